"""Verification: walk each tree from its root along the tokens that the target chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.sampling import SamplingBatch, sample
from fastgrpo.tree import Draft


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the target chose. Column d of `path` is the node at depth d on the walked path, -1 past its end.

    The token chosen at `path[b, d]` is `token_ids[b, d]`: for all but the last node of the path it
    is the token of the next node (an accepted draft token), for the last it is the next token.
    """

    path: Int[Tensor, "B D"]
    token_ids: Int[Tensor, "B D"]
    logprobs: Float[Tensor, "B D"]
    entropies: Float[Tensor, "B D"]  # of the distribution that the token was drawn from, before top-k and top-p
    num_accepted: Int[Tensor, " B"]  # accepted draft tokens; num_accepted + 1 tokens are emitted


def verify(
    logits: Float[Tensor, "T V"],
    draft: Draft,
    row_starts: Int[Tensor, " B"],
    batch: SamplingBatch,
    vocabulary: Int[Tensor, " V"],
) -> Verdict:
    """Emit the target's tokens along the drafted paths.

    Only rows on a walked path are sampled. Every emitted token is argmax(warped logits + noise)
    of the target itself, so the result without a draft is a prefix of the result with one.

    Args:
        logits: target logits of the packed nodes; those of sequence b start at `row_starts[b]`.
        draft: the trees.
        row_starts: first packed row of each sequence.
        batch: the sampling state at the roots.
        vocabulary: int32 arange over V.
    """
    num_seqs, device = len(row_starts), logits.device
    alive = torch.arange(num_seqs, device=device)
    node = torch.zeros_like(alive)
    columns: list[tuple[Tensor, ...]] = []
    num_accepted = torch.zeros_like(alive)
    while len(alive):
        rows = batch.rows(alive, len(columns))
        chosen, logprobs, entropies = sample(logits[row_starts[alive] + node], rows, vocabulary)
        is_child = draft.parents[alive] == node[:, None]
        is_match = is_child & (draft.token_ids[alive] == chosen[:, None])
        is_hit = is_match.any(-1)
        child = is_match.int().argmax(-1)
        found = ((node, -1), (chosen, -1), (logprobs, 0), (entropies, 0))
        columns.append(tuple(value.new_full((num_seqs,), empty).scatter_(0, alive, value) for value, empty in found))
        num_accepted[alive] += is_hit
        alive, node = alive[is_hit], child[is_hit]
    path, token_ids, logprobs, entropies = (torch.stack(c, dim=1) for c in zip(*columns, strict=True))
    return Verdict(path=path, token_ids=token_ids, logprobs=logprobs, entropies=entropies, num_accepted=num_accepted)


def find_ranks(verdict: Verdict, draft: Draft) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    """(number of draft children, place among them of the one that the target chose or -1) of each walked node.

    Args:
        draft: what was verified, or what it was the first nodes of: children that were not verified count too.
    """
    walked = (verdict.path >= 0)[..., None]
    is_child = walked & (draft.parents[:, None] == verdict.path[..., None])
    is_hit = is_child & (draft.token_ids[:, None] == verdict.token_ids[..., None])
    place = is_child.cumsum(-1).gather(-1, is_hit.int().argmax(-1, keepdim=True))[..., 0] - 1
    return is_child.sum(-1), place.masked_fill(~is_hit.any(-1), -1)


def count_hits(verdict: Verdict, draft: Draft) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """(offered, hits) by depth and sibling rank, as `StepRecord` keeps them."""
    offered, hits = [], []
    for children, ranks in zip(*(found.T for found in find_ranks(verdict, draft)), strict=True):
        width = int(children.max())
        if width:
            offered.append(tuple(int((children > rank).sum()) for rank in range(width)))
            hits.append(tuple(int((ranks == rank).sum()) for rank in range(width)))
    return tuple(offered), tuple(hits)
