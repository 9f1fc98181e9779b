"""Caption embeddings: computed once, cached on disk in shards, read through memory maps.

A folder holds the states of all distinct captions, two bytes a number, token after token without
padding: `00000.npy` (tokens of its captions, width) for each SHARD_CAPTIONS captions, and
`00000.json` with the length of each, which marks the shard as complete. `starts.npy`, the first
token of each caption among all, and the end, and `embeddings.json`, the encoder, its hash, its
tokenizer's hash and counts, complete the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mezzotint.core.distributed import WorkShare
from mezzotint.core.files import atomic_open, cache_dir, read_json, remove_partials, write_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.npz_files import load_npy
from mezzotint.core.progress import ProgressBar
from mezzotint.data.sources import hash_parts
from mezzotint.data.text_encoder import DTYPES, TextEncoder

EMBEDDINGS_CARD = "embeddings.json"
STARTS = "starts.npy"
SHARD_CAPTIONS = 2048  # a killed process loses its last shard
ADVICE = "remove the folder"


@runtime_checkable
class Captions(Protocol):
    """Embedded captions by image index.

    max_tokens: that all are padded to. card: encoder, encoder_hash, tokenizer_hash, dtype, ...
    """

    max_tokens: int
    card: dict[str, Any]

    def batch(self, indices: Sequence[int]) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return token embeddings, zero where the mask is False; no token for a missing caption."""
        ...


@final
class CaptionEmbeddings:
    """The cached `Captions`, all padded to `max_tokens`, the length of the longest.

    Args:
        folder: of `embed_captions`.
        captions: for every image, the number of its caption among the folder's distinct ones, or
        -1.
    """

    def __init__(self, folder: Path, captions: np.ndarray):
        self.folder = folder
        self.card: dict[str, Any] = read_json(folder / EMBEDDINGS_CARD, ADVICE)
        try:
            check_fields(
                self.card,
                {"width": int, "longest": int, "key": str, "dtype": str, "shard_captions": int},
            )
            self.dtype = DTYPES[self.card["dtype"]]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / EMBEDDINGS_CARD} is damaged: {error}; {ADVICE}") from None
        self.width, self.max_tokens = self.card["width"], self.card["longest"]
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int]) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return token embeddings, zero where the mask is False; no token for a missing caption."""
        text = torch.zeros(len(indices), self.max_tokens, self.width, dtype=self.dtype)
        mask = torch.zeros(len(indices), self.max_tokens, dtype=torch.bool)
        for row, i in enumerate(indices):
            if (k := int(self.captions[i])) >= 0:
                states = self._states(k)
                text[row, : len(states)] = states
                mask[row, : len(states)] = True
        return text, mask

    def _states(self, k: int) -> Float[Tensor, "t d"]:
        """Return the states of distinct caption k."""
        key, size = self.card["key"], self.card["shard_captions"]
        starts = _map_array(self.folder / STARTS, key)
        path = _shard_path(self.folder, k // size, "npy")
        begin, end = (int(starts[n] - starts[k // size * size]) for n in (k, k + 1))
        bits = np.array(_map_array(path, key)[begin:end])  # a copy: torch knows no read-only memory
        if bits.shape != (end - begin, self.width) or bits.dtype != np.int16:
            raise ValueError(f"{path} is damaged: {bits.dtype} {bits.shape}; {ADVICE}")
        return torch.from_numpy(bits).view(self.dtype)


@final
class LiveCaptions:
    """`Captions` that are embedded at every read and stored nowhere; else as the cached ones.

    All captions are split into tokens once, to know the longest.

    Args:
        texts: of every image; None or white space for no caption.
        encoder: that embeds them.

    Errors: ValueError if no image has a caption.
    """

    def __init__(self, texts: Sequence[str | None], encoder: TextEncoder):
        unique = unique_captions(texts)
        check_any_caption(unique.distinct)
        self.distinct, self.captions, self.encoder = unique.distinct, unique.numbers, encoder
        split = [encoder.tokens(caption) for caption in unique.distinct]
        self.max_tokens = max(len(ids) for ids, _ in split)
        self.card: dict[str, Any] = {
            **describe_encoder(encoder),
            "max_tokens": encoder.max_tokens,
            "captions": len(unique.distinct),
            "cut": sum(was_cut for _, was_cut in split),
        }

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int]) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return token embeddings, zero where the mask is False; no token for a missing caption."""
        numbers = (int(self.captions[i]) for i in indices)
        captions = [self.distinct[k] if k >= 0 else "" for k in numbers]
        text, mask = self.encoder.conditions(captions)
        return text[:, : self.max_tokens], mask[:, : self.max_tokens]


@functools.lru_cache(maxsize=1 << 14)
def _map_array(path: Path, key: str) -> np.ndarray:
    """Return an array of a folder, as a memory map; `key` tells folders of one path apart."""
    try:
        return load_npy(path, mmap=True)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"embedded captions in {path.parent} are damaged: {error}; {ADVICE}"
        ) from None


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


