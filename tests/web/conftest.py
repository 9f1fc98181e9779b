"""A studio in a process of its own, and Debian's Chromium in front of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import mezzotint as mz

CHROMIUM = Path("/usr/bin/chromium")
SHOTS = os.environ.get("MEZZOTINT_SCREENSHOTS")  # a folder to keep screenshots in


def tiny(folder: Path, seed: int) -> None:
    """A unet-tiny of 16 pixels with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = mz.create_model("unet-tiny", size=16, width=8, emb=32, num_classes=3)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    mz.save_model(model, folder)


class Training:
    """A real run in the background, stopped and continued by signals so that it takes no time from other tests."""

    def __init__(self, folder: Path):
        words = [
            "train",
            "unet-tiny",
            "images=4000000",
            "batch=32",
            "log_every_images=320",
            "model.size=16",
            "model.width=8",
        ]
        command = [sys.executable, "-m", "mezzotint.cli", *words, "--data", "shapes:16", "--out", str(folder)]
        self.folder = folder
        said = folder.with_suffix(".txt")
        with said.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        wait_for(lambda: (folder / "log.jsonl").exists() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, said.read_text()
        self.pause()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
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
    """`mezzotint serve` with a model, a model whose weights are not numbers, and a run."""

    def __init__(self, folder: Path, training: Training):
        tiny(folder / "good", 0)
        tiny(folder / "other", 1)
        tiny(folder / "broken", 2)
        broken = mz.load_model(folder / "broken")
        torch.nn.init.constant_(next(broken.parameters()), float("nan"))
        mz.save_model(broken, folder / "broken")
        self.model = folder / "good"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sources = [str(folder / name) for name in ("good", "other", "broken")] + [str(training.folder)]
        command = [sys.executable, "-m", "mezzotint.cli", "serve", *sources, "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self.said = folder / "server.txt"
        with self.said.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.said.read_text()
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
        pytest.skip(f"{CHROMIUM} is absent; install Debian's chromium to test the page in a real browser")
    pytest.importorskip("gradio", reason="gradio is absent; pip install mezzotint[web]")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is absent; pip install playwright")
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
    running = Server(tmp_path_factory.mktemp("models"), training)
    yield running
    running.end()


@pytest.fixture
def visit(browser, server):
    """Opens the page for a new visitor; afterwards, no request may have gone elsewhere and no script have failed."""
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
    hosts = {urlsplit(url).hostname for url in requests if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}
    assert not errors


@pytest.fixture
def shot():
    """Keeps a screenshot where MEZZOTINT_SCREENSHOTS says."""

    def take(page, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)

    return take
