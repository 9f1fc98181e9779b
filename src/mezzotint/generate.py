"""Seeds to images: image i is a function of its own seed, label and settings, whatever it is batched with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mezzotint import draws
from mezzotint.models import schedule_of
from mezzotint.process import guidance as guide
from mezzotint.process import samplers
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Level, Model
from mezzotint.process.samplers import grids
from mezzotint.registry import checked_options
