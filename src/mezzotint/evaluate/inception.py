"""Inception-v3 of FID, sFID and the Inception Score: the TensorFlow graph of 2015-12-05.

It is the network of Szegedy et al. 2016 (table 1, figures 5 to 7, with factorised 7x7 convolutions)
except for two quirks: average pools exclude the padding from the mean, and the last block pools by
maximum. Batch norm is folded into the convolutions when the weights are loaded. Layers are named as
in the PyTorch conversion of the weights by M. Seitzer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.core.files import PublishedFile
from mezzotint.core.tensor_files import open_safetensors, open_torch_file

BN_EPS = 1e-3  # of the graph's batch norms
# Dimensions of each tap, from the image to the output; see `Inception.forward`.
TAPS = {
    "64": 64,
    "192": 192,
    "sfid": 17 * 17 * 7,
    "768": 768,
    "1280": 1280,
    "2048": 2048,
    "logits": 1008,
}
PARTIAL_TAPS = ("64", "192", "sfid", "768", "1280")  # of weights that end at Mixed_7a


class Conv(nn.Conv2d):
    """A convolution with folded batch norm, then ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""
        return F.relu(super().forward(input))


def _average_pool(x: Tensor) -> Tensor:
    # Quirk: the padding is excluded from the mean.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """A block at 35 x 35 (Szegedy et al. 2016, figure 5)."""

    def __init__(self, channels: int, pool: int):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, 35, 35) -> (b, 224 + pool, 35, 35)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], 1)


