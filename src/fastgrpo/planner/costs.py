"""What the parts of a step cost, followed step by step from a profile on."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fastgrpo.planner.price_filter import PriceFilter, Vector
from fastgrpo.planner.profile import LEAST_S, MOST_S, HardwareProfile
from fastgrpo.types import SpeculationPlan, StepRecord

READ_PER_DRAFT = 2  # tokens of each sequence that the profiler's drafts read
_ALIKE = 0.9  # correlation of the errors of two points of the grid an octave apart: a slow machine is slow everywhere
_MUCH_READING, _DEAREST_READING = 0.5, 2.0  # over drafting, where reading is priced; over what the profile says
_HELD_UP = 1.5  # times the median: what took longer was held up
IDLE_S = 1e-4  # what a step may take where a draft would be made, though none is


class StepCosts:
    """A profile that follows real steps: of forwards, by tokens and cached positions; of drafts; of all the rest.

    Rollouts in which contexts grow while sequences finish tell tokens and positions apart. More tokens never take
    less. Plans are priced many at a time, as arrays. Until something was drafted, drafts are thought to be as much
    dearer than the profile says as forwards are, which is so where a machine was busy while it was measured.

    Args:
        start: what was measured before, perhaps long ago.
    """

    def __init__(self, start: HardwareProfile) -> None:
        self.start = start
        self._grid = np.array(start.num_tokens, dtype=np.float64)
        octaves = np.log2(self._grid)
        alike = np.eye(len(octaves) + 1)  # the last is the price of a cached position
        alike[:-1, :-1] = _ALIKE ** np.abs(octaves[:, None] - octaves)
        self._target = PriceFilter((*start.target_s, start.read_s), noise=0.05, alike=alike, has_tempo=True)
        self._draft = PriceFilter((IDLE_S, 1.0, 1.0), noise=0.1)  # idle; times what starts and levels took
        self._reading = PriceFilter((1.0,), noise=0.3)  # times what reading took
        self._rest = PriceFilter((start.fixed_s, start.walk_s, start.sample_s), noise=0.1)
        self._levels: Vector = np.array(start.draft_s)
        self._starts: Vector = np.array(start.draft_start_s or start.draft_s)
        self._draft_scale, self._has_drafted = 1.0, False

    @property
    def profile(self) -> HardwareProfile:
        """The profile with the target's times as they are as a rule now."""
        *target_s, read_s = np.clip(self._target.prices, LEAST_S, MOST_S).tolist()
        return replace(self.start, target_s=tuple(target_s), read_s=read_s)

    @property
    def tempo(self) -> float:
        """What everything takes just now over what it takes as a rule; plans compare the same at any."""
        return self._target.tempo

    # -- predictions, in seconds -----------------------------------------------------------------------------

    def predict_target_s(self, num_tokens: Vector | float, num_read: float) -> Vector:
        prices = self._target.prices
        return self.tempo * (_interpolate(num_tokens, self._grid, prices[:-1]) + prices[-1] * num_read)

    def find_target_doubt(self, num_tokens: float) -> float:
        """What the price of a forward of so many tokens may be off by: the standard deviation of its logarithm."""
        spent = self._target.prices * self._weigh_points(num_tokens)
        shares = spent / spent.sum()
        return math.sqrt(max(float(shares @ self._target.variance[:-1, :-1] @ shares), 0.0))

    def predict_draft_s(self, depths: Vector | float, widths: Vector | float, num_seqs: int) -> Vector:
        """Of drafts that read what was just accepted; depth 0 is none."""
        idle_s, start, level = self._draft.prices
        starts_s, levels_s = self._price_drafts(depths, widths, num_seqs)
        return np.asarray(self.tempo * (idle_s + start * starts_s + level * levels_s))

    def predict_reading_s(self, num_unread: float, num_seqs: int) -> float:
        """Of what no draft has read yet, beyond the few tokens that every draft reads."""
        price = min(float(self._reading.prices[0]), _DEAREST_READING)
        return self.tempo * price * self._price_reading(num_unread, num_seqs)

    def predict_rest_s(self, depths: Vector | float, num_emitted: Vector | float) -> Vector:
        """Of a step beside its forward and its draft: walks of so many levels at most, tokens sampled and kept."""
        fixed_s, level_s, sample_s = self._rest.prices
        return np.asarray(self.tempo * (fixed_s + level_s * depths + sample_s * num_emitted))

    @property
    def sample_s(self) -> float:
        """Seconds for one more emitted token."""
        return self.tempo * float(self._rest.prices[2])

    # -- learning --------------------------------------------------------------------------------------------

    def observe(self, *records: StepRecord) -> None:
        """Learn from steps of one plan with as many live sequences (plain: about), at once: what they took in the mean.

        Steps in which a part was held up are left out of it: prices are what a step takes as a rule.
        """
        plan, num_seqs, num_steps = records[0].plan, records[0].num_seqs, len(records)
        self._observe_forwards(records)
        verified = _leave_out_held_up(records, "verify_s", "num_emitted")
        self._rest.observe(
            np.array([1.0, plan.depth, _mean(verified, "num_emitted")]),
            _mean(verified, "verify_s") / self.tempo,
            num_steps,
        )
        if plan.is_plain or all(record.offered for record in records):  # else it says what neither takes
            drafted = _leave_out_held_up(records, "draft_s", "num_seqs")
            draft_s = _mean(drafted, "draft_s") - _mean(drafted, "plan_s")  # decisions are no part of what is decided
            self._observe_drafts(plan, num_seqs, _mean(drafted, "num_unread"), draft_s, num_steps)

    def _observe_forwards(self, records: Sequence[StepRecord]) -> None:
        """The smaller and the larger ones apart: their difference is what says how the time rises."""
        by_size = sorted(records, key=_get_num_tokens)
        middle = len(by_size) // 2 if by_size[0].num_tokens < by_size[-1].num_tokens else 0
        for some in (by_size[:middle], by_size[middle:]):
            if some:
                typical = _leave_out_held_up(some, "target_s", "num_tokens")
                bought = self._weigh_points(_mean(typical, "num_tokens"))
                bought[-1] = _mean(typical, "num_read")
                self._target.observe(bought, _mean(typical, "target_s"), len(some))
        prices = self._target.prices
        weights = 1 / self._target.doubts[:-1]
        prices[:-1] = np.exp(_level(np.log(prices[:-1]), weights))
        if not self._has_drafted:
            self._draft_scale = math.exp(np.average(np.log(prices[:-1] / self.start.target_s), weights=weights))

    def _weigh_points(self, num_tokens: float) -> Vector:
        """[grid + 1] how often such a forward takes what each price says, that of cached positions never."""
        weights = np.zeros(len(self._grid) + 1)
        right = min(max(int(np.searchsorted(self._grid, num_tokens)), 1), len(self._grid) - 1)
        left_at, right_at = self._grid[right - 1], self._grid[right]
        weight = max((num_tokens - left_at) / (right_at - left_at), 0.0)
        if weight > 1:  # beyond the grid the last price alone is to blame
            seconds = float(_interpolate(num_tokens, self._grid, self._target.prices[:-1]))
            weights[right] = seconds / self._target.prices[right]
        else:
            weights[right - 1], weights[right] = 1 - weight, weight
        return weights

    def _observe_drafts(
        self, plan: SpeculationPlan, num_seqs: int, num_unread: float, draft_s: float, num_steps: int
    ) -> None:
        self._has_drafted |= not plan.is_plain
        starts_s, levels_s = self._price_drafts(plan.depth, plan.width, num_seqs)
        reading_s = 0.0 if plan.is_plain else self.predict_reading_s(num_unread, num_seqs)
        bought = np.array([1.0, float(starts_s), float(levels_s)])
        drafting_s = self.tempo * float(self._draft.prices @ bought)
        if reading_s <= _MUCH_READING * drafting_s:
            self._draft.observe(bought, (draft_s - reading_s) / self.tempo, num_steps)
        else:  # one large step says little of drafts
            read = np.array([self._price_reading(num_unread, num_seqs)])
            self._reading.observe(read, (draft_s - drafting_s) / self.tempo, num_steps)

    def _price_drafts(self, depths: Vector | float, widths: Vector | float, num_seqs: int) -> tuple[Vector, Vector]:
        """Seconds of a draft's start and of its further levels, by the profile it began with, scaled."""
        depths, widths = np.asarray(depths, dtype=np.float64), np.asarray(widths, dtype=np.float64)
        if not len(self._levels):
            return np.zeros_like(depths), np.zeros_like(depths)
        starts_s = self._draft_scale * _interpolate(float(num_seqs), self._grid, self._starts)
        levels_s = self._draft_scale * _interpolate(num_seqs * widths, self._grid, self._levels)
        return np.where(depths > 0, starts_s, 0.0), np.maximum(depths - 1, 0.0) * levels_s

    def _price_reading(self, num_unread: float, num_seqs: int) -> float:
        return self._draft_scale * self.start.draft_read_s * max(num_unread - READ_PER_DRAFT * num_seqs, 0)

    def settle(self) -> None:
        """Predict for a machine at its usual tempo from now on."""
        self._target.settle()

    def state_dict(self) -> dict[str, Any]:
        filters = {"target": self._target, "draft": self._draft, "reading": self._reading, "rest": self._rest}
        scale = {"draft_scale": self._draft_scale, "has_drafted": self._has_drafted}
        return {"start": asdict(self.start)} | scale | {name: each.state_dict() for name, each in filters.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepCosts:
        """The costs that `state_dict` described."""
        start: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in state["start"].items()
        }
        costs = cls(HardwareProfile(**start))
        costs._target.restore(state["target"])
        costs._draft.restore(state["draft"])
        costs._reading.restore(state["reading"])
        costs._rest.restore(state["rest"])
        costs._draft_scale = float(state.get("draft_scale", 1.0))  # older states have none
        costs._has_drafted = bool(state.get("has_drafted", True))
        return costs


