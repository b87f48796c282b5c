"""When a plan is worth recording, where each is recorded before it is fast."""

from __future__ import annotations

from collections import defaultdict

RECORDING_S = 0.08  # what a step takes longer in which drafts are recorded, to begin with
_RATE = 0.25  # that what is seen of it changes it by
_LEAST, _MOST = 0.25, 2.0  # of it, that are seen: other work beside a step takes less, kernels that are compiled more


class RecordingPrice:
    """A better plan is taken once the present one has lost, with about so many live sequences, what a recording takes.

    So one rents skis until the rent has come to the price of a pair: whatever comes, it costs at most twice what the
    better choice would have. While sequences finish fast nothing is recorded for a few steps.

    Args:
        recording_s: price to begin with; 0 where nothing is recorded.
    """

    def __init__(self, recording_s: float = RECORDING_S) -> None:
        self.recording_s = recording_s
        self._lost_s: defaultdict[int, float] = defaultdict(float)  # by octave of live sequences, in this rollout

    def begin(self) -> None:
        """A rollout starts, with nothing recorded."""
        self._lost_s.clear()

    def find_wait_s(self, num_seqs: int) -> float:
        """What the present plan has still to lose; 0 and less where it is time for the better one."""
        return self.recording_s - self._lost_s[num_seqs.bit_length()]

    def lose(self, num_seqs: int, lost_s: float) -> None:
        """A step took so much longer than the better plan's would have."""
        self._lost_s[num_seqs.bit_length()] += lost_s

    def pay(self, num_seqs: int) -> None:
        """The better plan is taken."""
        self._lost_s[num_seqs.bit_length()] = 0.0

    def observe(self, excess_s: float) -> None:
        """A step in which drafts were recorded took so much longer than one like it will."""
        if excess_s >= _LEAST * self.recording_s:
            self.recording_s += _RATE * (min(excess_s, _MOST * self.recording_s) - self.recording_s)
