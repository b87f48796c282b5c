"""Rollouts that take turns, and what is read off them."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.engine import Engine
from fastgrpo.machine import describe_origin
from fastgrpo.metrics import compute_ratio
from fastgrpo.report import describe_commit, describe_machine
from fastgrpo.types import SamplingParams, StepRecord

TURN_TOKENS = 6  # of each live sequence
_COMMIT = describe_commit(Path(__file__).parent)  # before anything runs: another commit may be made meanwhile


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """One measured rollout: its completions, its seconds, and its engine steps where it had any."""

    token_ids: list[list[int]]
    generation_s: float
    records: list[StepRecord] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.generation_s


def measure_rollout(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> RolloutResult:
    """Generate once; a calibration that happened to fall into it is not counted."""
    calibrated_s = engine.planning.profile_s
    started = time.perf_counter()
    completions = engine.generate(prompts, params)
    generation_s = time.perf_counter() - started - (engine.planning.profile_s - calibrated_s)
    token_ids = [completion.token_ids for completion in completions]
    return RolloutResult(token_ids=token_ids, generation_s=generation_s, records=engine.records)


def interleave(
    engines: Mapping[str, Engine],
    prompts: list[list[int]],
    build_params: Callable[[int], SamplingParams],
    repeats: int,
    *,
    turn_tokens: int | None = None,
    on_repeat: Callable[[dict[str, list[RolloutResult]]], None] | None = None,
) -> dict[str, list[RolloutResult]]:
    """`repeats` rollouts of each engine, A B C A B C: what else the machine does hits all alike.

    Args:
        build_params: from the number of the repeat to what all engines are given in it.
        turn_tokens: of each live sequence, that a turn lasts; None for whole rollouts. On a machine whose speed changes
            from second to second short turns are what makes the ratios of engines repeatable.
        on_repeat: is given the results so far after each repeat, so that they can be kept should the rest not come.
    """
    results: dict[str, list[RolloutResult]] = {name: [] for name in engines}
    for repeat in range(repeats):
        params = build_params(repeat)
        if turn_tokens is None:
            each = {name: measure_rollout(engine, prompts, params) for name, engine in engines.items()}
        else:
            each = _measure_together(engines, prompts, params, turn_tokens)
        for name, result in each.items():
            results[name].append(result)
        if on_repeat is not None:
            on_repeat(results)
    return results


def choose_turn_tokens(engine: Engine) -> int | None:
    """Of `interleave`: short turns on a CPU, whose other work is felt at once; whole rollouts elsewhere."""
    return TURN_TOKENS if engine.target.device.type == "cpu" else None


def _measure_together(
    engines: Mapping[str, Engine], prompts: list[list[int]], params: SamplingParams, turn_tokens: int
) -> dict[str, RolloutResult]:
    sequences = {name: engine.take_requests(prompts, params) for name, engine in engines.items()}
    calibrated_s = {name: engine.planning.profile_s for name, engine in engines.items()}
    seconds = dict.fromkeys(engines, 0.0)
    with open_together({name: engine.roll_out(sequences[name]) for name, engine in engines.items()}) as rollouts:
        live = set(engines)
        for order in draw_orders(engines):
            for name in filter(live.__contains__, order):
                started = time.perf_counter()
                take_turn(engines[name], rollouts[name], turn_tokens)
                seconds[name] += time.perf_counter() - started
            live = {name for name in live if engines[name].scheduler.has_work}
            if not live:
                break
    return {
        name: RolloutResult(
            token_ids=[sequence.token_ids for sequence in sequences[name]],
            generation_s=seconds[name] - (engine.planning.profile_s - calibrated_s[name]),
            records=engine.records,
        )
        for name, engine in engines.items()
    }


def draw_orders(names: Iterable[str], seed: int = 0) -> Iterator[list[str]]:
    """Endless orders of turns: as given, in which rollouts are opened, then at random.

    What an engine leaves in the machine's caches is met by the next one; at random it hits all alike.
    """
    order, draws = list(names), random.Random(seed)
    while True:
        yield order
        order = draws.sample(order, len(order))


def take_turn(engine: Engine, rollout: Iterator[StepRecord], turn_tokens: int) -> list[StepRecord]:
    """Steps until each live sequence has emitted so many tokens, in the mean, or all are finished."""
    records: list[StepRecord] = []
    emitted = 0.0
    while emitted < turn_tokens and (not records or engine.scheduler.has_work):
        records.append(next(rollout))
        emitted += records[-1].acceptance_length
    return records


Rollouts = dict[str, Generator[StepRecord]]


@contextmanager
def open_together(rollouts: Rollouts) -> Iterator[Rollouts]:
    """Rollouts that share a model and take turns; none may be exhausted inside, all are closed behind it.

    A rollout puts the model back as it found it, so the first one opened has to close last: their first steps must be
    in this order.
    """
    with ExitStack() as stack:
        for rollout in rollouts.values():
            stack.callback(rollout.close)
        yield rollouts


def compute_median(values: Iterable[float]) -> float:
    return statistics.median(values)


def compute_equal_share(ours: Sequence[RolloutResult], theirs: Sequence[RolloutResult]) -> float:
    """Share of the completions, in [0, 1], that are equal token for token."""
    pairs = [
        (left, right)
        for a, b in zip(ours, theirs, strict=True)
        for left, right in zip(a.token_ids, b.token_ids, strict=True)
    ]
    return compute_ratio(sum(left == right for left, right in pairs), len(pairs))


@dataclass(frozen=True, kw_only=True)
class MatchedRates:
    """Tokens per second of some engine steps, and of baseline steps that would draw as many tokens."""

    own: float
    baseline: float

    @property
    def gain(self) -> float:
        return compute_ratio(self.own, self.baseline)


def match_rates(
    own: Iterable[StepRecord], baseline: Iterable[StepRecord], *, max_num_seqs: int | None = None
) -> MatchedRates:
    """Compare two kinds of rollout whose completions differ: like numbers of live sequences with like.

    A step of ours with n live sequences that emitted e tokens is held against e / n plain steps with n live
    sequences, at the mean seconds such steps of the baseline took (interpolated where it had none). Prompts
    are left out on both sides.

    Args:
        own, baseline: engine steps; the baseline's decode plainly.
        max_num_seqs: only steps of ours with at most this many live sequences, the tail; None takes all.
    """
    seconds: dict[int, list[float]] = {}
    for record in baseline:
        seconds.setdefault(record.num_seqs, []).append(record.step_s - record.prefill_s)
    times = sorted((num_seqs, statistics.fmean(each)) for num_seqs, each in seconds.items())
    compared = [record for record in own if max_num_seqs is None or record.num_seqs <= max_num_seqs]
    num_emitted = sum(record.num_emitted for record in compared)
    own_s = sum(record.step_s - record.prefill_s for record in compared)
    baseline_s = sum(record.acceptance_length * _interpolate(times, record.num_seqs) for record in compared)
    return MatchedRates(own=compute_ratio(num_emitted, own_s), baseline=compute_ratio(num_emitted, baseline_s))


def _interpolate(points: list[tuple[int, float]], at: int) -> float:
    """Linear between the points, level beyond them."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[0][1] if at < points[0][0] else points[-1][1]


