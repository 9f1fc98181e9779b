"""Open a recipe's dataset and check that it fits the network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mezzotint.backbones import native_size, needs_label, text_width
from mezzotint.config import Recipe, Shards
from mezzotint.core.distributed import WorkShare, World, all_ranks, on_rank0
from mezzotint.core.files import cache_dir, expand_user
from mezzotint.core.object_store import is_address, join_address, same_place
from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.caption_embeddings import Captions, LiveCaptions, embed_captions, fill_cache
from mezzotint.data.dataset import Dataset
from mezzotint.data.image_dataset import open_source, split_source
from mezzotint.data.latent_dataset import EncodedDataset, open_dataset
from mezzotint.data.shard_cache import ShardCache
from mezzotint.data.shard_index import is_sharded
from mezzotint.data.shard_order import choose_lanes
from mezzotint.data.sharded_captions import ShardedCaptions
from mezzotint.data.sharded_dataset import ShardedDataset, open_shards
from mezzotint.data.text_encoder import XXL, TextEncoder, open_text_encoder
from mezzotint.models import ModelInfo
from mezzotint.train.run_folder import started_recipe


def open_data(recipe: Recipe, info: ModelInfo, world: World, source: str | None = None) -> Dataset:
    """Open the recipe's dataset with its captions; see `open_recipe_dataset` and `open_captions`.

    All ranks call it together.
    """
    dataset = all_ranks(lambda: open_recipe_dataset(recipe, info, world, source), world)
    dataset.caption_embeddings = open_captions(recipe, dataset, text_width(info.config), world)
    return dataset


def open_recipe_dataset(
    recipe: Recipe, info: ModelInfo, world: World, source: str | None = None
) -> Dataset:
    """Open the recipe's images, or their latents for a network that works on latents.

    Images of a latent network are encoded at every read, unless the source holds prepared latents.

    Args:
        info: of the recipe's preset and model.
        world: its device encodes.
        source: where the data is now, if it moved.

    Errors: ValueError where the data do not fit the network's space, size or channels.
    """
    source, config = source or recipe.data.source, info.config
    _check_augment(recipe, config, recipe.data.codec or info.codec)
    height, width = native_size(config)
    buckets = recipe.data.buckets or (((height, width),) if height != width else ())
    dataset: Dataset
    if is_sharded(source):
        dataset = _open_shards(recipe, info, source, bool(buckets))
        _check_codec(recipe, dataset, source)
        return dataset
    if recipe.data.shards != Shards():
        raise ValueError(
            f"{source} is no address and no folder of `mezzotint prepare --shards`, so "
            "data.shards does nothing; leave its fields out, or give shards"
        )
    if buckets:
        dataset = _open_buckets(recipe, info, source, buckets)
    elif recipe.data.portrait:
        raise ValueError(
            "data.portrait turns images for a bucket wider than tall, but data.buckets is empty; "
            "set e.g. data.buckets=[[384,640]]"
        )
    else:
        dataset = open_dataset(
            source,
            size=config.size,
            channels=config.channels,
            crop=recipe.data.crop,
            columns=_columns(recipe),
            codec_name=recipe.data.codec or info.codec,
            mirror=recipe.data.flip,
            device=world.device,
            full_scale=recipe.data.full_scale,
        )
        _check_codec(recipe, dataset, source)
        _check_augment(recipe, config, dataset.codec_name)
    return dataset


def check_encoded_ahead(recipe: Recipe, dataset: Dataset, device: torch.device) -> None:
    """Raise ValueError for a run on a GPU whose images would be encoded at every read.

    The encoder would run on the images one by one, and both it and the training step would wait.
    """
    if device.type == "cuda" and isinstance(dataset, EncodedDataset):
        source, size = recipe.data.source, dataset.images.size
        raise ValueError(
            f"{source} holds images, and {recipe.preset} trains on latents: to encode them at "
            "every read would keep the GPU waiting. Encode them once: mezzotint prepare "
            f"{source} FOLDER --size {size} --codec {dataset.codec_name}, then --data FOLDER"
        )


def _check_augment(recipe: Recipe, config: Any, codec: str) -> None:
    """Raise ValueError where data.augment is set and the network reads no augmentation label."""
    asked = f"data.augment {recipe.data.augment:g}"
    if recipe.data.augment and not (codec == "pixels" and hasattr(config, "augment_label")):
        raise ValueError(
            f"{asked} needs a network on pixels that reads the augmentation label, and "
            f"{recipe.preset} works on {codec}; leave data.augment out"
        )
    if recipe.data.augment and recipe.model.get("augment_label") is False:
        raise ValueError(
            f"{asked} needs a network that reads the augmentation label; leave "
            "model.augment_label out, or set data.augment=0"
        )


def _columns(recipe: Recipe) -> dict[str, str]:
    """Return the columns that the recipe chooses."""
    chosen = dataclasses.asdict(recipe.data.columns)
    return {role: name for role, name in chosen.items() if name is not None}


def _open_buckets(
    recipe: Recipe, info: ModelInfo, source: str, buckets: tuple[tuple[int, int], ...]
) -> BucketedDataset:
    """Open images in aspect-ratio buckets; ValueError for a latent network."""
    if (recipe.data.codec or info.codec) != "pixels":
        raise ValueError(
            "images in aspect-ratio buckets, or of a size that is no square, are pixels, and this "
            "network works on latents; leave data.buckets out and take a square size"
        )
    opened, _ = open_source(source, max(native_size(info.config)), _columns(recipe))
    return BucketedDataset(
        opened,
        buckets,
        channels=info.config.channels,
        portrait=recipe.data.portrait,
        full_scale=recipe.data.full_scale,
    )


def _open_shards(recipe: Recipe, info: ModelInfo, source: str, has_buckets: bool) -> ShardedDataset:
    """Open an address of shards; ValueError for buckets, which need every image's size first."""
    if has_buckets:
        raise ValueError(
            f"{source} holds shards, which are read at one square size; leave data.buckets out, "
            "or give a folder of images on a disk"
        )
    given, config, base = recipe.data.shards, info.config, split_source(source)[0]
    if recipe.save.store and same_place(recipe.save.store, base):
        raise ValueError(
            f"save.store {recipe.save.store} is where the data is; give an address of its own, "
            f"e.g. {join_address(recipe.save.store, 'runs')}"
        )
    if is_address(given.cache):
        raise ValueError(
            f"data.shards.cache={given.cache} is an address; give a folder on a local disk"
        )
    folder = expand_user(given.cache) if given.cache else cache_dir() / "shards"
    return open_shards(
        source,
        ShardCache(folder.absolute(), int(given.cache_gb * 1e9), given.patience_s),
        size=config.size,
        channels=config.channels,
        crop=recipe.data.crop,
        columns=_columns(recipe) or None,
        codec_name=recipe.data.codec or info.codec,
        missing=given.missing,
        full_scale=recipe.data.full_scale,
    )


