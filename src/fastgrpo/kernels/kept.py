"""Memory for laid-out weights that outlives a rollout."""

from __future__ import annotations

import itertools
import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 2**21  # bytes
_LINES = 128  # bytes, two lines of the processor's caches: what is taken begins at one


class KeptMemory:
    """The host's memory for what is laid out again and again: new pages take longer than what is written to them.

    Whoever lays out anew asks for the same sizes in the same order, and gets the same memory; what does not follow that
    order gets new memory. From the second time on all of it stands in large pages, where the system has some: weights
    are read faster from them, but to get them may take longer than a single rollout wins. Copies begin without any.

    Attributes:
        is_joined: whether nothing was taken that did not stand in large pages, as far as there are some.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._num_taken = 0
        self.is_joined = True

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def begin(self) -> None:
        """All that was taken is free again."""
        self._num_taken = 0
        if not self.is_joined:
            self._tensors, self.is_joined = _join(self._tensors), True

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory with whatever stands in it, until the next `begin`."""
        number, self._num_taken = self._num_taken, self._num_taken + 1
        found = self._tensors[number] if number < len(self._tensors) else None
        if found is None or (found.shape, found.dtype) != (shape, dtype):
            found = torch.empty(shape, dtype=dtype, device="cpu")
            self._tensors[number:] = [found]
            self.is_joined = False
        return found

    def __reduce__(self) -> tuple[type[KeptMemory], tuple[()]]:
        return KeptMemory, ()


def _join(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors like these, side by side in large pages; the same ones where there are none, or hardly any to fill."""
    sizes = [-(-tensor.nbytes // _LINES) * _LINES for tensor in tensors]
    num_pages = -(-sum(sizes) // _LARGE_PAGE)
    if num_pages < 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensors
    try:
        pages = mmap.mmap(-1, (num_pages + 1) * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # so much memory, or no such pages
        return tensors
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    first = -memory.data_ptr() % _LARGE_PAGE
    places = itertools.accumulate(sizes, initial=first)
    return [
        memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, tensors, strict=False)
    ]
