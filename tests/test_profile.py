"""What things cost: timed though the machine is busy, kept on file, refused elsewhere, and turned into a forecast."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from conftest import SMALL_CPU, build_model, shared_model
from fastgrpo import draft_timing, profiler, timing
from fastgrpo import profile as profile_command
from fastgrpo.cache_folder import find_cache_folder, has_profile_cache
from fastgrpo.cli import main
from fastgrpo.drafters import Drafter, build_drafter
from fastgrpo.engine import Engine
from fastgrpo.idleness import OthersWork
from fastgrpo.model import TargetModel
from fastgrpo.options import ProfileOptions
from fastgrpo.planner import AcceptanceTable, AutoPlanner, Forecast, HardwareProfile, describe_gains, forecast_gains
from fastgrpo.planner.acceptance import MAX_DEPTH, MAX_WIDTH
from fastgrpo.planner.forecast import find_break_even
from fastgrpo.profile import Check, _check_first_gain, _choose_params, _correct, _describe_verdict
from fastgrpo.profile_files import (
    describe_identity,
    find_profile,
    keep_profile,
    read_profile,
    save_profile,
    take_profile,
)
from fastgrpo.profiler import Measurement, TimedForward, _fit_read_s, measure_costs
from fastgrpo.report.roofline import build_roofline
from fastgrpo.types import SamplingParams, SpeculationPlan
from tiny import save_tiny_model

PROMPTS = [[3, 5, 7], [11, 13]]


def set_clock(monkeypatch: pytest.MonkeyPatch, durations: Iterable[float]) -> list[float]:
    """A clock by which the runs that are timed take these seconds; returns the readings, as they are taken."""
    readings: list[float] = []
    ahead: Iterator[float] = iter(durations)

    def read() -> float:
        last = readings[-1] if readings else 0.0
        readings.append(last + next(ahead) if len(readings) % 2 else last)
        return readings[-1]

    monkeypatch.setattr(timing, "perf_counter", read)
    return readings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes four seconds, so few are made: what is measured does not depend on this machine."""
    set_clock(monkeypatch, itertools.repeat(4.0))
    monkeypatch.setattr(OthersWork, "count_cores_taken", lambda _: 0.0)


def build_target(**changes: object) -> TargetModel:
    return TargetModel(build_model("llama", torch.float32, **changes) if changes else shared_model("llama"))


def find(target: TargetModel, drafter: str = "ngram") -> HardwareProfile:
    with target.rollout_mode():
        return find_profile(target, build_drafter(drafter, target))


# -- the clock -------------------------------------------------------------------------------------------------


def test_runs_that_agree_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.repeat(0.25))
    measured = timing.measure_timing(lambda: None)
    assert (measured.least_s, measured.spread, measured.num_runs) == (0.25, 0, 3)


def test_runs_that_disagree_are_repeated_until_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, [0.5, 0.2, 0.4, *itertools.repeat(0.2, 20)])
    measured = timing.measure_timing(lambda: None)
    assert (measured.least_s, measured.spread, measured.num_runs) == (pytest.approx(0.2), pytest.approx(0), 6)


def test_runs_that_never_agree_end_with_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.cycle([0.01, 0.03, 0.03]))
    measured = timing.measure_timing(lambda: None)
    assert (measured.spread, measured.num_runs) == (pytest.approx(2), 12)


def test_slow_runs_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, [20.0, 90.0])
    assert timing.measure_timing(lambda: None).num_runs == 2


def test_when_patience_has_ended_each_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.cycle([0.01, 0.03, 0.03]))
    with timing.be_patient(60.0):
        assert timing.measure_timing(lambda: None).num_runs == 12
        with timing.be_patient(-1.0):
            hurried = timing.measure_timing(lambda: None)
        assert (hurried.num_runs, hurried.spread) == (1, 0)
        assert timing.measure_timing(lambda: None).num_runs == 12


def test_a_machine_that_is_too_busy_for_repetitions_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    measure = timing.measure_timing
    monkeypatch.setattr(timing, "measure_timing", lambda *args: (runs.append(0), measure(*args))[1])
    target = TargetModel(shared_model("llama"))
    with target.rollout_mode():
        measured = profiler.measure_costs(target, build_drafter("ngram", target), patience_s=0.0)
    timings = [each.timing for each in (*measured.by_tokens, *measured.by_context)]
    assert {each.num_runs for each in timings} == {1} and len(measured.profile.num_tokens) >= 9


def test_a_clock_that_stalls_is_asked_again_over_more_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, [0.0, 0.0, 0.4, 0.1, 0.1])
    calls: list[None] = []
    measured = timing.measure_timing(lambda: calls.append(None))
    assert measured.least_s == pytest.approx(0.1), "0.4 s were of four calls"
    assert len(calls) == 1 + (1 + 2 + 4) + 1 + 1


