"""What training shares among kinds of draft heads: batches, attention over packed rows, acceptance of what is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.kernels.gpu import without_cudnn_attention
from fastgrpo.model import TargetModel

_ROUND = 64  # sizes are rounded up to it: kernels are prepared once a shape
_RANKS = 4  # sibling ranks whose acceptance is measured

_Item = TypeVar("_Item")


def pack(items: list[_Item], widths: list[int], size: int) -> list[list[_Item]]:
    """Neighbours in batches whose widths add up to at most `size`; an item wider than that stands alone."""
    batches: list[list[_Item]] = []
    room = 0
    for item, width in zip(items, widths, strict=True):
        if width > room:
            batches.append([])
            room = size
        batches[-1].append(item)
        room -= width
    return batches


def round_up(count: int, step: int = _ROUND) -> int:
    """The next multiple: kernels are prepared once for each size."""
    return -(-count // step) * step


def attend_packed(
    query: Float[Tensor, "Q h d"],
    key: Float[Tensor, "S kv d"],
    value: Float[Tensor, "S kv d"],
    seen: Bool[Tensor, "Q S"],
) -> Float[Tensor, "Q hd"]:
    """Attention of packed rows, each to the keys it sees; query heads that share a key stand side by side."""
    key, value = (states.transpose(0, 1)[None] for states in (key, value))
    grouped = query.transpose(0, 1).unflatten(0, (key.shape[1], -1))  # [kv, rep, Q, d]
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    mask = bias.repeat(grouped.shape[1], 1)[None, None]
    with without_cudnn_attention():
        attended = F.scaled_dot_product_attention(grouped.flatten(1, 2)[None], key, value, attn_mask=mask)
    return attended[0].unflatten(1, grouped.shape[1:3]).flatten(0, 1).transpose(0, 1).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """One token drawn from the target's distribution at each of M places, and the noise that drew it."""

    chosen: Int[Tensor, " M"]
    noise: Float[Tensor, "M V"]
    temperature: Float[Tensor, " M"]

    @staticmethod
    def draw(
        target: TargetModel,
        hidden: Float[Tensor, "M H"],
        temperature: Float[Tensor, " M"],
        generator: torch.Generator,
    ) -> Draws:
        """Draw at final hidden states of the target."""
        logits = target.compute_logits(hidden.to(target.lm_head.weight.dtype)).float()
        noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
        chosen = (logits / temperature[:, None] + noise).argmax(-1)
        return Draws(chosen=chosen, noise=noise, temperature=temperature)

    def find_ranks(self, logits: Float[Tensor, "M C"], vocabulary: Int[Tensor, " C"]) -> Bool[Tensor, "M 4"]:
        """Whether the candidate of each sibling rank, ranked with the same noise, is what was drawn."""
        vocabulary = vocabulary.long()
        scores = logits.float() / self.temperature[:, None] + self.noise[:, vocabulary]
        ranked = vocabulary[scores.topk(min(_RANKS, len(vocabulary)), dim=-1).indices]
        found = ranked == self.chosen[:, None]
        return F.pad(found, (0, _RANKS - found.shape[1]))
