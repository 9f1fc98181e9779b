"""Make the plots and pictures of the documents: `python docs/make_figures.py [--run RUN] [--photo FILE]`.

Everything but the strip of a trained run is computed here from the library's own functions, in seconds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.flop_counter import FlopCounterMode

from mezzotint import backbones
from mezzotint.backbones.wavelet import dwt53
from mezzotint.core import rng
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data.shapes import shapes
from mezzotint.data.transforms import to_model_range, to_pixels, to_uint8
from mezzotint.models import open_model
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.process.logsnr import alpha, diffuse, sigma
from mezzotint.process.objectives import multiscale_mse
from mezzotint.process.schedules import cosine, cosine_interpolated
from mezzotint.sampling.sample import draw_start_noise, integrate, make_logsnr_steps
from mezzotint.sampling.settings import SamplingSettings

OUT = Path(__file__).parent / "images"
SIZES = (64, 128, 256, 512)  # pixels


def picture(photo: Path | None) -> Tensor:
    """One image in [-1, 1], (1, 3, 512, 512): the photograph, or a built-in shape."""
    if photo is None:
        return to_model_range(torch.from_numpy(shapes(512).read(3).copy())[None])
    with Pillow.open(photo) as opened:
        return to_model_range(torch.from_numpy(to_pixels(opened, 512, 3, "adm").copy())[None])


def levels_of(size: int, shifted: bool, u: Tensor) -> Tensor:
    """Log-SNR of simple diffusion's cosine at u, with the shift of `size` pixels against 64 or without."""
    return cosine(image_d=size if shifted else 64)(u)


