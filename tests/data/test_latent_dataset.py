"""Latent folders against their images, and training from either."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.tiny_vae import saved_vae
from mezzotint import config
from mezzotint.core.rng import Draws
from mezzotint.data import encode_latents as encode_module
from mezzotint.data.autoencoder import draw_latents, open_codec
from mezzotint.data.encode_latents import WorkShare, encode_latents
from mezzotint.data.image_dataset import open_images
from mezzotint.data.latent_dataset import (
    EncodedDataset,
    LatentDataset,
    encode_moments,
    open_dataset,
)
from mezzotint.data.prepare import prepare_latents
from mezzotint.data.transforms import to_model_range
from mezzotint.recipes import recipe_for
from mezzotint.train.loop import train
from mezzotint.train.sample_grid import preview_codec, to_visible

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    preview_codec.cache_clear()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL, saved by diffusers: factor 2, 4 channels, scale 0.7, shift 0.1."""
    return saved_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """11 images in two classes, one damaged, one captioned."""
    rng = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for i in range(11):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
    bad = root / "a" / "04.png"
    bad.write_bytes(bad.read_bytes()[:200])
    (root / "b" / "01.txt").write_text("the first of b")
    return root


# --- sets


def test_a_latent_folder_holds_images_and_mirror_images(image_folder, vae_folder, tmp_path):
    words = prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    raw, made, own = (
        open_images(image_folder, size=16),
        LatentDataset(tmp_path / "out"),
        open_codec(vae_folder),
    )
    assert (len(raw), len(made)) == (11, 10)
    assert (made.size, made.channels, made.label_names, made.num_classes) == (8, 4, ("a", "b"), 2)
    sound = [i for i in range(11) if raw.readable(i) == i]
    moments, labels = made.batch(range(10))
    for row, i in enumerate(sound):
        x = to_model_range(raw.image(i))[None]
        for view, picture in enumerate((x, x.flip(-1))):  # the mirror is encoded, not flipped
            mean, logvar = own.encode_moments(picture)
            assert torch.equal(moments[row, view, 0], mean[0].half())
            assert torch.equal(moments[row, view, 1], logvar[0].half())
        assert (made.label(row), made.name(row), made.text(row)) == (
            raw.label(i),
            raw.name(i),
            raw.text(i),
        )
    assert labels is not None
    assert labels.tolist() == [raw.label(i) for i in sound]
    assert not torch.equal(moments[:, 1], moments[:, 0].flip(-1))
    assert "a/04.png cannot be read" in words
    assert len(LatentDataset(tmp_path / "out", "test")) == 1


def test_statistics_are_of_the_drawn_latents(image_folder, vae_folder, tmp_path):
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    made = LatentDataset(tmp_path / "out")
    moments = made.batch(range(10))[0].double()
    means, logvars = moments.unbind(2)  # (image, view, channel, side, side)
    shape = (300, *means.shape)
    drawn = draw_latents(
        means.expand(shape), logvars.expand(shape), torch.randn(shape, dtype=torch.float64)
    )
    by_channel = drawn.transpose(0, 3).flatten(1)
    mean, std = by_channel.mean(1), by_channel.std(1)
    torch.testing.assert_close(
        torch.tensor(made.statistics["mean"], dtype=torch.float64), mean, atol=0.01, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor(made.statistics["std"], dtype=torch.float64), std, atol=0.01, rtol=0
    )


def test_a_scale_that_does_not_give_unit_deviation_is_reported(image_folder, tmp_path):
    odd = saved_vae(tmp_path / "odd", seed=0, scaling_factor=40.0)
    words = prepare_latents(image_folder, tmp_path / "out", 16, str(odd), progress=False)
    assert "! the latents' standard deviation is" in words
    assert "scale 40" in words