_get_num_tokens = operator.attrgetter("num_tokens")


def _mean(records: Sequence[StepRecord], name: str) -> float:
    return sum(getattr(record, name) for record in records) / len(records)  # fsum raises at what a broken clock says


def _leave_out_held_up(records: Sequence[StepRecord], part_s: str, size: str) -> list[StepRecord]:
    """Without the steps in which a part took longer than its size and the other steps explain."""
    median_s, usual = (statistics.median_low(getattr(record, name) for record in records) for name in (part_s, size))
    typical = [
        record
        for record in records
        if getattr(record, part_s) <= _HELD_UP * median_s * max(getattr(record, size) / usual, 1.0)
    ]
    return typical or list(records)  # where a clock goes backwards


def _interpolate(at: Vector | float, grid: Vector, values: Vector) -> Vector:
    """Piecewise linear, continued with the last slope (never falling) beyond the grid."""
    inside = np.interp(at, grid, values)
    slope = max((values[-1] - values[-2]) / (grid[-1] - grid[-2]), 0.0)
    return np.asarray(inside + slope * np.maximum(np.asarray(at) - grid[-1], 0.0))


def _level(values: Vector, weights: Vector) -> Vector:
    """The nearest values that never fall, by weighted least squares: neighbours that do are pooled."""
    if (values[1:] >= values[:-1]).all():
        return values
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            before, its_weight, its_count = pools.pop()
            mean = (mean * total + before * its_weight) / (total + its_weight)
            total, count = total + its_weight, count + its_count
        pools.append((mean, total, count))
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])
