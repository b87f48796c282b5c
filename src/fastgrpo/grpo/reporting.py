"""A training that is watched live and reported at its end."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.grpo.trainer import FastGRPOTrainer
from fastgrpo.report import LiveProgress, RunHistory, plot_run, print_summary, save_run, say
from fastgrpo.types import StepRecord, Timeline

Kept = TypeVar("Kept")


class ReportCallback(TrainerCallback):
    """Shows a training while it runs, and keeps the first and the last rollout's engine steps and step's timeline.

    Args:
        trainer: whose clock hears of a step's end before this does.
        progress: what shows them.
    """

    def __init__(self, trainer: FastGRPOTrainer, progress: LiveProgress) -> None:
        self.rollouts: dict[int, list[StepRecord]] = {}
        self.timelines: dict[int, Timeline] = {}
        self._trainer = trainer
        self.is_updating = False  # between the two ends of an optimiser step
        self._progress = progress
        self._records: list[StepRecord] = []
        trainer.engine.on_step.append(self._observe)

    def _observe(self, record: StepRecord) -> None:
        self._records.append(record)
        self._progress.rollout_step(record)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.start(state.max_steps, first_step=state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._records = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_updating = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.is_updating = False
        if self._records:
            self.rollouts = _keep_ends(self.rollouts, state.global_step, self._records)
            if self._trainer.timeline is not None:
                self.timelines = _keep_ends(self.timelines, state.global_step, self._trainer.timeline)
        self._records = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._progress.training_step({**(logs or {}), "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.stop()


def _keep_ends(kept: dict[int, Kept], step: int, new: Kept) -> dict[int, Kept]:
    """The first and the new one."""
    first = min(kept, default=step)
    return {first: kept.get(first, new), step: new}


def attach_report(trainer: FastGRPOTrainer, progress: LiveProgress) -> ReportCallback:
    """Show this training with `progress`; transformers' own printing goes. Train with `disable_tqdm`."""
    callback = ReportCallback(trainer, progress)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    return callback


def write_report(history: RunHistory, directory: Path, console: Console) -> None:
    """Write `run.json`, print the tables, and draw `run.png` where matplotlib is installed; say where they are."""
    written = [save_run(history, directory)]
    print_summary(history, console)
    if not history.training_rows:
        console.print("no step was logged: no plot (see logging_steps)", style="yellow")
    elif importlib.util.find_spec("matplotlib") is None:
        console.print("no plot without matplotlib: pip install matplotlib", style="yellow")
    else:
        written.append(directory / "run.png")
        plot_run(history, written[-1])
    say(console, "written: " + ", ".join(str(path) for path in written))