def resolve_order(recipe: Recipe, folder: Path, dataset: Dataset, world: World) -> Recipe:
    """Return the recipe with the lanes of its shards, and set the order of the dataset.

    A run that has started keeps its lanes, whatever the number of ranks. All ranks call it.

    Errors: ValueError for lanes that do not divide the batch, and for a cache too small for them.
    """
    if not isinstance(dataset, ShardedDataset):
        return recipe
    given = recipe.data.shards
    lanes = on_rank0(lambda: _choose_lanes(recipe, folder, dataset, world), world)
    dataset.set_order(lanes, given.shuffle_images)
    all_ranks(lambda: _check_cache(given, dataset, lanes, world), world)
    shards = dataclasses.replace(given, lanes=lanes)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=shards))


def _choose_lanes(recipe: Recipe, folder: Path, dataset: ShardedDataset, world: World) -> int:
    started = started_recipe(folder)
    lanes = recipe.data.shards.lanes or (started.data.shards.lanes if started else None)
    lanes = lanes or choose_lanes(recipe.batch, len(dataset.counts), world.size)
    other_recipe = started is not None and started.batch != recipe.batch  # which will be told
    if recipe.batch % lanes and not other_recipe:
        nearest = max(n for n in range(1, lanes) if recipe.batch % n == 0)
        raise ValueError(
            f"data.shards.lanes={lanes} does not divide batch={recipe.batch}; try "
            f"data.shards.lanes={nearest}, or leave it out"
        )
    return lanes


