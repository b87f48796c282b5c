"""Calls of reward functions beside the decoding: bounded, timed out by name, and gone when they are not wanted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from trl.trainer.utils import is_async_callable

_LOOP_ANSWERS_S = 5.0  # a loop that is silent for longer is blocked


@dataclass(kw_only=True, eq=False)
class RewardCall:
    """One call of a reward function with one completion.

    Args:
        function: in TRL's signature.
        name: what TRL calls it.
        index: of the completion, in this process's batch.
        prompt, completion, completion_ids: as TRL hands them over.
        columns: the other columns of the dataset.
        trainer_state: TRL's.
        extras, metrics: what the function logged, to be handed on in the order of the completions.
        rewards: what it returned or raised, once it did.
        started_s, ended_s: by `time.perf_counter`; None before.
    """

    function: Callable[..., Any]
    name: str
    index: int
    prompt: Any
    completion: Any
    completion_ids: list[int]
    columns: Mapping[str, Any]
    trainer_state: Any
    extras: list[tuple[str, list[Any]]] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    rewards: Future[list[Any]] = field(default_factory=Future)
    started_s: float | None = None
    ended_s: float | None = None

    def invoke(self) -> Any:
        """Call the function; of an async one, this is what must be awaited."""
        self.started_s = time.perf_counter()
        return self.function(
            prompts=[self.prompt],
            completions=[self.completion],
            completion_ids=[list(self.completion_ids)],  # which the function may change
            **{key: [value] for key, value in self.columns.items()},
            trainer_state=self.trainer_state,
            log_extra=lambda column, values: self.extras.append((column, list(values))),
            log_metric=lambda name, value: self.metrics.append((name, value)),
        )

    def settle(self, output: Any) -> None:
        """Keep what the function returned; what comes after a timeout is too late."""
        rewards = list(output)
        if len(rewards) != 1:
            raise ValueError(
                f"The reward function '{self.name}' returned {len(rewards)} rewards for completion {self.index} alone, "
                "but 1 was expected: it is declared per_completion and must return one reward per completion"
            )
        self.ended_s = time.perf_counter()
        with contextlib.suppress(InvalidStateError):
            self.rewards.set_result(rewards)

    def fail(self, error: BaseException) -> None:
        """Keep what the function raised."""
        self.ended_s = time.perf_counter()
        with contextlib.suppress(InvalidStateError):
            self.rewards.set_exception(error)


class RewardCalls:
    """The calls of one rollout. Threads begin when there is work and end when there is none.

    Threads are daemons: one that hangs in foreign code cannot be stopped, but does not keep the program alive.

    Args:
        most: sync calls at once, and async calls at once.
        timeout_s: seconds that a call may take from its start.
        loop: runs in a thread of its own; needed for async functions only.
    """

    def __init__(self, *, most: int, timeout_s: float, loop: asyncio.AbstractEventLoop | None) -> None:
        self._most, self._timeout_s, self._loop = most, timeout_s, loop
        self._lock = threading.Lock()
        self._waiting: deque[RewardCall] = deque()
        self._unsettled: dict[RewardCall, Future[None] | None] = {}  # with the task of an async one
        self._given_up: set[RewardCall] = set()
        self._num_threads = 0
        self._turns = asyncio.Semaphore(most)
        self._holding: set[RewardCall] = set()  # a turn; async ones

    @property
    def is_idle(self) -> bool:
        """Whether every call has its result or its error."""
        return all(call.rewards.done() for call in self._unsettled)

    def start(self, call: RewardCall) -> None:
        """Call as soon as there is room; returns at once."""
        if is_async_callable(call.function):
            assert self._loop is not None, "TRL runs a loop where a reward is async"
            self._unsettled[call] = asyncio.run_coroutine_threadsafe(self._await(call), self._loop)
            return
        self._unsettled[call] = None
        with self._lock:
            self._waiting.append(call)
            self._add_thread()

    def wait(self) -> None:
        """Return when every call has its result or its error; one that takes too long has a `TimeoutError`."""
        while not self.is_idle:
            left_s = self._give_up_late_ones()
            pending = [call.rewards for call in self._unsettled if not call.rewards.done()]
            concurrent.futures.wait(
                pending,
                timeout=min(left_s, self._timeout_s, threading.TIMEOUT_MAX),
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
        self._unsettled.clear()

    def cancel(self) -> None:
        """Begin no more calls and await none; threads end with the call they are at."""
        with self._lock:
            self._waiting.clear()
        for task in self._unsettled.values():
            if task is not None:
                task.cancel()
        self._unsettled.clear()

    def _give_up_late_ones(self) -> float:
        """Time out what has run too long; returns the seconds until the next call would."""
        now, left_s = time.perf_counter(), math.inf
        for call, task in self._unsettled.items():
            if call.rewards.done() or call.started_s is None:
                continue
            left = call.started_s + self._timeout_s - now
            if left > 0:
                left_s = min(left_s, left)
                continue
            error = TimeoutError(
                f"reward function '{call.name}' gave no reward for completion {call.index} within "
                f"{self._timeout_s:g} s ({call.completion!r:.80}); raise reward_timeout_s, or let it give up itself"
            )
            call.fail(error)
            if task is None:
                self._replace_thread(call)
            else:
                assert self._loop is not None
                task.cancel()
                self._loop.call_soon_threadsafe(self._give_turn_back, call)  # whatever it makes of that
                self._check_loop(error)
        return left_s

    def _check_loop(self, error: TimeoutError) -> None:
        """Raise where an async function waits without `await`: nothing else on its loop will ever run."""
        assert self._loop is not None
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_LOOP_ANSWERS_S)
        except TimeoutError:
            error.add_note("it blocks its event loop: an async reward must await what it waits for")
            raise error from None

    # -- threads of sync functions -------------------------------------------------------------------

    def _add_thread(self) -> None:
        if self._waiting and self._num_threads < self._most:
            self._num_threads += 1
            threading.Thread(target=self._work, name="fastgrpo-reward", daemon=True).start()

    def _replace_thread(self, call: RewardCall) -> None:
        """The thread at this call hangs: another one takes its place."""
        with self._lock:
            self._given_up.add(call)
            self._num_threads -= 1
            self._add_thread()

    def _work(self) -> None:
        call = None
        while True:
            with self._lock:
                if call in self._given_up:
                    return
                if not self._waiting:
                    self._num_threads -= 1
                    return
                call = self._waiting.popleft()
            try:
                call.settle(call.invoke())
            except BaseException as error:  # raised again where the rewards are collected
                call.fail(error)

    # -- tasks of async functions --------------------------------------------------------------------

    async def _await(self, call: RewardCall) -> None:
        try:
            await self._turns.acquire()
            self._holding.add(call)
            call.settle(await call.invoke())
        except asyncio.CancelledError:
            call.rewards.cancel()
            raise
        except BaseException as error:  # raised again where the rewards are collected
            call.fail(error)
        finally:
            self._give_turn_back(call)

    def _give_turn_back(self, call: RewardCall) -> None:
        """On the loop; once."""
        if call in self._holding:
            self._holding.remove(call)
            self._turns.release()


def find_failure(calls: Iterable[RewardCall]) -> BaseException | None:
    """What the first completion's call that failed has raised."""
    return next((error for call in calls if (error := call.rewards.exception()) is not None), None)
