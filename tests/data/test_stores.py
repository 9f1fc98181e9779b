"""Folders, zips and tars hold the same files; nothing in them leads elsewhere or hangs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import stat
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from helpers.image_files import png, write_folder, write_tar, write_zip
from mezzotint.core.paths import explain_path, is_hub_name, printable
from mezzotint.data import stores
from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepare import prepare_source
from mezzotint.data.stores import FolderStore, TarStore, ZipStore

CLASSES = {f"{name}/{i}.png": png(i) for name in ("daisy", "rose") for i in range(3)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))


def names_of(images):
    return [images.name(i) for i in range(len(images))]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.tar", "w"), ("a.TAR", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("A.TGZ", "w:gz"),
        ("a.tar.bz2", "w:bz2"), ("a.tbz2", "w:bz2"), ("a.tar.xz", "w:xz"), ("a.txz", "w:xz"),
        ("misnamed.tar", "w:gz"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "flowers/", "./", "./flowers/"])
def test_a_tar_of_class_folders_is_read_as_the_folder(tmp_path, name, mode, prefix):
    files = {f"{prefix}{n}": data for n, data in CLASSES.items()} | {f"{prefix}daisy/0.txt": "tall"}
    images = open_images(write_tar(tmp_path / name, files, mode), size=8)
    truth = open_images(write_folder(tmp_path / "truth", CLASSES), size=8)
    assert images.label_names == ("daisy", "rose")
    assert [images.label(i) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(images.batch(range(6))[0], truth.batch(range(6))[0])
    assert images.text(0) == "tall"
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.batch([5])[0], truth.batch([5])[0])


@pytest.mark.parametrize("name", ["set.ZIP", "set.Zip"])
def test_suffixes_of_any_case(tmp_path, name):
    assert len(open_images(write_zip(tmp_path / name, CLASSES), size=8)) == 6


def test_a_compressed_tar_is_decompressed_once(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tgz", CLASSES, "w:gz")
    assert len(open_images(path, size=8)) == 6
    (plain,) = (tmp_path / "cache" / "archives").glob("*.tar")
    with monkeypatch.context() as patch:
        patch.setattr(stores, "_decompress", lambda *_: pytest.fail("decompressed again"))
        assert len(open_images(path, size=8)) == 6
    write_tar(path, CLASSES | {"rose/9.png": png(9)}, "w:gz")
    assert len(open_images(path, size=8)) == 7
    assert not plain.exists()
    assert len(list((tmp_path / "cache" / "archives").glob("*.tar"))) == 1


def test_a_webdataset_is_told_from_class_folders(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    fields = {}
    for i in range(4):
        fields |= {f"{i:04d}.png": png(i), f"{i:04d}.cls": str(i % 2), f"{i:04d}.txt": f"no. {i}"}
    for name, mode in (("w.tar", "w"), ("w.tar.gz", "w:gz")):
        images = open_images(write_tar(tmp_path / name, fields, mode), size=8)
        assert [images.label(i) for i in range(4)] == [0, 1, 0, 1]
        assert images.text(3) == "no. 3"
    described = {}
    for i in range(2):
        described |= {f"{i}.png": png(i), f"{i}.json": '{"a": 1}'}
    assert (
        names_of(open_images(write_tar(tmp_path / "j.tar", described), size=8))[0]
        == "row 0 (0.png)"
    )
    boxes = CLASSES | {name.replace("png", "json"): "{}" for name in CLASSES}
    assert open_images(write_tar(tmp_path / "b.tar", boxes), size=8).label_names == (
        "daisy",
        "rose",
    )


@pytest.mark.parametrize(
    ("cells", "names", "labels"),
    [
        (["dog", "cat", "dog", ""], ("cat", "dog"), [1, 0, 1, None]),
        (["dog\n", "7", "dog\r\n", "7"], ("7", "dog"), [1, 0, 1, 0]),
        (
            [b"caf\xe9", "a\u0444".encode(), b"caf\xe9", b"\xef\xbb\xbfcat"],
            ("aф", "café", "cat"),
            [1, 0, 1, 2],
        ),
        (["10", "9\n", "10", "-1"], ("9", "10"), [1, 0, 1, None]),
        (["1", "0", "1", "1"], ("0", "1"), [1, 0, 1, 1]),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_the_classes_of_a_webdataset_are_words_or_numbers(
    tmp_path, monkeypatch, cells, names, labels, shards
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "set").mkdir()
    for part in np.array_split(np.arange(4), shards):
        fields = {f"d/{i}.png": png(i) for i in part} | {f"d/{i}.cls": cells[i] for i in part}
        fields = dict(sorted(fields.items()))
        write_tar(tmp_path / "set" / f"x-{part[0]}.tar", fields)
    path = tmp_path / "set" / ("x-0.tar" if shards == 1 else "")
    images = open_images(path, size=8)
    assert images.label_names == names
    assert [images.label(i) for i in range(4)] == labels


@pytest.mark.parametrize("prefix", ["", "flowers\\"])
def test_windows_separators_in_a_zip(tmp_path, prefix):
    files = {(prefix + name).replace("/", "\\"): data for name, data in CLASSES.items()}
    path = write_zip(tmp_path / "a.zip", files | {f"{prefix}empty\\": ""})
    images = open_images(path, size=8)
    truth = open_images(write_zip(tmp_path / "b.zip", CLASSES), size=8)
    assert images.label_names == ("daisy", "rose")
    assert torch.equal(images.batch(range(6))[0], truth.batch(range(6))[0])
    assert images.fingerprint == truth.fingerprint


HOSTILE = [
    "../../escaped.png", "/absolute.png", "a/../../b.png", "..\\w.png", "C:\\w.png", "\\s.png"
]  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_members_that_lead_out_of_an_archive_are_left_out(tmp_path, write):
    inside = tmp_path / "in"
    inside.mkdir()
    path = inside / ("a.zip" if write is write_zip else "a.tar")
    write(path, {name: png(i) for i, name in enumerate(HOSTILE)} | {"fine.png": png(9)})
    before = sorted(tmp_path.rglob("*"))
    images = open_images(path, size=8)
    images.batch([0])
    assert names_of(images) == ["fine.png"]
    assert "6 names that lead out of the archive were left out (../../escaped.png, " in str(
        images.report
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_devices_in_a_tar_are_left_out(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(7))
    path = write_tar(tmp_path / "a.tar", {"x/0.png": png(0), "y/1.png": png(1)})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("x/link.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("x/up.png", tarfile.LNKTYPE, "../secret.png"),
            ("x/same.png", tarfile.LNKTYPE, "y/1.png"),
            ("x/pipe.png", tarfile.FIFOTYPE, ""),
            ("x/null.png", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    images = open_images(path, size=8)
    assert names_of(images) == ["x/0.png", "x/same.png", "y/1.png"]
    assert torch.equal(images.image(1), images.image(2))
    report = str(images.report)
    assert "2 links were left out (x/link.png, x/up.png)" in report
    assert "2 devices, pipes and sockets were left out (x/null.png, x/pipe.png)" in report


def test_links_in_a_zip_are_left_out(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"0.png": png(0)})
    with zipfile.ZipFile(path, "a") as file:
        info = zipfile.ZipInfo("passwd.png")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    images = open_images(path, size=8)
    assert names_of(images) == ["0.png"]
    assert "1 links were left out (passwd.png)" in str(images.report)


def test_links_in_a_folder_stay_within_it(tmp_path):
    outside = write_folder(tmp_path / "outside", {"a/0.png": png(0), "secret.png": png(1)})
    root = write_folder(tmp_path / "root", {"real/1.png": png(2), "b/2.png": png(3)})
    (root / "a").symlink_to(outside / "a")
    (root / "b" / "secret.png").symlink_to(outside / "secret.png")
    (root / "b" / "up.png").symlink_to("../../outside/secret.png")
    (root / "b" / "same.png").symlink_to("../real/1.png")
    (root / "alias").symlink_to("real")
    (root / "real" / "loop").symlink_to(root)
    (root / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "given").symlink_to(root)  # a link that the user gives is followed
    for source in (root, tmp_path / "given"):
        images = open_images(source, size=8)
        assert names_of(images) == ["b/2.png", "b/same.png", "real/1.png"]
        assert "3 links that lead out of the data set were left out (a, b/secret.png, b/up" in str(
            images.report
        )
        assert "1 broken links were left out (dangling.png)" in str(images.report)


def test_a_snapshot_in_the_cache_of_the_hub_is_read(tmp_path):
    repo = tmp_path / "datasets--owner--name"
    write_folder(repo / "blobs", {"1a": png(0), "2b": png(1)})
    for name, blob in (("x/0.png", "1a"), ("y/1.png", "2b")):
        path = repo / "snapshots" / "abc" / name
        path.parent.mkdir(parents=True)
        path.symlink_to(os.path.relpath(repo / "blobs" / blob, path.parent))
    assert open_images(repo / "snapshots" / "abc", size=8).label_names == ("x", "y")


def test_pipes_sockets_and_devices_are_never_opened(tmp_path):
    root = write_folder(tmp_path / "root", {"0.png": png(0)})
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "0.txt")
    here = os.getcwd()
    os.chdir(root)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("socket.png")
    finally:
        os.chdir(here)
    images = open_images(root, size=8)
    assert names_of(images) == ["0.png"]
    assert images.text(0) is None
    assert "3 devices, pipes and sockets were left out" in str(images.report)
    with pytest.raises(ValueError, match="a folder, device, pipe or socket"):
        FolderStore(root).bytes("pipe.png")
    with pytest.raises(ValueError, match="is a device, pipe or broken link"):
        open_images(root / "pipe.png", size=8)


def test_bombs_are_seen_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BOMB_BYTES", 1 << 20)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(4 << 20))
        file.writestr("fine.png", png(0))
    images = open_images(path, size=8)
    assert names_of(images) == ["fine.png"]
    assert "1 files too large for an image were left out (bomb.png)" in str(images.report)
    with gzip.open(tmp_path / "b.tar.gz", "wb") as file:
        file.write(bytes(8 << 20))
    with pytest.raises(ValueError, match="unpacks to more than 100 times its size"):
        open_images(tmp_path / "b.tar.gz", size=8)
    assert not list((tmp_path / "cache" / "archives").glob("*.tar"))
    monkeypatch.setattr(stores, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 are read"):
        open_images(write_folder(tmp_path / "f", {"large.png": png(0)}), size=8)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tar", png(0), "not a readable tar"),
        ("a.tgz", b"\x1f\x8b" + bytes(50), "is damaged or cannot be decompressed"),
        ("a.tar.xz", b"\xfd7zXZ\x00" + bytes(50), "is damaged or cannot be decompressed"),
        ("a.tar", b"\x28\xb5\x2f\xfd" + bytes(50), "tar --zstd -xf"),
        ("a.zip", b"PK no", "not a readable zip"),
        ("a.7z", b"7z", "an archive of another kind"),
    ],
)
def test_archives_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_images(tmp_path / name, size=8)


def test_a_tar_that_is_cut_off(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(i, (64, 64)) for i in range(3)})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"2.png") + 3000])
    with pytest.raises(ValueError, match="not a readable tar"):
        open_images(path, size=8)
    again = write_tar(tmp_path / "b.tgz", CLASSES, "w:gz")
    again.write_bytes(again.read_bytes()[:-60])
    with pytest.raises(ValueError, match="is damaged or cannot be decompressed"):
        open_images(again, size=8)


def with_size(name: str, size: int) -> bytes:
    """Return the header of a tar's member that states a size of its own."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" + (256**11 + size).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


