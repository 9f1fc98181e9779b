"""Averages of the weights against closed forms; reconstructed widths against tracked ones."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import assert_same_tensors, small
from mezzotint.config import Ema
from mezzotint.models import load_model
from mezzotint.train import ema, posthoc_ema
from mezzotint.train.loop import train

BATCH = 16


def walk(steps, seed=0):
    """A random walk of weights, so that averages of different widths differ."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 50, generator=draw, dtype=torch.float64).cumsum(0)


def tracked(path, beta):
    """The average after each row of `path`, with decay beta(k) at step k = 1, 2, ..."""
    average = {"w": torch.zeros(path.shape[1], dtype=torch.float64)}
    result = []
    for k, row in enumerate(path, 1):
        ema.update(average, {"w": row}, beta(k))
        result.append(average["w"].clone())
    return torch.stack(result)


def test_exponential_average_against_the_closed_form():
    settings = Ema(half_life_images=1000, rampup=None)
    path = walk(300)
    average = tracked(path, lambda k: ema.exponential_beta(settings, k * BATCH, BATCH))
    # sum over k of (1 - beta) beta^(n - k) w_k, with beta^(1000 / 16) = 1/2
    beta = 0.5 ** (BATCH / 1000)
    factors = (1 - beta) * beta ** torch.arange(299, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(average[-1], factors @ path, rtol=1e-10, atol=1e-10)


def test_exponential_average_of_constant_weights_nears_them_by_half_each_half_life():
    settings = Ema(half_life_images=64, rampup=None)
    average = tracked(
        torch.ones(16, 1, dtype=torch.float64), lambda k: ema.exponential_beta(settings, k * 16, 16)
    )
    torch.testing.assert_close(
        1 - average[[3, 7, 11], 0], torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    )


def test_exponential_half_life_ramps_up_with_the_run():
    settings = Ema(half_life_images=1000, rampup=0.05)
    assert ema.exponential_beta(settings, 2100, 100) == pytest.approx(
        0.5
    )  # half-life 100 images, of 2000 before
    assert (
        ema.exponential_beta(settings, 100, 100) == 0
    )  # nothing was seen before, so nothing is kept
    assert ema.exponential_beta(settings, 10**6, 100) == pytest.approx(0.5**0.1)


def test_no_average_depends_on_the_batch_size():
    """Weights step from 0 to 1 after 2048 images; at 4096 the averages of both batches agree."""
    for settings in (
        Ema(half_life_images=1000, rampup=None),
        Ema(half_life_images=1000, rampup=0.05),
    ):
        ends = []
        for batch in (8, 32):
            step = torch.cat([torch.zeros(2048 // batch, 1), torch.ones(2048 // batch, 1)]).double()
            beta = lambda k, b=batch, s=settings: ema.exponential_beta(s, k * b, b)  # noqa: E731
            ends.append(float(tracked(step, beta)[-1, 0]))
        assert ends[0] == pytest.approx(ends[1], rel=1e-2)


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_matches_the_papers_values(std, gamma):
    assert ema.power_gamma(std) == pytest.approx(gamma, abs=0.005)  # EDM2 section 3.1


@pytest.mark.parametrize("std", [0.03, 0.1, 0.25])
def test_the_profile_has_the_requested_width(std):
    gamma = ema.power_gamma(std)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p = (gamma + 1) * t**gamma / len(t)
    mean = (p * t).sum()
    assert float(p.sum()) == pytest.approx(1, rel=1e-6)
    assert float((p * (t - mean) ** 2).sum().sqrt()) == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_average_against_its_profile(std):
    path = walk(2000)
    average = tracked(path, lambda k: ema.power_beta(std, k * BATCH, BATCH))[-1]
    # integral of (gamma + 1) t^gamma / T^(gamma + 1) over each step
    edges = torch.arange(2001, dtype=torch.float64) / 2000
    factors = (edges ** (ema.power_gamma(std) + 1)).diff()
    torch.testing.assert_close(average, factors @ path, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", [0.0, 0.29, -1.0])
def test_a_width_outside_the_range_is_refused(std):
    with pytest.raises(ValueError, match=r"0\.2887"):
        ema.power_gamma(std)


def test_profile_products_against_quadrature():
    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000 * 5
    cases = [
        (5.0, 6.9, 3.0, 17.0),
        (3.0, 17.0, 5.0, 6.9),
        (4.0, 2.0, 4.0, 2.0),
        (1.0, 0.5, 5.0, 0.0),
    ]
    for t_a, g_a, t_b, g_b in cases:
        a = torch.where(t <= t_a, (g_a + 1) * t**g_a / t_a ** (g_a + 1), 0.0)
        b = torch.where(t <= t_b, (g_b + 1) * t**g_b / t_b ** (g_b + 1), 0.0)
        numbers = [torch.tensor(v, dtype=torch.float64) for v in (t_a, g_a, t_b, g_b)]
        assert float(posthoc_ema.profile_product(*numbers)) == pytest.approx(
            float((a * b).sum() * 5 / 400_000), rel=1e-4
        )


@pytest.fixture(scope="module")
def two_widths():
    """Snapshots of widths 0.05 and 0.10, 32 of each: (path, [(images, std)], averages)."""
    steps, every = 4096, 128
    path = walk(steps)
    averages = {
        w: tracked(path, lambda k, w=w: ema.power_beta(w, k * BATCH, BATCH)) for w in (0.05, 0.10)
    }
    kept = [(k * BATCH, w) for k in range(every, steps + 1, every) for w in averages]
    return path, kept, torch.stack([averages[w][images // BATCH - 1] for images, w in kept])


@pytest.mark.parametrize("std", [0.04, 0.05, 0.07, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("steps", [4096, 2048])
def test_any_width_from_two_tracked_ones(two_widths, std, steps):
    """At the end of the run and halfway; the tracked widths are reproduced exactly."""
    path, kept, averages = two_widths
    until = [i for i, (images, _) in enumerate(kept) if images <= steps * BATCH]
    x, distance = posthoc_ema.solve_coefficients([kept[i] for i in until], steps * BATCH, std)
    rebuilt = x @ averages[until]
    direct = tracked(path[:steps], lambda k: ema.power_beta(std, k * BATCH, BATCH))[-1]
    error = float((rebuilt - direct).norm() / direct.norm())
    exact = std in (0.05, 0.1)
    assert error < (1e-12 if exact else 3e-3)
    assert distance < (1e-6 if exact else 0.03)


def few_snapshots(path, count):
    """`count` snapshots, half of width 0.05 and half of 0.10: [(images, std)], averages."""
    every = 2 * len(path) // count
    averages = {
        w: tracked(path, lambda k, w=w: ema.power_beta(w, k * BATCH, BATCH)) for w in (0.05, 0.10)
    }
    kept = [(k * BATCH, w) for k in range(every, len(path) + 1, every) for w in averages]
    return kept, torch.stack([averages[w][images // BATCH - 1] for images, w in kept])


# Measured relative errors are 0.4 to 0.9 of these; without the sum of 1 they are 2.6 to 10 times
# larger.
@pytest.mark.parametrize(
    ("count", "std", "largest"),
    [
        (4, 0.07, 8e-3), (4, 0.15, 2.5e-2), (8, 0.07, 4e-3), (8, 0.15, 8e-3), (16, 0.07, 6e-4),
        (16, 0.15, 1.5e-3),
    ],
)  # fmt: skip
def test_few_snapshots_come_near_the_tracked_average(count, std, largest):
    """Weights of length 3 that move by about 1 during training."""
    draw = torch.Generator().manual_seed(1)
    path = walk(2048) / 2048**0.5 + 3 * torch.randn(50, generator=draw, dtype=torch.float64)
    kept, averages = few_snapshots(path, count)
    x, _ = posthoc_ema.solve_coefficients(kept, 2048 * BATCH, std)
    direct = tracked(path, lambda k: ema.power_beta(std, k * BATCH, BATCH))[-1]
    assert float((x @ averages - direct).norm() / direct.norm()) < largest


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("std", [0.03, 0.07, 0.1, 0.15, 0.2])
def test_coefficients_are_edm2s(count, std):
    """EDM2's released code solves the system and divides by the sum of its solution."""
    kept, _ = few_snapshots(walk(64), count)
    t = torch.tensor([float(i) for i, _ in kept], dtype=torch.float64)
    gamma = torch.tensor([ema.power_gamma(s) for _, s in kept], dtype=torch.float64)
    last, wanted = t[-1], torch.tensor(ema.power_gamma(std), dtype=torch.float64)
    A = posthoc_ema.profile_product(t[:, None], gamma[:, None], t, gamma)
    solution = torch.linalg.solve(A, posthoc_ema.profile_product(t, gamma, last, wanted))
    x, _ = posthoc_ema.solve_coefficients(kept, int(last), std)
    torch.testing.assert_close(x, solution / solution.sum(), rtol=1e-6, atol=1e-8)
    assert float(x.sum()) == pytest.approx(1, abs=1e-12)


def test_more_snapshots_reduce_the_distance():
    distances = [
        posthoc_ema.solve_coefficients(
            [(i * 4096 // n, w) for i in range(1, n + 1) for w in (0.05, 0.1)], 4096, 0.15
        )[1]
        for n in (4, 8, 16, 32)
    ]
    assert all(b < a for a, b in pairwise(distances))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run with snapshots of three widths; the third is the reference of a reconstruction."""
    torch.set_num_threads(1)
    recipe = small(
        "batch=4", "images=160", "ema.power_stds=[0.05,0.1,0.15]", "ema.snapshot_every_images=8",
        "optim.lr=3e-3", "save.every_images=80", "samples.every_images=1000",
        "optim.warmup_images=0",
    )  # fmt: skip
    return train(recipe, tmp_path_factory.mktemp("averaged") / "run", quiet=True)


def test_a_run_saves_snapshots_at_the_recipes_interval(averaged):
    kept = posthoc_ema.list_snapshots(averaged)
    assert [s.images for s in kept if s.std == 0.05] == list(range(8, 161, 8))
    assert {s.std for s in kept} == {0.05, 0.1, 0.15}


@pytest.mark.parametrize(
    "name",
    ["best-0.05", "000000000080-best", "-0.05", "80-", "80-0.05-copy", "80-0.05 (1)", "8e1-0.05",
     "80--0.05", "80-nan", "80-inf", "\u0668\u0660-0.05", "80_000-0.05", "80-0.05-2", "80-0.05e",
     "80-0.0.5", "80-1-2-3"],
)  # fmt: skip
def test_other_files_beside_the_snapshots_are_passed_over(averaged, tmp_path, name):
    kept = posthoc_ema.list_snapshots(averaged)
    shutil.copytree(averaged / "ema", tmp_path / "ema")
    shutil.copy(kept[0].path, tmp_path / "ema" / f"{name}.safetensors")
    listed = posthoc_ema.list_snapshots(tmp_path)
    assert [(s.images, s.std, s.path.name) for s in listed] == [
        (s.images, s.std, s.path.name) for s in kept
    ]


@pytest.mark.parametrize("std", [0.05, 0.1, 1e-5, 0.123456, 0.25])
def test_a_snapshot_of_any_width_is_listed(tmp_path, std):
    path = posthoc_ema.snapshot_path(tmp_path, 160, std)
    path.parent.mkdir()
    path.touch()
    assert posthoc_ema.list_snapshots(tmp_path) == [(160, std, path)]


def test_a_reconstructed_average_is_close_to_a_tracked_one(averaged):
    direct = load_file(posthoc_ema.snapshot_path(averaged, 160, 0.15))
    hidden = averaged / "hidden"
    hidden.mkdir()
    for snapshot in posthoc_ema.list_snapshots(averaged):
        if snapshot.std == 0.15:
            snapshot.path.rename(hidden / snapshot.path.name)
    try:
        folder, rebuilt = posthoc_ema.save_reconstruction(averaged, 0.15)
        assert len(rebuilt.sources) == 40
        model = load_model(folder)
        assert model.info.extra["ema_width"] == 0.15
        assert model.info.images == 160
        state = model.backbone.state_dict()
        moved = load_file(averaged / "model" / "model.safetensors")
        gap = math.sqrt(sum(float((state[k] - direct[k]).square().sum()) for k in direct))
        scale = math.sqrt(sum(float((moved[k] - direct[k]).square().sum()) for k in direct))
        assert gap < 0.03 * scale  # of the distance between this average and the exponential one
        with pytest.raises(ValueError, match=r"8 to 160 images, not 4"):
            posthoc_ema.reconstruct(averaged, 0.1, 4)
    finally:
        for path in hidden.iterdir():
            path.rename(averaged / "ema" / path.name)


def test_parameters_that_do_not_train_are_not_reconstructed(averaged, monkeypatch):
    """They stay bit for bit; a sum of snapshots would round them."""
    real = posthoc_ema.load_model

    def frozen(folder):
        model = real(folder)
        next(model.backbone.parameters()).requires_grad_(False)
        return model

    monkeypatch.setattr(posthoc_ema, "load_model", frozen)
    model, rebuilt = posthoc_ema.reconstruct_model(averaged, 0.2)
    kept = load_file(averaged / "model" / "model.safetensors")
    (fixed, trained), state = list(rebuilt.weights)[:2], model.backbone.state_dict()
    first = next(name for name, _ in model.backbone.named_parameters())
    assert torch.equal(state[first], kept[first])
    other = trained if fixed == first else fixed
    assert torch.equal(state[other], rebuilt.weights[other])


def test_a_tracked_width_is_reconstructed_exactly(averaged):
    rebuilt = posthoc_ema.reconstruct(averaged, 0.05, 80)
    direct = load_file(posthoc_ema.snapshot_path(averaged, 80, 0.05))
    for name, tensor in direct.items():
        torch.testing.assert_close(rebuilt.weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_snapshots_after_a_resume_are_the_same(averaged, tmp_path):
    recipe = [
        "batch=4", "ema.power_stds=[0.05,0.1,0.15]", "ema.snapshot_every_images=8", "optim.lr=3e-3",
        "save.every_images=80", "samples.every_images=1000", "optim.warmup_images=0",
    ]  # fmt: skip
    train(small(*recipe, "images=80"), tmp_path / "run", quiet=True)
    train(small(*recipe, "images=160"), tmp_path / "run", quiet=True)
    for snapshot in posthoc_ema.list_snapshots(averaged):
        again = posthoc_ema.snapshot_path(tmp_path / "run", snapshot.images, snapshot.std)
        assert_same_tensors(load_file(snapshot.path), load_file(again))


def test_a_run_without_snapshots_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"ema\.power_stds"):
        posthoc_ema.reconstruct(tmp_path, 0.1)
