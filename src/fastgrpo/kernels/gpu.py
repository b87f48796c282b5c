"""Whether there are GPU kernels: they are written in Triton, which comes with PyTorch's CUDA builds.

Triton's interpreter (TRITON_INTERPRET=1) runs the same kernels in Python on CPU tensors; tests do that.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from fastgrpo.kernels.build import KERNELS_ENV

_LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CANDIDATES = 16  # below a node of a draft, that are ranked in one pass; each is a round of its own


@functools.cache
def is_available() -> bool:
    """Whether Triton is installed and kernels are not switched off."""
    return os.environ.get(KERNELS_ENV) != "off" and importlib.util.find_spec("triton") is not None


def runs_on(values: Tensor) -> bool:
    """Whether kernels run where these values are."""
    return values.device.type == "cuda" and find_obstacle() is None


@functools.cache
def find_obstacle() -> str | None:
    """Why a GPU must do with PyTorch's operators; None where it need not."""
    if not is_available():
        return "Triton, in which the GPU kernels are written, is not installed or switched off"
    if torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is too old for the GPU kernels, it has no bfloat16"
    return None
