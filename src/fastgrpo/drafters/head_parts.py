"""What draft heads are built of, whatever their kind: norm, MLP, rotation, output rows of the target's own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.model import TargetModel

_CPU_VOCAB_SIZE, _VOCAB_SIZE = 4096, 16384


def choose_vocab_size(target: TargetModel) -> int:
    """Tokens worth drafting from on this device.

    More tokens hold more of what the target says, and a draft level reads an output row for each: on a CPU that is
    half of its time (measured in dev/LOG.md), on a GPU next to nothing.
    """
    return min(_CPU_VOCAB_SIZE if target.device.type == "cpu" else _VOCAB_SIZE, target.vocab_size)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x: Float[Tensor, "*n heads d"], cos: Float[Tensor, "*#n d"], sin: Float[Tensor, "*#n d"]) -> Tensor:
    """Rotary position embedding in transformers' half-split convention."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return x * cos + torch.cat((-second, first), -1) * sin


def take_output_rows(head: Any, target: TargetModel) -> None:
    """Fill the head's output rows from the target as it is now."""
    with torch.no_grad():
        head.lm_head.weight.copy_(target.lm_head.weight[head.draft_vocab.long()])


def select_vocabulary(head: Any, counts: Int[Tensor, " V"]) -> None:
    """Draft from the most counted tokens; among equals those drafted already, then low ids, stay.

    The output rows are the target's own, so a change of rows costs nothing that was learnt.
    """
    score = counts.double() * 2
    score[head.draft_vocab.long()] += 1
    order = torch.argsort(score, descending=True, stable=True)
    chosen = order[: head.draft_vocab_size].sort().values
    head.draft_vocab.copy_(chosen.to(torch.int32))
