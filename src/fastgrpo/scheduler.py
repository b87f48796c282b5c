"""Continuous batching: who runs, who waits. Touches no tensor; a running sequence's slot is its place in the list."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from fastgrpo.lengths import LengthPredictor
from fastgrpo.types import Sequence


class Scheduler:
    """Continuous batching over `max_num_seqs` slots; every sequence ends on its own limits.

    Where not all waiting sequences can be admitted, those expected to be longest go first, so that no long one begins
    when the others end. The order of arrival decides between equals, while no length is known yet, and where the whole
    queue fits into the free slots and the memory. Siblings stand together, so that their prompt is kept only for a
    short while. A preempted sequence waits at the front and keeps the tokens it has emitted.

    Args:
        max_num_seqs: slots, at least 1.
        lengths: predicts completion lengths; learns the length of every sequence that is removed.

    Raises:
        ValueError: there is no slot, or no whole number of them.
    """

    def __init__(self, max_num_seqs: int, lengths: LengthPredictor | None = None) -> None:
        if not hasattr(max_num_seqs, "__index__"):
            raise ValueError(f"max_num_seqs must be an integer, got {max_num_seqs!r}")
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.lengths = lengths or LengthPredictor()
        self._has_arrivals = False  # since the queue was last put in order
        self._num_waiting_siblings: Counter[tuple[int, ...]] = Counter()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._has_arrivals = True
        self._num_waiting_siblings[sequence.group_key] += 1

    def admit(
        self,
        may_enter: Callable[[Sequence], bool] = lambda sequence: True,
        may_all_enter: Callable[[], bool] = lambda: True,
    ) -> list[Sequence]:
        """Move waiting sequences behind the running ones while slots are free; returns those moved.

        Args:
            may_enter: whether a sequence may run, asked of each in turn; the first refused and all behind it wait on.
            may_all_enter: whether `may_enter` would refuse nobody; if it would, the queue is put in order first.
        """
        admitted = []
        num_free = self.max_num_seqs - len(self.running)
        if self._has_arrivals and num_free > 0 and (num_free < len(self.waiting) or not may_all_enter()):
            self._put_longest_first()
        while self.waiting and len(self.running) < self.max_num_seqs and may_enter(self.waiting[0]):
            sequence = self.waiting.popleft()
            self._num_waiting_siblings[sequence.group_key] -= 1
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _put_longest_first(self) -> None:
        """Order the queue, once after arrivals only: the first completions to end are short, and would mislead."""
        self._has_arrivals = False
        if not self.lengths.num_prompts:
            return
        begun = [sequence for sequence in self.waiting if sequence.token_ids]
        groups: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in self.waiting:
            if not sequence.token_ids:
                groups.setdefault(sequence.group_key, []).append(sequence)
        longest_first = sorted(groups.values(), key=self._predict_length, reverse=True)  # stable: ties do not move
        self.waiting = deque((*begun, *(sequence for group in longest_first for sequence in group)))

    def _predict_length(self, siblings: list[Sequence]) -> float:
        return min(self.lengths.predict(siblings[0].prompt_ids), max(sequence.max_tokens for sequence in siblings))

    def has_waiting_sibling(self, sequence: Sequence) -> bool:
        return self._num_waiting_siblings[sequence.group_key] > 0

    def remove(self, slot: int) -> Sequence:
        """Take a finished sequence out and learn its length; the last running one moves into its slot."""
        sequence = self._take_out(slot)
        self.lengths.observe(sequence.prompt_ids, len(sequence.token_ids))
        return sequence

    def preempt(self, slot: int) -> Sequence:
        """Move a running sequence back to the front of the queue; the last running one takes its slot."""
        sequence = self._take_out(slot)
        self.waiting.appendleft(sequence)
        self._num_waiting_siblings[sequence.group_key] += 1
        return sequence

    def _take_out(self, slot: int) -> Sequence:
        sequence = self.running[slot]
        last = self.running.pop()
        if last is not sequence:
            self.running[slot] = last
        return sequence

    def abort(self) -> None:
        """Drop all sequences, as after an interrupted rollout; known lengths stay."""
        self.waiting.clear()
        self._has_arrivals = False
        self.running.clear()
        self._num_waiting_siblings.clear()

    def check(self) -> None:
        """Assert the conservation laws: slots within bounds, no finished sequence runs or waits, none stands twice."""
        assert len(self.running) <= self.max_num_seqs, f"{len(self.running)} run in {self.max_num_seqs} slots"
        assert all(s.finish_reason is None for s in self.running), "a finished sequence still runs"
        assert all(s.finish_reason is None for s in self.waiting), "a finished sequence waits"
        ids = [s.request_id for s in (*self.running, *self.waiting)]
        assert len(set(ids)) == len(ids), f"a request stands twice in {ids}"
        waiting = Counter(s.group_key for s in self.waiting)
        assert waiting == +self._num_waiting_siblings, "sibling counts differ from the queue"