def test_what_comes_before_each_run_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.repeat(0.25))
    calls: list[str] = []
    measured = timing.measure_timing(lambda: calls.append("run"), lambda: calls.append("before"))
    assert calls == ["run", *["before", "run"] * 3] and measured.total_s == 0.75


@pytest.mark.parametrize("step_s", [0.01, 0.2])
def test_drafts_are_timed_behind_a_forward_if_that_is_short(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """A head that is left in the processor's caches looks cheaper than it will be."""
    befores: list[object] = []
    monkeypatch.setattr(profiler, "time_drafts", lambda target, drafter, before: befores.append(before) or ())
    set_clock(monkeypatch, itertools.repeat(step_s))
    target = TargetModel(shared_model("llama"))
    with target.rollout_mode():
        profiler.measure_costs(target, build_drafter("ngram", target))
    assert (befores[0] is not None) == (step_s <= 0.05)


def test_a_dead_clock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "perf_counter", lambda: 3.0)
    calls: list[None] = []
    with pytest.raises(OSError, match="clock of this machine stood still over 64 calls"):
        timing.measure_timing(lambda: calls.append(None))
    assert len(calls) < 200


# -- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle-new", "block"])
def test_a_measured_profile_has_all_its_costs(steady: None, drafter: str) -> None:
    target = build_target(tie_word_embeddings=False)
    with target.rollout_mode():
        measured = measure_costs(target, build_drafter(drafter, target), contexts=(8, 32, 64), widths=(1, 2))
    profile = measured.profile
    assert profile.num_tokens == (1, 2, 4, 8), "more would take too long at four seconds each"
    assert profile.target_s == (4.0,) * 4
    assert profile.draft_start_s == (() if drafter == "none" else profile.target_s)
    assert profile.draft_s == (() if drafter == "none" else (pytest.approx(4.0 / 30),) * 4), "no depth is dearer"
    assert [(each.num_seqs, each.plan.depth, each.num_new) for each in measured.drafts] == (
        [] if drafter == "none" else [*itertools.product((1, 4, 16, 64), (1, 4), (2,)), (16, 1, 18), (16, 4, 18)]
    )
    assert (profile.read_s, profile.draft_read_s, profile.sample_s, profile.walk_s, profile.fixed_s) == (
        0,
        0,
        0,
        0,
        4.0,
    )
    assert profile.capacity == 8, "time that never rises has no knee"
    assert [(each.num_tokens, each.context_len) for each in measured.by_context] == [
        (16, 8), (16, 32), (16, 64), (32, 8), (32, 32), (32, 64),
    ]  # fmt: skip


def test_the_grid_goes_on_while_the_time_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.repeat(2**-10))
    target = build_target()
    with target.rollout_mode():
        measured = measure_costs(target, build_drafter("none", target))
    assert measured.profile.capacity == measured.profile.num_tokens[-1] == 4096
    assert measured.is_steady


