"""The Watch tab's content, without a browser."""

from __future__ import annotations

import json
import re

from mezzotint.web import watch_tab

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
