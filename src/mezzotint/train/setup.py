"""Build a training run, or restore it from its newest checkpoint."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones import (
    dummy_condition,
    get_backbone,
    native_size,
    needs_label,
    text_width,
)
from mezzotint.backbones.flops import count_macs
from mezzotint.config import Recipe
from mezzotint.core import rng
from mezzotint.core.distributed import World, all_ranks, on_rank0
from mezzotint.core.files import format_bytes
from mezzotint.core.machine import memory_bytes
from mezzotint.core.registry import Spec, build
from mezzotint.data.content import Content, read_content
from mezzotint.data.dataset import Dataset
from mezzotint.data.loader import check_batch, largest_share
from mezzotint.data.text_encoder import MAX_TOKENS, find_text_encoder
from mezzotint.models import ModelInfo, build_model, meta_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Model, Schedule
from mezzotint.process.objectives import Objective
from mezzotint.process.schedules import Table
from mezzotint.train import agreement, checkpoint, data_record, ema, log, parallel, sample_grid
from mezzotint.train.dataset import (
    check_encoded_ahead,
    data_notes,
    open_captions,
    open_recipe_dataset,
    resolve,
    resolve_order,
)
from mezzotint.train.draws import resolve_stream
from mezzotint.train.optim import make_optimisers
from mezzotint.train.precision import resolve_precision
from mezzotint.train.run_folder import check_same_recipe, write_recipe


@dataclass
class Run:
    """Everything that the training loop works on.

    recipe: resolved, see `train.dataset.resolve`.
    info: of the models that the run saves.
    model: as the step calls it, wrapped for the world.
    meta_model: the same network without storage; averages fill a copy of it.
    parts: parameters of the backbone by the name of their top-level module, for the log.
    check_folder: raises OSError where `folder` was moved or deleted since it was locked.
    logs: those open on this rank.
    data_event: record of a change of the data since the last start, if any.
    """

    recipe: Recipe
    folder: Path
    world: World
    dataset: Dataset
    info: ModelInfo
    model: Model
    meta_model: Model
    parts: dict[str, list[nn.Parameter]]
    objective: Objective
    schedule: Schedule
    state: checkpoint.TrainingState
    writer: checkpoint.CheckpointWriter
    check_folder: Callable[[], None] = lambda: None
    logs: Sequence[log.Log] = ()
    data_event: dict[str, Any] | None = None


@dataclass
class Start:
    """A run that has passed every check and is not yet written: the first fields of `Run`, and:

    newest: checkpoint to resume from, if any.
    damaged: a line for each damaged checkpoint.
    content: of the dataset. decision: about changes of the dataset since the last start.
    """

    recipe: Recipe
    dataset: Dataset
    info: ModelInfo
    model: Model
    meta_model: Model
    objective: Objective
    schedule: Schedule
    newest: Path | None
    damaged: list[str]
    content: Content
    decision: data_record.Decision


def check_start(
    recipe: Recipe,
    folder: Path,
    world: World,
    init_weights: Callable[[Model], None] | None = None,
    accept_changed_data: bool = False,
    lacking: list[str] | None = None,
) -> Start:
    """Open the data, build the network and check that all fits together; write nothing to `folder`.

    `setup` goes on from here, and `train --dry-run` ends here. All ranks call it together: what
    fails on one ends all. See `setup` for other arguments and errors.

    Args:
        lacking: of a dry run in one process: gets a line for the memory and for the text encoder
            that this machine lacks, in place of the errors. Without the memory the network is on
            the meta device, without the encoder the data have no captions.
    """

    def open_content() -> tuple[ModelInfo, Dataset, Content]:
        info = preset_info(recipe.preset, **recipe.model)
        check_batch(recipe.batch, world.size)
        parallel.check_sharding(recipe.engine, world.size, recipe.batch)
        _check_here(lambda: check_memory(recipe, meta_model(info), world), lacking)
        dataset = open_recipe_dataset(recipe, info, world)
        check_encoded_ahead(recipe, dataset, world.device)
        return info, dataset, read_content(dataset, captions=text_width(info.config) > 0)

    info, dataset, content = all_ranks(open_content, world)
    fits = not lacking
    agreement.check_same_content(content, recipe.data.source, world)
    num_classes = recipe.model.get("num_classes", 0 if text_width(info.config) else None)
    decision = on_rank0(
        lambda: data_record.decide(
            folder, content, recipe.data.source, num_classes, accept_changed_data
        ),
        world,
    )
    if dataset.label_names is not None:
        dataset.relabel(decision.classes)
    width = text_width(info.config)
    if lacking is None or _check_here(lambda: _check_text_encoder(recipe, width), lacking):
        dataset.caption_embeddings = open_captions(recipe, dataset, width, world)
    stream = on_rank0(lambda: resolve_stream(recipe, folder, world.device), world)
    precision = on_rank0(lambda: resolve_precision(recipe, folder, world.device), world)
    engine = dataclasses.replace(recipe.engine, precision=precision)
    recipe = dataclasses.replace(recipe, stream=stream, engine=engine)
    recipe = resolve_order(recipe, folder, dataset, world)
    resolved, info = all_ranks(lambda: resolve(recipe, info, dataset), world)
    on_rank0(lambda: check_same_recipe(folder, resolved), world)
    newest, damaged = checkpoint.find_resume_point(folder, world)
    model, on_meta, objective, schedule = all_ranks(
        lambda: _build_network(
            resolved, info, world, init_weights if newest is None else None, fits
        ),
        world,
    )
    return Start(
        recipe=resolved,
        dataset=dataset,
        info=info,
        model=model,
        meta_model=on_meta,
        objective=objective,
        schedule=schedule,
        newest=newest,
        damaged=damaged,
        content=content,
        decision=decision,
    )


def _check_here(check: Callable[[], None], lacking: list[str] | None) -> bool:
    """Return whether a check passes; its ValueError becomes a line of `lacking`, if given."""
    try:
        check()
    except ValueError as error:
        if lacking is None:
            raise
        lacking.append(str(error))
        return False
    return True


def _check_text_encoder(recipe: Recipe, width: int) -> None:
    """Raise ValueError for a text encoder that is not on this machine; download nothing."""
    name = recipe.data.text_encoder
    if width and name:
        try:
            find_text_encoder(name, fetch=False)
        except ValueError:
            raise ValueError(
                f"text encoder {name} is not on this machine; mezzotint download {name} fetches "
                "it, or data.text_encoder names its folder"
            ) from None


def _build_network(
    recipe: Recipe,
    info: ModelInfo,
    world: World,
    init_weights: Callable[[Model], None] | None,
    fits: bool,
) -> tuple[Model, Model, Objective, Schedule]:
    """Return the network and it on the meta device, objective and schedule of a resolved recipe.

    Args:
        fits: whether this machine holds the network; else both are on the meta device, and what
            needs weights is not checked.

    Errors: ValueError for what would fail hours into the run.
    """
    on_meta = meta_model(info)
    # The initial weights are the one thing drawn from torch's own generator here.
    torch.manual_seed(recipe.seed)
    model = build_model(info).to(world.device) if fits else on_meta
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, info.schedule)

    if fits:
        check_objective(recipe, model, objective, schedule)
    sample_grid.check_sample_grid(recipe.samples, on_meta)
    sample_grid.check_evaluation_sampler(recipe.evaluate, on_meta)
    for std in recipe.ema.power_stds:
        ema.power_gamma(std)

    if init_weights is not None and fits:
        init_weights(model)
    backbone = get_backbone(model)
    backbone.checkpointing = recipe.engine.checkpointing
    backbone.set_depthwise_kernel(recipe.engine.depthwise)
    make_optimisers(recipe.optim, backbone, fused=True)
    return model, on_meta, objective, schedule


def setup(
    recipe: Recipe,
    folder: Path,
    world: World,
    print_line: Callable[[str], None] = print,
    init_weights: Callable[[Model], None] | None = None,
    accept_changed_data: bool = False,
) -> Run:
    """Build a run in `folder`, or restore it from its newest intact checkpoint.

    Args:
        print_line: gets a line for each damaged checkpoint and for the one restored.
        init_weights: called on the network before its first step, e.g. to load weights to
            fine-tune; not on resume.
        accept_changed_data: go on with other data than the run began with, see
            `train.data_record.decide`.

    Errors: ValueError where recipe, data, network and folder do not fit together.
    """
    start = check_start(recipe, folder, world, init_weights, accept_changed_data)
    recipe, model = start.recipe, start.model
    # Averages, parts and optimisers come after wrapping: FSDP2 replaces parameters by shards.
    backbone = get_backbone(model)
    model.backbone = parallel.wrap(backbone, recipe.engine, recipe.engine.precision, world)
    parts, weights = parameters_by_module(backbone), ema.weights_of(backbone)
    averages = ["ema", *(f"power-{std:g}" for std in recipe.ema.power_stds)]
    state = checkpoint.TrainingState(
        backbone=backbone,
        optimisers=make_optimisers(recipe.optim, backbone, fused=True),
        averages={name: ema.copy_weights(weights) for name in averages},
        metrics_window=log.new_window(world.device, len(parts)),
    )

    for line in start.damaged:
        print_line(line)
    if start.newest is not None:
        checkpoint.restore_newest(state, folder, start.newest, world, print_line)
        print_line(f"resuming at {state.images:,} images")
    for line in data_notes(start.info, start.dataset):
        print_line(line)
    if recipe.batch % world.size:
        largest = largest_share(recipe.batch, world.size)
        print_line(
            f"batch {recipe.batch} on {world.size} ranks: {largest - 1} or {largest} images each, "
            f"and all wait for those with {largest}; a multiple of {world.size} keeps all busy"
        )
    # Last, so that a start that fails leaves the folder to the corrected command.
    on_rank0(lambda: write_recipe(folder, recipe), world)
    on_rank0(
        lambda: data_record.update_record(
            folder, start.content, start.decision, recipe.data.source, state.images
        ),
        world,
    )
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        dataset=start.dataset,
        info=start.info,
        model=model,
        meta_model=start.meta_model,
        parts=parts,
        objective=start.objective,
        schedule=start.schedule,
        state=state,
        writer=checkpoint.CheckpointWriter(world),
        data_event={
            "images": state.images,
            "event": "data changed",
            "changes": start.decision.change,
        }
        if start.decision.change
        else None,
    )


def check_memory(recipe: Recipe, on_meta: Model, world: World) -> None:
    """Raise ValueError for a network whose weights, gradients and averages no device here holds."""
    params = sum(p.numel() for p in on_meta.parameters())
    copies = 3 + len(recipe.ema.power_stds)
    # A sharded network has its weights whole only before it is wrapped.
    sharded = world.size > 1 and recipe.engine.strategy == "fsdp"
    needed = 4 * params * (1 if sharded else copies)
    available = memory_bytes(world.device)
    if needed > available:
        raise ValueError(
            f"model: {params:,} parameters need at least {format_bytes(needed)} for weights, "
            f"gradients and averages, and this device has {format_bytes(available)}; take a "
            f"smaller network, or see mezzotint plan {recipe.preset} --gpus N"
        )


@torch.no_grad()
def check_objective(recipe: Recipe, model: Model, objective: Objective, schedule: Schedule) -> None:
    """Compute the loss at a low, a middle and a high noise level, to fail before training starts.

    Errors: ValueError where the objective does not fit the network or the schedule, or the loss is
        not finite.
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
                f"objective {spec} is defined on the steps of DDPM's linear table, not on "
                f"{model.info.schedule}; set schedule.name=linear_ddpm with the same options, or "
                "objective.name=regression"
            )
    if recipe.time.loss_measure == "logsnr" and isinstance(schedule, Table):
        raise ValueError(
            f"time.loss_measure=logsnr is an integral over log-SNR, and {model.info.schedule} is a "
            "table of single levels; set time.loss_measure=u, or schedule.name=cosine"
        )
    if needs_label(config) and recipe.label_drop:
        raise ValueError(
            f"label_drop {recipe.label_drop}: this network has no null label; set label_drop=0"
        )
    u = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64, device=device)
    x, eps = (
        rng.normal(purpose, 0, [0, 1, 2], (config.channels, *native_size(config))).to(device)
        for purpose in ("sample", "noise")
    )
    logsnr = schedule(u)
    loss = objective(model, x.clamp(-1, 1), eps, logsnr.float(), dummy_condition(config, x))
    if recipe.time.loss_measure == "logsnr":
        loss = loss * (-schedules.slope(schedule, u) / 2).to(loss)
    if not torch.isfinite(loss).all():
        raise ValueError(
            f"objective {spec} with prediction {config.prediction} is {loss.tolist()} at "
            f"log-SNR {logsnr.tolist()} of schedule {model.info.schedule}; choose another "
            "objective, prediction or schedule"
        )


