"""Prompts: words to the condition of a model that reads text, through the encoder that its card names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.backbones import needs_label, text_width
from mezzotint.core.registry import suggest
from mezzotint.data.text_encoder import TextEncoder, open_text_encoder
from mezzotint.process import guidance as guide
from mezzotint.process.denoiser import Cond, Model
from mezzotint.sampling import conditioning


@functools.lru_cache(maxsize=2)
def _open_checked_encoder(name: str, max_tokens: int, expected: str, device: str) -> TextEncoder:
    found = open_text_encoder(name, device, max_tokens)
    if found.hash != expected:
        raise ValueError(
            f"the text encoder at {name} is not the one the model was trained with (SHA-256 {found.hash[:12]}..., not "
            f"{expected[:12]}...); put the right one there"
        )
    return found


def text_encoder_info(model: Model) -> dict[str, Any]:
    """What the card keeps of the text encoder that a model was trained with; ValueError where it names none."""
    kept = model.info.extra.get("text")
    if kept is None:
        raise ValueError(
            "this model's card names no text encoder; give embeddings instead: Cond(text=..., text_mask=...)"
            if text_width(model.info.config)
            else "this model reads no text; leave the prompts out"
        )
    return kept


def text_encoder_for(model: Model, name: str | None = None) -> TextEncoder:
    """The encoder that a model was trained with; ValueError where it is not on this machine or is another.

    name: where it is now, if it moved.
    """
    kept = text_encoder_info(model)
    device = next(model.parameters()).device
    return _open_checked_encoder(
        name or kept["encoder"], kept["max_tokens"], kept["encoder_hash"], str(device)
    )


def encode_prompts(model: Model, prompts: Sequence[str], name: str | None = None) -> Cond:
    """The condition of one prompt per image; an empty prompt is the empty condition. Errors: as `reader_of`."""
    text, mask = text_encoder_for(model, name).conditions(prompts)
    return Cond(text=text, text_mask=mask)


def null_condition(model: Model) -> guide.Null:
    """The function that empties a condition of this model: the null label, or no words."""
    config = model.info.config
    if needs_label(config):
        raise ValueError(
            "this network has no null label, so nothing guides it; sample it without guidance"
        )
    return guide.null_text if text_width(config) else guide.null_label(config.num_classes)


def empty_condition(model: Model, count: int) -> Cond:
    """A condition with the fields that `null_of` asks for, of the cheapest kind."""
    config = model.info.config
    label = torch.zeros(count, dtype=torch.long) if config.num_classes else None
    if not (width := text_width(config)):
        return Cond(label=label)
    text, mask = torch.zeros(count, 1, width), torch.zeros(count, 1, dtype=torch.bool)
    return Cond(label=label, text=text, text_mask=mask)


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, blank lines left out; ValueError for a file that cannot be read or holds none."""
    try:
        lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


def text_condition(model: Model, text: str | Sequence[str] | Tensor | None, count: int) -> Cond:
    """The text part of a condition for `count` images; ValueError for another number of prompts."""
    if text is None:
        return Cond()
    if isinstance(text, Tensor):
        return Cond(
            text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        )
    said = [text] * count if isinstance(text, str) else list(text)
    if len(said) != count:
        raise ValueError(f"{len(said)} prompts for {count} seeds; give one prompt, or one per seed")
    return conditioning.encode_prompts(model, said)


def label_condition(
    model: Model, label: int | str | Sequence[int | str] | Tensor | None, count: int
) -> Tensor | None:
    """Labels, by index or name, as a (count,) tensor, checked against the model's classes."""
    classes = model.info.config.num_classes
    if label is None:
        if needs_label(model.info.config):
            raise ValueError(f"this network has no null label: give labels, 0 to {classes - 1}")
        return None
    if not classes:
        raise ValueError("labels were given but this model is unconditional; leave label out")
    if not isinstance(label, int | Tensor):
        names = [label] if isinstance(label, str) else label
        label = [label_indices(model, [n])[0] if isinstance(n, str) else n for n in names]
    row = torch.as_tensor(label, dtype=torch.long, device="cpu").reshape(-1)
    row = row.expand(count) if len(row) == 1 else row
    if len(row) != count:
        raise ValueError(f"{len(row)} labels for {count} seeds; give one label, or one per seed")
    null = not needs_label(model.info.config)
    last = classes if null else classes - 1
    if len(row) and (row.min() < 0 or row.max() > last):
        raise ValueError(
            f"label {int(row.max() if row.max() > last else row.min())} is out of range: "
            f"0 to {classes - 1}" + (f", or {classes} for no class" if null else "")
        )
    return row


def label_indices(model: Model, names: Sequence[str]) -> list[int]:
    """Class names or numbers as indices; ValueError lists near names."""
    known = model.info.labels or ()
    found = []
    for name in names:
        if name in known:
            found.append(known.index(name))
        elif name.isdigit():
            found.append(int(name))
        else:
            raise ValueError(
                f"unknown label {name!r}; {suggest(name, known) if known else 'this model has no label names'}"
            )
    return found