@pytest.mark.parametrize("stream", ["philox4x64", "philox4x32"])
def test_latents_depend_on_seed_and_image_number_only(image_folder, vae_folder, tmp_path, stream):
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    made = LatentDataset(tmp_path / "out")
    moments, _ = made.batch([3, 3, 5])

    def drawn(seed, numbers, mirror=True, rows=slice(None)):
        return made.to_model(moments[rows], Draws(seed, stream), numbers, mirror, lambda t: t)

    one = drawn(0, [7, 8, 9])
    assert torch.equal(one[1], drawn(0, [8], rows=slice(1, 2))[0])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, drawn(1, [7, 8, 9]))
    mirrored = drawn(0, list(range(40)), rows=[0] * 40)
    plain = drawn(0, list(range(40)), mirror=False, rows=[0] * 40)
    same = sum(torch.equal(a, b) for a, b in zip(mirrored, plain, strict=True))
    assert 10 < same < 30  # the other half shows the mirror


def test_encoded_and_stored_batches_are_equal(image_folder, vae_folder, tmp_path):
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    os.remove(image_folder / "a" / "04.png")
    open_with = {
        "size": 8,
        "channels": 4,
        "crop": "adm",
        "codec_name": str(vae_folder),
        "mirror": True,
    }
    read = open_dataset(str(tmp_path / "out"), **open_with)
    encoded = open_dataset(str(image_folder), **open_with)
    assert isinstance(read, LatentDataset)
    assert isinstance(encoded, EncodedDataset)
    for x, y in zip(read.batch([4, 0, 9]), encoded.batch([4, 0, 9]), strict=True):
        assert torch.equal(x, y)


def tiny_latent_recipe(source: Path, space: str = "") -> config.Recipe:
    changes = [
        f"data.source={str(source)!r}", f"data.codec={space!r}", "data.flip=true",
        "model.size=8", "model.width=16",
        "model.depth=1", "model.heads=2", "images=48", "batch=8", "log_every_images=8",
        "samples.every_images=48",
        "samples.count=2", "samples.sampler=ddim", "samples.steps=2", "save.every_images=24",
        "engine.precision=float32",
    ]  # fmt: skip
    return config.override(recipe_for("diffit-latent-tiny"), changes)


def test_training_on_encoded_and_stored_latents_is_bitwise_equal(
    image_folder, vae_folder, tmp_path
):
    os.remove(image_folder / "a" / "04.png")
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    read = train(tiny_latent_recipe(tmp_path / "out"), tmp_path / "read", quiet=True)
    encoded = train(
        tiny_latent_recipe(image_folder, str(vae_folder)), tmp_path / "encoded", quiet=True
    )
    weights = [load_file(run / "model" / "model.safetensors") for run in (read, encoded)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    cards = [json.loads((run / "model" / "config.json").read_text()) for run in (read, encoded)]
    assert {card["codec"] for card in cards} == {str(vae_folder.resolve())}
    with Image.open(next((read / "samples").glob("*.png"))) as grid:
        assert grid.height >= 16  # decoded: 8 cells of 2 pixels


def test_a_grid_without_decoder_shows_latents():
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(to_visible(z, "sd-vae-ft-ema"), z[:, :3] / 3)


def test_grids_of_stable_diffusion_latents_are_decoded_by_taesd(shared, tmp_path):
    shutil.copytree(shared("data/taesd"), tmp_path / "cache" / "codecs" / "taesd")
    found = preview_codec("sd-vae-ft-ema", torch.device("cpu"))
    assert found is not None
    assert found.name == "taesd"
    assert to_visible(torch.zeros(1, 4, 4, 4), "sd-vae-ft-mse").shape == (1, 3, 32, 32)


# --- interruption, sharing, refusals


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_processes_share_the_work_and_the_last_completes_the_folder(
    image_folder, vae_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(encode_module, "PIECE_BYTES", 3 * 2 * 2 * 2 * 4 * 8 * 8)
    images, own = open_images(image_folder, size=16), open_codec(vae_folder)
    encode_latents(images, tmp_path / "one", own, progress=False)
    done = [
        encode_latents(images, tmp_path / "two", own, WorkShare(rank, 3), progress=False)
        for rank in (2, 0, 1)
    ]
    assert done == [False, False, True]
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("piece-*.npy"))) == 4
    encode_latents(images, tmp_path / "three", own, WorkShare(0, 2), progress=False)
    with pytest.raises(ValueError, match="three is not complete"):
        open_dataset(
            str(tmp_path / "three"), size=8, channels=4, crop="adm", codec_name=str(vae_folder)
        )


