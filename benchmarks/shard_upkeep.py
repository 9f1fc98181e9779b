"""What each library of benchmarks/shard_readers.py asks of those who depend on it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

STORES = {
    "datasets": "fsspec",
    "webdataset": "programs through pipes",
    "litdata": "boto3 and obstore",
    "megatron-energon": "multi-storage-client",
}
# Of the newest file in the wheel; energon's wheel has no dates.
RELEASED = {
    "datasets": "2026-11-09",
    "webdataset": "2025-06-19",
    "litdata": "2026-09-30",
    "megatron-energon": None,
}
NOT_RUN = {
    "mosaicml-streaming 0.13.0": "it requires torchvision, numpy below 2.2 and transformers below 5"
}


def describe_library(name: str) -> dict[str, Any]:
    """Return version, date, licence, lines of Python, packages that it brings, and its stores."""
    found = distribution(name)
    sources = [file for file in found.files or [] if file.suffix == ".py"]
    texts = [file.locate().read_text(encoding="utf-8", errors="ignore") for file in sources]
    licences = [found.metadata.get("License-Expression"), found.metadata.get("License")]
    classifiers = found.metadata.get_all("Classifier") or []
    licences += [c.split(" :: ")[-1] for c in classifiers if c.startswith("License")]
    packages = _packages(name) - {name}
    return {
        "version": found.version,
        "released": RELEASED[name],
        "licence": next((text for text in licences if text), "BSD-3-Clause, in its files"),
        "lines of Python": sum(text.count("\n") for text in texts),
        "packages": len(packages),
        "torchvision": "torchvision" in packages,
        "stores": STORES[name],
    }


def _packages(name: str) -> set[str]:
    """Return a package and those that it needs, torch with all of its own as one."""
    found, ahead = set(), [name]
    while ahead:
        name = ahead.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            needed = distribution(name).requires or []
        except PackageNotFoundError:  # for other machines
            continue
        found.add(name)
        if name != "torch":
            plain = (n for n in needed if "extra ==" not in n)
            ahead += [re.split(r"[^A-Za-z0-9._-]", n)[0] for n in plain]
    return found
