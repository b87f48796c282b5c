"""What a target says of draft trees on a GPU: walks, ranks, counts and where state belongs, one launch each.

Counterparts of `trees.c`; PyTorch's are in verify.py, drafters/calibration.py and cache.py.
"""

from __future__ import annotations

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.kernels.gpu_trees import MOST_ODDS, NONE, compute_log_odds, pad_size, tree_kernel

_NOWHERE = tl.constexpr(-2)  # a node that is nobody's parent; -1 is the root's


@tree_kernel
def _walk_level(
    rows: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    parents: tl.tensor,
    chosen: tl.tensor,
    logprobs: tl.tensor,
    entropies: tl.tensor,
    out_path: tl.tensor,
    out_chosen: tl.tensor,
    out_logprobs: tl.tensor,
    out_entropies: tl.tensor,
    out_accepted: tl.tensor,
    num_nodes: tl.tensor,
    num_levels: tl.tensor,
    level: tl.tensor,
    NODES: tl.constexpr,
) -> None:
    """One tree: what was chosen at its node of this level, and the row of logits of the next, -1 behind the end."""
    row = tl.program_id(0).to(tl.int64)
    source, start = tl.load(rows + row), tl.load(starts + row)
    node = tl.where(source >= 0, source - start, _NOWHERE)
    token = tl.load(chosen + row)
    out = row * num_levels + level
    tl.store(out_path + out, tl.maximum(node, -1))
    tl.store(out_chosen + out, token)
    tl.store(out_logprobs + out, tl.load(logprobs + row))
    tl.store(out_entropies + out, tl.load(entropies + row))
    index = tl.arange(0, NODES)
    is_node = index < num_nodes
    link = tl.load(parents + row * num_nodes + index, mask=is_node, other=-1)
    drafted = tl.load(tokens + row * num_nodes + index, mask=is_node, other=0)
    match = tl.min(tl.where(is_node & (link == node) & (drafted == token), index, NONE), 0)
    tl.store(rows + row, tl.where(match < NONE, start + match, -1))
    tl.store(out_accepted + row, tl.load(out_accepted + row) + tl.where(match < NONE, 1, 0))


class Walk:
    """The paths of B trees, level by level, as `fastgrpo.verify.Verdict` has them.

    Attributes:
        rows: of the logits, whose token is to be chosen next; -1 of walks that have ended.
    """

    def __init__(
        self,
        row_starts: Int[Tensor, " B"],
        token_ids: Int[Tensor, "B N"],
        parents: Int[Tensor, "B N"],
        num_levels: int,
    ) -> None:
        device, shape = row_starts.device, (len(row_starts), num_levels)
        self.rows = row_starts.clone()
        self._trees = (row_starts.contiguous(), token_ids.contiguous(), parents.contiguous())
        self._level, self._sizes = 0, (token_ids.shape[1], num_levels)
        self.path, self.token_ids = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.logprobs, self.entropies = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.num_accepted = torch.zeros_like(self.rows)

    def advance(self, chosen: Int[Tensor, " B"], logprobs: Float[Tensor, " B"], entropies: Float[Tensor, " B"]) -> None:
        """The tokens chosen at `rows`."""
        if len(self.rows):
            _walk_level[(len(self.rows),)](
                self.rows, *self._trees, chosen, logprobs, entropies,
                self.path, self.token_ids, self.logprobs, self.entropies, self.num_accepted,
                *self._sizes, self._level, NODES=pad_size(self._sizes[0]), num_warps=1,
            )  # fmt: skip
        self._level += 1


@tree_kernel
def _find_ranks(
    path: tl.tensor,
    chosen: tl.tensor,
    tokens: tl.tensor,
    parents: tl.tensor,
    num_children: tl.tensor,
    ranks: tl.tensor,
    num_nodes: tl.tensor,
    num_levels: tl.tensor,
    NODES: tl.constexpr,
) -> None:
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64) * num_levels + tl.program_id(1)
    node, token = tl.load(path + at), tl.load(chosen + at)
    node = tl.where(node >= 0, node, _NOWHERE)
    index = tl.arange(0, NODES)
    is_node = index < num_nodes
    is_child = is_node & (tl.load(parents + row * num_nodes + index, mask=is_node, other=-1) == node)
    is_hit = is_child & (tl.load(tokens + row * num_nodes + index, mask=is_node, other=0) == token)
    hit = tl.min(tl.where(is_hit, index, NONE), 0)
    tl.store(num_children + at, tl.sum(is_child.to(tl.int64), 0))
    tl.store(ranks + at, tl.where(hit < NONE, tl.sum((is_child & (index < hit)).to(tl.int64), 0), -1))


