"""The contract of every registered backbone; a new file in backbones/ needs no edit here.

Each backbone runs in its `-tiny` preset, with its parameters moved off their initial values so that
nothing is zero by construction. Exceptions are listed by preset, each with its reason.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

import mezzotint.backbones as backbones
from helpers.tiny_models import READERS, create_tiny
from mezzotint.core.registry import build
from mezzotint.process import schedules
from mezzotint.process.denoiser import Cond

TINY = sorted([*(name for name in backbones.presets() if name.endswith("-tiny")), *READERS])
LABELLED = [name for name in TINY if "text" not in name]
STATE_KEYS = Path(__file__).resolve().parents[1] / "golden" / "state_keys"
LEVELS = (-4.0, 0.5, 3.0)

_DIMR = "DiMR's heads start at random; only its noise dependence starts at nothing"
NOT_ZERO_AT_START = {"dimr-tiny": _DIMR, "dimr-latent-tiny": _DIMR}
# (preset, regular expression of the parameter): reason. A listed parameter must have no gradient.
WITHOUT_GRADIENT: dict[tuple[str, str], str] = {}


def make(name, dtype=torch.float32, **overrides):
    """A tiny model in eval mode, every parameter moved by a little noise."""
    torch.manual_seed(0)
    model = create_tiny(name, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def query(model, batch=3, height=None, width=None, dtype=torch.float32, levels=LEVELS):
    """A state, one log-SNR per image and labels that the model's config allows."""
    c = model.info.config
    g = torch.Generator().manual_seed(1)
    z = torch.randn(
        batch, c.channels, height or c.size, width or c.size, dtype=torch.float64, generator=g
    ).to(dtype)
    logsnr = torch.tensor(levels, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)[:batch]
    label = torch.arange(batch) % c.num_classes if c.num_classes else None
    if not backbones.text_width(c):
        return z, logsnr, Cond(label=label)
    text = torch.randn(batch, 5, backbones.text_width(c), dtype=torch.float64, generator=g).to(
        dtype
    )
    return (
        z,
        logsnr,
        Cond(label=label, text=text, text_mask=torch.arange(5) < 2 + torch.arange(batch)[:, None]),
    )


def raw_channels(model):
    return model.info.config.channels * (2 if model.parameterisation.learned_variance else 1)


def close(a, b, tolerance):
    """Equal to `tolerance` of the largest magnitude."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


def test_every_backbone_has_a_tiny_preset():
    covered = {backbones.presets()[name][0] for name in TINY if name not in READERS}
    assert covered == set(backbones.registry)


@pytest.mark.parametrize("name", TINY)
def test_its_schedule_exists_and_falls(name):
    model = create_tiny(name)
    logsnr = build(schedules.registry, model.info.schedule)(torch.linspace(0.01, 0.99, 99))
    assert logsnr.isfinite().all()
    assert (logsnr.diff() <= 0).all()


@pytest.mark.parametrize("name", TINY)
def test_shapes_at_the_native_size(name):
    model = make(name)
    z, logsnr, cond = query(model)
    outputs = model.raw(z, logsnr, cond)
    assert outputs[-1].shape == (len(z), raw_channels(model), *z.shape[2:])
    sides = [out.shape[-1] for out in outputs]
    assert sides == sorted(sides)
    assert all(z.shape[-1] % side == 0 for side in sides)
    guess = model(z, logsnr, cond)
    assert guess.x.shape == guess.eps.shape == z.shape
    assert (guess.var is not None) == model.parameterisation.learned_variance
    for field in guess:
        assert field is None or field.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_built_for_twice_the_size(name):
    size = 2 * create_tiny(name).info.config.size
    model = make(name, size=size)
    z, logsnr, cond = query(model, batch=1)
    assert model.raw(z, logsnr, cond)[-1].shape[2:] == (size, size)


@pytest.mark.parametrize(("tall", "wide"), [(0.5, 1), (1, 0.5), (2, 2), (1, 2)])
@pytest.mark.parametrize("name", TINY)
def test_other_shapes(name, tall, wide):
    model = make(name)
    # DiffiT's sides are whole windows in its coarsest stage.
    size = max(model.info.config.size, 2 * getattr(model.info.config, "tile", 1))
    z, logsnr, cond = query(model, 1, int(tall * size), int(wide * size))
    out = model(z, logsnr, cond).x
    assert out.shape == z.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_indivisible_and_misfit_inputs_are_refused(name):
    model = make(name)
    size, channels = model.info.config.size, model.info.config.channels
    z, logsnr, cond = query(model, 1, size + 1, size)
    with pytest.raises(
        ValueError, match=rf"{size + 1}(.|\n)*{size}"
    ):  # what was given, and a valid size
        model(z, logsnr, cond)
    with pytest.raises(ValueError, match=f"{size + 1}"):
        create_tiny(name, size=size + 1)
    with pytest.raises(ValueError, match=rf"\b{channels + 1}\b"):
        model(torch.zeros(1, channels + 1, size, size), logsnr, cond)


@pytest.mark.parametrize("name", LABELLED)
def test_labels(name):
    model = make(name)
    classes = model.info.config.num_classes
    assert classes > 0, "a tiny preset is class-conditional"
    z, logsnr, cond = query(model)
    null = Cond(label=torch.full((len(z),), classes))
    with torch.no_grad():
        torch.testing.assert_close(model(z, logsnr, Cond()), model(z, logsnr, null), rtol=0, atol=0)
        assert not torch.equal(model(z, logsnr, cond).x, model(z, logsnr, null).x)
    for bad in (-1, classes + 1):
        with pytest.raises(ValueError, match=rf"\b{classes}\b"):
            model(z, logsnr, Cond(label=torch.full((len(z),), bad)))
    with pytest.raises(ValueError, match="label"):
        model(z, logsnr, Cond(label=torch.zeros(len(z) + 1, dtype=torch.long)))


@pytest.fixture
def untyped(monkeypatch):
    """Leave out the checks of types, which no user has."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integers(name, dtype):
    model = make(name)
    z, logsnr, cond = query(model)
    assert cond.label is not None
    narrow = Cond(label=cond.label.to(dtype))
    with torch.no_grad():
        torch.testing.assert_close(model(z, logsnr, narrow), model(z, logsnr, cond), rtol=0, atol=0)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_are_not_one_whole_number_per_image_are_refused(name, untyped):
    model = make(name)
    z, logsnr, _ = query(model)
    for label, words in [
        (torch.zeros(len(z)), "whole numbers"),
        (torch.zeros(len(z), dtype=torch.bool), "whole numbers"),
        (torch.tensor(0), "one per image"),
        (torch.zeros(len(z), 1, dtype=torch.long), "one per image"),
    ]:
        with pytest.raises(ValueError, match=words):
            model.backbone(z, logsnr, Cond(label=label))


