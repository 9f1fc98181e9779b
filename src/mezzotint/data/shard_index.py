"""What the shards of an address hold: their images, classes and columns.

Shards of `mezzotint prepare --shards` have a card that says so. For others, this reads the footer
and the column of labels of each parquet file, and the whole of each tar. The result lies beside the
cached shards, under a key that changes with any of them.
"""

from __future__ import annotations

import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.core.files import expand_user, read_json, write_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.object_store import (
    StoredFile,
    StoreUnavailable,
    is_address,
    join_address,
    list_files,
    open_file,
    patience,
    read_bytes,
    stat_file,
)
from mezzotint.core.progress import ProgressBar
from mezzotint.data.columns import Columns, all_columns
from mezzotint.data.image_dataset import check_no_columns, split_source
from mezzotint.data.labels import NO_LABEL, sort_classes
from mezzotint.data.row_files import ROW_FILES, find_row_files
from mezzotint.data.shard_cache import (
    EmptyShardError,
    ShardCache,
    UnreadableShardError,
    locked,
)
from mezzotint.data.shard_format import SHARDS_CARD, ShardCard, parse_card
from mezzotint.data.sources import hash_parts
from mezzotint.data.splits import choose_split
from mezzotint.data.stores import Listing
from mezzotint.data.tables import read_label_column, table_source

THREADS = 16  # that ask the store at once
INDEX_FIELDS = {
    "counts": list[int], "checksums": list[int], "columns": dict[str, str],
    "label_names": list[str] | None, "unlabelled": int, "notes": list[str],
}  # fmt: skip
Role = str


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a data set.

    address: of the folder. builder: of `datasets`, that parses them. files, counts: each shard and
    its images, int64 (shards,). checksums: of each shard's content, 0 where none is known, uint32.
    row_hashes: as in the card, "" without one. columns: role -> name, the same for all shards.
    label_names: of all shards together. unlabelled: images without a label. card: of shards that
    `mezzotint prepare` wrote.
    """

    address: str
    builder: str
    files: tuple[StoredFile, ...] = field(repr=False)
    counts: np.ndarray = field(repr=False)
    checksums: np.ndarray = field(repr=False)
    columns: dict[Role, str]
    label_names: tuple[str, ...] | None
    unlabelled: int = 0
    row_hashes: tuple[str, ...] = field(default=(), repr=False)
    card: ShardCard | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def name(self, shard: int) -> str:
        """Return the address of a shard below that of the data set."""
        return self.files[shard].address.removeprefix(self.address).lstrip("/")

    def open(self, shard: int, cache: ShardCache) -> Any:
        """Return a shard's rows, see `ShardCache.open`."""
        return cache.open(self.files[shard], self.builder, self._row_hash(shard))

    def fetch(self, shard: int, cache: ShardCache) -> None:
        """Fetch a shard that the cache lacks, see `ShardCache.open` for errors."""
        if not cache.path(self.files[shard], self.builder).is_file():
            cache.fetch(self.files[shard], self.builder, self._row_hash(shard))

    def _row_hash(self, shard: int) -> str:
        return self.row_hashes[shard] if self.row_hashes else ""

    @property
    def fingerprint(self) -> str:
        """A hash that changes when shards are added, removed or replaced."""
        names = [self.name(k) for k in range(len(self.files))]
        sizes = [str(file.num_bytes) for file in self.files]
        return hash_parts([*names, *sizes, self.counts.tobytes(), self.checksums.tobytes()])


def is_sharded(source: str) -> bool:
    """Return whether training reads a source shard by shard: an address, or prepared shards."""
    base = split_source(source)[0]
    return is_address(base) or (expand_user(base) / SHARDS_CARD).is_file()


def open_index(source: str, cache: ShardCache, columns: Columns | None = None) -> ShardIndex:
    """Return the index of an address of shards; "ADDRESS:SPLIT" chooses one that their names state.

    The processes of a machine make it once.

    Args:
        columns: see `mezzotint.data.image_dataset.open_images`.

    Errors: ValueError for an address without shards, or with shards that differ in columns; OSError
        where the store does not answer.
    """
    base, split = split_source(source)
    base = base.rstrip("/") if is_address(base) else str(expand_user(base).resolve())
    with patience(cache.patience_s):
        card_address = join_address(base, SHARDS_CARD)
        if stat_file(card_address) is not None:
            check_no_columns(base, columns)
            if split:
                raise ValueError(
                    f"{base} was prepared as shards, which have no split {split!r}; leave it out, "
                    f"or prepare that split: mezzotint prepare SOURCE:{split} ADDRESS --size N "
                    "--shards N"
                )
            return _prepared_index(base, parse_card(read_bytes(card_address), card_address))
        builder, files, notes = _find_shards(base, split or None)
        key = hash_parts([base, builder, repr(sorted((columns or {}).items())), *map(repr, files)])
        path = cache.folder / f"index-{key}.json"
        with locked(path.with_suffix(".lock")):
            found = _read_index(path, len(files))
            if found is None:
                found = _index_shards(base, builder, files, cache, columns)
                write_json(path, found)
    filled = [k for k, count in enumerate(found["counts"]) if count]
    if len(filled) < len(files):
        notes.append(f"{len(files) - len(filled):,} shards without rows were left out")
    return ShardIndex(
        base, builder, tuple(files[k] for k in filled),
        np.array(found["counts"], np.int64)[filled],
        np.array(found["checksums"], np.uint32)[filled],
        columns=found["columns"],
        label_names=None if found["label_names"] is None else tuple(found["label_names"]),
        unlabelled=found["unlabelled"],
        notes=(*notes, *found["notes"]),
    )  # fmt: skip


