"""The command line. Every command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from mezzotint.config import Recipe


def demo(out: Path = Path("runs/demo"), images: int = 0, seed: int = 0) -> None:
    """Train a tiny class-conditional network on real handwritten digits (about 3 minutes on 2 CPU cores), then count
    how many of 500 samples a small classifier reads as the digit that was asked for.

    Args:
        out: Run folder; it is started anew each time.
        images: Training length in images; 0 for the demo's own.
        seed: Of every random draw.
    """
    from mezzotint.recipes.demo import run_demo

    run_demo(out, images or None, seed)


def train(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    data: Annotated[str, arg(aliases=["-d"])] = "",
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    recipe: Path | None = None,
    init_from: str | None = None,
    dry_run: bool = False,
) -> None:
    """Train a preset on your images. The same command again resumes. Progress counts images seen.

    Args:
        preset: Network and recipe, e.g. unet-tiny or uvit-256 (`mezzotint info` lists them).
        overrides: Fields of the recipe, e.g. images=2e6 batch=64 optim.lr=3e-4 model.size=64.
        data: Folder, zip, prepared set, parquet, hub name, or the built-in "digits" or "shapes:64".
        out: Run folder; runs/PRESET by default.
        recipe: Start from this recipe.yaml instead of the preset's own recipe.
        init_from: Start from the weights of this model folder, other sizes or classes allowed.
        dry_run: Print the resolved recipe, its differences from the paper and the plan for this device; train nothing.
    """
    from mezzotint import config
    from mezzotint.recipes import difference, recipe_for
    from mezzotint.train.loop import train as run

    chosen = config.from_yaml(recipe) if recipe else recipe_for(preset)
    if chosen.preset != preset:
        raise ValueError(f"{recipe} is a recipe for {chosen.preset}, not {preset}; name that preset")
    if data:
        chosen = config.override(chosen, [f"data.source={data!r}"])
    chosen = config.override(chosen, overrides)
    if dry_run:
        print(config.to_yaml(chosen))
        print(difference(chosen))
        print_plan(chosen)
        return
    if not chosen.data.source:
        raise ValueError("no data given; add --data FOLDER, a zip, a hub name, or the built-in --data digits")
    initialise = None
    if init_from is not None:
        from mezzotint.convert.surgery import start_from

        initialise = start_from(init_from)
    folder = run(chosen, out or Path("runs") / preset, initialise=initialise)
    print(f"done: {folder}/model holds the averaged weights, {folder}/samples the grids")
    print(f"next: mezzotint sample {folder} --n 16 --out samples.png")


def print_plan(recipe: Recipe) -> None:
    """What one process on this machine's device needs for the recipe, with a pointer to more."""
    from rich.console import Console

    from mezzotint.plan import here, plan, render

    if (device := here()) is not None:
        Console().print(render(plan(recipe, device=device, compare=False)))
    print(f"more: mezzotint plan {recipe.preset} --gpus N --device NAME")


# Without tyro's "{None}|STR" and "(default: None)", which would double the length of the help.
Word = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int, arg(metavar="N", help_behavior_hint="")]
Given = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Picture = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help_behavior_hint="")]]


