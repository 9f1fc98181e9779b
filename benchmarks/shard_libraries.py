"""The libraries of benchmarks/shard_readers.py behind one interface: batches, a state, a restart.

Every reader shuffles as its documentation recommends for training, returns the stored bytes without
decoding them, and reads with torch's own data loader or with the library's.
"""

from __future__ import annotations

import bisect
import os
import pickle
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from shard_sets import BUCKET, KEY, SECRET, ImageSet

Batch = list[tuple[int, int, int]]  # number, class, bytes
BUFFER = 1000  # images that a library's shuffle buffer holds


@dataclass(frozen=True)
class Settings:
    """What a reader is asked for; `cache` is an empty folder."""

    images: ImageSet
    cache: Path
    batch: int = 64  # images a step over all ranks
    rank: int = 0
    world: int = 1
    workers: int = 0
    seed: int = 0
    buffer: int = BUFFER

    @property
    def per_rank(self) -> int:
        """Return the images of a rank's batch."""
        return self.batch // self.world


class Reader(ABC):
    """One rank's reader of one epoch."""

    resume = "state"

    def __init__(self, settings: Settings):
        self.settings = settings
        # webdataset and litdata ask the environment for the rank.
        os.environ |= {
            "RANK": str(settings.rank),
            "GLOBAL_RANK": str(settings.rank),
            "WORLD_SIZE": str(settings.world),
            "NNODES": "1",
        }

    @abstractmethod
    def batches(self, state: Any = None) -> Iterator[Batch]:
        """Yield the batches of the epoch, or those after `state`."""

    @abstractmethod
    def state(self) -> Any:
        """Return what `batches` needs to go on after the last batch."""

    @staticmethod
    def change_ranks(states: list[bytes], world: int) -> list[bytes]:
        """Return the states of `world` ranks for those of other ranks, as pickled bytes."""
        return [states[rank % len(states)] for rank in range(world)]


def as_batch(rows: list[Any]) -> Batch:
    """Return the number, the class and the size of every row."""
    return [(int(r["number"]), int(r["label"]), len(r["image"])) for r in rows]


class Datasets(Reader):
    """`datasets` in streaming mode, with its own shuffle buffer and torchdata's loader."""

    form = "parquet"

    def batches(self, state: Any = None) -> Iterator[Batch]:
        """As `Reader.batches`."""
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node
        from torchdata.stateful_dataloader import StatefulDataLoader

        s = self.settings
        files = {"train": s.images.files(self.form)}
        rows = load_dataset(self.form, data_files=files, split="train", streaming=True)
        rows = rows.shuffle(seed=s.seed, buffer_size=s.buffer)
        rows = split_dataset_by_node(rows, s.rank, s.world)
        self.loader = StatefulDataLoader(
            rows, batch_size=s.per_rank, num_workers=s.workers, collate_fn=as_batch
        )
        if state is not None:
            self.loader.load_state_dict(state)
        yield from self.loader

    def state(self) -> Any:
        """As `Reader.state`."""
        return self.loader.state_dict()


class WebDataset(Reader):
    """`webdataset`; it has no state, so a restart reads and drops what was seen."""

    form, resume = "tar", "skip"
    seen = 0

    def batches(self, state: Any = None) -> Iterator[Batch]:
        """As `Reader.batches`."""
        import webdataset as wds

        s = self.settings
        shards = s.images.files("tar")
        if s.images.endpoint:
            shards = [self._pipe(shard) for shard in shards]
        rows = wds.WebDataset(
            shards,
            shardshuffle=len(shards),
            detshuffle=True,
            nodesplitter=wds.split_by_node,
            seed=s.seed,
            empty_check=False,
        ).compose(wds.detshuffle(s.buffer, s.buffer, seed=s.seed))
        loader = DataLoader(
            rows, batch_size=s.per_rank, num_workers=s.workers, collate_fn=self._as_batch
        )
        self.seen = state or 0
        for batch in islice(loader, self.seen, None):
            self.seen += 1
            yield batch

    def state(self) -> Any:
        """As `Reader.state`."""
        return self.seen

    def _pipe(self, shard: str) -> str:
        """Return the command that reads an object: webdataset opens no s3:// address."""
        url = shard.replace("s3://", f"{self.settings.images.endpoint}/")
        sign = f"--aws-sigv4 aws:amz:us-east-1:s3 --user {KEY}:{SECRET}"
        return f"pipe:curl -s -f {sign} {url}"

    @staticmethod
    def _as_batch(rows: list[Any]) -> Batch:
        return [(int(r["__key__"]), int(r["cls"]), len(r["jpg"])) for r in rows]


class LitData(Reader):
    """`litdata`, with chunks of its own form; it downloads chunks to a cache."""

    form = "litdata"

    def batches(self, state: Any = None) -> Iterator[Batch]:
        """As `Reader.batches`."""
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import downloader

        s = self.settings
        options: dict[str, Any] = {}
        if s.images.endpoint:
            options["storage_options"] = {"endpoint_url": s.images.endpoint}
            options["cache_dir"] = str(s.cache)
        # litdata has no option for an S3 server without TLS.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # type: ignore[typeddict-unknown-key]
        rows = StreamingDataset(
            s.images.place("litdata"), shuffle=True, seed=s.seed, drop_last=True, **options
        )
        self.loader = StreamingDataLoader(
            rows, batch_size=s.per_rank, num_workers=s.workers, collate_fn=as_batch
        )
        if state is not None:
            self.loader.load_state_dict(state)
        yield from self.loader

    def state(self) -> Any:
        """As `Reader.state`."""
        return self.loader.state_dict()


