"""Models: built from presets, saved as config.json and model.safetensors, loaded from both.

The presets themselves are at the end of each file of `backbones`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mezzotint.backbones as backbones
from mezzotint.core.boxed import boxed_folder, boxed_models, refuse_boxed
from mezzotint.core.distributed import default_device
from mezzotint.core.fields import parse, parse_options, shorten
from mezzotint.core.file_hashes import HASHES, add_hashes, check_hashes
from mezzotint.core.files import (
    atomic_write,
    check_new_or_empty,
    format_bytes,
    fsync_path,
    partial_folder,
    read_json,
    sha256_of_file,
)
from mezzotint.core.hub import download_model
from mezzotint.core.json_values import check_fields, first_line
from mezzotint.core.machine import use_full_float32
from mezzotint.core.registry import Spec, build, check_options, suggest
from mezzotint.core.tensor_files import (
    TensorSpec,
    at_most_parameters,
    list_names,
    open_safetensors,
    save_tensors,
)
from mezzotint.core.text import escape_markdown, escape_name, hide_folders
from mezzotint.process import schedules
from mezzotint.process.denoiser import Model, Schedule

FORMAT = 1  # of config.json; raised when an older reader would misread a newer file
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"  # a model's folder
TUNED = "tuned"  # of a run: the folder of `mezzotint tune`, beside model/
MOST_LEVELS = 64  # values of a list in a backbone's config; their number is that of the halvings


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model is, as written to config.json.

    backbone: registered name.
    config: the backbone's config dataclass.
    schedule: the noise schedule of its training.
    codec: the space it works in, "pixels" or the name of an autoencoder.
    preset: the preset it was made from, if any.
    labels: the names of its classes, if known.
    licence: of the weights; None for your own.
    images: number of training images seen.
    extra: JSON values of others: `text` says which text encoder it was trained with, `sampling` how
        to sample it (`mezzotint.sampling.tuned`), `ema_width` which average the weights are, and
        `raw_weights` that they are none.
    """

    backbone: str
    config: Any
    schedule: Spec
    codec: str = "pixels"
    preset: str | None = None
    labels: tuple[str, ...] | None = None
    licence: str | None = None
    images: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, with the number of the format."""
        return {"mezzotint": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ModelInfo:
        """Return the info of `to_json`'s values.

        Errors: ValueError for an unknown or missing key, a value of the wrong type or out of range,
            and for a schedule that cannot be built.
        """
        values = {k: v for k, v in values.items() if k != HASHES}
        if values.pop("mezzotint", None) != FORMAT:
            raise ValueError(f"not of mezzotint's format {FORMAT}; did another library write it?")
        info = parse(ModelInfo, values, "")
        entry = backbones.registry[info.backbone]
        if not 0 <= info.images < 2**63:
            raise ValueError(f"images is {info.images}; it must be at least 0")
        if "text" in info.extra:
            check_fields(info.extra, {"text": dict})
            text = {"encoder": str, "encoder_hash": str, "max_tokens": int}
            check_fields(info.extra["text"], text)
            check_fields({"dtype": "float16", **info.extra["text"]}, {"dtype": str})
        given = info.config.items() if isinstance(info.config, dict) else ()
        # Before the config is read, whose errors show its lists.
        if long := [k for k, v in given if isinstance(v, list) and len(v) > MOST_LEVELS]:
            raise ValueError(f"model.{shorten(long[0])} has more than {MOST_LEVELS} values")
        info = dataclasses.replace(info, config=parse(entry.config, info.config, "model"))
        try:
            middle = build(schedules.registry, info.schedule)(torch.tensor(0.5))
        except Exception as error:  # any type, for options of any type
            raise ValueError(f"schedule {shorten(info.schedule)}: {first_line(error)}") from None
        if not middle.isfinite():
            raise ValueError(f"schedule {shorten(info.schedule)} is not finite in its middle")
        return info


def presets() -> list[str]:
    """Return the names of all presets."""
    return list(backbones.presets())


def preset_info(name: str, **overrides: Any) -> ModelInfo:
    """Return the info of a preset, with fields of its config changed, e.g. num_classes=10."""
    known = backbones.presets()
    refuse_boxed(name)
    if name not in known:
        raise ValueError(f"unknown preset {name!r}; {suggest(name, [*known, *boxed_models()])}")
    backbone, preset = known[name]
    entry = backbones.registry[backbone]
    fields = check_options(f"preset {name}", entry.config, overrides)
    config = preset.change(parse_options("model.", entry.config, fields))
    return ModelInfo(
        backbone=backbone,
        config=config,
        schedule=entry.schedule(config),
        codec=preset.codec,
        preset=name,
    )


def build_model(info: ModelInfo) -> Model:
    """Return a model with random weights, on torch's default device."""
    entry = backbones.registry[info.backbone]
    return Model(entry.module(info.config), entry.parameterisation(info.config), info)