def _check_cache(given: Shards, dataset: ShardedDataset, lanes: int, world: World) -> None:
    """Raise ValueError where the shards that are in use at once do not fit the cache."""
    local_ranks = WorkShare.from_environment(local=True).world
    needed, most = dataset.bytes_needed(world.size, local_ranks), given.cache_gb * 1e9
    if needed > most:
        raise ValueError(
            f"data.shards.cache_gb={given.cache_gb:g} is too small: {lanes} lanes of "
            f"{given.shuffle_images:,} images need about {needed / 1e9:.3g} GB on each machine; "
            "give more, or smaller data.shards.lanes or data.shards.shuffle_images"
        )


def _check_codec(recipe: Recipe, dataset: Dataset, source: str) -> None:
    """Raise ValueError where prepared latents are of another autoencoder than data.codec."""
    wanted, actual = recipe.data.codec, dataset.codec_name
    if wanted and actual not in (wanted, str(expand_user(wanted).resolve())):
        raise ValueError(
            f"{source} holds latents of {actual}, not of data.codec={wanted}; leave data.codec out"
        )


def open_captions(recipe: Recipe, dataset: Dataset, width: int, world: World) -> Captions | None:
    """Return the embedded captions for a network that reads text `width` wide; None for width 0.

    All ranks call it together, and each embeds its share of the new captions.

    Errors: ValueError for a text network without an encoder or with one of another width, for an
        encoder given to a network that reads no text, for images without captions, and for
        captions that worker processes would have to embed.
    """
    encoder = all_ranks(lambda: _open_encoder(recipe, width, world), world)
    if encoder is None:
        return None
    if isinstance(dataset, ShardedDataset):
        return all_ranks(lambda: _open_sharded_captions(recipe, dataset, encoder), world)
    captions = all_ranks(lambda: [dataset.text(i) for i in range(len(dataset))], world)

    if not recipe.data.text_cache:
        if recipe.data.workers:
            raise ValueError(
                "data.text_cache=false embeds captions in the training process, and data.workers="
                f"{recipe.data.workers} loads batches in others; set data.workers=0"
            )
        return all_ranks(lambda: LiveCaptions(captions, encoder), world)
    # Machines without a common cache: each then embeds in its own what only others have.
    for share in (WorkShare(world.rank, world.size), WorkShare.from_environment(local=True)):
        all_ranks(lambda: fill_cache(captions, encoder, share, progress=world.is_rank0), world)  # noqa: B023
    return all_ranks(lambda: embed_captions(captions, encoder), world)  # from the cache


def _open_sharded_captions(
    recipe: Recipe, dataset: ShardedDataset, encoder: TextEncoder
) -> ShardedCaptions:
    """Return the captions of shards; ValueError where they would have to be embedded ahead."""
    captions = ShardedCaptions(dataset, encoder)
    if captions.is_stored:
        return captions
    if not dataset.has_captions:
        raise ValueError(
            f"{recipe.data.source} holds no captions; give shards with a column 'text'"
        )
    if recipe.data.text_cache or recipe.data.workers:
        raise ValueError(
            f"the captions of {recipe.data.source} are not embedded: prepare the shards with "
            "--text ENCODER, or embed them at every read in the training process: "
            "data.text_cache=false data.workers=0"
        )
    return captions


def _open_encoder(recipe: Recipe, width: int, world: World) -> TextEncoder | None:
    """Return the recipe's text encoder; None for a network that reads no text."""
    name = recipe.data.text_encoder
    if not width:
        if name:
            raise ValueError(
                f"{recipe.preset} reads no text; leave data.text_encoder out, or use a network "
                "that does: uvit-text-tiny, or a uvit with model.text_dim"
            )
        return None
    if not name:
        raise ValueError(
            f"{recipe.preset} reads captions; name a T5 encoder, e.g. "
            f"data.text_encoder=google-t5/t5-small (the paper uses {XXL})"
        )
    encoder = open_text_encoder(name, world.device, dtype_name=recipe.data.text_dtype)
    if encoder.width != width:
        raise ValueError(
            f"encoder {name} is {encoder.width} wide, the network reads {width}; "
            f"set model.text_dim={encoder.width}"
        )
    return encoder


