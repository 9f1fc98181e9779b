"""Edits: trajectories and interpolation, and image to image and inpainting of photographs.

Photographs are edited with an analytic denoiser.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.tiny_models import rows_seen, tiny
from mezzotint.core.registry import Spec
from mezzotint.data.transforms import to_model_range
from mezzotint.models import preset_info
from mezzotint.process import prediction
from mezzotint.process.denoiser import Cond, Model, Parameterisation
from mezzotint.process.logsnr import alpha, append_dims, sigma
from mezzotint.sampling import img2img as image_edits
from mezzotint.sampling import trajectory as noise_edits
from mezzotint.sampling.generate_images import generate_images
from mezzotint.sampling.img2img import (
    img2img,
    inpaint,
    inpaint_denoiser,
    read_image,
    read_image_and_mask,
    save_img2img,
    save_inpainting,
)
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.sample import make_logsnr_steps
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.sampling.trajectory import (
    interpolate,
    save_interpolation,
    save_trajectory,
    slerp,
    trajectory,
)

SIDE = 64
GREY, STD = -0.1, 0.5  # of photographs in [-1, 1], roughly


class Wiener(nn.Module):
    """The exact denoiser of Gaussian images with the spectrum and colours of photographs."""

    def __init__(self, height: int, width: int):
        super().__init__()
        f = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2
        power = (f + (0.3 / height) ** 2) ** -1.3
        colours = torch.tensor([1.6, 0.25, 0.15])[
            :, None, None
        ]  # variance of lightness, blue-yellow, green-red
        self.power = nn.Parameter(STD**2 * colours * power / power.mean(), requires_grad=False)
        axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        self.axes = nn.Parameter(
            axes / axes.norm(dim=1, keepdim=True), requires_grad=False
        )  # orthonormal rows

    def forward(self, z, noise, cond):
        a, s = (append_dims(g(noise), z).to(z) for g in (alpha, sigma))
        y = torch.einsum("kc,bchw->bkhw", self.axes, z - a * GREY)
        # The posterior mean, mode by mode: x = a P / (a^2 P + s^2) z about the mean.
        y = torch.fft.ifft2(torch.fft.fft2(y) * (a * self.power / (a**2 * self.power + s**2))).real
        return [GREY + torch.einsum("kc,bkhw->bchw", self.axes, y)]


def photographer(height: int = SIDE, width: int = SIDE, **settings) -> SamplingJob:
    card = preset_info("unet-tiny", size=SIDE, channels=3, num_classes=0)
    model = Model(
        Wiener(height, width),
        Parameterisation(kind=prediction.x, noise=lambda logsnr: logsnr),
        card,
    )
    size = None if height == width == SIDE else (height, width)
    return SamplingJob(
        model=model, settings=SamplingSettings(**{"steps": 60, **settings}, size=size)
    )


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((to_model_range(a) - to_model_range(b)).square().mean() / 4))


@pytest.fixture(params=["kodim19.png", "kodim23.png"])
def photograph(request, shared) -> Path:
    return shared(f"data/photos/{request.param}")


def size_of(path: Path) -> tuple[int, int]:
    """(width, height)."""
    with Image.open(path) as image:
        return image.size


def hole_mask(path: Path, like: Path) -> Path:
    """Write a mask: a white square in the middle of the image's central square."""
    width, height = size_of(like)
    side = min(width, height) // 5
    mask = np.zeros((height, width), np.uint8)
    middle = height // 2, width // 2
    mask[middle[0] - side : middle[0] + side, middle[1] - side : middle[1] + side] = 255
    Image.fromarray(mask).save(path)
    return path


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "ancestral"])
def test_inpainting_keeps_the_known_part_and_continues_it(photograph, tmp_path, sampler):
    job = photographer(sampler=Spec(sampler))
    image, mask = read_image_and_mask(job, photograph, hole_mask(tmp_path / "m.png", photograph))
    assert 0.1 < mask.float().mean() < 0.3
    made = inpaint(job, range(8), image, mask)
    kept = ~mask.expand(3, -1, -1)
    assert all(torch.equal(m[kept], image[kept]) for m in made)

    def error(x):  # root mean square in the hole, in grey levels
        return float((x.float() - image.float())[:, mask].square().mean().sqrt())

    grey = torch.full_like(image, float(image[:, ~mask].float().mean()), dtype=torch.float32)
    fresh = job.draw(range(8))
    # Better than fresh samples, and on average better than filling the hole with the mean.
    assert sum(map(error, made)) < 0.95 * sum(map(error, fresh))
    assert error(made.float().mean(0)) < 0.95 * error(grey)
    assert not torch.equal(made[0], made[1])
    rows, columns = (torch.nonzero(mask.any(i)).flatten() for i in (1, 0))

    def seam(images):  # mean step across the hole's upper edge
        return float(
            (images.float()[:, :, rows[0], columns] - images.float()[:, :, rows[0] - 1, columns])
            .abs()
            .mean()
        )

    assert seam(made) < 0.7 * seam(torch.where(mask, fresh, image))


