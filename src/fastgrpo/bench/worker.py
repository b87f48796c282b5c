"""A trainer in a process of its own that trains one step when it is its turn.

Not a thread: with more OpenMP teams than cores, libgomp stops spinning at its barriers, and every rollout
of a small model becomes about a third slower.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.bench.given_rows import give_rows
from fastgrpo.bench.training import build_trainer, find_trainer_class
from fastgrpo.grpo.clock import StepClock, attach_clock
from fastgrpo.loading import quiet_libraries
from fastgrpo.metrics import compute_phase_times, compute_ratio
from fastgrpo.options import E2EOptions, UpdateOptions
from fastgrpo.types import ROLLOUT, Timeline

Row = dict[str, Any]


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
        with _inherited_deafness():
            self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Return when the trainer is built."""
        self._receive()

    def train_step(self) -> tuple[Row, Timeline]:
        """Train one step and return what was measured, and when it did what."""
        self._connection.send("go")
        measured: tuple[Row, Timeline] = self._receive()
        return measured

    def finish(self) -> dict[str, int | None]:
        """Peak memory of the process, in bytes, after its last step."""
        return self._receive()

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        """The next answer of the process.

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


@contextlib.contextmanager
def _inherited_deafness() -> Iterator[None]:
    """A process that starts within ignores Ctrl-C until it asks for it: in an import it would show a traceback."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main_thread else None
    try:
        yield
    finally:
        if is_main_thread:
            signal.signal(signal.SIGINT, before)


def run_worker(name: str, options: E2EOptions, connection: Connection) -> None:
    """Build the trainer, then train a step for each word that comes; ends with its peak memory."""
    quiet_libraries()
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with tempfile.TemporaryDirectory() as folder:
            trainer = _build_timed(name, options, Path(folder), connection)
            connection.send((None, "ready"))
            connection.recv()
            trainer.train()
        connection.send((None, {"rss_bytes": read_peak_rss_bytes()} | _read_peak_gpu_bytes()))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        failure = (
            (ValueError, f"{name}: {error}")
            if isinstance(error, ValueError)
            else (RuntimeError, f"{name} failed:\n{traceback.format_exc()}")
        )
        with contextlib.suppress(BrokenPipeError):  # the benchmark was killed: nobody is there to be told
            connection.send(failure)


@dataclasses.dataclass(kw_only=True)
class _Rollouts:
    """What the training step that runs now has rolled out."""

    score_s: float = 0.0  # generation, rewards and draft learning
    lengths: list[int] = dataclasses.field(default_factory=list)


def _build_timed(name: str, options: E2EOptions, folder: Path, connection: Connection) -> Any:
    """The variant's trainer, which reports each step and waits for its turn."""
    rollouts = _Rollouts()
    trainer = build_trainer(
        options,
        variant=name,
        steps=options.steps,
        output_dir=folder,
        trainer_class=_choose_class(name, options, rollouts),
    )
    clock = StepClock(is_exact=True)
    attach_clock(trainer, clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_TurnCallback(trainer, clock, rollouts, connection))
    return trainer


def _choose_class(name: str, options: E2EOptions, rollouts: _Rollouts) -> type[Any]:
    own = find_trainer_class(name)
    noted = give_rows(own, options, rollouts.lengths) if isinstance(options, UpdateOptions) else own
    return _note_rollouts(noted, rollouts)


def _note_rollouts(trainer_class: type[Any], rollouts: _Rollouts) -> type[Any]:
    """A trainer of this class that notes how long its completions are, and what is done before the update."""

    class Noting(trainer_class):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            output = super()._generate_single_turn(*args, **kwargs)
            rollouts.lengths += [len(ids) for ids in output[0]]
            return output

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            rollouts.score_s += time.perf_counter() - started
            return output

    return Noting


class _TurnCallback(TrainerCallback):
    """Sends what was measured after each step, then waits.

    Args:
        clock: attached before, so that it hears of a step's end before this does.
    """

    def __init__(self, trainer: Any, clock: StepClock, rollouts: _Rollouts, connection: Connection) -> None:
        self._trainer, self._clock, self._rollouts, self._connection = trainer, clock, rollouts, connection
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        step_s = time.perf_counter() - self._started
        timeline = self._clock.timeline
        assert timeline is not None
        row = _build_row(self._trainer, timeline, self._rollouts, step_s)
        self._rollouts.score_s = 0.0
        self._rollouts.lengths.clear()
        self._connection.send((None, (row, timeline)))
        if state.global_step < state.max_steps:
            self._connection.recv()
        self._started = time.perf_counter()


def _build_row(trainer: Any, timeline: Timeline, rollouts: _Rollouts, step_s: float) -> Row:
    """The results of one training step.

    Args:
        step_s: seconds of data, rollout, rewards, update and logging.
    """
    records = trainer.engine.records if hasattr(trainer, "engine") else []
    learn_s = sum(trainer._metrics["train"].get("draft/learn_s", [])[-1:])
    num_tokens = sum(rollouts.lengths)
    phases = compute_phase_times(timeline)
    generation_s = phases[ROLLOUT]
    return {
        "step_s": step_s,
        "generation_s": generation_s,
        "learn_s": learn_s,
        "score_s": rollouts.score_s - generation_s - learn_s,
        "update_s": step_s - rollouts.score_s,
        "phases": phases | {"other": phases["other"] + step_s - timeline.step_s},
        "num_tokens": num_tokens,
        "tokens_per_s": compute_ratio(num_tokens, generation_s),  # 0 where there was no rollout
        "s_per_token": generation_s / num_tokens,
        "mean_length": num_tokens / len(rollouts.lengths),
        "max_length": max(rollouts.lengths),
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


def _read_peak_gpu_bytes() -> dict[str, int | None]:
    """Most memory that tensors took, and that PyTorch had set aside: that of recordings that ended goes late."""
    if not torch.cuda.is_available():
        return {"gpu_bytes": None, "gpu_reserved_bytes": None}
    return {"gpu_bytes": torch.cuda.max_memory_allocated(), "gpu_reserved_bytes": torch.cuda.max_memory_reserved()}
