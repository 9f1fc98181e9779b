"""Sampling: equal bytes for any batch, guidance, network calls, errors."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import mezzotint as mz
from helpers.tiny_models import SMALL, rows_seen, tiny
from mezzotint.core.registry import Spec
from mezzotint.models import get_schedule
from mezzotint.process.denoiser import Cond
from mezzotint.sampling import sample as sample_module
from mezzotint.sampling.conditioning import (
    label_condition,
    label_indices,
    list_seeds,
    text_condition,
)
from mezzotint.sampling.denoisers import batched_by_tile
from mezzotint.sampling.sample import (
    count_network_calls,
    draw_start_noise,
    generate,
    guidance_scale,
    make_denoiser,
    make_logsnr_steps,
    run_sampler,
)
from mezzotint.sampling.settings import Guidance, SamplingSettings


def cond_for(count: int) -> Cond:
    return Cond(label=torch.arange(count) % 10)


STOCHASTIC = SamplingSettings(
    sampler=Spec("ancestral"), steps=4, guidance=Guidance(scale=1.5, low=-4.0, high=6.0)
)


@pytest.mark.parametrize("preset", SMALL)
def test_the_same_bytes_for_batches_of_1_7_and_64(preset):
    model = tiny(preset)
    one, seven, many = (
        generate(model, range(20), cond_for(20), dataclasses.replace(STOCHASTIC, batch=b))
        for b in (1, 7, 64)
    )
    assert torch.equal(one, seven)
    assert torch.equal(one, many)
    alone = generate(model, [13], Cond(label=torch.tensor([3])), STOCHASTIC)
    assert torch.equal(alone[0], one[13])
    assert not torch.equal(one[3], one[13])


def test_every_tile_has_one_shape():
    """The copies that fill up a tile do not change its images."""
    model = tiny()
    rows = rows_seen(model)
    z = torch.randn(7, 3, 8, 8)
    made = batched_by_tile(model)(z, torch.linspace(-3, 3, 7), cond_for(7))
    assert rows == [4, 4]
    torch.testing.assert_close(made.x, model(z, torch.linspace(-3, 3, 7), cond_for(7)).x)


def test_sample_is_generate_with_defaults():
    model = tiny()
    made = mz.sample(
        model, [5, 6], label=[1, 2], sampler="heun", steps=3, guidance=2.0
    )  # clamped to pixels' range
    settings = SamplingSettings(sampler=Spec("heun"), steps=3, guidance=Guidance(scale=2.0))
    assert torch.equal(
        made, generate(model, [5, 6], Cond(label=torch.tensor([1, 2])), settings).clamp(-1, 1)
    )
    assert mz.sample(model, []).shape == (0, 3, 8, 8)
    assert mz.sample(model, [0], size=(16, 8), steps=1).shape == (1, 3, 16, 8)
    assert torch.equal(
        mz.sample(model, [0], label=4, steps=2),
        mz.sample(model, [0], label=[4], steps=2, guidance=1.0),
    )


@pytest.mark.parametrize("sampler", mz.process.samplers.registry)
@pytest.mark.parametrize(
    "guidance",
    [None, Guidance(scale=2.0), Guidance(scale=0.5, convention="dimr", low=-2.0, high=3.0)],
)
def test_network_calls_are_those_of_the_network(sampler, guidance):
    model = tiny()
    steps = 4 if sampler == "consistency" else 5
    settings = SamplingSettings(sampler=Spec(sampler), steps=steps, guidance=guidance, exact=False)
    rows = rows_seen(model)
    generate(model, [0, 1, 2], cond_for(3), settings)
    assert sum(rows) == 3 * count_network_calls(model, settings)
    weak = tiny(seed=1)
    rows += (weaker := rows_seen(weak))
    if guidance is not None:
        generate(model, [0, 1, 2], cond_for(3), settings, weak)
        # `rows` also holds the calls of the first run.
        assert sum(rows) + sum(weaker) == 3 * (
            count_network_calls(model, settings) + count_network_calls(model, settings, True)
        )


def test_the_empty_condition_is_skipped_without_reading_from_the_device():
    """Nothing can be read from the meta device: it would raise."""
    model = tiny().to("meta")
    rows = rows_seen(model)
    settings = SamplingSettings(
        steps=10, guidance=Guidance(scale=3.0, low=-1.0, high=1.0), exact=False
    )
    logsnr = make_logsnr_steps(model, settings)[:-1]
    inside = int(((logsnr >= -1) & (logsnr <= 1)).sum())
    assert 0 < inside < 10
    z = torch.empty(2, 3, 8, 8, device="meta")
    denoise, steps = make_denoiser(model, settings), make_logsnr_steps(model, settings)
    run_sampler(denoise, z, steps, [0, 1], cond_for(2), settings)
    assert sum(rows) == 2 * (10 + inside) == 2 * count_network_calls(model, settings)


def test_one_scale_in_three_conventions():
    model = tiny()
    made = [
        generate(model, [0, 1], cond_for(2), SamplingSettings(steps=3, guidance=g))
        for g in (
            Guidance(scale=1.5),
            Guidance(scale=0.5, convention="simple_diffusion"),
            Guidance(scale=0.5, convention="dimr"),
        )
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], generate(model, [0, 1], cond_for(2), SamplingSettings(steps=3)))


def test_power_cosine_over_index_and_over_u():
    """specs/diffit.md 2.1 prints the curve for w = 4.4, p = 4 at steps 0...999."""
    schedule = get_schedule(tiny("diffit-latent-tiny"))
    steps = torch.tensor([0, 50, 100, 200, 300, 400, 500, 999])
    printed = torch.tensor(
        [4.400, 4.119, 3.501, 2.224, 1.461, 1.139, 1.033, 1.000], dtype=torch.float64
    )
    by_index = guidance_scale(Guidance(scale=4.4, power=4.0, time="index"), schedule)(
        schedule.logsnr[steps]
    )
    torch.testing.assert_close(by_index, printed, rtol=0, atol=6e-4)
    # specs/dimr.md 6.2: w(n) = 1 + (S - 1) / 2 (1 - cos(pi (1 - n / 1000)^p)), n = step + 1
    by_u = guidance_scale(Guidance(scale=4.4, power=4.0), schedule)(schedule.logsnr[steps])
    n = (steps + 1).double()
    torch.testing.assert_close(
        by_u, 1 + 1.7 * (1 - torch.cos(math.pi * (1 - n / 1000) ** 4)), rtol=1e-9, atol=1e-9
    )
    with pytest.raises(ValueError, match="time=index"):
        guidance_scale(Guidance(scale=2.0, power=4.0, time="index"), get_schedule(tiny()))


def test_guided_channels_and_interval():
    model = tiny("diffit-latent-tiny")
    base = SamplingSettings(steps=2, guidance=Guidance(scale=3.0))
    full, part, none = (
        generate(model, [0, 1], cond_for(2), dataclasses.replace(base, guidance=g, steps=1))
        for g in (Guidance(scale=3.0), Guidance(scale=3.0, channels=3), None)
    )
    assert torch.equal(part[:, :3], full[:, :3])
    assert torch.equal(part[:, 3:], none[:, 3:])
    early = generate(
        model,
        [0],
        cond_for(1),
        dataclasses.replace(base, guidance=Guidance(scale=3.0, low=-20, high=-5)),
    )
    late = generate(
        model,
        [0],
        cond_for(1),
        dataclasses.replace(base, guidance=Guidance(scale=3.0, low=-5, high=20)),
    )
    assert not torch.equal(early, late)


def test_autoguidance_extrapolates_from_the_weaker_network():
    strong, weak = tiny(), tiny(seed=1)
    settings = SamplingSettings(steps=1, guidance=Guidance(scale=2.0))
    guided = generate(strong, [0], cond_for(1), settings, weak)
    a, b = (generate(m, [0], cond_for(1), SamplingSettings(steps=1)) for m in (strong, weak))
    torch.testing.assert_close(guided, b + 2 * (a - b), rtol=1e-4, atol=1e-4)
    free = tiny(num_classes=0)
    assert generate(free, [0], Cond(), settings, tiny(num_classes=0, seed=1)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="guidance scale"):
        generate(strong, [0], cond_for(1), SamplingSettings(steps=1), weak)
    with pytest.raises(ValueError, match="channels"):
        generate(
            strong,
            [0],
            cond_for(1),
            SamplingSettings(guidance=Guidance(scale=2.0, channels=1)),
            weak,
        )


def test_clipping_and_dtype_take_effect():
    model = tiny()
    plain = generate(model, [0, 1], cond_for(2), SamplingSettings(steps=3))
    assert plain.abs().max() > 1
    static = generate(model, [0, 1], cond_for(2), SamplingSettings(steps=3, clip=Spec("static")))
    assert static.abs().max() <= 1
    narrow = generate(
        model,
        [0, 1],
        cond_for(2),
        SamplingSettings(steps=3, clip=Spec("static", {"low": -0.5, "high": 0.5})),
    )
    assert narrow.abs().max() <= 0.5
    dynamic = generate(
        model,
        [0, 1],
        cond_for(2),
        SamplingSettings(steps=3, clip=Spec("dynamic", {"quantile": 0.9})),
    )
    assert dynamic.abs().max() <= 1
    assert not torch.equal(dynamic, static)
    low = generate(model, [0, 1], cond_for(2), SamplingSettings(steps=3, dtype="bfloat16"))
    assert low.dtype == torch.float32
    assert 0 < (low - plain).abs().max() < 0.1 * plain.abs().max()


def test_start_noise_depends_on_the_seed_alone():
    model = tiny()
    both = draw_start_noise(model, [3, 9], SamplingSettings())
    assert torch.equal(both[1:], draw_start_noise(model, [9], SamplingSettings()))
    assert both.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps 0 must be"),
        ({"sampler": "dim"}, "did you mean ddim"),
        ({"label": 11}, "label 11 .* 0 to 9"),
        ({"label": -1}, "label -1"),
        ({"label": [1, 2, 3]}, "3 labels for 2 seeds"),
        ({"guidance": 2.0}, "needs a label"),
        ({"guidance": float("nan"), "label": 1}, "nan"),
        ({"size": 9}, "9x9"),
        ({"size": (8, 9)}, "8x9"),
        ({"size": 0}, r"size\[0\] 0 must be"),
        ({"text": torch.zeros(2, 4, 8)}, "text"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mz.sample(tiny(), [0, 1], **arguments)


def test_bad_settings_for_a_model():
    free = tiny(num_classes=0)
    with pytest.raises(ValueError, match="without guidance"):
        mz.sample(free, [0], guidance=2.0)
    with pytest.raises(ValueError, match="leave label out"):
        mz.sample(free, [0], label=1)
    table = tiny("diffit-latent-tiny")
    for grid in (Spec("even"), Spec("respaced")):
        with pytest.raises(ValueError, match=r"1001 .* 1000"):
            generate(table, [0], cond_for(1), SamplingSettings(steps=1001, discretization=grid))
    with pytest.raises(ValueError, match=r"20\.\.\.30.*-15.*15"):
        generate(
            tiny(),
            [0],
            cond_for(1),
            SamplingSettings(guidance=Guidance(scale=2.0, low=20, high=30)),
        )
    with pytest.raises(ValueError, match=r"3\.\.\.-3"):
        generate(
            tiny(), [0], cond_for(1), SamplingSettings(guidance=Guidance(scale=2.0, low=3, high=-3))
        )
    with pytest.raises(ValueError, match="4 guided channels"):
        generate(
            tiny(), [0], cond_for(1), SamplingSettings(guidance=Guidance(scale=2.0, channels=4))
        )
    with pytest.raises(ValueError, match="'learned'"):
        count_network_calls(
            tiny(), SamplingSettings(sampler=Spec("ancestral", {"variance": "learned"}))
        )
    with pytest.raises(ValueError, match="'etta'"):
        generate(tiny(), [0], cond_for(1), SamplingSettings(sampler=Spec("ddim", {"etta": 1})))
    named = tiny()
    named.info = dataclasses.replace(named.info, labels=("rose", "tulip"))
    assert label_indices(named, ["tulip", "0"]) == [1, 0]
    with pytest.raises(ValueError, match="did you mean rose"):
        label_indices(named, ["rosa"])
    with pytest.raises(ValueError, match="'cat'"):
        mz.sample(tiny(), [0], label="cat")


def test_labels_by_name_are_labels_by_number():
    model = tiny()
    model.info = dataclasses.replace(model.info, labels=("rose", "tulip"))
    assert label_condition(model, "tulip", 2).tolist() == [1, 1]
    assert label_condition(model, ["tulip", 3, "rose"], 3).tolist() == [1, 3, 0]
    assert label_condition(model, (), 0).tolist() == []


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        (4, [4]), (np.int64(4), [4]), (torch.tensor(4), [4]), (np.array(4, np.uint8), [4]),
        (torch.arange(3), [0, 1, 2]), (torch.tensor([2, 9], dtype=torch.int32), [2, 9]),
        (np.array([2**62, 1], np.uint64), [2**62, 1]), (range(2), [0, 1]),
        ((np.int32(7), 8), [7, 8]), ([torch.tensor(5)], [5]),
        ((i * i for i in range(3)), [0, 1, 4]), ([], []), ({3}, [3]),
    ],
)  # fmt: skip
def test_seeds_of_any_integer_type(seeds, expected):
    assert list_seeds(seeds) == expected


def test_a_generator_draws_seeds():
    a, b = list_seeds([generator(1), generator(2)])
    assert a != b
    assert list_seeds(generator(1)) == [a]
    again = generator(1)
    assert list_seeds([again])[0] != list_seeds([again])[0]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([-1], "seed -1"), ([2**63], "2\\^63"), ([1.5], "1.5"), (["a"], "'a'"), ("12", "'12'"),
        ([True], "True"), (torch.rand(2), "not a whole number"), ([None], "None"),
        (torch.zeros(2, 2, dtype=torch.long), "one dimension"), (np.zeros((1, 1), int), "shape"),
    ],
)  # fmt: skip
def test_what_is_no_seed(seeds, message):
    with pytest.raises(ValueError, match=message):
        list_seeds(seeds)


@pytest.mark.parametrize(
    "label",
    [
        1, np.int64(1), torch.tensor(1), [1, 1], np.array([1, 1]), torch.tensor([1]),
        (np.uint8(1),) * 2, (i for i in (1, 1)), "tulip", ["tulip", np.int16(1)],
    ],
)  # fmt: skip
def test_labels_of_any_integer_type(label):
    model = tiny()
    model.info = dataclasses.replace(model.info, labels=("rose", "tulip"))
    assert label_condition(model, label, 2).tolist() == [1, 1]


@pytest.mark.parametrize(
    "label", [[1.0], [None], [True], torch.rand(2), [10**30], np.array([-(2**40)])]
)
def test_what_is_no_label(label):
    with pytest.raises(ValueError, match="label"):
        label_condition(tiny(), label, 2)


@pytest.mark.parametrize("size", [np.int64(8), torch.tensor(8), (np.int32(8), torch.tensor(8))])
def test_sizes_and_steps_of_any_integer_type(size):
    model = tiny("unet-tiny", size=8)
    expected = mz.sample(model, [0], steps=2, size=8)
    assert torch.equal(mz.sample(model, [0], steps=int(np.int64(2)), size=size), expected)


@pytest.mark.parametrize("size", ["8", 8.0, (8,), (8, 8, 8), torch.tensor([8, 8])], ids=str)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="give a whole number, or"):
        sample_module._height_and_width(size)


def test_samples_of_a_tensor_of_seeds():
    model = tiny()
    expected = mz.sample(model, [3, 4], label=[1, 2], steps=1)
    given = mz.sample(model, torch.tensor([3, 4]), label=np.array([1, 2]), steps=1)
    assert torch.equal(given, expected)


def test_a_name_instead_of_a_model(tmp_path):
    """In its own process: here the type annotations would raise first."""
    code = "import mezzotint as mz\nmz.sample('my-model', [0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        "ValueError: 'my-model' is not a model; open one first: sample(load_model(" in done.stderr
    )


SCALES = """
import mezzotint as mz
model = mz.create_model("unet-tiny", size=8, width=8, emb_dim=16, multipliers=(1,), blocks=(1,),
                        attention=(False,), num_classes=3).eval()
