"""Write one shard: images or latents with labels and captions, as parquet.

The bytes are a function of the plan: neither time, process nor the order of writing enters.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mezzotint.core.progress import ProgressBar
from mezzotint.core.rng import philox
from mezzotint.core.threads import map_in_order
from mezzotint.data.audit import Audit
from mezzotint.data.autoencoder import Codec
from mezzotint.data.encode_latents import check_size, sum_latents
from mezzotint.data.image_dataset import DecodedImage, ImageDataset
from mezzotint.data.latent_dataset import encode_moments
from mezzotint.data.prepared_forms import Form
from mezzotint.data.shard_format import (
    IMAGE,
    LABEL,
    NAME,
    REPORT_KEY,
    ROW_GROUP_ROWS,
    TEXT,
    TOKENS,
    RowHash,
)
from mezzotint.data.shard_report import count_rows
from mezzotint.data.sources import hash_parts
from mezzotint.data.text_encoder import TextEncoder
from mezzotint.data.transforms import UnreadableImage

SHUFFLE_DRAW = 2**63 - 1  # of the order's random numbers; no epoch of training draws it
CACHED_CAPTIONS = 4096


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """All that decides the bytes of the shards.

    Rows are assigned to shards by a permutation, a function of `seed`: a folder sorted by class
    would give shards of one class, and training would see one class after another.

    form: of the images; not used with a codec, whose latents are stored in place of pixels.
    encoder: embeds the captions into the column `tokens`; without it there is none.

    Errors: ValueError for fewer images than shards, and a size that the codec does not take.
    """

    images: ImageDataset
    num_shards: int
    form: Form
    seed: int = 0
    codec: Codec | None = None
    encoder: TextEncoder | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= len(self.images):
            raise ValueError(
                f"{self.num_shards} shards of {len(self.images):,} images; give 1 to "
                f"{len(self.images)}"
            )
        if self.codec:
            check_size(self.images.size, self.codec)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The values that every shard keeps; two plans with the same give the same shards."""
        images, codec, encoder = self.images, self.codec, self.encoder
        latents = codec and {
            "codec_hash": codec.hash,
            "scale": codec.scale,
            "shift": codec.shift,
            "factor": codec.factor,
        }
        captions = encoder and {
            "encoder_hash": encoder.hash,
            "tokenizer_hash": encoder.tokenizer_hash,
            "dtype": encoder.dtype_name,
            "max_tokens": encoder.max_tokens,
        }
        return {
            "format": 1,
            "size": images.size,
            "channels": codec.channels if codec else images.channels,
            "crop": images.crop,
            "form": "" if codec else self.form.name,
            "latents": latents,
            "captions": captions,
            "images": len(images),
            "source": images.fingerprint,
            "shards": self.num_shards,
            "seed": self.seed,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of `facts`."""
        return hash_parts([json.dumps(self.facts, sort_keys=True)])

    @functools.cached_property
    def _permutation(self) -> np.ndarray:
        return philox("order", self.seed, 0, SHUFFLE_DRAW).permutation(len(self.images))

    def indices(self, k: int) -> list[int]:
        """Return the images of shard k, in the order of its rows."""
        begin, end = (n * len(self.images) // self.num_shards for n in (k, k + 1))
        return self._permutation[begin:end].tolist()

    def schema(self) -> Any:
        """Return the Arrow schema, with class names for `datasets`."""
        from datasets import ClassLabel, Features, Value

        names = self.images.label_names
        kinds = {
            IMAGE: Value("binary"),
            LABEL: Value("int64") if names is None else ClassLabel(names=list(names)),
            TEXT: Value("string"),
            NAME: Value("string"),
        }
        return Features(kinds | ({TOKENS: Value("binary")} if self.encoder else {})).arrow_schema


def write_shard(plan: ShardPlan, k: int, path: Path, bar: ProgressBar) -> None:
    """Write shard k to the file `path`, with its report in the key-value metadata.

    Errors: ValueError, naming the image, for latents and embeddings that are not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, report = plan.schema(), _ShardRows(plan)
    plain = dict.fromkeys((IMAGE, LABEL, TOKENS), "none")  # noise does not compress
    with pq.ParquetWriter(
        path,
        schema,
        compression={name: plain.get(name, "zstd") for name in schema.names},  # pyright: ignore[reportArgumentType]
        use_dictionary=False,
        write_statistics=False,  # of images, they would make the footer long
    ) as writer:
        for rows in report.row_groups(plan.indices(k), bar):
            columns = zip(*rows, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema), ROW_GROUP_ROWS)
        text = json.dumps(report.values(), sort_keys=True)
        writer.add_key_value_metadata({REPORT_KEY: text.encode()})


