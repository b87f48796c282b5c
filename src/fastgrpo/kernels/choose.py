"""Which kernels stand between a layer's matrix products where a weight is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgrpo.kernels import cpu, gpu


def find_kernels(weight: Tensor) -> Any:
    """The module of kernels for where a weight is, `cpu` or `gpu_decoder`; None without one."""
    if gpu.runs_on(weight):
        from fastgrpo.kernels import gpu_decoder  # in Triton, which is imported only where it runs

        return gpu_decoder
    return cpu if weight.device.type == "cpu" and cpu.is_available() else None
