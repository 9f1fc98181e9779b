"""Captions of COCO 2014's validation set, drawn by a seed: the prompts of zero-shot FID-30K."""

from __future__ import annotations

from pathlib import Path

from mezzotint.core.files import read_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.rng import philox
from mezzotint.sampling.prompts import Prompt, make_prompts, read_prompts, read_texts
from mezzotint.sampling.protocols import get_protocol

ANNOTATIONS = "captions_val2014.json"  # 202,654 captions of 40,504 images


def read_coco_captions(path: Path) -> list[str]:
    """Read the captions of a COCO annotation file in the order of their ids; spaces are joined.

    Errors: ValueError for a file of another kind, and for an id that is there twice.
    """
    advice = f"give {ANNOTATIONS} of COCO's annotations_trainval2014.zip"
    values = read_json(path, advice)
    try:
        check_fields(values, {"annotations": list[dict]})
        for row in values["annotations"]:
            check_fields(row, {"id": int, "image_id": int, "caption": str})
    except ValueError as error:
        raise ValueError(f"{path} holds no captions of COCO: {error}; {advice}") from None
    by_id = {row["id"]: " ".join(row["caption"].split()) for row in values["annotations"]}
    if len(by_id) != len(values["annotations"]):
        raise ValueError(f"{path} has two captions of one id; {advice}")
    return [by_id[number] for number in sorted(by_id)]


def draw_coco_captions(path: Path, count: int, seed: int = 0) -> tuple[str, ...]:
    """Draw captions uniformly without replacement; a function of the captions, count and seed.

    Errors: ValueError as `read_coco_captions`, and for fewer captions.
    """
    captions = read_coco_captions(path)
    if len(captions) < count:
        raise ValueError(
            f"{path} has {len(captions):,} captions and {count:,} are drawn; give {ANNOTATIONS}, "
            "which has 202,654"
        )
    chosen = philox("resample", seed, 0, draw=3).permutation(len(captions))[:count]
    return tuple(captions[i] for i in chosen)


def read_protocol_prompts(path: Path, protocol: str | None) -> tuple[Prompt, ...]:
    """Read the prompts of a file: those that the protocol draws from COCO, or one a line."""
    count = None if protocol is None else get_protocol(protocol).coco_captions
    if count is None:
        return read_prompts(path)
    return make_prompts(draw_coco_captions(path, count), None)


def read_protocol_texts(path: Path, protocol: str | None) -> tuple[str, ...]:
    """Read the texts of `read_protocol_prompts`; ValueError for a prompt with its own settings."""
    count = None if protocol is None else get_protocol(protocol).coco_captions
    return read_texts(path) if count is None else draw_coco_captions(path, count)
