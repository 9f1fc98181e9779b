"""A studio in a process of its own, and Debian's Chromium in front of it."""

from __future__ import annotations

import dataclasses
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
from helpers.tiny_t5 import saved_t5
from mezzotint.data.text_encoder import open_text_encoder

CHROMIUM = Path("/usr/bin/chromium")
SHOTS = Path(
    os.environ.get("MEZZOTINT_SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots")
)


def tiny(folder: Path, seed: int) -> None:
    """A unet-tiny of 16 pixels with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = mz.create_model("unet-tiny", size=16, width=8, emb_dim=32, num_classes=3)
    moved_off_its_start(model)
    mz.save_model(model, folder)


def moved_off_its_start(model) -> None:
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def reading(folder: Path, t5: Path, name: str) -> None:
    """A uvit-text-tiny of 16 pixels whose card says that it was trained with that encoder."""
    torch.manual_seed(0)
    small = {
        "size": 16,
        "width": 8,
        "emb_dim": 16,
        "multipliers": (1, 2),
        "blocks": (1,),
        "depth": 1,
        "heads": 2,
    }
    model = mz.create_model("uvit-text-tiny", **small, text_dim=16)
    moved_off_its_start(model)
    kept = {"encoder": name, "encoder_hash": open_text_encoder(str(t5)).hash, "max_tokens": 16}
    model.info = dataclasses.replace(model.info, extra={"text": kept})
    mz.save_model(model, folder)


def looked_into(folder: Path) -> None:
    """A DiMR and a DiffiT, whose insides the page shows."""
    for name in ("dimr", "diffit"):
        torch.manual_seed(0)
        model = mz.create_model(f"{name}-tiny", num_classes=3)
        moved_off_its_start(model)
        mz.save_model(model, folder / name)


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
        command = [
            sys.executable,
            "-m",
            "mezzotint",
            *words,
            "--data",
            "shapes:16",
            "--out",
            str(folder),
        ]
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
    """`mezzotint serve` in a process of its own, once it answers."""

    def __init__(self, folder: Path, *words: str):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mezzotint", "serve", *words, "--port", str(port)]
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
    """Two models, one whose weights are not numbers, two that read words, one of them without its encoder; one of each
    kind that is looked into; a run."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("good", "other", "broken")):
        tiny(folder / name, seed)
    broken = mz.load_model(folder / "broken")
    torch.nn.init.constant_(next(broken.parameters()), float("nan"))
    mz.save_model(broken, folder / "broken")
    t5 = saved_t5(folder / "t5", 0)
    reading(folder / "words", t5, str(t5))
    reading(folder / "speechless", t5, "nobody/has-this-t5")
    looked_into(folder)
    names = ("good", "other", "broken", "words", "speechless", "dimr", "diffit")
    running = Server(folder, *(str(folder / name) for name in names), str(training.folder))
    yield running
    running.end()


@pytest.fixture
def guarded(browser, tmp_path):
    """A studio that asks who is there."""
    tiny(tmp_path / "good", 0)
    running = Server(tmp_path, str(tmp_path / "good"), "--auth", "rembrandt:rocker")
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
    hosts = {
        urlsplit(url).hostname for url in requests if urlsplit(url).scheme not in ("data", "blob")
    }
    assert hosts == {"127.0.0.1"}
    assert not errors


@pytest.fixture
def shot():
    """Keeps a screenshot in build/screenshots, or where MEZZOTINT_SCREENSHOTS says."""

    def take(page, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    return take
