"""Memory for laid-out weights that outlives a rollout."""

from __future__ import annotations

import torch
from torch import Tensor


class KeptMemory:
    """The host's memory for what is laid out again and again: new pages take longer than what is written to them.

    Whoever lays out anew asks for the same sizes in the same order, and gets the same memory; what does not follow that
    order gets new memory. Copies begin without any.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._num_taken = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def begin(self) -> None:
        """All that was taken is free again."""
        self._num_taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory with whatever stands in it, until the next `begin`."""
        number, self._num_taken = self._num_taken, self._num_taken + 1
        found = self._tensors[number] if number < len(self._tensors) else None
        if found is None or (found.shape, found.dtype) != (shape, dtype):
            found = torch.empty(shape, dtype=dtype, device="cpu")
            self._tensors[number:] = [found]
        return found

    def __reduce__(self) -> tuple[type[KeptMemory], tuple[()]]:
        return KeptMemory, ()
