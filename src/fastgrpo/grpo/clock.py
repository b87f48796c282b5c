"""Where the time of a training step goes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.metrics import step_time_shares
from fastgrpo.types import BACKWARD, FORWARD, LEARNING, LOG_PROBS, OPTIMISER, REWARDS, ROLLOUT, Span, Timeline

_LEARN_SHARE_OF_ROLLOUT, _LEARN_SHARE_OF_SAVING = 0.25, 0.5
_LEAST_LEARN_SHARE = 0.005  # least share of a step that pays off what learning owes, though speculation saves nothing


class StepClock(TrainerCallback):
    """Times the parts of each training step and hands them out under `time/`.

    Args:
        log: called with each metric's name and value at the end of a step.
        is_exact: wait for the GPU at the end of each phase. Otherwise times are the host's, and kernels that still run
            count towards the phase that waits for them.
    """

    def __init__(self, log: Callable[[str, float], None] = lambda key, value: None, *, is_exact: bool = False) -> None:
        self._log = log
        self._waits = is_exact and torch.cuda.is_available()
        self._started: float | None = None
        self._last_step_s: float | None = None
        self._last_rollout_s = 0.0
        self.rollout_s = self.reward_s = self.learn_s = 0.0
        self._owed_s = 0.0  # seconds that draft learning owes to later steps; below 0: seconds it has left
        self._has_learnt = False
        self.timeline: Timeline | None = None  # of the last step that ended
        self._spans: list[Span] = []
        self._open: list[str] = []  # phases under way, the innermost last
        self._since = 0.0  # when the innermost phase began or was resumed

    def budget_s(self, share: float, saved_s: float | None = None) -> float:
        """Seconds that draft learning may still take: a share of the last step, or of the first one so far, less those
        that it has taken in this step.

        Never more than a quarter of this step's rollout (before it, of the last one): about what a good head saves.

        Args:
            share: of the step, in [0, 1).
            saved_s: seconds that speculation saved in this step's rollout, of which learning takes at most half; None
                where that is not known, or where a head is still too young to save anything.
        """
        step_s = self.rollout_s + self.reward_s if self._last_step_s is None else self._last_step_s
        budget_s = min(share * step_s, _LEARN_SHARE_OF_ROLLOUT * (self.rollout_s or self._last_rollout_s))
        budget_s = budget_s if saved_s is None else min(budget_s, max(saved_s, 0.0) * _LEARN_SHARE_OF_SAVING)
        return max(budget_s - self.learn_s, 0.0)

    def pay(self, budget_s: float) -> None:
        """Pay for earlier learning, since one update may take longer than a step allows; call as each step begins.

        Args:
            budget_s: this step's, from `budget_s`.
        """
        paid_s = max(budget_s, _LEAST_LEARN_SHARE * (self._last_step_s or 0.0))
        self._owed_s = max(self._owed_s - paid_s, -paid_s)

    @property
    def owes(self) -> bool:
        """Whether earlier learning is still to be paid for: until then, nothing is learnt."""
        return self._owed_s > 0

    def charge(self, learn_s: float, *, owed_s: float | None = None) -> None:
        """Add up what draft learning took in this step.

        Args:
            learn_s: seconds that the step spent on it.
            owed_s: seconds that the step became longer for it, where these are fewer: time that the step would have
                waited anyway is not owed. The first learning, which prepares kernels, is not owed either.
        """
        self.learn_s += learn_s
        if self._has_learnt:
            self._owed_s += learn_s if owed_s is None else owed_s
        self._has_learnt = True

    # -- the timeline of a step ----------------------------------------------------------------------

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Wraps a phase of a step; a phase within another one interrupts it. Outside of steps nothing is noted."""
        if self._started is None or (name == LOG_PROBS and FORWARD in self._open):  # the loss's own are its forward
            yield
            return
        self._cut()
        self._open.append(name)
        try:
            yield
        finally:
            self._cut()
            self._open.pop()

    def note(self, name: str, started_s: float, ended_s: float) -> None:
        """Add a stretch of the step to the timeline; times are those of `time.perf_counter`."""
        if self._started is not None:
            self._spans.append(Span(name=name, start_s=started_s - self._started, end_s=ended_s - self._started))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a phase."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return run

    def _cut(self) -> None:
        """Note the innermost phase up to now: it ends here, or is interrupted."""
        now = self._now()
        if self._open:
            self.note(self._open[-1], self._since, now)
        self._since = now

    def _now(self) -> float:
        if self._waits:
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- the trainer's events ------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._now()
        self._spans, self._open = [], []
        self.rollout_s = self.reward_s = self.learn_s = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._cut()
        self._open.append(OPTIMISER)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._cut()
        self._open.pop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._started is None:
            return
        step_s = self._now() - self._started
        self.timeline = Timeline(step_s=step_s, spans=tuple(self._spans))
        self._started = None
        if self.rollout_s:
            self._last_step_s, self._last_rollout_s = step_s, self.rollout_s
        update_s = step_s - self.rollout_s - self.reward_s - self.learn_s
        shares = step_time_shares(self.rollout_s, self.learn_s, update_s, self.reward_s)
        for key, value in shares.items():
            self._log(key, value)


def attach_clock(trainer: Any, clock: StepClock) -> None:
    """Time the phases of a trainer, TRL's or fastgrpo's, by wrapping methods that both have."""
    accelerator, learner = trainer.accelerator, getattr(trainer, "learner", None)
    if (side := getattr(getattr(trainer, "learning", None), "side", None)) is not None:
        side.on_piece.append(clock.note)
    for owner, method, phase in (
        (trainer, "_generate_single_turn", ROLLOUT),
        (trainer, "_calculate_rewards", REWARDS),
        (trainer, "_get_per_token_logps_and_entropies", LOG_PROBS),
        (trainer, "compute_loss", FORWARD),
        (accelerator, "backward", BACKWARD),
        (accelerator, "clip_grad_norm_", OPTIMISER),
        (learner, "learn", LEARNING),
        (getattr(trainer, "savings", None), "fill_old_logps", LOG_PROBS),
    ):
        if owner is not None:
            setattr(owner, method, clock.timed(phase, getattr(owner, method)))
    trainer.add_callback(clock)
