"""What is idle while a rollout ends: cores of the machine, and this process while others still decode."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import torch.distributed as dist

_WINDOW_S = 0.1  # the system counts in hundredths of a second
_ENOUGH = 0.75  # share of a core that must be idle for each thread: the system itself takes some
_KEY = "fastgrpo/done"  # what all processes have done, counted
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container (cgroup version 2)


class IdleCores:
    """Counts the cores that were idle since it was built, and that this process may use."""

    def __init__(self) -> None:
        self._since, self._idle_s, self._own_s = time.perf_counter(), _read_idle_s(), time.process_time()

    @property
    def suffice(self) -> bool | None:
        """Whether a core, or most of it, was idle for each of PyTorch's threads; None where it is too early to say."""
        elapsed_s = time.perf_counter() - self._since
        if elapsed_s < _WINDOW_S:
            return None
        idle = (_read_idle_s() - self._idle_s) / elapsed_s
        left = _count_own_cores() - (time.process_time() - self._own_s) / elapsed_s
        return min(idle, left) >= _ENOUGH * torch.get_num_threads()


class OthersWork:
    """Counts what other processes on the machine take, from now on."""

    def __init__(self) -> None:
        self._since, self._busy_s, self._own_s = time.perf_counter(), _read_busy_s(), time.process_time()

    def count_cores_taken(self) -> float:
        """Mean number of cores that others took from PyTorch's threads so far; 0 where each thread had most of one."""
        busy_s = _read_busy_s() - self._busy_s - (time.process_time() - self._own_s)
        cores = busy_s / max(time.perf_counter() - self._since, _WINDOW_S)
        num_threads = torch.get_num_threads()
        taken = cores - max(_count_own_cores() - num_threads, 0.0)
        return taken if taken > (1 - _ENOUGH) * num_threads else 0.0


class OtherProcesses:
    """Tells, without waiting, whether other processes of the run have still to finish what this one has finished.

    Every process builds one each time that it has done its part of common work, before they meet again.
    """

    _known: ClassVar[Any] = None  # the store of this run
    _num_done: ClassVar[int] = 0  # by this process, since there is that store

    def __init__(self) -> None:
        self._num_processes = dist.get_world_size() if dist.is_initialized() else 1
        if self._num_processes == 1:
            return
        self._store = dist.distributed_c10d._get_default_store()  # a collective would have to keep its turn
        own = type(self)
        own._num_done = own._num_done + 1 if self._store is own._known else 1
        own._known = self._store
        self._all_done = self._num_processes * own._num_done
        self._store.add(_KEY, 1)

    def are_busy(self) -> bool:
        return self._num_processes > 1 and self._store.add(_KEY, 0) < self._all_done


def look_for_cores(others: OtherProcesses) -> bool:
    """Whether enough cores are idle while the others are busy; watches for a tenth of a second."""
    cores = IdleCores()
    while others.are_busy():
        if (suffice := cores.suffice) is not None:
            return suffice
        time.sleep(_WINDOW_S / 5)
    return False


def _read_idle_s() -> float:
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))


def _read_busy_s() -> float:
    """With what runs at a low priority, as this process may itself, and what the host of a virtual machine keeps."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "steal", 0.0))


def _count_own_cores() -> float:
    """Cores that this process may use."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(float, _QUOTA.read_text().split())
    except (OSError, ValueError):  # no such file, or no limit: `max`
        return num_cores
    return min(num_cores, quota / period)