class _ShardRows:
    """Makes the rows of a shard, and counts them."""

    def __init__(self, plan: ShardPlan):
        self.plan = plan
        self.audit, self.hash = Audit(plan.images.size), RowHash()
        self.num_bytes = self.num_tokens = self.longest = self.num_cut = 0
        self.sums: list[dict[str, Any]] = []
        self._embed = functools.lru_cache(CACHED_CAPTIONS)(self._embed_caption)

    def row_groups(self, indices: Sequence[int], bar: ProgressBar) -> Iterator[list[Any]]:
        """Yield rows, tuples as the columns of the schema, in lists of ROW_GROUP_ROWS."""
        rows: list[Any] = []
        for i, decoded, stored in self._encode(indices):
            bar.advance()
            self.audit.add(self.plan.images, i, decoded)
            if isinstance(decoded, UnreadableImage):
                continue
            rows.append(self._make_row(i, stored))
            if len(rows) == ROW_GROUP_ROWS:
                yield rows
                rows = []
        if rows:
            yield rows

    def _encode(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[int, DecodedImage | UnreadableImage, bytes]]:
        """Yield each index with its image and the bytes to store; b"" for a damaged one."""
        images, form, codec = self.plan.images, self.plan.form, self.plan.codec

        def read(i: int) -> tuple[int, DecodedImage | UnreadableImage, bytes]:
            try:
                decoded = images.decode(i)
            except UnreadableImage as reason:
                return i, reason, b""
            return i, decoded, b"" if codec else form.encode(decoded.pixels)

        # The processes of a machine share its cores.
        threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        for i, decoded, stored in map_in_order(read, indices, max(1, threads)):
            if codec and isinstance(decoded, DecodedImage):
                stored = self._encode_latent(codec, i, decoded.pixels)
            yield i, decoded, stored

    def _encode_latent(self, codec: Codec, i: int, pixels: np.ndarray) -> bytes:
        try:
            moments = encode_moments(codec, torch.from_numpy(pixels.copy()), mirror=True).numpy()
        except ValueError as error:
            raise ValueError(f"{self.plan.images.name(i)}: {error}") from None
        self.sums.append(sum_latents(moments[None]))
        return moments.tobytes()

    def _make_row(self, i: int, stored: bytes) -> tuple[Any, ...]:
        images = self.plan.images
        row = (stored, images.label(i), images.text(i), images.name(i))
        tokens, is_cut = self._embed((row[2] or "").strip()) if self.plan.encoder else (None, False)
        self.hash.add(*row, tokens)
        self.num_bytes += len(stored)
        self.num_cut += is_cut
        if self.plan.encoder is None:
            return row
        num_tokens = len(tokens or b"") // (2 * self.plan.encoder.width)
        self.num_tokens += num_tokens
        self.longest = max(self.longest, num_tokens)
        return (*row, tokens)

    def _embed_caption(self, caption: str) -> tuple[bytes | None, bool]:
        """Return the states of a caption, None for an empty one, and whether it was cut."""
        encoder = self.plan.encoder
        if encoder is None or not caption:
            return None, False
        # numpy has no bfloat16: the two bytes of a number are kept as an integer
        states = encoder.states(caption).contiguous().view(torch.int16).numpy()
        return states.tobytes(), encoder.tokens(caption)[1]

    def values(self) -> dict[str, Any]:
        """Return the shard's report, ready for JSON."""
        names = ("sum", "sum_of_squares", "numbers")
        sums = {name: np.sum([s[name] for s in self.sums], 0).tolist() for name in names}
        return {
            **count_rows(self.audit),
            "bytes": self.num_bytes,
            "tokens": self.num_tokens,
            "longest": self.longest,
            "cut": self.num_cut,
            "latents": sums if self.sums else None,
            "sha256": self.hash.hexdigest(),
            "fingerprint": self.plan.fingerprint,
            "plan": self.plan.facts,
        }
