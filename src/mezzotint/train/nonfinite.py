"""What stands between a bad step and the weights: non-finite steps are stopped, skipped or rolled back, each with a
bundle that `mezzotint replay` repeats; spikes of the loss are reported.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mezzotint import config
from mezzotint.train import checkpoint, log
from mezzotint.train.distributed import full_tensor, group_norms
from mezzotint.train.setup import Run
from mezzotint.train.step import Batch, Losses, StepResult

WEIGHTS, FACTS, RECIPE = "weights.safetensors", "bundle.json", "recipe.yaml"  # a bundle's files
MIN_LOSSES = 32  # losses before a spike is called one


class NonFiniteError(FloatingPointError):
    """A loss or the gradient of a step is not finite; nothing was updated. `facts` is what the bundle holds."""

    def __init__(self, message: str, facts: dict[str, Any]):
        super().__init__(message)
        self.facts = facts


def spike(recent: Collection[float], loss: float, deviations: float) -> float | None:
    """The median of the recent losses if `loss` stands out above them, else None. Our own rule.

    It stands out when it exceeds the median by `deviations` robust standard deviations: 1.4826 times the median
    distance from the median, which is the standard deviation of normal losses and which spikes do not move. The unit
    is at least 1 % of the median, so that a flat curve has no spikes of rounding.
    """
    if len(recent) < MIN_LOSSES:
        return None
    usual = statistics.median(recent)
    unit = 1.4826 * statistics.median(abs(other - usual) for other in recent)
    return usual if loss - usual > deviations * max(unit, 0.01 * abs(usual)) else None


def detect_spike(run: Run, verdict: StepResult) -> dict[str, Any] | None:
    """Remember the loss of a sound step; an event for events.jsonl if it is a spike."""
    now, deviations = run.state, run.recipe.nonfinite.spike
    usual = None if deviations is None else spike(now.recent, verdict.loss, deviations)
    now.recent.append(verdict.loss)
    if usual is None:
        return None
    now.spikes += 1
    return {
        "images": now.images + run.recipe.batch,
        "event": "spike",
        "loss": verdict.loss,
        "median": usual,
    }


def handle_nonfinite(run: Run, batch: Batch, losses: Losses, verdict: StepResult) -> dict[str, Any]:
    """Write the bundle of a non-finite step; then stop, or make ready for the next images, as the recipe says.

    All ranks call this together, after the gradient and before any update.

    Returns:
        The event for events.jsonl; `state.skipped` has been counted up and gradients are gone.

    Errors: NotFinite where the recipe says "stop", its limit is reached, or there is no checkpoint to roll back to.
    """
    recipe, now = run.recipe, run.state
    facts = gather_facts(run, batch, losses, verdict)
    words = describe_failure(facts)
    bundle, problem = run.folder / "bundles" / str(now.images), None
    weights = {name: full_tensor(p.detach()).cpu() for name, p in now.backbone.named_parameters()}
    if run.world.is_rank0:
        try:
            write_bundle(bundle, config.to_yaml(recipe), facts, weights)
        except OSError as error:  # no bundle must not hide why there should be one
            problem = f"its bundle could not be written: {error}"
    for optimiser in now.optimisers:
        optimiser.zero_grad(set_to_none=True)
    repeat = problem or f"repeat it with: mezzotint replay {bundle}"
    choice, done = recipe.nonfinite.on_nonfinite, now.skipped
    if choice == "stop":
        raise NonFiniteError(
            f"{words}. Try a lower optim.lr, optim.clip=1, engine.precision=float32, or nonfinite.on_nonfinite=skip; "
            f"{repeat}",
            facts,
        )
    if done >= recipe.nonfinite.limit:
        raise NonFiniteError(
            f"{words}. {done} steps were passed over, nonfinite.limit allows no more; {repeat}",
            facts,
        )
    event = {
        "images": now.images + recipe.batch,
        "event": choice,
        "why": words,
        "bundle": str(bundle.name),
    }
    if choice == "rollback":
        event["to_images"] = roll_back(run, words, facts)
    now.skipped = done + 1
    return event


def roll_back(run: Run, words: str, facts: dict[str, Any]) -> int:
    """Weights, optimiser and averages of the newest checkpoint; the images seen stay. Returns the checkpoint's."""
    now, images = run.state, run.state.images
    run.writer.settle()
    newest, _ = checkpoint.find_newest_intact(run.folder)
    if newest is None:
        raise NonFiniteError(f"{words}. There is no checkpoint to roll back to", facts)
    recent, spikes = now.recent, now.spikes
    checkpoint.restore_checkpoint(now, newest, run.world)
    restored, now.images = now.images, images
    now.recent, now.spikes = recent, spikes
    now.window.zero_()
    return restored


