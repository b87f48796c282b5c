"""Drafts learn where the machine would wait: the run is the same, and what does not pay is given up."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model
from fastgrpo import idleness
from fastgrpo.attention import ATTENTION_NAME
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.clock import StepClock
from fastgrpo.idleness import IdleCores, OthersWork
from fastgrpo.learner import Learner, LearnReport
from fastgrpo.side_learning import SideLearning, StepComparison
from fastgrpo.types import BESIDE, PLAIN, SamplingParams, Sequence, SpeculationPlan, StepRecord
from test_trainer import assert_same_weights, build_trainer, weights_of

PLAN = SpeculationPlan(depth=2, width=1, num_draft_tokens=2)
PROMPTS = [[5, 9, 11, 6, 20, 33], [8, 7, 30, 31]]
LENGTHS = [3, 4, 5, 6, 7, 8, 60, 60]  # the last two are the tail
PARAMS = [SamplingParams(max_tokens=length, seed=1, stream=stream) for stream, length in enumerate(LENGTHS)]


def build_record(num_seqs: int, step_s: float, plan: SpeculationPlan = PLAIN, **facts: Any) -> StepRecord:
    return StepRecord(
        num_seqs=num_seqs, plan=plan, num_tokens=num_seqs, num_emitted=num_seqs, num_read=0, num_prefilled=0,
        offered=(), hits=(), draft_s=0.0, target_s=step_s, verify_s=0.0, step_s=step_s,
        **{"num_waiting": 0, "prefill_s": 0.0, **facts},
    )  # fmt: skip


@pytest.fixture
def idle_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdleCores, "suffice", True)


@pytest.fixture
def busy_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdleCores, "suffice", False)


class Inline:
    """Does at once what a thread is given."""

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


class School:
    """An engine whose head learns beside it."""

    def __init__(self, *, lessons: int = 2, speculation: Any = PLAN) -> None:
        self.engine = Engine(build_model("llama"), drafter="eagle-new", speculation=speculation)
        self.learner = Learner(self.engine.drafter)
        self.engine.on_finish.append(self.learner.add)
        self.spans: list[tuple[str, float, float]] = []
        self.side = SideLearning(self.learner, self.engine)
        self.side.on_piece.append(lambda *span: self.spans.append(span))
        for _ in range(lessons):  # an update's own time is known from the second on
            self.engine.generate(PROMPTS[:2], SamplingParams(max_tokens=20, seed=9))
            self.learner.learn(0.0)

    def roll_out(self) -> list[list[int]]:
        with self.side.follow():
            completions = self.engine.generate([PROMPTS[0]] * len(LENGTHS), PARAMS)
        return [completion.token_ids for completion in completions]

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """A rollout that is made up, by `listen`; pieces are done at once."""
        self.side._pool = Inline()
        self.engine.scheduler.add(Sequence(request_id=0, prompt_ids=[1], params=PARAMS[0], max_tokens=1, stream_key=0))
        with self.side.follow():
            yield
        self.engine.scheduler.abort()

    def listen(self, record: StepRecord) -> None:
        for listener in self.engine.on_step:
            listener(record)

    def finish(self) -> LearnReport | None:
        lesson = self.side.take_lesson()
        return None if lesson is None else self.learner.finish(lesson)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().float() for p in self.learner.drafter.head.parameters()])


# -- what steps lose ---------------------------------------------------------------------------------


def test_steps_are_compared_with_like_ones() -> None:
    comparison = StepComparison()
    for step_s in (0.010, 0.012, 0.010):
        comparison.observe(build_record(4, step_s), is_beside=False)
    comparison.observe(build_record(4, 0.5, is_steady=False), is_beside=False)
    comparison.observe(build_record(4, 0.5, PLAN), is_beside=False)
    assert comparison.take_extra_s() is None, "nothing ran beside"
    comparison.observe(build_record(4, 0.016), is_beside=True)
    comparison.observe(build_record(4, 0.114, prefill_s=0.1), is_beside=True)
    comparison.observe(build_record(4, 9.0, is_steady=False), is_beside=True)
    comparison.observe(build_record(3, 9.0), is_beside=True)  # three quarters of the sequences: too few
    assert comparison.take_extra_s() == pytest.approx(2 * 0.010), "two of four steps, that stand for all"
    assert comparison.take_extra_s() is None
    comparison.observe(build_record(2, 9.0), is_beside=True)
    assert comparison.take_extra_s() is None, "none is like it"
    for num_seqs, step_s in ((10, 0.020), (7, 0.014)):
        comparison.observe(build_record(num_seqs, step_s), is_beside=False)
    comparison.observe(build_record(8, 0.021), is_beside=True)
    assert comparison.take_extra_s() == pytest.approx(0.007), "with the nearest number of sequences"


# -- beside a rollout --------------------------------------------------------------------------------


def test_learning_beside_changes_no_token_and_no_draft_of_the_rollout(idle_cores: None) -> None:
    alone, school = School(lessons=0), School()
    expected, before = alone.roll_out(), school.weights()
    assert alone.side.take_lesson() is None, "what an update takes by itself is not known"
    drafting = [p.clone() for p in school.engine.drafter.fast_head.parameters()]
    assert school.roll_out() == expected
    assert all(map(torch.equal, drafting, school.engine.drafter.fast_head.parameters())), "not before it is finished"
    assert school.engine.is_alone and len(school.engine.on_step) == 0
    updates = school.learner.num_updates
    report = school.finish()
    assert report is not None and report.num_updates >= 1 and report.num_updates <= updates
    assert report.num_tokens > 0 and 0 <= report.free_s < report.learn_s, "refreshing is not hidden"
    assert not torch.equal(school.weights(), before)
    assert not all(map(torch.equal, drafting, school.engine.drafter.fast_head.parameters()))
    assert len(school.spans) >= 1 + report.num_updates and {name for name, *_ in school.spans} == {BESIDE}
    assert school.finish() is None
    late = school.learner.begin().rollouts
    assert {len(rollout.token_ids) for rollout in late} <= {60}, "those that ended later wait for the next lesson"


def test_a_lesson_begins_in_the_tail_and_leaves_steps_between_to_compare(idle_cores: None) -> None:
    school, seen = School(), []
    school.engine.on_step.append(lambda record: seen.append((record.num_seqs, school.engine.is_alone)))
    school.roll_out()
    assert all(is_alone for num_seqs, is_alone in seen if num_seqs > len(LENGTHS) / 2)
    flags = "".join("a" if is_alone else "b" for _, is_alone in seen)
    assert "b" in flags and all(len(run) >= 3 for run in flags.split("b") if run), flags


def test_the_planner_learns_no_costs_from_steps_with_something_beside(idle_cores: None) -> None:
    school, heard = School(), []
    school.engine.planning.observe = heard.append
    school.roll_out()
    unsteady = [place for place, record in enumerate(heard) if not record.is_steady]
    assert unsteady and all(record.is_steady for record in school.engine.records), "the record says what it was"


@pytest.mark.usefixtures("busy_cores")
def test_nothing_is_learnt_beside_where_no_core_is_idle() -> None:
    school = School()
    school.roll_out()
    assert school.finish() is None and not school.spans
    assert len(school.learner.begin().rollouts) == len(LENGTHS), "they teach behind the rollout"


def test_a_rollout_that_breaks_off_leaves_no_piece_behind(idle_cores: None) -> None:
    school = School()

    def give_up(record: StepRecord) -> None:
        if not school.engine.is_alone:
            raise KeyboardInterrupt

    school.engine.on_step.append(give_up)
    with pytest.raises(KeyboardInterrupt):
        school.roll_out()
    school.engine.on_step.remove(give_up)
    assert school.engine.is_alone and not school.engine.on_step
    assert school.side.take_lesson() is None and len(school.learner.begin().rollouts) >= 6, "they teach later"
    taught = school.roll_out()
    assert taught == School(lessons=0).roll_out()


def test_memory_for_both_is_not_there(idle_cores: None, caplog: pytest.LogCaptureFixture) -> None:
    school = School()

    def fail(rollouts: list[FinishedRollout]) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    given, school.learner.update = school.learner.update, fail
    expected = School(lessons=0).roll_out()
    with caplog.at_level(logging.WARNING):
        assert school.roll_out() == expected
    assert "beside decoding stays off" in caplog.text
    assert school.finish().num_updates == 0
    school.learner.update = given
    school.roll_out()
    assert school.finish() is None, "nor later"
    assert school.learner.learn(0.0).num_updates == 1


def test_an_error_of_a_lesson_is_heard(idle_cores: None) -> None:
    school = School()

    def fail(rollouts: list[FinishedRollout]) -> Any:
        raise RuntimeError("a defect")

    school.learner.update = fail
    with pytest.raises(RuntimeError, match="a defect"):
        school.roll_out()
    assert school.engine.is_alone


def test_the_last_piece_ends_with_the_rollouts_weights(idle_cores: None) -> None:
    """Adapters are merged while it runs."""
    school, modes = School(), []
    school.side.on_piece.append(lambda *_: modes.append(school.engine.target.config._attn_implementation))
    school.roll_out()
    assert modes and set(modes) == {ATTENTION_NAME}


def test_what_nothing_is_like_is_charged_and_given_up(idle_cores: None) -> None:
    """Every step has a plan of its own, so that none says what another takes."""
    school = School()
    for rollout in collect(school):
        school.learner.add(rollout)
    school.learner.update_s, beside = 0.1, 0
    with school.follow():
        for step, num_seqs in enumerate([8] * 3 + [2] * 40):
            beside += not school.engine.is_alone
            plan = SpeculationPlan(depth=1, width=1 + step, num_draft_tokens=1)
            school.listen(build_record(num_seqs, 0.01, plan))
    assert beside == 3 and school.side.taken_s == pytest.approx(0.3, abs=0.01)
    assert school.side.take_lesson().free_s == 0


def test_a_tail_too_short_for_an_update_leaves_the_lesson_to_be_gone_on_with(idle_cores: None) -> None:
    school = School()
    for rollout in collect(school):
        school.learner.add(rollout)
    with school.follow():
        for num_seqs in [8] * 3 + [2] * 5:
            school.listen(build_record(num_seqs, 0.01))
    lesson = school.side.take_lesson()
    assert lesson is not None and lesson.num_updates == 0, "the head was judged"
    report = school.learner.learn(0.0, lesson=lesson)
    assert report.num_updates == 1 and math.isfinite(report.held_out_loss)
    assert not school.learner.begin().rollouts


# -- whether it pays ---------------------------------------------------------------------------------


def play(school: School, *, extra_s: float, update_s: float = 0.1) -> int:
    """A rollout's records, steps with an update beside them longer; returns how many had one."""
    num_beside = 0
    school.learner.update_s = update_s
    with school.follow():
        for num_seqs in [8] * 3 + [2] * 40:
            is_beside = not school.engine.is_alone
            num_beside += is_beside
            school.listen(build_record(num_seqs, 0.01 + is_beside * extra_s))
    return num_beside


