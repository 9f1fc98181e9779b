"""Recipes of text to image with simple diffusion's U-ViT (arXiv 2301.11093, section 4).

The paper's three models (256x256, 512x512, 384x640 pixels; T5-XXL) are the presets uvit-256 and
uvit-512 with model.text_dim=4096, model.num_classes=0 and data.text_encoder=google/t5-v1_1-xxl;
docs/text-conditioning.md has them. Their data are not public; batch and length are not known.
"""

from __future__ import annotations

from mezzotint.config import Data, Ema, Optim, Recipe, SampleGrid, Save, Time
from mezzotint.core.registry import Spec
from mezzotint.recipes import recipe


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
