"""Text conditioning: does uvit-text-tiny draw combinations of words that it never saw?

    python benchmarks/words.py --out runs/words               # train, sample, check; resumes
    python benchmarks/words.py --out runs/words --check-real  # only run the checker on real images

Every caption of `shapes` names a colour, a shape and a position; every fifth combination of the
three is held out of training. A T5 encoder of two layers is made here and trained to classify the
words of the training captions (in place of pretraining); nothing is downloaded. The checker looks
at pixels alone: the hue of the saturated pixels is the colour, their centroid the position, and the
template that covers them best the shape.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mezzotint import config
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data import shapes as drawn
from mezzotint.data.image_dataset import open_images
from mezzotint.data.shapes import CENTRES, COLOURS, POSITIONS, SHAPES, Attributes, list_combinations
from mezzotint.data.text_encoder import open_text_encoder
from mezzotint.data.transforms import to_uint8
from mezzotint.models import load_model
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.sampling.sample import generate
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.train.loop import train

WIDTH = 64  # of the encoder
OF_ONE_HUE = 30  # degrees around the commonest hue
TARGET = {"colour": 0.9, "shape": 0.8, "position": 0.8}


def make_encoder(folder: Path, seed: int = 0) -> Path:
    """Make a word-level T5 encoder, trained to classify the training captions' three words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    if (folder / "model.safetensors").is_file():
        return folder
    captions = [a.caption() for a in list_combinations("train")]
    words = sorted({word for caption in captions for word in caption.split()})
    names = ["<pad>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )
    torch.manual_seed(seed)
    size = {
        "vocab_size": len(names),
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
    }
    model = T5EncoderModel(T5Config(**size, dropout_rate=0.0))
    counts = (len(COLOURS), len(SHAPES), len(POSITIONS))
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, count) for count in counts)
    batch = fast(captions, return_tensors="pt", padding=True)
    targets = torch.tensor([tuple(a) for a in list_combinations("train")])
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=2e-3)
    for step in range(300):
        rows = torch.randint(len(captions), (64,))
        mask = batch["attention_mask"][rows]
        states = model(input_ids=batch["input_ids"][rows], attention_mask=mask).last_hidden_state
        end = states[
            torch.arange(64), mask.sum(1) - 1
        ]  # the state of the end token knows the whole caption
        losses = [
            torch.nn.functional.cross_entropy(head(end), targets[rows, k])
            for k, head in enumerate(heads)
        ]
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
        if step % 100 == 99:
            print(f"encoder step {step + 1}: loss {float(sum(losses)):.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and saturation times value, of uint8 (3, h, w)."""
    r, g, b = (pixels / 255.0).astype(np.float64)
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.where(
        high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    return hue * 60, chroma


def masks_of_shapes(side: int, x: float, y: float, radius: float) -> list[np.ndarray]:
    """Coverage of every shape at a centre and size in parts of the side."""
    pixel = (np.arange(side) + 0.5) / side
    across, down = pixel[None] - x, pixel[:, None] - y
    return [
        np.clip(0.5 - distance(across, down, radius) * side, 0, 1) for distance in SHAPES.values()
    ]


def read(pixels: np.ndarray) -> Attributes | None:
    """Return what an image shows, from its pixels alone; None if hardly a pixel is saturated."""
    hue, chroma = hsv(pixels)
    side = pixels.shape[-1]
    cover = np.clip((chroma - 0.25) / 0.3, 0, 1)  # grounds are nearly grey, shapes saturated
    if cover.sum() < 0.003 * side**2:
        return None
    histogram, edges = np.histogram(hue, bins=120, range=(0, 360), weights=cover)
    peak = (edges[:-1] + edges[1:])[histogram.argmax()] / 2
    # A halo of another colour is not part of the shape.
    cover = cover * (abs((hue - peak + 180) % 360 - 180) < OF_ONE_HUE)
    apart = [abs((peak - h + 180) % 360 - 180) for h in COLOURS.values()]
    pixel = (np.arange(side) + 0.5) / side
    x, y = (cover.sum(0) * pixel).sum() / cover.sum(), (cover.sum(1) * pixel).sum() / cover.sum()
    column, row = (int(np.argmin([abs(v - c) for c in CENTRES])) for v in (x, y))
    best = (-1.0, 0)
    for radius in np.linspace(0.10, 0.18, 9):
        # The triangle's centroid is its centre, but rows of pixels are cut.
        for dy in np.linspace(-0.03, 0.03, 5):
            for dx in (-0.01, 0.0, 0.01):
                for k, mask in enumerate(masks_of_shapes(side, x + dx, y + dy, radius)):
                    overlap = np.minimum(mask, cover).sum() / np.maximum(mask, cover).sum()
                    best = max(best, (float(overlap), k))
    return Attributes(int(np.argmin(apart)), best[1], 3 * row + column)


def score(images: Sequence[np.ndarray], wanted: Sequence[Attributes]) -> dict[str, float]:
    """Return the fractions of images with the wanted colour, shape and position, and all three."""
    right = np.array(
        [[found is not None and found[k] == a[k] for k in range(3)] for found, a in
         ((read(p), a) for p, a in zip(images, wanted, strict=True))]
    )  # fmt: skip
    named = dict(zip(("colour", "shape", "position"), right.mean(0).tolist(), strict=True))
    return {**named, "all three": float(right.all(1).mean())}


def check_real(count: int = 150, size: int = 64) -> dict[str, float]:
    """Score real images of the held-out combinations, to check the checker."""
    images = open_images(f"shapes:test,count={count}", size=size, keep_in_memory=False)
    source = images.source
    assert isinstance(source, drawn.ShapeSource)
    pixels, _ = images.batch(range(count))
    return score(pixels.numpy(), [source.attributes(i) for i in range(count)])


def recipe(out: Path, images: int, size: int) -> config.Recipe:
    """uvit-text-tiny's own, on the training part of the shapes, with the encoder made here."""
    own = [
        "data.source='shapes:train,count=40000'",
        f"data.text_encoder={str(out / 'encoder')!r}",
        f"images={images}",
        f"model.size={size}",
        f"schedule.options.image_d={size}",
        f"model.text_dim={WIDTH}",
        "save.every_images=5000",
        "samples.every_images=1000000000",
    ]
    return config.override(recipe_for("uvit-text-tiny"), own)


def sample_images(
    model_folder: Path, wanted: Sequence[Attributes], guidance: float, steps: int
) -> torch.Tensor:
    """Return one uint8 image for each combination."""
    model = load_model(model_folder).eval().requires_grad_(False)
    kept = model.info.extra["text"]
    text, mask = open_text_encoder(kept["encoder"], max_tokens=kept["max_tokens"]).conditions(
        [a.caption() for a in wanted]
    )
    settings = SamplingSettings(
        steps=steps, guidance=Guidance(scale=guidance) if guidance != 1 else None, exact=False
    )
    return to_uint8(
        generate(model, list(range(len(wanted))), Cond(text=text, text_mask=mask), settings)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/words"))
    parser.add_argument("--images", type=int, default=150_000, help="training length")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--each", type=int, default=4, help="images of every held-out combination")
    parser.add_argument("--guidance", type=float, default=4.0, help="as DiT counts it; 1 is none")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--check-real", action="store_true", help="only check the checker")
    parser.add_argument("--no-training", action="store_true", help="sample what the run holds now")
    args = parser.parse_args()
    real = check_real(size=args.size)
    print("the checker on real images of held-out combinations:", json.dumps(real))
    if args.check_real:
        return
    out = args.out.resolve()
    start = time.monotonic()
    make_encoder(out / "encoder")
    if not args.no_training:
        train(recipe(out, args.images, args.size), out / "run")
    wanted = [a for a in list_combinations("test") for _ in range(args.each)]
    images = sample_images(out / "run" / "model", wanted, args.guidance, args.steps)
    result = {
        "held_out_combinations": len(list_combinations("test")),
        "pictures": len(wanted),
        "size": args.size,
        "training_images": load_model(out / "run" / "model").info.images,
        "guidance": args.guidance,
        "sampler": "ddim",
        "steps": args.steps,
        "seconds": round(time.monotonic() - start),
        "measured": score(images.numpy(), wanted),
        "target": TARGET,
        "checker_on_real_pictures": real,
    }
    (out / "words.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = list(range(0, len(wanted), max(1, len(wanted) // 40)))[:40]
    save_png(make_grid(images[shown], columns=8), out / "words.png")
    for k, i in enumerate(shown):
        found = read(images[i].numpy())
        caption = found.caption() if found else "nothing"
        print(f"{k // 8},{k % 8}: caption {wanted[i].caption()!r}, recognised {caption!r}")
    print(json.dumps(result["measured"]))
    with Image.open(out / "words.png") as grid:
        print(f"{out / 'words.png'} {grid.size}, {out / 'words.json'}")


if __name__ == "__main__":
    main()
