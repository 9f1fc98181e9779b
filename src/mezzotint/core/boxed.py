"""The models in the box: trained models that ship inside the package, opened by name.

Each is a folder of `mezzotint/box/`, which `python -m mezzotint.convert.box` writes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mezzotint.core.fields import suggest
from mezzotint.core.files import read_json

BOX = Path(__file__).parents[1] / "box"


def boxed_models() -> list[str]:
    """Return the names of the models in the box."""
    return sorted(folder.parent.name for folder in BOX.glob("*/config.json"))


def boxed_folder(name: str | Path) -> Path | None:
    """Return the folder of a model in the box; None where it has none of that name.

    A path that exists is never taken for a name.
    """
    known = str(name) in boxed_models() and not os.path.lexists(name)
    return BOX / str(name) if known else None


def suggest_boxed(name: str | Path) -> str:
    """Return the end of an error about an unknown model: names in the box; empty for none."""
    names = boxed_models()
    return f"; {suggest(str(name), names)}".replace("known:", "in the box:") if names else ""


def refuse_boxed(name: str) -> None:
    """Raise ValueError for the name of a model in the box where a preset is needed."""
    if name in boxed_models():
        raise ValueError(
            f"{name} is a trained model, not a preset: mezzotint sample {name} samples it, and "
            f"mezzotint train PRESET --init-from {name} starts from it"
        )


def read_boxed(name: str) -> dict[str, Any]:
    """Return what `mezzotint info` says of a model in the box, JSON-ready; reads no weights.

    Returns:
        name, network (preset or backbone), input ("64x64x3"), data, licence, images (seen in
        training), distance (as measured, or "not evaluated"), megabytes, card (path).
    """
    folder = BOX / name
    info = read_json(folder / "config.json")
    config = info["config"]
    return {
        "name": name,
        "network": info["preset"] or info["backbone"],
        "input": f"{config['size']}x{config['size']}x{config['channels']}",
        **info["extra"]["box"],
        "licence": info["licence"],
        "images": info["images"],
        "megabytes": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
        "card": str(folder / "README.md"),
    }
