"""Guidance and clipping of a closed-form denoiser: formulas, skipped passes, counted calls."""

import math

import pytest
import torch
from safetensors.torch import load_file

from mezzotint.process import guidance
from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.logsnr import alpha, append_dims, diffuse, sigma

CLASSES = 10


def gaussian(z, logsnr, cond):
    """Denoise unit-variance data whose mean is the label / 10; `var` returns the label."""
    mean = append_dims(cond.label.to(z) / 10, z)
    a, s = append_dims(alpha(logsnr), z), append_dims(sigma(logsnr), z)
    x = a * z + s**2 * mean  # posterior mean with prior N(mean, 1)
    return Denoised(x, (z - a * x) / s, mean.expand_as(z))


@pytest.fixture
def query():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, 8, 8, dtype=torch.float64, generator=g)
    return z, torch.full((5,), -0.7, dtype=torch.float64), Cond(label=torch.tensor([0, 3, 3, 9, 1]))


def two_passes(query):
    z, logsnr, cond = query
    return gaussian(z, logsnr, cond), gaussian(
        z, logsnr, Cond(label=torch.full_like(cond.label, CLASSES))
    )


NULL = guidance.null_label(CLASSES)


@pytest.mark.parametrize(
    ("scale", "formula"),
    [
        (guidance.dit_s(1.5), lambda c, u: u + 1.5 * (c - u)),
        (guidance.simple_diffusion_w(0.1), lambda c, u: 1.1 * c - 0.1 * u),
        (guidance.dimr_s(0.4), lambda c, u: c + 0.4 * (c - u)),
        (guidance.dit_s(0.0), lambda c, u: u),
    ],
    ids=["dit", "simple-diffusion", "dimr", "unconditional"],
)
def test_each_published_scale(scale, formula, query):
    c, u = two_passes(query)
    out = guidance.classifier_free(gaussian, NULL, scale)(*query)
    torch.testing.assert_close(out.x, formula(c.x, u.x), rtol=0, atol=1e-13)
    torch.testing.assert_close(out.eps, formula(c.eps, u.eps), rtol=0, atol=1e-13)
    torch.testing.assert_close(out.var, c.var, rtol=0, atol=0)
    z, logsnr, _ = query
    torch.testing.assert_close(diffuse(out.x, out.eps, logsnr), z, rtol=0, atol=1e-12)


def test_only_the_leading_channels_are_guided(query):
    c, u = two_passes(query)
    out = guidance.classifier_free(gaussian, NULL, guidance.dit_s(2.0), channels=3)(*query)
    torch.testing.assert_close(out.eps[:, :3], (2 * c.eps - u.eps)[:, :3], rtol=0, atol=1e-13)
    torch.testing.assert_close(out.eps[:, 3:], c.eps[:, 3:], rtol=0, atol=0)
    torch.testing.assert_close(out.x[:, 3:], c.x[:, 3:], rtol=0, atol=0)


