"""Wrappers that take a denoiser and return one: guidance, clipping, counting of calls.

A guidance scale is a function of log-SNR in DiT's unit: guess = weak + scale (strong - weak), so 1
is no guidance and 0 the weak guess. `simple_diffusion_w` and `dimr_s` convert the other papers'
numbers. Since x and eps are linear in each other given z, mixing both is mixing either.

Both passes of classifier-free guidance run as one doubled batch. The weak pass is skipped where the
scale is 1 for the whole batch, if the log-SNRs (b,) are on the CPU. Samplers give them there for
models on any device, because reading them from a GPU would make the host wait. Log-SNRs on a GPU
always take both passes; the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.process.logsnr import alpha, append_dims, sigma, to_device_of

Scale = Callable[[Tensor], Tensor]  # log-SNR (b,) -> guidance scale (b,) in DiT's unit
Null = Callable[[Cond], Cond]  # a condition -> the empty condition of the same batch


def dit_s(s: float | Tensor) -> Scale:
    """Return DiT's, DiffiT's and EDM2's constant scale: uncond + s (cond - uncond); 1 is none.

    Args:
        s: one for all images, or (b,).
    """
    if isinstance(s, Tensor):
        return s.to
    return lambda logsnr: torch.full_like(logsnr, s)


def simple_diffusion_w(w: float) -> Scale:
    """Return simple diffusion's constant weight: (1 + w) cond - w uncond (section 2); 0 is none."""
    return dit_s(1 + w)


def dimr_s(s: float) -> Scale:
    """Return DiMR's constant scale: cond + s (cond - uncond) (specs/dimr.md 6.2); 0 is none.

    DiMR's default is 0.4.
    """
    return dit_s(1 + s)


def interval(scale: Scale, low: float, high: float) -> Scale:
    """Return `scale` where low <= logsnr <= high, and 1 elsewhere (arXiv 2404.07724).

    Errors: ValueError unless low < high; both are natural log-SNRs, low the noisier.
    """
    if not low < high:
        raise ValueError(
            f"the interval {low}...{high} is empty; its ends are log-SNRs, the noisier first"
        )
    return lambda logsnr: torch.where((logsnr >= low) & (logsnr <= high), scale(logsnr), 1.0)


def power_cosine(peak: float | Tensor, power: float, time: Callable[[Tensor], Tensor]) -> Scale:
    """Return MDT's curve: 1 at pure noise, `peak` at the clean end.

    DiffiT uses it at 256 pixels, and DiMR.

    Args:
        peak: scale in DiT's unit at time 0; one for all images, or (b,).
        power: exponent; a larger one stays near 1 for longer.
        time: log-SNR (b,) to t / T in [0, 1], 1 noisiest: DiffiT's index / 1000, DiMR's n / 1000.

    Errors: ValueError for a power that is not positive.
    """
    if not power > 0:
        raise ValueError(f"power {power} must be positive; DiffiT uses 4")

    def scale(logsnr: Tensor) -> Tensor:
        # specs/diffit.md 2.1: s(t) = 1 + (w - 1) / 2 (1 - cos(pi (1 - t/T)^p))
        rise = 1 - torch.cos(math.pi * (1 - time(logsnr)) ** power)
        half = (peak - 1) / 2
        return 1 + (half.to(rise) if isinstance(half, Tensor) else half) * rise

    return scale


def null_label(num_classes: int) -> Null:
    """Return the function that replaces every label by the null label, index num_classes.

    Errors: ValueError for num_classes 0; when called, for a condition without a label.
    """
    if num_classes < 1:
        raise ValueError(
            "an unconditional network cannot be guided by labels; sample it without guidance"
        )

    def null(cond: Cond) -> Cond:
        if cond.label is None:
            raise ValueError("guidance needs a label for each image; none was given")
        return replace(cond, label=torch.full_like(cond.label, num_classes))

    return null


def null_label_and_text(num_classes: int) -> Null:
    """Return the function that empties label and text together, as training drops them.

    A condition may have one of the two.

    Errors: ValueError for num_classes 0; when called, for a condition without both.
    """
    empty_label = null_label(num_classes)

    def null(cond: Cond) -> Cond:
        if cond.label is None and cond.text is None:
            raise ValueError("guidance needs text or a label for each image; none was given")
        cond = cond if cond.label is None else empty_label(cond)
        return cond if cond.text is None else null_text(cond)

    return null


def negative_text(negative: Cond) -> Null:
    """Return the function that replaces the text of a batch by that of `negative`."""
    return lambda cond: replace(cond, text=negative.text, text_mask=negative.text_mask)


def null_text(cond: Cond) -> Cond:
    """Return the condition without text: no token is real.

    Errors: ValueError for a condition without text.
    """
    if cond.text is None or cond.text_mask is None:
        raise ValueError("guidance needs text and its mask for each image; none was given")
    return replace(cond, text_mask=torch.zeros_like(cond.text_mask))


def _is_unguided(scale: Tensor) -> bool:
    """Return whether all scales are 1; False if that cannot be read without a transfer."""
    return scale.device.type == "cpu" and bool((scale == 1).all())


