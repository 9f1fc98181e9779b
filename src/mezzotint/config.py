"""Recipe: everything a training run depends on, as frozen dataclasses, YAML and dotted overrides.

Functions in `mezzotint.recipes` return one per published run, the command line changes single
fields (`optim.lr=3e-4`), and the run folder keeps the resolved recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml

from mezzotint.core.fields import MOST_IMAGES, MOST_SEED, Checked, Range, parse, type_hints
from mezzotint.core.object_store import is_address
from mezzotint.core.registry import Spec, suggest

MOST_BYTES = 1_000_000  # of a recipe's file

# Ranges that several fields share. They end where a value is a typing error or cannot work.
Hours = Annotated[float, Range(0, 10_000, "about a year", above=True)]
Interval = Annotated[int, Range(0, MOST_IMAGES, "images")]
Positive = Annotated[int, Range(1, MOST_IMAGES, "images")]
Batch = Annotated[int, Range(1, 1_000_000, "images at a time")]
Steps = Annotated[int, Range(1, 10_000)]
SamplingDType = Literal["auto", "float32", "bfloat16", "float16"]
GuidanceScale = Annotated[float, Range(-1000, 1000, "1 is no guidance")]
Side = Annotated[int, Range(1, 16_384, "pixels")]
Beta = Annotated[float, Range(0, 1, "the part of a moment that a step keeps", below=True)]
PowerStd = Annotated[float, Range(0.001, 0.2886, "the widest is 0.2887; EDM2 uses 0.05 and 0.10")]


@dataclass(frozen=True, kw_only=True)
class Columns(Checked):
    """Columns of a table, or of a file of labels and captions; None chooses by name and type.

    image, label, caption: names; "" for none, e.g. to leave labels out.
    """

    image: str | None = None
    label: str | None = None
    caption: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shards(Checked):
    """Data in shards, at an address or in a folder of `mezzotint prepare --shards`.

    lanes: parts of an epoch that are read side by side, a divisor of the batch; by default two for
        each rank of the first start, at least 8. Fixed for the run, like shuffle_images.
    shuffle_images: images of a block; a lane permutes the images within each of its blocks.
    cache: folder on a local disk that keeps the shards in use; $MEZZOTINT_CACHE/shards by default.
    cache_gb: the largest size of the cache, in 1e9 bytes, for all runs and ranks of a machine.
    missing: what to do about a shard that is missing, cut, changed or damaged: "stop" all ranks, or
        "skip" it, count it, and train on images of other shards in its place.
    patience_s: seconds to wait for a store that does not answer, when shards are read.
    """

    prefix: ClassVar[str] = "data.shards."

    lanes: Annotated[int, Range(1, 10**6)] | None = None
    shuffle_images: Annotated[int, Range(1, 10**8)] = 4096
    cache: str = ""
    cache_gb: Annotated[float, Range(1e-6, 1e6)] = 50.0
    missing: Literal["stop", "skip"] = "stop"
    patience_s: Annotated[float, Range(0, 1e6)] = 600.0


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """The training data.

    source: folder, zip, prepared dataset, parquet, hub name or built-in set ("digits", "shapes");
        or an address of shards, e.g. s3://bucket/train.
    crop: "adm" (halve with BOX, bicubic, centre) or "plain" (one antialiased resize, centre).
    flip: mirror each image with probability 1/2.
    augment: probability of each of EDM's non-leaky augmentations (EDM: 0.12 on CIFAR-10, 0.15 on
        FFHQ), which condition the network; for few images, and networks on pixels only.
    columns: of images, labels and captions, e.g. {image: photo, label: species}.
    codec: autoencoder of a latent network, by name or folder; the preset's or dataset's by default.
    text_encoder: T5 encoder of a network that reads captions, by name or folder.
    text_dtype: of its states, as the network reads them: float16 or bfloat16.
    text_cache: embed each caption once and keep it in $MEZZOTINT_CACHE; false embeds captions at
        every read, for the same numbers without the disk.
    buckets: aspect-ratio buckets, [[height, width], ...] in pixels; by default the network's size.
    portrait: with buckets, rotate images that are taller than wide, and note it in their captions.
    workers: processes that decode; 0 decodes in a thread of the training process.
    full_scale: the value that is white in grey images of more than 8 bits; by default measured.
    """

    prefix: ClassVar[str] = "data."

    source: str = ""
    crop: Literal["adm", "plain"] = "adm"
    flip: bool = False
    augment: Annotated[float, Range(0, 1, "a probability")] = 0.0
    columns: Columns = field(default_factory=Columns)
    codec: str = ""
    text_encoder: str = ""
    text_dtype: Literal["float16", "bfloat16"] = "float16"
    text_cache: bool = True
    buckets: tuple[tuple[Side, Side], ...] = ()
    portrait: bool = False
    workers: Annotated[int, Range(0, 1024, "0 decodes in a thread")] = 0
    full_scale: Annotated[int, Range(1, 2**32, "the value of white")] | None = None
    shards: Shards = field(default_factory=Shards)


@dataclass(frozen=True, kw_only=True)
class Time(Checked):
    """How noise levels are drawn.

    sampling: "uniform" draws u independently; "stratified" spreads a batch's u evenly.
    loss_measure: "u" averages the loss over the schedule's u; "logsnr" multiplies each image's loss
        by -dlogsnr/du / 2, so that its expectation is an integral over log-SNR for any schedule
        (SiD2 eq. of section 9).
    """

    prefix: ClassVar[str] = "time."

    sampling: Literal["uniform", "stratified"] = "uniform"
    loss_measure: Literal["u", "logsnr"] = "u"


@dataclass(frozen=True, kw_only=True)
class Optim(Checked):
    """AdamW, RAdam, or Muon for hidden matrices with AdamW for the rest.

    lr: peak learning rate.
    warmup_images: length of the linear warm-up; decay: "cosine" reaches zero at the end of the run.
    clip: bound on the global gradient norm; None for none.
    """

    prefix: ClassVar[str] = "optim."

    name: Literal["adamw", "radam", "muon"] = "adamw"
    lr: Annotated[float, Range(0, 100)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: Annotated[float, Range(0, 10, "a large one stops learning", above=True)] = 1e-8
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    warmup_images: Interval = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip: Annotated[float, Range(1e-9, 1e9, "null for none")] | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Ema(Checked):
    """Averages of the weights.

    half_life_images: of the exponential average, which is sampled and saved as model/.
    rampup: upper bound of the half-life, in images seen (EDM: 0.05); None for no bound.
    power_stds: relative widths of power-function averages, e.g. (0.05, 0.10). Their snapshots give
        any other width after the run (EDM2 section 3; `mezzotint ema`).
    snapshot_every_images: between snapshots; None saves one with every checkpoint.
    """

    prefix: ClassVar[str] = "ema."

    half_life_images: Annotated[float, Range(1, MOST_IMAGES)] = 500_000
    rampup: Annotated[float, Range(0, 1e6, "null for no bound")] | None = 0.05
    power_stds: tuple[PowerStd, ...] = ()
    snapshot_every_images: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [f"{std:g}" for std in self.power_stds]  # as the files of the averages are named
        if len(set(names)) < len(names):
            raise ValueError(f"ema.power_stds {list(self.power_stds)} names a width twice")


@dataclass(frozen=True, kw_only=True)
class SampleGrid(Checked):
    """Sample grids of a run, with fixed seeds and labels.

    every_images, count: between grids, and samples of each; 0 of either draws no grids.
    sampler: with options as on the command line, "ancestral:variance=learned"; with the family's
        discretization, without clipping.
    guidance: classifier-free guidance scale in DiT's convention, 1 = none.
    dtype: of the network's arithmetic; "auto" is bfloat16 on a GPU that has it, else float32.
    """

    prefix: ClassVar[str] = "samples."

    every_images: Interval = 500_000
    count: Annotated[int, Range(0, 10_000, "they are drawn into one PNG")] = 64
    sampler: str = "ddim"
    steps: Steps = 50
    guidance: GuidanceScale | None = None
    dtype: SamplingDType = "auto"


@dataclass(frozen=True, kw_only=True)
class Evaluate(Checked):
    """Metrics of samples of the averaged weights, and their likelihood, during training.

    every_images: between evaluations; 0 for none.
    num_images: samples, of seeds 0 ... num_images - 1; of the likelihood at most so many images.
    reference: file of real images' statistics (`mezzotint reference`).
    features: feature sets; the reference must have each of them.
    weights: file of their network; the one in the cache by default.
    reference_source: library that made the reference, where the file does not say.
    sampler, steps, guidance, dtype: as for sample grids; the likelihood is always in float32.
    batch: samples at a time on each rank.
    prompts: file of one prompt a line, used in turn, for a network that reads captions.
    bits_per_dim: measure the likelihood too, or alone where no reference is given.
    data: its images, not trained on; by default the test split of a data.source that names its
        training split, as FOLDER:train does.
    """

    prefix: ClassVar[str] = "evaluate."

    every_images: Interval = 0
    num_images: Annotated[int, Range(2, 10_000_000)] = 5_000
    reference: str = ""
    features: tuple[str, ...] = ("inception-2048",)
    weights: str | None = None
    reference_source: str | None = None
    sampler: str = "ddim"
    steps: Steps = 50
    guidance: GuidanceScale | None = None
    dtype: SamplingDType = "auto"
    batch: Batch = 64
    prompts: str | None = None
    bits_per_dim: bool = False
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Save(Checked):
    """Checkpoints.

    every_images: between checkpoints; one is saved at the end of the run too, 0 for that one alone.
    keep: newest checkpoints to keep.
    keep_every_images: keep the first at or past each multiple of it too.
    store: address, e.g. s3://bucket/runs/xl, for checkpoints in place of the run folder and a copy
        of its other files, so that any machine can resume (see docs/checkpoints.md).
    """

    prefix: ClassVar[str] = "save."

    every_images: Interval = 1_000_000
    keep: Annotated[int, Range(1, 1_000_000)] = 2
    keep_every_images: Positive | None = None
    store: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store and not is_address(self.store):
            raise ValueError(
                f"save.store {self.store} is no address; give e.g. s3://bucket/runs/xl, or leave "
                "it out to keep checkpoints in the run folder"
            )
        if "*" in self.store:
            raise ValueError(f"save.store {self.store} holds a *; give the address of one folder")


@dataclass(frozen=True, kw_only=True)
class Engine(Checked):
    """How a step is computed: speed and memory, not what is learnt.

    precision: of the passes, weights are always float32; "auto" is bf16 where that is fast.
    strategy: for several processes, "ddp" copies the weights, "fsdp" shards them per block.
    shard_ranks: with "fsdp", ranks that together hold one copy of the weights, e.g. a node's 8;
        then only gradients go from node to node, once a step (HSDP). None for all ranks.
    microbatch: images per forward pass and process; None for its share of the batch.
    checkpointing: what each block keeps for the backward pass: everything for "none"; for
        "selective" the results of products, convolutions and attention; for "full" its input alone.
    compile: torch.compile each repeated block.
    peak_tflops: of one device, in 1e12 FLOP per second; given, the log holds the utilisation.
    depthwise: kernels of DiMR's depthwise convolutions on a GPU, cuDNN's or our own in Triton.
    """

    prefix: ClassVar[str] = "engine."

    precision: Literal["auto", "float32", "bf16"] = "auto"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    shard_ranks: Annotated[int, Range(2, 10**6)] | None = None
    microbatch: Batch | None = None
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    peak_tflops: Annotated[float, Range(1e-6, 1e6)] | None = None
    depthwise: Literal["cudnn", "triton"] = "cudnn"


@dataclass(frozen=True, kw_only=True)
class NonFinite(Checked):
    """What to do after a step that is not finite (`train.nonfinite`), and which losses to report.

    on_nonfinite: a loss or gradient that is not finite never reaches the weights and leaves a
        bundle for `mezzotint replay`. Then "stop" ends the run, "skip" continues with the next
        images, and "rollback" does so from the weights of the newest checkpoint.
    limit: skips or rollbacks of a run; the next one stops it.
    spike: report a loss this many robust standard deviations above the recent median, or None.
    """

    prefix: ClassVar[str] = "nonfinite."

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    limit: Annotated[int, Range(0, 10**9)] = 10
    spike: Annotated[float, Range(0, 1e9, "null for no report", above=True)] | None = 10.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """One training run.

    preset, model: the network, and fields of its config to change, e.g. {"size": 64}.
    schedule: noise schedule; None for the family's own at this size.
    objective: name and options of one in `process.objectives`.
    images, batch: length of the run and of one optimiser step, in images.
    label_drop: probability of the null label or empty text in training, for guidance.
    stream: generator of the training's random numbers, see `mezzotint.core.rng.Draws`. "auto" is
        "philox4x32" for a run that starts on a GPU, else "philox4x64"; a run keeps its stream.
    log_every_images: between log lines.
    trackers: get every log line besides log.jsonl; their packages must be installed.
    hours: the budget for which `train --hours` chose the length; a record, not read in training.
    """

    preset: str
    model: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    schedule: Spec | None = None
    objective: Spec = field(default_factory=lambda: Spec("eps_mse"))
    time: Time = field(default_factory=Time)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    images: Positive = 10_000_000
    batch: Batch = 256
    label_drop: Annotated[float, Range(0, 1, "a probability")] = 0.1
    seed: Annotated[int, Range(0, MOST_SEED)] = 0
    stream: Literal["auto", "philox4x64", "philox4x32"] = "auto"
    log_every_images: Positive = 10_000
    samples: SampleGrid = field(default_factory=SampleGrid)
    evaluate: Evaluate = field(default_factory=Evaluate)
    save: Save = field(default_factory=Save)
    engine: Engine = field(default_factory=Engine)
    nonfinite: NonFinite = field(default_factory=NonFinite)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    hours: Hours | None = None


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


class _Loader(yaml.SafeLoader):
    """YAML without aliases, tags and repeated keys.

    With aliases a short text can stand for a very large value, tags fail in ways of their own, and
    of a key that repeats all values but one would be lost.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias and a tag."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        if (tag := getattr(self.peek_event(), "tag", None)) is not None:
            raise yaml.YAMLError(f"tags ({tag}) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a key that repeats."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {key.value!r} repeats")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def parse_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML text; ValueError begins with `name` and is one line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else getattr(error, "problem", None) or error
        raise ValueError(f"{name} is not YAML: {_cut(' '.join(str(reason).split()))}") from None


def from_yaml(path: str | Path) -> Recipe:
    """Read a recipe from YAML; ValueError names the file and the key.

    A file without `stream` is of a run that began before there were two.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES or not path.is_file():
            raise ValueError(f"it is no file of at most {MOST_BYTES:,} bytes")
        values = parse_yaml(path.read_text("utf-8-sig"), "its text")
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping of keys to values")
        return from_dict({"stream": "philox4x64", **values})
    except ValueError as error:
        raise ValueError(f"{path} is not a recipe: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; a run folder holds its recipe as recipe.yaml"
        ) from None


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return the recipe with single fields changed.

    A new name drops the options that the recipe had for the old one.

    Args:
        assignments: "optim.lr=3e-4", "model.size=64", "objective.name=sigmoid",
            "objective.options.bias=-1"; values are YAML.

    Errors: ValueError for an unknown field, listing near names, or a value of the wrong type.
    """
    values, assignments, given = to_dict(recipe), list(assignments), set[str]()
    if not assignments:
        return recipe
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not of the form key=value, e.g. optim.lr=3e-4")
        if path == "hours":
            raise ValueError(f"{assignment}: a budget is an option of train: --hours {text}")
        keys = path.split(".")
        # Walk down to the dictionary that holds the last key.
        node = values
        for depth, key in enumerate(keys[:-1]):
            if key == "schedule" and node.get(key) is None:
                node[key] = {"name": "", "options": {}}
            if key == "options" and "name" in node:
                node.setdefault(key, {})
            if not isinstance(node.get(key), dict):
                name = ".".join(keys[: depth + 1])
                wrong = f"{name!r} has no fields" if key in node else f"no field {name!r}"
                raise ValueError(f"{wrong}; {_suggest_field(values, keys[: depth + 1], node)}")
            node = node[key]
        # Fields of a model or of options are checked where the network or the function is known.
        any_key = keys[0] == "model" or "options" in keys[:-1]
        if keys[-1] not in node and not any_key:
            raise ValueError(f"no field {path!r}; {_suggest_field(values, keys, node)}")
        value = _parse_assigned(keys, text, assignment)
        # Another function does not take the options that the recipe had for its own.
        options = node.get("options")
        if keys[-1] == "name" and isinstance(options, dict) and value != node["name"]:
            prefix = path.removesuffix("name") + "options."
            node["options"] = {k: v for k, v in options.items() if prefix + k in given}
        node[keys[-1]] = value
        given.add(path)
    return from_dict(values)


def _suggest_field(values: dict[str, Any], keys: list[str], node: dict[str, Any]) -> str:
    """Return advice for an unknown field: where its name exists, else names near it in `node`."""
    if found := _find_fields(values, keys[-1]):
        return f"did you mean {' or '.join(found)}?"
    of_network = f"; a field of the network is model.{keys[0]}" if len(keys) == 1 else ""
    return f"{suggest(keys[-1], node)}{of_network}"


def _find_fields(values: dict[str, Any], name: str, prefix: str = "") -> list[str]:
    """Return the paths of all fields called `name`; not options, which vary with their function."""
    found = [f"{prefix}{name}"] if prefix and name in values else []
    for key, inner in values.items():
        if isinstance(inner, dict) and key not in ("model", "options"):
            found += _find_fields(inner, name, f"{prefix}{key}.")
    return found


def _parse_assigned(keys: list[str], text: str, assignment: str) -> Any:
    """Return the value of a field from its text.

    The text is YAML. For a field of text only null and quoted text are: every path can be given.
    """
    kind: Any = Recipe
    for key in keys:
        kind = type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
    is_text = kind in (str, str | None)
    if is_text and text[:1] not in ("'", '"') and (kind is str or text not in ("", "null", "~")):
        return text
    try:
        return parse_yaml(text, _cut(assignment))
    except ValueError:
        if not is_text:
            raise
        return text
