"""What a recipe trains on, in the space its network works in, with the captions it reads."""

from __future__ import annotations

from pathlib import Path

import torch

from mezzotint.config import Recipe
from mezzotint.data.latent_sets import TrainingSet, open_training_set, space_of
from mezzotint.models import preset_card


def open_data(recipe: Recipe, device: torch.device, source: str | None = None) -> TrainingSet:
    """The recipe's set: pictures, or latents for a preset that works on latents; made at every read if not prepared.

    Args:
        device: where pictures are encoded. source: where the data is now, if it moved.

    Errors: ValueError where the data do not fit the network's space, resolution or channels.
    """
    card = preset_card(recipe.preset, **recipe.model)
    source = source or recipe.data.source
    images = open_training_set(
        source,
        size=card.config.size,
        channels=card.config.channels,
        crop=recipe.data.crop,
        space=recipe.data.codec or card.codec,
        mirror=recipe.data.flip,
        device=device,
    )
    asked, found = recipe.data.codec, space_of(images)
    if asked and found not in (asked, str(Path(asked).expanduser().resolve())):
        raise ValueError(f"{source} holds latents of {found}, data.codec asks for {asked}; leave data.codec out")
    return images
