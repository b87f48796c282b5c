"""What the parts of a step cost, followed step by step: extended Kalman filters over the logarithms of a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.types import SpeculationPlan, StepRecord

READ_PER_DRAFT = 2  # tokens of each sequence that the profiler's drafts read
_DOUBT = 0.5  # nats; what a price may be off by, before anything was measured
_ALIKE = 0.9  # correlation of the errors of two points of the grid an octave apart: a slow machine is slow everywhere
_DRIFT = 0.003  # nats; what a price changes by from step to step
_OUTLIER = 2.5  # standard deviations; more is taken for this much
_SURPRISE_RATE, _MOST_SURPRISE = 0.25, 1.5  # of the running mean of such deviations; beyond, the prices are doubted
_DOUBT_AGAIN = 0.25  # share of the first doubt's variance that comes back then
_MUCH_READING, _DEAREST_READING = 0.5, 2.0  # over drafting, where reading is priced; over what the profile says
_LEAST_S = 1e-12  # of a price that the profile gives as 0
IDLE_S = 1e-4  # what a step may take where a draft would be made, though none is

Vector = NDArray[np.float64]


class PriceFilter:
    """Positive prices whose sum, each times what was bought, is what was measured.

    The blame for an error goes where the doubt is. Single outliers move little; when several measurements agree that
    the prices are wrong, they are doubted anew, and soon right.

    Args:
        prices: what is believed to begin with.
        noise: nats that measurements scatter by.
        alike: correlation of the prices' errors; None takes them for independent.
    """

    def __init__(self, prices: Sequence[float], *, noise: float, alike: Vector | None = None) -> None:
        self.prices: Vector = np.maximum(np.array(prices, dtype=np.float64), _LEAST_S)
        self.noise = noise
        self._prior = _DOUBT**2 * (np.eye(len(self.prices)) if alike is None else alike)
        self.variance = self._prior.copy()
        self._surprise = 0.0

    def observe(self, bought: Vector, measured_s: float, num_steps: int = 1) -> None:
        """Learn from one measurement, the mean of so many steps in a row, which scatters as one does."""
        spent = self.prices * bought
        predicted_s = float(spent.sum())
        if predicted_s <= 0 or measured_s <= 0:
            return
        shares = spent / predicted_s
        self.variance += num_steps * (_DRIFT / _DOUBT) ** 2 * self._prior
        spread = self.variance @ shares
        deviation = float(np.sqrt(shares @ spread + self.noise**2))
        scaled = min(max(float(np.log(measured_s / predicted_s)) / deviation, -_OUTLIER), _OUTLIER)
        self.prices *= np.exp(spread * (scaled / deviation))
        self.variance -= np.outer(spread, spread / deviation**2)
        self._surprise += _SURPRISE_RATE * (scaled - self._surprise)
        if abs(self._surprise) > _MOST_SURPRISE:
            self.variance += _DOUBT_AGAIN * self._prior
            self._surprise = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "prices": self.prices.tolist(),
            "variance": self.variance.tolist(),
            "surprise": self._surprise,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` described."""
        self.prices, self.variance = np.array(state["prices"]), np.array(state["variance"])
        self._surprise = float(state["surprise"])


