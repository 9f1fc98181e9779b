"""Text to image on real captions: the drawings of Debian's openclipart-svg, whole authors held out.

    apt-get download openclipart-svg && dpkg -x openclipart-svg_*.deb clipart
    apt-get install librsvg2-bin                                  # rsvg-convert draws them
    python benchmarks/openclipart.py drawings --source clipart    # RUNS/sets: two prepared sets
    python benchmarks/openclipart.py encoder                      # RUNS/encoder: a T5 of two layers
    python benchmarks/openclipart.py train --images 150000        # RUNS/run; resumes
    python benchmarks/openclipart.py judge                        # RUNS/judge: an image tower
    python benchmarks/openclipart.py score                        # the result file and the sheet

No weights are downloaded. The T5 is trained here on the training drawings and their captions.
`score` draws held-out captions and asks a judge, trained on the training part alone, which of 100
captions each sample shows. The judge's answers on the real held-out drawings stand beside it, and
those for samples with each other's captions, which must be chance.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipart_drawings import write_drawings
from common import RESULTS, one_thread, write
from contrastive import (
    WIDTH,
    load_scorer,
    retrieval_ranks,
    save_scorer,
    train_encoder,
    train_scorer,
)
from mezzotint import config
from mezzotint.core.files import read_json, write_json
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepare import prepare_source
from mezzotint.data.text_encoder import open_text_encoder
from mezzotint.data.transforms import to_uint8
from mezzotint.models import load_model
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.sampling.sample import generate
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.train.loop import train

AMONG = 100
TARGET = 5 / AMONG
SHEET_CAPTIONS, SHEET_SEEDS = 8, 4


def make_sets(source: Path, out: Path, size: int) -> None:
    """Render the drawings and prepare the training and the held-out set."""
    start = time.monotonic()
    counts = write_drawings(source, out / "drawings", size)
    for part in counts["drawings"]:
        prepare_source(out / "drawings" / part, out / "sets" / part, size, progress=False)
    write_json(out / "drawings.json", {**counts, "seconds": round(time.monotonic() - start)})
    print(json.dumps(counts, indent=1))


def open_set(out: Path, part: str) -> tuple[Tensor, list[str]]:
    """Return uint8 drawings (n, 3, h, w) and their captions."""
    images = open_images(out / "sets" / part)
    pixels, _ = images.batch(range(len(images)))
    return pixels, [images.text(i) or "" for i in range(len(images))]


def recipe(out: Path, images: int, patches: int) -> config.Recipe:
    """uvit-text-tiny's own at this size, with so many patches along a side (its own: 8)."""
    size = read_json(out / "drawings.json", "run the stage drawings")["size"]
    own = [
        f"data.source={str(out / 'sets' / 'train')!r}",
        f"data.text_encoder={str(out / 'encoder')!r}",
        f"images={images}",
        f"model.size={size}",
        f"model.patch={size // patches}",
        f"model.text_dim={WIDTH}",
        f"schedule.options.image_d={size}",
        "save.every_images=4000",
        "samples.every_images=1000000000",
    ]
    return config.override(recipe_for("uvit-text-tiny"), own)


def sample_captions(
    folder: Path, captions: Sequence[str], guidance: float, steps: int
) -> tuple[Tensor, int]:
    """Return one uint8 sample for each caption, seeds 0, 1, ...; and the images trained on."""
    model = load_model(folder).eval().requires_grad_(False)
    kept = model.info.extra["text"]
    encoder = open_text_encoder(kept["encoder"], max_tokens=kept["max_tokens"])
    settings = SamplingSettings(
        steps=steps, guidance=Guidance(scale=guidance) if guidance != 1 else None, exact=False
    )
    samples = []
    for first in range(0, len(captions), 32):
        text, mask = encoder.conditions(captions[first : first + 32])
        longest = int(mask.sum(1).max())
        cond = Cond(text=text[:, :longest], text_mask=mask[:, :longest])
        seeds = list(range(first, first + len(text)))
        samples.append(to_uint8(generate(model, seeds, cond, settings)))
    return torch.cat(samples), model.info.images


def summarise(ranks: Tensor, num_captions: int) -> dict[str, float]:
    """Return top-1 and top-5 with the standard error of the mean over captions, and the mean rank.

    Args:
        ranks: of samples, caption by caption, equally many of each.
        num_captions: number of captions.
    """
    found = {f"top-{k}": (ranks < k).float().view(num_captions, -1).mean(1) for k in (1, 5)}
    result = {}
    for name, per_caption in found.items():
        result[name] = round(float(per_caption.mean()), 4)
        error = float(per_caption.std()) / math.sqrt(num_captions)
        result[f"{name} standard error"] = round(error, 4)
    return {**result, "mean rank of 100": round(float(ranks.float().mean()) + 1, 1)}


