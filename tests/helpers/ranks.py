"""Run a function on several gloo ranks of this machine.

The ranks are forked from a server that has imported the library: a rank starts in a tenth of a
second, and a launch under torchrun in several.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from helpers.ports import find_port

PRELOAD = ["mezzotint.train.loop", "mezzotint.recipes", "torch.distributed.fsdp"]


def run_on_ranks(
    ranks: int,
    work: Callable[..., Any],
    *arguments: Any,
    timeout: float = 240,
    step_seconds: float | None = None,
) -> list[Any]:
    """Return work(world, *arguments) of each rank; AssertionError with the traceback of a failure.

    Args:
        work: of a module in helpers/, which the ranks can import.
        step_seconds: after which a collective of a training step gives up.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = find_port()
    results: dict[int, Any] = {}
    processes = []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run,
            args=(rank, ranks, port, step_seconds, sender, work, arguments),
            daemon=True,
        )
        process.start()
        sender.close()
        processes.append((process, receiver))
    failures = []
    for rank, (_, receiver) in enumerate(processes):
        try:
            failed, results[rank] = (
                receiver.recv() if receiver.poll(timeout) else (True, "no answer in time")
            )
        except EOFError:
            failed, results[rank] = True, "it ended without an answer"
        if failed:
            failures.append(f"rank {rank}: {results[rank]}")
    for process, receiver in processes:
        receiver.close()
        process.join(10)
        process.kill()
        process.join()
        process.close()
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(ranks)]


def _run(
    rank: int,
    ranks: int,
    port: int,
    step_seconds: float | None,
    sender: Any,
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    import torch

    from mezzotint.core import distributed

    torch.set_num_threads(1)
    if step_seconds is not None:
        distributed.STEP_TIMEOUT = timedelta(seconds=step_seconds)
    try:
        with distributed.process_group() as world:
            answer = False, work(world, *arguments)
    except BaseException:
        answer = True, traceback.format_exc()[-3000:]
    sender.send(answer)
    sender.close()
