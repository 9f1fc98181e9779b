"""The Watch tab's plots, without a browser."""

from __future__ import annotations

import json
import math
import re

import pytest

from mezzotint.web import html, watch_tab

BINS = {"-2..2": 0.5, ">10": 1.0}


def run_with(folder, *records):
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder, (folder / "log.jsonl").stat().st_size


def line(images, loss, **more):
    return {
        "images": images,
        "loss": loss,
        "loss_by_logsnr": BINS,
        "images_per_second": 10.0,
        **more,
    }


def titles(html):
    return re.findall("<h3>(.*?)</h3>", html)


def test_every_metric_of_an_evaluation_along_the_way_has_its_plot(tmp_path):
    first = line(100, 0.5)
    judged = [{"images": n, "evaluation": {"fid": 300.0 - n, "kid": 0.1}} for n in (100, 200)]
    drawn = watch_tab.curves(*run_with(tmp_path, first, judged[0], line(200, 0.4), judged[1]))
    assert titles(drawn) == [
        "Loss",
        "Loss by log-SNR",
        "Throughput",
        "Evaluation: fid",
        "Evaluation: kid",
    ]
    assert "fid over images seen" in drawn
    assert watch_tab.headline(tmp_path).count("200 images seen") == 1


def test_a_run_without_a_line_yet_says_so(tmp_path):
    assert "logged nothing yet" in watch_tab.curves(tmp_path, 0)
    assert "waiting" in watch_tab.headline(tmp_path)


@pytest.mark.parametrize(
    ("losses", "logarithmic"), [((0.5, 0.4), False), ((5.0, 0.4), True), ((5.0, -1.0), False)]
)
def test_loss_is_drawn_on_the_axis_that_shows_it(losses, logarithmic):
    assert watch_tab.spans_decades([{"loss": loss} for loss in losses], "loss") is logarithmic


def test_gaps_and_nothing_at_all_are_drawn_from_zero():
    for values in ([1.0, math.nan, 2.0], [math.nan], [0.0]):
        assert "<svg" in html.plot(
            [html.Line(list(range(len(values))), values)], "x", "y", from_zero=True
        )