def meta_model(info: ModelInfo) -> Model:
    """Return a model on the meta device, without storage, in eval mode."""
    with torch.device("meta"):
        return build_model(info).eval().requires_grad_(False)


def create_model(preset: str, **overrides: Any) -> Model:
    """Return a preset with random weights.

    Args:
        preset: a name of `presets()`.
        overrides: fields of the backbone's config, e.g. num_classes=10, size=64.

    Errors: ValueError for an unknown preset or field, listing similar names, for values of a wrong
        type, and for values that do not fit together.
    """
    return build_model(preset_info(preset, **overrides))


def get_schedule(model: Model) -> Schedule:
    """Return the noise schedule that a model was trained on."""
    return build(schedules.registry, model.info.schedule)


def tensor_specs(
    backbone: str, config: Any, held: Mapping[str, TensorSpec] | None = None
) -> dict[str, TensorSpec]:
    """Return dtype and shape of a backbone's state dict, by key, without allocating it.

    Args:
        held: tensors of a file; the config is a stranger's then. Building ends as soon as the
            network has more parameters than the file.

    Errors: with `held`, ValueError for every config that gives no network.
    """
    if held is not None:
        try:
            backbones.registry[backbone].parameterisation(config)
            with at_most_parameters(len(held)):
                return tensor_specs(backbone, config)
        except Exception as error:  # what a constructor raises for numbers that do not fit
            raise ValueError(f"no {backbone} has this config: {first_line(error)}") from None
    with torch.device("meta"):
        module = backbones.registry[backbone].module(config)
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()}


def model_from_state_dict(info: ModelInfo, state: Mapping[str, Tensor]) -> Model:
    """Return a model with these weights, on the CPU, without copying them.

    Args:
        state: with the keys and shapes of `tensor_specs`. Weights in float16 or bfloat16 become
            float32.
    """
    entry = backbones.registry[info.backbone]
    with torch.device("meta"):
        module = entry.module(info.config)
    state = {
        k: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for k, t in state.items()
    }
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    unset = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if unset:
        # Buffers outside the state dict depend on the config alone: take them from a new network.
        buffers = dict(entry.module(info.config).named_buffers())
        for name in unset:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffers[name]
    return Model(module, entry.parameterisation(info.config), info)


def save_model(model: Model, folder: str | Path) -> None:
    """Write a model to a folder: config.json, model.safetensors and README.md.

    All files are first written and flushed next to the folder. A new folder then appears by one
    rename. In an existing model's folder each file is replaced by one, config.json last, and other
    files stay. config.json holds the SHA-256 of its own values and of the weights.

    Errors: ValueError as `check_model_folder`.
    """
    folder = Path(folder)
    check_model_folder(folder)
    with partial_folder(folder) as partial:
        state = {
            name: t.detach().cpu().contiguous() for name, t in model.backbone.state_dict().items()
        }
        save_tensors(state, partial / WEIGHTS, {"format": "pt"})
        hashes = [sha256_of_file(partial / WEIGHTS)]
        (partial / CONFIG).write_text(_config_text(model.info, hashes))
        (partial / README).write_text(readme(model), encoding="utf-8")
        for name in (WEIGHTS, CONFIG, README):
            fsync_path(partial / name)
        if not folder.exists():
            partial.rename(folder.resolve())  # of a link that leads nowhere yet
            return
        _accept_either(folder, hashes)
        for name in (WEIGHTS, README, CONFIG):  # the last says that the others are of its images
            (partial / name).replace(folder / name)


