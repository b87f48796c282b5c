"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.metrics import step_time_shares

_LEARN_SHARE_OF_ROLLOUT, _LEARN_SHARE_OF_SAVING = 0.25, 0.5


class StepClock(TrainerCallback):
    """Times the parts of each training step and hands them out under `time/`.

    Args:
        log: called with each metric's name and value at the end of a step.
    """

    def __init__(self, log: Callable[[str, float], None]) -> None:
        self._log = log
        self._started: float | None = None
        self._last_step_s: float | None = None
        self.rollout_s = self.reward_s = self.learn_s = 0.0

    def budget_s(self, share: float, saved_s: float | None = None) -> float:
        """Seconds that draft learning may take now: a share of the last step, or of this one so far.

        Never more than a quarter of the rollout, about what a good head saves of it.

        Args:
            share: of the step, in [0, 1).
            saved_s: what speculation saved in this step's rollout; learning then takes at most half of it.
                None where nobody knows, or where a head is still too young to save anything.
        """
        step_s = self.rollout_s + self.reward_s if self._last_step_s is None else self._last_step_s
        budget_s = min(share * step_s, _LEARN_SHARE_OF_ROLLOUT * self.rollout_s)
        return budget_s if saved_s is None else min(budget_s, max(saved_s, 0.0) * _LEARN_SHARE_OF_SAVING)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        self.rollout_s = self.reward_s = self.learn_s = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._started is None:
            return
        step_s = time.perf_counter() - self._started
        if self.rollout_s:
            self._last_step_s = step_s
        update_s = step_s - self.rollout_s - self.reward_s - self.learn_s
        shares = step_time_shares(self.rollout_s, self.learn_s, update_s, self.reward_s)
        for key, value in shares.items():
            self._log(key, value)
