"""What is tried costs no more than trials may lose, and first trials go where hardly anything was seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SMALL_CPU
from fastgrpo.planner import PlanInputs
from fastgrpo.planner.costs import StepCosts
from fastgrpo.planner.expectation import Expectation
from fastgrpo.planner.grid import GRID
from fastgrpo.planner.predictor import Predictor
from fastgrpo.planner.trials import Trials
from fastgrpo.types import PLAIN, SpeculationPlan
from test_planner import build_record

DRAFT, RIVAL = (
    SpeculationPlan(depth=1, width=1, num_draft_tokens=1),
    SpeculationPlan(depth=2, width=1, num_draft_tokens=2),
)
PLAIN_RATE = 100.0  # tokens per second, whoever is live
LENGTHS = {PLAIN: 1.0, DRAFT: 1.2, RIVAL: 1.9}


def build_trials(
    monkeypatch: pytest.MonkeyPatch, *, doubts: Mapping[int, float], known: list[list[float]] | None = None
) -> Trials:
    """Trials that are due, without credit, where prices of forwards are in doubt by their number of tokens."""
    predictor = Predictor(StepCosts(SMALL_CPU), Expectation(known), GRID)
    monkeypatch.setattr(predictor.costs, "find_target_doubt", lambda num_tokens: doubts.get(num_tokens, 0.0))
    monkeypatch.setattr(predictor.expectation, "predict_length", lambda plan, num_seqs: LENGTHS[plan])
    trials = Trials(predictor)
    take_steps(trials, 24)
    return trials


def take_steps(trials: Trials, count: int, plan: SpeculationPlan = PLAIN, num_seqs: int = 1) -> None:
    for _ in range(count):
        trials.count(build_record(plan, num_seqs))


def begin(trials: Trials, other: SpeculationPlan, current: SpeculationPlan, ratio: float, num_seqs: int = 4) -> int:
    """Try a plan of so much of the current one's rate."""
    rates = dict.fromkeys((PLAIN, DRAFT, RIVAL), PLAIN_RATE)
    if other.is_plain:
        rates[current] /= ratio
    else:
        rates[other] *= ratio
    return trials.begin(other, current, rates, PlanInputs(num_seqs=num_seqs), least_gain=1.0)


@given(
    st.floats(0, 0.5),
    st.lists(
        st.tuples(
            st.sampled_from([(DRAFT, PLAIN), (PLAIN, DRAFT), (RIVAL, DRAFT)]),
            st.floats(0.6, 1.4),
            st.sampled_from([1, 4, 5, 7, 16]),
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_trials_lose_their_credit_and_a_plain_step_an_octave_at_most_whatever_others_promise_to_gain(credit_s, asked):
    with pytest.MonkeyPatch.context() as monkeypatch:
        trials = build_trials(monkeypatch, doubts=dict.fromkeys(range(100), 0.2))
        trials.credit_s = credit_s
        lost_s, most_s = 0.0, defaultdict(float)
        for (other, current), ratio, num_seqs in asked:
            num_steps = begin(trials, other, current, ratio, num_seqs)
            loss = 1 - ratio if other.is_plain else 1 / ratio - 1
            lost_s += max(num_steps * num_seqs * LENGTHS[other] * loss / PLAIN_RATE, 0.0)
            octave = num_seqs.bit_length()
            most_s[octave] = max(most_s[octave], num_seqs / PLAIN_RATE)
            assert all(first_s <= most_s[each] + 1e-9 for each, first_s in trials.first_loss_s.items())
            assert trials.credit_s == pytest.approx(credit_s - lost_s + sum(trials.first_loss_s.values()), abs=1e-9)
            assert trials.credit_s >= 0
            take_steps(trials, 24)


@pytest.mark.parametrize(
    ("other", "current", "ratio", "doubts", "is_tried"),
    [
        (DRAFT, PLAIN, 0.88, {}, True),
        (DRAFT, PLAIN, 0.79, {4: 0.2}, False),  # unlikely
        (DRAFT, PLAIN, 0.79, {8: 0.2}, True),  # but by a price that may be wrong
        (PLAIN, DRAFT, 0.9, {4: 0.2}, True),
        (PLAIN, DRAFT, 0.9, {8: 0.2}, False),  # what it takes is known
        (DRAFT, PLAIN, 0.0, {8: 9.0}, False),  # it does not fit
    ],
)
def test_first_trials_are_of_what_is_likely_and_was_hardly_seen(other, current, ratio, doubts, is_tried, monkeypatch):
    trials = build_trials(monkeypatch, doubts=doubts)
    assert bool(begin(trials, other, current, ratio)) == is_tried
    trials.credit_s = 9.0
    assert not (is_tried and begin(trials, other, current, ratio)), "one was just begun"


def test_drafts_that_are_known_to_lose_get_no_first_trials(monkeypatch):
    assert not begin(build_trials(monkeypatch, doubts={}, known=[[0.5]]), DRAFT, PLAIN, 0.88)


def test_first_trials_of_drafts_end_once_some_were_made_with_about_as_many_live(monkeypatch):
    trials = build_trials(monkeypatch, doubts={})
    take_steps(trials, 12, DRAFT, num_seqs=4)
    assert not begin(trials, DRAFT, PLAIN, 0.88, num_seqs=7)
    assert begin(trials, DRAFT, PLAIN, 0.88, num_seqs=8)


@pytest.mark.parametrize(
    ("num_drafted", "other", "doubts", "factor"),
    [
        (36, DRAFT, {}, 2.0),
        (35, DRAFT, {}, 1.0),  # hardly known yet
        (36, DRAFT, {8: 0.2}, 1.0),  # by a price that may be wrong
        (36, PLAIN, {}, 1.0),  # what most steps are is never rarely looked at
    ],
)
def test_a_trial_of_drafts_that_teaches_little_is_charged_twice(num_drafted, other, doubts, factor, monkeypatch):
    trials = build_trials(monkeypatch, doubts=doubts)
    take_steps(trials, num_drafted, DRAFT, num_seqs=4)
    take_steps(trials, 300)
    trials.credit_s = 9.0
    current, own_rate = (PLAIN, 80) if other is DRAFT else (DRAFT, 100)
    num_steps = begin(trials, other, current, 0.8)
    loss_s = num_steps * 4 * LENGTHS[other] * (1 - 0.8) / own_rate
    assert num_steps and 9.0 - trials.credit_s == pytest.approx(factor * loss_s)


def test_a_clear_lead_over_plain_decoding_is_believed_for_a_while_where_that_was_seen(monkeypatch):
    trials = build_trials(monkeypatch, doubts={})
    trials.credit_s = 9.0
    assert begin(trials, PLAIN, DRAFT, 0.5), "nobody decoded plainly with about four live"
    for num_steps, is_tried in ((4, False), (200, False), (60, True)):
        take_steps(trials, 1, PLAIN if num_steps == 4 else DRAFT, num_seqs=6)
        take_steps(trials, num_steps, DRAFT)
        assert bool(begin(trials, PLAIN, DRAFT, 0.5)) == is_tried
