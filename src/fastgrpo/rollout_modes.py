"""Who has a model in rollouts, and what they have changed of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn


class RolloutModes:
    """What rollouts have changed of each model, in the order they began; they may end in any order and any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection while it is held may end another rollout in this thread
        self._entered: dict[int, list[contextlib.ExitStack]] = {}  # by the model's id
        self._left: list[contextlib.ExitStack] = []  # ended, but not put back yet: a later rollout still runs

    def enter(self, model: nn.Module, mode: contextlib.ExitStack) -> None:
        with self._lock:
            self._entered.setdefault(id(model), []).append(mode)

    def leave(self, model: nn.Module, mode: contextlib.ExitStack) -> None:
        """Undo a rollout's changes, once all later ones are undone, and earlier ones' that only waited for it."""
        with self._lock:
            entered = self._entered[id(model)]
            self._left.append(mode)
            while entered and entered[-1] in self._left:
                self._left.remove(entered[-1])
                entered.pop().close()
            if not entered:
                self._entered.pop(id(model), None)


MODES = RolloutModes()


class Owners:
    """Which thread has a model in rollouts: only one may, since each changes the model and puts it back."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant for the reason given in `RolloutModes`
        self._threads: dict[int, list[int]] = {}  # by the model's id, one entry for each rollout

    @contextlib.contextmanager
    def own(self, model: nn.Module) -> Iterator[None]:
        """This thread has the model in a rollout within.

        Raises:
            RuntimeError: another thread has.
        """
        own = threading.get_ident()
        with self._lock:
            threads = self._threads.setdefault(id(model), [])
            if any(thread != own for thread in threads):
                raise RuntimeError(
                    "this model is in a rollout of another thread: end that one first, or give each thread a copy of "
                    "the model; engines of one model may take turns in one thread"
                )
            threads.append(own)
        try:
            yield
        finally:
            with self._lock:
                threads.remove(own)
                if not threads:
                    self._threads.pop(id(model), None)


OWNERS = Owners()
