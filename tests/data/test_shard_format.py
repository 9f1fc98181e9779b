"""The card of the shards: what is written is read, and nothing else."""

from __future__ import annotations

import json

import pytest

from mezzotint.data.shard_format import (
    RowHash,
    ShardCard,
    ShardEntry,
    parse_card,
    shard_name,
)


@pytest.fixture
def card() -> ShardCard:
    shards = [ShardEntry(shard_name(k), 5 + k, 999, k, f"{k:064x}") for k in range(2)]
    return ShardCard(
        kind="images", size=16, channels=3, crop="adm", form="raw", label_names=["ä", "b"],
        plan="0" * 32, shards=shards, left_out=["a.png (cut off)"],
    )  # fmt: skip


def test_a_card_is_read_as_written(card):
    assert parse_card(card.to_json(), "here") == card
    assert (card.count, card.row_shape, card.row_bytes) == (11, (3, 16, 16), 768)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "of format 2, not 1"),
        ({"kind": "sounds"}, "images, latents"),
        ({"form": "gif"}, "webp-lossless"),
        ({"size": "16"}, "its 'size' is '16'"),
        ({"count": 12}, "'count' is not that of its shards"),
        ({"label_names": ["b", "ä"]}, "'fingerprint' is not that"),
        ({"statistics": {}}, "images have none"),
        ({"factor": 3}, "do not fit together"),
    ],
)
def test_a_changed_card_is_refused(card, change, said):
    values = {**json.loads(card.to_json()), **change}
    with pytest.raises(ValueError, match=rf"s3://here is damaged: .*{said}.*prepare the shards"):
        parse_card(json.dumps(values), "s3://here")


def test_a_shard_lies_beside_its_card(card):
    values = json.loads(card.to_json())
    values["shards"][0]["name"] = "../../other.parquet"
    with pytest.raises(ValueError, match="not the name of a shard beside it"):
        parse_card(json.dumps(values), "here")


def test_every_part_of_a_row_counts():
    first = (b"ab", 1, "x", "n", b"t")
    others = [(b"a",), (b"ab", None), (b"ab", 1, None), (b"ab", 1, "null"), (b"ab", 1, "x", "m"),
              (b"ab", 1, "x", "n", None)]  # fmt: skip
    rows = [first, *((*other, *first[len(other) :]) for other in others)]
    hashes = set()
    for row in rows:
        one = RowHash()
        one.add(*row)
        hashes.add(one.hexdigest())
    assert len(hashes) == len(rows)
