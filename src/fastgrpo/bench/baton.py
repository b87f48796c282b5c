"""Trainers that stand side by side in one process and step in turn."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Baton:
    """Lets one thread run at a time, in a fixed order; who has left is passed over.

    Each runner's random numbers go on where they were when it handed over.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = list(names)
        self._holder = names[0]
        self._condition = threading.Condition()
        self._is_broken = False
        self._random: dict[str, Any] = {}

    def take(self, name: str) -> None:
        """Wait for the turn of `name`.

        Raises:
            RuntimeError: another runner failed.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._is_broken or self._holder == name)
            if self._is_broken:
                raise RuntimeError("stopped, as another variant failed")
        if name in self._random:
            _set_random_state(self._random[name])

    def hand_over(self, name: str) -> None:
        """End the turn of `name`."""
        self._random[name] = _read_random_state()
        with self._condition:
            self._holder = self._names[(self._names.index(name) + 1) % len(self._names)]
            self._condition.notify_all()

    def leave(self, name: str) -> None:
        """`name` is done."""
        with self._condition:
            after = self._names[(self._names.index(name) + 1) % len(self._names)]
            self._names.remove(name)
            if self._holder == name:
                self._holder = after
            self._condition.notify_all()

    def break_off(self) -> None:
        """Wake and stop every runner that waits."""
        with self._condition:
            self._is_broken = True
            self._condition.notify_all()


def _read_random_state() -> Any:
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def _set_random_state(state: Any) -> None:
    python, numpy, cpu, gpu = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state_all(gpu)


class TurnCallback(TrainerCallback):
    """Hands the baton over after each training step.

    Args:
        on_step: called with the seconds of each step: data, rollout, rewards, update and logging.
    """

    def __init__(self, baton: Baton, name: str, on_step: Callable[[float], None]) -> None:
        self._baton, self._name, self._on_step = baton, name, on_step
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._on_step(time.perf_counter() - self._started)
        self._baton.hand_over(self._name)
        self._baton.take(self._name)
        self._started = time.perf_counter()


def run_in_turn(baton: Baton, runners: Mapping[str, Callable[[], object]]) -> None:
    """Run all to their ends, each in a thread of its own.

    Raises:
        Exception: the first that a runner raised; the others have been stopped.
    """
    num_threads = torch.get_num_threads()
    failures: list[BaseException] = []

    def run(name: str) -> None:
        torch.set_num_threads(num_threads)
        try:
            baton.take(name)
            runners[name]()
            baton.leave(name)
        except BaseException as error:
            failures.append(error)
            baton.break_off()

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in runners]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():  # with a time limit, so that Ctrl-C is heard
                thread.join(timeout=0.5)
    finally:
        baton.break_off()
    if failures:
        raise failures[0]
