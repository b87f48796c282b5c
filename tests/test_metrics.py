"""Laws of the numbers: times add up, plain decoding has acceptance length 1, shares are shares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.metrics import rollout_metrics, step_time_shares, summarise_rollout
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

SECONDS = st.floats(min_value=0, max_value=100)


@st.composite
def step_records(draw: st.DrawFn, plain: bool | None = None) -> StepRecord:
    """A step that could have happened: every sequence emits at least one token, at most its path."""
    is_plain = draw(st.booleans()) if plain is None else plain
    num_seqs = draw(st.integers(1, 64))
    depth = draw(st.integers(1, 4))
    plan = PLAIN if is_plain else SpeculationPlan(depth=depth, width=2, num_draft_tokens=depth + 2)
    parts_s = [draw(SECONDS) for _ in range(4)]
    return StepRecord(
        num_seqs=num_seqs,
        num_waiting=draw(st.integers(0, 64)),
        plan=plan,
        num_tokens=num_seqs * (1 + plan.num_draft_tokens),
        num_emitted=draw(st.integers(num_seqs, num_seqs * (1 + plan.depth))),
        num_read=draw(st.integers(0, 10_000)),
        num_prefilled=draw(st.integers(0, 1_000)),
        offered=((num_seqs, num_seqs),) * plan.depth,
        hits=((0, 0),) * plan.depth,
        prefill_s=parts_s[0],
        draft_s=parts_s[1],
        target_s=parts_s[2],
        verify_s=parts_s[3],
        step_s=sum(parts_s) + draw(SECONDS),
    )


@given(st.lists(step_records(), max_size=8), SECONDS)
def test_the_parts_of_a_rollout_add_up_to_its_time(records: list[StepRecord], between_steps_s: float) -> None:
    rollout_s = sum(record.step_s for record in records) + between_steps_s
    summary = summarise_rollout(records, rollout_s=rollout_s)
    parts_s = summary.prefill_s + summary.draft_s + summary.target_s + summary.verify_s + summary.other_s
    assert parts_s == pytest.approx(rollout_s)
    assert summary.other_s >= between_steps_s - 1e-6


@given(st.lists(step_records(plain=True), min_size=1, max_size=8))
def test_plain_decoding_has_acceptance_length_one(records: list[StepRecord]) -> None:
    summary = summarise_rollout(records, rollout_s=1.0)
    assert summary.acceptance_length == 1
    assert summary.mean_draft_tokens == 0
    assert summary.share_speculating == 0
    assert math.isnan(summary.acceptance_length_speculating)
    assert math.isnan(summary.acceptance_rate)


@given(st.lists(step_records(plain=False), min_size=1, max_size=8))
def test_speculating_steps_only_give_one_acceptance_length(records: list[StepRecord]) -> None:
    summary = summarise_rollout(records, rollout_s=1.0)
    assert summary.acceptance_length_speculating == summary.acceptance_length >= 1
    assert 0 <= summary.acceptance_rate <= 1
    assert summary.first_draft_rate == 0, "no record here has a hit"
    # what a sequence emits is its next token and the accepted share of its draft
    assert summary.acceptance_length == pytest.approx(1 + summary.acceptance_rate * summary.mean_draft_tokens)


@given(st.lists(step_records(), min_size=1, max_size=8), st.integers(0, 8))
def test_the_summary_does_not_depend_on_the_order_of_steps(records: list[StepRecord], turn: int) -> None:
    turned = records[turn:] + records[:turn]
    before, after = (summarise_rollout(steps, rollout_s=2.0) for steps in (records, turned))
    assert before.acceptance_length == after.acceptance_length
    assert before.num_tokens_verified == after.num_tokens_verified
    assert before.target_s == pytest.approx(after.target_s)


def test_an_empty_rollout_has_counts_but_no_ratios() -> None:
    summary = summarise_rollout([], rollout_s=0.0)
    assert summary.num_steps == summary.num_tokens_emitted == summary.num_tokens_verified == 0
    for ratio in (summary.tokens_per_s, summary.acceptance_length, summary.share_speculating):
        assert math.isnan(ratio)


@pytest.mark.parametrize("rollout_s", [-1.0, math.nan, math.inf])
def test_an_impossible_time_is_named(rollout_s: float) -> None:
    with pytest.raises(ValueError, match=str(rollout_s)):
        summarise_rollout([], rollout_s=rollout_s)
    with pytest.raises(ValueError, match=f"update time.*{rollout_s}"):
        step_time_shares(1.0, 1.0, rollout_s, 1.0)


def test_a_peak_is_the_most_of_any_step_and_nan_where_none_says() -> None:
    record = StepRecord(
        num_seqs=1, num_waiting=0, plan=PLAIN, num_tokens=1, num_emitted=1, num_read=0, num_prefilled=0, offered=(),
        hits=(), prefill_s=0.0, draft_s=0.0, target_s=0.0, verify_s=0.0, step_s=0.0,
    )  # fmt: skip
    steps = [replace(record, cache_bytes=size, num_preempted=count) for size, count in ((5, 0), (9, 2), (7, 1))]
    summary = summarise_rollout(steps, rollout_s=1.0)
    assert (summary.cache_peak_bytes, summary.num_preempted) == (9, 3)
    assert math.isnan(summarise_rollout([record], rollout_s=1.0).cache_peak_bytes)


@given(st.lists(step_records(), max_size=4))
def test_metrics_have_the_same_keys_whatever_was_measured(records: list[StepRecord]) -> None:
    full = rollout_metrics(summarise_rollout(records, rollout_s=1.0), capacity=64)
    empty = rollout_metrics(summarise_rollout([], rollout_s=0.0), capacity=None)
    assert full.keys() == empty.keys()
    assert full["plan/capacity"] == 64
    assert math.isnan(empty["plan/capacity"])
    assert all(isinstance(value, int | float) for value in full.values())


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_the_shares_of_a_step_add_up_to_one(rollout_s: float, learn_s: float, update_s: float, reward_s: float) -> None:
    row = step_time_shares(rollout_s, learn_s, update_s, reward_s)
    assert row["time/rollout_s"] == rollout_s
    assert row["time/learn_s"] == learn_s
    shares = [value for key, value in row.items() if key.endswith("_share")]
    if rollout_s + learn_s + update_s + reward_s == 0:
        assert all(math.isnan(share) for share in shares)
    else:
        assert sum(shares) == pytest.approx(1)
