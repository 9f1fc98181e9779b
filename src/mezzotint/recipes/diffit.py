"""Recipes of DiffiT (arXiv 2312.02139). FID is of 50,000 samples."""

from __future__ import annotations

from dataclasses import replace

from mezzotint.config import Data, Ema, Optim, Recipe, SampleGrid, Save, Time
from mezzotint.core.registry import Spec
from mezzotint.recipes import base, ema_from_decay, recipe, small

# The paper trains for "200000" iterations; EDM, whose recipe it follows, counts in kimg.
EDM_IMAGES = 200_000_000


def _edm(
    preset: str,
    lr: float,
    batch: int,
    grid_steps: int,
    dropout: float = 0.0,
    augment: float = 0.0,
) -> Recipe:
    """Return EDM's recipe: log-normal noise, weight 1 in F-space, Adam, warm-up, ramped average.

    The paper does not mention EDM's augmentations, nor how their label enters the network. They are
    part of the recipe that it follows, and include the flip.
    """
    return Recipe(
        preset=preset,
        model={"dropout": dropout},
        data=Data(augment=augment),
        objective=Spec("regression"),
        optim=Optim(lr=lr, betas=(0.9, 0.999), eps=1e-8, warmup_images=10_000_000, clip=None),
        ema=Ema(half_life_images=500_000, rampup=0.05),
        images=EDM_IMAGES,
        batch=batch,
        label_drop=0.0,
        log_every_images=50_000,
        samples=SampleGrid(every_images=1_000_000, sampler="heun", steps=grid_steps),
        save=Save(every_images=1_000_000, keep_every_images=20_000_000),
    )


@recipe("diffit-cifar10")
def diffit_cifar10() -> Recipe:
    """FID 1.95, unconditional, EDM's deterministic Heun with 18 steps (35 network calls)."""
    return _edm("diffit-cifar10", 1e-3, 512, 18, dropout=0.13, augment=0.12)


@recipe("diffit-ffhq64")
def diffit_ffhq64() -> Recipe:
    """FID 2.22, unconditional, 40 steps (79 network calls)."""
    return _edm("diffit-ffhq64", 2e-4, 256, 40, dropout=0.05, augment=0.15)


def _latent(preset: str, lr: float, batch: int) -> Recipe:
    """Return the latent recipe: DDPM's linear table, eps with learned range.

    The paper states no optimiser, length or flip. AdamW without decay is DiT's; 400 ImageNet epochs
    are what the DiMR paper lists for DiffiT.
    """
    return Recipe(
        preset=preset,
        data=Data(flip=True),
        objective=Spec("hybrid"),
        optim=Optim(lr=lr, betas=(0.9, 0.999), clip=None),
        ema=ema_from_decay(0.9999, batch),
        images=400 * 1_281_167,
        batch=batch,
        label_drop=0.1,
        log_every_images=100 * batch,
        samples=SampleGrid(
            every_images=10_000 * batch, sampler="ancestral:variance=learned", steps=250
        ),
        save=Save(every_images=5_000 * batch, keep_every_images=100_000 * batch),
    )


@recipe("diffit-256")
def diffit_256() -> Recipe:
    """FID 1.73, 250 ancestral steps, power-cosine guidance (4.6 in the paper, 4.4 in its code)."""
    return _latent("diffit-256", 3e-4, 256)


@recipe("diffit-512")
def diffit_512() -> Recipe:
    """FID 2.67, guided at 1.49, 250 ancestral steps."""
    return _latent("diffit-512", 1e-4, 512)


@recipe("diffit-tiny")
def diffit_tiny() -> Recipe:
    """For a laptop; no published number.

    It predicts v on the cosine, with SiD2's weight (2 ln(128 / size) as its bias). The time vector
    scales and shifts every norm, as in ADM's U-Net. The paper has EDM's row, and no such norm.
    """
    return replace(
        _edm("diffit-tiny", 1e-3, 8, 18),
        model={"dropout": 0.0, "prediction": "v", "film": True},
        objective=Spec("sigmoid", {"bias": None}),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), warmup_images=500, clip=1.0),
        time=Time(sampling="stratified", loss_measure="logsnr"),
        label_drop=0.1,
        images=200_000,
        log_every_images=3_200,
        samples=SampleGrid(every_images=50_000, count=40, sampler="heun", steps=18),
        save=Save(every_images=50_000),
    )


@recipe("diffit-latent-tiny")
def diffit_latent_tiny() -> Recipe:
    """For a laptop, on latents of a small autoencoder; no published number."""
    return replace(
        _latent("diffit-latent-tiny", 1e-3, 64),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), warmup_images=3_000, clip=1.0),
        ema=Ema(),
        images=200_000,
        log_every_images=3_200,
        samples=SampleGrid(every_images=50_000, count=40, steps=50),
        save=Save(every_images=50_000),
    )


@recipe("diffit-small")
def diffit_small() -> Recipe:
    """For one consumer GPU, or a CPU over a weekend; no published number."""
    return small(diffit_tiny(), width=2)


@recipe("diffit-base")
def diffit_base() -> Recipe:
    """For one or several GPUs over days; no published number."""
    return base(diffit_tiny(), width=4)
