"""Estimate the memory that a machine of a training run needs beside its GPUs."""

from __future__ import annotations

from typing import Any

from mezzotint.backbones import native_size
from mezzotint.config import Recipe
from mezzotint.core.distributed import MOST_GPUS_PER_NODE
from mezzotint.data.loader import largest_share
from mezzotint.process.denoiser import Model
from mezzotint.tools.accelerators import GIB
from mezzotint.train.step import PREFETCHED_BATCHES

FLOAT = 4  # bytes of a float32
# Resident memory after the imports with torch 2.11.0+cu130, measured without a GPU. What CUDA's
# driver and NCCL add is not measured.
RANK_BYTES, WORKER_BYTES = 620_000_000, 510_000_000


def host_memory(recipe: Recipe, model: Model, gpus: int, optimiser_bytes: int) -> dict[str, int]:
    """Return the bytes that the fullest machine of a run needs, that of rank 0.

    Args:
        gpus: ranks of the run; a machine has `engine.shard_ranks` of them, or up to eight.
        optimiser_bytes: of the moments, over all ranks as one.

    Returns:
        ranks: of the machine;
        processes: of ranks and `data.workers`, as Python and torch occupy it;
        batches: loaded, and drawn ahead with their noise;
        checkpoint: the machine's share of the state, from its copy until it is written; each tensor
            is copied on one rank of the run;
        models: the averaged and the raw weights, until model/ and model-raw/ are written, and the
            averages of snapshots;
        total: the sum. Memory-mapped data are not counted: the kernel frees their pages on demand.
    """
    config, engine = model.info.config, recipe.engine
    ranks = min(gpus, engine.shard_ranks or MOST_GPUS_PER_NODE)
    params = sum(p.numel() for p in model.parameters())
    powers = len(recipe.ema.power_stds)
    state = FLOAT * params * (2 + powers) + optimiser_bytes  # weights and averages
    height, width = native_size(config)
    numel = config.channels * height * width
    # One byte a channel of a pixel; of a latent, mean and log-variance of two views in float16.
    loaded = numel if model.info.codec == "pixels" else 2 * 2 * 2 * numel
    workers = recipe.data.workers
    in_flight = 2 * max(1, workers) * loaded + PREFETCHED_BATCHES * 2 * FLOAT * numel
    parts = {
        "processes": ranks * (RANK_BYTES + workers * WORKER_BYTES),
        "batches": ranks * largest_share(recipe.batch, gpus) * in_flight,
        "checkpoint": state * ranks // gpus,
        "models": FLOAT * params * (2 + powers),
    }
    return {"ranks": ranks, **parts, "total": sum(parts.values())}


def describe_host_memory(host: dict[str, Any]) -> str:
    """Return a sentence for the printed plan."""
    gib = {key: f"{value / GIB:.3g}" for key, value in host.items()}
    ranks = f"{host['ranks']} rank" + ("s" if host["ranks"] > 1 else "")
    return (
        f"a machine of {ranks} needs {gib['total']} GiB of its own memory: {gib['processes']} for "
        f"processes, {gib['batches']} for batches, and during a save {gib['checkpoint']} for the "
        f"checkpoint and {gib['models']} for model/ and model-raw/; CUDA's driver is not counted"
    )