def sample(
    model: Positional[Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]],
    /,
    *,
    out: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="")] = Path("samples.png"),
    n: Annotated[Count, arg(aliases=["-n"])] = 16,  # torchrun takes --n for one of its own
    seed: Count = 0,
    label: Annotated[tuple[str, ...], arg(metavar="[A B ...]", help_behavior_hint="")] = (),
    label_law: Word = None,
    text: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], arg(metavar="WORDS", help_behavior_hint="")]] = (),
    prompts: Picture = None,
    encoder: Word = None,
    protocol: Word = None,
    sampler: Word = None,
    grid: Word = None,
    steps: Given = None,
    guidance: Word = None,
    guide: Word = None,
    clip: Word = None,
    size: Word = None,
    dtype: Word = None,
    batch: Given = None,
    codec: Word = None,
    latents: Switch = False,
    overwrite: Switch = False,
    trajectory: Switch = False,
    interpolate: Given = None,
    image: Picture = None,
    image_logsnr: Annotated[float | None, arg(metavar="L", help_behavior_hint="")] = None,
    mask: Picture = None,
) -> None:
    """Sample images from a run, a model folder or a hub repository. The same command resumes; torchrun shares.

    Args:
        model: Run folder, model folder or hub name.
        out: FILE.png (one grid, the default), a folder of PNGs, .npz (ADM's), .tar.
        n: Number of images; 16 by default.
        seed: Number of the first image, 0 by default; each depends on its own alone.
        label: Class names or numbers to choose from; all by default.
        label_law: turn (default), random, or balanced: 50 in a row.
        text: What to show, for a model that reads text; --text may be repeated, they are taken in turn.
        prompts: A file of such, one a line.
        encoder: Folder of the text encoder, if it moved.
        protocol: simple-diffusion-512steps, diffit-256, diffit-512, dimr-256, adm, edm2.
        sampler: With options: ddim (default), ddim:eta=0.5, heun:s_churn=40.
        grid: even, even_logsnr, karras:rho=5, respaced; by default the family's.
        steps: Of the grid; 50 by default.
        guidance: dit_s=1.5 (or 1.5), simple_diffusion_w=0.1, dimr_s=0.4; and low=-3,high=5 (log-SNR), power=4,
            channels=3.
        guide: A weaker model to guide away from (autoguidance).
        clip: none (default), static, dynamic:quantile=0.995.
        size: Of the network's input: 64, or 48x64 (height first).
        dtype: float32 (default), bfloat16, float16.
        batch: Images per network call; 64 by default.
        codec: Autoencoder to decode with; by default the model's.
        latents: Write latents (.npz), not images.
        overwrite: Replace what exists or has other settings.
        trajectory: The way to each image: filmstrip and GIF.
        interpolate: So many frames from each seed to the next.
        image: Start from this picture noised to --image-logsnr.
        image_logsnr: Lower forgets more of it.
        mask: Paint only where this picture is white.
    """
    from mezzotint import protocols as words
    from mezzotint.produce import job_for, produce
    from mezzotint.prompts import prompts_from

    given = {
        "sampler": None if sampler is None else words.parse_sampler(sampler),
        "grid": None if grid is None else words.parse_grid(grid),
        "steps": steps,
        "guidance": None if guidance is None else words.parse_guidance(guidance),
        "size": None if size is None else words.parse_size(size),
        "dtype": dtype,
        "batch": batch,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    if clip is not None:
        changes["clip"] = words.parse_clip(clip)
    job = job_for(
        model, changes, protocol=protocol, labels=label, label_law=label_law, guide=guide, codec=codec, latents=latents,
        texts=(*text, *(prompts_from(prompts) if prompts else ())), encoder=encoder,
    )  # fmt: skip
    if trajectory or interpolate is not None or image is not None or mask is not None or image_logsnr is not None:
        from mezzotint.looking import look

        written = look(
            job, out, n, seed, film=trajectory, frames=interpolate, picture=image, logsnr=image_logsnr, mask=mask
        )
    else:
        written = [produce(job, out, n, seed, overwrite)]
    print(f"{n} images, {job.calls} network calls each:", *written)


def prepare(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    size: int,
    crop: Literal["adm", "plain"] = "adm",
    codec: str = "pixels",
    text: str = "",
) -> None:
    """Resize a folder, zip or hub data set once into a memory-mapped set that training reads without decoding.

    With --codec, write latents of the pictures and of their mirror images instead. That resumes when the same command
    is given again, and torchrun shares it over processes.

    Args:
        source: Folder of images (class subfolders or flat), zip, parquet or hub name.
        out: Folder to write; appears only when complete.
        size: Height and width in pixels.
        crop: adm (halve with BOX, bicubic, centre; as the papers) or plain (one antialiased resize, centre).
        codec: sd-vae-ft-ema, sd-vae-ft-mse, taesd, or any autoencoder of diffusers by folder or hub name.
        text: T5 encoder that embeds the captions now rather than when training starts.
    """
    from mezzotint.data.audit import describe
    from mezzotint.data.prepare import prepare as run
    from mezzotint.data.prepare import prepare_latents, prepare_words

    if codec == "pixels":
        print(describe(run(source, out, size=size, crop=crop)))
    else:
        print(prepare_latents(source, out, size, codec, crop=crop))
    if text:
        print("\n".join(prepare_words(out, text)))


def prefetch(
    what: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    only_list: Annotated[Switch, arg(name="list")] = False,
) -> None:
    """List and fetch what a recipe needs from elsewhere (autoencoder, text encoder), with sizes and hashes.

    It lands in $MEZZOTINT_CACHE (or ~/.cache/mezzotint); copy that folder to a machine without network.

    Args:
        what: A preset, a recipe.yaml, or the name of an autoencoder or text encoder.
        overrides: Fields of the recipe, e.g. data.text=google-t5/t5-small.
        only_list: Fetch nothing.
    """
    from mezzotint import config, models
    from mezzotint.prefetch import needs_for
    from mezzotint.prefetch import prefetch as run
    from mezzotint.recipes import recipe_for

    recipe = None
    if Path(what).suffix in (".yaml", ".yml") or what in models.presets():
        recipe = recipe_for(what) if what in models.presets() else config.from_yaml(what)
        recipe = config.override(recipe, overrides)
    print(run(needs_for(what, recipe), only_list))


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


def convert(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: Literal["mezzotint", "official"] = "mezzotint",
    family: str | None = None,
    hint: tuple[str, ...] = (),
    check: bool = False,
) -> None:
    """Convert an official checkpoint of DiMR or DiffiT to a model folder, or a model folder back, bitwise.

    Args:
        source: Official .safetensors or .pth file, or a model folder for --to official.
        out: Model folder to write, or the official file.
        to: Direction.
        family: dimr or diffit; recognised by its keys by default.
        hint: What shapes cannot tell, e.g. heads=16 (docs/checkpoints.md lists them).
        check: Read the result back, convert it back and compare every tensor bit for bit.
    """
    import yaml

    from mezzotint.convert import convert as run

    pairs = [h.partition("=") for h in hint]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"hint {name!r} is not of the form name=value, e.g. heads=16")
    hints = {name: yaml.safe_load(value) for name, _, value in pairs}
    for line in run(source, out, to=to, check=check, family=family, hints=hints):
        print(line)


