"""From a recipe and a folder to a run that can start: data, network, optimisers, the newest intact checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mezzotint import config
from mezzotint.backbones import dummy_condition, needs_label, text_width
from mezzotint.config import Recipe
from mezzotint.core import rng
from mezzotint.core.distributed import World, raise_on_all_ranks
from mezzotint.core.files import atomic_replace
from mezzotint.core.registry import Spec, build
from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.image_dataset import open_images, open_source, split_suffix
from mezzotint.data.latent_dataset import LATENTS, Dataset, codec_of, open_dataset
from mezzotint.models import ModelInfo, build_model, meta_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Model, Schedule
from mezzotint.process.objectives import Objective
from mezzotint.process.schedules import Table
from mezzotint.train import checkpoint, distributed, ema, log, sample_grid
from mezzotint.train.dataset import open_data, text_encoder_info
from mezzotint.train.optim import make_optimisers

# Fields that may differ when a run is continued: how long, how fast, how often; what is done about a failure.
CHANGEABLE = (
    "images", "engine", "save", "samples", "evaluate", "log_every_images", "nonfinite", "trackers", "data.workers",
    "ema.snapshot_every_images",
)  # fmt: skip


@dataclass
class Run:
    """A run that is set up: what `run` needs, and nothing it does."""

    recipe: Recipe
    folder: Path
    world: World
    images: Dataset
    info: ModelInfo
    model: Model  # as the step calls it, wrapped for the world
    shell: Model  # the same network on the meta device: averages fill a copy of it
    parts: dict[str, list[nn.Parameter]]  # of the backbone, by the name of its top-level module
    objective: Objective
    schedule: Schedule
    state: checkpoint.TrainingState
    writer: checkpoint.CheckpointWriter


def resolve(recipe: Recipe, images: Dataset) -> Recipe:
    """The recipe with everything that depended on the data or the machine written out.

    Errors: ValueError where data and network do not fit: labels, channels.
    """
    card = preset_info(recipe.preset, **recipe.model)
    model = dict(recipe.model)
    if images.num_classes and "num_classes" not in model and not text_width(card.config):
        model["num_classes"] = images.num_classes
    card = preset_info(recipe.preset, **model)
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


def describe_data(recipe: Recipe) -> str:
    """What the recipe's data is, in a line, or why it cannot be trained on; fetches nothing and loads no encoder."""
    source, card = recipe.data.source, preset_info(recipe.preset, **recipe.model)
    base = source if os.path.isdir(source) else split_suffix(source)[0]
    folder, config, space = Path(base).expanduser(), card.config, recipe.data.codec or card.codec
    if not source:
        return "none given; add --data FOLDER, a zip, a hub name, or the built-in --data digits"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not folder.exists():
        return f"nothing lies at {base}; training would look for a data set of that name on the hub"
    pictures = (
        space != "pixels" and not (folder / LATENTS).is_file()
    )  # of which latents are to be made
    try:
        if recipe.data.buckets:
            opened, _ = open_source(source, config.size)
            images: Dataset = BucketedDataset(
                opened, recipe.data.buckets, channels=config.channels, portrait=recipe.data.portrait
            )
        elif pictures:
            images = open_images(source, size=config.size, crop=recipe.data.crop)
        else:
            images = open_dataset(
                source,
                size=config.size,
                channels=config.channels,
                crop=recipe.data.crop,
                space=space,
            )
        resolve(recipe, images)
    except (ValueError, OSError) as error:
        return f"cannot be trained on: {error}"
    names = images.label_names or ()
    classes = (
        f"{len(names):,} classes ({', '.join(names[:3])}{' ...' if names[3:] else ''})"
        if names
        else "no labels"
    )
    line = f"{source} holds {len(images):,} {'pictures' if codec_of(images) == 'pixels' else 'latents'}, {classes}"
    if not pictures:
        return line
    return (
        f"{line}; {recipe.preset} needs latents: {space} makes them at every read (data.codec names another), or once "
        f"and for all: mezzotint prepare {source} FOLDER --size PIXELS --codec {space}"
    )


