"""N-grams over the sequence itself and the finished and running siblings of its group.

The continuations counted behind the longest known suffix act as the draft distribution, so they are
ranked like any other draft: log count + the noise of their position (siblings of a group share
tokens, not noise). Tables live for one rollout.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.sampling import gumbel_noise_at
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan

_MAX_ORDER = 4  # longest context, tokens
_MIN_ORDER = 2  # a single token predicts too little to pay for its verification
_MAX_CHILDREN = 16  # continuations looked at for a node

_Table = dict[tuple[int, ...], Counter[int]]


@dataclass(frozen=True, kw_only=True)
class _Node:
    token_id: int
    parent: int
    depth: int
    score: float  # log of the estimated chance that the target walks here


class NgramDrafter:
    """Longest-suffix n-gram drafter; needs no training and no features."""

    name = "ngram"
    wants_features = False

    def __init__(self) -> None:
        self._tables: dict[tuple[int, ...], _Table] = {}

    def begin(self) -> None:
        self._tables.clear()

    def count_unread(self, lengths: list[int]) -> int:
        return 0

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        tokens = sequence.all_token_ids
        table = self._tables.get(sequence.group_key)
        if table is None:
            table = self._tables[sequence.group_key] = defaultdict(Counter)
            num_new_tokens = len(tokens)
        for end in range(len(tokens) - num_new_tokens, len(tokens)):
            for order in range(_MIN_ORDER, _MAX_ORDER + 1):
                if end >= order:
                    table[tuple(tokens[end - order : end])][tokens[end]] += 1

    def release(self, slot: int, last_slot: int) -> None:
        pass  # a finished sibling goes on predicting for its group

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        trees = [self._grow(sequence, plan) for sequence in context.sequences]
        width = max(len(tree) for tree in trees)
        device = context.pending_token_ids.device
        return Draft(
            token_ids=torch.tensor(
                [[n.token_id for n in tree] + [0] * (width - len(tree)) for tree in trees], device=device
            ),
            parents=torch.tensor(
                [[n.parent for n in tree] + [-1] * (width - len(tree)) for tree in trees], device=device
            ),
            num_nodes=torch.tensor([len(tree) for tree in trees], device=device),
        )

    def _grow(self, sequence: Sequence, plan: SpeculationPlan) -> list[_Node]:
        """Level by level, the best `width` nodes of a level expanded, the best nodes overall kept."""
        table = self._tables.get(sequence.group_key, {})
        root = _Node(token_id=sequence.pending_token_id, parent=-1, depth=0, score=0.0)
        suffixes = {0: tuple(sequence.all_token_ids[-_MAX_ORDER:])}
        pool, frontier = [root], [0]
        for depth in range(1, plan.depth + 1):
            level = []
            for parent in frontier:
                for token_id, score in self._children(table, suffixes[parent], sequence, depth, plan.width):
                    suffixes[len(pool)] = (*suffixes[parent], token_id)[-_MAX_ORDER:]
                    level.append(len(pool))
                    node = _Node(token_id=token_id, parent=parent, depth=depth, score=pool[parent].score + score)
                    pool.append(node)
            frontier = sorted(level, key=lambda index: -pool[index].score)[: plan.width]
        best = sorted(range(1, len(pool)), key=lambda index: (-pool[index].score, index))
        kept = [0, *sorted(best[: plan.num_draft_tokens])]
        place = {old: new for new, old in enumerate(kept)}
        return [
            _Node(token_id=n.token_id, parent=place.get(n.parent, -1), depth=n.depth, score=n.score)
            for n in (pool[index] for index in kept)
        ]

    def _children(
        self, table: _Table, suffix: tuple[int, ...], sequence: Sequence, depth: int, width: int
    ) -> list[tuple[int, float]]:
        """(token, log chance) of the most promising continuations, best first."""
        counts = next(
            (table[suffix[-order:]] for order in range(len(suffix), _MIN_ORDER - 1, -1) if suffix[-order:] in table),
            None,
        )
        if not counts:
            return []
        position = len(sequence.token_ids) + depth - 1
        is_noisy = sequence.params.temperature > 0
        noisy = []
        for token_id, count in counts.most_common(_MAX_CHILDREN):
            noise = gumbel_noise_at(sequence.stream_key, position, token_id) if is_noisy else 0.0
            noisy.append((math.log(count) + noise, token_id))
        noisy.sort(reverse=True)
        total = math.log(sum(math.exp(value - noisy[0][0]) for value, _ in noisy) + 1.0) + noisy[0][0]
        return [(token_id, value - total) for value, token_id in noisy[:width]]
