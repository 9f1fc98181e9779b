"""Many images: the same files whatever the batch, the interruption or the kill; nothing half-written; no surprise."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mezzotint as mz
from helpers.tiny_models import tiny
from mezzotint import cli
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate import features
from mezzotint.evaluate.evaluate import make_protocol
from mezzotint.evaluate.image_source import from_job, open_image_source
from mezzotint.evaluate.results import load_evaluation, require_comparable
from mezzotint.sampling import generate_images, writers
from mezzotint.sampling.generate_images import consecutive_batches
from mezzotint.sampling.job import SamplingJob, make_job
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.sampling.writers import make_writer

N = 11
SETTINGS = SamplingSettings(
    sampler=Spec("ancestral"), steps=2, batch=4, guidance=Guidance(scale=1.5)
)
KINDS = ("images", "images.npz", "images.tar", "images.png")


def job(**changes) -> SamplingJob:
    settings = dataclasses.replace(SETTINGS, **changes)
    return SamplingJob(model=tiny(), settings=settings, classes=tuple(range(10)), label_order="random")


def make(out: Path, n: int = N, **changes) -> Path:
    return generate_images.generate_images(job(**changes), out, n, quiet=True)


def content(out: Path) -> dict[str, bytes]:
    """Every file of an output with its card by name; nothing else may lie around."""
    files = sorted(out.iterdir()) if out.is_dir() else [out, out.with_name(f"{out.name}.json")]
    beside = {p.name for p in out.parent.iterdir()} - {out.name, f"{out.name}.json"}
    assert not beside, beside
    return {f.name: f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted outputs by kind."""
    torch.set_num_threads(1)
    return {kind: content(make(tmp_path_factory.mktemp("whole") / kind)) for kind in KINDS}


def test_every_kind_holds_the_same_images_and_labels(finished, tmp_path):
    drawn, labels = job().draw(range(N)), job().labels(range(N))
    assert set(finished["images"]) == {f"{i:06d}.png" for i in range(N)} | {"card.json"}
    for i in range(N):
        picture = Image.open(io.BytesIO(finished["images"][f"{i:06d}.png"]))
        assert np.array_equal(np.asarray(picture), drawn[i].permute(1, 2, 0))
        assert picture.text == {"label": str(labels[i])}
    (tmp_path / "a.npz").write_bytes(finished["images.npz"]["images.npz"])
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], drawn.permute(0, 2, 3, 1))
        assert arrays["arr_1"].tolist() == labels
    source = open_image_source(tmp_path / "a.npz")  # as our own evaluation reads it
    assert source.n == N
    assert torch.equal(torch.cat(list(source.batches(0, N))), drawn)
    (tmp_path / "a.tar").write_bytes(finished["images.tar"]["images.tar"])
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == [f"{i:09d}.{e}" for i in range(N) for e in ("png", "cls")]
    images = open_images(str(tmp_path / "a.tar"), size=8)  # as our own training reads it
    pixels, read = images.batch(range(N))
    assert torch.equal(pixels, drawn)
    names = images.label_names
    assert read.tolist() == labels if names is None else [int(names[i]) for i in read] == labels
    sheet = Image.open(io.BytesIO(finished["images.png"]["images.png"]))
    assert sheet.size[0] > 4 * 64


@pytest.mark.parametrize("kind", ["images", "images.npz"])
def test_samples_on_disk_say_what_the_model_says_of_them(kind, finished, tmp_path):
    out = tmp_path / kind
    files = (
        {f"{kind}/{name}": data for name, data in finished[kind].items()}
        if kind == "images"
        else finished[kind]
    )
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    there, drawn = (
        make_protocol(open_image_source(out), (8, 8)),
        make_protocol(from_job(job(), N), (8, 8)),
    )
    assert dataclasses.replace(there, source=drawn.source) == drawn
    assert (there.steps, there.seeds) == (2, "0...10")
    assert there.sampler == "ancestral() on the grid of the family"
    card = out / "card.json" if kind == "images" else out.with_name(f"{kind}.json")
    for other in ("{", "[1]", '{"mezzotint_samples": 99}'):
        card.write_text(other)
        assert open_image_source(out).card == {"preprocessing": "none"}


def test_part_of_a_run_says_so(finished, tmp_path):
    for name, data in finished["images"].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "000003.png").unlink()
    assert open_image_source(tmp_path).card["seeds"] == "10 of 0...10"


