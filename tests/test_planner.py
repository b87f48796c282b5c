"""The planner decides from counted facts alone; what it decides is the best of its grid, and mistakes cost little."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

import fastgrpo
from conftest import SMALL_CPU, SyntheticClockPlanner
from fastgrpo.planner import (
    SPECULATION,
    AcceptanceTable,
    AutoPlanner,
    BanditPlanner,
    FixedPlanner,
    HardwareProfile,
    PaperPlanner,
    PlanInputs,
    Planner,
    build_planner,
    compute_expected_length,
    restore_planner,
)
from fastgrpo.planner.acceptance import MAX_DEPTH, MAX_WIDTH
from fastgrpo.planner.bandit import ARMS
from fastgrpo.planner.costs import StepCosts
from fastgrpo.planner.expectation import Expectation
from fastgrpo.planner.grid import GRID
from fastgrpo.planner.recording_price import RECORDING_S, RecordingPrice
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

FLAT = HardwareProfile(num_tokens=(1, 64, 512), target_s=(0.020, 0.0201, 0.021), draft_s=(0.001, 0.001, 0.0011))


def build_record(plan: SpeculationPlan, num_seqs: int, **facts: object) -> StepRecord:
    settings = {
        "num_seqs": num_seqs,
        "num_waiting": 0,
        "plan": plan,
        "num_tokens": num_seqs * (1 + plan.num_draft_tokens),
        "num_emitted": num_seqs,
        "num_read": 100 * num_seqs,
        "num_prefilled": 0,
        "offered": ((num_seqs,) * plan.width,) if plan.depth else (),
        "hits": ((0,) * plan.width,) if plan.depth else (),
        "prefill_s": 0.0,
        "draft_s": 0.0,
        "target_s": 0.01,
        "verify_s": 0.0,
        "step_s": 0.01,
    }
    return StepRecord(**(settings | facts))


def play_step(plan: SpeculationPlan, num_seqs: int, chance: float, rng: random.Random) -> StepRecord:
    """One step in which each walked node's first child is right with `chance`, its other children never."""
    offered, hits, num_emitted, walkers = [], [], num_seqs, num_seqs
    for _ in range(plan.depth):
        if not walkers:
            break
        accepted = sum(rng.random() < chance for _ in range(walkers))
        offered.append((walkers,) * plan.width)
        hits.append((accepted, *[0] * (plan.width - 1)))
        num_emitted += accepted
        walkers = accepted
    return build_record(plan, num_seqs, num_emitted=num_emitted, offered=tuple(offered), hits=tuple(hits))


def play(planner: SyntheticClockPlanner, num_steps: int, num_seqs: int, chance: float) -> list[StepRecord]:
    """A rollout on the planner's machine."""
    rng, records = random.Random(0), []
    planner.begin()
    for _ in range(num_steps):
        records.append(play_step(planner.plan(PlanInputs(num_seqs=num_seqs)), num_seqs, chance, rng))
        planner.observe(records[-1])
    return records


def compute_speed(planner: SyntheticClockPlanner, records: list[StepRecord]) -> float:
    """Tokens per second relative to plain decoding."""
    seconds = sum(planner.compute_step_s(record) for record in records)
    plain_s = sum(planner.speed * planner.machine.compute_target_s(r.num_seqs) for r in records)
    return sum(r.num_emitted for r in records) / seconds / (sum(r.num_seqs for r in records) / plain_s)


# -- purity --------------------------------------------------------------------------------------------------


def test_planner_types_and_metrics_import_no_torch():
    """Loaded without the package's own __init__, which brings the engine."""
    folder = str(Path(fastgrpo.__file__).parent)
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('fastgrpo'); package.__path__ = [{folder!r}]\n"
        "sys.modules['fastgrpo'] = package\n"
        "import fastgrpo.planner, fastgrpo.lengths, fastgrpo.types, fastgrpo.metrics, fastgrpo.draft_control\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
def test_the_same_facts_give_the_same_plans(chance):
    histories = [play(SyntheticClockPlanner(), 120, 4, chance) for _ in range(2)]
    assert histories[0] == histories[1]


# -- the paper's rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_seqs", "num_verify", "width", "depth"),
    [(64, 2, 1, 3), (32, 5, 4, 3), (16, 10, 8, 3), (8, 20, 8, 4), (4, 40, 8, 5), (1, 160, 8, 5)],
)
def test_the_papers_schedule(num_seqs, num_verify, width, depth):
    """Capacity 160; the root counts in N_verify, and levels that cannot be filled are not drafted."""
    plan = PaperPlanner(capacity=160).plan(PlanInputs(num_seqs=num_seqs))
    assert plan.num_draft_tokens == num_verify - 1
    assert plan.width == width
    assert plan.depth == min(depth, num_verify - 1)


@pytest.mark.parametrize("num_seqs", [81, 100, 160, 1000])
def test_the_papers_rule_decodes_plainly_without_room_for_a_node(num_seqs):
    assert PaperPlanner(capacity=160).plan(PlanInputs(num_seqs=num_seqs)) == PLAIN


@given(
    capacity=st.floats(1, 5000),
    num_seqs=st.integers(1, 512),
    alpha=st.floats(1e-308, 1e308),
    num_read=st.integers(0, 99),
)
def test_the_papers_rule_stays_within_capacity(capacity, num_seqs, alpha, num_read):
    """And is a function of the live sequences: neither what is read nor what was observed matters."""
    planner = PaperPlanner(capacity=capacity, alpha=alpha)
    plan = planner.plan(PlanInputs(num_seqs=num_seqs))
    assert plan.is_plain or num_seqs * (1 + plan.num_draft_tokens) <= capacity
    assert plan.num_draft_tokens <= min(plan.width + plan.width**2 * max(plan.depth - 1, 0), planner.max_verify - 1)
    assert plan.width <= planner.max_width and plan.depth <= planner.max_depth
    planner.observe(build_record(plan, num_seqs))
    assert planner.plan(PlanInputs(num_seqs=num_seqs, num_read=num_read)) == plan


@pytest.mark.parametrize("capacity", [0, 0.5, -3, math.nan, math.inf])
def test_a_capacity_below_one_token_is_refused(capacity):
    with pytest.raises(ValueError, match=rf"capacity must be at least 1 token, got {capacity}"):
        PaperPlanner(capacity=capacity)


@given(st.integers(1, 512))
def test_the_papers_own_capacity_is_160_on_every_machine(num_seqs):
    own, inputs = PaperPlanner.with_own_capacity(), PlanInputs(num_seqs=num_seqs)
    assert own.plan(inputs) == PaperPlanner(capacity=160).plan(inputs)
    assert (own.name, own.state_dict()) == ("paper-own", {"capacity": 160})


# -- expected length -----------------------------------------------------------------------------------------


def enumerate_chances(plan: SpeculationPlan, rates: list[list[float]]) -> list[float]:
    """The path chance of every node of the full tree."""
    return [
        math.prod(rates[level][rank] for level, rank in enumerate(path))
        for depth in range(1, plan.depth + 1)
        for path in itertools.product(range(plan.width), repeat=depth)
    ]


@given(
    depth=st.integers(1, 4),
    width=st.integers(1, 3),
    extra=st.integers(0, 20),
    rates=st.lists(st.lists(st.floats(0, 0.5), min_size=3, max_size=3), min_size=4, max_size=4),
)
def test_expected_length_is_that_of_the_best_tree(depth, width, extra, rates):
    """One, and the largest path chances: a parent's is never below its child's, so they form a tree."""
    plan = SpeculationPlan(depth=depth, width=width, num_draft_tokens=depth + extra)
    best = sorted(enumerate_chances(plan, rates), reverse=True)[: plan.num_draft_tokens]
    assert compute_expected_length(plan, rates) == pytest.approx(1 + sum(best))


def test_expected_length_at_the_ends():
    zero, one = [[0.0] * MAX_WIDTH] * MAX_DEPTH, [[1.0] + [0.0] * (MAX_WIDTH - 1)] * MAX_DEPTH
    assert compute_expected_length(PLAIN, one) == 1
    for plan in GRID:
        assert compute_expected_length(plan, zero) == 1
        assert compute_expected_length(plan, one) == 1 + plan.depth


def test_acceptance_rates_are_counted_and_forgotten():
    table = AcceptanceTable(window=500)
    assert table.compute_rates()[0][0] == pytest.approx(0.3)
    plan = SpeculationPlan(depth=1, width=2, num_draft_tokens=2)
    for _ in range(300):
        table.observe(build_record(plan, 10, offered=((10, 10),), hits=((7, 2),)))
    assert table.compute_rates()[0][0] == pytest.approx(0.7, abs=0.01)
    assert table.compute_rates()[0][1] == pytest.approx(0.2, abs=0.01)
    for _ in range(300):
        table.observe(build_record(plan, 10, offered=((10, 10),), hits=((1, 0),)))
    assert table.compute_rates()[0][0] == pytest.approx(0.1, abs=0.02)
    assert all(0 <= rate <= 1 for row in table.compute_rates() for rate in row)


# -- the best of the grid ------------------------------------------------------------------------------------


@given(
    num_seqs=st.integers(1, 200),
    num_waiting=st.integers(0, 50),
    chance=st.floats(0, 0.95),
    slope=st.floats(0, 0.01),
    draft_s=st.floats(0, 0.01),
    room=st.none() | st.integers(0, 60),
)
def test_the_chosen_plan_promises_most(num_seqs, num_waiting, chance, slope, draft_s, room):
    """A fresh planner with a known table, against tokens per second computed for each plan in turn."""
    profile = HardwareProfile(
        num_tokens=(1, 64, 256),
        target_s=(0.02, 0.02 + slope, 0.02 + 20 * slope),
        draft_s=(draft_s + 1e-6,) * 3,
        sample_s=1e-5,
    )
    planner = AutoPlanner(profile)
    planner.expectation.table.offered = [[1e9] * MAX_WIDTH for _ in range(MAX_DEPTH)]
    planner.expectation.table.hits = [[1e9 * chance * 0.5**rank for rank in range(MAX_WIDTH)] for _ in range(MAX_DEPTH)]
    rates = [[min(1.0, chance * 0.5**rank) for rank in range(MAX_WIDTH)]] * MAX_DEPTH

    def tokens_per_s(plan: SpeculationPlan) -> float:
        length = min(compute_expected_length(plan, rates), 1 + plan.depth)
        seconds = profile.compute_target_s(num_seqs * (1 + plan.num_draft_tokens)) + 1e-5 * num_seqs * length
        if not plan.is_plain:
            seconds += plan.depth * (draft_s + 1e-6)
        return num_seqs * length / seconds

    most = 1000 if room is None else room
    fitting = [
        p for p in GRID
        if num_seqs * (1 + p.num_draft_tokens) <= planner.max_num_tokens and p.num_draft_tokens <= most
    ]  # fmt: skip
    chosen = planner.plan(PlanInputs(num_seqs=num_seqs, num_waiting=num_waiting, max_draft_tokens=room))
    plain, best = tokens_per_s(PLAIN), max([tokens_per_s(plan) for plan in fitting], default=0.0)
    if not chosen.is_plain:
        assert chosen in fitting
    if best > planner.margin * plain * 1.001:
        assert tokens_per_s(chosen) == pytest.approx(best, rel=1e-6)
    elif best < planner.margin * plain * 0.999:
        assert chosen.is_plain, "nothing was earned yet that a trial could lose"


