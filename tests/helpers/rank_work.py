"""What ranks do in tests of several: train a few steps, count collectives and bytes copied."""

from __future__ import annotations

import collections
import contextlib
import pickle
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mezzotint import config
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.config import Recipe
from mezzotint.core.distributed import World
from mezzotint.recipes import recipe_for
from mezzotint.train import checkpoint, loop, parallel
from mezzotint.train.setup import Run, setup
from mezzotint.train.step import Batch, gradient, gradient_norms, reduce_step, update

COMMON = [
    "data.source=digits", "model.channels=1", "model.num_classes=10", "batch=8", "images=800",
    "samples.every_images=0", "optim.warmup_images=0", "optim.lr=1e-3",
]  # fmt: skip
SMALL_UNET = [
    "model.size=8", "model.width=8", "model.emb_dim=16", "model.multipliers=[1,1]",
    "model.blocks=[1,1]", "model.attention=[false,true]", "model.heads=1",
]  # fmt: skip


def recipe(preset: str, *overrides: str) -> Recipe:
    return config.override(recipe_for(preset), [*COMMON, *overrides])


def start(world: World, folder: Path, preset: str, *overrides: str) -> Run:
    """A run of this rank, at its start, as on a GPU: FSDP2 gathers weights in bf16.

    Compiled blocks are traced, and their kernels are torch's own.
    """
    traced = partial(compile_blocks, backend="aot_eager")
    gathered = lambda precision, world: torch.bfloat16 if precision == "bf16" else None  # noqa: E731
    with (
        mock.patch.object(parallel, "compile_blocks", traced),
        mock.patch.object(parallel, "gathered_dtype", gathered),
    ):
        return setup(recipe(preset, *overrides), folder, world, lambda line: None)


def step(run: Run, batch: Batch) -> tuple[float, float]:
    """Train one step; return its loss and the norm of its gradient."""
    losses = gradient(run, batch)
    norms = gradient_norms(run)
    result = reduce_step(losses, norms[0], False, False, run.world)
    update(run, norms[0])
    run.state.images += run.recipe.batch
    loop.update_averages(run)
    return result.loss, result.grad_norm


def count_collectives(run: Run, batch: Batch) -> dict[str, int]:
    """The collectives of one step by name, whichever thread starts them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(run, batch)
    # Selective checkpointing sees an operation and passes it on, which is another event within.
    names = [
        event.name.removeprefix("c10d::")
        for event in profiled.events()
        if event.name.startswith("c10d::") and not _is_passed_on(event)
    ]
    return dict(collections.Counter(names))


def _is_passed_on(event: Any) -> bool:
    outer = event.cpu_parent
    return outer is not None and outer.name == "PythonDispatchMode"


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes that copies within the block write, of a sharded tensor this rank's part."""

    COPIES = ("copy_", "_to_copy", "clone")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.COPIES:
            for tensor in tree_leaves(result):
                own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                # Copies of a model without storage are on the meta device.
                self.bytes += 0 if own.is_meta else own.numel() * own.element_size()
        return result


def count_saved_bytes(run: Run) -> int:
    """The bytes that a save of checkpoint and models copies on this rank."""
    with CopiedBytes() as copied:
        loop.save(run, True, True, ())
    run.writer.wait()
    return copied.bytes


def state_bytes(run: Run) -> dict[str, int]:
    """The bytes of the whole weights and of the whole state of a checkpoint."""
    weights = sum(p.numel() * p.element_size() for p in run.state.backbone.parameters())
    tensors = [t for t in tree_leaves(run.state.tensors(run.world)) if isinstance(t, torch.Tensor)]
    return {"weights": weights, "state": sum(t.numel() * t.element_size() for t in tensors)}


def gradients_stay(run: Run) -> bool:
    """Whether clearing the gradients leaves them where they are, as zeros."""
    parameters = [p for p in run.state.backbone.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    parallel.clear_gradients(run.model.backbone, run.state.optimisers)
    return all(
        p.grad is not None and p.grad is g and not g.any()
        for p, g in zip(parameters, gradients, strict=True)
    )


def train_and_save(
    world: World, folder: Path, layouts: dict[str, tuple[str, ...]], steps: int = 3
) -> dict[str, dict[str, Any]]:
    """Train each layout; return losses and norms, collectives of a step, and bytes of a save."""
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in layouts.items():
        run = start(world, folder / name, *overrides)
        batches = loop.training_batches(run)
        curve = [step(run, next(batches)) for _ in range(steps)]
        found[name] = {
            "curve": curve,
            "collectives": count_collectives(run, next(batches)),
            "copied": count_saved_bytes(run),
            "gradients stay": gradients_stay(run),
            **state_bytes(run),
        }
        run.writer.close()
    return found


def train_with_slow_ranks(world: World, folder: Path, seconds: float) -> list[str]:
    """Train a run in which one rank reads, evaluates and writes late; return what was late."""
    late: list[str] = []

    def sleep(rank: int, what: str) -> None:
        if world.rank == rank and what not in late:
            late.append(what)
            time.sleep(seconds)

    def evaluator(model: Any, folder: Path, should_stop: Any) -> dict[str, float]:
        sleep(1, "evaluates")
        return {"score": 1.0}

    make_batch, write_manifest = loop.make_batch, checkpoint.write_manifest

    def make_late(*arguments: Any) -> Batch:
        batch = make_batch(*arguments)
        if batch.image_numbers[0] >= 48:
            sleep(1, "reads")
        return batch

    def write_late(*arguments: Any, **options: Any) -> None:
        sleep(0, "writes")
        write_manifest(*arguments, **options)

    sleep(1, "starts")
    changes = ["images=64", "save.every_images=32", "evaluate.every_images=32",
               "evaluate.bits_per_dim=true"]  # fmt: skip
    late_recipe = recipe("unet-tiny", *SMALL_UNET, *changes)
    with (
        mock.patch.object(loop, "make_batch", make_late),
        mock.patch.object(checkpoint, "write_manifest", write_late),
    ):
        loop.train(late_recipe, folder, quiet=True, evaluator=evaluator)
    return late


def count_start_traffic(world: World, folder: Path) -> dict[str, tuple[int, int]]:
    """The calls, and the bytes given to them, of each collective between start and first step."""
    counts: dict[str, tuple[int, int]] = {}

    def counted(name: str, function: Any, argument: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            value = arguments[argument]
            tensor = isinstance(value, torch.Tensor)
            size = value.nbytes if tensor else len(pickle.dumps(value))
            calls, total = counts.get(name, (0, 0))
            counts[name] = calls + 1, total + size
            return function(*arguments, **options)

        return mock.patch.object(torch.distributed, name, call)

    arguments = {
        "all_reduce": 0, "broadcast_object_list": 0, "gather_object": 0, "all_gather_object": 1,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, argument in arguments.items():
            stack.enter_context(counted(name, getattr(torch.distributed, name), argument))
        stack.enter_context(mock.patch.object(loop, "loop", return_value=None))
        loop.train(recipe("unet-tiny", *SMALL_UNET), folder, quiet=True)
    return counts
