"""`mezzotint replay BUNDLE`: repeat a step that was not finite and find the layer where it began."""

from __future__ import annotations

import dataclasses
import json
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
from mezzotint.config import Recipe
from mezzotint.core.distributed import World
from mezzotint.core.registry import build
from mezzotint.data.loader import load_batches
from mezzotint.models import build_model, meta_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.train import checkpoint, log, nonfinite
from mezzotint.train.dataset import open_data
from mezzotint.train.setup import Run, parameters_by_module
from mezzotint.train.step import gradient, make_batch


@dataclass(frozen=True)
class Replayed:
    """A step repeated.

    fails: whether a loss or gradient was not finite again.
    weights: parameters that were not finite to begin with.
    forward: the module whose output was the first not to be finite; backward: the parameter whose gradient was.
    numbers, loss, recorded: per image, its number in the run, and its loss now and then.
    """

    fails: bool
    weights: list[str]
    forward: str | None
    backward: str | None
    numbers: list[int]
    loss: list[float]
    recorded: list[float]

    def __str__(self) -> str:
        apart = max(
            (
                abs(a - b)
                for a, b in zip(self.loss, self.recorded, strict=True)
                if math.isfinite(a - b)
            ),
            default=0,
        )
        bad = [n for n, v in zip(self.numbers, self.loss, strict=True) if not math.isfinite(v)]
        lines = [
            f"fails again: {'yes' if self.fails else 'no'}",
            f"weights not finite: {', '.join(self.weights[:8]) or 'none'}",
            f"losses not finite: {len(bad)} of {len(self.loss)} {bad[:8] or ''}".rstrip(),
            f"other losses differ from the recorded ones by at most {apart:.3g}",
            f"first output not finite: {self.forward or 'none'}",
            f"first gradient not finite, from the loss backwards: {self.backward or 'none'}",
        ]
        return "\n".join(lines)


def replay(bundle: Path, source: str | None = None, device: torch.device | None = None) -> Replayed:
    """Repeat the step of a bundle in one process, rank after rank, at the recipe's precision, without compiling.

    Args:
        source: where the data is now, if it moved; it must be the same data.
        device: where to compute; a GPU where there is one.

    Errors: ValueError for a damaged bundle or other data.
    """
    wrong = checkpoint.find_damage(bundle)
    if wrong is not None:
        raise ValueError(
            f"{bundle} is no intact bundle: {wrong}; runs write theirs to RUN/bundles/IMAGES"
        )
    recipe = config.from_yaml(bundle / nonfinite.RECIPE)
    facts = json.loads((bundle / nonfinite.FACTS).read_text())
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = rebuild_run(recipe, bundle, source, facts["data"], device)
    weights = [
        name for name, p in run.state.backbone.named_parameters() if not torch.isfinite(p).all()
    ]
    loss: list[float] = []
    numbers: list[int] = []
    with find_nonfinite(run.state.backbone) as found:
        for rank in range(facts["ranks"]):
            feed = load_batches(
                run.images, seed=recipe.seed, start_image=facts["images"], batch=recipe.batch, rank=rank,
                world=facts["ranks"],
            )  # fmt: skip
            batch = make_batch(recipe, run.images, run.info.config.num_classes, next(feed), device)
            loss += gradient(run, batch).loss.tolist()
            numbers += batch.numbers
    if numbers != facts["numbers"]:
        raise ValueError(
            f"{bundle}: the data order gives other images than recorded; was the bundle edited?"
        )
    finite = all(math.isfinite(v) for v in loss) and found["backward"] is None
    return Replayed(
        fails=not finite,
        weights=weights,
        forward=found["forward"],
        backward=found["backward"],
        numbers=numbers,
        loss=loss,
        recorded=[float(v) for v in facts["loss"]],
    )


def rebuild_run(
    recipe: Recipe, bundle: Path, source: str | None, fingerprint: str, device: torch.device
) -> Run:
    """The run that a bundle is of, with its weights, in one process and without anything it would write."""
    from safetensors.torch import load_file

    card = preset_info(recipe.preset, **recipe.model)
    card = dataclasses.replace(card, schedule=recipe.schedule or card.schedule)
    images = open_data(recipe, World(rank=0, size=1, device=device), source)
    if images.fingerprint != fingerprint:
        raise ValueError(
            f"{source or recipe.data.source} is not the data that {bundle} was made with; give --data"
        )
    model = build_model(card).to(device).train()
    model.backbone.load_state_dict(load_file(bundle / nonfinite.WEIGHTS), strict=False)
    setattr(model.backbone, "checkpointing", recipe.engine.checkpointing)  # noqa: B010
    world = World(rank=0, size=1, device=device)
    parts = parameters_by_module(model.backbone)
    current = checkpoint.TrainingState(model.backbone, [], {}, log.new_window(device, len(parts)))
    return Run(
        recipe=recipe, folder=bundle, world=world, images=images, info=card, model=model, shell=meta_model(card),
        parts=parts, objective=build(objectives.registry, recipe.objective),
        schedule=build(schedules.registry, card.schedule), state=current, writer=checkpoint.CheckpointWriter(world),
    )  # fmt: skip


@contextmanager
def find_nonfinite(backbone: nn.Module) -> Iterator[dict[str, str | None]]:
    """Within the block, note the first module whose output and the first parameter whose gradient is not finite."""
    found: dict[str, str | None] = {"forward": None, "backward": None}

    def output(name: str, module: nn.Module, given: Any, out: Any) -> None:
        if found["forward"] is None and not is_finite(out):
            inside = "" if is_finite(given) else ", whose input was not finite either"
            found["forward"] = f"{name or '(itself)'} ({type(module).__name__}){inside}"

    def accumulated(name: str, parameter: Tensor) -> None:
        if (
            found["backward"] is None
            and parameter.grad is not None
            and not is_finite(parameter.grad)
        ):
            found["backward"] = name

    hooks = [m.register_forward_hook(partial(output, name)) for name, m in backbone.named_modules()]
    hooks += [
        p.register_post_accumulate_grad_hook(partial(accumulated, name))
        for name, p in backbone.named_parameters()
        if p.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def is_finite(value: Any) -> bool:
    """Whether every number is finite in a tensor, or in the tensors of a list, tuple or dict."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(is_finite(v) for v in value.values())
    return all(is_finite(v) for v in value) if isinstance(value, (list, tuple)) else True
