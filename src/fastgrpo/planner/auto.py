"""The plan with the most expected tokens per second, from what was measured."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastgrpo.planner.acceptance import AcceptanceTable, compute_expected_length
from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

_GRID = tuple(
    SpeculationPlan(depth=d, width=w, num_draft_tokens=n)
    for d, w, n in (
        *((1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (2, 2, 3), (2, 2, 4), (2, 3, 6), (3, 1, 3), (3, 2, 6)),
        *((3, 3, 8), (3, 4, 12), (4, 2, 8), (4, 4, 16), (5, 4, 16), (5, 4, 24), (6, 4, 24), (6, 8, 32), (8, 8, 48)),
    )
)


_PRIOR_PROMISED, _KEEP_PROMISED = 8.0, 0.98  # draft tokens; of what was counted, at each step


class _Ratio:
    """A running ratio of measured to predicted, robust to outliers by clipping each step."""

    def __init__(self, value: float = 1.0, rate: float = 0.1) -> None:
        self.value, self.rate = value, rate

    def observe(self, measured: float, predicted: float) -> None:
        """`predicted` is what this ratio was already applied to."""
        ratio = min(max(measured / predicted, 0.5), 2.0)
        self.value = min(max(self.value * ratio**self.rate, 0.1), 10.0)


class AutoPlanner(Planner):
    """Takes the plan with the most expected tokens per second, and keeps learning whether that is true.

    A plan must promise `margin` more than plain decoding. Every real step corrects the costs: the time of
    its forward corrects the table near its number of tokens (plain steps, as sequences finish, visit what
    trees would cost), the times of drafting and sampling their own ratios; so a wrong or stale profile
    heals. Acceptance is corrected likewise, and a tree goes at most one level deeper than what was tried.
    Where plain decoding is chosen although speculation is near to paying, a cheap trial step is made after a
    wait that doubles each time, so that what a bad drafter can cost stays bounded.
    """

    name = "auto"

    def __init__(
        self,
        profile: HardwareProfile,
        *,
        margin: float = 1.03,
        max_num_tokens: int | None = None,
        trial_wait: int = 32,
        max_trial_wait: int = 512,
        trial_floor: float = 0.85,
    ) -> None:
        self.profile = profile
        self.margin = margin
        self.max_num_tokens = max_num_tokens or profile.num_tokens[-1]  # beyond, costs are guessed
        self.acceptance = AcceptanceTable()
        self.trial_wait, self.max_trial_wait, self.trial_floor = trial_wait, max_trial_wait, trial_floor
        self._wait = trial_wait
        self._plain_steps = trial_wait  # the first trial may come at once
        self._draft_cost = _Ratio()
        self._sample_cost = _Ratio()
        self._length = _Ratio(rate=0.05)
        self._promised, self._accepted = _PRIOR_PROMISED, _PRIOR_PROMISED  # draft tokens, of shared budgets
        self._expected: dict[SpeculationPlan, float] = {}
        self._age = 0
        self._current = PLAIN

    def predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Seconds of a step with this plan."""
        batch, profile = inputs.num_seqs, self.profile
        emitted = batch * self._predict_length(plan)
        seconds = profile.fixed_s + profile.sample_s * emitted * self._sample_cost.value
        seconds += profile.compute_target_s(batch * (1 + plan.num_draft_tokens), inputs.num_read)
        return seconds + self._predict_draft_s(plan, batch) * self._draft_cost.value

    def _predict_draft_s(self, plan: SpeculationPlan, batch: int) -> float:
        if plan.is_plain:
            return 0.0
        if self.profile.is_one_pass:  # what it reads beside is not run through its layers
            return self.profile.compute_draft_s(batch * plan.depth)
        reading = self.profile.compute_draft_s(batch * self._predict_length(plan))
        return reading + (plan.depth - 1) * self.profile.compute_draft_s(batch * plan.width)

    def _predict_length(self, plan: SpeculationPlan) -> float:
        if plan.is_plain:
            return 1.0
        if plan not in self._expected:
            self._expected[plan] = compute_expected_length(plan, self.acceptance.compute_rates())
        return 1 + (self._expected[plan] - 1) * self._length.value

    def _predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Tokens per second; the price of switching on is spread over the steps until it is asked again.

        A one-pass drafter projects what it has not read to keys and values and runs no layer on it: no price is put
        on that.
        """
        seconds = self.predict_step_s(plan, inputs)
        if not plan.is_plain and self._current.is_plain and not self.profile.is_one_pass:
            seconds += self._draft_cost.value * self.profile.compute_draft_s(inputs.num_unread) / self.trial_wait
        return inputs.num_seqs * self._predict_length(plan) / seconds

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        room, deepest = self.max_num_tokens // inputs.num_seqs, self.acceptance.explored_depth + 1
        fitting = [p for p in _GRID if 1 + p.num_draft_tokens <= room and p.depth <= deepest]
        plain_rate = self._predict_rate(PLAIN, inputs)
        rates = {p: self._predict_rate(p, inputs) for p in fitting}
        best = max(rates, key=rates.__getitem__, default=PLAIN)
        if best.is_plain:
            chosen = PLAIN
        elif rates[best] > self.margin * plain_rate:
            keep = self._current in rates and rates[self._current] * self.margin > rates[best]
            chosen = self._current if keep else best
        else:
            chosen = self._trial(rates, plain_rate)
        self._plain_steps = self._plain_steps + 1 if chosen.is_plain else 0
        self._current = chosen
        return chosen

    def choose_budget(self, plan: SpeculationPlan, inputs: PlanInputs, chances: Sequence[float]) -> int:
        """The draft tokens worth their time: what they promise, less what that time brings at the better of two rates.

        These are the rates of this plan and of plain decoding.

        Between two points of the profile a token's time is the same, so that the best number is one of these points
        or where a chance falls below that time's worth.
        """
        batch, profile = inputs.num_seqs, self.profile
        most = max(min(len(chances), self.max_num_tokens - batch), 0)
        rate = max(self._predict_rate(plan, inputs), self._predict_rate(PLAIN, inputs))
        trust = self._accepted / self._promised
        worth = trust * (1 - rate * profile.sample_s * self._sample_cost.value)  # of a token that is surely accepted
        knots = [0, *(n - batch for n in profile.num_tokens if 0 < n - batch < most), most]
        times = [profile.compute_target_s(batch + n, inputs.num_read) for n in knots]
        choices = set(knots)
        for (left, right), (start_s, end_s) in zip(itertools.pairwise(knots), itertools.pairwise(times), strict=True):
            price = rate * (end_s - start_s) / max(right - left, 1)
            paying = bisect.bisect_left(chances, -price / worth, key=operator.neg) if worth > 0 else 0
            choices.add(min(max(paying, left), right))
        gains = [0.0, *itertools.accumulate(chances)]
        return max(
            sorted(choices),
            key=lambda n: worth * gains[n] - rate * profile.compute_target_s(batch + n, inputs.num_read),
        )

    def _trial(self, rates: dict[SpeculationPlan, float], plain_rate: float) -> SpeculationPlan:
        """Plain decoding, but for a cheap trial once in a while where speculation is near to paying."""
        cheapest = min(rates, key=lambda p: (p.num_draft_tokens, -rates[p]))
        if self._plain_steps < self._wait or rates[cheapest] < self.trial_floor * plain_rate:
            return PLAIN
        self._wait = min(2 * self._wait, self.max_trial_wait)
        return cheapest

    def observe(self, record: StepRecord) -> None:
        plan = record.plan
        self.profile = self.profile.corrected(record.num_tokens, record.target_s, num_read=record.num_read)
        if self.profile.sample_s:
            predicted_s = self.profile.sample_s * record.num_emitted * self._sample_cost.value
            self._sample_cost.observe(record.verify_s, predicted_s)
        if plan.is_plain or not record.offered:
            return  # nothing was drafted, so neither the cost nor the acceptance of a draft was seen
        predicted_s = self._predict_draft_s(plan, record.num_seqs) * self._draft_cost.value
        if predicted_s:
            self._draft_cost.observe(record.draft_s, predicted_s)
        self._length.observe(record.acceptance_length - 0.9, self._predict_length_of(record) - 0.9)
        if record.num_promised:
            self._observe_promise(record)
        self.acceptance.observe(record)
        self._age += 1
        if self._age % 8 == 0:
            self._expected.clear()
        if record.acceptance_length > 1.5:
            self._wait = self.trial_wait

    def _predict_length_of(self, record: StepRecord) -> float:
        """What `_predict_length` says with as many nodes as were verified."""
        nodes = round(record.num_tokens / record.num_seqs) - 1
        if nodes == record.plan.num_draft_tokens:
            return self._predict_length(record.plan)
        expected = compute_expected_length(record.plan, self.acceptance.compute_rates(), nodes)
        return 1 + (expected - 1) * self._length.value

    def _observe_promise(self, record: StepRecord) -> None:
        """How many of the tokens that the chances promised were accepted."""
        self._promised = _KEEP_PROMISED * self._promised + record.num_promised
        self._accepted = _KEEP_PROMISED * self._accepted + record.num_emitted - record.num_seqs

    def estimate_saved_s(self, records: Iterable[StepRecord]) -> float:
        """Seconds that the speculating steps saved over plain decoding of the same tokens; negative if they lost."""
        speculating = [record for record in records if not record.plan.is_plain]
        plain_s = sum(
            record.acceptance_length
            * self.predict_step_s(PLAIN, PlanInputs(num_seqs=record.num_seqs, num_read=record.num_read))
            for record in speculating
        )
        return plain_s - sum(record.step_s - record.prefill_s for record in speculating)

    def begin(self) -> None:
        self._wait = self.trial_wait
        self._current = PLAIN
        self.acceptance.forget(0.7)  # a drafter once useless may have learnt
        self._expected.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "profile": asdict(self.profile),
            "offered": self.acceptance.offered,
            "hits": self.acceptance.hits,
            "draft_cost": self._draft_cost.value,
            "sample_cost": self._sample_cost.value,
            "length": self._length.value,
            "promised": self._promised,
            "accepted": self._accepted,
            "plain_steps": self._plain_steps,
            "age": self._age,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AutoPlanner:
        """The planner that `state_dict` described."""
        profile: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in state["profile"].items()
        }
        planner = cls(HardwareProfile(**profile))
        planner.acceptance.offered = [list(row) for row in state["offered"]]
        planner.acceptance.hits = [list(row) for row in state["hits"]]
        planner._draft_cost.value = float(state["draft_cost"])
        planner._sample_cost.value = float(state["sample_cost"])
        planner._length.value = float(state["length"])
        planner._promised = float(state.get("promised", _PRIOR_PROMISED))
        planner._accepted = float(state.get("accepted", _PRIOR_PROMISED))
        planner._plain_steps, planner._age = int(state["plain_steps"]), int(state["age"])
        return planner
