"""Files of a folder or of an archive, by name."""

from __future__ import annotations

import functools
import os
import stat
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from mezzotint.data.transforms import UnreadableImage


class FolderStore:
    """Files below a folder, by relative name with forward slashes; links are followed."""

    def __init__(self, root: Path):
        self.root = root

    def sizes(self) -> dict[str, int]:
        """Return file sizes in bytes by name, without hidden files."""
        sizes: dict[str, int] = {}
        seen: set[str] = set()
        root = str(self.root)
        for folder, below, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            below[:] = [] if real in seen else [name for name in below if not name.startswith(".")]
            prefix = Path(os.path.relpath(folder, root)).as_posix() + "/" if folder != root else ""
            for name in [] if real in seen else files:
                status = _status(os.path.join(folder, name))
                if not name.startswith(".") and status is not None and stat.S_ISREG(status.st_mode):
                    sizes[prefix + name] = status.st_size
            seen.add(real)
        return sizes

    def bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.root / name).read_bytes()


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # a broken link
        return None


class ZipStore:
    """Members of a zip, by name; read in place, never extracted to disk."""

    def __init__(self, root: Path):
        self.root = root
        self.modified_ns = root.stat().st_mtime_ns

    def sizes(self) -> dict[str, int]:
        """Return CRC-32 by name, in place of sizes, without folders and hidden members."""

        def is_hidden(name: str) -> bool:
            return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)

        members = [info for info in self._handle().infolist() if not info.is_dir()]
        return {info.filename: info.CRC for info in members if not is_hidden(info.filename)}

    def bytes(self, name: str) -> bytes:
        """Return the content of a member; `UnreadableImage` if it is damaged."""
        try:
            return self._handle().read(name)
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, zlib.error) as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error

    def _handle(self) -> zipfile.ZipFile:
        return _open_zip(str(self.root), self.modified_ns, os.getpid(), threading.get_ident())


# One handle per thread and process: they would share one file position.
@functools.lru_cache(maxsize=64)
def _open_zip(path: str, modified_ns: int, pid: int, thread: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(
            f"{path} is not a readable zip ({error}); give a zip of images or unpack it to a folder"
        ) from error
