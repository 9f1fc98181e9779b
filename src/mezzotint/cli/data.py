"""Commands of data and of what else a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import Switch


def prepare(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    size: int,
    crop: Literal["adm", "plain"] = "adm",
    codec: str = "pixels",
    text: str = "",
) -> None:
    """Resize a folder, zip or hub data set once into a memory-mapped set that training reads without decoding.

    With --codec, write latents of the pictures and of their mirror images instead. That resumes when the same command
    is given again, and torchrun shares it over processes.

    Args:
        source: Folder of images (class subfolders or flat), zip, parquet or hub name.
        out: Folder to write; appears only when complete.
        size: Height and width in pixels.
        crop: adm (halve with BOX, bicubic, centre; as the papers) or plain (one antialiased resize, centre).
        codec: sd-vae-ft-ema, sd-vae-ft-mse, taesd, or any autoencoder of diffusers by folder or hub name.
        text: T5 encoder that embeds the captions now rather than when training starts.
    """
    from mezzotint.data.audit import describe
    from mezzotint.data.prepare import prepare_captions, prepare_latents
    from mezzotint.data.prepare import prepare_source as run

    if codec == "pixels":
        print(describe(run(source, out, size=size, crop=crop)))
    else:
        print(prepare_latents(source, out, size, codec, crop=crop))
    if text:
        print("\n".join(prepare_captions(out, text)))


def prefetch(
    what: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    only_list: Annotated[Switch, arg(name="list")] = False,
) -> None:
    """List and fetch what a recipe needs from elsewhere (autoencoder, text encoder), with sizes and hashes.

    It lands in $MEZZOTINT_CACHE (or ~/.cache/mezzotint); copy that folder to a machine without network.

    Args:
        what: A preset, a recipe.yaml, or the name of an autoencoder or text encoder.
        overrides: Fields of the recipe, e.g. data.text_encoder=google-t5/t5-small.
        only_list: Fetch nothing.
    """
    from mezzotint import config, models
    from mezzotint.recipes import recipe_for
    from mezzotint.tools.download import download as run
    from mezzotint.tools.download import needs_for

    recipe = None
    if Path(what).suffix in (".yaml", ".yml") or what in models.presets():
        recipe = recipe_for(what) if what in models.presets() else config.from_yaml(what)
        recipe = config.override(recipe, overrides)
    print(run(needs_for(what, recipe), only_list))
