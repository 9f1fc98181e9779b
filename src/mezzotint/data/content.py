"""What a dataset holds, image by image, to tell whether two datasets are the same and what differs.

An image is known by its name, the number of its stored bytes, and their CRC-32. Paths, times and
the order of the classes do not count: a copy elsewhere, or a zip of a folder, is the same dataset.

Checksums cost a read. All images are read where they are at most READ_BYTES together, which takes
seconds; of a larger dataset, a share of that size, chosen by the hash of the name. So a million
files of 100 kB cost a look at each size and 10,000 reads; a single image of them that was replaced
by one of as many bytes may go unseen, a replaced dataset does not.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np

from mezzotint.data.dataset import Dataset
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.sharded_dataset import ShardedDataset
from mezzotint.data.sources import hash_parts
from mezzotint.data.transforms import UnreadableImage

READ_BYTES = 1 << 30
UNKNOWN_BYTES = 100_000  # of a file that a table names
# One image. name, caption: hashes; 0 for no caption. checksum: 0 where it was not read.
ROW = np.dtype(
    [("name", "<u8"), ("size", "<i8"), ("checksum", "<u4"), ("label", "<i4"), ("caption", "<u8")]
)


@dataclass(frozen=True)
class Content:
    """The images of a dataset in its order, as ROWs, and the names of its classes.

    of_shards: the rows are shards, because a list of the images may not fit.
    """

    rows: np.ndarray
    label_names: tuple[str, ...]
    of_shards: bool = False

    @cached_property
    def classes(self) -> np.ndarray:
        """The hash of each image's class name, uint64 (n,); 0 for an image without a label."""
        hashes = np.array([*map(_hash, self.label_names), 0], np.uint64)
        return hashes[self.rows["label"]]  # NO_LABEL is the last entry

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that is known of the images, of their order, and of their class names."""
        columns = [self.rows[name].tobytes() for name in ("name", "size", "checksum", "caption")]
        return hash_parts([*columns, self.classes.tobytes()])

    @property
    def unlabelled(self) -> int:
        """The number of images without a label."""
        return int((self.rows["label"] == NO_LABEL).sum())


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_content(dataset: Dataset, *, captions: bool) -> Content:
    """Return what a dataset holds.

    Args:
        captions: whether captions count, for a network that reads text.
    """
    names, sizes = dataset.inventory()
    if isinstance(dataset, ShardedDataset):
        return _read_shards(dataset, names, sizes)
    rows = np.zeros(len(names), ROW)
    rows["name"] = [_hash(name) for name in names]
    rows["size"] = sizes
    labels = (dataset.label(i) for i in range(len(names)))
    rows["label"] = [NO_LABEL if label is None else label for label in labels]
    if captions:
        texts = (dataset.text(i) for i in range(len(names)))
        rows["caption"] = [0 if text is None else _hash(text) for text in texts]
    expected = np.where(sizes < 0, UNKNOWN_BYTES, sizes)
    share = READ_BYTES / max(1, int(expected.sum()))
    chosen = np.flatnonzero(rows["name"] <= share * 2.0**64)

    def checksum(i: int) -> int:
        try:
            return max(1, dataset.checksum(i))
        except (UnreadableImage, OSError):
            return 0

    parts = [chosen[i : i + 64].tolist() for i in range(0, len(chosen), 64)]
    with ThreadPoolExecutor(16) as pool:  # network disks answer many readers at once
        found = pool.map(lambda part: [checksum(i) for i in part], parts)
        rows["checksum"][chosen] = list(chain.from_iterable(found))
    return Content(rows, dataset.label_names or ())


def _read_shards(dataset: ShardedDataset, names: list[str], sizes: np.ndarray) -> Content:
    """Return the content of shards; no image is looked at."""
    rows = np.zeros(len(names), ROW)
    rows["name"] = [_hash(name) for name in names]
    rows["size"], rows["label"] = sizes, NO_LABEL
    rows["checksum"] = [dataset.checksum(k) for k in range(len(names))]
    return Content(rows, dataset.label_names or (), of_shards=True)


@dataclass(frozen=True)
class Changes:
    """How one dataset differs from another.

    relabelled: images whose class has another name, beyond renamed classes. recaptioned: images
    with another caption. renamed_classes: old name -> new name, where most images of the one are
    those of the other. new_classes, gone_classes: other names that only one of the two has.
    """

    added: int = 0
    removed: int = 0
    replaced: int = 0
    relabelled: int = 0
    recaptioned: int = 0
    renamed_classes: dict[str, str] = field(default_factory=dict)
    new_classes: tuple[str, ...] = ()
    gone_classes: tuple[str, ...] = ()
    unit: str = "image"

    def __bool__(self) -> bool:
        return any(value for name, value in vars(self).items() if name != "unit")

    def __str__(self) -> str:
        words = ("added", "removed", "replaced", "relabelled", "recaptioned")
        counts = {word: getattr(self, word) for word in words}
        parts = [
            f"{n:,} {self.unit}{'s' if n > 1 else ''} {word}" for word, n in counts.items() if n
        ]
        parts += [f"class {old} renamed {new}" for old, new in self.renamed_classes.items()]
        parts += [_list_classes("new", self.new_classes), _list_classes("gone", self.gone_classes)]
        return ", ".join(filter(None, parts))


def _list_classes(word: str, names: tuple[str, ...]) -> str:
    shown = f"{', '.join(names[:5])}{' ...' if names[5:] else ''}"
    return f"{word} class{'es' if len(names) > 1 else ''} {shown}" if names else ""


def compare(old: Content, new: Content) -> Changes:
    """Return how `new` differs from `old`; nothing where they differ in order or file names only.

    Images are the same where name, size and checksum are, or where another name has the same size
    and checksum. A checksum that was not read does not count.
    """
    a, b = old.rows, new.rows
    _, i, j = np.intersect1d(a["name"], b["name"], return_indices=True)
    read = (a["checksum"][i] > 0) & (b["checksum"][j] > 0)
    same = (a["size"][i] == b["size"][j]) & (~read | (a["checksum"][i] == b["checksum"][j]))
    rest_a, rest_b = np.ones(len(a), bool), np.ones(len(b), bool)
    rest_a[i[same]] = rest_b[j[same]] = False
    moved = _pair_by_content(a, np.flatnonzero(rest_a), b, np.flatnonzero(rest_b))
    rest_a[moved[:, 0]] = rest_b[moved[:, 1]] = False
    replaced = int((rest_a[i] & rest_b[j]).sum())
    pairs = np.concatenate([np.stack([i[same], j[same]], 1), moved])

    renamed = _find_renamed_classes(old, new, pairs)
    expected = old.classes.copy()
    for before, after in renamed.items():
        expected[old.classes == _hash(before)] = _hash(after)
    captions = a["caption"][pairs[:, 0]] != b["caption"][pairs[:, 1]]
    used = {old.label_names[k] for k in np.unique(a["label"]) if k != NO_LABEL}
    known = {*old.label_names, *renamed.values()}
    gone = used - {*new.label_names, *renamed}
    return Changes(
        added=int(rest_b.sum()) - replaced,
        removed=int(rest_a.sum()) - replaced,
        replaced=replaced,
        relabelled=int((expected[pairs[:, 0]] != new.classes[pairs[:, 1]]).sum()),
        recaptioned=int(captions.sum()),
        renamed_classes=renamed,
        new_classes=tuple(name for name in new.label_names if name not in known),
        gone_classes=tuple(name for name in old.label_names if name in gone),
        unit="shard" if new.of_shards else "image",
    )


def _pair_by_content(
    a: np.ndarray, rest_a: np.ndarray, b: np.ndarray, rest_b: np.ndarray
) -> np.ndarray:
    """Return index pairs, (n, 2), of those rows of `a` and `b` that have equal checksums."""
    found = defaultdict[tuple[int, int], list[int]](list)
    for j in reversed(rest_b.tolist()):
        found[int(b["size"][j]), int(b["checksum"][j])].append(j)
    pairs = []
    for i in rest_a.tolist():
        size, checksum = int(a["size"][i]), int(a["checksum"][i])
        if checksum and found[size, checksum]:
            pairs.append((i, found[size, checksum].pop()))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _find_renamed_classes(old: Content, new: Content, pairs: np.ndarray) -> dict[str, str]:
    """Return old name -> new name of the classes that have another name and mostly the same images.

    Args:
        pairs: indices of the images that both have, (n, 2).
    """
    labels = zip(old.rows["label"][pairs[:, 0]], new.rows["label"][pairs[:, 1]], strict=True)
    both = Counter((int(i), int(j)) for i, j in labels if NO_LABEL not in (i, j))
    of_old, of_new = Counter[int](), Counter[int]()
    for (i, j), n in both.items():
        of_old[i] += n
        of_new[j] += n
    names = ((old.label_names[i], new.label_names[j], i, j) for i, j in both)
    return {
        before: after
        for before, after, i, j in names
        if before not in new.label_names
        and after not in old.label_names
        and 2 * both[i, j] > max(of_old[i], of_new[j])
    }
