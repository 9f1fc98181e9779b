"""Code that leaves a mark in the working folder where it runs, in the usual dangerous forms."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np

MARK = "it-ran"
SCRIPT = f"import os\nos.mkdir({MARK!r})\n"
YAML = f"preset: !!python/object/apply:os.mkdir [{MARK}]\n".encode()


class Payload:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


PICKLED = pickle.dumps({"fid": Payload()}, 2)


def objects() -> np.ndarray:
    """Return an array of payloads."""
    return np.array([Payload()], dtype=object)


def object_npy() -> bytes:
    """Return a .npy whose array is of objects."""
    file = io.BytesIO()
    np.save(file, objects())
    return file.getvalue()


def pickle_in_zip(name: str) -> bytes:
    """Return a zip with a pickle as one member, as torch writes weights."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, PICKLED)
    return file.getvalue()


def ran() -> bool:
    """Return whether a payload ran in the working folder, and remove its mark."""
    if found := Path(MARK).exists():
        Path(MARK).rmdir()
    return found