# -- mistakes cost little ------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [SMALL_CPU, FLAT], ids=["small_cpu", "flat"])
@pytest.mark.parametrize("speed", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("num_seqs", [1, 8, 32, 64])
def test_a_useless_drafter_is_dropped_whatever_the_profile_said(machine, speed, num_seqs):
    """Also where the machine is five times slower or faster than when it was measured."""
    planner = SyntheticClockPlanner(machine, speed=speed)
    records = play(planner, 600, num_seqs, chance=0.0)
    has_tried = [not record.plan.is_plain for record in records]
    assert sum(has_tried[:100]) <= 60
    assert sum(has_tried[100:]) <= 1 + 500 // 8, "trials are eight steps apart at least"
    assert compute_speed(planner, records[100:]) > 0.985


@pytest.mark.parametrize("believed", [0.2, 0.5, 2.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("num_seqs", [1, 4])
def test_a_profile_of_a_busy_machine_heals_within_some_tens_of_steps(believed, num_seqs):
    """All of it was believed so many times dearer than it is, drafts too, of which plain steps say nothing."""
    planner = SyntheticClockPlanner(XEON)
    names = ("target_s", "draft_s", "draft_start_s")
    every = {name: tuple(believed * s for s in getattr(XEON, name)) for name in names}
    planner._predictor.costs = StepCosts(replace(XEON, **every, draft_read_s=believed * XEON.draft_read_s))
    drafted = [not record.plan.is_plain for record in play(planner, 200, num_seqs, chance=0.75)]
    assert sum(drafted[80:]) > 0.8 * 120


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_drafts_that_look_far_too_dear_heal_by_trials_of_what_was_never_tried(num_seqs):
    """No other tree is thought to come near what the smallest makes, which says little of what the others take."""
    grid = tuple(2**n for n in range(10))
    truth = HardwareProfile(num_tokens=grid, target_s=tuple(0.02 * max(1, n / 64) for n in grid), draft_s=(0.002,) * 10)
    planner, settled = SyntheticClockPlanner(truth), SyntheticClockPlanner(truth)
    planner._predictor.costs = StepCosts(replace(truth, draft_s=(0.02,) * 10))
    for each in (planner, settled):
        play(each, 500, num_seqs, chance=0.8)
    least = 0.95 * compute_speed(settled, play(settled, 200, num_seqs, chance=0.8))
    assert compute_speed(planner, play(planner, 200, num_seqs, chance=0.8)) > least


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
def test_forwards_beyond_the_grid_are_learnt_as_they_are_predicted(factor):
    costs = StepCosts(SMALL_CPU)
    plan = SpeculationPlan(depth=1, width=8, num_draft_tokens=8)
    truth = factor * SMALL_CPU.compute_target_s(9 * 64)
    for _ in range(60):
        record = build_record(plan, 64, offered=((64,) * 8,), hits=((0,) * 8,))
        costs.observe(replace(record, target_s=truth, num_read=0))
    assert float(costs.predict_target_s(9 * 64.0, 0)) == pytest.approx(truth, rel=0.05)
    assert float(costs.profile.target_s[-1]) == pytest.approx(factor * SMALL_CPU.target_s[-1], rel=0.25)


@pytest.mark.parametrize("num_seqs", [1, 4])
def test_larger_forwards_that_look_too_dear_are_measured_by_trials(num_seqs):
    """By a wrong price no draft is worth verifying: a trial verifies some all the same, else the price never heals."""
    rng, drafted = random.Random(0), []
    planner = SyntheticClockPlanner(FLAT)
    grid = (num_seqs, num_seqs + 1, 512)
    planner._predictor.costs = StepCosts(
        HardwareProfile(num_tokens=grid, target_s=(0.02, 0.06, 0.063), draft_s=(0.001,) * 3)
    )
    planner.begin()
    for _ in range(1500):
        inputs = PlanInputs(num_seqs=num_seqs)
        plan = planner.plan(inputs)
        record = play_step(plan, num_seqs, 0.8, rng)
        chances = [0.8] * (num_seqs * plan.depth)
        budget = 0 if plan.is_plain else planner.choose_budget(plan, inputs, chances)
        num_emitted = num_seqs + min(record.num_emitted - num_seqs, budget)
        planner.observe(replace(record, num_tokens=num_seqs + budget, num_emitted=num_emitted))
        drafted.append(budget > 0)
    assert sum(drafted[1000:]) > 400


def test_a_price_that_is_believed_is_looked_at_again():
    """Larger forwards were dear when they were measured, so that none is worth making: on a machine that may change."""
    rng, num_trials, num_whole = random.Random(0), 0, 0
    dear = HardwareProfile(num_tokens=(4, 8, 512), target_s=(0.02, 0.04, 2.5), draft_s=(0.001,) * 3)
    planner = SyntheticClockPlanner(dear)
    planner.trial_share = 0.1
    for num_tokens in (4, 8) * 100:
        facts = {"num_tokens": num_tokens, "num_read": 0, "target_s": dear.compute_target_s(num_tokens)}
        planner._predictor.costs.observe(build_record(PLAIN, num_tokens, **facts))
    planner.begin()
    for _ in range(1500):
        inputs = PlanInputs(num_seqs=4)
        plan = planner.plan(inputs)
        budget = 0 if plan.is_plain else planner.choose_budget(plan, inputs, [0.5] * (4 * plan.depth))
        record = play_step(plan, 4, 0.5, rng)
        num_emitted = 4 + min(record.num_emitted - 4, budget)
        planner.observe(replace(record, num_tokens=4 + budget, num_emitted=num_emitted))
        num_trials += not plan.is_plain
        num_whole += budget > 0
    assert 2 <= num_whole < num_trials / 12, "of trials of three steps"


def test_a_clock_that_goes_astray_teaches_nothing():
    planner = SyntheticClockPlanner()
    play(planner, 60, 4, chance=0.7)
    before = planner.state_dict()["costs"]
    for seconds in ((math.nan,), (math.inf,), (-1.0,), (0.0,), (math.inf, -math.inf), (1e308, 1e308)):
        for each in seconds:
            times = dict.fromkeys(("target_s", "draft_s", "verify_s", "step_s"), each)
            AutoPlanner.observe(planner, replace(build_record(PLAIN, 4), **times))
        planner.expectation  # noqa: B018  it learns when it is asked
    assert planner.state_dict()["costs"]["target"]["prices"] == before["target"]["prices"]
    assert math.isfinite(planner._trials.credit_s) and all(map(math.isfinite, planner.profile.target_s))


@pytest.mark.parametrize("machine", [SMALL_CPU, FLAT], ids=["small_cpu", "flat"])
@pytest.mark.parametrize("num_seqs", [1, 64])
@pytest.mark.parametrize("trial_share", [0.002, 0.02])
def test_trials_go_on_and_cost_their_share(machine, num_seqs, trial_share):
    planner = SyntheticClockPlanner(machine)
    planner.trial_share = trial_share
    play(planner, 200, num_seqs, chance=0.0)
    records = play(planner, 4000, num_seqs, chance=0.0)
    trials = [record for record in records if not record.plan.is_plain]
    assert trials, "a drafter may have learnt"
    assert 1 - 1.5 * trial_share < compute_speed(planner, records) < 1 - 0.25 * trial_share


XEON = HardwareProfile(  # two cores, 135M parameters: measured
    num_tokens=(1, 2, 4, 8, 16, 32, 64),
    target_s=(0.0144, 0.0153, 0.0197, 0.0240, 0.0327, 0.0499, 0.0864),
    draft_s=(0.0011, 0.0011, 0.0011, 0.0016, 0.0025, 0.0042, 0.0075),
    draft_start_s=(0.0022, 0.0024, 0.0026, 0.0034, 0.0049, 0.0080, 0.0144),
    draft_read_s=1.5e-5,
)


@pytest.mark.parametrize("first_credit", [True, False])
def test_first_trials_are_paid_for_in_advance(first_credit):
    """Drafts win 12 % and are believed to lose as much: known after some tens of steps, and not after 150 without."""
    planner, rng, drafted = SyntheticClockPlanner(XEON), random.Random(1), []
    believed = distort(XEON, (1, 1, 1, 1.14, 1.14, 1.14, 1.14))
    planner._predictor.costs = StepCosts(replace(believed, draft_start_s=tuple(1.3 * s for s in XEON.draft_start_s)))
    if not first_credit:
        planner._trials.first_loss_s[3] = 1.0
    for _ in range(150):
        num_unread = 8 if drafted and drafted[-1] else 600
        plan = planner.plan(PlanInputs(num_seqs=4, num_read=600, num_unread=num_unread))
        drafted.append(not plan.is_plain)
        planner.observe(replace(play_step(plan, 4, 0.58, rng), num_read=600, num_unread=num_unread))
    assert sum(drafted) > 40 if first_credit else sum(drafted) <= 6


@pytest.mark.parametrize("num_seqs", [16, 32, 64])
@pytest.mark.parametrize("known", [[[0.75]] * 3, None])
def test_drafts_that_lose_a_little_cost_little_from_the_first_step_on(num_seqs, known):
    """They promise nearly as much as plain decoding, are tried first where many run, and win nothing there."""
    planner = SyntheticClockPlanner(XEON, acceptance=known)
    assert compute_speed(planner, play(planner, 160, num_seqs, chance=0.7)) > 0.98


def test_what_was_measured_of_a_drafter_before_is_believed_at_first():
    """Until some tens of trials say otherwise; ranks and depths that were not measured are guessed from the others."""
    known = [[0.6, 0.2], [0.5]]
    told, untold = Expectation(known), Expectation()
    plans = [SpeculationPlan(depth=d, width=w, num_draft_tokens=d * w) for d, w in ((1, 1), (1, 2), (2, 1), (3, 1))]
    lengths = [told.predict_length(plan, 4) for plan in plans]
    assert lengths == pytest.approx([1.6, 1.8, 1.9, 1 + 0.6 + 0.3 + 0.15])
    assert untold.predict_length(plans[0], 4) == pytest.approx(1.3)
    assert told.explored_depth == 2 and untold.explored_depth == 0
    twin = Expectation.from_state(json.loads(json.dumps(told.state_dict())))
    assert twin.predict_length(plans[1], 4) == lengths[1]
    rng = random.Random(0)
    for _ in range(60):
        told.observe(play_step(plans[0], 4, 0.1, rng))
    assert told.predict_length(plans[0], 4) < 1.2, "it was another text"


def test_with_a_known_acceptance_drafts_that_win_begin_at_once():
    told, untold = (AutoPlanner(XEON, acceptance=known) for known in ([[0.6], [0.5], [0.4]], None))
    inputs = PlanInputs(num_seqs=2, num_unread=8)
    assert not told.plan(inputs).is_plain and untold.plan(inputs).is_plain
    assert AutoPlanner(XEON, acceptance=[[0.0]]).plan(inputs).is_plain


@pytest.mark.parametrize("known", [0.9, 0.99])
def test_drafts_that_were_known_to_be_good_and_are_useless_now_end_within_a_bounded_number_of_steps(known):
    """One live sequence shows little in a step, and each surprise forgets some of it: not what was known before."""
    planner = SyntheticClockPlanner(XEON, acceptance=[[known]] * 4)
    drafted = [not record.plan.is_plain for record in play(planner, 400, 1, chance=0.0)]
    assert sum(drafted) < 130 and sum(drafted[200:]) < 40
    restored = AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))
    assert restored.expectation.table.prior_weight == planner.expectation.table.prior_weight < 32


def test_what_was_known_of_a_drafter_fades_as_all_that_is_counted_does():
    """Else it outweighs what each of many short rollouts says."""
    planner = SyntheticClockPlanner(XEON, acceptance=[[0.9]] * 3)
    drafted = [not record.plan.is_plain for _ in range(20) for record in play(planner, 60, 1, chance=0.0)]
    assert sum(drafted[300:]) < 130


@pytest.mark.parametrize("known", [[[0.8, 0.1], [0.6, 0.1], [0.5, 0.1]], None])
def test_a_useless_drafter_stays_dropped_in_many_short_rollouts(known):
    """What was counted fades with each of them, and came to count for less than the guess that it contradicts."""
    planner = SyntheticClockPlanner(XEON, acceptance=known)
    records = [record for _ in range(60) for record in play(planner, 10, 1, chance=0.0)]
    assert sum(not record.plan.is_plain for record in records[200:]) < 40
    assert compute_speed(planner, records[200:]) > 0.98


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_clear_gain_over_plain_decoding_that_was_not_seen_is_tried(is_asked, monkeypatch):
    """Plain decoding is believed 1.3 times as dear as it is, so that drafts which lose 4 % seem to win clearly."""
    planner, rng, drafted = SyntheticClockPlanner(XEON), random.Random(0), []
    planner._predictor.costs = StepCosts(distort(XEON, (1.3, 1.3, 1.3, 1.3, 1, 1, 1)))
    if not is_asked:
        monkeypatch.setattr(planner._predictor.costs, "find_target_doubt", lambda num_tokens: 0.0)
    for _ in range(400):
        if not is_asked:
            planner._trials.last_plain[4] = planner._trials.num_steps
        plan = planner.plan(PlanInputs(num_seqs=8))
        drafted.append(not plan.is_plain)
        planner.observe(play_step(plan, 8, 0.45, rng))
    assert all(drafted[:4]) and (sum(drafted[200:]) < 40) == is_asked, sum(drafted[200:])


@pytest.mark.parametrize(
    ("num_seqs", "factors"), [(8, (1, 1, 1.6, 1.6, 1.2, 1.2, 1)), (16, (1, 1, 1, 1.6, 1.6, 1.2, 1))]
)
def test_plain_decoding_in_doubt_is_tried_before_other_trees(num_seqs, factors):
    """Believed 1.6 times as dear as it is, it looks clearly worse than drafts which lose a tenth, and other trees that
    nobody has tried would take all that trials may lose.
    """
    planner, rng, plans = SyntheticClockPlanner(XEON, acceptance=[[0.5]] * 3), random.Random(0), []
    planner._predictor.costs = StepCosts(distort(XEON, factors))
    for _ in range(100):
        plans.append(planner.plan(PlanInputs(num_seqs=num_seqs, num_read=200 * num_seqs)))
        planner.observe(play_step(plans[-1], num_seqs, 0.5, rng))
    assert not plans[0].is_plain and sum(not plan.is_plain for plan in plans) < 20


@pytest.mark.parametrize("num_seqs", [8, 12, 24, 48])
def test_a_forward_that_was_measured_often_is_in_no_doubt_between_points_of_the_grid_either(num_seqs):
    costs, rng = StepCosts(XEON), random.Random(0)
    for _ in range(100):
        target_s = XEON.compute_target_s(num_seqs)
        costs.observe(replace(play_step(PLAIN, num_seqs, 0.0, rng), target_s=target_s, num_read=0))
    assert costs.find_target_doubt(num_seqs) < 0.04


def test_where_drafts_clearly_win_other_trees_are_tried_though_plain_decoding_is_in_doubt(monkeypatch):
    """It is not tried itself there, so that nothing was tried as long as that lasted."""
    planner = SyntheticClockPlanner(FLAT, acceptance=[[0.9]] * 8)
    monkeypatch.setattr(planner._predictor.costs, "find_target_doubt", lambda num_tokens: 0.25)
    plans = [record.plan for record in play(planner, 300, 4, chance=0.9)]
    assert sum(plan.is_plain for plan in plans) < 10 and len(set(plans[100:])) > 4


@pytest.mark.parametrize(("chance", "wins"), [(0.75, True), (0.0, False)])
def test_drafts_whose_forwards_look_too_dear_are_tried_in_time(chance, wins):
    """By the profile they would lose a third, and make 1.2 of plain decoding; what is known to be useless is left."""
    planner = SyntheticClockPlanner(XEON, acceptance=[[chance]] * 3)
    planner._predictor.costs = StepCosts(distort(XEON, (1, 1, 1, 1, 1.4, 1.4, 1.4)))
    rng, drafted = random.Random(0), []
    for _ in range(120):
        num_unread = 16 if drafted and drafted[-1] else 200
        plan = planner.plan(PlanInputs(num_seqs=8, num_read=800, num_unread=num_unread))
        drafted.append(not plan.is_plain)
        planner.observe(replace(play_step(plan, 8, chance, rng), num_read=800, num_unread=num_unread))
    assert not drafted[0] and (sum(drafted[60:]) > 50 if wins else not any(drafted))


def test_what_is_accepted_of_the_likeliest_few_says_nothing_of_all():
    """A budget of half of the drafts has eight in ten of them accepted, where five in ten are of all."""
    plan = SpeculationPlan(depth=1, width=1, num_draft_tokens=1, most_draft_tokens=1)
    expectation, rng = Expectation(), random.Random(0)
    for step in range(200):
        is_whole, hits = step < 30, sum(rng.random() < 0.5 for _ in range(16))
        facts = {"num_tokens": 32 if is_whole else 24, "num_emitted": 16 + (hits if is_whole else round(0.8 * hits))}
        expectation.observe(build_record(plan, 16, offered=((16,),), hits=((hits,),), **facts))
    assert expectation.predict_length(plan, 16) == pytest.approx(1.5, abs=0.04)


@pytest.mark.parametrize("num_seqs", [1, 2, 4, 8])
def test_a_drafter_that_was_good_for_long_is_dropped_as_soon_as_it_is_useless(num_seqs):
    """With few live sequences what is remembered spans a thousand steps, and a budget of nothing shows no misses."""
    planner, rng, drafted = AutoPlanner(XEON), random.Random(1), []
    planner.begin()
    for step in range(2400):
        plan = planner.plan(PlanInputs(num_seqs=num_seqs, num_read=200 * num_seqs, num_unread=2 * num_seqs))
        record = play_step(plan, num_seqs, 0.85 if step < 2000 else 0.0, rng)
        drafted.append(not plan.is_plain)
        num_tokens = record.num_tokens if step < 2000 else num_seqs
        target_s = XEON.compute_target_s(num_tokens)
        draft_s = XEON.compute_draft_s(plan, num_seqs)
        planner.observe(replace(record, num_tokens=num_tokens, target_s=target_s, draft_s=draft_s))
    assert sum(drafted[1000:2000]) > 900
    assert sum(drafted[2000:]) < 120


def test_rates_that_are_predicted_together_are_those_of_each_plan():
    """Also where tokens cost something to sample: fewer are emitted than the bound says that they are looked up by."""
    planner = AutoPlanner(replace(XEON, sample_s=5e-4), acceptance=[[0.5, 0.1]] * 3)
    inputs = PlanInputs(num_seqs=4, num_waiting=3, num_read=100, num_unread=50)
    rates = {plan: rate for plan, rate in planner._predictor.predict_rates(inputs, room=8).items() if rate}
    assert len(rates) > 3 and all(plan.num_draft_tokens <= 8 for plan in rates)
    assert rates == pytest.approx({plan: planner.predict_rate(plan, inputs) for plan in rates})


@pytest.mark.parametrize("num_unread", [0, 10**6])
def test_the_price_of_switching_on_counts(num_unread):
    """Reading a million tokens takes longer than the next steps could win; what was read is free."""
    planner = AutoPlanner(replace(SMALL_CPU, draft_read_s=1e-4))
    assert planner.plan(PlanInputs(num_seqs=1, num_unread=num_unread)).is_plain == bool(num_unread)


def test_the_price_of_switching_on_is_spread_further_the_more_still_wait():
    """Whoever ends is followed by somebody, so that drafts last: what is too dear for the last ones pays then."""

    def count_drafting(num_waiting: int) -> int:
        planners = {num_unread: AutoPlanner(replace(FLAT, draft_read_s=1e-4)) for num_unread in range(0, 60000, 1000)}
        return sum(
            not planner.plan(PlanInputs(num_seqs=4, num_waiting=num_waiting, num_unread=num_unread)).is_plain
            for num_unread, planner in planners.items()
        )

    assert 0 < count_drafting(0) < count_drafting(4) < count_drafting(12)


def test_a_dear_first_reading_says_little_of_drafts():
    """Where every trial begins with reading, its price must not make drafts look dear, and drafts stay untried."""
    profile = replace(SMALL_CPU, draft_read_s=1e-5)
    costs, plan = StepCosts(profile), SpeculationPlan(depth=2, width=2, num_draft_tokens=4)
    before_s = float(costs.predict_draft_s(plan.depth, plan.width, 32))
    target_s = profile.compute_target_s(32 * 5, 3200)
    for _ in range(20):
        costs.observe(build_record(plan, 32, num_unread=3000, draft_s=before_s + 0.3, target_s=target_s))
    assert float(costs.predict_draft_s(plan.depth, plan.width, 32)) == pytest.approx(before_s, rel=0.01)
    assert costs.predict_reading_s(3000, 32) == pytest.approx(2 * 1e-5 * (3000 - 64), rel=0.01), "at most twice as dear"


def test_what_the_planner_itself_takes_is_no_part_of_a_draft():
    """It stands among the draft's seconds, whatever was decided."""
    costs, plan = StepCosts(SMALL_CPU), SpeculationPlan(depth=1, width=1, num_draft_tokens=1)
    before_s = float(costs.predict_draft_s(plan.depth, plan.width, 4))
    target_s = SMALL_CPU.compute_target_s(8, 400)
    for _ in range(20):
        costs.observe(build_record(plan, 4, draft_s=before_s + 0.002, plan_s=0.002, target_s=target_s))
    assert float(costs.predict_draft_s(plan.depth, plan.width, 4)) / costs.tempo == pytest.approx(before_s, rel=0.01)


def test_a_switch_must_promise_more_than_the_margin():
    """Plans whose rates cross back and forth by less than it do not take turns."""
    planner, rng = SyntheticClockPlanner(), random.Random(0)
    plans = []
    for step in range(400):
        num_seqs = 6 + step % 2
        plans.append(planner.plan(PlanInputs(num_seqs=num_seqs)))
        planner.observe(play_step(plans[-1], num_seqs, 0.6, rng))
    lasting = [plan for plan, after in itertools.pairwise(plans[100:]) if plan == after]  # a trial is one step
    assert sum(a != b for a, b in itertools.pairwise(lasting)) <= 12


@pytest.mark.parametrize(("gain", "drafts"), [(1.01, False), (1.025, False), (1.035, True), (1.2, True)])
def test_to_drafts_and_to_another_tree_the_margin_must_be_promised_and_back_nothing(gain, drafts):
    """Once a plan is taken it is kept while it wins at all and no other wins by so much."""
    planner = AutoPlanner(FLAT, trial_share=0.0)
    plan, inputs = GRID[0], PlanInputs(num_seqs=4)
    rates = dict.fromkeys(GRID, 0.0) | {PLAIN: 100.0, plan: 100.0 * gain}
    planner._predictor.predict_rates = lambda *_: dict(rates)
    assert planner.plan(inputs) == (plan if drafts else PLAIN)
    planner._current = plan
    planner._term.forget()
    assert planner.plan(inputs) == plan, "what is done already goes on"
    rates[GRID[1]] = gain * rates[plan]
    planner._term.forget()
    assert planner.plan(inputs) == (GRID[1] if drafts else plan)
    planner._current, rates[GRID[1]] = plan, 0.0
    rates[plan] = 99.9
    planner._term.forget()
    assert planner.plan(inputs).is_plain


def test_trees_that_look_too_dear_are_tried_and_found_cheap():
    """The steps of the plan in use say nothing of what larger forwards take: a wrong price of them must heal."""
    prices = {"num_tokens": (1, 2, 4, 8, 64), "draft_s": (0.001,) * 5}
    truth = HardwareProfile(target_s=(0.020, 0.0201, 0.0203, 0.0206, 0.05), **prices)
    planner = AutoPlanner(HardwareProfile(target_s=(0.020, 0.0201, 0.030, 0.050, 0.10), **prices))
    rng = random.Random(0)
    plans: list[SpeculationPlan] = []
    for _ in range(300):
        plans.append(planner.plan(PlanInputs(num_seqs=1, num_read=100)))
        record = play_step(plans[-1], 1, 0.6, rng)
        target_s = float(np.interp(record.num_tokens, truth.num_tokens, truth.target_s))
        draft_s = 0.001 * plans[-1].depth
        planner.observe(replace(record, target_s=target_s, draft_s=draft_s, step_s=target_s + draft_s))
    assert all(plan.depth < 2 for plan in plans[:8]), "so it looked"
    assert sum(plan.depth > 1 for plan in plans[-200:]) > 180


def test_a_drafter_that_became_good_is_noticed():
    planner = SyntheticClockPlanner()
    play(planner, 300, 2, chance=0.0)
    records = play(planner, 600, 2, chance=0.9)
    assert compute_speed(planner, records[300:]) > 2


@pytest.mark.parametrize("num_seqs", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("chance", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_auto_never_loses_to_plain_decoding_once_calibrated(num_seqs, chance):
    planner = SyntheticClockPlanner(speed=1.3)
    play(planner, 150, num_seqs, chance)
    records = play(planner, 400, num_seqs, chance)
    assert compute_speed(planner, records) > 0.98


@pytest.mark.parametrize(("num_seqs", "least"), [(1, 2.5), (4, 2.0), (16, 1.1)])
def test_a_good_drafter_is_used_where_there_is_room(num_seqs, least):
    planner = SyntheticClockPlanner()
    records = play(planner, 300, num_seqs, chance=0.85)
    assert compute_speed(planner, records[50:]) > least


@pytest.mark.parametrize(("machine", "deepest"), [(FLAT, 8), (XEON, 6)], ids=["flat", "xeon"])
@pytest.mark.parametrize("num_seqs", [1, 2])
def test_the_deepest_plans_come_to_be_chosen(machine, deepest, num_seqs):
    """The grid has no plan of seven levels, nor chains of four and five: it must not take them to go on."""
    plans = [record.plan for record in play(SyntheticClockPlanner(machine), 300, num_seqs, chance=0.96)]
    assert sum(plan.depth == deepest for plan in plans[100:]) > 150


def test_a_tree_grows_a_level_at_a_time():
    """A lucky first level says nothing of the fifth: a deep tree for many sequences would be dear to try."""
    planner, rng = AutoPlanner(FLAT), random.Random(0)
    depths = []
    for _ in range(12):
        plan = planner.plan(PlanInputs(num_seqs=16))
        depths.append(plan.depth)
        explored = planner.expectation.explored_depth
        assert plan.depth <= explored + 1 or explored >= max(
            p.depth for p in GRID if p.width == plan.width and p.depth < plan.depth
        )
        planner.observe(play_step(plan, 16, 0.95, rng))
    assert depths[:3] == [1, 2, 3] and max(depths) >= 5


@pytest.mark.parametrize("num_seqs", [1, 4, 16])
@pytest.mark.parametrize(("share", "chance"), [(0.1, 0.6), (0.25, 0.5), (1.0, 0.0)])
def test_what_a_drafter_does_not_have_is_not_expected_of_it(num_seqs, share, chance):
    """N-grams have a child for few sequences and no siblings: where they lose, they are dropped like other drafters."""
    machine = HardwareProfile(num_tokens=(1, 64, 512), target_s=(0.020, 0.0201, 0.021), draft_s=(0.003,) * 3)
    planner, rng, records = SyntheticClockPlanner(machine), random.Random(0), []
    for _ in range(600):
        plan = planner.plan(PlanInputs(num_seqs=num_seqs))
        record = build_record(plan, num_seqs, num_tokens=num_seqs, offered=(), hits=())
        known = 0 if plan.is_plain else sum(rng.random() < share for _ in range(num_seqs))
        if known:
            hits = sum(rng.random() < chance for _ in range(known))
            facts = {"num_tokens": num_seqs + known, "num_emitted": num_seqs + hits}
            record = replace(record, offered=((known,),), hits=((hits,),), **facts)
        planner.observe(record)
        records.append(record)
    assert compute_speed(planner, records[100:]) > 0.97


def test_what_was_recorded_on_the_way_teaches_acceptance_and_no_costs():
    """Else drafts would look as dear as their recording, and stay untried."""
    planner, plan = AutoPlanner(FLAT), SpeculationPlan(depth=1, width=1, num_draft_tokens=1)
    costs = planner.profile
    slow = {"draft_s": 0.3, "target_s": 0.5, "verify_s": 0.2, "step_s": 1.0}
    for _ in range(200):
        record = build_record(plan, 10, num_emitted=18, offered=((10,),), hits=((8,),), is_steady=False, **slow)
        planner.observe(record)
    assert planner.profile == costs
    assert planner.expectation.predict_length(plan, 10) == pytest.approx(1.8, abs=0.05)
    planner.observe(build_record(plan, 10, num_emitted=18, offered=((10,),), hits=((8,),), **slow))
    assert planner.profile != costs


def test_a_trial_pays_for_what_is_recorded_for_it():
    """As many steps go by before the next one as must bring in, at the share that trials may lose, what it took."""
    gaps = []
    for recorded_s in (0.0, 0.1, 0.4):
        planner, tried = AutoPlanner(FLAT, trial_share=0.01), []
        for step in range(9000):
            plan = planner.plan(PlanInputs(num_seqs=8))
            is_first = step > 1000 and not plan.is_plain and not tried  # by now nothing is accepted, and plain is best
            is_slow = is_first and recorded_s > 0
            facts = {"is_steady": False, "draft_s": recorded_s, "step_s": 0.01 + recorded_s} if is_slow else {}
            planner.observe(build_record(plan, 8, **facts))
            if step > 1000 and not plan.is_plain:
                tried.append(step)
        gaps.append(max(b - a for a, b in itertools.pairwise(tried)))
    assert gaps[0] < 900 < 0.1 / (0.01 * 0.01) < gaps[1] < 2000 < 0.4 / (0.01 * 0.01) < gaps[2] < 5000


def test_sequences_share_no_budget_where_a_device_would_have_to_be_asked():
    def plan(num_seqs, runs_ahead):
        planner = AutoPlanner(replace(FLAT, runs_ahead=runs_ahead))
        planner._recording.lose(num_seqs, 1.0)  # so that drafts may begin
        return planner.plan(PlanInputs(num_seqs=num_seqs))

    ahead, beside = ({plan(num_seqs, runs_ahead) for num_seqs in range(1, 30)} for runs_ahead in (True, False))
    assert all(plan.most_draft_tokens is None for plan in ahead)
    assert any(plan.most_draft_tokens is not None for plan in beside)
    assert {replace(plan, most_draft_tokens=None) for plan in beside} == ahead


KNOWN = [[0.8]] * 8
RECORDED_S = 0.1


def roll_out_recorded(planner, lives, recorded=()):
    """Plans for so many live sequences, step after step; drafts of a new number take longer by what is recorded."""
    plans, recorded, rng = [], recorded if isinstance(recorded, set) else set(), random.Random(0)
    planner.begin()
    for num_seqs in lives:
        plan = planner.plan(PlanInputs(num_seqs=num_seqs))
        record = play_step(plan, num_seqs, 0.8, rng)
        is_new = not plan.is_plain and (plan, num_seqs) not in recorded
        recorded.add((plan, num_seqs))
        drafts_s = 0.0 if plan.is_plain else 0.001 * plan.depth + RECORDED_S * is_new
        target_s = float(np.interp(record.num_tokens, FLAT.num_tokens, FLAT.target_s))
        times = {"draft_s": drafts_s, "target_s": target_s, "verify_s": 0.0, "step_s": drafts_s + target_s}
        planner.observe(replace(record, **times, is_steady=not is_new, has_recorded=is_new))
        plans.append(plan)
    return plans


def test_drafts_are_recorded_once_plain_decoding_has_lost_as_much():
    planner = AutoPlanner(replace(FLAT, runs_ahead=True), acceptance=KNOWN)
    plans = roll_out_recorded(planner, [8] * 100)
    first = next(step for step, plan in enumerate(plans) if not plan.is_plain)
    plain_rate, rate = (planner.predict_rate(plan, PlanInputs(num_seqs=8)) for plan in (PLAIN, plans[-1]))
    gain = 1 - plain_rate / rate
    assert first * 0.02 * gain == pytest.approx(0.08, abs=0.03)
    assert not any(plan.is_plain for plan in plans[first + 1 :]), "and from then on they stay"
    assert RECORDING_S < planner._recording.recording_s < 1.05 * RECORDED_S, "it was seen once"
    unrecorded = AutoPlanner(FLAT, acceptance=KNOWN)
    assert unrecorded.plan(PlanInputs(num_seqs=8)) != PLAIN, "where nothing is recorded, at once"


@pytest.mark.parametrize(("num_steps", "is_worth_it"), [(6, False), (60, True)])
def test_when_to_record_is_learnt_from_rollout_to_rollout(num_steps, is_worth_it):
    """In those that end soon after it nothing is recorded any more, in longer ones sooner."""
    planner = AutoPlanner(replace(FLAT, runs_ahead=True), acceptance=KNOWN)
    rollouts = [roll_out_recorded(planner, [8] * num_steps) for _ in range(8)]
    waits = [sum(plan.is_plain for plan in plans) for plans in rollouts]
    assert waits[0] == 5 and all(wait < 3 if is_worth_it else wait == num_steps for wait in waits[4:]), waits
    restored = AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))
    assert restored._recording.patience == planner._recording.patience
    again = AutoPlanner(replace(FLAT, runs_ahead=True), acceptance=KNOWN)
    roll_out_recorded(again, [8] * num_steps)  # saved behind it, as a checkpoint is
    restored = AutoPlanner.from_state(json.loads(json.dumps(again.state_dict())))
    assert roll_out_recorded(restored, [8] * num_steps) == rollouts[1]


@pytest.mark.parametrize("num_steps", [12, 60])
def test_what_earlier_rollouts_have_recorded_is_not_waited_for(num_steps):
    planner, recorded = AutoPlanner(replace(FLAT, runs_ahead=True), acceptance=KNOWN), set()
    rollouts = [roll_out_recorded(planner, [8] * num_steps, recorded) for _ in range(9)]
    waits = [sum(plan.is_plain for plan in plans) for plans in rollouts]
    assert waits[0] == 5 and all(wait <= 1 for wait in waits[5:]), waits
    assert planner._recording.recording_s > RECORDING_S, "it was recorded once, and dearer than was thought"
    restored = AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))
    assert restored._recording.share == planner._recording.share
    octave, before = (8).bit_length(), dict(planner._recording.share)
    roll_out_recorded(planner, [8] * num_steps)  # the cache has moved
    assert before[octave] < 0.2 and planner._recording.share[octave] > 0.5


