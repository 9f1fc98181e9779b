"""What the studio holds: the models and runs of the command line, and how much one visitor may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mezzotint.core.registry import suggest
from mezzotint.models import WEIGHTS, open_model
from mezzotint.process.denoiser import Model


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request; beyond them is a ValueError, whether asked on the page or over HTTP.

    pictures: at once. words: characters of all prompts. steps: of a grid. enlargement: of the network's native side.
    seconds: of computing.
    photo_bytes, photo_pixels: of an uploaded picture, encoded and decoded. waiting: requests in the queue.
    visitors: whose earlier pictures are kept. earlier: pictures kept of each.
    """

    pictures: int = 16
    words: int = 4000
    steps: int = 250
    enlargement: int = 2
    seconds: float = 300.0
    photo_bytes: int = 4 << 20
    photo_pixels: int = 4 << 20
    waiting: int = 64
    visitors: int = 32
    earlier: int = 24


class Opened:
    """A model by where it came from, read again when its weights change, as a run's do at every checkpoint."""

    def __init__(self, source: str | Path):
        self.source = source
        self.stamp = self._stamp()
        self.model = open_model(source)

    def _stamp(self) -> float:
        folder = Path(self.source)
        weights = [p for p in (folder / "model" / WEIGHTS, folder / WEIGHTS) if p.is_file()]
        return weights[0].stat().st_mtime if weights else 0.0

    def current(self) -> Model:
        """The model, from its newest weights."""
        stamp = self._stamp()
        if stamp != self.stamp:
            # It may be replaced at this moment; then the one at hand serves until the next request.
            with suppress(ValueError, OSError):
                self.model, self.stamp = open_model(self.source), stamp
        return self.model


@dataclass(frozen=True, kw_only=True)
class Studio:
    """models: name -> `Opened`; runs: name -> run folder; a visitor chooses by name and can name nothing else."""

    models: dict[str, Opened]
    runs: dict[str, Path]
    limits: Limits = field(default_factory=Limits)

    def model(self, name: str) -> Model:
        """The model of that name; ValueError lists those there are."""
        if not self.models:
            raise ValueError(
                "no model was given: start with `mezzotint serve RUN` or a model's folder"
            )
        if name not in self.models:
            raise ValueError(
                f"there is no model {str(name)[:80]!r}; {suggest(str(name)[:80], self.models)}"
            )
        return self.models[name].current()

    def run(self, name: str) -> Path:
        """The run of that name; ValueError lists those there are."""
        if name not in self.runs:
            raise ValueError(
                f"there is no run {str(name)[:80]!r}; {suggest(str(name)[:80], self.runs)}"
            )
        return self.runs[name]

    def reads(self, name: object) -> bool:
        """Whether the model of that name reads prompts."""
        return name in self.models and "text" in self.models[str(name)].model.info.extra

    def of(self, *backbones: str) -> list[str]:
        """Names of the models with one of these backbones."""
        return [
            name for name, opened in self.models.items() if opened.model.info.backbone in backbones
        ]


def open_studio(sources: Sequence[str], limits: Limits | None = None) -> Studio:
    """The studio of the command line's run folders, model folders and hub names.

    A run that has saved no model yet can be watched; start again to sample from it.

    Errors: ValueError for a source that is neither a run nor a model.
    """
    models: dict[str, Opened] = {}
    runs: dict[str, Path] = {}
    for source in sources:
        folder = Path(source)
        is_run = (folder / "recipe.yaml").is_file() or (folder / "log.jsonl").is_file()
        name = unused(folder.resolve().name if folder.is_dir() else source, {*models, *runs})
        if is_run:
            runs[name] = folder.resolve()
        if not is_run or (folder / "model").is_dir():
            models[name] = Opened(folder.resolve() if folder.is_dir() else source)
    return Studio(models=models, runs=runs, limits=limits or Limits())


def unused(name: str, taken: set[str]) -> str:
    """`name`, with a number where it is taken."""
    count = 2
    chosen = name
    while chosen in taken:
        chosen, count = f"{name} ({count})", count + 1
    return chosen
