"""The plan with the most expected tokens per second, from what was measured."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fastgrpo.planner.acceptance import Rates
from fastgrpo.planner.costs import StepCosts, Vector, shape_arrays
from fastgrpo.planner.expectation import Expectation
from fastgrpo.planner.planner import Chances, PlanInputs, Planner
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.planner.recording_price import RECORDING_S, RecordingPrice
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

GRID = tuple(  # sequences share their budgets; one of them may have three times its share, or all that is drafted
    SpeculationPlan(depth=d, width=w, num_draft_tokens=n, most_draft_tokens=min(w + w * w * (d - 1), 3 * n))
    for d, w, n in (
        *((1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 6), (2, 6, 12)),
        *((3, 1, 3), (3, 2, 6), (3, 3, 6), (3, 3, 8), (3, 4, 12), (3, 6, 24), (3, 8, 48), (4, 2, 8), (4, 4, 12)),
        *((4, 4, 16), (4, 8, 48), (5, 4, 24), (5, 8, 48), (6, 1, 6), (8, 2, 12), (8, 4, 24), (8, 8, 48)),
    )
)


_DEPTHS, _WIDTHS, _NODES = shape_arrays((PLAIN, *GRID))
_SHALLOWER = [max((p.depth for p in GRID if p.width == q.width and p.depth < q.depth), default=q.depth) for q in GRID]
_EXPLORED = np.minimum(_DEPTHS - 1, [0, *_SHALLOWER])  # levels to be tried before: all but the last, or the next plan's
_PLACES = _DEPTHS.astype(int), np.maximum(_WIDTHS.astype(int) - 1, 0)  # in tables that begin with depth 0 and width 1
_NOTHING = (0, None)
_STEPS_DECIDED, _MOST_DECIDED = 7, 23  # that a plan is kept for without asking again: twice as many where it stands
_LASTING_STEPS = 32  # that drafts are expected to last once they are switched on, while nobody waits
_CLEAR_GAIN = 1.1  # rate of drafts over plain decoding that needs no trial of the latter, if it was seen lately
_PROMISING, _RIVAL_WAIT = 0.75, 256  # of the current rate, from which on a plan is worth a trial, after so many steps
_DOUBTFUL = 0.12  # nats that the price of a forward may be off by: where nothing was measured of it for long
_DOUBTS = 1.5  # standard deviations of it that a plan is given, before it is taken for clearly worse
_WHOLE_TRIALS = 8  # one trial in so many verifies what it is charged for, whatever is believed of its price
_LEAST_WORTH = 1e-6  # of a drafted token, where nothing was accepted of what was promised
_FIRST_CREDIT = 4  # plain steps, that the first trials with about so many live may lose besides:
_LIKELY, _LIKELY_KNOWN = 0.8, 0.92  # of plans of so much of the current rate, the more where acceptance is known
_FIRST_STEPS = 12  # until so many have drafted there
_TRIAL_STEPS = 3  # of drafts in place of plain decoding, once they have read; all others are tried for one
_TRIAL_WAIT, _DRAFTS_WAIT = 4, 24  # steps between trials, at least; before one of drafts in place of plain decoding
_PRIOR_PROMISED, _KEEP_PROMISED = 8.0, 0.98  # draft tokens; of what was counted, at each step
_KEEP_AT_BEGIN = 0.7  # of all that was counted, at each rollout


class AutoPlanner(Planner):
    """Takes the plan with the most expected tokens per second, and keeps learning whether that is true.

    Every real step corrects the costs, those of forwards (plain steps, as sequences finish, visit what trees would
    cost), of drafts and of sampling; so a wrong or stale profile heals, within tens of steps where all of it is wrong,
    within hundreds where trials alone visit what is. What plans have had accepted corrects what is predicted of each,
    and a tree goes at most one level deeper than what was tried, or to the next depth that the grid has with its width.

    A plan does not flap: from plain decoding to drafts, and from one tree to another, the new one must promise
    `margin` more; the price of switching on, reading what the drafter has not read, is part of it. Once in a while
    something else is tried, for a few steps drafts where plain decoding is chosen, for one plain decoding and other
    trees where drafts are, plain decoding first where its price is in doubt: this may cost `trial_share` of the time,
    and is all that a bad drafter can take, but for a few steps' worth of first trials, without which a profile that is
    wrong would be believed for long. Steps in which a device's work was recorded tell what is accepted, and nothing of
    costs.

    Where the host would have to wait for what a device drafts, sequences do not share their budgets; drafts are
    recorded there before they are fast, and drafting begins once that is worth it (see `RecordingPrice`).

    Args:
        profile: what forwards and drafts cost, to begin with.
        margin: rate over the present one that is worth a change, at least 1.
        max_num_tokens: tokens in a target forward at most, roots included; None takes the end of the profile's grid,
            beyond which costs are guessed.
        trial_share: share of the time that trials may lose, in [0, 1).
        acceptance: of drafts by depth and rank, as measured before; what is seen takes its place within some steps.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    name = "auto"

    def __init__(
        self,
        profile: HardwareProfile,
        *,
        margin: float = 1.03,
        max_num_tokens: int | None = None,
        trial_share: float = 0.01,
        acceptance: Rates | None = None,
    ) -> None:
        if not 1 <= margin < math.inf:
            raise ValueError(f"margin must be a finite ratio of at least 1, got {margin}")
        if not 0 <= trial_share < 1:
            raise ValueError(f"trial_share must be in [0, 1), got {trial_share}")
        if max_num_tokens is not None and max_num_tokens < 1:
            raise ValueError(f"max_num_tokens must be at least 1, or None for the profile's, got {max_num_tokens}")
        self._costs = StepCosts(profile)
        self._grid = tuple(replace(plan, most_draft_tokens=None) for plan in GRID) if profile.runs_ahead else GRID
        self.margin, self.trial_share = margin, trial_share
        self.max_num_tokens = profile.num_tokens[-1] if max_num_tokens is None else max_num_tokens
        self._expectation = Expectation(acceptance)
        self._promised, self._accepted = _PRIOR_PROMISED, _PRIOR_PROMISED  # draft tokens, of shared budgets
        self._unheard: list[StepRecord] = []  # steps since the last decision
        self._unlearnt: list[StepRecord] = []  # and those before it that were too few to learn from
        self._credit_s = 0.0  # that trials may lose
        self._first_loss_s: defaultdict[int, float] = defaultdict(float)  # of first trials, by octave of live sequences
        self._num_drafted: Counter[int] = Counter()  # steps, likewise
        self._last_plain: dict[int, int] = {}  # the number of the step, likewise
        self._num_trials = 0
        self._trial_age = 0  # steps since the last one
        self._num_steps = 0
        self._last_tried: dict[SpeculationPlan, int] = {}  # the number of the step, by plan
        self._current = PLAIN
        self._decided_for: tuple[int, int | None] = _NOTHING  # octave of sequences; room
        self._decided_read = 0  # cached positions that forwards read then
        self._last_num_seqs = 0
        self._steps_left = 0  # that it is kept for
        self._steps_decided = _STEPS_DECIDED
        self._trial, self._trial_left = PLAIN, 0  # what is tried in place of it, for how many steps more
        self._is_trial = False  # whether this step's plan is tried
        self._rates: tuple[int, dict[SpeculationPlan, float]] = (0, {})  # as the last decision saw them, of so many
        self._prices: dict[tuple[SpeculationPlan, int], list[float]] = {}  # tokens that so many drafts cost, until then
        self._recording = RecordingPrice(RECORDING_S if profile.runs_ahead else 0.0)
        self._promised_gain = 0.0  # share of a step's time that the best plan would save

    @property
    def expectation(self) -> Expectation:
        """What plans are expected to emit, as far as is known now."""
        self._learn()
        return self._expectation

    @property
    def profile(self) -> HardwareProfile:
        """What forwards and drafts cost, as far as is known now."""
        self._learn()
        return self._costs.profile

    # -- predictions -----------------------------------------------------------------------------------------

    def predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Seconds of a step with this plan, what the drafter has not read left out."""
        self._learn()
        return self._predict_step_s(plan, inputs)

    def _predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        length = self._expectation.predict_length(plan, inputs.num_seqs)
        return float(self._predict_steps_s(plan.depth, plan.width, plan.num_draft_tokens, length, inputs))

    def _predict_steps_s(
        self, depths: Vector | float, widths: Vector | float, nodes: Vector | float, lengths: Vector | float,
        inputs: PlanInputs,
    ) -> Vector:  # fmt: skip
        batch, costs = inputs.num_seqs, self._costs
        seconds = costs.predict_target_s(batch * (1 + nodes), inputs.num_read)
        return seconds + costs.predict_draft_s(depths, widths, batch) + costs.predict_rest_s(depths, batch * lengths)

    def predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Tokens per second; the price of switching on is spread over the steps that drafts are expected to last."""
        self._learn()
        return self._predict_rate(plan, inputs)

    def _predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        seconds = self._predict_step_s(plan, inputs)
        if not plan.is_plain:
            seconds += self._predict_reading_s(inputs)
        return inputs.num_seqs * self._expectation.predict_length(plan, inputs.num_seqs) / seconds

    def _predict_reading_s(self, inputs: PlanInputs) -> float:
        """The price of switching on, of each step that drafts are expected to last: the longer, the more still wait."""
        num_steps = _LASTING_STEPS * (1 + inputs.num_waiting / inputs.num_seqs)
        return self._costs.predict_reading_s(inputs.num_unread, inputs.num_seqs) / num_steps

    def _predict_rates(self, inputs: PlanInputs) -> dict[SpeculationPlan, float]:
        """`predict_rate` of plain decoding and of every plan of the grid; 0 of those that do not fit, go deeper than
        what was explored leads to, or cannot be worth a trial beside the best.
        """
        batch = inputs.num_seqs
        room, explored = inputs.find_room(self.max_num_tokens), self._expectation.explored_depth
        bounds = self._expectation.bound_lengths(batch)[_PLACES]
        seconds = self._predict_steps_s(_DEPTHS, _WIDTHS, _NODES, bounds, inputs)
        rates = dict.fromkeys(self._grid, 0.0) | {PLAIN: batch / float(seconds[0])}
        seconds += self._predict_reading_s(inputs)
        most = np.where((room >= _NODES) & (explored >= _EXPLORED), batch * bounds / seconds, 0.0)[1:]
        best, sample_s = 0.0, self._costs.sample_s
        for index in most.argsort()[::-1].tolist():
            if most[index] <= _PROMISING * best:
                break
            plan = self._grid[index]
            length = self._expectation.predict_length(plan, batch)
            spared_s = batch * (float(bounds[1 + index]) - length) * sample_s
            rates[plan] = rate = batch * length / (float(seconds[1 + index]) - spared_s)
            best = max(best, rate)
        return rates

    # -- the decision ----------------------------------------------------------------------------------------

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        """The current plan for some steps while about as many run, read about as much, and nobody joins; else the best,
        or a trial.
        """
        decided_for = (inputs.num_seqs.bit_length(), inputs.max_draft_tokens)
        is_alike = (
            decided_for == self._decided_for and self._decided_read <= 2 * inputs.num_read <= 4 * self._decided_read
        )
        nobody_joined = inputs.num_seqs <= self._last_num_seqs
        self._last_num_seqs = inputs.num_seqs
        if is_alike and nobody_joined and self._steps_left > 0:
            self._steps_left -= 1
            self._is_trial = self._trial_left > 0
            if self._is_trial:
                self._trial_left -= 1
                return self._trial
            return self._current
        self._is_trial = False
        self._hear()
        if len(self._unlearnt) > _STEPS_DECIDED or self._expectation.is_new:
            self._learn()
        rates = self._predict_rates(inputs)
        plain_rate = rates[PLAIN]
        self._rates, self._prices = (inputs.num_seqs, rates), {}
        best, before = max(self._grid, key=rates.__getitem__), self._current
        least_rate = plain_rate * (self.margin if self._current.is_plain else 1.0)
        self._promised_gain, wait_s = 0.0, 0.0
        if rates[best] <= least_rate:
            self._current = PLAIN
        elif self._current.is_plain or rates[best] > self.margin * rates[self._current]:
            wait_s = self._recording.find_wait_s(inputs.num_seqs)
            if wait_s <= 0:
                self._current = best
                self._recording.pay(inputs.num_seqs)
            else:
                if rates[self._current] < plain_rate:  # that of what does not fit any more is 0
                    self._current = PLAIN
                self._promised_gain = 1 - rates[self._current] / rates[best]
        # with the first drafts all that is known changes; plain steps teach nothing of them
        is_learning = self._expectation.is_new and not self._current.is_plain
        stands = is_alike and self._current == before
        self._steps_decided = min(2 * self._steps_decided + 1, _MOST_DECIDED) if stands else _STEPS_DECIDED
        self._decided_for, self._decided_read = decided_for, inputs.num_read
        self._steps_left = 0 if is_learning else self._steps_decided
        self._trial_left = 0
        if wait_s > 0:
            lost_s = self._promised_gain * self._predict_step_s(self._current, inputs)  # by each step
            self._steps_left = min(self._steps_left, int(wait_s / lost_s))
            return self._current
        other = best if self._current.is_plain else self._choose_rival(rates, inputs.num_seqs)
        if not self._can_afford(other, rates, inputs):
            return self._current
        self._trial, self._trial_left, self._is_trial = other, self._count_trial_steps(other) - 1, True
        return other

    def _choose_rival(self, rates: dict[SpeculationPlan, float], num_seqs: int) -> SpeculationPlan:
        """What drafts of the current plan are tried against: the best plan not tried for long, else plain decoding;
        this one first where it is in doubt what it takes, unless drafts clearly win.

        A tree's own steps say little of what others take, or of what further children would have had accepted.
        """
        if self._costs.find_target_doubt(num_seqs) > _DOUBTFUL and not self._is_clearly_ahead(rates, num_seqs):
            return PLAIN
        least, before = _PROMISING * rates[self._current], self._num_steps - _RIVAL_WAIT
        rivals = [plan for plan in rates if rates[plan] > least and self._last_tried.get(plan, before) <= before]
        return max(rivals, key=rates.__getitem__, default=PLAIN)

    def _is_clearly_ahead(self, rates: dict[SpeculationPlan, float], num_seqs: int) -> bool:
        """Whether plain decoding needs no trial: seen lately, and slower whatever may be wrong of its price."""
        was_seen = self._num_steps - self._last_plain.get(num_seqs.bit_length(), -_RIVAL_WAIT) < _RIVAL_WAIT
        clear_gain = _CLEAR_GAIN * math.exp(_DOUBTS * self._costs.find_target_doubt(num_seqs))
        return was_seen and rates[self._current] > clear_gain * rates[PLAIN]

    def _can_afford(self, other: SpeculationPlan, rates: dict[SpeculationPlan, float], inputs: PlanInputs) -> bool:
        """Whether a trial of this plan in place of the current one is paid for; then it is charged for.

        Drafts count as behind until they promise a gain that is worth a change.
        """
        octave, num_steps = inputs.num_seqs.bit_length(), self._count_trial_steps(other)
        if self._trial_age < (_TRIAL_WAIT if num_steps == 1 else _DRAFTS_WAIT) or not rates[other]:
            return False
        if other.is_plain and self._is_clearly_ahead(rates, inputs.num_seqs):
            return False
        doubt = self._costs.find_target_doubt(inputs.num_seqs * (1 + other.num_draft_tokens))
        rate = rates[self._current] * (self.margin if self._current.is_plain else 1.0)
        emitted = inputs.num_seqs * self._expectation.predict_length(other, inputs.num_seqs)
        loss_s = num_steps * emitted * (1 / rates[other] - 1 / rate)
        if not other.is_plain:
            loss_s += self._costs.predict_reading_s(inputs.num_unread, inputs.num_seqs)
        first_s = 0.0
        likely = (_LIKELY_KNOWN if self._expectation.table.known else _LIKELY) * math.exp(-_DOUBTS * doubt)
        is_new = doubt > _DOUBTFUL if other.is_plain else self._num_drafted[octave] < _FIRST_STEPS
        if is_new and rates[other] > likely * rates[self._current]:
            first_s = max(_FIRST_CREDIT * inputs.num_seqs / rates[PLAIN] - self._first_loss_s[octave], 0.0)
        if loss_s > self._credit_s + first_s:
            return False
        first_s = min(max(loss_s, 0.0), first_s)
        self._first_loss_s[octave] += first_s
        self._credit_s -= max(loss_s, 0.0) - first_s
        self._trial_age = 0
        self._num_trials += 1
        return True

    def _count_trial_steps(self, other: SpeculationPlan) -> int:
        """Drafts in place of plain decoding are tried for some steps: what is dear is the reading before the first."""
        return _TRIAL_STEPS if self._current.is_plain and not other.is_plain else 1

    def choose_budget(self, plan: SpeculationPlan, inputs: PlanInputs, chances: Chances) -> int:
        """The draft tokens worth their time: what they promise, less what that time brings at the better of two rates.

        These are the rates of this plan and of plain decoding. Where the price of such a forward is in doubt, the last
        step of a trial verifies all that it was charged for: by a wrong price nothing might be, and nothing would show
        what it takes. Once in some trials it does so without a doubt: machines change.
        """
        most = max(min(len(chances), self.max_num_tokens - inputs.num_seqs), 0)
        if self._is_trial and not self._trial_left:
            charged = inputs.num_seqs * plan.num_draft_tokens
            is_due = self._num_trials % _WHOLE_TRIALS == 0
            if is_due or self._costs.find_target_doubt(inputs.num_seqs + charged) > _DOUBTFUL:
                return min(charged, most)
        worth = itertools.accumulate(np.asarray(chances)[:most].tolist(), initial=0.0)
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
                rates = {each: self._predict_rate(each, inputs) for each in (plan, PLAIN)}
            rate = max(rates[plan], rates[PLAIN])
            trust = self._accepted / self._promised
            worth = max(trust * (1 - rate * self._costs.sample_s), _LEAST_WORTH)  # of a token that is surely accepted
            num_tokens = np.arange(float(inputs.num_seqs), inputs.num_seqs + 1.0 + 2 * most)
            times_s = self._costs.predict_target_s(num_tokens, inputs.num_read)
            self._prices[key] = (rate / worth * times_s).tolist()
        return self._prices[key]

    # -- learning --------------------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        """Learnt from before a decision: several steps at once take a fraction of the time."""
        self._unheard.append(record)

    def _hear(self) -> None:
        """Count the steps since the last decision."""
        for record in self._unheard:
            step_s = record.step_s if 0 <= record.step_s < math.inf else 0.0  # else a clock went astray
            if 0 <= record.prefill_s <= step_s:
                self._credit_s += self.trial_share * (step_s - record.prefill_s)
            if not record.is_steady and record.plan not in (PLAIN, self._current):
                self._credit_s -= step_s  # a trial pays for what is recorded for it, too
            self._trial_age += 1
            self._num_steps += 1
            self._last_tried[record.plan] = self._num_steps
            if record.plan.is_plain:
                self._last_plain[record.num_seqs.bit_length()] = self._num_steps
            else:
                self._num_drafted[record.num_seqs.bit_length()] += 1
            if record.is_steady and record.plan == self._current:
                self._recording.lose(record.num_seqs, self._promised_gain * step_s)
                if self._recording.recording_s and not record.plan.is_plain:
                    num_seqs, rates = self._rates
                    plain_s = record.acceptance_length * num_seqs / rates[PLAIN]
                    self._recording.save(plain_s + record.prefill_s - step_s)
        self._unlearnt += self._unheard
        self._unheard.clear()

    def _learn(self) -> None:
        """Costs and acceptance, from all that was not learnt from."""
        self._hear()
        if not self._unlearnt:
            return
        for records in _group_alike(self._unlearnt):
            if records[0].is_steady:
                self._costs.observe(*records)
            elif not records[0].plan.is_plain:
                for record in records:
                    self._learn_recording(record)
            if records[0].plan.is_plain:
                continue  # no drafts were asked for, so no acceptance was seen
            self._expectation.observe(*records)
            for record in records:
                if record.num_promised:
                    self._promised = _KEEP_PROMISED * self._promised + record.num_promised
                    self._accepted = _KEEP_PROMISED * self._accepted + record.num_emitted - record.num_seqs
        self._unlearnt.clear()
        self._prices.clear()

    def _learn_recording(self, record: StepRecord) -> None:
        """What a step took longer in which drafts were recorded."""
        plan, inputs = record.plan, PlanInputs(num_seqs=record.num_seqs, num_read=record.num_read)
        shape = (plan.depth, plan.width, plan.num_draft_tokens)
        usual_s = float(self._predict_steps_s(*shape, record.acceptance_length, inputs))
        self._recording.observe(record.step_s - record.prefill_s - usual_s)

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
        self._learn()
        self._current, self._decided_for, self._trial_left = PLAIN, _NOTHING, 0
        self._recording.begin()
        self.expectation.fade(_KEEP_AT_BEGIN)  # a drafter once useless may have learnt

    def state_dict(self) -> dict[str, Any]:
        self._learn()
        return {
            "margin": self.margin,
            "trial_share": self.trial_share,
            "max_num_tokens": self.max_num_tokens,
            "costs": self._costs.state_dict(),
            "expectation": self.expectation.state_dict(),
            "promised": self._promised,
            "accepted": self._accepted,
            "credit_s": self._credit_s,
            "recording_s": self._recording.recording_s,
            "patience": list(self._recording.patience.items()),
            "first_loss_s": list(self._first_loss_s.items()),
            "num_drafted": list(self._num_drafted.items()),
            "last_plain": list(self._last_plain.items()),
            "num_trials": self._num_trials,
            "trial_age": self._trial_age,
            "num_steps": self._num_steps,
            "last_tried": [[asdict(plan), step] for plan, step in self._last_tried.items()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AutoPlanner:
        """The planner that `state_dict` described."""
        costs = StepCosts.from_state(state["costs"])
        settings = {name: state[name] for name in ("margin", "trial_share", "max_num_tokens") if name in state}
        planner = cls(costs.start, **settings)  # older states have no settings
        planner._costs = costs
        planner._expectation = Expectation.from_state(state["expectation"])
        planner._promised, planner._accepted = float(state["promised"]), float(state["accepted"])
        planner._credit_s, planner._trial_age = float(state["credit_s"]), int(state["trial_age"])
        planner._num_trials = int(state.get("num_trials", 0))
        if "recording_s" in state:  # older states have none, nor the next five
            planner._recording = RecordingPrice(float(state["recording_s"]))
        planner._recording.patience.update({int(octave): float(each) for octave, each in state.get("patience", ())})
        planner._num_steps = int(state.get("num_steps", 0))
        planner._first_loss_s.update({int(octave): float(lost) for octave, lost in state.get("first_loss_s", ())})
        planner._num_drafted = Counter({int(octave): int(count) for octave, count in state.get("num_drafted", ())})
        planner._last_plain = {int(octave): int(step) for octave, step in state.get("last_plain", ())}
        planner._last_tried = {SpeculationPlan(**plan): int(step) for plan, step in state.get("last_tried", ())}
        return planner


def _group_alike(records: Sequence[StepRecord]) -> Iterator[list[StepRecord]]:
    for _, alike in itertools.groupby(records, _find_kind):
        while group := list(itertools.islice(alike, 1 + _MOST_DECIDED)):
            yield group


def _find_kind(record: StepRecord) -> tuple[SpeculationPlan, int, bool, bool, bool]:
    """Steps in a row of one kind are learnt from at once: one plan, as many sequences, no drafter catching up."""
    is_behind = record.num_unread > (1 + record.plan.depth) * record.num_seqs
    return record.plan, record.num_seqs, bool(record.offered), is_behind and not record.plan.is_plain, record.is_steady
