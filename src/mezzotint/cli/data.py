"""Commands for data and the models it needs: prepare, download."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import NUMBER, Overrides, Seed, Side, Switch
from mezzotint.core.console import echo
from mezzotint.core.fields import Range


def prepare(
    source: Positional[Annotated[str, arg(metavar="SOURCE")]],
    out: Positional[Annotated[str, arg(metavar="OUT")]],
    /,
    *,
    size: Annotated[int, NUMBER, Side],
    crop: Literal["adm", "plain"] = "adm",
    columns: Annotated[tuple[str, ...], arg(metavar="ROLE=NAME ...", help_behavior_hint="")] = (),
    form: Literal["raw", "webp-lossless", "jpeg-95"] = "raw",
    codec: str = "pixels",
    text: Annotated[str, arg(metavar="ENCODER", help_behavior_hint="")] = "",
    text_dtype: Literal["float16", "bfloat16"] = "float16",
    full_scale: Annotated[int | None, NUMBER, Range(1, 2**32, "the value of white")] = None,
    shards: Annotated[int | None, NUMBER, Range(1, 1_000_000)] = None,
    seed: Seed = 0,
) -> None:
    """Resize a dataset once, so that training reads it without decoding.

    With --codec, write latents of the images and of their mirror images instead. With --shards,
    write parquet files for a disk or object store that many machines read. Run the same command
    again to resume; torchrun splits the work of latents and shards over processes.

    Args:
        source: Folder of images (class subfolders or flat), zip, parquet or hub name.
        out: Folder to write; with --shards also an address: s3://bucket/folder, gs://, hf://, ...
        size: Height and width in pixels.
        crop: Centre crop after adm's resizing, as in the papers, or one plain antialiased resize.
        columns: Columns of a table, or of a file of labels and captions: image=NAME, label=NAME,
            caption=NAME; an empty name is none. Without it they are chosen by name and type.
        form: How images are stored. raw is read fastest; webp-lossless takes less than half the
            space; jpeg-95 takes a fifth and changes pixels, and is named where numbers are shown.
        codec: sd-vae-ft-ema, sd-vae-ft-mse, taesd, or a folder or hub name of a diffusers
            autoencoder.
        text: T5 encoder to embed the captions with; without it, training embeds them.
        text_dtype: Of the embedded captions, as the recipe's data.text_dtype.
        full_scale: White in grey images of more than 8 bits, e.g. 4095; by default the smallest
            usual one that holds a sample's largest value.
        shards: Number of shards (parquet files), each with images drawn from the whole source.
            Choose several for each process that trains, of 100 MB to 1 GB.
        seed: Of the draw, with --shards.
    """
    from mezzotint.core.object_store import is_address
    from mezzotint.data.audit import describe_audit
    from mezzotint.data.columns import parse_columns
    from mezzotint.data.prepare import prepare_captions, prepare_latents, prepare_source
    from mezzotint.data.prepare_shards import prepare_shards

    chosen = parse_columns(columns)
    if codec != "pixels" and form != "raw":
        raise ValueError(f"--form {form} stores images, --codec {codec} latents; give one")
    if shards is None and is_address(out):
        raise ValueError(
            f"{out} is an address; add --shards N to write shards there, or give a folder"
        )
    if shards is None and seed:
        raise ValueError(f"--seed {seed} draws images into shards; add --shards N, or leave it out")
    if shards is not None:
        words = prepare_shards(
            source, out, size, shards, seed=seed, form=form, codec_name=codec, encoder_name=text,
            text_dtype=text_dtype, crop=crop, columns=chosen, full_scale=full_scale,
        )  # fmt: skip
        echo(words)
        return
    if codec == "pixels":
        report = prepare_source(
            source, out, size=size, crop=crop, columns=chosen, full_scale=full_scale, form=form
        )
        echo(describe_audit(report))
    else:
        echo(
            prepare_latents(
                source, out, size, codec, crop=crop, columns=chosen, full_scale=full_scale
            )
        )
    if text:
        echo("\n".join(prepare_captions(out, text, dtype_name=text_dtype)))


def download(
    what: Positional[Annotated[str, arg(metavar="WHAT")]],
    overrides: Overrides = (),
    /,
    *,
    only_list: Annotated[Switch, arg(name="list")] = False,
) -> None:
    """Download what a recipe needs (autoencoder, text encoder), or CLIP, with sizes and hashes.

    Files go to $MEZZOTINT_CACHE, by default ~/.cache/mezzotint. Copy that folder to a machine
    without network access.

    Args:
        what: A preset, a recipe.yaml, or the name of an autoencoder, text encoder or CLIP model.
        overrides: Fields of the recipe, e.g. data.text_encoder=google-t5/t5-small.
        only_list: List the files; download nothing.
    """
    from mezzotint.tools.download import download_requirements, find_requirements

    echo(download_requirements(find_requirements(what, overrides), only_list))
