"""Commands that make images and take models elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from mezzotint.cli.arguments import Count, File, Given, Switch, Text


def sample(
    model: Positional[Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]],
    /,
    *,
    out: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="")] = Path(
        "samples.png"
    ),
    num_images: Annotated[Count, arg(aliases=["-n"])] = 16,
    seed: Count = 0,
    label: Annotated[tuple[str, ...], arg(metavar="[A B ...]", help_behavior_hint="")] = (),
    label_order: Text = None,
    text: tyro.conf.UseAppendAction[
        Annotated[tuple[str, ...], arg(metavar="WORDS", help_behavior_hint="")]
    ] = (),
    prompts: File = None,
    encoder: Text = None,
    protocol: Text = None,
    sampler: Text = None,
    discretization: Text = None,
    steps: Given = None,
    guidance: Text = None,
    guide_model: Text = None,
    clip: Text = None,
    size: Text = None,
    dtype: Text = None,
    batch: Given = None,
    codec: Text = None,
    latents: Switch = False,
    overwrite: Switch = False,
    trajectory: Switch = False,
    interpolate: Given = None,
    image: File = None,
    image_logsnr: Annotated[float | None, arg(metavar="L", help_behavior_hint="")] = None,
    mask: File = None,
) -> None:
    """Sample images from a run, a model folder or a hub repository. The same command resumes; torchrun shares.

    Args:
        model: Run folder, model folder or hub name.
        out: FILE.png (one grid, the default), a folder of PNGs, .npz (ADM's), .tar.
        num_images: Number of images; 16 by default.
        seed: Number of the first image, 0 by default; each depends on its own alone.
        label: Class names or numbers to choose from; all by default.
        label_order: turn (default), random, or balanced: 50 in a row.
        text: What to show, for a model that reads text; --text may be repeated, they are taken in turn.
        prompts: A file of such, one a line.
        encoder: Folder of the text encoder, if it moved.
        protocol: simple-diffusion-512steps, diffit-256, diffit-512, dimr-256, adm, edm2.
        sampler: With options: ddim (default), ddim:eta=0.5, heun:s_churn=40.
        discretization: even, even_logsnr, karras:rho=5, respaced; by default the family's.
        steps: Of the grid; 50 by default.
        guidance: 1.5, or scale=0.4,convention=dimr; and low=-3,high=5 (log-SNR), power=4,
            channels=3.
        guide_model: A weaker model to guide away from (autoguidance).
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
    from mezzotint.sampling import protocols as words
    from mezzotint.sampling.conditioning import read_prompts
    from mezzotint.sampling.generate_images import generate_images, make_job

    given = {
        "sampler": None if sampler is None else words.parse_sampler(sampler),
        "discretization": discretization and words.parse_discretization(discretization),
        "steps": steps,
        "guidance": None if guidance is None else words.parse_guidance(guidance),
        "size": None if size is None else words.parse_size(size),
        "dtype": dtype,
        "batch": batch,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    if clip is not None:
        changes["clip"] = words.parse_clip(clip)
    job = make_job(
        model, changes, protocol=protocol, labels=label, label_order=label_order, guide_model=guide_model, codec=codec, latents=latents,
        prompts=(*text, *(read_prompts(prompts) if prompts else ())), encoder=encoder,
    )  # fmt: skip
    if (
        trajectory
        or interpolate is not None
        or image is not None
        or mask is not None
        or image_logsnr is not None
    ):
        from mezzotint.sampling.trajectory import look

        written = look(
            job, out, num_images, seed,
            film=trajectory, frames=interpolate, picture=image, logsnr=image_logsnr, mask=mask, overwrite=overwrite,
        )  # fmt: skip
    else:
        written = [generate_images(job, out, num_images, seed, overwrite)]
    print(f"{num_images} images, {job.network_calls} network calls each:", *written)


def serve(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    port: int | None = None,
    auth: str = "",
) -> None:
    """Open the studio, one page on 127.0.0.1: sample, watch runs, see what schedules and networks do, compare.

    Args:
        sources: Run folders, model folders or hub names.
        port: A free one from 7860 upwards by default.
        auth: user:password that visitors must give.
    """
    from mezzotint.web.app import serve as run

    run(sources, port, auth)


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

    from mezzotint.convert.official.load import convert as run

    pairs = [h.partition("=") for h in hint]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"hint {name!r} is not of the form name=value, e.g. heads=16")
    hints = {name: yaml.safe_load(value) for name, _, value in pairs}
    for line in run(source, out, to=to, check=check, family=family, hints=hints):
        print(line)


def export(
    model: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: Literal["diffusers", "torch", "onnx"],
    size: int | None = None,
) -> None:
    """Take a model elsewhere: a diffusers pipeline, or its denoiser (z, logsnr, label) -> (x, eps) as one file.

    Args:
        model: Run folder, model folder or hub name.
        out: Folder (diffusers), .pt2 file (torch) or .onnx file.
        to: Form; for torch and onnx the file is read back and its outputs compared.
        size: Height and width of z in torch's and onnx's; the network's own by default.
    """
    from mezzotint.convert.export import export as run

    for line in run(model, out, to, size):
        print(line)


def card(
    source: Positional[str],
    /,
    *,
    evaluation: tuple[Path, ...] = (),
    licence: str | None = None,
    fresh: bool = False,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write the card of a run's model (README.md with the hub's metadata, samples.png), and push the model if asked.

    Args:
        source: Run folder or model folder.
        evaluation: Files of `mezzotint evaluate`; those in the run folder are found without being named.
        licence: Of the weights, as the hub names it: apache-2.0, cc-by-4.0, other ...
        fresh: Sample the picture anew instead of taking the run's newest grid.
        push: Repository of the Hugging Face hub, owner/name, made if it is not there.
        private: Make that repository private.
    """
    from mezzotint.convert.model_card import push_to_hub, write_card

    folder = write_card(source, evaluation, licence, fresh)
    print(f"card: {folder / 'README.md'}")
    if push is not None:
        print(push_to_hub(folder, push, private))
