"""The network as samplers call it: in tiles, by CUDA graphs, compiled, in the settings' dtype."""

from __future__ import annotations

import torch

from mezzotint.backbones.blocks import compile_blocks
from mezzotint.backbones.precision import share_weights
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Model, PerImage
from mezzotint.sampling.cuda_graphs import CudaGraphDenoiser, Recorder
from mezzotint.sampling.settings import DTYPES, SamplingSettings, resolve_dtype

TILE_SIZE = 4  # images; a larger tile is a little faster for many images and slower for one
FIRST_CALLS = 8  # of a batch size before its graph is recorded, which takes as long as 4 calls


def model_denoiser(
    model: Model, settings: SamplingSettings, recorder: Recorder | None = None
) -> Denoiser:
    """Return the unguided model as the settings ask for it.

    The weights are cast now, once: call this again after they have changed.

    Args:
        recorder: replaces CUDA graphs, in tests.

    Errors: ValueError for CUDA graphs without a CUDA device, or of a model evaluated in tiles.
    """
    device = next(model.parameters()).device
    check_cuda_graphs(settings, device, emulated=recorder is not None)
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    if settings.compile or dtype != torch.float32:
        model = share_weights(model, None if dtype == torch.float32 else dtype)
    denoise: Denoiser = model
    if settings.compile:
        compile_blocks(model.backbone)
        denoise = padded_to_seen(denoise)
    if settings.cuda_graphs:
        denoise = CudaGraphDenoiser(denoise, recorder)
    elif is_exact(settings, device):
        denoise = batched_by_tile(denoise)
    elif settings.cuda_graphs is None and (device.type == "cuda" or recorder is not None):
        # Guidance doubles a batch.
        sizes = {1, 2, settings.batch, 2 * settings.batch}
        denoise = CudaGraphDenoiser(denoise, recorder, sizes, FIRST_CALLS, required=False)
    return denoise if dtype == torch.float32 else autocast_denoiser(denoise, dtype)


def is_exact(settings: SamplingSettings, device: torch.device) -> bool:
    """Return whether the network is evaluated in tiles of one size."""
    return device.type == "cpu" if settings.exact is None else settings.exact


def check_cuda_graphs(
    settings: SamplingSettings, device: torch.device, emulated: bool = False
) -> None:
    """Raise ValueError where the settings ask for CUDA graphs that are impossible.

    Args:
        emulated: tests need no CUDA device.
    """
    if settings.cuda_graphs and device.type != "cuda" and not emulated:
        raise ValueError(
            f"cuda_graphs needs a CUDA device and the model is on {device}; leave it out"
        )
    if settings.cuda_graphs and is_exact(settings, device):
        raise ValueError("cuda_graphs cannot evaluate in tiles; leave out exact=True or it")


def batched_by_tile(denoise: Denoiser, size: int = TILE_SIZE) -> Denoiser:
    """Return the same denoiser, called with exactly `size` images at a time.

    Matrix kernels choose their blocking, and with it their rounding, by the shape of the call. With
    one shape for every call an image's bytes do not depend on its batch.
    """

    def denoise_tiles(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        tiles = [
            _denoise_rows(denoise, torch.arange(start, start + size), z, logsnr, cond)
            for start in range(0, len(z), size)
        ]
        x, eps, var = zip(*tiles, strict=True)
        learned = None if var[0] is None else torch.cat(var)[: len(z)]
        return Denoised(torch.cat(x)[: len(z)], torch.cat(eps)[: len(z)], learned)

    return denoise_tiles


def padded_to_seen(denoise: Denoiser) -> Denoiser:
    """Return the same denoiser, which fills a batch up to the smallest size seen that holds it.

    A compiled network is compiled again for every new batch size: for a last batch that is not
    full, this takes longer than computing a full one.
    """
    seen: set[int] = set()

    def denoise_padded(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        size = min((n for n in seen if n >= len(z)), default=len(z))
        seen.add(size)
        if size == len(z):
            return denoise(z, logsnr, cond)
        x, eps, var = _denoise_rows(denoise, torch.arange(size), z, logsnr, cond)
        return Denoised(x[: len(z)], eps[: len(z)], None if var is None else var[: len(z)])

    return denoise_padded


def _denoise_rows(
    denoise: Denoiser, rows: torch.Tensor, z: Image, logsnr: PerImage, cond: Cond
) -> Denoised:
    """Denoise rows of a batch; rows beyond its end are copies of its last image."""
    rows = rows.clamp(max=len(z) - 1)
    on_device = rows.to(z.device)
    return denoise(z[on_device], logsnr[rows.to(logsnr.device)], cond[on_device])


def autocast_denoiser(denoise: Denoiser, dtype: torch.dtype) -> Denoiser:
    """Return the denoiser with its matrix products in another dtype (autocast)."""

    def denoise_autocast(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        with torch.autocast(z.device.type, dtype):
            return denoise(z, logsnr, cond)

    return denoise_autocast