def test_a_start_with_less_noise_stays_closer(photograph):
    job = photographer(steps=40)
    image = read_image(job, photograph)
    starts = (-6.0, -2.0, 1.0, 5.0)
    near = [psnr(img2img(job, [0], image, logsnr)[0], image) for logsnr in starts]
    assert near == sorted(near)
    assert near[-1] > 25
    assert near[-1] - near[0] > 10
    # The least noise keeps the image; the most keeps no more than a fresh sample does.
    assert abs(near[0] - psnr(job.draw([0])[0], image)) < 3


def test_inpainting_replaces_the_known_part_and_stays_consistent_with_z():
    model = photographer().model
    z, logsnr = torch.randn(2, 3, SIDE, SIDE), torch.tensor([0.3, -4.0])
    keep = torch.rand(SIDE, SIDE) > 0.5
    known = torch.rand(2, 3, SIDE, SIDE)
    made = inpaint_denoiser(model, known, keep)(z, logsnr, Cond())
    assert torch.equal(made.x[..., keep], known[..., keep])
    assert torch.equal(made.x[..., ~keep], model(z, logsnr, Cond()).x[..., ~keep])
    a, s = (append_dims(g(logsnr), z) for g in (alpha, sigma))
    torch.testing.assert_close(a * made.x + s * made.eps, z, rtol=1e-5, atol=1e-5)


def test_masks_in_latent_cells(shared, tmp_path):
    """A cell of eight by eight pixels is painted if one of its pixels is."""
    pytest.importorskip("diffusers")
    photograph = shared("data/photos/kodim23.png")
    model = tiny("diffit-latent-tiny")
    job = SamplingJob(
        model=model,
        settings=SamplingSettings(steps=2),
        classes=(1,),
        codec=str(shared("data/taesd")),
    )
    picture = read_image(job, photograph)
    assert picture.shape == (3, 64, 64)
    paint = torch.zeros(64, 64, dtype=torch.bool)
    paint[9, 9] = True
    made = inpaint(job, [0], picture, paint)[0]
    decoded = job.decode(job.decoder.encode_moments(to_model_range(picture)[None])[0])[0]
    # Other cells see it only through the reach of the decoder.
    assert (
        psnr(made[:, 32:, 32:], decoded[:, 32:, 32:])
        > psnr(made[:, 8:16, 8:16], decoded[:, 8:16, 8:16]) + 6
    )


def test_slerp_keeps_the_norm_and_the_ends():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 16, 16, generator=g)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    middle = slerp(a, b, 0.5)
    assert middle.norm() == pytest.approx(float(a.norm() + b.norm()) / 2, rel=0.03)
    assert ((a + b) / 2).norm() < 0.8 * middle.norm()
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a, atol=1e-5)


