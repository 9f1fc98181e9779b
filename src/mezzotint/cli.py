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


# Without tyro's "{None}|STR" and "(default: None)", which would double the length of the help.
Word = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int, arg(metavar="N", help_behavior_hint="")]
Given = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Picture = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help_behavior_hint="")]]


def sample(
    model: Positional[Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]],
    /,
    *,
    out: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="")] = Path("samples.png"),
    n: Count = 16,
    seed: Count = 0,
    label: Annotated[tuple[str, ...], arg(metavar="[A B ...]", help_behavior_hint="")] = (),
    label_law: Word = None,
    protocol: Word = None,
    sampler: Word = None,
    grid: Word = None,
    steps: Given = None,
    guidance: Word = None,
    guide: Word = None,
    clip: Word = None,
    size: Word = None,
    dtype: Word = None,
    batch: Given = None,
    codec: Word = None,
    latents: Switch = False,
    overwrite: Switch = False,
    trajectory: Switch = False,
    interpolate: Given = None,
    image: Picture = None,
    image_logsnr: Annotated[float | None, arg(metavar="L", help_behavior_hint="")] = None,
    mask: Picture = None,
) -> None:
    """Sample images from a run, a model folder or a hub repository. The same command resumes; torchrun shares.

    Args:
        model: Run folder, model folder or hub name.
        out: FILE.png (one grid, the default), a folder of PNGs, .npz (ADM's), .tar.
        n: Number of images; 16 by default.
        seed: Number of the first image, 0 by default; each depends on its own alone.
        label: Class names or numbers to choose from; all by default.
        label_law: turn (default), random, or balanced: 50 in a row.
        protocol: simple-diffusion-512steps, diffit-256, diffit-512, dimr-256, adm, edm2.
        sampler: With options: ddim (default), ddim:eta=0.5, heun:s_churn=40.
        grid: even, even_logsnr, karras:rho=5, respaced; by default the family's.
        steps: Of the grid; 50 by default.
        guidance: dit_s=1.5 (or 1.5), simple_diffusion_w=0.1, dimr_s=0.4; and low=-3,high=5 (log-SNR), power=4,
            channels=3.
        guide: A weaker model to guide away from (autoguidance).
        clip: none (default), static, dynamic:quantile=0.995.
        size: Of the network's input: 64, or 48x64 (height first).
        dtype: float32 (default), bfloat16, float16.
        batch: Images per network call; 64 by default.
        codec: Autoencoder to decode with; by default the model's.
        latents: Write latents (.npz), not images.
        overwrite: Replace what exists or has other settings.
        trajectory: The way to each image: filmstrip and GIF.
        interpolate: So many frames from each seed to the next.
        image: Start from this picture noised to --image-logsnr.
        image_logsnr: Lower forgets more of it.
        mask: Paint only where this picture is white.
    """
    from mezzotint import protocols as words
    from mezzotint.produce import job_for, produce

    given = {
        "sampler": None if sampler is None else words.parse_sampler(sampler),
        "grid": None if grid is None else words.parse_grid(grid),
        "steps": steps,
        "guidance": None if guidance is None else words.parse_guidance(guidance),
        "size": None if size is None else words.parse_size(size),
        "dtype": dtype,
        "batch": batch,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    if clip is not None:
        changes["clip"] = words.parse_clip(clip)
    job = job_for(
        model, changes, protocol=protocol, labels=label, label_law=label_law, guide=guide, codec=codec, latents=latents
    )
    if trajectory or interpolate is not None or image is not None or mask is not None or image_logsnr is not None:
        from mezzotint.looking import look

        written = look(
            job, out, n, seed, film=trajectory, frames=interpolate, picture=image, logsnr=image_logsnr, mask=mask
        )
    else:
        written = [produce(job, out, n, seed, overwrite)]
    print(f"{n} images, {job.calls} network calls each:", *written)


def prepare(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    size: int,
    crop: Literal["adm", "plain"] = "adm",
    codec: str = "pixels",
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
    """
    from mezzotint.data.audit import describe
    from mezzotint.data.prepare import prepare as run
    from mezzotint.data.prepare import prepare_latents

    if codec == "pixels":
        print(describe(run(source, out, size=size, crop=crop)))
    else:
        print(prepare_latents(source, out, size, codec, crop=crop))


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