def test_one_doubled_call_or_one_plain_call(query):
    z, _, cond = query
    asked = []

    def denoise(z, logsnr, cond):
        asked.append(len(z))
        return gaussian(z, logsnr, cond)

    scale = guidance.interval(guidance.dit_s(3.0), -2.0, 2.0)
    guided = guidance.classifier_free(denoise, NULL, scale)
    inside, outside = torch.full((5,), 1.0).double(), torch.full((5,), 2.5).double()
    guided(z, inside, cond)
    plain = guided(z, outside, cond)
    assert asked == [10, 5]
    for a, b in zip(plain, gaussian(z, outside, cond), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    mixed = guided(z, torch.tensor([1.0, 2.5, 1.0, 2.5, 1.0]).double(), cond)  # levels may differ
    assert asked == [10, 5, 10]
    torch.testing.assert_close(mixed.x[1], plain.x[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(mixed.x[0], guided(z, inside, cond).x[0], rtol=0, atol=0)


def test_log_snrs_on_a_device_are_never_read():
    # The meta device has no values: any read raises, as any read on an accelerator would wait.
    z, level = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, device="meta")
    counted = guidance.CallCounter(gaussian)
    scale = guidance.interval(guidance.dit_s(1.0), -1.0, 1.0)
    guided = guidance.clipped(guidance.classifier_free(counted, NULL, scale))
    out = guided(z, level, Cond(label=torch.empty(2, dtype=torch.long, device="meta")))
    assert out.x.shape == z.shape
    assert counted.rows == 4


def test_call_counter_counts_both_passes(query):
    z, logsnr, cond = query
    counted = guidance.CallCounter(gaussian)
    guided = guidance.classifier_free(counted, NULL, guidance.dit_s(1.5))
    for _ in range(3):
        guided(z, logsnr, cond)
    assert counted.rows == 3 * 2 * len(z)
    guidance.classifier_free(counted, NULL, guidance.simple_diffusion_w(0.0))(z, logsnr, cond)
    assert counted.rows == 7 * len(z)


def test_interval_ends():
    scale = guidance.interval(guidance.dit_s(3.0), -1.0, 2.0)
    levels = torch.tensor([-1.1, -1.0, 0.0, 2.0, 2.1])
    assert scale(levels).tolist() == [1.0, 3.0, 3.0, 3.0, 1.0]


def test_power_cosine_of_the_specification():
    # specs/diffit.md 2.1: w 4.4, p 4 at DDPM's step t
    curve = guidance.power_cosine(4.4, 4.0, lambda t: t / 1000)
    steps = torch.tensor([0, 50, 100, 200, 300, 400, 500, 750, 999], dtype=torch.float64)
    printed = torch.tensor(
        [4.400, 4.119, 3.501, 2.224, 1.461, 1.139, 1.033, 1.000, 1.000], dtype=torch.float64
    )
    torch.testing.assert_close(curve(steps), printed, rtol=0, atol=6e-4)
    assert abs(float(curve(torch.arange(1000, dtype=torch.float64)).mean()) - 1.608) < 1e-3


@pytest.mark.parametrize(("peak", "power"), [(1.5, 1.0), (2.0, 2.0), (4.0, 4.0), (8.0, 3.5)])
def test_golden_power_cosine(shared, peak, power):
    golden = load_file(shared("golden/dimr/schedule.safetensors"))
    curve = guidance.power_cosine(peak, power, lambda n: n / 1000)
    expected = golden[f"cfg_decay_s{peak}_p{power}"]
    torch.testing.assert_close(
        curve(golden["cfg_decay_timesteps"].double()).float(), expected, rtol=2e-6, atol=2e-6
    )


def test_autoguidance_and_its_skip(query):
    def weak(z, logsnr, cond):
        calls.append(len(z))
        return Denoised(0.5 * z, 0.25 * z)

    calls = []
    strong = gaussian(*query)
    out = guidance.autoguidance(gaussian, weak, guidance.dit_s(2.0))(*query)
    torch.testing.assert_close(out.x, 2 * strong.x - 0.5 * query[0])
    torch.testing.assert_close(out.eps, 2 * strong.eps - 0.25 * query[0])
    torch.testing.assert_close(out.var, strong.var)
    guidance.autoguidance(gaussian, weak, guidance.dit_s(1.0))(*query)
    assert calls == [5]


def test_clipping_keeps_the_state_and_what_was_inside(query):
    z, logsnr, cond = query
    raw = gaussian(3 * z, logsnr, cond)
    out = guidance.clipped(gaussian, -0.5, 0.7)(3 * z, logsnr, cond)
    torch.testing.assert_close(out.x, raw.x.clamp(-0.5, 0.7), rtol=0, atol=0)
    torch.testing.assert_close(diffuse(out.x, out.eps, logsnr), 3 * z, rtol=0, atol=1e-12)
    inside = out.x == raw.x
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(out.eps[inside], raw.eps[inside], rtol=0, atol=0)


def test_dynamic_clipping_is_that_of_imagen(query):
    z, logsnr, cond = query
    big = z * torch.tensor([5.0, 4.0, 0.1, 1.0, 6.0]).double().reshape(5, 1, 1, 1)
    raw = gaussian(big, logsnr, cond)
    out = guidance.dynamically_clipped(gaussian, 0.9)(big, logsnr, cond)
    q = raw.x.abs().flatten(1).quantile(0.9, dim=1, interpolation="higher").clamp(min=1)
    q = append_dims(q, z)
    close = (out.x - raw.x.clamp(-q, q) / q).abs()
    assert (
        float(close.amax()) < 0.02
    )  # the quantile's own convention moves q by one order statistic at most
    assert float(out.x.abs().max()) <= 1
    assert torch.equal(out.x[2], raw.x[2])  # an image within [-1, 1] stays as it is
    torch.testing.assert_close(diffuse(out.x, out.eps, logsnr), big, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", [("label",), ("text",), ("label", "text")])
def test_label_and_text_are_emptied_together(fields):
    given = {"label": torch.tensor([1, 2])} if "label" in fields else {}
    if "text" in fields:
        given |= {"text": torch.ones(2, 3, 4), "text_mask": torch.ones(2, 3, dtype=torch.bool)}
    empty = guidance.null_label_and_text(CLASSES)(Cond(**given))
    assert (empty.label is None) == ("label" not in fields)
    assert (empty.text is None) == ("text" not in fields)
    assert empty.label is None or empty.label.tolist() == [CLASSES, CLASSES]
    assert empty.text_mask is None or not empty.text_mask.any()


def test_a_condition_of_nothing_cannot_be_emptied():
    with pytest.raises(ValueError, match="needs text or a label"):
        guidance.null_label_and_text(CLASSES)(Cond())


def test_text_is_doubled_with_its_mask(query):
    z, logsnr, _ = query
    text, mask = torch.randn(5, 3, 2).double(), torch.ones(5, 3, dtype=torch.bool)
    seen = []

    def denoise(z, logsnr, cond):
        seen.append(cond)
        return Denoised(z + cond.text.mean(), z)

    def empty(cond):
        return Cond(text=torch.zeros_like(cond.text), text_mask=torch.zeros_like(cond.text_mask))

    guidance.classifier_free(denoise, empty, guidance.dit_s(2.0))(
        z, logsnr, Cond(text=text, text_mask=mask)
    )
    assert seen[0].text.shape == (10, 3, 2)
    assert not seen[0].text[5:].any()
    assert seen[0].text_mask[:5].all()
    assert not seen[0].text_mask[5:].any()


def test_errors(query):
    z, logsnr, _ = query
    guided = guidance.classifier_free(gaussian, NULL, guidance.dit_s(2.0))
    with pytest.raises(ValueError, match="label"):
        guided(z, logsnr, Cond())
    with pytest.raises(ValueError, match="unconditional"):
        guidance.null_label(0)
    with pytest.raises(ValueError, match="fields"):
        guidance.classifier_free(gaussian, lambda _: Cond(), guidance.dit_s(2.0))(*query)
    with pytest.raises(ValueError, match=r"1\.0\.\.\.1\.0"):
        guidance.interval(guidance.dit_s(2.0), 1.0, 1.0)
    with pytest.raises(ValueError, match="power"):
        guidance.power_cosine(2.0, 0.0, lambda l: l)
    with pytest.raises(ValueError, match="channels"):
        guidance.classifier_free(gaussian, NULL, guidance.dit_s(2.0), channels=0)
    for bad in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="quantile"):
            guidance.dynamically_clipped(gaussian, bad)
    with pytest.raises(ValueError, match="clipping"):
        guidance.clipped(gaussian, 1.0, -1.0)
