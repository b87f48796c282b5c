"""What whole drafts take, by sequences and depth: `propose` itself, timed on sequences that are made up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.memory import is_out_of_memory
from fastgrpo.model import TargetModel
from fastgrpo.planner.costs import READ_PER_DRAFT
from fastgrpo.planner.profile import interpolate
from fastgrpo.timing import MOST_RUNS, Timing, level, measure_on
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan

if TYPE_CHECKING:
    from fastgrpo.drafters import Drafter

_SHALLOW = SpeculationPlan(depth=1, width=4, num_draft_tokens=4)
_DEEP = SpeculationPlan(depth=4, width=4, num_draft_tokens=16)
_NUM_SEQS = (1, 4, 16, 64)
_CONTEXT = 32  # tokens of a sequence before the first draft
_NEW = READ_PER_DRAFT  # tokens accepted between two drafts, about as many as are
_MANY_NEW = {"cpu": 18, "cuda": 66}  # enough to price one: more than it takes a device's time to launch their reading
_PRICED_SEQS = 16  # sequences whose drafts price a token that was not read


@dataclass(frozen=True, kw_only=True)
class TimedDraft:
    """One measured draft."""

    num_seqs: int
    plan: SpeculationPlan
    num_new: int  # tokens of each sequence that the drafter had not read
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class DraftCosts:
    """Drafts as `HardwareProfile` prices them, on its grid; empty and 0 where nothing was timed."""

    start_s: tuple[float, ...]
    level_s: tuple[float, ...]
    read_s: float


def time_drafts(
    target: TargetModel, drafter: Drafter, before: Callable[[], object] | None = None
) -> tuple[TimedDraft, ...]:
    """Time drafts of one level and of four; empty where the drafter cannot be timed.

    Call inside `target.rollout_mode`.

    Args:
        before: what a step does before each draft, not timed; see `measure_on`.
    """
    drafter = getattr(drafter, "members", (drafter,))[0]
    if not getattr(drafter, "can_be_timed", False):
        return ()
    drafts: list[TimedDraft] = []
    many_new = _MANY_NEW.get(target.device.type, _MANY_NEW["cpu"])
    try:
        for num_seqs, num_new in (*((n, _NEW) for n in _NUM_SEQS), (_PRICED_SEQS, many_new)):
            drafts += [_time_draft(target, drafter, num_seqs, plan, num_new, before) for plan in (_SHALLOW, _DEEP)]
    except (RuntimeError, OSError) as error:
        if not is_out_of_memory(error) or not drafts:
            raise
        warnings.warn(
            f"a draft for {num_seqs} sequences does not fit the memory; its time is continued from smaller ones",
            stacklevel=3,
        )
    drafter.begin()
    return tuple(drafts)


def fit_draft_costs(drafts: tuple[TimedDraft, ...], grid: tuple[int, ...]) -> DraftCosts:
    """A start by sequences, a further level by nodes, a token more to read: linear between what was timed."""
    if not drafts:
        return DraftCosts(start_s=(), level_s=(), read_s=0.0)
    times = {(each.num_seqs, each.plan, each.num_new): each.timing.least_s for each in drafts}
    num_seqs = sorted({each.num_seqs for each in drafts})
    starts = level([times[count, _SHALLOW, _NEW] for count in num_seqs])
    deep = [times[count, _DEEP, _NEW] for count in num_seqs]
    further = _DEEP.depth - _SHALLOW.depth
    least_s = min(starts) / (10 * further)  # where the clock cannot tell the two depths apart
    levels = level([max((many_s - one_s) / further, least_s) for one_s, many_s in zip(starts, deep, strict=True)])
    many_new = max(each.num_new for each in drafts)
    few_s, many_s = (times.get((_PRICED_SEQS, _SHALLOW, num_new), 0.0) for num_new in (_NEW, many_new))
    return DraftCosts(
        start_s=tuple(_continue(num_seqs, starts, count) for count in grid),
        level_s=tuple(_continue([_DEEP.width * count for count in num_seqs], levels, nodes) for nodes in grid),
        read_s=max(many_s - few_s, 0.0) / (_PRICED_SEQS * max(many_new - _NEW, 1)),
    )


def _continue(points: list[int], times: list[float], at: int) -> float:
    return times[0] if len(points) == 1 else interpolate(points, times, at)


def _time_draft(
    target: TargetModel,
    drafter: Drafter,
    num_seqs: int,
    plan: SpeculationPlan,
    num_new: int,
    before: Callable[[], object] | None,
) -> TimedDraft:
    drafter.begin()
    device = target.device
    cache = target.build_cache(with_features=drafter.wants_features)
    sequences = [_build_sequence(request_id) for request_id in range(num_seqs)]
    cache.add_rows(num_seqs)
    for row in range(num_seqs):
        cache.reserve(row, _CONTEXT + num_new * MOST_RUNS)
    context = DraftContext(sequences=sequences, cache=cache, device=device)  # whose tensors are no part of a draft

    def run() -> None:
        for sequence in sequences:
            sequence.token_ids += [1] * num_new
        for row, sequence in enumerate(sequences):  # no more than is there, but on a clock that stands still
            cache.reserve(row, sequence.num_cached)
        cache.lengths = [sequence.num_cached for sequence in sequences]
        drafter.propose(context, plan)

    return TimedDraft(num_seqs=num_seqs, plan=plan, num_new=num_new, timing=measure_on(run, device, before))


def _build_sequence(request_id: int) -> Sequence:
    return Sequence(
        request_id=request_id,
        prompt_ids=[1] * _CONTEXT,
        params=SamplingParams(),
        max_tokens=1,
        stream_key=request_id,
    )
