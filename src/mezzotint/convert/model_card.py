"""Model cards: the README.md of a trained model, and its upload to the Hugging Face hub."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.core.boxed import boxed_folder
from mezzotint.core.file_hashes import HASHES, add_hashes
from mezzotint.core.files import atomic_write, check_replaceable, read_json
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.core.text import (
    escape_markdown,
    escape_name,
    fence,
    hide_folders,
    hide_local,
    last_component,
)
from mezzotint.data.autoencoder import open_codec
from mezzotint.data.transforms import to_uint8
from mezzotint.evaluate.results import Evaluation, Number, load_evaluation
from mezzotint.models import CONFIG, README, WEIGHTS, ModelInfo, find_tuned, open_model, readme
from mezzotint.process.denoiser import Model
from mezzotint.sampling.sample import sample
from mezzotint.sampling.tuned import FIELDS, WIDTH, describe_tuned, read_tuned, tuned_section
from mezzotint.train import log
from mezzotint.train.report import public_recipe
from mezzotint.train.run_folder import run_lock

GRID = "samples.png"
# What is uploaded; any other file in the folder stays where it is.
FILES = (CONFIG, WEIGHTS, README, GRID)


@runtime_checkable
class Hub(Protocol):
    """The two calls of `huggingface_hub.HfApi` that `push_to_hub` makes."""

    def create_repo(
        self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False
    ) -> Any:
        """Create the repository, unless it exists."""
        ...

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, allow_patterns: list[str]
    ) -> Any:
        """Upload the files of a folder as one commit."""
        ...


def write_card(
    source: str | Path,
    evaluations: Sequence[str | Path] = (),
    licence: str | None = None,
    fresh: bool = False,
) -> Path:
    """Write README.md and samples.png into a run's model folder, or into a model folder.

    Of a run that was tuned (`mezzotint tune`) this is RUN/tuned, else RUN/model.

    Args:
        source: run folder, or folder of `save_model`.
        evaluations: files of `mezzotint evaluate`; those in the run folder are found by themselves.
        licence: of the weights, as the hub names it (apache-2.0, cc-by-4.0, other); None takes the
            one in the model's config.json.
        fresh: sample new images instead of copying the run's newest grid.

    Returns:
        the model folder.

    Errors: ValueError for a folder without a model, a run that is being trained, a file that is no
        evaluation, and a samples.png that no card has written.
    """
    folder = Path(source)
    if boxed_folder(source) is not None:
        raise ValueError(f"{source} is in the box and has its card; give a run or model folder")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a run folder or a model folder")
    run = folder if (folder / "recipe.yaml").exists() else None
    with run_lock(folder) if run else nullcontext():  # training replaces model/ with every save
        return _write_card(folder, run, evaluations, licence, fresh)


def _write_card(
    folder: Path,
    run: Path | None,
    evaluations: Sequence[str | Path],
    licence: str | None,
    fresh: bool,
) -> Path:
    model = open_model(folder, tuned=True)
    tuned = find_tuned(folder)
    target = tuned or (folder / "model" if run else folder)
    paths = (*_find_evaluations(run, model.info), *evaluations)
    numbers = [load_evaluation(path) for path in paths]
    recipe = config.from_yaml(run / "recipe.yaml") if run else None
    records = log.read(run / "log.jsonl") if run and (run / "log.jsonl").exists() else []
    of_training = run if tuned is None else None  # its grids know nothing of tuned settings
    grids = sorted((of_training / "samples").glob("*.png")) if of_training else []
    grids = [path for path in grids if path.is_file()]
    check_replaceable(target / GRID, lambda path: _is_grid(path, grids), "a grid of a card")
    if grids and not fresh:
        atomic_write(target / GRID, grids[-1].read_bytes())
        caption = f"The run's fixed seeds and labels after {model.info.images:,} images."
    else:
        caption = save_sample_grid(model, target / GRID)
    text = card_text(
        model,
        folder.name,
        caption,
        recipe,
        records,
        numbers,
        licence,
    )
    atomic_write(target / README, text)
    return target


def _is_grid(path: Path, grids: Sequence[Path]) -> bool:
    """Return whether a card has written the image: it shows it, or it is a grid of the run."""
    content = path.read_bytes()
    shown = f"({GRID})" in (path.with_name(README)).read_text(encoding="utf-8")
    return shown or any(grid.read_bytes() == content for grid in grids)


def _find_evaluations(run: Path | None, info: ModelInfo) -> list[Path]:
    """Return the run folder's evaluation files, and those that training made of these weights."""
    if run is None:
        return []
    kinds = () if "ema_width" in info.extra else ("", "-bits-per-dim")
    at_the_end = [run / "evaluations" / f"{info.images}{kind}.json" for kind in kinds]
    files = [*sorted(run.glob("*.json")), *(path for path in at_the_end if path.exists())]
    return [p for p in files if p.is_file() and b'"mezzotint_evaluation"' in p.read_bytes()]


