"""Pixels in an .npz: names, layouts and types of arrays that other libraries write."""

import numpy as np
import pytest

from helpers.image_files import png
from mezzotint.data import npz_source
from mezzotint.data.image_dataset import open_images

RGB = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
GREY = RGB[..., 0]
CLASSES = np.arange(12) % 3
MNIST = {"x_train": GREY, "y_train": CLASSES, "x_test": GREY[:5], "y_test": CLASSES[:5]}
MEDMNIST = {
    "train_images": RGB,
    "train_labels": CLASSES[:, None],
    "val_images": RGB[:3],
    "val_labels": CLASSES[:3, None],
    "test_images": RGB[3:7],
    "test_labels": CLASSES[3:7, None],
}


def opened(tmp_path, arrays, split="", **options):
    np.savez(tmp_path / "a.npz", **arrays)
    return open_images(f"{tmp_path / 'a.npz'}{split}", size=8, **options)


@pytest.mark.parametrize(
    ("arrays", "split", "expected"),
    [
        (MNIST, ":train", GREY), (MNIST, ":test", GREY[:5]),
        (MNIST, ":all", np.concatenate([GREY[:5], GREY])),
        ({"trainX": GREY, "trainY": CLASSES, "testX": GREY[:5], "testY": CLASSES[:5]}, ":test",
         GREY[:5]),
        ({"train_data": GREY, "train_targets": CLASSES}, "", GREY),
    ],
)  # fmt: skip
def test_splits_by_name(tmp_path, arrays, split, expected):
    images = opened(tmp_path, arrays, split, channels=1)
    assert images.batch(range(len(images)))[0][:, 0].numpy().tolist() == expected.tolist()
    labels = [images.label(i) for i in range(len(images))]
    first = [0, 1, 2, 0, 1]
    assert labels == {":test": first, ":all": [*first, *CLASSES]}.get(split, CLASSES.tolist())


def test_medical_sets_have_three_splits(tmp_path):
    with pytest.raises(ValueError, match=r"splits test, train, val; give one of them, .*:train"):
        opened(tmp_path, MEDMNIST)
    images = opened(tmp_path, MEDMNIST, ":validation")
    assert images.batch(range(3))[0].permute(0, 2, 3, 1).numpy().tolist() == RGB[:3].tolist()
    assert [images.label(i) for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["arr_0", "images", "X", "data", "img", "pixels"])
@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (RGB, RGB),
        (RGB.transpose(0, 3, 1, 2), RGB),
        (GREY[:, None], GREY[..., None].repeat(3, -1)),
        (GREY[..., None], GREY[..., None].repeat(3, -1)),
        (np.dstack([RGB.reshape(12, -1, 3), np.full((12, 64, 1), 255, np.uint8)]).reshape(
            12, 8, 8, 4), RGB),
    ],
    ids=["nhwc", "nchw", "n1hw", "nhw1", "rgba"],
)  # fmt: skip
def test_layouts(tmp_path, name, pixels, expected):
    images = opened(tmp_path, {name: pixels}, channels=3)
    assert images.batch(range(12))[0].permute(0, 2, 3, 1).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.uint16, 65535), (np.float32, 1), (np.float64, 255), (np.uint16, 4095)]
)
def test_grey_of_more_bits_has_one_full_scale(tmp_path, dtype, white):
    values = GREY / 255 * white
    pixels = (values if dtype != np.uint16 else values.round()).astype(dtype)
    images = opened(tmp_path, {"images": pixels}, channels=1)
    assert any(f"full scale {white}" in note for note in images.full_scale.notes)
    assert abs(images.batch(range(12))[0][:, 0].numpy().astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("labels", ["labels", "label", "y", "targets", "target"])
def test_labels_of_any_usual_name(tmp_path, labels):
    names = np.array(["cat", "dog", "eel"])[CLASSES]
    images = opened(tmp_path, {"images": RGB, labels: names, "ids": np.arange(12)})
    assert images.label_names == ("cat", "dog", "eel")
    assert [images.label(i) for i in range(12)] == CLASSES.tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": RGB, "data": RGB}, "two arrays of images, data and images"),
        ({"images": RGB, "y": CLASSES, "labels": CLASSES}, "two arrays of labels, labels and y"),
        ({"weights": RGB}, "holds weights; give uint8 images"),
        ({"images": RGB / 255}, r"images of .* is float64 .*; scale it to 0...255"),
        ({"images": RGB[..., :2]}, r"is uint8 \(12, 8, 8, 2\)"),
        ({"images": RGB[:0]}, r"is uint8 \(0, 8, 8, 3\)"),
        ({"images": RGB > 3}, "is bool"),
        ({"images": RGB, "labels": CLASSES[:5]}, "5 labels for 12 images"),
    ],
)
def test_what_is_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, arrays)


