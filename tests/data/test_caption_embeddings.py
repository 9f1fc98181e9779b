"""Caption embeddings at full scale: bfloat16, shards that resume and are shared, or none at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mezzotint.data.caption_embeddings as embeddings_module
from helpers.data import open_recipe_data
from helpers.tiny_t5 import saved_t5
from mezzotint import config
from mezzotint.core.distributed import WorkShare
from mezzotint.data.caption_embeddings import (
    CaptionEmbeddings,
    LiveCaptions,
    describe_captions,
    embed_captions,
    fill_cache,
    is_complete,
)
from mezzotint.data.loader import load_batches
from mezzotint.data.prepare import prepare_captions, prepare_source
from mezzotint.data.text_encoder import TextEncoder, open_text_encoder
from mezzotint.models import load_model, save_model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.conditioning import encode_prompts
from mezzotint.train.loop import train

pytest.importorskip("transformers")

CAPTIONS = ["a red ring", None, "in the centre", "a red ring", "a blue square at the top", "ring"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return saved_t5(tmp_path_factory.mktemp("t5"), seed=0)


def recipe(t5: Path, *changes: str) -> config.Recipe:
    own = [
        "data.source=shapes:16,count=20", f"data.text_encoder={str(t5)!r}", "model.size=16",
        "model.text_dim=16", "model.width=8", "model.emb_dim=16", "model.depth=1",
        "model.heads=2", "model.patch=4", "images=16", "batch=8", "log_every_images=8",
        "samples.every_images=16", "samples.count=2", "samples.steps=2",
        "engine.precision=float32", "optim.warmup_images=0",
    ]  # fmt: skip
    return config.override(recipe_for("uvit-text-tiny"), [*own, *changes])


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_disk_holds_two_bytes_a_number_of_the_real_tokens_alone(t5, dtype, monkeypatch):
    monkeypatch.setattr(embeddings_module, "SHARD_CAPTIONS", 3)
    encoder = open_text_encoder(str(t5), dtype_name=dtype)
    cached = embed_captions(CAPTIONS, encoder)
    text, mask = cached.batch(range(len(CAPTIONS)))
    assert text.dtype == getattr(torch, dtype)
    assert mask.sum(1).tolist() == [4, 0, 4, 4, 7, 2]
    for row, caption in enumerate(CAPTIONS):
        expected = encoder.encode(caption or "").to(text.dtype)
        assert torch.equal(text[row, : len(expected)], expected)
    assert not text[~mask].any()
    shards = sorted(cached.folder.glob("?????.npy"))
    arrays = [np.load(path) for path in shards]
    assert [array.nbytes for array in arrays] == [(4 + 4 + 7) * 16 * 2, 2 * 16 * 2]
    assert cached.card["tokens"] == 17
    assert np.load(cached.folder / "starts.npy").tolist() == [0, 4, 8, 15, 17]


def test_dtypes_have_caches_of_their_own_and_only_two_are_known(t5):
    folders = {
        embed_captions(CAPTIONS, open_text_encoder(str(t5), dtype_name=dtype)).folder
        for dtype in ("float16", "bfloat16")
    }
    assert len(folders) == 2
    with pytest.raises(ValueError, match="states in float8; choose from float16, bfloat16"):
        open_text_encoder(str(t5), dtype_name="float8")


def test_a_kill_costs_one_shard(t5, monkeypatch):
    monkeypatch.setattr(embeddings_module, "SHARD_CAPTIONS", 2)
    encoder = open_text_encoder(str(t5))
    whole = content(embed_captions(CAPTIONS, encoder).folder)
    monkeypatch.setenv("MEZZOTINT_CACHE", str(encoder.name + "-other-cache"))
    read: list[str] = []
    encode = TextEncoder.encode

    def dies_at_the_fourth(self, caption):
        read.append(caption)
        if len(read) == 4:
            raise KeyboardInterrupt
        return encode(self, caption)

    monkeypatch.setattr(TextEncoder, "encode", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        embed_captions(CAPTIONS, encoder)
    resumed = embed_captions(CAPTIONS, encoder)
    assert read[4:] == ["a blue square at the top", "ring"]
    assert content(resumed.folder) == whole


def test_processes_share_the_shards_and_the_last_completes_the_folder(t5, monkeypatch):
    monkeypatch.setattr(embeddings_module, "SHARD_CAPTIONS", 1)
    encoder = open_text_encoder(str(t5))
    whole = content(embed_captions(CAPTIONS, encoder).folder)
    monkeypatch.setenv("MEZZOTINT_CACHE", str(encoder.name + "-shared-cache"))
    for rank in (2, 0):
        folder = fill_cache(CAPTIONS, encoder, WorkShare(rank, 3))
        assert not is_complete(folder)
    assert [path.stem for path in sorted(folder.glob("*.npy"))] == ["00000", "00002", "00003"]
    fill_cache(CAPTIONS, encoder, WorkShare(1, 3))
    assert is_complete(folder)
    assert content(folder) == whole


def test_damaged_caches_are_refused_with_the_way_out(t5):
    folder = embed_captions(CAPTIONS, open_text_encoder(str(t5))).folder
    numbers = np.array([2])
    np.save(folder / "00000.npy", np.zeros((3, 16), np.int16))
    with pytest.raises(ValueError, match=r"00000\.npy is damaged.*remove the folder"):
        CaptionEmbeddings(folder, numbers).batch([0])
    card = json.loads((folder / "embeddings.json").read_text())
    for change in ({"dtype": "int4"}, {"width": "wide"}):
        (folder / "embeddings.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(ValueError, match=r"is damaged.*remove the folder"):
            CaptionEmbeddings(folder, numbers)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_captions_embedded_at_every_read_are_those_of_the_cache(t5, dtype):
    encoder = open_text_encoder(str(t5), max_tokens=12, dtype_name=dtype)
    live, cached = LiveCaptions(CAPTIONS, encoder), embed_captions(CAPTIONS, encoder)
    for text, expected in zip(live.batch([4, 1, 0]), cached.batch([4, 1, 0]), strict=True):
        assert torch.equal(text, expected)
    assert live.max_tokens == cached.max_tokens == 7
    assert describe_captions(live) == describe_captions(cached)
    with pytest.raises(ValueError, match="no image has a caption"):
        LiveCaptions([None], encoder)


def test_a_run_is_the_same_with_and_without_the_cache(t5, tmp_path):
    weights = []
    for change in ("data.text_cache=true", "data.text_cache=false"):
        run = train(recipe(t5, change, "data.text_dtype=bfloat16"), tmp_path / change, quiet=True)
        weights.append(load_file(run / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert len(list((tmp_path / "cache" / "caption-embeddings").iterdir())) == 1
    half = train(recipe(t5), tmp_path / "half", quiet=True)
    weights.append(load_file(half / "model" / "model.safetensors"))
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_batches_hold_bfloat16_and_worker_processes_do_not_embed(t5):
    images = open_recipe_data(recipe(t5, "data.text_dtype=bfloat16"))
    feed = load_batches(images, seed=0, start_image=0, batch=4)
    loaded = next(feed)
    feed.close()
    assert loaded.text.dtype == torch.bfloat16
    reader = open_text_encoder(str(t5), dtype_name="bfloat16")
    for row, i in enumerate(images.batch_indices(0, 0, 4, 4).tolist()):
        states = reader.states(images.text(i))
        assert torch.equal(loaded.text[row, : len(states)], states)
    with pytest.raises(ValueError, match=r"data\.text_cache=false.*set data\.workers=0"):
        open_recipe_data(recipe(t5, "data.text_cache=false", "data.workers=2"))


def test_prompts_are_read_as_the_model_was_trained(t5, tmp_path):
    run = train(recipe(t5, "data.text_dtype=bfloat16"), tmp_path / "run", quiet=True)
    model = load_model(run / "model")
    assert model.info.extra["text"]["dtype"] == "bfloat16"
    assert encode_prompts(model, ["a red ring"]).text.dtype == torch.bfloat16
    del model.info.extra["text"]["dtype"]  # a model of before says nothing and read float16
    save_model(model, tmp_path / "old")
    assert encode_prompts(load_model(tmp_path / "old"), ["ring"]).text.dtype == torch.float16


def test_prepare_embeds_its_share_in_the_dtype_of_the_recipe(t5, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings_module, "SHARD_CAPTIONS", 8)
    prepare_source("shapes:16,count=20", tmp_path / "out", 16, progress=False)

    def prepare(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return prepare_captions(tmp_path / "out", str(t5), dtype_name="bfloat16", progress=False)[0]

    assert "this process's share" in prepare(0)
    assert "distinct captions for 20 images" in prepare(1)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(embeddings_module, "_write_shard", lambda *_: pytest.fail("embedded twice"))
    source = f"data.source={str(tmp_path / 'out')!r}"
    open_recipe_data(recipe(t5, source, "data.text_dtype=bfloat16"))