def break_down(records: Iterable[StepRecord], baseline: Iterable[StepRecord] | None = None) -> list[dict[str, float]]:
    """Engine steps by powers of two of their live sequences, most first: `num_seqs` 8 stands for 8 to 15.

    With the plain steps of a baseline, each row has its `gain` over them (`match_rates`).
    """
    plain = None if baseline is None else list(baseline)
    buckets: dict[int, list[StepRecord]] = {}
    for record in records:
        buckets.setdefault(1 << (record.num_seqs.bit_length() - 1), []).append(record)
    rows = [_describe_bucket(least, buckets[least]) for least in sorted(buckets, reverse=True)]
    if plain is None:
        return rows
    return [row | {"gain": match_rates(buckets[int(row["num_seqs"])], plain).gain} for row in rows]


def _describe_bucket(least: int, records: list[StepRecord]) -> dict[str, float]:
    emitted = sum(record.num_emitted for record in records)
    num_forwards = sum(record.num_seqs for record in records)
    return {
        "num_seqs": least,
        "num_steps": len(records),
        "tokens_per_s": emitted / sum(record.step_s for record in records),
        "step_ms": 1000 * compute_median(record.step_s for record in records),
        "nodes_per_sequence": sum(record.num_tokens for record in records) / num_forwards,
        "acceptance_length": emitted / num_forwards,
        "share_speculating": sum(not record.plan.is_plain for record in records) / len(records),
    }


def describe_run(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a published number must name."""
    return {
        "command": command,
        "commit": _COMMIT,
        "machine": describe_machine(),
        "settings": dict(settings),
        **describe_origin(settings.get("model")),
    }