def _mix(strong: Denoised, weak: Denoised, scale: Tensor, channels: int | None) -> Denoised:
    """Return weak + scale (strong - weak) on the first `channels` channels.

    The other channels and the variance are those of `strong`.
    """

    def mix(c: Tensor, u: Tensor) -> Tensor:
        s = append_dims(to_device_of(scale, c), c).to(c.dtype)
        # DiT, section 3: eps = eps_u + s (eps_c - eps_u)
        mixed = u[:, :channels] + s * (c[:, :channels] - u[:, :channels])
        # Exactly the strong guess, as for a batch that needs no weak pass.
        mixed = torch.where(s == 1, c[:, :channels], mixed)
        return mixed if channels is None else torch.cat([mixed, c[:, channels:]], 1)

    return Denoised(mix(strong.x, weak.x), mix(strong.eps, weak.eps), strong.var)


def classifier_free(
    denoise: Denoiser, null: Null, scale: Scale, channels: int | None = None
) -> Denoiser:
    """Guide away from the empty condition, in one doubled batch (arXiv 2207.12598).

    Args:
        denoise: a conditional denoiser.
        null: condition to empty condition, e.g. `null_label(1000)`.
        scale: in DiT's unit, e.g. `dit_s(1.5)`, `simple_diffusion_w(0.1)`, `dimr_s(0.4)`,
            `power_cosine(...)`.
        channels: number of leading channels to guide, all by default; DiffiT guides 3 of its 4
            latent channels (specs/diffit.md 2.1). The others and the learned variance come from the
            conditional pass.
    """
    if channels is not None and channels < 1:
        raise ValueError(f"channels {channels} must be at least 1; leave it out to guide all")

    def guided(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        empty = null(cond)
        s = scale(logsnr)
        if _is_unguided(s):
            return denoise(z, logsnr, cond)
        both = denoise(torch.cat([z, z]), torch.cat([logsnr, logsnr]), _join(cond, empty))
        n = len(z)
        strong = Denoised(both.x[:n], both.eps[:n], None if both.var is None else both.var[:n])
        return _mix(strong, Denoised(both.x[n:], both.eps[n:]), s, channels)

    return guided


def _join(first: Cond, second: Cond) -> Cond:
    """Return two conditions with the same fields as one batch."""

    def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            if a is not b:
                raise ValueError("the empty condition must have the same fields as the condition")
            return None
        return torch.cat([a, b])

    return Cond(
        label=join(first.label, second.label),
        text=join(first.text, second.text),
        text_mask=join(first.text_mask, second.text_mask),
        augment=join(first.augment, second.augment),
    )


def autoguidance(denoise: Denoiser, weak: Denoiser, scale: Scale) -> Denoiser:
    """Guide away from a weaker denoiser under the same condition (arXiv 2406.02507).

    Args:
        denoise: the strong denoiser.
        weak: e.g. an earlier checkpoint, or a smaller network of the same data.
        scale: in DiT's unit, the paper's w: guess = weak + w (strong - weak).
    """

    def guided(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        strong = denoise(z, logsnr, cond)
        s = scale(logsnr)
        return strong if _is_unguided(s) else _mix(strong, weak(z, logsnr, cond), s, None)

    return guided


def with_image(logsnr: PerImage, guess: Denoised, x: Image) -> Denoised:
    """Return `guess` with another image, and the noise that the same state z then implies."""
    level = to_device_of(logsnr, x)
    # z = alpha x + sigma eps, so deps = -(alpha / sigma) dx; exactly zero where x did not change.
    ratio = append_dims(alpha(level) / sigma(level), x).to(x.dtype)
    return Denoised(x, guess.eps + ratio * (guess.x - x), guess.var)


def clipped(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clamp the image to low...high and recompute the noise (simple diffusion, after guidance)."""
    if not low < high:
        raise ValueError(f"clipping to {low}...{high} leaves nothing; the first must be smaller")

    def guess(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        raw = denoise(z, logsnr, cond)
        return with_image(logsnr, raw, raw.x.clamp(low, high))

    return guess


def dynamically_clipped(denoise: Denoiser, quantile: float = 0.995) -> Denoiser:
    """Clip the image by Imagen's dynamic thresholding (arXiv 2205.11487 section 2.3).

    The noise is recomputed.

    Per image, q is the `quantile` of |x|, at least 1; x is clamped to -q...q and divided by q.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile {quantile} must lie in (0, 1]; Imagen uses 0.995")

    def guess(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        raw = denoise(z, logsnr, cond)
        # Sorted, since torch.quantile refuses more than 16 M elements.
        magnitude = raw.x.abs().flatten(1).sort(1).values
        q = magnitude[:, math.ceil(quantile * magnitude.shape[1]) - 1].clamp(min=1)
        q = append_dims(q, raw.x)
        return with_image(logsnr, raw, raw.x.clamp(-q, q) / q)

    return guess


class CallCounter:
    """A denoiser that counts images in `rows`; a doubled batch counts twice.

    Network calls per image, the NFE of papers that count both passes, are rows / images.
    """

    def __init__(self, denoise: Denoiser):
        self.denoise = denoise
        self.rows = 0

    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """Return the wrapped denoiser's answer."""
        self.rows += len(z)
        return self.denoise(z, logsnr, cond)
