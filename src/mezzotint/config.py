"""Recipe: everything a training run depends on, as frozen dataclasses, YAML and dotted overrides.

Functions in `mezzotint.recipes` return one per published run, the command line changes single
fields (`optim.lr=3e-4`), and the run folder keeps the resolved recipe.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from mezzotint.core.registry import Spec, suggest

T = TypeVar("T")


def _at_least(prefix: str, values: object, **least: int) -> None:
    """Raise ValueError for a field below its smallest value; None is allowed."""
    for name, bound in least.items():
        value = getattr(values, name)
        if value is not None and not value >= bound:  # "not >=" refuses nan too
            raise ValueError(f"{prefix}{name} {value} must be at least {bound}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training data.

    source: folder, zip, prepared dataset, parquet, hub name or built-in set ("digits", "shapes").
    crop: "adm" (halve with BOX, bicubic, centre) or "plain" (one antialiased resize, centre).
    flip: mirror each image with probability 1/2.
    codec: autoencoder of a latent network, by name or folder; the preset's or dataset's by default.
    text_encoder: T5 encoder of a network that reads captions, by name or folder.
    buckets: aspect-ratio buckets, [[height, width], ...] in pixels; none for squares.
    portrait: with buckets, rotate images that are taller than wide, and note it in their captions.
    workers: processes that decode; 0 decodes in a thread of the training process.
    full_scale: the value that is white in grey images of more than 8 bits; by default measured.
    """

    source: str = ""
    crop: Literal["adm", "plain"] = "adm"
    flip: bool = False
    codec: str = ""
    text_encoder: str = ""
    buckets: tuple[tuple[int, int], ...] = ()
    portrait: bool = False
    workers: int = 0
    full_scale: int | None = None

    def __post_init__(self):
        _at_least("data.", self, workers=0, full_scale=1)


@dataclass(frozen=True, kw_only=True)
class Time:
    """How noise levels are drawn.

    sampling: "uniform" draws u independently; "stratified" spreads a batch's u evenly.
    loss_measure: "u" averages the loss over the schedule's u; "logsnr" multiplies each image's loss
        by -dlogsnr/du / 2, so that its expectation is an integral over log-SNR for any schedule
        (SiD2 eq. of section 9).
    """

    sampling: Literal["uniform", "stratified"] = "uniform"
    loss_measure: Literal["u", "logsnr"] = "u"


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, or Muon for hidden matrices with AdamW for the rest.

    lr: peak learning rate.
    warmup_images: length of the linear warm-up; decay: "cosine" reaches zero at the end of the run.
    clip: bound on the global gradient norm; None for none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip: float | None = 1.0

    def __post_init__(self):
        _at_least("optim.", self, lr=0, weight_decay=0, warmup_images=0)


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Averages of the weights.

    half_life_images: of the exponential average, which is sampled and saved as model/.
    rampup: upper bound of the half-life, in images seen (EDM: 0.05); None for no bound.
    power_stds: relative widths of power-function averages, e.g. (0.05, 0.10). Their snapshots give
        any other width after the run (EDM2 section 3; `mezzotint ema`).
    snapshot_every_images: between snapshots; None saves one with every checkpoint.
    """

    half_life_images: float = 500_000
    rampup: float | None = 0.05
    power_stds: tuple[float, ...] = ()
    snapshot_every_images: int | None = None

    def __post_init__(self):
        _at_least("ema.", self, half_life_images=1, snapshot_every_images=1)


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """Sample grids of a run, with fixed seeds and labels.

    every_images, count: between grids, and samples of each; 0 of either draws no grids.
    sampler: with options as on the command line, "ancestral:variance=learned"; with the family's
        discretization, without clipping.
    guidance: classifier-free guidance scale in DiT's convention, 1 = none.
    """

    every_images: int = 500_000
    count: int = 64
    sampler: str = "ddim"
    steps: int = 50
    guidance: float | None = None

    def __post_init__(self):
        _at_least("samples.", self, every_images=0, count=0, steps=1)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Metrics of samples of the averaged weights during training, on all ranks.

    every_images: between evaluations; 0 for none.
    num_images: samples, of seeds 0 ... num_images - 1.
    reference: file of real images' statistics (`mezzotint reference`).
    features: feature sets; the reference must have each of them.
    weights: file of their network; the one in the cache by default.
    reference_source: library that made the reference, where the file does not say.
    sampler, steps, guidance: as for sample grids.
    batch: samples at a time on each rank.
    prompts: file of one prompt a line, used in turn, for a network that reads captions.
    """

    every_images: int = 0
    num_images: int = 5_000
    reference: str = ""
    features: tuple[str, ...] = ("inception-2048",)
    weights: str | None = None
    reference_source: str | None = None
    sampler: str = "ddim"
    steps: int = 50
    guidance: float | None = None
    batch: int = 64
    prompts: str | None = None

    def __post_init__(self):
        _at_least("evaluate.", self, every_images=0, steps=1, batch=1)