def gather_facts(run: Run, batch: Batch, losses: Losses, verdict: StepResult) -> dict[str, Any]:
    """What happened, of all ranks, ready for JSON: per image, and norms per parameter ("layers")."""
    mine = (batch.numbers, losses.loss.tolist(), losses.logsnr.tolist())
    shares = [mine]
    if run.world.size > 1:
        gathered: list[Any] = [None] * run.world.size
        dist.all_gather_object(gathered, mine)
        shares = gathered
    named = list(run.state.backbone.named_parameters())
    of_gradient = group_norms(
        [[p.grad] if p.grad is not None else [] for _, p in named], run.world
    ).tolist()
    of_weight = group_norms([[p.detach()] for _, p in named], run.world).tolist()
    return {
        "images": run.state.images,
        "ranks": run.world.size,
        "grad_norm": to_json_number(verdict.grad_norm),
        "numbers": [n for share in shares for n in share[0]],
        "loss": [to_json_number(v) for share in shares for v in share[1]],
        "logsnr": [to_json_number(v) for share in shares for v in share[2]],
        "layers": {
            name: {"grad_norm": to_json_number(g), "weight_norm": to_json_number(w)}
            for (name, _), g, w in zip(named, of_gradient, of_weight, strict=True)
        },
        "data": run.images.fingerprint,
        "device": run.world.device.type,
        "torch": torch.__version__,
    }


def to_json_number(value: float) -> float | str:
    """JSON has no nan and no infinity: they become words, which float() reads."""
    return value if math.isfinite(value) else str(value)


def describe_failure(facts: dict[str, Any]) -> str:
    """One sentence: where the step failed."""
    loss = [float(v) for v in facts["loss"]]
    bad = [i for i, v in enumerate(loss) if not math.isfinite(v)]
    at = [
        f"image {n} at log-SNR {float(v):.2f}"
        for n, v in zip(facts["numbers"], facts["logsnr"], strict=True)
    ]
    largest = max(range(len(loss)), key=lambda i: loss[i])
    where = (
        f"{len(bad)} of {len(loss)} losses are not finite: {', '.join(at[i] for i in bad[:8])}"
        if bad
        else f"all losses are finite; the largest is {loss[largest]:.3g}, {at[largest]}"
    )
    return f"gradient norm {facts['grad_norm']} at {facts['images']} images; nothing was updated. {where}"


def write_bundle(
    bundle: Path, recipe: str, facts: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    """A folder that repeats one step elsewhere: recipe, facts, the weights before it; appears when complete."""
    from safetensors.torch import save_file

    partial = bundle.with_name(f".{bundle.name}.partial")
    partial.mkdir(parents=True)
    (partial / RECIPE).write_text(recipe)
    (partial / FACTS).write_text(json.dumps(facts, indent=1))
    save_file(weights, partial / WEIGHTS)
    checkpoint.write_manifest(partial)
    checkpoint.publish_folder(partial, bundle)


def record_unreadable(run: Run) -> int:
    """Write the pictures that any rank found unreadable to unreadable.txt; all ranks call this together.

    Returns:
        How many are new, on the first rank; 0 on the others.
    """
    found = run.images.report.unreadable
    if run.world.size > 1:
        gathered: list[Any] = [None] * run.world.size
        dist.all_gather_object(gathered, found)
        found = {name: reason for share in gathered for name, reason in share.items()}
    return log.append_unreadable(run.folder / "unreadable.txt", found) if run.world.is_rank0 else 0
