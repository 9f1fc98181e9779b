"""Resize a set of pictures once and write it as Arrow, to be read through a memory map ever after.

A prepared folder is also what `datasets.load_from_disk` opens: one row per picture with `pixels` (uint8, channels x
size x size, as bytes), `label`, `text` (its caption) and `name`. Beside the rows lie `mezzotint.json`, which tells our
reader what the bytes mean, and `report.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezzotint.data.audit import Audit, examined
from mezzotint.data.image_dataset import LATENTS, ImageDataset, open_images
from mezzotint.data.tables import CARD
from mezzotint.data.transforms import UnreadableImage

BATCH_BYTES = 16 << 20  # of pixels in one Arrow record batch
SHARD_BYTES = 512 << 20  # of pixels in one file


def prepare_source(
    source: str | Path,
    out: str | Path,
    size: int,
    *,
    channels: int = 3,
    crop: str = "adm",
    progress: bool = True,
) -> dict[str, Any]:
    """Write the pictures of `source` at one size to the new folder `out`; the report says what was found.

    What cannot be read is left out and named in the report. `out` appears only when it is complete.

    Args:
        source, size, channels, crop: see `mezzotint.data.image_dataset.open_images`.
        out: a folder that does not exist yet, or is empty.
        progress: show a bar on standard error.

    Returns:
        `mezzotint.data.audit.Audit.summary`, the content of `report.json`.
    """
    images = open_images(source, size=size, channels=channels, crop=crop, keep_in_memory=False)
    return prepare_images(images, Path(out), progress=progress)


def prepare_latents(
    source: str | Path,
    out: str | Path,
    size: int,
    name: str,
    *,
    crop: str = "adm",
    device: str | None = None,
    progress: bool = True,
) -> str:
    """Write the latents of the pictures of `source`, and of their mirror images, to `out`; go on if it was begun.

    Started by torchrun, every process encodes its share; the last to finish completes the set.

    Args:
        source, size, crop: see `mezzotint.data.image_dataset.open_images`; size is in pixels.
        name: of the autoencoder, see `mezzotint.data.autoencoder.open_codec`.
        device: where it computes; a GPU where there is one.
        progress: show a bar on standard error.

    Returns: what the set holds, in words. Errors: ValueError as `mezzotint.data.encode_latents.encode_latents`.
    """
    import torch

    from mezzotint.data.autoencoder import open_codec
    from mezzotint.data.encode_latents import WorkShare, encode_latents
    from mezzotint.data.latent_dataset import LatentDataset, describe_latents

    share = WorkShare.from_environment()
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    images = open_images(source, size=size, crop=crop, keep_in_memory=False)
    if not encode_latents(images, Path(out), open_codec(name, device), share, progress=progress):
        return f"this process's share of {out} is done; the set is complete when the other processes have finished"
    return describe_latents(LatentDataset(Path(out)))


def prepare_captions(out: str | Path, name: str, *, progress: bool = True) -> list[str]:
    """Embed the captions of a prepared folder into our cache, where training looks for them; what there was, in words.

    Args:
        out: a folder of `prepare` or `prepare_latents`.
        name: of the T5 encoder, see `mezzotint.data.text_encoder.open_text_encoder`.
        progress: show a bar on standard error.

    Errors: ValueError as `mezzotint.data.text_encoder.embed_captions`.
    """
    import torch

    from mezzotint.data.latent_dataset import LatentDataset
    from mezzotint.data.text_encoder import describe_captions, embed_captions, open_text_encoder

    images = LatentDataset(Path(out)) if (Path(out) / LATENTS).is_file() else open_images(out)
    reader = open_text_encoder(name, "cuda" if torch.cuda.is_available() else "cpu")
    return describe_captions(
        embed_captions([images.text(i) for i in range(len(images))], reader, progress=progress)
    )


def prepare_images(images: ImageDataset, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """`prepare` for a set already open."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; remove it or give another folder")
    with _beside(out) as folder:
        report = _write(images, folder, progress)
        try:
            os.replace(folder, out)
        except OSError:
            if not (out / CARD).is_file():
                raise
            # Another process was first with the same set.
    return report


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder next to `out` to write in, gone afterwards unless renamed; what killed runs left there goes too."""
    host = socket.gethostname()
    for old in out.parent.glob(f".{out.name}.*.partial"):
        *_, writer, number, _ = old.name.split(".")
        if writer == host.replace(".", "-") and number.isdigit() and not _alive(int(number)):
            shutil.rmtree(old, ignore_errors=True)
    folder = out.parent / f".{out.name}.{host.replace('.', '-')}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True)
    except OSError as error:  # of a name that nobody asked for
        raise OSError(f"{out} cannot be written: {error.strerror}; give another folder") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        return True
    return True


def _write(images: ImageDataset, folder: Path, progress: bool) -> dict[str, Any]:
    from datasets import ClassLabel, Features, Value

    label = (
        Value("int64") if images.label_names is None else ClassLabel(names=list(images.label_names))
    )
    features = Features(
        {
            "pixels": Value("binary"),
            "label": label,
            "text": Value("string"),
            "name": Value("string"),
        }
    )
    found, content = Audit(images.size), hashlib.sha256()
    writer = _Shards(folder, features.arrow_schema, images.channels * images.size**2)
    with writer:
        for i, decoded in examined(images, progress=progress):
            found.add(images, i, decoded)
            if isinstance(decoded, UnreadableImage):
                continue
            row = (decoded.pixels.tobytes(), images.label(i), images.text(i), images.name(i))
            content.update(row[0] + f"{row[1]} {row[2]!r}".encode())
            writer.add(row)
    if not found.count:
        raise ValueError(f"nothing to prepare: no image can be read; {images.report}")
    report = found.summary(images)
    card = {
        "format": 1,
        "count": found.count,
        "channels": images.channels,
        "size": images.size,
        "crop": images.crop,
        "label_names": images.label_names,
        "fingerprint": content.hexdigest()[:32],
        "left_out": [f"{name} ({reason})" for name, reason in found.unreadable.items()],
    }
    _write_json(folder / "report.json", report)
    _describe_to_datasets(folder, features, writer.names, card["fingerprint"])
    _write_json(folder / CARD, card)
    return report


def _describe_to_datasets(folder: Path, features: Any, names: list[str], fingerprint: str) -> None:
    """The two files by which `datasets.load_from_disk` knows a data set."""
    from datasets import DatasetInfo

    DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _write_json(folder / "state.json", state)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


class _Shards:
    """Rows into record batches into files, each synced to disk when it is full."""

    def __init__(self, folder: Path, schema: Any, row_bytes: int):
        self.folder, self.schema = folder, schema
        self.batch_rows = max(1, BATCH_BYTES // row_bytes)
        self.shard_rows = max(1, SHARD_BYTES // row_bytes)
        self.names: list[str] = []
        self.rows: list[tuple[Any, ...]] = []
        self.written = 0  # rows in the open file
        self.files = contextlib.ExitStack()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self.files.close()

    def add(self, row: tuple[Any, ...]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.batch_rows:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self.rows:
            return
        if not self.names or self.written >= self.shard_rows:
            self._next_file()
        columns = [
            pa.array([row[k] for row in self.rows], field.type)
            for k, field in enumerate(self.schema)
        ]
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.written += len(self.rows)
        self.rows = []

    def _next_file(self) -> None:
        import pyarrow as pa

        self.files.close()
        self.names.append(f"data-{len(self.names):05d}.arrow")
        self.written = 0
        file = self.files.enter_context((self.folder / self.names[-1]).open("wb"))
        self.files.callback(lambda: (file.flush(), os.fsync(file.fileno())))
        self.writer = self.files.enter_context(pa.ipc.new_stream(file, self.schema))