class BlockB(nn.Module):
    """A block from 35 x 35 to 17 x 17 (Szegedy et al. 2016, figure 10)."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 288, 35, 35) -> (b, 768, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """A block at 17 x 17, its 7x7 convolutions as 1x7 and 7x1 (Szegedy et al. 2016, figure 6)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7_3 = Conv(inner, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = Conv(channels, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = Conv(inner, inner, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = Conv(inner, inner, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = Conv(inner, 192, (1, 7), padding=(0, 3))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 768, 17, 17) -> the same; the first 192 channels are the graph's mixed_n/conv."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], 1)


class BlockD(nn.Module):
    """A block from 17 x 17 to 8 x 8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 768, 17, 17) -> (b, 1280, 8, 8)."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """A block at 8 x 8 with expanded filter banks (Szegedy et al. 2016, figure 7).

    Args:
        max_pool: pool by maximum, the quirk of the last block.
    """

    def __init__(self, channels: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, 8, 8) -> (b, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        fans = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        fans += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *fans, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """The network with its taps.

    Args:
        partial: without Mixed_7b, Mixed_7c and the classifier, for weights that end at Mixed_7a.
    """

    def __init__(self, partial: bool = False):
        super().__init__()
        self.taps = PARTIAL_TAPS if partial else tuple(TAPS)
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, inner=128)
        self.Mixed_6c = BlockC(768, inner=160)
        self.Mixed_6d = BlockC(768, inner=160)
        self.Mixed_6e = BlockC(768, inner=192)
        self.Mixed_7a = BlockD(768)
        if not partial:
            self.Mixed_7b = BlockE(1280, max_pool=False)
            self.Mixed_7c = BlockE(2048, max_pool=True)
            self.fc = nn.Linear(2048, TAPS["logits"])

    def forward(self, x: Float[Tensor, "b 3 299 299"], taps: Collection[str]) -> dict[str, Tensor]:
        """Return features by tap, each (b, TAPS[tap]) float32.

        "64", "192", "768", "1280", "2048": spatial means after the first and second max pool,
        Mixed_6e, Mixed_7a and Mixed_7c. "sfid": the first 7 channels of Mixed_6d's 1x1 branch (the
        graph's mixed_6/conv), in the order row, column, channel (Nash et al. 2021, section 5; 2,023
        numbers). "logits": without their bias, as in the original code of the Inception Score and
        in ADM's.

        Args:
            x: images scaled to (v - 128) / 128 for v in 0...255, see `resize`.
            taps: stages after the last one of these are not computed.
        """
        for tap in taps:
            if tap not in self.taps:
                reason = "; these weights end at Mixed_7a" if tap in TAPS else ""
                raise ValueError(f"no tap {tap!r}; known: {', '.join(self.taps)}{reason}")
        features: dict[str, Tensor] = {}
        for tap, value in self._stages(x):
            if tap in taps:
                features[tap] = value.mean((2, 3)) if value.ndim == 4 else value
            if len(features) == len(set(taps)):
                break
        return features

    def _stages(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each tap's name and map (or vector), in the order of computation."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        yield "64", x
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        yield "192", x
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        yield "sfid", x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        yield "768", x
        x = self.Mixed_7a(x)
        yield "1280", x
        x = self.Mixed_7c(self.Mixed_7b(x))
        yield "2048", x
        yield "logits", F.linear(x.mean((2, 3)), self.fc.weight)


def fold_batch_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge every NAME.conv and NAME.bn of a state dict into one convolution NAME.

    Its weight is W gamma / sqrt(var + eps), its bias beta - mean gamma / sqrt(var + eps), computed
    in float64 and returned in float32. Keys of folded layers and of the classifier stay.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, is_unfolded, _ = key.partition(".conv.weight")
        if is_unfolded:
            try:
                gamma, beta, mean, var = (
                    state[f"{layer}.bn.{name}"].double()
                    for name in ("weight", "bias", "running_mean", "running_var")
                )
            except KeyError as missing:
                raise ValueError(f"the weights have {key} but no {missing.args[0]}") from None
            gain = gamma / (var + BN_EPS).sqrt()
            out[f"{layer}.weight"] = (value.double() * gain.reshape(-1, 1, 1, 1)).float()
            out[f"{layer}.bias"] = (beta - mean * gain).float()
        elif ".bn." not in key:
            out[key] = value.float()
    return out


def inception_from_state_dict(state: Mapping[str, Tensor]) -> Inception:
    """Return the network, in eval mode, with weights folded or not, complete or up to Mixed_7a.

    Errors: ValueError unless every key is used and every parameter is filled.
    """
    weights = fold_batch_norms(state)
    model = Inception(
        partial=not any(key.startswith(("Mixed_7b", "Mixed_7c", "fc")) for key in weights)
    )
    own = model.state_dict()
    unused, missing = sorted(weights.keys() - own), sorted(own.keys() - weights)
    wrong = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if unused or missing or wrong:
        raise ValueError(
            f"these are not the weights of FID's Inception: missing {missing[:4]}, unknown "
            f"{unused[:4]}, of another shape {wrong[:4]} ({len(missing)}, {len(unused)} and "
            f"{len(wrong)} in total)"
        )
    model.load_state_dict(weights)
    # Channels last is 1.5 times as fast on a CPU core, and the layout of tensor cores.
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model.eval().requires_grad_(False)


def load_inception(path: str | Path) -> Inception:
    """Load the network from a .pth (without running code in it) or .safetensors file.

    Errors: ValueError for a missing or damaged file, and as in `inception_from_state_dict`.
    """
    path = Path(path)

    def state_dict(contents: Any) -> Mapping[str, Tensor]:
        if not isinstance(contents, dict) or not all(
            isinstance(v, Tensor) for v in contents.values()
        ):
            raise ValueError(f"{path} holds no state dict of tensors")
        return contents

    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give Inception's weights as .pth or .safetensors"
        )
    source = (
        open_safetensors(path)
        if path.suffix == ".safetensors"
        else open_torch_file(path, state_dict)
    )
    return inception_from_state_dict({name: source.read(name) for name in source.claims})


# The 2015-12-05 TensorFlow Inception as converted for PyTorch by M. Seitzer; batch norm not folded.
INCEPTION_FILE = PublishedFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    bytes=95_628_359,
    licence="Apache-2.0",
)
