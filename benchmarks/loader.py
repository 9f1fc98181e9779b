"""Images per second of the data loader per core, and the cores that each preset needs.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --photos PHOTOS \\
        --out benchmarks/results/loader-cpu.json

Rates are processor time of one thread in random order: JPEG files decoded, resized and cropped; the
same images prepared once (memory-mapped rows of uint8); latents of a 256 px image, drawn from
float16 moments of 4 x 32 x 32. Mirroring and scaling to the model's range are included; "for a GPU"
leaves them out, because they are done there, and has one copy of the bytes in place of that to
pinned memory. `--photos` are prepared in each form, for sizes and rates. Noise is that of one image
in either stream of random numbers.

`--gpu-flops` is the most that the network could run at; a preset's demand is that rate over 6 GMAC.
A row compares it, for 8 GPUs that reach 45 % of that rate, with 16 cores that read images or
latents for them. They draw their random numbers themselves.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from common import RESULTS, one_thread, write
from mezzotint.core.rng import Draws, Stream
from mezzotint.data.autoencoder import draw_latents
from mezzotint.data.encode_latents import encode_latents
from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.data.latent_dataset import LatentDataset
from mezzotint.data.prepare import prepare_source
from mezzotint.data.prepared_forms import FORMS
from mezzotint.tools import summary
from mezzotint.tools.benchmark import time_interleaved

GPUS, CORES, UTILISATION = 8, 16, 0.45
STREAMS: tuple[Stream, ...] = get_args(Stream)
NOISE = ((4, 32, 32), (3, 64, 64), (3, 256, 256), (3, 512, 512))


def jpegs(folder: Path, count: int, side: int) -> None:
    """Write smooth random colour images, about as compressible as photographs."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 24, 24, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1)
        grain = 0.04 * torch.randn(3, side, side, generator=generator)
        pixels = ((image + grain).clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
        (folder / f"{i % 10}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i % 10}" / f"{i:05d}.jpg", quality=90)


@dataclass(frozen=True)
class Pooled:
    """A codec that costs nothing: averages over 8 x 8 pixels in 4 channels, with some variance."""

    name: str = "pooled"
    factor: int = 8
    channels: int = 4
    scale: float = 1.0
    shift: float = 0.0
    hash: str = "pooled"

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        mean = torch.nn.functional.avg_pool2d(images, 8)
        mean = torch.cat([mean, mean[:, :1]], 1)
        return mean, torch.full_like(mean, -4.0)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Latents drawn with `noise`."""
        return draw_latents(mean, logvar, noise)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Blocks of 8 x 8 pixels."""
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8.0).clamp(-1, 1)


def rate(
    images: ImageDataset | LatentDataset, device: str, batch: int = 64, for_gpu: bool = False
) -> float:
    """Return images per second of one core in random order; the median of five batches."""
    generator = torch.Generator().manual_seed(1)
    numbers, draws = list(range(batch)), Draws(0)

    def read() -> None:
        loaded, _ = images.batch(torch.randint(len(images), (batch,), generator=generator).tolist())
        if for_gpu:
            loaded.clone()
        else:
            images.to_model(loaded, draws, numbers, True, lambda t: t)

    return batch / time_interleaved({"read": read}, device)["read"]


def noise_rates(shape: tuple[int, ...], device: str, batch: int = 8) -> dict[str, float]:
    """Return by stream the images per second whose noise one core draws, each from its number."""
    batch = batch if shape[-1] > 64 else 8 * batch
    works = {
        stream: partial(Draws(0, stream).normal, "noise", list(range(batch)), shape)
        for stream in STREAMS
    }
    return {stream: batch / seconds for stream, seconds in time_interleaved(works, device).items()}


