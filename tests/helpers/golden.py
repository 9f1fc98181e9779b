"""Golden numbers of the networks and the wavelet, from weights and inputs that are formulas.

`PYTHONPATH=tests python -m helpers.golden --record` writes tests/golden/backbones.json. Do so only
where outputs are meant to change; tests/backbones/test_golden.py compares with that file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mezzotint as mz
from mezzotint.backbones import text_width
from mezzotint.backbones.wavelet import dwt53

FILE = Path(__file__).parents[1] / "golden" / "backbones.json"
PRESETS = sorted(name for name in mz.presets() if name.endswith("-tiny"))


def formula(*shape: int, seed: int) -> Tensor:
    """Return sin(0.7 i + 0.01 i² + seed), float64: numbers that need no random generator."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * i + 0.01 * i**2 % (2 * torch.pi) + seed).reshape(shape)


def make_model(preset: str) -> mz.Model:
    """Return a preset in float64 whose every trained weight comes from a formula."""
    model = mz.create_model(preset).eval().double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.backbone.parameters()):
            if parameter.requires_grad:
                fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
                parameter.copy_(formula(*parameter.shape, seed=seed) / fan_in**0.5)
    return model


def run_model(preset: str) -> Tensor:
    """Return the finest output for two images at two noise levels, with labels or text."""
    model = make_model(preset)
    c = model.info.config
    z = formula(2, c.channels, c.size, c.size, seed=1)
    cond = mz.Cond(label=torch.tensor([0, c.num_classes - 1]) if c.num_classes else None)
    if width := text_width(c):
        mask = torch.tensor([[True, True, True], [True, False, False]])
        cond = mz.Cond(text=formula(2, 3, width, seed=2), text_mask=mask)
    with torch.no_grad():
        return model.raw(z, torch.tensor([-3.0, 2.0], dtype=torch.float64), cond)[-1]


def run_wavelet() -> Tensor:
    """Return two levels of the transform of a 16 x 8 image."""
    return dwt53(formula(1, 2, 16, 8, seed=3), 2)


def summarise(out: Tensor) -> dict[str, Any]:
    """Return the shape, the root mean square and 12 values spread over the output."""
    flat = out.flatten()
    index = torch.linspace(0, len(flat) - 1, 12, dtype=torch.float64).long()
    rms = float(flat.square().mean().sqrt())
    return {"shape": list(out.shape), "rms": rms, "values": flat[index].tolist()}


def measure() -> dict[str, dict[str, Any]]:
    """Return the summary of every tiny preset and of the wavelet."""
    return {"wavelet": summarise(run_wavelet())} | {p: summarise(run_model(p)) for p in PRESETS}


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        raise SystemExit(__doc__)
    FILE.write_text(json.dumps(measure(), indent=1) + "\n")
