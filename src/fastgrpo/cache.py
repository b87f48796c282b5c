"""Keys, values and features of running sequences, in blocks of positions. No holes, hardly any copies.

A row is one sequence, a position one token. Each row has a table of blocks, which are taken as it grows and given back
when it ends, so that memory in use is that of live tokens and at most one block a row. Siblings share the blocks of
their prompt; a shared block is copied before a row writes into it. Accepted nodes are gathered to the end of their row
in one vectorised move.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.block_store import BlockStore
from fastgrpo.blocks import BLOCK_SIZE, BlockPool, count_blocks
from fastgrpo.kernels import cpu, gpu, trees
from fastgrpo.memory import find_available_bytes, is_out_of_memory
from fastgrpo.transfer import is_host, upload

_LEAST_BLOCKS = 16  # storage grows by at least as many
_MOST_TAKEN = 0.9  # share of a device's free memory that growing by more than a block may take: forwards need the rest
_IDLE_BYTES = 64 * 2**20  # less idle memory than this is not worth giving back


@dataclass(frozen=True, kw_only=True)
class RowPrefix:
    """The first positions of a row, kept for siblings that still wait; whoever holds it must `drop` it."""

    blocks: tuple[int, ...]
    length: int


class SlotCache:
    """Keys, values and, if a drafter wants them, features of every running sequence: rows 0..B-1.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        feature_width: numbers per token kept for drafter and learner; 0 keeps none.
        dtype: of keys, values and features.

    Attributes:
        lengths: cached tokens of each running row.
        position_bytes: bytes of one position, in all layers and stores together.
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
        self.keys = BlockStore(num_layers=num_layers, width=width, dtype=dtype, device=device)
        self.values = BlockStore(num_layers=num_layers, width=width, dtype=dtype, device=device)
        self.features = (
            BlockStore(num_layers=1, width=feature_width, dtype=dtype, device=device) if feature_width else None
        )
        self.stores = [store for store in (self.keys, self.values, self.features) if store is not None]
        self.position_bytes = sum(store.position_bytes for store in self.stores)
        self.lengths: list[int] = []
        self._pool = BlockPool()
        self._tables: list[list[int]] = []  # blocks of each row
        self._prefixes: list[RowPrefix] = []  # that are held
        self._table: np.ndarray | None = None  # all rows' blocks, see `table`; None after they have changed
        self._blocks: Tensor | None = None  # the same on the device
        self._scratch: int | None = None  # a block without a row
        self._expected = 0  # blocks that this rollout may come to use

    # -- memory --------------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        return BLOCK_SIZE * self.position_bytes

    def list_data(self) -> list[Tensor]:
        """The storage itself, which moves when it grows."""
        return [store.data for store in self.stores]

    @property
    def num_bytes(self) -> int:
        """Bytes of storage; on a CPU more than is in use."""
        return sum(store.num_bytes for store in self.stores)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that rows and held prefixes own, and of the scratch block."""
        return self._pool.num_taken * self.block_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were in use at once since `begin`."""
        return self._pool.most_taken * self.block_bytes

    @property
    def num_left(self) -> int:
        """Blocks that may still be taken."""
        return self._pool.num_left

    def begin(self, *, expected_blocks: int = 0, limit: int | None = None) -> None:
        """A rollout starts; no row may be left from the last one.

        Args:
            expected_blocks: blocks that may come to be in use at once. On a CPU there is room for them from the first.
            limit: most blocks in use at once; None: as many as there is memory for.
        """
        assert not self.lengths, f"{len(self.lengths)} rows run"
        self._pool.limit = sys.maxsize if limit is None else limit
        if self.keys.num_blocks > self._pool.limit:
            self.clear()
        self._pool.most_taken = 0
        self._expected = min(expected_blocks, self._pool.limit)

    def _make_room(self) -> None:
        """Grow the storage: on a CPU to all blocks that are expected, elsewhere in large steps.

        Steps are large because storage moves when it grows, and recorded forwards are lost with each move. Where memory
        does not suffice, the step is halved until it does.

        Raises:
            OSError, torch.OutOfMemoryError: there is no memory for a single block more.
        """
        held = self._pool.size
        is_lazy = self.keys.data.device.type == "cpu"
        wanted = max(self._expected if is_lazy else self._expected // 4, 2 * held, _LEAST_BLOCKS)
        more = max(min(wanted, self._pool.limit) - held, 1)
        while more > 1 and not self._may_move(held + more):
            more //= 2
        while True:
            size = held + more
            try:
                for store in self.stores:
                    if store.num_blocks < size:
                        store.resize(size, self._pool.end)
                    elif not held:  # kept from an earlier rollout
                        store.data.zero_()
                self._pool.size = size
                return
            except (OSError, RuntimeError) as error:
                if more == 1 or not is_out_of_memory(error):
                    raise
                more //= 2

    def _may_move(self, num_blocks: int) -> bool:
        """Whether a device has room for all stores to move, one after the other, into storage for `num_blocks` each.

        Always true on a CPU, where memory is only taken as it is written to.
        """
        device = self.keys.data.device
        available = None if device.type == "cpu" else find_available_bytes(device)
        if available is None:
            return True
        free = _MOST_TAKEN * available
        for store in self.stores:
            num_bytes = num_blocks * BLOCK_SIZE * store.position_bytes
            if num_bytes > free:
                return False
            free += store.num_bytes - num_bytes
        return True

    def _return_memory(self) -> None:
        """Give idle memory back to the system, where it is more than what is in use."""
        num_idle = self._pool.num_idle
        if num_idle >= self._pool.num_taken and num_idle * self.block_bytes >= _IDLE_BYTES:
            runs = self._pool.pop_idle()
            for store in self.stores:
                store.release_memory(runs)

    # -- rows ----------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Int[Tensor, "B K"]:
        """Index of the first position of each block of each row; short rows are padded with their own last block.

        Another row's block would not do: what stands behind a row's end may be read, with weight 0, and must be finite.
        """
        if self._blocks is None:
            self._blocks = upload(self.table, self.keys.data.device)
        return self._blocks

    @property
    def table(self) -> np.ndarray:
        """`blocks` on the host, int64 [B, K]; read only."""
        if self._table is None:
            width = max(map(len, self._tables), default=0) or 1
            padded = [table + (table[-1:] or [0]) * (width - len(table)) for table in self._tables]
            self._table = BLOCK_SIZE * np.array(padded, dtype=np.int64).reshape(len(padded), width)
        return self._table

    def _forget_table(self) -> None:
        """To be called whenever rows or their blocks have changed."""
        self._table = self._blocks = None

    def locate(self, rows: Int[Tensor, " T"], positions: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
        """Index in a store of each position of its row."""
        return locate_each(self.blocks, rows, positions)

    def add_rows(self, count: int) -> None:
        """New empty rows behind the running ones."""
        self.lengths.extend([0] * count)
        self._tables.extend([] for _ in range(count))
        self._forget_table()

    def reserve(self, row: int, length: int) -> None:
        """Make room for `length` positions of a row; those behind its cached ones may then be written.

        Raises:
            MemoryError, OSError, torch.OutOfMemoryError: the limit is reached, or there is no more memory.
        """
        table = self._tables[row]
        if self._writes_shared(row, length):
            place = self.lengths[row] // BLOCK_SIZE
            fresh = self._take()
            try:
                for store in self.stores:
                    store.copy_block(table[place], fresh)
            except BaseException:  # such as no memory for what is copied
                self._pool.give_back(fresh)
                raise
            self._pool.give_back(table[place])
            table[place] = fresh
            self._forget_table()
        while len(table) * BLOCK_SIZE < length:
            table.append(self._take())
            self._forget_table()

    def count_missing(self, row: int, length: int) -> int:
        """Blocks that `reserve` would take."""
        return max(count_blocks(length) - len(self._tables[row]), 0) + self._writes_shared(row, length)

    def _writes_shared(self, row: int, length: int) -> bool:
        own = self.lengths[row]
        return length > own and own % BLOCK_SIZE > 0 and self._pool.is_shared(self._tables[row][own // BLOCK_SIZE])

    def _take(self) -> int:
        if self._pool.is_full and self._pool.num_left > 0:
            self._make_room()
        return self._pool.take()

    def take_scratch(self) -> int:
        """Index of the first position of the scratch block, which no row reads: padded tokens are written there.

        It is taken at the first call, counts towards the limit, and is kept until `clear`.

        Raises:
            MemoryError, OSError, torch.OutOfMemoryError: the limit is reached, or there is no more memory.
        """
        if self._scratch is None:
            self._scratch = self._take()
        return BLOCK_SIZE * self._scratch

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's positions from `length` on, and give back their blocks."""
        assert length <= self.lengths[row], f"row {row} holds {self.lengths[row]} positions, not {length}"
        self.lengths[row] = length
        table, num_kept = self._tables[row], count_blocks(length)
        if num_kept < len(table):
            for block in table[num_kept:]:
                self._pool.give_back(block)
            del table[num_kept:]
            self._forget_table()

    def trim(self) -> None:
        """Give back the blocks behind every row's own length."""
        for row, length in enumerate(self.lengths):
            self.truncate(row, length)

    def remove_row(self, row: int) -> None:
        """Free a row; the last row takes its place."""
        self.truncate(row, 0)
        self.lengths[row], self._tables[row] = self.lengths[-1], self._tables[-1]
        self.lengths.pop()
        self._tables.pop()
        self._forget_table()
        self._return_memory()

    def release(self, row: int, last_row: int) -> None:
        """`remove_row` for a cache to which the last of the running rows may not have been added yet."""
        if last_row < len(self.lengths):
            self.remove_row(row)
        elif row < len(self.lengths):
            self.truncate(row, 0)

    def gather(
        self,
        path: Int[Tensor, "B D"],
        lengths: Int[Tensor, " B"],
        blocks: Int[Tensor, "B K"],
        starts: Int[Tensor, " B"],
        features: Float[Tensor, "T W"] | None,
    ) -> None:
        """Move node `path[b, j]` of each row to position length + j; its other nodes are not kept.

        Args:
            path: nodes in walking order, -1 past the end of a path.
            lengths, blocks: of the rows, as this cache has them.
            starts: first packed node of each row.
            features: of the packed nodes, written where their nodes go; None leaves features as they are.
        """
        if is_host(path) and cpu.is_available():
            cached = None if features is None or self.features is None else (self.features.data, features)
            trees.keep_path(path, lengths, blocks, self.keys.data, self.values.data, cached, starts)
            return
        if gpu.runs_on(path):
            from fastgrpo.kernels import gpu_walk  # in Triton, which is imported only where it runs

            source, target = gpu_walk.locate_path(path, lengths, blocks)
            nodes = (starts[:, None] + path.clamp(min=0)).flatten()
        else:
            rows, depth = _find_walked(path)
            start, node = lengths[rows], path[rows, depth]
            source = locate_each(blocks, rows, start + torch.where(node < 0, depth, node))
            target = locate_each(blocks, rows, start + depth)
            nodes = starts[rows] + node.clamp(min=0)
        if len(source):
            self.keys.move_positions(source, target)
            self.values.move_positions(source, target)
        if features is not None and self.features is not None:
            self.features.write(0, target, features[nodes])

    def advance(self, num_tokens: list[int]) -> None:
        """Keep the next `num_tokens[b]` positions of each row: its length grows by as many."""
        self.lengths = [length + count for length, count in zip(self.lengths, num_tokens, strict=True)]

    def read_features(self, row: int) -> Float[Tensor, "T W"] | None:
        """A copy of a row's features; None where none are kept."""
        if self.features is None:
            return None
        positions = torch.arange(self.lengths[row], device=self.features.data.device)
        index = self.locate(torch.full_like(positions, row), positions)
        return self.features.read(0, index[None])[0]

    # -- prefixes ------------------------------------------------------------------------------------

    def hold(self, row: int, length: int) -> RowPrefix:
        """Keep the first positions of a row until `drop`, whatever becomes of the row."""
        assert length <= self.lengths[row], f"row {row} holds {self.lengths[row]} positions, not {length}"
        prefix = RowPrefix(blocks=tuple(self._tables[row][: count_blocks(length)]), length=length)
        for block in prefix.blocks:
            self._pool.share(block)
        self._prefixes.append(prefix)
        return prefix

    def restore(self, rows: Iterable[int], prefix: RowPrefix) -> None:
        """Begin rows anew with a held prefix, whose blocks they share."""
        for row in rows:
            self.truncate(row, 0)
            for block in prefix.blocks:
                self._pool.share(block)
            self._tables[row], self.lengths[row] = list(prefix.blocks), prefix.length
        self._forget_table()

    def drop(self, prefix: RowPrefix) -> None:
        """Hold a prefix no longer."""
        self._prefixes = [held for held in self._prefixes if held is not prefix]
        for block in prefix.blocks:
            self._pool.give_back(block)

    def share(self, source: int, rows: Iterable[int], length: int) -> None:
        """Begin rows anew with the first positions of another one, whose blocks they share."""
        prefix = self.hold(source, length)
        self.restore(rows, prefix)
        self.drop(prefix)

    # -- the end -------------------------------------------------------------------------------------

    def clear(self, *, keeps_storage: bool = False) -> None:
        """Drop every row and prefix and give the memory back; storage that is kept stays where it is for later rows."""
        self.lengths, self._tables, self._prefixes, self._scratch = [], [], [], None
        self._forget_table()
        self._pool.clear()
        for store in self.stores if not keeps_storage else ():
            store.clear()

    def check(self, expected_lengths: list[int]) -> None:
        """Assert the conservation laws: one row a sequence, blocks for its tokens and no more, no block lost."""
        assert self.lengths == expected_lengths, f"cache holds {self.lengths}, sequences say {expected_lengths}"
        for row, (length, table) in enumerate(zip(self.lengths, self._tables, strict=True)):
            assert len(table) == count_blocks(length), f"row {row}: {len(table)} blocks for {length} positions"
        scratch = [] if self._scratch is None else [self._scratch]
        self._pool.check((*self._tables, *(prefix.blocks for prefix in self._prefixes), scratch))
        for store in self.stores:
            assert store.num_blocks >= self._pool.size, f"{store.num_blocks} blocks stored of {self._pool.size}"


def _find_walked(path: Int[Tensor, "B D"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Row and depth of each node on a walked path; on a device, of each entry: to find the nodes would mean to wait."""
    if is_host(path):
        rows, depth = (path >= 0).nonzero(as_tuple=True)
        return rows, depth
    rows, depth = (torch.arange(size, device=path.device) for size in path.shape)
    return rows.repeat_interleave(path.shape[1]), depth.repeat(path.shape[0])


def locate_each(blocks: Int[Tensor, "B K"], rows: Int[Tensor, " T"], positions: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """`locate` of single positions."""
    return blocks[rows, (positions // BLOCK_SIZE).clamp(max=blocks.shape[1] - 1)] + positions % BLOCK_SIZE


def locate(blocks: Int[Tensor, "B K"], positions: Int[Tensor, "B X"]) -> Int[Tensor, "B X"]:
    """Index in a store of the positions of each row; of those beyond the row's table, some index within the store.

    Args:
        blocks: index of the first position of each block of each row.
    """
    place = (positions // BLOCK_SIZE).clamp(max=blocks.shape[1] - 1)
    return blocks.gather(1, place) + positions % BLOCK_SIZE