def check_any_caption(texts: Iterable[str | None]) -> None:
    """Raise ValueError where no image has a caption."""
    if not any((text or "").strip() for text in texts):
        raise ValueError(
            "no image has a caption; add NAME.txt for each, a metadata.jsonl, or a column 'text'"
        )


def embed_captions(
    texts: Sequence[str | None], encoder: TextEncoder, *, progress: bool = False
) -> CaptionEmbeddings:
    """Return the embeddings of every image's caption, from the cache; fill the cache if needed.

    Errors: ValueError if no image has a caption.
    """
    return open_cache(fill_cache(texts, encoder, WorkShare(), progress=progress), texts)


def open_cache(folder: Path, texts: Sequence[str | None]) -> CaptionEmbeddings:
    """Return the embeddings of the captions that `fill_cache` has embedded in `folder`."""
    return CaptionEmbeddings(folder, unique_captions(texts).numbers)


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds all shards, and the card."""
    return (folder / EMBEDDINGS_CARD).is_file()


def fill_cache(
    texts: Sequence[str | None], encoder: TextEncoder, share: WorkShare, *, progress: bool = False
) -> Path:
    """Embed this process's share of the shards that the cache lacks; return the cache's folder.

    Processes do not communicate. The one that finds all shards there completes the folder.

    Errors: ValueError if no image has a caption.
    """
    captions = unique_captions(texts)
    check_any_caption(captions.distinct)
    facts = [encoder.hash, encoder.tokenizer_hash, str(encoder.max_tokens), encoder.dtype_name]
    key = hash_parts(["shards", *facts, *captions.distinct])
    folder = cache_dir() / "caption-embeddings" / key
    if is_complete(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-len(captions.distinct) // SHARD_CAPTIONS))
    own = [captions.distinct[k * SHARD_CAPTIONS : (k + 1) * SHARD_CAPTIONS] for k in shards]
    todo = [
        k
        for k in shards
        if k % share.world == share.rank and not _shard_path(folder, k, "json").is_file()
    ]
    total = sum(len(own[k]) for k in todo)
    with ProgressBar("embedding captions", total, unit="captions", show=progress) as bar:
        for k in todo:
            _write_shard(folder, k, own[k], encoder, bar)
    if all(_shard_path(folder, k, "json").is_file() for k in shards):
        _complete_folder(folder, key, captions, encoder)
    return folder


def _shard_path(folder: Path, k: int, suffix: str) -> Path:
    return folder / f"{k:05d}.{suffix}"


def _write_shard(
    folder: Path, k: int, captions: Sequence[str], encoder: TextEncoder, bar: ProgressBar
) -> None:
    """Write the states of a shard's captions, then their lengths."""
    states, num_cut = [], 0
    for caption in captions:
        states.append(encoder.states(caption))
        num_cut += encoder.tokens(caption)[1]
        bar.advance()
    with atomic_open(_shard_path(folder, k, "npy")) as file:
        # numpy has no bfloat16: the two bytes of a number are kept as an integer
        np.save(file, torch.cat(states).view(torch.int16).numpy())
    lengths = [len(one) for one in states]
    write_json(_shard_path(folder, k, "json"), {"lengths": lengths, "cut": num_cut})


def _complete_folder(
    folder: Path, key: str, captions: UniqueCaptions, encoder: TextEncoder
) -> None:
    """Write starts.npy and the card; the card comes last and marks the folder as complete."""
    shards = range(-(-len(captions.distinct) // SHARD_CAPTIONS))
    facts = [read_json(_shard_path(folder, k, "json"), ADVICE) for k in shards]
    for k, fact in zip(shards, facts, strict=True):
        try:
            check_fields(fact, {"lengths": list, "cut": int})
        except ValueError as error:
            path = _shard_path(folder, k, "json")
            raise ValueError(f"{path} is damaged: {error}; {ADVICE}") from None
    lengths = np.array([n for fact in facts for n in fact["lengths"]], dtype=np.int64)
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    remove_partials(folder)
    with atomic_open(folder / STARTS) as file:
        np.save(file, starts)
    card = {
        "format": 2,
        "key": key,
        **describe_encoder(encoder),
        "width": encoder.width,
        "max_tokens": encoder.max_tokens,
        "shard_captions": SHARD_CAPTIONS,
        "longest": int(lengths.max()),
        "tokens": int(starts[-1]),
        "captions": len(captions.distinct),
        "cut": sum(fact["cut"] for fact in facts),
    }
    write_json(folder / EMBEDDINGS_CARD, card)


def describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """Return what a card, and a model that reads its captions, keep of the encoder."""
    return {
        "encoder": encoder.name,
        "encoder_hash": encoder.hash,
        "tokenizer_hash": encoder.tokenizer_hash,
        "dtype": encoder.dtype_name,
    }


def describe_captions(embeddings: CaptionEmbeddings | LiveCaptions) -> list[str]:
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
