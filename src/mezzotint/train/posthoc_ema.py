"""Post-hoc EMA: averages of any width from snapshots of power-function averages (EDM2).

EDM2 section 3.2 and appendix C.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.core.tensor_files import open_safetensors, save_tensors
from mezzotint.models import check_model_folder, load_model, save_model
from mezzotint.process.denoiser import Model
from mezzotint.train.ema import Weights, power_gamma


class Snapshot(NamedTuple):
    """A power-function average on disk, of relative width `std` at `images` seen."""

    images: int
    std: float
    path: Path


def write_snapshot(run: Path, weights: Weights, images: int, std: float) -> None:
    """Write ema/IMAGES-STD.safetensors, float32, atomically."""
    (run / "ema").mkdir(exist_ok=True)
    save_tensors(weights, snapshot_path(run, images, std))


def snapshot_path(run: Path, images: int, std: float) -> Path:
    """Return the path of the snapshot of relative width `std` at `images` seen."""
    return run / "ema" / f"{images:012d}-{std:g}.safetensors"


def list_snapshots(run: Path) -> list[Snapshot]:
    """Return a run's snapshots, oldest first."""
    snapshots = []
    for path in sorted((run / "ema").glob("*-*.safetensors")):
        # Other files are not ours, e.g. a copy of one under another name.
        if name := re.fullmatch(r"(\d+)-(\d+(?:\.\d+)?(?:e-\d+)?)", path.stem, re.ASCII):
            snapshots.append(Snapshot(int(name[1]), float(name[2]), path))
    return snapshots


def profile_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """Return the inner product over t of the profiles p(t; t_a, gamma_a) and p(t; t_b, gamma_b).

    p(t; T, gamma) = (gamma + 1) t^gamma / T^(gamma + 1) up to T, then 0, is the share of the
    weights of time t in the average at T (EDM2 eq. 3 normalised to integral 1). All broadcast,
    float64.
    """
    # EDM2 appendix C: the integral to min(t_a, t_b) of the product of two powers
    first = torch.minimum(t_a, t_b)
    powers = gamma_b * torch.log(first / t_b) + gamma_a * torch.log(first / t_a)
    shorter = first / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shorter * powers.exp()


def solve_coefficients(
    snapshots: list[tuple[int, float]], images: int, std: float
) -> tuple[Tensor, float]:
    """Return factors on snapshots whose sum is nearest to the average of width `std` at `images`.

    Args:
        snapshots: (images, std) each.

    Returns: the factors, (n,) float64 of sum 1, and the distance of the sum's profile from the
        wanted one, relative to the length of the wanted one.
    """
    t = torch.tensor([float(i) for i, _ in snapshots], dtype=torch.float64)
    gamma = torch.tensor([power_gamma(s) for _, s in snapshots], dtype=torch.float64)
    target_t = torch.tensor(float(images), dtype=torch.float64)
    target_gamma = torch.tensor(power_gamma(std), dtype=torch.float64)
    # EDM2 appendix C: min over x of || p - sum_i x_i p_i ||^2 is A x = b with A_ij = <p_i, p_j>,
    # b_i = <p_i, p>
    A = profile_product(t[:, None], gamma[:, None], t, gamma)
    b = profile_product(t, gamma, target_t, target_gamma)
    # Neighbouring snapshots are nearly parallel: unit diagonal, then solve by singular values.
    length = A.diagonal().sqrt()
    unit_A, unit_b = A / (length[:, None] * length), b / length
    x = torch.linalg.lstsq(unit_A, unit_b[:, None], driver="gelsd").solution[:, 0] / length
    # EDM2's released phema.py: the factors of an average sum to 1, so that constant weights stay.
    x = x / x.sum()
    wanted = profile_product(target_t, target_gamma, target_t, target_gamma)
    square = wanted - 2 * (x @ b) + x @ A @ x
    return x, float((square.clamp(min=0) / wanted).sqrt())


class Reconstruction(NamedTuple):
    """A reconstructed average.

    sources: the snapshots it is a sum of.
    distance: of its profile from the wanted one, see `solve_coefficients`.
    """

    weights: Weights
    images: int
    sources: list[Snapshot]
    distance: float


def reconstruct(run: Path, std: float, images: int | None = None) -> Reconstruction:
    """Reconstruct the power-function average of relative width `std` at `images` seen.

    Args:
        images: of the newest snapshot by default.

    Errors: ValueError for a run without snapshots up to `images`, or a width outside (0, 0.2887).
    """
    power_gamma(std)  # refuses a width outside its range before anything is read
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(
            f"{run} has no snapshots in ema/; train with e.g. ema.power_stds=[0.05,0.10]"
        )
    first, last = snapshots[0].images, snapshots[-1].images
    images = last if images is None else images
    sources = [s for s in snapshots if s.images <= images]
    if not sources or images > last:
        raise ValueError(f"{run} has snapshots from {first:,} to {last:,} images, not {images:,}")
    x, distance = solve_coefficients([(s.images, s.std) for s in sources], images, std)
    weights: dict[str, Any] = {}
    for factor, snapshot in zip(x.tolist(), sources, strict=True):
        file = open_safetensors(snapshot.path)
        for name in file.claims:
            part = factor * file.read(name).double()
            weights[name] = part if name not in weights else weights[name] + part
    return Reconstruction({k: w.float() for k, w in weights.items()}, images, sources, distance)


def reconstruct_model(
    run: Path, std: float, images: int | None = None
) -> tuple[Model, Reconstruction]:
    """Return the run's model with a reconstructed average as its weights."""
    rebuilt = reconstruct(run, std, images)
    model = load_model(run / "model")
    # The factors sum to 1 up to rounding only, and parameters that do not train stay bit for bit.
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    averaged = {name: weight for name, weight in rebuilt.weights.items() if name in trained}
    model.backbone.load_state_dict({**model.backbone.state_dict(), **averaged})
    extra = {**model.info.extra, "ema_width": std}
    model.info = dataclasses.replace(model.info, images=rebuilt.images, extra=extra)
    return model, rebuilt


def save_reconstruction(
    run: Path, std: float, images: int | None = None, out: Path | None = None
) -> tuple[Path, Reconstruction]:
    """Write a reconstructed model as a model folder; return its path and the reconstruction.

    Args:
        out: the folder; RUN/model-STD by default.
    """
    folder = out or run / f"model-{std:g}"
    check_model_folder(folder)
    model, rebuilt = reconstruct_model(run, std, images)
    save_model(model, folder)
    return folder, rebuilt