for scales, named in (("3", "'3'"), ([None, 2], "None"), ([2, "x"], "'x'"), ([2.0, True], "True")):
    try:
        mz.sample(model, [0, 1], label=1, steps=1, guidance=scales)
    except ValueError as error:
        assert str(error) == f"guidance scale is {named}; a number is needed", error
    else:
        raise AssertionError(scales)
"""


def test_what_is_no_guidance_scale():
    """In its own process: here the type annotations would raise first."""
    done = subprocess.run([sys.executable, "-c", SCALES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "shape", [(1, 4, 16), (3, 4, 16), (0, 4, 16), (2, 16), (16,), (), (2, 1, 4, 16)]
)
def test_embeddings_of_another_shape_are_refused(shape):
    message = rf"shape {re.escape(str(shape))} for 2 seeds; .* so \(2, tokens, width\)"
    with pytest.raises(ValueError, match=message):
        text_condition(tiny(), torch.zeros(shape), 2)
    taken = text_condition(tiny(), torch.ones(2, 4, 16), 2)
    assert torch.equal(taken.text, torch.ones(2, 4, 16))
    assert torch.equal(taken.text_mask, torch.ones(2, 4, dtype=torch.bool))


def test_images_are_clamped_and_latents_are_not():
    torch.manual_seed(0)
    for preset, inside in (("unet-tiny", True), ("dimr-latent-tiny", False)):
        model = mz.create_model(preset).eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        assert (mz.sample(model, [0, 1], steps=2).abs().max() <= 1) == inside


def test_a_network_without_null_label():
    model = mz.create_model("dimr-tiny", size=16, num_classes=3, null_label=False).eval()
    assert mz.sample(model, [0], label=2, steps=2).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="0 to 2"):
        mz.sample(model, [0], steps=2)
    with pytest.raises(ValueError, match="label 3"):
        mz.sample(model, [0], label=3, steps=2)
    with pytest.raises(ValueError, match="without guidance"):
        mz.sample(model, [0], label=1, steps=2, guidance=2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_an_error_that_names_the_seeds(value):
    model = tiny()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad or p.numel()).fill_(value)
    with pytest.raises(FloatingPointError, match=r"seed 3, 5 .*ddim.*2 steps.*try more steps"):
        mz.sample(model, [3, 5], steps=2)
