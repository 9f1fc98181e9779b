"""Official JiT checkpoints (github.com/LTH14/JiT): `.pth` with model, model_ema1, model_ema2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mezzotint.backbones.jit import JiTConfig
from mezzotint.convert.official import CheckpointFormat, TensorSlice, registry

PREFIX = "net."
# Official module -> ours, each with weight and bias.
OUTSIDE = {
    "t_embedder.mlp.0": "time.fc1",
    "t_embedder.mlp.2": "time.fc2",
    "x_embedder.proj2": "patch.1",
    "final_layer.linear": "head",
    "final_layer.adaLN_modulation.1": "modulation",
}
INSIDE = {
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.w12": "up",
    "mlp.w3": "down",
    "adaLN_modulation.1": "modulation",
}
# Whole tensors, official -> ours.
TENSORS = {
    "pos_embed": "positions",
    "in_context_posemb": "context_positions",
    "y_embedder.embedding_table.weight": "label.weight",
    "x_embedder.proj1.weight": "patch.0.weight",
    "final_layer.norm_final.weight": "norm.weight",
}
NORMS = {"norm1": "norm1", "norm2": "norm2", "attn.q_norm": "norm_q", "attn.k_norm": "norm_k"}

# Depth of a published network -> block before which the context is added.
RELEASED_STARTS = {12: 4, 24: 8, 32: 10, 40: 10}

_OUTSIDE = "|".join(re.escape(name) for name in OUTSIDE)
_INSIDE = "|".join(re.escape(name) for name in INSIDE)
_NORMS = "|".join(re.escape(name) for name in NORMS)
PATTERN = (
    rf"net\.({'|'.join(re.escape(name) for name in TENSORS)}"
    rf"|({_OUTSIDE})\.(weight|bias)"
    rf"|blocks\.\d+\.(({_INSIDE})\.(weight|bias)|({_NORMS})\.weight))"
)


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    heads: int | None = None,
    context_start: int | None = None,
    noise_scale: float | None = None,
) -> JiTConfig:
    """Infer the config of a state dict.

    Hints:
        heads: of the attention. By default the width over that of a head, which the norms of q and
            k show.
        context_start: block before which the context is added. By default that of the published
            network of this depth, and an error for other depths.
        noise_scale: standard deviation of the noise; size / 256 by default, 1 below.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = shapes[PREFIX + name]
        if len(found) != axes or 0 in found:
            raise ValueError(f"{PREFIX}{name} has shape {found}; expected {axes} axes, none empty")
        return found

    _, tokens, width = shape("pos_embed", 3)
    bottleneck, channels, patch, _ = shape("x_embedder.proj1.weight", 4)
    grid = math.isqrt(tokens)
    if grid**2 != tokens:
        raise ValueError(f"{PREFIX}pos_embed of {tokens} tokens is not of a square image")
    # Counted, not the highest index, so that a gap shows as unused and missing keys.
    blocks = {m[1] for m in map(re.compile(r"net\.blocks\.(\d+)\.").match, shapes) if m}
    (head_width,) = shape("blocks.0.attn.q_norm.weight", 1)
    if heads is not None and heads * head_width != width:
        raise ValueError(
            f"heads={heads} contradicts the file: width {width} over heads of {head_width} is "
            f"{width // head_width}; leave the hint out"
        )
    if context_start is None:
        if len(blocks) not in RELEASED_STARTS:
            raise ValueError(
                f"context_start leaves no trace in the shapes, and no release has {len(blocks)} "
                f"blocks; give context_start=..., 0 to {len(blocks) - 1}"
            )
        context_start = RELEASED_STARTS[len(blocks)]
    size = grid * patch
    return JiTConfig(
        size=size,
        channels=channels,
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        patch=patch,
        width=width,
        depth=len(blocks),
        heads=width // head_width,
        bottleneck=bottleneck,
        context_tokens=shape("in_context_posemb", 3)[1],
        context_start=context_start,
        # Only the two largest were trained with it (section 3).
        dropout=0.2 if len(blocks) in (32, 40) else 0.0,
        noise_scale=max(1.0, size / 256) if noise_scale is None else noise_scale,
    )


def key_map(c: JiTConfig) -> dict[str, tuple[TensorSlice, ...]]:
    """Return official key -> our rows."""
    pairs = dict(TENSORS)
    for leaf in ("weight", "bias"):
        pairs |= {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in OUTSIDE.items()}
    for i in range(c.depth):
        at = f"blocks.{i}."
        for leaf in ("weight", "bias"):
            pairs |= {f"{at}{t}.{leaf}": f"{at}{o}.{leaf}" for t, o in INSIDE.items()}
        pairs |= {f"{at}{t}.weight": f"{at}{o}.weight" for t, o in NORMS.items()}
    return {PREFIX + theirs: (TensorSlice(ours),) for theirs, ours in pairs.items()}


registry.add(
    "jit",
    CheckpointFormat(
        backbone="jit",
        pattern=PATTERN,
        config=infer_config,
        keys=key_map,
        licence="MIT, as its authors' repository says",
        where="github.com/LTH14/JiT, README: JiT-B/16, L/16, H/16 and larger",
    ),
)