def test_labels_of_other_shapes_in_two_splits_are_refused(tmp_path):
    arrays = {**MNIST, "y_test": np.eye(3)[CLASSES[:5]]}
    with pytest.raises(ValueError, match=r"differ in shape: y_test \(5, 3\), y_train \(12,\)"):
        opened(tmp_path, arrays, ":all")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (CLASSES, ("0", "1", "2")),
        (CLASSES[:, None], ("0", "1", "2")),
        (np.eye(3)[CLASSES], ("0", "1", "2")),
        (np.array(["cat", "dog", "eel"])[CLASSES], ("cat", "dog", "eel")),
    ],
    ids=["numbers", "columns", "one-hot", "names"],
)
def test_the_images_of_a_split_without_labels_have_none(tmp_path, labels, names):
    arrays = {"train_images": RGB, "train_labels": labels, "test_images": RGB[:5]}
    images = opened(tmp_path, arrays, ":all")
    assert images.label_names == names
    assert [images.label(i) for i in range(17)] == [*[None] * 5, *CLASSES.tolist()]


def test_labels_of_a_split_are_as_many_as_its_images(tmp_path):
    """Also where too many of one and too few of the other add up."""
    arrays = {**MNIST, "y_train": CLASSES[:5], "y_test": CLASSES}
    with pytest.raises(ValueError, match=r"y_test of .* has 12 labels for 5 images"):
        opened(tmp_path, arrays, ":all")


@pytest.mark.parametrize(
    "other",
    [
        {"weights": np.array([{}], dtype=object)},  # which would be refused
        {"ids": np.arange(12), "bounding_boxes": np.zeros((12, 4))},
    ],
)
@pytest.mark.parametrize("used", [{"images": RGB, "labels": CLASSES}, {"arr_0": RGB}])
def test_arrays_that_are_neither_images_nor_labels_are_not_read(tmp_path, monkeypatch, used, other):
    read, names = npz_source.read_npz, set()

    def note(file, wanted, **options):
        names.update(wanted)
        return read(file, wanted, **options)

    monkeypatch.setattr(npz_source, "read_npz", note)
    images = opened(tmp_path, {**used, **other})
    assert images.batch(range(12))[0].permute(0, 2, 3, 1).numpy().tolist() == RGB.tolist()
    assert names == set(used)


