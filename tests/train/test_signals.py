"""Ctrl-C and the other signals: finish the step, save, say how to resume; a second one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers.evaluators import digits_reference, evaluated_recipe, random_evaluator
from helpers.runs import assert_same_run, small
from mezzotint.train import checkpoint, loop, setup
from mezzotint.train.loop import train

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def first_of(*numbers):
    """Return parameters; `make test` tries the first alone."""
    return [numbers[0], *(pytest.param(n, marks=pytest.mark.slow) for n in numbers[1:])]


def send(number):
    """Send a signal to this process, and wait until it has come."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def exits(monkeypatch):
    """The exit codes of os._exit, which ends nothing here."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return codes


def stop_and_resume(whole, folder, recipe, capsys, evaluator=None, *, at):
    """Train until a signal stops the run at so many images, then train the rest."""
    with pytest.raises(SystemExit) as ended:
        train(recipe, folder, evaluator=evaluator)
    assert ended.value.code == 0
    assert f"stopped at {at} images; run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if at:
        assert checkpoint.list_checkpoints(folder)[-1].name == str(at)
    if whole is not None:
        train(recipe, folder, quiet=True, evaluator=evaluator)
        assert_same_run(whole, folder)


@pytest.mark.parametrize("number", first_of(*SIGNALS))
def test_a_signal_in_a_step_saves_and_the_same_command_goes_on(
    whole, tmp_path, monkeypatch, capsys, number
):
    averages, sent = loop.update_averages, []

    def update(run):
        averages(run)
        if run.state.images == 64 and not sent:
            sent.append(number)
            send(number)

    monkeypatch.setattr(loop, "update_averages", update)
    stop_and_resume(whole, tmp_path / "run", small(), capsys, at=80)


@pytest.mark.parametrize("number", first_of(signal.SIGHUP, signal.SIGINT))
def test_a_signal_while_a_grid_is_drawn(whole, tmp_path, monkeypatch, capsys, number):
    draw, sent = loop.save_sample_grid, []

    def draw_and_send(*arguments):
        if not sent:
            sent.append(number)
            send(number)
        return draw(*arguments)

    monkeypatch.setattr(loop, "save_sample_grid", draw_and_send)
    stop_and_resume(whole, tmp_path / "run", small(), capsys, at=96)
    assert (tmp_path / "run" / "samples" / "000000000080.png").is_file()


@pytest.mark.parametrize("number", first_of(signal.SIGINT, signal.SIGHUP))
def test_a_signal_during_an_evaluation(tmp_path, monkeypatch, capsys, number):
    recipe = evaluated_recipe(digits_reference(tmp_path / "digits.npz"))
    make = random_evaluator(recipe)
    assert make is not None

    def evaluator(model, folder, should_stop):
        send(number)
        assert should_stop()
        return make(model, folder, should_stop)

    stop_and_resume(None, tmp_path / "run", recipe, capsys, evaluator, at=64)


@pytest.mark.parametrize("number", first_of(*SIGNALS[1:]))
def test_a_signal_during_the_start_trains_nothing(whole, tmp_path, monkeypatch, capsys, number):
    opened, sent = setup.open_recipe_dataset, []

    def open_and_send(*arguments):
        if not sent:
            sent.append(number)
            send(number)
        return opened(*arguments)

    monkeypatch.setattr(setup, "open_recipe_dataset", open_and_send)
    stop_and_resume(whole, tmp_path / "run", small(), capsys, at=0)


def test_ctrl_c_during_the_start_leaves_at_once(tmp_path, monkeypatch):
    def open_data(*arguments):
        send(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(setup, "open_recipe_dataset", open_data)
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path, quiet=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [p.name for p in tmp_path.iterdir()] == []


def test_ctrl_c_while_a_checkpoint_is_read_leaves_at_once(whole, stopped, monkeypatch):
    """Torch wraps it together with its traceback."""
    from torch.distributed.checkpoint import FileSystemReader

    read = FileSystemReader.read_data

    def slow(*arguments):
        send(signal.SIGINT)
        return read(*arguments)

    folder = stopped(96)
    monkeypatch.setattr(FileSystemReader, "read_data", slow)
    with pytest.raises(KeyboardInterrupt):
        train(small(), folder, quiet=True)
    monkeypatch.undo()
    train(small(), folder, quiet=True)
    assert_same_run(whole, folder)


def test_ctrl_c_in_the_command_line_is_one_sentence(monkeypatch, capsys):
    from mezzotint import cli

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["mezzotint", "train", "unet-tiny", "--data", "digits"])
    monkeypatch.setattr(loop, "train", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "run the same command again" in line


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_exits_at_once(exits, first, second):
    stop = loop.StopSignal()
    with stop.listening():
        send(first)
        wait_for(lambda: stop.requested)
        assert exits == []
        send(second)
        wait_for(lambda: exits)
    assert exits == [128 + second]


def test_a_second_signal_exits_though_the_main_thread_is_busy(tmp_path):
    """In one long call of torch, where Python runs no handler: here, a lock that nobody frees."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from mezzotint.train.signals import StopSignal\n"
        "with StopSignal().listening():\n"
        "    import ctypes; libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    libc.pthread_mutex_lock(mutex)\n"
        "    print('ready', flush=True)\n"
        "    libc.pthread_mutex_lock(mutex)\n"  # unlike sleep, no signal ends it
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for number in (signal.SIGTERM, signal.SIGINT):
            assert process.poll() is None
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(60) == 128 + signal.SIGINT


