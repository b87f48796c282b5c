"""Two trees of each sequence as one: equal paths once, the best nodes of both kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.pools import LEVEL_PENALTY
from fastgrpo.transfer import is_host
from fastgrpo.tree import Draft
from fastgrpo.verify import Verdict

_PRIME = 0x9E3779B97F4A7C15 - 2**64  # odd: multiplying by it loses no bit of a path's hash


@dataclass(frozen=True)
class JoinedDraft:
    """A draft of two drafters, and what each said of its nodes: -inf where it did not propose one."""

    draft: Draft
    of_first: Float[Tensor, "B N"]
    of_second: Float[Tensor, "B N"]


def join_drafts(
    first: Draft, second: Draft, calibrations: tuple[Calibration, Calibration], num_draft_tokens: int, depth: int
) -> JoinedDraft:
    """The `num_draft_tokens` nodes of both trees with the best calibrated chance from the root.

    A node that both propose has the better of its two chances.

    Args:
        depth: levels that a tree has at most; a device is not asked for how many there are.
    """
    assert first.log_chances is not None and second.log_chances is not None
    width = first.token_ids.shape[1]
    (depth_1, path_1), (depth_2, path_2) = _find_paths(first, depth), _find_paths(second, depth)
    same = (path_2[:, :, None] == path_1[:, None]) & second.node_mask[:, :, None] & first.node_mask[:, None]
    is_shared, twin = same.any(-1), same.int().argmax(-1)
    place = torch.where(is_shared, twin, torch.arange(second.token_ids.shape[1], device=twin.device) + width)
    parents = torch.cat((first.parents, place.gather(1, second.parents.clamp(min=0))), 1)
    tokens = torch.cat((first.token_ids, second.token_ids), 1)
    depths = torch.cat((depth_1, depth_2), 1)
    absent = torch.full_like(tokens, -torch.inf, dtype=first.log_chances.dtype)
    of_first, of_second = absent.clone(), absent.clone()
    of_first[:, :width] = first.log_chances.masked_fill(~first.node_mask, -torch.inf)
    second_chances = second.log_chances.to(absent.dtype).masked_fill(~second.node_mask, -torch.inf)
    of_second.scatter_reduce_(1, place, second_chances, "amax")
    used = torch.cat((first.node_mask, second.node_mask & ~is_shared), 1)
    scores = _score((of_first, of_second), calibrations, parents, depths, depth).masked_fill(~used, -torch.inf)
    return _keep_best(tokens, parents, scores, (of_first, of_second), num_draft_tokens)


def count_matched(draft: Draft, verdict: Verdict) -> Int[Tensor, " B"]:
    """Tokens that the target would have accepted of this draft, of those it chose for another draft."""
    node = torch.zeros_like(draft.num_nodes)
    alive = torch.ones_like(node, dtype=torch.bool)
    matched = torch.zeros_like(node)
    for depth in range(verdict.token_ids.shape[1]):
        is_child = (draft.parents == node[:, None]) & draft.node_mask
        is_match = is_child & (draft.token_ids == verdict.token_ids[:, depth, None])
        alive = alive & (verdict.path[:, depth] >= 0) & is_match.any(-1)
        matched += alive
        node = torch.where(alive, is_match.int().argmax(-1), node)
    return matched


def _find_paths(draft: Draft, depth: int) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Depth of each node, and a hash of the tokens from the root to it."""
    has_parent, above = draft.parents >= 0, draft.parents.clamp(min=0)
    depths = torch.zeros_like(draft.parents)
    paths = torch.zeros_like(draft.parents)
    for _ in range(depth):
        deeper = torch.where(has_parent, depths.gather(1, above) + 1, 0)
        if is_host(deeper) and torch.equal(deeper, depths):
            break
        depths = deeper
        paths = torch.where(has_parent, (paths.gather(1, above) + draft.token_ids + 1) * _PRIME, 0)
    return depths, paths


def _score(
    chances: tuple[Float[Tensor, "B P"], Float[Tensor, "B P"]],
    calibrations: tuple[Calibration, Calibration],
    parents: Int[Tensor, "B P"],
    depths: Int[Tensor, "B P"],
    most: int,
) -> Float[Tensor, "B P"]:
    """Calibrated log chance of each node from the root."""
    scores = torch.zeros_like(chances[0])
    above = parents.clamp(min=0)
    for depth in range(1, 1 + (int(depths.max()) if is_host(depths) else most)):
        first, second = (calibration(each, depth) for calibration, each in zip(calibrations, chances, strict=True))
        own = scores.gather(1, above) + torch.maximum(first, second) - LEVEL_PENALTY
        scores = torch.where(depths == depth, own, scores)
    return scores


def _keep_best(
    tokens: Int[Tensor, "B P"],
    parents: Int[Tensor, "B P"],
    scores: Float[Tensor, "B P"],
    chances: tuple[Float[Tensor, "B P"], Float[Tensor, "B P"]],
    num_draft_tokens: int,
) -> JoinedDraft:
    """Root and best nodes, best first."""
    root_first = scores.index_fill(1, torch.zeros(1, dtype=torch.int64, device=scores.device), torch.inf)
    best, kept = root_first.topk(min(1 + num_draft_tokens, scores.shape[1]), dim=1)  # best first
    unused = best == -torch.inf
    place = torch.zeros_like(tokens).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    links = place.gather(1, parents.gather(1, kept).clamp(min=0)).masked_fill(unused, -1)
    links[:, 0] = -1
    first, second = (each.gather(1, kept).masked_fill(unused, -torch.inf) for each in chances)
    return JoinedDraft(
        draft=Draft(
            token_ids=tokens.gather(1, kept),
            parents=links,
            num_nodes=(~unused).sum(1),
            log_chances=torch.maximum(first, second),
            scores=best.index_fill(1, torch.zeros(1, dtype=torch.int64, device=best.device), 0.0),
        ),
        of_first=first,
        of_second=second,
    )
