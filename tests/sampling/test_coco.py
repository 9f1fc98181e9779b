"""Captions of COCO: a fixed draw, whatever the order of the file; files of another kind."""

from __future__ import annotations

import dataclasses
import json

import pytest

from helpers.coco import write_coco
from mezzotint.sampling import protocols
from mezzotint.sampling.coco import (
    draw_coco_captions,
    read_coco_captions,
    read_protocol_texts,
)


def test_captions_come_in_the_order_of_their_ids(tmp_path):
    file = write_coco(tmp_path, images=4)
    assert read_coco_captions(file)[:3] == ["a red circle", "a red circle at the top", "a red ring"]


def test_the_draw_is_a_function_of_captions_count_and_seed(tmp_path):
    file = write_coco(tmp_path, images=20)
    drawn = draw_coco_captions(file, 30)
    assert len(drawn) == 30
    values = json.loads(file.read_text())
    values["annotations"].reverse()
    file.write_text(json.dumps(values))
    assert draw_coco_captions(file, 30) == drawn
    assert draw_coco_captions(file, 10) == drawn[:10]
    assert draw_coco_captions(file, 30, seed=1) != drawn
    # Without replacement: all of them are a permutation.
    assert sorted(draw_coco_captions(file, 40)) == sorted(read_coco_captions(file))


def test_fewer_captions_than_the_protocol_draws(tmp_path):
    with pytest.raises(ValueError, match=r"has 40 captions and 30,000 are drawn"):
        read_protocol_texts(write_coco(tmp_path, images=20), "coco-fid-30k")


def test_other_protocols_read_a_file_of_prompts(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a ring\na circle\n")
    for protocol in (None, "simple-diffusion-512steps"):
        assert read_protocol_texts(tmp_path / "prompts.txt", protocol) == ("a ring", "a circle")
    few = dataclasses.replace(protocols.PROTOCOLS["coco-fid-30k"], coco_captions=6)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco-fid-30k", few)
    file = write_coco(tmp_path, images=4)
    assert read_protocol_texts(file, "coco-fid-30k") == draw_coco_captions(file, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a ring\n", "cannot be read as JSON"),
        ("{}", "it has no 'annotations'"),
        ('{"annotations": [{"id": 1, "image_id": 2}]}', "it has no 'caption'"),  # of instances
        (json.dumps({"annotations": [{"id": 1, "image_id": 2, "caption": "a"}] * 2}), "one id"),
    ],
)
def test_files_of_another_kind(content, message, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_coco_captions(tmp_path / "other.json")
    assert "captions_val2014.json" in str(caught.value)
