"""The FID Inception-v3: the TensorFlow graph of 2015-12-05 that every paper's FID, sFID and Inception Score use.

It is Szegedy et al. 2016 (table 1, figures 5 to 7, with factorised 7x7 convolutions) but for two quirks of that graph:
average pools leave the padding out of the mean, and the last block pools by maximum. Batch norm is folded into the
convolutions when the weights are read. Layer names are those of the well-known PyTorch conversion of the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.core.files import (
    PublishedFile,
)
from mezzotint.core.tensor_files import (
    open_safetensors,
    open_torch_file,
)

BN_EPS = 1e-3  # of the graph's batch norms
# Channels of each tap, from the image on; see `Inception.forward`.
TAPS = {
    "64": 64,
    "192": 192,
    "sfid": 17 * 17 * 7,
    "768": 768,
    "1280": 1280,
    "2048": 2048,
    "logits": 1008,
}
PARTIAL_TAPS = ("64", "192", "sfid", "768", "1280")  # what weights that end at Mixed_7a give


class Conv(nn.Conv2d):
    """Convolution, folded batch norm, ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""
        return F.relu(super().forward(input))


def _mean3(x: Tensor) -> Tensor:
    # Quirk: the mean is over the pixels that exist, not over the padding.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35 (Szegedy et al. 2016, figure 5)."""

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
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean3(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17 (Szegedy et al. 2016, figure 10)."""

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
    """17 x 17 with 7x7 convolutions as 1x7 and 7x1 (Szegedy et al. 2016, figure 6)."""

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
        """(b, 768, 17, 17) -> the same shape; the first 192 channels are the graph's `mixed_n/conv`."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean3(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

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
    """8 x 8 with expanded filter banks (Szegedy et al. 2016, figure 7); `maximum`: pool by maximum, the last quirk."""

    def __init__(self, channels: int, maximum: bool):
        super().__init__()
        self.maximum = maximum
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
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _mean3(x)
        fans = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        fans += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *fans, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """The network up to the classifier, or (`partial`) up to Mixed_7a.

    Args:
        partial: leave out Mixed_7b, Mixed_7c and the classifier, for weights that do not have them.
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
            self.Mixed_7b = BlockE(1280, maximum=False)
            self.Mixed_7c = BlockE(2048, maximum=True)
            self.fc = nn.Linear(2048, TAPS["logits"])

    def forward(self, x: Float[Tensor, "b 3 299 299"], taps: Collection[str]) -> dict[str, Tensor]:
        """Features by tap, each (b, TAPS[tap]) float32; nothing beyond the last tap asked for is computed.

        "64", "192", "768", "1280", "2048": spatial means after the first and second max pool, Mixed_6e, Mixed_7a and
        Mixed_7c. "sfid": the first 7 channels of Mixed_6d's 1x1 branch (the graph's `mixed_6/conv`), in the order row,
        column, channel (Nash et al. 2021, section 5; 2,023 numbers). "logits": without their bias, as Inception Scores
        are computed (the bias is left out in the original score's code and in ADM's).

        Args:
            x: images scaled to (v - 128) / 128 for v in 0...255, see `pixels`.
        """
        for tap in taps:
            if tap not in self.taps:
                what = "; these weights end at Mixed_7a" if tap in TAPS else ""
                raise ValueError(f"no tap {tap!r}; known: {', '.join(self.taps)}{what}")
        found: dict[str, Tensor] = {}
        for tap, value in self._stages(x):
            if tap in taps:
                found[tap] = value.mean((2, 3)) if value.ndim == 4 else value
            if len(found) == len(set(taps)):
                break
        return found

    def _stages(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each tap's name and map (or vector), in the order in which they are computed."""
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


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with every NAME.conv and NAME.bn made one NAME: W gamma / sqrt(var + eps), beta - mean gamma / sqrt(...).

    Keys of the folded layout and of the classifier pass through. Computed in float64, returned in float32.
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


def inception_from(state: Mapping[str, Tensor]) -> Inception:
    """The network with the weights of a state dict, folded or not, whole or up to Mixed_7a; in eval mode.

    Every key is used and every parameter filled, or a ValueError names what is left over or missing.
    """
    weights = folded(state)
    model = Inception(
        partial=not any(key.startswith(("Mixed_7b", "Mixed_7c", "fc")) for key in weights)
    )
    own = model.state_dict()
    unused, missing = sorted(weights.keys() - own), sorted(own.keys() - weights)
    wrong = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if unused or missing or wrong:
        raise ValueError(
            f"these are not the weights of the FID Inception: missing {missing[:4]}, unknown {unused[:4]}, "
            f"of another shape {wrong[:4]} ({len(missing)}, {len(unused)} and {len(wrong)} in all)"
        )
    model.load_state_dict(weights)
    # Channels-last: 1.5 times as fast on a CPU core, and what tensor cores want.
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (a keyword its stubs leave out)
    return model.eval().requires_grad_(False)


def load_inception(path: str | Path) -> Inception:
    """`inception_from` a .pth (no code in it is run) or .safetensors file; ValueError when it is damaged."""
    path = Path(path)

    def state_dict(contents: Any) -> Mapping[str, Tensor]:
        if not isinstance(contents, dict) or not all(
            isinstance(v, Tensor) for v in contents.values()
        ):
            raise ValueError(f"{path} holds no state dict of tensors")
        return contents

    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give one of Inception's weights, .pth or .safetensors"
        )
    source = (
        open_safetensors(path)
        if path.suffix == ".safetensors"
        else open_torch_file(path, state_dict)
    )
    return inception_from({name: source.read(name) for name in source.claims})


# The 2015-12-05 TensorFlow Inception as converted for PyTorch by M. Seitzer; batch norm not folded.
INCEPTION_FILE = PublishedFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    bytes=95_628_359,
    licence="Apache-2.0",
)
