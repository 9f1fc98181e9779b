"""The network as samplers call it: weights cast once, compiled, the default dtype."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mezzotint as mz
from helpers.tiny_models import tiny
from mezzotint.backbones import dummy_condition, text_width
from mezzotint.backbones.precision import product_parameters, share_weights
from mezzotint.models import preset_info
from mezzotint.process.denoiser import Cond
from mezzotint.sampling import denoisers
from mezzotint.sampling.denoisers import autocast_denoiser, model_denoiser, padded_to_seen
from mezzotint.sampling.settings import SamplingSettings, resolve_dtype

TINY = ["unet", "uvit", "sid2", "dimr", "jit", "diffit", "uvit-text", "diffit-latent",
        "dimr-latent"]  # fmt: skip


def perturbed(preset: str) -> mz.Model:
    """Return a tiny preset with no weight left at its initial zero or one."""
    torch.manual_seed(0)
    size = {} if "latent" in preset or "text" in preset else {"size": 16}
    model = mz.create_model(f"{preset}-tiny", **size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def inputs(model: mz.Model, count: int = 2):
    config = model.info.config
    torch.manual_seed(1)
    z = torch.randn(count, config.channels, config.size, config.size)
    cond = dummy_condition(config, z)
    if config.num_classes:
        cond = Cond(label=torch.arange(count))
    if width := text_width(config):
        cond = Cond(text=torch.randn(count, 5, width), text_mask=torch.arange(5).expand(2, 5) < 4)
    return z, torch.linspace(-3, 3, count).double(), cond


def test_every_family_is_here():
    families = {preset_info(f"{name}-tiny").backbone for name in TINY}
    assert families == set(mz.backbones.registry)


@pytest.mark.parametrize("preset", TINY)
def test_weights_cast_once_give_what_autocast_gives(preset):
    model = perturbed(preset)
    before = copy.deepcopy(model.state_dict())
    z, logsnr, cond = inputs(model)
    with torch.no_grad():
        plain = model(z, logsnr, cond)
        expected = autocast_denoiser(model, torch.bfloat16)(z, logsnr, cond)
        made = model_denoiser(model, SamplingSettings(dtype="bfloat16", exact=False))(
            z, logsnr, cond
        )
    assert torch.equal(made.x, expected.x)
    assert torch.equal(made.eps, expected.eps)
    assert made.x.dtype == torch.float32
    # They are bfloat16's, and the model itself is as it was.
    error = (made.x - plain.x).norm() / plain.x.norm()
    assert 0 < error < 0.05
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("preset", TINY)
def test_products_are_cast_and_all_else_is_shared(preset):
    model = perturbed(preset)
    cast = share_weights(model, torch.bfloat16)
    products = product_parameters(model.backbone)
    own = dict(model.backbone.named_parameters())
    for name, weight in cast.backbone.named_parameters():
        if name in products:
            assert weight.dtype == torch.bfloat16, name
            assert torch.equal(weight, own[name].to(torch.bfloat16))
        else:
            assert weight is own[name], name
    kept = {name for name in own if name not in products}
    assert sum(own[n].numel() for n in products) > 0.7 * sum(p.numel() for p in own.values())
    parts = ("norm", "position", "time.p", "time.w", "time.b", "label.weight", "bias_table",
             "gain", "classes", "table", "project.bias", "attn.qkv.bias")  # fmt: skip
    assert all(any(part in name for part in parts) for name in kept), kept


def test_a_shared_model_follows_the_weights_that_are_not_cast():
    model = perturbed("unet")
    shared = share_weights(model)
    assert {id(p) for p in shared.parameters()} == {id(p) for p in model.parameters()}
    assert all(a is not b for a, b in zip(shared.modules(), model.modules(), strict=True))


class WeightCasts(TorchDispatchMode):
    """Collects the names of the weights that are cast while it is active."""

    def __init__(self, *models):
        super().__init__()
        self.names: set[str] = set()
        self.storages = {
            p.untyped_storage().data_ptr(): name for m in models for name, p in m.named_parameters()
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.names.add(self.storages.get(args[0].untyped_storage().data_ptr(), ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", TINY)
def test_no_weight_of_a_product_is_cast_while_sampling(preset):
    model = perturbed(preset)
    cast = share_weights(model, torch.bfloat16)
    z, logsnr, cond = inputs(model)
    found = []
    for each in (model, cast):
        with torch.no_grad(), WeightCasts(model, cast) as casts:
            autocast_denoiser(each, torch.bfloat16)(z, logsnr, cond)
        found.append(casts.names - {""})
    products = {f"backbone.{name}" for name in product_parameters(model.backbone)}
    assert len(found[0] & products) > 0.8 * len(products)
    assert not found[1] & products


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [("cpu", True, "float32"), ("cuda", True, "bfloat16"), ("cuda", False, "float32")],
)
def test_auto_is_bfloat16_on_a_gpu_that_has_it(device, native, expected, monkeypatch):
    def supported(including_emulation):
        assert not including_emulation
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert SamplingSettings().dtype == "auto"
    assert resolve_dtype("auto", torch.device(device)) == expected
    assert resolve_dtype("float16", torch.device(device)) == "float16"


def test_a_compiled_network_is_a_copy_and_no_last_batch_compiles_it_again(monkeypatch):
    compiled = []
    monkeypatch.setattr(denoisers, "compile_blocks", compiled.append)
    model = tiny()
    denoise = model_denoiser(model, SamplingSettings(compile=True, exact=False))
    assert len(compiled) == 1
    assert compiled[0] is not model.backbone
    rows: list[int] = []
    compiled[0].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    for size in (4, 8, 3, 1, 5, 9):
        z, cond = torch.randn(size, 3, 8, 8), Cond(label=torch.arange(size))
        with torch.no_grad():
            made = denoise(z, torch.linspace(-2, 2, size), cond)
            expected = model(z, torch.linspace(-2, 2, size), cond)
        torch.testing.assert_close(made.x, expected.x)
        torch.testing.assert_close(made.eps, expected.eps)
    assert rows == [4, 8, 4, 4, 8, 9]


def test_padding_keeps_a_learned_variance():
    def denoise(z, logsnr, cond):
        return mz.Denoised(z, 2 * z, 3 * z)

    padded = padded_to_seen(denoise)
    z = torch.randn(4, 1, 2, 2)
    padded(z, torch.zeros(4), Cond())
    made = padded(z[:3], torch.zeros(3), Cond())
    assert all(torch.equal(a, k * z[:3]) for k, a in enumerate(made, start=1))