@pytest.mark.parametrize("name", TINY)
def test_inputs_without_a_batch_and_a_wrong_number_of_levels_are_refused(name, untyped):
    model = make(name)
    z, logsnr, cond = query(model)
    with pytest.raises(ValueError, match=r"give a batch \(b, \d, height, width\)"):
        model.backbone(z[0], logsnr, cond)
    for levels in (logsnr[:1], torch.cat([logsnr, logsnr]), logsnr[0], logsnr[:, None]):
        with pytest.raises(ValueError, match=r"log-SNRs .* give one per image"):
            model(z, levels, cond)


@pytest.mark.parametrize("name", TINY)
def test_without_classes(name):
    model = make(name, num_classes=0)
    z, logsnr, cond = query(model)
    with torch.no_grad():
        assert model(z, logsnr, cond).x.isfinite().all()
    with pytest.raises(ValueError, match="label"):
        model(z, logsnr, Cond(label=torch.ones(len(z), dtype=torch.long)))


@pytest.mark.parametrize("name", TINY)
def test_text_is_read_where_the_config_has_a_width_and_refused_elsewhere(name):
    model = make(name)
    z, logsnr, cond = query(model)
    width = backbones.text_width(model.info.config)
    other = Cond(label=cond.label, text=torch.randn(len(z), 5, width or 16))
    with torch.no_grad():
        if width:
            assert not torch.equal(model(z, logsnr, other).x, model(z, logsnr, cond).x)
        else:
            with pytest.raises(ValueError, match="text"):
                model(z, logsnr, other)


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter(name):
    model = make(name)
    outputs = model.raw(*query(model))
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    for key, parameter in model.named_parameters():
        if any(preset == name and re.search(pattern, key) for preset, pattern in WITHOUT_GRADIENT):
            assert parameter.grad is None or not parameter.grad.any(), (
                f"{key} has a gradient after all"
            )
        elif parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", TINY)
def test_every_weight_has_a_gradient_of_the_finest_output(name):
    """Else DDP waits for it in vain, and a checkpoint lacks its optimiser's state."""
    model = make(name)
    z, logsnr, cond = query(model)
    denoised = model(z, logsnr, cond)
    (denoised.x.sum() + (0 if denoised.var is None else denoised.var.sum())).backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    with torch.no_grad():
        assert torch.equal(model.raw(z, logsnr, cond)[-1], model.finest(z, logsnr, cond))


