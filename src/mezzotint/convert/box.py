"""Put a trained model into the box: `python -m mezzotint.convert.box RUN NAME --data ...`.

The box is a folder of the package, `mezzotint/box/NAME`. It holds the weights in bfloat16,
config.json, and a card with a grid of samples. See `core.boxed` for how it is opened.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

from mezzotint import config
from mezzotint.convert.model_card import GRID, card_text, save_sample_grid
from mezzotint.core.boxed import BOX
from mezzotint.core.console import echo
from mezzotint.core.files import atomic_write, format_bytes, partial_folder
from mezzotint.evaluate.results import Evaluation, load_evaluation
from mezzotint.models import README, load_model, open_model, save_model
from mezzotint.process.denoiser import Model
from mezzotint.train import log

MOST_BYTES = 8_000_000  # of a model's folder: every installation downloads it


def box_model(
    run: Positional[Path],
    name: Positional[str],
    /,
    *,
    data: str,
    licence: str,
    evaluation: tuple[Path, ...] = (),
    box: Path = BOX,
) -> Path:
    """Write a run's averaged model to the box in bfloat16, with its card; return its folder.

    A model of that name is replaced.

    Args:
        run: Run folder, with its recipe and log.
        name: By which users load it.
        data: Name, authors, year and licence of the training images.
        licence: Of the weights, as the hub names it, e.g. mit.
        evaluation: Files of `mezzotint evaluate`; the first number of the first is the distance.
        box: Folder to write to.

    Errors: ValueError for a run without a recipe or model, and for more than 8 MB.
    """
    recipe = config.from_yaml(run / "recipe.yaml")
    evaluations = [load_evaluation(path) for path in evaluation]
    trained = open_model(run).cpu()
    facts = {"data": data, "distance": _describe_distance(evaluations)}
    info = dataclasses.replace(
        trained.info, licence=licence, extra={**trained.info.extra, "box": facts}
    )
    backbone = trained.backbone.to(torch.bfloat16)
    folder = box / name
    with partial_folder(folder) as partial:
        new = partial / name
        save_model(Model(backbone, trained.parameterisation, info), new)
        model = load_model(new).eval()
        grid = save_sample_grid(model, new / GRID)
        caption = f"{grid} Trained on {data}. It comes with mezzotint; the weights are bfloat16."
        records = log.read(run / "log.jsonl")
        card = card_text(model, name, caption, recipe, records, evaluations, source=name)
        atomic_write(new / README, card)
        size = sum(file.stat().st_size for file in new.iterdir())
        if size > MOST_BYTES:
            raise ValueError(
                f"{run} is {format_bytes(size)} in bfloat16 with its card, and a model in the box "
                f"may have {format_bytes(MOST_BYTES)}; take a smaller network"
            )
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def _describe_distance(evaluations: list[Evaluation]) -> str:
    """Return the first number and the count of samples."""
    if not evaluations:
        return "not evaluated"
    number, protocol = evaluations[0].numbers[0], evaluations[0].protocol
    return f"{number.metric} {number.value:.4g} of {protocol.num_images:,} samples"


if __name__ == "__main__":
    echo(f"in the box: {tyro.cli(box_model)}")
