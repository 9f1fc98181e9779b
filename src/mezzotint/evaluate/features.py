"""Named feature sets: a network, how its input is made, its weights' hash, and what a distance on it may be called.

`open_features` gives them by name; `from_module` and `from_hub` make one of any module. `features_of` runs them over
images. Only the published Inception with the TensorFlow resize gives a distance called "FID".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.core import files
from mezzotint.core.registry import suggest
from mezzotint.core.tensor_files import sha256_of_module
from mezzotint.evaluate import inception
from mezzotint.evaluate.resize import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_RULES,
    Prepare,
    as_uint8,
    normalised,
)

NETWORK_BATCH = 32  # images per forward pass, always; see `stream`
# Folded copy of the same 2015 weights, as published with public image-recognition samples, up to Mixed_7a.
KNOWN_INCEPTION = {
    inception.INCEPTION_FILE.sha256,
    "0a671d884145fee795ce6cb82852abf8c60c0824afe4b3e89f2cab69116c4ffa",
}


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """One vector per image.

    name: as `open_features` takes it. distance: what a Fréchet distance on these features is called in print.
    dims: length of a vector. channels: of the images read. input: size and resize rule in words.
    weights: SHA-256 of the weights. prepare: uint8 images to the network's input.
    network, tap: network(prepared images, taps wanted) -> {tap: (b, dims)}, of which `tap` is this set.
    """

    name: str
    distance: str
    dims: int
    channels: int = 3
    input: str
    weights: str
    prepare: Prepare = field(repr=False)
    network: nn.Module = field(repr=False)
    tap: str = "features"

    def card(self) -> dict[str, Any]:
        """What a number computed on these features must say of them."""
        return {"name": self.name, "dims": self.dims, "input": self.input, "weights": self.weights}

    @property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of `card`: equal for equal networks fed in the same way."""
        return hashlib.sha256(json.dumps(self.card(), sort_keys=True).encode()).hexdigest()[:16]

    def __call__(self, images: Tensor) -> Float[Tensor, "n d"]:
        """Features of uint8 images (or floats in [0, 1]), (n, channels, h, w), in float32 on the CPU."""
        return compute_features([self], [images])[self.name]


class _Single(nn.Module):
    """A module of one output as a feature set's network."""

    def __init__(self, module: nn.Module, dims: int, name: str):
        super().__init__()
        self.module, self.dims, self.name = module, dims, name

    def forward(self, x: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """{"features": module(x)}, after a look at the shape."""
        out = self.module(x)
        if not isinstance(out, Tensor) or out.shape != (len(x), self.dims):
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"feature network {self.name!r} returned {given}; expected {(len(x), self.dims)}"
            )
        return {"features": out}


def _inception_distance(tap: str, rule: str, sha256: str) -> str:
    base = {"2048": "FID", "sfid": "sFID"}.get(tap) if sha256 in KNOWN_INCEPTION else None
    base = base or f"FD-Inception-{tap}" + (
        "" if sha256 in KNOWN_INCEPTION else f" (weights {sha256[:8]})"
    )
    return f"{base} ({rule} resize)" if rule else base


def _inception_sets(
    names: Sequence[str], path: str | Path | None, device: torch.device
) -> list[FeatureSet]:
    """Feature sets "inception-TAP" or "inception-TAP:RULE" on one network."""
    for name in names:
        tap, _, rule = name.removeprefix("inception-").partition(":")
        if tap not in inception.TAPS or rule not in INCEPTION_RULES:
            raise ValueError(f"unknown feature set {name!r}; {suggest(name, feature_set_names())}")
    file = Path(path) if path is not None else files.locate_file(inception.INCEPTION_FILE)
    # The published file has a published hash; a file that bears its name must have it too.
    file = (
        files.check_sha256(file, inception.INCEPTION_FILE)
        if file.name == inception.INCEPTION_FILE.name
        else file
    )
    sha256 = files.sha256_of_file(file)
    network = inception.load_inception(file).to(device)
    sets: list[FeatureSet] = []
    for name in names:
        tap, _, rule = name.removeprefix("inception-").partition(":")
        if tap not in network.taps:
            have = ", ".join(f"inception-{t}" for t in network.taps)
            raise ValueError(f"{file} ends at Mixed_7a and has no {name}; it gives {have}")
        words, prepare = INCEPTION_RULES[rule]
        sets.append(
            FeatureSet(
                name=name,
                distance=_inception_distance(tap, rule, sha256),
                dims=inception.TAPS[tap],
                input=words,
                weights=sha256,
                prepare=prepare,
                network=network,
                tap=tap,
            )
        )
    return sets


