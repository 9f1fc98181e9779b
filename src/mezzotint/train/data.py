"""What a recipe trains on, in the space its network works in, with the captions it reads."""

from __future__ import annotations

from pathlib import Path

from mezzotint.backbones import text_width
from mezzotint.config import Recipe
from mezzotint.data.buckets import BucketedImages
from mezzotint.data.images import open_source
from mezzotint.data.latent_sets import TrainingSet, open_training_set, space_of
from mezzotint.data.text import XXL, embed, encoder
from mezzotint.data.words import Words
from mezzotint.models import Card, preset_card
from mezzotint.ranks import World, fail_together


def open_data(recipe: Recipe, world: World, source: str | None = None) -> TrainingSet:
    """The recipe's set: pictures, or latents for a preset that works on latents; made at every read if not prepared.

    Args:
        world: whose device encodes; the first rank embeds captions that are not embedded yet, the others wait.
        source: where the data is now, if it moved.

    Errors: ValueError where the data do not fit the network's space, resolution or channels.
    """
    card = preset_card(recipe.preset, **recipe.model)
    source = source or recipe.data.source
    if recipe.data.shapes:
        return open_buckets(recipe, card, source, world)
    if recipe.data.portrait:
        raise ValueError("data.portrait turns pictures for a shape wider than tall: name it, data.shapes=[[384,640]]")
    images = open_training_set(
        source,
        size=card.config.size,
        channels=card.config.channels,
        crop=recipe.data.crop,
        space=recipe.data.codec or card.codec,
        mirror=recipe.data.flip,
        device=world.device,
    )
    asked, found = recipe.data.codec, space_of(images)
    if asked and found not in (asked, str(Path(asked).expanduser().resolve())):
        raise ValueError(f"{source} holds latents of {found}, data.codec asks for {asked}; leave data.codec out")
    images.words = open_words(recipe, images, text_width(card.config), world)
    return images


def open_buckets(recipe: Recipe, card: Card, source: str, world: World) -> BucketedImages:
    """The recipe's pictures in its aspect-ratio buckets; ValueError for a network that works on latents."""
    if (recipe.data.codec or card.codec) != "pixels":
        raise ValueError("aspect-ratio buckets are of pixels; leave data.shapes out for a latent network")
    opened, _ = open_source(source, card.config.size)
    config = card.config
    images = BucketedImages(opened, recipe.data.shapes, channels=config.channels, portrait=recipe.data.portrait)
    images.words = open_words(recipe, images, text_width(config), world)
    return images


def open_words(recipe: Recipe, images: TrainingSet, width: int, world: World) -> Words | None:
    """The embedded captions for a network that reads text of that width; None for one that does not (width 0).

    Errors: ValueError for a text network without encoder or with one of another width, for an encoder given to an
    image-only network, and for pictures without captions.
    """
    name = recipe.data.text
    if not width and name:
        raise ValueError(
            f"{recipe.preset} reads no text; leave data.text out, or use a network that does: uvit-text-tiny, or a "
            "uvit with model.text_dim"
        )
    if not width:
        return None
    if not name:
        raise ValueError(
            f"{recipe.preset} reads captions: name a T5 encoder, e.g. data.text=google-t5/t5-small (the paper's is "
            f"{XXL})"
        )
    reader = encoder(name, world.device)
    if reader.width != width:
        raise ValueError(
            f"encoder {name} is {reader.width} wide, the network reads {width}; set model.text_dim={reader.width}"
        )
    texts = [images.text(i) for i in range(len(images))]
    words = error = None
    if world.main:
        try:
            words = embed(texts, reader, progress=True)
        except (ValueError, OSError) as found:
            error = found
    fail_together(error, world)
    return words or embed(texts, reader)


def text_card(words: Words | None) -> dict[str, object]:
    """What a model's card keeps of its encoder, so that prompts are read by the same one."""
    if words is None:
        return {}
    kept = {k: words.card[k] for k in ("encoder", "encoder_hash", "tokenizer_hash")}
    return {"text": {**kept, "max_tokens": words.max_tokens}}
