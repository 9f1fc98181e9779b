"""Export a model: its denoiser to torch.export or ONNX, its folder to a diffusers pipeline.

The exported denoiser is (z, logsnr, label) -> (x, eps). It has a third output `var` where the
variance is learned, and no `label` where there are no classes. Parameterisation and noise embedding
are inside: to sample with it you need `process.samplers` and nothing else of this library, or a
dozen lines in any language. The batch is free; height, width and dtype are fixed.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mezzotint.backbones import native_size
from mezzotint.core.files import (
    atomic_open,
    atomic_write,
    check_new_or_empty,
    check_replaceable,
    is_special,
    write_json,
)
from mezzotint.core.tensor_files import list_names
from mezzotint.models import open_model, save_model
from mezzotint.process.denoiser import Cond, Image, Model, PerImage

CARD_BYTES = 16 << 20  # of the config.json in an exported file, labels included
OPSET = 20  # of ONNX: the newest that onnxruntime 1.20 runs everywhere

# The pipeline's code stays in the library: an exported folder holds two imports, easy to review.
_MODULE = "mezzotint.convert.diffusers_pipeline"
_NEEDS = '"""Needs `pip install mezzotint`."""'
PIPELINE = f"{_NEEDS}\n\nfrom {_MODULE} import MezzotintPipeline  # noqa: F401\n"
NETWORK = f"{_NEEDS}\n\nfrom {_MODULE} import Network  # noqa: F401\n"


class FlatDenoiser(nn.Module):
    """A Model with tensors in and out: (z, logsnr, label) -> (x, eps) or (x, eps, var)."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(
        self, z: Image, logsnr: PerImage, label: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Denoise; label (b,) is int64, and num_classes is the null label."""
        return tuple(t for t in self.model(z, logsnr, Cond(label=label)) if t is not None)


def tensor_names(model: Model) -> tuple[list[str], list[str]]:
    """Return the names of the exported denoiser's inputs and outputs."""
    labelled = ["label"] if model.info.config.num_classes else []
    learned = ["var"] if model.parameterisation.learned_variance else []
    return ["z", "logsnr", *labelled], ["x", "eps", *learned]


def example_inputs(
    model: Model, batch: int, size: tuple[int, int] | None = None
) -> tuple[Tensor, ...]:
    """Return inputs for it on the CPU: noise, log-SNRs from -6 to 6, classes in turn."""
    c = model.info.config
    height, width = size or native_size(c)
    z = torch.randn(batch, c.channels, height, width, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(batch) % c.num_classes,) if c.num_classes else ()
    return (z, torch.linspace(-6, 6, batch), *labels)


def trace_denoiser(
    model: Model, size: tuple[int, int] | None = None
) -> torch.export.ExportedProgram:
    """Trace the denoiser, with a free batch of 1 or more.

    Args:
        model: on the CPU, in eval mode.
        size: (height, width) of z; the native size by default.

    Errors: ValueError for a size that the network does not accept, and for a network that
    torch.export cannot trace. FloatingPointError where its outputs are not finite.
    """
    flat, inputs = FlatDenoiser(model), example_inputs(model, 2, size)
    with torch.no_grad():
        outputs = flat(*inputs)  # the network's own errors are clearer than the tracer's
    if not all(output.isfinite().all() for output in outputs):
        raise FloatingPointError("the model's outputs are not finite numbers; nothing is exported")
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in tensor_names(model)[0]}
    try:
        with torch.no_grad():
            return torch.export.export(flat, inputs, dynamic_shapes=shapes)
    # The tracer raises many kinds of errors; to the user all mean the same.
    except Exception as error:
        raise ValueError(_describe_failure(model, "torch.export", error)) from error