def evaluate(
    source: Positional[str] = "",
    /,
    *,
    reference: str = "",
    maker: str | None = None,
    make_reference: tuple[str, Path] | None = None,
    features: tuple[str, ...] = ("inception-2048", "inception-sfid", "inception-logits"),
    weights: Path | None = None,
    heldout: str | None = None,
    n: int = 50_000,
    size: int | None = None,
    channels: int = 3,
    protocol: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: str | None = None,
    train_images: str | None = None,
    heldout_images: str | None = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("evaluation.json"),
) -> None:
    """Judge a model, a folder of images or an .npz against a reference; every number comes with its card.

    Args:
        source: Run or model folder, hub name, folder of PNGs, or .npz with arr_0.
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

    sets = open_features(features, weights)
    if make_reference is not None:
        made = references.make_reference(real_images(make_reference[0], size, channels), make_reference[1], sets)
        print(f"{make_reference[1]}: {', '.join(made.statistics)}, hash {made.hash}")
        return
    if not source or not reference:
        raise ValueError("give what to judge and --reference FILE; --make-reference DATA FILE makes one")
    path = Path(source)
    if path.suffix == ".npz" or (path.is_dir() and not ((path / "config.json").exists() or (path / "model").exists())):
        judged = real_images(source, None, channels)
    else:
        from mezzotint import protocols as words
        from mezzotint.produce import job_for

        given = {"steps": steps, "sampler": sampler and words.parse_sampler(sampler)}
        given["guidance"] = guidance and words.parse_guidance(guidance)
        judged = samples_of(job_for(source, {k: v for k, v in given.items() if v}, protocol=protocol), n)
    real = references.completed(references.read_reference(reference, maker), sets)
    against = None if heldout is None else references.read_reference(heldout, maker)
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
    model: str | None = None,
    reference: str | None = None,
    n: int = 50_000,
    steps: int | None = None,
    features: tuple[str, ...] = ("inception-2048", "inception-sfid", "inception-logits"),
    weights: Path | None = None,
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
    checkpointing: bool = False,
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
        checkpointing: Recompute each block in the backward pass.
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


def serve(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    port: int | None = None,
    auth: str = "",
) -> None:
    """Open the studio, one page on 127.0.0.1: sample, watch runs, see what schedules and networks do, compare.

    Args:
        sources: Run folders, model folders or hub names.
        port: A free one from 7860 upwards by default.
        auth: user:password that visitors must give.
    """
    from mezzotint.web.page import serve as run

    run(sources, port, auth)


def export(
    model: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: Literal["diffusers", "torch", "onnx"],
    size: int | None = None,
) -> None:
    """Take a model elsewhere: a diffusers pipeline, or its denoiser (z, logsnr, label) -> (x, eps) as one file.

    Args:
        model: Run folder, model folder or hub name.
        out: Folder (diffusers), .pt2 file (torch) or .onnx file.
        to: Form; for torch and onnx the file is read back and its outputs compared.
        size: Height and width of z in torch's and onnx's; the network's own by default.
    """
    from mezzotint.export import export as run

    for line in run(model, out, to, size):
        print(line)


def card(
    source: Positional[str],
    /,
    *,
    evaluation: tuple[Path, ...] = (),
    licence: str | None = None,
    fresh: bool = False,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write the card of a run's model (README.md with the hub's metadata, samples.png), and push the model if asked.

    Args:
        source: Run folder or model folder.
        evaluation: Files of `mezzotint evaluate`; those in the run folder are found without being named.
        licence: Of the weights, as the hub names it: apache-2.0, cc-by-4.0, other ...
        fresh: Sample the picture anew instead of taking the run's newest grid.
        push: Repository of the Hugging Face hub, owner/name, made if it is not there.
        private: Make that repository private.
    """
    from mezzotint.hub import push_to_hub, write_card

    folder = write_card(source, evaluation, licence, fresh)
    print(f"card: {folder / 'README.md'}")
    if push is not None:
        print(push_to_hub(folder, push, private))


