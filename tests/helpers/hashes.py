"""Print hashes of what every tiny preset samples and learns, as JSON.

test_hashes.py runs this file in a fresh process. To record new hashes, where results are meant to
change: `PYTHONPATH=tests python -m helpers.hashes --record`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

# One instruction set for all machines, set before torch is imported: kernels choose their rounding
# by it.
ISA = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
GOLDEN = Path(__file__).parents[1] / "golden" / "hashes.json"


def digest(tensors) -> dict:
    """SHA-256 of the bytes, and a few numbers for machines whose rounding is another."""
    h = hashlib.sha256()
    for tensor in tensors:
        h.update(tensor.contiguous().numpy().tobytes())
    flat = [float(t.double().abs().mean()) for t in tensors]
    return {"sha256": h.hexdigest(), "mean_abs": flat}


def sampled(preset: str) -> dict:
    import torch

    import mezzotint as mz

    torch.manual_seed(0)
    model = mz.create_model(preset).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = model.info.config
    label = [0, 1, 2, 3] if config.num_classes else None
    return digest([mz.sample(model, seeds=range(4), label=label, steps=4)])


def trained(preset: str, folder: Path) -> dict:
    from safetensors.torch import load_file

    from mezzotint import config
    from mezzotint.recipes import recipe_for
    from mezzotint.train.loop import train

    changes = [
        "images=64",
        "batch=32",
        "samples.every_images=0",
        "engine.precision=float32",
        "data.flip=true",
    ]
    if "text" in preset:
        from helpers.tiny_t5 import saved_t5

        t5 = saved_t5(folder / "t5", seed=0)
        changes += ["data.source=shapes:count=64", f"data.text_encoder={t5}", "model.text_dim=16"]
    elif "latent" in preset:
        changes += [
            "data.source=shapes:count=64",
            f"data.codec={saved_vae(folder / 'vae')}",
            "model.num_classes=6",
        ]
    else:
        changes += ["data.source=digits"]
    recipe = config.override(recipe_for(preset), changes)
    run = train(recipe, folder / preset, quiet=True)
    found = {}
    for name in ("model", "model-raw"):
        weights = load_file(run / name / "model.safetensors")
        found[name] = digest([weights[key] for key in sorted(weights)])
        found[name]["mean_abs"] = [sum(found[name]["mean_abs"])]
    return found


def saved_vae(folder: Path) -> Path:
    import diffusers
    import torch

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        scaling_factor=0.7, layers_per_block=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def measure(presets: list[str]) -> dict:
    import torch

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEZZOTINT_CACHE"] = f"{folder}/cache"
        for preset in presets:
            found[preset] = {"samples": sampled(preset), **trained(preset, Path(folder))}
    return {"torch": torch.__version__.partition("+")[0], "presets": found}


if __name__ == "__main__":
    os.environ.update(ISA)
    import mezzotint.backbones as backbones

    result = measure(sorted(name for name in backbones.presets() if name.endswith("-tiny")))
    if "--record" in sys.argv:
        GOLDEN.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
