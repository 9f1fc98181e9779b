"""Captions of images in shards: embedded when the shards were prepared, or at every read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mezzotint.data.caption_embeddings import describe_encoder
from mezzotint.data.sharded_dataset import ShardedDataset
from mezzotint.data.text_encoder import DTYPES, TextEncoder

FACTS = ("encoder_hash", "tokenizer_hash", "dtype")  # that stored and wanted embeddings share


@final
class ShardedCaptions:
    """Embedded captions of `dataset` by image index, see `caption_embeddings.Captions`.

    Args:
        encoder: that embeds them, or that embedded them when the shards were prepared.

    Errors: ValueError for shards that another encoder embedded.
    """

    def __init__(self, dataset: ShardedDataset, encoder: TextEncoder):
        self.dataset = dataset
        self.card: dict[str, Any] = {
            **describe_encoder(encoder), "max_tokens": encoder.max_tokens,
        }  # fmt: skip
        stored = dataset.index.card.captions if dataset.index.card else None
        for fact in FACTS:
            if stored is not None and stored[fact] != self.card[fact]:
                raise ValueError(
                    f"{dataset.index.address} holds captions embedded by {stored['encoder']} "
                    f"({fact} {stored[fact]}), and the recipe names {encoder.name} "
                    f"({self.card[fact]}); name the same encoder, or prepare the shards again"
                )
        self.is_stored = stored is not None
        self.max_tokens: int = stored["longest"] if stored else encoder.max_tokens
        self.width, self.dtype = encoder.width, DTYPES[encoder.dtype_name]
        # Worker processes of stored captions need no encoder, which they could not share.
        self.encoder = None if self.is_stored else encoder

    def batch(self, indices: Sequence[int]) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return token embeddings, zero where the mask is False; no token for a missing caption."""
        if self.encoder is not None:
            captions = [(self.dataset.text(i) or "").strip() for i in indices]
            text, mask = self.encoder.conditions(captions)
            return text[:, : self.max_tokens], mask[:, : self.max_tokens]
        text = torch.zeros(len(indices), self.max_tokens, self.width, dtype=self.dtype)
        mask = torch.zeros(len(indices), self.max_tokens, dtype=torch.bool)
        for row, i in enumerate(indices):
            if stored := self.dataset.tokens(i):
                states = torch.frombuffer(bytearray(stored), dtype=self.dtype)
                states = states.reshape(-1, self.width)
                text[row, : len(states)], mask[row, : len(states)] = states, True
        return text, mask
