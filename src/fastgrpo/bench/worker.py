"""A trainer in a process of its own that trains one step when it is its turn.

Not a thread: with more OpenMP teams than cores, libgomp stops spinning at its barriers, and every rollout
of a small model becomes about a third slower.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.bench.training import build_trainer, find_trainer_class
from fastgrpo.loading import quiet_libraries
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import E2EOptions

Row = dict[str, float]


class Worker:
    """The handle of such a process.

    Args:
        name: the variant to train.
        options: the same for all variants.
    """

    def __init__(self, name: str, options: E2EOptions) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_worker, args=(name, options, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Return when the trainer is built."""
        self._receive()

    def train_step(self) -> Row:
        """Train one step and return what was measured."""
        self._connection.send("go")
        return self._receive()

    def finish(self) -> dict[str, int | None]:
        """Peak memory of the process, in bytes, after its last step."""
        return self._receive()

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        """
        Raises:
            ValueError: the settings do not fit, as the process said.
            RuntimeError: it failed, or died.
        """
        try:
            failure, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of {self.name} died, exit code {self._process.exitcode}") from None
        if failure is not None:
            raise failure(value)
        return value


def run_worker(name: str, options: E2EOptions, connection: Connection) -> None:
    """Build the trainer, then train a step for each word that comes; ends with its peak memory."""
    quiet_libraries()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _build_timed(name, options, Path(folder), connection)
            connection.send((None, "ready"))
            connection.recv()
            trainer.train()
        connection.send((None, {"rss_bytes": read_peak_rss_bytes(), "gpu_bytes": _read_peak_gpu_bytes()}))
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        connection.send((ValueError, f"{name}: {error}"))
    except Exception:
        connection.send((RuntimeError, f"{name} failed:\n{traceback.format_exc()}"))


@dataclasses.dataclass(kw_only=True)
class _Phases:
    """Seconds and lengths of the training step that runs now."""

    generation_s: float = 0.0
    generate_and_score_s: float = 0.0  # generation, rewards and draft learning
    lengths: list[int] = dataclasses.field(default_factory=list)


class _Stopwatch:
    """Holds the phases of the current step, for the trainer's methods and its callback."""

    def __init__(self) -> None:
        self.phases = _Phases()

    def take(self) -> _Phases:
        phases, self.phases = self.phases, _Phases()
        return phases


def _build_timed(name: str, options: E2EOptions, folder: Path, connection: Connection) -> Any:
    """The variant's trainer, which reports each step and waits for its turn."""
    stopwatch = _Stopwatch()
    trainer = build_trainer(
        options,
        variant=name,
        steps=options.steps,
        output_dir=folder,
        trainer_class=_time_phases(find_trainer_class(name), stopwatch),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_TurnCallback(connection, lambda step_s: _build_row(trainer, stopwatch.take(), step_s)))
    return trainer


def _time_phases(trainer_class: type[Any], stopwatch: _Stopwatch) -> type[Any]:
    """A trainer of this class that notes how long its rollouts take."""

    class Timed(trainer_class):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = super()._generate_single_turn(*args, **kwargs)
            stopwatch.phases.generation_s += time.perf_counter() - started
            stopwatch.phases.lengths += [len(ids) for ids in output[0]]
            return output

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            stopwatch.phases.generate_and_score_s += time.perf_counter() - started
            return output

    return Timed


class _TurnCallback(TrainerCallback):
    """Sends a row after each step, then waits.

    Args:
        build_row: from the seconds of a step (data, rollout, rewards, update and logging) to its row.
    """

    def __init__(self, connection: Connection, build_row: Callable[[float], Row]) -> None:
        self._connection, self._build_row = connection, build_row
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._connection.send((None, self._build_row(time.perf_counter() - self._started)))
        if state.global_step < state.max_steps:
            self._connection.recv()
        self._started = time.perf_counter()


def _build_row(trainer: Any, phases: _Phases, step_s: float) -> Row:
    records = trainer.engine.records if hasattr(trainer, "engine") else []
    learn_s = sum(trainer._metrics["train"].get("draft/learn_s", [])[-1:])
    num_tokens = sum(phases.lengths)
    return {
        "step_s": step_s,
        "generation_s": phases.generation_s,
        "learn_s": learn_s,
        "score_s": phases.generate_and_score_s - phases.generation_s - learn_s,
        "update_s": step_s - phases.generate_and_score_s,
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / phases.generation_s,
        "s_per_token": phases.generation_s / num_tokens,
        "mean_length": num_tokens / len(phases.lengths),
        "max_length": max(phases.lengths),
        "acceptance_length": compute_ratio(
            sum(record.num_emitted for record in records), sum(record.num_seqs for record in records)
        ),
    }


def read_peak_rss_bytes() -> int:
    """Most memory this process has held.

    `getrusage` of a process started by vfork begins with its parent's peak, so Linux's own count of
    this program's memory comes first.
    """
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read_peak_gpu_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
