"""Protocols against recorded runs and published numbers; label orders; settings as text."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mezzotint as mz
from helpers.tiny_models import tiny
from mezzotint.core import rng
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond
from mezzotint.sampling import parse, protocols
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.sample import (
    count_network_calls,
    make_denoiser,
    make_logsnr_steps,
    run_sampler,
)
from mezzotint.sampling.settings import Guidance, SamplingSettings


@pytest.mark.parametrize(
    ("name", "preset", "calls"),
    [
        ("simple-diffusion-512steps", "unet-tiny", 512),
        ("diffit-512", "diffit-latent-tiny", 500),
        ("dimr-256", "dimr-tiny", 500),
        ("adm", "diffit-latent-tiny", 250),
        ("edm2", "unet-tiny", 63),
    ],
)  # fmt: skip
def test_network_calls_are_the_published_ones(name, preset, calls):
    assert count_network_calls(tiny(preset), protocols.get_protocol(name).settings) == calls


def test_diffit_256_is_unguided_only_where_its_curve_is_one():
    settings = protocols.get_protocol("diffit-256").settings
    # At the noisiest steps the power-cosine differs from 1 by less than rounding.
    assert 490 <= count_network_calls(tiny("diffit-latent-tiny"), settings) < 500


def test_dimr_runs_as_recorded(shared):
    """specs/dimr.md 6: the solver's runs with 10 network times, both forms of guidance."""
    model = mz.load_official(shared("golden/dimr/latent2r.state.safetensors"), heads=4)
    run = load_file(shared("golden/dimr/latent2r.sampler.safetensors"))
    settings = dataclasses.replace(protocols.get_protocol("dimr-256").settings, steps=10)
    decay = dataclasses.replace(settings, guidance=Guidance(scale=2.0, power=2.0))
    plain = dataclasses.replace(settings, guidance=None)
    for name, used in (("const0.4_10", settings), ("decay2.0_p2.0_10", decay), ("uncfg10", plain)):
        denoise, steps = make_denoiser(model, used), make_logsnr_steps(model, used)
        made = run_sampler(denoise, run["z"], steps, [0, 1], Cond(label=run["y"]), used)
        expected = run[f"{name}.out"]
        assert (made - expected).abs().max() / expected.abs().max() < 2e-5


def test_diffit_runs_as_recorded(shared, monkeypatch):
    """specs/diffit.md 2.1 and 5: respaced steps, learned variance, 3 of 4 channels guided."""
    with np.load(shared("golden/diffit/diffusion.npz")) as file:
        golden = {k: torch.from_numpy(file[k]) for k in file.files}
    named = load_file(shared("golden/diffit/A_in8_p2.safetensors"))
    model = mz.load_official(
        {k.removeprefix("sd/"): v for k, v in named.items() if k.startswith("sd/")}
    ).eval()
    kept = len(golden["sample_z"]) // 2
    monkeypatch.setattr(rng, "normal", lambda *args, draw=0: golden["sample_noises"][draw, :kept])
    settings = dataclasses.replace(protocols.get_protocol("diffit-256").settings, steps=4)
    z, cond = golden["sample_z"][:kept], Cond(label=golden["sample_y"][:kept])
    denoise, steps = make_denoiser(model, settings), make_logsnr_steps(model, settings)
    made = run_sampler(denoise, z, steps, range(kept), cond, settings)
    expected = golden["sample_out"][:kept]
    assert (made - expected).abs().max() / expected.abs().max() < 2e-5


def test_simple_diffusion_steps_are_even_and_end_clipped():
    model = tiny()
    settings = dataclasses.replace(
        protocols.get_protocol("simple-diffusion-512steps").settings, steps=4
    )
    steps = make_logsnr_steps(model, settings)
    u = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(steps[:-1], mz.process.schedules.cosine(8, 8)(u), rtol=0, atol=1e-9)
    assert steps[-1] == float("inf")
    denoise, z = make_denoiser(model, settings), torch.randn(2, 3, 8, 8)
    made = run_sampler(denoise, z, steps, [0, 1], Cond(), settings)
    assert made.abs().max() <= 1


def test_whose_scripts_drop_the_fraction_truncates_and_others_round():
    assert {name for name, p in protocols.PROTOCOLS.items() if p.uint8_rule == "truncate"} == {
        "adm",
        "diffit-256",
        "diffit-512",
        "edm2",
    }
    job = SamplingJob(
        model=tiny(), settings=SamplingSettings(steps=1), classes=(1,), uint8_rule="truncate"
    )
    rounds = dataclasses.replace(job, uint8_rule="round")
    difference = rounds.draw([0, 1]).int() - job.draw([0, 1]).int()
    assert set(difference.unique().tolist()) == {0, 1}


def test_docs_list_every_protocol():
    page = (Path(__file__).resolve().parents[2] / "docs" / "protocols.md").read_text()
    for name, p in protocols.PROTOCOLS.items():
        assert f"`{name}`" in page
        assert str(p.settings.steps) in page
        assert p.codec in page


def test_every_protocol_states_its_dtype():
    """The default would depend on the machine."""
    assert {p.settings.dtype for p in protocols.PROTOCOLS.values()} == {"float32", "float16"}


def test_fifty_per_class_of_fifty_thousand():
    labels = protocols.choose_labels("balanced", range(50_000), range(1000))
    assert set(Counter(labels).values()) == {50}
    assert labels[:51] == [0] * 50 + [1]


