"""CLIP score over a distance, a point for each guidance scale, of a small model of drawn shapes.

    python benchmarks/words_sweep.py --out runs/words-sweep --weights INCEPTION

It trains `uvit-text-tiny` as benchmarks/words.py does, and the scorer: a CLIP of two layers, made
and trained here on the training part of the same shapes in place of OpenAI's. Then it runs
`mezzotint evaluate --sweep` on the captions that neither has seen. Nothing is downloaded, and it
resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mezzotint.cli import run_command
from mezzotint.core import rng
from mezzotint.data.image_dataset import open_images
from mezzotint.data.shapes import list_combinations
from mezzotint.evaluate.clip import Preprocessing, open_clip
from mezzotint.evaluate.features import NETWORK_BATCH
from mezzotint.train.loop import train
from words import make_encoder, recipe

WIDTH, PATCH, MAX_TOKENS, BATCH = 64, 4, 16, 64


def save_tokenizer(folder: Path, captions: Sequence[str]) -> int:
    """Write a tokenizer of the captions' words; return the number of its end token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in captions for word in caption.split()})
    names = ["<pad>", "<start>", "<unk>", *words, "<end>"]
    end = len(names) - 1
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
        unk_token="<unk>", padding_side="right",
    ).save_pretrained(folder)  # fmt: skip
    return end


def make_scorer(folder: Path, size: int, steps: int) -> Path:
    """Make and train a small CLIP on the training part of the shapes."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    if (folder / "model.safetensors").is_file():
        return folder
    end = save_tokenizer(folder, [a.caption() for a in list_combinations("train")])
    layers = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    text = {
        "vocab_size": end + 1, "max_position_embeddings": MAX_TOKENS, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": end,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**layers, **text},
            vision_config={**layers, "image_size": size, "patch_size": PATCH},
            projection_dim=WIDTH,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    images = open_images(f"shapes:train,count={steps * BATCH}", size=size, keep_in_memory=False)
    prepare = Preprocessing(size=size, crop=size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    order = rng.philox("order", 0, 0).permutation(steps * BATCH)
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH].tolist()
        pixels = prepare(images.batch(rows)[0])
        words = tokenizer([images.text(i) for i in rows], return_tensors="pt", padding=True)
        loss = model(**words, pixel_values=pixels, return_loss=True).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"scorer step {step + 1}: loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder)
    return folder


def retrieval(scorer: Path, size: int, count: int = 300) -> float:
    """Return how often a held-out image is nearest to its caption of the 75 held-out ones."""
    clip = open_clip(str(scorer))
    images = open_images(f"shapes:test,count={count}", size=size, keep_in_memory=False)
    captions = [a.caption() for a in list_combinations("test")]
    parts = [range(i, min(count, i + NETWORK_BATCH)) for i in range(0, count, NETWORK_BATCH)]
    rows = torch.cat([clip.features(images.batch(list(part))[0]) for part in parts])
    nearest = (rows @ clip.embed(captions).T).argmax(1).tolist()
    hits = [captions[k] == images.text(i) for i, k in enumerate(nearest)]
    return sum(hits) / count


def main() -> None:
    """Train, make the reference, sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/words-sweep"))
    parser.add_argument("--weights", type=Path, required=True, help="of Inception, to Mixed_7a")
    parser.add_argument("--images", type=int, default=50_000, help="training length")
    parser.add_argument("--scorer-steps", type=int, default=600)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--each", type=int, default=4, help="images of every held-out caption")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scales", default="1,1.5,2,3,4,6")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    scorer = make_scorer(out / "shapes-clip", args.size, args.scorer_steps)
    right = retrieval(scorer, args.size)
    print(f"the scorer finds the caption of {right:.1%} of held-out images among 75", flush=True)
    make_encoder(out / "encoder")
    train(recipe(out, args.images, args.size), out / "run")
    captions = [a.caption() for a in list_combinations("test")]
    (out / "prompts.txt").write_text("\n".join(captions) + "\n")
    features = ["--features", "inception-64", "--weights", str(args.weights)]
    reference, size = str(out / "shapes.npz"), str(args.size)
    run_command("reference", "shapes:test,count=500", reference, "--size", size, *features)
    run_command(
        "evaluate", str(out / "run"), "--prompts", str(out / "prompts.txt"),
        "-n", str(args.each * len(captions)), "--steps", str(args.steps), "--reference", reference,
        *features, "--clip", str(scorer), "--sweep", f"guidance={args.scales}",
        "-o", str(out / "sweep.json"),
    )  # fmt: skip
    (out / "scorer.json").write_text(json.dumps({"retrieval_among_75": right}) + "\n")


if __name__ == "__main__":
    main()