class StepCosts:
    """A profile that follows real steps: of forwards, by tokens and cached positions; of drafts; of all the rest.

    Rollouts in which contexts grow while sequences finish tell tokens and positions apart. More tokens never take
    less. Plans are priced many at a time, as arrays.

    Args:
        start: what was measured before, perhaps long ago.
    """

    def __init__(self, start: HardwareProfile) -> None:
        self.start = start
        self._grid = np.array(start.num_tokens, dtype=np.float64)
        octaves = np.log2(self._grid)
        alike = np.eye(len(octaves) + 1)  # the last is the price of a cached position
        alike[:-1, :-1] = _ALIKE ** np.abs(octaves[:, None] - octaves)
        self._target = PriceFilter((*start.target_s, start.read_s), noise=0.05, alike=alike)
        self._draft = PriceFilter((IDLE_S, 1.0, 1.0), noise=0.1)  # idle; times what starts and levels took
        self._reading = PriceFilter((1.0,), noise=0.3)  # times what reading took
        self._rest = PriceFilter((start.fixed_s, start.walk_s, start.sample_s), noise=0.1)
        self._levels: Vector = np.array(start.draft_s)
        self._starts: Vector = np.array(start.draft_start_s or start.draft_s)

    @property
    def profile(self) -> HardwareProfile:
        """The profile with the target's times as they are now."""
        *target_s, read_s = self._target.prices.tolist()
        return replace(self.start, target_s=tuple(target_s), read_s=read_s)

    # -- predictions, in seconds -----------------------------------------------------------------------------

    def predict_target_s(self, num_tokens: Vector | float, num_read: float) -> Vector:
        prices = self._target.prices
        return _interpolate(num_tokens, self._grid, prices[:-1]) + prices[-1] * num_read

    def predict_draft_s(self, depths: Vector | float, widths: Vector | float, num_seqs: int) -> Vector:
        """Of drafts that read what was just accepted; depth 0 is none."""
        idle_s, start, level = self._draft.prices
        starts_s, levels_s = self._price_drafts(depths, widths, num_seqs)
        return idle_s + start * starts_s + level * levels_s

    def predict_reading_s(self, num_unread: float, num_seqs: int) -> float:
        """Of what no draft has read yet, beyond the few tokens that every draft reads."""
        return min(float(self._reading.prices[0]), _DEAREST_READING) * self._price_reading(num_unread, num_seqs)

    def predict_rest_s(self, depths: Vector | float, num_emitted: Vector | float) -> Vector:
        """Of a step beside its forward and its draft: walks of so many levels at most, tokens sampled and kept."""
        fixed_s, level_s, sample_s = self._rest.prices
        return np.asarray(fixed_s + level_s * depths + sample_s * num_emitted)

    @property
    def sample_s(self) -> float:
        """Seconds for one more emitted token."""
        return float(self._rest.prices[2])

    # -- learning --------------------------------------------------------------------------------------------

    def observe(self, *records: StepRecord) -> None:
        """Learn from steps of one plan with as many live sequences, at once: from what they took in the mean."""
        plan, num_seqs, num_steps = records[0].plan, records[0].num_seqs, len(records)

        def mean(name: str) -> float:
            return math.fsum(getattr(record, name) for record in records) / num_steps

        num_tokens = mean("num_tokens")
        bought = np.zeros(len(self._grid) + 1)
        right = min(max(int(np.searchsorted(self._grid, num_tokens)), 1), len(self._grid) - 1)
        left_at, right_at = self._grid[right - 1], self._grid[right]
        weight = (num_tokens - left_at) / (right_at - left_at)
        bought[right - 1], bought[right], bought[-1] = max(1 - weight, 0.0), weight, mean("num_read")
        self._target.observe(bought, mean("target_s"), num_steps)
        prices = self._target.prices
        prices[:-1] = np.exp(_level(np.log(prices[:-1]), 1 / np.diag(self._target.variance)[:-1]))
        self._rest.observe(np.array([1.0, plan.depth, mean("num_emitted")]), mean("verify_s"), num_steps)
        if plan.is_plain or all(record.offered for record in records):  # else it says what neither takes
            self._observe_drafts(plan, num_seqs, mean("num_unread"), mean("draft_s"), num_steps)

    def _observe_drafts(
        self, plan: SpeculationPlan, num_seqs: int, num_unread: float, draft_s: float, num_steps: int
    ) -> None:
        starts_s, levels_s = self._price_drafts(plan.depth, plan.width, num_seqs)
        reading_s = 0.0 if plan.is_plain else self.predict_reading_s(num_unread, num_seqs)
        bought = np.array([1.0, float(starts_s), float(levels_s)])
        drafting_s = float(self._draft.prices @ bought)
        if reading_s <= _MUCH_READING * drafting_s:
            self._draft.observe(bought, draft_s - reading_s, num_steps)
        else:  # one large step says little of drafts
            read = np.array([self._price_reading(num_unread, num_seqs)])
            self._reading.observe(read, draft_s - drafting_s, num_steps)

    def _price_drafts(self, depths: Vector | float, widths: Vector | float, num_seqs: int) -> tuple[Vector, Vector]:
        """Seconds of a draft's start and of its further levels, by the profile it began with."""
        depths, widths = np.asarray(depths, dtype=np.float64), np.asarray(widths, dtype=np.float64)
        if not len(self._levels):
            return np.zeros_like(depths), np.zeros_like(depths)
        starts_s = _interpolate(float(num_seqs), self._grid, self._starts)
        levels_s = _interpolate(num_seqs * widths, self._grid, self._levels)
        return np.where(depths > 0, starts_s, 0.0), np.maximum(depths - 1, 0.0) * levels_s

    def _price_reading(self, num_unread: float, num_seqs: int) -> float:
        return self.start.draft_read_s * max(num_unread - READ_PER_DRAFT * num_seqs, 0)

    def state_dict(self) -> dict[str, Any]:
        filters = {"target": self._target, "draft": self._draft, "reading": self._reading, "rest": self._rest}
        return {"start": asdict(self.start)} | {name: each.state_dict() for name, each in filters.items()}

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
        return costs


def shape_arrays(plans: Sequence[SpeculationPlan]) -> tuple[Vector, Vector, Vector]:
    """Depths, widths and draft tokens of plans, as `StepCosts` prices them."""
    depths, widths, nodes = np.array([(p.depth, p.width, p.num_draft_tokens) for p in plans], dtype=np.float64).T
    return depths, widths, nodes


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