@pytest.mark.parametrize(
    ("arrays", "num_bytes"),
    [
        (MEDMNIST, (RGB.nbytes + CLASSES.nbytes) * 19 // 12),
        ({**MNIST, "weights": np.zeros(10**6)}, (GREY.nbytes + CLASSES.nbytes) * 17 // 12),
    ],
)
def test_the_arrays_together_are_no_bomb(tmp_path, monkeypatch, arrays, num_bytes):
    monkeypatch.setattr(npz_source, "BOMB_RATIO", 0)
    monkeypatch.setattr(npz_source, "BOMB_BYTES", num_bytes)
    assert len(opened(tmp_path, arrays, ":test")) in (4, 5)
    npz_source._npz.cache_clear()
    monkeypatch.setattr(npz_source, "BOMB_BYTES", num_bytes - 1)
    with pytest.raises(ValueError, match=f"arrays of {num_bytes:,} bytes; at most"):
        opened(tmp_path, arrays, ":test")


PNGS = [png(i) for i in range(4)]
BLOB = np.frombuffer(b"".join(PNGS), np.uint8)
OFFSETS = np.cumsum([0, *map(len, PNGS)])


@pytest.mark.parametrize(
    "changed",
    [
        {"train_offsets": OFFSETS.astype(float)},
        {"train_offsets": OFFSETS > 0},
        {"train_offsets": OFFSETS.astype("U8")},
        {"train_offsets": np.int64(3)},
        {"train_offsets": OFFSETS[:0]},
        {"train_offsets": OFFSETS[:1]},
        {"train_offsets": OFFSETS[None]},
        {"train_offsets": np.stack([OFFSETS[:-1], OFFSETS[1:]], 1)},
        {"train_offsets": -OFFSETS},
        {"train_offsets": OFFSETS - 1},
        {"train_offsets": OFFSETS + 1},
        {"train_offsets": OFFSETS[::-1]},
        {"train_offsets": OFFSETS[::-1].astype(np.uint64)},
        {"train_offsets": np.array([0, 2**63 + 1], np.uint64)},
        {"train_offsets": OFFSETS[[0, 2, 1, 3, 4]]},
        {"train_blob": BLOB[:-1]},
        {"train_blob": BLOB[None]},
        {"train_blob": BLOB.astype(np.int32)},
        {"train_blob": BLOB.astype(np.int8)},
        {"train_blob": np.uint8(3)},
        {"train_blob": np.array(b"".join(PNGS))},
    ],
)
def test_a_blob_and_its_offsets_are_bytes_and_places_in_them(tmp_path, changed):
    arrays = {"train_blob": BLOB, "train_offsets": OFFSETS}
    images = opened(tmp_path, arrays)
    assert len(images) == len({images.image(i).numpy().tobytes() for i in range(4)}) == 4
    npz_source._npz.cache_clear()
    with pytest.raises(ValueError, match=r"train_blob of .*; the blob is uint8 \(bytes,\), the"):
        opened(tmp_path, {**arrays, **changed})


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint64, ">i8"])
def test_offsets_of_any_whole_numbers(tmp_path, dtype):
    offsets = OFFSETS[[1, 2, 2, 3]].astype(dtype)  # the second is empty
    images = opened(tmp_path, {"train_blob": BLOB, "train_offsets": offsets})
    truth = opened(tmp_path, {"train_blob": BLOB, "train_offsets": OFFSETS})
    assert (images.image(0) == truth.image(1)).all()
    assert (images.image(2) == truth.image(2)).all()
    with pytest.raises(ValueError, match="no bytes"):
        images.image(1)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (np.array([b"cat", b"dog", b"eel"]), ("cat", "dog", "eel")),
        (np.array(["ü".encode(), "猫".encode(), b"\xff"]), ("ü", "猫", "\ufffd")),
        (np.array(["cat", "dög", "eel"]), ("cat", "dög", "eel")),
        (np.array([7, 8, 9]), ("7", "8", "9")),
    ],
)
def test_names_of_classes_are_text(tmp_path, classes, names):
    images = opened(tmp_path, {"images": RGB, "labels": CLASSES, "classes": classes})
    assert images.label_names == names
    assert [images.label(i) for i in range(12)] == CLASSES.tolist()


@pytest.mark.parametrize(
    "classes",
    [np.array("cat"), np.array(b"cat"), np.array([["a", "b", "c"]]), np.array([0.5, 1, 2]),
     np.array([True, False, True]), np.int64(3)],
)  # fmt: skip
def test_classes_that_are_no_list_of_names_are_refused(tmp_path, classes):
    with pytest.raises(ValueError, match=r"classes of .*a\.npz is .*; give text of shape"):
        opened(tmp_path, {"images": RGB, "labels": CLASSES, "classes": classes})
