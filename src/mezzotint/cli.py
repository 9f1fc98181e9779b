"""The command line. Every command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg


def demo(out: Path = Path("runs/demo"), images: int = 0, seed: int = 0) -> None:
    """Train a tiny class-conditional network on real handwritten digits (about 3 minutes on 2 CPU cores), then count
    how many of 500 samples a small classifier reads as the digit that was asked for.

    Args:
        out: Run folder; it is started anew each time.
        images: Training length in images; 0 for the demo's own.
        seed: Of every random draw.
    """
    from mezzotint.recipes.demo import run_demo

    run_demo(out, images or None, seed)


def train(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    data: Annotated[str, arg(aliases=["-d"])] = "",
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    recipe: Path | None = None,
    init_from: str | None = None,
    dry_run: bool = False,
) -> None:
    """Train a preset on your images. The same command again resumes. Progress counts images seen.

    Args:
        preset: Network and recipe, e.g. unet-tiny or uvit-256 (`mezzotint info` lists them).
        overrides: Fields of the recipe, e.g. images=2e6 batch=64 optim.lr=3e-4 model.size=64.
        data: Folder, zip, prepared set, parquet, hub name, or the built-in "digits" or "shapes:64".
        out: Run folder; runs/PRESET by default.
        recipe: Start from this recipe.yaml instead of the preset's own recipe.
        init_from: Start from the weights of this model folder, other sizes or classes allowed.
        dry_run: Print the resolved recipe and its differences from the paper; train nothing.
    """
    from mezzotint import config
    from mezzotint.recipes import difference, recipe_for
    from mezzotint.train.loop import train as run

    chosen = config.from_yaml(recipe) if recipe else recipe_for(preset)
    if chosen.preset != preset:
        raise ValueError(f"{recipe} is a recipe for {chosen.preset}, not {preset}; name that preset")
    if data:
        chosen = config.override(chosen, [f"data.source={data!r}"])
    chosen = config.override(chosen, overrides)
    if dry_run:
        print(config.to_yaml(chosen))
        print(difference(chosen))
        return
    if not chosen.data.source:
        raise ValueError("no data given; add --data FOLDER, a zip, a hub name, or the built-in --data digits")
    initialise = None
    if init_from is not None:
        from mezzotint.convert.surgery import start_from

        initialise = start_from(init_from)
    folder = run(chosen, out or Path("runs") / preset, initialise=initialise)
    print(f"done: {folder}/model holds the averaged weights, {folder}/samples the grids")
    print(f"next: mezzotint sample {folder} --n 16 --out samples.png")


def sample(
    model: Positional[str],
    /,
    *,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples.png"),
    n: int = 16,
    seed: int = 0,
    label: tuple[str, ...] = (),
    sampler: str = "ddim",
    steps: int = 50,
    guidance: float | None = None,
    size: int | None = None,
    batch: int = 64,
) -> None:
    """Sample images from a run, a model folder or a hub repository into a PNG grid or a folder of PNGs.

    Args:
        model: Run folder, model folder or hub name.
        out: A .png for one grid, or a folder for one PNG per image.
        n: Number of images; image i has seed `seed` + i.
        seed: Seed of the first image.
        label: Class names or numbers, repeated in turn; all classes in turn by default.
        sampler: Name of a sampler, e.g. ddim, heun, dpmpp_2m, ancestral.
        steps: Steps of the sampler's grid.
        guidance: Classifier-free guidance scale as DiT counts it; 1 or nothing is none.
        size: Height and width in pixels; the network's own by default.
        batch: Images per network call; changes speed and memory, not the images.
    """
    from mezzotint.generate import Settings, sample_to
    from mezzotint.registry import Spec

    settings = Settings(
        sampler=Spec(sampler), steps=steps, guidance=guidance, size=None if size is None else (size, size), batch=batch
    )
    print(sample_to(model, out, settings, n, seed, label))


def prepare(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    size: int,
    crop: Literal["adm", "plain"] = "adm",
) -> None:
    """Resize a folder, zip or hub data set once into a memory-mapped set that training reads without decoding.

    Args:
        source: Folder of images (class subfolders or flat), zip, parquet or hub name.
        out: Folder to write; appears only when complete.
        size: Height and width in pixels.
        crop: adm (halve with BOX, bicubic, centre; as the papers) or plain (one antialiased resize, centre).
    """
    from mezzotint.data.prepare import prepare as run

    run(source, out, size=size, crop=crop)


def info(preset: Positional[str] = "", /, *, json: bool = False) -> None:
    """List every published size with parameters and multiply-accumulates, counted and claimed.

    Args:
        preset: Show this one's layers by resolution instead of the table.
        json: One JSON object per preset, for programs.
    """
    from json import dumps

    from rich.console import Console

    from mezzotint import info as counts

    if json:
        for row in [counts.describe(preset)] if preset else counts.table():
            print(dumps(row))
    elif preset:
        Console().print(counts.render_layers(preset, counts.layers(preset)))
    else:
        Console().print(counts.render_table(counts.table()))


def convert(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: Literal["mezzotint", "official"] = "mezzotint",
    family: str | None = None,
    hint: tuple[str, ...] = (),
    check: bool = False,
) -> None:
    """Convert an official checkpoint of DiMR or DiffiT to a model folder, or a model folder back, bitwise.

    Args:
        source: Official .safetensors or .pth file, or a model folder for --to official.
        out: Model folder to write, or the official file.
        to: Direction.
        family: dimr or diffit; recognised by its keys by default.
        hint: What shapes cannot tell, e.g. heads=16 (docs/checkpoints.md lists them).
        check: Read the result back, convert it back and compare every tensor bit for bit.
    """
    import yaml

    from mezzotint.convert import convert as run

    pairs = [h.partition("=") for h in hint]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"hint {name!r} is not of the form name=value, e.g. heads=16")
    hints = {name: yaml.safe_load(value) for name, _, value in pairs}
    for line in run(source, out, to=to, check=check, family=family, hints=hints):
        print(line)


COMMANDS = {"demo": demo, "train": train, "sample": sample, "prepare": prepare, "info": info, "convert": convert}


def main() -> None:
    """Entry point: a user's error is one sentence on stderr and exit code 1 (2 for a wrong command line)."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="mezzotint",
            description="High-resolution image diffusion backbones: train, sample, evaluate.",
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"mezzotint: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mezzotint: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
