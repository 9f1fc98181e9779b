"""From a recipe and a folder to a run that can start: data, network, optimisers, the newest intact checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.data.images import Images, open_images
from mezzotint.models import Card, build_model, preset_card
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Model, Schedule
from mezzotint.ranks import World
from mezzotint.registry import build
from mezzotint.train import distributed, ema, log, state
from mezzotint.train.optim import make_optimisers
from mezzotint.train.step import Objective

# Fields that may differ when a run is continued: how long, how fast, how often; never what is learnt.
CHANGEABLE = ("images", "engine", "save", "grid", "log_every_images")


@dataclass
class Run:
    """A run that is set up: what `run` needs, and nothing it does."""

    recipe: Recipe
    folder: Path
    world: World
    images: Images
    card: Card
    model: Model  # as the step calls it, wrapped for the world
    objective: Objective
    schedule: Schedule
    state: state.State


def resolve(recipe: Recipe, images: Images) -> Recipe:
    """The recipe with everything that depended on the data or the machine written out.

    Errors: ValueError where data and network do not fit: labels, channels.
    """
    card = preset_card(recipe.preset, **recipe.model)
    model = dict(recipe.model)
    if images.num_classes and "num_classes" not in model:
        model["num_classes"] = images.num_classes
    card = preset_card(recipe.preset, **model)
    wanted = card.config.num_classes
    if wanted and not images.num_classes:
        raise ValueError(
            f"{recipe.preset} is conditioned on {wanted} classes but {recipe.data.source} has no labels; "
            "use class subfolders, or train it without: model.num_classes=0"
        )
    if wanted and images.num_classes > wanted:
        raise ValueError(
            f"{recipe.data.source} has {images.num_classes} classes, model.num_classes={wanted} is too few; "
            f"set model.num_classes={images.num_classes}"
        )
    precision = recipe.engine.precision
    if precision == "auto":
        precision = "bf16" if _bf16_is_fast() else "float32"
    return dataclasses.replace(
        recipe,
        model=model,
        schedule=recipe.schedule or card.schedule,
        engine=dataclasses.replace(recipe.engine, precision=precision),
    )


def _bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices faster than float32 ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Write recipe.yaml, or check that the one there is of the same run; ValueError lists the differences."""
    path = folder / "recipe.yaml"
    if path.exists():
        old, new = config.to_dict(config.from_yaml(path)), config.to_dict(recipe)
        differing = [
            f"  {k}: {old.get(k)} there, {new[k]} asked" for k in new if k not in CHANGEABLE and old.get(k) != new[k]
        ]
        if differing:
            listing = "\n".join(differing)
            raise ValueError(f"{folder} belongs to another recipe:\n{listing}\nUse another --out, or ask for the same.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "recipe.yaml.partial"
    temporary.write_text(config.to_yaml(recipe))
    temporary.replace(path)


def setup(
    recipe: Recipe,
    folder: Path,
    world: World,
    say: Callable[[str], None] = print,
    initialise: Callable[[Model], None] | None = None,
) -> Run:
    """Open the data, build and wrap the network, make the optimisers, and restore the newest intact checkpoint.

    initialise: called on the network before its first step (not on resume), e.g. to load weights to fine-tune.
    """
    first = preset_card(recipe.preset, **recipe.model).config
    images = open_images(recipe.data.source, size=first.size, channels=first.channels, crop=recipe.data.crop)
    recipe = resolve(recipe, images)
    if world.main:
        claim_folder(folder, recipe)
    card = preset_card(recipe.preset, **recipe.model)
    card = dataclasses.replace(card, schedule=recipe.schedule or card.schedule, labels=images.label_names)
    torch.manual_seed(recipe.seed)
    model = build_model(card).to(world.device)
    backbone = model.backbone
    checkpoint, passed = state.newest_intact(folder)
    if checkpoint is None and initialise is not None:
        initialise(model)
    setattr(backbone, "checkpointing", recipe.engine.checkpointing)  # noqa: B010
    model.backbone = distributed.wrap(backbone, recipe.engine, recipe.engine.precision, world)
    weights = ema.weights_of(backbone)
    names = ["ema", *(f"power-{std:g}" for std in recipe.ema.power_stds)]
    current = state.State(
        backbone=backbone,
        optimisers=make_optimisers(recipe.optim, backbone, fused=True),
        averages={name: ema.snapshot(weights) for name in names},
        window=log.new_window(world.device),
    )
    for sentence in passed:
        say(sentence)
    if checkpoint is not None:
        state.restore(current, checkpoint, world)
        say(f"resuming at {current.images:,} images")
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        images=images,
        card=card,
        model=model,
        objective=build(objectives.registry, recipe.objective),
        schedule=build(schedules.registry, card.schedule),
        state=current,
    )


def averaged_model(run: Run, name: str = "ema") -> Model:
    """A separate model in eval mode with an average's weights, gathered when sharded; all ranks call this together."""
    card = dataclasses.replace(run.card, images=run.state.images)
    with torch.device("meta"):
        model = build_model(card)
    weights = {k: distributed.whole(w) for k, w in run.state.averages[name].items()}
    # Buffers are constants of the config; they come from the trained module.
    buffers = {k: distributed.whole(b) for k, b in run.state.backbone.named_buffers()}
    model.backbone.load_state_dict({**buffers, **weights}, assign=True, strict=False)
    return model.eval().requires_grad_(False)
