"""benchmarks/time_to_quality.py: minutes to a distance, the clock, and what may not be mixed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("the source distribution has no benchmarks", allow_module_level=True)
sys.path.append(str(ROOT / "benchmarks"))
import time_to_quality as benchmark  # noqa: E402

NEW, OLD = "Alpha (avx512)", "Alpha (avx2)"


def row(entrant, minutes, distance, processor=OLD):
    return {
        "entrant": entrant, "minutes": minutes, "distances": {"FD": distance},
        "processor": processor,
    }  # fmt: skip


def test_minutes_are_interpolated_in_logarithms():
    curve = [row("unet", 10, 400), row("unet", 40, 100)]
    # Half-way in log distance is half-way in log minutes.
    assert benchmark.minutes_to(curve, "FD", 200) == "20"
    assert benchmark.minutes_to(curve, "FD", 100) == "40"
    assert benchmark.minutes_to(curve, "FD", 400) == "≤ 10"
    assert benchmark.minutes_to(curve, "FD", 99) == "–"


def test_no_curve_joins_two_processors():
    rows = [row("unet", 40, 100, NEW), row("unet", 10, 400), row("uvit", 10, 300)]
    assert benchmark.name_processors(rows) == {OLD: "A", NEW: "B"}
    assert list(benchmark.curves(rows)) == [("unet", "A"), ("uvit", "A"), ("unet", "B")]
    lines = benchmark.tabulate_minutes(rows, "FD").splitlines()
    assert lines[0] == "| entrant | processor | 400 | 320 | 250 | 200 | 160 | 130 | 100 |"
    assert lines[2] == "| `unet` | A | ≤ 10 | – | – | – | – | – | – |"
    assert lines[4] == f"| `unet` | B |{' ≤ 40 |' * 7}"


@pytest.fixture
def entrant(tmp_path, monkeypatch):
    """An entrant whose every image takes a second of processor time."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock.now)
    monkeypatch.setattr(benchmark, "facts", lambda device: {"processor": OLD})
    made = SimpleNamespace(
        folder=tmp_path / "run", batch=8, first_images=16, seen=0, killed_at=None
    )

    def advance(images):
        while made.seen < images:
            if made.seen == made.killed_at:
                raise SystemExit(143)
            made.seen, clock.now = made.seen + 1, clock.now + 1.0

    made.advance = advance
    return made


def test_an_interruption_does_not_stop_the_clock(entrant):
    entrant.killed_at = 200
    with pytest.raises(SystemExit):
        benchmark.train_for(entrant, 300)
    # The last piece began after 136 images; the time of all 200 counts.
    assert benchmark.read_clock(entrant.folder) == (136, 200.0)
    entrant.killed_at = None
    images, seconds = benchmark.train_for(entrant, 300)
    assert seconds == pytest.approx(300, rel=0.1)
    assert images <= 300


def test_a_run_does_not_go_on_on_another_processor(entrant, monkeypatch):
    benchmark.train_for(entrant, 100)
    monkeypatch.setattr(benchmark, "facts", lambda device: {"processor": NEW})
    before = entrant.seen
    with pytest.raises(ValueError, match=r"began on Alpha \(avx2\), and this is .*other --runs"):
        benchmark.train_for(entrant, 200)
    assert entrant.seen == before


def test_other_settings_do_not_relabel_rows():
    done = {"samples": 256, "reference": "1000 training images", "rows": []}
    benchmark.check_settings(done, {"samples": 256}, Path("x.json"))
    benchmark.check_settings({}, {"samples": 256}, Path("x.json"))
    with pytest.raises(ValueError, match=r"x\.json was measured with samples: 256; .*--out"):
        benchmark.check_settings(done, {"samples": 500}, Path("x.json"))


def test_the_results_are_of_one_setting_each():
    for path in (ROOT / "benchmarks" / "results").glob("time-to-quality-*.json"):
        rows = json.loads(path.read_text())["rows"]
        keys = [(r["entrant"], r["asked_minutes"], r["processor"]) for r in rows]
        assert len(keys) == len(set(keys))
