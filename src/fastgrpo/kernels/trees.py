"""Draft trees on the host (`trees.c`): the small operations between a drafter's passes and around verification."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.kernels.cpu import NAMES, call, compute, find_most


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
        self._chances, self._scores = (torch.empty(num_trees, capacity, dtype=torch.float32) for _ in range(2))
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
        scores = torch.empty(num_trees, count, dtype=torch.float32)
        visible = torch.empty(num_trees, count, expanded + count, dtype=torch.bool)
        below = (chances.contiguous(), token_ids.contiguous(), *chances.shape, *map(float, line), penalty)
        pool = (self._chances, self._tokens, self._scores, self._parents)
        sizes = (expanded, self._tokens.shape[1], self.num_filled)
        parents = (beam.places, beam.scores, beam.visible)
        compute("grow_level", *below, *parents, *sizes, *pool, count, token_out, above, places, scores, visible)
        self.num_filled += num_nodes * num_children
        return Beam(token_ids=token_out, above=above, places=places, scores=scores, visible=visible)

    def prune(self, count: int, roots: Int[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token ids, parents, number of nodes, log chances and scores of the best nodes; the pool is used up."""
        num_trees, capacity = self._tokens.shape
        count = min(count, self.num_filled)
        tokens, parents = (torch.empty(num_trees, count + 1, dtype=torch.int64) for _ in range(2))
        chances, scores = (torch.empty(num_trees, count + 1, dtype=torch.float32) for _ in range(2))
        num_nodes = torch.empty(num_trees, dtype=torch.int64)
        pool = (self._chances, self._tokens, self._scores, self._parents)
        sizes = (num_trees, capacity, self.num_filled, count)
        compute("prune", *pool, *sizes, roots.contiguous(), tokens, parents, num_nodes, chances, scores)
        return tokens, parents, num_nodes, chances, scores


@functools.lru_cache(maxsize=256)
def begin_beam(num_trees: int) -> Beam:
    """The root, above all candidates; not to be written to."""
    zeros = torch.zeros(num_trees, 1, dtype=torch.int64)
    return Beam(
        token_ids=zeros,
        above=zeros,
        places=zeros,
        scores=torch.zeros(num_trees, 1, dtype=torch.float32),
        visible=torch.empty(num_trees, 1, 0, dtype=torch.bool),
    )


def find_ancestors(parents: Int[Tensor, "B N"]) -> Bool[Tensor, "B N N"]:
    """See `fastgrpo.tree.compute_ancestors`."""
    visible = torch.empty(*parents.shape, parents.shape[1], dtype=torch.bool)
    call("find_ancestors", parents.contiguous(), *parents.shape, visible)
    return visible


def sum_chances(scores: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """See `fastgrpo.tree.Draft.num_promised`."""
    sums = torch.empty(len(scores), dtype=torch.float32)
    call("sum_chances", scores.contiguous(), *scores.shape, sums)
    return sums


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
    logprobs, entropies = (torch.empty(len(row_starts), num_levels, dtype=torch.float32) for _ in range(2))
    num_accepted = torch.empty_like(row_starts)
    trees = (row_starts, token_ids.contiguous(), parents.contiguous(), *token_ids.shape)
    rows = (stream_keys, positions, temperature, num_levels)
    name = f"walk_{NAMES[logits.dtype]}"
    call(
        name, logits, logits.stride(0), logits.shape[1], *trees, *rows, path, chosen, logprobs, entropies, num_accepted
    )
    deepest = find_most(num_accepted) + 1
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


def rank_nodes(scores: Float[Tensor, "B N"], num_nodes: Int[Tensor, " B"]) -> tuple[list[float], list[int]]:
    """See `fastgrpo.tree.Draft.rank_nodes`."""
    chances, rows = (ctypes.c_double * scores.numel())(), (ctypes.c_int64 * scores.numel())()
    count = call("rank_nodes", scores.contiguous(), *scores.shape, num_nodes, chances, rows)
    return chances[:count], rows[:count]


def keep_nodes(
    parents: Int[Tensor, "B N"], scores: Float[Tensor, "B N"], counts: Int[Tensor, " B"], most: int
) -> tuple[Int[Tensor, "B M"], Float[Tensor, "B M"]]:
    """Parents and scores of the first `counts` nodes of each tree, `most` at most; -1 and -inf beyond."""
    num_trees = len(counts)
    parents_out = torch.empty(num_trees, most, dtype=torch.int64)
    scores_out = torch.empty(num_trees, most, dtype=torch.float32)
    call("keep_nodes", parents.contiguous(), scores.contiguous(), *parents.shape, counts, most, parents_out, scores_out)
    return parents_out, scores_out


def count_judged_(
    offered: np.ndarray,
    hits: np.ndarray,
    path: Int[Tensor, "B D"],
    parents: Int[Tensor, "B N"],
    log_chances: Float[Tensor, "B N"],
    decay: float,
) -> None:
    """Children of walked nodes by depth and log-odds, and those that the target chose; see `Calibration`.

    Args:
        offered, hits: what was counted so far, [levels, bins] of float64; added to.
        decay: what it is multiplied with before.
    """
    links = (parents.contiguous(), log_chances.contiguous(), parents.shape[1])
    tables = [torch.from_numpy(table) for table in (offered, hits)]
    assert all(table.dtype == torch.float64 and table.is_contiguous() for table in tables)
    call("count_judged", path.contiguous(), *path.shape, *links, *offered.shape, *tables, ctypes.c_double(decay))


def keep_path(
    path: Int[Tensor, "B D"],
    lengths: Int[Tensor, " B"],
    blocks: Int[Tensor, "B K"],
    keys: Float[Tensor, "L P kvd"],
    values: Float[Tensor, "L P kvd"],
    features: tuple[Float[Tensor, "_ P W"], Float[Tensor, "T W"]] | None,
    starts: Int[Tensor, " B"],
) -> None:
    """See `fastgrpo.cache.SlotCache.gather`.

    Args:
        features: the cache's, and those of packed nodes, which are written to it.
    """
    (_, num_positions, width), size = keys.shape, keys.element_size()
    cached, own = features or (None, None)
    assert own is None or (cached is not None and own.is_contiguous() and own.dtype == cached.dtype)
    own_size = 0 if own is None else own.shape[1] * own.element_size()
    sizes = (len(keys), num_positions * width * size, width * size)
    rows = (*path.shape, lengths, blocks.contiguous(), blocks.shape[1])
    call("keep_path", path.contiguous(), *rows, keys, values, *sizes, cached, own, starts, own_size)
