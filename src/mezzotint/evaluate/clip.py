"""CLIP: its image network as a feature set, and embeddings of captions.

Both are unit vectors of one space (Radford et al. 2021, arXiv 2103.00020); their cosine says how
well an image fits a caption. `clip_score` makes numbers of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from mezzotint.core.distributed import default_device
from mezzotint.core.files import read_json, sha256_of_file
from mezzotint.core.hub import Pretrained, find_pretrained, hash_tokenizer, quiet_transformers
from mezzotint.core.tensor_files import sha256_of_module
from mezzotint.evaluate.features import NETWORK_BATCH, FeatureSet, exact_float32, from_module

# Imagen (arXiv 2205.11487) and most papers since measure with this one.
VIT_L14 = "openai/clip-vit-large-patch14"
REVISIONS = {VIT_L14: "32bd64288804d66eefd0ccbe215aa642df71cc41"}
# SHA-256 of that revision's model.safetensors, 1,710,540,580 bytes.
VIT_L14_SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
FILES = ("*.json", "merges.txt", "*.safetensors")
KIND = Pretrained(
    kind="CLIP model", shelf="clip", files=FILES, example=f"papers measure with {VIT_L14}"
)
# CLIP's own, where a folder says nothing else.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How CLIP sees an image: shorter side to `size`, centre crop to `crop`, mean and std."""

    size: int
    crop: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def describe(self) -> str:
        """Return the rule as a feature set states it."""
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return (
            f"shorter side to {self.size} px by Pillow's bicubic on uint8, centre crop "
            f"{self.crop} px, mean {mean}, std {std}"
        )

    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return what the network takes, on the device of the images.

        Pillow's bicubic is antialiased and rounds to uint8, as CLIP's own transform does.
        """
        rows = [self._crop(row) for row in images.permute(0, 2, 3, 1).cpu().numpy()]
        scaled = torch.from_numpy(np.stack(rows)).to(images.device).permute(0, 3, 1, 2) / 255
        mean, std = (scaled.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (scaled - mean) / std

    def _crop(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop uint8 (h, w, 3); a long side is truncated, an odd rest left below."""
        height, width = pixels.shape[:2]
        short = min(height, width)
        height, width = (int(self.size * side / short) for side in (height, width))
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        top, left = ((side - self.crop) // 2 for side in (height, width))
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))