@pytest.mark.parametrize(("growth", "last"), [(1.6, 4096), (1.8, 256)])
def test_the_grid_ends_past_the_knee(growth: float, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where twice the tokens take nearly twice as long, few plans pay: large forwards are not worth the wait."""

    def measure(target: TargetModel, rows: int, width: int, *, context: int) -> TimedForward:
        count = rows * width
        timing_of = timing.Timing(least_s=1e-6 * growth ** math.log2(count), spread=0.0, num_runs=3, total_s=0.0)
        return TimedForward(num_tokens=count, num_seqs=rows, context_len=context, timing=timing_of)

    monkeypatch.setattr(profiler, "_measure_forward", measure)
    assert [each.num_tokens for each in profiler._measure_grid(build_target())][-1] == last


@pytest.mark.parametrize("is_cuda", [False, True])
def test_a_grid_that_does_not_fit_the_memory_is_shrunk_and_named(
    steady: None, monkeypatch: pytest.MonkeyPatch, is_cuda: bool
) -> None:
    target = build_target(tie_word_embeddings=False)
    forward, drafted = profiler._measure_forward, draft_timing._time_draft
    error = torch.OutOfMemoryError("CUDA") if is_cuda else RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def measure(target: TargetModel, rows: int, width: int, *, context: int) -> TimedForward:
        if rows * width == 4 and context == 1:
            raise error
        return forward(target, rows, width, context=context)

    def draft(target: TargetModel, drafter: Drafter, num_seqs: int, *shape: object) -> object:
        if num_seqs >= 16:
            raise error
        return drafted(target, drafter, num_seqs, *shape)

    monkeypatch.setattr(profiler, "_measure_forward", measure)
    monkeypatch.setattr(draft_timing, "_time_draft", draft)
    with target.rollout_mode(), pytest.warns(UserWarning) as warned:
        measured = measure_costs(target, build_drafter("eagle-new", target))
    messages = " ".join(str(each.message) for each in warned)
    assert "a forward of 4 tokens does not fit the memory, so the profile ends at 2" in messages
    assert "a draft for 16 sequences does not fit the memory" in messages
    assert measured.profile.num_tokens == (1, 2) and len(measured.profile.draft_start_s) == 2
    monkeypatch.setattr(profiler, "_measure_forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
    with target.rollout_mode(), pytest.raises(RuntimeError, match="broken"):
        measure_costs(target, build_drafter("none", target))


@given(
    start=st.tuples(st.floats(1e-3, 1e-2), st.floats(0, 1e-3)),
    level=st.tuples(st.floats(1e-3, 1e-2), st.floats(0, 1e-4)),
    read_s=st.floats(0, 1e-4),
)
def test_the_costs_of_drafts_are_recovered(
    start: tuple[float, float], level: tuple[float, float], read_s: float
) -> None:
    """From whole drafts of a machine whose starts and levels are straight lines."""

    def build(num_seqs: int, plan: SpeculationPlan, num_new: int) -> draft_timing.TimedDraft:
        seconds = start[0] + start[1] * num_seqs + read_s * num_seqs * (num_new - 2)
        seconds += (plan.depth - 1) * (level[0] + level[1] * num_seqs * plan.width)
        timed = timing.Timing(least_s=seconds, spread=0.0, num_runs=3, total_s=3 * seconds)
        return draft_timing.TimedDraft(num_seqs=num_seqs, plan=plan, num_new=num_new, timing=timed)

    shapes = [*((n, 2) for n in (1, 4, 16, 64)), (16, 18)]
    plans = (draft_timing._SHALLOW, draft_timing._DEEP)
    costs = draft_timing.fit_draft_costs(tuple(build(n, p, new) for n, new in shapes for p in plans), (1, 8, 64, 256))
    profile = HardwareProfile(
        num_tokens=(1, 8, 64, 256), target_s=(1.0,) * 4, draft_s=costs.level_s, draft_start_s=costs.start_s,
        draft_read_s=costs.read_s,
    )  # fmt: skip
    for num_seqs in (1, 5, 32, 64):
        plan = SpeculationPlan(depth=3, width=4, num_draft_tokens=8)
        expected = start[0] + start[1] * num_seqs + 2 * (level[0] + level[1] * max(num_seqs * 4, 4))
        assert profile.compute_draft_s(plan, num_seqs) == pytest.approx(expected, rel=0.03)
    assert profile.draft_read_s == pytest.approx(read_s, abs=1e-9)


def test_a_busy_machine_is_named_with_its_figure(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    set_clock(monkeypatch, itertools.cycle([4.0, 12.0]))
    target = build_target()
    with pytest.warns(UserWarning, match=r"a forward of \d+ tokens took 100 % longer in the median of 2 runs"):
        assert find(target).floor_s == 4.0, "the fastest run is believed"
    assert not cache.exists(), "and not kept for the next time"


def test_a_second_that_was_slow_is_in_no_profile(steady: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of a point are slowed alike, by less than tells it from its neighbours."""
    seen: Counter[int] = Counter()

    def measure(target: TargetModel, rows: int, width: int, *, context: int) -> TimedForward:
        num_tokens = rows * width
        seen[num_tokens] += context == 1
        seconds = (0.01 + 1e-3 * num_tokens) * (1.4 if seen[num_tokens] == 1 and 4 < num_tokens < 128 else 1.0)
        timed = timing.Timing(least_s=seconds, spread=0.0, num_runs=3, total_s=3 * seconds)
        return TimedForward(num_tokens=num_tokens, num_seqs=rows, context_len=context, timing=timed)

    monkeypatch.setattr(profiler, "_measure_forward", measure)
    target = build_target()
    with target.rollout_mode():
        profile = measure_costs(target, build_drafter("none", target)).profile
    assert profile.target_s == pytest.approx([0.01 + 1e-3 * num_tokens for num_tokens in profile.num_tokens])
    assert max(seen.values()) == 2 and profile.num_tokens[-1] >= 128


def test_contexts_that_do_not_fit_the_memory_are_priced_with_fewer_rows(
    steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = profiler._measure_forward

    def measure(target: TargetModel, rows: int, width: int, *, context: int) -> TimedForward:
        if rows * context > 2000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(target, rows, width, context=context)

    monkeypatch.setattr(profiler, "_measure_forward", measure)
    target = build_target()
    with target.rollout_mode(), pytest.warns(UserWarning, match="16 sequences of 200 .* priced with 8"):
        measured = measure_costs(target, build_drafter("none", target), contexts=(32, 200))
    assert [each.num_seqs for each in measured.by_context] == [8, 8]


@given(times=st.lists(st.floats(1e-4, 10), min_size=1, max_size=9), slow=st.integers(0, 8))
def test_times_are_levelled_by_later_ones_alone(times: list[float], slow: int) -> None:
    """One disturbed point lifts no other."""
    levelled = timing.level(times)
    assert levelled == sorted(levelled) and all(a <= b for a, b in zip(levelled, times, strict=True))
    assert levelled[-1] == times[-1] and timing.level(sorted(times)) == sorted(times)
    disturbed = sorted(times)
    index = slow % len(times)
    disturbed[index] += 100
    assert index == len(times) - 1 or timing.level(disturbed)[:index] == sorted(times)[:index]


@pytest.mark.parametrize(("again", "spread"), [(1.0, 0.0), (2.0, 1.0), (9.0, 7.0)])
def test_what_took_longer_than_more_work_is_timed_again(again: float, spread: float) -> None:
    def build(seconds: float) -> timing.Timing:
        return timing.Timing(least_s=seconds, spread=0.0, num_runs=3, total_s=3 * seconds)

    asked: list[int] = []

    def measure(index: int) -> timing.Timing:
        asked.append(index)
        return build(again)

    settled = timing.repeat_disturbed([build(8.0), build(1.0), build(1.1), build(4.0)], measure)
    assert asked == [0]
    assert [each.spread for each in settled] == [spread, 0, 0, 0]
    assert [each.least_s for each in settled] == [min(again, 8.0), 1.0, 1.1, 4.0]


@pytest.mark.parametrize(("again", "spread"), [(2.1, 0.05), (48.0, 23.0)])
def test_a_point_measured_while_something_else_ran_is_measured_again(again: float, spread: float) -> None:
    """Its runs agree, and nothing larger was quicker: but twice the tokens do not take 24 times as long."""

    def build(seconds: float) -> timing.Timing:
        return timing.Timing(least_s=seconds, spread=0.0, num_runs=2, total_s=2 * seconds)

    settled = timing.repeat_disturbed([build(0.5), build(1.0), build(48.0)], lambda _: build(again), growth=2.0)
    assert [each.least_s for each in settled] == [0.5, 1.0, again]
    assert settled[-1].spread == pytest.approx(spread, abs=0.06)


def test_a_disturbance_at_the_start_does_not_make_the_machine_look_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, itertools.chain([9.0, 9.0], itertools.repeat(4.0)))
    target = build_target()
    with target.rollout_mode():
        measured = measure_costs(target, build_drafter("none", target))
    assert measured.profile.target_s == (4.0,) * len(measured.by_tokens)
    assert measured.is_steady and measured.by_tokens[0].timing.least_s == 4.0


@given(
    read_s=st.floats(0, 1e-3),
    starts=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    contexts=st.lists(st.integers(1, 4096), min_size=2, max_size=4, unique=True),
)
def test_the_price_of_a_position_is_found_behind_any_width(
    read_s: float, starts: list[float], contexts: list[int]
) -> None:
    def build(start: float, context: int) -> TimedForward:
        seconds = start + 16 * context * read_s
        each = timing.Timing(least_s=seconds, spread=0.0, num_runs=3, total_s=3 * seconds)
        return TimedForward(num_tokens=16, num_seqs=16, context_len=context, timing=each)

    groups = [[build(start, context) for context in contexts] for start in starts]
    assert _fit_read_s(groups) == pytest.approx(read_s, rel=1e-6, abs=1e-12)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """SMALL_CPU, as if measured of the tiny Llama with ngram."""
    target = build_target()
    save_profile(SMALL_CPU, describe_identity(target, build_drafter("ngram", target)), tmp_path / "profile.json")
    return tmp_path / "profile.json"


def change(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_profile_on_file_is_the_one_that_was_measured(path: Path) -> None:
    assert read_profile(path)[0] == SMALL_CPU
    engine = Engine(shared_model("llama"), drafter="ngram", profile=path)
    engine.generate(PROMPTS, SamplingParams(max_tokens=2))
    assert isinstance(engine.planner, AutoPlanner)
    assert engine.planner.profile.num_tokens == SMALL_CPU.num_tokens
    given = Engine(shared_model("llama"), drafter="ngram", speculation="paper", profile=replace(SMALL_CPU, read_s=1.0))
    given.generate(PROMPTS, SamplingParams(max_tokens=2))
    assert given.planner is not None and given.planner.state_dict() == {"capacity": SMALL_CPU.capacity}
    Engine(shared_model("llama"), drafter="ngram", speculation="off", profile=path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["identity"].update(cpu="abacus"), "cpu is 'abacus' there and '.*' here"),
        (lambda c: c["identity"].update(cpu_bfloat16="tiles"), "cpu_bfloat16 is 'tiles' there and .* here"),
        (lambda c: c["identity"].update(num_threads=99), "num_threads is 99 there and 1 here"),
        (lambda c: c["identity"].update(hidden_size=4096), "hidden_size is 4096 there and 32 here"),
        (lambda c: c["identity"].update(dtype="int4"), "dtype is 'int4' there and 'float64' here"),
        (lambda c: c["identity"].update(drafter="block"), "drafter is 'block' there and 'ngram' here"),
        (lambda c: c["identity"].pop("device"), "device is None there and 'cpu' here"),
        (lambda c: c["identity"].update(coolant="water"), "coolant is 'water' there and None here"),
    ],
)
def test_a_profile_of_something_else_is_refused_by_name(path: Path, edit: Callable[[dict], object], message: str):
    change(path, edit)
    remedy = "fastgrpo profile --model MODEL --drafter ngram --dtype float64 --output"
    with pytest.raises(ValueError, match=f"{message}.*{remedy}"):
        Engine(shared_model("llama"), drafter="ngram", profile=path)


