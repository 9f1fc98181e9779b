"""Counts of GPU kernels on fake tensors: bytes, FLOP, dtype, and the line of the code they serve.

`benchmarks/step_model.py` says what is modelled and how its environment is made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# One H200, as measured on such cards: copies reach 4.3 TB/s and products 790 TFLOP/s; whole steps
# come to about nine tenths of that.
BYTES_PER_SECOND = 3.9e12
FLOP_PER_SECOND = {2: 680e12, 4: 45e12}  # by bytes of an element; float32 without TF32


@dataclass
class Kernel:
    """Kernels of one kind that serve one line: their number and sums.

    milliseconds: the greater of its bytes' time and its FLOP's time, kernel by kernel.
    arithmetic: the part of `milliseconds` that the FLOP alone need.
    """

    count: int = 0
    bytes: float = 0.0
    flop: float = 0.0
    milliseconds: float = 0.0
    arithmetic: float = 0.0

    def add(self, nbytes: float, flop: float = 0.0, rate: float = 1.0) -> None:
        """Add one kernel that runs `flop` at `rate` per second."""
        self.count += 1
        self.bytes += nbytes
        self.flop += flop
        arithmetic = 1e3 * flop / rate
        self.arithmetic += arithmetic
        self.milliseconds += max(1e3 * nbytes / BYTES_PER_SECOND, arithmetic)


def tensor_bytes(t: Tensor) -> int:
    """Return the bytes that a kernel reads or writes of a tensor; expanded axes count once."""
    sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return prod(map(int, sizes)) * t.element_size()


def kind_of(name: str) -> str:
    """Return the kind of an ATen operation, for the table."""
    for kind, pattern in {
        "attention": "attention",
        "product": r"(^|\.|_)(mm|addmm|bmm|baddbmm|addbmm)$",
        "convolution": "convolution|depthwise",
        "update": "_foreach|adam",
        "norm": "norm|softmax",
        "cast": "_to_copy",
        "copy": "clone|copy|cat|stack|pad|slice_backward|select_backward|index|embedding|gather",
        "reduction": "sum|mean|var|amax|any|all|argmax",
    }.items():
        if re.search(pattern, name):
            return kind
    return "elementwise"


def operation_kernels(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Iterator[tuple[str, float, float, float, str]]:
    """Yield (name, bytes, FLOP, FLOP per second, dtype) of each kernel of one ATen operation.

    Views and allocations have none. Everything else is one kernel that reads its tensor arguments
    once and writes its results once, but for convolutions: their gradients are kernels of their
    own, and in 16 bits cuDNN first brings a map that is not channels-last into its layout, and the
    result back (two more kernels).
    """
    name = func._schema.name.removeprefix("aten::")
    read, written = _read_and_written(func, args, kwargs, out)
    if not written or re.match(r"(new_)?empty|_unsafe_view|lift_fresh|_reshape_alias|alias", name):
        return
    widest = max(written, key=tensor_bytes)
    dtype, size = str(widest.dtype).removeprefix("torch."), min(4, widest.element_size())
    packet = func._overloadpacket
    if packet is aten.convolution_backward:
        yield from _convolution_gradients(args, out, dtype)
        return
    total = sum(map(tensor_bytes, read)) + sum(map(tensor_bytes, written))
    flop = rate = 0.0
    if packet in flop_registry:
        flop = flop_registry[packet](*args, **kwargs, out_val=out)
        rate = FLOP_PER_SECOND[max(2, size)]
    if packet is aten.convolution:
        flop, rate = convolution_flop(args[0], args[1], out, args[-1], size)
        if _needs_layout(args[0], args[-1], size):
            yield "convolution layout", 2.0 * tensor_bytes(args[0]), 0.0, 1.0, dtype
            yield "convolution layout", 2.0 * tensor_bytes(out), 0.0, 1.0, dtype
    yield name, total, flop, rate or 1.0, dtype


def _read_and_written(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[list[Tensor], list[Tensor]]:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    mutated: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            mutated += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    if not mutated:
        # A result in the storage of an argument is a view.
        storages = {t.untyped_storage()._cdata for t in given}
        return given, [t for t in made if t.untyped_storage()._cdata not in storages]
    overwritten = re.search(r"::(copy|zero|fill|normal|uniform)_$", func._schema.name)
    unread = {id(t) for t in mutated} if overwritten or "out" in kwargs else set()
    return [t for t in given if id(t) not in unread], mutated


def convolution_flop(
    x: Tensor, weight: Tensor, out: Tensor, groups: int, size: int
) -> tuple[float, float]:
    """Return the FLOP of a convolution and their rate; a depthwise one counts its bytes alone."""
    if groups > 1:
        return 0.0, 1.0
    return 2.0 * out.numel() * weight[0].numel(), FLOP_PER_SECOND[max(2, size)]


def _needs_layout(x: Tensor, groups: int, size: int) -> bool:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1
    return groups == 1 and size == 2 and not channels_last


def _convolution_gradients(
    args: tuple[Any, ...], out: Any, dtype: str
) -> Iterator[tuple[str, float, float, float, str]]:
    grad, x, weight = args[:3]
    groups, mask = args[-2], args[-1]
    size = min(4, grad.element_size())
    flop, rate = convolution_flop(x, weight, grad, groups, size)
    if _needs_layout(x, groups, size):
        for t in (grad, x, *([x] if mask[0] else [])):
            yield "convolution layout", 2.0 * tensor_bytes(t), 0.0, 1.0, dtype
    for wanted, name, other, result in zip(
        mask, ("input", "weight", "bias"), (weight, x, None), out, strict=True
    ):
        if wanted:
            total = sum(tensor_bytes(t) for t in (grad, other, result) if t is not None)
            is_product = name != "bias"
            yield f"convolution_backward {name}", total, flop * is_product, rate, dtype


SOURCE = re.compile(r'File "[^"]*/(mezzotint/[^"]+)", line (\d+)')


def source_line() -> str:
    """Return file:line of the innermost frame within the library, or "" where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/mezzotint/" in path:
            return f"{path.rsplit('/mezzotint/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@dataclass
