"""Blocks of cache positions: which are taken, and by how many. Counted facts, no tensors."""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Iterable

BLOCK_SIZE = 64
"""Positions of a block; `kernels/common.h` knows it too."""


def count_blocks(num_positions: int) -> int:
    """Blocks that `num_positions` need."""
    return -(-num_positions // BLOCK_SIZE)


class BlockPool:
    """Hands out block numbers, the lowest free one first, so that little memory is ever touched.

    A block may have several owners, which then only read it; it is free when the last one gives it back.

    Attributes:
        size: blocks that there is storage for.
        limit: blocks that may be taken at once, whatever the storage.
        most_taken: the highest number taken at once since `SlotCache.begin`.
    """

    def __init__(self) -> None:
        self.size = 0
        self.limit = sys.maxsize
        self.most_taken = 0
        self._num_owners: Counter[int] = Counter()  # by block, for those that are taken
        self._free: list[int] = []  # a heap of the blocks below `_fresh` that are not taken
        self._fresh = 0  # the first block that was never taken
        self._idle: set[int] = set()  # free blocks that still have memory behind them

    @property
    def num_taken(self) -> int:
        return len(self._num_owners)

    @property
    def num_left(self) -> int:
        """Blocks that may still be taken."""
        return self.limit - self.num_taken

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def end(self) -> int:
        """The first block that was never taken; none behind it was."""
        return self._fresh

    @property
    def is_full(self) -> bool:
        """Whether there is no storage for another block."""
        return self.num_taken == self.size

    def take(self) -> int:
        """Take the lowest free block.

        Raises:
            MemoryError: the limit is reached.
        """
        if self.num_left <= 0:
            raise MemoryError(f"all {self.limit} blocks of the cache are taken")
        assert not self.is_full, f"no storage behind block {self.size}"
        if self._free:
            block = heapq.heappop(self._free)
        else:
            block = self._fresh
            self._fresh += 1
        self._idle.discard(block)
        self._num_owners[block] = 1
        self.most_taken = max(self.most_taken, self.num_taken)
        return block

    def share(self, block: int) -> None:
        """Add an owner to a block."""
        assert block in self._num_owners, f"block {block} is free"
        self._num_owners[block] += 1

    def is_shared(self, block: int) -> bool:
        return self._num_owners[block] > 1

    def give_back(self, block: int) -> None:
        """Take an owner from a block, which is free without any."""
        assert block in self._num_owners, f"block {block} is free"
        self._num_owners[block] -= 1
        if not self._num_owners[block]:
            del self._num_owners[block]
            heapq.heappush(self._free, block)
            self._idle.add(block)

    def pop_idle(self) -> list[tuple[int, int]]:
        """(first, end) of each run of free blocks that still have memory behind them, for the caller to release."""
        runs = []
        for _, numbered in itertools.groupby(enumerate(sorted(self._idle)), lambda pair: pair[1] - pair[0]):
            blocks = [block for _, block in numbered]
            runs.append((blocks[0], blocks[-1] + 1))
        self._idle.clear()
        return runs

    def clear(self) -> None:
        """Free all blocks and forget the storage; limit and `most_taken` stay."""
        self.size = self._fresh = 0
        self._num_owners.clear()
        self._free.clear()
        self._idle.clear()

    def check(self, owned: Iterable[Iterable[int]]) -> None:
        """Assert that no block is lost: each has as many owners as tables name it, and all others are free."""
        assert Counter(itertools.chain.from_iterable(owned)) == self._num_owners, "owners differ from the tables"
        assert sorted((*self._free, *self._num_owners)) == list(range(self._fresh)), "a block is lost, or stands twice"
        assert self._fresh <= self.size, f"{self._fresh} blocks in a storage of {self.size}"
        assert self._idle <= set(self._free), "a block is idle and taken"