def _bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices faster than float32 ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fixed_fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may differ when a run is continued."""
    values = config.to_dict(recipe)
    for path in CHANGEABLE:
        *outer, key = path.split(".")
        del (values[outer[0]] if outer else values)[key]
    return values


def check_run_folder(folder: Path, source: str) -> None:
    """ValueError for a folder that cannot become a run's: it lies in the data's, or holds what is not a run's."""
    base = source if os.path.isdir(source) else split_suffix(source)[0]
    data = Path(base).expanduser()
    if base and data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"{folder} lies in the data folder {base}, whose pictures the run's grids would join; "
            "use an --out elsewhere, e.g. --out runs/NAME"
        )
    if folder.is_dir() and not (folder / "recipe.yaml").exists():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise ValueError(
                f"{folder} is no run's folder and holds {', '.join(others[:3])}{' ...' if others[3:] else ''}; "
                "use an --out that is new or empty"
            )


def has_started(folder: Path) -> bool:
    """Whether a run's training left anything in its folder, beyond the recipe of a start that failed."""
    lines = folder / "log.jsonl"
    places = ("checkpoints", "model", "samples", "ema", "evaluations", "bundles")
    return (lines.exists() and lines.stat().st_size > 0) or any(
        any((folder / p).glob("[!.]*")) for p in places
    )


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """ValueError where training was begun in the folder with another recipe; it lists the differences."""
    path = folder / "recipe.yaml"
    if path.exists() and has_started(folder):
        old, new = fixed_fields(config.from_yaml(path)), fixed_fields(recipe)
        differing = [
            f"  {k}: {old.get(k)} there, {new[k]} asked" for k in new if old.get(k) != new[k]
        ]
        if differing:
            listing = "\n".join(differing)
            raise ValueError(
                f"{folder} belongs to another recipe:\n{listing}\nUse another --out, or ask for the same."
            )


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write recipe.yaml, and clear away what a killed process left half-written; OSError where that cannot be."""
    path = folder / "recipe.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_partial(folder)
        atomic_replace(path, lambda beside: beside.write_text(config.to_yaml(recipe)))
    except OSError as error:
        raise OSError(
            f"the run's folder {folder} cannot be written: {error}; mend it or use another --out"
        ) from error


def setup(
    recipe: Recipe,
    folder: Path,
    world: World,
    say: Callable[[str], None] = print,
    initialise: Callable[[Model], None] | None = None,
) -> Run:
    """Open the data, build and wrap the network, make the optimisers, and restore the newest intact checkpoint.

    initialise: called on the network before its first step (not on resume), e.g. to load weights to fine-tune.

    The folder is claimed last, so that a start that fails leaves it to the corrected command.
    """
    images = open_data(recipe, world)
    recipe = resolve(recipe, images)
    _on_main(lambda: check_same_recipe(folder, recipe), world)
    card = run_info(recipe, images)
    torch.manual_seed(recipe.seed)
    model = build_model(card).to(world.device)
    shell = meta_model(card)
    schedule, objective = (
        build(schedules.registry, card.schedule),
        build(objectives.registry, recipe.objective),
    )
    check_objective(recipe, model, objective, schedule)
    sample_grid.check_sample_grid(recipe.samples, shell)
    for std in recipe.ema.power_stds:
        ema.power_gamma(std)  # refuses a width that no average has
    backbone = model.backbone
    newest, passed = checkpoint.find_newest_intact(folder)
    if newest is None and initialise is not None:
        initialise(model)
    setattr(backbone, "checkpointing", recipe.engine.checkpointing)  # noqa: B010
    model.backbone = distributed.wrap(backbone, recipe.engine, recipe.engine.precision, world)
    weights = ema.weights_of(backbone)
    parts = parameters_by_module(backbone)
    names = ["ema", *(f"power-{std:g}" for std in recipe.ema.power_stds)]
    current = checkpoint.TrainingState(
        backbone=backbone,
        optimisers=make_optimisers(recipe.optim, backbone, fused=True),
        averages={name: ema.snapshot(weights) for name in names},
        window=log.new_window(world.device, len(parts)),
    )
    _on_main(lambda: write_recipe(folder, recipe), world)
    for sentence in passed:
        say(sentence)
    if newest is not None:
        checkpoint.restore_checkpoint(current, newest, world)
        say(f"resuming at {current.images:,} images")
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        images=images,
        info=card,
        model=model,
        shell=shell,
        parts=parts,
        objective=objective,
        schedule=schedule,
        state=current,
        writer=checkpoint.CheckpointWriter(world),
    )


def run_info(recipe: Recipe, images: Dataset) -> ModelInfo:
    """What the run's models say of themselves."""
    card = preset_info(recipe.preset, **recipe.model)
    return dataclasses.replace(
        card,
        schedule=recipe.schedule or card.schedule,
        labels=images.label_names,
        codec=codec_of(images),
        extra=text_encoder_info(images.words),
    )


