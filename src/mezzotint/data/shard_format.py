"""The shard form: parquet files of one size, and the card that names them.

A folder or address of `mezzotint prepare --shards N` holds `shard-00000.parquet` ... and, written
last, `mezzotint-shards.json`, the card. Each shard is a parquet file with the columns `COLUMNS` in
row groups of ROW_GROUP_ROWS rows; `datasets.load_dataset("parquet", ...)` reads it. Its key-value
metadata `mezzotint` is the JSON of `mezzotint.data.prepare_shards`' report of that shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mezzotint.core.json_values import check_fields, parse_json
from mezzotint.data.prepared_forms import FORMS
from mezzotint.data.sources import hash_parts

SHARDS_CARD = "mezzotint-shards.json"
REPORT_KEY = b"mezzotint"  # of a shard's key-value metadata
# Stored bytes of the card's form, or a float16 (view, 2, c, h, w) of moments; int64; captions;
# names in the source; a float16 or bfloat16 (tokens, width), in shards that have "captions".
IMAGE, LABEL, TEXT, NAME, TOKENS = "image", "label", "text", "name", "tokens"
COLUMNS = (IMAGE, LABEL, TEXT, NAME)
ROW_GROUP_ROWS = 256
KINDS = ("images", "latents")
MAX_LEFT_OUT = 1000  # names in the card; report.json has all
ADVICE = "prepare the shards again"


def shard_name(k: int) -> str:
    """Return the file name of shard k."""
    return f"shard-{k:05d}.parquet"


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the card.

    bytes: of the file. unreadable: images left out of it. sha256: of its rows, see `RowHash`.
    """

    name: str
    rows: int
    bytes: int
    unreadable: int
    sha256: str


class RowHash:
    """The SHA-256 of the rows of a shard, in order; another writer of parquet does not change it.

    Of each row: the stored bytes; the UTF-8 of "LABEL TEXT NAME", the first two as in JSON; and, if
    there are any, the tokens. Each is preceded by its length in 8 bytes, little-endian.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(
        self, image: bytes, label: int | None, text: str | None, name: str, tokens: bytes | None
    ) -> None:
        """Add a row."""
        facts = f"{json.dumps(label)} {json.dumps(text)} {name}".encode()
        for part in (image, facts, *([] if tokens is None else [tokens])):
            self._hash.update(len(part).to_bytes(8, "little"))
            self._hash.update(part)

    def hexdigest(self) -> str:
        """Return the hash of the rows so far, in hexadecimal."""
        return self._hash.hexdigest()


ENTRY_KINDS = {"name": str, "rows": int, "bytes": int, "unreadable": int, "sha256": str}
CARD_KINDS = {
    **dict.fromkeys(("size", "channels", "factor", "count", "unlabelled"), int),
    **dict.fromkeys(("kind", "crop", "form", "codec", "codec_hash", "plan", "fingerprint"), str),
    **dict.fromkeys(("scale", "shift"), float),
    "mirror": bool,
    "statistics": dict | None,
    "label_names": list[str] | None,
    "captions": dict | None,
    "left_out": list[str],
    "notes": list[str],
}


@dataclass(frozen=True, kw_only=True)
class ShardCard:
    """What the shards of an address hold.

    kind: "images" or "latents". size: side in pixels, of latents that of the encoded images.
    channels: of the images, or of the latents. form: of `mezzotint.data.prepared_forms`, "" for
    latents. codec, codec_hash, factor, scale, shift: of the latents; "pixels", "", 1, 1 and 0 for
    images. statistics: of the latents, as in the card of a folder of latents. mirror: whether
    latents have the mirror image as a second view. label_names: of the classes, None without
    labels. unlabelled: images without a label among labelled ones. count: rows of all shards. plan:
    hash of all that the preparation was given, which every shard holds. fingerprint: hash of the
    rows of all shards, in order. left_out: the first MAX_LEFT_OUT unreadable images, with reasons.
    captions: of the column `tokens`: encoder, encoder_hash, tokenizer_hash, dtype, width,
    max_tokens, longest; None without it.
    """

    kind: str
    size: int
    channels: int
    crop: str
    form: str
    label_names: list[str] | None
    plan: str
    shards: list[ShardEntry]
    codec: str = "pixels"
    codec_hash: str = ""
    factor: int = 1
    scale: float = 1.0
    shift: float = 0.0
    statistics: dict[str, Any] | None = None
    mirror: bool = False
    captions: dict[str, Any] | None = None
    unlabelled: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        """Return the number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Return the hash of all rows, in order."""
        facts = [self.kind, self.form, str(self.size), self.crop, json.dumps(self.label_names)]
        return hash_parts([*facts, *(shard.sha256 for shard in self.shards)])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Return the shape of a row: uint8 pixels (c, h, w), or moments (view, 2, c, h, w)."""
        side = self.size // self.factor
        shape = (self.channels, side, side)
        return (1 + self.mirror, 2, *shape) if self.kind == "latents" else shape

    @property
    def row_bytes(self) -> int | None:
        """Return the bytes of the image of a row; None where they vary."""
        if self.kind == "latents":
            return 2 * math.prod(self.row_shape)
        return math.prod(self.row_shape) if FORMS[self.form].is_raw else None

    def to_json(self) -> str:
        """Return the text of the card."""
        values = {
            "format": 1,
            **{k: v for k, v in vars(self).items() if k != "shards"},
            "count": self.count,
            "fingerprint": self.fingerprint,
            "shards": [vars(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def parse_card(text: bytes | str, where: str) -> ShardCard:
    """Return the card whose text was read at `where`.

    Errors: ValueError, naming `where`, for a card that is damaged or of another format.
    """
    try:
        return _check_card(parse_json(text))
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}; {ADVICE}") from None


def _check_card(values: Any) -> ShardCard:
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    if values.get("format") != 1:
        raise ValueError(f"it is of format {values.get('format')}, not 1")
    check_fields(values, {**CARD_KINDS, "shards": list[dict]})
    shards = [_check_entry(entry) for entry in values["shards"]]
    names = {field.name for field in dataclasses.fields(ShardCard)} - {"shards"}
    card = ShardCard(shards=shards, **{name: values[name] for name in names})
    if card.kind not in KINDS:
        raise ValueError(f"its 'kind' is {card.kind!r}; allowed: {', '.join(KINDS)}")
    if card.kind == "images" and card.form not in FORMS:
        raise ValueError(f"its 'form' is {card.form!r}; allowed: {', '.join(FORMS)}")
    if min(card.size, card.channels, card.factor) < 1 or card.size % card.factor:
        raise ValueError("its 'size', 'channels' and 'factor' do not fit together")
    if (card.kind == "latents") != (card.statistics is not None):
        raise ValueError("latents have 'statistics', images have none")
    for name in ("count", "fingerprint"):
        if values[name] != getattr(card, name):
            raise ValueError(f"its {name!r} is not that of its shards")
    return card


def _check_entry(entry: Mapping[str, Any]) -> ShardEntry:
    check_fields(entry, ENTRY_KINDS)
    shard = ShardEntry(**{name: entry[name] for name in ENTRY_KINDS})
    if "/" in shard.name or "\\" in shard.name or not shard.name.endswith(".parquet"):
        raise ValueError(f"{shard.name!r} is not the name of a shard beside it")
    if min(shard.rows, shard.bytes, shard.unreadable) < 0:
        raise ValueError(f"a number of {shard.name} is negative")
    return shard
