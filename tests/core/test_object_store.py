"""Files at addresses: what is written is read back, and every failure is one sentence."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mezzotint.core import object_store as store
from mezzotint.core import store_calls
from mezzotint.core.object_store import (
    MissingFileError,
    StoreError,
    StoreUnavailable,
    join_address,
    patience,
)
from mezzotint.core.store_errors import translate_error


@pytest.fixture(params=["file", "memory", "s3"])
def base(request, tmp_path):
    """An empty folder of each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return "s3://bucket/runs"
    if request.param == "file":
        return f"file://{tmp_path}/runs"
    address = f"memory://{tmp_path.name}/runs"
    return address


def test_what_is_an_address():
    for text in ("s3://bucket/a", "gs://b", "hf://datasets/a/b", "https://x.org/a", "memory://a"):
        assert store.is_address(text)
    for text in (
        "shapes:64",
        "C:\\images",
        "c://images",
        "data/set.zip",
        "owner/name",
        "/a//b",
        "",
    ):
        assert not store.is_address(text), text
    assert join_address("s3://bucket/a/", "b", "c/d") == "s3://bucket/a/b/c/d"


def test_write_list_read_delete(base, tmp_path):
    for name in ("a/1.bin", "a/2.txt", "ab/3.bin", "a/b/4.BIN"):
        store.write_bytes(join_address(base, name), name.encode())

    def names(files):
        return [file.address.removeprefix(f"{base}/") for file in files]

    assert names(store.list_files(base)) == ["a/1.bin", "a/2.txt", "a/b/4.BIN", "ab/3.bin"]
    assert names(store.list_files(f"{base}/a")) == ["a/1.bin", "a/2.txt", "a/b/4.BIN"]
    assert names(store.list_files(f"{base}/a/", (".bin",))) == ["a/1.bin", "a/b/4.BIN"]
    assert names(store.list_files(f"{base}/*/?.bin")) == ["a/1.bin", "ab/3.bin"]
    assert names(store.list_files(f"{base}/a/2.txt")) == ["a/2.txt"]
    found = store.stat_file(f"{base}/a/1.bin")
    assert found.num_bytes == 7
    assert found.version
    assert store.stat_file(f"{base}/a") is None
    assert store.stat_file(f"{base}/missing") is None
    assert store.read_bytes(f"{base}/a/1.bin", 2, 5) == b"1.b"
    assert store.read_bytes(f"{base}/a/1.bin", 2, 500) == b"1.bin"

    # What another process changes is seen at once.
    store.write_bytes(f"{base}/a/1.bin", b"another content")
    assert store.stat_file(f"{base}/a/1.bin").num_bytes == 15
    assert store.stat_file(f"{base}/a/1.bin").version != found.version

    store.delete_files(f"{base}/a")
    assert names(store.list_files(base)) == ["ab/3.bin"]
    store.delete_files(f"{base}/a")  # nothing there is no error
    assert store.list_files(f"{base}/a", allow_empty=True) == []
    for empty in (f"{base}/a", f"{base}/a/*.bin"):
        with pytest.raises(MissingFileError, match="there are no files at"):
            store.list_files(empty)
    with pytest.raises(MissingFileError, match=r"that end in \.jpg or \.png"):
        store.list_files(base, (".jpg", ".png"))
    with pytest.raises(StoreError, match="does not exist"):
        store.read_bytes(f"{base}/a/1.bin")


def test_upload_and_download(base, tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "local").write_bytes(content)
    store.upload_file(tmp_path / "local", f"{base}/x/large")
    store.download_file(f"{base}/x/large", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == content
    with store.open_file(f"{base}/x/large") as file:
        file.seek(-5, os.SEEK_END)
        assert file.read() == content[-5:]
        file.seek(100)
        assert file.read(2 << 20) == content[100 : 100 + (2 << 20)]
        assert file.tell() == 100 + (2 << 20)
        assert file.read() == content[100 + (2 << 20) :]
    with pytest.raises((StoreError, FileNotFoundError)):
        store.download_file(f"{base}/x/none", tmp_path / "new" / "none")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]
    assert [file.num_bytes for file in store.list_files(base)] == [3 << 20]


