"""Pretrained models of a recipe: listed, downloaded and checked, also without network access."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from mezzotint import config
from mezzotint.cli import main
from mezzotint.data.autoencoder import find_autoencoder, if_cached
from mezzotint.recipes import recipe_for
from mezzotint.tools.download import (
    download_requirements,
    find_requirements,
    recipe_requirements,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, dict[str, bytes]]:
    """A hub of three repositories; pytorch.bin is a file that no recipe needs."""
    content = {
        "stabilityai/sd-vae-ft-ema": {
            "config.json": b"{}",
            "diffusion_pytorch_model.safetensors": b"vae" * 100,
            "pytorch.bin": b"x",
        },
        "madebyollin/taesd": {
            "taesd_encoder.safetensors": b"e" * 50,
            "taesd_decoder.safetensors": b"d" * 60,
        },
        "google-t5/t5-small": {
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "model.safetensors": b"t5" * 80,
        },
    }

    def info(self, repo, files_metadata, revision=None):
        if repo not in content:
            raise OSError("no such repository")
        siblings = [
            SimpleNamespace(
                rfilename=name,
                size=len(data),
                lfs=SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()),
            )
            for name, data in content[repo].items()
        ]
        return SimpleNamespace(siblings=siblings)

    def download(repo, allow_patterns, local_dir=None, local_files_only=False, revision=None):
        if local_files_only:
            raise OSError("not cached")
        for name, data in content[repo].items():
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                Path(local_dir).mkdir(parents=True, exist_ok=True)
                (Path(local_dir) / name).write_bytes(served.get(name, data))
        return local_dir

    served: dict[str, bytes] = {}
    content["served"] = served
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return content


def test_requirements_of_recipes():
    def names(preset, *overrides):
        return [r.name for r in find_requirements(preset, overrides)]

    assert names("unet-tiny") == []
    assert names("diffit-256") == ["sd-vae-ft-ema", "taesd"]
    assert names("diffit-latent-tiny", "data.codec=taesd") == ["taesd"]
    assert names("uvit-text-tiny") == ["google/t5-v1_1-xxl"]
    assert names("uvit-text-tiny", "data.text_encoder=google-t5/t5-small") == ["google-t5/t5-small"]


def test_requirements_of_a_recipe_file(tmp_path):
    recipe = config.override(recipe_for("diffit-latent-tiny"), ["data.codec=taesd"])
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(recipe))
    found = find_requirements(str(tmp_path / "recipe.yaml"))
    assert found == recipe_requirements(recipe)
    assert [r.name for r in found] == ["taesd"]


def test_downloaded_files_are_found_in_the_cache(hub, tmp_path, monkeypatch, capsys):
    listed = download_requirements(find_requirements("diffit-256"), only_list=True)
    assert hashlib.sha256(b"vae" * 100).hexdigest() in listed
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("sys.argv", ["mezzotint", "download", "diffit-256"])
    main()
    codecs = tmp_path / "cache" / "codecs"
    assert f"downloaded to {codecs}" in capsys.readouterr().out
    assert find_autoencoder("sd-vae-ft-ema", fetch=False) == codecs / "sd-vae-ft-ema"
    assert sorted(p.name for p in find_autoencoder("taesd", fetch=False).iterdir()) == [
        "taesd_decoder.safetensors",
        "taesd_encoder.safetensors",
    ]
    assert not (codecs / "sd-vae-ft-ema" / "pytorch.bin").exists()
    # The second time, files and hashes are those on the disk.
    again = download_requirements(find_requirements("diffit-256"))
    assert hashlib.sha256(b"d" * 60).hexdigest() in again
    assert "downloaded to" not in again


def test_models_by_name(hub, tmp_path, capsys, monkeypatch):
    download_requirements(find_requirements("google-t5/t5-small"))
    assert (tmp_path / "cache" / "text" / "google-t5" / "t5-small" / "tokenizer.json").is_file()
    monkeypatch.setattr("sys.argv", ["mezzotint", "download", "taesd", "--list"])
    main()
    assert "taesd_encoder.safetensors" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "codecs").exists()
    with pytest.raises(ValueError, match="taesdd"):
        find_requirements("taesdd")


def test_damaged_download_is_refused(hub):
    hub["served"]["taesd_decoder.safetensors"] = b"cut"
    with pytest.raises(ValueError, match=r"taesd_decoder\.safetensors"):
        download_requirements(find_requirements("taesd"))


def test_failed_download_names_the_folder_and_fetches_the_rest(hub, tmp_path):
    del hub["stabilityai/sd-vae-ft-ema"]
    codecs = tmp_path / "cache" / "codecs"
    with pytest.raises(ValueError, match=re.escape(str(codecs / "sd-vae-ft-ema"))):
        download_requirements(find_requirements("diffit-256"))
    assert (codecs / "taesd" / "taesd_encoder.safetensors").is_file()


def test_real_taesd_opens_from_the_cache(shared, tmp_path):
    pytest.importorskip("diffusers")
    assert if_cached("taesd") is None
    shutil.copytree(shared("data/taesd"), tmp_path / "cache" / "codecs" / "taesd")
    codec = if_cached("taesd")
    assert codec is not None
    assert codec.name == "taesd"
    listed = download_requirements(find_requirements("taesd"))
    file = tmp_path / "cache" / "codecs" / "taesd" / "taesd_encoder.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in listed
