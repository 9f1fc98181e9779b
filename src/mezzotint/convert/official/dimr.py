"""Official DiMR checkpoints (github.com/qihao067/DiMR), `.pth` state dicts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from mezzotint.backbones.dimr import DiMRConfig
from mezzotint.backbones.dimr_blocks import NORMS
from mezzotint.convert.official import CheckpointFormat, TensorSlice, get_shape, registry

# The tensors of a time-dependent vector, official and ours, in the same order.
TDP = ("param0", "param1", "nodecay_weight", "nodecay_bias")
TIME = ("time.p0", "time.p1", "time.w_minus_1", "time.b")
NORM_VECTORS = {"TDRMSN": ("scale",), "LN": ("weight", "bias"), "RMSN": (), "ADARMSN": ()}
# Norms with weights of their own: the official tensor, ours.
NORM_OWN = {"RMSN": ("scale", "gain"), "ADARMSN": ("linear.weight", "linear.weight")}

RELEASED_HEADS = {960: 16, 1152: 16}  # width of the transformer -> heads

_LEAF = r"(\.(param0|param1|nodecay_weight|nodecay_bias))"
_NORM = rf"norm\.(linear\.weight|(scale|weight|bias){_LEAF}?)"
PATTERN = (
    r"stages\.\d+\.(input_layer\.1\.(weight|bias)|input_layer\.3\.position_embeddings\.weight"
    r"|class_embeds\.weight"
    rf"|upsample\.(1\.kernel\.(weight|bias)|[02]\.(weight|bias){_LEAF})"
    rf"|blocks\.\d+\.(block[12]\.{_NORM}"
    r"|block1\.(query_key_value\.weight|dense\.(weight|bias)|1\.(weight|bias))"
    r"|block2\.w[012]\.(weight|bias))"
    rf"|skip_denses\.\d+\.(weight|bias)|output_layer\.(0\.(weight|bias){_LEAF}|2\.(weight|bias)))"
)


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    heads: int | None = None,
    null_label: bool | None = None,
    time: str | None = None,
    image_input_ratio: tuple[int, ...] | list[int] = (),
) -> DiMRConfig:
    """Infer the config of a state dict.

    Hints:
        heads: of the attention, which leave no trace in the shapes. By default 16 for the widths
            960 and 1152 of the released models, and an error for others.
        null_label: whether the last row of the class embedding means "no class". By default it
            does, except in a table of 1000 rows: ImageNet's classes alone.
        time: "scaled_linear" (default with 4 channels: latents) or "linear_vp" (default otherwise:
            pixels).
        image_input_ratio: of each branch, coarse to fine; empty is 1, as in the released configs.
    """
    found = {m[1] for m in map(re.compile(r"stages\.(\d+)\.").match, shapes) if m}
    branches = len(found)
    if not branches or found != {str(i) for i in range(branches)}:
        raise ValueError(f"its branches are {sorted(found)[:8]}; expected stages.0, stages.1, ...")
    indices = range(branches)
    ratios = tuple(image_input_ratio) or (1,) * branches
    if len(ratios) != branches or not all(isinstance(r, int) and r >= 1 for r in ratios):
        raise ValueError(
            f"image_input_ratio {image_input_ratio!r} must be {branches} whole numbers from 1, one "
            "for each branch"
        )
    patches = tuple(
        get_shape(shapes, f"stages.{i}.input_layer.1.weight", 4)[2] * ratio
        for i, ratio in zip(indices, ratios, strict=True)
    )
    tables = [
        get_shape(shapes, f"stages.{i}.input_layer.3.position_embeddings.weight", 2)[0]
        for i in indices
    ]
    sizes = {math.isqrt(rows) * patch for rows, patch in zip(tables, patches, strict=True)}
    if len(sizes) != 1 or any(math.isqrt(rows) ** 2 != rows for rows in tables):
        raise ValueError(
            f"position tables of {tables} rows for patches {patches} do not belong to one square "
            "input"
        )
    stages = tuple(
        "transformer"
        if f"stages.{i}.blocks.0.block1.query_key_value.weight" in shapes
        else "convnext"
        for i in indices
    )
    rows = [
        get_shape(shapes, f"stages.{i}.class_embeds.weight", 2)[0]
        for i in indices
        if stages[i] == "transformer"
    ]
    if len(set(rows)) > 1:
        raise ValueError(f"class embeddings of different lengths {rows}")
    if null_label is None:
        null_label = rows != [1000] * len(rows)
    channels = get_shape(shapes, "stages.0.input_layer.1.weight", 4)[1]
    depthwise = [
        get_shape(shapes, f"stages.{i}.blocks.0.block1.1.weight", 4)[2]
        for i in indices
        if stages[i] == "convnext"
    ]
    if len(set(depthwise)) > 1:
        raise ValueError(f"depthwise kernels of different widths {depthwise}")
    dims = tuple(get_shape(shapes, f"stages.{i}.input_layer.1.weight", 4)[0] for i in indices)
    if heads is None:
        widths = {dim for dim, stage in zip(dims, stages, strict=True) if stage == "transformer"}
        if not widths <= RELEASED_HEADS.keys():
            fit = [h for h in range(1, 65) if all(width % h == 0 for width in widths)]
            raise ValueError(
                f"heads leave no trace in the shapes, and no release has the width {max(widths)}; "
                f"give heads=..., one of {fit}"
            )
        heads = RELEASED_HEADS[max(widths)] if widths else 1
    return DiMRConfig(
        size=sizes.pop(),
        channels=channels,
        num_classes=rows[0] - null_label if rows else 0,
        null_label=null_label,
        patches=patches,
        image_input_ratio=ratios if max(ratios) > 1 else (),
        dims=dims,
        hidden_dims=tuple(
            get_shape(shapes, f"stages.{i}.blocks.0.block2.w0.weight", 2)[0] for i in indices
        ),
        depths=tuple(infer_depth(shapes, i) for i in indices),
        stages=stages,
        heads=heads,
        kernel_size=depthwise[0] if depthwise else 7,
        norm=infer_norm(shapes),
        time=time or ("scaled_linear" if channels == 4 else "linear_vp"),
    )


def infer_depth(shapes: Mapping[str, tuple[int, ...]], i: int) -> int:
    """Return the blocks of branch i, from the highest index, so that a gap is an error."""
    found = [re.match(rf"stages\.{i}\.(blocks|skip_denses)\.(\d+)\.", key) for key in shapes]
    counts = [1 + int(m[2]) // 2 * 2 if m[1] == "blocks" else 2 * int(m[2]) + 3 for m in found if m]
    return max(counts, default=1)


def infer_norm(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of the block norm, from the names of its parameters."""
    prefix = "stages.0.blocks.0.block2.norm."
    for name, leaf in {"TDRMSN": "scale.param0", "LN": "weight.param0", "RMSN": "scale"}.items():
        if prefix + leaf in shapes:
            return name
    shapes[prefix + "linear.weight"]  # raises the ValueError where this is missing too
    return "ADARMSN"


