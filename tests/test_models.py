"""Model folders: round trips, failed saves, and files that claim more than they hold."""

from __future__ import annotations

import errno
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint as mz
from mezzotint import models
from mezzotint.backbones import registry as backbones


@pytest.fixture
def model():
    return mz.create_model(
        "dimr-tiny", dims=(16, 8, 8), hidden_dims=(32, 16, 16), depths=(3, 1, 1), size=16, heads=2
    )


@pytest.fixture
def folder(model, tmp_path):
    mz.save_model(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unread(monkeypatch):
    """Fail the test if weights are read."""

    def safe_open(*args, **kwargs):
        raise AssertionError("weights were read before the header was checked")

    monkeypatch.setattr("safetensors.safe_open", safe_open)


def header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_round_trip(model, folder):
    again = mz.load_model(folder)
    assert again.info == model.info
    state = again.backbone.state_dict()
    assert state.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.backbone.state_dict().items())
    z, logsnr = torch.randn(2, 3, 16, 16), torch.tensor([-2.0, 1.0])
    for a, b in zip(model(z, logsnr, mz.Cond())[:2], again(z, logsnr, mz.Cond())[:2], strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert "Licence of the weights" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(p for p in mz.presets() if "tiny" in p))
def test_every_family_round_trips(name, tmp_path):
    model = mz.create_model(name)
    mz.save_model(model, tmp_path / "model")
    again = mz.load_model(tmp_path / "model")
    assert again.info == model.info
    config = model.info.config
    z, noise = torch.randn(1, config.channels, config.size, config.size), torch.zeros(1)
    for a, b in zip(
        model.eval().raw(z, noise, mz.Cond()), again.eval().raw(z, noise, mz.Cond()), strict=True
    ):
        assert torch.equal(a, b)
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == frozen
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])


def test_saving_again_keeps_other_files(model, folder):
    (folder / "grid.png").write_bytes(b"an image")
    with torch.no_grad():
        next(model.backbone.parameters()).zero_()
    model.info = replace(model.info, images=12)
    mz.save_model(model, folder)
    again = mz.load_model(folder)
    assert again.info.images == 12
    assert not next(again.backbone.parameters()).any()
    assert (folder / "grid.png").read_bytes() == b"an image"


@pytest.mark.parametrize("content", ["nothing", "a model"])
def test_a_model_is_saved_where_a_link_leads(model, tmp_path, monkeypatch, content):
    """Both folders are as on disks of their own."""
    (tmp_path / "disk" / "target").mkdir(parents=True)
    if content == "a model":
        mz.save_model(model, tmp_path / "disk" / "target")
    link = tmp_path / "link"
    link.symlink_to("disk/target")
    rename = Path.replace

    def within_a_disk(path, target):
        if path.resolve().parents[1] != Path(target).resolve().parents[1]:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", within_a_disk)
    model.info = replace(model.info, images=12)
    mz.save_model(model, link)
    assert link.is_symlink()
    assert mz.load_model(tmp_path / "disk" / "target").info.images == 12
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["target"]