def _read_index(path: Path, num_shards: int) -> dict[str, Any] | None:
    """Return the content of an index file; None where it is to be made, again if it is damaged."""
    try:
        found = read_json(path, "delete it")
        check_fields(found, INDEX_FIELDS)
    except (ValueError, OSError):
        return None
    lists = found["counts"], found["checksums"]
    whole = all(len(of) == num_shards and min(of) >= 0 and max(of) < 2**63 for of in lists)
    return found if whole and max(lists[1]) < 2**32 and any(lists[0]) else None


def check_network_fits(
    index: ShardIndex, source: str, size: int, channels: int, codec_name: str
) -> None:
    """Raise ValueError where a network does not take the shards' latents, or their pixels."""
    card = index.card
    if card is None or card.kind == "images":
        if codec_name != "pixels":
            raise ValueError(
                f"{source} holds images, and the network works on latents of {codec_name}; encode "
                "them once: mezzotint prepare SOURCE ADDRESS --size PIXELS --shards N --codec "
                f"{codec_name}"
            )
        if card is not None and card.size < size:
            raise ValueError(
                f"{source} holds images of {card.size} pixels, the network takes {size}; prepare "
                f"them at --size {size}, or set model.size={card.size}"
            )
        return
    if codec_name == "pixels":
        raise ValueError(
            f"{source} holds latents of {card.codec}, but the network works on pixels; train on "
            "the images, or choose a latent preset (mezzotint info)"
        )
    side = card.size // card.factor
    if (card.channels, side) != (channels, size):
        raise ValueError(
            f"{source} holds latents of {card.channels} channels and {side}x{side} cells, the "
            f"network takes {channels} and {size}x{size}; set model.size={side} "
            f"model.channels={card.channels}, or prepare at another --size"
        )


def _prepared_index(base: str, card: ShardCard) -> ShardIndex:
    entries = [entry for entry in card.shards if entry.rows]
    if not entries:
        raise ValueError(f"{base} holds shards without images; prepare them again")
    return ShardIndex(
        base,
        "parquet",
        tuple(StoredFile(join_address(base, e.name), e.bytes, "") for e in entries),
        np.array([entry.rows for entry in entries], np.int64),
        np.array([int(entry.sha256[:8], 16) for entry in entries], np.uint32),
        columns={},
        label_names=tuple(card.label_names) if card.label_names else None,
        unlabelled=card.unlabelled if card.label_names else 0,
        row_hashes=tuple(entry.sha256 for entry in entries),
        card=card,
        notes=tuple(card.notes),
    )


def _find_shards(base: str, split: str | None) -> tuple[str, list[StoredFile], list[str]]:
    """Return the builder, the shards of one split, and notes."""
    files = {file.address: file for file in list_files(base, tuple(ROW_FILES))}
    if not files:
        raise ValueError(
            f"{base} holds no shards ({', '.join(ROW_FILES)}); give the folder of the shards, or "
            f"write some: mezzotint prepare FOLDER {base} --size PIXELS --shards N"
        )
    folder = base if "*" not in base else base[: base.index("*")].rpartition("/")[0]
    names = {address.removeprefix(folder).lstrip("/") or address: address for address in files}
    # Spark, Hadoop and macOS name files that are no data, or not yet, with _ and dots.
    hidden = [name for name in names if re.search(r"(^|/)[._]", name) and len(names) > 1]
    names = {name: address for name, address in names.items() if name not in hidden}
    if not names:
        raise ValueError(f"{base} holds no shards but hidden ones, e.g. {hidden[0]}; rename them")
    listing = Listing({name: files[address].num_bytes for name, address in names.items()})
    found = find_row_files(folder, listing)
    assert found is not None, "the listing holds files of rows alone"
    builder, splits = found
    counts = {name: len(of) for name, of in splits.items()}
    if split is None and ("train" in splits or len(splits) == 1):
        split = "train" if "train" in splits else next(iter(splits))
    if split != "all" or "all" in splits:
        splits = {split: splits[choose_split(base, counts, split)]}
    chosen = sorted(name for of in splits.values() for name in of)
    left_out = len(names) - len(chosen)
    notes = [f"{left_out:,} files of other splits or kinds were left out"] if left_out else []
    return builder, [files[names[name]] for name in chosen], notes