def parameters_by_module(backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters by top-level module, in the network's order."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.partition(".")[0], []).append(parameter)
    return parts


def count_training_flop(model: Model, objective: str) -> float:
    """Return the floating-point operations of one image's forward and backward pass.

    The target of objective `consistency` is one more forward pass.

    The backward pass counts as two forward passes, a multiply-accumulate as two operations;
    recomputation by checkpointing does not count.
    """
    passes = 3.0 + objectives.EXTRA_PASSES.get(objective, 0)
    tokens = MAX_TOKENS if text_width(model.info.config) else 0
    return passes * 2.0 * count_macs(get_backbone(model), tokens).computed


def averaged_model(run: Run) -> Model:
    """Return a model in eval mode that shares the averaged weights; all ranks call it together.

    Sharded weights are gathered.
    """
    state = {**dict(run.state.backbone.named_buffers()), **run.state.averages["ema"]}
    weights = {name: parallel.full_tensor(tensor) for name, tensor in state.items()}
    return fill_model(empty_model(run), weights)


def empty_model(run: Run) -> Model:
    """Return a model of the images seen by now, in eval mode and without weights."""
    model = copy.deepcopy(run.meta_model)
    model.info = dataclasses.replace(run.info, images=run.state.images)
    return model


def fill_model(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """Give a model these weights and buffers, not copied."""
    # Buffers that are not saved are not loaded either: they are constants of the config.
    model.backbone.load_state_dict(weights, assign=True, strict=False)
    return model
