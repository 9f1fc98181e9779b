"""Conditions for a model: class labels, and prompts through the model's own text encoder."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mezzotint.backbones import needs_label, text_width
from mezzotint.data.labels import find_class
from mezzotint.data.text_encoder import TextEncoder, open_text_encoder
from mezzotint.process import guidance as guide
from mezzotint.process.denoiser import Cond, Model
from mezzotint.sampling.prompts import describe_cut, make_prompts

# One or several, as integers of Python, numpy or torch; tensors and arrays of one dimension too.
Seeds: TypeAlias = SupportsIndex | torch.Generator | Iterable[Any]
Labels: TypeAlias = SupportsIndex | str | Iterable[Any]


@functools.lru_cache(maxsize=2)
def _open_checked_encoder(
    name: str, max_tokens: int, sha256: str, dtype_name: str, device: str
) -> TextEncoder:
    encoder = open_text_encoder(name, device, max_tokens, dtype_name)
    if encoder.hash != sha256:
        raise ValueError(
            f"the text encoder at {name} is not the one the model was trained with: its SHA-256 is "
            f"{encoder.hash[:12]}..., not {sha256[:12]}...; give the right folder"
        )
    return encoder


def text_encoder_info(model: Model) -> dict[str, Any]:
    """Return what a model's info says of its text encoder: encoder, encoder_hash, max_tokens.

    Errors: ValueError for a model that names none.
    """
    info = model.info.extra.get("text")
    if info is not None:
        return info
    if text_width(model.info.config):
        raise ValueError(
            "this model's config.json names no text encoder; give embeddings instead: "
            "Cond(text=..., text_mask=...)"
        )
    raise ValueError("this model has no text conditioning; leave the prompts out")


def text_encoder_for(model: Model, name: str | None = None) -> TextEncoder:
    """Open the text encoder that a model was trained with.

    Args:
        name: its folder or name, if it is not where the model's info says.

    Errors: ValueError if it is not on this machine or is another encoder.
    """
    info = text_encoder_info(model)
    device = next(model.parameters()).device
    return _open_checked_encoder(
        name or info["encoder"],
        info["max_tokens"],
        info["encoder_hash"],
        info.get("dtype", "float16"),
        str(device),
    )


def encode_prompts(model: Model, prompts: Sequence[str], name: str | None = None) -> Cond:
    """Return the condition of one prompt per image; an empty prompt is the empty condition.

    Errors: as `text_encoder_for`.
    """
    text, mask = text_encoder_for(model, name).conditions(prompts)
    return Cond(text=text, text_mask=mask)


def null_condition(model: Model) -> guide.Null:
    """Return the function that empties a condition of this model: no class, no text."""
    config = model.info.config
    if needs_label(config):
        raise ValueError(
            "this network has no null label, which guidance needs; sample it without guidance"
        )
    if not text_width(config):
        return guide.null_label(config.num_classes)
    classes = config.num_classes
    return guide.null_label_and_text(classes) if classes else guide.null_text


def empty_condition(model: Model, count: int) -> Cond:
    """Return a small condition of `count` images that has every field `null_condition` reads."""
    config = model.info.config
    label = torch.zeros(count, dtype=torch.long) if config.num_classes else None
    if not (width := text_width(config)):
        return Cond(label=label)
    text, mask = torch.zeros(count, 1, width), torch.zeros(count, 1, dtype=torch.bool)
    return Cond(label=label, text=text, text_mask=mask)


def text_condition(model: Model, text: str | Sequence[str] | Tensor | None, count: int) -> Cond:
    """Return the text part of a condition for `count` images.

    Args:
        text: one prompt for all images, one per image, or token embeddings (count, t, d).

    Errors: ValueError for another number of prompts.
    """
    if text is None:
        return Cond()
    if isinstance(text, Tensor):
        if text.ndim != 3 or len(text) != count:
            raise ValueError(
                f"text embeddings of shape {tuple(text.shape)} for {count} seeds; give "
                f"(seeds, tokens, width), so ({count}, tokens, width)"
            )
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return Cond(text=text, text_mask=mask)
    prompts = [text] * count if isinstance(text, str) else list(text)
    if len(prompts) != count:
        raise ValueError(
            f"{len(prompts)} prompts for {count} seeds; give one prompt, or one per seed"
        )
    for line in describe_cut(text_encoder_for(model), make_prompts(prompts, None)):
        warnings.warn(line, stacklevel=3)
    return encode_prompts(model, prompts)


def list_seeds(seeds: Seeds) -> list[int]:
    """Return seeds as integers in [0, 2^63).

    Args:
        seeds: one seed or several. A seed is an integer of Python, numpy or torch, or a
            `torch.Generator`, from which one is drawn.

    Errors: ValueError for anything else, and for integers out of range.
    """
    listed = []
    for seed in list_items(seeds):
        if isinstance(seed, torch.Generator):
            seed = torch.randint(2**63 - 1, (), generator=seed, device=seed.device)
        listed.append(_integer(seed, "seed"))
        if not 0 <= listed[-1] < 2**63:
            raise ValueError(f"seed {listed[-1]} is out of range: 0 to 2^63 - 1")
    return listed


def list_items(values: Any) -> list[Any]:
    """Return the values of an array, a tensor or an iterable of at most one dimension, or of one.

    Errors: ValueError for more dimensions.
    """
    if isinstance(values, Tensor | np.ndarray):
        if values.ndim > 1:
            raise ValueError(f"an array of shape {tuple(values.shape)}; give one dimension")
        return values.reshape(-1).tolist()
    is_many = isinstance(values, Iterable) and not isinstance(values, str)
    return list(values) if is_many else [values]


def _integer(value: Any, what: str) -> int:
    """Return a whole number of any type as an int; ValueError for others, booleans too."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise ValueError(f"{what} {value!r} is not a whole number; give e.g. 0, or range(8)")
    return int(value)


def label_condition(model: Model, label: Labels | None, count: int) -> Tensor | None:
    """Return class labels as a (count,) tensor, checked against the model's classes.

    Args:
        label: index or name, one for all images or one per image; None is no class. Indices may be
            integers of Python, numpy or torch.

    Errors: ValueError for unknown or missing labels and for another number of them.
    """
    classes = model.info.config.num_classes
    if label is None:
        if needs_label(model.info.config):
            raise ValueError(f"this network has no null label: give labels, 0 to {classes - 1}")
        return None
    if not classes:
        raise ValueError("labels were given but this model is unconditional; leave label out")
    indices = [
        label_indices(model, [item])[0] if isinstance(item, str) else _integer(item, "label")
        for item in list_items(label)
    ]
    if len(indices) not in (1, count):
        raise ValueError(
            f"{len(indices)} labels for {count} seeds; give one label, or one per seed"
        )
    has_null = not needs_label(model.info.config)
    last = classes if has_null else classes - 1
    for index in indices:
        if not 0 <= index <= last:
            raise ValueError(
                f"label {index} is out of range: 0 to {classes - 1}"
                + (f", or {classes} for no class" if has_null else "")
            )
    return torch.tensor(indices, dtype=torch.long).expand(count)


def label_indices(model: Model, names: Sequence[str]) -> list[int]:
    """Return the indices of classes given as text, see `mezzotint.data.labels.find_class`."""
    return [find_class(name, model.info.labels) for name in names]