@pytest.mark.parametrize("size", [-1, -512, -1024, -1536, -(2**40)])
def test_a_tar_whose_member_has_a_negative_size(tmp_path, size):
    """Its next member would be itself or one before it, for ever."""
    data = write_tar(tmp_path / "a.tar", CLASSES).read_bytes()
    whole = data[: data.index(b"rose/0.png")]
    (tmp_path / "b.tar").write_bytes(whole + with_size("rose/0.png", size) + bytes(1024))
    with pytest.raises(ValueError, match=r"b\.tar is not a readable tar \(the size of rose/0\.png"):
        open_images(tmp_path / "b.tar", size=8)


def test_threads_read_the_directory_of_a_zip_once_and_each_its_own_members(tmp_path, monkeypatch):
    parsed, parse = [], zipfile.ZipFile._RealGetContents

    def count(file):
        parsed.append(file)
        parse(file)

    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", count)
    files = {f"{i:02d}.png": png(i, (64, 48)) for i in range(24)}
    store = ZipStore(write_zip(tmp_path / "a.zip", files))
    assert list(store.listing().sizes) == list(files)
    together = threading.Barrier(4)

    def read(offset: int) -> bool:
        together.wait(60)
        names = [*files][offset:] + [*files][:offset]
        return all(
            store.bytes(name) == files[name] and files[name].startswith(store.head(name))
            for name in names * 5
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [0, 5, 11, 18])) == [True] * 4
    assert len(parsed) == 1
    write_zip(tmp_path / "a.zip", {"other.png": png(99)})
    os.utime(tmp_path / "a.zip", (1, 1))
    assert ZipStore(tmp_path / "a.zip").bytes("other.png") == png(99)  # another file is read again
    assert len(parsed) == 2


