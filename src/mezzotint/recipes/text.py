"""Text to image with simple diffusion's U-ViT (arXiv 2301.11093, section 4). The paper's data are not public.

Its three models (256x256, 512x512, 384x640 pixels; T5-XXL) are the presets uvit-256 and uvit-512 with
model.text_dim=4096 model.num_classes=0 and data.text_encoder=google/t5-v1_1-xxl; docs/latents.md has the commands. Batch, data
and length of their training are not known (section 7, [?]).
"""

from __future__ import annotations

from mezzotint.config import Data, Ema, Optim, Recipe, SampleGrid, Save, Time
from mezzotint.core.registry import Spec
from mezzotint.recipes import recipe


@recipe("uvit-text-tiny")
def uvit_text_tiny() -> Recipe:
    """For a laptop, on captions; how well words steer it is measured by benchmarks/words.py.

    At another model.size, set schedule.options.image_d to it as well.
    """
    return Recipe(
        preset="uvit-text-tiny",
        data=Data(flip=False),
        # Words decide what is where before the picture shows it: at 64 pixels below a log-SNR of -5, where the
        # unshifted cosine spends a twentieth of its time and eps-MSE hardly weighs. Hence a shift of -2.8, and the
        # image's own error. That x is predicted spares the patches from carrying the noise through the transformer.
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