def draw_captions(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw at most `count` different captions, in an order that the seed decides."""
    distinct = list(dict.fromkeys(captions))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    return [distinct[i] for i in order[:count].tolist()]


def make_judge(out: Path, steps: int, seed: int) -> None:
    """Train the judge, and measure it on the real drawings of both parts."""
    pixels, captions = open_set(out, "train")
    judge = train_scorer(pixels, captions, out / "encoder", steps, seed + 1)
    save_scorer(judge, out / "judge")
    held_out, real_captions = open_set(out, "test")
    real = retrieval_ranks(judge, held_out, real_captions, AMONG, seed)
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randperm(len(pixels), generator=generator)[: len(held_out)].tolist()
    known = retrieval_ranks(judge, pixels[seen], [captions[i] for i in seen], AMONG, seed)
    found = {
        "judge_steps": steps,
        "real held-out drawings": summarise(real, len(real)),
        "real training drawings": summarise(known, len(known)),
    }
    write_json(out / "judge" / "real.json", found)
    print(json.dumps(found, indent=1))


def score(args: argparse.Namespace) -> None:
    """Measure retrieval of held-out captions from samples, write the result and the sheet."""
    out = args.out.resolve()
    start = time.monotonic()
    judge = load_scorer(out / "encoder", out / "judge")
    _, real_captions = open_set(out, "test")
    distinct = draw_captions(real_captions, args.num_captions, args.seed)
    wanted = [caption for caption in distinct for _ in range(args.each)]
    samples, images = sample_captions(out / "run" / "model", wanted, args.guidance, args.steps)
    ranks = retrieval_ranks(judge, samples, wanted, AMONG, args.seed)
    shifted = wanted[args.each :] + wanted[: args.each]
    control = retrieval_ranks(judge, samples, shifted, AMONG, args.seed)
    recorded = config.to_dict(recipe(out, args.images, args.patches))
    recorded["data"].update(source="sets/train", text_encoder="encoder")  # no path of this machine
    content: dict[str, Any] = {
        "data": read_json(out / "drawings.json", "run the stage drawings"),
        "recipe": recorded,
        "training_images": images,
        "guidance": args.guidance,
        "steps": args.steps,
        "captions": len(distinct),
        "samples of each": args.each,
        "chance": 1 / AMONG,
        "target": TARGET,
        "samples": summarise(ranks, len(distinct)),
        "samples with another caption": summarise(control, len(distinct)),
        **read_json(out / "judge" / "real.json", "run the stage judge"),
        "seconds": round(time.monotonic() - start),
    }
    write(args.result, "cpu", **content)
    print(json.dumps({k: content[k] for k in content if "recipe" not in k}, indent=1))
    draw_sheet(out, distinct, args)


def draw_sheet(out: Path, distinct: Sequence[str], args: argparse.Namespace) -> None:
    """Draw the first captions, two in a row, each with a row of seeds; print them."""
    shown = distinct[:SHEET_CAPTIONS]
    wanted = [caption for caption in shown for _ in range(SHEET_SEEDS)]
    samples, _ = sample_captions(out / "run" / "model", wanted, args.guidance, args.steps)
    save_png(make_grid(samples, columns=2 * SHEET_SEEDS), args.sheet)
    with Image.open(args.sheet) as image:
        small = image.quantize(128)  # a fourth of the bytes
    small.save(args.sheet, optimize=True)
    for k, caption in enumerate(shown):
        print(f"row {k // 2 + 1}, {('left', 'right')[k % 2]}: {caption}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("drawings", "encoder", "train", "judge", "score"))
    parser.add_argument("--source", type=Path, help="folder of the package, for drawings")
    parser.add_argument("--out", type=Path, default=Path("runs/openclipart"))
    parser.add_argument("--size", type=int, default=128, help="side in pixels, for drawings")
    parser.add_argument("--encoder-steps", type=int, default=1000)
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=150_000, help="training length")
    parser.add_argument("--patches", type=int, default=4, help="along a side; 8 is 4 times dearer")
    parser.add_argument("--num-captions", type=int, default=100, help="at most so many, for score")
    parser.add_argument("--each", type=int, default=4, help="samples of every held-out caption")
    parser.add_argument("--guidance", type=float, default=4.0, help="as DiT counts it; 1 is none")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULTS / "openclipart.json")
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/openclipart.png"))
    args = parser.parse_args()
    one_thread()
    out = args.out.resolve()
    if args.stage == "drawings":
        if args.source is None or args.size % args.patches:
            parser.error(f"drawings needs --source, and a --size that {args.patches} divides")
        make_sets(args.source, out, args.size)
    elif args.stage == "encoder":
        train_encoder(*open_set(out, "train"), out / "encoder", args.encoder_steps, args.seed)
    elif args.stage == "train":
        train(recipe(out, args.images, args.patches), out / "run")
    elif args.stage == "judge":
        make_judge(out, args.judge_steps, args.seed)
    else:
        score(args)


if __name__ == "__main__":
    main()
