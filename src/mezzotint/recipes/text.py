"""Recipes of text to image with simple diffusion's U-ViT (arXiv 2301.11093, section 4).

The paper trains three models, at 256x256, 512x512 and 384x640 pixels, on the states of T5-XXL; its
data are not public. What it leaves open is chosen as for the classes: batch and length are those of
the class-conditional U-ViT, and so are rate, average and label_drop. How text enters the network
is in docs/text-conditioning.md.
"""

from __future__ import annotations

from dataclasses import replace

from mezzotint.config import Data, Ema, Optim, Recipe, SampleGrid, Save, Time
from mezzotint.core.registry import Spec
from mezzotint.recipes import recipe, recipe_for

XXL = "google/t5-v1_1-xxl"


def _published(preset: str, classes: str, objective: str) -> Recipe:
    """Return the recipe of the U-ViT on classes at the same size, with captions in their place."""
    return replace(
        recipe_for(classes),
        preset=preset,
        # A mirrored image would contradict "left" and "right" in its caption (our choice).
        data=Data(crop="adm", flip=False, text_encoder=XXL, text_dtype="bfloat16"),
        objective=Spec(objective),
    )


@recipe("uvit-text-256")
def uvit_text_256() -> Recipe:
    """Zero-shot FID 8.30 of 30,000 samples for COCO captions."""
    return _published("uvit-text-256", "uvit-256", "eps_mse")


@recipe("uvit-text-512")
def uvit_text_512() -> Recipe:
    """No number is known; multiscale loss, as of the U-ViT on classes at this size."""
    return _published("uvit-text-512", "uvit-512", "multiscale")


@recipe("uvit-text-384x640")
def uvit_text_384x640() -> Recipe:
    """No number is known. Images taller than wide are turned and noted in their captions.

    Data, samples and evaluation are of 384x640 pixels. The noise schedule is shifted as for the
    square of this area, of 496 pixels, and the loss is that of 512x512 (both our choice).
    """
    recipe = _published("uvit-text-384x640", "uvit-512", "multiscale")
    return replace(recipe, data=replace(recipe.data, portrait=True))


@recipe("uvit-text-tiny")
def uvit_text_tiny() -> Recipe:
    """For a laptop, on captions; benchmarks/words.py measures how well captions steer it.

    Set schedule.options.image_d to model.size where that changes.
    """
    return Recipe(
        preset="uvit-text-tiny",
        data=Data(flip=False),
        # Captions decide the layout at high noise: at 64 pixels, below a log-SNR of -5, where the
        # unshifted cosine spends a twentieth of its time and eps-MSE has little weight. Hence a
        # shift of -2.8 and the error of the image itself. Predicting x spares the patches from
        # carrying the noise through the transformer.
        schedule=Spec("cosine", {"image_d": 64, "noise_d": 16}),
        objective=Spec("regression"),
        time=Time(sampling="stratified"),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), warmup_images=3_000, decay="cosine"),
        ema=Ema(half_life_images=20_000),
        images=150_000,
        batch=16,
        label_drop=0.1,
        log_every_images=3_200,
        samples=SampleGrid(every_images=50_000, count=40, steps=50),
        save=Save(every_images=25_000),
    )
