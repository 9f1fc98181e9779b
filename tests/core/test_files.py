"""Files are whole or absent, have the umask's mode, follow no links and replace no devices."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from mezzotint.core.files import (
    _partial_path,
    atomic_folder,
    atomic_open,
    atomic_replace,
    atomic_write,
    cache_dir,
    check_replaceable,
    is_special,
    no_follow,
    partial_folder,
    remove_partials,
)
from mezzotint.core.tensor_files import save_tensors


def write_open(path):
    with atomic_open(path) as file:
        file.write(b"new")


WAYS = {
    "open": write_open,
    "write": lambda path: atomic_write(path, "new"),
    "replace": lambda path: atomic_replace(path, lambda partial: partial.write_bytes(b"new")),
}


@pytest.fixture(params=WAYS)
def write(request):
    return WAYS[request.param]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_those_of_the_umask(tmp_path, write, umask, expected):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.pth")
    finally:
        os.umask(before)
    assert {mode(path) for path in tmp_path.iterdir()} == {expected}


@pytest.mark.parametrize("folder", ["file", "absent", "/proc"])
def test_a_place_that_cannot_be_written_is_named_and_not_the_partial_file(tmp_path, write, folder):
    (tmp_path / "file").write_text("old")
    path = tmp_path / folder / "target"
    with pytest.raises(OSError, match=f"^{path} cannot be written: .*choose another place") as end:
        write(path)
    assert "partial" not in str(end.value)
    assert end.value.errno
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_copy_to_a_full_disk_names_the_target(tmp_path):
    def copy(partial):
        raise OSError(errno.ENOSPC, "No space left on device", "/source", None, str(partial))

    with pytest.raises(OSError, match=r"target cannot be written: No space .* free some space"):
        atomic_replace(tmp_path / "target", copy)


def private_device(path):
    """Make a null device of our own, never the machine's."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device needs root")


@pytest.mark.parametrize("linked", [False, True])
def test_a_device_is_written_to_and_stays(tmp_path, write, linked):
    private_device(tmp_path / "null")
    path = tmp_path / "null"
    if linked:
        path = tmp_path / "link"
        path.symlink_to("null")
    write(path)
    assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode)
    assert path.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_gets_the_content_and_stays(tmp_path, write, linked):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(fifo)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    write(tmp_path / "link" if linked else fifo)
    reader.join(10)
    assert received == [b"new"]
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_by_its_name(tmp_path, name, to):
    (tmp_path / "link").symlink_to("/dev/stdout")
    script = (
        "import sys; from pathlib import Path; from mezzotint.core.files import atomic_write\n"
        "print('before'); atomic_write(Path(sys.argv[1]), 'content\\n'); print('after')"
    )
    command = [sys.executable, "-c", script, name]
    if to == "pipe":
        text = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    else:
        with (tmp_path / "file").open("wb") as file:
            subprocess.run(command, cwd=tmp_path, stdout=file, check=True)
        text = (tmp_path / "file").read_bytes()
    assert text == b"before\ncontent\nafter\n"
    assert os.path.islink("/dev/stdout")


def test_what_is_special(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "loop", "dangling", "none", "."):
        assert not is_special(tmp_path / name)
    for name in ("/dev/null", "/dev/stdout", "/dev/fd/7", "/dev/../dev/stderr"):
        assert is_special(Path(name))


def test_a_link_is_replaced_and_its_target_stays(tmp_path, write):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        write(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_links_at_partial_names_are_not_followed(tmp_path, write):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    out = tmp_path / "out"
    _partial_path(out).symlink_to(precious / "file")
    write(out)
    assert out.read_text() == "new"
    assert not out.is_symlink()
    folder = tmp_path / "folder"
    _partial_path(folder).symlink_to(precious)
    with partial_folder(folder) as partial:
        (partial / "file").write_text("new")
    assert (precious / "file").read_text() == "precious"


@pytest.mark.parametrize("target", ["empty", "absent"])
@pytest.mark.parametrize("way", ["absolute", "relative", "of a link"])
def test_a_folder_is_written_where_a_link_leads(tmp_path, way, target):
    disk, here = tmp_path / "disk", tmp_path / "here"
    (disk / "empty").mkdir(parents=True)
    here.mkdir()
    link = here / "link"
    link.symlink_to(f"../disk/{target}" if way == "relative" else disk / target)
    if way == "of a link":
        link = here / "second"
        link.symlink_to("link")
    with atomic_folder(link, complete="done") as partial:
        assert partial.parent == disk  # a rename works within one disk
        (partial / "done").write_text("new")
    assert (disk / target / "done").read_text() == "new"
    assert link.is_symlink()
    assert {path.name for path in disk.iterdir()} == {"empty", target}
    assert all(path.is_symlink() for path in here.iterdir())


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("folder", [partial_folder, lambda path: atomic_folder(path, "done")])
def test_a_disk_is_no_folder_that_can_get_its_name(tmp_path, monkeypatch, folder, linked):
    mount = tmp_path / "mount"
    mount.mkdir()
    (tmp_path / "link").symlink_to(mount)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mount)
    refused = pytest.raises(ValueError, match=r"mount is a disk of its own.* new folder inside it")
    with refused, folder(tmp_path / "link" if linked else mount):
        pytest.fail("work was done")
    assert sorted(os.listdir(tmp_path)) == ["link", "mount"]
    with folder(mount / "new") as partial:
        (partial / "done").touch()


