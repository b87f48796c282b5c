"""Whether there are GPU kernels: they are written in Triton, which comes with PyTorch's CUDA builds.

Triton's interpreter (TRITON_INTERPRET=1) runs the same kernels in Python on CPU tensors; tests do that.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo.kernels.build import KERNELS_ENV

_LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GIVEN_UP: list[str] = []  # why the kernels are not used any more
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
    return _GIVEN_UP[0] if _GIVEN_UP else None


def give_up(error: Exception) -> None:
    """From now on PyTorch's operators take the kernels' place in this process: what failed once would fail again."""
    _GIVEN_UP.append(f"a GPU kernel failed: {describe_failure(error)}")
    find_obstacle.cache_clear()


def comes_from_kernels(error: Exception) -> bool:
    """Whether Triton raised an error, or what it calls: it compiles and loads a kernel at its first launch."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    modules += [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.split(".")[0] == "triton" for name in modules)


def describe_failure(error: BaseException) -> str:
    """An error in one line: Triton puts the source of a kernel before what is wrong with it, and wraps errors."""
    while getattr(error, "error_message", "") is None and error.__cause__ is not None:
        error = error.__cause__
    text = (getattr(error, "error_message", None) or str(error)).strip()
    return text.splitlines()[0] if text else repr(error)


class _Absence:
    """Keeps cuDNN's attention off while any thread holds this: PyTorch has one switch for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._was_there = True

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        with self._lock:
            if not self._num_inside:
                self._was_there = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if not self._num_inside:
                    torch.backends.cuda.enable_cudnn_sdp(self._was_there)


_ABSENCE = _Absence()


def without_cudnn_attention() -> contextlib.AbstractContextManager[None]:
    """PyTorch's attention by its other kernels, which take any shape as it comes.

    On a Hopper GPU PyTorch prefers cuDNN's, which plans each new shape for 0.08 s, and for as long again for its
    gradient (H100, PyTorch 2.11); lengths of completions come in ever new ones.
    """
    return _ABSENCE.hold()
