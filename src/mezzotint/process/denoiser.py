"""Types shared by samplers, guidance, objectives and backbones; `Model` connects them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from mezzotint.process.logsnr import append_dims, to_device_of
from mezzotint.process.prediction import Prediction, solve

Image = Float[Tensor, "b c h w"]
PerImage = Float[Tensor, " b"]  # one log-SNR, or one loss, per image
Schedule = Callable[[Tensor], Tensor]  # u in (0, 1), 0 clean -> log-SNR, decreasing


@dataclass(frozen=True, kw_only=True)
class Cond:
    """What the image should show; every field optional, batch first. `cond[rows]` slices the batch.

    label: class index; `num_classes` of the backbone is the null label (no class).
    text: token embeddings; text_mask: True where a token is real, not padding.
    augment: EDM's augmentation label of a training image (`data.augmentation`); None for none.
    """

    label: Integer[Tensor, " b"] | None = None
    text: Float[Tensor, "b t d"] | None = None
    text_mask: Bool[Tensor, "b t"] | None = None
    augment: Float[Tensor, "b 9"] | None = None

    def __getitem__(self, rows: slice | Tensor) -> Cond:
        """Return the condition of some images of the batch: a slice, or indices or a mask."""
        return self.map(lambda t: t[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> Cond:
        """Return the same condition with `function` applied to every tensor present."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return replace(self, **{k: function(t) for k, t in fields.items() if t is not None})


class Denoised(NamedTuple):
    """A denoiser's answer: the expected image, its noise, and the learned variance, if any.

    var: -1...1, between the logs of the smallest and largest variance of an ancestral step.
    """

    x: Image
    eps: Image
    var: Image | None = None


@runtime_checkable
class Denoiser(Protocol):
    """A model, as samplers and guidance use it."""

    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """Return the expected image and noise of the state z at log-SNR `logsnr`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parameterisation:
    """How a backbone's output and inputs relate to the log-SNR; one value per family.

    kind: the row that the output predicts.
    noise: log-SNR (b,) -> the number that the network gets as its noise level (b,).
    scale: log-SNR (b,) -> factor on the network's input (b,).
    learned_variance: the output has twice the channels; the second half is `Denoised.var`.
    """

    kind: Prediction
    noise: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor] = torch.ones_like
    learned_variance: bool = False


class Model(nn.Module):
    """A backbone with its parameterisation: a Denoiser for samplers, raw outputs for losses.

    Args:
        backbone: module with forward(z, noise, cond) -> list of outputs, coarse to fine, the finest
            last.
        parameterisation: what those outputs mean.
        info: `mezzotint.models.ModelInfo`, from which the same model can be built again.
        input_dtype: of the backbone's input; None is that of its first parameter.
    """

    def __init__(
        self,
        backbone: nn.Module,
        parameterisation: Parameterisation,
        info: Any = None,
        input_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.parameterisation = parameterisation
        self.info = info
        self.input_dtype = input_dtype

    def raw(self, z: Image, logsnr: PerImage, cond: Cond) -> Sequence[Tensor]:
        """Return the backbone's outputs, coarse to fine, in its dtype; the last has z's size."""
        p = self.parameterisation
        if logsnr.ndim != 1 or logsnr.shape[0] != z.shape[0]:
            raise ValueError(
                f"log-SNRs {tuple(logsnr.shape)} for a batch of {len(z)}; give one per image, "
                f"({len(z)},)"
            )
        # Samplers give log-SNRs on the CPU, where guidance reads them without waiting for the GPU.
        logsnr = to_device_of(logsnr, z)
        dtype = self.input_dtype or next(self.backbone.parameters()).dtype
        scaled = append_dims(p.scale(logsnr), z).to(z.dtype) * z
        return self.backbone(scaled.to(dtype), p.noise(logsnr), cond)

    def finest(self, z: Image, logsnr: PerImage, cond: Cond) -> Tensor:
        """Return the last output of `raw`, of z's size.

        The coarser outputs add zeros to it and to the gradients. So every weight has a gradient:
        DDP waits for it, and a checkpoint holds its optimiser's state.
        """
        *coarse, out = self.raw(z, logsnr, cond)
        if torch.is_grad_enabled():
            for unused in coarse:
                out = out + 0 * unused.mean().to(out)
        return out

    def forward(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """Return the image and noise that the finest output implies, in float32 or wider."""
        return self.interpret(z, self.finest(z, logsnr, cond), logsnr)

    def interpret(self, z: Image, out: Tensor, logsnr: PerImage) -> Denoised:
        """Return the image and noise that a finest output of `raw` implies."""
        var = None
        if self.parameterisation.learned_variance:
            out, var = out.chunk(2, dim=1)
            var = var.to(torch.promote_types(var.dtype, torch.float32))
        return Denoised(*solve(self.parameterisation.kind, z, out, to_device_of(logsnr, z)), var)
