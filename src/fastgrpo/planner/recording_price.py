"""When a plan is worth recording, where each is recorded before it is fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

RECORDING_S = 0.08  # what a step takes longer in which drafts are recorded, to begin with
_RATE = 0.25  # that what is seen of it changes it by
_CLEARLY_WORTH = 1.5  # times what it takes, that a recording should have saved
_SHARE_RATE = 0.5  # that what became of a plan changes the share by, in which it was recorded
_OFTEN = 0.5  # such a share: below, a plan that did not pay cost nothing
_LEAST_PATIENCE, _MOST_PATIENCE = 0.25, 16.0
_LEAST, _MOST = 0.25, 2.0  # of it, that are seen: other work beside a step takes less, kernels that are compiled more


class RecordingPrice:
    """A better plan is taken once the present one has lost, with about so many live sequences, what a recording takes.

    So one rents skis until the rent has come to the price of a pair: whatever comes, it costs at most twice what the
    better choice would have. While sequences finish fast nothing is recorded for a few steps.

    Rollouts resemble each other: where a recording would clearly have paid in the last one, had it been there from the
    first step on, half as much is lost before it is made in the next; where one was made and did not, twice as much.
    Recordings may outlive a rollout: where the better plan was recorded already when it was taken, less is lost before
    it is taken the next time, and soon next to nothing.

    Args:
        recording_s: price to begin with; 0 where nothing is recorded.

    Attributes:
        patience: times the price, that is lost before; by octave of live sequences, as all that is counted here.
        share: how often the better plan had to be recorded when it was taken, of late.
    """

    def __init__(self, recording_s: float = RECORDING_S) -> None:
        self.recording_s = recording_s
        self.patience: defaultdict[int, float] = defaultdict(partial(float, 1.0))  # can be pickled
        self.share: defaultdict[int, float] = defaultdict(partial(float, 1.0))
        self._lost_s: defaultdict[int, float] = defaultdict(float)  # in this rollout, as the next two
        self._worth_s: defaultdict[int, float] = defaultdict(float)  # what was lost without, and saved with a recording
        self._paid: list[int] = []  # where the better plan was taken, the last one last
        self._is_open = False  # nothing was heard of it yet

    def begin(self) -> None:
        """A rollout starts."""
        for octave in {*self._worth_s, *self._paid}:
            if self._worth_s[octave] > _CLEARLY_WORTH * self.recording_s:
                self.patience[octave] = max(self.patience[octave] / 2, _LEAST_PATIENCE)
            elif octave in self._paid and self.share[octave] >= _OFTEN:
                self.patience[octave] = min(2 * self.patience[octave], _MOST_PATIENCE)
        self._lost_s.clear()
        self._worth_s.clear()
        self._paid.clear()
        self._is_open = False

    def find_wait_s(self, num_seqs: int) -> float:
        """What the present plan has still to lose; 0 and less where it is time for the better one."""
        octave = num_seqs.bit_length()
        return self.patience[octave] * self.share[octave] * self.recording_s - self._lost_s[octave]

    def lose(self, num_seqs: int, lost_s: float) -> None:
        """A step took so much longer than the better plan's would have."""
        self._lost_s[num_seqs.bit_length()] += lost_s
        self._worth_s[num_seqs.bit_length()] += lost_s

    def pay(self, num_seqs: int) -> None:
        """The better plan is taken."""
        self._lost_s[num_seqs.bit_length()] = 0.0
        self._paid.append(num_seqs.bit_length())
        self._is_open = True

    def settle(self, *, was_recorded: bool) -> None:
        """The first step with the better plan was made: whether it had to be recorded for that."""
        if self._is_open:
            octave, self._is_open = self._paid[-1], False
            self.share[octave] += _SHARE_RATE * (was_recorded - self.share[octave])

    def save(self, saved_s: float) -> None:
        """A step with the plan that was paid for last took so much less than plain decoding of what it emitted."""
        if self._paid:
            self._worth_s[self._paid[-1]] += saved_s

    def observe(self, excess_s: float) -> None:
        """A step in which drafts were recorded took so much longer than one like it will."""
        if excess_s >= _LEAST * self.recording_s:
            self.recording_s += _RATE * (min(excess_s, _MOST * self.recording_s) - self.recording_s)

    def state_dict(self) -> dict[str, Any]:
        """What the next rollout begins with; how much was lost while waiting ends with this one."""
        return {
            "recording_s": self.recording_s,
            "patience": list(self.patience.items()),
            "recorded_share": list(self.share.items()),
            "worth_s": list(self._worth_s.items()),
            "paid": list(self._paid),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RecordingPrice:
        """The price that `state_dict` described."""
        price = cls(float(state["recording_s"]))
        price.patience.update({int(octave): float(each) for octave, each in state.get("patience", ())})
        price.share.update({int(octave): float(each) for octave, each in state.get("recorded_share", ())})
        price._worth_s.update({int(octave): float(each) for octave, each in state.get("worth_s", ())})
        price._paid = [int(octave) for octave in state.get("paid", ())]  # older states have not the last four
        return price