def test_interpolation_meets_its_ends():
    job = SamplingJob(model=tiny(), settings=SamplingSettings(steps=3), classes=(4,))
    rows = interpolate(job, [3, 4, 9], 5)
    assert rows.shape == (2, 5, 3, 8, 8)
    ends = job.draw([3, 4, 9]).int()
    for row, (a, b) in zip(rows.int(), ((0, 1), (1, 2)), strict=True):
        assert (row[0] - ends[a]).abs().max() <= 1  # sin of the whole angle over itself rounds
        assert (row[-1] - ends[b]).abs().max() <= 1
    with pytest.raises(ValueError, match="1 images and 5 frames"):
        interpolate(job, [3], 5)


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 4), ("heun", 7)])
def test_a_trajectory_has_every_call_and_ends_in_the_image(sampler, calls):
    settings = SamplingSettings(sampler=Spec(sampler), steps=4, guidance=Guidance(scale=2.0))
    job = SamplingJob(model=tiny(), settings=settings, classes=(4, 5))
    frames, levels = trajectory(job, [7, 8])
    assert len(frames) == len(levels) == calls + 1
    assert torch.equal(frames[-1], job.draw([7, 8]))
    assert torch.equal(frames[-2], frames[-1])  # the last step returns the denoised image
    assert levels[0] == float(make_logsnr_steps(job.model, settings)[0])
    assert levels[-1] == math.inf
    assert levels == sorted(levels)


PICTURE = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
SEEDS = range(3, 8)


def frames_and_levels(job):
    frames, levels = trajectory(job, SEEDS)
    return [*frames, torch.tensor(levels)]


EDITS = {
    "img2img": lambda job: [img2img(job, SEEDS, PICTURE, -1.0)],
    "inpaint": lambda job: [inpaint(job, SEEDS, PICTURE, PICTURE[0] > 30)],
    "inpaint from the image": lambda job: [inpaint(job, SEEDS, PICTURE, PICTURE[0] > 30, 0.5)],
    "interpolate": lambda job: [interpolate(job, SEEDS[:3], 5)],
    "trajectory": frames_and_levels,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_edit_takes_batches_and_makes_the_images_of_one(edit, batch):
    def make(model, **settings):
        settings = SamplingSettings(sampler=Spec("ancestral"), steps=3, **settings)
        return EDITS[edit](SamplingJob(model=model, settings=settings, classes=(4, 5, 6)))

    for images, whole in zip(make(tiny(), batch=batch), make(tiny(), batch=64), strict=True):
        assert torch.equal(images, whole)
    model = tiny()
    rows = rows_seen(model)
    make(model, batch=batch, exact=False)  # exact images are computed in tiles of four
    assert max(rows) == batch


def test_edits_are_written_with_their_card(tmp_path, shared):
    job = SamplingJob(model=tiny(), settings=SamplingSettings(steps=12), classes=(4, 5))
    photograph = shared("data/photos/kodim19.png")
    mask = hole_mask(tmp_path / "mask.png", photograph)
    film = save_trajectory(job, tmp_path / "film.png", range(2), False)
    between = save_interpolation(job, 4, tmp_path / "between.png", range(3), False)
    painted = save_inpainting(job, photograph, mask, None, tmp_path / "o.png", range(2), False)
    noised = save_img2img(job, photograph, -1.0, tmp_path / "i.png", range(2), False)
    assert [p.name for p in (*film, *between, *painted, *noised)] == [
        "film.png", "film.gif", "between.png", "between.gif", "o.png", "i.png",
    ]  # fmt: skip
    assert size_of(film[0])[0] == 10 * 66 + 2
    assert size_of(between[0]) == (4 * 66 + 2, 2 * 66 + 2)
    assert size_of(painted[0])[0] == 2 * 66 + 2  # given, masked, two images: a square of four
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames >= 12  # equal neighbours are merged
        assert gif.info["loop"] == 0
    card = json.loads((tmp_path / "o.png.json").read_text())
    assert (card["edit"], card["image"], card["mask"]) == ("inpaint", "kodim19.png", "mask.png")
    assert json.loads((tmp_path / "between.png.json").read_text())["frames"] == 4


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_an_edit_replaces_edits_only(tmp_path, name):
    job = SamplingJob(model=tiny(), settings=SamplingSettings(steps=2), classes=(4,))
    out = tmp_path / "a.png"
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"{name} exists already.*--overwrite"):
        save_trajectory(job, out, range(1), False)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    save_trajectory(job, out, range(1), True)
    assert (tmp_path / name).read_bytes() != b"mine"
    written = (tmp_path / "a.gif").read_bytes()
    save_trajectory(job, out, range(7, 8), False)
    assert (tmp_path / "a.gif").read_bytes() != written


