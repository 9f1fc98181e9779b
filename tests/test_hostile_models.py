"""Model folders of strangers: a sentence or a model, quickly; and a changed bit is named."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter

import pytest
import torch

import mezzotint as mz
from helpers import hostile
from helpers.tiny_models import tiny
from mezzotint import models

SECONDS = 3.0  # of the processor for one folder; none needs 1
SMALL = {
    "unet-tiny": {},
    "uvit-tiny": {"size": 16, "width": 8, "emb_dim": 16, "depth": 1, "heads": 1},
    "diffit-latent-tiny": {"size": 8, "width": 16, "depth": 1, "heads": 1},
    "diffit-tiny": {"size": 16, "width": 16, "blocks": 1, "heads": 1},
    "dimr-tiny": {"size": 8, "dims": (16, 8, 8), "hidden_dims": (16, 8, 8), "depths": (1, 1, 1)},
    "sid2-tiny": {"size": 16, "width": 8, "emb_dim": 16, "depth": 1, "heads": 1},
}


def make(preset, folder):
    """Return config.json's values and the weights of a small saved model."""
    model = tiny() if preset == "unet-tiny" else mz.create_model(preset, **SMALL[preset])
    mz.save_model(model, folder)
    values = json.loads((folder / "config.json").read_text())
    return values, (folder / "model.safetensors").read_bytes()


def outcome(folder):
    """Load and sample a folder; return what happened, failing for anything but a sentence."""
    began = time.process_time()
    try:
        model = mz.load_model(folder)
    except ValueError as error:
        sentence = str(error)
        assert "config.json" in sentence or "model.safetensors" in sentence
        assert not {"\n", "\x1b"} & set(sentence)
        assert len(sentence) < 3000
        result = "refused"
    else:
        try:
            label = 0 if models.backbones.needs_label(model.info.config) else None
            mz.sample(model.eval(), [0], label=label, steps=1, size=model.info.config.size)
            result = "sampled"
        except (ValueError, FloatingPointError):
            result = "loaded, refused to sample"
    assert time.process_time() - began < SECONDS
    return result


def try_all(preset, tmp_path, step):
    """Try every `step`-th hostile card and header of a preset; return the counts."""
    values, weights = make(preset, tmp_path / "model")
    good = json.dumps({k: v for k, v in values.items() if k != "sha256"}).encode()
    folders = [(name, card, weights) for name, card in hostile.cards(values)]
    folders += [(name, good, header) for name, header in hostile.headers(weights)]
    counts = Counter()
    mz.sample(mz.load_model(tmp_path / "model").eval(), [0], steps=1)  # imports what it needs
    for name, card, header in folders[::step]:
        hostile.write(tmp_path / "model", card, header)
        try:
            counts[outcome(tmp_path / "model")] += 1
        except BaseException as error:
            raise AssertionError(f"{preset}: {name}") from error
    return counts


def test_some_hostile_cards_and_headers(tmp_path):
    assert try_all("unet-tiny", tmp_path, 17)["refused"] > 40


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("preset", SMALL)
def test_all_hostile_cards_and_headers(preset, tmp_path, capsys):
    counts = try_all(preset, tmp_path, 1)
    with capsys.disabled():
        print(f"\n{preset}: {sum(counts.values())} hostile cards and headers: {dict(counts)}")
    assert counts["refused"] > 500


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        ("unet-tiny", "blocks", [1000, 1]),
        ("uvit-tiny", "depth", 1000),
        ("sid2-tiny", "depth", 1000),
        ("diffit-latent-tiny", "depth", 1000),
        ("diffit-tiny", "blocks", 1000),
        ("dimr-tiny", "depths", [1001, 1, 1]),
        ("uvit-tiny", "depth", 10**6),
    ],
)
def test_blocks_that_the_weights_do_not_have_are_refused_at_once(preset, field, value, tmp_path):
    values, _ = make(preset, tmp_path / "model")
    assert field in values["config"]
    values["config"][field] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    began = time.process_time()
    with pytest.raises(ValueError, match=r"config\.json.*(more than the \d+ te|at most 1,024)"):
        mz.load_model(tmp_path / "model")
    assert time.process_time() - began < 1


def flip(path, bit):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def try_flips(folder, bits_of):
    """Change bits of both files one after another; every one must be named."""
    count = 0
    for name in ("config.json", "model.safetensors"):
        good = (folder / name).read_bytes()
        for bit in bits_of(name, 8 * len(good)):
            flip(folder / name, bit)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                mz.load_model(folder)
            (folder / name).write_bytes(good)
            count += 1
    mz.load_model(folder)
    return count


def test_a_changed_bit_is_named(tmp_path):
    mz.save_model(tiny(), tmp_path / "model")
    assert try_flips(tmp_path / "model", lambda name, bits: range(5, bits, bits // 20)) > 30


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_changed_bit_of_card_and_header_is_named(tmp_path, capsys):
    mz.save_model(tiny(), tmp_path / "model")
    header = 8 + len(json.dumps(hostile.split(
        (tmp_path / "model" / "model.safetensors").read_bytes())[0]))  # fmt: skip

    def bits_of(name, bits):
        if name == "config.json":
            return range(bits)
        return [*range(0, 8 * header, 5), *range(8 * header, bits, bits // 1000)]

    count = try_flips(tmp_path / "model", bits_of)
    with capsys.disabled():
        print(f"\n{count} changed bits, all named")


def test_the_hash_is_the_file_s(tmp_path):
    """As `sha256sum model.safetensors` prints it."""
    values, weights = make("unet-tiny", tmp_path / "model")
    assert values["sha256"]["files"] == {"model.safetensors": [hashlib.sha256(weights).hexdigest()]}


def test_folders_without_hashes_still_load(tmp_path):
    values, _ = make("unet-tiny", tmp_path / "model")
    del values["sha256"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert mz.load_model(tmp_path / "model").info.preset == "unet-tiny"


def test_another_model_s_weights_are_named(tmp_path):
    make("unet-tiny", tmp_path / "a")
    mz.save_model(tiny(seed=1), tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes(
        (tmp_path / "b" / "model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was saved"):
        mz.load_model(tmp_path / "a")


@pytest.mark.parametrize("kept", range(4))
def test_a_save_killed_at_any_step_leaves_a_model(kept, tmp_path, monkeypatch):
    """Files are replaced one after another; between any two the folder loads."""
    mz.save_model(tiny(), tmp_path / "model")
    old, new = tiny(), tiny(seed=1)
    done, replace = [], models.Path.replace

    def killed(self, target):
        if len(done) == kept + 1:  # the first one is inside the temporary folder
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            mz.save_model(new, tmp_path / "model")
    found = mz.load_model(tmp_path / "model").backbone.state_dict()
    weights = tmp_path / "model" / "model.safetensors" in done
    expected = (new if weights else old).backbone.state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())
