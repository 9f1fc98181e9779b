"""What a recipe needs from elsewhere is listed, fetched and checked; a hub that cannot be asked is no dead end."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from mezzotint import config
from mezzotint.cli import main
from mezzotint.data.autoencoder import find_autoencoder, if_cached
from mezzotint.recipes import recipe_for
from mezzotint.tools.download import download, needs_for, needs_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, dict[str, bytes]]:
    """A hub of three repositories, one file of which nobody needs."""
    content = {
        "stabilityai/sd-vae-ft-ema": {
            "config.json": b"{}", "diffusion_pytorch_model.safetensors": b"vae" * 100, "pytorch.bin": b"x"
        },
        "madebyollin/taesd": {"taesd_encoder.safetensors": b"e" * 50, "taesd_decoder.safetensors": b"d" * 60},
        "google-t5/t5-small": {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"t5" * 80},
    }  # fmt: skip

    def info(self, repo, files_metadata):
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

    def download(repo, allow_patterns, local_dir=None, local_files_only=False):
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


def test_what_recipes_need():
    def names(preset, *changes):
        return [need.name for need in needs_of(config.override(recipe_for(preset), changes))]

    assert names("unet-tiny") == []
    assert names("diffit-256") == ["sd-vae-ft-ema", "taesd"]
    assert names("diffit-latent-tiny", "data.codec=taesd") == ["taesd"]
    assert names("uvit-text-tiny") == ["google/t5-v1_1-xxl"]
    assert names("uvit-text-tiny", "data.text_encoder=google-t5/t5-small") == ["google-t5/t5-small"]
    assert "needs no file" in download([])


def test_fetching_puts_files_where_they_are_found(hub, tmp_path, monkeypatch, capsys):
    listed = download(needs_of(recipe_for("diffit-256")), only_list=True)
    assert hashlib.sha256(b"vae" * 100).hexdigest() in listed
    assert "not on this machine" in listed
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("sys.argv", ["mezzotint", "prefetch", "diffit-256"])
    main()
    assert "fetched to" in capsys.readouterr().out
    assert (
        find_autoencoder("sd-vae-ft-ema", fetch=False)
        == tmp_path / "cache" / "codecs" / "sd-vae-ft-ema"
    )
    assert sorted(p.name for p in find_autoencoder("taesd", fetch=False).iterdir()) == [
        "taesd_decoder.safetensors", "taesd_encoder.safetensors"
    ]  # fmt: skip
    assert not (tmp_path / "cache" / "codecs" / "sd-vae-ft-ema" / "pytorch.bin").exists()
    again = download(
        needs_of(recipe_for("diffit-256"))
    )  # now from disk, hashes of the files themselves
    assert hashlib.sha256(b"d" * 60).hexdigest() in again
    assert "fetched to" not in again


def test_single_things_by_name(hub, tmp_path, capsys, monkeypatch):
    download(needs_for("google-t5/t5-small", None))
    assert (tmp_path / "cache" / "text" / "google-t5" / "t5-small" / "tokenizer.json").is_file()
    monkeypatch.setattr("sys.argv", ["mezzotint", "prefetch", "taesd", "--list"])
    main()
    assert "taesd_encoder.safetensors" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing is known of 'taesdd'"):
        needs_for("taesdd", None)


def test_a_damaged_download_is_told(hub):
    hub["served"]["taesd_decoder.safetensors"] = b"cut"
    with pytest.raises(ValueError, match="is not what the hub states"):
        download(needs_for("taesd", None))


def test_what_cannot_be_fetched_is_listed_with_its_place(hub, tmp_path):
    del hub["stabilityai/sd-vae-ft-ema"]
    with pytest.raises(ValueError, match="could not be fetched") as error:
        download(needs_of(recipe_for("diffit-256")))
    assert str(tmp_path / "cache" / "codecs" / "sd-vae-ft-ema") in str(error.value)
    assert (
        tmp_path / "cache" / "codecs" / "taesd" / "taesd_encoder.safetensors"
    ).is_file()  # the rest was fetched


def test_real_taesd_is_at_hand_once_it_is_in_the_cache(shared, tmp_path):
    pytest.importorskip("diffusers")
    assert if_cached("taesd") is None
    shutil.copytree(shared("data/taesd"), tmp_path / "cache" / "codecs" / "taesd")
    found = if_cached("taesd")
    assert found is not None
    assert found.name == "taesd"
    listed = download(needs_for("taesd", None))
    file = tmp_path / "cache" / "codecs" / "taesd" / "taesd_encoder.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in listed