class Means(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_evaluations_of_a_model_and_of_its_samples_are_alike(tmp_path, monkeypatch):
    """By the command line, with a reference of a prepared set; features are opened after everything else is seen."""
    opened = []

    def own(names, path):
        opened.append(names)
        return [features.from_module(Means().eval(), name="means", dims=3, size=8)]

    monkeypatch.setattr(features, "open_features", own)
    mz.save_model(tiny(), tmp_path / "m")
    samples, real = str(tmp_path / "samples"), str(tmp_path / "real.npz")
    generate_images.generate_images(make_job(tmp_path / "m", {"steps": 2}), samples, 60, quiet=True)
    cli.data.prepare("shapes:count=60", tmp_path / "set", size=8)
    for given, words in [
        ({"source": samples}, "give what to judge and --reference"),
        ({"source": samples, "reference": str(tmp_path / "none.npz")}, "none.npz cannot be read"),
        (
            {"source": samples, "reference": str(tmp_path / "set")},
            "is a folder; .*--make-reference",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            cli.evaluation.evaluate(given.pop("source"), **given)
    with pytest.raises(ValueError, match="no images at"):
        cli.evaluation.evaluate(make_reference=(str(tmp_path / "absent"), Path(real)))
    assert not opened
    cli.evaluation.evaluate(make_reference=(str(tmp_path / "set"), Path(real)))
    with pytest.raises(ValueError, match="there is no folder"):
        cli.evaluation.evaluate(str(tmp_path / "absent"), reference=real)
    with pytest.raises(ValueError, match="give both or neither"):
        cli.evaluation.evaluate(samples, reference=real, train_images=samples)
    assert len(opened) == 1
    cli.evaluation.evaluate(samples, reference=real, out=tmp_path / "a.json")
    cli.evaluation.evaluate(
        str(tmp_path / "m"), reference=real, steps=2, n=60, out=tmp_path / "b.json"
    )
    cli.evaluation.evaluate(str(tmp_path / "set"), reference=real, out=tmp_path / "c.json")
    a, b, c = (load_evaluation(tmp_path / f"{name}.json") for name in "abc")
    assert require_comparable(a, b).unstated == ()
    assert a["FD-means"].value == b["FD-means"].value > c["FD-means"].value


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_for_any_batch(finished, tmp_path, kind):
    for batch in (1, 7, 64):
        again = content(make(tmp_path / str(batch) / kind, batch=batch))
        assert again == finished[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_after_each_batch(finished, tmp_path, kind, monkeypatch):
    """Every start makes one batch more, then an error; the files at the end are those of an uninterrupted run."""
    real, made, left = SamplingJob.draw, [], [1]

    def one_then_stop(self, seeds):
        if not left.pop():
            raise RuntimeError("stopped")
        left.append(0)
        made.extend(seeds)
        return real(self, seeds)

    monkeypatch.setattr(SamplingJob, "draw", one_then_stop)
    out = tmp_path / "o" / kind
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped"):
            make(out)
        left[:] = [1]
    make(out)
    assert made == list(range(N))  # none twice, none left out
    assert content(out) == finished[kind]


SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from sampling.test_writers import SamplingJob, make
real = SamplingJob.draw
def slow(self, seeds):
    time.sleep(0.4)
    return real(self, seeds)
SamplingJob.draw = slow
make(__import__("pathlib").Path({out!r}))
"""


@pytest.mark.parametrize("kind", ["images", "images.npz"])
def test_killed_and_run_again(finished, tmp_path, kind):
    out = tmp_path / "o" / kind
    script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    parts = out if kind == "images" else make_writer(out).folder
    until = time.monotonic() + 120
    while not any(p.name[0].isdigit() for p in (parts.iterdir() if parts.exists() else ())):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / f"{N - 1:06d}.png").exists()
    assert out.exists() == (kind == "images")
    (parts / ".000000004-000000008.partial").write_bytes(b"what a kill leaves")
    make(out)
    assert content(out) == finished[kind]


@pytest.mark.parametrize("kind", ["images", "images.npz", "images.tar"])
@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_no_space_left(finished, tmp_path, kind, when, monkeypatch):
    """The disk fills up at the first, second, ... file after the card; room is made; the same command goes on."""
    out = tmp_path / "o" / kind
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1 + when:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(writers.os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left while writing .*/o/"):
        make(out)
    assert not list((tmp_path / "o").rglob("*.partial"))
    assert out.exists() == (kind == "images")
    monkeypatch.undo()
    make(out)
    assert content(out) == finished[kind]


def test_too_small_a_disk_is_told_before_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        generate_images.shutil, "disk_usage", lambda path: usage._replace(free=1000)
    )
    monkeypatch.setattr(SamplingJob, "draw", lambda self, seeds: pytest.fail("images were made"))
    with pytest.raises(OSError, match=r"needs up to \d+ kB, of which 1000 bytes are free"):
        make(tmp_path / "a.npz")


def test_what_exists_is_kept_unless_asked(finished, tmp_path):
    out = make(tmp_path / "o" / "images.npz")
    with pytest.raises(
        ValueError, match=r"exists already; choose another --out, or add --overwrite"
    ):
        make(out)
    assert content(out) == finished["images.npz"]
    generate_images.generate_images(job(steps=3), out, N, overwrite=True, quiet=True)
    assert content(out)["images.npz"] != finished["images.npz"]["images.npz"]


@pytest.mark.parametrize("card", [None, '{"title": "holiday"}'])
def test_a_picture_of_somebody_else_is_kept_unless_asked(finished, tmp_path, card):
    out = tmp_path / "images.png"
    out.write_bytes(b"mine")
    if card is not None:
        (tmp_path / "images.png.json").write_text(card)
    with pytest.raises(
        ValueError, match=r"exists already; choose another --out, or add --overwrite"
    ):
        make(out)
    assert out.read_bytes() == b"mine"
    generate_images.generate_images(job(), out, N, overwrite=True, quiet=True)
    assert content(make(out)) == finished["images.png"]  # our own is made again without being asked


@pytest.mark.parametrize("kind", ["images", "images.npz"])
def test_another_settings_are_refused_in_the_middle(finished, tmp_path, kind, monkeypatch):
    out = tmp_path / "o" / kind
    real = SamplingJob.draw
    monkeypatch.setattr(
        SamplingJob, "draw", lambda self, seeds: 1 / 0 if seeds[0] else real(self, seeds)
    )
    with pytest.raises(ZeroDivisionError):
        make(out, steps=3)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"begun with other settings:\n  steps: 3 there, 2 asked(.|\n)*--overwrite"
    ):
        make(out)
    generate_images.generate_images(job(), out, N, overwrite=True, quiet=True)
    assert content(out) == finished[kind]


def test_a_folder_grows_and_does_not_shrink(finished, tmp_path):
    out = tmp_path / "o" / "images"
    make(out, n=5)
    make(out)
    assert content(out) == finished["images"]
    with pytest.raises(ValueError, match="n: 11 there, 5 asked"):
        make(out, n=5)


def test_images_begin_where_asked(finished, tmp_path):
    out = generate_images.generate_images(job(), tmp_path / "o", 3, first_seed=7, quiet=True)
    files = content(out)
    assert set(files) == {"000007.png", "000008.png", "000009.png", "card.json"}
    assert files["000008.png"] == finished["images"]["000008.png"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds files that are not a sampling run's"):
        generate_images.generate_images(job(), tmp_path, 3, overwrite=True, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.png"]


@pytest.mark.parametrize("ending", [".npz", ".tar"])
def test_a_large_file_is_written_in_bounded_memory(tmp_path, ending):
    output = make_writer(tmp_path / f"a{ending}")
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)  # 786 kB, and incompressible
    output.begin({"num_images": 1024}, False)
    for start in range(0, 1024, 64):
        output.put(range(start, start + 64), images, [0] * 64)
    tracemalloc.start()
    output.finish(range(1024), [0] * 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / f"a{ending}").stat().st_size > 16 * images.nbytes
    assert peak < 4 * images.nbytes


def test_batches_are_consecutive():
    assert consecutive_batches([0, 1, 2, 3, 4, 7, 8, 10], 3) == [
        range(3),
        range(3, 5),
        range(7, 9),
        range(10, 11),
    ]
    assert consecutive_batches([], 3) == []


@pytest.mark.parametrize(
    ("out", "n", "message"),
    [
        ("a.npz", 0, "n 0 must be at least 1"),
        ("a.jpg", 3, "neither a folder nor a .npz, .tar or .png"),
    ],
)
def test_bad_requests(tmp_path, out, n, message):
    with pytest.raises(ValueError, match=message):
        generate_images.generate_images(job(), tmp_path / out, n, quiet=True)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_the_network_cannot(tmp_path):
    with pytest.raises(ValueError, match="9x9 does not fit"):
        make(tmp_path / "a.npz", size=(9, 9))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a pixel model with named classes, a weaker one, an unconditional one, and a latent one."""
    folder = tmp_path_factory.mktemp("models")
    strong = tiny()
    strong.info = dataclasses.replace(strong.info, labels=tuple("abcdefghij"))
    mz.save_model(strong, folder / "strong")
    mz.save_model(tiny(seed=1), folder / "weak")
    mz.save_model(tiny(num_classes=0), folder / "free")
    mz.save_model(tiny("diffit-latent-tiny"), folder / "latent")
    return folder


def run(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    """The command line: exit code and what it said."""
    monkeypatch.setattr(sys, "argv", ["mezzotint", "sample", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_command_line_makes_what_it_says(models, tmp_path, monkeypatch, capsys):
    words = [
        "--num-images",
        6,
        "--steps",
        3,
        "--sampler",
        "ddim:eta=0.5",
        "--discretization",
        "even_logsnr:logsnr_min=-8,logsnr_max=8",
    ]
    words += [
        "--guidance",
        "scale=2,low=-3,high=4",
        "--clip",
        "static",
        "--label",
        "c",
        "7",
        "--size",
        "8x16",
    ]
    code, said = run(monkeypatch, capsys, models / "strong", *words, "--out", tmp_path / "a.npz")
    assert code == 0, said
    card = json.loads((tmp_path / "a.npz.json").read_text())
    assert (
        f"6 images, {card['network_calls_per_image']} network calls each: {tmp_path / 'a.npz'}"
        in said
    )
    assert "6/6 images" in said
    assert "images/s" in said
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 8, 16, 3)
        assert arrays["arr_1"].tolist() == [2, 7, 2, 7, 2, 7]
    assert card["sampler"] == {"name": "ddim", "options": {"eta": 0.5}}
    assert card["guidance"] == {"scale": 2.0, "convention": "dit", "low": -3.0, "high": 4.0}
    assert card["logsnr"] == [-8.0, "inf"]


def test_the_command_line_follows_a_protocol(models, tmp_path, monkeypatch, capsys):
    words = [
        "--protocol",
        "edm2",
        "--dtype",
        "float32",
        "--steps",
        4,
        "--guidance",
        "1.5",
        "--guide-model",
        models / "weak",
    ]
    code, said = run(
        monkeypatch, capsys, models / "strong", *words, "--num-images", 2, "--out", tmp_path / "a"
    )
    assert code == 0, said
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert card["protocol"] == "edm2"
    assert [line.split(":")[0] for line in card["deviations"]] == [
        "steps",
        "guidance",
        "dtype",
        "codec",
    ]
    assert card["network_calls_per_image"] == 2 * 7
    assert card["guide"]["sha256"] != card["model"]["sha256"]


def test_latents_are_written_raw(models, tmp_path, monkeypatch, capsys):
    words = ["--latents", "--num-images", 3, "--steps", 2, "--out", tmp_path / "a.npz"]
    code, said = run(monkeypatch, capsys, models / "latent", *words)
    assert code == 0, said
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 4, 8, 8)
        assert arrays["arr_0"].dtype == np.float32
    assert json.loads((tmp_path / "a.npz.json").read_text())["codec"] is None


def test_a_latent_model_with_its_decoder(models, tmp_path, shared):
    """TAESD decodes Stable Diffusion's latents; eight pixels a cell."""
    pytest.importorskip("diffusers")
    made = make_job(models / "latent", {"steps": 2}, codec=str(shared("data/taesd")))
    out = generate_images.generate_images(made, tmp_path / "a.npz", 2, quiet=True)
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (2, 64, 64, 3)
    assert json.loads((tmp_path / "a.npz.json").read_text())["codec"]["sha256"] == made.decoder.hash


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strong", "--steps", "0"], "0 steps are not enough"),
        (["latent", "--discretization", "respaced", "--steps", "1001", "--latents", "--out", "a.npz"], "than the table's 1000"),
        (["strong", "--guidance", "scale=2,low=30,high=40"], "lies outside the schedule"),
        (["free", "--guidance", "2"], "unconditional network cannot be guided"),
        (["free", "--label", "3"], "this model is unconditional"),
        (["strong", "--label", "rose"], "unknown label 'rose'"),
        (["strong", "--label", "12"], "label 12 is out of range"),
        (["strong", "--label-order", "radnom"], "did you mean random"),
        (["strong", "--protocol", "edm3"], "did you mean edm2"),
        (["strong", "--guide-model", "free", "--guidance", "2"], "has num_classes 0, the model 10"),
        (["strong", "--guide-model", "weak"], "a guide needs a guidance scale"),
        (["strong", "--codec", "taesd"], "codec taesd does not fit a model that works in pixels"),
        (["strong", "--latents"], "latents are written as .npz"),
        (["strong", "--trajectory", "--interpolate", "3"], "one look at a time"),
        (["strong", "--mask", "m.png"], "only with an image"),
        (["absent"], "there is no folder"),
    ],
)  # fmt: skip
def test_bad_command_lines_are_one_sentence(models, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        str(models / w) if w in ("strong", "weak", "free", "latent", "absent") else w for w in words
    ]
    code, said = run(monkeypatch, capsys, *words)
    assert code == 1
    assert message in said
    assert said.startswith("mezzotint: ")
    assert not list(tmp_path.iterdir())