@pytest.mark.parametrize("order", protocols.LABEL_ORDERS)
def test_a_label_is_a_function_of_the_seed(order):
    labels = protocols.choose_labels(order, range(300), range(10))
    assert protocols.choose_labels(order, range(100, 170), range(10)) == labels[100:170]
    assert protocols.choose_labels(order, [7], range(10)) == labels[7:8]
    assert set(protocols.choose_labels(order, range(500), (3, 5))) == {3, 5}
    assert order in protocols.LABEL_ORDER_RULES


def test_random_labels_are_uniform():
    counts = np.bincount(protocols.choose_labels("random", range(5000), range(10)), minlength=10)
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 27.9  # 99.9 % of chi-squared with 9 degrees of freedom
    with pytest.raises(ValueError, match="did you mean random"):
        protocols.choose_labels("radnom", [0], [0])


def test_every_setting_changes_the_card():
    model = tiny()
    settings = dataclasses.replace(protocols.get_protocol("dimr-256").settings, steps=6)
    job = SamplingJob(model=model, settings=settings, classes=tuple(range(10)), protocol="dimr-256")
    card = job.card(10, 0)
    assert json.loads(json.dumps(card)) == card
    assert card["network_calls_per_image"] == 12
    assert card["deviations"] == [
        "steps: 6 instead of 250",
        "label_order: turn instead of balanced",
        "codec: pixels instead of sd-vae-ft-ema",
    ]
    changed = {
        "sampler": Spec("heun"),
        "discretization": Spec("karras"),
        "steps": 7,
        "guidance": Guidance(scale=2.0),
        "clip": Spec("static"),
        "size": (16, 8),
        "exact": False,
        "dtype": "bfloat16",
        "compile": True,
    }
    # These two change the speed alone.
    fields = {f.name for f in dataclasses.fields(SamplingSettings)}
    assert fields == {*changed, "batch", "cuda_graphs"}
    for field, value in changed.items():
        other = dataclasses.replace(
            job, settings=dataclasses.replace(job.settings, **{field: value})
        )
        assert other.card(10, 0) != card, field
    for field, value in (
        ("guide_model", tiny(seed=1)),
        ("classes", (1,)),
        ("label_order", "random"),
        ("uint8_rule", "truncate"),
    ):
        assert dataclasses.replace(job, **{field: value}).card(10, 0) != card, field
    assert (
        dataclasses.replace(job, model=tiny(seed=2)).card(10, 0)["model"]["sha256"]
        != card["model"]["sha256"]
    )


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse.parse_sampler, "ddim:eta=0.5", Spec("ddim", {"eta": 0.5})),
        (parse.parse_sampler, "heun:s_churn=40,s_max=inf",
         Spec("heun", {"s_churn": 40.0, "s_max": float("inf")})),
        (parse.parse_sampler, "ancestral:variance=learned",
         Spec("ancestral", {"variance": "learned"})),
        (parse.parse_sampler, "ancestral:variance=0.3", Spec("ancestral", {"variance": 0.3})),
        (parse.parse_sampler, "unipc:order=2", Spec("unipc", {"order": 2})),
        (parse.parse_discretization, "even:end=1e-3,clean=false",
         Spec("even", {"end": 1e-3, "clean": False})),
        (parse.parse_discretization, "karras:sigma_max=40",
         Spec("karras", {"sigma_max": 40.0})),
        (parse.parse_clip, "none", None),
        (parse.parse_clip, "dynamic:quantile=0.9", Spec("dynamic", {"quantile": 0.9})),
        (parse.parse_guidance, "1.5", Guidance(scale=1.5)),
        (parse.parse_guidance, "scale=0.4,convention=dimr,low=-3,high=5",
         Guidance(scale=0.4, convention="dimr", low=-3.0, high=5.0)),
        (parse.parse_guidance, "1.5,low=-3,high=5", Guidance(scale=1.5, low=-3.0, high=5.0)),
        (parse.parse_guidance, "scale=4.4,power=4,time=index,channels=3",
         Guidance(scale=4.4, power=4.0, time="index", channels=3)),
        (parse.parse_size, "64", (64, 64)),
        (parse.parse_size, "48x64", (48, 64)),
        (parse.parse_size, " 048 X 64 ", (48, 64)),
    ],
)  # fmt: skip
def test_settings_as_text(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse.parse_sampler, "hein", "did you mean heun"),
        (parse.parse_sampler, "ddim:eta", "name=value"),
        (parse.parse_sampler, "ddim:eta=much", "eta of sampler ddim is 'much'"),
        (parse.parse_sampler, "unipc:order=2.5", "order .* '2.5'"),
        (parse.parse_sampler, "ddim:noise=1", "noise"),
        (parse.parse_discretization, "even:clean=maybe", "'maybe'"),
        (parse.parse_discretization, "karas", "did you mean karras"),
        (parse.parse_clip, "dynamik", "did you mean dynamic"),
        (parse.parse_guidance, "strong", "scale of guidance is 'strong'"),
        (parse.parse_guidance, "cfg=2", "'cfg'"),
        (parse.parse_size, "0", "'0'"),
        (parse.parse_size, "8x8x8", "'8x8x8'"),
        (parse.parse_size, "²", "size '²' is neither a number nor"),
        (parse.parse_size, "8x٣", "size '8x٣' is neither a number nor"),
        (parse.parse_size, "9" * 5000, "is neither a number nor HEIGHTxWIDTH"),
        (parse.parse_size, "8x" + "1" * 5000, "is neither a number nor HEIGHTxWIDTH"),
        (parse.parse_size, "x8", "size 'x8' is neither"),
        (protocols.get_protocol, "dimr", "did you mean dimr-256"),
    ],
)  # fmt: skip
def test_bad_settings_as_text(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