@dataclass(frozen=True, kw_only=True)
class Save:
    """Checkpoints.

    every_images: between checkpoints; one is saved at the end of the run too, 0 for that one alone.
    keep: newest checkpoints to keep.
    keep_every_images: keep those at multiples of it too.
    """

    every_images: int = 1_000_000
    keep: int = 2
    keep_every_images: int | None = None

    def __post_init__(self):
        _at_least("save.", self, every_images=0, keep=1, keep_every_images=1)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a step is computed: speed and memory, not what is learnt.

    precision: of the passes, weights are always float32; "auto" is bf16 where that is fast.
    strategy: for several processes, "ddp" copies the weights, "fsdp" shards them per block.
    microbatch: images per forward pass and process; None for its share of the batch.
    checkpointing: what each block keeps for the backward pass: everything for "none"; for
        "selective" the results of products, convolutions and attention; for "full" its input alone.
    compile: torch.compile each repeated block.
    peak_tflops: of one device, in 1e12 FLOP per second; given, the log holds the utilisation.
    depthwise: kernels of DiMR's depthwise convolutions on a GPU, cuDNN's or our own in Triton.
    """

    precision: Literal["auto", "float32", "bf16"] = "auto"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    microbatch: int | None = None
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    peak_tflops: float | None = None
    depthwise: Literal["cudnn", "triton"] = "cudnn"

    def __post_init__(self):
        _at_least("engine.", self, microbatch=1)


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """What to do after a step that is not finite (`train.nonfinite`), and which losses to report.

    on_nonfinite: a loss or gradient that is not finite never reaches the weights and leaves a
        bundle for `mezzotint replay`. Then "stop" ends the run, "skip" continues with the next
        images, and "rollback" does so from the weights of the newest checkpoint.
    limit: skips or rollbacks of a run; the next one stops it.
    spike: report a loss this many robust standard deviations above the recent median, or None.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    limit: int = 10
    spike: float | None = 10.0

    def __post_init__(self):
        _at_least("nonfinite.", self, limit=0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    preset, model: the network, and fields of its config to change, e.g. {"size": 64}.
    schedule: noise schedule; None for the family's own at this size.
    objective: name and options of one in `process.objectives`.
    images, batch: length of the run and of one optimiser step, in images.
    label_drop: probability of the null label or empty text in training, for guidance.
    log_every_images: between log lines.
    trackers: get every log line besides log.jsonl; their packages must be installed.
    """

    preset: str
    model: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    schedule: Spec | None = None
    objective: Spec = field(default_factory=lambda: Spec("eps_mse"))
    time: Time = field(default_factory=Time)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    images: int = 10_000_000
    batch: int = 256
    label_drop: float = 0.1
    seed: int = 0
    log_every_images: int = 10_000
    samples: SampleGrid = field(default_factory=SampleGrid)
    evaluate: Evaluate = field(default_factory=Evaluate)
    save: Save = field(default_factory=Save)
    engine: Engine = field(default_factory=Engine)
    nonfinite: NonFinite = field(default_factory=NonFinite)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self):
        _at_least("", self, images=1, batch=1, log_every_images=1)
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop {self.label_drop} is not a probability, 0 to 1")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested dictionaries and lists, ready for YAML or JSON."""
    return _tuples_to_lists(dataclasses.asdict(recipe))


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples_to_lists(v) for k, v in value.items()}
    return [_tuples_to_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_dict(values: dict[str, Any]) -> Recipe:
    """Return the recipe of `to_dict`; ValueError names an unknown key or a wrong value."""
    return parse(Recipe, values, "")


def to_yaml(recipe: Recipe) -> str:
    """Return the complete recipe as YAML."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def from_yaml(path: str | Path) -> Recipe:
    """Read a recipe from YAML; ValueError names the file and the key."""
    try:
        values = yaml.safe_load(Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping of keys to values")
        return from_dict(values)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a recipe: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; a run folder holds its recipe as recipe.yaml"
        ) from None


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return the recipe with single fields changed.

    Args:
        assignments: "optim.lr=3e-4", "model.size=64", "objective.name=sigmoid",
            "objective.options.bias=-1"; values are YAML.

    Errors: ValueError for an unknown field, listing near names, or a value of the wrong type.
    """
    values = to_dict(recipe)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not of the form key=value, e.g. optim.lr=3e-4")
        keys = path.split(".")
        # Walk down to the dictionary that holds the last key.
        node = values
        for depth, key in enumerate(keys[:-1]):
            if key == "schedule" and node.get(key) is None:
                node[key] = {"name": "", "options": {}}
            if not isinstance(node.get(key), dict):
                name = ".".join(keys[: depth + 1])
                wrong = f"{name!r} has no fields" if key in node else f"no field {name!r}"
                raise ValueError(f"{wrong}; {suggest(key, node)}")
            node = node[key]
        # Fields of a model or of options are checked where the network or the function is known.
        any_key = keys[0] == "model" or "options" in keys[:-1]
        if keys[-1] not in node and not any_key:
            raise ValueError(f"no field {path!r}; {suggest(keys[-1], node)}")
        node[keys[-1]] = yaml.safe_load(text)
    return from_dict(values)


def parse(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`: a dataclass, union, literal, tuple, dict or scalar.

    Args:
        path: of the field, for the ValueError of a value that does not fit.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(typing.cast(type, kind), value, path)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return parse(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path} is {value!r}; allowed: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path} is {value!r}; a list is needed")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ValueError(f"{path} has {len(value)} values; {len(inner)} are needed")
        return tuple(
            parse(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict or kind is Any:
        return value
    return _parse_scalar(kind, value, path)


WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _parse_scalar(kind: type, value: Any, path: str) -> Any:
    """Return a bool, int, float or str. YAML reads 1e6 as text, so both count as integers."""
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise ValueError(f"{path} is {value!r}; {WANTED[kind]} is needed")
    try:
        number = float(value) if kind in (int, float) else value
        if kind is int and number == int(number):
            return int(value) if isinstance(value, int) else int(number)
        if kind is float or (kind is str and isinstance(value, str)):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{path} is {value!r}; {WANTED[kind]} is needed")


def _parse_dataclass(kind: type[T], value: Any, path: str) -> T:
    if not isinstance(value, dict):
        raise ValueError(f"{path or 'the recipe'} is {value!r}; a mapping is needed")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ValueError(
                f"unknown key {f'{path}.{key}'.lstrip('.')!r}; {suggest(str(key), hints)}"
            )
    required = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, kind))
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for key in required:
        if key not in value:
            raise ValueError(f"key {f'{path}.{key}'.lstrip('.')!r} is missing")
    return kind(**{k: parse(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})
