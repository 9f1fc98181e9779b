"""A run's model made ready for others: a card for people and for the Hugging Face hub, and the way there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data.autoencoder import open_codec
from mezzotint.data.transforms import to_uint8
from mezzotint.evaluate.results import Evaluation, load_evaluation
from mezzotint.models import CONFIG, README, WEIGHTS, open_model
from mezzotint.process.denoiser import Model
from mezzotint.sampling.sample import sample
from mezzotint.train import log

GRID = "samples.png"
FILES = (
    CONFIG,
    WEIGHTS,
    README,
    GRID,
)  # what goes to the hub; nothing else that lies in the folder
LIMITS = (
    "It draws what its training images hold, with their gaps and prejudices, and may repeat single training images "
    "(`mezzotint evaluate --train-images ... --heldout-images ...` looks for copies).",
    "It was trained at one resolution; other sizes are extrapolation.",
    "Numbers compare only with numbers made under the same protocol (`mezzotint compare`).",
)


@runtime_checkable
class Api(Protocol):
    """The two calls of `huggingface_hub.HfApi` that a push makes."""

    def create_repo(
        self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False
    ) -> Any:
        """Make the repository, or find it."""
        ...

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, allow_patterns: list[str]
    ) -> Any:
        """Send the files of a folder as one commit."""
        ...


def write_card(
    source: str | Path,
    evaluations: Sequence[str | Path] = (),
    licence: str | None = None,
    fresh: bool = False,
) -> Path:
    """Write README.md and samples.png into a run's model folder (or into a model folder); returns that folder.

    Args:
        source: run folder, or folder of `save_model`.
        evaluations: files of `mezzotint evaluate`; those that lie in the run folder are found without being named.
        licence: of the weights, as the hub names it (apache-2.0, cc-by-4.0, other); by default what the model's card
            says, else none is stated.
        fresh: sample the picture anew instead of taking the run's newest grid.

    Errors: ValueError for a folder without a model, and for a file that is no evaluation.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; a card is written for a run or a model folder"
        )
    run = folder if (folder / "recipe.yaml").exists() else None
    model = open_model(folder)
    place = folder / "model" if run else folder
    found = [load_evaluation(path) for path in (*_lying_in(run, model.info.images), *evaluations)]
    recipe = config.from_yaml(run / "recipe.yaml") if run else None
    records = log.read(run / "log.jsonl") if run and (run / "log.jsonl").exists() else []
    grids = sorted((run / "samples").glob("*.png")) if run else []
    if grids and not fresh:
        shutil.copyfile(grids[-1], place / GRID)
        caption = f"The run's fixed seeds and labels after {model.info.images:,} images."
    else:
        caption = draw_samples(model, place / GRID)
    text = card_text(
        model, place.name if not run else folder.name, caption, recipe, records, found, licence
    )
    (place / README).write_text(text, encoding="utf-8")
    return place


def _lying_in(run: Path | None, images: int) -> list[Path]:
    """The evaluations in a run's folder, in the order of their names; of those along the way, the one at `images`."""
    if run is None:
        return []
    along = run / "evaluations" / f"{images}.json"
    files = [*sorted(run.glob("*.json")), *([along] if along.exists() else [])]
    return [p for p in files if '"mezzotint_evaluation"' in p.read_text()]


def draw_samples(model: Model, path: Path, count: int = 16, steps: int = 50) -> str:
    """Sample seeds 0, 1, ... with classes in turn into a PNG; returns a caption."""
    classes = model.info.config.num_classes
    labels = [i % classes for i in range(count)] if classes else None
    made = sample(model, range(count), labels, steps=steps)
    decoder = open_codec(model.info.codec, made.device)
    save_png(make_grid(to_uint8(decoder.decode(made)).cpu()), path)
    return f"Seeds 0 to {count - 1}{', classes in turn' if classes else ''}; DDIM, {steps} steps, no guidance."


