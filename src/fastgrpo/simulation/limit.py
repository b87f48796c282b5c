"""About the most that planning can gain: rollouts that know the fate of every draft before it is verified."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence as ListOf

import numpy as np
from numpy.typing import NDArray

from fastgrpo.lengths import LengthPredictor
from fastgrpo.planner import PlanInputs
from fastgrpo.scheduler import Scheduler
from fastgrpo.simulation.costs import ProfileCosts
from fastgrpo.simulation.replay import Drafted, Replay, Request, Run
from fastgrpo.simulation.trees import OUTSIDE, TreeTables
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

_LEAST_GAINS = (1.0, 1.1, 1.2, 1.4, math.inf)


def find_limit(
    tables: TreeTables,
    requests: ListOf[Request],
    costs: ProfileCosts,
    *,
    plans: ListOf[SpeculationPlan],
    max_num_seqs: int,
    lengths: LengthPredictor | None = None,
) -> Replay:
    """The quickest of some rollouts that know each draft's fate; arguments and errors as for `replay_told`.

    They differ in what drafts must bring at a step: sequences that draft end one by one, and a few of them take more
    for each token than many do. The last never drafts. No proof: all sequences draft one shape, step by step, and
    another order of doing so might be quicker still.
    """
    told = (
        replay_told(
            tables,
            requests,
            costs,
            plans=plans,
            max_num_seqs=max_num_seqs,
            lengths=copy.deepcopy(lengths),
            least_gain=least_gain,
        )
        for least_gain in _LEAST_GAINS
    )
    return min(told, key=lambda each: each.total_s)


def replay_told(
    tables: TreeTables,
    requests: ListOf[Request],
    costs: ProfileCosts,
    *,
    plans: ListOf[SpeculationPlan],
    max_num_seqs: int,
    lengths: LengthPredictor | None = None,
    least_gain: float = 1.0,
) -> Replay:
    """Simulate a rollout that verifies the accepted draft tokens alone, with the shape that gives most at each step.

    It knows what steps take, too, and reading what the drafter has not read costs it nothing. So a planner may come
    near it only where nearly all that it has verified is accepted.

    Args:
        tables, requests, max_num_seqs, lengths: as for `replay`.
        plans: the shapes to choose from, beside plain decoding.
        least_gain: times plain decoding's tokens per second, below which a step drafts nothing.

    Raises:
        ValueError: there is no request, or no slot.
    """
    if not requests:
        raise ValueError("nothing to replay: give at least one request")
    run = _ToldRun(tables, requests, Scheduler(max_num_seqs, lengths), plans)
    costs.begin()
    records = []
    while run.scheduler.has_work:
        records.append(run.step_told(costs, least_gain))
    return Replay(records=records, exact_share=run.num_exact / max(run.num_drafts, 1))


class _ToldRun(Run):
    def __init__(
        self, tables: TreeTables, requests: ListOf[Request], scheduler: Scheduler, plans: ListOf[SpeculationPlan]
    ) -> None:
        super().__init__(tables, requests, scheduler)
        self._plans = (PLAIN, *plans)
        shapes = np.array([(plan.depth, plan.width) for plan in self._plans], dtype=np.float64)
        self._depths, self._widths = shapes.T
        trees = [tables.find(plan) for plan in plans]
        none = np.zeros(tables.facts.num_positions, dtype=np.int64)
        # [plans, P]: draft tokens that the target chooses at each position, and whether the tree is known to be right
        self._accepted = np.stack([none, *((each.places < OUTSIDE).sum(1) for each in trees)])
        self._is_exact = np.stack([none == 0, *(each.is_exact for each in trees)])

    def step_told(self, costs: ProfileCosts, least_gain: float) -> StepRecord:
        num_prefilled = self.admit()
        inputs = self.build_inputs()
        left = self.lengths[self.live] - self.num_emitted[self.live]
        accepted = np.minimum(self._accepted[:, self.rows], left - 1)
        rates = self._predict_rates(accepted.sum(1), inputs, costs)
        best = int(rates.argmax())
        if rates[best] < least_gain * rates[0]:
            best = 0
        if best:
            self.num_drafter_read[self.live] = self._count_cached()
            self.num_drafts += len(self.live)
            self.num_exact += int(self._is_exact[best, self.rows].sum())
        drafted = Drafted(num_verified=accepted[best], num_accepted=accepted[best])
        return self.take(self._plans[best], drafted, self.build_inputs(), num_prefilled, costs)

    def _predict_rates(
        self, num_accepted: NDArray[np.int64], inputs: PlanInputs, costs: ProfileCosts
    ) -> NDArray[np.float64]:
        """Tokens per second of each plan, so many draft tokens verified and accepted of all sequences together."""
        emitted = inputs.num_seqs + num_accepted.astype(np.float64)
        seconds = costs.steps.predict_target_s(emitted, inputs.num_read)
        seconds += costs.steps.predict_draft_s(self._depths, self._widths, inputs.num_seqs)
        seconds += costs.steps.predict_rest_s(self._depths, emitted)
        rates: NDArray[np.float64] = emitted / seconds
        return rates
