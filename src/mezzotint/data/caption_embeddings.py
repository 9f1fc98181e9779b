"""Embedded captions on disk: written once by `text_encoder`, read through a memory map.

A folder holds `tokens.npy`, float16 (tokens of all distinct captions, width); `starts.npy`, the
first token of each distinct caption, and the end; and `words.json`: the encoder, its hash, its
tokenizer's hash, counts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float16
from torch import Tensor

from mezzotint.core.files import read_json

EMBEDDINGS_CARD = "words.json"


@final
class CaptionEmbeddings:
    """Embedded captions by image index, all padded to `max_tokens`, the length of the longest.

    Args:
        folder: of `mezzotint.data.text_encoder.embed_captions`.
        captions: for every image, the number of its caption among the folder's distinct ones, or
        -1.
    """

    def __init__(self, folder: Path, captions: np.ndarray):
        self.folder = folder
        self.card: dict[str, Any] = read_json(folder / EMBEDDINGS_CARD, "remove the folder")
        self.width, self.max_tokens = int(self.card["width"]), int(self.card["longest"])
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
        tokens = np.load(Path(folder) / "tokens.npy", mmap_mode="r", allow_pickle=False)
        starts = np.load(Path(folder) / "starts.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"embedded captions in {folder} are damaged: {error}; remove the folder"
        ) from None
    return tokens, starts
