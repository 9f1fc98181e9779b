"""Files of samples: equal for any batch size and after any interruption, and never half-written."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_models import tiny
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate.image_source import from_job, open_image_source
from mezzotint.evaluate.results import make_protocol
from mezzotint.sampling.generate_images import (
    BackgroundWriter,
    consecutive_batches,
    generate_images,
)
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.sampling.writers import encode_png, encode_pngs, make_writer

N = 11
SETTINGS = SamplingSettings(
    sampler=Spec("ancestral"), steps=2, batch=4, guidance=Guidance(scale=1.5)
)
KINDS = ("images", "images.npz", "images.tar", "images.png")


def job(**changes) -> SamplingJob:
    settings = dataclasses.replace(SETTINGS, **changes)
    return SamplingJob(
        model=tiny(), settings=settings, classes=tuple(range(10)), label_order="random"
    )


def make(out: Path, num_images: int = N, overwrite: bool = False, **changes) -> Path:
    return generate_images(job(**changes), out, num_images, overwrite=overwrite, quiet=True)


def content(out: Path) -> dict[str, bytes]:
    """Return an output's files and card by name, after checking that there are no others."""
    files = sorted(out.iterdir()) if out.is_dir() else [out, out.with_name(f"{out.name}.json")]
    others = {p.name for p in out.parent.iterdir()} - {out.name, f"{out.name}.json"}
    assert not others
    return {f.name: f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of uninterrupted runs by kind."""
    torch.set_num_threads(1)
    return {kind: content(make(tmp_path_factory.mktemp("finished") / kind)) for kind in KINDS}


def test_every_format_holds_the_same_images_and_labels(finished, tmp_path):
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
    source = open_image_source(tmp_path / "a.npz")  # as evaluation reads it
    assert source.num_images == N
    assert torch.equal(torch.cat(list(source.batches(0, N))), drawn)
    (tmp_path / "a.tar").write_bytes(finished["images.tar"]["images.tar"])
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == [f"{i:09d}.{e}" for i in range(N) for e in ("png", "cls")]
    images = open_images(str(tmp_path / "a.tar"), size=8)  # as training reads it
    pixels, read = images.batch(range(N))
    assert torch.equal(pixels, drawn)
    names = images.label_names
    assert read.tolist() == labels if names is None else [int(names[i]) for i in read] == labels
    sheet = Image.open(io.BytesIO(finished["images.png"]["images.png"]))
    assert sheet.size[0] > 4 * 64


@pytest.mark.parametrize("kind", ["images", "images.npz"])
def test_files_and_the_model_give_the_same_evaluation_protocol(kind, finished, tmp_path):
    out = tmp_path / kind
    folder = out if kind == "images" else tmp_path
    folder.mkdir(exist_ok=True)
    for name, data in finished[kind].items():
        (folder / name).write_bytes(data)
    of_files = make_protocol(open_image_source(out), (8, 8))
    of_model = make_protocol(from_job(job(), N), (8, 8))
    assert dataclasses.replace(of_files, source=of_model.source) == of_model
    assert (of_files.steps, of_files.seeds) == (2, "0...10")
    assert "ancestral" in of_files.sampler
    card = out / "card.json" if kind == "images" else out.with_name(f"{kind}.json")
    for other in ("{", "[1]", '{"mezzotint_samples": 99}'):
        card.write_text(other)
        assert open_image_source(out).metadata == {"preprocessing": "none"}


def test_the_protocol_of_part_of_a_run_says_so(finished, tmp_path):
    for name, data in finished["images"].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "000003.png").unlink()
    assert open_image_source(tmp_path).metadata["seeds"] == "10 of 0...10"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_for_any_batch(finished, tmp_path, kind):
    for batch in (1, 7, 64):
        again = content(make(tmp_path / str(batch) / kind, batch=batch))
        assert again == finished[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_after_each_batch(finished, tmp_path, kind, monkeypatch):
    """Every run makes one batch, then fails; the final files are those of an uninterrupted run."""
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
    assert made == list(range(N))  # none twice, none missing
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
    """The disk is full at the n-th file after the card; later there is space again."""
    out = tmp_path / "o" / kind
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1 + when:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left while writing .*/o/"):
        make(out)
    assert not list((tmp_path / "o").rglob("*.partial"))
    assert out.exists() == (kind == "images")
    monkeypatch.undo()
    make(out)
    assert content(out) == finished[kind]


def test_a_full_disk_raises_before_sampling(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(SamplingJob, "draw", lambda self, seeds: pytest.fail("sampled"))
    with pytest.raises(OSError, match="1000 bytes"):
        make(tmp_path / "a.npz")


def test_a_finished_file_is_kept_without_overwrite(finished, tmp_path):
    out = make(tmp_path / "o" / "images.npz")
    with pytest.raises(ValueError, match="--overwrite"):
        make(out)
    assert content(out) == finished["images.npz"]
    make(out, overwrite=True, steps=3)
    assert content(out)["images.npz"] != finished["images.npz"]["images.npz"]


@pytest.mark.parametrize("card", [None, '{"title": "holiday"}'])
def test_a_png_without_a_sampling_card_is_kept_without_overwrite(finished, tmp_path, card):
    out = tmp_path / "images.png"
    out.write_bytes(b"mine")
    if card is not None:
        (tmp_path / "images.png.json").write_text(card)
    with pytest.raises(ValueError, match="--overwrite"):
        make(out)
    assert out.read_bytes() == b"mine"
    make(out, overwrite=True)
    assert content(make(out)) == finished["images.png"]  # its own output is replaced


@pytest.mark.parametrize("kind", ["images", "images.npz"])
def test_an_unfinished_output_of_other_settings_is_refused(finished, tmp_path, kind, monkeypatch):
    out = tmp_path / "o" / kind
    real = SamplingJob.draw
    monkeypatch.setattr(
        SamplingJob, "draw", lambda self, seeds: 1 / 0 if seeds[0] else real(self, seeds)
    )
    with pytest.raises(ZeroDivisionError):
        make(out, steps=3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"steps: 3 there, 2 given(.|\n)*--overwrite"):
        make(out)
    make(out, overwrite=True)
    assert content(out) == finished[kind]


def test_a_folder_grows_and_does_not_shrink(finished, tmp_path):
    out = tmp_path / "o" / "images"
    make(out, 5)
    make(out)
    assert content(out) == finished["images"]
    with pytest.raises(ValueError, match="num_images: 11 there, 5 given"):
        make(out, 5)


@pytest.mark.parametrize("name", ["000003.png", "000099.png"])
def test_a_folder_of_the_same_settings_is_begun_again_with_overwrite(finished, tmp_path, name):
    out = make(tmp_path / "o" / "images")
    (out / name).write_bytes(b"damaged")
    (out / "cover.png").write_bytes(b"mine")
    make(out, overwrite=True)
    assert content(out) == finished["images"] | {"cover.png": b"mine"}


@pytest.mark.parametrize("names", [[""], ["host.7"], ["host.7", "elsewhere.8"]])
def test_a_folder_left_before_its_first_card_is_taken(finished, tmp_path, names):
    out = tmp_path / "o" / "images"
    out.mkdir(parents=True)
    for name in names:
        (out / f".card.json.{name}.partial").write_bytes(b'{"mezz')
    make(out)
    assert content(out) == finished["images"]


def test_the_first_seed(finished, tmp_path):
    out = generate_images(job(), tmp_path / "o", 3, first_seed=7, quiet=True)
    files = content(out)
    assert set(files) == {"000007.png", "000008.png", "000009.png", "card.json"}
    assert files["000008.png"] == finished["images"]["000008.png"]


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="choose another --out"):
        make(tmp_path, 3, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.png"]


@pytest.mark.parametrize("ending", [".npz", ".tar"])
def test_a_large_file_is_written_in_bounded_memory(tmp_path, ending):
    writer = make_writer(tmp_path / f"a{ending}")
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)  # 786 kB, incompressible
    writer.open({"num_images": 1024}, False)
    for start in range(0, 1024, 64):
        writer.write(range(start, start + 64), images, [0] * 64)
    tracemalloc.start()
    writer.close(range(1024), [0] * 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / f"a{ending}").stat().st_size > 16 * images.nbytes
    assert peak < 4 * images.nbytes


def test_a_batch_is_written_while_the_next_is_drawn():
    """The first write ends only once the second batch is handed over."""
    second, written = threading.Event(), []

    def write(batch, images):
        if batch.start == 0:
            assert second.wait(60)
        written.append(batch)

    with BackgroundWriter(write) as background:
        background.put(range(2), torch.zeros(2))
        assert not written
        second.set()
        background.put(range(2, 4), torch.zeros(2))
        assert written[0] == range(2)
    assert written == [range(2), range(2, 4)]


def test_an_error_of_writing_is_raised_once_at_the_next_batch():
    def write(batch, images):
        raise OSError(28, "full")

    with BackgroundWriter(write) as background:
        background.put(range(2), torch.zeros(2))
        with pytest.raises(OSError, match="full"):
            background.put(range(2, 4), torch.zeros(2))
        background.wait()


def test_pngs_encoded_in_threads_are_those_encoded_one_by_one():
    images = torch.randint(0, 256, (9, 3, 5, 7), dtype=torch.uint8)
    labels = list(range(9))
    assert list(encode_pngs(images, labels)) == [
        encode_png(image, label) for image, label in zip(images, labels, strict=True)
    ]
    assert list(encode_pngs(images[:2])) == [encode_png(image) for image in images[:2]]
    assert len({*encode_pngs(images[:1], [0]), *encode_pngs(images[:1])}) == 2


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
        ("a.npz", 0, "num_images 0"),
        ("a.jpg", 3, "a.jpg"),
    ],
)
def test_bad_outputs(tmp_path, out, n, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / out, n)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_for_a_size_that_the_network_cannot_take(tmp_path):
    with pytest.raises(ValueError, match="9x9"):
        make(tmp_path / "a.npz", size=(9, 9))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_card_json_of_others_claims_no_folder(tmp_path, overwrite):
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "card.json").write_text('{"title": "holiday"}')
    (folder / "000001.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"card.json is not a card of mezzotint sample"):
        make(folder, overwrite=overwrite)
    assert (folder / "000001.png").read_bytes() == b"precious"


def test_files_of_others_beside_an_output_stay(tmp_path):
    (tmp_path / "a.npz.json").write_text('{"title": "holiday"}')
    with pytest.raises(ValueError, match=r"a.npz.json exists and is not a card"):
        make(tmp_path / "a.npz")
    (tmp_path / ".b.npz.parts").mkdir()
    (tmp_path / ".b.npz.parts" / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"b.npz.parts holds files"):
        make(tmp_path / "b.npz")
    assert (tmp_path / ".b.npz.parts" / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["a.npz", "a.tar", "a.png"])
def test_a_pipe_gets_the_whole_file(finished, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.mkfifo(tmp_path / name)
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / name).read_bytes()))
    reader.start()
    make(tmp_path / name)
    reader.join(10)
    assert received == [finished[f"images{name[1:]}"][f"images{name[1:]}"]]
    # Nothing lies beside a pipe or device, and no shard is left in the current folder.
    assert sorted(os.listdir(tmp_path)) == sorted([name, "here"])
    assert not os.listdir()


@pytest.mark.parametrize("name", ["null", "pipe.gif", "tty.x"])
def test_a_device_without_an_ending_of_ours_gets_the_grid(finished, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / name
    os.mkfifo(path)
    received = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    make(path)
    reader.join(10)
    assert received == [finished["images.png"]["images.png"]]
    assert os.listdir(tmp_path / "out") == [name]


@pytest.mark.parametrize(
    ("classes", "num_images", "columns"),
    [
        (tuple(range(10)), 30, 10),  # every class in turn: a column each
        (tuple(range(10)), 20, 10),
        (tuple(range(10)), 32, 8),  # the last turn is not whole
        ((3, 7, 9), 9, 3),
        ((3, 7), 16, 4),  # two columns would be a tall strip
        ((4,), 12, 4),
        ((3, 3, 5), 12, 4),  # two classes, one of them twice: no column each
    ],
)
def test_a_grid_has_one_column_per_class(tmp_path, classes, num_images, columns):
    settings = dataclasses.replace(SETTINGS, steps=1, batch=32, guidance=Guidance(scale=1.0))
    ordered = SamplingJob(model=tiny(), settings=settings, classes=classes, label_order="turn")
    out = generate_images(ordered, tmp_path / "grid.png", num_images, quiet=True)
    with Image.open(out) as grid:
        assert grid.width == 2 + columns * 66  # images of 64 pixels with margins of 2
