"""The plan with the most expected tokens per second, from what was measured."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastgrpo.planner.costs import FollowedProfile
from fastgrpo.planner.expectation import Expectation
from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

GRID = tuple(  # sequences share their budgets; one of them may have three times its share, or all that is drafted
    SpeculationPlan(depth=d, width=w, num_draft_tokens=n, most_draft_tokens=min(w + w * w * (d - 1), 3 * n))
    for d, w, n in (
        *((1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (2, 2, 3), (2, 2, 4), (2, 3, 6), (3, 1, 3), (3, 2, 6)),
        *((3, 3, 8), (3, 4, 12), (4, 2, 8), (4, 4, 16), (5, 4, 16), (5, 4, 24), (6, 4, 24), (6, 8, 32), (8, 8, 48)),
    )
)


READ_PER_DRAFT = 2  # tokens of each sequence that the profiler's drafts read
_LASTING_STEPS = 32  # that drafts are expected to last once they are switched on
_IDLE_RATE, _IDLE_STEP_S = 0.1, 1e-3  # of the running mean; what it may grow by beyond doubling
_CLEAR_GAIN = 1.2  # rate of drafts over plain decoding that needs no trial of the latter
_TRIAL_WAIT = 8  # steps from one trial to the next at least
_PRIOR_PROMISED, _KEEP_PROMISED = 8.0, 0.98  # draft tokens; of what was counted, at each step
_KEEP_AT_BEGIN = 0.7  # of all that was counted, at each rollout


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

    Every real step corrects the costs, those of forwards (plain steps, as sequences finish, visit what trees would
    cost), of drafts and of sampling; so a wrong or stale profile heals. What plans have had accepted corrects
    what is predicted of each, and a tree goes at most one level deeper than what was tried.

    A plan does not flap: from plain decoding to drafts, and from one tree to another, the new one must promise
    `margin` more; the price of switching on, reading what the drafter has not read, is part of it. Once in a while
    a step tries the other side, drafts where plain decoding is chosen and plain decoding where drafts are: this may
    cost `trial_share` of the time, and is all that a bad drafter can take.

    Args:
        profile: what forwards and drafts cost, to begin with.
        margin: rate over the present one that is worth a change, above 1.
        max_num_tokens: tokens in a target forward at most, roots included; None takes the end of the profile's grid,
            beyond which costs are guessed.
        trial_share: share of the time that trials may lose, in [0, 1).
    """

    name = "auto"

    def __init__(
        self,
        profile: HardwareProfile,
        *,
        margin: float = 1.03,
        max_num_tokens: int | None = None,
        trial_share: float = 0.01,
    ) -> None:
        self._costs = FollowedProfile(profile)
        self.margin, self.trial_share = margin, trial_share
        self.max_num_tokens = max_num_tokens or profile.num_tokens[-1]
        self.expectation = Expectation()
        self._draft_cost = _Ratio()
        self._rest_cost = _Ratio()
        self._idle_s = 0.0  # what a step takes where its draft would be made, though none is
        self._promised, self._accepted = _PRIOR_PROMISED, _PRIOR_PROMISED  # draft tokens, of shared budgets
        self._credit_s = 0.0  # that trials may lose
        self._trial_age = 0  # steps since the last one
        self._current = PLAIN

    @property
    def profile(self) -> HardwareProfile:
        """What forwards and drafts cost, as far as is known now."""
        return self._costs.profile

    # -- predictions -----------------------------------------------------------------------------------------

    def predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Seconds of a step with this plan, what the drafter has not read left out."""
        batch, profile = inputs.num_seqs, self.profile
        seconds = profile.compute_target_s(batch * (1 + plan.num_draft_tokens), inputs.num_read)
        seconds += self._idle_s + self._draft_cost.value * profile.compute_draft_s(plan, batch)
        return seconds + self._predict_rest_s(batch * self.expectation.predict_length(plan, batch))

    def _predict_rest_s(self, num_emitted: float) -> float:
        """Seconds of a step beside its forward and its draft."""
        return self._rest_cost.value * (self.profile.fixed_s + self.profile.sample_s * num_emitted)

    def _predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Tokens per second; the price of switching on is spread over the steps that drafts are expected to last."""
        seconds = self.predict_step_s(plan, inputs)
        if not plan.is_plain:
            seconds += self._predict_reading_s(inputs.num_unread, inputs.num_seqs) / _LASTING_STEPS
        return inputs.num_seqs * self.expectation.predict_length(plan, inputs.num_seqs) / seconds

    def _predict_reading_s(self, num_unread: int, num_seqs: int) -> float:
        """Seconds to read what no draft has read yet, beyond the few tokens that every draft reads."""
        return self._draft_cost.value * self.profile.draft_read_s * max(num_unread - READ_PER_DRAFT * num_seqs, 0)

    # -- the decision ----------------------------------------------------------------------------------------

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        room, deepest = self.max_num_tokens // inputs.num_seqs, self.expectation.explored_depth + 1
        fitting = [p for p in GRID if 1 + p.num_draft_tokens <= room and p.depth <= deepest]
        plain_rate = self._predict_rate(PLAIN, inputs)
        rates = {p: self._predict_rate(p, inputs) for p in fitting}
        best = max(rates, key=rates.__getitem__, default=PLAIN)
        if best.is_plain or rates[best] <= plain_rate * (self.margin if self._current.is_plain else 1.0):
            self._current = PLAIN
        elif self._current not in rates or rates[best] > self.margin * rates[self._current]:
            self._current = best
        rates[PLAIN] = plain_rate
        other = best if self._current.is_plain else PLAIN
        return other if self._can_afford(other, rates, inputs) else self._current

    def _can_afford(self, other: SpeculationPlan, rates: dict[SpeculationPlan, float], inputs: PlanInputs) -> bool:
        """Whether a step with this plan in place of the current one is paid for; then it is charged for.

        Drafts count as behind until they promise a gain that is worth a change.
        """
        is_clear = other.is_plain and rates[self._current] > _CLEAR_GAIN * rates[other]
        if other == self._current or self._trial_age < _TRIAL_WAIT or is_clear:
            return False
        rate = rates[self._current] * (self.margin if self._current.is_plain else 1.0)
        emitted = inputs.num_seqs * self.expectation.predict_length(other, inputs.num_seqs)
        loss_s = emitted * (1 / rates[other] - 1 / rate)
        if not other.is_plain:
            loss_s += self._predict_reading_s(inputs.num_unread, inputs.num_seqs)
        if loss_s > self._credit_s:
            return False
        self._credit_s, self._trial_age = self._credit_s - loss_s, 0
        return True

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
        worth = trust * (1 - rate * profile.sample_s * self._rest_cost.value)  # of a token that is surely accepted
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

    # -- learning --------------------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        plan = record.plan
        self._credit_s += self.trial_share * (record.step_s - record.prefill_s)
        self._trial_age += 1
        self._costs.observe(record.num_tokens, record.num_read, record.target_s)
        rest_s = self._predict_rest_s(record.num_emitted)
        if rest_s:
            self._rest_cost.observe(record.verify_s, rest_s)
        if plan.is_plain:
            self._idle_s += _IDLE_RATE * (min(record.draft_s, 2 * self._idle_s + _IDLE_STEP_S) - self._idle_s)
        if plan.is_plain or not record.offered:
            return  # nothing was drafted, so neither the cost nor the acceptance of a draft was seen
        draft_s = self._draft_cost.value * self.profile.compute_draft_s(plan, record.num_seqs)
        if draft_s:
            draft_s += self._predict_reading_s(record.num_unread, record.num_seqs)
            self._draft_cost.observe(max(record.draft_s - self._idle_s, 0.0), draft_s)
        self.expectation.observe(record)
        if record.num_promised:
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
        self._current = PLAIN
        self.expectation.fade(_KEEP_AT_BEGIN)  # a drafter once useless may have learnt

    def state_dict(self) -> dict[str, Any]:
        return {
            "costs": self._costs.state_dict(),
            "expectation": self.expectation.state_dict(),
            "draft_cost": self._draft_cost.value,
            "rest_cost": self._rest_cost.value,
            "idle_s": self._idle_s,
            "promised": self._promised,
            "accepted": self._accepted,
            "credit_s": self._credit_s,
            "trial_age": self._trial_age,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AutoPlanner:
        """The planner that `state_dict` described."""
        costs = FollowedProfile.from_state(state["costs"])
        planner = cls(costs.start)
        planner._costs = costs
        planner.expectation = Expectation.from_state(state["expectation"])
        planner._draft_cost.value = float(state["draft_cost"])
        planner._rest_cost.value, planner._idle_s = float(state["rest_cost"]), float(state["idle_s"])
        planner._promised, planner._accepted = float(state["promised"]), float(state["accepted"])
        planner._credit_s, planner._trial_age = float(state["credit_s"]), int(state["trial_age"])
        return planner
