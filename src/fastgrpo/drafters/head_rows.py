"""Keys and values of a draft head, one row for each running sequence, in the order of the engine's slots.

Only the end of a prompt is read, as much as the head has seen of prompts when it was trained: for long prompts that
saves nearly all the cost of a first draft. Positions here are those of the row, which begins with the first token read.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch, attend_to_rows
from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.cache import SlotCache
from fastgrpo.model import TargetModel
from fastgrpo.types import Sequence


class HeadRows:
    """What a head has read of each running sequence; tokens are read late, when a draft is asked for.

    Args:
        target: heads have its key heads, and its type when they draft.
        num_layers: of the head.
        num_prompt_tokens: last tokens of each prompt that are read; up to a block more, so that a block begins the row.

    Attributes:
        starts: index of the first token read of each row's sequence, a multiple of the block size.
    """

    def __init__(self, target: TargetModel, num_layers: int, num_prompt_tokens: int) -> None:
        self.head_dim = target.head_dim
        self.num_prompt_tokens = num_prompt_tokens
        self.starts: list[int] = []
        nothing = np.zeros((0, 0), dtype=np.int64)
        self._shifted: tuple[np.ndarray, list[int], np.ndarray] = (nothing, [], nothing)  # last call of `shift_table`
        self.cache = SlotCache(
            num_layers=num_layers,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            feature_width=0,
            dtype=target.dtype,
            device=target.device,
        )

    @property
    def num_read(self) -> list[int]:
        """Tokens of each row's sequence that were read or left out; rows admitted after the last draft are not listed.

        What was left out stands before the row.
        """
        return [start + length for start, length in zip(self.starts, self.cache.lengths, strict=True)]

    @property
    def num_bytes(self) -> int:
        return self.cache.num_bytes

    def clear(self, *, keeps_storage: bool = False) -> None:
        self.cache.clear(keeps_storage=keeps_storage)
        self.starts = []

    def count_unread(self, sequences: list[Sequence]) -> int:
        """Cached tokens of the running sequences that are to be read before the next draft."""
        num_read = sum(self._list_starts(sequences)) + sum(self.cache.lengths[: len(sequences)])
        return sum(sequence.num_cached for sequence in sequences) - num_read

    def reserve(self, sequences: list[Sequence], num_nodes: int) -> None:
        """Make room for the cached tokens of the sequences, which run in the first slots, and `num_nodes` behind."""
        self.starts = self._list_starts(sequences)
        self.cache.add_rows(len(sequences) - len(self.cache.lengths))
        for row, (sequence, start) in enumerate(zip(sequences, self.starts, strict=True)):
            self.cache.reserve(row, sequence.num_cached - start + num_nodes)

    def _list_starts(self, sequences: list[Sequence]) -> list[int]:
        """`starts` for these sequences: as they are where a row has been read, else found anew."""
        kept = [start if length else None for start, length in zip(self.starts, self.cache.lengths, strict=True)]
        kept += [None] * (len(sequences) - len(kept))
        return [
            self._find_start(sequence) if start is None else start
            for start, sequence in zip(kept, sequences, strict=True)
        ]

    def _find_start(self, sequence: Sequence) -> int:
        return max(len(sequence.prompt_ids) - self.num_prompt_tokens, 0) // BLOCK_SIZE * BLOCK_SIZE

    def place(self, lengths: list[int]) -> list[int]:
        """Lengths counted from each sequence's first token, as lengths of the rows."""
        return [length - start for length, start in zip(lengths, self.starts, strict=True)]

    def shift_table(self, table: np.ndarray) -> np.ndarray:
        """The target's table of blocks, [B, K], with each row starting at the block at which the head's row begins."""
        if not any(self.starts):
            return table
        known, starts, shifted = self._shifted
        if known is not table or starts != self.starts:
            columns = np.arange(table.shape[1]) + np.array(self.starts)[:, None] // BLOCK_SIZE
            shifted = np.take_along_axis(table, columns.clip(max=table.shape[1] - 1), axis=1)
            self._shifted = table, list(self.starts), shifted
        return shifted

    def finish(self, lengths: list[int]) -> None:
        """Note that `lengths` tokens of each sequence have been read."""
        self.cache.lengths = self.place(lengths)

    def trim(self) -> None:
        """Drop what was drafted behind the positions that were read."""
        self.cache.trim()

    def release(self, slot: int, last_slot: int) -> None:
        """The sequence in `slot` runs no more; the one in `last_slot` moves there."""
        if last_slot < len(self.starts):
            self.starts[slot] = self.starts[-1]
            self.starts.pop()
        self.cache.release(slot, last_slot)

    def write(
        self, layer: int, index: Int[Tensor, " T"], key: Float[Tensor, "T kv d"], value: Float[Tensor, "T kv d"]
    ) -> None:
        """Keys and values at flat indices."""
        for store, states in ((self.cache.keys, key), (self.cache.values, value)):
            store.write(layer, index, states.flatten(1).to(store.data.dtype))

    def attend(
        self,
        layer: int,
        batch: ForwardBatch,
        query: Float[Tensor, "T h d"],
        key: Float[Tensor, "T kv d"],
        value: Float[Tensor, "T kv d"],
    ) -> Float[Tensor, "T hd"]:
        """Write the batch's keys and values behind its rows, then attend to rows and batch as its mask says."""
        self.write(layer, batch.write_index, key, value)
        keys, values = self.cache.keys, self.cache.values
        packed, scale = query.flatten(1).to(keys.data.dtype), self.head_dim**-0.5
        attended = attend_to_rows(packed, keys, values, layer, batch, head_dim=self.head_dim, scale=scale)
        return attended.to(query.dtype)
