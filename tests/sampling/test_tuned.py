"""A model's tuned settings: where they are used, what replaces them, what a stranger may write."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import mezzotint as mz
from helpers import hostile
from helpers.tiny_models import tiny
from mezzotint.core.registry import Spec
from mezzotint.evaluate.image_source import from_job
from mezzotint.process.denoiser import Cond
from mezzotint.sampling.job import check_sampler, make_job
from mezzotint.sampling.protocols import get_protocol
from mezzotint.sampling.sample import generate, make_denoiser
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.sampling.tuned import (
    Measured,
    TunedSettings,
    add_tuned,
    describe_tuned,
    read_tuned,
    tuned_section,
)

GUIDANCE = Guidance(scale=1.5, low=-3.0, high=20.0)
MEASURED = Measured(
    metric="FD-*random*", value=1.25, default=2.5, low=-1.5, high=-1.0, images=100, first_seed=7,
    calls=9000, reference="/home/me/ref.npz", reference_hash="0123456789abcdef",
)  # fmt: skip
TUNED = TunedSettings(
    sampler=Spec("ddim", {"eta": 0.5}), steps=4, guidance=GUIDANCE, width=0.08, measured=MEASURED
)


def tuned_model(**changes):
    model = tiny(num_classes=10)
    model.info = add_tuned(model.info, dataclasses.replace(TUNED, **changes))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "model"
    mz.save_model(tuned_model(), folder)
    return folder


def test_they_survive_saving_and_are_used_where_nothing_is_given(folder):
    assert read_tuned(mz.load_model(folder).info) == TUNED
    job = make_job(folder)
    settings = job.settings
    assert (settings.sampler, settings.steps, settings.guidance) == (TUNED.sampler, 4, GUIDANCE)
    assert set(job.tuned_fields) == {"sampler", "steps", "guidance", "EMA width"}
    card = job.card(4, 0)
    assert card["tuned"] == "sampler, steps, guidance, EMA width by FD-*random* against " + (
        MEASURED.reference_hash
    )
    assert from_job(job, 4).metadata["tuned"] == card["tuned"]


def test_what_is_given_replaces_them(folder):
    job = make_job(folder, {"steps": 2, "guidance": None})
    assert (job.settings.steps, job.settings.guidance) == (2, None)
    assert job.settings.sampler == TUNED.sampler
    assert job.tuned_fields == ("sampler", "EMA width")


def test_a_protocol_is_never_altered(folder):
    job = make_job(folder, protocol="edm2")
    assert job.settings == get_protocol("edm2").settings
    assert job.tuned is None
    assert job.card(4, 0)["tuned"] is None


def test_classifier_free_guidance_is_not_taken_for_autoguidance(folder):
    with pytest.raises(ValueError, match="needs a guidance scale"):
        check_sampler(make_job(folder, guide_model=folder))


def test_sample_in_python_uses_them_too():
    model = tuned_model(sampler=Spec("ddim"))
    own = mz.sample(model, [3], label=2)
    plain = tiny(num_classes=10)
    same = make_same(plain, steps=4, guidance=GUIDANCE)
    assert torch.equal(own, same)
    assert torch.equal(
        mz.sample(model, [3], 2, sampler="ddim", steps=2, guidance=1),
        mz.sample(plain, [3], 2, steps=2),
    )
    # Without a label nothing can be guided.
    assert torch.equal(mz.sample(model, [3]), mz.sample(plain, [3], steps=4))


def make_same(model, steps, guidance):
    settings = SamplingSettings(steps=steps, guidance=guidance)
    return generate(model, [3], Cond(label=torch.tensor([2])), settings).clamp(-1, 1)


def test_they_are_described_without_local_paths_and_markup():
    assert describe_tuned(TUNED) == (
        "ddim, 4 steps, guidance 1.5 for log-SNR from -3, EMA width 0.08"
    )
    assert describe_tuned(TUNED, ["steps"]) == "4 steps"
    text = "\n".join(tuned_section(tuned_model().info))
    assert r"FD-\*random\* 1.25 instead of 2.5" in text
    assert "ref.npz (0123456789abcdef)" in text
    assert "/home" not in text
    assert tuned_section(tiny().info) == []


def test_a_strangers_settings_are_refused_in_a_sentence(tmp_path):
    model = tiny(num_classes=10)
    good = add_tuned(model.info, TUNED).extra["sampling"]
    sentences = {}
    hostile_values = [
        (f"{'.'.join(path)} = {name}", hostile.replaced(good, path, new))
        for path in hostile.paths(good)
        for name, new in hostile.VALUES.items()
    ]
    hostile_values += [
        (f"{path} missing", hostile.without(good, path)) for path in hostile.paths(good)
    ]
    for name, values in [*hostile_values, ("a list", [1]), ("text", "x"), ("nothing", None)]:
        model.info = dataclasses.replace(model.info, extra={"sampling": values})
        try:
            tuned = read_tuned(model.info)
            assert tuned is not None
            tuned_section(model.info)
            make_denoiser(model, SamplingSettings(**tuned.fields(guided=True)))
        except ValueError as error:
            sentences[name] = str(error)
        except BaseException as error:
            raise AssertionError(name) from error
    assert len(sentences) > 200
    assert not {"\n", "\x1b"} & set("".join(sentences.values()))


@pytest.mark.parametrize(
    ("name", "option", "written", "read"),
    [
        ("heun", "s_churn", "40", 40.0),
        ("heun", "s_churn", 40, 40.0),
        ("heun", "s_noise", "1e-3", 0.001),
        ("heun", "s_max", "inf", float("inf")),
        ("ddim", "eta", "0.5", 0.5),
    ],
)
def test_an_option_written_as_text_is_used_as_a_number(name, option, written, read):
    model = tuned_model()
    written = {"sampler": {"name": name, "options": {option: written}}}
    values = {"sampling": model.info.extra["sampling"] | written}
    model.info = dataclasses.replace(model.info, extra=values)
    sampler = read_tuned(model.info).sampler
    assert sampler == Spec(name, {option: read})
    assert isinstance(sampler.options[option], float)
    given = tuned_model(sampler=Spec(name, {option: read}))
    images = mz.sample(model, [0], label=1, steps=2)
    assert torch.equal(images, mz.sample(given, [0], label=1, steps=2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps 0 must be at least 1"),
        ("sampler", {"name": "heuun"}, "unknown sampler.*heun"),
        ("sampler", {"name": "ddim", "options": {"denoise": 1}}, "denoise"),
        ("guidance", {"scale": "much"}, "guidance.scale.*a number is needed"),
        ("guidance", {"scale": 2, "low": 3, "high": -3}, "interval 3.*is empty"),
        ("width", 0.5, "width 0.5 must be"),
        ("more", 1, "unknown key 'more'"),
    ],
)
def test_each_wrong_value_is_named(folder, tmp_path, field, value, message):
    mz.save_model(tuned_model(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["sha256"]
    config["extra"]["sampling"][field] = value
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"extra\.sampling.*{message}"):
        make_job(tmp_path / "m")
    assert make_job(tmp_path / "m", protocol="edm2").tuned is None
