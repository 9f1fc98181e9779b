"""EDM's augmentations: pixels, label, probabilities, and what a batch depends on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mezzotint.data.augmentation import augment, augmentation_label, draw_augmentations


def parameters(*rows: dict[int, float]) -> torch.Tensor:
    """a0 ... a7 of some images, all zero but those given by index."""
    return torch.tensor([[row.get(i, 0.0) for i in range(8)] for row in rows], dtype=torch.float64)


def images(count: int, height: int = 8, width: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.manual_seed(0)) * 2 - 1


def keys(t: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def reflected(i: int, n: int) -> int:
    i %= 2 * n
    return i if i < n else 2 * n - 1 - i


def reference(image: np.ndarray, a: list[float]) -> np.ndarray:
    """Table 6 pixel by pixel: 3 x 3 matrices from the middle of the image, then bicubic."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    h, w = image.shape[1:]

    def scaled(x, y):
        return np.diag([x, y, 1.0])

    def rotated(t):
        c, s = math.cos(t), math.sin(t)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    moved = np.eye(3)
    moved[:2, 2] = a6 * w / 8, a7 * h / 8
    s, k = 2 ** (0.2 * a2), 2 ** (0.2 * a5)
    stretched = rotated(a4) @ scaled(k, 1 / k) @ rotated(-a4)
    flipped = scaled(1 - 2 * a0, 1) @ scaled(1, 1 - 2 * a1)
    inverse = np.linalg.inv(moved @ stretched @ rotated(-a3) @ scaled(s, s) @ flipped)
    out = np.zeros_like(image)
    for row in range(h):
        for column in range(w):
            x, y, _ = inverse @ [column + 0.5 - w / 2, row + 0.5 - h / 2, 1]
            x, y = x - 0.5 + w / 2, y - 0.5 + h / 2
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    pixel = image[:, reflected(i, h), reflected(j, w)]
                    out[:, row, column] += keys(y - i) * keys(x - j) * pixel
    return out.clip(-1, 1)


@pytest.mark.parametrize(
    "a",
    [
        {0: 1.0},
        {1: 1.0},
        {2: 1.3},
        {2: -1.3},
        {3: 0.7},
        {4: 0.4, 5: 1.1},
        {6: 0.37, 7: -0.9},
        {0: 1.0, 1: 1.0, 2: -0.8, 3: -2.1, 4: 2.5, 5: -0.6, 6: 1.4, 7: 0.2},
    ],
    ids=["x-flip", "y-flip", "larger", "smaller", "rotated", "stretched", "moved", "all"],
)
@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_each_transformation_is_that_of_the_table(a, size):
    image, drawn = images(1, *size), parameters(a)
    expected = reference(image[0].double().numpy(), drawn[0].tolist())
    np.testing.assert_allclose(augment(image, drawn)[0].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ({0: 1.0}, lambda x: x.flip(-1)),
        ({1: 1.0}, lambda x: x.flip(-2)),
        ({3: math.pi}, lambda x: x.rot90(2, (-2, -1))),
        ({3: math.pi / 2}, lambda x: x.rot90(1, (-2, -1))),  # counter-clockwise, as Rotate(-a3)
        ({6: 2.0}, lambda x: torch.cat([x[..., :2].flip(-1), x[..., :-2]], -1)),
        ({7: -1.0}, lambda x: torch.cat([x[..., 1:, :], x[..., -1:, :]], -2)),
        ({2: 5.0}, None),
    ],
)
def test_whole_pixels_are_moved_to_where_they_belong(a, expected):
    image = images(1)
    moved = augment(image, parameters(a))
    if expected is None:  # twice as large: the middle four pixels fill the middle
        moved, image = moved[..., 3:5, 3:5].mean((-2, -1)), image[..., 3:5, 3:5].mean((-2, -1))
        torch.testing.assert_close(moved, image, atol=0.2, rtol=0)
    else:
        torch.testing.assert_close(moved, expected(image), atol=1e-5, rtol=0)


def test_the_label_is_that_of_the_table():
    drawn = parameters({0: 1.0, 1: 1.0, 2: -1.5, 3: 0.5, 4: 2.0, 5: -0.7, 6: 0.3, 7: -0.2})
    expected = [
        1, 1, -1.5, math.cos(0.5) - 1, math.sin(0.5), -0.7 * math.cos(2), -0.7 * math.sin(2),
        0.3, -0.2,
    ]  # fmt: skip
    torch.testing.assert_close(augmentation_label(drawn), torch.tensor([expected]))
    assert not augmentation_label(parameters({})).any()


@pytest.mark.parametrize("probability", [1e-9, 0.12, 0.5])
def test_the_label_is_zero_exactly_where_the_image_is_untouched(probability):
    drawn = draw_augmentations(1, list(range(200)), probability)
    x = images(200, channels=1)
    same = (augment(x, drawn) == x).flatten(1).all(1)
    assert torch.equal(same, ~augmentation_label(drawn).any(1))
    assert 0 < same.sum() < 200


@pytest.mark.parametrize("probability", [0.12, 0.5])
def test_each_is_applied_with_its_probability_and_drawn_from_its_distribution(probability):
    count = 2000
    drawn = draw_augmentations(3, list(range(count)), probability)
    on = (drawn != 0).double().mean(0)
    wanted = torch.tensor([0.5, probability / 2, *[probability] * 6], dtype=torch.float64)
    assert ((on - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt()).all()
    assert torch.equal(drawn[:, 4] != 0, drawn[:, 5] != 0)
    assert torch.equal(drawn[:, 6] != 0, drawn[:, 7] != 0)
    for i, std in [(2, 1), (3, math.pi / 3**0.5), (4, math.pi / 3**0.5), (5, 1), (6, 1), (7, 1)]:
        values = drawn[:, i][drawn[:, i] != 0]
        assert values.std() == pytest.approx(std, rel=0.15), i
        assert abs(values.mean()) < 4 * std / len(values) ** 0.5, i
    # Independent of each other.
    both = ((drawn[:, 2] != 0) & (drawn[:, 3] != 0)).double().mean().item()
    assert both == pytest.approx(probability**2, abs=4 * probability / count**0.5)


def test_an_image_depends_on_seed_and_number_alone():
    numbers = [5, 900, 17, 3]
    x = images(4, 7, 10)
    drawn = draw_augmentations(2, numbers, 0.5)
    whole = augment(x, drawn)
    for i, n in enumerate(numbers):
        alone = draw_augmentations(2, [n], 0.5)
        assert torch.equal(alone[0], drawn[i])
        assert torch.equal(augment(x[i : i + 1], alone)[0], whole[i])
    assert not torch.equal(draw_augmentations(3, numbers, 0.5), drawn)
    assert not torch.equal(drawn[0], drawn[1])
