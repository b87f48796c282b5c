"""Rows of per-position state: keys and values, features. Running sequences own rows 0..B-1, no holes.

A row is one sequence, a position one token. Accepted nodes are gathered to the end of their row in
one vectorised move; a finished row is filled by the last one, so that live rows stay contiguous and
are read as views. Nothing else is copied: on a CPU room for the longest sequence is set aside at once and costs
memory as it is written; elsewhere it grows with the live rows.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.transfer import is_host, upload

_BLOCK = 64  # positions are allocated in blocks of this many
_LAZY_BYTES = 2**20  # from here on the system's pages are taken as they are written


@dataclass(frozen=True, kw_only=True)
class RowPrefix:
    """The first positions of a row, kept aside for siblings that still wait."""

    parts: tuple[Float[Tensor, "_ S _"], ...]  # one for each store


class RowStore:
    """[layers, rows, positions, width] of numbers with one owner, grown on demand.

    Args:
        num_layers: independent planes that move together.
        width: numbers per position.
        dtype, device: of the storage.
    """

    def __init__(self, *, num_layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(num_layers, 0, 0, width, dtype=dtype, device=device)

    @property
    def num_rows(self) -> int:
        return self.data.shape[1]

    @property
    def capacity(self) -> int:
        """Positions each row can hold."""
        return self.data.shape[2]

    @property
    def num_bytes(self) -> int:
        """Set aside; on a CPU more than is in use."""
        return self.data.numel() * self.data.element_size()

    def resize(self, num_rows: int, capacity: int, used_rows: int, used_length: int) -> None:
        """Move the first `used_*` rows and positions into room for `num_rows` of `capacity`; the rest is zero.

        Zero, since a masked position still enters a product with weight zero and must not be NaN.

        Raises:
            OSError: the system does not promise so much memory.
        """
        kept = self.data[:, :used_rows, :used_length]
        grown = _allocate((self.data.shape[0], num_rows, capacity, self.data.shape[3]), like=self.data)
        grown[:, : kept.shape[1], : kept.shape[2]] = kept
        self.data = grown

    def flat(self, layer: int) -> Float[Tensor, "RS W"]:
        """One layer with rows and positions as one axis: index row * capacity + position."""
        return self.data[layer].view(-1, self.data.shape[3])

    def write(self, layer: int, index: Int[Tensor, " T"], values: Float[Tensor, "T W"]) -> None:
        self.flat(layer).index_copy_(0, index, values)

    def move_positions(self, source: Int[Tensor, " M"], target: Int[Tensor, " M"]) -> None:
        """Copy positions (flat indices) to others in every layer at once; all are read before any is written."""
        flat = self.data.view(self.data.shape[0], -1, self.data.shape[3])
        flat[:, target] = flat[:, source]

    def move_row(self, source: int, target: int, length: int) -> None:
        self.data[:, target, :length] = self.data[:, source, :length]

    def snapshot(self, row: int, length: int) -> Tensor:
        return self.data[:, row, :length].clone()

    def restore(self, rows: list[int], part: Tensor) -> None:
        for row in rows:
            self.data[:, row, : part.shape[1]] = part

    def clear(self) -> None:
        self.data = self.data[:, :0, :0].clone()


def reserve_rows(
    stores: list[RowStore], num_rows: int, length: int, *, used_rows: int, used_length: int, expected: int = 0
) -> None:
    """Make room in all stores, which have as many rows of as many positions.

    Where memory is taken as it is written, there is room for the expected length from the first, or else for twice the
    length before; elsewhere for twice the length before, up to the expected one, while there is memory for it.

    Args:
        num_rows, length: rows, and positions of each, that are needed.
        used_rows, used_length: the first ones of both are kept.
        expected: positions that the longest row may come to.
    """
    held_rows, capacity = stores[0].num_rows, stores[0].capacity
    if num_rows <= held_rows and length <= capacity:
        return
    num_rows, needed = max(num_rows, used_rows), max(length, used_length)
    sizes = [needed]
    if stores[0].data.device.type == "cpu":
        sizes.insert(0, max(needed, expected, 2 * capacity if length > capacity else capacity))
    elif length > capacity:  # it should seldom move
        sizes.insert(0, max(needed, min(2 * capacity, expected)))
    for size in sizes:
        try:
            for store in stores:
                store.resize(num_rows, -(-size // _BLOCK) * _BLOCK, used_rows, used_length)
            return
        except (OSError, torch.OutOfMemoryError):
            if size == needed:
                raise


def _allocate(shape: tuple[int, ...], *, like: Tensor) -> Tensor:
    """Zeros; large ones on a CPU cost memory as they are written."""
    num_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < _LAZY_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # else a row's first position would take two megabytes
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


class SlotCache:
    """The state of every running sequence: keys, values and, if a drafter wants them, features.

    Args:
        num_layers, num_kv_heads, head_dim: of the target model.
        feature_width: numbers per token kept for drafter and learner; 0 keeps none.
        dtype: of keys and values. Features are kept in bfloat16 unless the model is wider.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        feature_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        width = num_kv_heads * head_dim
        self.keys = RowStore(num_layers=num_layers, width=width, dtype=dtype, device=device)
        self.values = RowStore(num_layers=num_layers, width=width, dtype=dtype, device=device)
        self.features = (
            RowStore(num_layers=1, width=feature_width, dtype=dtype, device=device) if feature_width else None
        )
        self.lengths: list[int] = []  # cached tokens of each running row
        self._expected = 0

    @property
    def stores(self) -> list[RowStore]:
        return [store for store in (self.keys, self.values, self.features) if store is not None]

    @property
    def num_bytes(self) -> int:
        return sum(store.num_bytes for store in self.stores)

    def expect(self, length: int) -> None:
        """The longest row may come to so many positions."""
        self._expected = length

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` positions each."""
        used = max(self.lengths, default=0)
        reserve_rows(
            self.stores, num_rows, length, used_rows=len(self.lengths), used_length=used, expected=self._expected
        )

    def add_rows(self, count: int) -> None:
        """New empty rows behind the running ones."""
        self.lengths.extend([0] * count)
        assert len(self.lengths) <= self.keys.num_rows, f"{len(self.lengths)} rows, reserved {self.keys.num_rows}"

    def snapshot(self, row: int, length: int) -> RowPrefix:
        return RowPrefix(parts=tuple(store.snapshot(row, length) for store in self.stores))

    def restore(self, rows: list[int], prefix: RowPrefix) -> None:
        """Begin rows with a kept prefix."""
        for store, part in zip(self.stores, prefix.parts, strict=True):
            store.restore(rows, part)
        for row in rows:
            self.lengths[row] = prefix.parts[0].shape[1]

    def commit(self, path: Int[Tensor, "B D"], num_tokens: list[int]) -> None:
        """Keep the walked path of each row: node `path[b, j]` becomes position length + j.

        Chains need no move. `num_tokens[b]` tokens (root included) are added to row b.
        """
        step = torch.arange(path.shape[1], device=path.device)
        moves = path > step
        if not is_host(path) or bool(moves.any()):  # a device is not asked: what need not move is copied onto itself
            lengths = upload(self.lengths, path.device)
            start = (lengths + torch.arange(len(lengths), device=path.device) * self.keys.capacity)[:, None]
            source, target = (start + place for place in (torch.where(moves, path, step), step))
            chosen = moves if is_host(path) else ...
            source, target = source[chosen].flatten(), target.expand_as(source)[chosen].flatten()
            self.keys.move_positions(source, target)
            self.values.move_positions(source, target)
        self.lengths = [length + count for length, count in zip(self.lengths, num_tokens, strict=True)]

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's positions from `length` on."""
        assert length <= self.lengths[row], f"row {row} holds {self.lengths[row]} positions, not {length}"
        self.lengths[row] = length

    def remove_row(self, row: int) -> None:
        """Free a row; the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for store in self.stores:
                store.move_row(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """Drop every row and give the memory back."""
        self.lengths = []
        for store in self.stores:
            store.clear()

    def check(self, expected_lengths: list[int]) -> None:
        """Assert the conservation laws: one row a sequence, no holes, nothing beyond its store."""
        assert self.lengths == expected_lengths, f"cache holds {self.lengths}, sequences say {expected_lengths}"
        for store in self.stores:
            assert store.num_rows >= len(self.lengths), f"{len(self.lengths)} rows in a store of {store.num_rows}"
            assert store.capacity >= max(self.lengths, default=0), f"{self.lengths} beyond {store.capacity}"
            assert store.capacity == self.keys.capacity, "stores disagree on capacity"
