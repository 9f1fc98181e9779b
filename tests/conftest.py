"""Shared by all tests: one thread, no network, and the golden numbers and images in ../shared."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")
# Processes that tests start find the helpers too.
HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# A busy machine is slow, and no fault.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")
# The slowest start first, so that no process of a parallel run waits for another at the end.
FIRST = {"web", "docs", "train", "convert", "tools", "test_hashes.py"}
SHARED = Path(os.environ.get("MEZZOTINT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_modifyitems(items):
    """Keep a file, and all of web/, in one process of a parallel run: it makes fixtures once."""
    for item in items:
        path = item.path.relative_to(HERE)
        group = "web" if path.parts[0] == "web" else path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.relative_to(HERE).parts[0] not in FIRST)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def s3_server(tmp_path):
    """Return a real S3 server that serves `tmp_path / "s3"`; skip without rclone."""
    from helpers.s3_server import running_server

    with running_server(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def shared():
    """Return a function from a relative path to a file in ../shared; skip where it is absent."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"{path} is absent: golden numbers and images lie outside the checkout")
        return path

    return find