def ema(
    run: Positional[Path],
    /,
    *,
    width: float,
    images: int | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
) -> None:
    """Average a run's weights anew, with any width, from the snapshots it kept (ema.power_stds in its recipe).

    Args:
        run: Run folder.
        width: Relative width of the power-function average, e.g. 0.08 (EDM2); below 0.2887.
        images: Average up to so many images seen; the newest snapshot by default.
        out: Model folder to write; RUN/model-WIDTH by default.
    """
    from mezzotint.train.posthoc import save_rebuilt

    folder, rebuilt = save_rebuilt(run, width, images, out)
    print(f"{folder}: relative width {width:g} at {rebuilt.images:,} images, of {len(rebuilt.sources)} snapshots")
    print(f"relative distance of its profile from the one asked for: {rebuilt.distance:.2g} (0.1 and above is coarse)")


def replay(bundle: Positional[Path], /, *, data: Annotated[str | None, arg(aliases=["-d"])] = None) -> None:
    """Repeat a training step that was not finite, from the bundle it left, and name the layer where it began.

    Args:
        bundle: Folder RUN/bundles/IMAGES.
        data: Where the training data is now, if it moved.
    """
    from mezzotint.train.replay import replay as run

    print(run(bundle, data))


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
    checkpointing: Switch = False,
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
        checkpointing: Judge the run with activation checkpointing; both ways are shown.
        efficiency: Part of the device's ceiling that a step reaches, 0 to 1; 0.35 by default.
        json: One JSON object, for programs.
    """
    from json import dumps

    from rich.console import Console

    from mezzotint import config
    from mezzotint import plan as planning
    from mezzotint.recipes import recipe_for

    asked = {"batch": batch, "engine.strategy": strategy, "engine.precision": precision}
    named = [f"{k}={v}" for k, v in asked.items() if v is not None] + ["engine.checkpointing=true"] * checkpointing
    recipe = config.override(recipe_for(preset), [*overrides, *named])
    answer = planning.plan(recipe, gpus=gpus, device=device, efficiency=efficiency or planning.EFFICIENCY)
    if json:
        print(dumps(answer))
    else:
        Console().print(planning.render(answer))


def doctor(
    data: Positional[str] = "",
    /,
    *,
    size: Given = None,
    channels: Count = 3,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("runs"),
    json: Switch = False,
) -> None:
    """Look at this machine and at your data for half a minute, and list what deserves a look before training.

    Args:
        data: As for train; without it only the machine is looked at.
        size: Height and width in pixels to train at; by default the largest usual one that half the pictures reach.
        channels: 1 (grey) or 3 (RGB).
        out: Where runs will be written.
        json: One JSON object, for programs.
    """
    from json import dumps

    from mezzotint.doctor import examine, render

    found = examine(data, size=size, channels=channels, folder=out)
    print(dumps(found) if json else render(found))


def report(run: Positional[Path], /, *, out: Annotated[Path | None, arg(aliases=["-o"])] = None) -> None:
    """Make one self-contained HTML page of a run, finished or not: curves, grids over time, recipe, environment.

    Args:
        run: Run folder.
        out: File to write; RUN/report.html by default.
    """
    from mezzotint import config
    from mezzotint.recipes import difference
    from mezzotint.report import write_report

    print(write_report(run, out or run / "report.html", difference(config.from_yaml(run / "recipe.yaml"))))


COMMANDS = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "prepare": prepare,
    "prefetch": prefetch,
    "info": info,
    "convert": convert,
    "evaluate": evaluate,
    "compare": compare,
    "reproduce": reproduce,
    "bench": bench,
    "serve": serve,
    "export": export,
    "card": card,
    "ema": ema,
    "replay": replay,
    "plan": plan,
    "doctor": doctor,
    "report": report,
}


def main() -> None:
    """Entry point: a user's error is one sentence on stderr and exit code 1 (2 for a wrong command line)."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="mezzotint",
            description="High-resolution image diffusion backbones: train, sample, evaluate.",
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"mezzotint: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mezzotint: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
