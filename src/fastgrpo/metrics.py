"""From the raw facts of engine steps to the numbers a person reads. Pure arithmetic, no tensors.

A number that was not measured is `nan`, never 0: TRL leaves `nan` out when it averages a metric and
logs `None` when nothing is left, and the set of keys stays the same on every process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastgrpo.types import PHASES, StepRecord, Timeline


@dataclass(frozen=True, kw_only=True)
class RolloutSummary:
    """One rollout in numbers. Times are seconds; the parts add up to `rollout_s`.

    Ratios are `nan` where their denominator is 0 (no step, no draft, no time).
    """

    num_steps: int
    num_tokens_emitted: int
    num_tokens_verified: int  # tokens in the target forwards, roots included
    rollout_s: float
    tokens_per_s: float  # emitted tokens per second of rollout_s
    acceptance_length: float  # tokens emitted per sequence and target forward, plain steps included
    acceptance_length_speculating: float  # the same over the steps with a plan that is not plain
    acceptance_rate: float  # accepted / verified draft tokens, in [0, 1]
    first_draft_rate: float  # chance that a tree's best first token is the target's choice: the drafter's own merit
    share_speculating: float  # share of the steps that speculated, in [0, 1]
    mean_draft_tokens: float  # draft tokens verified per sequence and target forward, plain steps included
    prefill_s: float
    draft_s: float
    target_s: float
    verify_s: float
    cache_peak_bytes: float  # keys, values and features in use at once, at most; nan where no step says so
    num_preempted: int  # times that a sequence had to wait for memory and was computed anew
    other_s: float  # rollout_s less the four parts: scheduling, bookkeeping and what lies between steps


def compute_ratio(numerator: float, denominator: float) -> float:
    """`numerator / denominator`, and `nan` where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def _acceptance_length(records: Iterable[StepRecord]) -> float:
    counts = [(record.num_emitted, record.num_seqs) for record in records]
    return compute_ratio(sum(emitted for emitted, _ in counts), sum(seqs for _, seqs in counts))


def summarise_rollout(records: Sequence[StepRecord], *, rollout_s: float) -> RolloutSummary:
    """Sum up the engine steps of one rollout that took `rollout_s` seconds of wall clock.

    Every sequence emits exactly one token that no draft proposed in each step, so the accepted draft
    tokens are `num_emitted - num_seqs`. An accepted token beyond a stop token is never emitted and
    so not counted: the acceptance rate is a lower bound, tight but for the last step of a sequence.

    `other_s` is negative only where the clocks of the steps and of the rollout disagree.

    Raises:
        ValueError: `rollout_s` is negative or not finite.
    """
    if not (math.isfinite(rollout_s) and rollout_s >= 0):
        raise ValueError(f"rollout_s must be a finite number of seconds >= 0, got {rollout_s}")
    num_forwards = sum(record.num_seqs for record in records)
    num_emitted = sum(record.num_emitted for record in records)
    num_verified = sum(record.num_tokens for record in records)
    num_draft_tokens = num_verified - num_forwards
    speculating = [record for record in records if not record.plan.is_plain]
    drafted = [record for record in speculating if record.offered]
    prefill_s = sum(record.prefill_s for record in records)
    draft_s = sum(record.draft_s for record in records)
    target_s = sum(record.target_s for record in records)
    verify_s = sum(record.verify_s for record in records)
    return RolloutSummary(
        num_steps=len(records),
        num_tokens_emitted=num_emitted,
        num_tokens_verified=num_verified,
        rollout_s=rollout_s,
        tokens_per_s=compute_ratio(num_emitted, rollout_s),
        acceptance_length=_acceptance_length(records),
        acceptance_length_speculating=_acceptance_length(speculating),
        acceptance_rate=compute_ratio(num_emitted - num_forwards, num_draft_tokens),
        first_draft_rate=compute_ratio(
            sum(record.hits[0][0] for record in drafted), sum(record.offered[0][0] for record in drafted)
        ),
        share_speculating=compute_ratio(len(speculating), len(records)),
        mean_draft_tokens=compute_ratio(num_draft_tokens, num_forwards),
        prefill_s=prefill_s,
        draft_s=draft_s,
        target_s=target_s,
        verify_s=verify_s,
        cache_peak_bytes=max((record.cache_bytes for record in records), default=0) or math.nan,
        num_preempted=sum(record.num_preempted for record in records),
        other_s=rollout_s - (prefill_s + draft_s + target_s + verify_s),
    )


def rollout_metrics(summary: RolloutSummary, *, capacity: float | None) -> dict[str, float]:
    """The summary under the keys of a TRL log row. Times in seconds.

    Args:
        summary: what `summarise_rollout` returned.
        capacity: tokens one target forward verifies at no extra cost (the paper's C_peak);
            `None` where no planner measured it, logged as `nan`.
    """
    return {
        "rollout/spec_accept_length": summary.acceptance_length,
        "rollout/spec_accept_length_speculating": summary.acceptance_length_speculating,
        "rollout/spec_accept_rate": summary.acceptance_rate,
        "rollout/spec_first_draft_rate": summary.first_draft_rate,
        "rollout/tokens_per_s": summary.tokens_per_s,
        "rollout/target_s": summary.target_s,
        "rollout/draft_s": summary.draft_s,
        "rollout/verify_s": summary.verify_s,
        "rollout/prefill_s": summary.prefill_s,
        "rollout/other_s": summary.other_s,
        "rollout/cache_peak_bytes": summary.cache_peak_bytes,
        "rollout/num_preempted": summary.num_preempted,
        "plan/num_draft_tokens": summary.mean_draft_tokens,
        "plan/share_speculating": summary.share_speculating,
        "plan/capacity": math.nan if capacity is None else float(capacity),
    }


def step_time_shares(rollout_s: float, draft_learn_s: float, update_s: float, reward_s: float) -> dict[str, float]:
    """Where one training step's time went: `time/<part>_s` in seconds, `time/<part>_share` in [0, 1].

    The parts are `rollout`, `learn` (training the drafter), `update` (training the policy) and
    `reward`; the shares are of their sum and add up to 1, or are all `nan` where the sum is 0.

    Raises:
        ValueError: a time is negative or not finite.
    """
    parts_s = {"rollout": rollout_s, "learn": draft_learn_s, "update": update_s, "reward": reward_s}
    for name, part_s in parts_s.items():
        if not (math.isfinite(part_s) and part_s >= 0):
            raise ValueError(f"the {name} time must be a finite number of seconds >= 0, got {part_s}")
    total_s = sum(parts_s.values())
    seconds = {f"time/{name}_s": part_s for name, part_s in parts_s.items()}
    return seconds | {f"time/{name}_share": compute_ratio(part_s, total_s) for name, part_s in parts_s.items()}


def compute_phase_times(timeline: Timeline) -> dict[str, float]:
    """Seconds of each of `PHASES` in a step, and `other`: what lies between them. They add up to the step."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for span in timeline.spans:
        if span.name in seconds:
            seconds[span.name] += span.end_s - span.start_s
    return seconds | {"other": timeline.step_s - sum(seconds.values())}
