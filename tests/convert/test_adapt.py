"""Adapting a model to other classes, sizes and channels keeps the rest, for every family."""

from __future__ import annotations

import pytest
import torch

import mezzotint as mz
from mezzotint.convert.adapt import adapt, initialise_from

TINY = sorted(name for name in mz.presets() if "tiny" in name)
WITH_TRANSFORMS = {
    "unet dwt": ("unet-tiny", {"transform": "dwt", "patch": 2}),
    "uvit patches": ("uvit-tiny", {"transform": "conv", "patch": 2}),
    "diffit windows": ("diffit-latent-tiny", {"window": 4}),
    "dimr without null": ("dimr-tiny", {"null_label": False}),
    **{name: (name, {}) for name in TINY},
}


@pytest.fixture(params=WITH_TRANSFORMS)
def model(request):
    preset, overrides = WITH_TRANSFORMS[request.param]
    torch.manual_seed(0)
    model = mz.create_model(preset, **overrides).eval()
    for p in model.parameters():  # nothing may stay trivially zero
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape)
    return model


def inputs(model, channels=None, size=None):
    config = model.info.config
    generator = torch.Generator().manual_seed(1)
    size = size or config.size
    z = torch.randn(2, channels or config.channels, size, size, generator=generator)
    return z, torch.tensor([-1.0, 2.0])


def labels(*values):
    return mz.Cond(label=torch.tensor(values))


def valid(model):
    """A condition of two that the model takes: labels 3 and 4 where it has classes."""
    return labels(3, 4) if model.info.config.num_classes else mz.Cond()


def how(report):
    return {c.name: c.how for c in report if c.how != "kept"}


