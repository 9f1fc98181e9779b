"""Convert official files to models and back, by the key maps of this folder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mezzotint.backbones as backbones
import mezzotint.models as models
from mezzotint.convert.official import CheckpointFormat, registry
from mezzotint.core.console import echo
from mezzotint.core.files import check_replaceable
from mezzotint.core.json_values import check_fields, parse_json
from mezzotint.core.registry import check_options, suggest
from mezzotint.core.tensor_files import (
    TensorSource,
    TensorSpec,
    list_names,
    open_safetensors,
    open_torch_file,
    save_tensors,
    state_dict_specs,
)
from mezzotint.process.denoiser import Model

HALVES = (torch.float16, torch.bfloat16)
# Hints of every family; each has more of its own, see `CheckpointFormat.config`.
COMMON = {"entry": None, "widen": False}
OWN = "mezzotint"  # metadata of an official file written by us: config.json's values


class Shapes(dict[str, tuple[int, ...]]):
    """Official key -> shape; a missing key is a ValueError that also lists the `unknown` keys."""

    unknown: tuple[str, ...] = ()

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"unused keys {list_names([*self.unknown])}; missing [{key}]")


def load_official(
    source: str | Path | Mapping[str, Any], family: str | None = None, **hints: Any
) -> Model:
    """Load a model from an official checkpoint.

    Sizes are inferred from shapes, and everything is checked before weights are read.

    Args:
        source: a .safetensors or .pth/.pt/.ckpt/.bin file, or a state dict.
        family: registered official family, e.g. "dimr"; None recognises it by its keys.
        hints: what shapes do not show, e.g. heads=16 for DiMR (see docs/checkpoints.md). For all
            families: entry="ema" chooses a state dict inside a training checkpoint, and widen=True
            accepts float16 and bfloat16 weights and converts them to float32, which is lossless.

    Errors: ValueError for another family's keys (says which), unused and missing keys (lists both),
    wrong shapes, half precision without `widen`, and files that are truncated, state wrong sizes or
    contain code.
    """
    common = {name: hints.pop(name, default) for name, default in COMMON.items()}
    opened = open_source(source, common["entry"])
    family = identify_family(opened, family)
    official = registry[family]
    shapes = Shapes({name: claim.shape for name, claim in opened.claims.items()})
    shapes.unknown = tuple(name for name in shapes if not re.fullmatch(official.pattern, name))
    try:
        infer = partial(official.config, shapes)
        hints = check_options(f"family {family}", infer, hints)
        kept = read_own_info(opened, official.backbone, hints)
        config = infer(**hints) if kept is None else kept.config
        own = models.tensor_specs(official.backbone, config)
        dtype = check_tensors(opened, official, config, own, common["widen"])
    except ValueError as error:
        raise ValueError(f"{opened.what} as a {family} checkpoint: {error}") from None
    extra = {"official": {"family": family, "dtype": str(dtype).removeprefix("torch.")}}
    if kept is not None:
        info = dataclasses.replace(kept, extra={**kept.extra, **extra})
        return models.model_from_state_dict(info, to_ours(opened, official, config, own))
    entry = backbones.registry[official.backbone]
    same = [n for n, p in entry.presets.items() if p.config == config]
    info = models.ModelInfo(
        backbone=official.backbone,
        config=config,
        schedule=entry.schedule(config),
        codec=official.codec(config),
        preset=same[0] if same else None,
        licence=official.licence,
        extra=extra,
    )
    echo(f"{family} weights of {opened.what}: {official.licence}", stderr=True)
    return models.model_from_state_dict(info, to_ours(opened, official, config, own))


def read_own_info(
    source: TensorSource, backbone: str, hints: Mapping[str, Any]
) -> models.ModelInfo | None:
    """Return what mezzotint wrote beside the tensors, None for a file of others.

    Errors: ValueError for another backbone, and for hints that the file contradicts.
    """
    if OWN not in source.metadata:
        return None
    values = parse_json(source.metadata[OWN])
    check_fields({OWN: values}, {OWN: dict})
    info = models.ModelInfo.from_json(values)
    if info.backbone != backbone:
        raise ValueError(f"its metadata are of a {info.backbone}, its tensors of a {backbone}")
    for name, value in hints.items():
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(info.config, name):
            raise ValueError(
                f"{name}={value!r} contradicts the file, which was written with "
                f"{name}={getattr(info.config, name)!r}; leave the hint out"
            )
    return info


def open_source(source: str | Path | Mapping[str, Any], entry: str | None) -> TensorSource:
    """Open the state dict of `source`, without reading its tensors."""
    if isinstance(source, Mapping):
        state = choose_state_dict("the state dict", source, entry)
        return TensorSource(
            "the state dict", state_dict_specs("the state dict", state), state.__getitem__
        )
    path = Path(source)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; official checkpoints are files, and mezzotint's own folders open "
            "with load_model"
        )
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; docs/checkpoints.md lists where to get each official file"
        )
    if path.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
        return open_torch_file(path, lambda contents: choose_state_dict(str(path), contents, entry))
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is neither .safetensors nor .pth, .pt, .ckpt, .bin")
    everything = open_safetensors(path)
    inside = find_flat_entries(everything.claims)
    if entry is None and not inside:
        return everything
    prefix = f"{check_entry(everything.what, inside, entry)}."
    claims = {
        name.removeprefix(prefix): c
        for name, c in everything.claims.items()
        if name.startswith(prefix)
    }
    return TensorSource(everything.what, claims, lambda name: everything.read(prefix + name))


def choose_state_dict(what: str, contents: Any, entry: str | None) -> Mapping[str, Tensor]:
    """Return the state dict itself, or the `entry` of a training checkpoint that holds it."""
    if not isinstance(contents, Mapping):
        raise ValueError(f"{what} holds a {type(contents).__name__}, not a state dict")
    nested = [str(k) for k, v in contents.items() if is_state_dict(v)]
    if nested:
        return contents[check_entry(what, nested, entry)]
    if not is_state_dict(contents):
        wrong = [str(k) for k, v in contents.items() if not isinstance(v, Tensor)]
        raise ValueError(f"{what} is no state dict: {list_names(wrong)} are no tensors")
    inside = find_flat_entries(contents)
    if entry is None and not inside:
        return contents
    prefix = f"{check_entry(what, inside, entry)}."
    return {name.removeprefix(prefix): t for name, t in contents.items() if name.startswith(prefix)}


def is_state_dict(value: Any) -> bool:
    """Return whether `value` maps names to tensors and nothing else."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def find_flat_entries(names: Mapping[str, Any]) -> list[str]:
    """Return the prefixes, e.g. "ema", under which a flat dict holds a known state dict.

    Empty where it is a known state dict itself.
    """
    if any(count_known_keys(names).values()):
        return []
    prefixes = {name.split(".", 1)[0] for name in names}
    return sorted(
        p
        for p in prefixes
        if any(count_known_keys([n.removeprefix(f"{p}.") for n in names]).values())
    )