@pytest.mark.parametrize("host", ["node-1", "node.cluster.example.org"])
def test_only_what_killed_processes_left_is_removed(tmp_path, monkeypatch, host):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    ours, dead = host.replace(".", "-"), 2**22 + 1  # above every process number of Linux
    names = {
        # name: (age in seconds, whether it is removed)
        f".a.npy.{ours}.{os.getppid()}.partial": (0, False),
        f".b.npy.{ours}.{os.getppid()}.partial": (10**6, False),
        f".a.npy.{ours}.{dead}.partial": (0, True),
        f".piece-000000.npy.{ours}.{dead}.partial": (10**6, True),
        f".a.npy.{ours}.{os.getpid()}.partial": (0, True),
        f".a.npy.node-2.{os.getppid()}.partial": (3000, False),
        f".a.npy.node-2.{dead}.partial": (3000, False),
        f".b.npy.node-2.{dead}.partial": (4000, True),
        ".download.partial": (3000, False),
        ".upload.partial": (4000, True),
        "a.npy": (10**6, False),
        "a.partial": (10**6, False),
        ".hidden": (10**6, False),
    }
    for name, (age, _) in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_partials(tmp_path)
    assert set(os.listdir(tmp_path)) == {name for name, (_, left) in names.items() if not left}


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "device"])
def test_locks_and_logs_are_regular_files(tmp_path, kind):
    path, target = tmp_path / "log", tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        private_device(path)
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("precious")
    for way in ("a", "w"):
        with pytest.raises(OSError, match="log is a link or no regular file"):
            open(path, way, opener=no_follow)  # noqa: SIM115
    assert not target.exists() or target.read_text() == "precious"


def test_a_regular_log_grows(tmp_path):
    for line in ("a", "b"):
        with open(tmp_path / "log", "a", opener=no_follow) as file:
            file.write(line)
    assert (tmp_path / "log").read_text() == "ab"


# A file system that is full, as a file that may not grow; in a process of its own.
FULL = """
import resource, signal, sys, torch
from pathlib import Path
from mezzotint.core.files import atomic_open, atomic_replace
from mezzotint.core.tensor_files import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
def write_open(path):
    with atomic_open(path) as file:
        file.write(bytes(100_000))
ways = {
    "file": write_open,
    "other": lambda path: atomic_replace(path, lambda partial: partial.write_bytes(bytes(100_000))),
    "a.safetensors": lambda path: save_tensors({"a": torch.zeros(100_000)}, path),
    "a.pth": lambda path: save_tensors({"a": torch.zeros(100_000)}, path),
}
for name, write in ways.items():
    try:
        write(Path(name))
    except OSError as error:
        sys.stderr.write(f"{error}\\n")
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    names = ["file", "other", "a.safetensors", "a.pth"]
    assert len(lines) == len(names), done.stderr
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name} cannot be written: "), line
        assert "free some space" in line
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path, write):
    with pytest.raises(OSError, match=r"none/file cannot be written: No such file or directory"):
        write(tmp_path / "none" / "file")


def test_only_what_is_ours_is_replaced(tmp_path):
    ours = lambda path: b"ours" in path.read_bytes()  # noqa: E731
    (tmp_path / "ours").write_text("this is ours")
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("theirs")
    os.mkfifo(tmp_path / "fifo")
    for name in ("ours", "empty", "fifo", "none"):
        check_replaceable(tmp_path / name, ours, "a report")
    for name in ("theirs", "link"):
        with pytest.raises(ValueError, match=f"{name} exists and is not a report of mezzotint"):
            check_replaceable(tmp_path / name, ours, "a report")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        check_replaceable(tmp_path, ours, "a report")

    def unreadable(path):
        raise zipfile.BadZipFile("damaged")

    with pytest.raises(ValueError, match="is not a report"):
        check_replaceable(tmp_path / "theirs", unreadable, "a report")


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        (None, None, "{}/.cache/mezzotint"),
        (None, "", "{}/.cache/mezzotint"),  # as if it were not set, as XDG has it
        ("", "", "{}/.cache/mezzotint"),
        ("", "/xdg", "/xdg/mezzotint"),
        ("/own", "", "/own"),
        ("/own", "/xdg", "/own"),
    ],
)
def test_an_empty_variable_names_no_cache(tmp_path, monkeypatch, own, xdg, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("MEZZOTINT_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert str(cache_dir()) == expected.format(tmp_path)