def test_a_path_is_a_local_file(tmp_path):
    store.write_bytes(str(tmp_path / "a" / "b [1].txt"), b"1")
    assert store.list_files(str(tmp_path))[0].address == f"file://{tmp_path}/a/b [1].txt"
    assert store.read_bytes(f"{tmp_path}/a/b [1].txt") == b"1"


@pytest.mark.parametrize(
    "write", [lambda path, address: store.write_bytes(address, b"a"), store.upload_file]
)
@pytest.mark.parametrize("below", ["file/a", "file/a/b", "link/a"])
def test_a_place_that_cannot_be_written_is_named(write, below, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    address = f"file://{tmp_path}/{below}"
    with pytest.raises(StoreError, match=f"{address} cannot be written"):
        write(tmp_path / "file", address)
    assert store.stat_file(address) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("scheme", ["FILE", "File", "MEMORY"])
def test_the_case_of_a_scheme_does_not_matter(scheme, tmp_path):
    address = f"{scheme}://{tmp_path}/a"
    store.write_bytes(address, b"a")
    assert store.read_bytes(f"{scheme.lower()}://{tmp_path}/a") == b"a"
    assert [file.num_bytes for file in store.list_files(address)] == [1]
    store.delete_files(address)
    assert store.stat_file(address) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("s3://b/x", "s3a://b/x/", True),
        ("s3://b/x", "s3://b/x/y", False),
        ("s3://b/x", "gs://b/x", False),
        ("file:///tmp/x/", "/tmp/y/../x", True),
        ("file:///tmp/x", "s3://tmp/x", False),
    ],
)
def test_one_place_by_two_names(a, b, same):
    assert store.same_place(a, b) == store.same_place(b, a) == same


def test_errors_name_what_to_set(s3_server, monkeypatch, tmp_path):
    store.write_bytes("s3://bucket/a", b"1")
    with pytest.raises(StoreError, match=r"there is no bucket s3://other; .*AWS_ENDPOINT_URL"):
        store.list_files("s3://other/a")
    with pytest.raises(StoreError, match="there is no bucket s3://other"):
        store.write_bytes("s3://other/a", b"1")
    calls = (
        lambda: store.list_files("s3://bucket"), lambda: store.stat_file("s3://bucket/a"),
        lambda: store.read_bytes("s3://bucket/a"), lambda: store.write_bytes("s3://bucket/a", b"2"),
        lambda: store.download_file("s3://bucket/a", tmp_path / "a"),
    )  # fmt: skip
    wanted = "s3://bucket.* may not be used .*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for call in calls:
        with pytest.raises(StoreError, match=wanted):
            call()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=r"Unable to locate credentials.*AWS_PROFILE"):
        store.list_files("s3://bucket")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"profile \(nobody\).*AWS_PROFILE"):
        store.list_files("s3://bucket")


def test_a_wrong_checksum_names_the_setting_for_other_servers():
    from botocore.exceptions import FlexibleChecksumError

    error = FlexibleChecksumError(error_msg="Expected checksum a did not match b")
    told = translate_error(error, "s3://bucket/a")
    assert isinstance(told, StoreError)
    assert "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required" in str(told)


def test_addresses_that_cannot_be_read(monkeypatch):
    with pytest.raises(StoreError, match="dask:// is no scheme that can be read; use s3, gs, hf"):
        store.list_files("dask://a")
    with pytest.raises(StoreError, match="chains file systems"):
        store.read_bytes("simplecache::s3://bucket/a")
    with pytest.raises(StoreError, match="can be read and not written"):
        store.write_bytes("https://example.org/a?key=secret", b"")
    with pytest.raises(StoreError, match="only a file or a folder"):
        store.delete_files("memory://a/*")

    store_calls._filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StoreError, match=r"pip install 'mezzotint\[s3\]'"):
        store.list_files("s3://bucket/a")
    with pytest.raises(StoreError, match="pip install 'gcsfs'"):
        store.list_files("gs://bucket/a")


