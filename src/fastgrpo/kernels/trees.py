"""Draft trees on the host (`trees.c`): the small operations between a drafter's passes and around verification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.kernels.cpu import NAMES, call


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Nodes chosen to be expanded, W of each tree."""

    token_ids: Int[Tensor, "B W"]
    above: Int[Tensor, "B W"]  # place of the parent among the nodes expanded last
    places: Int[Tensor, "B W"]  # in the tree, of all candidates; 0 is the root
    scores: Float[Tensor, "B W"]  # calibrated log chance from the root
    visible: Bool[Tensor, "B W E"]  # ancestors among the nodes expanded so far, themselves included


class Pool:
    """Room for all candidates of B trees.

    Args:
        capacity: candidates of a tree at most.
    """

    def __init__(self, num_trees: int, capacity: int) -> None:
        self.num_filled = 0
        self._chances, self._scores = (torch.empty(num_trees, capacity) for _ in range(2))
        self._tokens, self._parents = (torch.empty(num_trees, capacity, dtype=torch.int64) for _ in range(2))

    def grow(
        self,
        chances: Float[Tensor, "B V K"],
        token_ids: Int[Tensor, "B V K"],
        beam: Beam,
        width: int,
        line: tuple[float, float],
        penalty: float,
    ) -> Beam:
        """Take the candidates below a beam; the best `width` of them are the next one.

        Args:
            chances: log chance of each, given its parent.
            line: slope and offset of the calibration.
            penalty: nats, taken off each score.
        """
        num_trees, num_nodes, num_children = chances.shape
        count, expanded = min(width, num_nodes * num_children), beam.visible.shape[2]
        token_out, above, places = (torch.empty(num_trees, count, dtype=torch.int64) for _ in range(3))
        scores = torch.empty(num_trees, count)
        visible = torch.empty(num_trees, count, expanded + count, dtype=torch.bool)
        below = (chances.contiguous(), token_ids.contiguous(), *chances.shape, *map(float, line), penalty)
        pool = (self._chances, self._tokens, self._scores, self._parents)
        sizes = (expanded, self._tokens.shape[1], self.num_filled)
        parents = (beam.places, beam.scores, beam.visible)
        call("grow_level", *below, *parents, *sizes, *pool, count, token_out, above, places, scores, visible)
        self.num_filled += num_nodes * num_children
        return Beam(token_ids=token_out, above=above, places=places, scores=scores, visible=visible)

    def prune(self, count: int, roots: Int[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token ids, parents, number of nodes, log chances and scores of the best nodes; the pool is used up."""
        num_trees, capacity = self._tokens.shape
        count = min(count, self.num_filled)
        tokens, parents = (torch.empty(num_trees, count + 1, dtype=torch.int64) for _ in range(2))
        chances, scores = (torch.empty(num_trees, count + 1) for _ in range(2))
        num_nodes = torch.empty(num_trees, dtype=torch.int64)
        pool = (self._chances, self._tokens, self._scores, self._parents)
        sizes = (num_trees, capacity, self.num_filled, count)
        call("prune", *pool, *sizes, roots.contiguous(), tokens, parents, num_nodes, chances, scores)
        return tokens, parents, num_nodes, chances, scores


def begin_beam(num_trees: int) -> Beam:
    """The root, above all candidates."""
    zeros = torch.zeros(num_trees, 1, dtype=torch.int64)
    return Beam(
        token_ids=zeros,
        above=zeros,
        places=zeros,
        scores=torch.zeros(num_trees, 1),
        visible=torch.empty(num_trees, 1, 0, dtype=torch.bool),
    )


def find_ancestors(parents: Int[Tensor, "B N"]) -> Bool[Tensor, "B N N"]:
    """See `fastgrpo.tree.compute_ancestors`."""
    visible = torch.empty(*parents.shape, parents.shape[1], dtype=torch.bool)
    call("find_ancestors", parents.contiguous(), *parents.shape, visible)
    return visible


def walk(
    logits: Float[Tensor, "T V"],
    row_starts: Int[Tensor, " B"],
    token_ids: Int[Tensor, "B N"],
    parents: Int[Tensor, "B N"],
    stream_keys: Int[Tensor, " B"],
    positions: Int[Tensor, " B"],
    temperature: Float[Tensor, " B"],
    num_levels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Path, chosen token ids, log-probs, entropies and number of accepted draft tokens; see `fastgrpo.verify.Verdict`.

    Sampling is `cpu.sample`'s, bit for bit.

    Args:
        num_levels: nodes of a path at most.
    """
    assert logits.stride(1) == 1, "columns must be adjacent"
    path, chosen = (torch.empty(len(row_starts), num_levels, dtype=torch.int64) for _ in range(2))
    logprobs, entropies = (torch.empty(len(row_starts), num_levels) for _ in range(2))
    num_accepted = torch.empty_like(row_starts)
    trees = (row_starts, token_ids.contiguous(), parents.contiguous(), *token_ids.shape)
    rows = (stream_keys, positions, temperature, num_levels)
    name = f"walk_{NAMES[logits.dtype]}"
    call(
        name, logits, logits.stride(0), logits.shape[1], *trees, *rows, path, chosen, logprobs, entropies, num_accepted
    )
    deepest = int(num_accepted.max()) + 1
    path, chosen, logprobs, entropies = (
        each if deepest == num_levels else each[:, :deepest].contiguous()
        for each in (path, chosen, logprobs, entropies)
    )
    return path, chosen, logprobs, entropies, num_accepted


def find_ranks(
    path: Int[Tensor, "B D"], chosen: Int[Tensor, "B D"], token_ids: Int[Tensor, "B N"], parents: Int[Tensor, "B N"]
) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    """See `fastgrpo.verify.find_ranks`."""
    num_children, ranks = torch.empty_like(path), torch.empty_like(path)
    trees = (token_ids.contiguous(), parents.contiguous(), token_ids.shape[1])
    call("find_ranks", path.contiguous(), chosen.contiguous(), *path.shape, *trees, num_children, ranks)
    return num_children, ranks


def count_judged(
    path: Int[Tensor, "B D"],
    parents: Int[Tensor, "B N"],
    log_chances: Float[Tensor, "B N"],
    num_levels: int,
    num_bins: int,
) -> Float[Tensor, "2 levels bins"]:
    """Children of walked nodes by depth and log-odds, and those that the target chose; see `Calibration`."""
    tables = torch.zeros(2, num_levels, num_bins, dtype=torch.float64)
    trees = (parents.contiguous(), log_chances.contiguous(), parents.shape[1])
    call("count_judged", path.contiguous(), *path.shape, *trees, num_levels, num_bins, tables[0], tables[1])
    return tables
