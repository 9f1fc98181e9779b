"""Commands for finished models: convert, export, card."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mezzotint.cli.arguments import Size
from mezzotint.cli.outputs import check_outside_run
from mezzotint.core.console import echo


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
    """Convert an official DiMR or DiffiT checkpoint to a model folder, or back, bit for bit.

    Args:
        source: Official .safetensors or .pth file, or a model folder for --to official.
        out: Model folder to write, or the official file.
        to: Direction.
        family: dimr or diffit; by default recognised by its keys.
        hint: What shapes do not say, e.g. heads=16 (docs/checkpoints.md lists them).
        check: Convert the result back and compare every tensor bit for bit.
    """
    from mezzotint.config import parse_yaml
    from mezzotint.convert.official.load import convert_checkpoint as run

    check_outside_run(out)
    pairs = [h.partition("=") for h in hint]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"hint {name!r} is not of the form name=value, e.g. heads=16")
    hints = {name: parse_yaml(value, f"--hint {name}={value}") for name, _, value in pairs}
    for line in run(source, out, to=to, check=check, family=family, hints=hints):
        echo(line)


def export(
    model: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: Literal["diffusers", "torch", "onnx"],
    size: Size = None,
) -> None:
    """Export a model as a diffusers pipeline, or its denoiser as a torch or ONNX file.

    The denoiser is (z, logsnr, label) -> (x, eps).

    Args:
        model: Run folder, model folder, eurosat-64 or hub name.
        out: Folder (diffusers), .pt2 file (torch) or .onnx file.
        to: Format; a torch or onnx file is read back and its outputs are compared.
        size: Height and width of z in a torch or onnx file; by default the network's own.
    """
    from mezzotint.convert.export import export_model as run

    check_outside_run(out)
    for line in run(model, out, to, size):
        echo(line)


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
    """Write a model card (README.md, samples.png), and push the model to the Hugging Face hub.

    Args:
        source: Run folder or model folder.
        evaluation: Files of `mezzotint evaluate`; those in the run folder are always found.
        licence: Of the weights, as the hub names it: apache-2.0, cc-by-4.0, other ...
        fresh: Sample new images instead of using the run's newest grid.
        push: Repository of the hub, owner/name; it is created if it does not exist.
        private: Create the repository as private.
    """
    from mezzotint.convert.model_card import push_to_hub, write_card

    folder = write_card(source, evaluation, licence, fresh)
    echo(f"card: {folder / 'README.md'}")
    if push is not None:
        echo(push_to_hub(folder, push, private))
