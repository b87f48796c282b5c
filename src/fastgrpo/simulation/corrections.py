"""What measured steps say of a cost table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastgrpo.planner import HardwareProfile
from fastgrpo.simulation.costs import Corrections, ProfileCosts, StepWork
from fastgrpo.types import StepRecord


def fit_corrections(profile: HardwareProfile, rollouts: Iterable[Sequence[StepRecord]]) -> Corrections:
    """Measured over predicted seconds of each part, over all steps of some rollouts; a part that never ran keeps 1."""
    costs = ProfileCosts(profile=profile)
    steps = [
        (record, costs.price(work))
        for records in rollouts
        for record, work in zip(records, list_work(records), strict=True)
    ]
    plain = [record for record, _ in steps if record.plan.is_plain]
    between_s = 0.0
    if plain:
        between_s = max(sum(record.draft_s for record in plain) / len(plain) - profile.fixed_s, 0.0)
    outside_s = profile.fixed_s + between_s
    drafted = [
        (record.draft_s - outside_s, priced.draft_s - profile.fixed_s)
        for record, priced in steps
        if not record.plan.is_plain
    ]
    return Corrections(
        prefill=_compare((record.prefill_s, priced.prefill_s) for record, priced in steps if record.num_prefilled),
        draft=_compare(drafted),
        target=_compare((record.target_s, priced.target_s) for record, priced in steps),
        verify=_compare((record.verify_s, priced.verify_s) for record, priced in steps),
        between_s=between_s,
    )


def _compare(times: Iterable[tuple[float, float]]) -> float:
    pairs = list(times)
    measured_s, predicted_s = sum(measured for measured, _ in pairs), sum(predicted for _, predicted in pairs)
    return measured_s / predicted_s if measured_s > 0 and predicted_s > 0 else 1.0


def list_work(records: Sequence[StepRecord]) -> list[StepWork]:
    """The work of measured steps. What the drafter had not read is not recorded; it is counted from what was emitted.

    Tokens of sequences that end meanwhile count although nobody reads them any more.
    """
    works = []
    num_unread = records[0].num_read if records else 0
    for record in records:
        num_unread += record.num_prefilled
        works.append(
            StepWork(
                plan=record.plan,
                num_seqs=record.num_seqs,
                num_tokens=record.num_tokens,
                num_read=record.num_read,
                num_unread=min(num_unread, record.num_read),
                num_emitted=record.num_emitted,
                num_prefilled=record.num_prefilled,
            )
        )
        num_unread = record.num_emitted + (num_unread if record.plan.is_plain else 0)
    return works