def key_map(c: DiMRConfig) -> dict[str, tuple[TensorSlice, ...]]:
    """Return official key -> rows of ours."""
    result: dict[str, tuple[TensorSlice, ...]] = {}
    start = 0
    for i, (stage, hidden) in enumerate(zip(c.stages, c.hidden_dims, strict=True)):
        theirs, ours = f"stages.{i}.", f"branches.{i}."
        for name, width in time_vectors(c, i):
            for leaf, own in zip(TDP, TIME, strict=True):
                result[f"{theirs}{name}.{leaf}"] = (TensorSlice(own, start, start + width),)
            start += width
        result |= map_whole(f"{theirs}input_layer.1", f"{ours}patch", ("weight", "bias"))
        result[f"{theirs}input_layer.3.position_embeddings.weight"] = (
            TensorSlice(f"{ours}positions"),
        )
        if stage == "transformer":
            result[f"{theirs}class_embeds.weight"] = (TensorSlice(f"{ours}classes"),)
        if i > 0:
            result |= map_whole(
                f"{theirs}upsample.1.kernel", f"{ours}cascade.project", ("weight", "bias")
            )
        for j in range(c.depths[i]):
            result |= map_block(f"{theirs}blocks.{j}.", f"{ours}blocks.{j}.", stage, hidden, c.norm)
        for j in range(c.depths[i] // 2):
            result |= map_whole(
                f"{theirs}skip_denses.{j}", f"{ours}skips.{j}.linear", ("weight", "bias")
            )
        result |= map_whole(f"{theirs}output_layer.2", f"{ours}head", ("weight", "bias"))
    return result


def time_vectors(c: DiMRConfig, i: int) -> Iterator[tuple[str, int]]:
    """Yield name and width of branch i's time-dependent vectors, in the order of `Branch`."""
    dim = c.dims[i]
    if i > 0:
        joined = c.dims[i - 1] * (c.depths[i - 1] + 1)
        yield from [("upsample.0.weight", joined), ("upsample.0.bias", joined)]
        yield from [("upsample.2.weight", dim), ("upsample.2.bias", dim)]
    parts = ("block1", "block2") if c.stages[i] == "transformer" else ("block2",)
    for j in range(c.depths[i]):
        yield from (
            (f"blocks.{j}.{part}.norm.{leaf}", dim)
            for part in parts
            for leaf in NORM_VECTORS[c.norm]
        )
    yield from [("output_layer.0.weight", dim), ("output_layer.0.bias", dim)]


def map_whole(
    theirs: str, ours: str, leaves: tuple[str, ...]
) -> dict[str, tuple[TensorSlice, ...]]:
    """Map whole tensors from one prefix to another."""
    return {f"{theirs}.{leaf}": (TensorSlice(f"{ours}.{leaf}"),) for leaf in leaves}


def map_block(
    theirs: str, ours: str, stage: str, hidden: int, norm: str
) -> dict[str, tuple[TensorSlice, ...]]:
    """Map one block; our `up` stacks w0 (the gated half) and w1."""
    result: dict[str, tuple[TensorSlice, ...]] = {}
    if stage == "transformer":
        result |= map_whole(f"{theirs}block1.query_key_value", f"{ours}attention.qkv", ("weight",))
        result |= map_whole(f"{theirs}block1.dense", f"{ours}attention.out", ("weight", "bias"))
    else:
        result |= map_whole(f"{theirs}block1.1", f"{ours}depthwise", ("weight", "bias"))
    for leaf in ("weight", "bias"):
        result[f"{theirs}block2.w0.{leaf}"] = (TensorSlice(f"{ours}mlp.up.{leaf}", 0, hidden),)
        result[f"{theirs}block2.w1.{leaf}"] = (
            TensorSlice(f"{ours}mlp.up.{leaf}", hidden, 2 * hidden),
        )
    result |= map_whole(f"{theirs}block2.w2", f"{ours}mlp.down", ("weight", "bias"))
    if norm in NORM_OWN:
        official, own = NORM_OWN[norm]
        if stage == "transformer":
            result[f"{theirs}block1.norm.{official}"] = (
                TensorSlice(f"{ours}attention.norm.{own}"),
            )
        result[f"{theirs}block2.norm.{official}"] = (TensorSlice(f"{ours}mlp.norm.{own}"),)
    return result


assert set(NORM_VECTORS) == set(NORMS)

registry.add(
    "dimr",
    CheckpointFormat(
        backbone="dimr",
        pattern=PATTERN,
        config=infer_config,
        keys=key_map,
        codec=lambda c: "sd-vae-ft-ema" if c.time == "scaled_linear" else "pixels",
        licence="research purposes only, as its authors' README says; their code is Apache-2.0",
        where="huggingface.co/QHL067/DiMR: DiMR-XL_2R_800epochs.pth and DiMR-G_2R_800epochs.pth, "
        "ImageNet 256x256",
    ),
)