def find_ranks(
    path: Int[Tensor, "B D"], chosen: Int[Tensor, "B D"], token_ids: Int[Tensor, "B N"], parents: Int[Tensor, "B N"]
) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    """See `fastgrpo.verify.find_ranks`."""
    num_children, ranks = torch.empty_like(path), torch.empty_like(path)
    if path.numel():
        _find_ranks[tuple(path.shape)](
            path.contiguous(), chosen.contiguous(), token_ids.contiguous(), parents.contiguous(), num_children, ranks,
            parents.shape[1], path.shape[1], NODES=pad_size(parents.shape[1]), num_warps=1,
        )  # fmt: skip
    return num_children, ranks


@tree_kernel
def _count_judged(
    path: tl.tensor,
    parents: tl.tensor,
    chances: tl.tensor,
    tables: tl.tensor,
    num_levels: tl.tensor,
    num_nodes: tl.tensor,
    weight: tl.tensor,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    NODES: tl.constexpr,
) -> None:
    """One tree: children of walked nodes by depth and log-odds, and those of them that the target chose."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, NODES)
    is_node = index < num_nodes
    parent = tl.load(parents + row * num_nodes + index, mask=is_node, other=-1)
    chance = tl.load(chances + row * num_nodes + index, mask=is_node, other=float("-inf")).to(tl.float32)
    above = tl.full((NODES,), -1, tl.int32)
    is_walked = index < 0
    for level in range(num_levels):
        node = tl.load(path + row * num_levels + level)
        above = tl.where(parent == tl.where(node >= 0, node, _NOWHERE), level, above)
        is_walked = is_walked | (index == node)
    is_judged = (above >= 0) & (chance > float("-inf"))
    odds = compute_log_odds(tl.where(is_judged, chance, 0.0))
    bin_of = tl.floor((odds + MOST_ODDS) * ((BINS - 1) / (2 * MOST_ODDS)) + 0.5).to(tl.int32)
    cell = tl.maximum(tl.minimum(above, LEVELS - 1), 0) * BINS + bin_of
    counted = tl.zeros((NODES,), tl.float32) + weight
    tl.atomic_add(tables + cell, counted, mask=is_judged)
    tl.atomic_add(tables + LEVELS * BINS + cell, counted, mask=is_judged & is_walked)


def count_judged_(
    tables: Float[Tensor, "2 levels bins"],
    path: Int[Tensor, "B D"],
    parents: Int[Tensor, "B N"],
    log_chances: Float[Tensor, "B N"],
    weight: float,
) -> None:
    """Add `weight` for each child of a walked node to float32 tables; see `Calibration`."""
    if parents.numel():
        _count_judged[(len(parents),)](
            path.contiguous(), parents.contiguous(), log_chances.contiguous(), tables, path.shape[1], parents.shape[1],
            weight, LEVELS=tables.shape[1], BINS=tables.shape[2], NODES=pad_size(parents.shape[1]), num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


@tree_kernel
def _locate_path(
    path: tl.tensor,
    lengths: tl.tensor,
    blocks: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    num_levels: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, level = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * num_levels + level
    node, length = tl.load(path + at), tl.load(lengths + row)
    own_blocks = blocks + row * num_blocks
    source, target = length + tl.where(node < 0, level, node), length + level
    source_block = tl.load(own_blocks + tl.minimum(source // BLOCK, num_blocks - 1))
    target_block = tl.load(own_blocks + tl.minimum(target // BLOCK, num_blocks - 1))
    tl.store(sources + at, source_block + source % BLOCK)
    tl.store(targets + at, target_block + target % BLOCK)


def locate_path(
    path: Int[Tensor, "B D"], lengths: Int[Tensor, " B"], blocks: Int[Tensor, "B K"]
) -> tuple[Int[Tensor, " BD"], Int[Tensor, " BD"]]:
    """Where the walked nodes stand in the cache, and where they belong; both the latter behind the end of a path."""
    sources, targets = (torch.empty(path.numel(), dtype=torch.int64, device=path.device) for _ in range(2))
    if path.numel():
        _locate_path[tuple(path.shape)](
            path.contiguous(), lengths.contiguous(), blocks.contiguous(), sources, targets, path.shape[1],
            blocks.shape[1], BLOCK=BLOCK_SIZE, num_warps=1,
        )  # fmt: skip
    return sources, targets