def _on_main(task: Callable[[], object], world: World) -> None:
    """Do something on the first rank; where it fails there, all ranks fail."""
    error = None
    if world.is_rank0:
        try:
            task()
        except (ValueError, OSError) as reason:
            error = reason
    raise_on_all_ranks(error, world)


@torch.no_grad()
def check_objective(recipe: Recipe, model: Model, objective: Objective, schedule: Schedule) -> None:
    """The loss at a low, a middle and a high noise level, so that what does not fit together fails before training.

    Errors: ValueError where the objective refuses the network or the schedule, or the loss is not finite.
    """
    config, device = model.info.config, next(model.parameters()).device
    spec = recipe.objective
    if spec.name == "hybrid":
        table = build(schedules.registry, Spec("linear_ddpm", spec.options))
        if not (
            isinstance(schedule, Table)
            and isinstance(table, Table)
            and torch.equal(schedule.logsnr, table.logsnr)
        ):
            raise ValueError(
                f"objective {spec} is defined on the steps of DDPM's linear table, not on {model.info.schedule}; "
                "set schedule.name=linear_ddpm with the same options, or objective.name=regression"
            )
    u = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64, device=device)
    x, eps = (
        rng.normal(purpose, 0, [0, 1, 2], (config.channels, config.size, config.size)).to(device)
        for purpose in ("sample", "noise")
    )
    if needs_label(config) and recipe.label_drop:
        raise ValueError(
            f"label_drop {recipe.label_drop}: this network has no null label to drop to; set label_drop=0"
        )
    logsnr = schedule(u)
    loss = objective(model, x.clamp(-1, 1), eps, logsnr.float(), dummy_condition(config, x))
    if recipe.time.loss_measure == "logsnr":
        loss = loss * (-schedules.slope(schedule, u) / 2).to(loss)
    if not torch.isfinite(loss).all():
        raise ValueError(
            f"objective {spec} of a network that predicts {config.prediction} is {loss.tolist()} at log-SNR "
            f"{logsnr.tolist()} of schedule {model.info.schedule}; choose another objective, prediction or schedule"
        )


def parameters_by_module(backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by the first word of their names, in the network's order."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.partition(".")[0], []).append(parameter)
    return parts


def flop_per_image(shell: Model) -> float:
    """Floating-point operations of one image's forward and backward pass: three forward passes of 2 per MAC."""
    config = shell.info.config
    z = torch.empty(1, config.channels, config.size, config.size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shell.backbone(z, torch.empty(1, device="meta"), dummy_condition(config, z))
    return 3.0 * counter.get_total_flops()


def averaged_model(run: Run, name: str | None = "ema") -> Model:
    """A model in eval mode that shares an average's weights (None: those trained), gathered when sharded; all ranks
    call this together.
    """
    model = copy.deepcopy(run.shell)
    model.info = dataclasses.replace(run.info, images=run.state.images)
    chosen = ema.weights_of(run.state.backbone) if name is None else run.state.averages[name]
    weights = {k: distributed.full_tensor(w) for k, w in chosen.items()}
    # Buffers are constants of the config; they come from the trained module.
    buffers = {k: distributed.full_tensor(b) for k, b in run.state.backbone.named_buffers()}
    model.backbone.load_state_dict({**buffers, **weights}, assign=True, strict=False)
    return model


def copy_to_cpu(model: Model) -> Model:
    """The model with weights of its own on the CPU, which later steps do not change."""
    model.backbone.load_state_dict(
        {k: t.to("cpu", copy=True) for k, t in model.backbone.state_dict().items()}, assign=True
    )
    return model
