"""Autoencoders: moments, scales, tiles, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_vae import saved_vae
from mezzotint.data import autoencoder
from mezzotint.data.autoencoder import draw_latents, open_codec
from mezzotint.data.image_dataset import open_images
from mezzotint.data.transforms import to_model_range
from mezzotint.train.sample_grid import preview_codec

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    preview_codec.cache_clear()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL, saved by diffusers: factor 2, 4 channels, scale 0.7, shift 0.1."""
    return saved_vae(tmp_path_factory.mktemp("vae"), seed=0)


def test_moments_are_those_of_diffusers_scaled(vae_folder):
    own, theirs = open_codec(vae_folder), diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    x = torch.rand(3, 3, 16, 12) * 2 - 1
    mean, logvar = own.encode_moments(x)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
    assert mean.shape == (3, 4, 8, 6)
    torch.testing.assert_close(mean, 0.7 * (posterior.mean - 0.1))
    noise = torch.randn_like(mean)
    expected = 0.7 * (
        posterior.mean + posterior.std * noise - 0.1
    )  # pipelines' (sample - shift) * scale
    torch.testing.assert_close(draw_latents(mean, logvar, noise), expected)
    with torch.no_grad():
        back = theirs.decode(mean / 0.7 + 0.1).sample.clamp(-1, 1)
    torch.testing.assert_close(own.decode(mean), back)


def test_encoding_and_decoding_do_not_depend_on_the_batch(vae_folder):
    own = open_codec(vae_folder)
    x = torch.rand(5, 3, 16, 16) * 2 - 1
    mean, logvar = own.encode_moments(x)
    for i in range(5):
        alone = own.encode_moments(x[i : i + 1])
        assert torch.equal(alone[0][0], mean[i])
        assert torch.equal(alone[1][0], logvar[i])
        assert torch.equal(own.decode(mean[i : i + 1])[0], own.decode(mean)[i])


def test_pixels_are_a_codec():
    own = open_codec("pixels")
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    mean, logvar = own.encode_moments(x)
    assert torch.equal(draw_latents(mean, logvar, torch.randn_like(x)), x)
    assert torch.equal(own.decode(x), x)
    assert (own.factor, own.channels, own.scale) == (1, 3, 1.0)


def test_published_scales():
    assert autoencoder.SD_SCALE == 0.18215
    assert {autoencoder.RELEASES[name].scale for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")} == {
        0.18215
    }


def test_the_published_scale_wins_over_a_config_that_lacks_it(tmp_path):
    saved_vae(
        tmp_path / "cache" / "codecs" / "sd-vae-ft-ema",
        seed=0,
        scaling_factor=None,
        shift_factor=None,
    )
    found = open_codec("sd-vae-ft-ema")
    assert (found.name, found.scale, found.shift) == ("sd-vae-ft-ema", 0.18215, 0.0)


def test_the_hash_depends_on_the_weights(vae_folder, tmp_path):
    assert open_codec(vae_folder).hash == open_codec(str(vae_folder)).hash
    assert open_codec(vae_folder).hash != open_codec(saved_vae(tmp_path / "other", seed=1)).hash


def test_log_variance_of_minus_infinity_is_no_noise():
    mean = torch.randn(2, 3)
    assert torch.equal(
        draw_latents(mean, torch.full_like(mean, -torch.inf), torch.randn(2, 3)), mean
    )


def test_drawn_latents_have_the_given_moments():
    mean, logvar = torch.tensor([1.5, -2.0]), torch.tensor([0.5, -3.0])
    drawn = draw_latents(
        mean.expand(200_000, 2), logvar.expand(200_000, 2), torch.randn(200_000, 2)
    )
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(0), logvar.exp(), atol=0.02, rtol=0)


def test_tiled_decoding_of_a_local_decoder_equals_the_whole():
    def decode(z):  # each cell becomes 2x2 pixels, alone
        return z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    for height, width, tile in [(9, 14, 5), (16, 4, 8), (7, 7, 7), (20, 33, 8)]:
        z = torch.randn(1, 4, height, width)
        torch.testing.assert_close(autoencoder.decode_tiled(decode, z, tile, 2), decode(z))


def test_tiles_bound_the_size_decoded_at_once(vae_folder):
    own = open_codec(vae_folder)
    z = torch.randn(1, 4, 24, 40)
    seen: list[tuple[int, ...]] = []
    whole = own.vae.decode
    own.vae.decode = lambda part: seen.append(part.shape) or whole(part)
    assert own.decode(z, tile=8).shape == (1, 3, 48, 80)
    assert max(max(shape[2:]) for shape in seen) == 8
    own.decode(z, tile=40)
    assert seen[-1] == (1, 4, 24, 40)
    own.decode(z)
    assert seen[-1] == (1, 4, 24, 32)  # a CPU's default
    with pytest.raises(ValueError, match="at least 4 cells"):
        own.decode(z, tile=0)


def test_taesd_reconstructs_photographs(shared):
    own = open_codec(shared("data/taesd"))
    assert (own.factor, own.channels, own.scale) == (8, 4, 1.0)
    image_folder = open_images(shared("data/photos"), size=128)
    x = to_model_range(image_folder.batch([0, 20, 40])[0])
    mean, logvar = own.encode_moments(x)
    assert (logvar == -torch.inf).all()
    error = ((own.decode(mean) - x) / 2).square().flatten(1).mean(1)
    psnr = -10 * error.log10()
    assert psnr.min() > 17
    assert psnr.mean() > 24
    assert 0.4 < mean.std() < 1.6  # Stable Diffusion's latents after 0.18215


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_damaged_taesd_is_reported(shared, tmp_path, part):
    shutil.copytree(shared("data/taesd"), tmp_path / "taesd")
    file = tmp_path / "taesd" / f"taesd_{part}.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if not k.startswith("12.")}, file)
    with pytest.raises(ValueError, match="holds no TAESD"):
        open_codec(tmp_path / "taesd")
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        open_codec(tmp_path / "taesd")


def test_a_missing_codec_names_the_files_and_the_folder(tmp_path):
    with pytest.raises(ValueError) as error:
        open_codec("sd-vae-ft-mse")
    words = str(error.value)
    for part in (
        "stabilityai/sd-vae-ft-mse",
        "diffusion_pytorch_model.safetensors",
        "335 MB",
        "mezzotint download",
    ):
        assert part in words
    assert str(tmp_path / "cache" / "codecs" / "sd-vae-ft-mse") in words
    with pytest.raises(ValueError, match="did you mean sd-vae-ft"):
        open_codec("sd-vae-ft-em")
    assert autoencoder.if_cached("taesd") is None


def test_folders_without_codec_are_refused(tmp_path, vae_folder):
    with pytest.raises(ValueError, match="holds no autoencoder"):
        open_codec(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(vae_folder, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel; codecs are"):
        open_codec(other)
    (other / "config.json").write_text(json.dumps(values))
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        open_codec(other)


def test_images_and_latents_that_do_not_fit_a_codec(vae_folder):
    own = open_codec(vae_folder)
    with pytest.raises(ValueError, match="multiples of 2"):
        own.encode_moments(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="latents of 3 channels do not fit"):
        own.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="not finite"):
        own.encode_moments(torch.full((1, 3, 16, 16), torch.nan))