def save_sample_grid(model: Model, path: Path, count: int = 16, steps: int | None = None) -> str:
    """Sample seeds 0, 1, ... with classes in turn into a PNG, and return a caption.

    Sampler, guidance and, where `steps` is None, steps are the model's own, or DDIM with 50 steps.
    """
    classes = model.info.config.num_classes
    labels = [i % classes for i in range(count)] if classes else None
    samples = sample(model, range(count), labels, steps=steps)
    decoder = open_codec(model.info.codec, samples.device)
    save_png(make_grid(to_uint8(decoder.decode(samples)).cpu()), path)
    in_turn = ", classes in turn" if classes else ""
    tuned, how = read_tuned(model.info), f"DDIM, {steps or 50} steps, no guidance"
    if tuned is not None:
        tuned = dataclasses.replace(tuned, steps=steps or tuned.steps)
        how = describe_tuned(tuned, FIELDS if labels else (*tuned.fields(guided=False), WIDTH))
    return f"Seeds 0 to {count - 1}{in_turn}; {how}."


def card_text(
    model: Model,
    name: str,
    caption: str,
    recipe: Recipe | None = None,
    records: Sequence[dict[str, Any]] = (),
    evaluations: Sequence[Evaluation] = (),
    licence: str | None = None,
    source: str | None = None,
) -> str:
    """Return the card: `mezzotint.models.readme` with images, training and evaluations added.

    Args:
        source: what a reader loads; by default OWNER/name, as on the hub.
    """
    return readme(
        model,
        name=name,
        source=source or f"OWNER/{name}",
        licence=licence,
        header=_hub_metadata(model, name, recipe, evaluations, licence),
        introduction=[f"![samples]({GRID})", "", caption, ""],
        sections=[
            *tuned_section(model.info),
            *_training_section(recipe, records),
            *_evaluation_section(evaluations),
        ],
    )


def _training_section(recipe: Recipe | None, records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines on how the model was trained, with the whole recipe."""
    if recipe is None:
        return []
    o, time = recipe.optim, recipe.time
    last = [r for r in records if "loss" in r][-1:]
    return [
        "## Training",
        "",
        f"- data: {escape_markdown(last_component(recipe.data.source))}",
        f"- length: {recipe.images:,} images in batches of {recipe.batch}",
        f"- loss: {escape_markdown(recipe.objective)}, "
        f"noise levels {time.sampling} in {time.loss_measure}",
        f"- optimiser: {o.name}, learning rate {o.lr:g}, betas {o.betas}, "
        f"weight decay {o.weight_decay:g}",
        f"- averaging: half-life of {recipe.ema.half_life_images:g} images",
        f"- precision: {recipe.engine.precision}; seed {recipe.seed} of {recipe.stream}",
        *[
            f"- loss over the last {recipe.log_every_images:,} images: {r['loss']:.4g}"
            for r in last
        ],
        "",
        "<details><summary>The whole recipe</summary>",
        "",
        *fence(public_recipe(recipe), "yaml"),
        "",
        "</details>",
        "",
    ]


def _evaluation_section(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return one table of numbers per evaluation, each with the protocol behind it."""
    if not evaluations:
        return ["## Numbers", "", "None: this model was not evaluated.", ""]
    lines = ["## Numbers", ""]
    for evaluation in evaluations:
        lines += ["| metric | value | features | reference |", "|---|---|---|---|"]
        lines += [_number_row(number) for number in evaluation.numbers]
        values = {k: v for k, v in dataclasses.asdict(evaluation.protocol).items() if v is not None}
        values["source"] = last_component(values["source"])
        shown = hide_folders(values)
        protocol = "; ".join(f"{key}: {escape_markdown(value)}" for key, value in shown.items())
        lines += ["", f"Protocol: {protocol}.", ""]
    return lines


def _number_row(n: Number) -> str:
    interval = ""
    if n.low is not None and n.high is not None:
        interval = f" ({n.low:.5g} to {n.high:.5g})"
    reference = ""
    if n.reference:
        reference = f"{_reference_name(n)} ({str(n.reference.get('hash'))[:12]})"
    features = hide_folders(n.features.get("name", ""))
    metric, features, reference = map(escape_markdown, (n.metric, features, reference))
    return f"| {metric} | {n.value:.5g}{interval} | {features} | {reference} |"


def _reference_name(n: Number) -> str | None:
    """Return the last component of a number's reference, or of the held-out one."""
    values = n.reference or {}
    name = values.get("name") or values.get("heldout")
    return None if name is None else last_component(name)


def _hub_metadata(
    model: Model,
    name: str,
    recipe: Recipe | None,
    evaluations: Sequence[Evaluation],
    licence: str | None,
) -> str:
    """Return the hub's metadata as YAML: licence, library, tags, every number with its dataset."""
    from huggingface_hub import EvalResult, ModelCardData

    info = model.info
    data = escape_name(last_component(recipe.data.source)) if recipe else "unknown"
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data,
            dataset_name=escape_name(_reference_name(n) or data),
            metric_type=escape_name(n.metric.lower()),
            metric_name=escape_name(n.metric),
            metric_value=round(n.value, 6),
        )
        for evaluation in evaluations
        for n in evaluation.numbers
    ]
    stated = licence or info.licence
    stated = stated and escape_name(stated)
    known = stated if stated and " " not in stated else ("other" if stated else None)
    values = ModelCardData(
        license=known,
        license_name=None if known == stated else stated,
        library_name="mezzotint",
        pipeline_tag="unconditional-image-generation",
        tags=["mezzotint", "diffusion", info.backbone],
        model_name=escape_name(name) if results else None,
        eval_results=results or None,
    )
    return values.to_yaml()


