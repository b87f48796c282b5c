"""TLT's bandit: which arm it may play, and that it finds the one that pays."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.planner import BanditPlanner, PlanInputs, restore_planner
from fastgrpo.planner.bandit import ARMS, BUCKETS, MAX_SPECULATING, find_bucket
from fastgrpo.types import PLAIN, SpeculationPlan
from test_planner import build_record


def reward_arms(planner: BanditPlanner, num_seqs: int, num_steps: int, best: int) -> list[int]:
    """The arms of some steps on a machine where arm `best` emits twice as much as the others."""
    played = []
    for _ in range(num_steps):
        plan = planner.plan(PlanInputs(num_seqs=num_seqs))
        played.append(ARMS.index(plan))
        num_emitted = num_seqs * (4 if played[-1] == best else 2)
        planner.observe(build_record(plan, num_seqs, num_emitted=num_emitted))
    return played


@given(
    max_num_tokens=st.integers(1, 2000),
    seed=st.integers(0, 9),
    steps=st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 1)), min_size=1, max_size=30),
)
def test_the_bandit_fits_its_bound_and_is_a_function_of_its_state(max_num_tokens, seed, steps):
    planner = BanditPlanner(max_num_tokens=max_num_tokens, seed=seed, epsilon=0.5)
    for num_seqs, step_s in steps:
        twin = restore_planner("bandit", json.loads(json.dumps(planner.state_dict())))
        assert twin == planner
        state, inputs = random.getstate(), PlanInputs(num_seqs=num_seqs)
        plan = planner.plan(inputs)
        assert plan == twin.plan(inputs) and random.getstate() == state
        assert plan.is_plain or (plan in ARMS and num_seqs * (1 + plan.num_draft_tokens) <= max_num_tokens)
        assert plan.is_plain == (num_seqs > MAX_SPECULATING or num_seqs * 9 > max_num_tokens)
        planner.observe(build_record(plan, num_seqs, step_s=step_s))


def test_it_speculates_below_32_live_sequences_alone():
    planner = BanditPlanner(max_num_tokens=4096)
    assert [planner.plan(PlanInputs(num_seqs=count)).is_plain for count in (31, 32, 33)] == [False, True, True]


@given(st.integers(1, 500))
def test_buckets_begin_at_their_thresholds(num_seqs):
    bucket = find_bucket(num_seqs)
    assert BUCKETS[bucket] <= num_seqs < (*BUCKETS[1:], math.inf)[bucket]


@pytest.mark.parametrize("best", range(len(ARMS)))
@pytest.mark.parametrize("num_seqs", [1, 4, 20, 31])
def test_the_bandit_tries_each_arm_and_then_mostly_plays_the_best(best, num_seqs):
    played = reward_arms(BanditPlanner(max_num_tokens=4096), num_seqs, 400, best)
    assert played[: len(ARMS)] == list(range(len(ARMS)))
    assert 0.85 < played[4:].count(best) / 396 < 0.98
    assert set(played[4:]) == set(range(len(ARMS))), "epsilon explores"


def test_the_bandit_follows_a_best_arm_that_changes():
    planner = BanditPlanner(max_num_tokens=4096)
    reward_arms(planner, 4, 100, best=0)
    assert reward_arms(planner, 4, 1000, best=3)[500:].count(3) > 400


def test_buckets_learn_apart_and_prompts_cost_an_arm_nothing():
    planner = BanditPlanner(max_num_tokens=4096, window=2)
    reward_arms(planner, 1, 20, best=0)
    assert planner.plan(PlanInputs(num_seqs=2)) == ARMS[0], "untried there"
    record = build_record(ARMS[2], 8, num_emitted=24, step_s=0.5, prefill_s=0.3)
    for _ in range(3):
        planner.observe(record)
    assert list(planner.rewards[find_bucket(8)][2]) == pytest.approx([24 / 0.2] * 2)
    before = planner.state_dict()
    other = SpeculationPlan(depth=1, width=1, num_draft_tokens=1)
    for ignored in (build_record(PLAIN, 8), build_record(other, 8), build_record(ARMS[0], 33)):
        planner.observe(ignored)
    assert planner.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_tokens": 0}, "max_num_tokens must be at least 1, got 0"),
        ({"max_num_tokens": 8, "epsilon": 1.5}, r"epsilon must be in \[0, 1\], got 1\.5"),
        ({"max_num_tokens": 8, "window": 0}, "window must be at least 1 reward, got 0"),
    ],
)
def test_impossible_bandits_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BanditPlanner(**settings)
