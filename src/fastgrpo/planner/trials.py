"""When something else than the best plan is tried, and what, so that what is believed is looked at again."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastgrpo.planner.planner import PlanInputs
from fastgrpo.planner.predictor import PROMISING, PlanRates, Predictor
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

DOUBTFUL = 0.12  # nats that the price of a forward may be off by: where nothing was measured of it for long
_DOUBTS = 1.5  # standard deviations of it that a plan is given, before it is taken for clearly worse
_CLEAR_GAIN = 1.1  # rate of drafts over plain decoding that needs no trial of the latter, if it was seen lately
_RIVAL = 0.75  # of the current rate, that a plan must be thought to make to be worth another trial
_RIVAL_WAIT = 256  # steps, after which a plan is worth another trial, and what was seen of plain decoding is old
_WHOLE_TRIALS = 8  # one trial in so many verifies what it is charged for, whatever is believed of its price
_FIRST_CREDIT = 1.0  # plain steps, that the first trials with about so many live may lose besides:
_LIKELY, _LIKELY_KNOWN = 0.8, 0.92  # of plans of so much of the current rate, the more where acceptance is known
_FIRST_STEPS = 12  # until so many have drafted there
_SETTLED_STEPS, _SETTLED_CHARGE = 36, 2.0  # once so many have, a trial of drafts is charged so many times its loss
_TRIAL_STEPS = 3  # of drafts in place of plain decoding, once they have read; all others are tried for one
_TRIAL_WAIT, _DRAFTS_WAIT = 4, 24  # steps between trials, at least; before one of drafts in place of plain decoding


class Trials:
    """What trials may still lose, and what was seen when.

    Trials may lose a share of the time, and the first ones with about as many live sequences (an octave) a plain step's
    worth besides, without which a profile that is wrong would be believed for long. Where plain decoding stands though
    drafts were tried in many steps, and what they take is not in doubt, a trial of them teaches little: it is charged
    twice, so that such trials lose half of the share.

    Args:
        predictor: says what a trial would lose, and what is in doubt.

    Attributes:
        credit_s: seconds that trials may lose.
        first_loss_s: of first trials, by octave of live sequences, as all that is counted here.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.credit_s = 0.0
        self.first_loss_s: defaultdict[int, float] = defaultdict(float)
        self.num_steps = 0
        self.last_plain: dict[int, int] = {}  # the number of the step
        self._num_drafted: Counter[int] = Counter()  # steps
        self._num_trials = 0
        self._age = 0  # steps since the last one
        self._last_tried: dict[SpeculationPlan, int] = {}  # the number of the step, by plan

    def count(self, record: StepRecord) -> None:
        """A step was taken."""
        octave = record.num_seqs.bit_length()
        self._age += 1
        self.num_steps += 1
        self._last_tried[record.plan] = self.num_steps
        if record.plan.is_plain:
            self.last_plain[octave] = self.num_steps
        else:
            self._num_drafted[octave] += 1

    def choose_rival(self, current: SpeculationPlan, rates: PlanRates, num_seqs: int) -> SpeculationPlan:
        """What drafts of the current plan are tried against: the best plan not tried for long, else plain decoding;
        this one first where it was not seen lately, or it is in doubt what it takes, unless drafts clearly win.

        A tree's own steps say little of what others take, or of what further children would have had accepted. A plan
        never tried may be priced far too dear, as by a profile in which drafts look ten times as dear: where nothing
        nearer is left to try it is tried, too, though it looks half as fast.
        """
        is_doubtful = self._predictor.costs.find_target_doubt(num_seqs) > DOUBTFUL
        if (is_doubtful or not self._was_plain_seen(num_seqs)) and not self._is_clear(current, rates, num_seqs):
            return PLAIN
        before, near = self.num_steps - _RIVAL_WAIT, _RIVAL * rates[current]
        rivals = [plan for plan in rates if rates[plan] > near and self._last_tried.get(plan, before) <= before]
        if not rivals and self._was_plain_seen(num_seqs):
            rivals = [
                plan for plan in rates if rates[plan] > PROMISING * rates[current] and plan not in self._last_tried
            ]
        return max(rivals, key=rates.__getitem__, default=PLAIN)

    def _was_plain_seen(self, num_seqs: int) -> bool:
        """Whether plain decoding was lately."""
        return self.num_steps - self.last_plain.get(num_seqs.bit_length(), -_RIVAL_WAIT) < _RIVAL_WAIT

    def _is_clear(self, current: SpeculationPlan, rates: PlanRates, num_seqs: int) -> bool:
        """Whether plain decoding is slower, whatever may be wrong of its price."""
        clear_gain = _CLEAR_GAIN * math.exp(_DOUBTS * self._predictor.costs.find_target_doubt(num_seqs))
        return rates[current] > clear_gain * rates[PLAIN]

    def _is_clearly_ahead(self, current: SpeculationPlan, rates: PlanRates, num_seqs: int) -> bool:
        """Whether plain decoding needs no trial: seen lately, and clearly slower."""
        return self._was_plain_seen(num_seqs) and self._is_clear(current, rates, num_seqs)

    def begin(
        self,
        other: SpeculationPlan,
        current: SpeculationPlan,
        rates: PlanRates,
        inputs: PlanInputs,
        *,
        least_gain: float,
    ) -> int:
        """Steps that the other plan is tried for in place of the current one, and charged for; 0: not now.

        Args:
            least_gain: what drafts must promise over plain decoding before they are taken; until then they count as
                behind.
        """
        num_steps = _TRIAL_STEPS if current.is_plain and not other.is_plain else 1
        if self._age < (_TRIAL_WAIT if num_steps == 1 else _DRAFTS_WAIT) or not rates[other]:
            return 0
        if other.is_plain and self._is_clearly_ahead(current, rates, inputs.num_seqs):
            return 0
        rate = rates[current] * (least_gain if current.is_plain else 1.0)
        if not self._pay(
            self._predict_loss_s(other, num_steps, rates[other], rate, inputs), other, current, rates, inputs
        ):
            return 0
        self._age = 0
        self._num_trials += 1
        return num_steps

    def _predict_loss_s(
        self, other: SpeculationPlan, num_steps: int, own_rate: float, current_rate: float, inputs: PlanInputs
    ) -> float:
        """What so many steps of another plan take longer; negative where they gain."""
        emitted = inputs.num_seqs * self._predictor.expectation.predict_length(other, inputs.num_seqs)
        loss_s = num_steps * emitted * (1 / own_rate - 1 / current_rate)
        if not other.is_plain:
            loss_s += self._predictor.costs.predict_reading_s(inputs.num_unread, inputs.num_seqs)
        return loss_s

    def _pay(
        self, loss_s: float, other: SpeculationPlan, current: SpeculationPlan, rates: PlanRates, inputs: PlanInputs
    ) -> bool:
        """Take the loss from what first trials may lose, then from the credit; False where both are too little."""
        if current.is_plain and self._is_settled(other, inputs.num_seqs):
            loss_s *= _SETTLED_CHARGE
        first_s = self._find_first_credit_s(other, current, rates, inputs)
        if loss_s > self.credit_s + first_s:
            return False
        first_s = min(max(loss_s, 0.0), first_s)
        self.first_loss_s[inputs.num_seqs.bit_length()] += first_s
        self.credit_s -= max(loss_s, 0.0) - first_s
        return True

    def _is_settled(self, other: SpeculationPlan, num_seqs: int) -> bool:
        """Whether another trial of such drafts teaches little: many steps have drafted, and the price is known."""
        if other.is_plain or self._num_drafted[num_seqs.bit_length()] < _SETTLED_STEPS:
            return False
        return self._predictor.costs.find_target_doubt(num_seqs * (1 + other.num_draft_tokens)) <= DOUBTFUL

    def _find_first_credit_s(
        self, other: SpeculationPlan, current: SpeculationPlan, rates: PlanRates, inputs: PlanInputs
    ) -> float:
        """What a trial may lose besides the credit, where hardly anything was seen of such a plan and it is likely."""
        octave, predictor = inputs.num_seqs.bit_length(), self._predictor
        doubt = predictor.costs.find_target_doubt(inputs.num_seqs * (1 + other.num_draft_tokens))
        likely = (_LIKELY_KNOWN if predictor.expectation.table.known else _LIKELY) * math.exp(-_DOUBTS * doubt)
        is_new = doubt > DOUBTFUL if other.is_plain else self._num_drafted[octave] < _FIRST_STEPS
        if not is_new or rates[other] <= likely * rates[current]:
            return 0.0
        return max(_FIRST_CREDIT * inputs.num_seqs / rates[PLAIN] - self.first_loss_s[octave], 0.0)

    def verifies_all(self, num_tokens: int) -> bool:
        """Whether the last step of the present trial verifies all that it was charged for, a forward of `num_tokens`.

        So where its price is in doubt: by a wrong one nothing might be verified, and nothing would show what it takes.
        Once in some trials without a doubt: machines change.
        """
        is_due = self._num_trials % _WHOLE_TRIALS == 0
        return is_due or self._predictor.costs.find_target_doubt(num_tokens) > DOUBTFUL

    def state_dict(self) -> dict[str, Any]:
        return {
            "credit_s": self.credit_s,
            "first_loss_s": list(self.first_loss_s.items()),
            "num_drafted": list(self._num_drafted.items()),
            "last_plain": list(self.last_plain.items()),
            "num_trials": self._num_trials,
            "trial_age": self._age,
            "num_steps": self.num_steps,
            "last_tried": [[asdict(plan), step] for plan, step in self._last_tried.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` described; older states lack most of it."""
        self.credit_s, self._age = float(state["credit_s"]), int(state["trial_age"])
        self._num_trials, self.num_steps = int(state.get("num_trials", 0)), int(state.get("num_steps", 0))
        self.first_loss_s.update({int(octave): float(lost) for octave, lost in state.get("first_loss_s", ())})
        self._num_drafted = Counter({int(octave): int(count) for octave, count in state.get("num_drafted", ())})
        self.last_plain = {int(octave): int(step) for octave, step in state.get("last_plain", ())}
        self._last_tried = {SpeculationPlan(**plan): int(step) for plan, step in state.get("last_tried", ())}