def test_learning_beside_a_step_says_nothing_of_recordings():
    """The step takes longer, and nothing was recorded."""
    planner = AutoPlanner(replace(FLAT, runs_ahead=True), acceptance=KNOWN)
    for _ in range(50):
        plan = planner.plan(PlanInputs(num_seqs=8))
        times = {"draft_s": 0.02, "target_s": 0.02, "verify_s": 0.0, "step_s": 0.04}
        planner.observe(replace(play_step(plan, 8, 0.8, random.Random(0)), **times, is_steady=False))
    assert planner._recording.recording_s == RECORDING_S


def test_while_sequences_finish_fast_nothing_is_recorded():
    planner = AutoPlanner(replace(FLAT, runs_ahead=True), acceptance=KNOWN)
    plans = roll_out_recorded(planner, [num_seqs for num_seqs in (64, 33, 17, 9, 5) for _ in range(3)] + [2] * 60)
    assert all(plan.is_plain for plan in plans[:15])
    assert not plans[-1].is_plain


@pytest.mark.parametrize("runs_ahead", [False, True])
@given(lives=st.lists(st.integers(1, 300), min_size=2, max_size=40), chance=st.sampled_from([0.3, 0.8, 0.95]))
@example_settings(max_examples=40, deadline=None)
def test_no_plan_goes_beyond_what_fits_while_a_better_one_waits(runs_ahead, lives, chance):
    """Nor stays where it has come to lose to plain decoding."""
    planner = AutoPlanner(replace(FLAT, runs_ahead=runs_ahead), acceptance=[[chance]] * 8, trial_share=0.0)
    planner._recording.lose(lives[0], 1.0)  # so that the first drafts begin at once
    for num_seqs in lives:
        inputs = PlanInputs(num_seqs=num_seqs)
        plan = planner.plan(inputs)
        assert plan.is_plain or num_seqs * (1 + plan.num_draft_tokens) <= planner.max_num_tokens
        assert plan.is_plain or planner.predict_rate(plan, inputs) >= planner.predict_rate(PLAIN, inputs)


