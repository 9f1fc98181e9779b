"""Official latent DiffiT checkpoints (github.com/NVlabs/DiffiT), `.safetensors`.

The map is written from the list of keys in specs/diffit.md section 2. The authors' code, which is
not free, was not consulted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mezzotint.backbones.diffit import DiffiTConfig, relative_index
from mezzotint.convert.official import CheckpointFormat, TensorSlice, get_shape, registry

PATTERN = (
    r"pos_embed|x_embedder\.proj\.(weight|bias)|t_embedder\.mlp\.[02]\.(weight|bias)"
    r"|y_embedder\.embedding_table\.weight"
    r"|blocks\.\d+\.(attn\.(relative_position_(bias_table|index)|(qkv_temb|qkv|proj)\.(weight|bias))"
    r"|mlp\.fc[12]\.(weight|bias))|final_layer\.linear\.(weight|bias)"
)
OUTSIDE = {  # official module -> ours
    "x_embedder.proj": "patch",
    "t_embedder.mlp.0": "time.fc1",
    "t_embedder.mlp.2": "time.fc2",
    "final_layer.linear": "final",
}
INSIDE = {"attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def square_side(what: str, square: int) -> int:
    """Return the side of a square; ValueError where it is none."""
    side = math.isqrt(square)
    if side**2 != square:
        raise ValueError(f"{what} has {square} rows, which is not the square of a side")
    return side


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, prediction: str = "eps") -> DiffiTConfig:
    """Infer the config: heads from the bias tables, windows from their length.

    Hints:
        prediction: what the weights predict; every release predicts eps.
    """
    width, channels, patch, _ = get_shape(shapes, "x_embedder.proj.weight", 4)
    grid = square_side("pos_embed", get_shape(shapes, "pos_embed", 3)[1])
    rows, heads = get_shape(shapes, "blocks.0.attn.relative_position_bias_table", 2)
    window = (square_side("the bias table", rows) + 1) // 2
    index = shapes["blocks.0.attn.relative_position_index"]
    # Checked before a table of that size is allocated.
    if index != (window**2, window**2):
        raise ValueError(
            f"bias tables of {rows} rows belong to {window**2} tokens, but the index is {index}"
        )
    outputs, cells = get_shape(shapes, "final_layer.linear.weight", 2)[0], patch**2 * channels
    if outputs not in (cells, 2 * cells):
        raise ValueError(
            f"the final layer has {outputs} outputs; patch {patch} and {channels} channels need "
            f"{cells} or, with a learned variance, {2 * cells}"
        )
    # Counted, not the highest index, so that a gap shows as unused and missing keys.
    blocks = {m[1] for m in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if m}
    return DiffiTConfig(
        size=grid * patch,
        channels=channels,
        num_classes=get_shape(shapes, "y_embedder.embedding_table.weight", 2)[0] - 1,
        prediction=prediction,
        patch=patch,
        width=width,
        depth=len(blocks),
        heads=heads,
        mlp_ratio=get_shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0] / width,
        window=None if window == grid else window,
        learned_variance=outputs == 2 * cells,
    )


def key_map(c: DiffiTConfig) -> dict[str, tuple[TensorSlice, ...]]:
    """Return official key -> our rows; `temporal` stacks all q, then all v, then all k."""
    result: dict[str, tuple[TensorSlice, ...]] = {"pos_embed": (TensorSlice("positions"),)}
    result["y_embedder.embedding_table.weight"] = (TensorSlice("label.weight"),)
    for leaf in ("weight", "bias"):
        for theirs, ours in OUTSIDE.items():
            result[f"{theirs}.{leaf}"] = (TensorSlice(f"{ours}.{leaf}"),)
        for i in range(c.depth):
            for theirs, ours in INSIDE.items():
                result[f"blocks.{i}.{theirs}.{leaf}"] = (TensorSlice(f"blocks.{i}.{ours}.{leaf}"),)
            q, v, k = ((part * c.depth + i) * c.width for part in range(3))
            result[f"blocks.{i}.attn.qkv_temb.{leaf}"] = tuple(
                TensorSlice(f"temporal.{leaf}", start, start + c.width) for start in (q, k, v)
            )
    for i in range(c.depth):
        result[f"blocks.{i}.attn.relative_position_bias_table"] = (
            TensorSlice(f"blocks.{i}.attn.bias_table"),
        )
    return result


def index_tables(c: DiffiTConfig) -> dict[str, Tensor]:
    """Return the index tables, int64 (tokens, tokens)."""
    side = c.table_side
    index = relative_index(side, side, torch.device("cpu")).view(side**2, side**2)
    return {f"blocks.{i}.attn.relative_position_index": index.clone() for i in range(c.depth)}


registry.add(
    "diffit",
    CheckpointFormat(
        backbone="diffit",
        pattern=PATTERN,
        config=infer_config,
        keys=key_map,
        constants=index_tables,
        codec=lambda c: "sd-vae-ft-ema",
        licence="CC-BY-NC-SA-4.0: no commercial use, share alike, "
        "name the authors (NVIDIA, DiffiT)",
        where="github.com/NVlabs/DiffiT, README: DiffiT for ImageNet 256x256 and 512x512",
    ),
)