def _digits(path: str | Path | None, device: torch.device) -> FeatureSet:
    from mezzotint.evaluate import digit_classifier

    if path is not None:
        raise ValueError(
            "feature set 'digits' trains its own network and reads no weights; leave the path out"
        )
    net = digit_classifier.train_digit_classifier().network
    return FeatureSet(
        name="digits",
        distance="FD-digits",
        dims=digit_classifier.FEATURES,
        channels=1,
        input=f"{digit_classifier.SIZE} px grey, antialiased bilinear, v / 127.5 - 1",
        weights=sha256_of_module(net),
        prepare=digit_classifier.prepare,
        network=_Single(
            digit_classifier.DigitFeatures(net), digit_classifier.FEATURES, "digits"
        ).to(device),
    )


def _dinov2(path: str | Path | None, device: torch.device) -> FeatureSet:
    return from_hub(
        str(path) if path is not None else "facebook/dinov2-large", name="dinov2", device=device
    )


SINGLE: dict[str, Callable[[str | Path | None, torch.device], FeatureSet]] = {
    "digits": _digits,
    "dinov2": _dinov2,
}


def feature_set_names() -> list[str]:
    """Every name that `open_features` takes."""
    suffixes = [f":{rule}" if rule else "" for rule in INCEPTION_RULES]
    return [f"inception-{tap}{suffix}" for tap in inception.TAPS for suffix in suffixes] + sorted(
        SINGLE
    )


def default_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_features(
    names: Sequence[str], path: str | Path | None = None, device: str | torch.device | None = None
) -> list[FeatureSet]:
    """Feature sets by name; those of one network share it, so that it runs once per image.

    Args:
        names: of `known()`. "inception-2048" is the FID's, "inception-sfid", "inception-logits" and smaller taps come
            from the same network; ":clean" or ":pytorch" feeds it like those packages.
        path: weights; for Inception a .pth or .safetensors (else cache or download), for DINOv2 a folder.
        device: of the network; CUDA when there is one.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"feature sets {list(names)}: name at least one, none twice; known: {', '.join(feature_set_names())}"
        )
    where = default_device() if device is None else torch.device(device)
    for name in names:
        if not name.startswith("inception-") and name not in SINGLE:
            raise ValueError(f"unknown feature set {name!r}; {suggest(name, feature_set_names())}")
    shared = [name for name in names if name.startswith("inception-")]
    made = {s.name: s for s in (_inception_sets(shared, path, where) if shared else [])}
    return [made[name] if name in made else SINGLE[name](path, where) for name in names]


def _own_name(name: str) -> str:
    """`name`, unless it could be taken for another feature set's or for a FID."""
    plain = bool(name) and all(c.isalnum() or c in ".-_" for c in name)
    if name in feature_set_names() or not plain or "fid" in name.lower():
        raise ValueError(
            f"name {name!r}: letters, digits, dots and dashes, not one of {', '.join(feature_set_names())}, no 'FID'"
        )
    return name


def from_module(
    module: nn.Module,
    *,
    name: str,
    dims: int,
    prepare: Prepare | None = None,
    input: str | None = None,
    size: int = 224,
    channels: int = 3,
) -> FeatureSet:
    """A feature set of any module; distances on it are called "FD-NAME".

    Args:
        module: (b, channels, size, size) -> (b, dims); put into eval mode, used on the device where it is.
        name: of letters, digits, dots, dashes; none of `known()`.
        prepare: uint8 images -> the module's input, with `input` saying in words what it does (they go on the card);
            without it: antialiased bicubic to `size`, ImageNet's mean and standard deviation (0.5 for grey).
    """
    if (prepare is None) != (input is None):
        raise ValueError(
            "give `prepare` and `input` (its description for the card) together, or neither"
        )
    if prepare is None:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
        prepare = normalised(size, mean, std)
        input = f"{size} px, antialiased bicubic, mean {mean}, std {std}"
    assert input is not None
    return FeatureSet(
        name=_own_name(name),
        distance=f"FD-{name}",
        dims=dims,
        channels=channels,
        input=input,
        weights=sha256_of_module(module),
        prepare=prepare,
        network=_Single(module.eval(), dims, name),
    )


class _ClassToken(nn.Module):
    """The class token after the last layer norm of a vision transformer of the `transformers` library."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, s, s) -> (b, dims)."""
        return self.transformer(pixel_values=x).last_hidden_state[:, 0]