def test_a_recording_price_follows_what_is_seen_and_begins_anew_with_a_rollout():
    price = RecordingPrice(0.08)
    price.lose(9, 0.05)
    assert price.find_wait_s(15) == pytest.approx(0.03) and price.find_wait_s(16) == 0.08
    price.pay(9)
    assert price.find_wait_s(9) == 0.08
    price.lose(9, 0.05)
    price.save(0.1)
    price.begin()
    assert price.find_wait_s(9) == 0.04, "it paid"
    price.lose(9, 0.01)
    price.begin()
    assert price.find_wait_s(9) == 0.04, "none was made, and none was missed"
    price.pay(9)
    restored = RecordingPrice.from_state(json.loads(json.dumps(price.state_dict())))
    for each in (price, restored):
        each.begin()
        assert each.find_wait_s(9) == 0.08, "it did not"
    price.observe(5.0)  # a kernel was compiled
    assert price.recording_s == pytest.approx(0.1)
    price.observe(0.001)  # something else was at work
    assert price.recording_s == pytest.approx(0.1)
    for _ in range(30):
        price.observe(0.05)
    assert price.recording_s == pytest.approx(0.05, rel=0.01)
    assert RecordingPrice(0.0).find_wait_s(4) <= 0


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_predicted_step_time_follows_the_measured_one(factor):
    planner, plan = SyntheticClockPlanner(SMALL_CPU, speed=factor), GRID[5]
    for _ in range(400):
        planner.observe(build_record(plan, 4, offered=((4, 0),), hits=((2, 0),), num_emitted=6))
    record = build_record(plan, 4)
    assert planner.predict_step_s(plan, PlanInputs(num_seqs=4)) == pytest.approx(
        planner.compute_step_s(record), rel=0.1
    )


