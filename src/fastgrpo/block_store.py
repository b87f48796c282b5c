"""Storage of blocks of positions. On a CPU it costs memory as it is written, and idle blocks give it back."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.blocks import BLOCK_SIZE

_LAZY_BYTES = 2**20  # from here on the system's pages are taken as they are written


class BlockStore:
    """[layers, blocks * BLOCK_SIZE, width] of numbers, all finite from the first.

    Args:
        num_layers: independent planes that move together.
        width: numbers per position.
        dtype, device: of the storage.

    Attributes:
        position_bytes: of one position in all layers.
    """

    def __init__(self, *, num_layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(num_layers, 0, width, dtype=dtype, device=device)
        self.position_bytes = num_layers * width * dtype.itemsize
        self._pages: mmap.mmap | None = None  # behind the data

    @property
    def num_blocks(self) -> int:
        return self.data.shape[1] // BLOCK_SIZE

    @property
    def num_bytes(self) -> int:
        """Set aside; on a CPU more than is in use."""
        return self.data.numel() * self.data.element_size()

    def resize(self, num_blocks: int, num_kept: int) -> None:
        """Move the first `num_kept` blocks into room for `num_blocks`; the rest is zero.

        Zero, since a masked position still enters a product with weight zero and must not be NaN.

        Raises:
            OSError, torch.OutOfMemoryError: so much memory is not to be had; nothing has changed.
        """
        num_layers, _, width = self.data.shape
        grown, pages = _allocate((num_layers, num_blocks * BLOCK_SIZE, width), like=self.data)
        kept = num_kept * BLOCK_SIZE
        grown[:, :kept] = self.data[:, :kept]
        self.data, self._pages = grown, pages

    def flat(self, layer: int) -> Float[Tensor, "P W"]:
        """One layer, position after position."""
        return self.data[layer]

    def write(self, layer: int, index: Int[Tensor, " T"], values: Float[Tensor, "T W"]) -> None:
        self.data[layer].index_copy_(0, index, values)

    def read(self, layer: int, index: Int[Tensor, "B S"]) -> Float[Tensor, "B S W"]:
        return self.data[layer].index_select(0, index.flatten()).view(*index.shape, self.data.shape[2])

    def move_positions(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"]) -> None:
        """Copy positions to others in every layer at once; all are read before any is written."""
        self.data[:, target] = self.data[:, source]

    def copy_block(self, source: int, target: int) -> None:
        blocks = self.data.unflatten(1, (-1, BLOCK_SIZE))
        blocks[:, target] = blocks[:, source]

    def release_memory(self, runs: list[tuple[int, int]]) -> None:
        """Let the system have the memory of blocks (first, end) back; they are zero afterwards."""
        num_layers, num_positions, width = self.data.shape
        layer_bytes = BLOCK_SIZE * width * self.data.element_size()  # of a block
        if self._pages is None or layer_bytes % mmap.PAGESIZE or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for layer in range(num_layers):
            start = layer * num_positions // BLOCK_SIZE * layer_bytes
            for first, end in runs:
                self._pages.madvise(mmap.MADV_DONTNEED, start + first * layer_bytes, (end - first) * layer_bytes)

    def clear(self) -> None:
        self.data, self._pages = self.data[:, :0].clone(), None


def _allocate(shape: tuple[int, ...], *, like: Tensor) -> tuple[Tensor, mmap.mmap | None]:
    """Zeros, and the system's pages behind them where they cost memory as they are written."""
    num_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < _LAZY_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return like.new_zeros(shape), None
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # in large pages the first block of every layer would take two megabytes; a single layer is written in order
        with contextlib.suppress(OSError):  # of systems without such pages
            pages.madvise(mmap.MADV_HUGEPAGE if shape[0] == 1 else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape), pages
