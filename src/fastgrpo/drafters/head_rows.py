"""Keys and values of a draft head, one row for each running sequence, in the order of the engine's slots."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch, attend_to_rows
from fastgrpo.cache import RowStore, reserve_rows
from fastgrpo.model import TargetModel


class HeadRows:
    """What a head has read of each running sequence; tokens are read late, when a draft is asked for.

    Args:
        target: heads have its key heads, and its type when they draft.
        num_layers: of the head.

    Attributes:
        num_read: positions of each row that were read; rows admitted after the last draft are not listed.
    """

    def __init__(self, target: TargetModel, num_layers: int) -> None:
        self.num_kv_heads, self.head_dim = target.num_kv_heads, target.head_dim
        width = target.num_kv_heads * target.head_dim
        self.keys = RowStore(num_layers=num_layers, width=width, dtype=target.dtype, device=target.device)
        self.values = RowStore(num_layers=num_layers, width=width, dtype=target.dtype, device=target.device)
        self.num_read: list[int] = []

    def clear(self) -> None:
        self.num_read = []
        self.keys.clear()
        self.values.clear()

    def count_unread(self, lengths: list[int]) -> int:
        return sum(lengths) - sum(self.num_read[: len(lengths)])

    def admit(self, num_rows: int) -> None:
        """The first `num_rows` slots run; new ones have read nothing."""
        self.num_read += [0] * (num_rows - len(self.num_read))

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` positions each."""
        used = max(self.num_read, default=0)
        stores = [self.keys, self.values]
        reserve_rows(stores, num_rows, length, used_rows=len(self.num_read), used_length=used)

    def release(self, slot: int, last_slot: int) -> None:
        """The sequence of `slot` is finished; the one of `last_slot` moves there."""
        if last_slot >= len(self.num_read):  # admitted after the last draft: nothing read yet
            if slot < len(self.num_read):
                self.num_read[slot] = 0
            return
        for store in (self.keys, self.values):
            store.move_row(last_slot, slot, self.num_read[last_slot])
        self.num_read[slot] = self.num_read[last_slot]
        self.num_read.pop()

    def write(
        self, layer: int, index: Int[Tensor, " T"], key: Float[Tensor, "T kv d"], value: Float[Tensor, "T kv d"]
    ) -> None:
        """Keys and values at flat indices, row * capacity + position."""
        for store, states in ((self.keys, key), (self.values, value)):
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
        packed, scale = query.flatten(1).to(self.keys.data.dtype), self.head_dim**-0.5
        attended = attend_to_rows(packed, self.keys, self.values, layer, batch, head_dim=self.head_dim, scale=scale)
        return attended.to(query.dtype)
