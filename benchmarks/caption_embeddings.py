"""What caption embeddings cost: seconds and bytes for each caption, and T5-XXL's by arithmetic.

    python benchmarks/caption_embeddings.py --encoder runs/openclipart/encoder \\
        --data runs/openclipart/sets/train

Every caption of the data set is embedded into an empty cache, encoded alone, read back in random
batches, and embedded at every read. What the cache takes beyond encoding does not depend on the
encoder, but for its width. The hours of T5-XXL are computed, not measured: its multiplications over
a rate, and its weights over a bandwidth, for captions that are encoded one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, one_thread, write
from mezzotint.data.caption_embeddings import LiveCaptions, embed_captions
from mezzotint.data.image_dataset import open_images
from mezzotint.data.text_encoder import open_text_encoder

MILLION = 1_000_000
PADDED = 128  # tokens of a caption on disk if padding were stored
# T5 v1.1 XXL's encoder (arXiv 2002.05202's feed-forward of three matrices): 24 layers, width 4096,
# 64 heads of 64, hidden width 10,240; 32,128 embeddings are looked up, not multiplied.
XXL_WIDTH, XXL_LAYERS, XXL_HIDDEN = 4096, 24, 10_240
XXL_WEIGHTS = XXL_LAYERS * (4 * XXL_WIDTH**2 + 3 * XXL_WIDTH * XXL_HIDDEN)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compute_xxl(tokens: float, tflops: float, terabytes: float) -> dict[str, float]:
    """Return bytes and hours of a million captions with T5-XXL.

    Args:
        tokens: of a caption, on average.
        tflops: of a device, in 1e12 FLOP per second.
        terabytes: of weights that a device reads per second, in 1e12 bytes.
    """
    flop = 2 * XXL_WEIGHTS * tokens * MILLION
    return {
        "tokens per caption": tokens,
        "GB on disk": round(tokens * XXL_WIDTH * 2 * MILLION / 1e9, 1),
        "GB on disk if padded": round(PADDED * XXL_WIDTH * 2 * MILLION / 1e9, 1),
        "hours by FLOP": round(flop / (tflops * 1e12) / 3600, 3),
        "hours by float32 weights read once a caption": round(
            4 * XXL_WEIGHTS * MILLION / (terabytes * 1e12) / 3600, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="folder of a T5")
    parser.add_argument("--data", required=True, help="data set with captions")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tflops", type=float, default=67, help="float32, data sheet of H100")
    parser.add_argument("--terabytes", type=float, default=3.35, help="per second, the same")
    parser.add_argument("--result", type=Path, default=RESULTS / "caption-embeddings.json")
    args = parser.parse_args()
    one_thread()
    images = open_images(args.data)
    texts = [images.text(i) for i in range(len(images))]
    encoder = open_text_encoder(args.encoder, dtype_name="bfloat16")
    distinct = list(dict.fromkeys(text for text in texts if text))
    encoding = seconds_of(lambda: [encoder.encode(caption) for caption in distinct])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MEZZOTINT_CACHE"] = cache
        embedding = seconds_of(lambda: embed_captions(texts, encoder))
        cached, live = embed_captions(texts, encoder), LiveCaptions(texts, encoder)
        disk = sum(path.stat().st_size for path in cached.folder.iterdir())
        rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        batches = [rows[i : i + args.batch] for i in range(0, 1024, args.batch)]
        read = sum(map(len, batches))
        reading = {
            name: seconds_of(lambda: [captions.batch(batch) for batch in batches]) / read  # noqa: B023
            for name, captions in (("cached", cached), ("embedded at every read", live))
        }
    tokens = cached.card["tokens"] / len(distinct)
    content = {
        "captions": len(distinct),
        "encoder": {"width": encoder.width, "layers": encoder.model.config.num_layers},
        "tokens per caption": round(tokens, 2),
        "words per caption": round(sum(len(c.split()) for c in distinct) / len(distinct), 2),
        "longest": cached.max_tokens,
        "captions per second": round(len(distinct) / embedding),
        "microseconds per caption beyond encoding": round(
            1e6 * (embedding - encoding) / len(distinct)
        ),
        "bytes on disk per token beyond its numbers": round(
            disk / cached.card["tokens"] - 2 * encoder.width, 2
        ),
        "microseconds to read a caption": {k: round(1e6 * v) for k, v in reading.items()},
        "T5-XXL, a million captions, computed": [
            compute_xxl(n, args.tflops, args.terabytes) for n in (round(tokens, 2), 20.0, 77.0)
        ],
    }
    write(args.result, "cpu", **content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
