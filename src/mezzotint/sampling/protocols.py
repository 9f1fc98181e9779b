"""Published sampling protocols by name, and the order of class labels.

`docs/protocols.md` lists the differences and what the papers leave open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mezzotint.core import rng
from mezzotint.core.registry import Spec, suggest
from mezzotint.sampling.settings import Guidance, SamplingSettings

# Images in a row of one class in the order "balanced": 50 x 1000 classes are ImageNet's 50,000.
IMAGES_PER_CLASS = 50

# The class of image i, out of K classes. Functions of i alone, so that any image can be made alone.
LABEL_ORDERS: dict[str, Callable[[int, int], int]] = {
    "turn": lambda i, k: i % k,
    "random": lambda i, k: int(rng.philox("label", 0, i).integers(k)),
    "balanced": lambda i, k: i // IMAGES_PER_CLASS % k,
}
LABEL_ORDER_RULES = {
    "turn": "image i: class i mod K of the K classes",
    "random": "image i: uniform over the classes, Philox keyed by (label, 0, i)",
    "balanced": f"image i: class floor(i / {IMAGES_PER_CLASS}) mod K of the K classes",
}
SEED_RULE = (
    "image i starts from float32 normals of Philox keyed by (sample, 0, i); draw d of a stochastic "
    "sampler is keyed by (sampler, 0, i, d)"
)


def choose_labels(order: str, seeds: Sequence[int], classes: Sequence[int]) -> list[int]:
    """Return the class of each seed's image, out of `classes`, e.g. range(1000)."""
    if order not in LABEL_ORDERS:
        raise ValueError(f"unknown label order {order!r}; {suggest(order, LABEL_ORDERS)}")
    return [classes[LABEL_ORDERS[order](i, len(classes))] for i in seeds]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a paper's images were made.

    settings: sampler, discretization, steps, guidance, clipping, dtype.
    label_order: of `LABEL_ORDERS`.
    uint8_rule: of `mezzotint.data.transforms.to_uint8`.
    codec: of the paper's model.
    source: where this is published.
    chosen: what is not published, and our choice.
    coco_captions: captions of COCO's validation set drawn as prompts; None for classes.
    """

    settings: SamplingSettings
    label_order: str
    uint8_rule: str
    codec: str
    source: str
    chosen: str
    coco_captions: int | None = None


_RESPACED = {
    "sampler": Spec("ancestral", {"variance": "learned"}),
    "discretization": Spec("respaced"),
    "steps": 250,
}

_DIFFIT_CHOSEN = "labels, float32 (the released half-precision switch does not run)"


def _jit(noise_scale: float) -> Protocol:
    """Return the protocol of specs/jit.md section 2."""
    own = {} if noise_scale == 1 else {"noise_scale": noise_scale}
    # Guided where t > 0.1, strictly, and the grid has a point there: log-SNR 2 ln(t / ((1 - t) s)).
    low = 2 * (math.log(0.1 / 0.9) - math.log(noise_scale)) + 1e-6
    return Protocol(
        settings=SamplingSettings(
            sampler=Spec("flow_heun", own),
            discretization=Spec("flow", own),
            steps=50,
            guidance=Guidance(scale=3.0, low=low, high=100.0),
            dtype="float32",
        ),
        label_order="balanced",
        uint8_rule="round",
        codec="pixels",
        source="JiT, arXiv 2511.13720, and its released sampling code; the clamp of 1 - t at 0.05 "
        "leaves noise of 2.2 grey levels at 256 pixels and 4.4 at 512, which the FIDs contain",
        chosen="float32 where the released code runs under bf16 autocast; guidance 3.0 is that of "
        "JiT-B, the scales of the other sizes are in `reproduce`",
    )


# specs/simple-diffusion.md section 2: x is clipped after guidance, u is even from 1 to 0, and the
# last step gives x.
SIMPLE_DIFFUSION = SamplingSettings(
    sampler=Spec("ancestral", {"variance": "posterior"}),
    discretization=Spec("even"),
    steps=512,
    clip=Spec("static"),
    dtype="float32",
)

PROTOCOLS: dict[str, Protocol] = {
    "simple-diffusion-512steps": Protocol(
        settings=SIMPLE_DIFFUSION,
        label_order="random",
        uint8_rule="round",
        codec="pixels",
        source="simple diffusion, arXiv 2301.11093, section 2 and appendix; 512 steps as in its "
        "ablations",
        chosen="the smaller (posterior) variance, no guidance (guided rows: "
        "scale=0.1,convention=simple_diffusion), labels, dtype, the rule to eight bits",
    ),
    # specs/simple-diffusion.md section 8; Imagen (arXiv 2205.11487), section 4: 30,000 captions of
    # the validation set at random, against all of its images.
    "coco-fid-30k": Protocol(
        settings=SIMPLE_DIFFUSION,
        label_order="random",
        uint8_rule="round",
        codec="pixels",
        source="simple diffusion, arXiv 2301.11093: zero-shot FID-30K; the captions as in Imagen, "
        "arXiv 2205.11487",
        chosen="which captions (uniform over all, seed 0), the crop of the real images (ADM's), "
        "no guidance (--sweep finds the best scale), 512 steps with the smaller variance, dtype",
        coco_captions=30_000,
    ),
    # specs/diffit.md 2.1 and section 5.
    "diffit-256": Protocol(
        settings=SamplingSettings(
            **_RESPACED,
            guidance=Guidance(scale=4.4, power=4.0, time="index", channels=3),
            dtype="float32",
        ),
        label_order="random",
        uint8_rule="truncate",  # as its released sampling script ends
        codec="sd-vae-ft-ema",
        source="DiffiT, arXiv 2312.02139, with the released scale 4.4 (the paper's section 5.8 "
        "says 4.6)",
        chosen=_DIFFIT_CHOSEN,
    ),
    "diffit-512": Protocol(
        settings=SamplingSettings(
            **_RESPACED, guidance=Guidance(scale=1.49, channels=3), dtype="float32"
        ),
        label_order="random",
        uint8_rule="truncate",  # as its released sampling script ends
        codec="sd-vae-ft-ema",
        source="DiffiT, arXiv 2312.02139, section 5.8",
        chosen=_DIFFIT_CHOSEN,
    ),
    # specs/dimr.md 6.1 to 6.3.
    "dimr-256": Protocol(
        settings=SamplingSettings(
            sampler=Spec("dpmpp_singlestep", {"order": 3}),
            discretization=Spec("even", {"end": 1e-3, "clean": False}),
            steps=250,
            guidance=Guidance(scale=0.4, convention="dimr"),
            dtype="float32",
        ),
        label_order="balanced",
        uint8_rule="round",
        codec="sd-vae-ft-ema",
        source="DiMR, arXiv 2406.09416, with the defaults of its released command",
        chosen="which guidance gave which FID is not stated; float32 where the released code runs "
        "under fp16 autocast",
    ),
    # ADM (arXiv 2105.05233), its released image_sample.py: 250 respaced steps, x clipped, fp16.
    "adm": Protocol(
        settings=SamplingSettings(**_RESPACED, clip=Spec("static"), dtype="float16"),
        label_order="random",
        uint8_rule="truncate",
        codec="pixels",
        source="ADM, arXiv 2105.05233, and its released sampling script",
        chosen="no guidance, since ADM guides by a classifier",
    ),
    # EDM2 (arXiv 2312.02696), its released generate_images.py: EDM's algorithm 1, 32 steps, fp16.
    "edm2": Protocol(
        settings=SamplingSettings(
            sampler=Spec("heun"),
            discretization=Spec("karras", {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}),
            steps=32,
            dtype="float16",
        ),
        label_order="random",
        uint8_rule="truncate",  # as its autoencoder's decoding ends; its pixel models round
        codec="sd-vae-ft-mse",
        source="EDM2, arXiv 2312.02696, and its released sampling script",
        chosen="no guidance; the guided presets differ by size: --guidance with --guide-model",
    ),
}

PROTOCOLS |= {f"jit-{size}": _jit(size / 256) for size in (256, 512)}


def get_protocol(name: str) -> Protocol:
    """Return the protocol of that name; ValueError lists similar names."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; {suggest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def find_deviations(
    name: str, used: SamplingSettings, label_order: str, uint8_rule: str, codec: str
) -> list[str]:
    """Return what differs from the protocol, as "steps: 50 instead of 250", for the card."""
    published = get_protocol(name)
    fields = ("sampler", "discretization", "steps", "guidance", "clip", "size", "dtype")
    pairs = {field: (getattr(used, field), getattr(published.settings, field)) for field in fields}
    pairs |= {
        "label_order": (label_order, published.label_order),
        "uint8_rule": (uint8_rule, published.uint8_rule),
        "codec": (codec, published.codec),
    }
    return [
        f"{field}: {ours} instead of {theirs}"
        for field, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
