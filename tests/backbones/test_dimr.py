"""DiMR against numbers of an independent implementation, and against the plain network."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mezzotint as mz
from helpers.plain import plain_module
from mezzotint.backbones import presets
from mezzotint.backbones.dimr import DiMR, DiMRConfig
from mezzotint.backbones.kernels.depthwise import ResidualDepthwise
from mezzotint.convert.official import registry as officials
from mezzotint.convert.official.load import bitwise_equal, official_specs, to_official
from mezzotint.models import tensor_specs
from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.samplers.dpmpp_singlestep import dpmpp_singlestep
from mezzotint.process.samplers.grids import even
from mezzotint.process.schedules import scaled_linear

HEADS = {"mini2r": 2, "latent2r": 4, "norm_LN": 2}


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(params=HEADS)
def golden(request, shared):
    state = shared(f"golden/dimr/{request.param}.state.safetensors")
    model = mz.load_official(state, heads=HEADS[request.param])
    return model, load_file(shared(f"golden/dimr/{request.param}.io.safetensors")), load_file(state)


def targets(eps, outputs):
    """Specs section 5: block sums divided by the ratio."""
    ratios = [eps.shape[-1] // out.shape[-1] for out in outputs]
    return [r * F.avg_pool2d(eps, r) for r in ratios]


def loss(outputs, eps, coefficients):
    per_branch = [
        (o - t).pow(2).mean((1, 2, 3)) for o, t in zip(outputs, targets(eps, outputs), strict=True)
    ]
    return sum(c * b for c, b in zip(coefficients, per_branch, strict=True))


def test_outputs_of_all_branches(golden):
    model, io, _ = golden
    out = model.backbone(io["x"], io["log_snr"], Cond(label=io["y"]))
    same = model.backbone(io["x"], io["same.log_snr"], Cond(label=io["y"]))
    alone = model.backbone(io["x"][1:2], io["log_snr"][1:2], Cond(label=io["y"][1:2]))
    for i in range(len(out)):
        close(out[i], io[f"out{i}"])
        close(same[i], io[f"same.out{i}"])
        close(alone[i], io[f"b1.out{i}"])


def test_time_vectors(golden):
    model, io, _ = golden
    config = model.info.config
    names = [
        f"stages.{i}.{name}"
        for i in range(len(config.dims))
        for name, _ in officials_module().time_vectors(config, i)
    ]
    values = dict(zip(names, model.backbone.time(io["log_snr"] / 4), strict=True))
    recorded = {k.removeprefix("tdp."): v for k, v in io.items() if k.startswith("tdp.")}
    for name, value in recorded.items():
        close(values[name], value)


def officials_module():
    import mezzotint.convert.official.dimr as module

    return module


def test_activations(golden):
    model, io, _ = golden
    captured = {}

    def keep(name, module):
        def hook(_, inputs, out):
            residual = inputs[0] if isinstance(module, ResidualDepthwise) else 0
            captured.update({name: out - residual, f"{name}.in": inputs[0]})

        module.register_forward_hook(hook)

    for i, branch in enumerate(model.backbone.branches):
        for j, block in enumerate(branch.blocks):
            keep(f"stage{i}.block{j}.out", block)
            keep(
                f"stage{i}.block{j}.block1",
                block.attention if branch.transformer else block.depthwise,
            )
            keep(f"stage{i}.block{j}.block2", block.mlp)
            keep(f"stage{i}.block{j}.block2.norm", block.mlp.norm)
        if branch.cascade is not None:
            keep(f"stage{i}.upsample", branch.cascade)
        branch.register_forward_hook(
            lambda _, inputs, out, i=i: captured.update(
                {
                    f"stage{i}.skips_concat": torch.cat(out[0], -1),
                    f"stage{i}.input_layer": _.embed(inputs[0]),
                }
            )
        )
    model.backbone(io["x"], io["log_snr"], Cond(label=io["y"]))
    recorded = {k.removeprefix("cap."): v for k, v in io.items() if k.startswith("cap.")}
    for name, value in recorded.items():
        if name == "stage1.upsample.norm_in":  # never formed: the concatenation after its norm
            continue
        close(captured[name][:1], value)


def test_loss_and_gradients(golden):
    model, io, _ = golden
    outputs = model.backbone(io["loss.xn"], 8 * io["loss.n"] / 1000 - 4, Cond(label=io["y"]))
    for i, target in enumerate(targets(io["loss.eps"], outputs)):
        close(outputs[i], io[f"loss.pred{i}"])
        close(target, io[f"loss.target{i}"])
    per_image = loss(outputs, io["loss.eps"], io["loss.coeffs"].tolist())
    close(per_image, io["loss.per_sample"])
    per_image.mean().backward()
    for own in model.backbone.parameters():
        own.data = own.grad  # gradients travel the same map as weights
    gradients = to_official(model)
    recorded = {k.removeprefix("grad."): v for k, v in io.items() if k.startswith("grad.")}
    for name, value in recorded.items():
        close(gradients[name], value, 1e-4)
    total = sum(g.double().pow(2).sum() for g in gradients.values())
    assert math.isclose(total, io["grad_norm_sq"], rel_tol=1e-4)


def test_three_optimiser_steps_with_ema(shared):
    model = mz.load_official(shared("golden/dimr/latent2r.state.safetensors"), heads=4)
    steps = load_file(shared("golden/dimr/latent2r.trainsteps.safetensors"))
    exempt = model.backbone.no_decay_parameters()
    named = dict(model.backbone.named_parameters())
    assert exempt < set(named)
    groups = [
        {"params": [p for n, p in named.items() if n not in exempt], "weight_decay": 3.0},
        {"params": [named[n] for n in sorted(exempt)], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=2e-3, betas=(0.99, 0.99))
    ema = {n: p.detach().clone() for n, p in named.items()}
    for i, lr in enumerate(steps["lr"].tolist()):
        for group in optimiser.param_groups:
            group["lr"] = lr
        record = {
            k.removeprefix(f"step{i}."): v for k, v in steps.items() if k.startswith(f"step{i}.")
        }
        outputs = model.backbone(record["xn"], 8 * record["n"] / 1000 - 4, Cond(label=record["y"]))
        per_image = loss(outputs, record["eps"], [0.25, 1.0])
        close(per_image, record["loss"], 1e-4)
        optimiser.zero_grad()
        per_image.mean().backward()
        optimiser.step()
        for n, p in named.items():
            ema[n].lerp_(p.detach(), 1 - 0.9)
    final = to_official(model)
    model.backbone.load_state_dict(ema)
    averaged = to_official(model)
    for name in final:
        # Adam divides by the root of squared gradients: their rounding shows in the step.
        torch.testing.assert_close(final[name], steps[f"final.{name}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(averaged[name], steps[f"ema.{name}"], rtol=1e-4, atol=1e-5)


def guided(model, scale):
    """Spec 6.2: eps = eps_u + (1 + s)(eps_c - eps_u); `scale` maps the noise level to 1 + s."""

    def denoise(z, logsnr, cond):
        null = Cond(label=torch.full_like(cond.label, model.info.config.num_classes))
        c, u = model.raw(z, logsnr, cond)[-1], model.raw(z, logsnr, null)[-1]
        w = scale(float(model.parameterisation.noise(logsnr[:1])))
        return model.interpret(z, u + w * (c - u), logsnr)

    return denoise


def power_cosine(noise):
    n = (noise + 4) / 8
    return 1 + 0.5 * (1 - math.cos(math.pi * (1 - n) ** 2))


@torch.no_grad()
def test_guided_noise_and_sampler_runs(shared):
    model = mz.load_official(shared("golden/dimr/latent2r.state.safetensors"), heads=4)
    run = load_file(shared("golden/dimr/latent2r.sampler.safetensors"))
    cond, z, table = Cond(label=run["y"]), run["z"], scaled_linear()
    scales = {"const0.4": lambda noise: 1.4, "decay2.0_p2.0": power_cosine}
    level = table.interpolated(torch.full((2,), 0.3, dtype=torch.float64))  # n = 300
    for name, scale in scales.items():
        close(guided(model, scale)(z, level, cond).eps, run[f"eps.{name}"])
    for name in ("uncfg10", "uncfg11", "uncfg12", "const0.4_10", "decay2.0_p2.0_10"):
        calls = []
        denoise = guided(model, scales[name[:-3]]) if name[:-3] in scales else model

        def counted(z, logsnr, cond, denoise=denoise, calls=calls) -> Denoised:
            calls.append(float(model.parameterisation.noise(logsnr[:1])))
            return denoise(z, logsnr, cond)

        steps = int(name[-2:])
        out = dpmpp_singlestep(counted, z, even(table, steps, end=1e-3, clean=False), cond)
        recorded = run[f"{name}.log_snr_calls"].unique_consecutive()
        assert torch.allclose(torch.tensor(calls), recorded, atol=2e-5)
        close(out, run[f"{name}.out"], 2e-5)


def test_published_keys_and_shapes(shared):
    recorded = json.loads(shared("golden/dimr/full_keys.json").read_text())
    assert recorded
    for name in recorded:
        size, branches = name.removesuffix("(inferred)").removeprefix("DiMR-").lower().split("/")
        (preset,) = (p for p in PARAMETERS if p.startswith(f"dimr-{size}-{branches}-"))
        expected = {key: tuple(shape) for key, shape in recorded[name].items()}
        config = presets()[preset][1].config
        # The 64-pixel models are listed with ImageNet's 1000 rows and no null label.
        config = replace(config, null_label=expected["stages.0.class_embeds.weight"][0] == 1001)
        own = tensor_specs("dimr", config)
        assert {
            k: c.shape for k, c in official_specs(officials["dimr"], config, own).items()
        } == expected
        assert officials["dimr"].config(expected, heads=config.heads) == config


def test_state_dict_goes_back_bitwise(golden):
    model, _, state = golden
    back = to_official(model)
    assert back.keys() == state.keys()
    assert all(bitwise_equal(back[k], state[k]) for k in state)


BASE = DiMRConfig(
    size=16, channels=3, num_classes=6, heads=3,
    patches=(4, 2, 1), dims=(24, 16, 8), hidden_dims=(40, 24, 16), depths=(5, 3, 3),
)  # fmt: skip
VARIANTS = {
    "3r": BASE,
    "LN": replace(BASE, norm="LN", null_label=False),
    "RMSN": replace(BASE, norm="RMSN", kernel_size=5),
    "ADARMSN": replace(BASE, norm="ADARMSN"),
    "one branch": replace(
        BASE, patches=(1,), dims=(24,), hidden_dims=(48,), depths=(5,), stages=("transformer",)
    ),
    "latent, convnext first": replace(
        BASE,
        channels=4,
        num_classes=0,
        null_label=False,
        time="scaled_linear",
        stages=("convnext",) * 3,
    ),
    "ratio 4, two transformers": replace(
        BASE,
        channels=1,
        patches=(4, 1),
        dims=(24, 12),
        hidden_dims=(30, 20),
        depths=(11, 1),
        stages=("transformer",) * 2,
    ),
}


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return module


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_plain_network(name, checkpointing):
    config = VARIANTS[name]
    plain = randomised(plain_module("dimr").PlainDiMR(config))
    state = plain.state_dict()
    model = mz.load_official(
        state, heads=config.heads, null_label=config.null_label, time=config.time
    )
    assert model.info.config == config
    model.backbone.checkpointing = checkpointing
    generator = torch.Generator().manual_seed(1)
    label = torch.tensor([1, 5, 0]) if config.num_classes else None
    # 16 x 12: not square, inside the position table
    z = torch.randn(3, config.channels, 16, 12, generator=generator)
    cotangents = None
    for noise in (torch.tensor([-3.5, 0.3, 3.9]), torch.full((3,), 1.7)):
        theirs, ours = plain(z, noise, label), model.backbone(z, noise, Cond(label=label))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-4 if config.norm == "ADARMSN" else 1e-5)
        cotangents = [torch.randn(out.shape, generator=generator) for out in theirs]
        sum((out * g).sum() for out, g in zip(ours, cotangents, strict=True)).backward()
        sum((out * g).sum() for out, g in zip(theirs, cotangents, strict=True)).backward()
    theirs = {n: p.grad for n, p in plain.named_parameters()}
    for own in model.backbone.parameters():
        own.data = own.grad
    ours = to_official(model)
    for key, gradient in theirs.items():
        close(ours[key], gradient, 1e-3 if config.norm == "ADARMSN" else 1e-4)


def test_float64_matches_float32_and_halves_run():
    backbone = randomised(DiMR(BASE))
    z, noise, cond = (
        torch.randn(2, 3, 16, 16),
        torch.tensor([-1.0, 2.0]),
        Cond(label=torch.tensor([0, 3])),
    )
    single = backbone(z, noise, cond)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = backbone(z, noise, cond)
    double = backbone.double()(z.double(), noise.double(), cond)
    half = backbone.bfloat16()(z.bfloat16(), noise, cond)
    assert half[-1].dtype == torch.bfloat16
    for a, b, c, d in zip(single, double, mixed, half, strict=True):
        assert b.dtype == torch.float64
        close(a.double(), b)
        close(c.double(), b, 0.1)
        close(d.double(), b, 0.1)


def test_output_starts_constant_in_time():
    backbone = DiMR(BASE)
    z = torch.randn(2, 3, 16, 16)
    low, high = (backbone(z, torch.full((2,), noise), Cond()) for noise in (-4.0, 4.0))
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


def test_classes_reach_every_norm():
    """They add to the time-dependent vectors by a map that starts at zero, in every branch."""
    torch.manual_seed(0)
    backbone = DiMR(replace(BASE, class_dim=8))
    state = backbone.state_dict()
    own = {key: state.pop(key) for key in ("time.classes.weight", "time.class_vectors.weight")}
    published = DiMR(BASE)
    published.load_state_dict(state)
    z, noise, label = torch.randn(3, 3, 16, 16), torch.tensor([-3.0, 0.0, 2.0]), torch.arange(3)
    for cond in (Cond(), Cond(label=label)):
        same = zip(backbone(z, noise, cond), published(z, noise, cond), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    weight = torch.randn(own["time.class_vectors.weight"].shape)
    backbone.time.class_vectors.weight.data = weight
    vectors = torch.cat(backbone.time(noise / 4, label), dim=1)
    plain = torch.cat(published.time(noise / 4), dim=1)
    table = own["time.classes.weight"]
    torch.testing.assert_close(vectors, plain + table[label] @ weight.T)
    # no label is the row after the classes
    with torch.no_grad():
        null = backbone(z, noise, Cond(label=torch.full((3,), BASE.num_classes)))
        for a, b in zip(backbone(z, noise, Cond()), null, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(backbone(z, noise, Cond(label=label)), null, strict=True):
            assert (a - b).abs().amax((1, 2, 3)).min() > 1e-3
    assert set(own) & backbone.no_decay_parameters() == set()
    assert table.std() < 0.03


@pytest.mark.parametrize("stages", [BASE.stages, ("convnext",) * 3])
def test_a_network_without_classes_embeds_none_in_its_norms(stages):
    config = replace(BASE, num_classes=0, stages=stages)
    state = DiMR(replace(config, class_dim=8)).state_dict()
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in DiMR(config).state_dict().items()
    }


def test_positions_beyond_the_table_are_interpolated():
    branch = DiMR(BASE).branches[2]
    table = branch.positions.detach().view(16, 16, -1)
    assert torch.equal(branch.position(3, 16), table[:3])
    assert branch.position(32, 2).shape == (32, 2, 8)
    # bilinear, corners not aligned: a ramp over the rows stays one, away from its ends
    branch.positions.data = torch.arange(16.0).repeat_interleave(16)[:, None].expand(256, 8).clone()
    ramp = (torch.arange(32) + 0.5) / 2 - 0.5
    assert torch.allclose(branch.position(32, 16)[4:-4, 0, 0], ramp[4:-4], atol=1e-5)
    outputs = DiMR(BASE)(torch.randn(1, 3, 32, 24), torch.zeros(1), Cond())
    assert [tuple(o.shape) for o in outputs] == [(1, 3, 8, 6), (1, 3, 16, 12), (1, 3, 32, 24)]


def test_noise_level_is_the_published_one():
    latent, pixels, own = (
        mz.create_model("dimr-tiny", time=time) for time in ("scaled_linear", "linear_vp", "cosine")
    )
    n = torch.arange(1, 1001, dtype=torch.float64)
    told = latent.parameterisation.noise(scaled_linear()(n / 1000))
    assert torch.allclose(told, 8 * n / 1000 - 4, atol=1e-12)
    assert torch.equal(
        latent.parameterisation.noise(torch.tensor([50.0, -50.0])),
        torch.tensor([8 / 1000 - 4, 4.0]),
    )
    # variance-preserving SDE, beta 0.1 to 20: alpha^2 at t = 1/2 is exp(-(0.05 + 19.9 / 8))
    middle = -math.log(math.expm1(0.05 + 19.9 / 8))
    assert math.isclose(
        float(pixels.parameterisation.noise(torch.tensor([middle]))), 0.0, abs_tol=1e-6
    )
    assert latent.info.schedule.name == "scaled_linear"
    assert pixels.info.schedule.name == "linear_vp"
    assert own.info.schedule.name == "cosine"
    levels = torch.linspace(-12, 20, 9)
    assert torch.equal(own.parameterisation.noise(levels), pixels.parameterisation.noise(levels))


PARAMETERS = {
    "dimr-xl-2r-256": (505_046_408, 160.18),
    "dimr-g-2r-256": (1_056_352_904, 331.10),
    "dimr-xl-3r-512": (525_027_372, 206.07),
    "dimr-m-3r-64": (132_828_681, 53.53),
    "dimr-l-3r-64": (284_138_505, 110.60),
}


# Of each number of resolutions one is enough for every change.
OTHERS = ("dimr-g-2r-256", "dimr-xl-3r-512", "dimr-l-3r-64")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in OTHERS)) for n in PARAMETERS]
)
def test_parameters_and_gmac(name):
    from torch.utils.flop_counter import FlopCounterMode

    config = presets()[name][1].config
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        backbone = DiMR(config)
        backbone(torch.empty(1, config.channels, config.size, config.size), torch.empty(1), Cond())
    parameters, gmac = PARAMETERS[name]
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 2) == gmac


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 18}, "multiple of the coarsest patch 4; try 16 or 20"),
        ({"heads": 5}, "heads 5 .* width 24"),
        ({"patches": (4, 3, 1)}, "multiple of the next"),
        ({"dims": (24, 16)}, "one entry per branch"),
        ({"depths": (5, 4, 3)}, "must be odd"),
        ({"norm": "TDLN"}, "unknown norm 'TDLN'"),
        ({"stages": ("convnext",) * 3}, "num_classes must be 0"),
        ({"num_classes": 0, "null_label": False}, "null_label=True"),
        ({"kernel_size": 4}, "odd"),
        ({"time": "edm"}, "scaled_linear, linear_vp or cosine"),
    ],
)
def test_config_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(BASE, **changes)


def test_input_errors():
    backbone, noise = DiMR(replace(BASE, null_label=False)), torch.zeros(1)
    for shape, cond, words in [
        ((1, 3, 18, 16), Cond(label=torch.tensor([0])), "nearest: 16x16"),
        ((1, 4, 16, 16), Cond(label=torch.tensor([0])), "network of 3"),
        ((1, 3, 16, 16), Cond(), "no null label"),
        ((1, 3, 16, 16), Cond(label=torch.tensor([6])), r"0\.\.\.5 are classes$"),
        ((1, 3, 16, 16), Cond(text=torch.zeros(1, 2, 3)), "not text"),
    ]:
        with pytest.raises(ValueError, match=words):
            backbone(torch.zeros(shape), noise, cond)


def test_every_norm_with_every_stage_has_finite_gradients():
    for norm, stages in itertools.product(
        ("LN", "TDRMSN", "RMSN", "ADARMSN"), (("transformer",), ("convnext",))
    ):
        classes = 6 if stages == ("transformer",) else 0
        backbone = DiMR(
            replace(
                BASE, norm=norm, stages=stages, patches=(2,), dims=(24,), hidden_dims=(48,),
                depths=(3,), num_classes=classes, null_label=bool(classes),
            )
        )  # fmt: skip
        backbone(torch.randn(2, 3, 16, 16), torch.zeros(2), Cond())[0].pow(2).mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
