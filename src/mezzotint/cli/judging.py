"""Commands that measure: images against real ones, networks against the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mezzotint.cli.words import File, Given, Switch, Word


def evaluate(
    source: Positional[Annotated[str, arg(metavar="SOURCE", help_behavior_hint="")]] = "",
    /,
    *,
    reference: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = "",
    maker: Word = None,
    make_reference: Annotated[tuple[str, Path] | None, arg(metavar="DATA OUT", help_behavior_hint="")] = None,
    features: tuple[str, ...] = ("inception-2048", "inception-sfid", "inception-logits"),
    weights: File = None,
    heldout: Word = None,
    n: Annotated[int, arg(aliases=["-n"])] = 50_000,
    size: Given = None,
    channels: int = 3,
    protocol: Word = None,
    sampler: Word = None,
    steps: Given = None,
    guidance: Word = None,
    train_images: Word = None,
    heldout_images: Word = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("evaluation.json"),
) -> None:
    """Judge a model, a folder of images or an .npz against a reference; every number comes with its card.

    Args:
        source: Run or model folder, hub name, folder or .zip of PNGs, prepared set, or .npz with arr_0.
        reference: Statistics of real images: ours, or an .npz/.pkl of ADM, EDM, EDM2, pytorch-fid, clean-fid.
        maker: Of a reference of bare mu and sigma: adm, edm, pytorch-fid or clean-fid.
        make_reference: DATA OUT: take the statistics of real images instead, with --size to resize them.
        features: Sets of features, e.g. inception-2048 (FID), inception-768, dinov2, digits.
        weights: Of the features' network; by default the cache, or a download with a pinned hash.
        heldout: A second reference, of real images not trained on: FDr.
        n: Samples to draw of a model.
        size: Height and width real images are cropped and resized to; finished images are taken as they are.
        channels: 3, or 1 for grey.
        protocol: Of sampling, as in `mezzotint sample`; so are sampler, steps and guidance.
        sampler: Of a model.
        steps: Of a model's sampler.
        guidance: Of a model.
        train_images: With --heldout-images: nearest training images beside samples, and a copy rate.
        heldout_images: Real images not trained on.
        out: Where the card goes; pieces of an interrupted evaluation lie beside it.
    """
    from mezzotint.evaluate import references, run
    from mezzotint.evaluate.features import open_features
    from mezzotint.evaluate.of_model import real_images, samples_of

    # What is asked for is looked at before a network is opened, which may take a download.
    if make_reference is not None:
        pictures = real_images(make_reference[0], size, channels)
        made = references.make_reference(pictures, make_reference[1], open_features(features, weights))
        print(f"{make_reference[1]}: {', '.join(made.statistics)}, hash {made.hash}")
        return
    if not source or not reference:
        raise ValueError("give what to judge and --reference FILE; --make-reference DATA FILE makes one")
    if (train_images is None) != (heldout_images is None):
        raise ValueError("copies are looked for with both --train-images and --heldout-images; give both or neither")
    real = references.read_reference(reference, maker)
    against = None if heldout is None else references.read_reference(heldout, maker)
    path = Path(source)
    of_a_model = any((path / name).exists() for name in ("config.json", "model", "recipe.yaml"))
    if path.suffix in (".npz", ".zip") or (path.is_dir() and not of_a_model):
        judged = real_images(source, None, channels)
    else:
        from mezzotint import protocols as words
        from mezzotint.produce import job_for

        given = {"steps": steps, "sampler": sampler and words.parse_sampler(sampler)}
        given["guidance"] = guidance and words.parse_guidance(guidance)
        judged = samples_of(job_for(source, {k: v for k, v in given.items() if v}, protocol=protocol), n)
    sets = open_features(features, weights)
    real = references.completed(real, sets)
    found = run.evaluate(judged, real, sets, heldout=against, folder=out.with_suffix(".pieces"), show=True)
    found.save(out)
    run.print_evaluation(found)
    print(f"card: {out}")
    if train_images is not None and heldout_images is not None:
        shown = [real_images(images, size, channels) for images in (train_images, heldout_images)]
        copied = run.copies_against(judged, shown[0], shown[1], sets[0], out.with_suffix(".copies.png"))
        print(f"copies: {copied}; sheet {out.with_suffix('.copies.png')}")


def compare(first: Positional[Path], second: Positional[Path], /, *, anyway: bool = False) -> None:
    """Compare two evaluations; refused where their cards differ in how the numbers were made.

    Args:
        first: evaluation.json.
        second: evaluation.json.
        anyway: Print the numbers all the same, the differing lines in red.
    """
    from mezzotint.evaluate import card

    a, b = card.load_evaluation(first), card.load_evaluation(second)
    card.print_comparison(a, b, card.compare(a, b) if anyway else card.require_alike(a, b))


def reproduce(
    name: Positional[str],
    /,
    *,
    model: Word = None,
    reference: Word = None,
    n: Annotated[int, arg(aliases=["-n"])] = 50_000,
    steps: Given = None,
    features: tuple[str, ...] = ("inception-2048", "inception-sfid", "inception-logits"),
    weights: File = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("runs/reproduce"),
    dry_run: bool = False,
) -> None:
    """A paper's claim, what it needs, and the whole protocol: samples, features, claimed beside measured.

    Args:
        name: dimr-xl-2r-256, dimr-g-2r-256, dimr-xl-3r-512, diffit-256, diffit-512, uvit-256 or uvit-512.
        model: Model folder of the weights (mezzotint convert makes it from the authors' file).
        reference: File of real statistics; the printed table says which.
        n: Images; the papers judge 50,000.
        steps: Fewer than the protocol's, for a rehearsal; the card says so.
        features: Other sets than the papers', for a rehearsal.
        weights: Of the features' network.
        out: Folder for pieces and the card.
        dry_run: Print claim, needs and price; run nothing.
    """
    from mezzotint.recipes.reproduce import reproduce as run

    run(
        name, model=model, reference=reference, n=n, steps=steps, features=features, weights=weights, out=out,
        dry_run=dry_run,
    )  # fmt: skip


def info(preset: Positional[str] = "", /, *, json: bool = False) -> None:
    """List every published size with parameters and multiply-accumulates, counted and claimed.

    Args:
        preset: Show this one's layers by resolution instead of the table.
        json: One JSON object per preset, for programs.
    """
    from json import dumps

    from rich.console import Console

    from mezzotint import info as counts

    if json:
        for row in [counts.describe(preset)] if preset else counts.table():
            print(dumps(row))
    elif preset:
        Console().print(counts.render_layers(preset, counts.layers(preset)))
    else:
        Console().print(counts.render_table(counts.table()))


def plan(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    gpus: int = 1,
    batch: Given = None,
    device: str = "h200",
    strategy: Literal["ddp", "fsdp"] | None = None,
    precision: Literal["float32", "bf16"] | None = None,
    checkpointing: Literal["none", "selective", "full"] | None = None,
    efficiency: float | None = None,
    json: Switch = False,
) -> None:
    """Say what a recipe will need: memory per rank, the largest batch that fits, step time, days, FLOP.

    Args:
        preset: Network and recipe, as for train.
        overrides: Fields of the recipe, e.g. model.size=128 engine.microbatch=32.
        gpus: Ranks, one process each.
        batch: Images per step over all ranks; the recipe's own by default.
        device: h200, b200, h100, a100, a100-40gb, l40s, rtx4090 or cpu.
        strategy: Which of the two to judge; both are shown.
        precision: Of the forward and backward pass.
        checkpointing: Of activations; every way is shown.
        efficiency: Part of the device's ceiling that a step reaches, 0 to 1; 0.35 by default.
        json: One JSON object, for programs.
    """
    from json import dumps

    from rich.console import Console

    from mezzotint import config
    from mezzotint import plan as planning
    from mezzotint.recipes import recipe_for

    asked = {"batch": batch, "engine.strategy": strategy, "engine.precision": precision}
    asked["engine.checkpointing"] = checkpointing
    named = [f"{k}={v}" for k, v in asked.items() if v is not None]
    recipe = config.override(recipe_for(preset), [*overrides, *named])
    answer = planning.plan(
        recipe, gpus=gpus, device=device, efficiency=planning.EFFICIENCY if efficiency is None else efficiency
    )
    if json:
        print(dumps(answer))
    else:
        Console().print(planning.render(answer))


def bench(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    train: bool = False,
    sample: bool = False,
    batch: int = 8,
    precision: Literal["float32", "bf16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: bool = False,
    checkpointing: Literal["none", "selective", "full"] = "none",
    graphs: bool = False,
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Measure a preset here: throughput, latency, peak memory, and the share of this machine's matrix-product rate.

    Args:
        preset: Network, e.g. dimr-xl-2r-256; its recipe's loss is trained.
        overrides: Fields of its config, e.g. size=64 num_classes=10.
        train: Measure a training step; without --train and --sample both are.
        sample: Measure a guided network call.
        batch: Images per step or call.
        precision: float32, or bf16 autocast over float32 weights.
        device: auto is the GPU where there is one.
        compile: torch.compile of each repeated block.
        checkpointing: What is computed again in the backward pass: nothing, what is cheap, or each block.
        graphs: Replay sampling from CUDA graphs.
        rounds: Measured repetitions; the median counts.
        json: One JSON object per measurement, for programs.
    """
    from json import dumps

    import torch
    from rich.console import Console

    from mezzotint import bench as measure
    from mezzotint import config
    from mezzotint.recipes import recipe_for

    recipe = config.override(recipe_for(preset), [f"model.{o}" for o in overrides])
    settings = measure.Settings(
        preset=preset,
        overrides=recipe.model,
        batch=batch,
        precision=precision,
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        compile=compile,
        checkpointing=checkpointing,
        graphs=graphs,
        rounds=rounds,
        objective=recipe.objective,
    )
    modes: list[Literal["train", "sample"]] = []
    if train or not sample:
        modes.append("train")
    if sample or not train:
        modes.append("sample")
    rows = [measure.bench(settings, mode) for mode in modes]
    if json:
        for row in rows:
            print(dumps(row))
        return
    Console().print(measure.render(rows))
