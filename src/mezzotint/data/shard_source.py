"""One open shard: rows as stored, with labels and captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.data.columns import all_columns
from mezzotint.data.dataset import renumber
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.prepared_forms import get_form
from mezzotint.data.shard_cache import ShardCache, UnreadableShardError
from mezzotint.data.shard_format import IMAGE, LABEL, TEXT, TOKENS, ShardCard
from mezzotint.data.shard_index import ShardIndex
from mezzotint.data.tables import table_source
from mezzotint.data.transforms import UnreadableImage

Stored = Image.Image | np.ndarray


@dataclass(frozen=True)
class ShardSource:
    """The rows of a shard.

    read: row -> Pillow image, pixels (c, h, w) or moments; may raise `UnreadableImage`.
    text: row -> caption or None. labels: class indices of the data set, NO_LABEL for none.
    tokens: row -> stored bytes of its embedded caption; None where there are none.
    """

    count: int
    read: Callable[[int], Stored] = field(repr=False)
    text: Callable[[int], str | None] = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    tokens: Callable[[int], bytes] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.count

    def stored_size(self, row: int) -> tuple[int, int] | None:
        """Return height and width of a row as stored; None if it is unreadable."""
        try:
            stored = self.read(row)
        except UnreadableImage:
            return None
        if isinstance(stored, np.ndarray):
            return stored.shape[-2], stored.shape[-1]
        return stored.height, stored.width


def open_shard(
    index: ShardIndex, shard: int, cache: ShardCache, classes: tuple[str, ...] | None
) -> ShardSource:
    """Open a shard; fetch it if need be.

    Args:
        classes: names of the data set's classes by number; None for one without labels.

    Errors: `UnreadableShardError` for one that cannot be read or is not as it was indexed; OSError
        where the store does not answer or the disk is full.
    """
    rows = index.open(shard, cache)
    if len(rows) != index.counts[shard]:
        raise UnreadableShardError(
            f"it has {len(rows):,} rows, and {index.counts[shard]:,} when it was indexed"
        )
    if index.card is not None:
        return _prepared_rows(rows, index.card, classes)
    return _table_rows(rows, index, shard, classes)


def _table_rows(
    rows: Any, index: ShardIndex, shard: int, classes: tuple[str, ...] | None
) -> ShardSource:
    """Open a shard of encoded images with columns of any names."""
    fields = all_columns(rows.features)
    # The index has checked the columns; of nested ones, as the JSON of a tar, a part may lack.
    columns = {role: name if name in fields else "" for role, name in index.columns.items()}
    try:
        table = table_source(rows, index.name(shard), columns=columns)
    except ValueError as error:
        raise UnreadableShardError(str(error)) from None
    labels = table.labels
    if classes is not None and labels is None:
        labels = np.full(len(rows), NO_LABEL, np.int64)
    if classes is not None and table.label_names is not None:
        if unknown := set(table.label_names) - set(classes):
            raise UnreadableShardError(f"its class {min(unknown)!r} is none of the data set's")
        labels = renumber(labels, table.label_names, classes)
    return ShardSource(len(rows), table.read, table.text, labels)


def _prepared_rows(rows: Any, card: ShardCard, classes: tuple[str, ...] | None) -> ShardSource:
    """Open a shard of `mezzotint prepare --shards`."""
    images = rows.select_columns([IMAGE])
    captions = rows.select_columns([TEXT])
    labels = None
    if card.label_names is not None:
        cells = rows.with_format("arrow")[:].column(LABEL).fill_null(NO_LABEL)
        labels = renumber(cells.to_numpy().astype(np.int64), tuple(card.label_names), classes or ())

    def read(row: int) -> Stored:
        stored = np.frombuffer(images[row][IMAGE], np.uint8)
        if card.row_bytes not in (None, len(stored)):
            raise UnreadableImage(f"{len(stored)} bytes, and its card states {card.row_bytes}")
        if card.kind == "latents":
            return stored.view(np.float16).reshape(card.row_shape)
        return get_form(card.form).decode(stored, card.row_shape)

    if card.captions is None:
        return ShardSource(len(rows), read, lambda row: captions[row][TEXT], labels)
    embedded = rows.select_columns([TOKENS])
    return ShardSource(
        len(rows), read, lambda row: captions[row][TEXT], labels, lambda row: embedded[row][TOKENS]
    )
