"""Where tensors stand in memory: calls that were recorded read them there, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]
"""Address, shape, strides and type."""


def find_place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def find_places(tensors: Iterable[Tensor | None]) -> tuple[Place | None, ...]:
    """The places of several tensors, of which some may be absent."""
    return tuple(None if tensor is None else find_place(tensor) for tensor in tensors)
