"""Prompts: words to the condition of a model that reads text, through the encoder that its card names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mezzotint.backbones import needs_label, text_width
from mezzotint.data.text import TextEncoder, encoder
from mezzotint.process import guidance as guide
from mezzotint.process.denoiser import Cond, Model


@functools.lru_cache(maxsize=2)
def _reader(name: str, max_tokens: int, expected: str, device: str) -> TextEncoder:
    found = encoder(name, device, max_tokens)
    if found.hash != expected:
        raise ValueError(
            f"the text encoder at {name} is not the one the model was trained with (SHA-256 {found.hash[:12]}..., not "
            f"{expected[:12]}...); put the right one there"
        )
    return found


def encoder_of(model: Model) -> dict[str, Any]:
    """What the card keeps of the text encoder that a model was trained with; ValueError where it names none."""
    kept = model.card.extra.get("text")
    if kept is None:
        raise ValueError(
            "this model's card names no text encoder; give embeddings instead: Cond(text=..., text_mask=...)"
            if text_width(model.card.config)
            else "this model reads no text; leave the prompts out"
        )
    return kept


def reader_of(model: Model, name: str | None = None) -> TextEncoder:
    """The encoder that a model was trained with; ValueError where it is not on this machine or is another.

    name: where it is now, if it moved.
    """
    kept = encoder_of(model)
    device = next(model.parameters()).device
    return _reader(name or kept["encoder"], kept["max_tokens"], kept["encoder_hash"], str(device))


def read(model: Model, prompts: Sequence[str], name: str | None = None) -> Cond:
    """The condition of one prompt per image; an empty prompt is the empty condition. Errors: as `reader_of`."""
    text, mask = reader_of(model, name).conditions(prompts)
    return Cond(text=text, text_mask=mask)


def null_of(model: Model) -> guide.Null:
    """The function that empties a condition of this model: the null label, or no words."""
    config = model.card.config
    if needs_label(config):
        raise ValueError("this network has no null label, so nothing guides it; sample it without guidance")
    return guide.null_text if text_width(config) else guide.null_label(config.num_classes)


def blank(model: Model, count: int) -> Cond:
    """A condition with the fields that `null_of` asks for, of the cheapest kind."""
    config = model.card.config
    label = torch.zeros(count, dtype=torch.long) if config.num_classes else None
    if not (width := text_width(config)):
        return Cond(label=label)
    text, mask = torch.zeros(count, 1, width), torch.zeros(count, 1, dtype=torch.bool)
    return Cond(label=label, text=text, text_mask=mask)


def prompts_from(path: Path) -> tuple[str, ...]:
    """One prompt a line, blank lines left out; ValueError for a file that cannot be read or holds none."""
    try:
        lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines
