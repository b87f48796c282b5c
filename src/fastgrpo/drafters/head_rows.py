"""Keys and values of a draft head, one row for each running sequence, in the order of the engine's slots."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch, attend_to_rows
from fastgrpo.cache import SlotCache
from fastgrpo.model import TargetModel


class HeadRows:
    """What a head has read of each running sequence; tokens are read late, when a draft is asked for.

    Args:
        target: heads have its key heads, and its type when they draft.
        num_layers: of the head.
    """

    def __init__(self, target: TargetModel, num_layers: int) -> None:
        self.head_dim = target.head_dim
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
        """Positions of each row that were read; rows admitted after the last draft are not listed."""
        return self.cache.lengths

    def clear(self) -> None:
        self.cache.clear()

    def count_unread(self, lengths: list[int]) -> int:
        return sum(lengths) - sum(self.num_read[: len(lengths)])

    def reserve(self, lengths: list[int], num_nodes: int) -> None:
        """The first slots run; make room for so many positions of each and a draft behind them."""
        self.cache.add_rows(len(lengths) - len(self.num_read))
        for row, length in enumerate(lengths):
            self.cache.reserve(row, length + num_nodes)

    def finish(self, lengths: list[int]) -> None:
        """So many positions of each row were read."""
        self.cache.lengths = list(lengths)

    def trim(self) -> None:
        """What was drafted behind the positions that were read goes."""
        self.cache.trim()

    def release(self, slot: int, last_slot: int) -> None:
        """The sequence of `slot` runs no more; the one of `last_slot` moves there."""
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
