"""Official checkpoints: sizes from shapes, total key maps, no code run, nothing huge allocated."""

from __future__ import annotations

import os
import pickle
import re
import struct
import time
import zipfile
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mezzotint as mz
from mezzotint import models
from mezzotint.backbones import registry as backbones
from mezzotint.convert.official import registry
from mezzotint.convert.official.load import (
    bitwise_equal,
    convert_checkpoint,
    official_specs,
    row_range,
    to_official,
)

# Our tiny DiMR predicts v by the cosine schedule, which no official file does.
OFFICIAL = {"dimr": {"prediction": "eps", "time": "linear_vp"}}


def small(family):
    """Return a random official state dict of a family, of the size of its tiny preset."""
    backbone = registry[family].backbone
    for name in backbones[backbone].presets:
        if "tiny" in name:
            card = models.preset_info(name, **OFFICIAL.get(family, {}))
            state = to_official(models.build_model(card))
            generator = torch.Generator().manual_seed(3)
            constants = registry[family].constants(card.config)
            return {
                k: t if k in constants else torch.randn(t.shape, generator=generator).to(t.dtype)
                for k, t in state.items()
            }, card.config
    raise AssertionError(f"{backbone} has no tiny preset")


HEADS = {"dimr": {"heads": 4}, "jit": {"context_start": 2}}


@pytest.fixture(params=sorted(registry))
def family(request):
    return request.param


@pytest.fixture
def dimr():
    return small("dimr")[0]


@pytest.fixture
def unread(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("tensors were put together before the claims were checked")

    monkeypatch.setattr("mezzotint.convert.official.load.to_ours", read)
    monkeypatch.setattr("safetensors.safe_open", read)


def test_key_maps_are_total(family):
    """Every official key holds something, every row of ours is held by exactly one official key."""
    official = registry[family]
    for preset in backbones[official.backbone].presets.values():
        own = models.tensor_specs(official.backbone, preset.config)
        held = {name: torch.zeros(c.shape[0], dtype=torch.int) for name, c in own.items()}
        for parts in official.keys(preset.config).values():
            assert parts
            for part in parts:
                held[part.name][slice(*row_range(part, own))] += 1
        assert all(bool((rows == 1).all()) for rows in held.values())
        assert all(
            re.fullmatch(official.pattern, key)
            for key in official_specs(official, preset.config, own)
        )


def test_sizes_come_from_shapes_and_the_way_back_is_bitwise(family, tmp_path, capsys):
    state, config = small(family)
    hints = HEADS.get(family, {})
    for path, save in ((tmp_path / "a.safetensors", save_file), (tmp_path / "a.pth", torch.save)):
        save(state, path)
        model = mz.load_official(path, **hints)
        assert model.info.config == config
        back = to_official(model)
        assert back.keys() == state.keys()
        assert all(bitwise_equal(back[k], t) for k, t in state.items())
    assert model.info.licence in capsys.readouterr().err
    named = mz.load_official(state, family, **hints)
    assert all(
        torch.equal(a, b) for a, b in zip(named.parameters(), model.parameters(), strict=True)
    )
    # the model owns its weights: training it leaves the caller's tensors alone
    before = {k: t.clone() for k, t in state.items()}
    for p in named.parameters():
        p.data.zero_()
    assert all(torch.equal(state[k], t) for k, t in before.items())


def test_convert_there_and_back(family, tmp_path):
    state, config = small(family)
    save_file(state, tmp_path / "in.safetensors")
    lines = convert_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "model", check=True, hints=HEADS.get(family)
    )
    assert f"checked: {len(state)} tensors equal bit for bit" in lines
    for out in ("out.safetensors", "out.pth"):
        assert (
            "checked"
            in convert_checkpoint(tmp_path / "model", tmp_path / out, to="official", check=True)[-1]
        )
    for back in (
        load_file(tmp_path / "out.safetensors"),
        torch.load(tmp_path / "out.pth", weights_only=True),
    ):
        assert all(bitwise_equal(back[k], state[k]) for k in state)
        assert back.keys() == state.keys()
    card = mz.load_model(tmp_path / "model").info
    assert card.config == config
    assert card.licence == registry[family].licence