class Energon(Reader):
    """`megatron-energon`, with an index of its own beside webdataset tars."""

    form = "tar"

    def batches(self, state: Any = None) -> Iterator[Batch]:
        """As `Reader.batches`."""
        from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

        s = self.settings
        place = s.images.place("tar").replace(f"s3://{BUCKET}", "msc://local")
        rows = get_train_dataset(
            place,
            worker_config=WorkerConfig(
                rank=s.rank, world_size=s.world, num_workers=s.workers, seed_offset=s.seed
            ),
            batch_size=s.per_rank,
            shuffle_buffer_size=s.buffer,
            max_samples_per_sequence=100,
            repeat=False,
            task_encoder=_energon_encoder(),
        )
        self.loader = get_savable_loader(rows)
        if state is not None:
            self.loader.restore_state_rank(state)
        yield from self.loader

    def state(self) -> Any:
        """As `Reader.state`."""
        return self.loader.save_state_rank()

    @staticmethod
    def change_ranks(states: list[bytes], world: int) -> list[bytes]:
        """Redistribute the states with energon's own program."""
        import torch

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for rank, state in enumerate(states):
                torch.save(pickle.loads(state), folder / f"state{rank}.pt")
            files = [str(path) for path in sorted(folder.glob("*.pt"))]
            program = [str(Path(sys.executable).parent / "energon"), "checkpoint", "redist"]
            options = ["--new-world-size", str(world), *files, str(folder / "out")]
            (folder / "out").mkdir()
            done = subprocess.run([*program, *options], capture_output=True, text=True)
            written = sorted((folder / "out").glob("*.pt"))
            if done.returncode or len(written) != world:
                raise RuntimeError(
                    f"energon checkpoint redist: {(done.stdout + done.stderr)[-150:]}"
                )
            # Its states hold objects of its own; its program has just written these files.
            return [pickle.dumps(torch.load(path, weights_only=False)) for path in written]


class Mezzotint(Reader):
    """The library's order and cache; `datasets` in streaming mode parses each shard."""

    form, resume = "parquet", "count"

    def batches(self, state: Any = None) -> Iterator[Batch]:
        """As `Reader.batches`."""
        import numpy as np

        from mezzotint.core.object_store import StoredFile, stat_file
        from mezzotint.data.shard_cache import ShardCache
        from mezzotint.data.shard_order import ShardOrder, choose_lanes

        s = self.settings
        names = s.images.files("parquet")
        files = [stat_file(name) or StoredFile(name, 0, "") for name in names]
        self.lanes, self.seen = state or (choose_lanes(s.batch, len(files), s.world), 0)
        order = ShardOrder(np.array(s.images.counts), s.batch, self.lanes, s.buffer, s.seed)
        steps = range(self.seen // s.batch, -(-len(order) // s.batch))
        rows = _Steps(order, ShardCache(s.cache, 1 << 40), files, s)
        loader = DataLoader(rows, batch_size=None, sampler=steps, num_workers=s.workers)
        for batch in loader:
            self.seen += s.batch
            yield batch

    def state(self) -> Any:
        """As `Reader.state`."""
        return self.lanes, self.seen


@dataclass
class _Steps:
    """A rank's batches by their step."""

    order: Any
    cache: Any
    files: list[Any]
    settings: Settings

    def __getitem__(self, step: int) -> Batch:
        s = self.settings
        start = step * s.batch + s.rank * s.per_rank
        count = max(0, min(s.per_rank, len(self.order) - start))
        rows = []
        starts = self.order.starts.tolist()
        for image in self.order.indices(start, count).tolist():
            shard = bisect.bisect_right(starts, image) - 1
            rows.append(self._open(shard)[image - starts[shard]])
        return as_batch(rows)

    def _open(self, shard: int) -> Any:
        self.opened = getattr(self, "opened", {})
        if shard not in self.opened:
            self.opened[shard] = self.cache.open(self.files[shard], "parquet")
        return self.opened[shard]


def _energon_encoder() -> Any:
    """Return a task encoder that keeps a row's number, class and size."""
    from megatron.energon import Cooker, DefaultTaskEncoder, Sample, basic_sample_keys, stateless

    @dataclass
    class Row(Sample):
        row: tuple[int, int, int]

    @stateless
    def cook(sample: dict[str, Any]) -> Row:
        row = (int(sample["__key__"].split("/")[-1]), int(sample["cls"]), len(sample["jpg"]))
        return Row(**basic_sample_keys(sample), row=row)

    class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
        decoder = None
        cookers: ClassVar[list[Any]] = [Cooker(cook)]

        @stateless
        def batch(self, samples: list[Any]) -> Batch:
            return [sample.row for sample in samples]

        @stateless
        def encode_batch(self, batch: Batch) -> Batch:
            return batch

    return Encoder()


LIBRARIES: dict[str, type[Reader]] = {
    "mezzotint": Mezzotint,
    "datasets": Datasets,
    "webdataset": WebDataset,
    "litdata": LitData,
    "megatron-energon": Energon,
}
