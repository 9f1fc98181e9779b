"""Caption embeddings: computed once, cached on disk, read through a memory map.

A folder holds `tokens.npy`, float16 (tokens of all distinct captions, width); `starts.npy`, the
first token of each distinct caption, and the end; and `embeddings.json`: the encoder, its hash, its
tokenizer's hash, counts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float16
from torch import Tensor

from mezzotint.core.files import atomic_folder, cache_dir, read_json, write_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.npz_files import load_npy
from mezzotint.core.progress import ProgressBar
from mezzotint.data.sources import hash_parts
from mezzotint.data.text_encoder import (
    TextEncoder,
)

EMBEDDINGS_CARD = "embeddings.json"


@final
class CaptionEmbeddings:
    """Embedded captions by image index, all padded to `max_tokens`, the length of the longest.

    Args:
        folder: of `embed_captions`.
        captions: for every image, the number of its caption among the folder's distinct ones, or
        -1.
    """

    def __init__(self, folder: Path, captions: np.ndarray):
        self.folder = folder
        self.card: dict[str, Any] = read_json(folder / EMBEDDINGS_CARD, "remove the folder")
        try:
            check_fields(self.card, {"width": int, "longest": int, "key": str})
        except ValueError as error:
            raise ValueError(
                f"{folder / EMBEDDINGS_CARD} is damaged: {error}; remove the folder"
            ) from None
        self.width, self.max_tokens = self.card["width"], self.card["longest"]
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int]) -> tuple[Float16[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return token embeddings, zero where the mask is False; no token for a missing caption."""
        text = np.zeros((len(indices), self.max_tokens, self.width), np.float16)
        mask = np.zeros((len(indices), self.max_tokens), bool)
        tokens, starts = _map_tokens(str(self.folder), self.card["key"])
        for row, i in enumerate(indices):
            k = int(self.captions[i])
            if k >= 0:
                count = int(starts[k + 1] - starts[k])
                text[row, :count] = tokens[starts[k] : starts[k + 1]]
                mask[row, :count] = True
        return torch.from_numpy(text), torch.from_numpy(mask)


@functools.lru_cache(maxsize=8)
def _map_tokens(folder: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        tokens = load_npy(Path(folder) / "tokens.npy", mmap=True)
        starts = load_npy(Path(folder) / "starts.npy")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"embedded captions in {folder} are damaged: {error}; remove the folder"
        ) from None
    return tokens, starts


@dataclass(frozen=True)
class UniqueCaptions:
    """The distinct captions of a dataset, and every image's number among them, -1 for none."""

    distinct: tuple[str, ...]
    numbers: np.ndarray


def unique_captions(texts: Sequence[str | None]) -> UniqueCaptions:
    """Number captions by first appearance; None and white space count as no caption."""
    seen: dict[str, int] = {}
    stripped = [(text or "").strip() for text in texts]
    numbers = [seen.setdefault(text, len(seen)) if text else -1 for text in stripped]
    return UniqueCaptions(tuple(seen), np.array(numbers, dtype=np.int64))


def embed_captions(
    texts: Sequence[str | None], encoder: TextEncoder, *, progress: bool = False
) -> CaptionEmbeddings:
    """Return the embeddings of every image's caption, from the cache; fill the cache if needed.

    Errors: ValueError if no image has a caption.
    """
    captions = unique_captions(texts)
    if not captions.distinct:
        raise ValueError(
            "no image has a caption; add NAME.txt for each, a metadata.jsonl, or a column 'text'"
        )
    key = hash_parts(
        [encoder.hash, encoder.tokenizer_hash, str(encoder.max_tokens), *captions.distinct]
    )
    folder = cache_dir() / "caption-embeddings" / key
    if not (folder / EMBEDDINGS_CARD).is_file():
        _write_embeddings(folder, key, captions, encoder, progress)
    return CaptionEmbeddings(folder, captions.numbers)


def _write_embeddings(
    folder: Path, key: str, captions: UniqueCaptions, encoder: TextEncoder, progress: bool
) -> None:
    """Write the states of all captions, token after token, into one file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, complete=EMBEDDINGS_CARD) as partial:
        lengths, num_cut = [], 0
        for caption in captions.distinct:
            ids, was_cut = encoder.tokens(caption)
            lengths.append(len(ids))
            num_cut += was_cut
        starts = np.cumsum([0, *lengths])
        tokens = np.lib.format.open_memmap(
            partial / "tokens.npy",
            mode="w+",
            dtype=np.float16,
            shape=(int(starts[-1]), encoder.width),
        )
        with ProgressBar("embedding captions", len(lengths), unit="captions", show=progress) as bar:
            for k, caption in enumerate(captions.distinct):
                states = encoder.encode(caption).numpy()
                if not np.isfinite(states.astype(np.float16)).all():
                    raise ValueError(
                        f"text encoder {encoder.name} gives NaN or infinity in float16 for the "
                        f"caption {caption[:80]!r}"
                    )
                tokens[starts[k] : starts[k + 1]] = states
                bar.advance()
        tokens.flush()
        np.save(partial / "starts.npy", starts)
        card = {
            "format": 1,
            "key": key,
            "encoder": encoder.name,
            "encoder_hash": encoder.hash,
            "tokenizer_hash": encoder.tokenizer_hash,
            "width": encoder.width,
            "max_tokens": encoder.max_tokens,
            "longest": max(lengths),
            "captions": len(captions.distinct),
            "cut": num_cut,
        }
        write_json(partial / EMBEDDINGS_CARD, card)


def describe_captions(embeddings: CaptionEmbeddings) -> list[str]:
    """Return lines of text: how many captions there are, how many are missing or were cut."""
    card = embeddings.card
    missing = int((embeddings.captions < 0).sum())
    lines = [
        f"{card['captions']:,} distinct captions for {len(embeddings):,} images, embedded by "
        f"{card['encoder']}"
    ]
    if missing:
        lines.append(f"{missing:,} images have no caption and train the empty condition")
    if card["cut"]:
        lines.append(f"{card['cut']:,} captions were cut to {card['max_tokens']} tokens")
    return lines
