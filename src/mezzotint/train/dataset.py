"""What a recipe trains on, in the space its network works in, with the captions it reads."""

from __future__ import annotations

from pathlib import Path

from mezzotint.backbones import text_width
from mezzotint.config import Recipe
from mezzotint.core.distributed import World, raise_on_all_ranks
from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.caption_embeddings import CaptionEmbeddings
from mezzotint.data.image_dataset import open_source
from mezzotint.data.latent_dataset import Dataset, codec_of, open_dataset
from mezzotint.data.text_encoder import XXL, embed_captions, open_text_encoder
from mezzotint.models import ModelInfo, preset_info


def open_data(recipe: Recipe, world: World, source: str | None = None) -> Dataset:
    """The recipe's set: pictures, or latents for a preset that works on latents; made at every read if not prepared.

    Args:
        world: whose device encodes; the first rank embeds captions that are not embedded yet, the others wait.
        source: where the data is now, if it moved.

    Errors: ValueError where the data do not fit the network's space, resolution or channels.
    """
    card = preset_info(recipe.preset, **recipe.model)
    source = source or recipe.data.source
    if recipe.data.buckets:
        return open_buckets(recipe, card, source, world)
    if recipe.data.portrait:
        raise ValueError(
            "data.portrait turns pictures for a shape wider than tall: name it, data.buckets=[[384,640]]"
        )
    images = open_dataset(
        source,
        size=card.config.size,
        channels=card.config.channels,
        crop=recipe.data.crop,
        space=recipe.data.codec or card.codec,
        mirror=recipe.data.flip,
        device=world.device,
    )
    asked, found = recipe.data.codec, codec_of(images)
    if asked and found not in (asked, str(Path(asked).expanduser().resolve())):
        raise ValueError(
            f"{source} holds latents of {found}, data.codec asks for {asked}; leave data.codec out"
        )
    images.words = open_captions(recipe, images, text_width(card.config), world)
    return images


def open_buckets(recipe: Recipe, card: ModelInfo, source: str, world: World) -> BucketedDataset:
    """The recipe's pictures in its aspect-ratio buckets; ValueError for a network that works on latents."""
    if (recipe.data.codec or card.codec) != "pixels":
        raise ValueError(
            "aspect-ratio buckets are of pixels; leave data.buckets out for a latent network"
        )
    opened, _ = open_source(source, card.config.size)
    config = card.config
    images = BucketedDataset(
        opened, recipe.data.buckets, channels=config.channels, portrait=recipe.data.portrait
    )
    images.words = open_captions(recipe, images, text_width(config), world)
    return images


def open_captions(
    recipe: Recipe, images: Dataset, width: int, world: World
) -> CaptionEmbeddings | None:
    """The embedded captions for a network that reads text of that width; None for one that does not (width 0).

    Errors: ValueError for a text network without encoder or with one of another width, for an encoder given to an
    image-only network, and for pictures without captions.
    """
    name = recipe.data.text_encoder
    if not width and name:
        raise ValueError(
            f"{recipe.preset} reads no text; leave data.text_encoder out, or use a network that does: uvit-text-tiny, or a "
            "uvit with model.text_dim"
        )
    if not width:
        return None
    if not name:
        raise ValueError(
            f"{recipe.preset} reads captions: name a T5 encoder, e.g. data.text_encoder=google-t5/t5-small (the paper's is "
            f"{XXL})"
        )
    reader = open_text_encoder(name, world.device)
    if reader.width != width:
        raise ValueError(
            f"encoder {name} is {reader.width} wide, the network reads {width}; set model.text_dim={reader.width}"
        )
    texts = [images.text(i) for i in range(len(images))]
    words = error = None
    if world.is_rank0:
        try:
            words = embed_captions(texts, reader, progress=True)
        except (ValueError, OSError) as found:
            error = found
    raise_on_all_ranks(error, world)
    return words or embed_captions(texts, reader)


def text_encoder_info(words: CaptionEmbeddings | None) -> dict[str, object]:
    """What a model's card keeps of its encoder, so that prompts are read by the same one."""
    if words is None:
        return {}
    kept = {k: words.card[k] for k in ("encoder", "encoder_hash", "tokenizer_hash")}
    return {"text": {**kept, "max_tokens": words.max_tokens}}
