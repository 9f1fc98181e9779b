"""Adapt a trained model to other classes, another resolution or other channels.

One field of the config changes at a time. An axis of a tensor that then has another length is what
that field describes: rows of a label table, channels (fastest, where a cell has several: patches,
wavelet bands, variance beside prediction), or a square grid of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mezzotint.backbones as backbones
import mezzotint.models as models
from mezzotint.backbones.diffit import sincos_positions
from mezzotint.process.denoiser import Model
from mezzotint.sampling.tuned import KEY

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What happened to one tensor; `how` is kept, interpolated, extended, cut, new or dropped."""

    name: str
    how: str
    old: Shape | None
    new: Shape | None
    note: str = ""

    def __str__(self) -> str:
        shapes = f"{self.old}" if self.old == self.new else f"{self.old} -> {self.new}"
        return f"{self.how:12} {self.name} {shapes}" + (f": {self.note}" if self.note else "")


def adapt(
    model: Model,
    *,
    num_classes: int | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> tuple[Model, list[Change]]:
    """Return a copy of `model` with another number of classes, native size or channels.

    Kept labels and the null label give the same output bit for bit. So do the old channels of an
    image with more channels: the new input channels start with zero weight. A label table that the
    source did not have starts at zero. Positions and relative-position tables are interpolated
    bilinearly (the papers train each resolution from scratch).

    Args:
        model: the source, not modified.
        num_classes: class labels without the null label; the first ones are kept.
        size: pixels or latent cells. channels: of the input; the first ones are kept.

    Returns:
        the model, on the CPU, and one `Change` per tensor.

    Errors: ValueError where the config does not allow the size.
    """
    info = model.info
    wanted = {"num_classes": num_classes, "channels": channels, "size": size}
    state = {name: t.detach().cpu().clone() for name, t in model.backbone.state_dict().items()}
    changes = {
        name: Change(name, "kept", tuple(t.shape), tuple(t.shape)) for name, t in state.items()
    }
    for field, value in wanted.items():
        old = getattr(info.config, field)
        if value is None or value == old:
            continue
        config = replace(info.config, **{field: value})
        state, carried = _carry_over(state, info.backbone, config, field, (old, value))
        changes |= {c.name: _merge_changes(changes.get(c.name), c) for c in carried}
        labels = None if field == "num_classes" else info.labels
        extra = {k: v for k, v in info.extra.items() if k != KEY}  # tuned for the old network
        info = replace(info, config=config, labels=labels, preset=None, images=0, extra=extra)
    return models.model_from_state_dict(info, state), list(changes.values())


def initialise_from(source: str, say: Callable[[str], None] = print) -> Callable[[Model], None]:
    """Return a function that loads the weights of `source` into a new model.

    `source` is a model folder, a run folder or a hub repository. Classes, size and channels are
    adapted as in `adapt`. Where another field of the config differs (a smaller patch, as SiD2 goes
    from 128 to 512 pixels), tensors of the same name and shape are kept and the others keep their
    random weights. `say` receives a line for every tensor that is not simply kept.

    Errors: ValueError for another backbone, and where no tensor fits.
    """

    def initialise(model: Model) -> None:
        folder = Path(source) / "model"
        old = models.load_model(folder if folder.is_dir() else source)
        wanted = model.info.config
        if old.info.backbone != model.info.backbone:
            raise ValueError(
                f"{source} is a {old.info.backbone}; a {model.info.backbone} cannot start from it"
            )
        adapted, changes = adapt(
            old, num_classes=wanted.num_classes, size=wanted.size, channels=wanted.channels
        )
        change_of = {c.name: c for c in changes}
        fresh = model.backbone.state_dict()
        plain, carried = old.backbone.state_dict(), adapted.backbone.state_dict()
        # The source's tensor where it fits (a finer patch keeps the grid, and so the positions),
        # else the adapted one, else random weights.
        state, reported = {}, []
        for name, tensor in fresh.items():
            if name in plain and plain[name].shape == tensor.shape:
                state[name] = plain[name]
            elif name in carried and carried[name].shape == tensor.shape:
                state[name] = carried[name]
                reported.append(change_of[name])
            else:
                reported.append(Change(name, "new", None, tuple(tensor.shape)))
        reported += [
            Change(k, "dropped", tuple(t.shape), None) for k, t in plain.items() if k not in fresh
        ]
        if not state:
            raise ValueError(f"no tensor of {source} fits this model; compare the two config.json")
        model.backbone.load_state_dict(state, strict=False)
        say(
            f"started from {source}: {len(state)} of {len(fresh)} tensors copied, "
            f"{len(reported)} changes"
        )
        for change in reported:
            say(f"  {change}")

    return initialise


def _merge_changes(before: Change | None, after: Change) -> Change:
    """Return two changes of one tensor as one."""
    if before is None or before.how == "kept":
        return after
    return replace(
        after, old=before.old, how=f"{before.how}, {after.how}", note=f"{before.note}; {after.note}"
    )


def _carry_over(
    state: Mapping[str, Tensor], backbone: str, config: Any, field: str, values: tuple[int, int]
) -> tuple[dict[str, Tensor], list[Change]]:
    """Return the state for `config`, and what changed.

    In `config`, `field` changed from values[0] to values[1].
    """
    specs = models.tensor_specs(backbone, config)
    differing = [n for n, c in specs.items() if n not in state or tuple(state[n].shape) != c.shape]
    fresh = backbones.registry[backbone].module(config).state_dict() if differing else {}
    result, changes = {n: t for n, t in state.items() if n in specs}, []
    for name in differing:
        new = fresh[name].clone()
        how, note = "new", ""
        if name in state and backbone == "diffit" and name == "positions":
            how, note = (
                "interpolated",
                "sines and cosines at the coordinates in between",
            )
            side, width = isqrt(new.shape[1]), new.shape[2]
            new.copy_(sincos_positions(side, side, isqrt(state[name].shape[1]), width))
        elif name in state:
            how, note = _CARRY[field](name, state[name], new, *values)
        elif field == "num_classes" and values[0] == 0:
            new.zero_()
            note = "starts at zero: every label gives the source's output"
        result[name] = new
        changes.append(
            Change(
                name,
                how,
                tuple(state[name].shape) if name in state else None,
                tuple(new.shape),
                note,
            )
        )
    changes += [
        Change(n, "dropped", tuple(t.shape), None) for n, t in state.items() if n not in specs
    ]
    return result, changes


def _find_changed_axes(old: Tensor, new: Tensor) -> list[int]:
    """Return the axes of different lengths; none if the tensors have different numbers of axes."""
    return (
        [i for i in range(old.ndim) if old.shape[i] != new.shape[i]] if old.ndim == new.ndim else []
    )


def _carry_classes(name: str, old: Tensor, new: Tensor, before: int, after: int) -> tuple[str, str]:
    """Copy the labels that remain from `old` to `new`; the null label, if any, stays last."""
    axes, kept = _find_changed_axes(old, new), min(before, after)
    if len(axes) != 1 or old.shape[axes[0]] - before != new.shape[axes[0]] - after:
        return "new", ""
    (axis,) = axes
    null = old.shape[axis] - before  # rows beyond the labels: 1 or 0
    new.narrow(axis, 0, kept).copy_(old.narrow(axis, 0, kept))
    new.narrow(axis, after, null).copy_(old.narrow(axis, before, null))
    note = f"the first {kept} labels{' and the null label' if null else ''} kept"
    return ("extended" if after > before else "cut"), note


def _carry_channels(
    name: str, old: Tensor, new: Tensor, before: int, after: int
) -> tuple[str, str]:
    """Copy the channels of `old` to `new`.

    New channels start at zero in an input (axis 1), at random in an output.
    """
    axes, kept = _find_changed_axes(old, new), min(before, after)
    if (
        len(axes) != 1
        or old.shape[axes[0]] % before
        or old.shape[axes[0]] // before * after != new.shape[axes[0]]
    ):
        return "new", ""
    (axis,) = axes
    if axis == 1:
        new.zero_()
    cells = old.unflatten(axis, (-1, before)), new.unflatten(axis, (-1, after))
    cells[1].narrow(axis + 1, 0, kept).copy_(cells[0].narrow(axis + 1, 0, kept))
    start = "at zero" if axis == 1 else "at random"
    note = f"the first {kept} channels kept" + (
        f", new ones start {start}" if after > before else ""
    )
    return ("extended" if after > before else "cut"), note


def _carry_size(name: str, old: Tensor, new: Tensor, before: int, after: int) -> tuple[str, str]:
    """Copy `old` to `new`, interpolated over two axes, or over one that is a flattened square."""
    axes = _find_changed_axes(old, new)
    if not old.is_floating_point() or len(axes) not in (1, 2):
        return "new", "a table computed from the config"
    lengths = [(old.shape[i], new.shape[i]) for i in axes]
    if len(axes) == 1:
        sides = [isqrt(n) for n in lengths[0]]
        if [s * s for s in sides] != list(lengths[0]):
            return "new", ""
        square, target = (sides[0], sides[0]), (sides[1], sides[1])
        image = old.unflatten(axes[0], square).movedim((axes[0], axes[0] + 1), (-2, -1))
    else:
        square, target = (lengths[0][0], lengths[1][0]), (lengths[0][1], lengths[1][1])
        image = old.movedim(axes, (-2, -1))
    # A bias table holds relative displacements: its ends and its zero stay. Positions are cells:
    # the edges of the grid stay.
    displacements = name.endswith("bias_table")
    flat = image.reshape(1, -1, *square).to(torch.promote_types(old.dtype, torch.float32))
    resized = F.interpolate(flat, size=target, mode="bilinear", align_corners=displacements)[0].to(
        old.dtype
    )
    resized = resized.view(*image.shape[:-2], *target)
    if len(axes) == 1:
        new.copy_(resized.movedim((-2, -1), (axes[0], axes[0] + 1)).flatten(axes[0], axes[0] + 1))
    else:
        new.copy_(resized.movedim((-2, -1), axes))
    return "interpolated", f"{square[0]}x{square[1]} to {target[0]}x{target[1]}"


_CARRY = {"num_classes": _carry_classes, "channels": _carry_channels, "size": _carry_size}
