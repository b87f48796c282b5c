"""Draft learning beside the tail of a rollout, where something idles meanwhile: measured, never assumed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastgrpo.engine import Engine
from fastgrpo.idleness import IdleCores
from fastgrpo.learner import Learner, Lesson
from fastgrpo.memory import is_out_of_memory
from fastgrpo.types import BESIDE, SpeculationPlan, StepRecord

logger = logging.getLogger(__name__)

_TAIL = 0.5  # of the sequences are still running: the others are there to learn from
_STEPS_BETWEEN = 3  # steps without an update between two with one, to compare with
_KEPT_STEPS, _ALIKE = 8, 1.3  # of one kind, of those; so many times the sequences at most
_MOST_TAKEN = 0.5  # of an update's own time, from decoding: with more it is made between rollouts
_LEAST_JUDGED, _MOST_JUDGED = 2, 8  # updates that are judged by, the last ones: their median, for machines are noisy
_MOST_UNJUDGED = 3  # updates in a row beside steps that nothing is like
_REST, _LONGEST_REST = 8, 256  # rollouts without, once it did not pay
_FRUITLESS = 8  # times as many, where an update took more from decoding than it takes by itself


class StepComparison:
    """How much longer steps take with something beside them: each is compared with like ones without.

    Like are steps of one plan with about as many sequences, of which none recorded anything for later.
    """

    def __init__(self) -> None:
        self._alone: dict[SpeculationPlan, dict[int, deque[float]]] = defaultdict(dict)  # by number of sequences
        self._extra_s: list[float] = []
        self._num_steps = 0

    def observe(self, record: StepRecord, *, is_beside: bool) -> None:
        seconds = record.step_s - record.prefill_s
        self._num_steps += is_beside
        if not record.is_steady:
            return
        if not is_beside:
            alike = self._alone[record.plan].setdefault(record.num_seqs, deque(maxlen=_KEPT_STEPS))
            alike.append(seconds)
        elif (usual_s := self._find_usual_s(record)) is not None:
            self._extra_s.append(seconds - usual_s)

    def _find_usual_s(self, record: StepRecord) -> float | None:
        """What such a step takes alone, by those with the nearest number of sequences."""
        alike = self._alone[record.plan]
        nearest = min(alike, key=lambda num_seqs: abs(num_seqs - record.num_seqs), default=None)
        if nearest is None or not 1 / _ALIKE <= nearest / record.num_seqs <= _ALIKE:
            return None
        return statistics.median(alike[nearest])

    def take_extra_s(self) -> float | None:
        """Seconds that the steps since the last call lost; None where none of them had a like one."""
        extra_s, num_steps = self._extra_s, self._num_steps
        self._extra_s, self._num_steps = [], 0
        return sum(extra_s) * num_steps / len(extra_s) if extra_s else None


class SideLearning:
    """Lessons in a thread of their own, on a GPU in a stream of their own, while few sequences are left to decode.

    On a CPU one begins where a core, or most of it, is idle for each of PyTorch's threads. On any device, what updates
    take from decoding is measured; where that is more than half of what they take by themselves, the lesson ends, and
    the next rollouts go without, twice as many each time, and many more where nothing was hidden at all.

    Args:
        learner: of the engine's drafter.

    Attributes:
        on_piece: told of each piece of a lesson: `BESIDE`, when it began and ended, by `time.perf_counter`.
        taken_s: what the lesson of the last rollout took from decoding, seconds; where nothing was comparable, as long
            as updates take by themselves.
    """

    def __init__(self, learner: Learner, engine: Engine) -> None:
        self._learner, self._engine = learner, engine
        self.on_piece: list[Callable[[str, float, float], None]] = []
        device = engine.target.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: ThreadPoolExecutor | None = None
        self._left_to_rest, self._rest = 0, _REST
        self._compared: deque[float] = deque(maxlen=_MOST_JUDGED)  # what updates took from decoding, seconds
        self._is_off = False
        self._reset()

    def _reset(self) -> None:
        self._most_seqs = self._num_alone = 0
        self._cores: IdleCores | None = None
        self._has_room = self._stream is not None  # else it is asked for in the tail
        self._comparison = StepComparison()
        self._lesson: Lesson | None = None
        self._is_over = False
        self._piece: Future[bool] | None = None
        self._started_s = 0.0
        self._num_unjudged = 0
        self.taken_s = 0.0  # the first piece's too

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """A rollout that teaches takes place within; whatever happens, nothing runs on behind it."""
        self._reset()
        if self._is_off or self._left_to_rest:
            self._left_to_rest = max(self._left_to_rest - 1, 0)
            yield
            return
        self._engine.on_step.append(self._observe)
        try:
            yield
        except BaseException:
            self._give_up()
            raise
        finally:
            self._engine.on_step.remove(self._observe)

    def take_lesson(self) -> Lesson | None:
        """What was begun beside the last rollout, to be finished by the learner; None where nothing was."""
        lesson, self._lesson = self._lesson, None
        if lesson is not None:
            lesson.free_s = max(lesson.learn_s - self.taken_s, 0.0)
        return lesson

    def _give_up(self) -> None:
        """The rollout has broken off: its rollouts teach later."""
        if self._piece is not None:
            concurrent.futures.wait([self._piece])
        lesson, self._piece, self._engine.is_alone = self.take_lesson(), None, True
        if lesson is not None:
            self._learner.put_back(lesson)

    # -- beside the steps ----------------------------------------------------------------------------

    def _observe(self, record: StepRecord) -> None:
        self._most_seqs = max(self._most_seqs, record.num_seqs + record.num_waiting)
        self._comparison.observe(record, is_beside=self._piece is not None)
        is_last = not self._engine.scheduler.has_work
        if self._piece is None:
            self._num_alone += 1
            if not is_last and self._may_begin(record):
                self._begin_piece()
        elif is_last or self._piece.done():  # while the weights are still those of the rollout
            self._end_piece(self._piece)

    def _may_begin(self, record: StepRecord) -> bool:
        is_tail = record.num_waiting == 0 and record.num_seqs <= _TAIL * self._most_seqs
        if self._is_over or self._learner.update_s is None or not is_tail:
            self._num_alone = 0
            return False
        self._has_room = self._has_room or self._find_room()
        return self._has_room and self._num_alone >= _STEPS_BETWEEN

    def _find_room(self) -> bool:
        if self._cores is None:
            self._cores = IdleCores()
        suffice = self._cores.suffice
        self._is_over = suffice is False
        return bool(suffice)

    def _begin_piece(self) -> None:
        if self._lesson is None:
            self._lesson = self._learner.begin()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fastgrpo-learner")
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._engine.is_alone = False
        self._started_s = time.perf_counter()
        self._piece = self._pool.submit(self._run_piece, self._lesson)

    def _run_piece(self, lesson: Lesson) -> bool:
        if self._stream is None:
            return lesson.advance()
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            is_done = lesson.advance()
            self._stream.synchronize()
        return is_done

    def _end_piece(self, piece: Future[bool]) -> None:
        """Wait for a piece, if need be, and hear what it has come to."""
        waited_from = time.perf_counter()
        concurrent.futures.wait([piece])
        ended_s = time.perf_counter()
        self._piece, self._num_alone, self._engine.is_alone = None, 0, True
        assert self._lesson is not None
        try:
            self._is_over = not piece.result()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._is_over = self._is_off = True
            logger.warning("draft learning beside decoding stays off: there is no memory for both (%s)", error)
        for listener in self.on_piece:
            listener(BESIDE, self._started_s, ended_s)
        self._charge(self._comparison.take_extra_s(), ended_s - waited_from)

    def _charge(self, extra_s: float | None, waited_s: float) -> None:
        assert self._lesson is not None and self._learner.update_s is not None
        if extra_s is None:
            self._num_unjudged += 1
            self._is_over = self._is_over or self._num_unjudged >= _MOST_UNJUDGED
            self.taken_s += self._learner.update_s + waited_s
            return
        self._num_unjudged = 0
        self.taken_s += max(extra_s + waited_s, 0.0)
        if self._lesson.updates_s:  # the first piece is none
            self._compared.append(extra_s + waited_s)
            self._judge()

    def _judge(self) -> None:
        assert self._learner.update_s is not None
        if len(self._compared) < _LEAST_JUDGED:
            return
        taken_s = statistics.median(self._compared)
        if taken_s <= _MOST_TAKEN * self._learner.update_s:
            self._rest = _REST
            return
        if taken_s > self._learner.update_s:
            self._rest = min(_FRUITLESS * self._rest, _LONGEST_REST)
        self._is_over, self._left_to_rest, self._rest = True, self._rest, min(2 * self._rest, _LONGEST_REST)
        self._compared.clear()
        logger.info(
            "draft learning goes on between rollouts: beside decoding an update takes %.3f s from it, by itself %.3f s",
            taken_s,
            self._learner.update_s,
        )
