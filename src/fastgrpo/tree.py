"""Draft trees as tensors: topologically ordered nodes, node 0 is the root."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu, gpu, trees
from fastgrpo.transfer import download, is_host, upload


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a drafter proposes for B sequences. The law needs token ids only, no draft probabilities.

    Nodes are in topological order (a parent comes before its children), siblings carry distinct
    tokens and stand in the drafter's order of preference; node 0 is the pending token. Rows may
    use fewer than N nodes. Where there are `scores` they fall from node to node, so that the best
    n nodes of a row are its first ones.
    """

    token_ids: Int[Tensor, "B N"]
    parents: Int[Tensor, "B N"]  # index of the parent; -1 for the root and for unused nodes
    num_nodes: Int[Tensor, " B"]  # root included, at least 1
    log_chances: Float[Tensor, "B N"] | None = None  # of each node, given its parent, as the drafter sees it
    scores: Float[Tensor, "B N"] | None = None  # calibrated log chance of the path to each node; -inf where unused
    counts: tuple[int, ...] | None = None  # `num_nodes` where the host knows it without asking a device

    @staticmethod
    def roots(pending_token_ids: Int[Tensor, " B"]) -> Draft:
        """The empty draft: plain decoding."""
        num_rows, device = pending_token_ids.shape[0], pending_token_ids.device
        parents, num_nodes = (_list_roots if device.type == "cpu" else _build_roots)(num_rows, device)
        return Draft(token_ids=pending_token_ids[:, None], parents=parents, num_nodes=num_nodes, counts=(1,) * num_rows)

    def keep(self, counts: list[int]) -> Draft:
        """The first `counts` nodes of each row, root included."""
        width = max(counts)
        num_nodes = upload(counts, self.num_nodes.device, self.num_nodes.dtype)
        scores: Tensor | None
        if self.scores is not None and is_host(self.scores) and cpu.is_available():
            parents, scores = trees.keep_nodes(self.parents, self.scores, num_nodes, width)
        else:
            used = torch.arange(width, device=num_nodes.device) < num_nodes[:, None]
            parents = self.parents[:, :width].masked_fill(~used, -1)
            scores = None if self.scores is None else self.scores[:, :width].masked_fill(~used, -torch.inf)
        return Draft(
            token_ids=self.token_ids[:, :width],
            parents=parents,
            num_nodes=num_nodes,
            log_chances=None if self.log_chances is None else self.log_chances[:, :width],
            scores=scores,
            counts=tuple(counts),
        )

    def rank_nodes(self) -> tuple[list[float], list[int]]:
        """The chance that each drafted node is accepted, in falling order over all rows, and the row of each."""
        assert self.scores is not None, "nothing is known of its nodes"
        if is_host(self.scores) and cpu.is_available():
            return trees.rank_nodes(self.scores, self.num_nodes)
        scores, num_nodes = download(self.scores, self.num_nodes)
        drafted = scores[:, 1:].ravel()
        places = (-drafted).argsort(kind="stable")[: int(num_nodes.sum()) - len(num_nodes)]
        return np.exp(drafted[places]).tolist(), (places // max(scores.shape[1] - 1, 1)).tolist()

    @property
    def num_promised(self) -> Float[Tensor, " B"] | None:
        """Expected number of accepted draft tokens of each row if the scores are right; None without scores."""
        if self.scores is None:
            return None
        if is_host(self.scores) and cpu.is_available():
            return trees.sum_chances(self.scores)
        return self.scores[:, 1:].exp().sum(1)

    @property
    def num_tokens(self) -> int:
        return int(self.num_nodes.sum())

    @property
    def node_mask(self) -> Bool[Tensor, "B N"]:
        """True where a node is in use."""
        index = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return index < self.num_nodes[:, None]


def _build_roots(num_rows: int, device: torch.device) -> tuple[Int[Tensor, "B 1"], Int[Tensor, " B"]]:
    """(parents, number of nodes) of trees without a draft."""
    parents = torch.full((num_rows, 1), -1, dtype=torch.int64, device=device)
    return parents, torch.ones(num_rows, dtype=torch.int64, device=device)


_list_roots = functools.lru_cache(maxsize=256)(_build_roots)  # not for recordings, which need memory of their own


@functools.lru_cache(maxsize=256)
def _see_themselves(num_rows: int) -> Bool[Tensor, "B 1 1"]:
    """Ancestors in trees without a draft: each root sees itself."""
    return torch.ones(num_rows, 1, 1, dtype=torch.bool)


def compute_ancestors(parents: Int[Tensor, "B N"], depth: int | None = None) -> Bool[Tensor, "B N N"]:
    """`[b, i, j]` is True iff node j is node i or an ancestor of it.

    Args:
        depth: most levels of a tree; None: its draft nodes. A device follows as many links, the host those there are.
    """
    num_nodes = parents.shape[1]
    if is_host(parents) and num_nodes == 1:
        return _see_themselves(parents.shape[0])
    if is_host(parents) and cpu.is_available():
        return trees.find_ancestors(parents)
    if gpu.runs_on(parents):
        from fastgrpo.kernels import gpu_trees  # in Triton, which is imported only where it runs

        return gpu_trees.find_ancestors(parents, num_nodes - 1 if depth is None else min(depth, num_nodes - 1))
    if num_nodes == 1:
        return torch.ones(len(parents), 1, 1, dtype=torch.bool, device=parents.device)
    index = torch.arange(num_nodes, device=parents.device)
    ancestors = (index[:, None] == index)[None].repeat(parents.shape[0], 1, 1)
    hop = parents
    for _ in range(num_nodes - 1 if depth is None else min(depth, num_nodes - 1)):
        if is_host(hop) and not bool((hop >= 0).any()):
            break
        ancestors |= hop[:, :, None] == index
        hop = torch.where(hop >= 0, parents.gather(1, hop.clamp(min=0)), -1)
    return ancestors


def check_draft(draft: Draft) -> None:
    """Assert the promises of `Draft`: order, distinct siblings, one root a row."""
    token_ids, parents, num_nodes = draft.token_ids.tolist(), draft.parents.tolist(), draft.num_nodes.tolist()
    for row, (tokens, links, count) in enumerate(zip(token_ids, parents, num_nodes, strict=True)):
        assert 1 <= count <= len(tokens), f"row {row} uses {count} of {len(tokens)} nodes"
        assert links[0] == -1, f"row {row}: the root has parent {links[0]}"
        for node in range(1, count):
            assert 0 <= links[node] < node, f"row {row}: node {node} has parent {links[node]}"
        assert all(link == -1 for link in links[count:]), f"row {row}: an unused node has a parent"
        edges = [(links[node], tokens[node]) for node in range(1, count)]
        assert len(set(edges)) == len(edges), f"row {row}: two siblings carry the same token"
