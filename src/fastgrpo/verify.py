"""Verification: walk each tree from its root along the tokens that the target chooses."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu, gpu, trees
from fastgrpo.sampling import SamplingBatch, sample_rows, samples_on_host
from fastgrpo.transfer import download, is_host
from fastgrpo.tree import Draft

Counts = tuple[tuple[int, ...], ...]

_VERDICT = ("path", "token_ids", "logprobs", "entropies", "num_accepted")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the target chose. Column d of `path` is the node at depth d on the walked path, -1 past its end.

    The token chosen at `path[b, d]` is `token_ids[b, d]`: for all but the last node of the path it
    is the token of the next node (an accepted draft token), for the last it is the next token.
    """

    path: Int[Tensor, "B D"]
    token_ids: Int[Tensor, "B D"]
    logprobs: Float[Tensor, "B D"]  # as in `Completion`
    entropies: Float[Tensor, "B D"]  # nats; of the distribution that the token was drawn from, before top-k and top-p
    num_accepted: Int[Tensor, " B"]  # accepted draft tokens; num_accepted + 1 tokens are emitted


def verify(
    logits: Float[Tensor, "T V"],
    draft: Draft,
    row_starts: Int[Tensor, " B"],
    batch: SamplingBatch,
    vocabulary: Int[Tensor, " V"],
    depth: int | None = None,
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
        depth: most levels of a tree; None: its draft nodes. A device walks that many, the host only while a walk lasts.
    """
    most = draft.token_ids.shape[1] - 1
    num_levels = 1 + (most if depth is None else min(depth, most))
    if samples_on_host(logits, batch):
        noise_rows = (batch.stream_keys, batch.positions, batch.temperature)
        walked = trees.walk(logits, row_starts, draft.token_ids, draft.parents, *noise_rows, num_levels)
        return Verdict(**dict(zip(_VERDICT, walked, strict=True)))
    if gpu.runs_on(logits) and logits.dtype in gpu.DTYPES:
        from fastgrpo.kernels import gpu_walk  # in Triton, which is imported only where it runs

        walk = gpu_walk.Walk(row_starts, draft.token_ids, draft.parents, num_levels)
        for level in range(num_levels):
            walk.advance(*sample_rows(logits, walk.rows, batch.ahead(level), vocabulary))
        return Verdict(**{name: getattr(walk, name) for name in _VERDICT})
    return _walk(logits, draft, row_starts, batch, vocabulary, num_levels)


def _walk(
    logits: Float[Tensor, "T V"],
    draft: Draft,
    row_starts: Int[Tensor, " B"],
    batch: SamplingBatch,
    vocabulary: Int[Tensor, " V"],
    num_levels: int,
) -> Verdict:
    """`verify` without kernels of its own, level by level."""
    node = torch.zeros_like(row_starts)
    is_alive = torch.ones_like(node, dtype=torch.bool)
    columns: list[tuple[Tensor, ...]] = []
    num_accepted = torch.zeros_like(node)
    for level in range(num_levels):
        rows = torch.where(is_alive, row_starts + node, -1)
        chosen, logprobs, entropies = sample_rows(logits, rows, batch.ahead(level), vocabulary)
        columns.append((node.masked_fill(~is_alive, -1), chosen, logprobs, entropies))
        is_child = (draft.parents == node[:, None]) & is_alive[:, None]
        is_match = is_child & (draft.token_ids == chosen[:, None])
        is_alive, node = is_match.any(-1), is_match.int().argmax(-1)
        num_accepted = num_accepted + is_alive
        if is_host(is_alive) and not bool(is_alive.any()):
            break
    path, token_ids, logprobs, entropies = (torch.stack(c, dim=1) for c in zip(*columns, strict=True))
    return Verdict(path=path, token_ids=token_ids, logprobs=logprobs, entropies=entropies, num_accepted=num_accepted)


def find_ranks(verdict: Verdict, draft: Draft) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    """(number of draft children, rank among them of the token that the target chose or -1) of each walked node.

    Args:
        draft: what was verified, or the larger pool that it was taken from: children that were not verified count too.
    """
    if is_host(draft.parents) and cpu.is_available():
        return trees.find_ranks(verdict.path, verdict.token_ids, draft.token_ids, draft.parents)
    if gpu.runs_on(draft.parents):
        from fastgrpo.kernels import gpu_walk

        return gpu_walk.find_ranks(verdict.path, verdict.token_ids, draft.token_ids, draft.parents)
    walked = (verdict.path >= 0)[..., None]
    is_child = walked & (draft.parents[:, None] == verdict.path[..., None])
    is_hit = is_child & (draft.token_ids[:, None] == verdict.token_ids[..., None])
    place = is_child.cumsum(-1).gather(-1, is_hit.int().argmax(-1, keepdim=True))[..., 0] - 1
    return is_child.sum(-1), place.masked_fill(~is_hit.any(-1), -1)


def count_hits(children: np.ndarray, ranks: np.ndarray) -> tuple[Counts, Counts]:
    """(offered, hits) by depth and sibling rank, as `StepRecord` has them; of what `find_ranks` found, [B, D] each."""
    offered, hits = [], []
    for below, chosen in zip(zip(*children.tolist(), strict=True), zip(*ranks.tolist(), strict=True), strict=True):
        width = max(below)
        if width:
            num_nodes = [0] * (width + 1)  # by how many children they have
            for count in below:
                num_nodes[count] += 1
            offered.append(tuple(sum(num_nodes[rank + 1 :]) for rank in range(width)))
            hits.append(tuple(chosen.count(rank) for rank in range(width)))
    return tuple(offered), tuple(hits)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a step on the host; lists have one entry for each sequence."""

    num_accepted: list[int]
    token_ids: list[list[int]]  # the columns of `Verdict`, those past the end of a path included
    logprobs: list[list[float]]
    entropies: list[list[float]]
    num_promised: float  # accepted draft tokens that the drafter's chances predicted; 0 where it gives none
    offered: Counts  # by depth and sibling rank, as `StepRecord` keeps them
    hits: Counts


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The results of a step on its device, before `read_outcome` copies them to the host; one row for each sequence."""

    num_accepted: Int[Tensor, " B"]
    token_ids: Int[Tensor, "B D"]  # this and the next two as in `Verdict`
    logprobs: Float[Tensor, "B D"]
    entropies: Float[Tensor, "B D"]
    num_promised: Float[Tensor, " B"] | None  # `Draft.num_promised`
    num_children: Int[Tensor, "B D"] | None  # this and the next as `find_ranks` gives them; None for a plain step
    ranks: Int[Tensor, "B D"] | None

    def list_known(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def find_facts(verdict: Verdict, draft: Draft, pool: Draft) -> Facts:
    """The results of a step, left on their device.

    Args:
        draft: what was verified.
        pool: everything that was drafted; `draft` is the first nodes of each of its rows, or the pool itself.
    """
    num_children, ranks = find_ranks(verdict, pool) if pool.token_ids.shape[1] > 1 else (None, None)
    return Facts(
        num_accepted=verdict.num_accepted,
        token_ids=verdict.token_ids,
        logprobs=verdict.logprobs,
        entropies=verdict.entropies,
        num_promised=draft.num_promised,
        num_children=num_children,
        ranks=ranks,
    )


def read_outcome(facts: Facts, num_rows: int, packed: Int[Tensor, " X"] | None = None) -> Outcome:
    """Copy the results of a step to the host: the only read of a device that a step makes.

    Args:
        num_rows: sequences; the rows behind them are padding.
        packed: the known facts in one tensor, if `transfer.pack` has made one.
    """
    known = facts.list_known()
    read = {
        name: values[:num_rows] for name, values in zip(known, download(*known.values(), packed=packed), strict=True)
    }
    offered, hits = count_hits(read["num_children"], read["ranks"]) if "ranks" in read else ((), ())
    return Outcome(
        num_accepted=read["num_accepted"].tolist(),
        token_ids=read["token_ids"].tolist(),
        logprobs=read["logprobs"].tolist(),
        entropies=read["entropies"].tolist(),
        num_promised=sum(read["num_promised"].tolist()) if "num_promised" in read else 0.0,
        offered=offered,
        hits=hits,
    )
