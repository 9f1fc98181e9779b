"""The rehearsal of several processes: it says what is wrong, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from mezzotint.tools import rehearsal

PATIENCE = 60.0  # seconds; a busy machine is slow


@pytest.fixture
def alive(monkeypatch):
    """Return a function that lists the processes of this test, recognised by their environment."""
    mark = f"MEZZOTINT_TEST={uuid.uuid4().hex}"
    monkeypatch.setenv(*mark.split("="))

    def processes() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # ended meanwhile, or not ours; a zombie has no environment
                pass
        return [pid for pid in found if pid != os.getpid()]

    return processes


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def test_two_processes_communicate(alive):
    result = rehearsal.check_processes(timeout=200)
    assert result["passed"], result["error"]
    assert result["started"] == result["processes"] >= 2
    wait_until(lambda: not alive())


def test_a_slow_machine_is_no_firewall(alive):
    result = rehearsal.check_processes(timeout=0.01)
    assert not result["passed"]
    assert result["error"].startswith("0 of 2 had started after 0.01 s: the machine is slow")
    wait_until(lambda: not alive())


@pytest.mark.parametrize(
    ("status", "started", "printed", "words"),
    [
        (0, 2, "a warning", ""),
        (None, 0, "", "0 of 2 had started after 60 s: the machine is slow or busy"),
        (None, 1, "", "1 of 2 had started after 60 s: the machine is slow or busy"),
        (None, 2, "", "no answer within 60 s; is a firewall between the processes?"),
        (1, 2, "x\nRuntimeError: refused\ny", "RuntimeError: refused"),
        (1, 0, "", "no output"),
    ],
)
def test_what_is_said(status, started, printed, words):
    said = rehearsal.describe_failure(status, started, 2, 60.0, printed)
    assert said.startswith(words)
    assert bool(said) == bool(words)


@pytest.mark.slow
def test_ranks_that_started_and_hear_nothing(alive, monkeypatch):
    mute = rehearsal._RANK.partition("from mezzotint")[0]
    mute += "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}.started', 'w'); time.sleep(1000)"
    monkeypatch.setattr(rehearsal, "_RANK", mute)
    result = rehearsal.check_processes(timeout=60)
    assert result["started"] == 2
    assert "firewall" in result["error"]
    wait_until(lambda: not alive())


def test_the_error_of_a_rank_is_told(alive, monkeypatch):
    monkeypatch.setattr(rehearsal, "_RANK", "raise OSError('refused')")
    result = rehearsal.check_processes(timeout=200)
    assert not result["passed"]
    assert "refused" in result["error"]
    wait_until(lambda: not alive())


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_nothing_survives_the_end_of_the_doctor(alive, number):
    script = (
        "from mezzotint.tools import rehearsal\n"
        "rehearsal._RANK = rehearsal._RANK.split('from mezz')[0] + 'time.sleep(1000)'\n"
        "rehearsal.check_processes(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as doctor:
        wait_until(lambda: len(alive()) >= 4)  # the doctor, torchrun, two ranks
        doctor.send_signal(number)
    wait_until(lambda: not alive())
