"""Draft trees on a GPU: the small operations between a drafter's passes and before verification, one launch each.

Here they are grown, pruned and laid out; `gpu_walk` has what follows. Counterparts of `trees.c`; PyTorch's are in
drafters/pools.py, tree.py and attention.py. Sizes of trees are padded, so that few kernels are compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.kernels.trees import Beam

NONE = tl.constexpr(0x7FFFFFFF)
_LEAST_MISS = tl.constexpr(-1e-6)  # log chances are taken for this at most where log-odds are computed
_SERIES_FROM = tl.constexpr(-0.02)  # 1 - exp(x) loses digits above
MOST_ODDS = tl.constexpr(8.0)
_LEAST_SIZE, _MOST_SIZE = 64, 512  # that trees are padded to; larger ones to powers of two


def tree_kernel(run: Callable[..., None]) -> Any:
    """Compiled once for all sizes but those that are padded, and for all columns of a table, aligned or not."""
    return triton.jit(run, do_not_specialize=[name for name in inspect.signature(run).parameters if name.islower()])


@triton.jit
def compute_log_odds(chance: tl.tensor) -> tl.tensor:
    bounded = tl.minimum(chance, _LEAST_MISS)
    series = -bounded * (1.0 + bounded * (0.5 + bounded * (1.0 / 6.0 + bounded / 24.0)))
    miss = tl.where(bounded > _SERIES_FROM, series, 1.0 - tl.exp(bounded))
    return tl.minimum(tl.maximum(chance - tl.log(miss), -MOST_ODDS), MOST_ODDS)


@triton.jit
def _calibrate(chance: tl.tensor, slope: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """log(sigmoid(slope * odds + offset)); an absent candidate stays one."""
    x = slope * compute_log_odds(tl.where(chance == float("-inf"), 0.0, chance)) + offset
    calibrated = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    return tl.where(chance == float("-inf"), float("-inf"), calibrated)


@triton.jit
def _choose_best(score: tl.tensor, is_left: tl.tensor, index: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The best of those that are left, and where it stands: the first of equal ones."""
    best = tl.max(tl.where(is_left, score, float("-inf")), 0)
    return best, tl.min(tl.where(is_left & (score == best), index, NONE), 0)


@tree_kernel
def _grow_level(
    chances: tl.tensor,
    tokens: tl.tensor,
    places: tl.tensor,
    sums: tl.tensor,
    visible: tl.tensor,
    pool_chances: tl.tensor,
    pool_tokens: tl.tensor,
    pool_sums: tl.tensor,
    pool_parents: tl.tensor,
    out_tokens: tl.tensor,
    out_above: tl.tensor,
    out_places: tl.tensor,
    out_sums: tl.tensor,
    out_visible: tl.tensor,
    num_nodes: tl.tensor,
    num_children: tl.tensor,
    num_expanded: tl.tensor,
    capacity: tl.tensor,
    num_filled: tl.tensor,
    num_chosen: tl.tensor,
    line: tl.tensor,
    penalty: tl.tensor,
    WIDTH: tl.constexpr,
    SEEN: tl.constexpr,
) -> None:
    """One tree: the candidates of a level join its pool, and the best of them are chosen to be expanded."""
    row = tl.program_id(0).to(tl.int64)
    width = num_nodes * num_children
    index = tl.arange(0, WIDTH)
    is_inside = index < width
    node = row * num_nodes + index // num_children
    chance = tl.load(chances + row * width + index, mask=is_inside, other=float("-inf")).to(tl.float32)
    token = tl.load(tokens + row * width + index, mask=is_inside, other=0)
    slope, offset = tl.load(line), tl.load(line + 1)
    score = tl.where((slope == 1.0) & (offset == 0.0), chance, _calibrate(chance, slope, offset))
    score = tl.load(sums + node, mask=is_inside, other=0.0) + score - penalty
    score = tl.where(score == score, score, float("-inf"))  # what is no number could not be found among the rest
    first = row * capacity + num_filled + index
    tl.store(pool_chances + first, chance, mask=is_inside)
    tl.store(pool_tokens + first, token, mask=is_inside)
    tl.store(pool_sums + first, score, mask=is_inside)
    tl.store(pool_parents + first, tl.load(places + node, mask=is_inside, other=0), mask=is_inside)
    seen = tl.arange(0, SEEN)
    is_left = is_inside
    for rank in range(num_chosen):
        best, chosen = _choose_best(score, is_left, index)
        is_left = is_left & (index != chosen)
        own = row * num_chosen + rank
        above = chosen // num_children
        tl.store(out_tokens + own, tl.sum(tl.where(index == chosen, token, 0), 0))
        tl.store(out_above + own, above.to(tl.int64))
        tl.store(out_places + own, (1 + num_filled + chosen).to(tl.int64))
        tl.store(out_sums + own, best)
        ancestors = visible + (row * num_nodes + above) * num_expanded + seen
        is_seen = tl.load(ancestors, mask=seen < num_expanded, other=0)
        is_seen = tl.where(seen == num_expanded + rank, 1, is_seen)
        places_seen = own * (num_expanded + num_chosen) + seen
        tl.store(out_visible + places_seen, is_seen.to(tl.uint8), mask=seen < num_expanded + num_chosen)