def measure_forms(photos: Path, size: int, folder: Path, device: str) -> list[dict[str, Any]]:
    """Return bytes and images per second and core of each form of the photographs at `size`."""
    rows = []
    for name in FORMS:
        out = folder / f"{name}{size}"
        start = time.process_time()
        report = prepare_source(photos, out, size, form=name, progress=False)
        seconds = time.process_time() - start
        images = open_images(str(out), keep_in_memory=False)
        stored = sum(path.stat().st_size for path in out.glob("*.arrow"))
        rows.append(
            {
                "form": name,
                "size": size,
                "images": report["images"],
                "bytes_per_image": stored / report["images"],
                "read_for_a_gpu_per_core": rate(images, device, 32, for_gpu=True),
                "prepared_per_core": report["images"] / seconds,
            }
        )
        print(rows[-1])
    return rows


def demands(flops: float) -> dict[str, float]:
    """Return by preset the images per second of a training step (6 GMAC per image) at `flops`."""
    rows = summary.read_summaries()
    return {r["name"]: flops / (6e9 * (r["gmac"] - r["gmac_skipped"])) for r in rows}


def source_of(preset: str) -> str:
    """Return what the preset is trained on: latents, or prepared images of its own size."""
    row = summary.read_summary(preset)
    return "latents" if row["codec"] != "pixels" else f"prepared {row['input_shape'][1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument(
        "--gpu-flops",
        type=float,
        default=790e12,
        help="790e12: bf16 products of one H200, measured",
    )
    parser.add_argument("--photos", type=Path, help="folder of photographs for the forms")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu",))
    parser.add_argument("--out", type=Path, default=RESULTS / "loader-cpu.json")
    args = parser.parse_args()
    one_thread()
    count, sizes = (16, [32]) if args.small else (args.count, args.sizes)
    rates: dict[str, float] = {}
    forms: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for size in sizes:
            stored = max(size, 256)  # images at least as large as the training size
            source = folder / f"jpeg{stored}"
            if not source.exists():
                source.mkdir()
                jpegs(source, count, stored)
            # Without a cache, as a set larger than memory is read.
            rates[f"jpeg {stored} to {size}"] = rate(
                open_images(str(source), size=size, keep_in_memory=False), args.device
            )
            prepare_source(source, folder / f"prepared{size}", size, progress=False)
            images = open_images(str(folder / f"prepared{size}"), size=size, keep_in_memory=False)
            rates[f"prepared {size}"] = rate(images, args.device)
            rates[f"prepared {size}, for a GPU"] = rate(images, args.device, for_gpu=True)
        images = open_images(
            str(folder / f"jpeg{max(sizes[0], 256)}"), size=256, keep_in_memory=False
        )
        encode_latents(images, folder / "latents", Pooled(), progress=False)
        rates["latents"] = rate(LatentDataset(folder / "latents"), args.device)
        latents = LatentDataset(folder / "latents")
        rates["latents, for a GPU"] = rate(latents, args.device, for_gpu=True)
        for size in (sizes if args.small else (256, 512)) if args.photos else ():
            forms += measure_forms(args.photos, size, folder, args.device)
    for shape in NOISE[:1] if args.small else NOISE:
        for stream, value in noise_rates(shape, args.device).items():
            rates[f"noise {'x'.join(map(str, shape))}, {stream}"] = value
    for name, value in rates.items():
        print(f"{name:24} {value:12,.0f} images/s per core")
    rows: list[dict[str, Any]] = []
    for preset, most in demands(args.gpu_flops).items():
        source, demand = source_of(preset), GPUS * UTILISATION * most
        read = rates.get(f"{source}, for a GPU")
        rows.append(
            {
                "preset": preset,
                "source": source,
                "demand_8_gpus": demand,
                "supply_16_cores": read and CORES * read,
                "outruns": read and CORES * read > demand,
            }
        )
        print(rows[-1])
    write(
        args.out,
        args.device,
        rates_per_core=rates,
        gpu_flops=args.gpu_flops,
        utilisation=UTILISATION,
        photos=args.photos and args.photos.name,
        forms=forms,
        rows=rows,
    )


if __name__ == "__main__":
    main()
