"""Compare predictions of x, eps and v where the data fill few of many dimensions.

    OMP_NUM_THREADS=1 python benchmarks/prediction_toy.py

A spiral of 2 dimensions lies in 2, 8, 16 and 512 dimensions by a random matrix of orthonormal
columns. A perceptron of five layers of width 256 learns it, and predicts x, eps or v; the loss is
that of v for all three (JiT, arXiv 2511.13720, section 3). It takes minutes on one core. Writes
benchmarks/results/prediction-toy.json and docs/images/prediction-toy.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from common import RESULTS, one_thread, write

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "prediction-toy.png"
DIMENSIONS, PREDICTIONS = (2, 8, 16, 512), ("x", "eps", "v")
WIDTH, LAYERS, BATCH, RATE = 256, 5, 256, 1e-3
MIN_TIME = 0.05  # the least t or 1 - t to divide by, as JiT clamps 1 - t
SAMPLES, STEPS = 1000, 250


def draw_spiral(count: int, generator: torch.Generator) -> Tensor:
    """Return points (count, 2) of a spiral of two turns, of about unit variance."""
    turn = torch.rand(count, generator=generator).sqrt() * 4 * math.pi
    points = torch.stack([turn.cos(), turn.sin()], dim=1) * turn[:, None] / (2 * math.pi)
    return points + 0.02 * torch.randn(count, 2, generator=generator)


class Perceptron(nn.Module):
    """Map noised points (b, d) and times (b, 1) to predictions (b, d)."""

    def __init__(self, dimensions: int):
        super().__init__()
        widths = [dimensions + 1, *[WIDTH] * (LAYERS - 1)]
        hidden = [
            layer
            for first, second in itertools.pairwise(widths)
            for layer in (nn.Linear(first, second), nn.ReLU())
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH, dimensions))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the network's output."""
        return self.layers(torch.cat([z, t], dim=1))


def to_velocity(prediction: str, value: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return v = x - eps at z = t x + (1 - t) eps, from a value of x, eps or v."""
    # JiT table 1: what v is for each prediction.
    if prediction == "x":
        return (value - z) / (1 - t).clamp(min=MIN_TIME)
    if prediction == "eps":
        return (z - value) / t.clamp(min=MIN_TIME)
    return value


def train_network(
    prediction: str, basis: Tensor, steps: int, generator: torch.Generator
) -> Perceptron:
    """Return a network trained on the spiral in the space that `basis` (d, 2) spans."""
    torch.manual_seed(0)
    network = Perceptron(len(basis))
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x = draw_spiral(BATCH, generator) @ basis.T
        eps = torch.randn(x.shape, generator=generator)
        t = torch.rand(BATCH, 1, generator=generator)
        z = t * x + (1 - t) * eps
        truth = {"x": x, "eps": eps, "v": x - eps}[prediction]
        found, target = (to_velocity(prediction, value, z, t) for value in (network(z, t), truth))
        loss = (found - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


@torch.no_grad()
def sample_points(network: Perceptron, prediction: str, noise: Tensor) -> Tensor:
    """Return samples (n, d) by Heun's method, Euler's in the last step."""
    z = noise
    times = torch.linspace(0, 1, STEPS + 1)
    for k, (first, second) in enumerate(itertools.pairwise(times)):
        t, s = (torch.full((len(z), 1), float(value)) for value in (first, second))
        v = to_velocity(prediction, network(z, t), z, t)
        ahead = z + (s - t) * v
        if k < STEPS - 1:
            v = (v + to_velocity(prediction, network(ahead, s), ahead, s)) / 2
        z = z + (s - t) * v
    return z


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return the energy distance of two sets of points, 0 for equal distributions."""
    between = torch.cdist(a, b).mean()
    return float(2 * between - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main() -> None:
    """Train, sample, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--out", type=Path, default=RESULTS / "prediction-toy.json")
    parser.add_argument("--image", type=Path, default=IMAGE)
    given = parser.parse_args()
    one_thread()
    rows = []
    figure, axes = plt.subplots(
        len(PREDICTIONS), len(DIMENSIONS), figsize=(7.2, 5.4), sharex=True, sharey=True
    )
    for column, dimensions in enumerate(DIMENSIONS):
        generator = torch.Generator().manual_seed(dimensions)
        square = torch.randn(dimensions, 2, generator=generator)
        basis = torch.linalg.qr(square).Q
        real = draw_spiral(SAMPLES, generator)
        other = energy_distance(draw_spiral(SAMPLES, generator), real)
        for line, prediction in enumerate(PREDICTIONS):
            network = train_network(prediction, basis, given.steps, generator)
            noise = torch.randn(SAMPLES, dimensions, generator=generator)
            points = sample_points(network, prediction, noise)
            plane = points @ basis
            beside = (points - plane @ basis.T).square().sum(1).mean().sqrt()
            rows.append(
                {
                    "dimensions": dimensions,
                    "prediction": prediction,
                    "energy_distance": energy_distance(plane, real),
                    "of_real_points": other,
                    "rms_beside_the_plane": float(beside),
                }
            )
            print(rows[-1], flush=True)
            axis = axes[line, column]
            axis.scatter(*plane.T, s=1, color="#c8693c", linewidths=0)
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            if line == 0:
                axis.set_title(f"{dimensions} dimensions", fontsize=9)
            if column == 0:
                axis.set_ylabel(f"predicts {prediction}", fontsize=9)
    figure.tight_layout()
    given.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.image, dpi=130)
    write(given.out, "cpu", steps=given.steps, batch=BATCH, rows=rows)


if __name__ == "__main__":
    main()
