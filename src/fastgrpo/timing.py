"""How long a call takes, and how far its repetitions disagree."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate
from time import monotonic, perf_counter

import torch

LARGE_SPREAD = 0.5  # a median half again as long as the least run: something else is at work
_REPEAT_SPREAD = 0.25  # runs that disagree more are repeated
_RUNS, _MAX_ROUNDS = 3, 4
_CALLS_BEFORE = 1  # in which work that is replayed later is recorded (see `graphs`)
MOST_RUNS = _CALLS_BEFORE + 1 + _RUNS * _MAX_ROUNDS  # calls of what is timed, by a clock that works, and before
_BUDGET_S = 3.0  # runs of one point; slow ones are repeated less
_MAX_CALLS = 64  # calls timed as one while the clock shows no difference


class Stopwatch:
    """Seconds spent in its `with` blocks, added up until they are taken; blocks do not nest."""

    def __init__(self) -> None:
        self._total_s = self._started = 0.0

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._total_s += perf_counter() - self._started

    def take_s(self) -> float:
        """What was added up since it was last taken."""
        taken_s, self._total_s = self._total_s, 0.0
        return taken_s


Moment = float | torch.cuda.Event


class DeviceClock:
    """Moments in the work of a device, which may come to them later than the host does.

    Args:
        num_kept: moments of a GPU that are asked about together; later ones take the place of the first.
    """

    def __init__(self, device: torch.device, num_kept: int) -> None:
        is_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(num_kept)] if is_gpu else []
        self._next = 0

    def mark(self) -> Moment:
        if not self._events:
            return perf_counter()
        event = self._events[self._next]
        self._next = (self._next + 1) % len(self._events)
        event.record()
        return event


def compute_seconds(begin: Moment, end: Moment) -> float:
    """Between two moments of one device, both past."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float), "moments of one device"
        return end - begin
    return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Several runs of one call.

    Args:
        least_s: seconds of the fastest run: other work on the machine only ever adds.
        spread: how much longer the median run took, as a share of the fastest; 0 where all agree.
        num_runs: runs that were timed.
        total_s: seconds of all of them.
    """

    least_s: float
    spread: float
    num_runs: int
    total_s: float


_patient_until: ContextVar[float] = ContextVar("patient_until", default=math.inf)


@contextlib.contextmanager
def be_patient(seconds: float) -> Iterator[None]:
    """For so long each call is timed several times, and more often where runs disagree; after that once."""
    token = _patient_until.set(monotonic() + seconds)
    try:
        yield
    finally:
        _patient_until.reset(token)


def is_late() -> bool:
    """Whether patience has run out (see `be_patient`)."""
    return monotonic() > _patient_until.get()


def measure_timing(run: Callable[[], object], before: Callable[[], object] | None = None) -> Timing:
    """Time a call after one warm-up; runs that disagree are repeated, a bounded number of times (see `be_patient`).

    Args:
        run: returns when its work is done, an accelerator's included.
        before: called before each run, and not timed.

    Raises:
        OSError: the clock stands still.
    """
    run()
    times: list[float] = []
    while True:
        for _ in range(_RUNS):
            if before is not None:
                before()
            times.append(_time(run))
            was_late = is_late()
            if was_late or (sum(times) > _BUDGET_S and len(times) > 1):
                break
        spread = statistics.median(times) / min(times) - 1
        if was_late or spread <= _REPEAT_SPREAD or sum(times) > _BUDGET_S or len(times) >= _RUNS * _MAX_ROUNDS:
            return Timing(least_s=min(times), spread=spread, num_runs=len(times), total_s=sum(times))


def measure_on(run: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> Timing:
    """`measure_timing` of work that an accelerator may still be at when the call returns, and may replay.

    Args:
        before: of each run, on the host alone: it puts out of a processor's caches what a step would not find there.
    """
    if device.type != "cuda":
        return measure_timing(run, before)

    def finish() -> None:
        run()
        torch.cuda.synchronize(device)

    for _ in range(_CALLS_BEFORE):
        finish()
    return measure_timing(finish)


def level(times: list[float]) -> list[float]:
    """Times of ever larger work, none above a later one's: more work never takes less, and noise only ever adds."""
    return list(accumulate(reversed(times), min))[::-1]


def repeat_disturbed(timings: list[Timing], measure: Callable[[int], Timing], growth: float = math.inf) -> list[Timing]:
    """Timings of ever larger work, those that took clearly longer than a later one once more, and the better kept.

    So are those that took clearly longer than `growth` times the one before.

    A point that still does has the excess for its spread: its runs may agree with each other, but not with the rest.

    Args:
        measure: from the index of a point to another timing of it.
        growth: how many times the work before each point is.
    """
    settled = list(timings)

    def repeat(index: int, most_s: float) -> None:
        if settled[index].least_s > (1 + _REPEAT_SPREAD) * most_s:
            best = min(settled[index], measure(index), key=lambda timing: timing.least_s)
            settled[index] = replace(best, spread=max(best.spread, best.least_s / most_s - 1))

    for index in reversed(range(len(settled) - 1)):
        repeat(index, min(timing.least_s for timing in settled[index + 1 :]))
    for index in range(1, len(settled)):
        repeat(index, growth * settled[index - 1].least_s)
    return settled


def _time(run: Callable[[], object]) -> float:
    """Seconds of a call, always above 0: where the clock shows none, of several calls at once."""
    num_calls = 1
    while num_calls <= _MAX_CALLS:
        started = perf_counter()
        for _ in range(num_calls):
            run()
        elapsed_s = perf_counter() - started
        if elapsed_s > 0:
            return elapsed_s / num_calls
        num_calls *= 2
    raise OSError(
        f"the clock of this machine stood still over {_MAX_CALLS} calls, so nothing can be timed; set "
        "speculation=off or fixed, which need no times, or give a profile that was measured before"
    )
