"""Branches, attention and layer table show what the network computes; no browser."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mezzotint as mz
from mezzotint.backbones.diffit import TMSA
from mezzotint.process import logsnr as level
from mezzotint.process.prediction import target
from mezzotint.web import internals
from mezzotint.web.request import Request, make_job
from mezzotint.web.streaming import preview
from mezzotint.web.studio import open_studio

TOKENS, HEADS = 16, 2


@torch.no_grad()
def test_heatmap_is_the_attention_of_the_layer():
    """With one-hot values that number the tokens, the layer's output is the attention itself."""
    torch.manual_seed(0)
    attn = TMSA(TOKENS * HEADS, HEADS, side=4)
    x = torch.cat([torch.randn(1, 4, TOKENS, TOKENS), torch.eye(TOKENS).expand(1, 4, -1, -1)], -1)
    attn.qkv.weight[-TOKENS * HEADS :] = torch.cat(
        [torch.zeros(TOKENS, TOKENS), torch.eye(TOKENS)], 1
    ).repeat(HEADS, 1)
    attn.qkv.weight[: -TOKENS * HEADS].normal_()
    attn.qkv.bias[-TOKENS * HEADS :] = 0
    torch.nn.init.eye_(attn.proj.weight)
    attn.proj.bias.zero_()
    q_t, bias = torch.randn(1, TOKENS * HEADS), torch.randn(1, HEADS, TOKENS, TOKENS)
    weights = attn(x, q_t, torch.zeros(1, TOKENS * HEADS), bias)
    heat, row, column = internals.attention_heatmap(attn, (x, q_t, q_t, bias), 0.8, 0.3)
    assert (row, column) == (6, 2)  # of 8 x 8 tokens: window 2 of four, its token 10
    expected = torch.zeros(8, 8)
    expected[4:, :4] = weights[0, 2, 10].view(HEADS, 4, 4).mean(0)
    torch.testing.assert_close(heat, expected)
    assert heat.sum() == pytest.approx(1)


@pytest.fixture
def studio(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    small = {"width": 16, "depth": 2, "heads": 2}
    for preset, options in (
        ("dimr-tiny", {}),
        ("diffit-latent-tiny", small),
        ("unet-tiny", {"size": 16, "width": 8}),
    ):
        torch.manual_seed(0)
        mz.save_model(mz.create_model(preset, **options), tmp_path / preset)
    return open_studio(
        [str(tmp_path / name) for name in ("dimr-tiny", "diffit-latent-tiny", "unet-tiny")]
    )


def test_an_exact_branch_shows_the_image_at_its_own_size(studio):
    job = make_job(studio, Request(model="dimr-tiny"))
    torch.manual_seed(0)
    x, eps, logsnr = (
        torch.rand(1, 3, 32, 32) * 2 - 1,
        torch.randn(1, 3, 32, 32),
        torch.tensor([0.7]),
    )
    z = level.alpha(logsnr) * x + level.sigma(logsnr) * eps
    patches = job.model.info.config.patches
    assert patches == (4, 2, 1)
    truth = target(job.model.parameterisation.kind, x, eps, logsnr)
    outputs = [F.avg_pool2d(truth, rho) * rho for rho in patches]  # specs/dimr.md 2.9
    for shown, rho in zip(internals.branch_images(job, z, outputs, 0.7), patches, strict=True):
        expected = preview(job, F.avg_pool2d(x, rho))[0]
        assert shown.shape == (3, 32 // rho, 32 // rho)
        assert (shown.int() - expected.int()).abs().max() <= 1


def last(steps) -> tuple[str, str]:
    *_, end = steps
    return end


def test_attention_of_a_latent_model_needs_no_autoencoder_and_sampling_does(studio):
    images, status = last(internals.attention(studio, "diffit-latent-tiny", 0, 3, 2, 0.5, 0.5))
    assert images.count("<img") == 2 * 3
    assert "layer 2 of 2" in status
    with pytest.raises(ValueError, match="download sd-vae-ft-ema"):
        make_job(studio, Request(model="diffit-latent-tiny"))


def test_errors_for_what_a_network_does_not_have(studio):
    with pytest.raises(ValueError, match="unet-tiny"):
        last(internals.branches(studio, "unet-tiny", 0, 2))
    with pytest.raises(ValueError, match="dimr-tiny"):
        last(internals.attention(studio, "dimr-tiny", 0, 2, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match="layer '3'"):
        last(internals.attention(studio, "diffit-latent-tiny", 0, 2, 3, 0.5, 0.5))


def test_network_table_by_resolution(studio):
    table = internals.network_table("dimr-tiny")
    for text in ("32×32", "16×16", "8×8", "1.326 M"):
        assert text in table


@pytest.mark.parametrize("name", ["dimr-tiny", "diffit-latent-tiny", "unet-tiny"])
def test_a_network_with_hooks_is_not_replayed_from_a_graph(studio, name):
    job, seed = internals.make_single_job(studio, name, 7, 3)
    assert job.settings.cuda_graphs is False
    assert (job.settings.steps, seed) == (3, 7)
