"""One optimiser step: noise and log-SNRs, gradient, agreement between ranks, update."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.config import Recipe, Time
from mezzotint.core import rng
from mezzotint.core.distributed import World, sum_over_ranks
from mezzotint.data import loader
from mezzotint.data.augmentation import augment, augmentation_label, draw_augmentations
from mezzotint.data.dataset import Dataset
from mezzotint.data.labels import NO_LABEL
from mezzotint.process.denoiser import Cond
from mezzotint.process.objectives import at_images
from mezzotint.process.schedules import slope
from mezzotint.train.draws import draws_of
from mezzotint.train.optim import learning_rate, set_learning_rate
from mezzotint.train.parallel import clear_gradients, group_norms, no_sync
from mezzotint.train.setup import Run
from mezzotint.train.transfer import SideStream, send_to

PREFETCHED_BATCHES = 4  # drawn and on the device before the loop asks for them


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch, on its device.

    x: images in the model's range, (b, c, h, w).
    eps: noise, (b, c, h, w).
    u: position in the schedule, (b,) float64.
    cond: label and text (null label, no text where dropped), and x's augmentation label.
    image_numbers: number of each image in the run, 0 for the first image seen.
    """

    x: Tensor
    eps: Tensor
    u: Tensor
    cond: Cond
    image_numbers: list[int]

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch."""
        parts = (getattr(self.cond, field.name) for field in fields(self.cond))
        return [self.x, self.eps, self.u, *(t for t in parts if isinstance(t, Tensor))]

    def split(self, size: int | None, largest_share: int | None = None) -> Iterator[Batch]:
        """Yield microbatches of at most `size` images; the whole batch for None.

        Ranks with one image less than others yield as many: FSDP2's are collectives.

        Args:
            largest_share: images of the rank that has most; those of this batch by default.
        """
        images = len(self.image_numbers)
        most = largest_share or images
        parts = min(images, -(-most // (size or most)))
        end = 0
        for left in reversed(range(parts)):  # each of them needs an image
            rows = slice(end, end := min(end + (size or images), images - left))
            yield Batch(
                self.x[rows],
                self.eps[rows],
                self.u[rows],
                self.cond[rows],
                self.image_numbers[rows],
            )


class Losses(NamedTuple):
    """This rank's loss per image and the log-SNR of its noise, (b,) each, on the device."""

    loss: Tensor
    logsnr: Tensor


class StepResult(NamedTuple):
    """What all ranks agree on before an update.

    loss: mean over the global batch.
    grad_norm: of the whole gradient, before clipping.
    finite: whether every loss and the gradient are finite.
    stopping: whether a rank was asked to stop.
    failing: whether a rank could not write a checkpoint.
    """

    loss: float
    grad_norm: float
    finite: bool
    stopping: bool
    failing: bool