@pytest.mark.parametrize("num_emitted", [12, 15, 18])
def test_the_predicted_length_follows_the_measured_one(num_emitted):
    """Stop tokens cut accepted paths, so what is emitted can be less than what was accepted."""
    planner, plan = AutoPlanner(FLAT), SpeculationPlan(depth=1, width=1, num_draft_tokens=1)
    for _ in range(800):
        planner.observe(build_record(plan, 10, num_emitted=num_emitted, offered=((10,),), hits=((8,),)))
    assert planner.expectation.predict_length(plan, 10) == pytest.approx(num_emitted / 10, abs=0.03)


# -- profiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": (1,), "target_s": (1.0,), "draft_s": ()}, "at least two token counts"),
        ({"num_tokens": (1, 1, 2)}, "increasing grid"),
        ({"num_tokens": (4, 2, 8)}, "increasing grid"),
        ({"num_tokens": (0, 1, 2)}, "increasing grid"),
        ({"num_tokens": (1, math.nan, 2)}, "increasing grid"),
        ({"num_tokens": (1, 2, math.inf)}, "increasing grid"),
        ({"num_tokens": (1, 1.5, 2)}, "increasing grid"),
        ({"read_s": 10**400}, "finite and positive"),
        ({"draft_s": (), "draft_start_s": (1.0, 1.0, 1.0)}, "draft_start_s needs draft_s"),
        ({"target_s": (1.0, 2.0)}, "one time for each of 3 points, got 2"),
        ({"draft_s": (1.0, 2.0)}, "one time for each of 3 points"),
        ({"target_s": (1.0, math.nan, 2.0)}, "finite and positive"),
        ({"target_s": (1.0, 0.0, 2.0)}, "finite and positive"),
        ({"target_s": (1.0, 5e-324, 2.0)}, "finite and positive"),
        ({"draft_s": (1.0, -1.0, 2.0)}, "finite and positive"),
        ({"draft_s": (1.0, math.inf, 2.0)}, "finite and positive"),
        ({"sample_s": -1.0}, "finite and positive"),
        ({"sample_s": math.nan}, "finite and positive"),
        ({"fixed_s": math.inf}, "finite and positive"),
        ({"sample_s": 1e308}, r"1e\+09 s at most: sample_s is 1e\+308"),
        ({"target_s": (1.0, 2.0, 1e300)}, r"1e\+09 s at most: target_s at 512 tokens is 1e\+300"),
    ],
)
def test_impossible_profiles_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FLAT, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0.5}, "margin must be .* at least 1, got 0.5"),
        ({"margin": math.nan}, "margin must be .* got nan"),
        ({"trial_share": -1.0}, r"trial_share must be in \[0, 1\), got -1.0"),
        ({"trial_share": math.nan}, "trial_share must be .* got nan"),
        ({"max_num_tokens": 0}, "max_num_tokens must be at least 1, or None .* got 0"),
        ({"acceptance": [[0.5, 1.7]]}, r"acceptance rates must be in \[0, 1\], got 1.7"),
        ({"acceptance": [[math.nan]]}, "acceptance rates must be .* got nan"),
    ],
)
def test_impossible_settings_of_auto_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoPlanner(FLAT, **settings)


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"alpha": math.nan}, {"min_depth": 9}, {"max_depth": 0}, {"max_width": 0}]
)
def test_impossible_constants_of_the_papers_rule_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        PaperPlanner(capacity=160, **settings)


