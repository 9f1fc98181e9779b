"""Hashes that a folder's JSON file keeps: of its own values, and of the files beside it.

A changed bit anywhere in these files is then an error that names the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.core.files import sha256_of_file
from mezzotint.core.json_values import check_fields

HASHES = "sha256"  # the key of the JSON file


def _hash_values(values: Mapping[str, Any], files: Mapping[str, list[str]]) -> str:
    rest = {k: v for k, v in values.items() if k != HASHES}
    # Read back, since JSON knows neither tuples nor keys that are numbers.
    text = json.dumps(json.loads(json.dumps([rest, files])), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def add_hashes(values: Mapping[str, Any], files: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the values with a key for their own SHA-256, and those accepted of each file."""
    return {**values, HASHES: {"values": _hash_values(values, files), "files": dict(files)}}


def check_hashes(path: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless the JSON file at `path` and the files beside it are as saved.

    Args:
        values: of the JSON file. Without the key, from before there were hashes, all is accepted.
    """
    if HASHES not in values:
        return
    try:
        check_fields(values, {HASHES: dict})
        hashes = values[HASHES]
        check_fields(hashes, {"values": str, "files": dict[str, list[str]]})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    advice = f"Save or download it again; if you changed it, remove {HASHES!r} from {path.name}"
    if _hash_values(values, hashes["files"]) != hashes["values"]:
        raise ValueError(
            f"{path} is not the file that was saved: its values have another SHA-256. {advice}"
        )
    for name, accepted in hashes["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{path}: {name!r} is not the name of a file beside it")
        sha256 = sha256_of_file(path.parent / name)
        if sha256 not in accepted:
            known = " or ".join(f"{h[:12]}..." for h in accepted)
            raise ValueError(
                f"{path.parent / name} is not the file that was saved: its SHA-256 is "
                f"{sha256[:12]}..., {path.name} has {known}. {advice}"
            )
