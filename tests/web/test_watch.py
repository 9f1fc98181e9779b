"""The Watch tab's content, without a browser."""

from __future__ import annotations

import json
import re
import sys
from html import escape
from unittest import mock

import pytest

from mezzotint.web import watch_tab
from mezzotint.web.studio import Studio

BINS = {"-2..2": 0.5, ">10": 1.0}


def run_with(folder, *records):
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder, (folder / "log.jsonl").stat().st_size


def line(images, loss):
    return {"images": images, "loss": loss, "loss_by_logsnr": BINS, "images_per_second": 10.0}


def test_each_value_of_the_log_and_each_metric_has_a_plot(tmp_path):
    first, second = (
        {"images": n, "evaluation": {"fid": 300.0 - n, "kid": 0.1}} for n in (100, 200)
    )
    curves = watch_tab.render_curves(
        *run_with(tmp_path, line(100, 0.5), first, line(200, 0.4), second)
    )
    assert re.findall("<h3>(.*?)</h3>", curves) == [
        "Loss",
        "Loss by log-SNR",
        "Speed",
        "Evaluation: fid",
        "Evaluation: kid",
    ]
    assert "fid over images seen" in curves
    assert "-2..2, &gt;10" in curves
    assert "200 images seen" in watch_tab.render_progress(tmp_path)


def test_a_run_without_a_log_line(tmp_path):
    assert "nothing yet" in watch_tab.render_curves(tmp_path, 0)
    assert "waiting" in watch_tab.render_progress(tmp_path)
    assert "No sample grid" in watch_tab.render_grid(tmp_path, 0)


@pytest.mark.parametrize("metric", ["<img src=x onerror=alert(1)>", "FID <b>", '"</h3>&<script>'])
def test_the_name_of_a_metric_is_text(tmp_path, metric):
    evaluated = {"images": 200, "evaluation": {metric: 3.0}}
    curves = watch_tab.render_curves(*run_with(tmp_path, line(100, 0.5), evaluated))
    assert f"<h3>Evaluation: {escape(metric)}</h3>" in curves
    assert metric not in curves


@pytest.fixture
def tab(tmp_path, monkeypatch):
    """A run folder, and what its tab does every two seconds and for its slider; no gradio."""
    gradio = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    run = tmp_path / "run <1>"
    run.mkdir()
    watch_tab.watch_tab(Studio(models={}, runs={"run": run}), gradio.Tab())
    refresh, show = gradio.Timer().tick.call_args, gradio.Slider().input.call_args
    return run, refresh.args[0], show.args[0]


def test_a_sound_run_is_shown(tab):
    run, refresh, _ = tab
    run_with(run, line(100, 0.5))
    progress, curves, _, grid, _ = refresh("run", 0, None)
    assert "100 images seen" in progress
    assert "<svg" in curves
    assert "No sample grid" in grid


@pytest.mark.parametrize(
    "damaged",
    [
        {"images": 100},
        line(100, "low"),
        {**line(100, 0.5), "loss_by_logsnr": 5},
        {"images": 100, "evaluation": 7},
    ],
)
def test_a_damaged_line_is_told(tab, damaged):
    run, refresh, _ = tab
    run_with(run, line(50, 0.5), damaged)
    progress, curves, *_ = refresh("run", 0, None)
    message = r"run &lt;1&gt;: its log .* holds values that no run writes \((Key|Value|Type)Error"
    assert re.search(message, progress)
    assert 'role="alert"' in progress
    assert curves == ""


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_damaged_grid_is_told_beside_the_curves(tab, content):
    run, refresh, show = tab
    run_with(run, line(100, 0.5))
    (run / "samples").mkdir()
    (run / "samples" / "000000000100.png").write_bytes(content)
    progress, curves, _, grid, _ = refresh("run", 0, None)
    assert "100 images seen" in progress
    assert "<svg" in curves
    assert "remove the damaged line or file" in grid
    assert show("run", 0) == grid