@torch.no_grad()
@pytest.mark.parametrize("classes", [13, 7])
def test_other_classes(model, classes):
    if not model.info.config.num_classes:
        pytest.skip("has no classes: see test_classes_for_an_unconditional_network")
    before = {k: t.clone() for k, t in model.backbone.state_dict().items()}
    adapted, report = adapt(model, num_classes=classes)
    adapted.eval()
    z, logsnr = inputs(model)
    null = mz.Cond() if getattr(model.info.config, "null_label", True) else labels(6, 1)
    for cond in (labels(0, 6), null):
        for a, b in zip(model.raw(z, logsnr, cond), adapted.raw(z, logsnr, cond), strict=True):
            assert torch.equal(a, b)
    assert list(how(report).values()) == ["extended" if classes > 10 else "cut"]
    assert adapted.info.config.num_classes == classes
    if classes > 10:
        adapted.raw(z, logsnr, labels(12, 10))
    assert all(torch.equal(t, before[k]) for k, t in model.backbone.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("preset", ["unet-tiny", "uvit-tiny", "sid2-tiny", "diffit-tiny"])
def test_classes_for_an_unconditional_network(preset):
    model = mz.create_model(preset, num_classes=0).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    adapted, report = adapt(model, num_classes=3)
    adapted.eval()
    z, logsnr = inputs(model)
    for cond in (mz.Cond(), labels(0, 2), labels(3, 1)):
        assert torch.equal(model.raw(z, logsnr, mz.Cond())[0], adapted.raw(z, logsnr, cond)[0])
    assert list(how(report).values()) == ["new"]


@torch.no_grad()
def test_more_channels(model):
    c = model.info.config.channels
    adapted, report = adapt(model, channels=c + 2)
    adapted.eval()
    z, logsnr = inputs(model, c + 2)
    theirs = model.raw(z[:, :c].contiguous(), logsnr, valid(model))
    for a, b in zip(theirs, adapted.raw(z, logsnr, valid(model)), strict=True):
        halves = a.shape[1] // c  # prediction, and variance where it is learned
        kept = b.unflatten(1, (halves, c + 2))[:, :, :c].flatten(1, 2)
        torch.testing.assert_close(kept, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert set(how(report).values()) == {"extended"}
    fewer, report = adapt(model, channels=1)
    assert set(how(report).values()) == {"cut"}
    z, logsnr = inputs(model, 1)
    assert fewer.eval()(z, logsnr, valid(model)).x.isfinite().all()


@torch.no_grad()
def test_another_resolution(model):
    size = 2 * model.info.config.size
    adapted, report = adapt(model, size=size)
    adapted.eval()
    assert adapted.info.config.size == size
    assert set(how(report).values()) <= {"interpolated"}
    z, logsnr = inputs(model, size=size)
    ours, theirs = (m.raw(z, logsnr, valid(model)) for m in (adapted, model))
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        if model.info.backbone == "dimr" or not how(report):
            # DiMR reads its own table in the same way beyond its native size, a U-Net has none
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@torch.no_grad()
def test_nothing_to_do_is_the_source(model):
    config = model.info.config
    same, report = adapt(
        model, num_classes=config.num_classes, size=config.size, channels=config.channels
    )
    assert not how(report)
    assert same.info == model.info
    state = same.backbone.state_dict()
    assert all(torch.equal(state[k], t) for k, t in model.backbone.state_dict().items())
    assert not {t.data_ptr() for t in state.values()} & {
        t.data_ptr() for t in model.backbone.state_dict().values()
    }


def test_tables_are_interpolated_where_they_should_be():
    torch.manual_seed(0)
    diffit = mz.create_model("diffit-latent-tiny")
    table = diffit.backbone.blocks[0].attn.bias_table
    side = 15  # 2 w - 1 with w = 8
    rows = torch.arange(side, dtype=torch.float32) - 7
    table.data = rows[:, None].expand(side, side).reshape(-1, 1).expand(-1, 4).clone()
    adapted, report = adapt(diffit, size=32)
    new = adapted.backbone.blocks[0].attn.bias_table.detach().view(31, 31, 4)
    # displacements -15 ... 15 take the place of -7 ... 7: ends stay ends, zero stays zero
    torch.testing.assert_close(new[:, 3, 1], torch.linspace(-7, 7, 31))
    assert how(report)["blocks.0.attn.bias_table"] == "interpolated"
    assert any("15x15 to 31x31" in str(c) for c in report)

    dimr = mz.create_model("dimr-tiny")
    ramp = torch.arange(8.0).repeat_interleave(8)[:, None].expand(64, 128).clone()
    dimr.backbone.branches[0].positions.data = ramp
    adapted, _ = adapt(dimr, size=64)
    new = adapted.backbone.branches[0].positions.detach().view(16, 16, 128)[:, 5, 7]
    torch.testing.assert_close(new, ((torch.arange(16) + 0.5) / 2 - 0.5).clamp(0, 7))


def test_several_at_once_and_the_report():
    model = mz.create_model("dimr-tiny")
    adapted, report = adapt(model, num_classes=3, size=64, channels=1)
    assert (
        adapted.info.config.num_classes,
        adapted.info.config.size,
        adapted.info.config.channels,
    ) == (3, 64, 1)
    assert {c.name for c in report} == set(adapted.backbone.state_dict())
    changed = how(report)
    assert changed["branches.0.classes"] == "cut"
    assert changed["branches.1.positions"] == "interpolated"
    assert changed["branches.2.head.weight"] == "cut"
    (line,) = (str(c) for c in report if c.name == "branches.0.classes")
    assert "(11, 128) -> (4, 128): the first 3 labels and the null label kept" in line
    adapted(torch.randn(1, 1, 64, 64), torch.zeros(1), mz.Cond()).x.sum().backward()


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="try 60 or 64"):
        adapt(mz.create_model("dimr-tiny"), size=62)


def test_start_from_fills_what_fits_and_tells_the_rest(tmp_path):
    source = mz.create_model("sid2-tiny", num_classes=4)
    mz.save_model(source, tmp_path / "model")
    fresh = mz.create_model("sid2-tiny", num_classes=4, size=64, transform="conv", patch=2)
    said: list[str] = []
    initialise_from(str(tmp_path), said.append)(fresh)
    mine, theirs = fresh.backbone.state_dict(), source.backbone.state_dict()
    same = [k for k in mine if k in theirs and mine[k].shape == theirs[k].shape]
    assert len(same) > 0.9 * len(mine)
    assert all(torch.equal(mine[k], theirs[k]) for k in same)
    assert len(said) > 1
    assert "started from" in said[0]


def test_start_from_another_backbone_is_refused(tmp_path):
    mz.save_model(mz.create_model("unet-tiny"), tmp_path / "model")
    with pytest.raises(ValueError, match="is a unet; a uvit cannot start from it"):
        initialise_from(str(tmp_path))(mz.create_model("uvit-tiny"))


@torch.no_grad()
@pytest.mark.parametrize(("side", "larger"), [(8, 16), (9, 15)])
def test_diffit_at_another_size_has_the_positions_that_it_had_there(side, larger):
    model = mz.create_model("diffit-latent-tiny", size=2 * side).eval()
    adapted, _ = adapt(model, size=2 * larger)
    torch.testing.assert_close(
        adapted.backbone.positions, model.backbone.positions_for((larger, larger))
    )


@torch.no_grad()
def test_positions_of_odd_grids_are_cells_too():
    dimr = mz.create_model("dimr-tiny", size=36, patches=(4, 2, 1))  # 9 x 9 tokens
    dimr.backbone.branches[0].positions.data = (
        torch.arange(9.0).repeat_interleave(9)[:, None].expand(81, 128).clone()
    )
    adapted, _ = adapt(dimr, size=60)
    new = adapted.backbone.branches[0].positions.view(15, 15, 128)[:, 5, 7]
    torch.testing.assert_close(new, ((torch.arange(15) + 0.5) * 9 / 15 - 0.5).clamp(0, 8))