def test_a_signal_that_torchrun_repeats_counts_once(exits, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("mezzotint.train.signals.TORCHRUN_REPEATS_SECONDS", 1.0)
    with loop.StopSignal().listening():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        time.sleep(0.2)
        assert exits == []
        time.sleep(1)
        send(signal.SIGTERM)
        wait_for(lambda: exits)
    assert exits == [128 + signal.SIGTERM]


@pytest.mark.parametrize(
    ("restarts", "signalled", "status"),
    [("0", False, 0), ("0", True, 0), ("3", True, 0), ("3", False, 75)],
)
def test_a_rank_that_stops_for_another_is_started_again(monkeypatch, restarts, signalled, status):
    """Under a torchrun that restarts ranks; it would take 0 for the end of the run."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setattr("mezzotint.train.signals.TORCHRUN_FOLLOWS_SECONDS", 0.1)
    stop = loop.StopSignal()
    stop.requested = signalled
    assert stop.exit_status() == status


def test_a_rank_waits_for_the_signal_of_its_own_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    stop = loop.StopSignal()
    threading.Timer(0.2, setattr, (stop, "requested", True)).start()
    assert stop.exit_status() == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number):
    """As `nohup` ignores SIGHUP, and a shell SIGINT for its jobs in the background."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        stop = loop.StopSignal()
        with stop.listening():
            send(number)
            time.sleep(0.05)
            assert not stop.requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, previous)


def test_signals_are_left_alone_outside_the_main_thread():
    inside = []

    def listen():
        with loop.StopSignal().listening():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert inside == [signal.getsignal(signal.SIGTERM)]


SCRIPT = """
import torch; torch.set_num_threads(1)
from helpers.runs import small
from mezzotint.train.loop import train
train(small("data.workers={workers}", "images=100000", "save.keep=2"), {folder!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_every_process_of_a_run_with_workers_saves(tmp_path, number):
    """As a terminal and a scheduler send it; the workers leave with their parent."""
    script = SCRIPT.format(workers=2, folder=str(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "128/100,000 images" in line:
                os.killpg(process.pid, number)
                break
        _, printed = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "stopped at" in printed
    assert "Traceback" not in printed
    assert checkpoint.find_newest_intact(tmp_path / "run")[0] is not None
