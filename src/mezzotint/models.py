"""Presets to models, models to folders and back: config.json + model.safetensors, no code in either."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mezzotint.backbones as backbones
from mezzotint.config import parse
from mezzotint.core.distributed import default_device
from mezzotint.core.files import format_bytes, fsync_path, partial_folder, read_json
from mezzotint.core.registry import Spec, build, check_options, suggest
from mezzotint.core.tensor_files import TensorSpec, list_names, read_safetensors_header
from mezzotint.process import schedules
from mezzotint.process.denoiser import Model, Schedule

FORMAT = 1  # of config.json; raised when an older reader would misread a newer file
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"  # a model's folder


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model is, as written to config.json.

    backbone: registered name; config: its config dataclass.
    schedule: the noise schedule it was (or will be) trained on.
    codec: the space it works in, "pixels" or the name of an autoencoder.
    preset: the preset it came from, if any. labels: the names of its classes, if known.
    licence: of the weights, None when they are one's own. images: training images seen.
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
        """JSON values, with the format's number."""
        return {"mezzotint": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ModelInfo:
        """The card of `to_json`; ValueError names an unknown or missing key."""
        values = dict(values)
        if values.pop("mezzotint", None) != FORMAT:
            raise ValueError(
                f"config.json is not of mezzotint format {FORMAT}; was it written by another library?"
            )
        known = [f.name for f in dataclasses.fields(ModelInfo)]
        for key in values:
            if key not in known:
                raise ValueError(f"config.json has an unknown key {key!r}; {suggest(key, known)}")
        for key in ("backbone", "config", "schedule"):
            if key not in values:
                raise ValueError(f"config.json has no key {key!r}")
        entry = backbones.registry[values["backbone"]]
        values["config"] = make_config(entry.config, values["config"])
        values["schedule"] = Spec(**values["schedule"])
        if values.get("labels") is not None:
            values["labels"] = tuple(values["labels"])
        return ModelInfo(**values)


def make_config(kind: type, values: dict[str, Any]) -> Any:
    """The config dataclass `kind` from JSON values; a misspelt field is an error that lists near names."""
    return kind(**_fields(f"config {kind.__name__}", kind, values))


def _fields(what: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the config dataclass `kind` has them; ValueError for a wrong name, type, size or count."""
    hints = typing.get_type_hints(kind)
    found = {
        k: parse(hints[k], v, f"model.{k}") for k, v in check_options(what, kind, values).items()
    }
    for name, least in (("size", 1), ("channels", 1), ("num_classes", 0)):
        if found.get(name, least) < least:
            raise ValueError(f"model.{name} is {found[name]}; it must be at least {least}")
    return found


def presets() -> list[str]:
    """Every preset's name, published sizes and laptop ones."""
    return list(backbones.presets())


def preset_info(name: str, **overrides: Any) -> ModelInfo:
    """The Card of a preset, with fields of its backbone's config replaced, e.g. num_classes=10."""
    known = backbones.presets()
    if name not in known:
        raise ValueError(f"unknown preset {name!r}; {suggest(name, known)}")
    backbone, preset = known[name]
    entry = backbones.registry[backbone]
    config = dataclasses.replace(
        preset.config, **_fields(f"preset {name}", entry.config, overrides)
    )
    return ModelInfo(
        backbone=backbone,
        config=config,
        schedule=entry.schedule(config),
        codec=preset.codec,
        preset=name,
    )


def build_model(card: ModelInfo) -> Model:
    """A Model with random weights (or weights on the current default device) from its Card."""
    entry = backbones.registry[card.backbone]
    return Model(entry.module(card.config), entry.parameterisation(card.config), card)


def create_model(preset: str, **overrides: Any) -> Model:
    """A preset with random weights.

    Args:
        preset: a name of `presets()`.
        overrides: fields of the backbone's config, e.g. num_classes=10, size=64.

    Errors: ValueError for an unknown preset or field, listing near names, for values of a wrong type, and for values
    that do not fit together.
    """
    return build_model(preset_info(preset, **overrides))


def get_schedule(model: Model) -> Schedule:
    """The noise schedule that a model's card names."""
    return build(schedules.registry, model.info.schedule)


def tensor_specs(backbone: str, config: Any) -> dict[str, TensorSpec]:
    """State-dict key -> dtype and shape of a backbone, from the meta device: nothing is allocated."""
    with torch.device("meta"):
        module = backbones.registry[backbone].module(config)
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()}


def model_from_state_dict(card: ModelInfo, state: Mapping[str, Tensor]) -> Model:
    """A Model of these weights, which it takes over, on the CPU; `state` must have the keys and shapes of `claims`.

    Weights narrower than float32 become float32.
    """
    entry = backbones.registry[card.backbone]
    with torch.device("meta"):
        module = entry.module(card.config)
    state = {
        k: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for k, t in state.items()
    }
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:  # buffers outside the state dict are functions of the config: take them from a network built for real
        real = dict(entry.module(card.config).named_buffers())
        for name in left:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = real[name]
    return Model(module, entry.parameterisation(card.config), card)


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, model.safetensors and README.md, so that `load_model` builds the same model.

    Everything is written and flushed beside the folder first. A new folder then appears in one rename; in an existing
    model's folder each file is replaced in one, weights first, and other files stay.

    Errors: ValueError where `folder` is a file or holds another library's config.json.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is saved as a folder")
    if (folder / CONFIG).exists() and "mezzotint" not in read_json(folder / CONFIG):
        raise ValueError(f"{folder / CONFIG} belongs to another library; choose another folder")
    with partial_folder(folder) as partial:
        state = {
            name: t.detach().cpu().contiguous() for name, t in model.backbone.state_dict().items()
        }
        save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(model.info.to_json(), indent=2) + "\n")
        (partial / README).write_text(readme(model))
        for name in (WEIGHTS, CONFIG, README):
            fsync_path(partial / name)
        if not folder.exists():
            partial.rename(folder)
            return
        for name in (WEIGHTS, CONFIG, README):
            (partial / name).replace(folder / name)


