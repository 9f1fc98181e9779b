"""Shards: each image once, the same bytes whoever writes them, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers.image_files import png, write_folder
from helpers.s3_server import running_server
from helpers.tiny_t5 import saved_t5
from helpers.tiny_vae import saved_vae
from mezzotint import cli
from mezzotint.core.distributed import WorkShare
from mezzotint.core.object_store import list_files, read_bytes
from mezzotint.data import prepare_shards as module
from mezzotint.data.image_dataset import open_images
from mezzotint.data.latent_dataset import LatentDataset
from mezzotint.data.prepare import prepare_latents, prepare_source
from mezzotint.data.prepare_shards import (
    ShardPlan,
    prepare_shards,
    resolve_address,
    write_shards,
)
from mezzotint.data.prepared_forms import get_form
from mezzotint.data.shard_format import RowHash, ShardCard, parse_card

NUM_SHARDS = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """23 images in two classes, sorted by class; two damaged, some captioned."""
    files: dict[str, bytes | str] = {
        f"{'ab'[i > 11]}/{i:02d}.png": png(i, (20 + i, 40 - i)) for i in range(23)
    }
    for name in ("a/03.png", "b/17.png"):
        files[name] = files[name][:200]
    files["a/00.txt"], files["b/20.txt"] = "the red circle", "a blue square"
    return write_folder(tmp_path_factory.mktemp("pictures"), files)


def plan_of(pictures: Path, **changes) -> ShardPlan:
    images = open_images(pictures, size=16, keep_in_memory=False)
    return ShardPlan(images, **{"num_shards": NUM_SHARDS, "form": get_form("raw"), **changes})


def read_card(address: str) -> ShardCard:
    return parse_card(read_bytes(f"{address}/mezzotint-shards.json"), address)


def read_rows(address: str) -> list[dict]:
    card, rows = read_card(address), []
    for shard in card.shards:
        table = pq.read_table(f"{address.removeprefix('file://')}/{shard.name}")
        assert table.num_rows == shard.rows
        rows += table.to_pylist()
    assert len(rows) == card.count
    return rows


def content_of(address: str) -> dict[str, bytes]:
    """Return all files of an address, hidden ones too."""
    return {
        file.address.rpartition("/")[2]: read_bytes(file.address) for file in list_files(address)
    }


@pytest.fixture(scope="module")
def once(pictures, tmp_path_factory) -> str:
    """The address of the shards of one process."""
    address = resolve_address(str(tmp_path_factory.mktemp("once") / "shards"))
    assert write_shards(plan_of(pictures), address) is not None
    return address


# --- what the shards hold


def test_every_image_is_in_one_shard_as_the_source_has_it(pictures, once):
    images, rows = open_images(pictures, size=16), read_rows(once)
    index = {images.name(i): i for i in range(23)}
    assert sorted(row["name"] for row in rows) == sorted(set(index) - {"a/03.png", "b/17.png"})
    for row in rows:
        i = index[row["name"]]
        assert row["image"] == images.image(i).numpy().tobytes()
        assert (row["label"], row["text"]) == (images.label(i), images.text(i))
    for shard in read_card(once).shards:  # the source is sorted by class
        table = pq.read_table(f"{once.removeprefix('file://')}/{shard.name}").to_pylist()
        assert {row["label"] for row in table} == {0, 1}
        hashed = RowHash()
        for row in table:
            hashed.add(*(row[name] for name in ("image", "label", "text", "name")), None)
        assert hashed.hexdigest() == shard.sha256


def test_the_report_adds_up_to_that_of_one_folder(pictures, once, tmp_path):
    whole = prepare_source(pictures, tmp_path / "out", 16, progress=False)
    total = json.loads(read_bytes(f"{once}/report.json"))
    same = whole.keys() - {"duplicates", "duplicates_with_other_labels"}
    assert {name: total[name] for name in same} == {name: whole[name] for name in same}
    assert (total["shards"], total["bytes"]) == (NUM_SHARDS, 21 * 16 * 16 * 3)
    card = read_card(once)
    assert sorted(name[:8] for name in card.left_out) == ["a/03.png", "b/17.png"]
    assert sum(shard.unreadable for shard in card.shards) == 2
    assert (card.kind, card.form, card.label_names) == ("images", "raw", ["a", "b"])


def test_rows_of_a_table_keep_missing_labels_and_captions(tmp_path):
    labels, texts = ["x", None, "y", "x", None], ["a", "b", None, None, "e"]
    rows = {"image": [png(i) for i in range(5)], "label": labels, "text": texts}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    out = str(tmp_path / "shards")
    prepare_shards(str(tmp_path / "rows.parquet"), out, 8, 2, progress=False)
    card = read_card(out)
    assert (card.label_names, card.unlabelled) == (["x", "y"], 2)
    found = {(row["label"], row["text"]) for row in read_rows(out)}
    assert found == {(0, "a"), (None, "b"), (1, None), (0, None), (None, "e")}


def test_datasets_reads_a_shard(once, tmp_path):
    import datasets

    path = f"{once.removeprefix('file://')}/shard-00000.parquet"
    read = datasets.load_dataset(
        "parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read.features["label"].names == ["a", "b"]
    assert len(read[0]["image"]) == 16 * 16 * 3
    assert json.loads(pq.read_metadata(path).metadata[b"mezzotint"])["rows"] == len(read)


def test_a_compressed_form_is_that_of_prepare(pictures, tmp_path):
    address = resolve_address(str(tmp_path / "shards"))
    write_shards(plan_of(pictures, form=get_form("webp-lossless")), address)
    images = open_images(pictures, size=16)
    index = {images.name(i): i for i in range(23)}
    for row in read_rows(address)[:5]:
        decoded = get_form("webp-lossless").decode(np.frombuffer(row["image"], np.uint8), ())
        assert isinstance(decoded, Image.Image)
        pixels = np.asarray(decoded).transpose(2, 0, 1)
        assert (pixels == images.image(index[row["name"]]).numpy()).all()


def test_latents_are_those_of_a_folder_of_latents(pictures, tmp_path):
    pytest.importorskip("diffusers")
    codec = str(saved_vae(tmp_path / "vae", seed=0))
    out = str(tmp_path / "shards")
    words = prepare_shards(str(pictures), out, 16, 3, codec_name=codec, progress=False)
    prepare_latents(pictures, tmp_path / "folder", 16, codec, progress=False)
    whole, card = LatentDataset(tmp_path / "folder"), read_card(out)
    index = {whole.name(i): i for i in range(len(whole))}
    rows = read_rows(out)
    assert len(rows) == len(index)
    for row in rows:
        moments = np.frombuffer(row["image"], np.float16).reshape(card.row_shape)
        assert torch.equal(torch.from_numpy(moments.copy()), whole.moments(index[row["name"]]))
    assert card.row_shape == (2, 2, 4, 8, 8)
    assert (card.codec, card.codec_hash) == (whole.codec_name, whole.codec_hash)
    for name in ("mean", "std", "overall_std"):
        assert np.allclose(card.statistics[name], whole.statistics[name], rtol=1e-9)
    assert "mean and deviation by channel" in words
    assert "21 images" in words


def test_captions_are_embedded_as_in_training(pictures, tmp_path):
    pytest.importorskip("transformers")
    from mezzotint.data.text_encoder import open_text_encoder

    folder, out = str(saved_t5(tmp_path / "t5", seed=0)), str(tmp_path / "shards")
    prepare_shards(
        str(pictures), out, 16, 2, encoder_name=folder, text_dtype="bfloat16", progress=False
    )
    encoder = open_text_encoder(folder, dtype_name="bfloat16")
    card, with_tokens = read_card(out), 0
    for row in read_rows(out):
        if row["text"] is None:
            assert row["tokens"] is None
            continue
        bits = torch.frombuffer(bytearray(row["tokens"]), dtype=torch.bfloat16)
        assert torch.equal(bits.reshape(-1, card.captions["width"]), encoder.states(row["text"]))
        with_tokens += 1
    assert with_tokens == card.captions["captions"] == 2
    assert card.captions["encoder_hash"] == encoder.hash
    assert card.captions["longest"] == 4  # "the red circle" and its end


def test_an_encoder_needs_captions(tmp_path):
    bare = write_folder(tmp_path / "bare", {f"{i}.png": png(i) for i in range(3)})
    with pytest.raises(ValueError, match="no image has a caption"):
        prepare_shards(str(bare), str(tmp_path / "out"), 16, 1, encoder_name="t5", progress=False)
    assert not (tmp_path / "out").exists()


# --- who writes them


def test_the_bytes_do_not_depend_on_the_number_of_processes(pictures, once, tmp_path):
    address = resolve_address(str(tmp_path / "shards"))
    plan = plan_of(pictures)
    assert write_shards(plan, address, WorkShare(2, 3)) is None
    assert write_shards(plan, address, WorkShare(0, 3)) is None
    assert write_shards(plan, address, WorkShare(1, 3)) is not None
    assert content_of(address) == content_of(once)


KILLED = """
import os, signal, sys
from pathlib import Path
from mezzotint.core.distributed import WorkShare
from mezzotint.data import prepare_shards as module
from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepared_forms import get_form

