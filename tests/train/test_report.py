"""`mezzotint report` on a run in every state: new, killed while it wrote a line, finished."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint import config
from mezzotint.core.registry import Spec, build
from mezzotint.models import create_model
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import describe_changes, recipe_for
from mezzotint.train.report import (
    POINTS,
    line_over_images,
    logsnr_bin_names,
    render_grids,
    render_page,
    spans_decade,
    write_report,
    zero_output_loss,
)

LINE = {
    "images": 3200, "loss": 0.5, "grad_norm": 1.0,
    "images_per_second": 120.0, "peak_memory_gib": 0.7,
    "loss_by_logsnr": {"<-10": 0.1, "-2..2": 0.4, ">10": 1.0},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run killed while it wrote a log line, with a spike and four grids, in a name to escape."""
    folder = tmp_path / "run <1>"
    (folder / "samples").mkdir(parents=True)
    recipe = config.override(
        recipe_for("unet-tiny"), ["data.source=digits", "model.size=16", "images=12800"]
    )
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    lines = [json.dumps({**LINE, "images": 3200 * i, "loss": 0.5 / i}) for i in (1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"images": 12800, "lo')
    (folder / "events.jsonl").write_text(
        json.dumps({"images": 6400, "event": "spike", "loss": 9.0}) + "\n"
    )
    for i in (1, 2, 3, 4):
        pixels = np.full((8, 8, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / "samples" / f"{3200 * i:012d}.png")
    return folder


class Checker(HTMLParser):
    """Collects the addresses that elements would load, and checks that elements close."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset") and not value.startswith(
                ("data:", "#")
            ):
                self.fetched.append(value)
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == []
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    return text


def test_no_local_path_is_shown(run):
    recipe = config.override(
        config.from_yaml(run / "recipe.yaml"),
        ["data.source=/home/alice/pets", "data.codec=/home/alice/vae", "evaluate.weights=~/w.pth",
         "evaluate.reference=/home/alice/ref.npz"],
    )  # fmt: skip
    (run / "recipe.yaml").write_text(config.to_yaml(recipe))
    with (run / "log.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"images": 9600, "evaluation": {"FID": 1.0}}) + "\n")
    event = {"images": 6400, "event": "evaluation failed", "why": "/home/alice/ref.npz is damaged"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    start = {"images": 0, "command": "python -m mezzotint train unet-tiny --out /home/alice/run"}
    (run / "environment.json").write_text(json.dumps([start]))
    text = render_page(run, describe_changes(recipe))
    assert "alice" not in text
    assert all(
        name in text for name in ("on pets", "ref.npz is damaged", "--out run", "codec: vae")
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"run\xff", r"run\xff"),
        (b"caf\xe9 <1>", r"caf\xe9 &lt;1&gt;"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
        ("ü 猫".encode(), "ü 猫"),
    ],
)
def test_a_run_folder_of_any_name_has_a_page(run, tmp_path, name, shown):
    run = run.rename(tmp_path / os.fsdecode(name))
    page = write_report(run, tmp_path / "page.html").read_text("utf-8")
    assert f"<h1>{shown}</h1>" in checked(page)


def test_a_killed_run(run):
    text = checked(render_page(run, describe_changes(config.from_yaml(run / "recipe.yaml"))))
    assert "run &lt;1&gt;" in text
    assert "9,600 of 12,800 images" in text
    assert "continues it" in text
    assert "data.source:" in text
    assert "spike" in text
    assert "loss 9.0" in text
    assert text.count("<svg") == 5
    ids = re.findall(r'<g id="([^"]+)"|clipPath id="([^"]+)"', text)
    clips = [clip for _, clip in ids if clip]
    assert len(clips) == len(set(clips))
    assert text.count("data:image/png;base64") == 4
    assert text.index("12,800 images</figcaption>") < text.index("3,200 images</figcaption>")
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text


def test_newest_grid_is_first_and_unchanged(run):
    first = re.search(r"data:image/png;base64,([^\"]+)", render_grids(run))[1]
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))[0, 0, 0] == 160


def test_large_grids_become_jpeg(run, monkeypatch):
    monkeypatch.setattr("mezzotint.train.report.LARGEST_PNG", 10)
    assert render_grids(run).count("data:image/jpeg") == 4
    monkeypatch.setattr("mezzotint.train.report.GRIDS", 2)
    assert "12,800" in render_grids(run)
    assert render_grids(run).count("<img") == 2


def test_a_new_run(run):
    for name in ("log.jsonl", "events.jsonl"):
        (run / name).unlink()
    for path in (run / "samples").iterdir():
        path.unlink()
    text = checked(render_page(run, ""))
    assert "No line is logged yet" in text
    assert "<img" not in text


def test_a_finished_run_is_written_to_a_file(run, tmp_path):
    with (run / "log.jsonl").open("w") as file:
        file.write(json.dumps({**LINE, "images": 12800}) + "\n")
    out = write_report(run, tmp_path / "new" / "page.html")
    assert "finished" in out.read_text()
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        write_report(tmp_path, tmp_path / "x.html")


def test_a_line_skips_records_without_its_value():
    records = [{"images": 1, "a": {"b": 5.0}}, {"images": 2}, {"images": 3, "a": {"b": 6.0}}]
    line = line_over_images(records, "a", "b")
    assert (line.x, line.y) == ([1, 3], [5.0, 6.0])


def test_a_long_line_is_thinned_and_keeps_its_ends():
    line = line_over_images([{"images": i, "loss": 0.0} for i in range(10 * POINTS + 7)], "loss")
    assert POINTS / 2 < len(line.x) <= POINTS + 1
    assert (line.x[0], line.x[-1]) == (0, 10 * POINTS + 6)


@pytest.mark.parametrize(
    ("values", "expected"), [([0.5, 0.4], False), ([5.0, 0.4], True), ([5.0, -1.0], False)]
)
def test_logarithmic_axis_for_values_over_a_decade(values, expected):
    assert spans_decade(values) is expected


@pytest.mark.parametrize(
    "preset", ["unet-tiny", "diffit-tiny", "diffit-latent-tiny", "uvit-text-tiny"]
)
def test_zero_output_loss_is_the_loss_of_a_new_network(preset):
    """These backbones output zeros before their first step."""
    recipe = recipe_for(preset)
    line = zero_output_loss(recipe, levels=32)
    model = create_model(preset, **recipe.model)
    schedule = build(schedules.registry, recipe.schedule or model.info.schedule)
    config_of = model.info.config
    u = torch.tensor([0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    shape = (1, config_of.channels, config_of.size, config_of.size)
    x = 0.5 * torch.randn(shape, generator=generator)
    eps = torch.randn(shape, generator=generator)
    with torch.no_grad():
        loss = build(objectives.registry, recipe.objective)(
            model, x, eps, schedule(u).float(), Cond()
        )
    assert set(line) <= set(logsnr_bin_names())
    assert all(value >= 0 for value in line.values())
    if recipe.time.loss_measure == "u":
        assert min(line.values()) * 0.8 < loss.item() < max(line.values()) * 1.2


def test_zero_output_loss_of_noise_prediction_is_one():
    recipe = config.override(
        recipe_for("dimr-tiny"),
        ["model.prediction=eps", "objective={name: eps_mse}", "time.loss_measure=u"],
    )
    assert recipe.objective == Spec("eps_mse")
    line = zero_output_loss(recipe, levels=32)
    assert list(line.values()) == pytest.approx([1.0] * len(line), abs=0.05)


def test_bin_names():
    assert logsnr_bin_names() == ["<-10", "-10..-6", "-6..-2", "-2..2", "2..6", "6..10", ">10"]
