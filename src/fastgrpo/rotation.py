"""The rotary embedding of positions, looked up where that is quicker than asking the model's module anew."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.transfer import is_host


class RotationTable:
    """cos and sin of positions; those that were asked for once are kept on the host.

    A position's are the same in any batch: RoPE kinds for which they are not are refused (`model.check_supported`).

    Args:
        rotary_emb: transformers' module, whose frequencies do not change while this lasts.
    """

    def __init__(self, rotary_emb: Any) -> None:
        self._rotary_emb = rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, positions: Int[Tensor, " T"], like: Float[Tensor, "*n"]
    ) -> tuple[Float[Tensor, "T d"], Float[Tensor, "T d"]]:
        """cos and sin, in the type and on the device of `like`."""
        if not is_host(positions):  # a device would have to be asked how long the table must be
            return self._compute(positions, like)
        most = int(positions.max())
        if self._table is None or len(self._table[0]) <= most or self._table[0].dtype != like.dtype:
            self._table = self._compute(torch.arange(2 * most + 2), like)
        cos, sin = (part.index_select(0, positions) for part in self._table)
        return cos, sin

    def _compute(self, positions: Int[Tensor, " T"], like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary_emb(like, position_ids=positions[None])
        return cos[0].contiguous(), sin[0].contiguous()
