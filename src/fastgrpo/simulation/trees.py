"""From recorded trees to those that a smaller plan would have drafted at the same positions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastgrpo.simulation.facts import NO_PARENT, Facts
from fastgrpo.types import SpeculationPlan

OUTSIDE = np.iinfo(np.int16).max  # place of a node that the smaller tree does not have


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanTrees:
    """The trees of one plan at all P positions, best node first; D is the plan's depth, n its `tree_size`.

    Args:
        num_nodes: int [P], draft nodes. Where the recorded tree was cut, nodes that it lacks count: they would have
            been drafted, but whether the target chooses them is not known, so they are never accepted.
        chances: float [P, n], of being accepted, falling; 0 where a node is absent or was not recorded.
        places: int16 [P, D], place from 1 on of the node that the target walks to at each depth, or `OUTSIDE`.
        num_children: uint8 [P, D], children in the tree of the walked node of depth 0, 1, ...; 0 where the target's
            choice after it was not recorded.
        ranks: int8 [P, D], sibling rank of the child that the target chooses, or -1.
        is_exact: bool [P], True where the plan's own tree is known to be this one, so that nothing is approximated.
    """

    num_nodes: NDArray[np.int64]
    chances: NDArray[np.float32]
    places: NDArray[np.int16]
    num_children: NDArray[np.uint8]
    ranks: NDArray[np.int8]
    is_exact: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TreeTables:
    """The trees of every plan that was asked for, each cut out once."""

    facts: Facts
    _known: dict[tuple[int, int, int], PlanTrees] = field(default_factory=dict)

    def find(self, plan: SpeculationPlan) -> PlanTrees:
        key = (plan.depth, plan.width, plan.tree_size)
        if key not in self._known:
            self._known[key] = restrict_trees(self.facts, plan)
        return self._known[key]


def restrict_trees(facts: Facts, plan: SpeculationPlan) -> PlanTrees:
    """Cut a plan's trees out of the recorded ones, as `drafters.beams` would have grown them.

    A node takes part if it is no deeper than `depth`, is among the best `width` of its siblings, and its parent is
    among the best `width` of those that take part on its level; the best `tree_size` of all such nodes are the tree.
    """
    order, is_risky = _order_nodes(facts, plan)
    kept = (order > 0) & (order <= plan.tree_size)
    num_kept = kept.sum(1)
    most = min(plan.width + (plan.depth - 1) * plan.width**2, plan.tree_size)
    num_nodes = np.where(facts.is_full, most, num_kept)
    is_whole = ~facts.is_full | (num_kept == most)
    is_smaller = plan.depth <= facts.plan.depth and plan.width <= facts.plan.width
    places, num_children, ranks = _follow_paths(facts, order, kept, plan.depth)
    return PlanTrees(
        num_nodes=num_nodes,
        chances=_collect_chances(facts, order, kept, plan.tree_size),
        places=places,
        num_children=num_children,
        ranks=ranks,
        is_exact=is_whole & ~np.any(is_risky & (order < plan.tree_size), axis=1) & is_smaller,
    )


def _order_nodes(facts: Facts, plan: SpeculationPlan) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """[P, N] place from 1 on among the nodes that take part (0: none), and whether children of it may be missing.

    The smaller plan may expand a node that the recorded draft, which had better ones on the level, did not.
    """
    shapes, rows = facts.shapes, np.arange(facts.num_positions)
    order = np.zeros(facts.parents.shape, dtype=np.int16)
    is_expanded = np.zeros(facts.parents.shape, dtype=np.bool_)
    is_expanded[:, 0] = True
    num_on_level = np.zeros((facts.num_positions, plan.depth + 1), dtype=np.int16)
    count = np.zeros(facts.num_positions, dtype=np.int16)
    for node in range(1, facts.parents.shape[1]):
        parents, depths = facts.parents[:, node], shapes.depths[:, node]
        takes_part = (parents != NO_PARENT) & (depths <= plan.depth) & (shapes.ranks[:, node] < plan.width)
        takes_part &= is_expanded[rows, np.where(takes_part, parents, 0)]
        level = np.minimum(depths, plan.depth)
        is_expanded[:, node] = takes_part & (num_on_level[rows, level] < plan.width)
        num_on_level[rows, level] += takes_part
        count += takes_part
        order[:, node] = np.where(takes_part, count, 0)
    was_expanded = (shapes.places < facts.plan.width) & (shapes.depths < facts.plan.depth)
    is_risky = is_expanded & (shapes.depths < plan.depth) & ~was_expanded
    return order, is_risky


def _collect_chances(
    facts: Facts, order: NDArray[np.int16], kept: NDArray[np.bool_], tree_size: int
) -> NDArray[np.float32]:
    chances = np.zeros((facts.num_positions, tree_size), dtype=np.float32)
    rows, nodes = np.nonzero(kept)
    chances[rows, order[rows, nodes] - 1] = np.exp(facts.scores[rows, nodes].astype(np.float32))
    return chances


def _follow_paths(
    facts: Facts, order: NDArray[np.int16], kept: NDArray[np.bool_], depth: int
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.int8]]:
    """`places`, `num_children` and `ranks` of `PlanTrees`."""
    rows = np.arange(facts.num_positions)
    num_children = np.zeros(facts.parents.shape, dtype=np.uint8)
    for node in range(1, facts.parents.shape[1]):
        num_children[rows, np.where(kept[:, node], facts.parents[:, node], 0)] += kept[:, node]
    places = np.full((facts.num_positions, depth), OUTSIDE, dtype=np.int16)
    ranks = np.full((facts.num_positions, depth), -1, dtype=np.int8)
    offered = np.zeros((facts.num_positions, depth), dtype=np.uint8)
    walked, is_inside = np.zeros(facts.num_positions, dtype=np.int64), np.ones(facts.num_positions, dtype=np.bool_)
    for level in range(min(depth, facts.plan.depth)):
        offered[:, level] = np.where(is_inside & (facts.num_known > level), num_children[rows, walked], 0)
        is_inside = is_inside & (facts.path[:, level] >= 0)
        walked = np.where(is_inside, facts.path[:, level], 0)
        is_inside &= kept[rows, walked]
        places[:, level] = np.where(is_inside, order[rows, walked], OUTSIDE)
        ranks[:, level] = np.where(is_inside, facts.shapes.ranks[rows, walked], -1)
    return places, offered, ranks
