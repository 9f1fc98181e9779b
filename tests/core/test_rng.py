"""Every draw is a function of its key alone."""

from types import SimpleNamespace

import pytest
import torch

from mezzotint.core import rng


def test_a_row_does_not_depend_on_its_batch():
    together = rng.normal("noise", 3, [5, 6, 7], (2, 4, 4))
    alone = rng.normal("noise", 3, [6], (2, 4, 4))
    assert torch.equal(together[1:2], alone)


def test_draws_depend_on_purpose_seed_index_and_draw():
    base = rng.normal("noise", 3, [5], (8,))
    others = [
        rng.normal("sample", 3, [5], (8,)),
        rng.normal("noise", 4, [5], (8,)),
        rng.normal("noise", 3, [6], (8,)),
        rng.normal("noise", 3, [5], (8,), draw=1),
        rng.normal("noise", 3 + 2**32, [5], (8,)),  # a 32-bit seed would alias
    ]
    assert not any(torch.equal(base, other) for other in others)


def test_moments_over_indices():
    normal = rng.normal("noise", 0, list(range(4000)), (4,)).double()
    assert abs(normal.mean()) < 0.03
    assert abs(normal.var() - 1) < 0.04
    uniform = rng.uniform("time", 0, list(range(4000)))
    assert 0 < uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        rng.uniform("time", -1, [0])


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (1 - 2.0**-53, 1 - 2.0**-53),
        (1 - 2.0**-52, 1 - 2.0**-52),
        (0.25, 0.25 + 2.0**-54),
        (0.0, 2.0**-54),
    ],
)
def test_the_ends_of_uniform_numbers_stay_inside(drawn, expected, monkeypatch):
    monkeypatch.setattr(rng, "philox", lambda *key: SimpleNamespace(random=lambda: drawn))
    numbers = rng.uniform("time", 0, [3, 4])
    assert 0 < numbers.min() <= numbers.max() < 1
    assert numbers.tolist() == [expected, expected]
