"""How likely drafts are accepted, by depth and sibling rank, and what a tree of a given shape yields."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping

from fastgrpo.types import SpeculationPlan, StepRecord

MAX_DEPTH, MAX_WIDTH = 8, 8
GUESS_WEIGHT = 4.0  # trials that a guess counts for

Rates = list[list[float]]  # by depth and sibling rank


class AcceptanceTable:
    """The chance that the target chooses the child of sibling rank r of a walked node at depth d.

    Counts decay, so that the table follows a changing drafter; a weak prior fills what is unknown. A child of the
    root that was asked for and not drafted, as n-grams often have few or none, is a miss: plans are asked for it again.

    Args:
        prior: chance of the first child of the root, before anything was seen; falls by half with each rank.
        prior_weight: trials that the prior counts for.
        window: sequences and steps that counts are remembered for; infinite forgets nothing.
        above: a table of more steps than this one's, whose rates are the prior instead.
        known: rates by depth and rank that were measured before, the prior instead.

    Raises:
        ValueError: a known rate is no number in [0, 1], or no sequence is to be remembered; the message names it.
    """

    def __init__(
        self,
        *,
        prior: float = 0.3,
        prior_weight: float = GUESS_WEIGHT,
        window: float = math.inf,
        above: AcceptanceTable | None = None,
        known: Rates | None = None,
    ) -> None:
        self.prior, self.prior_weight, self.window, self.above = prior, prior_weight, window, above
        self.known = [list(row[:MAX_WIDTH]) for row in (known or [])[:MAX_DEPTH] if len(row)]
        if bad := [rate for row in self.known for rate in row if not 0 <= rate <= 1]:
            raise ValueError(f"acceptance rates must be in [0, 1], got {bad[0]} in {self.known}")
        if not window > 0:
            raise ValueError(f"window must be above 0 sequences, got {window}")
        self.offered = [[0.0] * MAX_WIDTH for _ in range(MAX_DEPTH)]
        self.hits = [[0.0] * MAX_WIDTH for _ in range(MAX_DEPTH)]

    def observe(self, *records: StepRecord) -> None:
        self.fade(max(1 - sum(record.num_seqs for record in records) / self.window, 0.5))
        for record in records:
            drafted = record.offered[0] if record.offered else ()
            for rank in range(min(record.plan.width, record.plan.tree_size, MAX_WIDTH)):
                self.offered[0][rank] += record.num_seqs - (drafted[rank] if rank < len(drafted) else 0)
            for depth, (offered, hits) in enumerate(zip(record.offered, record.hits, strict=True)):
                for rank, (trials, count) in enumerate(zip(offered, hits, strict=True)):
                    if depth < MAX_DEPTH and rank < MAX_WIDTH:
                        self.offered[depth][rank] += trials
                        self.hits[depth][rank] += count

    def fade(self, keep: float, *, least: float = 0.0) -> None:
        """Weigh down what was counted so far, of each level to so many trials of its first child at least."""
        for offered, hits in zip(self.offered, self.hits, strict=True):
            if not offered[0]:
                continue
            share = min(max(keep, least / max(offered[0], 1.0)), 1.0)
            offered[:] = [count * share for count in offered]
            hits[:] = [count * share for count in hits]

    def state_dict(self) -> dict[str, list[list[float]]]:
        return {name: [list(row) for row in getattr(self, name)] for name in ("offered", "hits")}

    def restore(self, state: Mapping[str, list[list[float]]]) -> None:
        """Go on with the counts that `state_dict` described."""
        self.offered, self.hits = ([list(row) for row in state[name]] for name in ("offered", "hits"))

    @property
    def explored_depth(self) -> int:
        """Levels from the root whose rates rest on trials, of this table or before it, more than on a guess."""
        trials = [row[0] for row in self.offered]
        own = next((depth for depth, count in enumerate(trials) if count < 2 * GUESS_WEIGHT), MAX_DEPTH)
        return max(own, len(self.known))

    def compute_rates(self) -> Rates:
        """Acceptance rates in [0, 1] by depth and rank.

        The prior is the table above, or what is known; else that of a depth is the level above, of a rank a fall by
        half.
        """
        weight, rates = self.prior_weight, []
        priors = [] if self.above is None else self.above.compute_rates()
        priors = priors or [_complete(row) for row in self.known]
        prior = [self.prior * 0.5**rank for rank in range(MAX_WIDTH)]
        for depth in range(MAX_DEPTH):
            given = priors[depth] if depth < len(priors) else prior
            counts = zip(self.hits[depth], self.offered[depth], given, strict=True)
            prior = [(hits + weight * expected) / (offered + weight) for hits, offered, expected in counts]
            rates.append(prior)
        return rates


def _complete(rates: list[float]) -> list[float]:
    """Of all ranks: those not known fall by half."""
    missing = MAX_WIDTH - len(rates)
    return [*rates, *(rates[-1] * 0.5**rank for rank in range(1, missing + 1))]


def compute_expected_length(plan: SpeculationPlan, rates: Rates, num_draft_tokens: int | None = None) -> float:
    """Expected tokens per sequence and forward: one, plus the best `num_draft_tokens` path chances of the tree.

    Args:
        num_draft_tokens: None takes those of the plan.
    """
    best = _list_best_nodes(rates, plan.width, plan.depth)
    most = plan.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
    return 1 + sum(itertools.islice(best, most))


def _list_best_nodes(rates: Rates, width: int, depth: int) -> Iterator[float]:
    """Path chances of the nodes of a tree, the best first, so that none stands before its parent."""
    levels = [sorted(row[:width], reverse=True) for row in rates[:depth]]
    heap = [(-levels[0][0], 1, 0, 1.0)] if levels and width else []  # negative chance, depth, place, chance above
    while heap:
        negative, level, place, above = heapq.heappop(heap)
        yield -negative
        if place + 1 < len(levels[level - 1]):
            heapq.heappush(heap, (-above * levels[level - 1][place + 1], level, place + 1, above))
        if level < len(levels):
            heapq.heappush(heap, (negative * levels[level][0], level + 1, 0, -negative))
