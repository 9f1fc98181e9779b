"""Layers of the simple diffusion networks: conditioning, ResBlock, transformer block, transforms.

Section numbers are those of specs/simple-diffusion.md. "Our choice" marks what the papers do not
state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.backbones.inputs import label_rows, wavelet_levels
from mezzotint.backbones.text_conditioning import add_text
from mezzotint.backbones.wavelet import dwt53, idwt53
from mezzotint.process.denoiser import Cond


def zero_init(layer: nn.Module) -> nn.Module:
    """Set all parameters of `layer` to zero, so that its output starts at zero; return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def to_gpu_layout(h: Tensor) -> Tensor:
    """Return the map (b, c, h, w) channels-last on a GPU, as it is elsewhere.

    cuDNN's 16-bit convolutions read and write this layout; others are copied to it and back. On
    the CPU the layout would change the last bits.
    """
    return h.contiguous(memory_format=torch.channels_last) if h.is_cuda else h


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, whose result has the layout of the convolution that follows."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (b, c, h, w) over each group's channels and cells."""
        # torch's kernel and its decomposition return channels-first whatever they are given. In a
        # compiled block the copy is part of the kernel that writes the result.
        return to_gpu_layout(super().forward(input))


def group_norm(channels: int) -> GroupNorm:
    """Return a GroupNorm with gcd(32, channels / 4) groups: 32 for the published widths.

    The number of groups is our choice (section 6, [?]).

    Errors: ValueError where the channels are no multiple of 4.
    """
    if channels % 4:
        raise ValueError(
            f"a width of {channels} channels is no multiple of 4; try {channels + -channels % 4}"
        )
    return GroupNorm(math.gcd(32, channels // 4), channels)


def inv_cos(logsnr: Tensor) -> Tensor:
    """Return the u in [0, 1] at which the plain cosine schedule has this log-SNR (section 2)."""
    # u = (2/pi) atan(exp(-clip(l, -20, 20) / 2))
    return torch.atan(torch.exp(-logsnr.clamp(-20, 20) / 2)) * (2 / math.pi)


def sinusoidal_embedding(position: Tensor, dim: int) -> Tensor:
    """Return ADM's timestep embedding, (b,) -> (b, dim): sines, then cosines.

    The angles are position / 10000^(k / (dim/2)).
    """
    k = torch.arange(dim // 2, device=position.device, dtype=position.dtype)
    angle = position[:, None] * torch.exp(-math.log(10_000) * k / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()], -1)


class AugmentEmbedding(nn.Module):
    """Linear map of EDM's 9 augmentation numbers to (b, dim), see `Cond.augment`.

    Without a bias, samples and images that are not augmented get exactly zero. The weights start at
    zero (our choice), so the option changes no network at initialisation.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 9))

    def forward(self, cond: Cond, batch: int) -> Tensor:
        """Return (batch, dim); zero where the condition has no `augment`."""
        numbers = cond.augment
        if numbers is None:  # zeros, so that the weight still gets a gradient
            numbers = self.weight.new_zeros(batch, 9)
        return F.linear(numbers.to(self.weight), self.weight)


class Conditioning(nn.Module):
    """The vector that every FiLM reads (section 6): swish(MLP(noise) + embedding(label)).

    The swish of the sum is our choice. DDPM computes it in every block, we compute it once.

    Args:
        width: dimension of the sinusoidal embedding. emb_dim: dimension of the vector.
        num_classes: number of labels, 0 for none; the null label has a row of its own.
        augment_label: whether to add an `AugmentEmbedding`.
    """

    def __init__(self, width: int, emb_dim: int, num_classes: int, augment_label: bool = False):
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} must be even: half of it are sines, half cosines")
        self.width = width
        self.num_classes = num_classes
        self.noise = nn.Sequential(
            nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.label = nn.Embedding(num_classes + 1, emb_dim) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        self.augment = AugmentEmbedding(emb_dim) if augment_label else None

    def forward(self, logsnr: Tensor, cond: Cond, pooled: Tensor | None = None) -> Tensor:
        """(b,) log-SNR and conditions to (b, emb_dim); `pooled` (b, emb_dim) is the pooled text."""
        if cond.text is not None and pooled is None:
            raise ValueError(
                "text was given to a network without text input; pass a label or no condition"
            )
        wide = logsnr.to(torch.promote_types(logsnr.dtype, torch.float32))
        # The embedding's periods are made for steps from 0 to 1000 (section 2).
        position = sinusoidal_embedding(1000 * inv_cos(wide), self.width)
        out = self.noise(position.to(next(self.noise.parameters()).dtype))
        index = label_rows(cond.label, self.num_classes, logsnr.shape[0], logsnr.device)
        out = out if self.label is None else out + self.label(index)
        out = out if self.augment is None else out + self.augment(cond, out.shape[0])
        return F.silu(out if pooled is None else out + pooled)


class FiLM(nn.Module):
    """h (1 + scale) + shift with (scale, shift) = Linear(emb); section 6."""

    def __init__(self, emb_dim: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(emb_dim, 2 * channels)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h is (b, c, h, w) or tokens (b, n, c); emb is (b, emb)."""
        scale, shift = (
            f[:, :, None, None] if h.ndim == 4 else f[:, None] for f in self.linear(emb).chunk(2, 1)
        )
        return torch.addcmul(shift, h, 1 + scale)


class ResBlock(nn.Module):
    """Section 6: two 3x3 convolutions with FiLM between them; the second starts at zero.

    A skip from the way down is added, not concatenated: (Norm(h) + Norm'(skip)) / sqrt(2).
    """

    def __init__(self, channels: int, emb_dim: int, dropout: float = 0.0, skip: bool = False):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.norm_skip = group_norm(channels) if skip else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.film = FiLM(emb_dim, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """(b, c, h, w) and (b, emb_dim) to (b, c, h, w); `skip` if the block was built with one."""
        n = self.norm1(h)
        if self.norm_skip is not None:
            assert skip is not None, "built with a skip"
            n = (n + self.norm_skip(skip)) * math.sqrt(0.5)
        n = self.conv1(F.silu(n))
        n = self.dropout(F.silu(self.film(self.norm2(n), emb)))
        return h + self.conv2(n)


def to_tokens(h: Tensor) -> Tensor:
    """(b, c, h, w) to (b, h w, c); no copy for a channels-last map, nor in `to_map`."""
    return h.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(b, h w, c) to (b, c, h, w) with the height and width of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(scale q k^T) v for (b, heads, n, d); the scale is 1 / sqrt(d) unless given.

    `mask` is that of `scaled_dot_product_attention`.
    """
    short = q.shape[-2] <= 512  # long rows stay fused for the sake of memory
    # One AVX512-BF16 core, 257 tokens, forward and backward: torch's fused kernel is 1.1-1.3 times
    # as fast as the product written out in float32, but 2.2 times slower in bf16.
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None
    # On GPUs heads wider than 256 fit neither cuDNN nor flash (torch's sdp_utils.cpp), only the
    # memory-efficient kernel, which does not use Hopper's instructions. Not measured.
    wide = q.device.type == "cuda" and q.shape[-1] > 256
    if short and (on_cpu or wide):
        return written_out_attention(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return what `attention` does as two products and a softmax; a `mask` is of booleans."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Section 6: pre-norm self-attention, q and k normalised per head, output starting at zero.

    Norms are LayerNorm, without bias on the tokens and with bias on q and k; the projections to q,
    k and v have no bias (our choice). Text tokens of `text_channels`, if any, give extra keys and
    values, see `text_conditioning`.
    """

    def __init__(self, channels: int, heads: int, text_channels: int = 0):
        super().__init__()
        if channels % heads:
            raise ValueError(f"a width of {channels} does not divide into {heads} heads")
        self.heads = heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.norm_q = nn.LayerNorm(channels // heads)
        self.norm_k = nn.LayerNorm(channels // heads)
        self.text = nn.Linear(text_channels, 2 * channels, bias=False) if text_channels else None
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(
        self, h: Tensor, text_tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(b, c, h, w) to (b, c, h, w), the residual included.

        text_tokens: (b, t, text_channels). mask: of `attention_mask`.
        """
        q, k, v = self.qkv(self.norm(to_tokens(h))).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.text is not None and text_tokens is not None:
            k, v = add_text(k, v, self.text, text_tokens)
        # Autocast normalises in float32.
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        mixed = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return h + to_map(self.out(mixed.transpose(1, 2).flatten(2)), h)


class TransformerBlock(nn.Module):
    """Section 6: first the MLP with FiLM, then attention without FiLM.

    FiLM comes before the swish, as in the ResBlock (the paper does not state the order, [?]).
    """

    def __init__(
        self, channels: int, emb_dim: int, heads: int, dropout: float = 0.0, text_channels: int = 0
    ):
        super().__init__()
        self.norm = nn.LayerNorm(channels, bias=False)
        self.up = nn.Linear(channels, 4 * channels)
        self.film = FiLM(emb_dim, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.down = zero_init(nn.Linear(4 * channels, channels))
        self.attention = Attention(channels, heads, text_channels)

    def forward(
        self, h: Tensor, emb: Tensor, text_tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(b, c, h, w) and (b, emb_dim) to (b, c, h, w); text_tokens and mask as in `Attention`."""
        hidden = F.silu(self.film(self.up(self.norm(to_tokens(h))), emb))
        return self.attention(h + to_map(self.down(self.dropout(hidden)), h), text_tokens, mask)


class PositionEmbedding(nn.Module):
    """Learned positions of a map, initialised from N(0, std²) (section 6).

    A map of another shape gets them resized bilinearly.
    """

    def __init__(self, channels: int, size: tuple[int, int], std: float = 0.01):
        super().__init__()
        self.table = nn.Parameter(std * torch.randn(1, channels, *size))

    def forward(self, h: Tensor) -> Tensor:
        """Add the positions to (b, c, h, w), which keeps its dtype: that of the residual stream."""
        table = self.table
        if table.shape[2:] != h.shape[2:]:
            table = F.interpolate(table, h.shape[2:], mode="bilinear", align_corners=False)
        return (h + table).to(h.dtype)


class Down(nn.Module):
    """2x2 average pool, then 1x1 convolution to the next width (section 6)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(b, c, h, w) to (b, out, h/2, w/2)."""
        return self.conv(F.avg_pool2d(h, 2))


class Up(nn.Module):
    """1x1 convolution to the level's width, then nearest x2 (section 6)."""

    def __init__(self, channels: int, out: int, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        """(b, c, h, w) to (b, out, 2h, 2w)."""
        return F.interpolate(self.conv(h), scale_factor=2.0, mode="nearest")


class Stem(nn.Module):
    """Section 5, first operation: image to a grid `patch` times coarser with `width` channels.

    none: 3x3 convolution. dwt: wavelet, then 3x3 convolution. conv: a patch x patch convolution
    with stride `patch`.
    """

    def __init__(self, channels: int, width: int, transform: str, patch: int):
        super().__init__()
        self.levels = wavelet_levels(transform, patch)
        if transform == "conv":
            self.conv = nn.Conv2d(channels, width, patch, stride=patch)
        else:
            self.conv = nn.Conv2d(channels * patch**2, width, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(b, channels, h, w) to (b, width, h/patch, w/patch)."""
        return self.conv(to_gpu_layout(dwt53(z, self.levels)))


class Head(nn.Module):
    """Section 5, last operation: norm, swish, convolution, inverse transform of `Stem`.

    The convolution starts at zero.
    """

    def __init__(self, width: int, channels: int, transform: str, patch: int):
        super().__init__()
        self.levels = wavelet_levels(transform, patch)
        self.norm = group_norm(width)
        if transform == "conv":
            self.conv = zero_init(nn.ConvTranspose2d(width, channels, patch, stride=patch))
        else:
            self.conv = zero_init(nn.Conv2d(width, channels * patch**2, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        """(b, width, h/patch, w/patch) to (b, channels, h, w)."""
        return idwt53(self.conv(F.silu(self.norm(h))), self.levels)
