"""Memory for copies of weights that outlives a rollout."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_HOST = torch.device("cpu")
_LARGE_PAGE = 2**21  # bytes
_LEAST_BYTES = 2**18  # of a tensor that stands in large pages; a tiny model's would take two megabytes there
_PIECE_BYTES = 2**26  # of address space, that tensors are cut from; memory is taken as it is written
_LINES = 128  # bytes, two lines of the processor's caches: a tensor begins at one


class KeptMemory:
    """Memory for what is laid out, merged or cast in each rollout anew.

    Whoever copies anew asks for the same sizes in the same order, and gets the same memory; what does not follow that
    order gets new memory. On the host new pages take longer than what is written to them; weights are read faster from
    large pages, in which they stand where the system has some. On a device, calls that were recorded find the weights
    where they were. Copies of this begin without any.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._num_taken = 0
        self._piece = torch.empty(0, dtype=torch.uint8, device="cpu")  # of large pages, what is left of it

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def begin(self) -> None:
        """All that was taken is free again."""
        self._num_taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _HOST) -> Tensor:
        """Memory with whatever stands in it, until the next `begin`."""
        number, self._num_taken = self._num_taken, self._num_taken + 1
        found = self._tensors[number] if number < len(self._tensors) else None
        if found is None or (found.shape, found.dtype, found.device) != (shape, dtype, device):
            is_host = device.type == "cpu"
            found = self._cut(shape, dtype) if is_host else torch.empty(shape, dtype=dtype, device=device)
            self._tensors[number:] = [found]
        return found

    def copy(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values in a type, in memory that `take` gives."""
        return self.take(tuple(values.shape), dtype, values.device).copy_(values)

    def _cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes >= _LEAST_BYTES and len(self._piece) < num_bytes:
            self._piece = _map_large_pages(max(num_bytes, _PIECE_BYTES))
        if not _LEAST_BYTES <= num_bytes <= len(self._piece):
            return torch.empty(shape, dtype=dtype, device="cpu")
        found, self._piece = self._piece[:num_bytes], self._piece[-(-num_bytes // _LINES) * _LINES :]
        return found.view(dtype).view(shape)

    def __reduce__(self) -> tuple[type[KeptMemory], tuple[()]]:
        return KeptMemory, ()


def _map_large_pages(num_bytes: int) -> Tensor:
    """At least so many bytes that begin with a page; none where the system has no such pages, or not so much memory."""
    num_bytes = -(-num_bytes // _LARGE_PAGE) * _LARGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        pages = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    piece = torch.frombuffer(pages, dtype=torch.uint8)
    return piece[-piece.data_ptr() % _LARGE_PAGE :][:num_bytes]
