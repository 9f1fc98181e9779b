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


def speed(*images_per_second, processor=OLD):
    return {"images_per_second": list(images_per_second), "processor": processor}


def row(entrant, images, distance):
    return {"entrant": entrant, "images": images, "distances": {"FD": distance}}


def test_minutes_are_interpolated_in_logarithms():
    curve = [(10.0, 400.0), (40.0, 100.0)]
    # Half-way in log distance is half-way in log minutes.
    assert benchmark.minutes_to(curve, 200) == "20.0"
    assert benchmark.minutes_to(curve, 100) == "40.0"
    assert benchmark.minutes_to(curve, 400) == "≤ 10.0"
    assert benchmark.minutes_to(curve, 99) == "–"


def test_every_row_is_on_one_clock():
    """Images over the median speed: 60 images/s and 30 images/s."""
    speeds = {"unet": speed(60, 10, 61), "uvit": speed(30)}
    rows = [row("uvit", 18_000, 300), row("unet", 144_000, 100), row("unet", 36_000, 400)]
    assert benchmark.curves(rows, speeds, "FD") == {
        "unet": [(10, 400), (40, 100)],
        "uvit": [(10, 300)],
    }
    lines = benchmark.tabulate_minutes(rows, speeds, "FD").splitlines()
    values = [400, 350, 320, 280, 250, 220, 200, 180, 160, 140, 130, 110, 100]
    assert lines[0] == f"| entrant | {' | '.join(map(str, values))} |"
    minutes = [f"{4000 / value:.1f}" for value in values[1:]]
    assert lines[2] == f"| `unet` | ≤ 10.0 | {' | '.join(minutes)} |"
    assert lines[3] == f"| `uvit` | {' | '.join(3 * ['≤ 10.0'] + 10 * ['–'])} |"
    named = SimpleNamespace(name="unet", batch=70)
    assert benchmark.count_images(named, 10, speeds) == 35_980  # whole batches
    assert benchmark.count_images(named, 1e-9, speeds) == 70


def test_speeds_of_two_processors_are_not_one_clock():
    with pytest.raises(ValueError):
        benchmark.find_processor({"unet": speed(60), "uvit": speed(30, processor=NEW)})


@pytest.mark.parametrize(("start", "per_image"), [(0.0, 0.5), (7.0, 0.5), (3.0, 4.0)])
def test_a_speed_has_no_start_in_it(monkeypatch, start, per_image):
    """A start of 0 to 7 s, twice the time of a batch and more, does not change the speed."""
    clock, seen = SimpleNamespace(now=0.0), {"unet": 0}
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock.now)

    def advance(images):
        assert images > seen["unet"]
        clock.now += start + per_image * (images - seen["unet"])
        seen["unet"] = images

    made = SimpleNamespace(name="unet", batch=8, advance=advance, saved_images=lambda: 0)
    found = benchmark.measure_speeds([made], rounds=3, seconds=20)["unet"]
    assert found == pytest.approx([1 / per_image] * 3)


@pytest.fixture
def entrant(tmp_path, monkeypatch):
    """An entrant whose every image takes a second of processor time."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock.now)
    monkeypatch.setattr(benchmark, "facts", lambda device: {"processor": OLD})
    made = SimpleNamespace(
        folder=tmp_path / "run", batch=8, first_images=16, seen=0, killed_at=None
    )
    made.saved_images = lambda: 0

    def advance(images):
        while made.seen < images:
            if made.seen == made.killed_at:
                raise SystemExit(143)
            made.seen, clock.now = made.seen + 1, clock.now + 1.0

    made.advance = advance
    return made


def test_images_of_a_killed_piece_that_were_saved_count(entrant):
    """A kill saves a checkpoint, and the clock does not know of its images."""
    entrant.killed_at = 200
    with pytest.raises(SystemExit):
        benchmark.train_for(entrant, float("inf"), most_images=160 + 64)
    entrant.killed_at, entrant.saved_images = None, lambda: entrant.seen
    entrant.seen = 216
    assert benchmark.train_for(entrant, float("inf"), most_images=208)[0] == 216


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


def test_the_results_are_on_one_clock():
    for path in (ROOT / "benchmarks" / "results").glob("time-to-quality-*.json"):
        result = json.loads(path.read_text())
        assert benchmark.find_processor(result["speeds"])
        keys = [(row["entrant"], row["images"]) for row in result["rows"]]
        assert len(keys) == len(set(keys))
        assert {entrant for entrant, _ in keys} <= set(result["speeds"])
