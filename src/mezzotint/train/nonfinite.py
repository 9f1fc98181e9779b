"""Non-finite steps: stop, skip or roll back, with a bundle that `mezzotint replay` repeats.

Also reports spikes of the loss.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mezzotint import config
from mezzotint.core.distributed import gather_from_ranks, gather_to_rank0, on_rank0
from mezzotint.core.files import partial_folder
from mezzotint.core.tensor_files import save_tensors
from mezzotint.train import checkpoint, checkpoint_store, ema, log
from mezzotint.train.parallel import clear_gradients, group_norms
from mezzotint.train.setup import Run
from mezzotint.train.staging import gather_to_host
from mezzotint.train.step import Batch, Losses, StepResult

WEIGHTS, FACTS, RECIPE = "weights.safetensors", "bundle.json", "recipe.yaml"  # a bundle's files
MIN_LOSSES = 32  # losses needed before one can be called a spike


class NonFiniteError(FloatingPointError):
    """A loss or the gradient of a step is not finite; nothing was updated.

    facts: what bundle.json holds.
    """

    def __init__(self, message: str, facts: dict[str, Any]):
        super().__init__(message)
        self.facts = facts


def find_spike(recent: Collection[float], loss: float, deviations: float) -> float | None:
    """Return the median of the recent losses if `loss` is a spike, else None. Our own rule.

    A spike exceeds the median by `deviations` robust standard deviations. One is 1.4826 times the
    median distance from the median: the standard deviation of normal losses, unmoved by spikes. It
    counts as at least 1 % of the median, so that rounding on a flat curve is no spike.
    """
    if len(recent) < MIN_LOSSES:
        return None
    median = statistics.median(recent)
    std = 1.4826 * statistics.median(abs(other - median) for other in recent)
    return median if loss - median > deviations * max(std, 0.01 * abs(median)) else None


def detect_spike(run: Run, result: StepResult) -> dict[str, Any] | None:
    """Remember the loss of a finite step; return an event for events.jsonl if it is a spike."""
    state, deviations = run.state, run.recipe.nonfinite.spike
    median = None if deviations is None else find_spike(state.recent, result.loss, deviations)
    state.recent.append(result.loss)
    if median is None:
        return None
    state.spikes += 1
    return {
        "images": state.images + run.recipe.batch,
        "event": "spike",
        "loss": result.loss,
        "median": median,
    }


def handle_nonfinite(run: Run, batch: Batch, losses: Losses, result: StepResult) -> dict[str, Any]:
    """Write the bundle of a non-finite step; then stop, skip or roll back, as the recipe says.

    All ranks call this together, after the gradient and before any update.

    Returns: the event for events.jsonl, after gradients are cleared and `state.skipped` is counted
        up.

    Errors: NonFiniteError where the recipe says "stop", its limit is reached, or there is no
        checkpoint to roll back to.
    """
    recipe, state = run.recipe, run.state
    facts = gather_facts(run, batch, losses, result)
    failure = describe_failure(facts)
    bundle = run.folder / "bundles" / str(state.images)
    weights = gather_to_host(ema.weights_of(state.backbone), run.world)

    def write() -> str:
        try:
            run.check_folder()
            write_bundle(bundle, config.to_yaml(recipe), facts, weights)
        except OSError as error:  # must not hide the failure of the step
            return f"its bundle could not be written: {error}"
        return f"repeat it with: mezzotint replay {bundle}"

    advice = on_rank0(write, run.world)
    clear_gradients(run.model.backbone, state.optimisers)

    choice, limit = recipe.nonfinite.on_nonfinite, recipe.nonfinite.limit
    if choice == "stop":
        raise NonFiniteError(
            f"{failure}. Try a lower optim.lr, optim.clip=1, engine.precision=float32, or "
            f"nonfinite.on_nonfinite=skip; {advice}",
            facts,
        )
    if state.skipped >= limit:
        raise NonFiniteError(
            f"{failure}. {state.skipped} steps were skipped and nonfinite.limit={limit} allows no "
            f"more; {advice}",
            facts,
        )
    event = {
        "images": state.images + recipe.batch,
        "event": choice,
        "why": failure,
        "bundle": bundle.name,
    }
    skipped = state.skipped + 1
    if choice == "rollback":
        event["to_images"] = roll_back(run, failure, facts)
    state.skipped = skipped
    return event


def roll_back(run: Run, failure: str, facts: dict[str, Any]) -> int:
    """Restore weights, optimiser and averages of the newest checkpoint, and return its images seen.

    The images seen by the run, its recent losses and its count of spikes are kept.
    """
    state, images = run.state, run.state.images
    run.writer.wait()
    store = run.recipe.save.store
    if store:
        checkpoint_store.fetch_newest(store, run.folder, run.world)
    newest, _ = on_rank0(lambda: checkpoint.find_newest_intact(run.folder), run.world)
    if newest is None:
        raise NonFiniteError(f"{failure}. There is no checkpoint to roll back to", facts)
    recent, spikes = state.recent, state.spikes
    checkpoint.restore_newest(state, run.folder, newest, run.world)
    if store:
        checkpoint_store.drop_fetched(run.folder, run.world)
    restored, state.images = state.images, images
    state.recent, state.spikes = recent, spikes
    state.metrics_window.zero_()
    return restored


def gather_facts(run: Run, batch: Batch, losses: Losses, result: StepResult) -> dict[str, Any]:
    """Return what bundle.json holds: losses per image of all ranks, norms per parameter."""
    mine = (batch.image_numbers, losses.loss.tolist(), losses.logsnr.tolist())
    shares = gather_from_ranks(mine, run.world)
    named = list(run.state.backbone.named_parameters())
    gradients = [[p.grad] if p.grad is not None else [] for _, p in named]
    grad_norms = group_norms(gradients, run.world).tolist()
    weight_norms = group_norms([[p.detach()] for _, p in named], run.world).tolist()
    return {
        "images": run.state.images,
        "ranks": run.world.size,
        "grad_norm": to_json_number(result.grad_norm),
        "image_numbers": [n for share in shares for n in share[0]],
        "loss": [to_json_number(v) for share in shares for v in share[1]],
        "logsnr": [to_json_number(v) for share in shares for v in share[2]],
        "layers": {
            name: {"grad_norm": to_json_number(g), "weight_norm": to_json_number(w)}
            for (name, _), g, w in zip(named, grad_norms, weight_norms, strict=True)
        },
        "data": run.dataset.fingerprint,
        "classes": list(run.dataset.label_names or ()),
        "device": run.world.device.type,
        "torch": torch.__version__,
    }


def to_json_number(value: float) -> float | str:
    """Return a number that JSON can hold; nan and infinity become strings that float() reads."""
    return value if math.isfinite(value) else str(value)


def describe_failure(facts: dict[str, Any]) -> str:
    """Return one sentence that says where a step failed."""
    loss = [float(v) for v in facts["loss"]]
    images = [
        f"image {n} at log-SNR {float(v):.2f}"
        for n, v in zip(facts["image_numbers"], facts["logsnr"], strict=True)
    ]
    bad = [images[i] for i, v in enumerate(loss) if not math.isfinite(v)]
    if bad:
        where = f"{len(bad)} of {len(loss)} losses are not finite: {', '.join(bad[:8])}"
    else:
        largest = max(range(len(loss)), key=lambda i: loss[i])
        where = f"all losses are finite; the largest is {loss[largest]:.3g}, {images[largest]}"
    norm, seen = facts["grad_norm"], facts["images"]
    return f"gradient norm {norm} at {seen} images; nothing was updated. {where}"


def write_bundle(
    bundle: Path, recipe: str, facts: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    """Write a folder from which one step can be repeated: recipe, facts, the weights before it."""
    with partial_folder(bundle) as partial:
        (partial / RECIPE).write_text(recipe)
        (partial / FACTS).write_text(json.dumps(facts, indent=1))
        save_tensors(weights, partial / WEIGHTS)
        checkpoint.write_manifest(partial, (RECIPE, FACTS, WEIGHTS))
        checkpoint.publish_folder(partial, bundle)


def record_unreadable(run: Run) -> None:
    """Add images that any rank could not read to unreadable.txt; all ranks call it together.

    A list that cannot be written waits for the next call: it must not stop a checkpoint.
    """
    shares = gather_to_rank0(run.dataset.report.unreadable)
    if shares is not None:
        reasons = {name: reason for share in shares for name, reason in share.items()}
        with contextlib.suppress(OSError):
            log.append_unreadable(run.folder / "unreadable.txt", reasons)
