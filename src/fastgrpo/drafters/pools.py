"""All candidates of draft trees, level by level: the best of the newest are expanded, the best of all are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.drafters.calibration import Calibration
from fastgrpo.kernels import cpu, gpu, trees
from fastgrpo.kernels.trees import Beam
from fastgrpo.transfer import is_host
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan

if TYPE_CHECKING:
    from fastgrpo.kernels import gpu_trees

_MOST_GPU_WIDTH = 16  # nodes of a level, whose candidates one program looks at
LEVEL_PENALTY = 1e-4  # nats; a child never outranks its parent, not even at chance 1


class Pool(Protocol):
    """The candidates of B trees under way."""

    def add(self, chances: Float[Tensor, "B V K"], token_ids: Int[Tensor, "B V K"]) -> Beam | None:
        """Take the candidates below the nodes expanded last (at first the root); returns those to expand next.

        After the plan's last level it may return None.

        Args:
            chances: log chance of each to be chosen below its parent, as the drafter says it; -inf of absent ones.
        """
        ...

    def prune(self) -> Draft:
        """The best nodes over all levels, best first; so parents stand before their children."""
        ...


def open_pool(roots: Int[Tensor, " B"], plan: SpeculationPlan, calibration: Calibration) -> Pool:
    """Compiled where there are kernels, else of PyTorch's operators; they differ in ties alone."""
    capacity = plan.width + plan.width**2 * (plan.depth - 1)
    if is_host(roots) and cpu.is_available():
        candidates = trees.Pool(len(roots), capacity)
        return _CompiledPool(roots, plan, calibration.line, candidates, trees.begin_beam(len(roots)))
    if gpu.runs_on(roots) and plan.width <= _MOST_GPU_WIDTH:
        from fastgrpo.kernels import gpu_trees  # in Triton, which is imported only where it runs

        beam, find_line = gpu_trees.begin_beam(len(roots), roots.device), partial(calibration.line_on, roots.device)
        return _CompiledPool(roots, plan, find_line, gpu_trees.Pool(len(roots), capacity, roots.device), beam)
    return _TensorPool(roots, plan, calibration)


class _CompiledPool:
    def __init__(
        self,
        roots: Int[Tensor, " B"],
        plan: SpeculationPlan,
        find_line: Callable[[int], Any],
        candidates: trees.Pool | gpu_trees.Pool,
        beam: Beam,
    ) -> None:
        self._roots, self._plan, self._find_line = roots, plan, find_line
        self._pool, self._beam, self._depth = candidates, beam, 0

    def add(self, chances: Float[Tensor, "B V K"], token_ids: Int[Tensor, "B V K"]) -> Beam | None:
        self._depth += 1
        is_last, line = self._depth == self._plan.depth, self._find_line(self._depth)
        width = 0 if is_last else self._plan.width
        self._beam = self._pool.grow(chances.float(), token_ids, self._beam, width, line, LEVEL_PENALTY)
        return None if is_last else self._beam

    def prune(self) -> Draft:
        return build_draft(*self._pool.prune(self._plan.tree_size, self._roots))


def build_draft(
    token_ids: Int[Tensor, "B N"],
    parents: Int[Tensor, "B N"],
    num_nodes: Int[Tensor, " B"],
    log_chances: Float[Tensor, "B N"],
    scores: Float[Tensor, "B N"],
) -> Draft:
    """What kernels have pruned; see `kernels.trees.Pool.prune`."""
    return Draft(
        token_ids=token_ids,
        parents=parents,
        num_nodes=num_nodes,
        log_chances=log_chances,
        scores=scores,
        counts=tuple(num_nodes.tolist()) if is_host(num_nodes) else None,
    )


class _TensorPool:
    def __init__(self, roots: Int[Tensor, " B"], plan: SpeculationPlan, calibration: Calibration) -> None:
        self._roots, self._plan, self._calibration = roots, plan, calibration
        self._rows = torch.arange(len(roots), device=roots.device)
        self._tokens: list[Tensor] = []  # [B, candidates] of each level
        self._chances: list[Tensor] = []  # their log chance below their parent, as the drafter said it
        self._scores: list[Tensor] = []  # calibrated, from the root
        self._parents: list[Tensor] = []  # place of the parent in the tree
        self._beam: Beam | None = None

    def add(self, chances: Float[Tensor, "B V K"], token_ids: Int[Tensor, "B V K"]) -> Beam | None:
        depth, num_before = len(self._tokens) + 1, sum(level.shape[1] for level in self._tokens)
        above = self._beam
        if above is None:
            places, sums = self._rows.new_zeros(len(self._rows), 1), chances.new_zeros(len(self._rows), 1)
        else:
            places, sums = above.places, above.scores
        self._tokens.append(token_ids.flatten(1))
        self._chances.append(chances.flatten(1))
        self._scores.append((sums[..., None] + self._calibration(chances, depth) - LEVEL_PENALTY).flatten(1))
        self._parents.append(places[..., None].expand(token_ids.shape).flatten(1))
        if depth == self._plan.depth:
            return None
        width = self._tokens[-1].shape[1]
        scores, best = self._scores[-1].topk(min(self._plan.width, width), dim=1)
        parent = best // max(chances.shape[2], 1)
        self._beam = Beam(
            token_ids=self._tokens[-1].gather(1, best),
            above=parent,
            places=1 + num_before + best,
            scores=scores,
            visible=_extend(None if above is None else above.visible, parent, best),
        )
        return self._beam

    def prune(self) -> Draft:
        """Absent candidates, and all below them, score -inf; where they are chosen they fill the end of a row as a
        place of their own, `nowhere`.
        """
        tokens, chances, scores, parents = (
            torch.cat(levels, 1) for levels in (self._tokens, self._chances, self._scores, self._parents)
        )
        nowhere = tokens.shape[1]
        tokens, chances, parents = F.pad(tokens, (0, 1)), F.pad(chances, (0, 1)), F.pad(parents, (0, 1))
        parents[:, nowhere] = nowhere + 1
        best = scores.topk(min(self._plan.tree_size, nowhere), dim=1)
        kept = best.indices.masked_fill(best.values.isneginf(), nowhere)
        count = kept.shape[1]
        place = self._rows.new_zeros(len(self._rows), nowhere + 2)
        place.scatter_(1, kept + 1, torch.arange(1, count + 1, device=place.device).expand_as(kept).contiguous())
        place[:, nowhere + 1] = -1
        roots = Draft.roots(self._roots)
        return Draft(
            token_ids=torch.cat((roots.token_ids, tokens.gather(1, kept)), 1),
            parents=torch.cat((roots.parents, place.gather(1, parents.gather(1, kept))), 1),
            num_nodes=roots.num_nodes + (kept < nowhere).sum(1),
            log_chances=torch.cat((chances.new_zeros(len(self._rows), 1), chances.gather(1, kept)), 1),
            scores=torch.cat((best.values.new_zeros(len(self._rows), 1), best.values), 1),
        )


def _extend(
    visible: Bool[Tensor, "B V E"] | None, above: Int[Tensor, "B W"], beam: Int[Tensor, "B W"]
) -> Bool[Tensor, "B W F"]:
    """Ancestors of the nodes now expanded, among all expanded ones."""
    own = torch.eye(beam.shape[1], dtype=torch.bool, device=beam.device).expand(len(beam), -1, -1)
    if visible is None:
        return own
    return torch.cat((visible.gather(1, above[..., None].expand(-1, -1, visible.shape[2])), own), -1)