def test_a_step_is_planned_for_somebody():
    with pytest.raises(ValueError, match="at least 1 live sequence, got 0"):
        PlanInputs(num_seqs=0)
    with pytest.raises(ValueError, match="max_draft_tokens must be at least 0, or None, got -1"):
        PlanInputs(num_seqs=1, max_draft_tokens=-1)
    for counts, got in (
        ({"num_waiting": -4}, "-4, 0"),
        ({"num_read": -1}, "0, -1"),
        ({"num_read": math.nan}, "0, nan"),
    ):
        with pytest.raises(ValueError, match=f"num_waiting and num_read must be at least 0, got {got}"):
            PlanInputs(num_seqs=4, **counts)


def test_a_plan_gives_way_as_soon_as_the_cache_has_no_room_for_it():
    planner = AutoPlanner(FLAT, acceptance=[[0.9]] * 8)
    roomy, tight = PlanInputs(num_seqs=2), PlanInputs(num_seqs=2, max_draft_tokens=2)
    assert planner.plan(roomy).num_draft_tokens > 2
    assert 0 < planner.plan(tight).num_draft_tokens <= 2
    assert planner.plan(replace(tight, max_draft_tokens=0)).is_plain
    assert planner.plan(roomy).num_draft_tokens > 2


@given(plan=st.sampled_from([PLAIN, *GRID, *ARMS]), room=st.none() | st.integers(0, 60))
def test_a_limited_plan_is_the_same_with_smaller_trees(plan, room):
    limited = plan.limit(room)
    most = plan.tree_size if room is None else room
    assert limited.tree_size == min(plan.tree_size, most)
    assert (limited is plan) == (plan.tree_size <= most)
    assert limited.num_draft_tokens == min(plan.num_draft_tokens, most) and limited.depth == min(plan.depth, most)
    assert (limited.most_draft_tokens is None) == (limited.is_plain or plan.most_draft_tokens is None)


def test_a_restored_planner_keeps_its_settings():
    planner = AutoPlanner(FLAT, margin=1.5, trial_share=0.3, max_num_tokens=64)
    restored = AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))
    assert (restored.margin, restored.trial_share, restored.max_num_tokens) == (1.5, 0.3, 64)


@given(st.floats(1, 600))
def test_times_are_interpolated_and_continued(num_tokens):
    profile = HardwareProfile(num_tokens=(1, 10, 100), target_s=(1.0, 1.9, 10.9))
    assert profile.compute_target_s(num_tokens) == pytest.approx(0.9 + 0.1 * num_tokens)
    assert profile.compute_draft_s(GRID[0], 4) == 0, "drafts were not timed"


def test_a_draft_is_a_start_and_further_levels():
    profile = replace(FLAT, draft_start_s=(0.01, 0.073, 0.521), draft_s=(0.001, 0.001, 0.001), draft_read_s=1e-5)
    plan = SpeculationPlan(depth=3, width=2, num_draft_tokens=4)
    assert profile.compute_draft_s(plan, 32) == pytest.approx(0.041 + 2 * 0.001)
    assert profile.compute_draft_s(plan, 32, num_unread=100) == pytest.approx(0.041 + 2 * 0.001 + 1e-3)
    assert replace(profile, draft_start_s=()).compute_draft_s(plan, 32) == pytest.approx(3 * 0.001)
    assert profile.compute_draft_s(PLAIN, 32) == 0