def noised(x: Tensor) -> None:
    """The photograph at 64 to 512 pixels at one u, without and with shift, all shown at 64: what a coarse look sees."""
    u = torch.tensor([0.65])
    rows, captions = [], []
    for shifted in (False, True):
        for size in SIZES:
            small = avg_pool2d(x, 512 // size)
            eps = rng.normal("noise", 0, [0], tuple(small.shape[1:]))
            logsnr = levels_of(size, shifted, u)
            z = diffuse(small, eps, logsnr)
            # Pooling divides the noise's standard deviation by size / 64; brought back to the variance of z at 64.
            scale = (alpha(logsnr) ** 2 + (sigma(logsnr) * 64 / size) ** 2).sqrt()
            rows.append(avg_pool2d(z, size // 64) / scale)
            captions.append(f"{size} px, log-SNR = {float(logsnr):.1f}")
    save_png(
        make_grid(to_uint8(torch.cat(rows).clamp(-1, 1)), 4, captions, zoom=3), OUT / "noised.png"
    )


def schedules() -> None:
    """Log-SNR over u for the shifted cosines and the interpolated schedule of 512 pixels."""
    u = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    _, axes = plt.subplots(figsize=(6, 3.4))
    for size in SIZES:
        axes.plot(
            u,
            levels_of(size, True, u),
            label=f"cosine, {size} px (shift {-2 * torch.log(torch.tensor(size / 64)):+.2f})",
        )
    axes.plot(
        u, cosine_interpolated(512, 32, 256)(u), "k--", label="interpolated, 512 px (32 to 256)"
    )
    axes.set(xlabel="u (0 clean, 1 noise)", ylabel="log-SNR", ylim=(-17, 13))
    axes.legend(fontsize=7)
    save_plot("schedules")


def band(octave: int, side: int = 512) -> Tensor:
    """Unit-variance noise between two spatial frequencies an octave apart: cycles per image 2^octave to twice that."""
    noise = rng.normal("noise", 0, [octave], (1, side, side)).double()
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f**2).sqrt()
    kept = torch.fft.ifft2(
        torch.fft.fft2(noise) * ((radius >= 2**octave) & (radius < 2 ** (octave + 1)))
    ).real
    return kept / kept.std()


def multiscale() -> None:
    """What an error of unit variance costs in each octave of spatial frequency: plain and multiscale loss at 512."""
    octaves = list(range(8))
    plain = [float(band(o).square().mean()) for o in octaves]
    scaled = [float(multiscale_mse(torch.zeros(1, 1, 512, 512).double(), band(o))) for o in octaves]
    whole = scaled[-1]
    _, axes = plt.subplots(figsize=(6, 3))
    axes.plot(octaves, plain, "o-", label="plain mean squared error")
    axes.plot(
        octaves,
        [s / whole for s in scaled],
        "s-",
        label="multiscale, 32 to 512 px (1 at the finest octave)",
    )
    axes.set(
        xticks=octaves,
        xlabel="spatial frequency, cycles per image",
        ylabel="loss per unit of error",
        yscale="log",
    )
    axes.set_xticklabels([f"{2**o}-{2 ** (o + 1)}" for o in octaves], fontsize=7)
    axes.legend(fontsize=7)
    save_plot("multiscale")
    print(
        "multiscale, loss per unit of error relative to the finest octave:",
        [round(s / whole, 1) for s in scaled],
    )


def wavelet(x: Tensor) -> None:
    """The bands of one level of the 5/3 wavelet, details enlarged fourfold in contrast."""
    bands = dwt53(x, 1).unflatten(1, (4, 3))[0]
    shown = torch.cat([bands[:1], bands[1:] * 4]).clamp(-1, 1)
    save_png(
        make_grid(to_uint8(avg_pool2d(shown, 2)), 4, ["LL", "LH x4", "HL x4", "HH x4"], zoom=1),
        OUT / "wavelet.png",
    )


def transforms() -> None:
    """Print GMAC of the 512-pixel U-Net behind each input transform."""
    _, preset = backbones.presets()["unet-512"]
    for transform, patch in (("none", 1), ("dwt", 2), ("dwt", 4), ("conv", 4)):
        config = replace(preset.config, transform=transform, patch=patch)
        with torch.device("meta"):
            net = backbones.registry["unet"].module(config)
            z, noise = torch.empty(1, 3, 512, 512), torch.empty(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(z, noise, Cond())
        print(f"unet-512 with {transform} {patch}: {counter.get_total_flops() / 2e9:.1f} GMAC")


def strip(run: Path, steps: int = 24, shown: int = 8) -> None:
    """A trained run's guess of the finished picture along the way, one row per class, plus its finished grid."""
    model = open_model(run)
    count = min(model.info.config.num_classes or 4, 4)
    seeds = list(range(count))
    frames: list[Tensor] = []

    def watched(denoise: Denoiser) -> Denoiser:
        def guess(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
            answer = denoise(z, logsnr, cond)
            frames.append(answer.x.cpu())
            return answer

        return guess

    settings = SamplingSettings(steps=steps)
    label = torch.tensor(seeds) if model.info.config.num_classes else None
    z = draw_start_noise(model, seeds, settings)
    integrate(
        model,
        z,
        make_logsnr_steps(model, settings),
        seeds,
        Cond(label=label),
        settings,
        None,
        watched,
    )
    kept = [frames[round(i * (len(frames) - 1) / (shown - 1))] for i in range(shown)]
    pixels = to_uint8(torch.stack(kept, 1).flatten(0, 1).clamp(-1, 1))
    save_png(
        make_grid(pixels, shown, zoom=4 if pixels.shape[-1] <= 16 else 1), OUT / "burnishing.png"
    )


def save_plot(name: str) -> None:
    """Write the current figure without a date, so that the same plot is the same file."""
    plt.tight_layout()
    plt.savefig(OUT / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close()


def main() -> None:
    """All figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, help="a trained run, e.g. runs/demo, for burnishing.png"
    )
    parser.add_argument("--photo", type=Path, help="a photograph; a built-in shape by default")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    x = picture(arguments.photo)
    noised(x)
    schedules()
    multiscale()
    wavelet(x)
    transforms()
    if arguments.run is not None:
        strip(arguments.run)


if __name__ == "__main__":
    main()
