"""The plan with the most expected tokens per second, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

from fastgrpo.planner.acceptance import Rates
from fastgrpo.planner.budget import SharedBudget
from fastgrpo.planner.costs import StepCosts
from fastgrpo.planner.expectation import Expectation
from fastgrpo.planner.grid import GRID
from fastgrpo.planner.planner import Chances, PlanInputs, Planner
from fastgrpo.planner.predictor import PlanRates, Predictor
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.planner.recording_price import RECORDING_S, RecordingPrice
from fastgrpo.planner.term import MOST_STEPS, NUM_STEPS, Term
from fastgrpo.planner.trials import Trials
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

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
    trees where drafts are, plain decoding first where its price is in doubt or old: this may cost `trial_share` of the
    time, and is all that a bad drafter can take, but for a plain step's worth of first trials with about as many live
    sequences, without which a profile that is wrong would be believed for long. Steps in which a device's work was
    recorded tell what is accepted, and nothing of costs.

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
        self.margin, self.trial_share = margin, trial_share
        self.max_num_tokens = profile.num_tokens[-1] if max_num_tokens is None else max_num_tokens
        grid = [replace(plan, most_draft_tokens=None) for plan in GRID] if profile.runs_ahead else GRID
        self._predictor = Predictor(StepCosts(profile), Expectation(acceptance), grid)
        self._trials = Trials(self._predictor)
        self._budget = SharedBudget(self._predictor)
        self._recording = RecordingPrice(RECORDING_S if profile.runs_ahead else 0.0)
        self._term = Term()
        self._current = PLAIN
        self._trial, self._trial_left = PLAIN, 0  # what is tried in place of it, for how many steps more
        self._is_trial = False  # whether this step's plan is tried
        self._plain_s = 0.0  # that a plain step takes, as the last decision saw it
        self._promised_gain = 0.0  # share of a step's time that the best plan would save
        self._unheard: list[StepRecord] = []  # steps since the last decision
        self._unlearnt: list[StepRecord] = []  # and those before it that were too few to learn from

    @property
    def expectation(self) -> Expectation:
        """What plans are expected to emit, as far as is known now."""
        self._learn()
        return self._predictor.expectation

    @property
    def profile(self) -> HardwareProfile:
        """What forwards and drafts cost, as far as is known now."""
        self._learn()
        return self._predictor.costs.profile

    def predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Seconds of a step with this plan, what the drafter has not read left out."""
        self._learn()
        return self._predictor.predict_step_s(plan, inputs)

    def predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Tokens per second; the price of switching on is spread over the steps that drafts are expected to last."""
        self._learn()
        return self._predictor.predict_rate(plan, inputs)

    # -- the decision ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._learn()
        self._current, self._trial_left = PLAIN, 0
        self._term.forget()
        self._recording.begin()
        self._predictor.expectation.fade(_KEEP_AT_BEGIN)  # a drafter once useless may have learnt

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        """The current plan, or what is tried in its place, for some steps while the state is alike; then the best."""
        if self._term.goes_on(inputs):
            self._is_trial = self._trial_left > 0
            self._trial_left -= self._is_trial
            return self._trial if self._is_trial else self._current
        self._hear()
        if len(self._unlearnt) > NUM_STEPS or self._predictor.expectation.is_new:
            self._learn()
        rates = self._predictor.predict_rates(inputs, inputs.find_room(self.max_num_tokens))
        self._plain_s = inputs.num_seqs / rates[PLAIN]
        self._budget.begin(inputs.num_seqs, rates)
        before = self._current
        best = max(
            (plan for plan in rates if not plan.is_plain), key=rates.__getitem__, default=self._predictor.grid[0]
        )
        wait_s = self._choose(best, rates, inputs.num_seqs)
        self._begin_term(inputs, stands=self._current == before, wait_s=wait_s)
        self._trial_left, self._is_trial = 0, False
        if wait_s <= 0:
            self._begin_trial(best, rates, inputs)
        return self._trial if self._is_trial else self._current

    def _choose(self, best: SpeculationPlan, rates: PlanRates, num_seqs: int) -> float:
        """Make the best plan the current one, if the gain is worth a change.

        Returns:
            Seconds that the current plan is still to lose against the best one before that is recorded; 0: none.
        """
        current, plain_rate, self._promised_gain = self._current, rates[PLAIN], 0.0
        if rates[best] <= plain_rate * (self.margin if current.is_plain else 1.0):
            self._current = PLAIN
        elif current.is_plain or rates[best] > self.margin * rates[current]:
            wait_s = self._recording.find_wait_s(num_seqs)
            if wait_s > 0:
                if rates[current] < plain_rate:  # that of what does not fit any more is 0
                    self._current = PLAIN
                self._promised_gain = 1 - rates[self._current] / rates[best]
                return wait_s
            self._current = best
            self._recording.pay(num_seqs)
        return 0.0

    def _begin_term(self, inputs: PlanInputs, *, stands: bool, wait_s: float) -> None:
        most: float = math.inf
        if self._predictor.expectation.is_new and not self._current.is_plain:
            most = 0  # with the first drafts all that is known changes; plain steps teach nothing of them
        elif wait_s > 0:
            most = wait_s / (self._promised_gain * self._predictor.predict_step_s(self._current, inputs))
        self._term.begin(inputs, stands=stands, most_steps=most)

    def _begin_trial(self, best: SpeculationPlan, rates: PlanRates, inputs: PlanInputs) -> None:
        """Try drafts where plain decoding is chosen, and what rivals them where drafts are, if that is paid for."""
        current, trials = self._current, self._trials
        other = best if current.is_plain else trials.choose_rival(current, rates, inputs.num_seqs)
        num_steps = trials.begin(other, current, rates, inputs, least_gain=self.margin)
        if num_steps:
            self._trial, self._trial_left, self._is_trial = other, num_steps - 1, True

    def choose_budget(self, plan: SpeculationPlan, inputs: PlanInputs, chances: Chances) -> int:
        """The draft tokens worth their time; once in a while all that the plan is charged for, so that it shows."""
        most = max(min(len(chances), self.max_num_tokens - inputs.num_seqs), 0)
        charged = inputs.num_seqs * plan.num_draft_tokens
        if self._is_trial:
            verifies_all = not self._trial_left and self._trials.verifies_all(inputs.num_seqs + charged)
        else:
            verifies_all = self._budget.is_due
        if verifies_all:
            return min(charged, most)
        return self._budget.choose(plan, inputs, chances, most)

    # -- learning --------------------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        """Learnt from before a decision: several steps at once take a fraction of the time."""
        if not self._is_trial:
            self._budget.count(record)
        self._unheard.append(record)

    def _hear(self) -> None:
        """Count the steps since the last decision."""
        for record in self._unheard:
            step_s = record.step_s if 0 <= record.step_s < math.inf else 0.0  # else a clock went astray
            if 0 <= record.prefill_s <= step_s:
                self._trials.credit_s += self.trial_share * (step_s - record.prefill_s)
            if not record.is_steady and record.plan not in (PLAIN, self._current):
                self._trials.credit_s -= step_s  # a trial pays for what is recorded for it, too
            self._trials.count(record)
            if record.plan == self._current:
                self._recording.settle(was_recorded=record.has_recorded)
            if record.is_steady and record.plan == self._current:
                self._recording.lose(record.num_seqs, self._promised_gain * step_s)
                if self._recording.recording_s and not record.plan.is_plain:
                    self._recording.save(record.acceptance_length * self._plain_s + record.prefill_s - step_s)
        self._unlearnt += self._unheard
        self._unheard.clear()

    def _learn(self) -> None:
        """Costs and acceptance, from all that was not learnt from."""
        self._hear()
        if not self._unlearnt:
            return
        for records in _group_alike(self._unlearnt):
            if records[0].is_steady:
                self._predictor.costs.observe(*records)
            elif records[0].has_recorded and not records[0].plan.is_plain:
                for record in records:
                    usual_s = self._predictor.predict_emitting_s(record)
                    self._recording.observe(record.step_s - record.prefill_s - usual_s)
            if not records[0].plan.is_plain:  # else no drafts were asked for, so no acceptance was seen
                self._predictor.expectation.observe(*records)
                self._budget.observe(records)
        self._unlearnt.clear()
        self._budget.forget_prices()

    def estimate_saved_s(self, records: Iterable[StepRecord]) -> float:
        """Seconds that the speculating steps saved over plain decoding of the same tokens; negative if they lost."""
        speculating = [record for record in records if not record.plan.is_plain]
        plain_s = sum(
            record.acceptance_length
            * self.predict_step_s(PLAIN, PlanInputs(num_seqs=record.num_seqs, num_read=record.num_read))
            for record in speculating
        )
        return plain_s - sum(record.step_s - record.prefill_s for record in speculating)

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._learn()
        return {
            "margin": self.margin,
            "trial_share": self.trial_share,
            "max_num_tokens": self.max_num_tokens,
            "costs": self._predictor.costs.state_dict(),
            "expectation": self._predictor.expectation.state_dict(),
            **self._recording.state_dict(),
            **self._budget.state_dict(),
            **self._trials.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AutoPlanner:
        """The planner that `state_dict` described."""
        costs = StepCosts.from_state(state["costs"])
        settings = {name: state[name] for name in ("margin", "trial_share", "max_num_tokens") if name in state}
        planner = cls(costs.start, **settings)  # older states have no settings
        planner._predictor.costs = costs
        planner._predictor.expectation = Expectation.from_state(state["expectation"])
        planner._budget.restore(state)
        planner._trials.restore(state)
        if "recording_s" in state:  # older states have none
            planner._recording = RecordingPrice.from_state(state)
        return planner


def _group_alike(records: Sequence[StepRecord]) -> Iterator[list[StepRecord]]:
    for _, alike in groupby(records, _find_kind):
        while group := list(islice(alike, 1 + MOST_STEPS)):
            yield group


def _find_kind(record: StepRecord) -> tuple[SpeculationPlan, int, bool, bool, tuple[bool, bool]]:
    """Steps in a row of one kind are learnt from at once: one plan, as many sequences, no drafter catching up.

    Plain ones that an octave of sequences took, too: they end one by one, and what a step takes rises evenly.
    """
    plan, num_seqs = record.plan, record.num_seqs
    is_behind = record.num_unread > (1 + plan.depth) * num_seqs and not plan.is_plain
    how = record.is_steady, record.has_recorded
    return plan, num_seqs.bit_length() if plan.is_plain else num_seqs, bool(record.offered), is_behind, how
