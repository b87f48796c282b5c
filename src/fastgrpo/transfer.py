"""Numbers on their way between the host and a device, without a wait that is not needed.

A device works on while the host prepares what comes next; it waits only where the host reads. A step of the engine
reads once, in `download`, whatever it needs to know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of integers the host has, which waits for nothing that the device still does."""
    own = torch.from_numpy(np.array(values, dtype=np.int64))  # a third of what torch.tensor takes
    if dtype != torch.int64:
        own = own.to(dtype)
    return send(own, device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device, which waits for nothing either."""
    return values if device.type == "cpu" else stage(values, device).to(device, non_blocking=True)


def stage(values: Tensor, device: torch.device) -> Tensor:
    """A copy of numbers of the host from where a device takes them without a wait."""
    return values.pin_memory() if device.type == "cuda" else values


def copy_to(table: Tensor, values: np.ndarray) -> None:
    """Numbers of the host into a tensor of as many, without a wait."""
    table.copy_(stage(torch.from_numpy(values), table.device), non_blocking=True)


def pack(*values: Tensor) -> Int[Tensor, " X"]:
    """Integers, and the bits of numbers as float64, one behind the other."""
    words = [value.double().view(torch.int64) if value.is_floating_point() else value.long() for value in values]
    return torch.cat([word.flatten() for word in words])


def download(*values: Tensor, packed: Int[Tensor, " X"] | None = None) -> list[np.ndarray]:
    """Integers as int64 and numbers as float64, all from one device in one read.

    Args:
        packed: what `pack` gives of the values, where that is there already.
    """
    if packed is None and is_host(values[0]):
        return [value.numpy() for value in values]
    parts = (pack(*values) if packed is None else packed).cpu().split([value.numel() for value in values])
    return [
        (part.view(torch.float64) if value.is_floating_point() else part).view(value.shape).numpy()
        for part, value in zip(parts, values, strict=True)
    ]


def is_host(values: Tensor) -> bool:
    """Whether reading these costs no wait."""
    return values.device.type == "cpu"
