"""Fine-tuning surgery: a trained model as one for other classes, another resolution or other channels.

No backbone is told about this. One field of the config is changed at a time, and an axis of a tensor that then has
another length is what that field says it is: rows of a label table, channels (fastest, where there are several per
cell: patches, wavelet bands, variance beside prediction), or a square grid of positions.
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

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What became of one tensor; `how` is kept, interpolated, extended, cut, new or dropped."""

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
    """A new model that continues `model` with another number of classes, native size or channels.

    What did not change is the source's: kept labels and the null label give the same output bit for bit, and so do
    the old channels of a wider image, whose new input channels start without weight; a table of labels that the source
    did not have starts at zero. Positions and relative-position
    tables are interpolated bilinearly, a published network's own resolution change being a training from scratch.

    Args:
        model: the source, left as it is. num_classes: labels without the null label; the first ones are kept.
        size: pixels or latent cells. channels: of the input; the first ones are kept.

    Returns: the model, on the CPU, and one `Change` per tensor. Errors: ValueError where the config refuses the size.
    """
    card = model.info
    wanted = {"num_classes": num_classes, "channels": channels, "size": size}
    state = {name: t.detach().cpu().clone() for name, t in model.backbone.state_dict().items()}
    report = {
        name: Change(name, "kept", tuple(t.shape), tuple(t.shape)) for name, t in state.items()
    }
    for field, value in wanted.items():
        old = getattr(card.config, field)
        if value is None or value == old:
            continue
        config = replace(card.config, **{field: value})
        state, changed = _carry(state, card.backbone, config, field, (old, value))
        report |= {c.name: _joined(report.get(c.name), c) for c in changed}
        labels = None if field == "num_classes" else card.labels
        card = replace(card, config=config, labels=labels, preset=None, images=0)
    return models.model_from_state_dict(card, state), list(report.values())


def initialise_from(source: str, say: Callable[[str], None] = print) -> Callable[[Model], None]:
    """A function that fills a fresh model with the weights of `source`, a model or run folder or hub repository.

    Classes, size and channels are adapted as `adapt` does. Where anything else of the config differs (a smaller patch,
    as SiD2 goes from 128 to 512 pixels) tensors of the same name and shape are kept and the others start afresh. Every
    tensor that is not simply kept is told.

    Errors: ValueError for another backbone, or when nothing fits.
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
        how = {c.name: c for c in changes}
        fresh = model.backbone.state_dict()
        plain, carried = old.backbone.state_dict(), adapted.backbone.state_dict()
        # As it is where it fits (a finer patch keeps the grid, so positions stay), else adapted, else afresh.
        state, told = {}, []
        for name, tensor in fresh.items():
            if name in plain and plain[name].shape == tensor.shape:
                state[name] = plain[name]
            elif name in carried and carried[name].shape == tensor.shape:
                state[name] = carried[name]
                told.append(how[name])
            else:
                told.append(Change(name, "new", None, tuple(tensor.shape)))
        told += [
            Change(k, "dropped", tuple(t.shape), None) for k, t in plain.items() if k not in fresh
        ]
        if not state:
            raise ValueError(f"no tensor of {source} fits this model; compare the two config.json")
        model.backbone.load_state_dict(state, strict=False)
        say(
            f"started from {source}: {len(state)} of {len(fresh)} tensors taken, {len(told)} changes"
        )
        for change in told:
            say(f"  {change}")

    return initialise


def _joined(before: Change | None, after: Change) -> Change:
    """Two changes of one tensor as one."""
    if before is None or before.how == "kept":
        return after
    return replace(
        after, old=before.old, how=f"{before.how}, {after.how}", note=f"{before.note}; {after.note}"
    )


def _carry(
    state: Mapping[str, Tensor], backbone: str, config: Any, field: str, values: tuple[int, int]
) -> tuple[dict[str, Tensor], list[Change]]:
    """The state for `config`, in which one field went from values[0] to values[1], and what changed."""
    claims = models.tensor_specs(backbone, config)
    differing = [n for n, c in claims.items() if n not in state or tuple(state[n].shape) != c.shape]
    fresh = backbones.registry[backbone].module(config).state_dict() if differing else {}
    result, changes = {n: t for n, t in state.items() if n in claims}, []
    for name in differing:
        new = fresh[name].clone()
        how, note = "new", ""
        if name in state and backbone == "diffit" and name == "positions":
            how, note = (
                "interpolated",
                "sines and cosines at the coordinates between, as the source has them there",
            )
            side, width = isqrt(new.shape[1]), new.shape[2]
            new.copy_(sincos_positions(side, side, isqrt(state[name].shape[1]), width))
        elif name in state:
            how, note = _CARRY[field](name, state[name], new, *values)
        elif field == "num_classes" and values[0] == 0:
            new.zero_()
            note = "starts without weight: every label gives what the source gives"
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
        Change(n, "dropped", tuple(t.shape), None) for n, t in state.items() if n not in claims
    ]
    return result, changes


def _changed_axes(old: Tensor, new: Tensor) -> list[int]:
    """Axes of different lengths; none if the tensors do not even have as many axes."""
    return (
        [i for i in range(old.ndim) if old.shape[i] != new.shape[i]] if old.ndim == new.ndim else []
    )


def _classes(name: str, old: Tensor, new: Tensor, before: int, after: int) -> tuple[str, str]:
    """Write the rows of `old` that are still labels into `new`; the null label, if any, stays the last row."""
    axes, kept = _changed_axes(old, new), min(before, after)
    if len(axes) != 1 or old.shape[axes[0]] - before != new.shape[axes[0]] - after:
        return "new", ""
    (axis,) = axes
    null = old.shape[axis] - before  # rows beyond the labels: 1 or 0
    new.narrow(axis, 0, kept).copy_(old.narrow(axis, 0, kept))
    new.narrow(axis, after, null).copy_(old.narrow(axis, before, null))
    note = f"the first {kept} labels{' and the null label' if null else ''} kept"
    return ("extended" if after > before else "cut"), note


def _channels(name: str, old: Tensor, new: Tensor, before: int, after: int) -> tuple[str, str]:
    """Write the channels of `old` into `new`; new ones start at zero in an input (axis 1), at random in an output."""
    axes, kept = _changed_axes(old, new), min(before, after)
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
    start = "without weight" if axis == 1 else "at random"
    note = f"the first {kept} channels kept" + (
        f", new ones start {start}" if after > before else ""
    )
    return ("extended" if after > before else "cut"), note


def _size(name: str, old: Tensor, new: Tensor, before: int, after: int) -> tuple[str, str]:
    """Write `old` into `new`, interpolated over the two axes, or the one flattened square, that changed."""
    axes = _changed_axes(old, new)
    if not old.is_floating_point() or len(axes) not in (1, 2):
        return "new", "a table that follows from the config"
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
    # A bias table holds relative displacements, whose ends and zero are kept; positions are cells, whose edges are.
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


_CARRY = {"num_classes": _classes, "channels": _channels, "size": _size}