@pytest.mark.parametrize("stale", [0.3, 3.0])
def test_the_price_of_reading_heals_from_plain_steps(stale):
    """Rollouts whose contexts grow while sequences finish tell both apart: what a token and what a position costs."""
    grid, read_s = (1, 2, 4, 8, 16, 32, 64), 2.5e-6
    truth = HardwareProfile(num_tokens=grid, target_s=tuple(0.03 + 0.0005 * n for n in grid), read_s=read_s)
    followed = StepCosts(replace(truth, read_s=stale * read_s))
    for _ in range(12):
        for length in range(100, 400, 2):
            num_seqs = max(1, 32 - length // 10)
            measured_s = truth.compute_target_s(num_seqs, num_seqs * length)
            facts = {"num_tokens": num_seqs, "num_read": num_seqs * length, "target_s": measured_s}
            followed.observe(build_record(PLAIN, num_seqs, **facts))
    for num_seqs, length in ((4, 300), (16, 150), (24, 110)):
        expected_s = truth.compute_target_s(num_seqs, num_seqs * length)
        found_s = followed.profile.compute_target_s(num_seqs, num_seqs * length)
        assert found_s == pytest.approx(expected_s, rel=0.02)


@pytest.mark.parametrize("stale", [0.5, 1.0, 2.0])
def test_a_machine_is_recovered_from_noisy_steps(stale):
    """3 % of noise, and one step in twenty that something else held up; within 3 % wherever steps went."""
    grid = (1, 2, 4, 8, 16, 32, 64)
    truth = HardwareProfile(num_tokens=grid, target_s=tuple(0.03 + 0.0005 * n for n in grid), read_s=2.5e-6)
    planner = AutoPlanner(replace(truth, target_s=tuple(stale * seconds for seconds in truth.target_s)))
    rng = random.Random(0)
    errors: list[float] = []
    for rollout in range(12):
        for length in range(100, 400, 2):
            num_seqs = max(1, 32 - length // 10)
            expected_s = truth.compute_target_s(num_seqs, num_seqs * length)
            if rollout >= 8:
                errors.append(planner.profile.compute_target_s(num_seqs, num_seqs * length) / expected_s - 1)
            held_up = rng.uniform(2, 6) if rng.random() < 0.05 else 1.0
            measured_s = expected_s * held_up * math.exp(rng.gauss(0, 0.03))
            planner.observe(
                build_record(PLAIN, num_seqs, num_tokens=num_seqs, num_read=num_seqs * length, target_s=measured_s)
            )
    assert abs(sum(errors) / len(errors)) < 0.02
    assert sum(abs(error) < 0.03 for error in errors) > 0.95 * len(errors)


@pytest.mark.parametrize("num_alike", [1, 8, 24])
def test_all_parts_of_a_machine_are_recovered_from_steps_learnt_from_together(num_alike):
    """As the test before; drafts and the rest too, and steps of one kind at once, as a planner learns from them."""
    truth = replace(XEON, read_s=2.5e-6, sample_s=1e-4, walk_s=5e-5, fixed_s=5e-4)
    machine, rng, errors = StepCosts(truth), random.Random(0), []
    followed = StepCosts(replace(distort(truth, (1.5,) * 7), draft_s=tuple(0.6 * s for s in truth.draft_s)))
    plans = [SpeculationPlan(depth=d, width=w, num_draft_tokens=n) for d, w, n in ((3, 1, 3), (2, 2, 4), (3, 3, 8))]

    def measure(seconds: float) -> float:
        return seconds * (rng.uniform(2, 6) if rng.random() < 0.05 else 1.0) * math.exp(rng.gauss(0, 0.03))

    for _ in range(max(1200 // num_alike, 150)):
        num_seqs, plan = rng.choice((1, 2, 4, 6)), rng.choice([PLAIN, *plans])
        records = []
        for num_read in (num_seqs * rng.randrange(100, 400) for _ in range(num_alike)):
            num_emitted = num_seqs + rng.randrange(num_seqs * plan.depth + 1)
            record = build_record(plan, num_seqs, num_read=num_read, num_emitted=num_emitted)
            expected, known = (
                (
                    float(costs.predict_target_s(record.num_tokens, num_read)),
                    float(costs.predict_draft_s(plan.depth, plan.width, num_seqs)),
                    float(costs.predict_rest_s(plan.depth, num_emitted)),
                )
                for costs in (machine, followed)
            )
            errors.append([found / true - 1 for found, true in zip(known, expected, strict=True)])
            names = dict(zip(("target_s", "draft_s", "verify_s"), map(measure, expected), strict=True))
            records.append(replace(record, **names))
        followed.observe(*records)
    late = np.array(errors[len(errors) // 2 :])
    assert (abs(late.mean(0)) < 0.01).all()
    assert ((abs(late) < 0.03).mean(0) > 0.95).all()


class SlowSeconds:
    """What a machine with other work on it does to a step: seconds in which all is slower, noise, single hold-ups."""

    def __init__(self, seed: int) -> None:
        self.rng, self.tempo = random.Random(seed), 0.0

    def draw(self) -> float:
        self.tempo = 0.95 * self.tempo + 0.06 * self.rng.gauss(0, 1)  # 0.2 nats, for twenty steps or so
        held_up = self.rng.uniform(2, 6) if self.rng.random() < 0.01 else 1.0
        return held_up * math.exp(self.tempo + self.rng.gauss(0, 0.1))


SLOPED = HardwareProfile(
    num_tokens=(1, 2, 4, 8, 16, 32, 64),
    target_s=tuple(0.02 + 0.0013 * n for n in (1, 2, 4, 8, 16, 32, 64)),
    read_s=3e-6,
)


def distort(profile: HardwareProfile, factors: tuple[float, ...]) -> HardwareProfile:
    return replace(profile, target_s=tuple(s * f for s, f in zip(profile.target_s, factors, strict=True)))


@pytest.mark.parametrize("seed", range(4))
def test_slow_seconds_are_not_taken_for_dear_forwards(seed):
    """A forward that is made once in 200 steps keeps its price beside the one that is made in all others."""
    stale = distort(SLOPED, (1, 1, 1.07, 0.93, 0.87, 0.9, 1))
    costs, machine, errors = StepCosts(stale), SlowSeconds(seed), []

    def compute_ratio(profile: HardwareProfile) -> float:
        return profile.compute_target_s(16, 1200) / profile.compute_target_s(8, 1200)

    for step in range(2000):
        num_tokens = 16 if step % 200 == 50 else 8
        target_s = machine.draw() * SLOPED.compute_target_s(num_tokens, 150 * num_tokens)
        facts = {"num_tokens": num_tokens, "num_read": 150 * num_tokens, "target_s": target_s}
        costs.observe(build_record(PLAIN, num_tokens, **facts))
        errors.append(math.log(compute_ratio(costs.profile) / compute_ratio(SLOPED)))
    late = np.abs(errors[400:])
    assert np.sqrt((late**2).mean()) < 0.1
    assert np.quantile(late, 0.5) < 0.07


@pytest.mark.parametrize("seed", range(4))
def test_how_the_time_rises_is_learnt_from_steps_of_one_plan(seed):
    """Trees of 4 to 8 nodes, seen in groups, on a machine whose profile was wrong about what the larger ones add."""
    stale = distort(SLOPED, (1, 1, 1.05, 0.9, 0.9, 0.9, 1))
    costs, machine = StepCosts(stale), SlowSeconds(seed)

    def compute_rise(profile: HardwareProfile) -> float:
        return math.log(profile.compute_target_s(8, 150) / profile.compute_target_s(4, 150))

    assert compute_rise(stale) < 0.05 < 0.18 < compute_rise(SLOPED)
    for _ in range(40):
        records = []
        for _ in range(8):
            num_tokens = machine.rng.choice((4, 5, 6, 6, 7, 8))
            target_s = machine.draw() * SLOPED.compute_target_s(num_tokens, 150)
            records.append(build_record(PLAIN, 1, num_tokens=num_tokens, num_read=150, target_s=target_s))
        costs.observe(*records)
    assert compute_rise(costs.profile) == pytest.approx(compute_rise(SLOPED), abs=0.13)


def test_a_trial_that_is_held_up_is_not_believed():
    """One of its three forwards takes six times as long."""
    costs = StepCosts(SLOPED)
    for _ in range(60):
        costs.observe(build_record(PLAIN, 8, num_tokens=8, num_read=1200, target_s=SLOPED.compute_target_s(8, 1200)))
    usual_s = SLOPED.compute_target_s(32, 1200)
    times_s = (6 * usual_s, usual_s, usual_s)
    costs.observe(*(build_record(PLAIN, 32, num_tokens=32, num_read=1200, target_s=each) for each in times_s))
    assert costs.profile.compute_target_s(32, 1200) == pytest.approx(usual_s, rel=0.2)


@pytest.mark.parametrize(("believed_s", "measured_s"), [(1e-12, 1e-13), (1e9, 1e10)])
def test_steps_beyond_what_a_profile_may_say_leave_one_that_can_be_asked_for(believed_s, measured_s):
    planner = AutoPlanner(HardwareProfile(num_tokens=(1, 8), target_s=(believed_s, believed_s)))
    for _ in range(8):
        planner.observe(build_record(PLAIN, 2, target_s=measured_s))
        assert planner.profile.target_s[0] == believed_s


def test_a_machine_that_became_slower_for_good_is_believed_soon():
    costs = StepCosts(SLOPED)
    for factor, num_steps in ((1.0, 200), (3.0, 60)):
        for _ in range(num_steps):
            target_s = factor * SLOPED.compute_target_s(8, 1200)
            costs.observe(build_record(PLAIN, 8, num_tokens=8, num_read=1200, target_s=target_s))
    assert costs.predict_target_s(8, 1200) == pytest.approx(3 * SLOPED.compute_target_s(8, 1200), rel=0.05)
    assert 0.9 < costs.tempo < 1.35, "as a rule, not for a while"


def test_long_contexts_make_drafts_pay():
    """What is read once for a sequence is shared by all the nodes of its tree."""
    profile = HardwareProfile(
        num_tokens=(1, 32, 64, 128), target_s=(0.04, 0.05, 0.06, 0.09), draft_s=(0.003,) * 4, read_s=2.5e-6
    )
    planner = AutoPlanner(profile)
    planner.expectation.table.offered = [[1e9] * MAX_WIDTH for _ in range(MAX_DEPTH)]
    planner.expectation.table.hits = [[1e9 * 0.25 * 0.5**rank for rank in range(MAX_WIDTH)] for _ in range(MAX_DEPTH)]
    short, long = (PlanInputs(num_seqs=32, num_read=32 * length) for length in (16, 4096))
    assert planner.plan(short).num_draft_tokens <= 1, "plain, or the cheapest trial"
    assert planner.plan(long).num_draft_tokens > 1


@pytest.mark.parametrize(
    ("num_read", "is_asked"), [(1023, False), (1025, False), (520, False), (400, True), (2100, True)]
)
def test_a_plan_is_kept_while_about_as_much_is_read(monkeypatch, num_read, is_asked):
    """Octaves of what was read have no edges: only twice as much, or half, asks for another decision."""
    planner, decisions = AutoPlanner(SMALL_CPU, acceptance=[[0.5] * 4] * 2), []
    predictor, predict = planner._predictor, planner._predictor.predict_rates
    monkeypatch.setattr(predictor, "predict_rates", lambda *asked: decisions.append(asked) or predict(*asked))
    planner.expectation._age = 100
    planner.plan(PlanInputs(num_seqs=4, num_read=1024))
    planner.plan(PlanInputs(num_seqs=4, num_read=num_read))
    assert len(decisions) == 1 + is_asked


def test_what_speculation_saved_is_known():
    """Steps that take what the profile says, at two tokens a sequence, against plain steps for as many."""
    planner = AutoPlanner(SMALL_CPU)
    plan = SpeculationPlan(depth=2, width=1, num_draft_tokens=2)
    plain_s = planner.predict_step_s(PLAIN, PlanInputs(num_seqs=4, num_read=400))
    records = [build_record(plan, 4, num_emitted=8, step_s=0.09, prefill_s=0.01), build_record(PLAIN, 4, step_s=9.0)]
    assert planner.estimate_saved_s(records) == pytest.approx(2 * plain_s - 0.08)
    assert planner.estimate_saved_s([build_record(plan, 4, num_emitted=4, step_s=0.09)]) < 0


@given(knee=st.integers(2, 200), flat_s=st.floats(1e-4, 1))
def test_the_capacity_of_a_roofline_is_its_knee(knee, flat_s):
    """Memory-bound up to the knee, compute-bound beyond."""
    grid = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    times = tuple(flat_s * max(1.0, num_tokens / knee) for num_tokens in grid)
    assert HardwareProfile(num_tokens=grid, target_s=times).capacity == pytest.approx(knee)


def test_the_capacity_where_the_time_never_rises_or_always_does():
    assert HardwareProfile(num_tokens=(1, 64), target_s=(1.0, 1.0)).capacity == 64
    assert HardwareProfile(num_tokens=(1, 2, 4), target_s=(1.0, 2.0, 4.0)).capacity == 1


# -- keys and checkpoints ------------------------------------------------------------------------------------


def test_the_planner_behind_a_key():
    fixed = SpeculationPlan(depth=1, width=1, num_draft_tokens=1)

    def refuse() -> HardwareProfile:
        raise AssertionError("measured without need")

    assert build_planner("off", fixed=fixed, measure=refuse) == FixedPlanner()
    assert build_planner("off", fixed=fixed, measure=refuse).name == "off"
    assert build_planner("fixed", fixed=fixed, measure=refuse).plan(PlanInputs(num_seqs=900)) == fixed
    assert build_planner(GRID[3], fixed=fixed, measure=refuse).plan(PlanInputs(num_seqs=1)) == GRID[3]
    assert build_planner("paper", fixed=fixed, measure=lambda: SMALL_CPU).state_dict() == {
        "capacity": SMALL_CPU.capacity
    }
    assert build_planner("auto", fixed=fixed, measure=lambda: SMALL_CPU).name == "auto"
    assert build_planner("paper-own", fixed=fixed, measure=refuse) == PaperPlanner.with_own_capacity()
    bandit = build_planner("bandit", fixed=fixed, measure=lambda: SMALL_CPU)
    assert bandit == BanditPlanner(max_num_tokens=SMALL_CPU.num_tokens[-1])
    with pytest.raises(ValueError, match=r"one of auto, off, .*, fixed, or a SpeculationPlan, got 'fast'"):
        build_planner("fast", fixed=fixed, measure=refuse)


@pytest.mark.parametrize("key", SPECULATION)
def test_every_key_has_a_planner_of_its_name_that_can_be_restored(key):
    planner = build_planner(key, fixed=GRID[0], measure=lambda: SMALL_CPU)
    assert planner.name == key
    planner.observe(build_record(planner.plan(PlanInputs(num_seqs=2)), 2, num_emitted=5))
    restored = restore_planner(key, json.loads(json.dumps(planner.state_dict())))
    assert restored is None or restored.state_dict() == planner.state_dict()
    assert (restored is None) == (key in ("off", "fixed", "paper-own"))


@pytest.mark.parametrize("key", SPECULATION)
def test_planners_can_be_pickled_and_a_state_stays_what_it_was(key):
    def play_on(planner: Planner) -> None:
        for _ in range(40):
            plan = planner.plan(PlanInputs(num_seqs=2))
            planner.observe(play_step(plan, 2, 0.6, random.Random(0)))

    planner = build_planner(key, fixed=GRID[0], measure=lambda: SMALL_CPU)
    play_on(planner)
    state, twin = planner.state_dict(), pickle.loads(pickle.dumps(planner))
    kept = copy.deepcopy(state)
    play_on(planner)
    assert state == kept == twin.state_dict()
    play_on(twin)
    assert twin.state_dict() == planner.state_dict()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"depth": -1, "width": 1, "num_draft_tokens": 1}, ">= 0"),
        ({"depth": 1, "width": 0, "num_draft_tokens": 1}, "all zero"),
        ({"depth": 1, "width": 1, "num_draft_tokens": 0}, "all zero"),
        ({"depth": 3, "width": 1, "num_draft_tokens": 2}, "cannot fill a depth of 3"),
    ],
)
def test_impossible_plans_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        SpeculationPlan(**plan)


@pytest.mark.parametrize("chance", [0.0, 0.6])
def test_a_restored_planner_goes_on_as_if_nothing_had_happened(chance):
    planner = SyntheticClockPlanner(speed=1.7)
    play(planner, 137, 3, chance)
    state = json.loads(json.dumps(planner.state_dict()))
    restored = AutoPlanner.from_state(state)
    assert restored.state_dict() == planner.state_dict()
    twin = SyntheticClockPlanner(speed=1.7)
    vars(twin).update(vars(restored))
    assert play(twin, 100, 3, chance) == play(planner, 100, 3, chance)


def test_a_restored_planner_knows_what_reading_took():
    planner, plan = AutoPlanner(XEON), SpeculationPlan(depth=1, width=1, num_draft_tokens=1)
    for _ in range(20):
        planner.observe(build_record(plan, 4, num_unread=2000, draft_s=0.06))
    restored = AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))
    inputs = PlanInputs(num_seqs=4, num_unread=2000)
    assert restored.predict_rate(plan, inputs) == planner.predict_rate(plan, inputs)