@pytest.mark.parametrize("damaged", [0, 3, 5])
@pytest.mark.parametrize("name", [b"\xff", b"\xc3\xc3", b"\x80"])
def test_a_member_whose_own_name_is_damaged_is_left_out(tmp_path, damaged, name):
    files = {f"bild-\u00e4-{i}.png": png(i) for i in range(6)}
    path = write_zip(tmp_path / "a.zip", files)
    data, own = path.read_bytes(), f"\u00e4-{damaged}".encode()
    path.write_bytes(data.replace(own, name + own[len(name) :], 1))  # before the directory's
    images = open_images(path, size=8)
    pixels, _ = images.batch(range(6))
    assert list(images.report.unreadable) == [f"bild-\u00e4-{damaged}.png"]
    truth = open_images(write_folder(tmp_path / "truth", files), size=8).batch(range(6))[0]
    assert [i for i in range(6) if not torch.equal(pixels[i], truth[i])] == [damaged]


def test_a_folder_of_archives_names_one(tmp_path):
    write_zip(tmp_path / "flowers.zip", CLASSES)
    with pytest.raises(ValueError, match=r"give the archive itself, e\.g\. .*flowers\.zip"):
        open_images(tmp_path, size=8)


def test_ignored_files_are_counted_by_kind_and_named(tmp_path):
    clutter = {"read me": "x", "a.csv": "x", "b.csv": "x", "c.mp4": "x"}
    images = open_images(write_folder(tmp_path, CLASSES | clutter), size=8)
    report = str(images.report)
    assert "3 files that are not images were ignored: 2 .csv, 1 no suffix (a.csv, b" in report
    assert "1 file .mp4 cannot be read" in report


