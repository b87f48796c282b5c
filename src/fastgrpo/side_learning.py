"""Draft learning beside the tail of a rollout, while cores or a GPU idle; kept up only where measured to pay."""

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

_TAIL = 0.5  # the tail begins when this share of the sequences still runs: the others are there to learn from
_STEPS_BETWEEN = 3  # steps without a piece between two pieces, to compare with
_KEPT_STEPS = 8  # steps without a piece that are remembered of each plan and number of sequences
_ALIKE = 1.3  # two steps of one plan are alike if their numbers of sequences differ by no more than this factor
_MOST_TAKEN = 0.5  # most seconds an update may take from decoding, as a share of what it takes alone
_LEAST_JUDGED, _MOST_JUDGED = 2, 8  # last updates whose median is judged by: machines are noisy
_MOST_UNJUDGED = 3  # pieces in a row without a like step to compare with, after which the lesson ends
_REST, _LONGEST_REST = 8, 256  # rollouts without learning beside them, after it did not pay
_FRUITLESS = 8  # times as many rollouts, where an update took more from decoding than it takes alone


class StepComparison:
    """How much longer steps take with a piece of a lesson beside them: they are compared with like steps without.

    Steps are alike if they have the same plan and about as many sequences. Those that are not steady are left out.
    """

    def __init__(self) -> None:
        self._alone: dict[SpeculationPlan, dict[int, deque[float]]] = defaultdict(dict)  # s, by number of sequences
        self._extra_s: list[float] = []  # of the steps that could be compared
        self._num_steps = 0  # with a piece beside them, comparable or not

    def observe(self, record: StepRecord, *, is_beside: bool) -> None:
        """Take in a step's time.

        Args:
            is_beside: whether a piece of a lesson ran beside it.
        """
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
        """Median seconds of the steps alone that are most like this one; None where none is alike."""
        alike = self._alone[record.plan]
        nearest = min(alike, key=lambda num_seqs: abs(num_seqs - record.num_seqs), default=None)
        if nearest is None or not 1 / _ALIKE <= nearest / record.num_seqs <= _ALIKE:
            return None
        return statistics.median(alike[nearest])

    def take_extra_s(self) -> float | None:
        """Seconds that steps since the last call took longer for pieces beside them; None where none was comparable."""
        extra_s, num_steps = self._extra_s, self._num_steps
        self._extra_s, self._num_steps = [], 0
        return sum(extra_s) * num_steps / len(extra_s) if extra_s else None


class SideLearning:
    """Lessons in a thread of their own, on a GPU in a stream of their own, while few sequences are left to decode.

    On a CPU a lesson begins only if a core, or most of one, is idle for each of PyTorch's threads. On any device the
    time that updates take from decoding is measured. Where it is more than half of what they take alone, the lesson
    ends, and the next rollouts go without: twice as many each time, and many more where an update cost decoding more
    than it takes alone.

    Args:
        learner: of the engine's drafter.

    Attributes:
        on_piece: functions called after each piece of a lesson with `BESIDE` and the times at which it began and ended,
            by `time.perf_counter`.
        taken_s: seconds that the lesson of the last rollout took from decoding; where no step was comparable, the
            seconds that its updates take alone.
    """

    def __init__(self, learner: Learner, engine: Engine) -> None:
        self._learner, self._engine = learner, engine
        self.on_piece: list[Callable[[str, float, float], None]] = []
        device = engine.target.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: ThreadPoolExecutor | None = None
        self._left_to_rest, self._rest = 0, _REST  # rollouts: still to go without, and to go without next time
        self._compared: deque[float] = deque(maxlen=_MOST_JUDGED)  # seconds that updates took from decoding
        self._is_off = False  # for good, for lack of memory
        self._reset()

    def _reset(self) -> None:
        """A rollout starts."""
        self._most_seqs = self._num_alone = 0
        self._cores: IdleCores | None = None
        self._has_room = self._stream is not None  # a CPU's idle cores are looked for in the tail
        self._comparison = StepComparison()
        self._lesson: Lesson | None = None
        self._is_over = False  # no further piece in this rollout
        self._piece: Future[bool] | None = None
        self._started_s = 0.0
        self._num_unjudged = 0
        self.taken_s = 0.0

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Wraps a rollout that is to be learnt from; nothing runs on after it, whatever happens."""
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
        """The lesson begun beside the last rollout, for the learner to finish; None where none was."""
        lesson, self._lesson = self._lesson, None
        if lesson is not None:
            lesson.free_s = max(lesson.learn_s - self.taken_s, 0.0)
        return lesson

    def _give_up(self) -> None:
        """After a rollout that broke off: what finished in it is learnt later."""
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
        elif is_last or self._piece.done():  # the last step must wait: after the rollout, weights change
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
        """Wait for a piece to end, and take in its result and its cost."""
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
        """Add up what a piece took from decoding: the extra seconds of steps, and those waited at the end."""
        assert self._lesson is not None and self._learner.update_s is not None
        if extra_s is None:
            self._num_unjudged += 1
            self._is_over = self._is_over or self._num_unjudged >= _MOST_UNJUDGED
            self.taken_s += self._learner.update_s + waited_s
            return
        self._num_unjudged = 0
        self.taken_s += max(extra_s + waited_s, 0.0)
        if self._lesson.updates_s:  # the first piece judges the head, and is no update
            self._compared.append(extra_s + waited_s)
            self._judge()

    def _judge(self) -> None:
        """End the lesson and rest for some rollouts, where updates take too much from decoding."""
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
            "draft learning goes on between rollouts: an update costs decoding %.3f s and takes %.3f s alone",
            taken_s,
            self._learner.update_s,
        )
