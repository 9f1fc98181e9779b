"""Draw the figures of docs/: `python docs/make_figures.py [--run RUN] [--photo FILE]`.

Everything except burnishing.png, which needs a trained run, is computed here in seconds.
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
from mezzotint.data.shapes import open_shapes
from mezzotint.data.transforms import to_model_range, to_pixels, to_uint8
from mezzotint.process.denoiser import Cond
from mezzotint.process.logsnr import alpha, diffuse, sigma
from mezzotint.process.objectives import multiscale_mse
from mezzotint.process.schedules import cosine, cosine_interpolated
from mezzotint.sampling.job import make_job
from mezzotint.sampling.trajectory import trajectory

OUT = Path(__file__).parent / "images"
SIZES = (64, 128, 256, 512)  # pixels


def read_photo(photo: Path | None) -> Tensor:
    """Return one image in [-1, 1], (1, 3, 512, 512): the photograph, or a built-in shape."""
    if photo is None:
        return to_model_range(torch.from_numpy(open_shapes(512).read(3).copy())[None])
    with Pillow.open(photo) as opened:
        return to_model_range(torch.from_numpy(to_pixels(opened, 512, 3, "adm").copy())[None])


def cosine_logsnr(size: int, shifted: bool, u: Tensor) -> Tensor:
    """Return the log-SNR of the cosine schedule, shifted from 64 to `size` pixels or not."""
    return cosine(image_d=size if shifted else 64)(u)


def draw_noised(x: Tensor) -> None:
    """Draw the photo noised at 64 to 512 pixels, without and with the shift, all at 64 pixels."""
    u = torch.tensor([0.65])
    rows, captions = [], []
    for shifted in (False, True):
        for size in SIZES:
            small = avg_pool2d(x, 512 // size)
            eps = rng.normal("noise", 0, [0], tuple(small.shape[1:]))
            logsnr = cosine_logsnr(size, shifted, u)
            z = diffuse(small, eps, logsnr)
            # Pooling divides the standard deviation of the noise by size / 64; restore the
            # variance that z has at 64 pixels.
            scale = (alpha(logsnr) ** 2 + (sigma(logsnr) * 64 / size) ** 2).sqrt()
            rows.append(avg_pool2d(z, size // 64) / scale)
            captions.append(f"{size} px, log-SNR = {float(logsnr):.1f}")
    pixels = to_uint8(torch.cat(rows).clamp(-1, 1))
    save_png(make_grid(pixels, 4, captions, zoom=3), OUT / "noised.png")


def plot_schedules() -> None:
    """Plot the shifted cosine schedules, and the interpolated schedule for 512 pixels."""
    u = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    _, axes = plt.subplots(figsize=(6, 3.4))
    for size in SIZES:
        shift = -2 * torch.log(torch.tensor(size / 64))
        label = f"cosine, {size} px (shift {shift:+.2f})"
        axes.plot(u, cosine_logsnr(size, True, u), label=label)
    interpolated = cosine_interpolated(512, 32, 256)(u)
    axes.plot(u, interpolated, "k--", label="interpolated, 512 px (32 to 256)")
    axes.set(xlabel="u (0 clean, 1 noise)", ylabel="log-SNR", ylim=(-17, 13))
    axes.legend(fontsize=7)
    save_plot("schedules")


def noise_of_octave(octave: int, side: int = 512) -> Tensor:
    """Return unit-variance noise with 2^octave to 2^(octave + 1) cycles per image."""
    noise = rng.normal("noise", 0, [octave], (1, side, side)).double()
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f**2).sqrt()
    mask = (radius >= 2**octave) & (radius < 2 ** (octave + 1))
    filtered = torch.fft.ifft2(torch.fft.fft2(noise) * mask).real
    return filtered / filtered.std()


def plot_multiscale_loss() -> None:
    """Plot the plain and the multiscale loss of a unit error in each octave, at 512 pixels."""
    octaves = list(range(8))
    zeros = torch.zeros(1, 1, 512, 512).double()
    plain = [float(noise_of_octave(o).square().mean()) for o in octaves]
    losses = [float(multiscale_mse(zeros, noise_of_octave(o))) for o in octaves]
    relative = [loss / losses[-1] for loss in losses]
    _, axes = plt.subplots(figsize=(6, 3))
    axes.plot(octaves, plain, "o-", label="plain mean squared error")
    label = "multiscale, 32 to 512 px (1 at the finest octave)"
    axes.plot(octaves, relative, "s-", label=label)
    axes.set(xticks=octaves, xlabel="spatial frequency, cycles per image")
    axes.set(ylabel="loss per unit of error", yscale="log")
    axes.set_xticklabels([f"{2**o}-{2 ** (o + 1)}" for o in octaves], fontsize=7)
    axes.legend(fontsize=7)
    save_plot("multiscale")
    print("multiscale loss relative to the finest octave:", [round(r, 1) for r in relative])


def draw_wavelet(x: Tensor) -> None:
    """Draw the bands of one level of the 5/3 wavelet, with the details enlarged fourfold."""
    bands = dwt53(x, 1).unflatten(1, (4, 3))[0]
    shown = torch.cat([bands[:1], bands[1:] * 4]).clamp(-1, 1)
    pixels = to_uint8(avg_pool2d(shown, 2))
    captions = ["LL", "LH x4", "HL x4", "HH x4"]
    save_png(make_grid(pixels, 4, captions, zoom=1), OUT / "wavelet.png")


def print_transform_costs() -> None:
    """Print the GMAC of the 512-pixel U-Net with each input transform."""
    _, preset = backbones.presets()["unet-512"]
    for transform, patch in (("none", 1), ("dwt", 2), ("dwt", 4), ("conv", 4)):
        config = replace(preset.config, transform=transform, patch=patch)
        with torch.device("meta"):
            net = backbones.registry["unet"].module(config)
            z, noise = torch.empty(1, 3, 512, 512), torch.empty(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(z, noise, Cond())
        print(f"unet-512 with {transform} {patch}: {counter.get_total_flops() / 2e9:.1f} GMAC")


def draw_trajectory(run: Path, steps: int = 24, columns: int = 8) -> None:
    """Draw the predictions of a trained run at `columns` of `steps` steps, one row per class."""
    job = make_job(run, {"steps": steps})
    seeds = list(range(min(job.model.info.config.num_classes or 4, 4)))
    frames = trajectory(job, seeds)[0][:-1]  # the last one is the finished image
    shown = [frames[round(i * (len(frames) - 1) / (columns - 1))] for i in range(columns)]
    pixels = torch.stack(shown, 1).flatten(0, 1)
    zoom = 4 if pixels.shape[-1] <= 16 else 1
    save_png(make_grid(pixels, columns, zoom=zoom), OUT / "burnishing.png")


def save_plot(name: str) -> None:
    """Write the current figure without a date, so that the same plot gives the same file."""
    plt.tight_layout()
    plt.savefig(OUT / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close()


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="trained run for burnishing.png, e.g. runs/demo")
    parser.add_argument("--photo", type=Path, help="photograph; by default a built-in shape")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    x = read_photo(arguments.photo)
    draw_noised(x)
    plot_schedules()
    plot_multiscale_loss()
    draw_wavelet(x)
    print_transform_costs()
    if arguments.run is not None:
        draw_trajectory(arguments.run)


if __name__ == "__main__":
    main()