@contextmanager
def _without_local_paths(folder: Path) -> Iterator[Path]:
    """Yield the folder, or a copy if its config.json names a local codec or text encoder.

    In the copy only the last component of their paths is left; it links to the other files.
    """
    values = read_json(folder / CONFIG)
    public: dict[str, Any] = copy.deepcopy(values)
    hashes = public.pop(HASHES, {"files": {}})
    public["codec"] = hide_local(public.get("codec", "pixels"))
    if text := public.get("extra", {}).get("text"):
        text["encoder"] = hide_local(text["encoder"])
    if public == {k: v for k, v in values.items() if k != HASHES}:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in (WEIGHTS, README, GRID):
            if (folder / name).is_file():
                (Path(temporary) / name).symlink_to((folder / name).resolve())
        text = json.dumps(add_hashes(public, hashes["files"]), indent=2)
        (Path(temporary) / CONFIG).write_text(text + "\n")
        yield Path(temporary)


def push_to_hub(
    folder: str | Path, repo: str, private: bool = False, hub: Hub | None = None
) -> str:
    """Upload a model folder to a repository of the Hugging Face hub, created if it does not exist.

    The model's four files are uploaded and nothing else. The hub knows you from `hf auth login` or
    $HF_TOKEN.

    Args:
        repo: "owner/name". hub: takes the place of `huggingface_hub.HfApi` in tests.

    Returns:
        the address of the commit.

    Errors: ValueError for a folder without a model, a name that is not owner/name, offline, and
    where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, README) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; "
            "push a folder of save_model or of `mezzotint card`"
        )
    if "mezzotint" not in read_json(folder / CONFIG):
        raise ValueError(f"{folder / CONFIG} belongs to another library")
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} must be owner/name")
    try:
        validate_repo_id(repo)
        hub = hub or HfApi()
        hub.create_repo(repo, private=private, exist_ok=True)
        with _without_local_paths(folder) as public:
            commit = hub.upload_folder(
                repo_id=repo,
                folder_path=public,
                commit_message="Weights and card, by mezzotint",
                allow_patterns=list(FILES),
            )
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is not a valid repository name: {error}") from None
    except LocalTokenNotFoundError:
        raise ValueError(
            "you are not logged in to the hub: run `hf auth login` or set HF_TOKEN, then push again"
        ) from None
    except ValueError:
        raise
    # Each HTTP client that huggingface_hub has used raises errors of its own.
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the hub did not accept {folder}: {first}. The folder is complete; push it again when "
            "there is a network (and HF_HUB_OFFLINE is not set), or upload it by hand"
        ) from None
    return str(getattr(commit, "commit_url", f"https://huggingface.co/{repo}"))
