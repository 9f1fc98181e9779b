"""Shards of `mezzotint prepare --shards`: training reads what an ordinary folder gives."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from helpers.image_files import png, write_folder
from helpers.tiny_t5 import saved_t5
from helpers.tiny_vae import saved_vae
from mezzotint.core.rng import Draws
from mezzotint.data.caption_embeddings import embed_captions
from mezzotint.data.content import read_content
from mezzotint.data.image_dataset import open_images
from mezzotint.data.latent_dataset import LatentDataset
from mezzotint.data.prepare import prepare_latents
from mezzotint.data.prepare_shards import prepare_shards
from mezzotint.data.shard_cache import ShardCache
from mezzotint.data.shard_index import is_sharded
from mezzotint.data.sharded_captions import ShardedCaptions
from mezzotint.data.sharded_dataset import ShardedDataset, ShardError, open_shards

COUNT = 23


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """23 images of 16 pixels in two classes with captions, two without."""
    files: dict[str, bytes | str] = {}
    for i in range(COUNT):
        name = f"{'ab'[i > 11]}/{i:02d}"
        files[f"{name}.png"] = png(i, (16, 16))
        if i % 10:
            files[f"{name}.txt"] = f"caption of {i}"
    return write_folder(tmp_path_factory.mktemp("pictures"), files)


def write_shards(pictures: Path, out: Path, **options) -> str:
    prepare_shards(str(pictures), str(out), 16, 4, progress=False, **options)
    return str(out)


def open_at(source: str, folder: Path, size: int = 16, channels: int = 3, **options):
    cache = ShardCache(folder / "cache", 10**8)
    return open_shards(source, cache, size=size, channels=channels, **options)


def source_rows(source: str) -> list[str]:
    """Return the name in its source of every image, in the order of the shards."""
    paths = sorted(Path(source).glob("*.parquet"))
    return [name for path in paths for name in pq.read_table(path)["name"].to_pylist()]


@pytest.mark.parametrize("form", ["raw", "webp-lossless"])
def test_images_labels_and_captions_are_those_of_the_folder(form, pictures, tmp_path):
    source = write_shards(pictures, tmp_path / "shards", form=form)
    assert is_sharded(source)
    dataset, plain = open_at(source, tmp_path), open_images(pictures, size=16)
    index = {plain.name(k): k for k in range(len(plain))}
    assert (len(dataset), dataset.label_names) == (COUNT, ("a", "b"))
    for k, name in enumerate(source_rows(source)):
        assert dataset.image(k).equal(plain.image(index[name]))
        assert dataset.label(k) == plain.label(index[name])
        assert dataset.text(k) == plain.text(index[name])
    assert {f"{k}" for k in source_rows(source)} == set(index)


def test_a_larger_preparation_is_made_smaller_and_a_smaller_one_refused(pictures, tmp_path):
    source = write_shards(pictures, tmp_path / "shards")
    assert open_at(source, tmp_path, size=8).image(0).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"16 pixels, the network takes 32.*model\.size=16"):
        open_at(source, tmp_path, size=32)


@pytest.mark.parametrize(
    ("source", "columns", "words"),
    [("shards:test", None, "no split 'test'"), ("shards", {"label": "name"}, "is no table")],
)
def test_what_prepared_shards_do_not_have_is_refused(source, columns, words, pictures, tmp_path):
    write_shards(pictures, tmp_path / "shards")
    with pytest.raises(ValueError, match=words):
        open_at(f"file://{tmp_path}/{source}", tmp_path, columns=columns)


def test_rows_that_were_changed_are_no_longer_those_of_the_card(pictures, tmp_path):
    source = write_shards(pictures, tmp_path / "shards")
    path = tmp_path / "shards" / "shard-00001.parquet"
    table = pq.read_table(path)
    size = path.stat().st_size
    pq.write_table(table.take(list(range(len(table)))[::-1]), path, compression="none")
    with path.open("ab") as file:  # as many bytes as before: the size alone shows nothing
        file.truncate(size)
    dataset = open_at(source, tmp_path)
    with pytest.raises(ShardError, match=r"shard-00001\.parquet"):
        [dataset.image(k) for k in range(COUNT)]


def test_latents_are_those_of_a_folder_of_latents(pictures, tmp_path):
    pytest.importorskip("diffusers")
    codec = str(saved_vae(tmp_path / "vae", seed=0))
    source = write_shards(pictures, tmp_path / "shards", codec_name=codec)
    prepare_latents(pictures, tmp_path / "latents", 16, codec, progress=False)
    whole = LatentDataset(tmp_path / "latents")
    index = {whole.name(k): k for k in range(len(whole))}
    dataset = open_at(source, tmp_path, size=8, channels=4, codec_name=codec)
    assert (dataset.codec_name, dataset.is_latent) == (whole.codec_name, True)
    order = [index[name] for name in source_rows(source)]
    numbers, draws = list(range(COUNT)), Draws(3)
    ours, labels = dataset.batch(numbers)
    theirs, expected = whole.batch(order)
    assert ours.equal(theirs)
    assert labels is not None
    assert labels.equal(expected)
    for mirror in (False, True):
        assert dataset.to_model(ours, draws, numbers, mirror, lambda x: x).equal(
            whole.to_model(theirs, draws, numbers, mirror, lambda x: x)
        )
    with pytest.raises(ValueError, match="works on pixels"):
        open_at(source, tmp_path)
    with pytest.raises(ValueError, match=r"model\.size=8"):
        open_at(source, tmp_path, size=16, channels=4, codec_name=codec)


@pytest.mark.parametrize("stored", [True, False])
def test_captions_are_those_of_the_cache(stored, pictures, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from mezzotint.data.text_encoder import open_text_encoder

    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "embeddings"))
    folder = str(saved_t5(tmp_path / "t5", seed=0))
    encoder = open_text_encoder(folder)
    options = {"encoder_name": folder} if stored else {}
    source = write_shards(pictures, tmp_path / "shards", **options)
    dataset, plain = open_at(source, tmp_path), open_images(pictures, size=16)
    index = {plain.name(k): k for k in range(len(plain))}
    order = [index[name] for name in source_rows(source)]
    ours = ShardedCaptions(dataset, encoder)
    theirs = embed_captions([plain.text(k) for k in range(COUNT)], encoder)
    assert ours.is_stored == stored
    text, mask = ours.batch(list(range(COUNT)))
    expected, expected_mask = theirs.batch(order)
    length = expected.shape[1]
    assert mask[:, :length].equal(expected_mask)
    assert not mask[:, length:].any()
    tolerance = {"rtol": 0.0, "atol": 0.0} if stored else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(text[:, :length].float(), expected.float(), **tolerance)


def test_captions_of_another_encoder_are_refused(pictures, tmp_path):
    pytest.importorskip("transformers")
    from mezzotint.data.text_encoder import open_text_encoder

    one, other = (str(saved_t5(tmp_path / f"t5-{seed}", seed=seed)) for seed in (0, 1))
    dataset = open_at(write_shards(pictures, tmp_path / "s", encoder_name=one), tmp_path)
    with pytest.raises(ValueError, match="holds captions embedded by"):
        ShardedCaptions(dataset, open_text_encoder(other))


def test_a_record_lists_shards_and_not_images(pictures, tmp_path):
    dataset = open_at(write_shards(pictures, tmp_path / "shards"), tmp_path)
    content = read_content(dataset, captions=False)
    assert content.of_shards
    assert len(content.rows) == 4
    again = open_at(write_shards(pictures, tmp_path / "again"), tmp_path)
    assert isinstance(again, ShardedDataset)
    assert read_content(again, captions=False).fingerprint == content.fingerprint