def test_updates_that_take_too_much_from_decoding_are_given_up_for_longer_and_longer(idle_cores: None) -> None:
    school = School()
    rollouts = [rollout for rollout in collect(school) if rollout.features is not None]

    def roll(extra_s: float) -> int:
        for rollout in rollouts:
            school.learner.add(rollout)
        count = play(school, extra_s=extra_s)
        school.finish()
        return count

    assert roll(0.02) > 4, "a fifth of its own time"
    assert 3 < roll(0.09) <= 6, "judged by most of the last ones"
    rests = []
    for _ in range(3):
        count = 0
        while not roll(0.09):
            count += 1
        rests.append(count)
    assert rests == [8, 16, 32]
    for _ in range(64):
        assert roll(0.02) == 0
    assert roll(0.02) > 4, "asked again, it pays"
    assert roll(0.09) > 3 and [roll(0.02) > 0 for _ in range(9)] == [False] * 8 + [True], "and the rest is short again"
    assert roll(0.3) > 0, "more than it takes by itself"
    assert [roll(0.02) > 0 for _ in range(65)] == [False] * 64 + [True]


def collect(school: School) -> list[FinishedRollout]:
    rollouts: list[FinishedRollout] = []
    school.engine.on_finish.append(rollouts.append)
    school.engine.generate([PROMPTS[0]] * len(LENGTHS), PARAMS)
    school.engine.on_finish.remove(rollouts.append)
    return rollouts


