"""Measured costs of this model on this machine: the planner's facts."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastgrpo.attention import ForwardBatch
from fastgrpo.draft_timing import TimedDraft, fit_draft_costs, time_drafts
from fastgrpo.memory import is_out_of_memory
from fastgrpo.model import TargetModel
from fastgrpo.planner import HardwareProfile
from fastgrpo.sampling import SamplingBatch
from fastgrpo.timing import LARGE_SPREAD, Timing, be_patient, is_late, level, measure_on, repeat_disturbed
from fastgrpo.tree import Draft
from fastgrpo.verify import verify

if TYPE_CHECKING:
    from fastgrpo.drafters import Drafter

_LEAST_TOKENS, _MOST_TOKENS = 256, 4096  # where the grid of tokens per forward may end
_LINEAR = 1.7  # twice the tokens take so many times as long: past the knee, where few plans pay
PATIENCE_S = 6.0  # for repetitions; about what a small model takes in all where the machine is quiet
_BUDGET_S = 30.0  # timed runs of the grid; a machine too slow for all of it ends sooner
_LONGEST_BETWEEN_S = 0.05  # of a forward that stands between timed drafts: small models leave heads in the caches
_ROWS = 8  # sequences that share the tokens of a measured forward
_READ_ROWS, _READ_CONTEXTS = 16, (32, 512)  # forwards whose difference prices a cached position


@dataclass(frozen=True, kw_only=True)
class TimedForward:
    """One measured point of the target."""

    num_tokens: int  # of the whole forward
    num_seqs: int  # rows that share them
    context_len: int  # cached positions of each row
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured: the points, and what the planner makes of them."""

    profile: HardwareProfile
    by_tokens: tuple[TimedForward, ...]  # hardly any context
    by_context: tuple[TimedForward, ...]
    drafts: tuple[TimedDraft, ...]  # empty where the drafter cannot be timed

    @property
    def worst(self) -> tuple[str, Timing]:
        """What disagreed most, in words, and its timing."""
        forwards = [
            (f"a forward of {each.num_tokens} tokens", each.timing) for each in self.by_tokens + self.by_context
        ]
        drafts = [
            (f"a draft of depth {each.plan.depth} for {each.num_seqs} sequences", each.timing) for each in self.drafts
        ]
        return max((*forwards, *drafts), key=lambda named: named[1].spread)

    @property
    def is_steady(self) -> bool:
        return self.worst[1].spread <= LARGE_SPREAD


def measure_costs(
    target: TargetModel,
    drafter: Drafter,
    *,
    contexts: tuple[int, ...] = _READ_CONTEXTS,
    widths: tuple[int, ...] = (1,),
    patience_s: float = PATIENCE_S,
) -> Measurement:
    """Time target forwards over a grid of tokens per forward, whole drafts, and sampling; price cached positions.

    Takes a few seconds on a small model. Call inside `target.rollout_mode`. Warns where repeated runs disagree much.

    Args:
        contexts: cached positions of each row in the forwards that price them, at least two.
        widths: tokens of each row in these forwards.
        patience_s: seconds after which everything is timed once: on a busy machine repetitions would take minutes.

    Raises:
        OSError: the machine's clock stands still.
    """
    try:
        with be_patient(patience_s):
            forwards = _measure_grid(target)
            is_short = forwards[0].timing.least_s <= _LONGEST_BETWEEN_S
            drafts = time_drafts(target, drafter, _build_forward(target, 1, 1, context=1) if is_short else None)
            reads = [_measure_contexts(target, width, contexts) for width in widths]
            sample_s, walk_s, fixed_s = _measure_rest(target)
            # once more, some time apart: a machine that was slow for a second was so in all runs of a point
            forwards = _repeat(target, forwards)
            reads = [_repeat(target, group) for group in reads]
    finally:
        target.forget()  # a rollout begins behind this, and its cache may be large
    grid = tuple(each.num_tokens for each in forwards)
    costs = fit_draft_costs(drafts, grid)
    profile = HardwareProfile(
        num_tokens=grid,
        target_s=tuple(level([each.timing.least_s for each in forwards])),
        draft_s=costs.level_s,
        draft_start_s=costs.start_s,
        read_s=_fit_read_s(reads),
        draft_read_s=costs.read_s,
        sample_s=sample_s,
        walk_s=walk_s,
        fixed_s=fixed_s,
        runs_ahead=target.device.type == "cuda",
    )
    measurement = Measurement(
        profile=profile,
        by_tokens=forwards,
        by_context=tuple(each for group in reads for each in group),
        drafts=drafts,
    )
    if not measurement.is_steady:
        warnings.warn(_describe_scatter(*measurement.worst), stacklevel=2)
    return measurement