@dataclass(frozen=True)
class _ShardFacts:
    """Images, checksum, class names and unlabelled images of one shard."""

    count: int
    checksum: int
    label_names: tuple[str, ...] | None
    unlabelled: int


def _index_shards(
    base: str,
    builder: str,
    files: list[StoredFile],
    cache: ShardCache,
    columns: Columns | None,
) -> dict[str, Any]:
    """Return the content of an index file; the first shard chooses the columns of all."""
    first = table_source(_open_first(base, files, builder, cache), base, columns=columns)
    choice = first.layout.columns
    assert choice is not None, "a table has columns"
    chosen = {"image": choice.image, "label": choice.label or "", "caption": choice.caption or ""}

    def read_facts(file: StoredFile) -> _ShardFacts:
        try:
            if builder == "parquet":
                return _read_parquet_facts(file, chosen)
            return _read_row_facts(cache.open(file, builder), file, chosen)
        except EmptyShardError:
            return _ShardFacts(0, 0, None, 0)
        except UnreadableShardError as reason:
            raise ValueError(_describe_unreadable(file, reason)) from None

    facts = []
    with (
        ProgressBar("looking at shards", len(files), unit="shards", show=len(files) > 1) as bar,
        ThreadPoolExecutor(THREADS if builder == "parquet" else 1) as pool,
    ):
        for one in pool.map(read_facts, files):
            facts.append(one)
            bar.advance()
    named = [one.label_names for one in facts if one.label_names is not None]
    return {
        "counts": [one.count for one in facts],
        "checksums": [one.checksum for one in facts],
        "columns": chosen,
        "label_names": list(_merge_classes(named)) if named else None,
        "unlabelled": sum(one.unlabelled for one in facts) if named else 0,
        "notes": list(first.notes),
    }


def _merge_classes(named: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the classes of all shards: as declared where all declare the same, else sorted."""
    if all(names == named[0] for names in named):
        return named[0]
    return sort_classes({name for names in named for name in names})


def _open_first(base: str, files: list[StoredFile], builder: str, cache: ShardCache) -> Any:
    """Return the rows of the first shard that has any."""
    for file in files:
        try:
            return cache.open(file, builder)
        except EmptyShardError:
            continue
        except UnreadableShardError as reason:
            raise ValueError(_describe_unreadable(file, reason)) from None
    raise ValueError(f"{base} holds no images: none of its {len(files):,} shards has rows")


def _describe_unreadable(file: StoredFile, reason: Exception) -> str:
    return f"{file.address} cannot be read: {reason}; write it again, or take it out of the folder"


def _read_parquet_facts(file: StoredFile, columns: dict[Role, str]) -> _ShardFacts:
    """Read a parquet file's footer and labels."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.table import InMemoryTable

    try:
        with open_file(file.address) as opened:
            parquet = pq.ParquetFile(opened)
            if not parquet.metadata.num_rows:  # whatever its columns
                return _ShardFacts(0, 0, None, 0)
            _check_columns(file, parquet.schema_arrow.names, columns)
            label = columns["label"].partition(".")[0]
            table = parquet.read(columns=[label] if label else [])
            footer = parquet.metadata
            # The offsets and statistics of every column: another content has another footer.
            checksum = zlib.crc32(repr(footer.to_dict()).encode())
            count = footer.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno or isinstance(error, StoreUnavailable)):
            raise
        raise UnreadableShardError(f"it is damaged: {str(error).splitlines()[0][:200]}") from None
    if not label:
        return _ShardFacts(count, checksum, None, 0)
    features = datasets.Features.from_arrow_schema(table.schema)
    rows = datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))
    return _label_facts(rows, count, checksum, file, columns)


def _read_row_facts(rows: Any, file: StoredFile, columns: dict[Role, str]) -> _ShardFacts:
    """Look at the rows of a cached shard."""
    _check_columns(file, rows.column_names, columns)
    if not columns["label"]:
        return _ShardFacts(len(rows), 0, None, 0)
    return _label_facts(rows, len(rows), 0, file, columns)


def _label_facts(
    rows: Any, count: int, checksum: int, file: StoredFile, columns: dict[Role, str]
) -> _ShardFacts:
    has_labels = columns["label"] in all_columns(rows.features)  # a JSON of a tar may lack it
    labels = read_label_column(rows, [], columns["label"], file.address) if has_labels else None
    if labels is None:
        return _ShardFacts(count, checksum, (), count)
    return _ShardFacts(count, checksum, labels.names, int((labels.indices == NO_LABEL).sum()))


def _check_columns(file: StoredFile, names: list[str], columns: dict[Role, str]) -> None:
    """Raise ValueError for a shard without the columns of the first."""
    wanted = [name.partition(".")[0] for name in columns.values() if name]
    if lacking := [name for name in wanted if name not in names]:
        raise ValueError(
            f"{file.address} has no column {lacking[0]!r}, which the first shard has; its columns "
            f"are {', '.join(names)[:300]}. Give shards of one data set, e.g. by a pattern: "
            "ADDRESS/train-*.parquet"
        )