def card_text(
    model: Model,
    name: str,
    caption: str,
    recipe: Recipe | None = None,
    records: Sequence[dict[str, Any]] = (),
    evaluations: Sequence[Evaluation] = (),
    licence: str | None = None,
) -> str:
    """The card: Markdown below the hub's YAML header, which `huggingface_hub` writes and checks."""
    card = model.info
    count = sum(p.numel() for p in model.backbone.parameters())
    classes = f", {card.config.num_classes} classes" if card.config.num_classes else ""
    lines = [
        f"# {name}",
        "",
        f"![samples]({GRID})",
        "",
        caption,
        "",
        f"{card.preset or card.backbone} of mezzotint: {count:,} parameters, "
        f"{card.config.size}x{card.config.size}x{card.config.channels} in {card.codec}{classes}; "
        f"{card.images:,} training images seen.",
        "",
        "```python",
        "import mezzotint as mz",
        "",
        f'model = mz.load_model("OWNER/{name}")',
        "images = mz.sample(model, seeds=range(4), steps=50)  # in [-1, 1]"
        if card.codec == "pixels"
        else "latents = mz.sample(model, seeds=range(4), steps=50)",
        "```",
        "",
        *_training(recipe, records),
        *_numbers(evaluations),
        "## Licence and limits",
        "",
        f"Licence of the weights: {licence or card.licence or 'not stated; ask whoever trained them'}.",
        "",
        *[f"- {limit}" for limit in LIMITS],
        "",
        "## The network",
        "",
        *[f"- {field}: {value}" for field, value in dataclasses.asdict(card.config).items()],
        f"- schedule: {card.schedule}",
        *([f"- labels: {', '.join(card.labels)}"] if card.labels else []),
    ]
    return (
        f"---\n{header(model, name, recipe, evaluations, licence)}\n---\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _training(recipe: Recipe | None, records: Sequence[dict[str, Any]]) -> list[str]:
    if recipe is None:
        return []
    o, time = recipe.optim, recipe.time
    last = [r for r in records if "loss" in r][-1:]
    return [
        "## Training",
        "",
        f"- data: {Path(recipe.data.source).name}",
        f"- length: {recipe.images:,} images in batches of {recipe.batch}",
        f"- loss: {recipe.objective}, noise levels {time.sampling} in {time.loss_measure}",
        f"- optimiser: {o.name}, learning rate {o.lr:g}, betas {o.betas}, weight decay {o.weight_decay:g}",
        f"- averaging: half-life of {recipe.ema.half_life_images:g} images",
        f"- precision: {recipe.engine.precision}; seed {recipe.seed}",
        *[
            f"- loss over the last {recipe.log_every_images:,} images: {r['loss']:.4g}"
            for r in last
        ],
        "",
        "<details><summary>The whole recipe</summary>",
        "",
        "```yaml",
        config.to_yaml(
            dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=""))
        ).rstrip(),
        "```",
        "",
        "</details>",
        "",
    ]


def _numbers(evaluations: Sequence[Evaluation]) -> list[str]:
    if not evaluations:
        return ["## Numbers", "", "None: this model was not evaluated.", ""]
    lines = ["## Numbers", ""]
    for evaluation in evaluations:
        lines += ["| metric | value | features | reference |", "|---|---|---|---|"]
        for n in evaluation.numbers:
            bounds = (
                f" ({n.low:.5g} to {n.high:.5g})"
                if n.low is not None and n.high is not None
                else ""
            )
            against = (
                f"{n.reference.get('name')} ({str(n.reference.get('hash'))[:12]})"
                if n.reference
                else ""
            )
            lines.append(
                f"| {n.metric} | {n.value:.5g}{bounds} | {n.features.get('name', '')} | {against} |"
            )
        stated = {k: v for k, v in dataclasses.asdict(evaluation.protocol).items() if v is not None}
        words = "; ".join(f"{k}: {Path(v).name if k == 'source' else v}" for k, v in stated.items())
        lines += ["", f"Protocol: {words}.", ""]
    return lines


def header(
    model: Model,
    name: str,
    recipe: Recipe | None,
    evaluations: Sequence[Evaluation],
    licence: str | None,
) -> str:
    """The hub's metadata as YAML: licence, library, tags, and every number with its data set."""
    from huggingface_hub import EvalResult, ModelCardData

    card = model.info
    data = Path(recipe.data.source).name if recipe else "unknown"
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data,
            dataset_name=str((n.reference or {}).get("name", data)),
            metric_type=n.metric.lower(),
            metric_name=n.metric,
            metric_value=round(n.value, 6),
        )
        for evaluation in evaluations
        for n in evaluation.numbers
    ]
    stated = licence or card.licence
    known = stated if stated and " " not in stated else ("other" if stated else None)
    values = ModelCardData(
        license=known,
        license_name=None if known == stated else stated,
        library_name="mezzotint",
        pipeline_tag="unconditional-image-generation",
        tags=["mezzotint", "diffusion", card.backbone],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return values.to_yaml()


def push_to_hub(
    folder: str | Path, repo: str, private: bool = False, api: Api | None = None
) -> str:
    """Send a model folder to a repository of the Hugging Face hub, made if it is not there; returns where it is.

    The model's four files go there and nothing else. Who you are is known from `hf auth login` or $HF_TOKEN.

    Args:
        repo: "owner/name". api: stands for the hub.

    Errors: ValueError for a folder that holds no model, for a name that is none, offline, and where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS, README) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}; push what save_model or `mezzotint card` wrote"
        )
    if "mezzotint" not in json.loads((folder / CONFIG).read_text()):
        raise ValueError(f"{folder / CONFIG} belongs to another library")
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} names no owner and repository; give owner/name")
    try:
        validate_repo_id(repo)
        hub = api or HfApi()
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Weights and card, by mezzotint",
            allow_patterns=list(FILES),
        )
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository: {error}") from None
    except LocalTokenNotFoundError:
        raise ValueError(
            "the hub does not know you: run `hf auth login` or set HF_TOKEN, then push again"
        ) from None
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # each HTTP client that the hub's library has used has errors of its own
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the hub did not take {folder}: {first}. The folder is complete; push it again when there is a network "
            "(and HF_HUB_OFFLINE is not set), or send it by hand"
        ) from None
    return str(getattr(done, "commit_url", f"https://huggingface.co/{repo}"))