images = open_images(sys.argv[1], size=16, keep_in_memory=False)
plan = module.ShardPlan(images, int(sys.argv[2]), get_form("raw"))
write = module.write_shard

def killed_halfway(plan, k, path, bar):
    write(plan, k, path, bar)
    if k == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

module.write_shard = killed_halfway
for address in sys.argv[3:]:
    children = []
    for rank in range(3):
        if not (child := os.fork()):
            module.write_shards(plan, address, WorkShare(rank, 3))
            os._exit(0)
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_a_killed_process_costs_one_shard(pictures, once, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of what is written before it is sent
    monkeypatch.setattr(tempfile, "tempdir", None)
    addresses = (f"file://{tmp_path}/shards", "s3://bucket/deep/shards")
    with running_server(tmp_path / "served"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(pictures), str(NUM_SHARDS), *addresses],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines() == ["[-9, 0, 0]"] * 2
        for address in addresses:
            _finish_after_kill(address, pictures, once, monkeypatch)
    assert not list(tmp_path.glob("*.partial"))


def _finish_after_kill(address: str, pictures: Path, once: str, monkeypatch) -> None:
    left = {name for name in content_of(address) if not name.startswith(".")}
    assert left == {f"shard-0000{k}.parquet" for k in range(3)}
    before = {file.address: file.version for file in list_files(address)}
    written = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_shard", _noting(module.write_shard, written))
        assert write_shards(plan_of(pictures), address) is not None
        assert written == [3]
        assert content_of(address) == content_of(once)
        after = {file.address: file.version for file in list_files(address)}
        assert all(after[name] == version for name, version in before.items() if name in after)
        write_shards(plan_of(pictures), address)  # again: nothing is written, the card neither
        assert {file.address: file.version for file in list_files(address)} == after
        assert written == [3]


def _noting(write, written: list[int]):
    def write_and_note(plan, k, path, bar):
        written.append(k)
        write(plan, k, path, bar)

    return write_and_note


def test_a_store_that_is_away_for_a_while_is_waited_for(pictures, once, tmp_path, monkeypatch):
    write = module.write_shard
    with running_server(tmp_path / "served") as server:

        def write_while_away(plan, k, path, bar):
            write(plan, k, path, bar)
            if k == 1:
                server.kill()
                threading.Timer(1.0, server.start).start()

        monkeypatch.setattr(module, "write_shard", write_while_away)
        assert write_shards(plan_of(pictures), "s3://bucket/shards") is not None
        assert content_of("s3://bucket/shards") == content_of(once)


def test_ranks_of_torchrun_share_the_shards(pictures, once, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out, said = str(tmp_path / "shards"), []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        said.append(prepare_shards(str(pictures), out, 16, NUM_SHARDS, progress=False))
    assert "the card will be written when the other processes have finished" in said[0]
    assert "4 shards" in said[1]
    assert "2 unreadable: " in said[1]
    assert content_of(out) == content_of(once)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed: 0 there, 1 given"),
        ({"num_shards": 3}, "shards: 4 there, 3 given"),
        ({"num_shards": 5}, "shards: 4 there, 5 given"),
        ({"form": get_form("jpeg-95")}, "form: raw there, jpeg-95 given"),
    ],
)
def test_shards_of_another_plan_are_refused(pictures, once, changes, said):
    before = content_of(once)
    with pytest.raises(ValueError, match=said):
        write_shards(plan_of(pictures, **changes), once, WorkShare(2, 3))
    assert content_of(once) == before


