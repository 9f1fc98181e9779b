"""The Triton kernels of the depthwise convolution against torch in float64.

They run in Triton's interpreter and on a GPU. The import of triton decides which, so
`test_interpreted` runs this file again in another process. With a GPU the same tests also run
compiled, and at published shapes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

triton = pytest.importorskip(
    "triton", reason="the kernels for NVIDIA GPUs need triton, which is not installed"
)
from mezzotint.backbones.kernels import depthwise  # noqa: E402
from mezzotint.backbones.kernels import depthwise_triton as kernels  # noqa: E402  (needs triton)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
computes = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU: test_interpreted runs this in the interpreter",
)
# Rounding of the result alone: products and sums are float32 whatever the type.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# b, h, w, c, k, type: sides that are no multiples of the tiles (16 columns, 32 channels), sides
# smaller than the kernel, images in several strips
SHAPES = [
    (1, 4, 19, 5, 7, torch.float32),
    (1, 1, 5, 33, 7, torch.float32),
    (1, 8, 1, 2, 7, torch.bfloat16),
    (2, 2, 2, 6, 7, torch.float16),
    (1, 15, 3, 1, 7, torch.float32),
    (2, 13, 4, 40, 3, torch.bfloat16),
    (1, 3, 17, 34, 5, torch.float32),
]
PUBLISHED = [
    (64, 32, 32, 480, 7, torch.bfloat16),
    (16, 16, 16, 960, 7, torch.float32),
    (2, 128, 128, 240, 7, torch.float16),
]
shapes = pytest.mark.parametrize("shape", SHAPES if INTERPRETED else SHAPES + PUBLISHED, ids=str)


def surrounded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a tensor of NaN between NaN: reads outside it and missing writes show in results."""
    margin = 4096
    numel = torch.Size(shape).numel()
    buffer = torch.full((numel + 2 * margin,), float("nan"), dtype=dtype, device=DEVICE)
    return buffer[margin : margin + numel].view(shape), buffer


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, surrounded by NaN."""
    inner, _ = surrounded(shape, dtype)
    return inner.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    x = x.double()
    out = conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
    )
    return out.permute(0, 2, 3, 1) + (x if residual else 0)


@pytest.fixture
def buffers(monkeypatch):
    """Surround each tensor that the kernels write; the margins must stay NaN."""
    made: list[tuple[Tensor, Tensor]] = []

    def empty(*shape: int, device: object, dtype: torch.dtype = torch.float32) -> Tensor:
        made.append(surrounded(shape, dtype))
        return made[-1][0]

    monkeypatch.setattr(kernels.torch, "empty", empty)
    monkeypatch.setattr(
        kernels.torch, "empty_like", lambda x: empty(*x.shape, device=x.device, dtype=x.dtype)
    )
    yield made
    for inner, buffer in made:
        assert inner.isfinite().all(), "not every element is written"
        assert int(buffer.isnan().sum()) == buffer.numel() - inner.numel(), (
            "written outside the tensor"
        )


@computes
@pytest.mark.parametrize(("few", "biased", "residual"), [(0, False, True), (256, True, False)])
@shapes
def test_forward(shape, few, biased, residual, buffers, monkeypatch):
    monkeypatch.setattr(
        kernels, "MIN_PROGRAMS", few
    )  # with 256, as published, most of these images are cut into strips of rows
    b, h, w, c, k, dtype = shape
    x, weight, bias = (
        normal((b, h, w, c), dtype, 0),
        normal((c, 1, k, k), torch.float32, 1),
        normal((c,), dtype, 2),
    )
    out = kernels.forward(x, weight, bias if biased else None, residual)
    assert out.shape == x.shape
    assert out.dtype == dtype
    right = exact(x, weight.double(), bias.double() if biased else None, residual)
    assert distance(out, right) < TOLERANCE[dtype]
    assert len(buffers) == 1


@computes
def test_forward_takes_weights_of_the_images_type(buffers):
    x, weight = normal((1, 4, 4, 32), torch.bfloat16, 0), normal((32, 1, 3, 3), torch.bfloat16, 1)
    bias = normal((32,), torch.bfloat16, 2)
    out = kernels.forward(x, weight, bias, True)
    assert torch.equal(out, kernels.forward(x, weight.float(), bias.float(), True))
    assert distance(out, exact(x, weight.double(), bias.double(), True)) < TOLERANCE[torch.bfloat16]


def check_gradients(shape: tuple) -> None:
    b, h, w, c, k, dtype = shape
    x, grad = normal((b, h, w, c), dtype, 0), normal((b, h, w, c), dtype, 1)
    weight = torch.zeros(c, 1, k, k, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.zeros(c, dtype=torch.float64, device=DEVICE, requires_grad=True)
    theirs = torch.autograd.grad(exact(x, weight, bias, False), (weight, bias), grad.double())
    ours = kernels.weight_gradient(x, grad, k)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.shape == right.shape
        assert mine.dtype == torch.float32
        assert mine.is_contiguous()
        assert distance(mine, right) < 1e-5
    if DEVICE == "cuda":  # where programs really run in any order
        again = kernels.weight_gradient(x, grad, k)
        assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


@computes
@shapes
def test_weight_gradient(shape, buffers):
    check_gradients(shape)


@computes
def test_weight_gradient_of_several_images_per_program(buffers, monkeypatch):
    monkeypatch.setattr(kernels, "GRADIENT_PROGRAMS", 2)
    check_gradients(
        (5, 3, 2, 3, 3, torch.float32)
    )  # three images to one program and two to the other
    assert buffers[0][0].shape == (2, 10, 3)


@computes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operation_and_its_gradients(dtype):
    """What a network on a GPU runs with engine.depthwise=triton."""
    x = normal((2, 6, 5, 3), dtype, 0).requires_grad_()
    weight = normal((3, 1, 7, 7), torch.float32, 1).requires_grad_()
    bias = normal((3,), torch.float32, 2).requires_grad_()
    toward = normal((2, 6, 5, 3), dtype, 3)
    out = depthwise.residual_depthwise(x, weight, bias, "triton")
    found = [out, *torch.autograd.grad((out * toward).sum(), (x, weight, bias))]
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = exact(*wide, residual=True)
    wanted = [expected, *torch.autograd.grad((expected * toward.double()).sum(), wide)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours.detach(), theirs.detach()) < 4 * TOLERANCE[dtype]


@computes
def test_operations_are_sound():
    """Shapes, autograd and the compiler's view, by torch's own check."""
    x, weight = normal((1, 5, 4, 6), torch.float32, 0), normal((6, 1, 3, 3), torch.float32, 1)
    bias, across = normal((6,), torch.float32, 2), x.transpose(1, 2)
    for image, shift in ((x, bias), (across, None)):
        inputs = [None if t is None else t.requires_grad_() for t in (image, weight, shift)]
        torch.library.opcheck(depthwise.residual_op, tuple(inputs))
    plain = x.detach(), across.detach().contiguous().view_as(x), weight.detach()
    torch.library.opcheck(depthwise.weight_gradient_op, plain)


@pytest.mark.skipif(INTERPRETED, reason="is what runs this")
def test_interpreted():
    # Triton 3.6 converts arrays of one element to numbers: numpy warns before 2.4, then refuses.
    old = ["-W", "ignore:Conversion of an array:DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", *old, __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy < 2.4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{3 * len(SHAPES) + 5} passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels have no registers")
@pytest.mark.parametrize("name", ["_convolve", "_correlate"])
def test_registers_suffice(name, tmp_path, monkeypatch):
    """Compiled for Hopper at a published width: a spilled sum would move 49 times per element."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton comes without cuobjdump")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    constants = {"C": 480, "K": 7, "RESIDUAL": True, "COLUMNS": kernels.COLUMNS}
    constants |= {"PATCHES": kernels.PATCHES, "CHANNELS": kernels.CHANNELS}
    types = dict.fromkeys(("x", "grad", "out"), "*bf16") | dict.fromkeys(
        ("taps", "bias", "partial"), "*fp32"
    )
    arguments = kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={a: "constexpr" if a in constants else types.get(a, "i32") for a in arguments},
        constexprs={(i,): constants[a] for i, a in enumerate(arguments) if a in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if a in types},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=dict(kernels.THREADS))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True
    )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, usage
    assert (found[2], found[3]) == ("0", "0"), found[0]