def draw_times(time: Time, draws: rng.Draws, image_numbers: list[int], batch: int) -> Tensor:
    """Draw u in (0, 1) for each image, (b,) float64.

    "stratified" is VDM's low-discrepancy sampler (appendix I.1): one offset per global batch, then
    even spacing.

    Args:
        batch: images of a global batch.
    """
    if time.sampling == "uniform":
        return draws.uniform("time", image_numbers)
    offset = draws.uniform("time", [n // batch for n in image_numbers])
    position = torch.tensor([n % batch for n in image_numbers], dtype=torch.float64)
    return (offset + position / batch).remainder(1.0).clamp(2.0**-54, 1 - 2.0**-53)


def make_batch(
    recipe: Recipe,
    dataset: Dataset,
    num_classes: int,
    loaded: loader.LoadedBatch,
    device: torch.device,
) -> Batch:
    """Draw noise, times, augmentation and dropped conditions, each by seed and image number alone.

    Augmentations are a few numbers, always of numpy's stream.

    Args:
        dataset: that `loaded` comes from.
        num_classes: of the network; 0 leaves labels out, else dropped and missing labels become
            num_classes, the null label.
    """
    image_numbers, labels = loaded.image_numbers.tolist(), loaded.labels
    draws = draws_of(recipe, device)
    send = partial(send_to, device=device)
    x = dataset.to_model(loaded.inputs, draws, image_numbers, recipe.data.flip, send)
    dropped = draws.uniform("condition", image_numbers) < recipe.label_drop
    label = text = text_mask = None
    if num_classes:
        assert labels is not None, "checked against the data before training started"
        label = send(torch.where(dropped | (labels == NO_LABEL), num_classes, labels))
    if loaded.text is not None and loaded.text_mask is not None:
        # A caption without a single token is the empty condition.
        text, text_mask = send(loaded.text), send(loaded.text_mask & ~dropped[:, None])
    augmentation = None
    if recipe.data.augment:
        drawn = draw_augmentations(recipe.seed, image_numbers, recipe.data.augment)
        x, augmentation = augment(x, drawn), send(augmentation_label(drawn))
    return Batch(
        x=x,
        eps=send(draws.normal("noise", image_numbers, tuple(x.shape[1:]))),
        u=send(draw_times(recipe.time, draws, image_numbers, recipe.batch)),
        cond=Cond(label=label, text=text, text_mask=text_mask, augment=augmentation),
        image_numbers=image_numbers,
    )


def prefetch(
    batches: Iterator[loader.LoadedBatch],
    make: Callable[[loader.LoadedBatch], Batch],
    side: SideStream,
    ahead: int = PREFETCHED_BATCHES,
) -> Iterator[Batch]:
    """Yield make(loaded) for each loaded batch, in order, made by threads `ahead` batches early.

    On a GPU they are made on the stream `side`: copies and noise do not wait for the step, nor the
    step for them. On a CPU, drawing the noise of 256 px images takes long, and releases Python's
    lock.
    """
    pending: deque[Future[tuple[Batch, Any]]] = deque()
    with ThreadPoolExecutor(ahead, thread_name_prefix="mezzotint-batch") as pool:
        while True:
            while len(pending) < ahead:
                pending.append(pool.submit(side.make, partial(make, next(batches))))
            yield side.hand_over(*pending.popleft().result())


def gradient(run: Run, batch: Batch) -> Losses:
    """Add the gradient of the mean loss over the global batch to every p.grad, by microbatches."""
    recipe, device = run.recipe, run.world.device.type
    # Dropout is the one draw from torch's own generator; it too depends on (seed, image number).
    bits = rng.philox("condition", recipe.seed, batch.image_numbers[0], 1)
    torch.manual_seed(int(bits.integers(2**62)))
    seen = batch.image_numbers[0] // recipe.batch * recipe.batch  # before this step, on any rank
    objective = at_images(run.objective, seen)
    largest = loader.largest_share(recipe.batch, run.world.size)
    microbatches = list(batch.split(recipe.engine.microbatch, largest))
    done: list[Losses] = []
    for part in microbatches:
        # Ranks add up their gradients once, in the backward pass of the last microbatch.
        last = len(done) == len(microbatches) - 1
        with nullcontext() if last else no_sync(run.model.backbone):
            logsnr = run.schedule(part.u)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.engine.precision == "bf16"):
                loss = objective(run.model, part.x, part.eps, logsnr.float(), part.cond)
            if recipe.time.loss_measure == "logsnr":
                loss = loss * (-slope(run.schedule, part.u) / 2).to(loss)
            # DDP and FSDP2 average over ranks, so this is the mean over the global batch, however
            # it is split into microbatches.
            (loss.sum() * (run.world.size / recipe.batch)).backward()
        done.append(Losses(loss.detach(), logsnr))
    return Losses(torch.cat([d.loss for d in done]), torch.cat([d.logsnr for d in done]))


def gradient_norms(run: Run) -> Tensor:
    """Return the norm of the gradient, then of each of `run.parts`; float64, equal on all ranks."""
    by_part = group_norms(
        [[p.grad for p in part if p.grad is not None] for part in run.parts.values()], run.world
    )
    return torch.cat([by_part.square().sum().sqrt()[None], by_part])


def reduce_step(
    losses: Losses, grad_norm: Tensor, stopping: bool, failing: bool, world: World
) -> StepResult:
    """Reduce a step's losses and flags over ranks, and wait for the device: the step's only wait.

    The wait costs little. Update and averages, launched next, stream all weights several times, and
    the host is ahead of the device again before they end.
    """
    bad = ~(torch.isfinite(losses.loss).all() & torch.isfinite(grad_norm))
    on_device = torch.stack([losses.loss.double().sum(), bad.double()])
    on_host = torch.tensor([len(losses.loss), stopping, failing], dtype=torch.float64)
    votes = torch.cat([on_device, on_host.to(on_device.device, non_blocking=True)])
    total, bad, count, stopping_ranks, failing_ranks, norm = torch.cat(
        [sum_over_ranks(votes, world), grad_norm[None]]
    ).tolist()
    return StepResult(total / count, norm, bad == 0, stopping_ranks > 0, failing_ranks > 0)


def update(run: Run, grad_norm: Tensor) -> None:
    """Clip the gradient to `optim.clip` and take a step at the rate of the images seen."""
    recipe, state = run.recipe, run.state
    if recipe.optim.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(
            run.model.parameters(), recipe.optim.clip, grad_norm.float()
        )
    set_learning_rate(state.optimisers, learning_rate(recipe.optim, state.images, recipe.images))
    for optimiser in state.optimisers:
        optimiser.step()
    clear_gradients(run.model.backbone, state.optimisers)
