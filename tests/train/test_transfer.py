"""Batches are made on a stream of their own, and the step waits on its stream, not on the host."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count, islice
from unittest import mock

import pytest
import torch

from helpers.runs import small
from mezzotint.data.autoencoder import Codec
from mezzotint.data.image_dataset import open_images
from mezzotint.data.latent_dataset import EncodedDataset
from mezzotint.process.denoiser import Cond
from mezzotint.train.dataset import check_encoded_ahead
from mezzotint.train.step import Batch, prefetch
from mezzotint.train.transfer import SideStream, send_to

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Recorder:
    """Stands for torch.cuda: writes down what is asked of its streams, in order."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.active: list[str] = []

    def Stream(self, device):
        assert device == GPU
        return RecordedStream(self, "side")

    def current_stream(self, device):
        assert device == GPU
        return RecordedStream(self, "step")

    @contextmanager
    def stream(self, stream):
        self.active.append(stream.name)
        yield
        self.active.pop()


class RecordedStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def record_event(self):
        event = ("event", sum(call[0] == "record" for call in self.cuda.calls))
        self.cuda.calls.append(("record", self.name, event))
        return event

    def wait_event(self, event):
        self.cuda.calls.append(("wait", self.name, event))


class RecordedBatch:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number
        assert cuda.active == ["side"]  # it is made on the side stream

    def tensors(self):
        return [self]

    def record_stream(self, stream):
        self.cuda.calls.append(("own", stream.name, self.number))


def test_each_batch_is_waited_for_on_the_device_before_it_is_used():
    cuda = Recorder()
    batches = prefetch(
        iter(count()), lambda n: RecordedBatch(cuda, n), SideStream(GPU, cuda), ahead=1
    )
    for batch in islice(batches, 3):
        number = batch.number
        # The last calls are this batch's: its event, waited for and owned by the step's stream.
        assert cuda.calls[-2:] == [("wait", "step", ("event", number)), ("own", "step", number)]
        assert ("record", "side", ("event", number)) in cuda.calls[:-2]
    assert [b.number for b in islice(batches, 3)] == [3, 4, 5]
    batches.close()


def test_nothing_is_asked_of_a_gpu_on_a_cpu():
    class Never:
        def __getattr__(self, name):
            raise AssertionError(name)

    side = SideStream(CPU, Never())
    made = iter(prefetch(iter(count()), lambda n: batch_of(n), side))
    assert [b.image_numbers for b in islice(made, 3)] == [[0], [1], [2]]


def batch_of(n: int) -> Batch:
    x = torch.full((1, 1, 2, 2), float(n))
    cond = Cond(label=torch.tensor([n]), text_mask=torch.ones(1, 1, dtype=torch.bool))
    return Batch(x, x + 1, x[:, 0, 0, 0].double(), cond, [n])


def test_the_tensors_of_a_batch_are_all_of_them():
    batch = batch_of(4)
    assert batch.cond.label is not None
    assert batch.cond.text_mask is not None
    expected = [batch.x, batch.eps, batch.u, batch.cond.label, batch.cond.text_mask]
    assert [id(t) for t in batch.tensors()] == [id(t) for t in expected]


def test_sending_to_the_cpu_copies_nothing():
    x = torch.ones(3)
    assert send_to(x, CPU) is x


def test_latents_encoded_at_every_read_are_refused_on_a_gpu():
    recipe = small()
    images = open_images("digits", size=64)
    check_encoded_ahead(recipe, images, GPU)
    codec = mock.Mock(Codec, factor=8, channels=4, hash="x")
    codec.name = "taesd"
    encoded = EncodedDataset(images, codec, mirror=False)
    check_encoded_ahead(recipe, encoded, CPU)
    words = "mezzotint prepare digits FOLDER --size 64 --codec taesd, then --data FOLDER"
    with pytest.raises(ValueError, match=words):
        check_encoded_ahead(recipe, encoded, GPU)