def test_convert_errors(dimr, tmp_path):
    save_file(dimr, tmp_path / "in.safetensors")
    for kwargs, words in [
        ({"to": "onnx"}, "mezzotint or official"),
        ({"to": "official", "hints": {"heads": 4}}, "hints"),
        ({"family": "dimrr"}, "did you mean dimr"),
    ]:
        with pytest.raises(ValueError, match=words):
            convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", **kwargs)
    mz.save_model(mz.create_model("uvit-tiny"), tmp_path / "uvit")
    with pytest.raises(ValueError, match=r"uvit"):
        convert_checkpoint(tmp_path / "uvit", tmp_path / "out.pth", to="official")
    mz.save_model(mz.load_official(dimr, heads=4), tmp_path / "model")
    with pytest.raises(ValueError, match=r"\.safetensors or \.pth"):
        convert_checkpoint(tmp_path / "model", tmp_path / "out.bin", to="official")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "model", "uvit"]


def test_wrong_keys_list_both(dimr, unread):
    key = "stages.1.blocks.0.block2.w1.weight"
    renamed = {f"{k}_renamed" if k == key else k: t for k, t in dimr.items()}
    with pytest.raises(ValueError, match=rf"unused keys \[{key}_renamed\]; missing \[{key}\]"):
        mz.load_official(renamed, heads=4)
    # a key from which a size is read
    key = "stages.0.input_layer.1.weight"
    renamed = {f"{k}_renamed" if k == key else k: t for k, t in dimr.items()}
    with pytest.raises(ValueError, match=rf"unused keys \[{key}_renamed\]; missing \[{key}\]"):
        mz.load_official(renamed, heads=4)
    truncated = dict(list(dimr.items())[: len(dimr) // 2])
    with pytest.raises(ValueError, match="missing"):
        mz.load_official(truncated, heads=4)
    extra = {**dimr, "optimizer.state.0.exp_avg": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"unused keys \[optimizer\.state\.0\.exp_avg\]"):
        mz.load_official(extra, heads=4)


def test_every_single_missing_or_misshapen_key_is_an_error(dimr, unread):
    for key in list(dimr)[::13]:
        with pytest.raises(ValueError, match=r"missing|instead of|dtypes"):
            mz.load_official({k: t for k, t in dimr.items() if k != key}, heads=4)
        wrong = {k: torch.cat([t, t[:1]]) if k == key else t for k, t in dimr.items()}
        with pytest.raises(ValueError):
            mz.load_official(wrong, heads=4)


def test_wrong_shape_names_the_key(dimr, unread):
    key = "stages.0.blocks.1.block1.dense.weight"
    with pytest.raises(ValueError, match=rf"{re.escape(key)} \(128, 127\) instead of \(128, 128\)"):
        mz.load_official({**dimr, key: dimr[key][:, 1:]}, heads=4)


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("stages.0.input_layer.1.weight", 4),
        ("stages.2.input_layer.1.weight", 4),
        ("stages.1.input_layer.3.position_embeddings.weight", 2),
        ("stages.0.class_embeds.weight", 2),
        ("stages.1.blocks.0.block1.1.weight", 4),
        ("stages.0.blocks.0.block2.w0.weight", 2),
    ],
)
@pytest.mark.parametrize("change", ["none", "fewer", "more", "empty"])
def test_a_size_is_read_from_a_tensor_of_its_dimensions_alone(dimr, unread, key, count, change):
    shape = tuple(dimr[key].shape)
    assert len(shape) == count
    changes = {"none": (), "fewer": shape[1:], "more": (*shape, 1), "empty": (*shape[1:], 0)}
    other = changes[change]
    message = rf"{re.escape(f'{key} has shape {other}')}; expected {count} dimensions, none empty"
    with pytest.raises(ValueError, match=message):
        mz.load_official({**dimr, key: torch.zeros(other)}, heads=4)


@pytest.mark.parametrize("number", ["9" * 20, "9" * 5000, "4", "100000000", "01", "\u0663"])
@pytest.mark.parametrize("key", ["input_layer.1.weight", "class_embeds.weight"])
def test_branches_are_numbered_from_zero(dimr, unread, key, number):
    began = time.process_time()
    with pytest.raises(ValueError, match=r"its branches are .*; expected stages\.0, stages\.1"):
        mz.load_official({**dimr, f"stages.{number}.{key}": torch.zeros(4, 4, 2, 2)}, heads=4)
    alone = {k: t for k, t in dimr.items() if k.startswith("stages.1.")}
    with pytest.raises(ValueError, match=r"its branches are \['1'\]"):
        mz.load_official(alone, "dimr", heads=4)
    assert time.process_time() - began < 10


