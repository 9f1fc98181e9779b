"""`mezzotint sample` and `mezzotint edit`: files, cards and errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mezzotint as mz
from helpers.tiny_models import tiny
from mezzotint import cli
from mezzotint.evaluate import features
from mezzotint.evaluate.results import load_evaluation, require_comparable
from mezzotint.sampling.generate_images import generate_images
from mezzotint.sampling.job import make_job


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models: with named classes, a weaker one, without classes, and of latents."""
    folder = tmp_path_factory.mktemp("models")
    strong = tiny()
    strong.info = dataclasses.replace(strong.info, labels=tuple("abcdefghij"))
    mz.save_model(strong, folder / "strong")
    mz.save_model(tiny(seed=1), folder / "weak")
    mz.save_model(tiny(num_classes=0), folder / "free")
    mz.save_model(tiny("diffit-latent-tiny"), folder / "latent")
    return folder


def run(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    """Run a command; return its exit code and output."""
    monkeypatch.setattr(sys, "argv", ["mezzotint", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_options_of_sample(models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.npz"
    code, printed = run(
        monkeypatch, capsys, "sample", models / "strong", "-n", 6, "--steps", 3, "--out", out,
        "--sampler", "ddim:eta=0.5", "--discretization", "even_logsnr:logsnr_min=-8,logsnr_max=8",
        "--guidance", "scale=2,low=-3,high=4", "--clip", "static", "--label", "c", "7",
        "--size", "8x16", "--dtype", "bfloat16",
    )  # fmt: skip
    assert code == 0, printed
    card = json.loads((tmp_path / "a.npz.json").read_text())
    assert f"6 images, {card['network_calls_per_image']} network calls each: {out}" in printed
    assert "6/6 images" in printed
    assert "images/s" in printed
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (6, 8, 16, 3)
        assert arrays["arr_1"].tolist() == [2, 7, 2, 7, 2, 7]
    assert (card["num_images"], card["first_seed"], card["classes"]) == (6, 0, [2, 7])
    assert card["sampler"] == {"name": "ddim", "options": {"eta": 0.5}}
    assert card["discretization"]["name"] == "even_logsnr"
    assert card["guidance"] == {"scale": 2.0, "convention": "dit", "low": -3.0, "high": 4.0}
    assert card["logsnr"] == [-8.0, "inf"]
    assert (card["dtype"], card["compiled"]) == ("bfloat16", None)


def test_a_protocol_and_what_deviates_from_it(models, tmp_path, monkeypatch, capsys):
    code, printed = run(
        monkeypatch, capsys, "sample", models / "strong", "--protocol", "edm2", "--dtype",
        "float32", "--steps", 4, "--guidance", "1.5", "--guide-model", models / "weak",
        "--num-images", 2, "--out", tmp_path / "a",
    )  # fmt: skip
    assert code == 0, printed
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert card["protocol"] == "edm2"
    deviations = [line.split(":")[0] for line in card["deviations"]]
    assert deviations == ["steps", "guidance", "dtype", "codec"]
    assert card["network_calls_per_image"] == 2 * 7
    assert card["guide_model"]["sha256"] != card["model"]["sha256"]


def test_latents_are_written_without_decoding(models, tmp_path, monkeypatch, capsys):
    words = ["--latents", "-n", 3, "--steps", 2, "--out", tmp_path / "a.npz"]
    code, printed = run(monkeypatch, capsys, "sample", models / "latent", *words)
    assert code == 0, printed
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 4, 8, 8)
        assert arrays["arr_0"].dtype == np.float32
    assert json.loads((tmp_path / "a.npz.json").read_text())["codec"] is None


def test_a_latent_model_with_its_decoder(models, tmp_path, shared):
    """TAESD decodes Stable Diffusion's latents, eight pixels a cell."""
    pytest.importorskip("diffusers")
    job = make_job(models / "latent", {"steps": 2}, codec=str(shared("data/taesd")))
    out = generate_images(job, tmp_path / "a.npz", 2, quiet=True)
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (2, 64, 64, 3)
    assert json.loads((tmp_path / "a.npz.json").read_text())["codec"]["sha256"] == job.decoder.hash


def write_image(path: Path, value: int, side: int = 8) -> Path:
    Image.new("RGB", (side, side), (value, value, value)).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "columns", "rows", "names"),
    [
        ("img2img", 3, 1, {"edited.png"}),
        ("inpaint", 2, 2, {"edited.png"}),
        ("interpolate", 3, 1, {"edited.png", "edited.gif"}),
        ("trajectory", 4, 2, {"edited.png", "edited.gif"}),
    ],
)
def test_edit(mode, columns, rows, names, models, tmp_path, monkeypatch, capsys):
    image, mask = write_image(tmp_path / "i.png", 90), write_image(tmp_path / "m.png", 255)
    words = {
        "img2img": ["--image", image, "--start-logsnr", "-2"],
        "inpaint": ["--image", image, "--mask", mask, "--start-logsnr", "0.5"],
        "interpolate": ["--frames", 3],
        "trajectory": [],
    }[mode]
    out = tmp_path / "out" / "edited.png"
    code, printed = run(
        monkeypatch, capsys, "edit", mode, models / "strong", *words, "-n", 2, "--seed", 5,
        "--steps", 3, "--label", "c", "--out", out,
    )  # fmt: skip
    assert code == 0, printed
    assert {p.name for p in out.parent.iterdir()} == names | {"edited.png.json"}
    card = json.loads((out.parent / "edited.png.json").read_text())
    assert (card["edit"], card["first_seed"], card["num_images"]) == (mode, 5, 2)
    assert card.get("image") == ("i.png" if "--image" in words else None)
    assert card.get("start_logsnr") == {"img2img": -2.0, "inpaint": 0.5}.get(mode)
    with Image.open(out) as sheet:
        # Images of 8 pixels are enlarged eight times, with a margin of 2 pixels.
        assert sheet.width == columns * 66 + 2
        assert round(sheet.height / 80) == rows
    assert str(out) in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "strong", "--steps", "0"], "steps 0 must be"),
        (["sample", "latent", "--discretization", "respaced", "--steps", "1001", "--latents",
          "--out", "a.npz"], "1000"),
        (["sample", "strong", "--guidance", "scale=2,low=30,high=40"], "30...40"),
        (["sample", "strong", "--guidance", "low=3,high=4"], "scale=1.5"),
        (["sample", "strong", "--guidance", "0.4,convention=dmr"], "dimr"),
        (["sample", "free", "--guidance", "2"], "without guidance"),
        (["sample", "free", "--label", "3"], "leave label out"),
        (["sample", "strong", "--label", "rose"], "'rose'"),
        (["sample", "strong", "--label", "12"], "label 12"),
        (["sample", "strong", "--label-order", "radnom"], "did you mean random"),
        (["sample", "strong", "--protocol", "edm3"], "did you mean edm2"),
        (["sample", "strong", "--guide-model", "free", "--guidance", "2"], "num_classes 0"),
        (["sample", "strong", "--guide-model", "weak"], "e.g. 1.5"),
        (["sample", "strong", "--codec", "taesd"], "taesd"),
        (["sample", "latent", "--latents"], ".npz"),
        (["sample", "strong", "--latents", "--out", "a.npz"], "works on pixels and has no latents"),
        (["sample", "latent", "--latents", "--codec", "taesd", "--out", "a.npz"],
         "latents are not decoded, and codec taesd decodes; leave one out"),
        (["sample", "strong", "--encoder", "t5"], "encoder t5 needs prompts; give --text"),
        (["edit", "trajectory", "strong", "--encoder", "t5"], "encoder t5 needs prompts"),
        (["sample", "strong", "--graphs", "on"], "cuda_graphs"),
        (["sample", "absent"], "absent"),
        (["edit", "trajectory", "strong", "--out", "a.npz"], "a.npz"),
        (["edit", "trajectory", "strong", "-n", "0"], "--num-images 0 must be"),
        (["edit", "interpolate", "strong", "-n", "1", "--frames", "3"], "1 images and 3 frames"),
        (["edit", "interpolate", "strong", "--frames", "1"], "--frames 1 must be"),
        (["edit", "img2img", "strong", "--image", "none.png", "--start-logsnr", "0"], "none.png"),
    ],
)  # fmt: skip
def test_a_bad_command_prints_one_sentence(models, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = ("strong", "weak", "free", "latent", "absent")
    code, printed = run(monkeypatch, capsys, *[models / w if w in folders else w for w in words])
    assert code == 1
    assert message in printed
    assert printed.startswith("mezzotint: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit", "img2img", "strong", "--start-logsnr", "0"], "--image"),
        (["edit", "img2img", "strong", "--image", "a.png"], "--start-logsnr"),
        (["edit", "inpaint", "strong", "--image", "a.png"], "--mask"),
        (["edit", "trajectory", "strong", "--image", "a.png"], "--image"),
        (["edit", "strong"], "img2img"),
    ],
)
def test_options_of_another_mode_are_refused(models, words, message, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, *words)
    assert code == 2
    assert message in printed


