"""Numbers of every schedule, default discretization and sampler, recorded in tests/golden.

`PYTHONPATH=tests python -m helpers.golden_numbers` writes schedules.json and samplers.json
again. Do that only for an entry that is new: the numbers must not change.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch

from helpers.closed_forms import mixture
from mezzotint.core.registry import Spec, build
from mezzotint.process import samplers, schedules
from mezzotint.process.denoiser import Cond
from mezzotint.process.samplers import grids
from mezzotint.sampling.sample import default_discretization

GOLDEN = Path(__file__).parents[1] / "golden"
U = [0.02, 0.25, 0.5, 0.75, 0.98]
STEPS = 8
SCHEDULE_OPTIONS = {"ddpm": {"betas": [0.01 * i for i in range(1, 20)]}}  # it has no defaults
SAMPLER_OPTIONS = {
    "ancestral": [{}, {"variance": 0.3}],
    "ddim": [{}, {"eta": 0.5}],
    "dpmpp_singlestep": [{}, {"order": 2}],
    "heun": [{}, {"s_churn": 4.0, "s_noise": 1.007}],
    "unipc": [{}, {"order": 2}],
}


def make_schedule(name: str) -> schedules.Schedule:
    return build(schedules.registry, Spec(name, SCHEDULE_OPTIONS.get(name, {})))


def schedule_numbers(name: str) -> list[float]:
    """Return a schedule's log-SNRs at U."""
    return make_schedule(name)(torch.tensor(U, dtype=torch.float64)).tolist()


def discretization_numbers(name: str, sampler: str) -> dict:
    """Return the kind, the options, the ends and the number of points of a default."""
    schedule = make_schedule(name)
    spec = default_discretization(schedule, name, Spec(sampler))
    points = grids.registry[spec.name](schedule, STEPS, **spec.options)
    return {
        "name": spec.name,
        "options": dict(spec.options),
        "first": float(points[0]),
        "last_finite": float(points[points.isfinite()][-1]),
        "ends_clean": bool(points[-1].isinf()),
        "points": len(points),
    }


def sampler_numbers(name: str) -> list[dict]:
    """Return what a sampler makes of three values of a mixture of two Gaussians, by its options."""
    denoise = mixture([-0.6, 0.5], 0.2, [0.3, 0.7])
    z = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64).reshape(1, 1, 1, 3)
    points = grids.even(schedules.cosine(64, 32), STEPS)
    results = []
    for options in SAMPLER_OPTIONS.get(name, [{}]):
        run = samplers.registry[name]
        arguments = dict(options)
        if "noise" in inspect.signature(run).parameters:
            arguments["noise"] = lambda i, z: torch.cos(7.0 * i + 3.0 * torch.arange(3.0)).to(z)
        x = run(denoise, z, points, Cond(), **arguments)
        results.append({"options": options, "x": x.flatten().tolist()})
    return results


def record() -> None:
    """Write both files."""
    numbers = {
        "schedules": {name: schedule_numbers(name) for name in schedules.registry},
        "discretizations": {
            name: {s: discretization_numbers(name, s) for s in ("ddim", "heun")}
            for name in schedules.registry
        },
    }
    (GOLDEN / "schedules.json").write_text(json.dumps(numbers, indent=1) + "\n")
    numbers = {name: sampler_numbers(name) for name in samplers.registry}
    (GOLDEN / "samplers.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    record()