def resolve(recipe: Recipe, info: ModelInfo, dataset: Dataset) -> tuple[Recipe, ModelInfo]:
    """Fill in what recipe and info leave to the data.

    That is classes, label names, codec, augmentation label and schedule.

    Errors: ValueError where the dataset's labels do not fit the network.
    """
    model, config = dict(recipe.model), info.config
    if dataset.num_classes and "num_classes" not in model and not text_width(config):
        model["num_classes"] = dataset.num_classes
        config = dataclasses.replace(config, num_classes=dataset.num_classes)
    if recipe.data.augment:
        model["augment_label"] = True
        config = dataclasses.replace(config, augment_label=True)
    wanted = config.num_classes
    if wanted and not dataset.num_classes:
        raise ValueError(
            f"{recipe.preset} is conditioned on {wanted} classes but {recipe.data.source} has no "
            "labels; use class subfolders, or train without classes: model.num_classes=0"
        )
    if wanted and dataset.num_classes > wanted:
        raise ValueError(
            f"{recipe.data.source} has {dataset.num_classes} classes, more than "
            f"model.num_classes={wanted}; set model.num_classes={dataset.num_classes}"
        )
    if wanted and needs_label(config) and (unlabelled := dataset.count_unlabelled()):
        raise ValueError(
            f"{unlabelled:,} of {len(dataset):,} images of {recipe.data.source} have no label, and "
            f"{recipe.preset} has no null label to train on them; give every image a label, or "
            "leave those images out"
        )
    schedule = recipe.schedule or info.schedule
    return (
        dataclasses.replace(recipe, model=model, schedule=schedule),
        dataclasses.replace(
            info,
            config=config,
            schedule=schedule,
            labels=dataset.label_names,
            codec=dataset.codec_name,
            extra=_text_encoder_info(dataset.caption_embeddings),
        ),
    )


def _text_encoder_info(captions: Captions | None) -> dict[str, object]:
    """Return what config.json keeps of the text encoder, for reading prompts later."""
    if captions is None:
        return {}
    encoder = {k: captions.card[k] for k in ("encoder", "encoder_hash", "tokenizer_hash", "dtype")}
    return {"text": {**encoder, "max_tokens": captions.max_tokens}}


def data_notes(info: ModelInfo, dataset: Dataset) -> list[str]:
    """Return what a user should know of the data: its report's notes, no label, too small."""
    notes, unlabelled = list(dataset.report.notes), dataset.count_unlabelled()
    if info.config.num_classes and unlabelled:
        missing = f"{unlabelled:,} of {len(dataset):,} images have no label"
        notes = [note for note in notes if not note.startswith(missing)]
        notes.append(f"{missing} and train the null label")
    return [*notes, *filter(None, [dataset.describe_enlarged()])]


def describe_data(recipe: Recipe, dataset: Dataset) -> str:
    """Return one line about the recipe's data: how many images, which classes, which space."""
    source, names = recipe.data.source, dataset.label_names or ()
    shown = f"{', '.join(names[:3])}{' ...' if names[3:] else ''}"
    classes = f"{len(names):,} classes ({shown})" if names else "no labels"
    encoded = isinstance(dataset, EncodedDataset)
    kind = "images" if encoded or dataset.codec_name == "pixels" else "latents"
    line = f"{source} holds {len(dataset):,} {kind}, {classes}"
    if not encoded:
        return line
    return (
        f"{line}; {recipe.preset} needs latents. {dataset.codec_name} encodes the images at every "
        "read (data.codec names another autoencoder). To encode them once: "
        f"mezzotint prepare {source} FOLDER --size PIXELS --codec {dataset.codec_name}"
    )