def readme(model: Model) -> str:
    """The model card that goes with the weights: Markdown with the hub's YAML header."""
    card = model.info
    count = sum(p.numel() for p in model.backbone.parameters())
    made = f"preset `{card.preset}`" if card.preset else f"backbone `{card.backbone}`"
    lines = [
        "---",
        "library_name: mezzotint",
        "pipeline_tag: unconditional-image-generation",
        "tags: [mezzotint, diffusion]",
        "---",
        "",
        f"# {card.preset or card.backbone}",
        "",
        f"A {made} of mezzotint with {count:,} parameters, working in "
        f"{card.codec}; {card.images:,} training images seen.",
        "",
        f"Licence of the weights: {card.licence or 'not stated'}.",
        "",
        "```python",
        "import mezzotint as mz",
        "",
        'model = mz.load_model("this folder or its name on the hub")',
        "```",
        "",
        *[f"- {name}: {value}" for name, value in dataclasses.asdict(card.config).items()],
        f"- schedule: {card.schedule}",
    ]
    return "\n".join(lines) + "\n"


def load_model(folder_or_repo: str | Path) -> Model:
    """The model of a folder written by `save_model`, or of such a repository on the Hugging Face hub, on the CPU.

    No code comes from the folder. Names, shapes, dtypes and bytes are compared with what config.json implies before
    anything is allocated. Weights stored in float16 or bfloat16 become float32.

    Errors: ValueError for a folder without a model, a card of another format, weights that do not belong to it or
    that claim more than they hold.
    """
    folder = Path(folder_or_repo)
    if not folder.is_dir():
        folder = _download(str(folder_or_repo))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; a model's folder holds {CONFIG}, {WEIGHTS} and {README}"
            )
    card = ModelInfo.from_json(read_json(folder / CONFIG))
    path = folder / WEIGHTS
    held = read_safetensors_header(path)
    expected = tensor_specs(card.backbone, card.config)
    if set(held) != set(expected):
        unused, missing = set(held) - set(expected), set(expected) - set(held)
        raise ValueError(
            f"{path} is not of this config: unused keys {list_names(unused)}; missing {list_names(missing)}"
        )
    wrong = [
        f"{k} {held[k].dtype} {held[k].shape} instead of {claim.dtype} {claim.shape}"
        for k, claim in expected.items()
        if held[k].shape != claim.shape
        or held[k].dtype.is_floating_point != claim.dtype.is_floating_point
    ]
    if wrong:
        total = format_bytes(sum(claim.bytes for claim in expected.values()))
        raise ValueError(
            f"{path} is not of this config, which needs {total}; wrong: {list_names(wrong)}"
        )
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return model_from_state_dict(card, {name: file.get_tensor(name) for name in expected})


def _download(repo: str) -> Path:
    """A hub repository's three files, from the cache where they are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise ValueError(
            f"there is no folder {repo}, and it is no repository's name either (owner/name)"
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, WEIGHTS, README]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"there is no folder {repo}, and the hub did not give a repository of that name: {first}"
        ) from None


def open_model(source: str | Path) -> Model:
    """The averaged model of a run folder, a model folder, or a hub repository, in eval mode on the best device."""
    folder = Path(source)
    if not (folder / "model").exists() and any(
        (folder / name).exists() for name in ("recipe.yaml", ".lock")
    ):
        raise ValueError(
            f"{folder} is a run that has saved no model yet; the same train command goes on until it has"
        )
    model = load_model(folder / "model" if (folder / "model").exists() else str(source))
    return model.eval().requires_grad_(False).to(default_device())


def meta_model(card: ModelInfo) -> Model:
    """The network without storage, in eval mode."""
    with torch.device("meta"):
        return build_model(card).eval().requires_grad_(False)
