"""What stands idle while a rollout ends: cores of the machine, and this process while others still decode."""

from __future__ import annotations

import os
import time

import psutil
import torch
import torch.distributed as dist

_WINDOW_S = 0.1  # the system counts in hundredths of a second
_KEY = "fastgrpo/done"  # what all processes have done, counted
_ENOUGH = 0.75  # of the cores that PyTorch's threads would take: the system itself takes something too


class IdleCores:
    """Cores that nobody uses, this process and all others considered, from now on."""

    def __init__(self) -> None:
        self._since, self._idle_s = time.perf_counter(), _read_idle_s()

    @property
    def suffice(self) -> bool | None:
        """Whether as many stood idle as PyTorch has threads; None while too little time has passed to say."""
        elapsed_s = time.perf_counter() - self._since
        if elapsed_s < _WINDOW_S:
            return None
        num_idle = min((_read_idle_s() - self._idle_s) / elapsed_s, _count_own_cores())
        return num_idle >= _ENOUGH * torch.get_num_threads()


class OtherProcesses:
    """Whether other processes of the run are still at what this one has done: asked without waiting for them.

    Each builds one whenever it has done its part of what all do, before they meet again.
    """

    _num_done = 0  # by this process

    def __init__(self) -> None:
        OtherProcesses._num_done += 1
        self._num_processes = dist.get_world_size() if dist.is_initialized() else 1
        if self._num_processes > 1:
            self._all_done = self._num_processes * OtherProcesses._num_done
            self._store = dist.distributed_c10d._get_default_store()  # a collective would have to keep its turn
            self._store.add(_KEY, 1)

    def are_busy(self) -> bool:
        return self._num_processes > 1 and self._store.add(_KEY, 0) < self._all_done


def look_for_cores(others: OtherProcesses) -> bool:
    """Whether enough cores stand idle while the others are busy; looks on for a tenth of a second."""
    cores = IdleCores()
    while others.are_busy():
        if (suffice := cores.suffice) is not None:
            return suffice
        time.sleep(_WINDOW_S / 5)
    return False


def _read_idle_s() -> float:
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))


def _count_own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
