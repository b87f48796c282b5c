"""Two drafters at hand: measure both, then draft with the one that pays, or with their trees joined."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext, StatefulDrafter
from fastgrpo.drafters.join import JoinedDraft, count_matched, join_drafts
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan
from fastgrpo.verify import Verdict

_FIRST_TRIALS = 4  # drafting steps of a kind that are all trials
_LEAST_GAP, _MOST_GAP = 16, 128  # drafting steps from one trial to the next; doubled by each that changes nothing
_TIMES_WINDOW, _TRIALS_WINDOW = 10, 16  # values that a running mean remembers
_MARGIN = 1.05  # gain that a change of way must promise; less is within the noise of so many trials


@dataclass
class _Running:
    """The mean of about the last `window` values; None before the first."""

    window: int
    value: float | None = None
    num_values: int = 0

    def observe(self, value: float) -> None:
        self.num_values = min(self.num_values + 1, self.window)
        self.value = value if self.value is None else self.value + (value - self.value) / self.num_values


@dataclass
class _Ledger:
    """What was measured with about so many live sequences."""

    lengths: dict[str, _Running] = field(default_factory=dict)  # tokens a forward of each way, in trials
    draft_s: dict[str, _Running] = field(default_factory=dict)  # seconds of a draft of each way
    rest_s: _Running = field(default_factory=lambda: _Running(_TIMES_WINDOW))  # from a draft's end to its judgement
    num_drafts: int = 0
    next_trial: int = 0  # number of the draft that measures all ways again
    gap: int = _LEAST_GAP
    way: str = ""

    def plan_trial(self, *, is_settled: bool) -> None:
        """After a trial: the next one comes later if this one has changed nothing."""
        if self.num_drafts < _FIRST_TRIALS:
            self.next_trial = self.num_drafts
            return
        self.gap = min(2 * self.gap, _MOST_GAP) if is_settled else _LEAST_GAP
        self.next_trial = self.num_drafts + self.gap

    def rate(self, way: str) -> float:
        """Tokens a second of a sequence; 0 for what was never measured."""
        length, draft_s, rest_s = self.lengths.get(way), self.draft_s.get(way), self.rest_s.value
        if length is None or draft_s is None or rest_s is None or length.value is None or draft_s.value is None:
            return 0.0
        return length.value / (draft_s.value + rest_s)


class Member(StatefulDrafter, Protocol):
    """A drafter that says what it holds of its nodes, and hears what became of them."""

    calibration: Calibration

    def judge(self, draft: Draft, verdict: Verdict) -> None: ...

    def end(self) -> None: ...


class AutoDrafter:
    """Drafts with one of two drafters or with both trees joined, whichever emits more tokens a second.

    In a trial both draft in full and their trees are joined: the tokens that the target then chooses say what
    each would have had accepted alone. Trials become rare where they change nothing. The choice is made for each
    power of two of live sequences, since a draft's cost weighs less beside a larger forward. Nodes are joined by
    calibrated chances. A GPU would have to be waited for to see what a draft takes, and is in trials alone.

    Args:
        first: is used until something better has been measured.
        second: the other one.
    """

    name = "auto"
    JOINED = "joined"

    def __init__(self, first: Member, second: Member) -> None:
        assert first.name != second.name
        self.members = (first, second)
        self.wants_features = first.wants_features or second.wants_features
        self._ledgers: dict[int, _Ledger] = {}
        self._drafts: dict[str, Draft] = {}  # of the step under way
        self._draft_s: dict[str, float] = {}
        self._joined: JoinedDraft | None = None
        self._way = first.name
        self._num_live = 1
        self._drafted_at = 0.0
        self._device = torch.device("cpu")
        self._is_timed = True  # this step
        self._num_drafts: Counter[str] = Counter()  # of each way, in this rollout

    @property
    def way_shares(self) -> dict[str, float]:
        """Share of the drafts of this rollout, or the last one, that came each way; sums to 1."""
        total = sum(self._num_drafts.values())
        return {way: self._num_drafts[way] / total for way in self._ways} if total else {}

    @property
    def position_bytes(self) -> int:
        return sum(member.position_bytes for member in self.members)

    @property
    def _ways(self) -> tuple[str, str, str]:
        return self.members[0].name, self.members[1].name, self.JOINED

    def begin(self) -> None:
        self._num_drafts.clear()
        for member in self.members:
            member.begin()

    def end(self) -> None:
        for member in self.members:
            member.end()

    @property
    def was_replayed(self) -> bool:
        """Whether the last draft took no longer than the next one like it will; who had no part in it has no say."""
        return all(getattr(member, "was_replayed", True) for member in self.members if member.name in self._drafts)

    @property
    def has_recorded(self) -> bool:
        """Whether a member's part of the last draft was recorded."""
        return any(getattr(member, "has_recorded", False) for member in self.members if member.name in self._drafts)

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        for member in self.members:
            member.observe(sequence, num_new_tokens)

    def release(self, slot: int, last_slot: int) -> None:
        for member in self.members:
            member.release(slot, last_slot)

    def count_unread(self, sequences: list[Sequence]) -> int:
        return max(member.count_unread(sequences) for member in self.members)

    def choose_way(self, num_live: int) -> str:
        """What drafts best with about so many live sequences, as far as was measured."""
        ledger = self._find_ledger(num_live)
        best = max(self._ways, key=ledger.rate)
        current = ledger.way or self._ways[0]
        ledger.way = best if ledger.rate(best) > _MARGIN * ledger.rate(current) else current
        return ledger.way

    def _find_ledger(self, num_live: int) -> _Ledger:
        return self._ledgers.setdefault(num_live.bit_length(), _Ledger())

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        self._num_live = len(context.sequences)
        ledger = self._find_ledger(self._num_live)
        is_trial = ledger.num_drafts >= ledger.next_trial
        ledger.num_drafts += 1
        if is_trial:
            ledger.next_trial = ledger.num_drafts + ledger.gap  # should nothing be joined
        self._way = self.JOINED if is_trial else self.choose_way(self._num_live)
        self._device, self._is_timed = context.device, is_trial or context.device.type != "cuda"
        self._drafts, self._draft_s, self._joined = {}, {}, None
        for member in self.members:
            if self._way in (member.name, self.JOINED):
                started = self._read_clock()
                self._drafts[member.name] = member.propose(context, plan)
                self._draft_s[member.name] = self._read_clock() - started
        draft = self._join(plan) if self._way == self.JOINED else self._drafts[self._way]
        self._num_drafts[self._way] += 1
        self._drafted_at = self._read_clock()
        self._is_timed = self._is_timed and self.was_replayed
        return draft

    def _read_clock(self) -> float:
        """Seconds; in a step that is timed, once a GPU has done what it was given."""
        if self._is_timed and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _join(self, plan: SpeculationPlan) -> Draft:
        started = self._read_clock()
        first, second = (self._drafts[member.name] for member in self.members)
        if first.log_chances is None or second.log_chances is None:  # one of them cannot say anything yet
            self._way = self.members[0 if second.log_chances is None else 1].name
            return self._drafts[self._way]
        calibrations = (self.members[0].calibration, self.members[1].calibration)
        self._joined = join_drafts(first, second, calibrations, plan.tree_size, plan.depth)
        self._draft_s[self.JOINED] = sum(self._draft_s.values()) + self._read_clock() - started
        return self._joined.draft

    def judge(self, draft: Draft, verdict: Verdict) -> None:
        ledger = self._find_ledger(self._num_live)
        if self._is_timed:
            ledger.rest_s.observe(self._read_clock() - self._drafted_at)
            for way, draft_s in self._draft_s.items():
                ledger.draft_s.setdefault(way, _Running(_TIMES_WINDOW)).observe(draft_s)
        if self._joined is None:
            own = next(member for member in self.members if member.name == self._way)
            own.judge(draft, verdict)
            return
        width = draft.token_ids.shape[1]  # the first nodes of the joined draft were verified
        for member, chances in zip(self.members, (self._joined.of_first, self._joined.of_second), strict=True):
            member.calibration.observe(draft, verdict, chances[:, :width])
        accepted = {member.name: count_matched(self._drafts[member.name], verdict) for member in self.members}
        for way, count in {**accepted, self.JOINED: verdict.num_accepted}.items():
            ledger.lengths.setdefault(way, _Running(_TRIALS_WINDOW)).observe(1 + float(count.double().mean()))
        before = ledger.way
        ledger.plan_trial(is_settled=self.choose_way(self._num_live) == before)

    def save(self, folder: Path) -> None:
        """Write what the members keep, each in a folder of its own."""
        for member in self.members:
            member.save(folder / member.name)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote; see the members for errors."""
        for member in self.members:
            if (folder / member.name).is_dir():
                member.restore(folder / member.name)
