"""Text reaches the network through attention and FiLM; padding and the empty text are exact."""

from __future__ import annotations

import pytest
import torch

from mezzotint.models import create_model
from mezzotint.process import guidance
from mezzotint.process.denoiser import Cond


def reading_model(**overrides):
    """uvit-text-tiny, smaller, every parameter moved off its start."""
    torch.manual_seed(0)
    small = {
        "size": 16,
        "width": 8,
        "emb_dim": 16,
        "multipliers": (1, 2),
        "blocks": (1,),
        "depth": 2,
        "heads": 2,
    }
    small |= {"transform": "dwt", "patch": 4, "text_dim": 16}
    model = create_model("uvit-text-tiny", **{**small, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def query(b=3, t=6):
    g = torch.Generator().manual_seed(0)
    z, text = torch.randn(b, 3, 16, 16, generator=g), torch.randn(b, t, 16, generator=g)
    mask = torch.arange(t) < torch.arange(1, b + 1)[:, None]
    return z, torch.linspace(-3, 3, b), text, mask


@torch.no_grad()
def test_the_content_of_padding_changes_nothing_bitwise():
    model, (z, logsnr, text, mask) = reading_model(), query()
    plain = model(z, logsnr, Cond(text=text, text_mask=mask)).x
    for rubbish in (0.0, 1e4, torch.nan):
        other = text.masked_fill(~mask[..., None], rubbish)
        assert torch.equal(model(z, logsnr, Cond(text=other, text_mask=mask)).x, plain)


@torch.no_grad()
def test_more_padding_changes_no_more_than_rounding():  # a longer row is summed in another order
    model, (z, logsnr, text, mask) = reading_model(), query()
    plain = model(z, logsnr, Cond(text=text, text_mask=mask)).x
    for more in (1, 7, 58):
        longer = torch.cat([text, torch.full((3, more, 16), 3.0)], 1)
        longer_mask = torch.cat([mask, torch.zeros(3, more, dtype=torch.bool)], 1)
        other = model(z, logsnr, Cond(text=longer, text_mask=longer_mask)).x
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_token_is_used_by_attention_and_by_film():
    z, logsnr, text, mask = query(b=1)
    mask = torch.ones_like(mask)
    for silent in ("attention", "film"):
        model = reading_model()
        if silent == "attention":
            for block in model.backbone.middle:
                block.attention.text.weight.zero_()
        else:
            model.backbone.words.pooled.weight.zero_()
        plain = model(z, logsnr, Cond(text=text, text_mask=mask)).x
        for word in range(text.shape[1]):
            other = text.clone()
            other[:, word] = other[:, word].flip(-1)
            assert not torch.equal(model(z, logsnr, Cond(text=other, text_mask=mask)).x, plain)


@torch.no_grad()
def test_no_text_equals_empty_text():
    model, (z, logsnr, text, _) = reading_model(), query()
    none = model(z, logsnr, Cond()).x
    empty = model(z, logsnr, Cond(text=text, text_mask=torch.zeros(3, 6, dtype=torch.bool))).x
    torch.testing.assert_close(none, empty)
    assert not torch.equal(none, model(z, logsnr, Cond(text=text)).x)
    assert torch.equal(
        model(z, logsnr, Cond(text=text)).x,
        model(z, logsnr, Cond(text=text, text_mask=torch.ones(3, 6, dtype=torch.bool))).x,
    )


def test_text_of_another_width_or_for_another_network_is_refused():
    model, (z, logsnr, text, mask) = reading_model(), query()
    with pytest.raises(ValueError, match=r"reads \(b, t, 16\)"):
        model(z, logsnr, Cond(text=text[..., :8], text_mask=mask))
    with pytest.raises(ValueError, match="without text input"):
        reading_model(text_dim=0)(z, logsnr, Cond(text=text, text_mask=mask))


@torch.no_grad()
def test_guidance_moves_away_from_the_empty_condition():
    model, (z, logsnr, text, mask) = reading_model(), query()
    cond = Cond(text=text, text_mask=mask)
    guided = guidance.classifier_free(model, guidance.null_text, guidance.dit_s(3.0))(
        z, logsnr, cond
    )
    strong = model(z, logsnr, cond).x
    weak = model(z, logsnr, Cond(text=text, text_mask=torch.zeros_like(mask))).x
    torch.testing.assert_close(guided.x, weak + 3 * (strong - weak), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance needs text"):
        guidance.null_text(Cond())
