"""Resize a set of images once and write it as Arrow, to be read through a memory map.

`datasets.load_from_disk` opens a prepared folder too: one row per image with `pixels` (uint8,
channels x size x size, as bytes, or a compressed file of `mezzotint.data.prepared_forms`), `label`,
`text` (its caption) and `name`. The folder also holds `mezzotint.json`, which describes the bytes,
and `report.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezzotint.core.distributed import WorkShare, default_device
from mezzotint.core.files import atomic_folder, write_json
from mezzotint.core.threads import map_in_order
from mezzotint.data.audit import Audit, decode_all
from mezzotint.data.autoencoder import open_codec
from mezzotint.data.columns import Columns
from mezzotint.data.encode_latents import encode_latents
from mezzotint.data.image_dataset import LATENTS, DecodedImage, ImageDataset, open_images
from mezzotint.data.latent_dataset import LatentDataset, describe_latents
from mezzotint.data.prepared_forms import Form, get_form
from mezzotint.data.prepared_source import CARD
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
    columns: Columns | None = None,
    full_scale: int | None = None,
    form: str = "raw",
    progress: bool = True,
) -> dict[str, Any]:
    """Write the images of `source` at one size to the new folder `out`; return a report.

    Unreadable images are left out and named in the report. `out` appears when it is complete.

    Args:
        source, size, channels, crop, columns, full_scale: see
            `mezzotint.data.image_dataset.open_images`.
        out: a folder that does not exist yet, or is empty.
        form: how pixels are stored, a name of `mezzotint.data.prepared_forms.FORMS`.
        progress: show a bar on standard error.

    Returns:
        `mezzotint.data.audit.Audit.summary`, the content of `report.json`.
    """
    out, chosen = Path(out), get_form(form)
    images = open_images(
        source,
        size=size,
        channels=channels,
        crop=crop,
        keep_in_memory=False,
        columns=columns,
        full_scale=full_scale,
    )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a folder that does not exist yet")
    with atomic_folder(out, complete=CARD) as folder:
        return _write_images(images, folder, chosen, progress)


def prepare_latents(
    source: str | Path,
    out: str | Path,
    size: int,
    codec_name: str,
    *,
    crop: str = "adm",
    columns: Columns | None = None,
    device: str | None = None,
    full_scale: int | None = None,
    progress: bool = True,
) -> str:
    """Write the latents of the images of `source`, and of their mirror images, to `out`; resumable.

    Under torchrun, every process encodes its share; the last to finish completes the folder.

    Args:
        source, crop, columns, full_scale: see `mezzotint.data.image_dataset.open_images`.
        size: side in pixels.
        codec_name: of the autoencoder, see `mezzotint.data.autoencoder.open_codec`.
        device: where it computes; by default a GPU if there is one.
        progress: show a bar on standard error.

    Returns: a description of the folder.

    Errors: ValueError as `mezzotint.data.encode_latents.encode_latents`.
    """
    images = open_images(
        source, size=size, crop=crop, keep_in_memory=False, columns=columns, full_scale=full_scale
    )
    codec = open_codec(codec_name, device or default_device())
    share = WorkShare.from_environment()
    if encode_latents(images, Path(out), codec, share, progress=progress):
        return describe_latents(LatentDataset(Path(out)))
    return (
        f"this process's share of {out} is done; the folder will be complete when the other "
        "processes have finished"
    )


def prepare_captions(
    out: str | Path, encoder_name: str, *, dtype_name: str = "float16", progress: bool = True
) -> list[str]:
    """Embed the captions of a prepared folder into the cache, where training looks for them.

    Under torchrun, every process embeds its share; the last to finish completes the cache.

    Args:
        out: a folder of `prepare_source` or `prepare_latents`.
        encoder_name: of the T5 encoder, see `mezzotint.data.text_encoder.open_text_encoder`.
        dtype_name: of the embeddings, as the recipe's data.text_dtype.
        progress: show a bar on standard error.

    Returns: a description of the captions, in lines.

    Errors: ValueError as `mezzotint.data.caption_embeddings.embed_captions`.
    """
    from mezzotint.data.caption_embeddings import (
        describe_captions,
        fill_cache,
        is_complete,
        open_cache,
    )
    from mezzotint.data.text_encoder import open_text_encoder

    dataset = LatentDataset(Path(out)) if (Path(out) / LATENTS).is_file() else open_images(out)
    encoder = open_text_encoder(encoder_name, default_device(), dtype_name=dtype_name)
    captions = [dataset.text(i) for i in range(len(dataset))]
    folder = fill_cache(captions, encoder, WorkShare.from_environment(), progress=progress)
    if is_complete(folder):
        return describe_captions(open_cache(folder, captions))
    return [
        "this process's share of the captions is embedded; the cache will be complete when the "
        "other processes have finished"
    ]


def _write_images(images: ImageDataset, folder: Path, form: Form, progress: bool) -> dict[str, Any]:
    from datasets import ClassLabel, Features, Value

    names = images.label_names
    label = Value("int64") if names is None else ClassLabel(names=list(names))
    features = Features(
        {
            "pixels": Value("binary"),
            "label": label,
            "text": Value("string"),
            "name": Value("string"),
        }
    )
    audit, content = Audit(images.size), hashlib.sha256()
    writer = _ArrowWriter(folder, features.arrow_schema, images.channels * images.size**2)
    with writer:
        for i, decoded, stored in _encode_all(decode_all(images, progress=progress), form):
            audit.add(images, i, decoded)
            if isinstance(decoded, UnreadableImage):
                continue
            row = (stored, images.label(i), images.text(i), images.name(i))
            # Lossless forms of the same images have the same fingerprint.
            hashed = decoded.pixels.tobytes() if form.is_lossless else stored
            content.update(hashed + f"{row[1]} {row[2]!r}".encode())
            writer.add(row)
    if not audit.count:
        raise ValueError(f"nothing to prepare: no image can be read; {images.report}")
    report = audit.summary(images)
    card = {
        "format": 1,
        "count": audit.count,
        "channels": images.channels,
        "size": images.size,
        "crop": images.crop,
        "label_names": images.label_names,
        "fingerprint": content.hexdigest()[:32],
        "form": form.name,
        "left_out": [f"{name} ({reason})" for name, reason in audit.unreadable.items()],
    }
    write_json(folder / "report.json", report)
    _write_datasets_files(folder, features, writer.names, card["fingerprint"])
    write_json(folder / CARD, card)
    return report


def _encode_all(
    decoded: Iterator[tuple[int, DecodedImage | UnreadableImage]], form: Form
) -> Iterator[tuple[int, DecodedImage | UnreadableImage, bytes]]:
    """Return each index and image with its bytes, made on all cores; b"" for a damaged one."""

    def encode(
        one: tuple[int, DecodedImage | UnreadableImage],
    ) -> tuple[int, DecodedImage | UnreadableImage, bytes]:
        i, image = one
        return i, image, b"" if isinstance(image, UnreadableImage) else form.encode(image.pixels)

    return map_in_order(encode, decoded, os.cpu_count() or 1)


def _write_datasets_files(folder: Path, features: Any, names: list[str], fingerprint: str) -> None:
    """Write the two files that `datasets.load_from_disk` needs."""
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


class _ArrowWriter:
    """Writes rows into record batches, and those into files of about SHARD_BYTES."""

    def __init__(self, folder: Path, schema: Any, row_bytes: int):
        self.folder, self.schema = folder, schema
        self.batch_rows = max(1, BATCH_BYTES // row_bytes)
        self.shard_rows = max(1, SHARD_BYTES // row_bytes)
        self.names: list[str] = []
        self.rows: list[tuple[Any, ...]] = []
        self.rows_in_file = 0
        self.files = contextlib.ExitStack()

    def __enter__(self) -> _ArrowWriter:
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
        if not self.names or self.rows_in_file >= self.shard_rows:
            self._open_next_file()
        columns = [
            pa.array([row[k] for row in self.rows], field.type)
            for k, field in enumerate(self.schema)
        ]
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows_in_file += len(self.rows)
        self.rows = []

    def _open_next_file(self) -> None:
        import pyarrow as pa

        self.files.close()
        self.names.append(f"data-{len(self.names):05d}.arrow")
        self.rows_in_file = 0
        file = self.files.enter_context((self.folder / self.names[-1]).open("wb"))
        self.writer = self.files.enter_context(pa.ipc.new_stream(file, self.schema))