def test_a_model_is_not_saved_as_a_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    monkeypatch.setattr(models, "save_tensors", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="is a disk of its own"):
        mz.save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_changes_nothing(model, folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        mz.save_model(model, folder)
    with pytest.raises(OSError, match="No space"):
        mz.save_model(model, folder.parent / "new")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_over_other_files(model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="is a file"):
        mz.save_model(model, tmp_path / "file")
    with pytest.raises(ValueError, match="another library"):
        mz.save_model(model, tmp_path / "other")
    with pytest.raises(OSError, match="file/new"):
        mz.save_model(model, tmp_path / "file" / "new")


def test_half_precision_is_widened(folder):
    path = folder / "model.safetensors"
    values = json.loads((folder / "config.json").read_text())
    del values["sha256"]  # other weights, on purpose
    (folder / "config.json").write_text(json.dumps(values))
    state = load_file(path)
    for dtype in (torch.float16, torch.bfloat16):
        save_file({k: t.to(dtype) for k, t in state.items()}, path)
        again = mz.load_model(folder).backbone.state_dict()
        assert all(
            t.dtype == torch.float32 and torch.equal(t, state[k].to(dtype).float())
            for k, t in again.items()
        )


def test_headers_are_checked_before_reading(folder, unread):
    path = folder / "model.safetensors"
    good, data = header(path)
    name = "branches.0.patch.weight"
    shape = good[name]["shape"]
    start, stop = good[name]["data_offsets"]

    def changed(**entry):
        return {**good, name: {**good[name], **entry}}

    huge = 25 * 10**9
    bad = {
        "cut": (good, data[:-10]),
        "longer": (good, data + b"0000"),
        "100 GB claim": (changed(shape=[huge], data_offsets=[start, start + 4 * huge]), data),
        "shape without bytes": (changed(shape=[*shape[:-1], shape[-1] * 1000]), data),
        "negative": (changed(shape=[-1, *shape[1:]]), data),
        "not whole": (changed(shape=[0.5, *shape[1:]]), data),
        "overlap": (changed(data_offsets=[0, stop - start]), data),
        "unknown dtype": (changed(dtype="F1000"), data),
        "no entry": ({**good, name: 7}, data),
        "other shape, same bytes": (changed(shape=[*shape[::-1]]), data),
        "integers": (changed(dtype="I32"), data),
        "renamed": ({f"{k}x" if k == name else k: v for k, v in good.items()}, data),
    }
    for case, (text, bytes_) in bad.items():
        write(path, text, bytes_)
        with pytest.raises(ValueError, match=r"model\.safetensors") as error:
            mz.load_model(folder)
        if case in ("renamed", "100 GB claim", "shape without bytes", "integers"):
            assert name in str(error.value), case
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        mz.load_model(folder)
    for rest in (b"", b"123", struct.pack("<Q", 4) + b"{no}", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(rest)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            mz.load_model(folder)


def test_a_config_of_640_gb(folder, unread):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["config"]["num_classes"] = 10**6
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"needs 64 MB.*classes"):
        mz.load_model(folder)


def test_bad_configs(folder):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"mezzotint": 999}, "format 1"),
        ({"backbone": "dimrr"}, "dimr"),
        ({"shedule": {}}, "schedule"),
        ({"config": {**good["config"], "head": 2}}, "heads"),
        ({"config": {**good["config"], "heads": 3}}, "heads 3"),
        ({"config": {**good["config"], "heads": "two"}}, r"model\.heads is 'two'"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            mz.load_model(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        mz.load_model(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        mz.load_model(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "a"}, r"model\.size is 'a'"),
        ({"size": None}, r"model\.size is None"),
        ({"num_classes": 3.5}, r"model\.num_classes is 3\.5"),
        ({"multipliers": 2}, r"model\.multipliers is 2"),
        ({"size": -4}, r"model\.size -4 .*1"),
        ({"num_classes": -1}, r"model\.num_classes -1 .*0"),
        ({"sise": 16}, "did you mean size"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        mz.create_model("unet-tiny", **fields)


def test_fields_are_parsed_like_those_of_a_recipe():
    assert models.preset_info("unet-tiny", dropout="1e-1", multipliers=[1, 2]).config.dropout == 0.1
    assert isinstance(models.preset_info("unet-tiny"), mz.ModelInfo)


@pytest.mark.parametrize("dtype", [None, 16, True, ["float16"], {"name": "float16"}])
def test_the_dtype_of_a_text_encoder_is_a_name(model, dtype):
    text = {"encoder": "t5", "encoder_hash": "0" * 64, "max_tokens": 8}
    for known in ({}, {"dtype": "bfloat16"}):
        info = replace(model.info, extra={"text": text | known})
        assert models.ModelInfo.from_json(info.to_json()) == info
    info = replace(model.info, extra={"text": text | {"dtype": dtype}})
    with pytest.raises(ValueError, match=r"'dtype' is .*; str is needed"):
        models.ModelInfo.from_json(info.to_json())


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        mz.load_model(tmp_path / "absent")
    with pytest.raises(ValueError, match="nobody/nothing"):
        mz.load_model("nobody/nothing")


def test_a_hub_repository_is_loaded_by_name(folder, monkeypatch):
    requests = []

    def snapshot_download(repo, allow_patterns):
        requests.append((repo, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert mz.load_model("someone/model").info.backbone == "dimr"
    assert requests == [("someone/model", ["README.md", "config.json", "model.safetensors"])]


def test_tensor_specs_allocate_nothing():
    entry = backbones["dimr"]
    config = replace(entry.presets["dimr-g-2r-256"].config, num_classes=10**6)
    assert sum(c.bytes for c in models.tensor_specs("dimr", config).values()) > 4 * 10**9


def test_public_names_are_listed_for_type_checkers():
    assert set(mz.__all__) == {"__version__", *mz._PUBLIC}
    assert all(getattr(mz, name) is not None for name in mz.__all__)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_run_is_not_a_model_and_names_its_own(model, missing, tmp_path):
    mz.save_model(model, tmp_path / "model")
    (tmp_path / {"config.json": "model.safetensors"}.get(missing, "config.json")).write_text("{}")
    with pytest.raises(ValueError, match=r"is a run; give its model's folder, .*model"):
        mz.load_model(tmp_path)
