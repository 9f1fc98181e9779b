"""Text in a transformer, the same block for every family that reads captions.

*simple diffusion* does not say how text enters its network (specs/simple-diffusion.md section 6,
[?]), and the papers of SiD2 and JiT have none. Our choice for all: the normalised, projected tokens
are extra keys and values of every self-attention, and their mean is one more term of the condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mezzotint.process.denoiser import Cond


class TextConditioning(nn.Module):
    """Text embeddings to tokens for the attention, and to one vector for the condition.

    Padding is masked. No text, or a text without tokens, is the empty condition.

    Args:
        text_dim: width of the embeddings. channels: of the tokens.
        emb_dim: of the condition's vector.
    """

    def __init__(self, text_dim: int, channels: int, emb_dim: int):
        super().__init__()
        self.text_dim = text_dim
        self.norm = nn.LayerNorm(text_dim)
        self.tokens = nn.Linear(text_dim, channels)
        self.pooled = nn.Linear(text_dim, emb_dim)

    def forward(self, cond: Cond, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens (b, t, channels), their mask and the pooled vector (b, emb_dim).

        The mask (b, t) is True for real tokens.
        """
        weight = self.norm.weight  # float32 where the weights of products are stored in bfloat16
        text, mask = cond.text, cond.text_mask
        if text is None:
            text, mask = (
                weight.new_zeros(batch, 1, self.text_dim),
                weight.new_zeros(batch, 1, dtype=torch.bool),
            )
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        fits = text.ndim == 3 and text.shape[0] == batch and text.shape[2] == self.text_dim
        if not fits or mask.shape != text.shape[:2]:
            raise ValueError(
                f"text {tuple(text.shape)} with mask {tuple(mask.shape)} for a batch of {batch}: "
                f"this network reads (b, t, {self.text_dim}) with a mask (b, t)"
            )
        # Tokenizers return integers.
        mask = mask.to(weight.device, torch.bool)
        # The values in the padding must not matter, not even where they are NaN.
        text = text.to(weight).masked_fill(~mask[..., None], 0)
        text = self.norm(text).to(weight.dtype) * mask[..., None]
        mean = text.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.tokens(text), mask, self.pooled(mean)


def attention_mask(cells: int, mask: Tensor) -> Tensor:
    """Return (b, 1, 1, cells + t): True for every cell of the image, then `mask` (b, t)."""
    return torch.cat([mask.new_ones(len(mask), cells), mask], 1)[:, None, None]


def add_text(k: Tensor, v: Tensor, projection: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return an attention's keys and values (b, n, heads, d) with those of the text behind them.

    Args:
        projection: of a token to its key and value, without bias.
        tokens: (b, t, channels), of `TextConditioning`.
    """
    more_k, more_v = projection(tokens).unflatten(-1, (2, k.shape[2], -1)).unbind(2)
    return torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