def check_entry(what: str, entries: list[str], entry: str | None) -> str:
    """Return `entry`; ValueError that lists the entries where it is none of them."""
    offer = " or ".join(f"entry={name!r}" for name in entries) or "none: it is a plain state dict"
    if entry is None:
        raise ValueError(
            f"{what} is a training checkpoint with several state dicts; choose one: {offer}"
        )
    if entry not in entries:
        raise ValueError(f"{what} has no entry {entry!r}; it offers {offer}")
    return entry


def count_known_keys(names: Any) -> dict[str, int]:
    """Return how many of the keys each family knows."""
    return {
        f: sum(re.fullmatch(registry[f].pattern, name) is not None for name in names)
        for f in registry
    }


def identify_family(source: TensorSource, family: str | None) -> str:
    """Return the family of these keys; ValueError if none, or another than `family`."""
    known = count_known_keys(source.claims)
    likely = max(known, key=known.__getitem__)
    if family is not None and family not in known:
        raise ValueError(f"unknown official family {family!r}; {suggest(family, known)}")
    if not known[likely]:
        first = list_names([*source.claims], 4)
        raise ValueError(
            f"{source.what} belongs to no known family ({', '.join(known)}): its keys are {first}"
        )
    if family is not None and known[family] < known[likely]:
        raise ValueError(f"{source.what} looks like {likely}, not {family}")
    return family or likely


