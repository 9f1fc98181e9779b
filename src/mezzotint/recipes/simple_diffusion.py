"""Recipes of simple diffusion (arXiv 2301.11093) and SiD2 (arXiv 2410.19324).

Most rates, batches and lengths are recollected, not quoted from the papers: they are a starting
point. FID is of 50,000 samples against ImageNet's training / validation statistics.
"""

from __future__ import annotations

from dataclasses import replace

from mezzotint.config import Data, Optim, Recipe, SampleGrid, Save, Time
from mezzotint.core.registry import Spec
from mezzotint.recipes import base, ema_from_decay, recipe, small

IMAGENET = Data(source="", crop="adm", flip=True)


def _published(preset: str, batch: int, steps: int) -> Recipe:
    """Return what the published runs share: Adam, 10k steps of warm-up, EMA 0.9999, eps-MSE."""
    return Recipe(
        preset=preset,
        data=IMAGENET,
        objective=Spec("eps_mse"),
        optim=Optim(lr=1e-4, betas=(0.9, 0.99), eps=1e-12, warmup_images=10_000 * batch, clip=1.0),
        ema=ema_from_decay(0.9999, batch),
        images=steps * batch,
        batch=batch,
        label_drop=0.1,
        log_every_images=100 * batch,
        samples=SampleGrid(every_images=10_000 * batch, sampler="ancestral", steps=512),
        save=Save(every_images=5_000 * batch, keep=2, keep_every_images=100_000 * batch),
    )


@recipe("unet-128")
def unet_128() -> Recipe:
    """FID train 2.26 (recollection), eval 2.88."""
    return _published("unet-128", 512, 1_500_000)


@recipe("unet-256")
def unet_256() -> Recipe:
    """FID train 3.76, eval 3.71."""
    return _published("unet-256", 512, 2_000_000)


@recipe("unet-512")
def unet_512() -> Recipe:
    """FID train 4.30 (recollection), eval 4.28; multiscale loss, which helps above 256 pixels."""
    return replace(_published("unet-512", 512, 3_000_000), objective=Spec("multiscale"))


@recipe("uvit-128")
def uvit_128() -> Recipe:
    """FID train 1.94 (recollection), eval 3.23."""
    return _published("uvit-128", 2048, 500_000)


@recipe("uvit-256")
def uvit_256() -> Recipe:
    """FID train 2.77, eval 3.75; guided train 2.44."""
    return _published("uvit-256", 2048, 500_000)


@recipe("uvit-512")
def uvit_512() -> Recipe:
    """FID train 3.54 (recollection), eval 4.53; guided train 3.02; multiscale loss."""
    return replace(_published("uvit-512", 2048, 500_000), objective=Spec("multiscale"))


def _sid2(preset: str, bias: float) -> Recipe:
    """Return SiD2's recipe; batch, steps and EMA are of its group's later runs, its own unknown."""
    return replace(
        _published(preset, 1024, 1_000_000),
        objective=Spec("sigmoid", {"bias": bias}),
        time=Time(loss_measure="logsnr"),
    )


@recipe("sid2-128")
def sid2_128() -> Recipe:
    """FID 1.26 (recollection)."""
    return _sid2("sid2-128", 0.0)


@recipe("sid2-256")
def sid2_256() -> Recipe:
    """FID 1.73 with a guidance interval."""
    return _sid2("sid2-256", -1.0)


@recipe("sid2-512")
def sid2_512() -> Recipe:
    """FID 2.19 with a guidance interval."""
    return _sid2("sid2-512", -3.0)


@recipe("sid2-256-flop")
def sid2_256_flop() -> Recipe:
    """FID 1.38 with a guidance interval."""
    return _sid2("sid2-256-flop", -1.0)


@recipe("sid2-512-flop")
def sid2_512_flop() -> Recipe:
    """FID 1.48 with a guidance interval."""
    return _sid2("sid2-512-flop", -3.0)


def _laptop(preset: str, lr: float) -> Recipe:
    """Return a recipe for CPU minutes: larger rate, small batch, short warm-up, ramped average.

    Batch and warm-up are those of least error after three minutes
    (benchmarks/results/choices-eurosat.json).
    """
    return Recipe(
        preset=preset,
        data=Data(flip=False),
        objective=Spec("eps_mse"),
        time=Time(sampling="stratified"),
        optim=Optim(lr=lr, betas=(0.9, 0.99), warmup_images=500),
        images=200_000,
        batch=8,
        log_every_images=3_200,
        samples=SampleGrid(every_images=50_000, count=40, steps=50),
        save=Save(every_images=50_000),
    )


@recipe("unet-tiny")
def unet_tiny() -> Recipe:
    """For a laptop; no published number."""
    return _laptop("unet-tiny", 2e-3)


@recipe("unet-mini")
def unet_mini() -> Recipe:
    """For hours on a CPU; no published number. The rate is that of `eurosat-64`."""
    return replace(_laptop("unet-mini", 2e-3), images=500_000)


@recipe("uvit-tiny")
def uvit_tiny() -> Recipe:
    """For a laptop; no published number."""
    return _laptop("uvit-tiny", 1e-3)


@recipe("sid2-tiny")
def sid2_tiny() -> Recipe:
    """For a laptop; no published number. The bias follows the size, as SiD2's three biases do."""
    return replace(
        _laptop("sid2-tiny", 2e-3),
        objective=Spec("sigmoid", {"bias": None}),
        time=Time(sampling="stratified", loss_measure="logsnr"),
    )


@recipe("unet-small")
def unet_small() -> Recipe:
    """For one consumer GPU, or a CPU over a weekend; no published number."""
    return small(unet_tiny(), width=4)


@recipe("unet-base")
def unet_base() -> Recipe:
    """For one or several GPUs over days; no published number."""
    return base(unet_tiny(), width=8)


@recipe("uvit-small")
def uvit_small() -> Recipe:
    """For one consumer GPU, or a CPU over a weekend; no published number."""
    return small(uvit_tiny(), width=4)


@recipe("uvit-base")
def uvit_base() -> Recipe:
    """For one or several GPUs over days; no published number."""
    return base(uvit_tiny(), width=6)


@recipe("sid2-small")
def sid2_small() -> Recipe:
    """For one consumer GPU, or a CPU over a weekend; no published number."""
    return small(sid2_tiny(), width=3)


@recipe("sid2-base")
def sid2_base() -> Recipe:
    """For one or several GPUs over days; no published number."""
    return base(sid2_tiny(), width=6)
