"""Image sources: any part of a folder, .zip or .npz of images, unchanged; damaged ones refused."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.image_files import png, write_folder
from mezzotint.cli.measure import Source
from mezzotint.evaluate.image_source import (
    GREY_NOTE,
    from_folder,
    from_npz,
    open_image_source,
    open_real_images,
    repeat_grey,
)


def random_images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 12, 12), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_part_of_a_sample_file_can_be_read(tmp_path, save):
    x = random_images(130)
    save(tmp_path / "s.npz", x.permute(0, 2, 3, 1).numpy(), np.arange(130))
    source = from_npz(tmp_path / "s.npz")
    assert (source.num_images, source.resolution) == (130, (12, 12))
    assert torch.cat(list(source.batches(0, 130))).equal(x)
    assert torch.cat(list(source.batches(65, 71))).equal(x[65:71])


def test_grey_sample_files_have_one_channel(tmp_path):
    np.savez(tmp_path / "g.npz", np.zeros((3, 4, 4, 1), np.uint8))
    assert next(iter(from_npz(tmp_path / "g.npz").batches(0, 3))).shape == (3, 1, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"arr_0": np.zeros((3, 4, 4, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((3, 3, 4, 4), np.uint8)}, r"\(3, 3, 4, 4\)"),
        ({"arr_0": np.array([{}], dtype=object)}, "pickled objects"),
        ({"other": np.zeros(3)}, "holds other, and no arr_0"),
    ],
)
def test_bad_sample_files_are_refused(tmp_path, arrays, named):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=named):
        from_npz(tmp_path / "s.npz")


def test_truncated_sample_files_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", np.zeros((64, 16, 16, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", content[:-100])
    with pytest.raises(ValueError, match="arr_0 is damaged"):
        list(from_npz(tmp_path / "s.npz").batches(0, 64))


def test_folders_and_zips_are_read_unchanged(tmp_path):
    x = random_images(5)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03d}.png")
    source = open_image_source(tmp_path)
    assert (source.num_images, source.resolution) == (5, (12, 12))
    assert torch.cat(list(source.batches(0, 5))).equal(x)
    assert torch.cat(list(source.batches(2, 4))).equal(x[2:4])
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for file in sorted(tmp_path.glob("*.png")):
            archive.write(file, file.name)
    assert torch.cat(list(open_image_source(tmp_path / "z.zip").batches(0, 5))).equal(x)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".png"])
def test_other_images_of_the_same_names_and_sizes_are_others(suffix, tmp_path):
    def write(seed):
        for i, image in enumerate(random_images(3, seed)):
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
            pixels.save(tmp_path / f"{i}{suffix}", **options)
        return {p.name: p.stat().st_size for p in tmp_path.iterdir()}

    options = {"compress_level": 0} if suffix == ".png" else {}
    sizes, first = write(0), open_image_source(tmp_path).identity
    assert open_image_source(tmp_path).identity == first
    assert write(1) == sizes
    assert open_image_source(tmp_path).identity != first


def test_only_opaque_alpha_channels_are_dropped(tmp_path):
    x = random_images(2)
    for i, image in enumerate(x):
        rgba = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("RGBA")
        rgba.save(tmp_path / f"{i}.png")
    assert torch.cat(list(from_folder(tmp_path).batches(0, 2))).equal(x)
    rgba.putalpha(100)
    rgba.save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="RGBA"):
        list(from_folder(tmp_path).batches(0, 2))


@pytest.mark.parametrize(
    ("second", "named"),
    [(Image.new("RGB", (12, 13)), "12 x 13"), (Image.new("L", (12, 12)), "mode L")],
)
def test_folders_of_different_images_are_refused(tmp_path, second, named):
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    second.save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=named):
        list(from_folder(tmp_path).batches(0, 2))


def test_folders_of_too_few_or_damaged_images_are_refused(tmp_path):
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images"):
        from_folder(tmp_path)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"b\.png"):
        list(from_folder(tmp_path).batches(0, 2))
    with pytest.raises(ValueError, match=r"a\.png"):
        open_image_source(tmp_path / "a.png")


def test_a_resized_dataset_with_a_damaged_image_is_refused(tmp_path):
    """It would count another image twice."""
    folder = write_folder(tmp_path / "set", {f"{i}.png": png(i, (20, 16)) for i in range(12)})
    (folder / "7.png").write_bytes(png(7, (20, 16))[:60])
    source = open_real_images(str(folder), 16)
    with pytest.raises(ValueError, match=r"7\.png cannot be read: .*mezzotint prepare"):
        list(source.batches(0, source.num_images))


@pytest.mark.parametrize(
    ("name", "channels", "words"),
    [("a.npz:test", 3, "no splits; give --size"), ("a.npz", 1, "holds images of colour")],
)
def test_a_sample_file_is_not_read_as_something_else(tmp_path, name, channels, words):
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=words):
        open_image_source(tmp_path / name, channels)


@pytest.mark.parametrize("size", [None, 16])
def test_latents_are_refused(tmp_path, size):
    (tmp_path / "latents.json").write_text("{}")
    with pytest.raises(ValueError, match="latents"):
        open_real_images(str(tmp_path), size)


def write_grey(folder, dtype=np.uint8, largest=255, suffix="png"):
    """Write four grey images and return their values, 0...255."""
    folder.mkdir()
    values = np.random.default_rng(0).random((4, 12, 12))
    values[:, 0, 0] = 1
    for i, image in enumerate(values):
        stored = image * largest
        stored = stored if dtype == np.float32 else stored.round()
        Image.fromarray(stored.astype(dtype)).save(folder / f"{i}.{suffix}")
    return torch.from_numpy(values)[:, None] * 255


@pytest.mark.parametrize(
    ("dtype", "largest", "suffix", "note"),
    [
        (np.uint8, 255, "png", None),
        (np.uint16, 4095, "png", "grey of 16 bits: full scale 4095"),
        (np.float32, 1, "tif", "grey of floats: full scale 1"),
        (np.int32, 255, "tif", "grey of 32 bits: full scale 255"),
    ],
)
def test_a_folder_of_grey_images(tmp_path, dtype, largest, suffix, note):
    values = write_grey(tmp_path / "grey", dtype, largest, suffix)
    for channels in (1, 3):
        source = open_image_source(tmp_path / "grey", channels)
        pixels = torch.cat(list(source.batches(0, 4)))
        assert source.channels == 1
        assert (pixels - values).abs().max() <= 0.6
        repeated = repeat_grey(source, 3)
        assert torch.cat(list(repeated.batches(0, 4))).equal(pixels.expand(-1, 3, -1, -1))
        text = repeated.metadata["preprocessing"]
        assert text.endswith(GREY_NOTE)
        assert text.startswith(note or GREY_NOTE)
        assert repeat_grey(source, 1) is source
        assert repeat_grey(repeated, 3) is repeated


def test_grey_and_colour_are_not_mixed(tmp_path):
    write_grey(tmp_path / "grey")
    Image.new("RGB", (12, 12)).save(tmp_path / "grey" / "3.png")
    with pytest.raises(ValueError, match=r"3\.png has mode RGB; the others are grey"):
        list(open_image_source(tmp_path / "grey").batches(0, 4))


def test_a_resized_grey_dataset_says_that_grey_is_repeated(tmp_path):
    write_grey(tmp_path / "grey")
    source = open_real_images(str(tmp_path / "grey"), 8)
    assert source.metadata["preprocessing"] == f"crop adm to 8 px; {GREY_NOTE}"
    one = open_real_images(str(tmp_path / "grey"), 8, channels=1)
    assert one.metadata["preprocessing"] == "crop adm to 8 px"
    assert next(iter(source.batches(0, 4))).equal(
        next(iter(one.batches(0, 4))).expand(-1, 3, -1, -1)
    )


def test_stored_images_are_read_upright_and_palettes_as_colour(tmp_path):
    picture = random_images(1)[0].permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(picture[::-1, ::-1]).save(tmp_path / "a.png", exif=exif)
    few = Image.fromarray(picture).quantize(8)
    few.save(tmp_path / "b.png")
    a, b = torch.cat(list(from_folder(tmp_path).batches(0, 2))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(a, picture)
    assert np.array_equal(b, np.asarray(few.convert("RGB")))


def test_a_sample_file_of_huge_images_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "s.npz", "w") as archive,
        archive.open("arr_0.npy", "w") as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 1 << 20, 1 << 20, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match="damaged"):
        from_npz(tmp_path / "s.npz")


# --- what the command is given --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "is_model"),
    [
        (["model/0.png", "cat/0.png"], False),
        (["model/0.png", "model/1.png"], False),
        (["0.png", "1.png"], False),
        (["config.json", "model.safetensors"], True),
        (["model/config.json", "model/model.safetensors"], True),
        (["recipe.yaml"], True),
    ],
)
def test_a_folder_is_a_model_or_images(tmp_path, files, is_model):
    """A class of images may be named "model"."""
    write_folder(tmp_path / "set", {file: png(1, (12, 12)) for file in files})
    source = Source(name=str(tmp_path / "set"))
    assert source.is_model == is_model
    if not is_model:
        assert source.open().num_images == 2


@pytest.mark.parametrize("name", ["s3://bucket/run", "gs://bucket/runs/xl", "nobody/model"])
def test_an_address_and_a_name_are_models(name):
    assert Source(name=name).is_model


@pytest.mark.parametrize(
    "options", [{"protocol": "adm"}, {"protocol": "coco-fid-30k"}, {"protocol": "adm", "steps": 2}]
)
def test_a_protocol_is_of_a_model_or_of_captions(tmp_path, options):
    folder = write_folder(tmp_path / "set", {f"{i}.png": png(i, (12, 12)) for i in range(2)})
    with pytest.raises(
        ValueError, match=r"holds images, and .*--protocol are of a model's samples"
    ):
        Source(name=str(folder), **options).open()
    (tmp_path / "prompts.txt").write_text("a ring\na square\n")
    captioned = Source(name=str(folder), protocol="adm", prompts=tmp_path / "prompts.txt").open()
    assert captioned.captions == ("a ring", "a square")
