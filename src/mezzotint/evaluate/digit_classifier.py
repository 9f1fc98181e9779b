"""A small classifier of the built-in digits, for a Fréchet distance without a download.

It trains in seconds on one CPU core, to the same weights for the same seed and machine. A distance
on its features is called FD-digits and is meaningless for photographs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mezzotint.core.rng import philox
from mezzotint.data.image_dataset import open_images

SIZE = 16  # pixels; other sizes are resized to it
FEATURES = 64
EPOCHS, BATCH, LEARNING_RATE = 12, 50, 4e-3


class DigitNet(nn.Module):
    """Two convolutions, one hidden layer of FEATURES units, ten logits."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (SIZE // 4) ** 2, FEATURES)
        self.out = nn.Linear(FEATURES, 10)

    def features(self, x: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b 64"]:
        """Return the penultimate layer, after its ReLU, for images in [-1, 1]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b 10"]:
        """Return logits of the digits 0...9 for images in [-1, 1]."""
        return self.out(self.features(x))


class DigitFeatures(nn.Module):
    """`DigitNet.features` as a forward pass."""

    net: DigitNet

    def __init__(self, net: DigitNet):
        super().__init__()
        self.net = net

    def forward(self, x: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b 64"]:
        """See `DigitNet.features`."""
        return self.net.features(x)


def prepare_digits(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1 s s"]:
    """Average the channels, resize to SIZE with antialiased bilinear, and scale to [-1, 1]."""
    grey = images.to(torch.float32).mean(1, keepdim=True)
    if grey.shape[2:] != (SIZE, SIZE):
        grey = F.interpolate(
            grey, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
        )
    return grey / 127.5 - 1


@dataclass(frozen=True)
class DigitClassifier:
    """A trained classifier. accuracy: on the held-out digits, in [0, 1]."""

    network: DigitNet
    accuracy: float

    def predict(self, images: UInt8[Tensor, "b c h w"]) -> Int[Tensor, " b"]:
        """Return the digit in each image."""
        return _predict(self.network, images)


def _predict(network: DigitNet, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(prepare_digits(images)).argmax(1)


def _load_split(split: str) -> tuple[Tensor, Tensor]:
    """Return all images and labels of the "train" or the "test" digits."""
    dataset = open_images(f"digits:{split}", size=SIZE, channels=1)
    images, labels = dataset.batch(range(len(dataset)))
    assert labels is not None
    return images, labels


@functools.cache
def train_digit_classifier(seed: int = 0) -> DigitClassifier:
    """Train on the 1,500 training digits and measure the accuracy on the 297 held-out ones."""
    with torch.inference_mode(False), torch.enable_grad():
        network = _train_network(seed)
    network.eval().requires_grad_(False)
    images, labels = _load_split("test")
    accuracy = (_predict(network, images) == labels).double().mean().item()
    return DigitClassifier(network, accuracy)


def _train_network(seed: int) -> DigitNet:
    images, labels = _load_split("train")
    x = prepare_digits(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitNet()
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * len(x) // BATCH)
    for epoch in range(EPOCHS):
        draw = philox("order", seed, epoch)
        for rows in torch.from_numpy(draw.permutation(len(x))).split(BATCH):
            # Shifted by up to a pixel, since generated digits are not centred like scanned ones.
            down, right = draw.integers(-1, 2, size=2).tolist()
            shifted = torch.roll(x[rows], (down, right), (2, 3))
            loss = F.cross_entropy(network(shifted), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
    return network