@pytest.mark.parametrize(
    "words", [["sample"], ["edit"], *(["edit", m] for m in ("img2img", "inpaint", "interpolate"))]
)
def test_help_fits_one_screen(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code, printed = run(monkeypatch, capsys, *words, "--help")
    assert code == 0
    assert len(printed.splitlines()) <= 45


class Means(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_a_model_and_its_samples_have_equal_evaluations(tmp_path, monkeypatch):
    means = features.from_module(Means().eval(), name="means", dims=3, size=8)
    monkeypatch.setattr(features, "open_features", lambda names, path: [means])
    mz.save_model(tiny(), tmp_path / "m")
    samples, real = str(tmp_path / "samples"), tmp_path / "real.npz"
    generate_images(make_job(tmp_path / "m", {"steps": 2}), samples, 60, quiet=True)
    cli.data.prepare("shapes:count=60", str(tmp_path / "set"), size=8)
    cli.evaluation.reference(str(tmp_path / "set"), real)
    evaluate = functools.partial(cli.evaluation.evaluate, reference=str(real))
    evaluate(samples, out=tmp_path / "a.json")
    evaluate(str(tmp_path / "m"), steps=2, num_images=60, out=tmp_path / "b.json")
    evaluate(str(tmp_path / "set"), out=tmp_path / "c.json")
    a, b, c = (load_evaluation(tmp_path / f"{name}.json") for name in "abc")
    assert require_comparable(a, b).unknown == ()
    assert a["FD-means"].value == b["FD-means"].value > c["FD-means"].value
