"""Metrics against closed forms, numpy in float64, and torchmetrics."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mezzotint.evaluate.bootstrap import bootstrap
from mezzotint.evaluate.kid import kid, squared_mmd
from mezzotint.evaluate.metrics import Gaussian, Moments, fdr, frechet_distance, inception_score
from mezzotint.evaluate.precision_recall import (
    density_coverage,
    nearest_neighbours,
    precision_recall,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def spd(d, seed=0, rank=None):
    a = rng(seed).normal(size=(d, rank or 2 * d))
    return a @ a.T / a.shape[1]


# --- Fréchet distance -----------------------------------------------------------------------------


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.25])
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    q, _ = np.linalg.qr(rng().normal(size=(3, 3)))
    want = 1 + 4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(want, rel=1e-13)
    turned = frechet_distance(q @ mu1, q @ np.diag(a) @ q.T, q @ mu2, q @ np.diag(b) @ q.T)
    assert turned == pytest.approx(want, rel=1e-12)


def test_frechet_in_two_dimensions_without_commuting():
    # For 2x2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), with M = S1 S2.
    s1, s2 = spd(2, 1), spd(2, 2)
    m = s1 @ s2
    want = np.trace(s1) + np.trace(s2) - 2 * np.sqrt(np.trace(m) + 2 * np.sqrt(np.linalg.det(m)))
    assert frechet_distance(np.zeros(2), s1, np.zeros(2), s2) == pytest.approx(want, rel=1e-12)


def test_frechet_against_the_general_eigenvalues():
    s1, s2, mu = spd(40, 1), spd(40, 2), rng(3).normal(size=40)
    cross = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
    want = mu @ mu + np.trace(s1) + np.trace(s2) - 2 * cross
    got = frechet_distance(
        torch.from_numpy(mu), torch.from_numpy(s1), torch.zeros(40), torch.from_numpy(s2)
    )
    assert got == pytest.approx(want, rel=1e-11)
    assert got == pytest.approx(frechet_distance(np.zeros(40), s2, mu, s1), rel=1e-12)  # symmetric


def test_frechet_of_singular_covariances():
    d = 50
    same = spd(d, 1, rank=7)
    assert frechet_distance(np.ones(d), same, np.ones(d), same) < 1e-11
    # Orthogonal ranges: the product vanishes and the traces add.
    left, right = np.diag([1.0, 2.0, 0, 0]), np.diag([0, 0, 3.0, 4.0])
    assert frechet_distance(np.zeros(4), left, np.zeros(4), right) == pytest.approx(10, rel=1e-14)
    assert frechet_distance(np.zeros(4), np.zeros((4, 4)), np.zeros(4), left) == pytest.approx(
        3, rel=1e-14
    )
    # Rank one: tr sqrt(aa^T bb^T) = |a.b|.
    a, b = rng(4).normal(size=(2, d))
    want = a @ a + b @ b - 2 * abs(a @ b)
    assert frechet_distance(
        np.zeros(d), np.outer(a, a), np.zeros(d), np.outer(b, b)
    ) == pytest.approx(want, rel=1e-10)


def test_frechet_of_fewer_images_than_dimensions_ignores_rounding():
    """Another order of the images changes a singular covariance by 1e-16, not the distance."""
    x, y = rng(5).normal(size=(20, 100)), 2 + rng(6).normal(size=(30, 100))
    values = []
    for order in range(3):
        xs, ys = rng(order).permutation(x), rng(order).permutation(y)
        values.append(frechet_distance(xs.mean(0), np.cov(xs.T), ys.mean(0), np.cov(ys.T)))
    # The product of the centred data has the needed singular values, without any covariance.
    xc, yc = (x - x.mean(0)) / np.sqrt(19), (y - y.mean(0)) / np.sqrt(29)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc**2).sum() + (yc**2).sum()
    want -= 2 * np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
    np.testing.assert_allclose(values, want, rtol=1e-11)


def test_frechet_is_invariant_to_rotation_and_shift_and_scales_with_the_square():
    s1, s2 = spd(12, 1), spd(12, 2)
    mu1, mu2 = rng(3).normal(size=(2, 12))
    q, _ = np.linalg.qr(rng(4).normal(size=(12, 12)))
    want = frechet_distance(mu1, s1, mu2, s2)
    assert frechet_distance(q @ mu1 + 5, q @ s1 @ q.T, q @ mu2 + 5, q @ s2 @ q.T) == pytest.approx(
        want, rel=1e-11
    )
    assert frechet_distance(3 * mu1, 9 * s1, 3 * mu2, 9 * s2) == pytest.approx(9 * want, rel=1e-11)


@pytest.mark.parametrize(
    ("mu", "cov", "named"),
    [
        (np.zeros(3), np.eye(4), "4 and 3 dimensions"),
        (np.zeros(3), np.full((3, 3), np.nan), "NaN"),
        (np.array([0, np.inf, 0]), np.eye(3), "NaN"),
        (np.zeros(3), -np.eye(3), "positive semidefinite"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "not symmetric"),
        (np.zeros(3), np.ones(3), r"\(3,\)"),
        (np.zeros(2), np.eye(3), r"\(2,\) and \(3,\)"),
    ],
)
def test_frechet_refuses_bad_means_and_covariances(mu, cov, named):
    with pytest.raises(ValueError, match=named):
        frechet_distance(mu, cov, np.zeros(3), np.eye(3))


def test_frechet_against_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).double()

    metric = fid.FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    g = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 2, 2), generator=g, dtype=torch.uint8)
    fake = torch.randint(30, 200, (70, 3, 2, 2), generator=g, dtype=torch.uint8)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = Gaussian.of(Moments.of(real.flatten(1))).distance(
        Gaussian.of(Moments.of(fake.flatten(1)))
    )
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


# --- moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_moments_agree_over_batches_order_and_ranks(offset, batch):
    x = rng().normal(size=(500, 9)) * np.arange(1, 10) + offset
    shuffled = torch.from_numpy(rng(1).permutation(x))
    parts = [Moments.of(b) for b in shuffled.split(batch)]
    in_order = sum(parts[1:], parts[0])
    ranks = [sum(parts[r + 2 :: 2], parts[r]) for r in range(min(2, len(parts)))]
    merged = sum(ranks[1:], ranks[0])
    for moments in (in_order, merged):
        assert moments.n == 500
        np.testing.assert_allclose(moments.mean.cpu(), x.mean(0), rtol=1e-13, atol=1e-10)
        np.testing.assert_allclose(
            moments.cov.cpu(), np.cov(x.T), rtol=0, atol=1e-8 if offset else 1e-10
        )


def test_bad_moments_are_refused():
    with pytest.raises(ValueError, match="there is 1"):
        _ = Moments.of(np.zeros((1, 3))).cov
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        Moments.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="3 and of 4"):
        _ = Moments.of(np.zeros((2, 3))) + Moments.of(np.zeros((2, 4)))
    with pytest.warns(UserWarning, match="5 images in 8 dimensions"):
        Gaussian.of(Moments.of(rng().normal(size=(5, 8))))


def test_gaussian_distance_is_the_function():
    x, y = rng(1).normal(size=(50, 6)), rng(2).normal(size=(40, 6)) + 1
    a, b = Gaussian.of(Moments.of(x)), Gaussian.of(Moments.of(y))
    want = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert a.distance(b) == pytest.approx(want, rel=1e-12)


# --- Inception Score and FDr ----------------------------------------------------------------------


def test_inception_score_of_known_posteriors():
    uniform = np.zeros((30, 8))
    assert inception_score(uniform).mean == pytest.approx(1, rel=1e-14)
    certain = 1e3 * np.eye(8)[np.arange(32) % 8]
    assert inception_score(certain).mean == pytest.approx(8, rel=1e-12)
    # Two images, (p, 1-p) and (1-p, p): exp(log 2 - entropy).
    p = 0.9
    logits = np.log([[p, 1 - p], [1 - p, p]])
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert inception_score(logits).mean == pytest.approx(2 * np.exp(-entropy), rel=1e-13)


def test_inception_score_of_splits():
    logits = rng().normal(size=(50, 10)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [
        np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean())
        for q in (p[:20], p[20:40], p[40:])
    ]
    mean, std = inception_score(
        logits + 7, split_size=20
    )  # a constant added to logits changes nothing
    assert (mean, std) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert np.isnan(inception_score(logits).std)


def test_fdr():
    assert fdr(6.0, 3.0) == 2.0
    with pytest.raises(ValueError, match="the second > 0"):
        fdr(1.0, 0.0)


# --- nearest neighbours ---------------------------------------------------------------------------


def test_precision_recall_density_and_coverage_by_hand():
    # k = 1. Radii of real images: 1 of (0,0) and (1,0), 9 of (10,0).
    real = np.array([[0.0, 0], [1, 0], [10, 0]])
    fake = np.array([[0.0, 1], [0, 3], [19, 0]])
    # Precision: (0,1) is on the circle of (0,0), inside. (0,3) is 3 from (0,0), 3.16 from (1,0) and
    # 10.4 from (10,0), outside. (19,0) is on the circle of (10,0), inside. 2/3.
    # Recall: the radii of generated images are 2, 2 and 19.2. (0,0) is 1 from (0,1), (1,0) is 1.41
    # from it, (10,0) is 9 from (19,0): all inside. 1.
    assert precision_recall(real, fake, k=1) == pytest.approx((2 / 3, 1.0))
    # Density: (0,1) is in one circle, that of (0,0), since 10.05 > 9. (0,3) is in none, (19,0) in
    # one. 2/3. Coverage: (0,0) by (0,1), (10,0) by (19,0), but not (1,0), since 1.41 > 1. 2/3.
    assert density_coverage(real, fake, k=1) == pytest.approx((2 / 3, 2 / 3))


@pytest.mark.parametrize("seed", range(8))
def test_duplicates_are_in_closed_balls_of_radius_zero(seed):
    """More than k equal rows have radius 0; another equal row is inside, despite rounding."""
    point, others = 5 * rng(seed).normal(size=(1, 2048)), 5 * rng(seed + 50).normal(size=(40, 2048))
    real, fake = np.concatenate([np.repeat(point, 5, 0), others]), np.repeat(point, 7, 0)
    assert precision_recall(real, fake, k=3) == pytest.approx((1, 5 / 45))
    # From differences, so that equal rows have distance 0.
    squared = np.square(real[:, None] - real[None]).sum(2)
    inside = squared[0] <= np.sort(squared, 1)[:, 3]
    assert density_coverage(real, fake, k=3) == pytest.approx((inside.sum() / 3, inside.mean()))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_neighbour_metrics_match_numpy_for_any_block(block):
    real, fake = rng(1).normal(size=(60, 5)), 0.8 * rng(2).normal(size=(45, 5)) + 0.3

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    for k in (3, 5):
        real_radii = np.sort(distances(real, real), 1)[:, k]
        fake_radii = np.sort(distances(fake, fake), 1)[:, k]
        inside = distances(fake, real) <= real_radii
        precision, density, coverage = (
            inside.any(1).mean(),
            inside.sum() / (k * 45),
            inside.any(0).mean(),
        )
        recall = (distances(real, fake) <= fake_radii).any(1).mean()
        assert precision_recall(real, fake, k, block) == pytest.approx(
            (precision, recall), rel=1e-14
        )
        assert density_coverage(real, fake, k, block) == pytest.approx(
            (density, coverage), rel=1e-14
        )
        assert 0 < precision < 1
        assert 0 < recall < 1
    got, index = nearest_neighbours(fake, real, 4, block)
    np.testing.assert_allclose(got.cpu(), np.sort(distances(fake, real), 1)[:, :4], rtol=1e-13)
    np.testing.assert_array_equal(index.cpu(), np.argsort(distances(fake, real), 1)[:, :4])


def test_neighbour_metrics_of_equal_and_distant_sets():
    x = rng().normal(size=(40, 3))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    assert density_coverage(x, x).coverage == 1.0
    distance, index = nearest_neighbours(x, x)
    assert not distance.any()
    assert index[:, 0].tolist() == list(range(40))


def test_bad_features_are_refused_by_neighbour_metrics():
    with pytest.raises(ValueError, match=r"real features have shape \(3, 2\)"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match=r"2 dimensions.* 3"):
        density_coverage(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(np.zeros((9, 2)), np.full((9, 2), np.nan))
    with pytest.raises(ValueError, match="k 0"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), k=0)


# --- KID ------------------------------------------------------------------------------------------


def mmd_by_sums(x, y):
    """Return the squared MMD as the double sums of Gretton et al. 2012, eq. 3."""

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_kid_of_few_images_is_the_mmd_with_the_jackknife_error():
    x, y = rng(1).normal(size=(9, 4)), rng(2).normal(size=(7, 4)) + 0.5
    assert squared_mmd(x, y) == pytest.approx(mmd_by_sums(x, y), rel=1e-12)
    value, error = kid(x, y)
    assert value == pytest.approx(mmd_by_sums(x, y), rel=1e-12)
    left = np.array([mmd_by_sums(np.delete(x, i, 0), y) for i in range(9)])
    right = np.array([mmd_by_sums(x, np.delete(y, i, 0)) for i in range(7)])
    want = np.sqrt(
        8 / 9 * ((left - left.mean()) ** 2).sum() + 6 / 7 * ((right - right.mean()) ** 2).sum()
    )
    assert error == pytest.approx(want, rel=1e-10)


def test_kid_of_subsets_is_unbiased_and_its_error_is_its_spread():
    """Over many pairs of samples of one distribution the mean is 0."""
    pairs = [rng(s).normal(size=(2, 400, 3)) for s in range(60)]
    results = [kid(a, b, subset_size=50, subsets=40, seed=s) for s, (a, b) in enumerate(pairs)]
    values, errors = np.array(results).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)
    assert 0.5 < errors.mean() / values.std() < 2.5
    assert kid(*pairs[0], subset_size=50, seed=0) == kid(*pairs[0], subset_size=50, seed=0)
    assert kid(*pairs[0], subset_size=50, seed=0) != kid(*pairs[0], subset_size=50, seed=1)


def test_kid_against_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.kid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).double() / 100

    g = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 2, 2), generator=g, dtype=torch.uint8)
    fake = torch.randint(30, 200, (60, 3, 2, 2), generator=g, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it keeps all features
        metric = module.KernelInceptionDistance(feature=Flat(), subsets=2, subset_size=60)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    mean, _ = metric.compute()
    assert kid(Flat()(real), Flat()(fake)).value == pytest.approx(mean.item(), rel=1e-5)


def test_bad_features_are_refused_by_kid():
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        kid(np.zeros((2, 4)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="NaN"):
        kid(np.full((5, 4), np.nan), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="subsets 1"):
        kid(np.zeros((5, 4)), np.zeros((9, 4)), subsets=1)


# --- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_intervals_contain_the_mean_as_often_as_promised():
    hits = 0
    for s in range(60):
        x = torch.from_numpy(rng(s).normal(size=(80, 1)))
        low, high, _ = bootstrap(lambda f: f.mean().item(), x, resamples=100, level=0.9, seed=s)
        hits += low <= 0 <= high
    assert 46 <= hits <= 60  # 54 expected; 46 is 3.4 standard deviations below


def test_bootstrap_of_a_frechet_distance_is_seeded():
    x = rng(1).normal(size=(100, 4))
    reference = Gaussian.of(Moments.of(rng(2).normal(size=(500, 4)) + 0.5))

    def statistic(f):
        return Gaussian.of(Moments.of(f)).distance(reference)

    first = bootstrap(statistic, x, resamples=40)
    assert first == bootstrap(statistic, x, resamples=40)
    assert first != bootstrap(statistic, x, resamples=40, seed=1)
    assert first.low < statistic(x) < first.high
    with pytest.raises(ValueError, match="resamples 3"):
        bootstrap(statistic, x, resamples=3)
    with pytest.raises(ValueError, match="1 images"):
        bootstrap(statistic, x[:1])
