"""Images per second of core that `prepare --shards` writes, and what a lost process costs.

    OMP_NUM_THREADS=1 python benchmarks/shards.py --source eurosat64.zip \\
        --out benchmarks/results/shards-cpu.json

The source is written as shards to a folder and to an S3 server on this machine (rclone), in every
form. Rates are processor time of all threads of the process that writes, decoding and hashing
included; the server's is left out. Then torchrun writes the test split with 1, 2 and 3 processes.
In a fourth run of 3 processes, one is killed (SIGKILL) after its first shard, and all are started
again. The files of the four runs must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from common import RESULTS, one_thread, write
from mezzotint.core.object_store import list_files, read_bytes
from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepare_shards import resolve_address, write_shards
from mezzotint.data.prepared_forms import FORMS, get_form
from mezzotint.data.shard_writer import ShardPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.s3_server import running_server

CARDS = 2  # files beside the shards


def measure_form(source: str, size: int, shards: int, form: str, address: str) -> dict[str, Any]:
    """Write the shards once, in this process; return rates and bytes."""
    images = open_images(source, size=size, keep_in_memory=False)
    plan = ShardPlan(images, shards, get_form(form))
    wall, used = time.perf_counter(), time.process_time()
    card = write_shards(plan, address)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    assert card is not None
    return {
        "form": form,
        "to": address.partition("://")[0],
        "images": card.count,
        "images_per_core_s": round(card.count / used, 1),
        "wall_s": round(wall, 1),
        "bytes_per_image": round(sum(s.bytes for s in card.shards) / card.count, 1),
    }


def hash_files(address: str) -> dict[str, str]:
    """Return the SHA-256 of every file of an address, by name."""
    return {
        file.address.rpartition("/")[2]: hashlib.sha256(read_bytes(file.address)).hexdigest()
        for file in list_files(address)
    }


def torchrun(processes: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start `mezzotint ARGUMENTS` in processes of this machine, without restarts."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, "-m", "mezzotint", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_one_and_restart(address: str, arguments: list[str], shards: int) -> dict[str, Any]:
    """Kill the last of three processes once a shard of its is there; start all again."""
    first = torchrun(3, arguments)
    while f"{address}/shard-00002.parquet" not in {f.address for f in list_here(address)}:
        time.sleep(0.05)
    for process in psutil.Process(first.pid).children(recursive=True):
        if process.environ().get("RANK") == "2":
            process.send_signal(signal.SIGKILL)
    code = first.wait()  # torchrun ends the others
    left = len(list_here(address))
    assert code
    assert left < shards
    second = torchrun(3, arguments)
    assert second.wait() == 0
    return {"shards_left": left, "shards": shards}


def list_here(address: str) -> list[Any]:
    """Return the files that are there by now."""
    return list_files(address, allow_empty=True)


def measure_processes(source: str, size: int, shards: int) -> list[dict[str, Any]]:
    """Write the raw shards with 1, 2 and 3 processes, then with 3 and kill one of them."""
    rows, expected = [], None
    options = ["--size", str(size), "--shards", str(shards)]
    for processes, is_killed in ((1, False), (2, False), (3, False), (3, True)):
        address = f"s3://bucket/by-{processes}-{'killed' if is_killed else 'whole'}"
        arguments = ["prepare", source, address, *options]
        began, facts = time.perf_counter(), {}
        if is_killed:
            facts = kill_one_and_restart(address, arguments, shards)
        else:
            assert torchrun(processes, arguments).wait() == 0
        found = hash_files(address)
        expected = expected or found
        assert len(found) == shards + CARDS
        rows.append(
            {
                "processes": processes,
                "killed": is_killed,
                "wall_s": round(time.perf_counter() - began, 1),
                "same_bytes": found == expected,
                **facts,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "shards-cpu.json")
    args = parser.parse_args()
    one_thread()
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    rows = []
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "s3"):
        for form in FORMS:
            for base in (resolve_address(f"{folder}/out"), "s3://bucket"):
                address = f"{base}/{form}"
                rows.append(measure_form(args.source, args.size, args.shards, form, address))
                print(rows[-1], flush=True)
        facts = {
            "clock": "processor time of all threads of the writer; wall where so named",
            "source": Path(args.source).name,
            "size": args.size,
            "shards": args.shards,
        }
        write(args.out, "cpu", **facts, forms=rows)
        processes = measure_processes(f"{args.source}:test", args.size, args.shards)
        write(args.out, "cpu", **facts, forms=rows, processes=processes)


if __name__ == "__main__":
    main()