def test_a_killed_prepare_resumes(vae_folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "in" / f"{i:02d}.png"
        )
    code = f"""
import time
from mezzotint.data import encode_latents, prepare
encode_latents.PIECE_BYTES = 3 * 2 * 2 * 2 * 4 * 8 * 8
encode_moments = encode_latents.encode_moments
encode_latents.encode_moments = lambda *a, **k: (time.sleep(0.1), encode_moments(*a, **k))[1]
source, out = {str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}
prepare.prepare_latents(source, out, 16, {str(vae_folder)!r}, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
    while len(list((tmp_path / "out").glob("piece-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "latents.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("piece-*.json")}
    host = socket.gethostname().replace(".", "-")
    left, living = (
        tmp_path / "out" / f".piece-000013.npy.{host}.{pid}.partial"
        for pid in (process.pid, os.getppid())
    )
    left.write_bytes(b"half")
    living.write_bytes(b"half")
    monkeypatch.setattr(encode_module, "PIECE_BYTES", 3 * 2 * 2 * 2 * 4 * 8 * 8)
    prepare_latents(tmp_path / "in", tmp_path / "out", 16, str(vae_folder), progress=False)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in kept.items())
    living.unlink()  # another process may be writing it
    prepare_latents(tmp_path / "in", tmp_path / "whole", 16, str(vae_folder), progress=False)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


@pytest.mark.parametrize("bad", [[0, 1, 2], [3, 4, 5], [9, 10], [0, 1, 2, 6, 7, 8]])
def test_a_piece_without_images_is_read_over(image_folder, vae_folder, tmp_path, monkeypatch, bad):
    """Every image of one or more of the four pieces is unreadable."""
    monkeypatch.setattr(encode_module, "PIECE_BYTES", 3 * 2 * 2 * 2 * 4 * 8 * 8)
    paths = sorted(image_folder.glob("*/*.png"))
    for i in bad:
        paths[i].write_bytes(b"damaged")
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    for path in [*(paths[i] for i in bad), image_folder / "a" / "04.png"]:
        path.unlink(missing_ok=True)
    prepare_latents(image_folder, tmp_path / "sound", 16, str(vae_folder), progress=False)
    made, sound = (LatentDataset(tmp_path / name) for name in ("out", "sound"))
    rows = range(len(sound))
    assert (len(made), made.label_names) == (len(sound), sound.label_names)
    assert made.inventory()[0] == sound.inventory()[0]
    assert [made.text(i) for i in rows] == [sound.text(i) for i in rows]
    for ours, theirs in zip(made.batch(rows), sound.batch(rows), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_other_codecs_sizes_and_images_are_refused(image_folder, vae_folder, tmp_path):
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    other = saved_vae(tmp_path / "other", seed=1)
    for source, size, space, words in [
        (image_folder, 16, other, "codec_hash"),
        (image_folder, 32, vae_folder, "size: 16 there, 32 given"),
        (image_folder / "a", 16, vae_folder, "pictures"),
    ]:
        with pytest.raises(ValueError, match=words):
            prepare_latents(source, tmp_path / "out", size, str(space), progress=False)
    with pytest.raises(ValueError, match="try --size 16"):
        prepare_latents(image_folder, tmp_path / "new", 17, str(vae_folder), progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        prepare_latents(image_folder, tmp_path / "mine", 16, str(vae_folder), progress=False)
    assert prepare_latents(
        image_folder, tmp_path / "out", 16, str(vae_folder), progress=False
    ).startswith("10 latents")


def test_datasets_that_do_not_fit_the_network_are_refused(image_folder, vae_folder, tmp_path):
    out = str(tmp_path / "out")
    prepare_latents(image_folder, out, 16, str(vae_folder), progress=False)

    def opened(source=out, codec_name=str(vae_folder), **changes):
        return open_dataset(
            source, **{"size": 8, "channels": 4, "crop": "adm", "codec_name": codec_name, **changes}
        )

    with pytest.raises(
        ValueError, match=r"8x8 cells, the network takes 4 and 16x16; set model\.size=8"
    ):
        opened(size=16)
    with pytest.raises(ValueError, match="latents of 4 channels"):
        opened(channels=16)
    with pytest.raises(ValueError, match="the network works on pixels"):
        opened(codec_name="pixels", channels=3, size=16)
    with pytest.raises(ValueError, match="out holds latents"):
        open_images(out, size=16)
    with pytest.raises(ValueError, match="latents of 4 channels, the network takes 16"):
        opened(source=str(image_folder), channels=16)
    with pytest.raises(ValueError, match=r"data\.codec.*sd-vae-ft-ema"):
        train(tiny_latent_recipe(tmp_path / "out", "sd-vae-ft-ema"), tmp_path / "run", quiet=True)


def test_non_finite_latents_are_refused(image_folder, vae_folder, tmp_path):
    huge = saved_vae(tmp_path / "huge", seed=0, scaling_factor=1e9)
    with pytest.raises(ValueError, match=r"a/00\.png: codec .*not finite in float16"):
        prepare_latents(image_folder, tmp_path / "bad", 16, str(huge), progress=False)
    with pytest.raises(ValueError, match="float16"):
        encode_moments(open_codec(huge), torch.zeros(3, 16, 16, dtype=torch.uint8), mirror=False)
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    piece = tmp_path / "out" / "piece-000000.npy"
    stored = np.load(piece)
    stored[2, 0, 0, 1, 3, 3] = np.nan
    np.save(piece, stored)
    made = LatentDataset(tmp_path / "out")
    made.batch([0, 1])
    with pytest.raises(ValueError, match=r"a/06\.png .*NaN"):
        made.batch([1, 2])


def test_damage_is_reported(image_folder, vae_folder, tmp_path):
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    for name, damage in [
        ("card", lambda d: (d / "latents.json").write_text("{")),
        ("format", lambda d: (d / "latents.json").write_text('{"format": 9}')),
        ("gone", lambda d: (d / "piece-000000.npy").unlink()),
        ("labels", lambda d: (d / "labels.npy").write_bytes(b"x")),
        ("cut", lambda d: os.truncate(d / "piece-000000.npy", 60)),
    ]:
        shutil.copytree(tmp_path / "out", tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(ValueError, match="prepare"):
            LatentDataset(tmp_path / name).batch([0])
    card = json.loads((tmp_path / "out" / "latents.json").read_text())
    for key, value in [
        ("factor", 0),
        ("size", "16"),
        ("channels", None),
        ("pieces", [1]),
        ("pieces", 3),
        ("count", 10**9),
        ("count", -1),
        ("label_names", 7),
        ("codec", []),
        ("statistics", None),
        ("notes", "x"),
    ]:
        (tmp_path / "out" / "latents.json").write_text(json.dumps({**card, key: value}))
        with pytest.raises(ValueError, match=r"latents\.json is damaged"):
            LatentDataset(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels[:-1], r"int64 \(9,\), not int64 \(10,\)"),
        (lambda labels: np.append(labels, 0), r"int64 \(11,\), not"),
        (lambda labels: labels[:, None], r"int64 \(10, 1\), not"),
        (lambda labels: labels[:0], r"int64 \(0,\), not"),
        (lambda labels: labels.astype(np.int32), "int32"),
        (lambda labels: labels.astype(np.float64), "float64"),
        (lambda labels: labels > 0, "bool"),
        (lambda labels: labels + 1, "the classes 1 to 2 of 2"),
        (lambda labels: labels - 2, "the classes -2 to -1 of 2"),
        (lambda labels: labels * 2**40, f"the classes 0 to {2**40} of 2"),
    ],
)
def test_labels_that_are_not_those_of_the_card_are_damage(
    image_folder, vae_folder, tmp_path, change, words
):
    prepare_latents(image_folder, tmp_path / "out", 16, str(vae_folder), progress=False)
    labels = np.load(tmp_path / "out" / "labels.npy")
    np.save(tmp_path / "out" / "labels.npy", change(labels))
    with pytest.raises(ValueError, match=rf"is damaged: labels\.npy: it holds .*{words}.*prepare"):
        LatentDataset(tmp_path / "out")
    np.save(tmp_path / "out" / "labels.npy", np.where(labels > 0, -1, labels))  # some unlabelled
    assert LatentDataset(tmp_path / "out").count_unlabelled() == 5
