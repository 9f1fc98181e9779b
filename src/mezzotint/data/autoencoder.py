"""Codecs: autoencoders of latent models, and the identity of pixel models.

All scaling constants are here. A codec's latents are in the model's units: the autoencoder's
output, shifted and scaled. Their distribution is given as mean and log-variance, from which
`draw_latents` draws without the autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.core.files import cache_dir, expand_user, read_json
from mezzotint.core.paths import explain_path, is_hub_name
from mezzotint.core.registry import suggest
from mezzotint.core.tensor_files import sha256_of_module

ImageBatch = Float[Tensor, "b c h w"]
LatentBatch = Float[Tensor, "b d i j"]

SD_SCALE = 0.18215  # Stable Diffusion's latents to unit standard deviation; also DiT, DiffiT, DiMR
# Largest side decoded in one piece, in cells. On a GPU 512 px of Stable Diffusion's, as the authors
# decode; on a CPU, whose convolutions copy their input nine times, 256 px.
TILE_CELLS, TILE_CELLS_CPU = 64, 32
KINDS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


@dataclass(frozen=True, kw_only=True)
class Release:
    """A published autoencoder: repository on the hub, its files, approximate size, licence."""

    repo: str
    files: tuple[str, ...]
    megabytes: int
    licence: str
    scale: float | None = None  # None: that of its config


DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
_TAESD = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")
RELEASES = {
    **{
        name: Release(
            repo=f"stabilityai/{name}",
            files=DIFFUSERS_FILES,
            megabytes=335,
            licence="MIT",
            scale=SD_SCALE,
        )
        for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")
    },
    "taesd": Release(repo="madebyollin/taesd", files=_TAESD, megabytes=5, licence="MIT"),
}
SD_LATENTS = tuple(RELEASES)  # these three share a latent space: TAESD decodes the others' latents


@runtime_checkable
class Codec(Protocol):
    """Images in [-1, 1] to latents and back.

    name: as given to `open_codec`; a folder as an absolute path. factor: pixels per cell, on each
    side. channels: of the latents. scale, shift: latent = scale (autoencoder's output - shift).
    hash: SHA-256 of the weights.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def factor(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def scale(self) -> float: ...  # noqa: D102
    @property
    def shift(self) -> float: ...  # noqa: D102
    @property
    def hash(self) -> str: ...  # noqa: D102

    def encode_moments(self, images: ImageBatch) -> tuple[LatentBatch, LatentBatch]:
        """Return mean and log-variance of the latents of images in [-1, 1].

        A deterministic codec's log-variance is -inf.
        """
        ...

    def decode(self, latents: LatentBatch, tile: int | None = None) -> ImageBatch:
        """Return images in [-1, 1], decoded one at a time; sides above `tile` cells in tiles."""
        ...


def draw_latents(
    mean: Float[Tensor, "*shape"], logvar: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return z = mean + exp(logvar / 2) noise (Kingma and Welling 2013, 2.4), at least float32."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    return torch.addcmul(mean.to(wide), (logvar.to(wide) / 2).exp(), noise.to(wide))


@final
@dataclass(frozen=True)
class Pixels:
    """The identity codec, of networks that work on pixels."""

    name: str = "pixels"
    factor: int = 1
    channels: int = 3
    scale: float = 1.0
    shift: float = 0.0
    hash: str = "pixels"

    def encode_moments(self, images: ImageBatch) -> tuple[LatentBatch, LatentBatch]:
        """Return the images, with log-variance -inf."""
        return images, torch.full_like(images, -torch.inf)

    def decode(self, latents: LatentBatch, tile: int | None = None) -> ImageBatch:
        """Return the latents, clamped to [-1, 1]."""
        return latents.clamp(-1, 1)


@final
class Autoencoder:
    """An autoencoder of diffusers as a codec, in float32 and eval mode; see `Codec`.

    Images are encoded and decoded one at a time: the result of one depends on no other, bit for
    bit, and the memory needed is that of one.
    """

    def __init__(self, name: str, vae: nn.Module, device: torch.device, scale: float | None = None):
        config: Any = vae.config
        widths = config[
            "block_out_channels" if "block_out_channels" in config else "encoder_block_out_channels"
        ]
        if config["in_channels"] != 3:
            raise ValueError(
                f"{name} encodes {config['in_channels']} channels; a codec of RGB images has 3"
            )
        self.name = name
        self.vae: Any = vae.to(device).eval().requires_grad_(False)
        self.device = device
        self._hash: str | None = None
        self.factor = 2 ** (len(widths) - 1)
        self.channels = int(config["latent_channels"])
        self.scale = float(config.get("scaling_factor") or 1.0) if scale is None else scale
        self.shift = float(config.get("shift_factor") or 0.0)

    @property
    def hash(self) -> str:
        """SHA-256 of all weights: names, shapes, bytes; computed on first use."""
        if self._hash is None:
            self._hash = sha256_of_module(self.vae)
        return self._hash

    @torch.no_grad()
    def encode_moments(self, images: ImageBatch) -> tuple[LatentBatch, LatentBatch]:
        """Return mean and log-variance of images (b, 3, h, w) in [-1, 1].

        Both are (b, channels, h / factor, w / factor) in float32.

        Errors: ValueError for sides that are not multiples of `factor` or non-finite latents.
        """
        if images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"images {tuple(images.shape[1:])} do not fit codec {self.name}: it takes 3 "
                f"channels and sides that are multiples of {self.factor}"
            )
        moments = [self._moments(image[None].to(self.device, torch.float32)) for image in images]
        mean, logvar = (torch.cat(parts) for parts in zip(*moments, strict=True))
        if not torch.isfinite(mean).all() or torch.isnan(logvar).any():
            raise ValueError(
                f"codec {self.name} gives latents that are not finite; are its weights intact?"
            )
        return mean, logvar

    def _moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.vae.encode(image)
        if "latent_dist" in encoded:
            posterior = encoded.latent_dist
            mean, logvar = posterior.mean, posterior.logvar + 2 * torch.tensor(self.scale).log()
        else:  # diffusers calls it "latents" or "latent"
            (mean,) = encoded.values()
            logvar = torch.full_like(mean, -torch.inf)
        return self.scale * (mean - self.shift), logvar

    @torch.no_grad()
    def decode(self, latents: LatentBatch, tile: int | None = None) -> ImageBatch:
        """Return images (b, 3, h factor, w factor) in [-1, 1] of latents (b, channels, h, w).

        Args:
            tile: larger sides are decoded in tiles of so many cells, a quarter overlapping and
                blended. This bounds memory and changes pixels slightly. None: 64, on a CPU 32.

        Errors: ValueError for another number of channels; FloatingPointError for images that are
            not finite numbers.
        """
        if latents.shape[1] != self.channels:
            raise ValueError(
                f"latents of {latents.shape[1]} channels do not fit codec {self.name}, which has "
                f"{self.channels}"
            )
        if tile is None:
            tile = TILE_CELLS_CPU if self.device.type == "cpu" else TILE_CELLS
        if tile < 4:
            raise ValueError(f"tile {tile}: at least 4 cells, e.g. 32")

        def decode_one(z: Tensor) -> Tensor:
            return self.vae.decode(z / self.scale + self.shift).sample

        images = []
        for z in latents.to(self.device, torch.float32).split(1):
            if max(z.shape[2:]) <= tile:
                image = decode_one(z)
            else:
                image = decode_tiled(decode_one, z, tile, self.factor)
            if not image.isfinite().all():
                raise FloatingPointError(
                    f"codec {self.name} decodes image {len(images)} of a batch to numbers that are "
                    "not finite; the latents or the codec's weights are damaged"
                )
            images.append(image.clamp(-1, 1))
        side = [n * self.factor for n in latents.shape[2:]]
        return torch.cat(images) if images else torch.empty(0, 3, *side, device=self.device)


def decode_tiled(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int, factor: int) -> Tensor:
    """Return decode(z), z (1, c, h, w), from overlapping tiles weighted by distance to edges."""

    def starts(side: int) -> list[int]:
        return [*range(0, max(side - tile, 0), tile - tile // 4), max(side - tile, 0)]

    height, width = (n * factor for n in z.shape[2:])
    total, weight = z.new_zeros(1, 3, height, width), z.new_zeros(height, width)
    for top in starts(z.shape[2]):
        for left in starts(z.shape[3]):
            image = decode(z[:, :, top : top + tile, left : left + tile])
            rows, columns = (_tent(n, tile // 4 * factor, image) for n in image.shape[2:])
            share = rows[:, None] * columns
            corner = (..., slice(top * factor, None), slice(left * factor, None))
            total[corner][..., : image.shape[2], : image.shape[3]] += image * share
            weight[corner][..., : image.shape[2], : image.shape[3]] += share
    return total / weight


def _tent(length: int, ramp: int, like: Tensor) -> Tensor:
    """Return weights along one side that rise over `ramp` pixels, stay at 1, and fall."""
    i = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return torch.minimum(torch.minimum(i, length - i) / ramp, torch.ones_like(i))


def open_codec(name: str | Path, device: torch.device | str = "cpu") -> Codec:
    """Open a codec by name.

    Args:
        name: "pixels"; "sd-vae-ft-ema", "sd-vae-ft-mse" or "taesd"; an autoencoder of diffusers as
            a folder or as OWNER/NAME on the hub; or a folder with taesd_encoder.safetensors and
            taesd_decoder.safetensors.
        device: where it computes.

    Errors: ValueError for an unknown name, a folder without autoencoder, damaged weights, and files
        that cannot be downloaded, with what to download and where to put it.
    """
    if str(name) == "pixels":
        return Pixels()
    folder = find_autoencoder(str(name))
    known = RELEASES.get(str(name))
    own_name = str(name) if not expand_user(name).is_dir() else str(folder)
    vae = _taesd(folder) if (folder / _TAESD[0]).is_file() else _diffusers(folder)
    return Autoencoder(own_name, vae, torch.device(device), known.scale if known else None)


def find_autoencoder(name: str, fetch: bool = True) -> Path:
    """Return the folder of an autoencoder: `name` itself, in our cache or the hub's, or downloaded.

    Args:
        fetch: whether it may be downloaded.

    Errors: ValueError as `open_codec`.
    """
    path = expand_user(name)
    if path.is_dir():
        return path.resolve()
    ours = cache_dir() / "codecs" / name
    if name in RELEASES and ours.is_dir():
        return ours
    if name not in RELEASES and not is_hub_name(name):
        raise ValueError(
            f"no codec {name!r}: neither a folder nor OWNER/NAME of the hub; "
            f"{explain_path(name, 'a folder of an autoencoder')}; "
            f"{suggest(name, ['pixels', *RELEASES])}"
        )
    release = RELEASES.get(name) or Release(
        repo=name, files=DIFFUSERS_FILES, megabytes=0, licence=""
    )
    from huggingface_hub import snapshot_download

    try:
        patterns = list(release.files)
        return Path(
            snapshot_download(release.repo, allow_patterns=patterns, local_files_only=not fetch)
        )
    except Exception as error:  # the hub, the network and the cache raise their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        size = f" ({release.megabytes} MB, {release.licence})" if release.megabytes else ""
        place = ours if name in RELEASES else "any folder"
        raise ValueError(
            f"codec {name} is not on this machine and could not be downloaded: {first}. Download "
            f"{' and '.join(release.files)} of the hub's {release.repo}{size} on a machine with a "
            f"network (mezzotint download {name}) and put them into {place}, or give the folder "
            "that holds them as the codec"
        ) from None


def if_cached(name: str, device: torch.device | str = "cpu") -> Codec | None:
    """Return the codec if its files are on this machine, else None; nothing is downloaded."""
    try:
        find_autoencoder(name, fetch=False)
    except ValueError:
        return None
    return open_codec(name, device)


def _diffusers(folder: Path) -> nn.Module:
    """Load the folder of diffusers' `save_pretrained`, or its subfolder "vae"."""
    diffusers = _import_diffusers()
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    try:
        kind = read_json(folder / "config.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no autoencoder: {error!r}; give a folder with "
            f"{' and '.join(DIFFUSERS_FILES)}, or with "
            f"{' and '.join(_TAESD)}"
        ) from None
    if kind not in KINDS:
        raise ValueError(
            f"{folder} holds a {kind}; codecs are autoencoders of images: {', '.join(KINDS)}"
        )
    try:
        loaded, report = getattr(diffusers, kind).from_pretrained(
            str(folder),
            torch_dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
        )
    except Exception as error:  # safetensors, pickle, json, shape errors of torch
        raise ValueError(
            f"the weights of {folder} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} lacks the weights {', '.join(report['missing_keys'][:4])}, ...; "
            "download it again"
        )
    return loaded


def _taesd(folder: Path) -> nn.Module:
    """Load TAESD from its author's two files.

    The author's modules are plain sequences. diffusers' encoder has the same indices. Its decoder
    clamps, tanh(x / 3) 3, in `forward` and not as layer 0, so that every later index is one less.
    """
    from safetensors.torch import load_file

    vae = _import_diffusers().AutoencoderTiny()
    state: dict[str, Tensor] = {}
    for part, file, shift in (("encoder", _TAESD[0], 0), ("decoder", _TAESD[1], 1)):
        try:
            tensors = load_file(folder / file)
        except Exception as error:  # safetensors raises its own
            raise ValueError(
                f"{folder / file} cannot be read: {error}; download it again"
            ) from None
        for key, tensor in tensors.items():
            index, _, rest = key.partition(".")
            if not index.isdigit():
                raise ValueError(f"{folder / file} is no TAESD {part}: unexpected key {key!r}")
            state[f"{part}.layers.{int(index) - shift}.{rest}"] = tensor
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{folder} holds no TAESD: {str(error).splitlines()[1].strip()[:200]}"
        ) from None
    return vae


def _import_diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("autoencoders need diffusers: pip install 'mezzotint[latent]'") from error
    return diffusers


def check_codec_fits(codec: Codec, channels: int, what: str) -> None:
    """Raise ValueError unless the latents have `channels` channels, those of `what`'s input."""
    if codec.channels != channels:
        raise ValueError(
            f"codec {codec.name} has latents of {codec.channels} channels, {what} takes "
            f"{channels}; use a codec of {channels} channels or set model.channels={codec.channels}"
        )