def save(edit, job, folder, seeds, overwrite=False):
    """Save an edit as a.png, of an image and mask in the folder above."""
    image, mask = folder.parent / "image.png", folder.parent / "mask.png"
    Image.new("RGB", (8, 8), (90, 20, 20)).save(image)
    Image.new("L", (8, 8), 255).save(mask)
    out = folder / "a.png"
    if edit == "img2img":
        save_img2img(job, image, -1.0, out, seeds, overwrite)
    elif edit == "inpaint":
        save_inpainting(job, image, mask, None, out, seeds, overwrite)
    elif edit == "interpolate":
        save_interpolation(job, 3, out, seeds, overwrite)
    else:
        save_trajectory(job, out, seeds, overwrite)


@pytest.fixture
def quick(tmp_path):
    """A job of two steps, and an empty folder."""
    (tmp_path / "out").mkdir()
    settings = SamplingSettings(steps=2)
    return SamplingJob(model=tiny(), settings=settings, classes=(4,)), tmp_path / "out"


@pytest.mark.parametrize("edit", ["img2img", "inpaint", "interpolate", "trajectory"])
def test_an_edit_replaces_no_samples(quick, edit):
    job, folder = quick
    samples = generate_images(job, folder / "a.png", 2, quiet=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"a\.png exists already.*--overwrite"):
        save(edit, job, folder, range(2))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save(edit, job, folder, range(2), overwrite=True)
    edited = samples.read_bytes()
    assert edited != before["a.png"]
    save(edit, job, folder, range(5, 7))  # its own output is replaced
    assert samples.read_bytes() != edited
    assert json.loads((folder / "a.png.json").read_text())["edit"] == edit


@pytest.mark.parametrize("edit", ["img2img", "inpaint", "interpolate", "trajectory"])
@pytest.mark.parametrize("name", ["write_card", "save_png"])
def test_an_interrupted_edit_is_made_again(quick, edit, name, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    job, folder = quick
    with monkeypatch.context() as patch:
        for module in (image_edits, noise_edits):
            patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            save(edit, job, folder, range(2))
    assert not (folder / "a.png").exists()
    save(edit, job, folder, range(2))
    assert (folder / "a.png").stat().st_size > 100


@pytest.mark.parametrize("name", ["null", "null.png"])
def test_an_edit_leaves_nothing_beside_a_device(tmp_path, monkeypatch, name):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / name).symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path)
    job = SamplingJob(model=tiny(), settings=SamplingSettings(steps=2), classes=(4,))
    paths = save_trajectory(job, tmp_path / "dev" / name, range(1), False)
    assert paths == [tmp_path / "dev" / name, Path("null.gif")]
    assert [p.name for p in (tmp_path / "dev").iterdir()] == [name]
    assert (tmp_path / "dev" / name).is_char_device()
    assert Path("null.gif").stat().st_size > 100


def test_other_sizes_need_an_image_that_fits(photograph, tmp_path):
    wide = photographer(32, 48)
    with pytest.raises(ValueError, match="48 x 32"):
        read_image(wide, photograph)
    with Image.open(photograph) as image:
        image.resize((48, 32)).save(tmp_path / "small.png")
    image = read_image(wide, tmp_path / "small.png")
    assert img2img(wide, [0], image, 3.0).shape == (1, 3, 32, 48)


def test_bad_edits(tmp_path, photograph):
    job = photographer()
    image = read_image(job, photograph)
    with pytest.raises(ValueError, match="-40"):
        img2img(job, [0], image, -40.0)
    (tmp_path / "no.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"no\.png"):
        read_image(job, tmp_path / "no.png")
    Image.new("L", (5, 5)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        read_image_and_mask(job, photograph, tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"a\.npz"):
        save_trajectory(job, tmp_path / "a.npz", range(2), False)
    with pytest.raises(ValueError, match="leave latents out"):
        img2img(dataclasses.replace(job, codec=None), [0], image, 0.0)
