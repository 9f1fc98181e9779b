"""One optimiser step, and the random draws it is a function of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint import draws
from mezzotint.config import Recipe, Time
from mezzotint.data import loader
from mezzotint.data.pixels import flip, to_model_range
from mezzotint.process.denoiser import Cond, Model, Schedule
from mezzotint.process.schedules import slope
from mezzotint.ranks import World
from mezzotint.train import log
from mezzotint.train.distributed import whole
from mezzotint.train.optim import learning_rate, set_learning_rate
from mezzotint.train.state import State

Objective = Callable[[Model, Tensor, Tensor, Tensor, Cond], Tensor]


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch, on its device.

    x: images in the model's range, (b, c, h, w). eps: noise. u: position in the schedule, float64. cond: with the null
    label where it was dropped. numbers: each image's number in the run.
    """

    x: Tensor
    eps: Tensor
    u: Tensor
    cond: Cond
    numbers: list[int]

    def split(self, size: int | None) -> Iterator[Batch]:
        """Microbatches of at most `size` images."""
        size = size or len(self.numbers)
        for i in range(0, len(self.numbers), size):
            part = slice(i, i + size)
            yield Batch(
                self.x[part], self.eps[part], self.u[part], self.cond.map(lambda t, p=part: t[p]), self.numbers[part]
            )


def draw_times(time: Time, seed: int, numbers: list[int], batch: int) -> Tensor:
    """u in (0, 1) for each image number, float64.

    "stratified" is VDM's low-discrepancy sampler (appendix I.1): one offset per global batch, then even spacing.
    """
    if time.sampling == "uniform":
        return draws.uniform("time", seed, numbers)
    offset = draws.uniform("time", seed, [n // batch for n in numbers])
    place = torch.tensor([n % batch for n in numbers], dtype=torch.float64)
    return (offset + place / batch).remainder(1.0).clamp(2.0**-54, 1 - 2.0**-53)


def make_batch(recipe: Recipe, num_classes: int, loaded: loader.Batch, device: torch.device) -> Batch:
    """Images with every random draw of the step; each is a function of (seed, image number) alone.

    Args:
        num_classes: of the network; 0 leaves labels out, otherwise dropped labels become index num_classes.
    """
    seed, numbers, images, labels = recipe.seed, loaded.numbers.tolist(), loaded.pixels, loaded.labels
    if recipe.data.flip:
        images = flip(images, draws.uniform("augment", seed, numbers) < 0.5)
    label = None
    if num_classes:
        assert labels is not None, "checked against the data before training started"
        dropped = draws.uniform("condition", seed, numbers) < recipe.label_drop
        label = torch.where(dropped, num_classes, labels).to(device, non_blocking=True)
    return Batch(
        x=to_model_range(images.to(device, non_blocking=True)),
        eps=draws.normal("noise", seed, numbers, tuple(images.shape[1:])).to(device, non_blocking=True),
        u=draw_times(recipe.time, seed, numbers, recipe.batch).to(device),
        cond=Cond(label=label),
        numbers=numbers,
    )


class NotFinite(FloatingPointError):
    """The gradient of a step is not finite; nothing was updated. `facts` says which images and log-SNRs."""

    def __init__(self, message: str, facts: dict[str, Any]):
        super().__init__(message)
        self.facts = facts


def step(
    recipe: Recipe, model: Model, objective: Objective, schedule: Schedule, state: State, batch: Batch, world: World
) -> None:
    """Gradient of the mean loss over the global batch, clipped; update; averages. Stops before a non-finite update."""
    # Dropout is the one draw left to torch's own generator; it too is a function of (seed, rank, images seen).
    torch.manual_seed(int(draws.philox("condition", recipe.seed, state.images, world.rank + 1).integers(2**62)))
    losses = []
    for part in batch.split(recipe.engine.microbatch):
        logsnr = schedule(part.u)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.engine.precision == "bf16"):
            loss = objective(model, part.x, part.eps, logsnr.float(), part.cond)
        if recipe.time.measure == "logsnr":
            loss = loss * (-slope(schedule, part.u) / 2).to(loss)
        # Exact for any split: every image's loss is divided by the global batch; DDP and FSDP average over ranks.
        (loss.sum() * (world.size / recipe.batch)).backward()
        log.add_losses(state.window, loss, logsnr)
        losses.append((loss.detach(), logsnr))
    parameters = [p for p in model.parameters() if p.grad is not None]
    clip = recipe.optim.clip if recipe.optim.clip is not None else float("inf")
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, clip))
    log.add_norm(state.window, norm, world)
    if not torch.isfinite(norm):
        raise _not_finite(norm, losses, batch, state.images)
    set_learning_rate(state.optimisers, learning_rate(recipe.optim, state.images, recipe.images))
    for optimiser in state.optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    state.images += recipe.batch


def _not_finite(norm: Tensor, losses: list[tuple[Tensor, Tensor]], batch: Batch, images: int) -> NotFinite:
    loss = torch.cat([a for a, _ in losses]).cpu()
    logsnr = torch.cat([b for _, b in losses]).cpu()
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    where = (
        "losses that are not finite: "
        + ", ".join(f"image {batch.numbers[i]} at log-SNR {logsnr[i]:.2f}" for i in bad[:8])
        if bad
        else f"all losses are finite; the largest is {loss.max():.3g} at log-SNR {logsnr[loss.argmax()]:.2f}"
    )
    return NotFinite(
        f"gradient norm {norm.item()} at {images} images; nothing was updated. {where}. "
        "Try a lower optim.lr, optim.clip=1, or engine.precision=float32.",
        {
            "images": images,
            "grad_norm": norm.item(),
            "numbers": batch.numbers,
            "loss": loss.tolist(),
            "logsnr": logsnr.tolist(),
        },
    )
