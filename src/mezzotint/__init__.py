"""mezzotint: high-resolution image diffusion backbones, trained, sampled and evaluated.

Public names load lazily, so that `import mezzotint` and `mezzotint --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "Cond": "mezzotint.process.denoiser",
    "Denoised": "mezzotint.process.denoiser",
    "Model": "mezzotint.process.denoiser",
    "ModelInfo": "mezzotint.models",
    "presets": "mezzotint.models",
    "create_model": "mezzotint.models",
    "save_model": "mezzotint.models",
    "load_model": "mezzotint.models",
    "load_official": "mezzotint.convert.official.load",
    "sample": "mezzotint.sampling.sample",
}
# Written out, since type checkers only read a plain list.
__all__ = [
    "Cond",
    "Denoised",
    "Model",
    "ModelInfo",
    "__version__",
    "create_model",
    "load_model",
    "load_official",
    "presets",
    "sample",
    "save_model",
]

if TYPE_CHECKING:
    from mezzotint.convert.official.load import load_official
    from mezzotint.models import ModelInfo, create_model, load_model, presets, save_model
    from mezzotint.process.denoiser import Cond, Denoised, Model
    from mezzotint.sampling.sample import sample


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    # `mezzotint.process.logsnr` and the like work after a plain `import mezzotint`.
    try:
        return importlib.import_module(f"mezzotint.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"mezzotint.{name}":
            raise
    raise AttributeError(
        f"module 'mezzotint' has no attribute {name!r}; public names: {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
