"""The images of benchmarks/shard_readers.py, written once in the form of each library."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KEY, SECRET, BUCKET = "key", "secret", "bucket"
Row = tuple[int, int, bytes]  # number, class, file


@dataclass(frozen=True)
class ImageSet:
    """Images in shards of `rows`, as parquet, tar, litdata's chunks and energon's tars.

    folder: of the disk, and of the bucket at `endpoint`.
    """

    name: str
    folder: Path
    counts: tuple[int, ...]
    endpoint: str = ""

    @property
    def total(self) -> int:
        """Return the number of images."""
        return sum(self.counts)

    def place(self, form: str) -> str:
        """Return the folder of a form: on the disk, or in the bucket where there is an endpoint."""
        return f"s3://{BUCKET}/{self.name}/{form}" if self.endpoint else f"{self.folder}/{form}"

    def files(self, form: str) -> list[str]:
        """Return the shards, parquet or tar."""
        ends = {"parquet": "parquet", "tar": "tar"}[form]
        return [f"{self.place(form)}/shard-{i:05d}.{ends}" for i in range(len(self.counts))]


def eurosat(source: Path, step: int = 1) -> Iterator[Row]:
    """Yield every `step`-th image of a zip archive of class folders, in the order of its names."""
    with zipfile.ZipFile(source) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith((".webp", ".jpg", ".png")))
        classes = {name: i for i, name in enumerate(sorted({n.split("/")[-2] for n in names}))}
        for number, name in enumerate(names[::step]):
            yield number, classes[name.split("/")[-2]], archive.read(name)


def photographs(count: int, side: int = 256) -> Iterator[Row]:
    """Yield JPEG files of smooth colours and grain, about as large as photographs of 256 pixels."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        pixels = pixels + rng.integers(-24, 25, (side, side, 1), np.int16)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
        yield number, number * 10 // count, file.getvalue()


def write_set(name: str, rows: list[Row], counts: list[int], folder: Path) -> ImageSet:
    """Write the rows in shards of `counts`, in every form; litdata takes chunks of one size."""
    folder = folder / name
    for form in ("parquet", "tar", "litdata"):
        (folder / form).mkdir(parents=True)
    start = 0
    for shard, count in enumerate(counts):
        part = rows[start : start + count]
        _write_parquet(part, folder / "parquet" / f"shard-{shard:05d}.parquet")
        _write_tar(part, folder / "tar" / f"shard-{shard:05d}.tar")
        start += count
    _write_litdata(rows, max(counts), folder / "litdata")
    _index_for_energon(folder / "tar")
    return ImageSet(name, folder, tuple(counts))


def _write_parquet(rows: list[Row], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    numbers, labels, files = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({"number": numbers, "label": labels, "image": pa.array(files, pa.binary())})
    parquet.write_table(table, path, row_group_size=256, compression={"image": "none"})


def _write_tar(rows: list[Row], path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number, label, data in rows:
            for ending, content in (("jpg", data), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:07d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _write_litdata(rows: list[Row], chunk: int, folder: Path) -> None:
    from litdata.streaming import Cache

    cache = Cache(input_dir=str(folder), chunk_size=chunk)
    for i, (number, label, data) in enumerate(rows):
        cache[i] = {"number": number, "label": label, "image": data}
    cache.done()
    cache.merge()


def _index_for_energon(folder: Path) -> None:
    """Write energon's index beside the tars."""
    command = [str(Path(sys.executable).parent / "energon"), "prepare", str(folder)]
    command += ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    done = subprocess.run([*command, "--num-workers", "1"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"energon prepare: {(done.stdout + done.stderr)[-2000:]}")


def serve(folder: Path, rclone: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    """Serve the folders of `folder` as buckets of an S3 server; set the clients' environment."""
    address = f"127.0.0.1:{port}"
    command = [str(rclone), "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", address]
    server = subprocess.Popen([*command, str(folder)], stderr=subprocess.DEVNULL)
    endpoint = f"http://{address}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        # The server's ranged answers carry the checksum of the whole object.
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    config: dict[str, Any] = {
        "profiles": {
            "local": {
                "storage_provider": {
                    "type": "s3",
                    "options": {
                        "base_path": BUCKET,
                        "endpoint_url": endpoint,
                        "region_name": "us-east-1",
                    },
                },
                "credentials_provider": {
                    "type": "S3Credentials",
                    "options": {"access_key": KEY, "secret_key": SECRET},
                },
            }
        }
    }
    path = folder / "msc.json"
    path.write_text(json.dumps(config))
    os.environ["MSC_CONFIG"] = str(path)
    return server, endpoint
