"""Blocks of cache positions: which are taken, and by how many. Counted facts, no tensors."""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Iterable

BLOCK_SIZE = 64
"""Positions of a block; `kernels/decoder.c` knows it too."""


def count_blocks(num_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-num_positions // BLOCK_SIZE)


class BlockPool:
    """Block numbers, the lowest free one handed out first, so that what was ever touched stays small.

    A block may have several owners, which then only read it, and is free when the last one gives it back.

    Attributes:
        size: blocks that there is storage for.
        limit: blocks that may be taken at once, whatever the storage.
        most_taken: the highest number taken at once since `begin`.
    """

    def __init__(self) -> None:
        self.size = 0
        self.limit = sys.maxsize
        self.most_taken = 0
        self._num_owners: Counter[int] = Counter()  # of each block that is taken
        self._free: list[int] = []  # a heap: those below `_fresh` that are not taken
        self._fresh = 0  # from here on no block was ever taken
        self._idle: set[int] = set()  # free, but still with memory behind them

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
        """All blocks that were ever taken stand before this one."""
        return self._fresh

    @property
    def is_full(self) -> bool:
        """Whether there is no storage for another block."""
        return self.num_taken == self.size

    def take(self) -> int:
        """The lowest free block.

        Raises:
            MemoryError: as many are taken as may be.
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
        """One owner more."""
        assert block in self._num_owners, f"block {block} is free"
        self._num_owners[block] += 1

    def is_shared(self, block: int) -> bool:
        return self._num_owners[block] > 1

    def give_back(self, block: int) -> None:
        """One owner less."""
        assert block in self._num_owners, f"block {block} is free"
        self._num_owners[block] -= 1
        if not self._num_owners[block]:
            del self._num_owners[block]
            heapq.heappush(self._free, block)
            self._idle.add(block)

    def pop_idle(self) -> list[tuple[int, int]]:
        """(first, end) of the runs of free blocks with memory behind them, which is now theirs no more."""
        runs = []
        for _, numbered in itertools.groupby(enumerate(sorted(self._idle)), lambda pair: pair[1] - pair[0]):
            blocks = [block for _, block in numbered]
            runs.append((blocks[0], blocks[-1] + 1))
        self._idle.clear()
        return runs

    def clear(self) -> None:
        """Nobody owns a block and there is no storage; limit and `most_taken` stay."""
        self.size = self._fresh = 0
        self._num_owners.clear()
        self._free.clear()
        self._idle.clear()

    def check(self, owned: Iterable[Iterable[int]]) -> None:
        """Assert that blocks are lost by nobody: each has as many owners as tables name it, all others are free."""
        assert Counter(itertools.chain.from_iterable(owned)) == self._num_owners, "owners differ from the tables"
        assert sorted((*self._free, *self._num_owners)) == list(range(self._fresh)), "a block is lost, or stands twice"
        assert self._fresh <= self.size, f"{self._fresh} blocks in a storage of {self.size}"
        assert self._idle <= set(self._free), "a block is idle and taken"
