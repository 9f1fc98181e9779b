"""Presets to models, models to folders and back: config.json + model.safetensors, no code in either."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import mezzotint.backbones as backbones
from mezzotint.process import schedules
from mezzotint.process.denoiser import Model, Schedule
from mezzotint.registry import Spec, build, checked_options, nearest

FORMAT = 1  # of config.json; raised when an older reader would misread a newer file


@dataclass(frozen=True, kw_only=True)
class Card:
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
    def from_json(values: dict[str, Any]) -> Card:
        """The card of `to_json`; ValueError names an unknown or missing key."""
        values = dict(values)
        if values.pop("mezzotint", None) != FORMAT:
            raise ValueError(f"config.json is not of mezzotint format {FORMAT}; was it written by another library?")
        known = [f.name for f in dataclasses.fields(Card)]
        for key in values:
            if key not in known:
                raise ValueError(f"config.json has an unknown key {key!r}; {nearest(key, known)}")
        for key in ("backbone", "config", "schedule"):
            if key not in values:
                raise ValueError(f"config.json has no key {key!r}")
        entry = backbones.registry[values["backbone"]]
        values["config"] = make_config(entry.config, values["config"])
        values["schedule"] = Spec(**values["schedule"])
        if values.get("labels") is not None:
            values["labels"] = tuple(values["labels"])
        return Card(**values)


def _tuples(value: Any) -> Any:
    """JSON lists as tuples, since configs are frozen and compared."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def make_config(kind: type, values: dict[str, Any]) -> Any:
    """The config dataclass `kind` from JSON values; a misspelt field is an error that lists near names."""
    checked_options(f"config {kind.__name__}", kind, values)
    return kind(**{k: _tuples(v) for k, v in values.items()})


def presets() -> list[str]:
    """Every preset's name, published sizes and laptop ones."""
    return list(backbones.presets())


def preset_card(name: str, **overrides: Any) -> Card:
    """The Card of a preset, with fields of its backbone's config replaced, e.g. num_classes=10."""
    known = backbones.presets()
    if name not in known:
        raise ValueError(f"unknown preset {name!r}; {nearest(name, known)}")
    backbone, preset = known[name]
    entry = backbones.registry[backbone]
    checked_options(f"preset {name}", entry.config, overrides)
    config = dataclasses.replace(preset.config, **{k: _tuples(v) for k, v in overrides.items()})
    return Card(backbone=backbone, config=config, schedule=entry.schedule(config), codec=preset.codec, preset=name)


def build_model(card: Card) -> Model:
    """A Model with random weights (or weights on the current default device) from its Card."""
    entry = backbones.registry[card.backbone]
    return Model(entry.module(card.config), entry.parameterisation(card.config), card)


def create_model(preset: str, **overrides: Any) -> Model:
    """A preset with random weights.

    Args:
        preset: a name of `presets()`.
        overrides: fields of the backbone's config, e.g. num_classes=10, size=64.

    Errors: ValueError for an unknown preset or field, listing near names, and for values that do not fit together.
    """
    return build_model(preset_card(preset, **overrides))


def schedule_of(model: Model) -> Schedule:
    """The noise schedule that a model's card names."""
    return build(schedules.registry, model.card.schedule)