def test_a_profile_that_is_given_outlives_an_update_of_a_library(path: Path) -> None:
    change(path, lambda content: content["identity"].update(torch="1.0"))
    target = build_target()
    assert take_profile(path, target, build_drafter("ngram", target)) == SMALL_CPU


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format="else"), "is no profile"),
        (lambda c: c.update(version=99), "has version 99"),
        (lambda c: c.update(capacity=0), "capacity must be at least 1 token, got 0"),
        (lambda c: c.update(capacity=None), "capacity must be at least 1 token, got None"),
        (lambda c: c.update(capacity=5000), "capacity is 5000, the times beside it say"),
        (lambda c: c["profile"].update(num_tokens=[1, 8, float("nan"), 64, 128, 256]), r"increasing grid.*nan"),
        (lambda c: c["profile"].update(num_tokens=[1, 8, 32, 64, 128, float("inf")]), r"increasing grid.*inf"),
        (lambda c: c["profile"].update(num_tokens=[1.5, 8, 32, 64, 128, 256]), r"increasing grid.*1\.5"),
        (lambda c: c["profile"].update(num_tokens=[1, 8, 32, 64, 128, 10**400]), "increasing grid"),
        (lambda c: c["profile"].update(read_s=10**400), "read_s is 1000"),
        (lambda c: c["profile"].update(draft_s=[], draft_start_s=[1.0] * 6), "draft_start_s needs draft_s"),
        (lambda c: c.pop("identity"), "identity must be a mapping, got None"),
        (lambda c: c["profile"].pop("read_s"), "profile must be a mapping of num_tokens"),
        (lambda c: c["profile"].update(num_tokens=[4], target_s=[1.0], draft_s=[]), r"at least two.*got \(4,\)"),
        (lambda c: c["profile"].update(num_tokens=[1, 8, 4, 64, 128, 256]), r"increasing grid.*1, 8, 4"),
        (lambda c: c["profile"]["target_s"].pop(), "one time for each of 6 points, got 5"),
        (lambda c: c["profile"]["target_s"].__setitem__(2, -1.0), "target_s at 32 tokens is -1.0"),
        (lambda c: c["profile"]["draft_s"].__setitem__(0, 0.0), "draft_s at 1 tokens is 0.0"),
        (lambda c: c["profile"]["target_s"].__setitem__(1, float("nan")), "target_s at 8 tokens is nan"),
        (lambda c: c["profile"]["target_s"].__setitem__(1, None), "target_s is .0.06, None"),
        (lambda c: c["profile"].update(fixed_s=float("inf")), "fixed_s is inf"),
        (lambda c: c["profile"].update(draft_read_s="dear"), "draft_read_s is 'dear'"),
        (lambda c: c["profile"].update(draft_start_s=[1.0]), "one time for each of 6 points, got 1 in draft_start_s"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_with_value_and_remedy(
    path: Path, edit: Callable[[dict], object], message: str
) -> None:
    change(path, edit)
    with pytest.raises(ValueError, match=f"profile.json.*{message}.*measure again with fastgrpo profile"):
        read_profile(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no profile at .*; fastgrpo profile writes one"):
        Engine(shared_model("llama"), drafter="ngram", profile=tmp_path / "nowhere.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep.json is not JSON.*measure again"):
        read_profile(tmp_path / "deep.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"bytes.json is not JSON.*measure again"):
        read_profile(tmp_path / "bytes.json")


# -- the cache ---------------------------------------------------------------------------------------------------


def test_what_was_measured_once_is_read_the_next_time(
    cache: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(shared_model("llama"), drafter="ngram")
    engine.generate(PROMPTS, SamplingParams(max_tokens=2))
    (file,) = cache.iterdir()
    first = read_profile(file)[0]
    set_clock(monkeypatch, ())  # a run that is timed now would raise
    assert find(build_target()) == first
    assert find(TargetModel(build_model("llama", seed=9))) == first, "other weights cost the same"


def test_what_was_measured_beside_other_work_is_not_kept(
    cache: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OthersWork, "count_cores_taken", lambda _: 1.4)
    with pytest.warns(UserWarning, match=r"other work took 1\.4 cores while costs were measured"):
        profile = find(build_target())
    assert profile.target_s and not list(cache.glob("profile-*.json"))


def test_whatever_costs_depend_on_is_kept_by_itself(cache: Path) -> None:
    timed = timing.Timing(least_s=1.0, spread=0.0, num_runs=3, total_s=3.0)
    forward = TimedForward(num_tokens=1, num_seqs=1, context_len=1, timing=timed)
    measured = Measurement(profile=SMALL_CPU, by_tokens=(forward,), by_context=(), drafts=())

    def keep(target: TargetModel, drafter: str = "ngram") -> None:
        assert keep_profile(measured, describe_identity(target, build_drafter(drafter, target))) is not None

    keep(build_target())
    keep(build_target(), "none")
    keep(build_target(num_hidden_layers=2))
    keep(build_target(vocab_size=130))
    keep(TargetModel(shared_model("llama", torch.float32), compute_dtype=torch.bfloat16))
    torch.set_num_threads(2)
    keep(build_target())
    torch.set_num_threads(1)
    keep(TargetModel(build_model("llama", seed=9)))  # as the first
    assert len(list(cache.iterdir())) == 6


def test_a_model_is_the_same_inside_a_rollout(steady: None) -> None:
    model = get_peft_model(
        build_model("llama", torch.float32, tie_word_embeddings=True), LoraConfig(target_modules="all-linear")
    )
    for target in (TargetModel(model), TargetModel(model, compute_dtype=torch.bfloat16)):
        drafter = build_drafter("eagle-new", target)
        outside = describe_identity(target, drafter)
        with target.rollout_mode():
            assert describe_identity(target, drafter) == outside
        assert outside["draft_parameters"] > 0


@pytest.mark.parametrize("damage", ["", "{", '{"format": "fastgrpo-profile", "version": 2}'])
def test_a_damaged_cache_is_named_and_replaced(cache: Path, steady: None, damage: str) -> None:
    first = find(build_target())
    (file,) = cache.iterdir()
    file.write_text(damage)
    with pytest.warns(UserWarning, match=f"left out and measured anew: {file}"):
        assert find(build_target()) == first
    assert read_profile(file)[0] == first
    change(file, lambda content: content["identity"].update(cpu="abacus"))
    with pytest.warns(UserWarning, match=f"{file} is of something else and is measured anew"):
        assert find(build_target()) == first


def test_a_cache_that_cannot_be_written_is_named(cache: Path, steady: None) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept .*FASTGRPO_CACHE names another folder"):
        find(build_target())


def test_a_cache_that_may_not_be_looked_into_is_named(
    cache: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as in the home of root, which containers name to whoever runs in them."""
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent == cache:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.warns(UserWarning, match="left out and measured anew: .*Permission denied"):
        find(build_target())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_profile_cache(), "off in tests"
    assert find_cache_folder().name == "fastgrpo", "a demo model is converted there all the same, not in ./off"
    profile = Measurement(profile=SMALL_CPU, by_tokens=(), by_context=(), drafts=())
    assert keep_profile(profile, {}) is None
    monkeypatch.setenv("FASTGRPO_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_cache_folder() == tmp_path / "fastgrpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_cache_folder() == tmp_path / "home" / ".cache" / "fastgrpo"
    monkeypatch.setenv("FASTGRPO_CACHE", "~/profiles")
    assert find_cache_folder() == tmp_path / "home" / "profiles"


# -- the forecast ------------------------------------------------------------------------------------------------


def build_table(chance: float) -> AcceptanceTable:
    table = AcceptanceTable()
    table.offered = [[1e9] * MAX_WIDTH for _ in range(MAX_DEPTH)]
    table.hits = [[1e9 * chance * 0.3**rank for rank in range(MAX_WIDTH)] for _ in range(MAX_DEPTH)]
    return table


@given(chance=st.floats(0, 0.7), context_len=st.integers(0, 4096))
def test_a_forecast_never_promises_less_than_plain_decoding(chance: float, context_len: int) -> None:
    for forecast in forecast_gains(replace(SMALL_CPU, read_s=1e-6), build_table(chance), context_len=context_len):
        assert forecast.speed_up == 1 if forecast.plan.is_plain else forecast.speed_up > 1
        assert 1 <= forecast.acceptance_length <= 1 + forecast.plan.depth


@pytest.mark.parametrize("context_len", [0, 2000])
def test_a_forecast_is_what_its_plan_emits_in_the_time_that_the_profile_says(context_len: int) -> None:
    """Reading what is cached is shared by a tree, so that long contexts make drafts pay."""
    profile = replace(SMALL_CPU, read_s=1e-5)
    for forecast in forecast_gains(profile, build_table(0.6), context_len=context_len):
        live, plan = forecast.num_seqs, forecast.plan
        nodes, read = live * (1 + plan.num_draft_tokens), live * context_len
        drafting_s = profile.compute_target_s(nodes, read) + profile.compute_draft_s(plan, live)
        expected = forecast.acceptance_length * profile.compute_target_s(live, read) / drafting_s
        assert forecast.speed_up == pytest.approx(expected, rel=0.01)


def test_a_useless_drafter_is_said_to_be_one() -> None:
    forecasts = forecast_gains(SMALL_CPU, build_table(0.0), context_len=100)
    assert all(forecast.plan.is_plain and forecast.speed_up == 1 for forecast in forecasts)
    assert describe_gains("eagle", forecasts).startswith("Speculation with eagle will not pay here: with 1 to 64 live")


def test_a_good_drafter_pays_until_the_knee() -> None:
    forecasts = forecast_gains(SMALL_CPU, build_table(0.5), context_len=100)
    assert forecasts[0].speed_up > 1.4
    break_even = find_break_even(forecasts)
    assert break_even is not None and break_even > 8
    text = describe_gains("eagle", forecasts)
    assert f"from {break_even} live sequences on it stops paying" in text and text.count(".") == 2
    flat = HardwareProfile(num_tokens=(1, 4096), target_s=(1.0, 1.0), draft_s=(0.001, 0.001))
    assert describe_gains("eagle", forecast_gains(flat, build_table(0.5), context_len=9)).endswith("pays with 64.")


def test_where_few_live_sequences_do_not_pay_that_is_said() -> None:
    forecasts = forecast_gains(SMALL_CPU, build_table(0.5), context_len=100)
    plain = forecast_gains(SMALL_CPU, build_table(0.0), context_len=100)
    mixed = (*plain[:3], *forecasts[3:4], *plain[4:])
    assert [forecast.plan.is_plain for forecast in mixed] == [True] * 3 + [False] + [True] * 3
    text = describe_gains("eagle", mixed)
    assert "but not with 1, 2, 4, where auto decodes plainly; from 16 live sequences on it stops paying" in text
    text = describe_gains("eagle", mixed[:4])
    assert "but not with 1, 2, 4, where auto decodes plainly" in text and text.endswith("it still pays with 8.")


def test_gains_that_were_tried_and_lost_are_lowered_before_it_is_said_that_drafts_pay() -> None:
    forecasts = forecast_gains(SMALL_CPU, build_table(0.5), context_len=100)
    live = [each.num_seqs for each in forecasts if not each.plan.is_plain]
    lost = Check(num_seqs=live[-1], expected=forecasts[len(live) - 1].speed_up, measured=0.99)
    text = _describe_verdict("eagle", _correct(forecasts, lost), build_table(0.5), True)
    assert "pays here" in text and f"from {live[-1]} live sequences on it stops paying" in text
    text = _describe_verdict("eagle", _correct(forecasts, replace(lost, measured=0.4)), build_table(0.5), True)
    assert text.startswith("Speculation with eagle will not pay here")
    assert "That is a loss" in lost.describe()
    won = replace(lost, measured=1.01)
    assert "a loss" not in won.describe()
    text = _describe_verdict("eagle", _correct(forecasts, won), build_table(0.5), True)
    assert text == describe_gains("eagle", forecasts)


def test_a_forecast_is_checked_with_as_many_live_as_it_drafts_for_and_with_none_where_it_never_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[tuple[int, int]] = []

    def check(engine: object, prompts: list[list[int]], params: object, expected: Forecast) -> None:
        checked.append((len(prompts), expected.num_seqs))
        assert not expected.plan.is_plain and expected.speed_up > 1

    monkeypatch.setattr(profile_command, "_check_forecast", check)
    steep = replace(SMALL_CPU, target_s=(0.060, 0.064, 0.256, 0.5, 1.0, 2.0))
    for chance in (0.7, 0.0):
        _check_first_gain(None, [[1]] * 8, None, steep, build_table(chance), 100)  # type: ignore[arg-type]
    assert checked == [(6, 6)]


@pytest.mark.parametrize(("slower", "tokens"), [(1, 48), (10, 19), (1000, 8)])
def test_the_rollouts_of_a_profile_are_as_long_as_the_machine_affords(slower: float, tokens: int) -> None:
    """Of a large model on a slow machine they are short, so that all of it takes minutes."""
    slow = replace(SMALL_CPU, target_s=tuple(slower * seconds for seconds in SMALL_CPU.target_s))
    options = ProfileOptions(model="demo", max_tokens=48)
    assert _choose_params(slow, 2, options, ()).max_tokens == tokens


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("drafter", ["eagle", "none"])
def test_profile_writes_what_the_engine_takes(
    model_dir: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], steady: None, drafter: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one and one"}\n{"prompt": "two"}\n')
    output = tmp_path / "profiles" / "tiny.json"
    argv = ["profile", "--model", str(model_dir), "--drafter", drafter, "--device", "cpu", "--dtype", "float32"]
    argv += ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "12", "--output", str(output)]
    assert main(argv) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "knee at 8 tokens a forward" in text and "before any training" in text
    assert "Speculation with" in text
    assert ("Nothing was measured of its drafts: 30 % of the first ones are assumed" in text) == (drafter == "none")
    result = json.loads(output.read_text())
    assert {"command", "commit", "machine", "identity", "settings", "by_tokens", "by_context"} <= result.keys()
    assert result["acceptance"]["is_measured"] == (drafter != "none")
    assert [forecast["num_seqs"] for forecast in result["forecasts"]] == [1, 2, 4, 8, 16, 32, 64]
    assert output.with_suffix(".png").stat().st_size > 10_000
    engine = Engine.from_pretrained(model_dir, dtype=torch.float32, device="cpu", drafter=drafter, profile=output)
    assert asdict(read_profile(output)[0]) == asdict(find_profile(engine.target, engine.drafter)), "and it is cached"
    other = "ngram" if drafter == "none" else "none"
    with pytest.raises(ValueError, match=f"drafter is '{drafter}' there and '{other}' here"):
        Engine.from_pretrained(model_dir, dtype=torch.float32, device="cpu", drafter=other, profile=output)


def test_what_was_tried_and_lost_beside_other_work_is_in_no_table_and_in_no_cache(
    model_dir: Path,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    steady: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OthersWork, "count_cores_taken", lambda _: 1.4)
    lost = Check(num_seqs=1, expected=2.0, measured=0.2)
    monkeypatch.setattr(profile_command, "_check_first_gain", lambda *_: lost)
    believed = forecast_gains(SMALL_CPU, build_table(0.5), context_len=100)
    assert not believed[0].plan.is_plain
    monkeypatch.setattr(profile_command, "forecast_gains", lambda *_, **__: believed)
    output = tmp_path / "tiny.json"
    argv = ["profile", "--model", str(model_dir), "--drafter", "ngram", "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--max-tokens", "4", "--num-prompts", "1", "--output", str(output)]) == 0
    text, result = " ".join(capsys.readouterr().out.split()), json.loads(output.read_text())
    assert "will not pay here" in text and "0.20x was measured where 2.00x was expected" in text
    assert "node" not in text.split("before any training")[1], "of no plan"
    assert {forecast["speed_up"] for forecast in result["forecasts"]} == {1.0}
    assert "Other work took 1.4 cores" in text and "not kept for the engine" in text
    assert result["cores_taken_by_others"] == 1.4 and not list(cache.glob("profile-*.json"))


@pytest.mark.parametrize("profile", [SMALL_CPU, HardwareProfile(num_tokens=(1, 8), target_s=(4.0, 4.0))])
def test_the_plot_shows_every_measured_point(profile: HardwareProfile) -> None:
    figure = build_roofline(profile, [0.5] * len(profile.num_tokens), title="tiny")
    expected = [profile.target_s[0] * 1000, 1 / profile.target_s[0]]
    for axes, first in zip(figure.axes, expected, strict=True):
        bottom, top = axes.get_ylim()
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        measured = [line for line in axes.lines if line.get_marker() in ("o", "s")]
        heights = [height for line in measured for height in line.get_ydata()]
        assert first == pytest.approx(heights[0])
        assert 0 < bottom < min(heights) and 1.5 * max(heights) <= top < 100 * max(heights)
        assert "knee" in " ".join(text.get_text() for text in axes.get_legend().get_texts())
    figure.draw_without_rendering()
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels(which="both")]
    assert any(labels) and not any("mathdefault" in label for label in labels), "numbers, not powers"


def test_profile_refuses_in_one_line(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["profile", "--model", str(model_dir), "--drafter", "none", "--device", "cpu"]
    assert main([*argv, "--max-tokens", "0"]) == 2
    assert "max_tokens must be above 0, got 0" in capsys.readouterr().err
    assert main([*argv, "--drafter", "nowhere"]) == 2
    assert "drafter must be eagle" in capsys.readouterr().err
    monkeypatch.setattr(timing, "perf_counter", lambda: 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(argv) == 2
    assert "the clock of this machine stood still" in capsys.readouterr().err


def test_prompts_that_cannot_be_completed_are_refused_before_anything_is_measured(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastgrpo.profile.measure_costs", lambda *_, **__: pytest.fail("it was measured"))
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt": "a" * 600}) + "\n")
    argv = ["profile", "--model", str(model_dir), "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--prompts", str(prompts)]) == 2
    assert "the model's context ends at 512" in capsys.readouterr().err
    assert main([*argv, "--temperature", "1e99"]) == 2
    assert "temperature must be 0 or between" in capsys.readouterr().err
    prompts.write_text(prompts.read_text() + "{\n")
    assert main([*argv, "--prompts", str(prompts)]) == 2
    assert "leave them out with --skip-broken" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="1 of 2 lines of"):
        assert main([*argv, "--prompts", str(prompts), "--skip-broken"]) == 2
    assert "the model's context ends at 512" in capsys.readouterr().err
