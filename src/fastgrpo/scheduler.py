"""Continuous batching: who runs, who waits. Touches no tensor; a running sequence's slot is its place in the list."""

from __future__ import annotations

from collections import Counter, deque

from fastgrpo.types import Sequence


class Scheduler:
    """First come, first served over `max_num_seqs` slots; every sequence ends on its own limits."""

    def __init__(self, max_num_seqs: int) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._num_waiting_siblings: Counter[tuple[int, ...]] = Counter()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._num_waiting_siblings[sequence.group_key] += 1

    def admit(self) -> list[Sequence]:
        """Move waiting sequences behind the running ones while slots are free; returns those moved."""
        admitted = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            self._num_waiting_siblings[sequence.group_key] -= 1
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def has_waiting_sibling(self, sequence: Sequence) -> bool:
        return self._num_waiting_siblings[sequence.group_key] > 0

    def remove(self, slot: int) -> Sequence:
        """Take a finished sequence out; the last running one moves into its slot."""
        sequence = self.running[slot]
        last = self.running.pop()
        if last is not sequence:
            self.running[slot] = last
        return sequence

    def abort(self) -> None:
        """Forget everything, as after an interrupted rollout."""
        self.waiting.clear()
        self.running.clear()
        self._num_waiting_siblings.clear()

    def check(self) -> None:
        """Assert that nobody is lost: slots within bounds, nobody finished still runs, nobody waits for a free slot."""
        assert len(self.running) <= self.max_num_seqs, f"{len(self.running)} run in {self.max_num_seqs} slots"
        assert all(s.finish_reason is None for s in self.running), "a finished sequence still runs"
        ids = [s.request_id for s in (*self.running, *self.waiting)]
        assert len(set(ids)) == len(ids), f"a request stands twice in {ids}"
        waiting = Counter(s.group_key for s in self.waiting)
        assert waiting == +self._num_waiting_siblings, "sibling counts differ from the queue"
