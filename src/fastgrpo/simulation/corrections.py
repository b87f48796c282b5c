"""What measured steps say of a cost table."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from fastgrpo.planner import HardwareProfile, StepCosts
from fastgrpo.simulation.costs import Corrections, ProfileCosts, StepSeconds, StepWork
from fastgrpo.types import StepRecord


def fit_corrections(profile: HardwareProfile, rollouts: Iterable[Sequence[StepRecord]]) -> Corrections:
    """Prices followed through all steps of some rollouts, mixed, so that none is believed for being the last."""
    records = [record for rollout in rollouts for record in rollout]
    random.Random(0).shuffle(records)
    steps = StepCosts(profile)
    for record in records:
        steps.observe(record)
    steps.settle()
    prefilled = [record for record in records if record.num_prefilled]
    predicted_s = sum(profile.compute_target_s(record.num_prefilled) for record in prefilled)
    measured_s = sum(record.prefill_s for record in prefilled)
    outside_s = sum(r.step_s - r.prefill_s - r.draft_s - r.target_s - r.verify_s for r in records)
    return Corrections(
        steps=steps,
        scale=_compare_sums(profile, steps, records),
        prefill=measured_s / predicted_s if measured_s > 0 and predicted_s > 0 else 1.0,
        between_s=max(outside_s / max(len(records), 1), 0.0),
    )


def _compare_sums(profile: HardwareProfile, steps: StepCosts, records: Sequence[StepRecord]) -> float:
    """Measured over predicted seconds of all steps, prompts apart."""
    costs = ProfileCosts(profile=profile, corrections=Corrections(steps=steps))
    measured_s = _sum_parts(records)
    predicted_s = _sum_parts([costs.price(StepWork.of(record)) for record in records])
    return measured_s / predicted_s if measured_s > 0 and predicted_s > 0 else 1.0


def _sum_parts(steps: Sequence[StepRecord] | Sequence[StepSeconds]) -> float:
    return sum(step.draft_s + step.target_s + step.verify_s for step in steps)