def official_specs(
    official: CheckpointFormat, config: Any, own: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """Return the official tensors of a config: key -> dtype and shape."""
    claims = {}
    for key, parts in official.keys(config).items():
        rows = sum(row_range(part, own)[1] - row_range(part, own)[0] for part in parts)
        first = own[parts[0].name]
        claims[key] = TensorSpec(first.dtype, (rows, *first.shape[1:]))
    constants = {
        k: TensorSpec(t.dtype, tuple(t.shape)) for k, t in official.constants(config).items()
    }
    return {**claims, **constants}


def row_range(part: Any, own: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """Return the first row of a part and the one after its last."""
    return part.start, own[part.name].shape[0] if part.stop is None else part.stop


def check_tensors(
    source: TensorSource,
    official: CheckpointFormat,
    config: Any,
    own: Mapping[str, TensorSpec],
    widen: bool,
) -> torch.dtype:
    """Check that keys, shapes and dtypes are exactly the config's; return the weights' dtype."""
    expected = official_specs(official, config, own)
    unused, missing = set(source.claims) - set(expected), set(expected) - set(source.claims)
    if unused or missing:
        raise ValueError(f"unused keys {list_names(unused)}; missing {list_names(missing)}")
    wrong = {k for k, claim in expected.items() if source.claims[k].shape != claim.shape}
    if wrong:
        raise ValueError(
            "wrong shapes: "
            + list_names(
                [f"{k} {source.claims[k].shape} instead of {expected[k].shape}" for k in wrong]
            )
        )
    kinds = {
        source.claims[k].dtype for k, claim in expected.items() if claim.dtype.is_floating_point
    }
    wrong_tables = {
        k
        for k, c in expected.items()
        if not c.dtype.is_floating_point and source.claims[k].dtype != c.dtype
    }
    if wrong_tables or len(kinds) != 1 or not all(k.is_floating_point for k in kinds):
        raise ValueError(
            f"mixed or wrong dtypes: {sorted(map(str, kinds))}, {list_names(wrong_tables)}"
        )
    (dtype,) = kinds
    if dtype in HALVES and not widen:
        raise ValueError(
            f"the weights are {dtype}; published ones are float32. widen=True loads them as float32"
        )
    return dtype


def to_ours(
    source: TensorSource, official: CheckpointFormat, config: Any, own: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """Return our tensors, copied from the official ones; the map fills each row exactly once."""
    for key, constant in official.constants(config).items():
        if not torch.equal(source.read(key), constant):
            raise ValueError(f"{source.what}: {key} is not the table that its config requires")
    pieces: dict[str, list[tuple[int, int, str, int]]] = {name: [] for name in own}
    for key, parts in official.keys(config).items():
        offset = 0
        for part in parts:
            start, stop = row_range(part, own)
            pieces[part.name].append((start, stop, key, offset))
            offset += stop - start
    state = {}
    for name, found in pieces.items():
        found.sort()
        ends = [0, *(stop for _, stop, _, _ in found)]
        assert [*(start for start, _, _, _ in found), own[name].shape[0]] == ends, (
            f"the map does not tile {name}"
        )
        state[name] = torch.cat(
            [source.read(key)[at : at + stop - start] for start, stop, key, at in found]
        )
    return state


def to_official(model: Model, family: str | None = None) -> dict[str, Tensor]:
    """Return the official state dict of a model, bit for bit that of the file it was loaded from.

    The dtype is that of the file, float32 for any other model.

    Errors: ValueError where no official release has such a backbone.
    """
    families = [f for f in registry if registry[f].backbone == model.info.backbone]
    if not families or (family is not None and family not in families):
        raise ValueError(
            f"there is no official {family or 'checkpoint'} of backbone {model.info.backbone}; "
            f"known: {', '.join(registry)}"
        )
    official = registry[family or families[0]]
    config, state = model.info.config, model.backbone.state_dict()
    own = models.tensor_specs(model.info.backbone, config)
    origin = model.info.extra.get("official")
    name = origin.get("dtype") if isinstance(origin, dict) else None
    dtype = {str(d).removeprefix("torch."): d for d in (*HALVES, torch.float64)}.get(
        str(name), torch.float32
    )
    result = {}
    for key, parts in official.keys(config).items():
        rows = torch.cat([state[p.name].cpu()[slice(*row_range(p, own))] for p in parts])
        result[key] = rows.to(dtype) if rows.is_floating_point() else rows
    return {**result, **official.constants(config)}


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "mezzotint",
    check: bool = False,
    family: str | None = None,
    hints: Mapping[str, Any] | None = None,
) -> list[str]:
    """Convert an official file to a model folder, or a model to an official file.

    Args:
        source, out: an official file (.safetensors or .pth) and a model folder, or the reverse;
            a source may also be the name of a hub repository.
        to: "mezzotint" or "official".
        check: read back what was written, convert it back and compare every tensor bit for bit.
        family, hints: as for `load_official`.

    Returns:
        lines that say what was done.

    Errors: those of `load_official`, and ValueError where the check fails.
    """
    if to == "mezzotint":
        models.check_model_folder(Path(out))
        model = load_official(source, family, **dict(hints or {}))
        models.save_model(model, out)
    elif to == "official":
        if hints:
            raise ValueError(
                f"hints {dict(hints)} are for reading official files; a mezzotint model needs none"
            )
        check_replaceable(Path(out), lambda _: False, "an empty file")
        model = models.load_model(source)
        write_official(to_official(model, family), Path(out), model.info)
    else:
        raise ValueError(f"to={to!r} must be mezzotint or official")
    config = {k: v for k, v in dataclasses.asdict(model.info.config).items() if k != "prediction"}
    lines = [
        f"{source} -> {out}",
        f"{model.info.backbone} {config}",
        f"licence of the weights: {model.info.licence or 'none stated'}",
    ]
    if check:
        again = models.load_model(out) if to == "mezzotint" else None
        written = to_official(again) if again is not None else read_tensors(open_source(out, None))
        original = (
            read_tensors(open_source(source, (hints or {}).get("entry")))
            if again is not None
            else to_official(model, family)
        )
        differing = {k for k in original if not bitwise_equal(original[k], written.get(k))} | (
            set(written) - set(original)
        )
        if differing:
            raise ValueError(f"{out} differs from {source} in {list_names(differing)}")
        lines.append(f"checked: {len(original)} tensors equal bit for bit")
    return lines


def read_tensors(source: TensorSource) -> dict[str, Tensor]:
    """Return every tensor of a source."""
    return {name: source.read(name) for name in source.claims}


def bitwise_equal(a: Tensor, b: Tensor | None) -> bool:
    """Return whether shape, dtype and bits are equal (a NaN equals itself, -0 differs from 0)."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def write_official(state: dict[str, Tensor], out: Path, info: models.ModelInfo) -> None:
    """Write a state dict as .safetensors or .pth, atomically.

    The info goes into the metadata, where loading finds what shapes do not show (heads, labels,
    licence): of a .pth into the attribute `_metadata` that torch's own state dicts have.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{out}: an official file ends in .safetensors or .pth")
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {OWN: json.dumps(info.to_json())}
    save_tensors({name: t.contiguous() for name, t in state.items()}, out, metadata)
