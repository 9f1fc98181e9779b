"""CLIP score: how well images fit their captions.

Papers call two numbers so. `clip_score` gives both, each a mean over images with its standard
error:

- "CLIP score": 100 cos(image, caption), the headline. Imagen (arXiv 2205.11487) plots this cosine,
  without the 100; simple diffusion's own scale is not known.
- "CLIPScore": 2.5 max(cos(image, "A photo depicts " + caption), 0), of Hessel et al. 2021 (arXiv
  2104.08718), who measure with CLIP's ViT-B/32.

Each bare name is of openai/clip-vit-large-patch14; another model's name is added to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mezzotint.core.distributed import all_ranks, on_rank0
from mezzotint.evaluate.clip import Clip
from mezzotint.evaluate.extract import compute_by_piece, extract_features, with_resolution
from mezzotint.evaluate.image_source import ImageSource, repeat_grey
from mezzotint.evaluate.results import Evaluation, Number, Protocol, make_protocol

CLIP_SCORE, CLIPSCORE = "CLIP score", "CLIPScore"
WEIGHT, PREFIX = 2.5, "A photo depicts "  # arXiv 2104.08718, section 3


def clip_score(
    source: ImageSource, clip: Clip, *, folder: str | Path | None = None, show: bool = False
) -> Evaluation:
    """Measure how well images fit their captions; the same on all ranks.

    Args:
        source: with captions, see `mezzotint.evaluate.image_source.caption_images`.
        clip: of `mezzotint.evaluate.clip.open_clip`.
        folder: for finished pieces, to resume an interrupted evaluation.
        show: show progress.

    Errors: ValueError for images without captions and for bad images.
    """

    def check() -> tuple[ImageSource, Protocol]:
        sized = repeat_grey(with_resolution(source), clip.features.channels)
        check_captions(sized)
        return sized, make_protocol(sized, sized.resolution)

    source, protocol = all_ranks(check)
    rows = extract_features(source, [clip.features], folder, show)
    captions = check_captions(source)
    texts = embed_captions(clip, captions, folder, show)

    def summarise() -> Evaluation:
        assert rows is not None, "rank 0 has them"
        assert texts is not None, "rank 0 has them"
        numbers = clip_numbers(clip, rows[clip.name], captions, texts)
        return Evaluation(protocol=protocol, numbers=tuple(numbers))

    return on_rank0(summarise)


def check_captions(source: ImageSource) -> tuple[str, ...]:
    """Return the caption of every image; ValueError for images without captions."""
    if source.captions is None:
        raise ValueError(
            f"{source.name} has no captions, which a CLIP score needs; give --prompts FILE"
        )
    return source.captions


def embed_captions(
    clip: Clip, captions: Sequence[str], folder: str | Path | None = None, show: bool = False
) -> dict[str, Tensor] | None:
    """Return embeddings of the distinct captions by metric, (n, dims) in order of appearance.

    On rank 0; None on the others. All ranks share the work, and call this together.
    """
    distinct = list(dict.fromkeys(captions))

    def compute(start: int, stop: int) -> dict[str, Tensor]:
        part = distinct[start:stop]
        return {
            CLIP_SCORE: clip.embed(part),
            CLIPSCORE: clip.embed([PREFIX + caption for caption in part]),
        }

    def key() -> str:
        return json.dumps(["captions", hash_captions(distinct), clip.text_hash])

    names = (CLIP_SCORE, CLIPSCORE)
    title = f"{len(distinct):,} captions by {clip.name}"
    return compute_by_piece(compute, names, len(distinct), title, folder, key, show)


def clip_numbers(
    clip: Clip, rows: Tensor, captions: Sequence[str], texts: dict[str, Tensor]
) -> list[Number]:
    """Return both scores.

    Args:
        rows: unit vectors of the images, (n, dims).
        captions: of the images.
        texts: as `embed_captions` returns them.
    """
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    which = [distinct[caption] for caption in captions]
    cosines = {k: (rows.double() * v[which].double()).sum(1) for k, v in texts.items()}
    scores = {
        # arXiv 2205.11487, section 4: the cosine itself; here in per cent.
        CLIP_SCORE: (100 * cosines[CLIP_SCORE], "100 cos(image, caption)"),
        # arXiv 2104.08718, section 3: CLIP-S = w max(cos(c, v), 0).
        CLIPSCORE: (
            WEIGHT * cosines[CLIPSCORE].clamp_min(0),
            f"{WEIGHT} max(cos(image, '{PREFIX}' + caption), 0)",
        ),
    }
    features = clip.metadata()
    against = {
        "name": "captions",
        "hash": hash_captions(captions),
        "num_captions": len(distinct),
        "cut": sum(clip.is_cut(caption) for caption in distinct),
    }
    return [
        Number(
            metric=metric_name(clip, metric),
            value=float(values.mean()),
            features=features,
            reference=against,
            error=float(values.std() / len(values) ** 0.5),
            settings={"formula": formula},
        )
        for metric, (values, formula) in scores.items()
    ]


def metric_name(clip: Clip, metric: str = CLIP_SCORE) -> str:
    """Return a metric's name; the bare one is reserved for the network of the papers."""
    return metric if clip.is_vit_l14 else f"{metric} ({clip.name})"


def hash_captions(captions: Sequence[str]) -> str:
    """Return 16 hex digits of the SHA-256 of captions in their order."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16]
