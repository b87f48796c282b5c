"""Copies of numbers between the host and a device, without needless waits.

A device works on while the host prepares what comes next; they wait for each other only where the host reads. A step of
the engine reads once, in `download`, all that it needs to know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers of the host as a tensor on the device, without waiting for the device's work."""
    own = torch.from_numpy(np.array(values, dtype=np.int64))  # a third of what torch.tensor takes
    if dtype != torch.int64:
        own = own.to(dtype)
    return send(own, device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host copied to a device, without waiting for the device's work."""
    return values if device.type == "cpu" else stage(values, device).to(device, non_blocking=True)


def stage(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host in pinned memory where the device is a GPU: copying from there waits for nothing."""
    return values.pin_memory() if device.type == "cuda" else values


def copy_to(table: Tensor, values: np.ndarray) -> None:
    """Copy numbers of the host into a tensor of the same shape, without waiting for the device's work."""
    table.copy_(stage(torch.from_numpy(values), table.device), non_blocking=True)


def pack(*values: Tensor) -> Int[Tensor, " X"]:
    """All values in one int64 tensor, one after the other: integers as they are, floats as the bits of float64."""
    words = [value.double().view(torch.int64) if value.is_floating_point() else value.long() for value in values]
    return torch.cat([word.flatten() for word in words])


def download(*values: Tensor, packed: Int[Tensor, " X"] | None = None) -> list[np.ndarray]:
    """Tensors of one device as arrays on the host, in one read: integers as int64, floats as float64.

    On the host they are views, in the types they have.

    Args:
        packed: `pack(*values)`, if it was computed already.
    """
    if packed is None and is_host(values[0]):
        return [value.numpy() for value in values]
    parts = (pack(*values) if packed is None else packed).cpu().split([value.numel() for value in values])
    return [
        (part.view(torch.float64) if value.is_floating_point() else part).view(value.shape).numpy()
        for part, value in zip(parts, values, strict=True)
    ]


def is_host(values: Tensor) -> bool:
    """Whether the tensor is on the host, where reading it waits for nothing."""
    return values.device.type == "cpu"