class _ImageNetwork(nn.Module):
    """CLIP's image network with its projection."""

    def __init__(self, clip: Any):
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, s, s) -> unit vectors (b, dims)."""
        return normalize(self.projection(self.vision(pixel_values=x).pooler_output).float())


class _TextNetwork(nn.Module):
    """CLIP's text network with its projection."""

    def __init__(self, clip: Any):
        super().__init__()
        self.text, self.projection = clip.text_model, clip.text_projection

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask (b, t) -> unit vectors (b, dims)."""
        pooled = self.text(input_ids=ids, attention_mask=mask).pooler_output
        return normalize(self.projection(pooled).float())


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIP model.

    name: without its owner. is_vit_l14: whether its weights are those of `VIT_L14`.
    features: of images, unit vectors. max_tokens: longer captions are cut.
    text_hash: of the text network and the tokenizer.
    """

    name: str
    is_vit_l14: bool
    features: FeatureSet
    max_tokens: int
    text_hash: str
    network: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)

    def metadata(self) -> dict[str, Any]:
        """Return what identifies the model's numbers in evaluations."""
        own = {"text": self.text_hash, "hash": _hash_texts(self.features.hash, self.text_hash)[:16]}
        return self.features.metadata() | own

    def is_cut(self, caption: str) -> bool:
        """Return whether a caption has more tokens than the network reads."""
        ids = self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]
        return len(ids) > self.max_tokens

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return unit vectors, float32 on the CPU; a caption's depends on that caption alone.

        The network always gets NETWORK_BATCH captions of max_tokens tokens, as `stream_features`
        does with images.
        """
        device = next(self.network.parameters()).device
        parts = [torch.empty(0, self.features.dims)]
        for first in range(0, len(captions), NETWORK_BATCH):
            part = list(captions[first : first + NETWORK_BATCH])
            padded = part + [""] * (NETWORK_BATCH - len(part))
            tokens = self.tokenizer(
                padded, padding="max_length", truncation=True, max_length=self.max_tokens,
                return_tensors="pt",
            )  # fmt: skip
            ids, mask = (tokens[k].to(device) for k in ("input_ids", "attention_mask"))
            with exact_float32(device):
                parts.append(self.network(ids, mask)[: len(part)].cpu())
        rows = torch.cat(parts)
        if not rows.isfinite().all():
            raise ValueError(f"embeddings of {self.name} are not finite; are the weights damaged?")
        return rows


def open_clip(name: str = VIT_L14, device: str | torch.device | None = None) -> Clip:
    """Open a CLIP model.

    Args:
        name: OWNER/NAME on the hub, or a folder that transformers saved: config, weights in
            safetensors, tokenizer, and preprocessor_config.json unless it has CLIP's own values.
        device: where it computes; a GPU if there is one.

    Errors: ValueError for a folder without CLIP, for damaged or partial weights, for another
        preprocessing than a resize and a centre crop, and for a model that cannot be downloaded,
        with what to download and where to put it.
    """
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ValueError("CLIP needs transformers: pip install 'mezzotint[text]'") from error
    folder = find_clip(name)
    file = folder / "model.safetensors"
    is_vit_l14 = file.is_file() and sha256_of_file(file) == VIT_L14_SHA256
    if name == VIT_L14 and not is_vit_l14:
        raise ValueError(
            f"{file} is not the published one (revision {REVISIONS[name]}, SHA-256 "
            f"{VIT_L14_SHA256}); delete {folder} and run mezzotint download {name}"
        )
    kind = read_json(folder / "config.json", "give a folder that transformers saved")
    if kind.get("model_type") != "clip":
        raise ValueError(
            f"{folder} holds a {kind.get('model_type')!r} model; give CLIP's, e.g. {VIT_L14}"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            loaded: Any = CLIPModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # transformers, tokenizers and safetensors raise their own
        raise ValueError(
            f"the CLIP model in {folder} cannot be read ({str(error).splitlines()[0]}); it needs "
            f"{', '.join(FILES)}"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"the weights in {folder} lack {len(report['missing_keys'])} tensors, first "
            f"{min(report['missing_keys'])}; download them again"
        )
    preprocessing = read_preprocessing(folder, int(model.config.vision_config.image_size))
    device = torch.device(device or default_device())
    model = model.float().eval().requires_grad_(False).to(device)
    short = "".join(c if c.isalnum() or c in ".-_" else "-" for c in Path(name).name or "clip")
    network = _TextNetwork(model)
    return Clip(
        name=short,
        is_vit_l14=is_vit_l14,
        features=from_module(
            _ImageNetwork(model),
            name=short,
            dims=int(model.config.projection_dim),
            prepare=preprocessing,
            input=preprocessing.describe(),
        ),
        max_tokens=int(model.config.text_config.max_position_embeddings),
        text_hash=_hash_texts(sha256_of_module(network), hash_tokenizer(folder)),
        network=network,
        tokenizer=tokenizer,
    )


def _hash_texts(*texts: str) -> str:
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()


def find_clip(name: str, fetch: bool = True) -> Path:
    """Return the folder of a CLIP model; see `find_pretrained`."""
    return find_pretrained(KIND, name, fetch, REVISIONS.get(name))


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """Return the preprocessing that a folder's preprocessor_config.json states, or CLIP's own.

    Args:
        image_size: of the network.

    Errors: ValueError for anything but a bicubic resize of the shorter side, a square centre crop
        to the network's size, and a normalisation.
    """
    path = folder / "preprocessor_config.json"
    own = Preprocessing(size=image_size, crop=image_size)
    if not path.is_file():
        return own
    values = read_json(path)

    def side(value: Any, *keys: str) -> Any:
        """Return the one number that stands for all keys; None if it is anything else."""
        given = [value.get(k) for k in keys] if isinstance(value, dict) else [value]
        return given[0] if len(set(given)) == 1 and isinstance(given[0], int) else None

    size = side(values.get("size", own.size), "shortest_edge")
    crop = side(values.get("crop_size", own.crop), "height", "width")
    steps = [f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")]
    mean, std = values.get("image_mean", MEAN), values.get("image_std", STD)
    if (
        values.get("resample", 3) != Image.Resampling.BICUBIC
        or not all(values.get(step, True) for step in steps)
        or size is None
        or crop != image_size
        or not size >= crop
        or any(len(v) != 3 for v in (mean, std))
    ):
        raise ValueError(
            f"{path} asks for another preprocessing than CLIP's: its shorter side to `size` by "
            f"bicubic, a square centre crop to the network's {image_size} px, mean and std"
        )
    return Preprocessing(size=size, crop=crop, mean=tuple(mean), std=tuple(std))