def from_hub(
    repo: str,
    *,
    name: str,
    size: int = 224,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> FeatureSet:
    """The class token of a vision transformer on the Hugging Face hub or in a folder; safetensors only, no code.

    `name` "dinov2" is kept for FD-DINOv2 (Stein et al. 2023): ViT-L/14, 224 px. Input: antialiased bicubic, ImageNet's
    mean and standard deviation, as in EDM2. transformers resamples the position embedding to exact size where the
    original repository offsets it by 0.1, so the features differ slightly from the original's: compare only numbers of
    one code.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ValueError(
            "features of hub models need transformers: pip install 'mezzotint[text]'"
        ) from error
    try:
        model = AutoModel.from_pretrained(
            repo, revision=revision, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{repo} cannot be loaded ({str(error).splitlines()[0]}); fetch it where there is a network "
            f"(hf download {repo}) and give the folder"
        ) from error
    dims = int(model.config.hidden_size)
    if name == "dinov2" and (dims, size) != (1024, 224):
        raise ValueError(
            f"{repo} gives {dims} dimensions at {size} px; DINOv2 ViT-L/14 has 1024 at 224. Choose a name"
        )
    where = default_device() if device is None else torch.device(device)
    token = _ClassToken(model.float().eval().requires_grad_(False)).to(where)
    return FeatureSet(
        name=name if name == "dinov2" else _own_name(name),
        distance="FD-DINOv2" if name == "dinov2" else f"FD-{name}",
        dims=dims,
        input=f"{size} px, antialiased bicubic, ImageNet mean and std",
        weights=sha256_of_module(model),
        prepare=normalised(size, IMAGENET_MEAN, IMAGENET_STD),
        network=_Single(token, dims, name),
    )


def _rebatched(batches: Iterable[Tensor], channels: int) -> Iterator[Tensor]:
    """The same images, NETWORK_BATCH at a time; ValueError for mixed sizes."""
    held: list[Tensor] = []
    count, seen = 0, None
    for batch in batches:
        images = as_uint8(batch, channels)
        seen = seen or images.shape[1:]
        if images.shape[1:] != seen:
            raise ValueError(
                f"images of {tuple(images.shape[1:])} after images of {tuple(seen)}; give one size"
            )
        held.append(images)
        count += len(images)
        if count >= NETWORK_BATCH:
            *whole, rest = torch.cat(held).split(NETWORK_BATCH)
            if len(rest) == NETWORK_BATCH:
                whole, rest = [*whole, rest], rest[:0]
            yield from whole
            held, count = [rest], len(rest)
    if count:
        yield torch.cat(held)


def stream(sets: Sequence[FeatureSet], batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Features by set name, batch by batch, float32 on the networks' device.

    However the images arrive, a network always sees exactly NETWORK_BATCH of them (the last batch is padded), so an
    image's features are bitwise the same whatever its neighbours, the caller's batch size or the number of ranks.
    Float32 throughout: no autocast, no TF32, which moves features by 1e-3.
    """
    channels = {s.channels for s in sets}
    if len(channels) != 1:
        raise ValueError(
            f"feature sets {[s.name for s in sets]} read images of {sorted(channels)} channels; run them apart"
        )
    for images in _rebatched(batches, channels.pop()):
        yield _features_of_one_batch(sets, images)


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(allow_tf32=False, deterministic=True),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.inference_mode()
def _features_of_one_batch(sets: Sequence[FeatureSet], images: Tensor) -> dict[str, Tensor]:
    n = len(images)
    padded = torch.cat([images, images[-1:].expand(NETWORK_BATCH - n, -1, -1, -1)])
    out: dict[str, Tensor] = {}
    passes: dict[tuple[int, str], list[FeatureSet]] = {}
    for s in sets:
        passes.setdefault((id(s.network), s.input), []).append(s)
    for group in passes.values():
        network = group[0].network
        device = _device_of(network)
        with _exact_float32(device):
            found = network(group[0].prepare(padded.to(device)), [s.tap for s in group])
        for s in group:
            out[s.name] = found[s.tap][:n].float()
            if not out[s.name].isfinite().all():
                raise ValueError(f"features {s.name!r} are not finite; are the weights damaged?")
    return {s.name: out[s.name] for s in sets}


def _device_of(network: nn.Module) -> torch.device:
    first = next(network.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def compute_features(sets: Sequence[FeatureSet], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Features of all images by set name, each (n, dims) float32, on the CPU."""
    parts: dict[str, list[Tensor]] = {s.name: [] for s in sets}
    for found in stream(sets, batches):
        for name, rows in found.items():
            parts[name].append(rows.cpu())
    return {
        s.name: torch.cat(parts[s.name]) if parts[s.name] else torch.empty(0, s.dims) for s in sets
    }
