"""A model taken elsewhere: its denoiser as a torch.export archive or an ONNX graph, its folder as a diffusers pipeline.

The exported denoiser is (z, logsnr, label) -> (x, eps), with `var` as a third output where the variance is learned and
without `label` where there are no classes. Parameterisation and noise embedding are inside, so whoever samples with it
needs `process.samplers` and nothing else of this library, or a dozen lines of any language. The batch is free; height,
width and dtype are fixed.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mezzotint.core.files import atomic_replace
from mezzotint.models import open_model, save_model
from mezzotint.process.denoiser import Cond, Image, Model, PerImage

OPSET = 20  # of ONNX: the newest that onnxruntime 1.20 runs everywhere

# The pipeline's code stays in the library: what a folder carries is two imports, so that its reader sees all it runs.
PIPELINE = '"""Needs `pip install mezzotint`."""\n\nfrom mezzotint.convert.diffusers_pipeline import MezzotintPipeline  # noqa: F401\n'
NETWORK = '"""Needs `pip install mezzotint`."""\n\nfrom mezzotint.convert.diffusers_pipeline import Network  # noqa: F401\n'


class Flat(nn.Module):
    """A Model with tensors in and out: (z, logsnr, label) -> (x, eps), or (x, eps, var) with a learned variance."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(
        self, z: Image, logsnr: PerImage, label: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """label: (b,) int64; the number of classes itself means no class."""
        return tuple(t for t in self.model(z, logsnr, Cond(label=label)) if t is not None)


def names(model: Model) -> tuple[list[str], list[str]]:
    """The exported denoiser's inputs and outputs, by name."""
    labelled = ["label"] if model.info.config.num_classes else []
    learned = ["var"] if model.parameterisation.learned_variance else []
    return ["z", "logsnr", *labelled], ["x", "eps", *learned]


def example(model: Model, batch: int, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
    """Inputs of the exported denoiser on the CPU: noise, log-SNRs from -6 to 6, classes in turn."""
    c = model.info.config
    height, width = size or (c.size, c.size)
    z = torch.randn(batch, c.channels, height, width, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(batch) % c.num_classes,) if c.num_classes else ()
    return (z, torch.linspace(-6, 6, batch), *labels)


def program(model: Model, size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """The denoiser traced whole, with a free batch of 1 or more.

    Args:
        model: on the CPU, in eval mode.
        size: (height, width) of z; the native size by default.

    Errors: ValueError for a size the network does not take, and for one that torch.export cannot trace.
    """
    flat, inputs = Flat(model), example(model, 2, size)
    with torch.no_grad():
        flat(*inputs)  # says what does not fit, in the network's own words
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in names(model)[0]}
    try:
        with torch.no_grad():
            return torch.export.export(flat, inputs, dynamic_shapes=shapes)
    except (
        Exception
    ) as error:  # the tracer raises what it likes; every kind means the same to whoever exports
        raise ValueError(_cannot(model, "torch.export", error)) from error


def _cannot(model: Model, tool: str, error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"{tool} cannot take the backbone {model.info.backbone}: {first} "
        "(--to diffusers works for every model, since it runs this library)"
    )


def save_torch(model: Model, path: Path, size: tuple[int, int] | None = None) -> float:
    """Write the denoiser as a torch.export archive (.pt2); returns the largest relative `difference` from ours.

    The archive is read back and run on another batch. `torch.export.load(path).module()` needs no mezzotint. The
    model's card lies in it as config.json.
    """
    traced = program(model, size)
    card = json.dumps(model.info.to_json())

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            torch.export.save(traced, file, extra_files={"config.json": card})

    atomic_replace(path, write)
    with path.open("rb") as file:
        back = torch.export.load(file).module()
    return difference(model, back, size)


def difference(
    model: Model, other: Callable[..., Sequence[Tensor]], size: tuple[int, int] | None = None
) -> float:
    """Largest difference of any output from ours, on a batch of three at log-SNRs -6, 0 and 6.

    In parts of that output's largest value: at -6 x is twenty times what the network gives, and so is its rounding.
    """
    inputs = example(model, 3, size)
    with torch.no_grad():
        ours, theirs = Flat(model)(*inputs), other(*inputs)
    return max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def save_onnx(model: Model, path: Path, size: tuple[int, int] | None = None) -> float:
    """Write the denoiser as an ONNX graph of opset 20; returns the largest relative `difference` from ours.

    The file is read back and run by onnxruntime on another batch. Networks above 2 GB keep their weights beside the
    graph, in PATH.data. The model's card is in the graph's metadata, under "mezzotint".

    Errors: ValueError without `pip install mezzotint[export]`, and for operations that ONNX does not have.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install mezzotint[export]") from None
    inputs, outputs = names(model)
    traced = program(model, size)
    chatter = logging.getLogger("torch.onnx")
    before = chatter.level
    try:
        chatter.setLevel(
            logging.ERROR
        )  # of operators of packages that are not installed and not used
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytree
            graph = torch.onnx.export(
                traced,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=_translations(),
            )
    except Exception as error:
        raise ValueError(_cannot(model, "ONNX", error)) from error
    finally:
        chatter.setLevel(before)
    assert graph is not None, "a program was given"
    graph.model.metadata_props["mezzotint"] = json.dumps(model.info.to_json())
    # Not written beside and renamed: a graph above 2 GB names its second file.
    graph.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> list[Tensor]:
        fed = {name: t.numpy() for name, t in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(a) for a in session.run(None, fed)]

    return difference(model, run, size)


def _translations() -> dict[Any, Any]:
    """Two operations of the noise coordinate, which is float64 here, as ONNX runtimes have them in float64."""
    from onnxscript import opset20

    op: Any = opset20  # its own types know neither symbolic values nor lists of axes

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
    """Write a folder that `diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads.

    network/ is the model as `save_model` writes it; model_index.json and two files of one import each name the
    pipeline, `mezzotint.convert.diffusers_pipeline`, which runs this library: mezzotint must be installed where it is loaded.

    Errors: ValueError without `pip install mezzotint[latent]`, and for a folder that is another pipeline's.
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
    save_model(model, folder / "network")
    values = {
        "_class_name": ["pipeline", "MezzotintPipeline"],
        "_diffusers_version": version,
        "network": ["network", "Network"],
    }
    (folder / "pipeline.py").write_text(PIPELINE, encoding="utf-8")
    (folder / "network" / "network.py").write_text(NETWORK, encoding="utf-8")
    atomic_replace(
        index,
        lambda beside: beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"),
    )


def export(
    source: str | Path,
    out: Path,
    to: Literal["diffusers", "torch", "onnx"],
    size: int | None = None,
) -> list[str]:
    """Export a run's, a folder's or a hub repository's model; returns what was done, a sentence a line.

    Errors: ValueError for a size with `diffusers`, whose pipeline takes any, and see the three functions.
    """
    model = open_model(source).cpu()
    if to == "diffusers":
        if size is not None:
            raise ValueError(
                "a diffusers pipeline takes its size when it is called; leave --size out"
            )
        save_diffusers(model, out)
        return [
            f"{out}: diffusers.DiffusionPipeline.from_pretrained({str(out)!r}, trust_remote_code=True)"
        ]
    save = save_torch if to == "torch" else save_onnx
    out.parent.mkdir(parents=True, exist_ok=True)
    apart = save(model, out, None if size is None else (size, size))
    inputs, outputs = names(model)
    return [
        f"{out}: ({', '.join(inputs)}) -> ({', '.join(outputs)})",
        f"largest difference, relative to each output's largest value: {apart:.2g}",
    ]