def saved_images(folder: Path) -> int:
    """Return the training images seen by a saved model; -1 where the folder holds none whole."""
    try:
        images = read_json(folder / CONFIG)["images"]
        whole = all((folder / name).is_file() for name in (WEIGHTS, README))
        return int(images) if whole else -1
    except (ValueError, KeyError, TypeError):
        return -1


def _accept_either(folder: Path, new: list[str]) -> None:
    """Let the config.json of a folder that is replaced accept its old weights and the new ones.

    A save that is killed between two files then leaves a folder that loads.
    """
    try:
        values = {k: v for k, v in read_json(folder / CONFIG).items() if k != HASHES}
        accepted = [sha256_of_file(folder / WEIGHTS), *new]
    except ValueError:  # no intact model is replaced
        return
    text = json.dumps(add_hashes(values, {WEIGHTS: accepted}), indent=2)
    atomic_write(folder / CONFIG, text + "\n")


def check_model_folder(folder: Path) -> None:
    """Raise ValueError unless a model may be saved in `folder`: new, empty, or a model's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is saved as a folder")
    if (folder / CONFIG).exists():
        if "mezzotint" not in read_json(folder / CONFIG):
            raise ValueError(f"{folder / CONFIG} belongs to another library; choose another folder")
        return
    page = folder / README
    # Ours may lack its config.json.
    if not (page.is_file() and b"library_name: mezzotint" in page.read_bytes()[:1000]):
        check_new_or_empty(folder, "model's")


HEADER = """\
library_name: mezzotint
pipeline_tag: unconditional-image-generation
tags: [mezzotint, diffusion]
"""
LIMITS = (
    "It generates what its training images show, with their gaps and biases, and may repeat single "
    "training images (`mezzotint evaluate --train-images ... --heldout-images ...` looks for "
    "copies).",
    "It was trained at one resolution; other sizes are extrapolation.",
    "Numbers compare only with numbers of the same protocol (`mezzotint compare`).",
)


def readme(
    model: Model,
    *,
    name: str | None = None,
    source: str = "this folder or its name on the hub",
    licence: str | None = None,
    header: str = HEADER,
    introduction: Sequence[str] = (),
    sections: Sequence[str] = (),
) -> str:
    """Return the text of README.md: Markdown below the hub's YAML header.

    Args:
        name: the title; the preset's or backbone's name by default. source: what a reader loads.
        licence: of the weights; None takes the model's own.
        header: the YAML. introduction, sections: lines before and after the facts of the model.
    """
    info = model.info
    kind = escape_markdown(info.preset or info.backbone)
    codec = escape_markdown(hide_folders(info.codec))
    height, width = backbones.native_size(info.config)
    stated = licence or info.licence or "not stated; ask the authors"
    count = sum(p.numel() for p in model.backbone.parameters())
    classes = f", {info.config.num_classes} classes" if info.config.num_classes else ""
    steps = "" if "sampling" in info.extra else ", steps=50"
    what, unit = ("images", "  # in [-1, 1]") if info.codec == "pixels" else ("latents", "")
    lines = [
        f"---\n{header.rstrip()}\n---",
        "",
        f"# {kind if name is None else escape_markdown(name)}",
        "",
        *introduction,
        f"{kind} of mezzotint: {count:,} parameters, "
        f"{height}x{width}x{info.config.channels} in {codec}{classes}; "
        f"{info.images:,} training images seen.",
        "",
        "```python",
        "import mezzotint as mz",
        "",
        f"model = mz.load_model({json.dumps(escape_name(source), ensure_ascii=False)})",
        f"{what} = mz.sample(model, seeds=range(4){steps}){unit}",
        "```",
        "",
        *sections,
        "## Licence and limits",
        "",
        f"Licence of the weights: {escape_markdown(stated)}.",
        "",
        *[f"- {limit}" for limit in LIMITS],
        "",
        "## The network",
        "",
        *[
            f"- {field}: {escape_markdown(hide_folders(value))}"
            for field, value in dataclasses.asdict(info.config).items()
        ],
        f"- schedule: {escape_markdown(info.schedule)}",
        *([f"- labels: {', '.join(map(escape_markdown, info.labels))}"] if info.labels else []),
    ]
    return "\n".join(lines) + "\n"


def load_model(folder_or_repo: str | Path) -> Model:
    """Load a model of `save_model`, on the CPU.

    No code is loaded. Names, shapes, dtypes and sizes are compared with what config.json implies
    before anything is allocated, then both files with their SHA-256. Weights in float16 or
    bfloat16 become float32.

    Args:
        folder_or_repo: its folder, a model of the box, a repository of the Hugging Face hub, or an
            address such as s3://bucket/runs/xl, of the model or of its run.

    Errors: ValueError for a folder without a model, a config.json of another format or that
        describes no network, weights that do not belong to it or are shorter than their header
        says, and files that are not those that were saved.
    """
    folder = Path(folder_or_repo)
    if not folder.is_dir():
        folder = boxed_folder(folder_or_repo) or download_model(
            str(folder_or_repo), (CONFIG, WEIGHTS, README)
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file() and (folder / "model" / name).is_file():
            raise ValueError(f"{folder} is a run; give its model's folder, {folder / 'model'}")
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; a model's folder holds {CONFIG}, {WEIGHTS} and {README}"
            )
    values = read_json(folder / CONFIG, "save or download the model again")
    weights = open_safetensors(folder / WEIGHTS)
    try:
        info = ModelInfo.from_json(values)
        expected = tensor_specs(info.backbone, info.config, weights.claims)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    _check_specs(folder / WEIGHTS, weights.claims, expected)
    check_hashes(folder / CONFIG, values)
    return model_from_state_dict(info, {name: weights.read(name) for name in expected})


def _config_text(info: ModelInfo, weights: list[str]) -> str:  # SHA-256 that it accepts
    return json.dumps(add_hashes(info.to_json(), {WEIGHTS: weights}), indent=2) + "\n"


def _check_specs(
    path: Path, specs: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]
) -> None:
    """Raise ValueError unless a file's tensors have the keys, shapes and kinds of the config's."""
    if set(specs) != set(expected):
        unused, missing = set(specs) - set(expected), set(expected) - set(specs)
        raise ValueError(
            f"{path} does not fit its config.json: unused keys {list_names(unused)}; "
            f"missing {list_names(missing)}"
        )
    wrong = [
        f"{k} {specs[k].dtype} {specs[k].shape} instead of {spec.dtype} {spec.shape}"
        for k, spec in expected.items()
        if specs[k].shape != spec.shape
        or specs[k].dtype.is_floating_point != spec.dtype.is_floating_point
    ]
    if wrong:
        total = format_bytes(sum(spec.bytes for spec in expected.values()))
        raise ValueError(
            f"{path} does not fit its config.json, which needs {total}; wrong: {list_names(wrong)}"
        )


def save_info(info: ModelInfo, folder: Path) -> None:
    """Replace the config.json of a saved model; its weights and README.md stay as they are."""
    atomic_write(folder / CONFIG, _config_text(info, [sha256_of_file(folder / WEIGHTS)]))


def find_tuned(run: Path) -> Path | None:
    """Return the folder that `mezzotint tune` wrote for a run's present weights, or None."""
    try:
        present = list(read_json(run / "model" / CONFIG)[HASHES]["files"][WEIGHTS])
        source = read_json(run / TUNED / CONFIG)["extra"]["sampling"]["source"]
        return run / TUNED if source in present else None
    except (ValueError, LookupError, TypeError):
        return None


def open_model(source: str | Path, tuned: bool = False) -> Model:
    """Load a model in eval mode on the default device, of a run its averaged weights.

    Args:
        source: run folder, model folder, model in the box, hub repository or address.
        tuned: of a run that was tuned, take the tuned average and its sampling settings.
    """
    folder = Path(source)
    if not (folder / "model").exists() and any(
        (folder / name).exists() for name in ("recipe.yaml", ".lock")
    ):
        raise ValueError(
            f"{folder} is a run without a saved model yet; continue it with the same train command"
        )
    use_full_float32()
    saved = folder / "model" if (folder / "model").exists() else str(source)
    model = load_model((find_tuned(folder) if tuned else None) or saved)
    return model.eval().requires_grad_(False).to(default_device())