# -- what stands idle --------------------------------------------------------------------------------

Times = namedtuple("Times", "idle")


@pytest.mark.parametrize(("idle_share", "suffice"), [(0.9, True), (0.5, False), (0.0, False)])
def test_idle_cores_are_counted_by_the_system(
    idle_share: float, suffice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(idleness.psutil, "cpu_times", lambda: Times(idle=idle_share * threads * time.perf_counter()))
    monkeypatch.setattr(idleness, "_count_own_cores", lambda: 2 * threads)
    cores = IdleCores()
    assert cores.suffice is None, "too early to say"
    time.sleep(0.11)
    assert cores.suffice is suffice
    monkeypatch.setattr(idleness, "_count_own_cores", lambda: 0)
    assert cores.suffice is False, "idle, but not ours"


@pytest.mark.parametrize(("busy", "spare", "taken"), [(0.75, 0, 0.75), (1.5, 1, 0.5), (1.5, 8, 0.0), (0.1, 0, 0.0)])
def test_others_work_counts_where_it_takes_cores_from_our_threads(
    busy: float, spare: int, taken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each thread; cores beside those of the threads are for others."""
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(idleness, "_count_own_cores", lambda: num_threads * (1 + spare))
    others = OthersWork()
    others._since -= 100
    monkeypatch.setattr(idleness, "_read_busy_s", lambda: others._busy_s + 100 * busy * num_threads)
    assert others.count_cores_taken() == pytest.approx(taken * num_threads, abs=0.05 * num_threads)


@pytest.mark.parametrize("kind", ["user", "system", "nice", "steal"])
def test_others_work_is_seen_whatever_it_is_counted_as(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a low priority, or of another virtual machine on the same host; other systems know neither."""
    num_threads, known = torch.get_num_threads(), {"user", "system", kind}
    counted = namedtuple("counted", sorted(known))
    monkeypatch.setattr(idleness, "_count_own_cores", lambda: num_threads)
    monkeypatch.setattr(idleness.psutil, "cpu_times", lambda: counted(**dict.fromkeys(known, 0.0)))
    others = OthersWork()
    others._since -= 100
    monkeypatch.setattr(
        idleness.psutil, "cpu_times", lambda: counted(**dict.fromkeys(known, 0.0) | {kind: 100.0 * num_threads})
    )
    assert others.count_cores_taken() == pytest.approx(num_threads, rel=0.05)


def test_real_counts_of_this_machine() -> None:
    """A thread that computes takes a core away, on whatever machine."""
    before, started = idleness._read_idle_s(), time.perf_counter()
    time.sleep(0.2)
    idle = (idleness._read_idle_s() - before) / (time.perf_counter() - started)
    assert 0 <= idle <= 1.2 * torch.multiprocessing.cpu_count()


# -- in a trainer ------------------------------------------------------------------------------------


@pytest.fixture
def no_debts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is now, earlier updates are paid for."""
    monkeypatch.setattr(StepClock, "owes", False)


@pytest.mark.usefixtures("idle_cores", "no_debts")
def test_a_run_that_learns_beside_is_the_run_without_learning(tmp_path: Path) -> None:
    ends: list[Any] = []
    pieces: list[int] = []  # the steps they were beside
    for share in (0.0, 0.5):
        trainer = build_trainer(
            tmp_path / str(share), draft_time_share=share, max_steps=6, max_completion_length=60, learning_rate=1e-3
        )
        if share:
            trainer.learning.side.on_piece.append(lambda *_, own=trainer: pieces.append(own.state.global_step))
        trainer.train()
        ends.append(weights_of(trainer))
    assert_same_weights(*ends)
    rows = [row for row in trainer.state.log_history if "draft/hidden_s" in row]
    assert len(rows) == 6 and all(row["draft/hidden_s"] >= 0 for row in rows)
    assert pieces and min(pieces) >= 2, "what an update takes alone is found out first"


@pytest.mark.usefixtures("idle_cores")
def test_nothing_is_hidden_where_that_is_switched_off(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path, hide_draft_learning=False, max_steps=6, max_completion_length=60, learning_rate=1e-3
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "draft/hidden_s" in row]
    assert len(rows) == 6 and all(row["draft/hidden_s"] == 0 for row in rows)


@pytest.mark.usefixtures("idle_cores", "no_debts")
def test_the_timeline_shows_what_is_learnt_beside(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=6, max_completion_length=60, learning_rate=1e-3)
    timelines = []
    trainer.learning._clock._log = lambda key, value: timelines.append(trainer.timeline)
    trainer.train()
    beside = [span for timeline in timelines if timeline for span in timeline.spans if span.name == BESIDE]
    assert beside and all(0 <= span.start_s <= span.end_s for span in beside)
    assert threading.active_count() < 20
