"""Resize a set of pictures once and write it as Arrow, to be read through a memory map ever after.

A prepared folder is also what `datasets.load_from_disk` opens: one row per picture with `pixels` (uint8, channels x
size x size, as bytes), `label`, `text` (its caption) and `name`. Beside the rows lie `mezzotint.json`, which tells our
reader what the bytes mean, and `report.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from mezzotint.core.distributed import default_device
from mezzotint.core.files import atomic_folder, write_json
from mezzotint.data.audit import Audit, decode_all
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
    from mezzotint.data.autoencoder import open_codec
    from mezzotint.data.encode_latents import WorkShare, encode_latents
    from mezzotint.data.latent_dataset import LatentDataset, describe_latents

    share = WorkShare.from_environment()
    images = open_images(source, size=size, crop=crop, keep_in_memory=False)
    if not encode_latents(
        images, Path(out), open_codec(name, device or default_device()), share, progress=progress
    ):
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
    from mezzotint.data.latent_dataset import LatentDataset
    from mezzotint.data.text_encoder import describe_captions, embed_captions, open_text_encoder

    images = LatentDataset(Path(out)) if (Path(out) / LATENTS).is_file() else open_images(out)
    reader = open_text_encoder(name, default_device())
    return describe_captions(
        embed_captions([images.text(i) for i in range(len(images))], reader, progress=progress)
    )


def prepare_images(images: ImageDataset, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """`prepare` for a set already open."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; remove it or give another folder")
    with atomic_folder(out, complete=CARD) as folder:
        return _write(images, folder, progress)


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
        for i, decoded in decode_all(images, progress=progress):
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
    write_json(folder / "report.json", report)
    _describe_to_datasets(folder, features, writer.names, card["fingerprint"])
    write_json(folder / CARD, card)
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
    write_json(folder / "state.json", state)


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
        self.writer = self.files.enter_context(pa.ipc.new_stream(file, self.schema))
