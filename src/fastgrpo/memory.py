"""How much memory is available, and whether an error means that it has run out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

_NO_MEMORY = (  # words in errors of PyTorch's CPU allocator; CUDA; Triton; cuBLAS and cuDNN; C++; oneDNN
    *("DefaultCPUAllocator", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory"),
    *("ALLOC_FAILED", "bad_alloc", "create a memory object"),
)
_STAYING_SHARE = 1 / 16  # of the memory that is free
_MEMINFO, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def find_available_bytes(device: torch.device) -> int | None:
    """Memory that this process could still take on a device; None where the system does not say.

    Of the machine's own, processes that were launched together have equal shares.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    try:
        text = _MEMINFO.read_text(encoding="ascii")
    except OSError:  # such as too many open files
        return None
    lines = (line.split() for line in text.splitlines())
    available = next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)
    bounds = [each for each in (available, _find_group_bytes()) if each is not None]
    return min(bounds) // _count_processes() if bounds else None


def may_stay(num_bytes: int, device: torch.device) -> bool:
    """Whether so much is little beside what is free on a device: it may be held between rollouts, as they train."""
    available = find_available_bytes(device)
    return available is not None and num_bytes <= _STAYING_SHARE * available


def _count_processes() -> int:
    """Processes of this launch on this machine, as torchrun and accelerate tell each of them."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(told), 1) if told.isdecimal() else 1


def _find_group_bytes() -> int | None:
    """Bytes that a container's limit (cgroup version 2) leaves; None without one. Cached files count as free."""
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        files = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such files, or no limit: `max`
        return None
    return max(limit - used + int(files.get("inactive_file", 0)) + int(files.get("active_file", 0)), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch's CPU allocator and libraries below it have no exception type for this."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def describe_error(error: BaseException) -> str:
    """An error's message; its type where it has none, such as Python's own `MemoryError`."""
    return str(error) or type(error).__name__


def describe_bytes(num_bytes: float) -> str:
    """Bytes for a person to read: 3.2 GiB, 410 MiB, 12 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1024:.3g} KiB"
