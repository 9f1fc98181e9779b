"""Signals that stop training: finish the step, save, exit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mezzotint.core.distributed import restarts_ranks

# torchrun passes on a signal that the terminal has sent to every process already.
TORCHRUN_REPEATS_SECONDS = 3.0
# Until the torchrun of this machine has heard of a machine that joins, and stops its ranks too.
TORCHRUN_FOLLOWS_SECONDS = 5.0
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class StopSignal:
    """Set by SIGINT, SIGTERM, SIGHUP or SIGUSR1: finish the step, save, exit.

    A second signal exits at once with 128 + its number. A signal that is ignored when training
    starts, as `nohup` does with SIGHUP, stays ignored.

    requested: whether a signal has come.
    interrupting: let SIGINT raise KeyboardInterrupt, where there is nothing to save.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.requested = self.interrupting = False

    def exit_status(self) -> int:
        """Return the exit status of a rank that has saved since it, or another, got a signal.

        It is 0, but under a torchrun that restarts ranks `TRY_AGAIN` for a rank that got none
        itself: a machine leaves, and the ranks of the others are to start again without it. With 0
        their torchrun would call the run finished.
        """
        if not restarts_ranks():
            return 0
        until = time.monotonic() + TORCHRUN_FOLLOWS_SECONDS
        while not self.requested and time.monotonic() < until:
            time.sleep(0.05)
        return 0 if self.requested else TRY_AGAIN

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within the block; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Handlers wait for the main thread, which may be in a long call of torch. A byte for each
        # signal goes through this pipe at once.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        watcher.start()
        previous_end = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        caught = [n for n in self.signals if signal.getsignal(n) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)
            signal.set_wakeup_fd(previous_end)
            os.close(write_end)
            watcher.join()
            os.close(read_end)

    def _handle(self, number: int, frame: Any) -> None:
        """Run in the main thread, between two steps of the interpreter."""
        self.requested = True
        if self.interrupting and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch(self, read_end: int) -> None:
        """Read signal numbers until the pipe is closed."""
        first = None
        grace = TORCHRUN_REPEATS_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        while numbers := os.read(read_end, 1):
            if numbers[0] not in self.signals:
                continue
            self.requested = True
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= grace:
                os._exit(128 + numbers[0])  # without waiting for threads; the next start cleans up
