"""Pictures while they are made: the sampler runs in a thread, the page takes the newest preview whenever it can.

One computation at a time, whoever asks: a second would halve the speed of both and double the memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from mezzotint.data.transforms import to_uint8
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.sample import count_network_calls, integrate, make_logsnr_steps

T = TypeVar("T")
PREVIEW_SECONDS = 0.25  # between two previews at least
BUSY = threading.Lock()


class Stopped(Exception):
    """The visitor left, cancelled or used up the time; raised inside the sampler's thread to end it."""


@dataclass(frozen=True)
class Update:
    """A look at pictures in the making: uint8 (b, c, h, w), the network call of so many, and its log-SNR."""

    images: Tensor
    call: int
    calls: int
    logsnr: float


class UpdateChannel:
    """Given to the work, which calls it after every network call; draws a frame only when one is due."""

    def __init__(self, seconds: float):
        self.stop = threading.Event()
        self.box: queue.Queue[Any] = queue.Queue(maxsize=1)
        self.seconds = seconds
        self.deadline = float("inf")
        self.last = 0.0

    def __call__(self, frame: Callable[[], Any]) -> None:
        """Show what `frame` draws if nothing was shown lately; raises `Stopped` if there is nobody to show it to."""
        now = time.monotonic()
        if self.stop.is_set():
            raise Stopped
        if now > self.deadline:
            raise TimeoutError(
                f"this took longer than {self.seconds:g} s and was stopped; ask for less"
            )
        if now - self.last >= PREVIEW_SECONDS and self.box.empty():
            self.last = now
            self.box.put(frame())

    def finish(self, answer: Answer) -> None:
        """Hand over the last word, unless nobody waits for it."""
        while not self.stop.is_set():
            try:
                return self.box.put(answer, timeout=0.2)
            except queue.Full:
                continue


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What the work returned, or the error that ended it."""

    value: T | None = None
    error: BaseException | None = None


def stream(work: Callable[[UpdateChannel], T], seconds: float) -> Generator[Any, None, T]:
    """Run work(show) in a thread; yield what it shows, return what it returns, raise what it raises.

    Closing the generator, as cancelling and leaving the page do, ends the work at its next network call.
    """
    show = UpdateChannel(seconds)

    def run() -> None:
        while not BUSY.acquire(timeout=0.2):
            if show.stop.is_set():
                return
        try:
            show.deadline = time.monotonic() + seconds
            with torch.no_grad():
                answer = Answer(value=work(show))
        except Stopped:
            return
        except BaseException as error:  # whatever a model does, it is told to the one who asked
            answer = Answer(error=error)
        finally:
            BUSY.release()
        show.finish(answer)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not isinstance(found := show.box.get(), Answer):
            yield found
    finally:
        show.stop.set()
    if found.error is not None:
        raise found.error
    return cast(T, found.value)


def sample_stream(
    job: SamplingJob, z: Image, numbers: list[int], show: Callable[[Callable[[], Update]], None]
) -> Tensor:
    """Sample from the state z, one row per seed in `numbers`, showing x-hat; uint8 (b, c, h, w)."""
    _ = (
        job.decoder
    )  # an autoencoder that does not fit or cannot be read is told now and not after the last step
    # Both passes of guidance are one call.
    calls = count_network_calls(job.model, replace(job.settings, guidance=None))
    done = 0

    def around(denoise: Denoiser) -> Denoiser:
        def watched(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
            nonlocal done
            guess = denoise(z, logsnr, cond)
            done += 1
            show(lambda: Update(preview(job, guess.x), done, calls, float(logsnr[0])))
            return guess

        return watched

    made = integrate(
        job.model,
        z,
        make_logsnr_steps(job.model, job.settings),
        numbers,
        job.cond(numbers),
        job.settings,
        None,
        around,
    )
    if not made.isfinite().all():
        raise FloatingPointError(
            "the model's answer is not a finite number; other steps or another sampler may help"
        )
    return job.decode(made)


def preview(job: SamplingJob, x: Tensor) -> Tensor:
    """x-hat as uint8; of latents the first three channels, since decoding each step would take longer than the step."""
    if job.codec == "pixels":
        return to_uint8(x.float()).cpu()
    return to_uint8(x[:, :3].float() / 3).cpu()