def _describe_failure(model: Model, tool: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    return (
        f"{tool} cannot take the backbone {model.info.backbone}: {first} "
        "(--to diffusers works for every model, since it runs this library)"
    )


def save_torch(model: Model, path: Path, size: tuple[int, int] | None = None) -> float:
    """Write the denoiser as a torch.export archive (.pt2); return its `max_relative_difference`.

    The archive is read back and run on another batch. `torch.export.load(path).module()` needs no
    mezzotint. The archive holds the model's config.json.
    """
    check_replaceable(path, _is_torch_export, "an export")
    traced = trace_denoiser(model, size)
    card = json.dumps(model.info.to_json())
    # Seekable, unlike a pipe that `path` may name.
    with tempfile.TemporaryFile() as archive:
        torch.export.save(traced, archive, extra_files={"config.json": card})
        archive.seek(0)
        back = torch.export.load(archive).module()
        archive.seek(0)
        with atomic_open(path) as file:
            shutil.copyfileobj(archive, file)
    return max_relative_difference(model, back, size)


def _is_torch_export(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("extra/config.json")]
        return any(archive.getinfo(name).file_size < CARD_BYTES for name in names) and any(
            b'"mezzotint"' in archive.read(name) for name in names
        )


def _is_onnx_export(path: Path) -> bool:
    with path.open("rb") as file:
        # ONNX begins with its version. The metadata are at the end: a key and a value, each after
        # its length.
        begins = file.read(1) == b"\x08"
        file.seek(max(0, path.stat().st_size - CARD_BYTES))
        return begins and b"\x0a\x09mezzotint\x12" in file.read()


def max_relative_difference(
    model: Model, other: Callable[..., Sequence[Tensor]], size: tuple[int, int] | None = None
) -> float:
    """Return the largest difference of any output from the model's, relative to that output.

    On a batch of three at log-SNRs -6, 0 and 6, relative to the output's largest value: at -6 x is
    twenty times the network's output, and so is its rounding.
    """
    inputs = example_inputs(model, 3, size)
    with torch.no_grad():
        ours, theirs = FlatDenoiser(model)(*inputs), other(*inputs)
    return max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def save_onnx(model: Model, path: Path, size: tuple[int, int] | None = None) -> float:
    """Write the denoiser as an ONNX graph of opset 20; return its `max_relative_difference`.

    The file is read back and run by onnxruntime on another batch. Networks above 2 GB keep their
    weights in PATH.data. The graph's metadata hold the model's config.json under "mezzotint".

    Errors: ValueError without `pip install mezzotint[export]`, and for operations that ONNX lacks.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install mezzotint[export]") from None
    if path.suffix.lower() not in (".onnx", "") and not is_special(path):
        raise ValueError(f"{path} does not end in .onnx, which onnxruntime needs; give FILE.onnx")
    data = path.with_name(f"{path.name}.data")
    check_replaceable(path, _is_onnx_export, "an export")
    check_replaceable(data, lambda _: path.exists(), "the weights of an export")
    inputs, outputs = tensor_names(model)
    traced = trace_denoiser(model, size)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        # It warns of packages that are not installed and not used.
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # torch's warning about torch's own pytree.
            warnings.simplefilter("ignore", FutureWarning)
            graph = torch.onnx.export(
                traced,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=_float64_translations(),
            )
    except Exception as error:
        raise ValueError(_describe_failure(model, "ONNX", error)) from error
    finally:
        logger.setLevel(level)
    assert graph is not None, "a program was given"
    graph.model.metadata_props["mezzotint"] = json.dumps(model.info.to_json())

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: t.numpy() for name, t in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(a) for a in session.run(None, arrays)]

    # In a folder, not under a temporary name: a graph above 2 GB contains its second file's name.
    with tempfile.TemporaryDirectory(dir=None if is_special(path) else path.parent) as folder:
        written = Path(folder) / path.name
        graph.save(written)
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        difference = max_relative_difference(model, run, size)
        for file, target in ((written.with_name(data.name), data), (written, path)):
            if file.exists():
                with file.open("rb") as content, atomic_open(target) as copy:
                    shutil.copyfileobj(content, copy)
    return difference


def _float64_translations() -> dict[Any, Any]:
    """Return ONNX forms of two operations of the noise coordinate that runtimes lack in float64."""
    from onnxscript import opset20

    op: Any = opset20  # its type hints know neither symbolic values nor lists of axes

    def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        # softplus(x) = max(x, 0) - log sigmoid(|x|), without overflow and so without a threshold
        return op.Sub(op.Relu(x), op.Log(op.Sigmoid(op.Abs(x))))

    def searchsorted(entries: Any, values: Any) -> Any:
        # the number of entries below each value
        below = op.Less(entries, op.Unsqueeze(values, [-1]))
        return op.ReduceSum(op.Cast(below, to=7), [-1], keepdims=0)

    return {
        torch.ops.aten.softplus.default: softplus,
        torch.ops.aten.searchsorted.Tensor: searchsorted,
    }


def save_diffusers(model: Model, folder: Path) -> None:
    """Write a folder that `diffusers.DiffusionPipeline.from_pretrained` loads as a pipeline.

    Its user passes trust_remote_code=True.
    network/ is the model as `save_model` writes it. model_index.json and two files of one import
    each name `mezzotint.convert.diffusers_pipeline`, so mezzotint must be installed to load it.

    Errors: ValueError without `pip install mezzotint[latent]`, and for another pipeline's folder.
        FloatingPointError for weights that are not finite.
    """
    try:
        from diffusers import __version__ as version
    except ImportError:
        raise ValueError(
            "a diffusers pipeline needs diffusers: pip install mezzotint[latent]"
        ) from None
    index = folder / "model_index.json"
    if index.exists() and "MezzotintPipeline" not in index.read_text(encoding="utf-8"):
        raise ValueError(f"{folder} holds another pipeline; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a pipeline is a folder")
    if not index.exists():
        check_new_or_empty(folder, "pipeline's")
    bad = [n for n, t in model.backbone.state_dict().items() if not t.isfinite().all()]
    if bad:
        raise FloatingPointError(f"weights that are not finite: {list_names(bad)}; not exported")
    save_model(model, folder / "network")
    values = {
        "_class_name": ["pipeline", "MezzotintPipeline"],
        "_diffusers_version": version,
        "network": ["network", "Network"],
    }
    atomic_write(folder / "pipeline.py", PIPELINE)
    atomic_write(folder / "network" / "network.py", NETWORK)
    write_json(index, values)


def export_model(
    source: str | Path,
    out: Path,
    to: Literal["diffusers", "torch", "onnx"],
    size: int | None = None,
) -> list[str]:
    """Export the model of a run, a folder or a hub repository; return lines that say what was done.

    Errors: ValueError for a size with `diffusers`, whose pipeline takes it when called; and see the
    three functions.
    """
    model = open_model(source).cpu()
    if to == "diffusers":
        if size is not None:
            raise ValueError(
                "a diffusers pipeline takes its size when it is called; leave --size out"
            )
        save_diffusers(model, out)
        return [
            f"{out}: diffusers.DiffusionPipeline.from_pretrained({str(out)!r}, "
            "trust_remote_code=True)"
        ]
    save = save_torch if to == "torch" else save_onnx
    out.parent.mkdir(parents=True, exist_ok=True)
    difference = save(model, out, None if size is None else (size, size))
    inputs, outputs = tensor_names(model)
    return [
        f"{out}: ({', '.join(inputs)}) -> ({', '.join(outputs)})",
        f"largest difference, relative to each output's largest value: {difference:.2g}",
    ]
