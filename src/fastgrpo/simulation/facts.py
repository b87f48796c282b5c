"""What was recorded of a rollout: the draft tree at every position of every completion, and what the target chose.

Axis letters: C completions, P positions (the tokens of all completions, one after another), N nodes of a recorded
tree (root is 0), D levels of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.types import SpeculationPlan

NO_PARENT = 255  # of the root and of unused nodes
MAX_NODES = 254  # draft nodes of a tree: a parent's index is one byte
_MOST_SCORE = 1e-3  # a log chance of 0, rounded
RECORD_AGAIN = "record again with fastgrpo bench simulate --record"


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """Outcomes of drafting at any position, whatever plan led there: a draft depends on its sequence alone.

    Args:
        plan: of the recorded trees, equal trees for all.
        parents: uint8 [P, N], index of the parent, nodes best first; `NO_PARENT` for the root and for unused nodes.
        scores: float [P, N], calibrated log chance of the path to each node; 0 for the root, -inf where unused.
        path: int16 [P, D], node that the target's choices walk to at depth 1, 2, ...; -1 past the end.
        lengths: int [C], tokens of each completion.
        prompt_lens: int [C], tokens of its prompt.
        groups: int [C], completions of one number are of one prompt.
        is_stopped: bool [C], whether a stop token ended it; otherwise its limit did.
        num_ahead: int [C], target's choices known beyond the end; walks go no further.
        most_prompt_tokens: last tokens of a prompt that the drafter reads, up to a block more; None reads all.
        about: where the facts come from, for people and for a repetition: plain JSON.

    Raises:
        ValueError: shapes, order of nodes or paths contradict each other; says which.
    """

    plan: SpeculationPlan
    parents: NDArray[np.uint8]
    scores: NDArray[np.floating]
    path: NDArray[np.int16]
    lengths: NDArray[np.integer]
    prompt_lens: NDArray[np.integer]
    groups: NDArray[np.integer]
    is_stopped: NDArray[np.bool_]
    num_ahead: NDArray[np.integer]
    most_prompt_tokens: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_trees()

    def _check_shapes(self) -> None:
        if self.plan.is_plain or self.plan.num_draft_tokens > MAX_NODES:
            raise ValueError(f"recorded trees have 1 to {MAX_NODES} draft nodes, got {self.plan}")
        num_positions, num_nodes = int(np.sum(self.lengths)), 1 + self.plan.num_draft_tokens
        expected = {
            "parents": (num_positions, num_nodes),
            "scores": (num_positions, num_nodes),
            "path": (num_positions, self.plan.depth),
            **dict.fromkeys(("lengths", "prompt_lens", "groups", "is_stopped", "num_ahead"), (len(self.lengths),)),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")
        if self.most_prompt_tokens is not None and self.most_prompt_tokens < 0:
            raise ValueError(f"most_prompt_tokens must be at least 0 or None, got {self.most_prompt_tokens}")
        if len(self.lengths) == 0 or np.min(self.lengths) < 1 or np.min(self.prompt_lens) < 1:
            raise ValueError("facts need a completion, and each completion and prompt at least one token")

    def _check_trees(self) -> None:
        order = np.arange(self.parents.shape[1])
        is_used = self.parents != NO_PARENT
        if np.any(is_used & (self.parents >= order)) or np.any(is_used[:, 0]):
            raise ValueError("a node stands before its parent")
        if np.any(is_used[:, 2:] & ~is_used[:, 1:-1]):
            raise ValueError("an unused node stands before a used one")
        if np.any(self.path < -1) or np.any(self.path >= len(order)):
            raise ValueError(f"a path leaves its tree of {len(order)} nodes")
        above = np.concatenate((np.zeros_like(self.path[:, :1]), self.path[:, :-1]), axis=1)
        is_walked = self.path >= 0
        parents = np.take_along_axis(self.parents, np.maximum(self.path, 0).astype(np.int64), axis=1)
        if np.any(is_walked & (parents != above)):
            raise ValueError("a path does not go from parent to child")
        if np.any(is_walked & (np.arange(self.plan.depth) >= self.num_known[:, None])):
            raise ValueError("a path goes on where the target's choices are not known")
        if np.any(np.isnan(self.scores)) or np.any(is_used & (self.scores > _MOST_SCORE)):
            raise ValueError("scores must be log chances, 0 at most; got others")

    @property
    def num_completions(self) -> int:
        return len(self.lengths)

    @property
    def num_positions(self) -> int:
        return len(self.parents)

    def count_skipped(self, prompt_len: int) -> int:
        """Tokens at the beginning of such a prompt that the drafter never reads, whole blocks of them."""
        if self.most_prompt_tokens is None:
            return 0
        return max(prompt_len - self.most_prompt_tokens, 0) // BLOCK_SIZE * BLOCK_SIZE

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[C] position of each completion's first token."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @cached_property
    def num_known(self) -> NDArray[np.int64]:
        """[P] target's choices that were recorded from each position on, at most D."""
        known = [
            np.minimum(length + ahead - np.arange(length), self.plan.depth)
            for length, ahead in zip(self.lengths, self.num_ahead, strict=True)
        ]
        return np.concatenate(known).astype(np.int64)

    @cached_property
    def is_full(self) -> NDArray[np.bool_]:
        """[P] True where the tree has as many nodes as were recorded at most, so that there may have been more."""
        full: NDArray[np.bool_] = self.parents[:, -1] != NO_PARENT
        return full

    @cached_property
    def shapes(self) -> NodeShapes:
        return _find_shapes(self.parents)


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeShapes:
    """Where each node stands in its tree; all uint8 [P, N], 0 for the root and for unused nodes.

    Args:
        depths: distance from the root.
        ranks: better siblings.
        places: better nodes of the same depth.
    """

    depths: NDArray[np.uint8]
    ranks: NDArray[np.uint8]
    places: NDArray[np.uint8]


def _find_shapes(parents: NDArray[np.uint8]) -> NodeShapes:
    num_positions, num_nodes = parents.shape
    rows = np.arange(num_positions)
    depths, ranks, places = (np.zeros(parents.shape, dtype=np.uint8) for _ in range(3))
    num_children, num_level = np.zeros_like(depths), np.zeros((num_positions, num_nodes + 1), dtype=np.uint8)
    for node in range(1, num_nodes):
        is_used = parents[:, node] != NO_PARENT
        parent = np.where(is_used, parents[:, node], 0)
        depths[:, node] = np.where(is_used, depths[rows, parent] + 1, 0)
        ranks[:, node] = np.where(is_used, num_children[rows, parent], 0)
        places[:, node] = np.where(is_used, num_level[rows, depths[:, node]], 0)
        num_children[rows, parent] += is_used
        num_level[rows, depths[:, node]] += is_used
    return NodeShapes(depths=depths, ranks=ranks, places=places)
