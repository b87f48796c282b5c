"""The rotary embedding of positions, looked up where that is quicker than asking the model's module anew."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastgrpo.kernels import cpu
from fastgrpo.places import find_place
from fastgrpo.transfer import is_host

_MOST_BYTES = 80 * 2**20  # of a table on a device: 128 numbers a head, and 131072 positions with a tree behind them


class RotationTable:
    """cos and sin of positions: on the host of those that were asked for, on a device of all that there can be.

    A position's are the same in any batch: RoPE kinds for which they are not are refused (`families.check_supported`).

    Args:
        rotary_emb: transformers' module, whose frequencies do not change while this lasts.
        num_positions: that a device may ask for; what is beyond has the last one's. Where a table would be large, or
            their number is not known (0), the module is asked.
    """

    def __init__(self, rotary_emb: Any, num_positions: int = 0) -> None:
        self._rotary_emb, self._num_positions = rotary_emb, num_positions
        self._table: tuple[Tensor, Tensor] | None = None
        self._made_of = (num_positions, *_list_facts(rotary_emb))

    @staticmethod
    def renew(known: RotationTable | None, rotary_emb: Any, num_positions: int) -> RotationTable:
        """The known table, if it is of these frequencies, else a new one."""
        if known is not None and known._made_of == (num_positions, *_list_facts(rotary_emb)):
            return known
        return RotationTable(rotary_emb, num_positions)

    def __call__(
        self, positions: Int[Tensor, " T"], like: Float[Tensor, "*n"]
    ) -> tuple[Float[Tensor, "T d"], Float[Tensor, "T d"]]:
        """cos and sin, in the type and on the device of `like`."""
        if not is_host(positions):  # a device would have to be asked how long the table must be
            return self._look_up(positions, like)
        cos, sin = (part.index_select(0, positions) for part in self.cover(positions, like.dtype))
        return cos, sin

    def cover(
        self, positions: Int[Tensor, " T"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "C d"], Float[Tensor, "C d"]]:
        """cos and sin of all positions of the host up to these, and of more."""
        return self.cover_up_to(cpu.find_most(positions) if cpu.is_available() else int(positions.max()), dtype)

    def cover_up_to(self, most: int, dtype: torch.dtype) -> tuple[Float[Tensor, "C d"], Float[Tensor, "C d"]]:
        """cos and sin of position `most`, all before it, and more."""
        if self._table is None or len(self._table[0]) <= most or self._table[0].dtype != dtype:
            self._table = self._compute(torch.arange(2 * most + 2), torch.empty(0, dtype=dtype))
        return self._table

    def _look_up(
        self, positions: Int[Tensor, " T"], like: Float[Tensor, "*n"]
    ) -> tuple[Float[Tensor, "T d"], Float[Tensor, "T d"]]:
        if self._table is None or self._table[0].dtype != like.dtype:
            self._table = self._build_table(like)
        if self._table is None:
            return self._compute(positions, like)
        at = positions.clamp(0, self._num_positions - 1)
        cos, sin = (part.index_select(0, at) for part in self._table)
        return cos, sin

    def _build_table(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotations of all positions that a device may ask for; None where they would take too much memory."""
        if self._num_positions:
            first, _ = self._compute(torch.zeros(1, dtype=torch.int64, device=like.device), like)
            if 2 * self._num_positions * first.numel() * first.element_size() > _MOST_BYTES:
                self._num_positions = 0
        if not self._num_positions:
            return None
        return self._compute(torch.arange(self._num_positions, device=like.device), like)

    def _compute(self, positions: Int[Tensor, " T"], like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary_emb(like, position_ids=positions[None])
        return cos[0].contiguous(), sin[0].contiguous()


def _list_facts(rotary_emb: Any) -> list[Any]:
    """What rotations depend on: the module or function, and of a module its numbers, and where recordings read them."""
    module = getattr(rotary_emb, "func", rotary_emb)
    facts = [module, *sorted(getattr(rotary_emb, "keywords", {}).items())]
    if isinstance(module, nn.Module):
        kept = {name: each for name, each in vars(module).items() if isinstance(each, int | float | str)}
        facts += sorted((name, each) for name, each in kept.items() if name != "training")
        for buffer in module.buffers():
            facts += [find_place(buffer), buffer.tolist()]  # writes through `.data` are not counted by PyTorch
    return facts
