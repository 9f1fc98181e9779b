"""Sampling in a thread, with a preview whenever the page is ready for one.

One computation runs at a time, for all visitors: a second would halve the speed of both and double
the memory.
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
from mezzotint.sampling.job import SamplingJob, check_decoder
from mezzotint.sampling.sample import count_network_calls, make_logsnr_steps

T = TypeVar("T")
PREVIEW_SECONDS = 0.25  # at least, between two previews
COMPUTING = threading.Lock()


class Cancelled(Exception):
    """The visitor left or pressed Stop; raised in the sampler's thread to end it."""


@dataclass(frozen=True)
class Update:
    """A preview: images as uint8 (b, c, h, w), the network call they are from, its log-SNR."""

    images: Tensor
    call: int
    num_calls: int
    logsnr: float


@dataclass(frozen=True)
class Result(Generic[T]):
    """What the work returned, or the error that ended it."""

    value: T | None = None
    error: BaseException | None = None


class UpdateChannel:
    """Carries previews from the sampler's thread to the page; call it after every network call."""

    def __init__(self, seconds: float):
        self.cancelled = threading.Event()
        self.queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self.seconds = seconds
        self.deadline = float("inf")
        self.last_update = 0.0

    def __call__(self, make_update: Callable[[], Any]) -> None:
        """Send an update if one is due. `make_update` is called only then.

        Errors: Cancelled; TimeoutError after `seconds` of computing.
        """
        now = time.monotonic()
        if self.cancelled.is_set():
            raise Cancelled
        if now > self.deadline:
            raise TimeoutError(
                f"this took longer than {self.seconds:g} s and was stopped; "
                "try fewer images or fewer steps"
            )
        if now - self.last_update >= PREVIEW_SECONDS and self.queue.empty():
            self.last_update = now
            self.queue.put(make_update())

    def finish(self, result: Result) -> None:
        """Send the result, unless the visitor has left."""
        while not self.cancelled.is_set():
            try:
                return self.queue.put(result, timeout=0.2)
            except queue.Full:
                continue


def stream(work: Callable[[UpdateChannel], T], seconds: float) -> Generator[Any, None, T]:
    """Run work(channel) in a thread; yield its updates, return its value, raise its error.

    Closing the generator ends the work at its next network call. Gradio closes it when the visitor
    presses Stop or leaves the page.
    """
    channel = UpdateChannel(seconds)

    def run() -> None:
        while not COMPUTING.acquire(timeout=0.2):
            if channel.cancelled.is_set():
                return
        try:
            channel.deadline = time.monotonic() + seconds
            with torch.no_grad():
                result = Result(value=work(channel))
        except Cancelled:
            return
        except BaseException as error:  # raised again in the visitor's own thread
            result = Result(error=error)
        finally:
            COMPUTING.release()
        channel.finish(result)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not isinstance(item := channel.queue.get(), Result):
            yield item
    finally:
        channel.cancelled.set()
    if item.error is not None:
        raise item.error
    return cast(T, item.value)


def sample_stream(
    job: SamplingJob, z: Image, seeds: list[int], send: Callable[[Callable[[], Update]], None]
) -> Tensor:
    """Sample from the state z, one row a seed, sending x-hat on the way; uint8 (b, c, h, w).

    Errors: FloatingPointError if the result is not finite; errors of the autoencoder, before the
        first step.
    """
    check_decoder(job)
    # A step's two passes of guidance are one update.
    num_calls = count_network_calls(job.model, replace(job.settings, guidance=None))
    call = 0

    def wrap(denoise: Denoiser) -> Denoiser:
        def denoise_and_send(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
            nonlocal call
            guess = denoise(z, logsnr, cond)
            call += 1
            send(lambda: Update(preview(job, guess.x), call, num_calls, float(logsnr[0])))
            return guess

        return denoise_and_send

    steps = make_logsnr_steps(job.model, job.settings)
    return job.decode(job.run_sampler(z, steps, seeds, wrap))


def preview(job: SamplingJob, x: Tensor) -> Tensor:
    """Return x-hat as uint8 (b, c, h, w) on the CPU.

    Of latents, it shows the first three channels: decoding each step would take longer than the
    step itself.
    """
    if job.codec == "pixels":
        return to_uint8(x.float()).cpu()
    return to_uint8(x[:, :3].float() / 3).cpu()
