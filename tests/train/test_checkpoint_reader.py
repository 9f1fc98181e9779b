"""Reading a checkpoint runs no code of it, and finds every damage."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import time

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from helpers.pickles import BUSY, DOUBLED, as_legacy, as_zip
from helpers.runs import assert_same_run, small
from mezzotint.train import checkpoint
from mezzotint.train.checkpoint_reader import PlainValues, file_sizes, read_metadata
from mezzotint.train.loop import train

MARKER = "code_ran"  # a folder in the working directory


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Built(Reduced):
    """Pickles as a call whose result gets a state."""

    def __reduce__(self):
        return (*self.call, {"x": 1})


def stack_global(module: str, name: str, argument: str) -> bytes:
    """The opcodes of protocol 4 that call module.name(argument)."""

    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def nested(evil):
    """A description that is right but for one value within."""
    return Metadata({}, planner_data={"a": [{"b": (evil,)}]}, storage_data={})


PAYLOADS = {
    "os.mkdir": lambda: pickle.dumps(Reduced(os.mkdir, MARKER)),
    "os.system": lambda: pickle.dumps(Reduced(os.system, f"mkdir {MARKER}")),
    "eval": lambda: pickle.dumps(Reduced(eval, f"__import__('os').mkdir({MARKER!r})")),
    "exec": lambda: pickle.dumps(Reduced(exec, f"import os; os.mkdir({MARKER!r})"), 0),
    "partial": lambda: pickle.dumps(functools.partial(os.mkdir, MARKER)),
    "nested": lambda: pickle.dumps(nested(Reduced(os.mkdir, MARKER))),
    "with a state": lambda: pickle.dumps(nested(Built(os.mkdir, MARKER))),
    "torch's own loader": lambda: pickle.dumps(Reduced(torch.load, MARKER)),
    "import": lambda: stack_global("builtins", "__import__", "os"),
    "stack global": lambda: stack_global("os", "mkdir", MARKER),
    "a dotted name": lambda: stack_global("torch", "serialization.os.mkdir", MARKER),
    "a dotted name of an allowed class": lambda: stack_global(
        "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__", MARKER
    ),
    "a module of an allowed class": lambda: stack_global(
        "torch.distributed.checkpoint.metadata", "os.mkdir", MARKER
    ),
    "protocol 0": lambda: f"cos\nmkdir\n(S'{MARKER}'\ntR.".encode(),
    "instance": lambda: f"(S'{MARKER}'\nios\nmkdir\n.".encode(),
    "object": lambda: f"(cos\nmkdir\nS'{MARKER}'\no.".encode(),
    "an attribute of a class": lambda: (
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'x'\nI1\nstb."
    ),
    "a persistent object": lambda: b"Pos.mkdir\n.",
    "another object": lambda: pickle.dumps({"state_dict_metadata": {}}),
    "a number": lambda: pickle.dumps(1),
    "an index beyond memory": lambda: b"\x80\x04Nr\xff\xff\xff\xff.",
    "bytes beyond memory": lambda: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "nothing": lambda: b"",
    "text": lambda: b"not a pickle",
}


@pytest.fixture
def description(whole):
    """The bytes that torch wrote, and what its own unpickling makes of them."""
    data = (whole / "checkpoints" / "96" / ".metadata").read_bytes()
    return data, pickle.loads(data)


def sign(folder):
    """Make the manifest of a checkpoint fit its files, as anyone who changes them can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_description_that_asks_for_anything_else_is_refused(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(PAYLOADS[payload]())
    with pytest.raises(ValueError, match=r"\.metadata (was refused|is damaged)"):
        read_metadata(tmp_path)
    assert not (tmp_path / MARKER).exists()
    assert not hasattr(Metadata, "x")


A_SET = "a set, or a mapping of an old format"
HASHED = {
    # name: (description, what it holds)
    "one key": (BUSY["key of a dict"], "a tuple as a key"),
    "many keys": (BUSY["keys of a dict"], "a tuple as a key"),
    "pairs": (BUSY["dict of pairs"], A_SET),
    "set": (BUSY["set"], A_SET),
    "frozenset": (BUSY["frozenset"], A_SET),
    "key beside a name": (b"\x80\x02}(U\x01aN)" + DOUBLED + b"Nu.", "a tuple as a key"),
    "short tuple": (pickle.dumps({("a", "b"): 1}), "a tuple as a key"),
    "number": (pickle.dumps({"a": {1: 2}}), "a int as a key"),
    "bytes": (pickle.dumps({b"a": 1}), "a bytes as a key"),
    "short set": (pickle.dumps([{"a", "b"}]), A_SET),
    "short frozenset": (pickle.dumps({"a": frozenset("ab")}), A_SET),
    "none within": (pickle.dumps(nested({None: 1})), "a NoneType as a key"),
    "set within": (pickle.dumps(nested({1, 2})), A_SET),
}


@pytest.mark.parametrize("name", HASHED)
def test_keys_that_take_time_to_hash_are_refused_at_once(tmp_path, name):
    content, words = HASHED[name]
    (tmp_path / ".metadata").write_bytes(content)
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"\.metadata was refused: it holds {words}"):
        read_metadata(tmp_path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_description_is_read_in_every_format_of_today(whole, description, tmp_path, protocol):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description[1], protocol))
    ours, again = read_metadata(whole / "checkpoints" / "96"), read_metadata(tmp_path)
    assert again.storage_data == ours.storage_data
    assert again.state_dict_metadata == ours.state_dict_metadata