class Counts:
    """All kernels of a step: (operation, file:line, dtype) -> their sums; attention by backend."""

    kernels: dict[tuple[str, str, str], Kernel] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)

    def add(
        self, name: str, where: str, dtype: str, nbytes: float, flop: float, rate: float
    ) -> None:
        """Add one kernel."""
        self.kernels.setdefault((name, where, dtype), Kernel()).add(nbytes, flop, rate)

    def add_attention(self, kernel: str) -> None:
        """Count a call of fused attention."""
        self.attention[kernel] = self.attention.get(kernel, 0) + 1

    def grouped(
        self, key: Callable[[str, str, str], tuple[str, ...]]
    ) -> dict[tuple[str, ...], Kernel]:
        """Return the sums by key(operation, file:line, dtype)."""
        groups: dict[tuple[str, ...], Kernel] = {}
        for name, kernel in self.kernels.items():
            into = groups.setdefault(key(*name), Kernel())
            for f in fields(Kernel):
                setattr(into, f.name, getattr(into, f.name) + getattr(kernel, f.name))
        return groups

    def total(self, attribute: str) -> float:
        """Return the sum of an attribute of `Kernel`."""
        return sum(getattr(kernel, attribute) for kernel in self.kernels.values())


class CountingMode(TorchDispatchMode):
    """Count the kernels of every operation within the block; within `paused()` none."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts, self.active = counts, True
        self.lines: dict[int, str] = {}  # of the forward operation, by its autograd node's number
        self.backward_of: int | None = None
        self.phase = ""  # replaces the line where set

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile run within the block."""
        return True

    def visit(self, number: int | None) -> None:
        """Take the following kernels for those of this node of the backward pass."""
        if number is not None:  # sums of gradients belong to the node before them
            self.backward_of = number

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def where(self) -> str:
        """Return the line of the forward pass that the current operation serves."""
        if self.phase:
            return self.phase
        if self.backward_of is not None:
            return "backward of " + self.lines.get(self.backward_of, "the loss")
        # Autograd has made the node of this operation just before.
        line = source_line()
        self.lines[torch.autograd._get_sequence_nr() - 1] = line
        return line

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.active:
            where = self.where()
            for name, nbytes, flop, rate, dtype in operation_kernels(func, args, kwargs, out):
                self.counts.add(name, where, dtype, nbytes, flop, rate)
        return out
