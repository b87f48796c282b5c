"""Longest first: what is known of lengths, who is admitted when, and that rollouts end sooner by it."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.lengths import LengthPredictor, hash_prompt
from fastgrpo.scheduler import Scheduler
from fastgrpo.types import SamplingParams, Sequence

PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=4) | st.lists(st.integers(0, 1), min_size=8, max_size=12)
FORWARD_S, ROW_S = 0.040, 0.001  # of a step, and of each live sequence in it


def build_sequence(request_id: int, prompt_ids: list[int], max_tokens: int = 10_000) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(
        request_id=request_id, prompt_ids=prompt_ids, params=params, max_tokens=max_tokens, stream_key=request_id
    )


def warm(pairs: list[tuple[list[int], int]], **settings: float) -> LengthPredictor:
    predictor = LengthPredictor(**settings)
    for prompt_ids, num_tokens in pairs:
        predictor.observe(prompt_ids, num_tokens)
    return predictor


def play(prompts: list[list[int]], lengths: list[int], num_slots: int, predictor: LengthPredictor) -> float:
    """Seconds of a rollout in which request i ends after lengths[i] steps; no model, only the scheduler."""
    scheduler, seconds = Scheduler(num_slots, predictor), 0.0
    for index, prompt_ids in enumerate(prompts):
        scheduler.add(build_sequence(index, prompt_ids))
    while scheduler.has_work:
        scheduler.admit()
        seconds += FORWARD_S + ROW_S * len(scheduler.running)
        for sequence in scheduler.running:
            sequence.append([0], [0.0], [0.0])
        for slot in reversed(range(len(scheduler.running))):
            if len(scheduler.running[slot].token_ids) == lengths[scheduler.running[slot].request_id]:
                scheduler.remove(slot)
        scheduler.check()
    return seconds


def list_admitted(scheduler: Scheduler, sequences: list[Sequence]) -> list[int]:
    """Request ids in the order in which they get a slot; who runs is removed at once."""
    for sequence in sequences:
        scheduler.add(sequence)
    order = []
    while scheduler.has_work:
        order += [sequence.request_id for sequence in scheduler.admit()]
        while scheduler.running:
            scheduler.remove(0)
    return order


# -- what is known -------------------------------------------------------------------------------------------


def test_the_same_prompt_counts_before_prompts_as_long_and_those_before_all():
    predictor = LengthPredictor()
    assert predictor.predict([1, 2]) == 0
    predictor.observe([1, 2], 100)
    assert predictor.predict([1, 2]) == predictor.predict([3, 4]) == predictor.predict([7] * 50) == 100
    predictor.observe([5] * 50, 20)
    assert (predictor.predict([1, 2]), predictor.predict([9, 9]), predictor.predict([7] * 50)) == (100, 100, 20)
    assert 20 < predictor.predict([1]) < 100, "of a length never seen"


SYSTEM = list(range(100, 130))  # what all prompts begin with
TASKS = {30: [1, 2, 3, 4] * 5, 200: [5, 6, 7, 8] * 5}  # mean completion lengths, and what prompts of a task say first


@pytest.mark.parametrize("system", [[], SYSTEM], ids=["bare", "system_prompt"])
def test_prompts_that_begin_alike_are_of_one_task(system):
    """Two tasks of as long prompts, as often completed: their lengths are told apart, as means of both are not."""
    draws = random.Random(0)
    seen = [
        (system + begins + [draws.randrange(1000) for _ in range(9)], draws.randint(mean // 2, 3 * mean // 2))
        for mean, begins in TASKS.items()
        for _ in range(40)
    ]
    predictor = warm(draws.sample(seen, len(seen)))
    for mean, begins in TASKS.items():
        assert predictor.predict([*system, *begins, *range(9)]) == pytest.approx(mean, rel=0.25)
    unknown = predictor.predict([*system, *range(50, 79)])
    assert 1.5 * min(TASKS) < unknown < 0.75 * max(TASKS), "of no task: as all"


def test_a_tasks_long_prompts_have_other_completions_than_its_short_ones():
    begins = TASKS[30]
    predictor = warm(
        [([*begins, *range(i, i + 5)], 20) for i in range(30)]
        + [([*begins, *range(i, i + 60)], 300) for i in range(30)]
    )
    assert predictor.predict([*begins, *range(90, 95)]) < 60 and predictor.predict([*begins, *range(90, 150)]) > 200


def test_beginnings_least_recently_completed_are_forgotten():
    predictor = warm([([i] * 600, 10 + i) for i in range(30)], max_prompts=2)
    assert len(predictor.state_dict()["kinds"]) == 16
    assert predictor.predict([29] * 500) > predictor.predict([0] * 500)
    again = warm([([i] * 8, 500 if i == 0 else 10) for i in (0, 1, 2, 3, 0, 4)], max_prompts=1)
    assert again.predict([0] * 8) > 1.5 * again.predict([1] * 8), "each has two kinds, and eight are remembered"
    assert again.predict([4] * 9) < again.predict([1] * 9), "those forgotten are taken for all"


@given(st.lists(st.tuples(PROMPTS, st.integers(1, 500)), min_size=1, max_size=40), PROMPTS)
def test_a_prediction_lies_among_what_was_seen_and_changes_nothing(pairs, prompt_ids):
    predictor = warm(pairs)
    before = predictor.state_dict()
    seen = [num_tokens for _, num_tokens in pairs]
    assert min(seen) - 1e-6 <= predictor.predict(prompt_ids) <= max(seen) + 1e-6
    own = [num_tokens for ids, num_tokens in pairs if ids == prompt_ids]
    if own:
        assert min(own) - 1e-6 <= predictor.predict(prompt_ids) <= max(own) + 1e-6
    assert predictor.state_dict() == before


def test_without_decay_it_is_the_mean_and_with_it_follows_the_policy():
    assert warm([([1], 10), ([1], 20), ([1], 60)], decay=1.0).predict([1]) == pytest.approx(30)
    predictor = warm([([1], 10)] * 50 + [([1], 100)] * 50)
    assert predictor.predict([1]) == pytest.approx(100, abs=1)


def test_prompts_least_recently_completed_are_forgotten():
    predictor = warm([([1], 10), ([2], 20), ([1], 10), ([3], 30)], max_prompts=2)
    assert predictor.num_prompts == 2
    assert predictor.predict([1]) == pytest.approx(10) and predictor.predict([3]) == pytest.approx(30)
    assert predictor.predict([2]) == predictor.predict([8]), "as a prompt never seen"


@given(st.lists(st.tuples(PROMPTS, st.integers(1, 500)), max_size=40), PROMPTS)
def test_a_restored_predictor_goes_on_as_if_nothing_had_happened(pairs, prompt_ids):
    predictor = warm(pairs, max_prompts=3)
    restored = LengthPredictor.from_state(json.loads(json.dumps(predictor.state_dict())))
    for each in (predictor, restored):
        each.observe(prompt_ids, 7)
    assert restored.state_dict() == predictor.state_dict()
    assert restored.predict(prompt_ids) == predictor.predict(prompt_ids)


def test_a_state_from_before_tasks_were_known_is_taken():
    predictor = warm([([1, 2], 10), ([5] * 40, 20)])
    older = {name: value for name, value in predictor.state_dict().items() if name != "kinds"}
    restored = LengthPredictor.from_state(older)
    assert restored.predict([1, 2]) == pytest.approx(10) and restored.predict([5] * 20 + [6] * 20) == pytest.approx(20)


def test_a_prompts_hash_is_the_same_in_every_process():
    assert hash_prompt([1, 2, 3]) == "77ba1ae68d5afbb4"
    assert len({hash_prompt(ids) for ids in ([1, 2], [2, 1], [1], [1, 2, 0], [258])}) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_prompts": 0}, "max_prompts must be at least 1, got 0"),
        ({"decay": 0.0}, r"decays must be in \(0, 1\], got 0\.0"),
        ({"shared_decay": 1.5}, r"decays must be in \(0, 1\], got 0\.9 and 1\.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LengthPredictor(**settings)


# -- who goes first ------------------------------------------------------------------------------------------


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=12),
    seen=st.lists(st.tuples(PROMPTS, st.integers(1, 500)), max_size=20),
    num_slots=st.integers(1, 14),
    data=st.data(),
)
def test_longest_first_siblings_together_ties_as_they_came(prompts, seen, num_slots, data):
    limits = data.draw(st.lists(st.integers(1, 500), min_size=len(prompts), max_size=len(prompts)))
    sequences = [build_sequence(i, ids, limits[i]) for i, ids in enumerate(prompts)]
    expected = warm(seen)
    order = list_admitted(Scheduler(num_slots, warm(seen)), sequences)
    assert sorted(order) == list(range(len(prompts)))
    if not seen or len(prompts) <= num_slots:
        assert order == sorted(order), "nothing to decide, or nothing to decide by"
        return
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda i: prompts[i])]
    assert len(groups) == len({tuple(ids) for ids in prompts}), "siblings stand together"
    assert all(group == sorted(group) for group in groups)
    keys = [(-min(expected.predict(prompts[g[0]]), max(limits[i] for i in g)), g[0]) for g in groups]
    assert keys == sorted(keys)


def test_later_arrivals_are_put_in_order_with_those_who_wait():
    scheduler = Scheduler(1, warm([([1], 10), ([2], 20), ([3], 30)]))
    first = [build_sequence(0, [1]), build_sequence(1, [2])]
    for sequence in first:
        scheduler.add(sequence)
    assert scheduler.admit() == [first[1]]
    late = build_sequence(2, [3])
    scheduler.add(late)
    assert scheduler.admit() == [] and list(scheduler.waiting) == [first[0], late], "no slot is free yet"
    scheduler.remove(0)
    assert scheduler.admit() == [late]
    scheduler.check()


@pytest.mark.parametrize("num_slots", [4, 8, 64])
def test_longest_first_where_the_memory_holds_fewer_than_there_are_slots(num_slots):
    lengths = [20] * 31 + [300]
    scheduler = Scheduler(num_slots, warm([([index], length) for index, length in enumerate(lengths)]))
    for index in range(32):
        scheduler.add(build_sequence(index, [index]))
    room = iter(range(4))
    admitted = scheduler.admit(lambda sequence: next(room, None) is not None, lambda: False)
    assert len(admitted) == 4 and admitted[0].request_id == 31


# -- what it gains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_slots", [8, 16])
def test_a_skewed_rollout_ends_sooner_longest_first(seed, num_slots):
    """Groups of 4, most short and some five to ten times as long; lengths of the second epoch are noisy copies."""
    rng = random.Random(seed)
    means = [rng.lognormvariate(3.5, 1.0) for _ in range(24)]
    prompts = [[index] * 5 for index in range(24) for _ in range(4)]
    first, second = ([max(1, round(means[ids[0]] * rng.uniform(0.7, 1.3))) for ids in prompts] for _ in range(2))
    predictor = LengthPredictor()
    play(prompts, first, num_slots, predictor)
    longest_first = play(prompts, second, num_slots, predictor)
    arrival = play(prompts, second, num_slots, LengthPredictor())
    assert longest_first < arrival


def test_a_straggler_at_the_end_is_the_worst_case():
    lengths = [20] * 31 + [200]
    prompts = [[index] for index in range(32)]
    known, rows_s = warm(list(zip(prompts, lengths, strict=True))), ROW_S * sum(lengths)
    assert play(prompts, lengths, 4, LengthPredictor()) == pytest.approx(340 * FORWARD_S + rows_s)
    assert play(prompts, lengths, 4, known) == pytest.approx(220 * FORWARD_S + rows_s)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=24), num_slots=st.integers(1, 6))
def test_longest_first_never_takes_a_third_more_than_another_order(lengths, num_slots):
    """Graham's bound (1969): with known lengths and alone in their groups, (4 - 1 / slots) / 3 of the best order."""
    prompts = [[index] for index in range(len(lengths))]
    known = warm(list(zip(prompts, lengths, strict=True)))
    longest_first, arrival = (play(prompts, lengths, num_slots, each) for each in (known, LengthPredictor()))
    rows_s = ROW_S * sum(lengths)  # the same in any order
    assert longest_first - rows_s <= (4 - 1 / num_slots) / 3 * (arrival - rows_s) + 1e-9
