"""JiT against numbers of the authors' code, and what the paper states."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mezzotint as mz
from mezzotint.backbones import get_backbone
from mezzotint.backbones.diffit import sincos_positions
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.backbones.jit import JiT, JiTConfig, flow_time, rotary_table, rotate
from mezzotint.models import meta_model, preset_info
from mezzotint.process import guidance
from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.logsnr import widest_float
from mezzotint.process.objectives.clamped_flow import clamped_flow
from mezzotint.process.samplers.flow_heun import flow, flow_heun
from mezzotint.process.samplers.heun import heun
from mezzotint.process.schedules.lognormal import lognormal

# Official names of the recorded gradients -> ours.
GRADIENTS = {
    "blocks.1.attn.qkv.weight": "blocks.1.qkv.weight",
    "final_layer.linear.weight": "head.weight",
    "in_context_posemb": "context_positions",
    "x_embedder.proj1.weight": "patch.0.weight",
    "y_embedder.embedding_table.weight": "label.weight",
}


SCHEDULE = lognormal()  # the grid does not depend on it


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(params=["A_in32_p8", "B_in64_p16"])
def recorded(request, shared):
    """Return the recorded config, tensors, and the model loaded from the recorded weights."""
    path = shared(f"golden/jit/{request.param}.safetensors")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    state = {k.removeprefix("sd/"): t for k, t in tensors.items() if k.startswith("sd/")}
    model = mz.load_official(
        state, "jit", context_start=config["context_start"], noise_scale=config["noise_scale"]
    )
    return config, tensors, model


def test_sizes_come_from_shapes(recorded):
    config, _, model = recorded
    ours = model.info.config
    for name in ("size", "patch", "width", "depth", "heads", "bottleneck", "context_tokens"):
        assert getattr(ours, name) == config[name], name
    assert ours.num_classes == config["num_classes"]


def test_outputs_are_the_authors(recorded):
    _, t, model = recorded
    with torch.no_grad():
        out = model.backbone.eval()(t["in/z"], t["in/t"], Cond(label=t["in/y"]))[0]
    assert relative_error(out, t["out/x"]) < 1e-5


def test_loss_and_gradients_are_the_authors(recorded):
    config, t, model = recorded
    model.eval().requires_grad_(True).zero_grad()
    s, time = config["noise_scale"], t["in/t"].double()
    logsnr = 2 * torch.log(time / ((1 - time) * s))
    loss = clamped_flow(clamp=config["t_eps"])
    losses = loss(model, t["in/x"], t["in/e"] / s, logsnr, Cond(label=t["in/y"]))
    assert relative_error(losses.detach().float(), t["out/loss"]) < 1e-5
    losses.mean().backward()
    ours = dict(model.backbone.named_parameters())
    for theirs, name in GRADIENTS.items():
        assert relative_error(ours[name].grad, t[f"grad/{theirs}"]) < 1e-5, name


def test_samples_are_the_authors(recorded):
    config, t, model = recorded
    s, (low, high) = config["noise_scale"], config["interval"]
    scale = guidance.dit_s(config["cfg"])
    assert high == 1
    if low > 0:  # strictly above: the grid has a point there
        scale = guidance.interval(scale, 2 * math.log(low / ((1 - low) * s)) + 1e-6, 100.0)
    denoise = guidance.classifier_free(
        model.eval(), guidance.null_label(config["num_classes"]), scale
    )
    grid = flow(SCHEDULE, config["steps"], noise_scale=s)
    label = Cond(label=t["sample/y"])
    with torch.no_grad():
        images = flow_heun(
            denoise, t["sample/z0"] / s, grid, label, noise_scale=s, clamp=config["t_eps"]
        )
    assert relative_error(images, t["sample/out"]) < 1e-4


# specs/jit.md section 3: parameters in millions, GMAC with attention, tensors of the state dict.
COUNTS = {
    "jit-b-256": (131.320, 25.223, 183),
    "jit-l-256": (459.140, 87.944, 351),
    "jit-h-256": (952.842, 181.946, 463),
    "jit-g-256": (2007.556, 383.743, 575),
    "jit-b-512": (133.387, 25.751, 183),
    "jit-l-512": (461.796, 88.624, 351),
    "jit-b-1024": (141.654, 27.865, 183),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_papers(name):
    params, gmac, tensors = COUNTS[name]
    model = meta_model(preset_info(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=6e-4)
    assert count_macs(get_backbone(model)).published / GIGA == pytest.approx(gmac, abs=6e-4)
    assert len(get_backbone(model).state_dict()) == tensors


def test_the_positions_alone_are_not_trained():
    frozen = [n for n, p in JiT(small()).named_parameters() if not p.requires_grad]
    assert frozen == ["positions"]


def small(**changes):
    fields = {"size": 16, "num_classes": 3, "patch": 4, "width": 32, "depth": 4, "heads": 2}
    fields |= {"bottleneck": 8, "context_tokens": 3, "context_start": 1}
    return JiTConfig(**{**fields, **changes})


def random_network(**changes):
    torch.manual_seed(0)
    net = JiT(small(**changes))
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("s", [1.0, 2.0, 4.0])
def test_the_process_is_the_papers(s):
    """z = t x + (1 - t) e with e of deviation s is the scaled unit-variance state; noise is t."""
    model = mz.create_model("jit-tiny", noise_scale=s)
    t = torch.tensor([1e-9, 0.1, 0.5, 0.95, 1 - 1e-6], dtype=torch.float64)
    logsnr = 2 * torch.log(t / ((1 - t) * s))
    assert torch.allclose(model.parameterisation.noise(logsnr), t, rtol=1e-9, atol=0)
    x, eps = torch.randn(2, 5, dtype=torch.float64)
    z = torch.sigmoid(logsnr).sqrt() * x + torch.sigmoid(-logsnr).sqrt() * eps
    theirs = t * x + (1 - t) * s * eps
    assert torch.allclose(model.parameterisation.scale(logsnr) * z, theirs, rtol=1e-9)
    spec = model.info.schedule
    assert (spec.name, spec.options["std"]) == ("lognormal", 0.8)
    median = flow_time(torch.tensor(-2 * spec.options["mean"]), s)
    assert median.item() == pytest.approx(1 / (1 + math.exp(0.8)))


@pytest.mark.parametrize(("s", "levels"), [(1.0, 2.2), (2.0, 4.4)])
def test_the_clamp_leaves_the_published_noise(s, levels):
    """Section 2: a perfect denoiser of one image ends 0.017136 (s e - x) away from it."""
    x = torch.full((1, 3, 4, 4), 0.25, dtype=torch.float64)
    z = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def perfect(state, logsnr, cond):
        return Denoised(x, x)

    grid = flow(SCHEDULE, 50, noise_scale=s)
    left = flow_heun(perfect, z, grid, Cond(), noise_scale=s) - x
    assert torch.allclose(left, 0.017136 * (s * z - x), rtol=1e-4, atol=1e-7)
    assert 127.5 * 0.017136 * s == pytest.approx(levels, abs=0.05)
    exact = flow_heun(perfect, z, grid, Cond(), noise_scale=s, clamp=0.0)
    assert torch.allclose(exact, x, atol=1e-12)


def test_heun_has_second_order_in_t():
    """Gaussian data of deviation 0.5: the exact flow keeps z / deviation of z."""
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def denoise(state, logsnr, cond):
        # E[x | z] = alpha d^2 / (alpha^2 d^2 + sigma^2) z
        a, v = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr)
        x = (a * 0.25 / (a**2 * 0.25 + v)).view(-1, 1, 1, 1) * state
        return Denoised(x, x)

    errors = [
        abs(float(flow_heun(denoise, z, flow(SCHEDULE, n), Cond(), clamp=0.0)) - 0.5)
        for n in (20, 40, 80)
    ]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3
    assert errors[2] < 1e-3


def test_sampler_differs_from_edms_heun():
    """It averages v where EDM averages eps."""
    model = mz.Model(random_network().eval(), mz.create_model("jit-tiny").parameterisation)
    z, grid = torch.randn(1, 3, 16, 16), flow(SCHEDULE, 6)
    with torch.no_grad():
        ours = flow_heun(model, z, grid, Cond(), clamp=0.0)
        edm = heun(model, z, grid, Cond())
    assert relative_error(ours, edm) > 1e-3


def test_rotary_positions_depend_on_differences_alone():
    cosine, sine = rotary_table(4, 4, 4, 8)
    q, k = torch.randn(2, 8).unbind(0)

    def product(a, b):
        at = [4 * row + column for row, column in (a, b)]
        return float(rotate(q, cosine[at[0]], sine[at[0]]) @ rotate(k, cosine[at[1]], sine[at[1]]))

    assert product((0, 1), (2, 3)) == pytest.approx(product((1, 0), (3, 2)), rel=1e-4)
    assert product((0, 1), (2, 3)) != pytest.approx(product((2, 1), (0, 3)), rel=1e-2)
    assert rotate(q, cosine[0], sine[0]).tolist() == pytest.approx(q.tolist())


def test_dropout_is_in_the_middle_half():
    net = JiT(small(depth=8, dropout=0.2))
    assert [block.dropout.p for block in net.blocks] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0]
    net = random_network(depth=8, dropout=0.5).train()
    z, t = torch.randn(1, 3, 16, 16), torch.full((1,), 0.5)
    assert not torch.equal(net(z, t, Cond())[0], net(z, t, Cond())[0])
    net.eval()
    assert torch.equal(net(z, t, Cond())[0], net(z, t, Cond())[0])


@pytest.mark.parametrize("start", [0, 3])
def test_the_context_tells_the_class_from_its_block_on(start):
    """With all gates of the condition off, the class enters by the context tokens alone."""
    net = random_network(context_start=start).eval()
    net.time.fc2.weight.data.zero_()
    z, t = torch.randn(1, 3, 16, 16), torch.full((1,), 0.5)
    with torch.no_grad():
        for block in net.blocks:
            block.modulation.weight.zero_()
        net.modulation.weight.zero_()
        one, two = (net(z, t, Cond(label=torch.tensor([k])))[0] for k in (0, 1))
    assert not torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3}, "heads that fit"),
        ({"width": 30}, "multiple of 4"),
        ({"context_start": 4}, "context_start 4"),
        ({"patch": 5}, "multiples of 5"),
        ({"context_tokens": 0}, "context_tokens"),
        ({"noise_scale": 0.0}, "noise_scale"),
    ],
)
def test_config_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_a_checkpoint_of_another_depth_needs_its_start(recorded):
    config, t, _ = recorded
    state = {k.removeprefix("sd/"): v for k, v in t.items() if k.startswith("sd/")}
    with pytest.raises(ValueError, match="give context_start="):
        mz.load_official(state, "jit")
    with pytest.raises(ValueError, match="leave the hint out"):
        mz.load_official(state, heads=config["heads"] + 1, context_start=1)


def test_the_averages_of_a_training_checkpoint_are_its_entries(tmp_path, recorded):
    _, t, model = recorded
    state = {k.removeprefix("sd/"): v for k, v in t.items() if k.startswith("sd/")}
    torch.save({"model": state, "model_ema1": state, "epoch": 3}, tmp_path / "last.pth")
    with pytest.raises(ValueError, match="model_ema1"):
        mz.load_official(tmp_path / "last.pth", context_start=1)
    start = model.info.config.context_start
    opened = mz.load_official(tmp_path / "last.pth", entry="model_ema1", context_start=start)
    assert torch.equal(opened.backbone.head.weight, state["net.final_layer.linear.weight"])


def test_tables_are_float32_where_the_device_has_no_float64(monkeypatch):
    for module in ("jit", "diffit"):
        monkeypatch.setattr(
            f"mezzotint.backbones.{module}.widest_float", lambda device: torch.float32
        )
    made: list[torch.dtype] = []
    arange, linspace = torch.arange, torch.linspace
    monkeypatch.setattr(torch, "arange", lambda *a, **k: made.append(k["dtype"]) or arange(*a, **k))
    monkeypatch.setattr(
        torch, "linspace", lambda *a, **k: made.append(k["dtype"]) or linspace(*a, **k)
    )
    rotary_table(2, 3, 3, 16)
    sincos_positions(2, 3, 3, 16)
    assert set(made) == {torch.float32}


def test_only_mps_has_no_float64():
    assert widest_float(torch.device("mps")) == torch.float32
    for name in ("cpu", "cuda", "meta"):
        assert widest_float(torch.device(name)) == torch.float64
