"""When a trainer's draft head learns: while cores or a GPU idle, if they do, else between rollout and update."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from fastgrpo.draft_loss import check_loss
from fastgrpo.drafters import find_trainable
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.clock import StepClock
from fastgrpo.grpo.config import FastGRPOConfig
from fastgrpo.idleness import OtherProcesses, look_for_cores
from fastgrpo.learner import Learner, LearnReport, Lesson
from fastgrpo.planner import AutoPlanner
from fastgrpo.side_learning import SideLearning

_CPU_SHARE, _SHARE = 0.1, 0.03  # default shares of a step's time, on a CPU and on a GPU
_NOTHING = ("learn_s", "hidden_s", "num_tokens", "num_updates")  # logged as 0 where nothing was learnt


class DraftLearning:
    """Lets the head learn once from each generation, within its share of the time.

    It learns while the machine would wait: beside the last sequences of the rollout (see `SideLearning`), while other
    processes still decode, or while streamed rewards are awaited. Otherwise it learns after the rewards.

    Args:
        log: called with each metric's name and value.

    Attributes:
        learner: None where no head is trained.
        side: None where nothing is learnt beside decoding.
        saved_s: seconds that speculation saved in the last rollout; None while the head is young, and for planners that
            cannot say.
    """

    def __init__(
        self, args: FastGRPOConfig, engine: Engine, clock: StepClock, log: Callable[[str, float], None]
    ) -> None:
        self._engine, self._clock, self._log = engine, clock, log
        share = args.draft_time_share
        self._share = (_CPU_SHARE if engine.target.device.type == "cpu" else _SHARE) if share is None else share
        self.learner = _build_learner(args, engine) if self._share else None
        self._hides = args.hide_draft_learning
        self.side = SideLearning(self.learner, engine) if self.learner and self._hides else None
        self.saved_s: float | None = None
        self._teaches = False  # whether the current or last rollout is to be learnt from
        self._is_due = False  # whether this step has still to learn
        self._lesson: Lesson | None = None  # begun beside this step's rollout, to be gone on with after the rewards
        engine.on_finish.extend([self._hear] if self.learner else [])

    def begin(self, *, is_training: bool) -> None:
        """A generation begins; those of evaluations are not learnt from."""
        self._teaches = self._is_due = is_training and self.learner is not None
        if (lesson := self._take_lesson()) is not None and self.learner is not None:
            self.learner.put_back(lesson)  # of a step that broke off
        if self._teaches and not self._clock.rollout_s:  # a step may generate more than once
            self._clock.pay(self._budget_s)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Wraps a rollout, beside which the head may learn."""
        side = self.side if self._is_due and self._lesson is None and not self._clock.owes else None
        with contextlib.nullcontext() if side is None else side.follow():
            yield

    def hear_rollout(self) -> None:
        """A rollout has ended: finish what was learnt beside it, or keep the lesson for later in the step."""
        self.saved_s, planner = None, self._engine.planner
        if self.learner is None:
            return
        if not self.learner.is_young and isinstance(planner, AutoPlanner):
            self.saved_s = planner.estimate_saved_s(self._engine.records)
        lesson = None if self.side is None else self.side.take_lesson()
        if lesson is not None and lesson.num_updates and not self.learner.is_young:
            started = time.perf_counter()
            self.learner.choose_vocabulary()
            self._finish(self.learner.finish(lesson), started)
        elif lesson is not None:
            self._lesson = lesson  # `learn` goes on with it

    def learn_while_others_decode(self) -> None:
        """Learn for as long as other processes are still in their rollouts; every process calls it after its own."""
        others, is_cpu = OtherProcesses(), self._engine.target.device.type == "cpu"
        if self._hides and self._is_due and others.are_busy() and (not is_cpu or look_for_cores(others)):
            self.learn(is_free=others.are_busy)

    def learn(self, *, is_free: Callable[[], bool] = lambda: False) -> None:
        """Learn now, unless the step has learnt already.

        Args:
            is_free: whether the step would wait now, so that learning costs nothing.
        """
        if not self._is_due or self.learner is None:
            return
        lesson, owes, started = self._take_lesson(), self._clock.owes, time.perf_counter()
        if owes and not is_free():
            self._is_due = False
            if lesson is not None:
                self.learner.put_back(lesson)
            self.learner.keep()
            for key in _NOTHING:
                self._log(f"draft/{key}", 0.0)
            return
        budget_s = 0.0 if owes else self._budget_s
        self._finish(self.learner.learn(budget_s, is_free=is_free, lesson=lesson), started)

    def _take_lesson(self) -> Lesson | None:
        lesson, self._lesson = self._lesson, None
        return lesson

    def _finish(self, report: LearnReport, started: float) -> None:
        """Charge and log what the step has learnt; it learns no more.

        Args:
            started: when the part after the rollout began, by `time.perf_counter`.
        """
        self._is_due = False
        longer_s = report.learn_s - report.free_s
        self._clock.charge(time.perf_counter() - started, owed_s=longer_s)
        self._log("draft/loss", report.loss)
        self._log("draft/learn_s", longer_s)
        self._log("draft/hidden_s", report.free_s)
        self._log("draft/num_tokens", report.num_tokens)
        self._log("draft/num_skipped", report.num_skipped)
        self._log("draft/num_updates", report.num_updates)
        self._log("draft/held_out_loss", report.held_out_loss)
        self._log("draft/effort", report.effort)
        self._log("draft/rolled_back", float(report.is_rolled_back))
        if self.saved_s is not None:
            self._log("draft/saved_s", self.saved_s)

    @property
    def _budget_s(self) -> float:
        return self._clock.budget_s(self._share, self.saved_s)

    def _hear(self, rollout: FinishedRollout) -> None:
        if self.learner is not None and self._teaches:
            self.learner.add(rollout)


def _build_learner(args: FastGRPOConfig, engine: Engine) -> Learner | None:
    drafter = find_trainable(engine.drafter)
    if args.speculation == "off" or drafter is None:
        return None
    loss = check_loss(args.draft_loss)
    return Learner(drafter, learning_rate=args.draft_learning_rate, loss=loss, seed=args.seed)