def test_state_is_plain_json():
    assert json.loads(json.dumps(PaperPlanner(capacity=12.5).state_dict())) == {"capacity": 12.5}
    assert FixedPlanner().state_dict() == {}
    assert asdict(SMALL_CPU)["num_tokens"] == SMALL_CPU.num_tokens


# -- one budget for all sequences ------------------------------------------------------------------------------

SHARED = SpeculationPlan(depth=3, width=3, num_draft_tokens=4, most_draft_tokens=12)


def compute_worth(planner: AutoPlanner, inputs: PlanInputs, chances: list[float], budget: int) -> float:
    """What the first `budget` tokens bring, less the tokens that plain work would have brought in their time."""
    rate = max(planner.predict_rate(SHARED, inputs), planner.predict_rate(PLAIN, inputs))
    accepted = sum(chances[:budget]) * planner._budget.trust
    seconds = planner.profile.compute_target_s(inputs.num_seqs + budget, inputs.num_read)
    seconds += planner.profile.sample_s * accepted
    return accepted - rate * seconds


@given(
    chances=st.lists(st.floats(0, 1), max_size=80).map(lambda found: sorted(found, reverse=True))
    | st.floats(0.8, 0.99).map(lambda chance: [chance**place for place in range(1, 60)]),
    num_seqs=st.integers(1, 100),
    sample_s=st.sampled_from([0.0, 1e-4]),
    chance=st.sampled_from([0.1, 0.95]),
)
def test_the_budget_is_the_best_of_all_numbers(chances, num_seqs, sample_s, chance):
    """Where the plan is better than plain decoding, and where it is not."""
    planner = AutoPlanner(replace(SMALL_CPU, sample_s=sample_s))
    know(planner, chance)
    inputs = PlanInputs(num_seqs=num_seqs)
    budget = planner.choose_budget(SHARED, inputs, chances)
    most = max(min(len(chances), planner.max_num_tokens - num_seqs), 0)
    assert 0 <= budget <= most
    best = max(compute_worth(planner, inputs, chances, n) for n in range(most + 1))
    assert compute_worth(planner, inputs, chances, budget) == pytest.approx(best, abs=1e-9)


def test_a_budget_is_found_whatever_a_forward_may_hold():
    """A profile's last point may lie beyond what anybody verifies: prices are made of what is asked for."""
    wide = replace(SMALL_CPU, num_tokens=(1, 10**13), target_s=(0.02, 1e9), draft_s=(0.002, 0.002), draft_start_s=())
    planner, inputs = AutoPlanner(wide), PlanInputs(num_seqs=2)
    assert planner.choose_budget(SHARED, inputs, [0.9] * 3) == 3
    assert planner.choose_budget(SHARED, inputs, [0.9] * 30) == 30, "more than was asked for before"


def test_a_budget_is_that_of_who_is_live_whoever_was_when_the_plan_was_chosen():
    plan, inputs, budgets = GRID[12], PlanInputs(num_seqs=8), set()
    for decided_for in (None, 1, 8, 64):
        planner = AutoPlanner(SMALL_CPU, acceptance=[[0.6]] * 8)
        if decided_for:
            planner.plan(PlanInputs(num_seqs=decided_for))
        budgets.add(planner.choose_budget(plan, inputs, [0.9 - 0.01 * place for place in range(80)]))
    assert len(budgets) == 1 and 0 < max(budgets) < 80, budgets


def test_one_broken_promise_says_little_however_long_none_was_made():
    budget = AutoPlanner(SMALL_CPU)._budget
    budget.observe([build_record(SHARED, 2, num_tokens=2)] * 1000)
    budget.observe([build_record(SHARED, 2, num_promised=1.0)])
    assert 0.8 < budget.trust < 0.95


def test_broken_promises_shrink_the_budget():
    planner = AutoPlanner(SMALL_CPU)
    inputs, chances = PlanInputs(num_seqs=2), [0.6] * 20 + [0.3] * 20
    before = planner.choose_budget(SHARED, inputs, chances)
    for _ in range(200):
        planner.observe(build_record(SHARED, 2, num_promised=6.0, target_s=SMALL_CPU.compute_target_s(10)))
    assert before >= 20
    planner.plan(inputs)
    assert planner.choose_budget(SHARED, inputs, chances) == 0
    restored = AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))
    assert restored.choose_budget(SHARED, inputs, chances) == 0


@pytest.mark.parametrize("promised", [math.nan, math.inf, -math.inf])
def test_a_promise_that_is_no_number_is_none(promised):
    """Once a head's weights are no numbers its chances are not either; they are put back, what was learnt stays."""
    planner, inputs, chances = AutoPlanner(SMALL_CPU), PlanInputs(num_seqs=2), [0.6] * 20
    budgets = []
    for each in (1.0, promised, 1.0):
        planner.observe(build_record(SHARED, 2, num_promised=each, target_s=SMALL_CPU.compute_target_s(10)))
        planner.plan(inputs)
        budgets.append(planner.choose_budget(SHARED, inputs, chances))
    assert budgets == [20] * 3


def test_promises_that_were_broken_are_tried_again():
    """What drafts would have had accepted counts as well where nothing of them was verified, so that a plan stands
    whose budget is nothing: by what is verified alone nobody would ever learn that promises are kept now.
    """
    planner, inputs, chances = SyntheticClockPlanner(), PlanInputs(num_seqs=4), [0.5] * 4
    planner._budget._promised, planner._budget._accepted = 200.0, 2.0
    budgets = []
    for _ in range(100):
        budgets.append(planner.choose_budget(SHARED, inputs, chances))
        facts = {"num_tokens": 4 + budgets[-1], "num_emitted": 4 + budgets[-1], "num_promised": 0.5 * budgets[-1]}
        planner.observe(build_record(SHARED, 4, **facts, offered=((4, 4, 4),), hits=((4, 0, 0),)))
        planner.expectation  # noqa: B018  it learns when it is asked
    assert budgets[:9] == [0] * 8 + [4]
    assert budgets[-20:] == [4] * 20
    planner._budget._num_spared = 5
    assert AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict())))._budget._num_spared == 5


def test_a_fixed_budget_is_shared_and_kept():
    inputs = PlanInputs(num_seqs=3)
    assert FixedPlanner(fixed=SHARED).choose_budget(SHARED, inputs, [0.5] * 36) == 12
    assert FixedPlanner(fixed=SHARED).choose_budget(SHARED, inputs, [0.5] * 7) == 7


def test_a_tree_may_not_be_smaller_than_its_share():
    with pytest.raises(ValueError, match="most_draft_tokens 3 must be at least num_draft_tokens 4"):
        SpeculationPlan(depth=3, width=3, num_draft_tokens=4, most_draft_tokens=3)


# -- monotone, where theory says so --------------------------------------------------------------------------------


def know(planner: AutoPlanner, chance: float) -> None:
    """As if first children had been accepted with this chance at every depth, and no other child ever."""
    table = planner.expectation.table
    table.offered = [[1e9] * MAX_WIDTH for _ in range(MAX_DEPTH)]
    table.hits = [[1e9 * chance, *[0.0] * (MAX_WIDTH - 1)] for _ in range(MAX_DEPTH)]


@given(
    chances=st.tuples(st.floats(0.02, 0.98), st.floats(0.02, 0.98)).map(sorted),
    num_seqs=st.integers(1, 32),
    slope=st.floats(0, 1e-3),
    level_s=st.floats(1e-4, 5e-3),
)
def test_more_acceptance_never_makes_a_chain_shallower(chances, num_seqs, slope, level_s):
    grid = (1, 512)
    profile = HardwareProfile(
        num_tokens=grid, target_s=tuple(0.02 + slope * n for n in grid), draft_s=(level_s, level_s)
    )
    chains = [SpeculationPlan(depth=depth, width=1, num_draft_tokens=depth) for depth in range(1, 9)]
    depths = []
    for chance in chances:
        planner = AutoPlanner(profile)
        know(planner, chance)
        rates = {plan: planner.predict_rate(plan, PlanInputs(num_seqs=num_seqs)) for plan in (PLAIN, *chains)}
        depths.append(max(rates, key=lambda plan: (round(rates[plan], 6), -plan.depth)).depth)
    assert depths == sorted(depths)


@given(
    slopes=st.tuples(st.floats(0, 2e-3), st.floats(0, 2e-3)).map(sorted),
    chances=st.lists(st.floats(0, 1), min_size=1, max_size=60).map(lambda found: sorted(found, reverse=True)),
    num_seqs=st.integers(1, 32),
)
def test_a_lower_price_of_a_token_never_shrinks_the_budget(slopes, chances, num_seqs):
    grid, budgets = (1, 2048), []
    for slope in slopes:
        profile = HardwareProfile(num_tokens=grid, target_s=tuple(0.02 + slope * n for n in grid))
        planner = AutoPlanner(profile)
        know(planner, 0.5)
        budgets.append(planner.choose_budget(SHARED, PlanInputs(num_seqs=num_seqs), chances))
    assert budgets[0] >= budgets[1]