def _measure_grid(target: TargetModel) -> tuple[TimedForward, ...]:
    """Forwards of ever more tokens, those that were disturbed once more."""

    def measure(num_tokens: int) -> TimedForward:
        rows = min(num_tokens, _ROWS)
        return _measure_forward(target, rows, num_tokens // rows, context=1)

    forwards: list[TimedForward] = []
    while _goes_on(forwards):
        num_tokens = 2 * forwards[-1].num_tokens if forwards else 1
        try:
            forwards.append(measure(num_tokens))
        except (RuntimeError, OSError) as error:
            if not is_out_of_memory(error) or len(forwards) < 2:
                raise
            warnings.warn(
                f"a forward of {num_tokens} tokens does not fit the memory, so the profile ends at "
                f"{forwards[-1].num_tokens} and no plan goes beyond",
                stacklevel=2,
            )
            break
    timings = repeat_disturbed(
        [each.timing for each in forwards], lambda index: measure(forwards[index].num_tokens).timing, growth=2.0
    )
    return tuple(replace(each, timing=timing) for each, timing in zip(forwards, timings, strict=True))


def _repeat(target: TargetModel, points: tuple[TimedForward, ...]) -> tuple[TimedForward, ...]:
    """The faster of two timings of each point, while patience (see `be_patient`) and memory last."""
    settled = list(points)
    for index, first in enumerate(points):
        if is_late():
            break
        try:
            again = _measure_forward(
                target, first.num_seqs, first.num_tokens // first.num_seqs, context=first.context_len
            )
            settled[index] = min(first, again, key=lambda point: point.timing.least_s)
        except (RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            break
    return tuple(settled)


def _measure_contexts(target: TargetModel, width: int, contexts: tuple[int, ...]) -> tuple[TimedForward, ...]:
    """Forwards that differ in cached positions alone; of fewer rows where the memory holds no more."""
    rows = _READ_ROWS
    while True:
        try:
            return tuple(_measure_forward(target, rows, width, context=context) for context in contexts)
        except (RuntimeError, OSError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
            warnings.warn(
                f"{rows} sequences of {max(contexts)} positions do not fit the memory, so that cached positions are "
                f"priced with {rows // 2}",
                stacklevel=2,
            )
            rows //= 2


def _goes_on(forwards: list[TimedForward]) -> bool:
    """Whether the grid of tokens per forward has not yet seen the knee."""
    if len(forwards) < 2:
        return True
    before, last = forwards[-2:]
    if sum(each.timing.total_s for each in forwards) > _BUDGET_S:
        return False
    is_linear = last.timing.least_s >= _LINEAR * before.timing.least_s
    return last.num_tokens < _LEAST_TOKENS or (not is_linear and last.num_tokens < _MOST_TOKENS)


def _describe_scatter(what: str, timing: Timing) -> str:
    return (
        f"the costs of this machine scatter: {what} took {100 * timing.spread:.0f} % longer in the median of "
        f"{timing.num_runs} runs than it can, so other work is probably on the machine; the fastest run is believed, "
        "and corrected at every step. Where the machine is quiet, fastgrpo profile measures again"
    )


def _fit_read_s(groups: Sequence[Sequence[TimedForward]]) -> float:
    """Seconds for each cached position: the common slope of forwards that differ, within a group, in these alone."""
    products, squares = 0.0, 0.0
    for group in groups:
        read = [each.num_seqs * each.context_len for each in group]
        times = [each.timing.least_s for each in group]
        mean_read, mean_s = statistics.fmean(read), statistics.fmean(times)
        products += sum((n - mean_read) * (s - mean_s) for n, s in zip(read, times, strict=True))
        squares += sum((n - mean_read) ** 2 for n in read)
    assert squares > 0, "a slope needs two contexts"
    return max(products / squares, 0.0)


def _measure_forward(target: TargetModel, rows: int, width: int, *, context: int) -> TimedForward:
    timing = measure_on(_build_forward(target, rows, width, context=context), target.device)
    return TimedForward(num_tokens=rows * width, num_seqs=rows, context_len=context, timing=timing)


def _build_forward(target: TargetModel, rows: int, width: int, *, context: int) -> Callable[[], object]:
    """A target forward of `rows` sequences with `width` tokens each behind `context` cached ones."""
    cache = target.build_cache(with_features=False)
    cache.add_rows(rows)
    for row in range(rows):
        cache.reserve(row, context + width)
    device = target.device
    batch = ForwardBatch.build(
        token_ids=torch.ones(rows, width, dtype=torch.int64, device=device),
        num_nodes=torch.full((rows,), width, device=device),
        visible=torch.ones(rows, width, width, dtype=torch.bool, device=device).tril(),
        blocks=cache.blocks,
        lengths=torch.full((rows,), context, device=device),
        dtype=target.dtype,
        num_repeats=target.num_repeats,
    )
    return lambda: target.decode(batch, cache)


def _measure_rest(target: TargetModel) -> tuple[float, float, float]:
    """Seconds for each sampled row, for each further level of a walk, and of a step: its sampling state, its roots."""

    def build() -> None:
        Draft.roots(SamplingBatch.build_blank(1, target.device).positions)

    def walk(rows: int) -> float:
        logits = torch.zeros(rows, target.vocab_size, dtype=target.dtype, device=target.device)
        vocabulary = torch.arange(target.vocab_size, dtype=torch.int32, device=target.device)
        row_starts = torch.arange(rows, device=target.device)
        roots, state = Draft.roots(torch.ones_like(row_starts)), SamplingBatch.build_blank(rows, target.device)
        walk_again = _record(target, lambda: (verify(logits, roots, row_starts, state, vocabulary).path,))

        def run() -> None:
            Draft.roots(SamplingBatch.build_blank(rows, target.device).positions)
            walk_again()

        return measure_on(run, target.device).least_s

    built_s, one_s, many_s = measure_on(build, target.device).least_s, walk(1), walk(_READ_ROWS)
    sample_s = max(many_s - one_s, 0.0) / (_READ_ROWS - 1)
    return sample_s, max(one_s - built_s - sample_s, 0.0), max(one_s - sample_s, 0.0)


def _record(target: TargetModel, run: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], object]:
    """The call as a step makes it: one of many in a recording, where steps are recorded."""
    recorder = target.open_recorder()
    if recorder is None:
        return run
    try:
        return recorder.record(run).replay
    except RuntimeError:
        return run
