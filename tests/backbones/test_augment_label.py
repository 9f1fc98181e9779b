"""Networks that read EDM's augmentation label: zero changes nothing, the others do."""

from __future__ import annotations

import pytest
import torch

from mezzotint import backbones
from mezzotint.backbones.flops import count_macs
from mezzotint.models import create_model, load_model, preset_info, save_model, tensor_specs
from mezzotint.process.denoiser import Cond
from mezzotint.process.guidance import classifier_free, null_label

PIXELS = ["unet-tiny", "uvit-tiny", "sid2-tiny", "diffit-tiny", "dimr-tiny"]


def make(preset: str, augment_label: bool, seed: int = 0):
    torch.manual_seed(seed)
    return create_model(preset, augment_label=augment_label).eval()


def query(model, batch: int = 3):
    z = torch.randn(batch, 3, 32, 32, generator=torch.manual_seed(1))
    return z, torch.tensor([-3.0, 0.0, 3.0])[:batch], torch.arange(batch)


@torch.no_grad()
@pytest.mark.parametrize("preset", PIXELS)
def test_it_changes_no_network_at_initialisation_and_zero_never_does(preset):
    plain, model = make(preset, False), make(preset, True)
    z, logsnr, label = query(model)
    ours = dict(model.backbone.state_dict())
    added = ours.keys() - plain.backbone.state_dict().keys()
    assert added
    assert all(name.endswith("augment.weight") for name in added)
    assert all(torch.equal(ours[k], v) for k, v in plain.backbone.state_dict().items())
    some = torch.randn(3, 9)
    before = plain(z, logsnr, Cond(label=label)).x
    assert torch.equal(model(z, logsnr, Cond(label=label, augment=some)).x, before)
    # After training: zero and no label are the same, and another label is not.
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    outputs = [
        model(z, logsnr, Cond(label=label, augment=numbers)).x
        for numbers in (None, torch.zeros(3, 9), some)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("preset", PIXELS)
def test_its_weights_get_a_gradient_with_and_without_a_label(preset):
    model = make(preset, True).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    z, logsnr, label = query(model)
    for numbers in (None, torch.randn(3, 9)):
        model.zero_grad()
        outputs = model.raw(z, logsnr, Cond(label=label, augment=numbers))
        sum(out.square().sum() for out in outputs).backward()
        for name, parameter in model.named_parameters():
            if name.endswith("augment.weight"):
                assert parameter.grad is not None
                assert bool(parameter.grad.any()) == (numbers is not None)


def test_guidance_keeps_the_label_in_both_halves():
    model = make("unet-tiny", True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    z, logsnr, label = query(model)
    cond = Cond(label=label, augment=torch.randn(3, 9))
    with torch.no_grad():
        guided = classifier_free(model, null_label(10), lambda l: torch.full_like(l, 2.0))
        empty = Cond(label=torch.full_like(label, 10), augment=cond.augment)
        weak, strong = model(z, logsnr, empty).eps, model(z, logsnr, cond).eps
        torch.testing.assert_close(guided(z, logsnr, cond).eps, weak + 2 * (strong - weak))


@pytest.mark.parametrize("preset", ["unet-tiny", "dimr-tiny"])
def test_a_saved_model_keeps_it(preset, tmp_path):
    model = make(preset, True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model").eval()
    assert again.info.config.augment_label is True
    assert "augment_label: True" in (tmp_path / "model" / "README.md").read_text()
    z, logsnr, label = query(model)
    cond = Cond(label=label, augment=torch.randn(3, 9))
    with torch.no_grad():
        assert torch.equal(model(z, logsnr, cond).x, again(z, logsnr, cond).x)


@pytest.mark.parametrize("shape", [(3, 8), (2, 9), (9,)])
def test_a_label_of_another_shape_is_refused(shape):
    model = make("diffit-tiny", True)
    z, logsnr, label = query(model)
    with pytest.raises(Exception, match=r"augment|shape"):
        model.backbone(z, logsnr, Cond(label=label, augment=torch.zeros(shape)))


@pytest.mark.parametrize(
    ("preset", "added"), [("diffit-cifar10", 9 * 512), ("diffit-ffhq64", 9 * 512)]
)
def test_the_published_image_space_networks_have_it(preset, added):
    info = preset_info(preset)
    assert info.config.augment_label
    counts = [
        sum(
            torch.Size(spec.shape).numel()
            for spec in tensor_specs(
                info.backbone, preset_info(preset, augment_label=on).config
            ).values()
        )
        for on in (True, False)
    ]
    assert counts[0] - counts[1] == added


def test_it_costs_next_to_nothing():
    on, off = (count_macs(backbones.get_backbone(make("uvit-tiny", a))) for a in (True, False))
    assert 0 < on.computed - off.computed < 1e-4 * off.computed
