"""How many tokens a step of a plan is expected to emit, learnt from the steps that were taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrpo.planner.acceptance import GUESS_WEIGHT, AcceptanceTable, Rates, compute_expected_length
from fastgrpo.types import SpeculationPlan, StepRecord

_WINDOW = 1200.0  # sequences and steps that what was counted is remembered for
_LOCAL_WEIGHT = 50.0  # trials that the table of the octave below counts for
_KNOWN_WEIGHT = 32.0  # and that what was measured before does, on other text
_PRIOR_ALL, _PRIOR_PLAN = 60.0, 300.0  # draft tokens that agreement with the tables counts for, of all and of a plan
_SURPRISE, _SURPRISE_STEPS, _LEAST_RATE = 4.0, 16, 0.02  # standard deviations; half-life; as if so many were accepted
_WHOLE = 0.9  # of a plan's draft tokens, that were verified where what was accepted is compared with what was predicted
_LEAST_TRIALS = 12.0  # that remain of what was counted, however many rollouts begin
_NEW_STEPS = 16  # speculating steps that all is new for
_KEEP_STEPS, _MOST_KEPT = 16, 128  # steps that predictions are kept for; drafts, where fewer than a quarter of all


class _Agreement:
    """Draft tokens that were accepted, beside what was predicted of them: decayed counts, drawn to agreement."""

    def __init__(self, prior: float, accepted: float = 0.0, predicted: float = 0.0) -> None:
        self.prior, self.accepted, self.predicted = prior, accepted, predicted

    def observe(self, accepted: float, predicted: float, num_drafts: int) -> None:
        self.fade(_keep(num_drafts))
        self.accepted += accepted
        self.predicted += predicted

    def fade(self, keep: float) -> None:
        self.accepted *= keep
        self.predicted *= keep

    @property
    def ratio(self) -> float:
        return (self.accepted + self.prior) / (self.predicted + self.prior)


class _Surprise:
    """First draft tokens that were accepted beyond what was expected, in the steps just past.

    They are counted whatever was verified: a budget of nothing, which a bad drafter gets, hides none of them.
    """

    def __init__(self, excess: float = 0.0, variance: float = 0.0, num_drafts: float = 0.0) -> None:
        self.excess, self.variance, self.num_drafts = excess, variance, num_drafts

    def observe(self, records: Sequence[StepRecord], rate: float) -> float | None:
        """The drafts just past, where chance does not explain what became of them; then it begins anew.

        Args:
            rate: of first draft tokens, that one of them is accepted.
        """
        rate = min(max(rate, _LEAST_RATE), 1 - _LEAST_RATE)
        num_drafts = sum(record.num_seqs for record in records)
        keep = 0.5 ** (len(records) / _SURPRISE_STEPS)
        self.excess = keep * self.excess + sum(sum(map(sum, record.hits[:1])) for record in records) - rate * num_drafts
        self.variance = keep**2 * self.variance + rate * (1 - rate) * num_drafts
        self.num_drafts = keep * self.num_drafts + num_drafts
        if self.excess**2 <= _SURPRISE**2 * self.variance:
            return None
        recent, self.excess, self.variance, self.num_drafts = self.num_drafts, 0.0, 0.0, 0.0
        return recent


class Expectation:
    """Expected tokens of plans, whether they were tried or not.

    A table of acceptance rates by depth and rank predicts every tree, one for each octave of live sequences, for
    stragglers write other text than most; each is drawn to the octave below. What all plans, and each plan by
    itself, then had accepted corrects the prediction: rates of depths and ranks do not say how they go together.

    Args:
        known: acceptance by depth and rank that was measured of the drafter before; None where nobody has.
    """

    def __init__(self, known: Rates | None = None) -> None:
        weight = GUESS_WEIGHT if known is None else _KNOWN_WEIGHT
        self.table = AcceptanceTable(prior_weight=weight, window=_WINDOW, known=known)
        self._local: dict[int, AcceptanceTable] = {}
        self._all = _Agreement(_PRIOR_ALL)
        self._plans: dict[SpeculationPlan, _Agreement] = {}
        self._surprise = _Surprise()
        self._age = 0
        self._num_unpredicted = 0  # drafts that predictions do not know of
        self._rates: dict[int, Rates] = {}  # by octave, until they are computed anew
        self._trees: dict[tuple[int, SpeculationPlan], float] = {}
        self._bounds: dict[int, NDArray[np.float64]] = {}

    @property
    def explored_depth(self) -> int:
        """Levels from the root whose rates rest on trials."""
        return self.table.explored_depth

    @property
    def is_new(self) -> bool:
        """Whether hardly anything was seen yet."""
        return self._age < _NEW_STEPS

    def predict_length(self, plan: SpeculationPlan, num_seqs: int) -> float:
        """Tokens per sequence and step with so many live, next token included."""
        if plan.is_plain:
            return 1.0
        own = self._plans.get(plan)
        accepted = self._predict_accepted(plan, num_seqs) * (own.ratio if own else 1.0)
        return 1 + min(accepted, plan.depth)

    def bound_lengths(self, num_seqs: int) -> NDArray[np.float64]:
        """At least what plans may be predicted, however many draft tokens they have: [depth from 0, width from 1]."""
        octave = num_seqs.bit_length()
        if octave not in self._bounds:
            rates = np.minimum(np.cumsum(self._find_rates(num_seqs), axis=1), 1.0)  # that any child is accepted
            ratio = self._all.ratio * max((each.ratio for each in self._plans.values()), default=1.0)
            accepted = max(ratio, self._all.ratio) * rates.cumprod(axis=0).cumsum(axis=0)
            self._bounds[octave] = np.concatenate((np.ones_like(accepted[:1]), 1 + accepted))
        return self._bounds[octave]

    def observe(self, *records: StepRecord) -> None:
        """Learn from steps in which drafts were asked for, all of one plan and with as many live sequences."""
        plan, num_seqs, num_steps = records[0].plan, records[0].num_seqs, len(records)
        num_drafts = num_seqs * num_steps
        accepted = float(sum(record.num_emitted for record in records) - num_drafts)
        nodes = sum(record.num_tokens for record in records) / num_drafts - 1
        if not self.is_new:  # while it is, the tables are far off, which says nothing of this plan
            if nodes > _WHOLE * plan.num_draft_tokens:  # the likeliest of fewer say nothing of all
                predicted = num_drafts * self._predict_mean_tree(plan, num_seqs, nodes)
                self._all.observe(accepted, predicted, num_drafts)
                own = self._plans.setdefault(plan, _Agreement(_PRIOR_PLAN))  # of what all plans together do not explain
                own.observe(accepted, self._all.ratio * predicted, num_drafts)
            self._notice(plan, records)
        self.table.observe(*records)
        self._find_local(num_seqs.bit_length()).observe(*records)
        self._age += num_steps
        self._num_unpredicted += num_drafts
        if self.is_new or self._num_unpredicted >= max(_KEEP_STEPS * num_seqs, min(self._age // 4, _MOST_KEPT)):
            self._forget_predictions()

    def _notice(self, plan: SpeculationPlan, records: Sequence[StepRecord]) -> None:
        """Where first draft tokens are clearly accepted as they were not before, that was of other text or drafts.

        With few live sequences the window is many steps long; what went before counts for no more than what showed it,
        and so does what was known of the drafter.
        """
        num_seqs = records[0].num_seqs
        rate = sum(self._find_rates(num_seqs)[0][: plan.width])
        recent = self._surprise.observe(records, rate)
        if recent is None:
            return
        self._doubt_known(recent)
        for table in (self.table, self._find_local(num_seqs.bit_length())):
            table.fade(min(recent / max(table.offered[0][0], 1.0), 1.0))
        for agreement in (self._all, *self._plans.values()):
            agreement.fade(min(recent / _WINDOW, 1.0))
        self._age = min(self._age, _NEW_STEPS)  # predictions are made anew more often again
        self._forget_predictions()

    def _doubt_known(self, most: float) -> None:
        """What was known of the drafter counts for so many trials at most, and for as many as a guess at least."""
        self.table.prior_weight = min(self.table.prior_weight, max(most, GUESS_WEIGHT))

    def fade(self, keep: float) -> None:
        """Weigh down all that was counted, and what was known before.

        Of trials some are left: where rollouts are short, a guess that they contradicted would come back else.
        """
        self._doubt_known(keep * self.table.prior_weight)
        for table in (self.table, *self._local.values()):
            table.fade(keep, least=_LEAST_TRIALS)
        for agreement in (self._all, *self._plans.values()):
            agreement.fade(keep)
        self._forget_predictions()

    def _predict_accepted(self, plan: SpeculationPlan, num_seqs: int) -> float:
        """Draft tokens accepted of a tree, from what all plans share."""
        key = (num_seqs.bit_length(), plan)
        if key not in self._trees:
            self._trees[key] = compute_expected_length(plan, self._find_rates(num_seqs)) - 1
        return self._trees[key] * self._all.ratio

    def _predict_mean_tree(self, plan: SpeculationPlan, num_seqs: int, num_nodes: float) -> float:
        """The same of a tree of so many nodes in the mean, before what agreement says."""
        rates, fewer = self._find_rates(num_seqs), int(num_nodes)
        least, most = (compute_expected_length(plan, rates, count) - 1 for count in (fewer, fewer + 1))
        return least + (num_nodes - fewer) * (most - least)

    def _find_local(self, octave: int) -> AcceptanceTable:
        if octave not in self._local:
            below = self._find_local(octave - 1) if octave > 1 else self.table
            self._local[octave] = AcceptanceTable(prior_weight=_LOCAL_WEIGHT, window=_WINDOW, above=below)
        return self._local[octave]

    def _find_rates(self, num_seqs: int) -> Rates:
        octave = num_seqs.bit_length()
        if octave not in self._rates:
            self._rates[octave] = self._find_local(octave).compute_rates()
        return self._rates[octave]

    def _forget_predictions(self) -> None:
        self._num_unpredicted = 0
        self._rates.clear()
        self._trees.clear()
        self._bounds.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "table": self.table.state_dict(),
            "known": self.table.known,
            "prior_weight": self.table.prior_weight,
            "local": [[octave, table.state_dict()] for octave, table in self._local.items()],
            "all": [self._all.accepted, self._all.predicted],
            "plans": [[asdict(plan), each.accepted, each.predicted] for plan, each in self._plans.items()],
            "surprise": list(vars(self._surprise).values()),
            "age": self._age,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Expectation:
        """The expectation that `state_dict` described."""
        expectation = cls(state.get("known") or None)  # older states have none
        expectation.table.prior_weight = float(state.get("prior_weight", expectation.table.prior_weight))
        expectation.table.restore(state["table"])
        for octave, table in state["local"]:
            expectation._find_local(octave).restore(table)
        expectation._all = _Agreement(_PRIOR_ALL, *state["all"])
        expectation._plans = {
            SpeculationPlan(**plan): _Agreement(_PRIOR_PLAN, *counts) for plan, *counts in state["plans"]
        }
        expectation._surprise = _Surprise(*map(float, state.get("surprise", ())))  # older states have none
        expectation._age = int(state["age"])
        return expectation


def _keep(num_drafts: int) -> float:
    return max(1 - num_drafts / _WINDOW, 0.5)