def test_the_description_is_what_torch_reads(whole, description):
    ours, theirs = read_metadata(whole / "checkpoints" / "96"), description[1]
    assert ours.storage_data == theirs.storage_data
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, value in theirs.state_dict_metadata.items():
        other = ours.state_dict_metadata[name]
        if isinstance(value, BytesStorageMetadata):
            assert isinstance(other, BytesStorageMetadata)
        else:
            assert (other.size, other.chunks) == (value.size, value.chunks)
            assert other.properties.dtype == value.properties.dtype
    assert list(file_sizes(ours)) == ["__0_0.distcp"]


@pytest.mark.parametrize("path", ["../../model/model.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_files_outside_the_checkpoint_are_refused(tmp_path, description, path):
    metadata = description[1]
    next(iter(metadata.storage_data.values())).relative_path = path
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="names the file"):
        read_metadata(tmp_path)


def test_a_description_that_expands_is_refused(tmp_path, description):
    """Many names for one long list: its copies would be the product of both."""
    metadata = description[1]
    tensor = next(v for v in metadata.state_dict_metadata.values() if hasattr(v, "chunks"))
    tensor.chunks = tensor.chunks * 3000
    metadata.state_dict_metadata = {str(i): tensor for i in range(3000)}
    (tmp_path / ".metadata").write_bytes(data := pickle.dumps(metadata))
    assert len(data) < 200_000
    with pytest.raises(ValueError, match="9000000 parts"):
        read_metadata(tmp_path)


def test_resuming_from_a_payload_runs_nothing_and_goes_on_from_the_one_before(
    whole, stopped, monkeypatch, capsys
):
    folder = stopped(96)
    monkeypatch.chdir(folder)
    newest = folder / "checkpoints" / "96"
    (newest / ".metadata").write_bytes(pickle.dumps(Reduced(os.mkdir, MARKER)))
    sign(newest)
    train(small(), folder)
    assert "96 is damaged and passed over: .metadata was refused: it asks for" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert not (folder / MARKER).exists()
    assert_same_run(whole, folder)


class Evil(Reduced):
    """A number that runs code when it is unpickled."""


def saved(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("name", BUSY)
@pytest.mark.parametrize("form", [as_zip, as_legacy])
def test_a_value_that_takes_for_ever_to_read_is_refused(form, name, monkeypatch):
    monkeypatch.setattr("mezzotint.core.pickle_scan.EXPANDED_LIMIT", 1000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    index, none = MetadataIndex("a"), torch.Size([])
    item = ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
    with pytest.raises(ValueError, match="goes through more than"):
        PlainValues().load_bytes(item, io.BytesIO(form(BUSY[name])))


@pytest.mark.parametrize(
    "content", [saved(Evil(os.mkdir, MARKER)), as_zip(BUSY["set"])], ids=["code", "busy"]
)
def test_a_payload_in_a_value_that_is_no_tensor_is_not_run(whole, stopped, monkeypatch, content):
    """The learning rate is stored as a pickle of its own within the data file."""
    folder = stopped(96)
    monkeypatch.chdir(folder)
    newest = folder / "checkpoints" / "96"
    metadata = pickle.loads((newest / ".metadata").read_bytes())
    (index,) = [i for i in metadata.storage_data if i.fqn.endswith("param_groups.0.lr")]
    info = metadata.storage_data[MetadataIndex(index.fqn)]
    info.offset, info.length = (newest / "__0_0.distcp").stat().st_size, len(content)
    with (newest / "__0_0.distcp").open("ab") as file:
        file.write(content)
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(newest)
    assert checkpoint.find_checkpoint_damage(newest) is None  # so it is loaded
    lines = []
    monkeypatch.setattr("builtins.print", lines.append)
    train(small(), folder, quiet=True)
    assert not (folder / MARKER).exists()
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(whole, tmp_path):
    """In a description alone: read as before or refused; in a checkpoint: always named."""
    folder = tmp_path / "96"
    shutil.copytree(whole / "checkpoints" / "96", folder)
    choose, tried, kinds = random.Random(0), 0, set()
    original = (folder / ".metadata").read_bytes()
    for _ in range(300):
        data = bytearray(original)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        (folder / ".metadata").write_bytes(data)
        try:
            read_metadata(folder)
            kinds.add("read")
        except ValueError as error:
            kinds.add(str(error)[:24])
        tried += 1
    (folder / ".metadata").write_bytes(original)
    for name in sorted(p.name for p in folder.iterdir()):
        before = (folder / name).read_bytes()
        for _ in range(100):
            data = bytearray(before)
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            (folder / name).write_bytes(data)
            if name != "manifest.json":
                assert checkpoint.find_checkpoint_damage(folder) is not None
            else:
                checkpoint.find_checkpoint_damage(folder)  # returns, whatever it says
            tried += 1
        (folder / name).write_bytes(before)
    assert checkpoint.find_checkpoint_damage(folder) is None
    print(f"\n{tried} flipped bits in a checkpoint: {len(kinds)} kinds of answer, no other error")
