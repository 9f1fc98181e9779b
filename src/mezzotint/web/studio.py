"""State of the studio: models, runs, and limits of one request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mezzotint.core.registry import suggest
from mezzotint.models import CONFIG, TUNED, WEIGHTS, open_model
from mezzotint.process.denoiser import Model


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request, from the page or over HTTP; beyond them is a ValueError.

    images: at once. prompt_chars: of all prompts together. steps: of the sampler.
    enlargement: of the network's own side. seconds: of computing.
    photo_bytes, photo_pixels: of an uploaded photo, encoded and decoded.
    body_bytes: of a request; a photo in base64 fits.
    queue_length: waiting requests. visitors: whose earlier images are kept. earlier: images kept of
    each visitor.
    """

    images: int = 16
    prompt_chars: int = 4000
    steps: int = 250
    enlargement: int = 2
    seconds: float = 300.0
    photo_bytes: int = 4 << 20
    photo_pixels: int = 4 << 20
    body_bytes: int = 6 << 20
    queue_length: int = 64
    visitors: int = 32
    earlier: int = 24

    def divide(self, count: int) -> Limits:
        """Return the limits of each of `count` samplings of one request: its time is shared."""
        return replace(self, seconds=self.seconds / count)


class ReloadingModel:
    """A model that is read again when its weights change, as a run's do at every checkpoint."""

    def __init__(self, source: str | Path):
        self.source = source
        self.modified = self._modified()
        self.model = open_model(source, tuned=True)

    def _modified(self) -> list[float]:
        folder = Path(self.source)
        folders = (folder / "model", folder / TUNED, folder)
        paths = [f / name for f in folders for name in (WEIGHTS, CONFIG)]
        return [path.stat().st_mtime for path in paths if path.is_file()]

    def latest(self) -> Model:
        """Return the model with its newest weights."""
        modified = self._modified()
        if modified != self.modified:
            # A training run may be replacing it right now; then the next request reads it.
            with suppress(ValueError, OSError):
                self.model, self.modified = open_model(self.source, tuned=True), modified
        return self.model


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Models and run folders by name. A visitor chooses a name and can open nothing else."""

    models: dict[str, ReloadingModel]
    runs: dict[str, Path]
    limits: Limits = field(default_factory=Limits)

    def model(self, name: object) -> Model:
        """Return the model of that name; ValueError for an unknown one."""
        if not self.models:
            raise ValueError(
                "no model was given: start with `mezzotint serve RUN` or a model's folder"
            )
        if not isinstance(name, str) or name not in self.models:
            short = str(name)[:80]
            raise ValueError(f"there is no model {short!r}; {suggest(short, self.models)}")
        return self.models[name].latest()

    def run(self, name: object) -> Path:
        """Return the run folder of that name; ValueError for an unknown one."""
        if not isinstance(name, str) or name not in self.runs:
            short = str(name)[:80]
            raise ValueError(f"there is no run {short!r}; {suggest(short, self.runs)}")
        return self.runs[name]

    def takes_prompts(self, name: object) -> bool:
        """Return whether the model of that name exists and is conditioned on text."""
        known = isinstance(name, str) and name in self.models
        return known and "text" in self.models[str(name)].model.info.extra

    def models_of(self, *backbones: str) -> list[str]:
        """Return the names of the models with one of these backbones."""
        return [
            name for name, entry in self.models.items() if entry.model.info.backbone in backbones
        ]


def open_studio(sources: Sequence[str], limits: Limits | None = None) -> Studio:
    """Return the studio of run folders, model folders, models in the box and hub names.

    A run that has saved no model yet can be watched; restart the studio to sample from it.

    Errors: ValueError for a source that is neither a run nor a model.
    """
    models: dict[str, ReloadingModel] = {}
    runs: dict[str, Path] = {}
    for source in sources:
        folder = Path(source)
        is_run = (folder / "recipe.yaml").is_file() or (folder / "log.jsonl").is_file()
        name = unique_name(folder.resolve().name if folder.is_dir() else source, {*models, *runs})
        if is_run:
            runs[name] = folder.resolve()
        if not is_run or (folder / "model").is_dir():
            models[name] = ReloadingModel(folder.resolve() if folder.is_dir() else source)
    return Studio(models=models, runs=runs, limits=limits or Limits())


def unique_name(name: str, taken: set[str]) -> str:
    """Return `name`, with a number appended if it is taken."""
    unique, count = name, 2
    while unique in taken:
        unique, count = f"{name} ({count})", count + 1
    return unique
