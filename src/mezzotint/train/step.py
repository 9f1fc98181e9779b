"""One optimiser step in three parts: gradient, agreement, update; and the random draws it is a function of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.config import Recipe, Time
from mezzotint.core import rng
from mezzotint.core.distributed import World, sum_over_ranks
from mezzotint.data import loader
from mezzotint.data.latent_dataset import Dataset
from mezzotint.process.denoiser import Cond
from mezzotint.process.schedules import slope
from mezzotint.train.distributed import group_norms, no_sync
from mezzotint.train.optim import learning_rate, set_learning_rate
from mezzotint.train.setup import Run


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
                self.x[part],
                self.eps[part],
                self.u[part],
                self.cond.map(lambda t, p=part: t[p]),
                self.numbers[part],
            )


class Losses(NamedTuple):
    """This rank's loss per image and the log-SNR it was noised at, (b,) each, on the device."""

    loss: Tensor
    logsnr: Tensor


class StepResult(NamedTuple):
    """What all ranks agree on before an update.

    loss: mean over the global batch. grad_norm: of the whole gradient, before clipping. finite: whether every loss and
    the gradient are. stopping: a rank was asked to stop. failing: a rank could not write a checkpoint.
    """

    loss: float
    grad_norm: float
    finite: bool
    stopping: bool
    failing: bool


def draw_times(time: Time, seed: int, numbers: list[int], batch: int) -> Tensor:
    """u in (0, 1) for each image number, float64.

    "stratified" is VDM's low-discrepancy sampler (appendix I.1): one offset per global batch, then even spacing.
    """
    if time.sampling == "uniform":
        return rng.uniform("time", seed, numbers)
    offset = rng.uniform("time", seed, [n // batch for n in numbers])
    place = torch.tensor([n % batch for n in numbers], dtype=torch.float64)
    return (offset + place / batch).remainder(1.0).clamp(2.0**-54, 1 - 2.0**-53)


def make_batch(
    recipe: Recipe,
    images: Dataset,
    num_classes: int,
    loaded: loader.LoadedBatch,
    device: torch.device,
) -> Batch:
    """Images with every random draw of the step; each is a function of (seed, image number) alone.

    Args:
        images: the set that `loaded` is of.
        num_classes: of the network; 0 leaves labels out, otherwise dropped labels become index num_classes.
    """
    seed, numbers, labels = recipe.seed, loaded.numbers.tolist(), loaded.labels

    def sent(tensor: Tensor) -> Tensor:  # only pinned memory is copied to a GPU without waiting
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(
            device, non_blocking=True
        )

    x = images.to_model(loaded.pixels, seed, numbers, recipe.data.flip, sent)
    dropped = rng.uniform("condition", seed, numbers) < recipe.label_drop
    label = text = text_mask = None
    if num_classes:
        assert labels is not None, "checked against the data before training started"
        label = sent(torch.where(dropped, num_classes, labels))
    if (
        loaded.text is not None and loaded.text_mask is not None
    ):  # no words at all is the empty condition
        text, text_mask = sent(loaded.text), sent(loaded.text_mask & ~dropped[:, None])
    return Batch(
        x=x,
        eps=sent(rng.normal("noise", seed, numbers, tuple(x.shape[1:]))),
        u=sent(draw_times(recipe.time, seed, numbers, recipe.batch)),
        cond=Cond(label=label, text=text, text_mask=text_mask),
        numbers=numbers,
    )


def prefetch(
    feed: Iterator[loader.LoadedBatch], make: Callable[[loader.LoadedBatch], Batch], most: int = 4
) -> Iterator[Batch]:
    """make(loaded) for each loaded batch, in order, in threads that run up to `most` batches ahead of the loop.

    Drawing the noise of a batch of 256 px images takes longer than a GPU's step, and releases Python's lock.
    """
    flying: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(most, thread_name_prefix="mezzotint-batch") as pool:
        while True:
            while len(flying) < most:
                flying.append(pool.submit(make, next(feed)))
            yield flying.popleft().result()


def gradient(run: Run, batch: Batch) -> Losses:
    """Backward pass of the mean loss over the global batch, one microbatch after the other; added to every p.grad."""
    recipe, device = run.recipe, run.world.device.type
    # Dropout is the one draw left to torch's own generator; it too is a function of (seed, image number).
    torch.manual_seed(
        int(rng.philox("condition", recipe.seed, batch.numbers[0], 1).integers(2**62))
    )
    parts = list(batch.split(recipe.engine.microbatch))
    done: list[Losses] = []
    for part in parts:
        last = len(done) == len(parts) - 1
        with nullcontext() if last else no_sync(run.model.backbone):
            logsnr = run.schedule(part.u)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.engine.precision == "bf16"):
                loss = run.objective(run.model, part.x, part.eps, logsnr.float(), part.cond)
            if recipe.time.loss_measure == "logsnr":
                loss = loss * (-slope(run.schedule, part.u) / 2).to(loss)
            # Exact for any split: each image's loss over the global batch; DDP and FSDP2 average over ranks.
            (loss.sum() * (run.world.size / recipe.batch)).backward()
        done.append(Losses(loss.detach(), logsnr))
    return Losses(torch.cat([d.loss for d in done]), torch.cat([d.logsnr for d in done]))


def gradient_norms(run: Run) -> Tensor:
    """Norms of the gradient: of the whole, then of each part in `run.parts`; float64, the same on every rank."""
    by_part = group_norms(
        [[p.grad for p in part if p.grad is not None] for part in run.parts.values()], run.world
    )
    return torch.cat([by_part.square().sum().sqrt()[None], by_part])


def reduce_step(
    losses: Losses, grad_norm: Tensor, stopping: bool, failing: bool, world: World
) -> StepResult:
    """One sum over ranks, and the one wait for the device in a step.

    The wait costs little: what is launched next, the update and the averages, streams all weights several times, and
    the host is ahead of the device again before that is over. In return nothing needs undoing.
    """
    bad = ~(torch.isfinite(losses.loss).all() & torch.isfinite(grad_norm))
    votes = torch.stack([losses.loss.double().sum(), bad.double()])
    own = torch.tensor([len(losses.loss), stopping, failing], dtype=torch.float64)
    votes = torch.cat([votes, own.to(votes.device, non_blocking=True)])
    total, bad, count, stopping_ranks, failing_ranks, norm = torch.cat(
        [sum_over_ranks(votes, world), grad_norm[None]]
    ).tolist()
    return StepResult(total / count, norm, bad == 0, stopping_ranks > 0, failing_ranks > 0)


def update(run: Run, grad_norm: Tensor) -> None:
    """One optimiser step along the gradient, clipped to recipe.optim.clip; the rate is that of the images seen."""
    recipe, now = run.recipe, run.state
    if recipe.optim.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(
            run.model.parameters(), recipe.optim.clip, grad_norm.float()
        )
    set_learning_rate(now.optimisers, learning_rate(recipe.optim, now.images, recipe.images))
    for optimiser in now.optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
