"""Tiny training runs on the digits, and bitwise comparison of two runs."""

from __future__ import annotations

import functools
import json
import tempfile

import torch
from safetensors.torch import load_file

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.recipes import recipe_for
from mezzotint.train import checkpoint, log

SMALL = [
    "data.source=digits", "data.flip=true", "model.size=8", "model.channels=1", "model.width=8",
    "model.emb_dim=16", "model.multipliers=[1,1]", "model.blocks=[1,1]",
    "model.attention=[false,true]", "model.heads=1", "model.dropout=0.1", "batch=16", "images=160",
    "log_every_images=32", "samples.every_images=80", "samples.count=10", "samples.steps=2",
    "save.every_images=48", "save.keep=10", "engine.precision=float32", "optim.warmup_images=32",
]  # fmt: skip


def small(*overrides: str) -> Recipe:
    """A recipe of 160 images in batches of 16 that trains in about a second."""
    return config.override(recipe_for("unet-tiny"), [*SMALL, *overrides])


def weights(folder) -> dict[str, torch.Tensor]:
    """The averaged weights of a run."""
    return load_file(folder / "model" / "model.safetensors")


def records(folder) -> list[dict]:
    """The lines of a run's log, without speed and memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in log.MEASURED} for line in lines]


def assert_same_run(a, b):
    """Weights, newest checkpoint, log and sample grids of two runs are equal, bit for bit."""
    assert_same_tensors(weights(a), weights(b))
    assert_same_tensors(last_state(a), last_state(b))
    assert records(a) == records(b)
    grids = sorted(p.name for p in (a / "samples").iterdir())
    assert grids == sorted(p.name for p in (b / "samples").iterdir())
    assert all((a / "samples" / n).read_bytes() == (b / "samples" / n).read_bytes() for n in grids)


def events(folder) -> list[dict]:
    """The lines of a run's events.jsonl."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def last_state(folder) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint by its path: weights, moments, averages, log window."""
    newest = checkpoint.list_checkpoints(folder)[-1]
    return _state(newest, (newest / "manifest.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)  # one of two compared runs is often that of earlier tests
def _state(folder, modified) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as flat:
        dcp_to_torch_save(folder, f"{flat}/state.pth")
        state = torch.load(f"{flat}/state.pth", weights_only=True)
    return dict(_walk_tensors(state, ""))


def _walk_tensors(value, path):
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk_tensors(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk_tensors(inner, f"{path}.{i}")


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())]
    assert not differing, differing[:5]
