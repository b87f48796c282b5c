"""A decision stands for a bounded number of steps, and only while the state that it was made for lasts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgrpo.planner import PlanInputs
from fastgrpo.planner.term import MOST_STEPS, NUM_STEPS, Term

STATE = PlanInputs(num_seqs=6, num_read=1000, max_draft_tokens=20)


def count_steps(term: Term, inputs: PlanInputs = STATE) -> int:
    """Steps before the next decision."""
    count = 0
    while term.goes_on(inputs):
        count += 1
    return count


def test_a_decision_that_is_made_again_stands_longer_each_time_up_to_a_bound():
    term, counts = Term(), []
    for stands in (False, True, True, True, False, True):
        assert not term.goes_on(STATE)
        term.begin(STATE, stands=stands)
        counts.append(count_steps(term))
    assert counts == [NUM_STEPS, 2 * NUM_STEPS + 1, MOST_STEPS, MOST_STEPS, NUM_STEPS, 2 * NUM_STEPS + 1]


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({}, False),
        ({"num_seqs": 5}, False),
        ({"num_seqs": 4, "num_read": 501}, False),
        ({"num_read": 500}, False),
        ({"num_read": 2000, "num_waiting": 9, "num_unread": 7}, False),
        ({"num_seqs": 7}, True),
        ({"num_seqs": 3}, True),
        ({"num_read": 499}, True),
        ({"num_read": 2001}, True),
        ({"max_draft_tokens": 19}, True),
        ({"max_draft_tokens": None}, True),
    ],
)
def test_it_ends_when_somebody_joins_or_the_state_is_another(change, ends):
    term = Term()
    term.goes_on(STATE)
    term.begin(STATE, stands=False)
    assert term.goes_on(replace(STATE, **change)) != ends


@pytest.mark.parametrize(("most", "expected"), [(0, 0), (0.9, 0), (3.7, 3), (1000.0, NUM_STEPS)])
def test_it_stands_for_no_longer_than_it_may(most, expected):
    term = Term()
    term.goes_on(STATE)
    term.begin(STATE, stands=False, most_steps=most)
    assert count_steps(term) == expected


def test_a_rollout_begins_with_a_decision_of_its_own():
    term = Term()
    term.goes_on(STATE)
    term.begin(STATE, stands=False)
    term.forget()
    assert not term.goes_on(STATE)
    term.begin(STATE, stands=True)
    assert count_steps(term) == NUM_STEPS, "the same decision, for another rollout"