@pytest.mark.parametrize("name", TINY)
def test_equal_and_mixed_levels_agree_and_images_are_independent(name):
    model = make(name, torch.float64)
    z, logsnr, cond = query(model, dtype=torch.float64)
    with torch.no_grad():
        together = model(z, logsnr, cond)
        for i in range(len(z)):
            common = model(z, logsnr[i].expand(len(z)), cond)
            alone = model(z[i : i + 1], logsnr[i : i + 1], cond[i : i + 1])
            for mixed, equal, single in zip(together, common, alone, strict=True):
                if mixed is not None:
                    close(equal[i], mixed[i], 1e-11)
                    close(single[0], mixed[i], 1e-11)
        assert not torch.allclose(model(z, logsnr + 1, cond).eps, together.eps), (
            "the level is not read"
        )


@pytest.mark.parametrize("name", TINY)
def test_precisions(name):
    with torch.no_grad():
        wide = make(name, torch.float64)
        exact = wide.raw(*query(wide, dtype=torch.float64))[-1]
        assert exact.dtype == torch.float64
        assert wide(*query(wide, dtype=torch.float64)).x.dtype == torch.float64
        middle = make(name)
        close(middle.raw(*query(middle))[-1].double(), exact, 1e-4)
        low = make(name, torch.bfloat16)
        out = low.raw(*query(low, dtype=torch.bfloat16))[-1]
        assert out.dtype == torch.bfloat16
        error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 0.1, f"bfloat16 is {error:.1%} away"
        assert low(*query(low, dtype=torch.bfloat16)).x.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            mixed = middle.raw(*query(middle))[-1]
        error = (mixed.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 0.1, f"autocast is {error:.1%} away"


@pytest.mark.parametrize("name", TINY)
def test_channels_last_changes_nothing(name):
    model = make(name, torch.float64)
    z, logsnr, cond = query(model, dtype=torch.float64)
    with torch.no_grad():
        plain = model(z, logsnr, cond).x
        model = model.to(memory_format=torch.channels_last)
        close(model(z.contiguous(memory_format=torch.channels_last), logsnr, cond).x, plain, 1e-11)


COMPILE = """
import json, sys, torch
from helpers.tiny_models import SMALL, create_tiny
from mezzotint.backbones import text_width
from mezzotint.process.denoiser import Cond

problems = {}
for name in sys.argv[1:]:
    torch.manual_seed(0)
    model = create_tiny(name, **SMALL.get(name, {})).eval()
    c = model.info.config
    z = torch.randn(2, c.channels, c.size, c.size)
    noise = model.parameterisation.noise(torch.tensor([-4.0, 3.0]))
    cond = Cond(label=torch.tensor([0, 1]))
    if width := text_width(c):
        mask = torch.tensor([[True, True, False], [True, False, False]])
        cond = Cond(text=torch.randn(2, 3, width), text_mask=mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        try:
            compiled = torch.compile(model.backbone, fullgraph=True, backend="eager")
            for a, b in zip(compiled(z, noise, cond), model.backbone(z, noise, cond), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"
    torch.compiler.reset()
print(json.dumps(problems))
"""


@pytest.fixture(scope="module")
def compile_problems():
    """Return preset -> error from another process, since shape checks wrap all functions here."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *TINY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TINY)
def test_one_graph_under_compile(name, compile_problems):
    assert name not in compile_problems, compile_problems[name]


@pytest.mark.parametrize("name", TINY)
def test_output_starts_at_zero(name):
    model = create_tiny(name)
    starts_at_zero = not any(out.any() for out in model.raw(*query(model)))
    assert starts_at_zero == (name not in NOT_ZERO_AT_START)


@pytest.mark.parametrize("name", TINY)
def test_state_keys_are_frozen(name):
    """Checkpoints depend on them: after a deliberate change, WRITE_STATE_KEYS=1 records them."""
    keys = {key: list(tensor.shape) for key, tensor in create_tiny(name).state_dict().items()}
    path = STATE_KEYS / f"{name}.json"
    if os.environ.get("WRITE_STATE_KEYS"):
        path.write_text(
            "{\n" + ",\n".join(f"  {json.dumps(k)}: {v}" for k, v in keys.items()) + "\n}\n"
        )
    assert path.exists(), f"{path} is absent; write it with WRITE_STATE_KEYS=1 and commit it"
    assert keys == json.loads(path.read_text())


def saved_bytes(model, inputs):
    """Return the bytes a forward keeps for its backward, parameters aside, and the gradients."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                storage,
            )  # held, so that no address comes twice
        return tensor

    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(out.square().mean() for out in model.raw(*inputs))
    loss.backward()
    return sum(size for size, _ in kept.values()), [
        parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad
    ]


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_saves_memory_and_changes_no_gradient(name):
    model = make(name).train()
    inputs = query(model)
    assert model.backbone.checkpointing == "none"
    plain, gradients = saved_bytes(model, inputs)
    for how in ("selective", "full"):
        model.backbone.checkpointing = how
        less, again = saved_bytes(model, inputs)
        assert how == "selective" or less < 0.6 * plain, f"{less} of {plain} bytes kept"
        for a, b in zip(again, gradients, strict=True):
            close(a, b, 1e-5)