def test_heads_and_other_hints(dimr, unread):
    with pytest.raises(
        ValueError, match=r"heads 5 do not divide width 128; these do: \[1, 2, 4, 8"
    ):
        mz.load_official(dimr, heads=5)
    with pytest.raises(ValueError, match="no option 'head'; did you mean heads"):
        mz.load_official(dimr, head=4)
    with pytest.raises(ValueError, match="no option 'shapes'"):
        mz.load_official(dimr, shapes={})


def test_null_label_is_read_from_the_table(dimr):
    key = "stages.0.class_embeds.weight"
    rows = dimr[key].shape[0]
    assert mz.load_official(dimr, heads=4).info.config.num_classes == rows - 1
    assert mz.load_official(dimr, heads=4, null_label=False).info.config.num_classes == rows
    imagenet = mz.load_official({**dimr, key: torch.zeros(1000, 128)}, heads=4).info.config
    assert (imagenet.num_classes, imagenet.null_label) == (1000, False)


def test_another_family(dimr, unread):
    with pytest.raises(ValueError, match="no known family"):
        mz.load_official({"layers.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="did you mean dimr"):
        mz.load_official(dimr, "dimer")
    for other in registry:
        if other != "dimr":
            with pytest.raises(ValueError, match=f"looks like dimr, not {other}"):
                mz.load_official(dimr, other)
            with pytest.raises(ValueError, match=f"looks like {other}, not dimr"):
                mz.load_official(small(other)[0], "dimr")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_only_when_asked(dimr, dtype):
    half = {k: t.to(dtype) for k, t in dimr.items()}
    with pytest.raises(ValueError, match="widen=True"):
        mz.load_official(half, heads=4)
    model = mz.load_official(half, heads=4, widen=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(bitwise_equal(t, half[k]) for k, t in to_official(model).items())
    mixed = {k: t if "bias" in k else half[k] for k, t in dimr.items()}
    with pytest.raises(ValueError, match="mixed"):
        mz.load_official(mixed, heads=4, widen=True)


def test_training_checkpoints_offer_their_entries(dimr, tmp_path):
    ema = {k: t + 1 for k, t in dimr.items()}
    training = {
        "model": dimr,
        "ema": ema,
        "optimizer": {"state": {0: {"step": torch.tensor(3)}}},
        "images": 7,
    }
    torch.save(training, tmp_path / "a.pth")
    for source in (training, tmp_path / "a.pth"):
        with pytest.raises(ValueError, match="entry='model' or entry='ema'"):
            mz.load_official(source, heads=4)
        with pytest.raises(ValueError, match="no entry 'emma'"):
            mz.load_official(source, heads=4, entry="emma")
        model = mz.load_official(source, heads=4, entry="ema")
        assert all(torch.equal(t, ema[k]) for k, t in to_official(model).items())
    flat = {**{f"model.{k}": t for k, t in dimr.items()}, **{f"ema.{k}": t for k, t in ema.items()}}
    save_file(flat, tmp_path / "a.safetensors")
    for source in (flat, tmp_path / "a.safetensors"):
        with pytest.raises(ValueError, match="entry='ema' or entry='model'"):
            mz.load_official(source, heads=4)
        model = mz.load_official(source, heads=4, entry="ema")
        assert all(torch.equal(t, ema[k]) for k, t in to_official(model).items())
    with pytest.raises(ValueError, match="plain state dict"):
        mz.load_official(dimr, heads=4, entry="ema")
    with pytest.raises(ValueError, match="no state dict"):
        mz.load_official({**dimr, "images": 7}, heads=4)


class Code:
    def __reduce__(self):
        return os.mkdir, ("/nonexistent/it-ran",)


def test_code_is_refused(tmp_path, dimr):
    torch.save({"state": Code(), **dimr}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Code()))
    torch.save({"state": Code()}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.pth", "c.pth"):
        with pytest.raises(ValueError, match=r"contains code .*refused"):
            mz.load_official(tmp_path / name)


def test_old_format_of_torch_save(dimr, tmp_path):
    torch.save(OrderedDict(dimr), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = mz.load_official(tmp_path / "old.pth", heads=4)
    assert all(bitwise_equal(t, dimr[k]) for k, t in to_official(model).items())


def test_files_that_are_nothing(tmp_path, dimr):
    torch.save(dimr, tmp_path / "cut.pth")
    data = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pth").write_text("not found")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "a.ckpt.txt").write_text("")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, words in [
        ("cut.pth", "damaged"),
        ("text.pth", "damaged"),
        ("empty.pth", "damaged"),
        ("list.pth", "holds a list"),
        ("absent.pth", "no file"),
        ("a.ckpt.txt", "neither"),
        (".", "folder"),
    ]:
        with pytest.raises(ValueError, match=words):
            mz.load_official(tmp_path / name, heads=4)


def test_a_lying_safetensors_header(dimr, tmp_path, unread):
    path = tmp_path / "a.safetensors"
    save_file(dimr, path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    lie = header.replace(b'"shape":[11,128]', b'"shape":[99,128]')
    assert lie != header
    for name, contents in {
        "lie": struct.pack("<Q", len(lie)) + lie + data[8 + length :],
        "cut": data[:-100],
        "100 GB header": struct.pack("<Q", 100 << 30) + data[8:],
    }.items():
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            mz.load_official(path, heads=4)
        assert name


def test_100_gb_claims(dimr, tmp_path, unread):
    key = "stages.0.class_embeds.weight"
    claim = {**dimr, key: torch.zeros(1).expand(200_000_000, 128)}
    with pytest.raises(ValueError, match="claim 102 GB"):
        mz.load_official(claim, heads=4)
    torch.save(claim, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="claim 102 GB"):
        mz.load_official(tmp_path / "a.pth", heads=4)
    torch.save({"bomb": torch.zeros(1 << 20)}, tmp_path / "b.pth")
    with (
        zipfile.ZipFile(tmp_path / "b.pth") as stored,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    with pytest.raises(ValueError, match="unpacks from"):
        mz.load_official(tmp_path / "c.pth", heads=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("preset", ["dimr-tiny", "dimr-latent-tiny", "diffit-latent-tiny"])
def test_a_file_of_our_own_comes_back_as_the_same_network(preset, suffix, tmp_path, capsys):
    torch.manual_seed(0)
    model = mz.create_model(preset)
    model.info = replace(
        model.info, labels=("a", "b\n"), licence="MIT", images=12, extra={"note": [1]}
    )
    mz.save_model(model, tmp_path / "a")
    file = tmp_path / f"f{suffix}"
    convert_checkpoint(tmp_path / "a", file, to="official", check=True)
    convert_checkpoint(file, tmp_path / "b", check=True)
    again = mz.load_model(tmp_path / "b")
    extra = {k: v for k, v in again.info.extra.items() if k != "official"}
    assert replace(again.info, extra=extra) == model.info
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert "research" not in capsys.readouterr().err
    if "dimr" in preset:
        with pytest.raises(ValueError, match=r"heads=8 contradicts the file.*heads=4"):
            mz.load_official(file, heads=8)


def test_heads_are_never_assumed_for_widths_without_a_release(dimr, tmp_path):
    with pytest.raises(ValueError, match=r"heads leave no trace.*give heads=.*\[1, 2, 4"):
        mz.load_official(dimr)
    infer = registry["dimr"].config
    for preset, heads in (("dimr-xl-2r-256", 16), ("dimr-g-2r-256", 16)):
        own = models.tensor_specs("dimr", backbones["dimr"].presets[preset].config)
        specs = official_specs(registry["dimr"], backbones["dimr"].presets[preset].config, own)
        assert infer({k: c.shape for k, c in specs.items()}).heads == heads


def test_metadata_of_strangers_is_one_sentence(dimr, tmp_path):
    path = tmp_path / "f.safetensors"
    for text in ("", "[" * 100_000, "[]", "{}", '{"mezzotint": 1, "backbone": "uvit"}'):
        save_file(dimr, path, metadata={"mezzotint": text})
        with pytest.raises(ValueError, match=r"f\.safetensors as a dimr checkpoint"):
            mz.load_official(path)