def test_patiences_of_threads_end_in_any_order():
    first, second = patience(600), patience(5)
    first.__enter__()
    second.__enter__()
    assert store_calls.patience_s() == 5
    first.__exit__(None, None, None)
    assert store_calls.patience_s() == 5
    second.__exit__(None, None, None)
    assert store_calls.patience_s() == store_calls.PATIENCE_S


def test_patience_of_the_environment(monkeypatch):
    monkeypatch.setenv("MEZZOTINT_STORE_PATIENCE_S", "2.5")
    assert store_calls.patience_s() == 2.5
    with patience(1):
        assert store_calls.patience_s() == 1
    for wrong in ("soon", "0", "nan"):
        monkeypatch.setenv("MEZZOTINT_STORE_PATIENCE_S", wrong)
        with pytest.raises(StoreError, match="give seconds"):
            store.read_bytes("memory://a")


def test_a_server_that_comes_back(s3_server, capsys, monkeypatch):
    store.write_bytes("s3://bucket/a", b"1")
    store.read_bytes("s3://bucket/a")  # makes the client, which takes its time
    monkeypatch.setattr(store_calls, "NOTICE_S", 0.1)
    s3_server.kill()
    timer = threading.Timer(2.0, s3_server.start)
    timer.start()
    assert store.read_bytes("s3://bucket/a") == b"1"
    timer.join()
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("waiting for s3://bucket/a: ")


def test_a_server_that_is_gone_or_frozen(s3_server, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(30 << 20))  # more than a connection's buffers hold
    calls = {
        "list": lambda: store.list_files("s3://bucket"),
        "read": lambda: store.read_bytes("s3://bucket/a"),
        "write": lambda: store.write_bytes("s3://bucket/a", b"1"),
        "download": lambda: store.download_file("s3://bucket/a", tmp_path / "b"),
    }
    s3_server.kill()
    with patience(0.5):
        for call in calls.values():
            with pytest.raises(StoreUnavailable, match=r"s3://bucket.* did not .*AWS_ENDPOINT_URL"):
                call()
    s3_server.start()
    assert store.list_files("s3://bucket", allow_empty=True) == []
    s3_server.freeze()
    for name, call in calls.items():
        begin = time.monotonic()
        with patience(1), pytest.raises(StoreUnavailable, match="did not answer for"):
            call()
        assert time.monotonic() - begin < 15, name  # it would be a minute
    monkeypatch.setattr(store_calls, "SLOWEST_BYTES_PER_S", 60 << 20)
    with patience(1), pytest.raises(StoreUnavailable):
        store.upload_file(tmp_path / "a", "s3://bucket/a")
    s3_server.thaw()
    assert not (tmp_path / "b").exists()


class _Odd(http.server.BaseHTTPRequestHandler):
    """Answers with the next status of a list; slowly, and without ranges."""

    statuses: list[int] = []  # noqa: RUF012

    def do_GET(self):
        status = self.statuses.pop(0) if self.statuses else 200
        self.send_response(status)
        self.send_header("Content-Length", "10")
        self.end_headers()
        if self.command == "GET":
            for byte in b"0123456789":
                time.sleep(0.02)
                self.wfile.write(bytes([byte]))

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def odd_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_status_of_an_answer_decides(odd_server):
    address = f"{odd_server}/a.bin?signature=secret"
    _Odd.statuses[:] = [503, 500, 429]
    assert store.read_bytes(address, 2, 5) == b"234"  # a slow server that knows no ranges
    for status, message in ((404, "does not exist"), (403, "may not be used"), (401, "may not be")):
        _Odd.statuses[:] = [status]
        with pytest.raises(StoreError, match=message) as caught:
            store.read_bytes(address)
        assert "secret" not in str(caught.value).partition("(")[0]
    _Odd.statuses[:] = [503] * 100
    with patience(0.5), pytest.raises(StoreUnavailable, match="503"):
        store.read_bytes(address)
    _Odd.statuses.clear()


def test_threads_and_other_processes(s3_server):
    store.write_bytes("s3://bucket/a", b"1")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.read_bytes, ["s3://bucket/a"] * 8)) == [b"1"] * 8
    read = "from mezzotint.core.object_store import read_bytes; print(read_bytes('s3://bucket/a'))"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "b'1'"
