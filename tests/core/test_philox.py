"""Philox4x32-10: the published numbers, and what its draws depend on."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers.runs import small
from mezzotint.core import philox
from mezzotint.core.rng import Draws
from mezzotint.train.draws import draws_of

CPU = torch.device("cpu")

# Random123, tests/kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def by_integers(counter: list[int], key: list[int]) -> list[int]:
    """The same function by Python's integers, which do not overflow."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_known_answers_of_random123(counter, key, expected):
    k0, k1 = words(key)
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    got = philox.philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in got] == words(expected)
    assert by_integers(words(counter), words(key)) == words(expected)


def test_random_counters_as_by_python_integers():
    random = np.random.default_rng(0)
    counters = random.integers(0, 2**32, (200, 4))
    for key in random.integers(0, 2**32, (3, 2)).tolist():
        c0, c1, c2, c3 = torch.from_numpy(counters).unbind(1)
        got = torch.stack(philox.philox4x32((c0, c1, c2, c3), tuple(key)), 1)
        assert got.tolist() == [by_integers(row, key) for row in counters.tolist()]


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("count", "chunk"), [(1, 1), (3, 1), (40, 3), (1021, 64), (1021, 1 << 15)])
def test_a_number_depends_on_key_index_and_position_alone(
    count, chunk, threads, monkeypatch, with_threads
):
    key, indices = (1, 2), [0, 7, 2**32 + 7, 2**62]
    whole = philox.normal(key, indices, 1021, CPU)
    assert len(whole.unique()) > 4070  # all differ, but for coincidences of float32
    monkeypatch.setattr(philox, "CPU_BLOCKS", chunk)
    with_threads(threads)
    assert torch.equal(philox.normal(key, indices, count, CPU), whole[:, :count])
    assert torch.equal(philox.normal(key, indices[2:3], count, CPU), whole[2:3, :count])


@pytest.mark.parametrize("function", [torch.log, torch.cos, torch.sin, torch.sqrt])
def test_functions_of_a_number_do_not_depend_on_its_place(function, with_threads):
    """In float64, before rounding: the ends of a loop, which are not vectorised, must agree."""
    x = torch.rand(40_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6.28
    whole, random = function(x), np.random.default_rng(0)
    for threads in (1, 2, 3):
        with_threads(threads)
        for length in (1, 2, 3, 5, 7, 9, 31, 5000, 20_001):
            start = int(random.integers(40_001 - length))
            part = slice(start, start + length)
            assert torch.equal(function(x[part]), whole[part])
            assert torch.equal(function(x[part].clone()), whole[part])


def test_the_extremes_are_finite():
    low, high = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 2**32 - 1)
    for u in (low, high):
        for v in (low, high):
            assert philox.normal_of_words((u, v, u, v)).isfinite().all()
    largest = philox.normal_of_words((low, low, low, low)).max().item()
    assert largest == pytest.approx(math.sqrt(2 * 33 * math.log(2)))


def test_moments_quantiles_and_correlations_of_a_million_numbers():
    drawn = Draws(5, "philox4x32").normal("noise", list(range(256)), (4, 32, 32)).double()
    flat, n = drawn.flatten(), drawn.numel()
    assert abs(flat.mean()) < 4 / n**0.5
    assert abs(flat.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((flat**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((flat**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for q in (-3.0, -1.0, 0.0, 0.5, 2.0, 4.0):
        p = 0.5 * (1 + math.erf(q / 2**0.5))
        assert abs((flat < q).double().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    # Neighbours, the two of a pair, and the same element of neighbouring images.
    row = drawn.flatten(1)
    for a, b in ((flat[1:], flat[:-1]), (flat[::2], flat[1::2]), (row[1:], row[:-1])):
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5


def test_uniform_numbers():
    draws, indices = Draws(0, "philox4x32"), list(range(4000))
    u = draws.uniform("time", indices)
    assert u.dtype == torch.float64
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02
    assert torch.equal(draws.uniform("time", [17]), u[17:18])
    ends = [(torch.full((1, 1), w),) * 4 for w in (0, 2**32 - 1)]
    for words_at_end in ends:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(philox, "blocks", lambda *_, w=words_at_end: w)
            assert 0 < philox.uniform((0, 0), [0]).item() < 1


def test_draws_depend_on_stream_purpose_seed_index_and_draw():
    made = [
        Draws(3, "philox4x32").normal("noise", [5], (8,)),
        Draws(3, "philox4x64").normal("noise", [5], (8,)),
        Draws(3, "philox4x32").normal("latent", [5], (8,)),
        Draws(4, "philox4x32").normal("noise", [5], (8,)),
        Draws(3, "philox4x32").normal("noise", [6], (8,)),
        Draws(3, "philox4x32").normal("noise", [5 + 2**32], (8,)),
        Draws(3, "philox4x32").normal("noise", [5], (8,), draw=1),
        Draws(3 + 2**32, "philox4x32").normal("noise", [5], (8,)),
        # In one list of words of any length, these would be seed 3 and draw 1, and seed 3 + 2^32.
        Draws(3, "philox4x32").normal("noise", [5], (8,), draw=2**32),
    ]
    assert len({tuple(row.flatten().tolist()) for row in made}) == len(made)


def test_negative_keys_are_refused_and_no_index_gives_no_row():
    draws = Draws(0, "philox4x32")
    for refused, index in ((draws, -1), (Draws(-1, "philox4x32"), 1)):
        with pytest.raises(ValueError, match="must not be negative"):
            refused.uniform("time", [index])
    assert draws.normal("noise", [], (2, 3)).shape == (0, 2, 3)
    assert draws.uniform("time", []).shape == (0,)


COMPARE = """
import sys

import torch
from torch._dynamo.utils import counters

from mezzotint.core import philox

torch._dynamo.config.recompile_limit = int(sys.argv[2])
compiled = philox.compile_normal_blocks(sys.argv[1])
philox.compile_normal_blocks = lambda: compiled
cpu = torch.device("cpu")
for key, indices, count in (
    ((1, 2), [0, 7, 2**32 + 7, 2**62], 1021),
    ((4_000_000_000, 5), [3], 64),
    ((1, 2), [9, 8, 7], 500),
    ((1, 2), [9, 8, 7, 6], 1021),
):
    drawn = philox.normal(key, indices, count, cpu, compiled=True)
    assert torch.equal(drawn, philox.normal(key, indices, count, cpu)), (key, indices, count)
assert counters["stats"]["unique_graphs"] >= 2
assert not counters["graph_break"], counters
"""


@pytest.mark.parametrize("limit", [8, 2])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_draws_are_the_same_numbers(backend, limit):
    """Without a graph break, for other keys, indices, counts, and a part of a block.

    The third compilation exceeds a limit of 2, as the buckets of many sizes may.

    In another process, since shape checks wrap all functions here.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, backend, str(limit)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("compile", "device", "expected"),
    [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)],
)
def test_a_compiled_run_on_a_gpu_compiles_its_draws(compile, device, expected):
    recipe = small(f"engine.compile={str(compile).lower()}")
    draws = draws_of(recipe, torch.device(device))
    assert draws.compiled == expected
