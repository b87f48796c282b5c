"""How many of the likeliest draft tokens, over all sequences, are worth verifying."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastgrpo.planner.planner import Chances, PlanInputs
from fastgrpo.planner.predictor import PlanRates, Predictor
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

_LEAST_WORTH = 1e-6  # of a drafted token, where nothing was accepted of what was promised
_MOST_SPARED = 8  # drafts in a row of which nothing is verified, before one is
_PRIOR_PROMISED, _KEEP_PROMISED = 8.0, 0.98  # draft tokens; of what was counted, at each step that drafts


class SharedBudget:
    """Draft tokens are worth their time while what they promise exceeds what that time brings otherwise.

    Otherwise: at the better of two rates, the plan's and plain decoding's. What chances promise is weighed by what was
    accepted of what they promised before. What is never verified keeps no promise and breaks none: after some drafts in
    a row of which nothing is, one is.

    Args:
        predictor: says what forwards take.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._promised, self._accepted = _PRIOR_PROMISED, _PRIOR_PROMISED  # draft tokens
        self._num_spared = 0  # drafts in a row of which nothing was verified
        self._rates = 0, PlanRates()  # as the last decision saw them, with so many live
        self._prices: dict[tuple[SpeculationPlan, int], list[float]] = {}  # tokens that so many drafts cost, until then

    @property
    def trust(self) -> float:
        """Draft tokens accepted of each one that was promised."""
        return self._accepted / self._promised

    def begin(self, num_seqs: int, rates: PlanRates) -> None:
        """A decision was made on these rates: prices are those of the steps that follow."""
        self._rates = (num_seqs, rates)
        self.forget_prices()

    def forget_prices(self) -> None:
        self._prices.clear()

    @property
    def is_due(self) -> bool:
        """Whether nothing was verified for so long that a draft is, whatever it promises."""
        return self._num_spared >= _MOST_SPARED

    def count(self, record: StepRecord) -> None:
        """A step of the plan that was decided on, no trial, was taken."""
        if record.offered:
            self._num_spared = 0 if record.num_tokens > record.num_seqs else self._num_spared + 1

    def observe(self, records: Iterable[StepRecord]) -> None:
        """Compare what was promised with what was accepted.

        Where nothing was verified what was counted before fades, to the weight that it began with.
        """
        for record in records:
            is_counted = 0 < record.num_promised < math.inf  # a head's broken weights promise no numbers
            if is_counted or (record.num_tokens == record.num_seqs and self._promised > _PRIOR_PROMISED):
                self._promised *= _KEEP_PROMISED
                self._accepted *= _KEEP_PROMISED
            if is_counted:
                self._promised += record.num_promised
                self._accepted += record.num_emitted - record.num_seqs

    def choose(self, plan: SpeculationPlan, inputs: PlanInputs, chances: Chances, most: int) -> int:
        """How many of the likeliest are verified, up to `most`."""
        worth = itertools.accumulate(chances[:most], initial=0.0)
        prices = self._find_prices(plan, inputs, most)
        gains = list(map(operator.sub, worth, prices))  # a step's few: NumPy begins slower
        return gains.index(max(gains))

    def _find_prices(self, plan: SpeculationPlan, inputs: PlanInputs, most: int) -> list[float]:
        """What verifying 0, 1, 2, ..., at least `most` draft tokens costs, in promised ones; the same until the next
        decision.
        """
        key = (plan, inputs.num_seqs)
        if len(self._prices.get(key, ())) <= most:
            num_seqs, rates = self._rates
            if num_seqs != inputs.num_seqs or plan not in rates:
                rates = PlanRates({each: self._predictor.predict_rate(each, inputs) for each in (plan, PLAIN)})
            rate, costs = max(rates[plan], rates[PLAIN]), self._predictor.costs
            worth = max(self.trust * (1 - rate * costs.sample_s), _LEAST_WORTH)  # of a token that is surely accepted
            num_tokens = np.arange(float(inputs.num_seqs), inputs.num_seqs + 1.0 + 2 * most)
            times_s = costs.predict_target_s(num_tokens, inputs.num_read)
            self._prices[key] = (rate / worth * times_s).tolist()
        return self._prices[key]

    def state_dict(self) -> dict[str, Any]:
        return {"promised": self._promised, "accepted": self._accepted, "num_spared": self._num_spared}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` described."""
        if 0 < state["promised"] < math.inf:  # an older state's may be no number
            self._promised, self._accepted = float(state["promised"]), float(state["accepted"])
        self._num_spared = int(state.get("num_spared", 0))  # older states have none