def test_other_images_are_another_plan(once, tmp_path):
    other = write_folder(tmp_path / "other", {f"a/{i}.png": png(50 + i) for i in range(23)})
    with pytest.raises(ValueError, match=r"source: .* there, .* given"):
        write_shards(plan_of(other), once)


def test_a_damaged_shard_is_named(pictures, once, tmp_path):
    shutil.copytree(once.removeprefix("file://"), tmp_path / "copy")
    shard = tmp_path / "copy" / "shard-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"copy/shard-00002.parquet is no shard .* delete it"):
        write_shards(plan_of(pictures), resolve_address(str(tmp_path / "copy")))


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("new", "--shards 0", "--shards 0 must be"),
        ("new", "--shards 24", "24 shards of 23 images; give 1 to 23"),
        ("full", "--shards 2", "full holds other files than shards: mine.txt"),
        ("full/mine.txt", "--shards 2", "mine.txt is a file; give a folder"),
        (
            "full/mine.txt/below",
            "--shards 2",
            "below/shard-00000.parquet cannot be written",
        ),
        ("file:///tmp/a*b", "--shards 2", "file:///tmp/a*b holds a *"),
        ("new", "--shards 2 --form jpeg-95 --codec taesd", "--form jpeg-95 stores images"),
        ("ssh://host/x", "--shards 2", "ssh:// is no scheme"),
        ("https://host/x", "--shards 2", "can be read and not written"),
        ("s3://bucket/x", "", "add --shards N"),
        ("s3://absent/x", "--shards 2", "absent"),
        ("new", "--seed 3", "add --shards N, or leave it out"),
    ],
)
def test_bad_input_is_one_sentence(pictures, tmp_path, capsys, monkeypatch, out, options, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    command = ["mezzotint", "prepare", str(pictures), out, "--size", "16", *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    before = sorted(os.listdir(tmp_path))
    served = tmp_path.parent / f"{tmp_path.name}-served"
    with running_server(served), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    printed = capsys.readouterr().err.strip()
    assert said in printed
    assert len(printed.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before
