"""What a step of a plan takes, what it emits, and so how many tokens per second: from what was measured so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgrpo.planner.costs import StepCosts, Vector
from fastgrpo.planner.expectation import Expectation
from fastgrpo.planner.planner import PlanInputs
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

_LASTING_STEPS = 32  # that drafts are expected to last once they are switched on, while nobody waits
PROMISING = 0.5  # of the best rate: plans that cannot come so near are not looked at


class PlanRates(dict[SpeculationPlan, float]):
    """Tokens per second by plan; 0 of those that are left out, which are out of the question."""

    def __missing__(self, plan: SpeculationPlan) -> float:
        return 0.0


class Predictor:
    """Costs and acceptance, joined.

    Args:
        grid: plans whose rates are predicted together.

    Attributes:
        costs, expectation: whoever learns changes them; predictions follow.
    """

    def __init__(self, costs: StepCosts, expectation: Expectation, grid: Sequence[SpeculationPlan]) -> None:
        self.costs, self.expectation, self.grid = costs, expectation, tuple(grid)
        self._depths, self._widths, self._nodes = _list_shapes((PLAIN, *grid))
        self._needed_depths = np.array([0, *(_find_needed_depth(plan, grid) for plan in grid)], dtype=np.float64)
        # in tables that begin with depth 0 and width 1
        self._places = self._depths.astype(int), np.maximum(self._widths.astype(int) - 1, 0)

    def predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Seconds of a step with this plan, what the drafter has not read left out."""
        length = self.expectation.predict_length(plan, inputs.num_seqs)
        return float(self._predict_steps_s(plan.depth, plan.width, plan.num_draft_tokens, length, inputs))

    def predict_emitting_s(self, record: StepRecord) -> float:
        """Seconds of a step like this one, of which is known how many tokens it emitted."""
        plan, inputs = record.plan, PlanInputs(num_seqs=record.num_seqs, num_read=record.num_read)
        shape = (plan.depth, plan.width, plan.num_draft_tokens)
        return float(self._predict_steps_s(*shape, record.acceptance_length, inputs))

    def predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Tokens per second; the price of switching on is spread over the steps that drafts are expected to last."""
        seconds = self.predict_step_s(plan, inputs)
        if not plan.is_plain:
            seconds += self._predict_reading_s(inputs)
        return inputs.num_seqs * self.expectation.predict_length(plan, inputs.num_seqs) / seconds

    def predict_rates(self, inputs: PlanInputs, room: int) -> PlanRates:
        """`predict_rate` of plain decoding and of the grid's plans.

        Left out are those that do not fit, that go deeper than what was explored leads to, or that cannot be worth a
        trial beside the best.

        Args:
            room: draft tokens of each sequence at most.
        """
        batch = inputs.num_seqs
        bounds = self.expectation.bound_lengths(batch)[self._places]
        seconds = self._predict_steps_s(self._depths, self._widths, self._nodes, bounds, inputs)
        rates = PlanRates({PLAIN: batch / float(seconds[0])})
        seconds += self._predict_reading_s(inputs)
        is_open = (room >= self._nodes) & (self.expectation.explored_depth >= self._needed_depths)
        most = np.where(is_open, batch * bounds / seconds, 0.0)[1:]
        best, sample_s = 0.0, self.costs.sample_s
        for index in most.argsort()[::-1].tolist():
            if most[index] <= PROMISING * best:
                break
            plan = self.grid[index]
            length = self.expectation.predict_length(plan, batch)
            spared_s = batch * (float(bounds[1 + index]) - length) * sample_s
            rates[plan] = rate = batch * length / (float(seconds[1 + index]) - spared_s)
            best = max(best, rate)
        return rates

    def _predict_steps_s(
        self, depths: Vector | float, widths: Vector | float, nodes: Vector | float, lengths: Vector | float,
        inputs: PlanInputs,
    ) -> Vector:  # fmt: skip
        batch, costs = inputs.num_seqs, self.costs
        seconds = costs.predict_target_s(batch * (1 + nodes), inputs.num_read)
        return seconds + costs.predict_draft_s(depths, widths, batch) + costs.predict_rest_s(depths, batch * lengths)

    def _predict_reading_s(self, inputs: PlanInputs) -> float:
        """The price of switching on, of each step that drafts are expected to last: the longer, the more still wait."""
        num_steps = _LASTING_STEPS * (1 + inputs.num_waiting / inputs.num_seqs)
        return self.costs.predict_reading_s(inputs.num_unread, inputs.num_seqs) / num_steps


def _list_shapes(plans: Sequence[SpeculationPlan]) -> tuple[Vector, Vector, Vector]:
    """Depths, widths and draft tokens, as `StepCosts` prices them."""
    depths, widths, nodes = np.array([(p.depth, p.width, p.num_draft_tokens) for p in plans], dtype=np.float64).T
    return depths, widths, nodes


def _find_needed_depth(plan: SpeculationPlan, grid: Sequence[SpeculationPlan]) -> int:
    """Levels that must have been tried before: all but the plan's last, or those of the next shallower one."""
    shallower = (each.depth for each in grid if each.width == plan.width and each.depth < plan.depth)
    return min(plan.depth - 1, max(shallower, default=plan.depth))
