"""`mezzotint replay BUNDLE`: repeat a non-finite step and find the layer where it began."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint import config
from mezzotint.backbones import get_backbone
from mezzotint.config import Recipe
from mezzotint.core.distributed import World, default_device
from mezzotint.core.files import read_json
from mezzotint.core.json_values import check_fields, first_line
from mezzotint.core.registry import build
from mezzotint.core.tensor_files import open_safetensors
from mezzotint.data.loader import load_batches
from mezzotint.data.sharded_dataset import ShardedDataset
from mezzotint.models import build_model, meta_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.train import checkpoint, log, nonfinite
from mezzotint.train.dataset import open_data
from mezzotint.train.setup import Run, parameters_by_module
from mezzotint.train.step import gradient, make_batch


@dataclass(frozen=True)
class ReplayedStep:
    """A repeated step.

    fails: whether a loss or the gradient is not finite again.
    weights: names of parameters that were not finite before the step.
    forward: first module whose output is not finite.
    backward: first parameter whose gradient is not finite.
    image_numbers, loss, recorded: per image, its number in the run, its loss now and in the bundle.
    """

    fails: bool
    weights: list[str]
    forward: str | None
    backward: str | None
    image_numbers: list[int]
    loss: list[float]
    recorded: list[float]

    def __str__(self) -> str:
        differences = [abs(a - b) for a, b in zip(self.loss, self.recorded, strict=True)]
        difference = max(filter(math.isfinite, differences), default=0)
        losses = zip(self.image_numbers, self.loss, strict=True)
        bad = [n for n, v in losses if not math.isfinite(v)]
        lines = [
            f"fails again: {'yes' if self.fails else 'no'}",
            f"weights not finite: {', '.join(self.weights[:8]) or 'none'}",
            f"losses not finite: {len(bad)} of {len(self.loss)} {bad[:8] or ''}".rstrip(),
            f"other losses differ from the recorded ones by at most {difference:.3g}",
            f"first output not finite: {self.forward or 'none'}",
            f"first gradient not finite, from the loss backwards: {self.backward or 'none'}",
        ]
        return "\n".join(lines)


def replay(
    bundle: Path, source: str | None = None, device: torch.device | None = None
) -> ReplayedStep:
    """Repeat the step of a bundle in one process, rank after rank, at its precision, not compiled.

    Args:
        source: where the data is now, if it moved; it must be the same data.
        device: to compute on; the GPU by default, if there is one.

    Errors: ValueError for a damaged bundle or other data.
    """
    damage = checkpoint.find_damage(bundle)
    if damage is not None:
        raise ValueError(
            f"{bundle} is not an intact bundle: {damage}; a run writes them to RUN/bundles/IMAGES"
        )
    recipe = config.from_yaml(bundle / nonfinite.RECIPE)
    facts = read_json(bundle / nonfinite.FACTS)
    kinds = {"data": str, "ranks": int, "images": int}
    try:
        check_fields(facts, {**kinds, "image_numbers": list[int], "loss": list[float | str]})
    except ValueError as error:
        raise ValueError(f"{bundle / nonfinite.FACTS}: {error}") from None
    device = device or default_device()
    run = rebuild_run(recipe, bundle, source, facts["data"], device)
    if facts.get("classes"):
        run.dataset.relabel(tuple(facts["classes"]))
    parameters = run.state.backbone.named_parameters()
    weights = [name for name, p in parameters if not torch.isfinite(p).all()]
    loss: list[float] = []
    image_numbers: list[int] = []
    with find_nonfinite(run.state.backbone) as first:
        for rank in range(facts["ranks"]):
            loaded = load_batches(
                run.dataset,
                seed=recipe.seed,
                start_image=facts["images"],
                batch=recipe.batch,
                rank=rank,
                world=facts["ranks"],
            )
            num_classes = run.info.config.num_classes
            batch = make_batch(recipe, run.dataset, num_classes, next(loaded), device)
            loss += gradient(run, batch).loss.tolist()
            image_numbers += batch.image_numbers
    if image_numbers != facts["image_numbers"]:
        raise ValueError(
            f"{bundle}: the data order gives other images than recorded; was the bundle edited?"
        )
    finite = all(math.isfinite(v) for v in loss) and first["backward"] is None
    return ReplayedStep(
        fails=not finite,
        weights=weights,
        forward=first["forward"],
        backward=first["backward"],
        image_numbers=image_numbers,
        loss=loss,
        recorded=[float(v) for v in facts["loss"]],
    )


def rebuild_run(
    recipe: Recipe, bundle: Path, source: str | None, fingerprint: str, device: torch.device
) -> Run:
    """Return the run of a bundle with its weights, without optimisers and averages."""
    world = World(rank=0, size=1, device=device)
    info = preset_info(recipe.preset, **recipe.model)
    info = dataclasses.replace(info, schedule=recipe.schedule or info.schedule)
    dataset = open_data(recipe, info, world, source)
    if dataset.fingerprint != fingerprint:
        raise ValueError(f"{source or recipe.data.source} is not the data of {bundle}; give --data")
    if isinstance(dataset, ShardedDataset):
        shards = recipe.data.shards
        if shards.lanes is None:
            raise ValueError(f"{bundle} does not say how many lanes its shards were read in")
        dataset.set_order(shards.lanes, shards.shuffle_images)
    model = build_model(info).to(device).train()
    weights = open_safetensors(bundle / nonfinite.WEIGHTS)
    state = {name: weights.read(name) for name in weights.claims}
    try:
        model.backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{weights.what} does not fit the recipe: {first_line(error)}") from None
    backbone = get_backbone(model)
    backbone.checkpointing = recipe.engine.checkpointing
    if device.type == "cuda":
        backbone.set_depthwise_kernel(recipe.engine.depthwise)
    parts = parameters_by_module(model.backbone)
    window = log.new_window(device, len(parts))
    return Run(
        recipe=recipe,
        folder=bundle,
        world=world,
        dataset=dataset,
        info=info,
        model=model,
        meta_model=meta_model(info),
        parts=parts,
        objective=build(objectives.registry, recipe.objective),
        schedule=build(schedules.registry, info.schedule),
        state=checkpoint.TrainingState(model.backbone, [], {}, window),
        writer=checkpoint.CheckpointWriter(world),
    )


@contextmanager
def find_nonfinite(backbone: nn.Module) -> Iterator[dict[str, str | None]]:
    """Within the block, find the first module whose output, and the first parameter whose gradient,
    is not finite.

    Yields: their names as "forward" and "backward", None as long as all is finite.
    """
    first: dict[str, str | None] = {"forward": None, "backward": None}

    def check_output(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if first["forward"] is None and not is_finite(output):
            cause = "" if is_finite(inputs) else ", whose input was not finite either"
            first["forward"] = f"{name or '(itself)'} ({type(module).__name__}){cause}"

    def check_gradient(name: str, parameter: Tensor) -> None:
        finite = parameter.grad is None or is_finite(parameter.grad)
        if first["backward"] is None and not finite:
            first["backward"] = name

    hooks = [
        module.register_forward_hook(partial(check_output, name))
        for name, module in backbone.named_modules()
    ]
    hooks += [
        p.register_post_accumulate_grad_hook(partial(check_gradient, name))
        for name, p in backbone.named_parameters()
        if p.requires_grad
    ]
    try:
        yield first
    finally:
        for hook in hooks:
            hook.remove()


def is_finite(value: Any) -> bool:
    """Return whether all numbers in a tensor, or a list, tuple or dict of tensors, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(is_finite(v) for v in value.values())
    return all(is_finite(v) for v in value) if isinstance(value, (list, tuple)) else True