LATIN = b"caf\xe9"


def test_names_of_any_bytes(tmp_path):
    root = tmp_path / "data"
    for folder in (b"ant", LATIN, b"a\x1b[31m"):
        (root / os.fsdecode(folder)).mkdir(parents=True)
        for name in (b"0.png", LATIN + b".png", b"new\nline.png"):
            (root / os.fsdecode(folder) / os.fsdecode(name)).write_bytes(png(len(name)))
    (root / os.fsdecode(LATIN) / os.fsdecode(LATIN + b"2.png")).write_bytes(b"damaged")
    images = open_images(root, size=8)
    assert images.label_names == (r"a\x1b[31m", "ant", r"caf\xe9")
    assert r"caf\xe9/caf\xe9.png" in names_of(images)
    assert r"ant/new\nline.png" in names_of(images)
    report = prepare_source(root, tmp_path / "out", 8, progress=False)
    assert report["images"] == 9
    assert list(report["unreadable"]) == [r"caf\xe9/caf\xe92.png"]
    prepared = open_images(tmp_path / "out")
    assert prepared.label_names == images.label_names
    assert r"caf\xe9/caf\xe9.png" in names_of(prepared)
    with io.BytesIO() as buffer, tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(root, "data")
        tar.close()
        (tmp_path / "b.tar").write_bytes(buffer.getvalue())
    assert names_of(open_images(tmp_path / "b.tar", size=8))[-1] == r"data/caf\xe9/new\nline.png"


def test_printable_names_and_what_a_path_is(tmp_path, monkeypatch):
    assert printable("é 猫.png") == "é 猫.png"
    assert printable(os.fsdecode(b"\xff\n")) == r"\xff\n"
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"o/x.tar": "", "a/b": "", "weights.pth": "", "m/w.safetensors": "",
                            "m/config.json": ""})  # fmt: skip
    assert [is_hub_name(n) for n in ("owner/name", "o/n-1.5")] == [True, True]
    for name in ("a/b", "o/x.tar", "o/y.tar", "./a", "C:\\a/b", "/a/b", "a", "a/b/c", "x/y.PNG"):
        assert not is_hub_name(name)
    for name, words in [
        ("o/x.tar", "o/x.tar is a tar, not a model"),
        ("o", "o is a folder, but not a model"),
        ("weights.pth", "mezzotint convert makes a model folder"),
        ("m/w.safetensors", "give its folder, m"),
        ("o\\gone.zip", r"there is no file or folder o\gone.zip"),
    ]:
        assert words in explain_path(name, "a model")


def test_tar_members_are_indexed_once(tmp_path):
    store = TarStore(write_tar(tmp_path / "a.tar", CLASSES))
    assert store.listing() is store.listing()


@pytest.mark.parametrize("name", ["o/x.tar", "a.png", "w.pth", "x/y.zip", "set.zip:train"])
def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch, name):
    import huggingface_hub

    from mezzotint.models import load_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail(name))
    write_folder(tmp_path, {"o/x.tar": "", "a.png": "", "w.pth": ""})
    with pytest.raises(ValueError, match=r"not a model folder|there is no file or folder"):
        load_model(name)