@tree_kernel
def _prune(
    chances: tl.tensor,
    tokens: tl.tensor,
    sums: tl.tensor,
    parents: tl.tensor,
    roots: tl.tensor,
    out_tokens: tl.tensor,
    out_parents: tl.tensor,
    out_counts: tl.tensor,
    out_chances: tl.tensor,
    out_sums: tl.tensor,
    capacity: tl.tensor,
    num_filled: tl.tensor,
    num_chosen: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """One tree: its best candidates behind the root, best first; absent ones, whose sum is -infinity, end it."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, WIDTH)
    is_inside = index < num_filled
    own = row * capacity + index
    score = tl.load(sums + own, mask=is_inside, other=float("-inf"))
    chance = tl.load(chances + own, mask=is_inside, other=0.0)
    token = tl.load(tokens + own, mask=is_inside, other=0)
    parent = tl.load(parents + own, mask=is_inside, other=0)
    place = tl.zeros((WIDTH,), tl.int64)  # in the tree, of those that were chosen
    out = row * (num_chosen + 1)
    tl.store(out_tokens + out, tl.load(roots + row))
    tl.store(out_parents + out, -1)
    tl.store(out_chances + out, 0.0)
    tl.store(out_sums + out, 0.0)
    count = tl.full((), 1, tl.int64)
    is_left = is_inside
    for rank in range(num_chosen):
        best, chosen = _choose_best(score, is_left, index)
        is_left = is_left & (index != chosen)
        is_own = (index == chosen) & (score > float("-inf"))  # of an absent one nothing is
        place = tl.where(is_own, count, place)
        above = tl.sum(tl.where(is_own, parent, 0), 0)  # 0 is the root, behind it stands candidate after candidate
        link = tl.sum(tl.where(index == above - 1, place, 0), 0)
        is_used = tl.sum(is_own.to(tl.int64), 0)
        at = out + 1 + rank
        tl.store(out_tokens + at, tl.sum(tl.where(is_own, token, 0), 0))
        tl.store(out_parents + at, tl.where(is_used > 0, link, -1))
        tl.store(out_chances + at, tl.sum(tl.where(is_own, chance, 0.0), 0))
        tl.store(out_sums + at, best)
        count += is_used
    tl.store(out_counts + row, count)


class Pool:
    """Room for all candidates of B trees; see `fastgrpo.kernels.trees.Pool`, equal ones are chosen in their order."""

    def __init__(self, num_trees: int, capacity: int, device: torch.device) -> None:
        self.num_filled = 0
        shape = (num_trees, capacity)
        self._chances, self._scores = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        self._tokens, self._parents = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))

    def grow(
        self,
        chances: Float[Tensor, "B V K"],
        token_ids: Int[Tensor, "B V K"],
        beam: Beam,
        width: int,
        line: Float[Tensor, " 2"],
        penalty: float,
    ) -> Beam:
        """Take the candidates below a beam; the best `width` of them are the next one. `line` is read by the device."""
        num_trees, num_nodes, num_children = chances.shape
        count, expanded = min(width, num_nodes * num_children), beam.visible.shape[2]
        device = chances.device
        token_out, above, places = (torch.empty(num_trees, count, dtype=torch.int64, device=device) for _ in range(3))
        scores = torch.empty(num_trees, count, dtype=torch.float32, device=device)
        visible = torch.empty(num_trees, count, expanded + count, dtype=torch.bool, device=device)
        if num_trees and num_nodes * num_children:
            _grow_level[(num_trees,)](
                chances.contiguous(), token_ids.contiguous(), beam.places.contiguous(), beam.scores.contiguous(),
                beam.visible.contiguous().view(torch.uint8), self._chances, self._tokens, self._scores, self._parents,
                token_out, above, places, scores, visible.view(torch.uint8), num_nodes, num_children, expanded,
                self._tokens.shape[1], self.num_filled, count, line, penalty,
                WIDTH=pad_size(num_nodes * num_children), SEEN=pad_size(expanded + count), num_warps=1,
                enable_fp_fusion=False,
            )  # fmt: skip
        self.num_filled += num_nodes * num_children
        return Beam(token_ids=token_out, above=above, places=places, scores=scores, visible=visible)

    def prune(self, count: int, roots: Int[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token ids, parents, number of nodes, log chances and scores of the best nodes."""
        (num_trees, capacity), device = self._tokens.shape, roots.device
        count = min(count, self.num_filled)
        tokens, parents = (torch.empty(num_trees, count + 1, dtype=torch.int64, device=device) for _ in range(2))
        shape = (num_trees, count + 1)
        chances, scores = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        num_nodes = torch.empty(num_trees, dtype=torch.int64, device=device)
        if num_trees:
            _prune[(num_trees,)](
                self._chances, self._tokens, self._scores, self._parents, roots.contiguous(), tokens, parents,
                num_nodes, chances, scores, capacity, self.num_filled, count,
                WIDTH=pad_size(self.num_filled), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return tokens, parents, num_nodes, chances, scores


def begin_beam(num_trees: int, device: torch.device) -> Beam:
    """The root, above all candidates."""
    zeros = torch.zeros(num_trees, 1, dtype=torch.int64, device=device)
    return Beam(
        token_ids=zeros,
        above=zeros,
        places=zeros,
        scores=torch.zeros(num_trees, 1, dtype=torch.float32, device=device),
        visible=torch.empty(num_trees, 1, 0, dtype=torch.bool, device=device),
    )


@tree_kernel
def _find_ancestors(
    parents: tl.tensor, visible: tl.tensor, num_nodes: tl.tensor, depth: tl.tensor, NODES: tl.constexpr
) -> None:
    row, node = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.arange(0, NODES)
    links = parents + row * num_nodes
    is_seen = index == node
    above = tl.load(links + node)
    for _ in range(depth):
        is_seen = is_seen | (index == above)
        above = tl.load(links + above, mask=above >= 0, other=-1)
    places = (row * num_nodes + node) * num_nodes + index
    tl.store(visible + places, is_seen.to(tl.uint8), mask=index < num_nodes)


def find_ancestors(parents: Int[Tensor, "B N"], depth: int) -> Bool[Tensor, "B N N"]:
    """See `fastgrpo.tree.compute_ancestors`.

    Args:
        depth: levels that a tree has at most.
    """
    num_rows, num_nodes = parents.shape
    visible = torch.empty(num_rows, num_nodes, num_nodes, dtype=torch.bool, device=parents.device)
    if visible.numel():
        _find_ancestors[(num_rows, num_nodes)](
            parents.contiguous(), visible.view(torch.uint8), num_nodes, depth, NODES=pad_size(num_nodes), num_warps=1
        )
    return visible


@tree_kernel
def _lay_out(
    visible: tl.tensor,
    lengths: tl.tensor,
    blocks: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    words: tl.tensor,
    starts: tl.tensor,
    num_nodes: tl.tensor,
    num_seen: tl.tensor,
    num_words: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    SEEN: tl.constexpr,
) -> None:
    """One node: its position, its place in the cache, and what it sees as bits."""
    row, node = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = row * num_nodes + node
    index = tl.arange(0, SEEN)
    is_seen = tl.load(visible + own * num_seen + index, mask=index < num_seen, other=0).to(tl.int64)
    length = tl.load(lengths + row)
    slot = length + (num_seen - num_nodes) + node
    block = tl.minimum(slot // BLOCK, num_blocks - 1)
    tl.store(positions + own, length + tl.sum(is_seen, 0) - 1)
    tl.store(places + own, tl.load(blocks + row * num_blocks + block) + slot % BLOCK)
    for word in range(num_words):
        bits = tl.where(index // 64 == word, is_seen << (index % 64).to(tl.int64), 0)
        tl.store(words + own * num_words + word, tl.sum(bits, 0))
    if node == 0:
        tl.store(starts + row, row * num_nodes)


def lay_out(
    visible: Bool[Tensor, "B N E"], lengths: Int[Tensor, " B"], blocks: Int[Tensor, "B K"]
) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " B"], Int[Tensor, "B N W"]]:
    """Positions, places in the cache, first packed token of each row, and `visible` as words of 64 bits.

    See `fastgrpo.attention.ForwardBatch`; every row has N nodes.
    """
    num_rows, num_nodes, num_seen = visible.shape
    num_words, device = -(-num_seen // 64), visible.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    positions, places = empty(num_rows * num_nodes), empty(num_rows * num_nodes)
    words, starts = empty(num_rows, num_nodes, num_words), empty(num_rows)
    if visible.numel():
        _lay_out[(num_rows, num_nodes)](
            visible.contiguous().view(torch.uint8), lengths.contiguous(), blocks.contiguous(), positions, places, words,
            starts, num_nodes, num_seen, num_words, blocks.shape[1],
            BLOCK=BLOCK_SIZE, SEEN=pad_size(num_seen), num_warps=1,
        )  # fmt: skip
    return positions, places, starts, words


def pad_size(count: int) -> int:
    """Few sizes: each is compiled when it first comes, and a small tree takes no longer in a larger one."""
    return _LEAST_SIZE if count <= _LEAST_SIZE else triton.next_power_of_2(max(count, _MOST_SIZE))
