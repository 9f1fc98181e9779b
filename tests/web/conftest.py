"""A studio in its own process, and Debian's Chromium as its browser."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import mezzotint as mz
from helpers.ports import find_port
from helpers.text_model import fill_zeros, save_text_model
from helpers.tiny_t5 import saved_t5

CHROMIUM = Path("/usr/bin/chromium")
SCREENSHOTS = Path(
    os.environ.get("MEZZOTINT_SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots")
)


def save_tiny(folder: Path, seed: int) -> None:
    """Save a unet-tiny of 16 pixels with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = mz.create_model("unet-tiny", size=16, width=8, emb_dim=32, num_classes=3)
    fill_zeros(model)
    mz.save_model(model, folder)


def save_dimr_and_diffit(folder: Path) -> None:
    """Save the models whose branches and attention the page shows."""
    for name in ("dimr", "diffit"):
        torch.manual_seed(0)
        model = mz.create_model(f"{name}-tiny", num_classes=3)
        fill_zeros(model)
        mz.save_model(model, folder / name)


class Training:
    """A real run in the background, paused by a signal while other tests run."""

    def __init__(self, folder: Path):
        arguments = [
            "train",
            "unet-tiny",
            "images=4000000",
            "batch=32",
            "log_every_images=320",
            "model.size=16",
            "model.width=8",
        ]
        command = [
            sys.executable,
            "-m",
            "mezzotint",
            *arguments,
            "--data",
            "shapes:16",
            "--out",
            str(folder),
        ]
        self.folder = folder
        output = folder.with_suffix(".txt")
        with output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        wait_for(lambda: (folder / "log.jsonl").exists() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, output.read_text()
        self.pause()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for(ready, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.1)


class Server:
    """`mezzotint serve` in its own process, once it answers."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder
        port = find_port()
        command = [sys.executable, "-m", "mezzotint", "serve", *arguments, "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "server.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(
            f"{CHROMIUM} is absent; install Debian's chromium to test the page in a real browser"
        )
    pytest.importorskip("gradio", reason="gradio is absent; pip install mezzotint[web]")
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is absent; pip install playwright"
    )
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def training(browser, tmp_path_factory):
    run = Training(tmp_path_factory.mktemp("run") / "digits")
    yield run
    run.end()


@pytest.fixture(scope="session")
def server(training, tmp_path_factory):
    """The studio of seven models and a run.

    good, other: unet-tiny. broken: its weights are not numbers. text: takes prompts.
    no-encoder: its text encoder is absent. dimr, diffit.
    """
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("good", "other", "broken")):
        save_tiny(folder / name, seed)
    broken = mz.load_model(folder / "broken")
    torch.nn.init.constant_(next(broken.parameters()), float("nan"))
    mz.save_model(broken, folder / "broken")
    t5 = saved_t5(folder / "t5", 0)
    save_text_model(folder / "text", t5, str(t5))
    save_text_model(folder / "no-encoder", t5, "nobody/has-this-t5")
    save_dimr_and_diffit(folder)
    names = ("good", "other", "broken", "text", "no-encoder", "dimr", "diffit")
    running = Server(folder, *(str(folder / name) for name in names), str(training.folder))
    yield running
    running.end()


@pytest.fixture
def guarded(browser, tmp_path, monkeypatch):
    """A studio with a password."""
    save_tiny(tmp_path / "good", 0)
    monkeypatch.setenv("MEZZOTINT_STUDIO_PASSWORD", "rocker")
    running = Server(tmp_path, str(tmp_path / "good"), "--auth", "rembrandt")
    yield running
    running.end()


@pytest.fixture
def visit(browser, server):
    """Open the page for a new visitor; check at the end that it loaded nothing from outside.

    A script error fails the test too.
    """
    contexts, requests, errors = [], [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#generate", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    hosts = {
        urlsplit(url).hostname for url in requests if urlsplit(url).scheme not in ("data", "blob")
    }
    assert hosts == {"127.0.0.1"}
    assert not errors


@pytest.fixture
def shot():
    """Save a screenshot in build/screenshots or $MEZZOTINT_SCREENSHOTS."""

    def take(page, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    return take
