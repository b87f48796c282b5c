"""How much to speculate: pure decisions from counted facts. No torch, no clock.

`paper` is the rule of FastGRPO (arXiv:2509.21792) with a calibrated capacity. `auto` predicts tokens
per second from a measured cost of tokens per forward and a measured chance of acceptance by depth and
sibling rank, takes the best plan of a grid, plain decoding included, and goes on measuring.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Measured seconds by tokens per forward, for one model on one machine.

    Args:
        num_tokens: increasing grid of tokens per forward.
        target_s: seconds of a target forward (output head included) at each grid point.
        draft_s: seconds of one draft level at each grid point; empty without a neural drafter.
        sample_s: seconds to sample, walk and commit one emitted token.
        fixed_s: seconds of a step that depend on nothing.

    Raises:
        ValueError: fewer than two points, an unordered grid, or a time that is not finite and positive.
    """

    num_tokens: tuple[int, ...]
    target_s: tuple[float, ...]
    draft_s: tuple[float, ...] = ()
    sample_s: float = 0.0
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        grid = self.num_tokens
        if len(grid) < 2 or any(b <= a for a, b in itertools.pairwise(grid)) or grid[0] < 1:
            raise ValueError(f"a profile needs an increasing grid of at least two token counts, got {grid}")
        if len(self.target_s) != len(grid) or len(self.draft_s) not in (0, len(grid)):
            raise ValueError(f"a profile needs one time for each of {len(grid)} points, got {len(self.target_s)}")
        times = (*self.target_s, *self.draft_s)
        if any(not math.isfinite(s) or s <= 0 for s in times) or min(self.sample_s, self.fixed_s) < 0:
            raise ValueError(f"profile times must be finite and positive, got {times}")

    def compute_target_s(self, num_tokens: float) -> float:
        return _interpolate(self.num_tokens, self.target_s, num_tokens)

    def compute_draft_s(self, num_tokens: float) -> float:
        return _interpolate(self.num_tokens, self.draft_s, num_tokens) if self.draft_s else 0.0

    def corrected(self, num_tokens: int, measured_s: float, *, rate: float = 0.1) -> HardwareProfile:
        """The profile after one more measured forward: times near `num_tokens` (in octaves) move towards it.

        One step moves a time by at most a factor 2 ** rate, so a stall does little harm.
        """
        ratio = min(max(measured_s / self.compute_target_s(num_tokens), 0.5), 2.0)
        weights = [rate * 0.7 ** abs(math.log2(num_tokens / grid)) for grid in self.num_tokens]
        times = [s * ratio**w for s, w in zip(self.target_s, weights, strict=True)]
        return replace(self, target_s=tuple(itertools.accumulate(times, max)))

    @property
    def capacity(self) -> float:
        """Tokens per forward at the knee: where the large-batch slope, continued, leaves the one-token time.

        The paper's C_peak, calibrated; the largest grid point where the time never rises that far.
        """
        slope = (self.target_s[-1] - self.target_s[-2]) / (self.num_tokens[-1] - self.num_tokens[-2])
        if slope <= 0:
            return float(self.num_tokens[-1])
        intercept = self.target_s[-1] - slope * self.num_tokens[-1]
        knee = (self.target_s[0] - intercept) / slope
        return min(max(knee, 1.0), float(self.num_tokens[-1]))


def _interpolate(grid: tuple[int, ...], values: tuple[float, ...], at: float) -> float:
    """Piecewise linear, continued with the last slope (never falling) beyond the grid."""
    right = min(max(bisect.bisect_left(grid, at), 1), len(grid) - 1)
    slope = (values[right] - values[right - 1]) / (grid[right] - grid[right - 1])
    if at > grid[-1]:
        return values[-1] + max(slope, 0.0) * (at - grid[-1])
    return max(values[right - 1] + slope * (at - grid[right - 1]), min(values))


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """What the engine knows before a step."""

    num_seqs: int
    num_waiting: int = 0
    num_unread: int = 0  # tokens the drafter has not read yet: the price of switching on


class Planner(Protocol):
    """Decides each step's plan and hears what came of it."""

    @property
    def name(self) -> str: ...

    def begin(self) -> None:
        """A rollout starts, perhaps with a better drafter."""
        ...

    def plan(self, inputs: PlanInputs) -> SpeculationPlan: ...

    def observe(self, record: StepRecord) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class FixedPlanner:
    """The same plan at every step; plain decoding is the fixed plan `PLAIN`."""

    fixed: SpeculationPlan = PLAIN

    @property
    def name(self) -> str:
        return "off" if self.fixed.is_plain else "fixed"

    def begin(self) -> None:
        pass

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        return self.fixed

    def observe(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}


@dataclass(kw_only=True)
class PaperPlanner:
    """FastGRPO's open-loop rule: N_verify = capacity / B, K = min(N_verify - 1, K_max), L from a logarithm.

    Differs from the reference code in one point: with fewer than two nodes a sequence it decodes
    plainly instead of drafting levels that cannot be used.
    """

    capacity: float
    alpha: float = 0.75
    max_width: int = 8
    min_depth: int = 3
    max_depth: int = 5
    max_verify: int = 160
    name: str = field(default="paper", init=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"verification capacity must be at least 1 token, got {self.capacity}")

    def begin(self) -> None:
        pass

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        num_verify = min(int(self.capacity / inputs.num_seqs), self.max_verify)
        if num_verify < 2:
            return PLAIN
        width = min(num_verify - 1, self.max_width)
        depth = max(self.min_depth, min(int(math.log2(num_verify / self.alpha)), self.max_depth))
        num_draft = min(num_verify - 1, width + width * width * (depth - 1))
        return SpeculationPlan(depth=min(depth, num_draft), width=width, num_draft_tokens=num_draft)

    def observe(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"capacity": self.capacity}


MAX_DEPTH, MAX_WIDTH = 8, 8
_GRID = tuple(
    SpeculationPlan(depth=d, width=w, num_draft_tokens=n)
    for d, w, n in (
        *((1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (2, 2, 3), (2, 2, 4), (2, 3, 6), (3, 1, 3), (3, 2, 6)),
        *((3, 3, 8), (3, 4, 12), (4, 2, 8), (4, 4, 16), (5, 4, 16), (5, 4, 24), (6, 4, 24), (6, 8, 32), (8, 8, 48)),
    )
)


class AcceptanceTable:
    """The chance that the target chooses the child of sibling rank r of a walked node at depth d.

    Counts decay, so that the table follows a changing drafter; a weak prior fills what is unknown.
    """

    def __init__(self, *, prior: float = 0.3, prior_weight: float = 4.0, decay: float = 0.98) -> None:
        self.prior, self.prior_weight, self.decay = prior, prior_weight, decay
        self.offered = [[0.0] * MAX_WIDTH for _ in range(MAX_DEPTH)]
        self.hits = [[0.0] * MAX_WIDTH for _ in range(MAX_DEPTH)]

    def observe(self, record: StepRecord) -> None:
        for depth, (offered, hits) in enumerate(zip(record.offered, record.hits, strict=True)):
            for rank, (trials, count) in enumerate(zip(offered, hits, strict=True)):
                if depth < MAX_DEPTH and rank < MAX_WIDTH:
                    self.offered[depth][rank] = self.decay * self.offered[depth][rank] + trials
                    self.hits[depth][rank] = self.decay * self.hits[depth][rank] + count

    def rate(self, depth: int, rank: int) -> float:
        """Acceptance rate in [0, 1]; the prior of a depth is the level above, of a rank a fall by half."""
        prior = self.prior * 0.5**rank if depth == 0 else self.rate(depth - 1, rank)
        weight = self.prior_weight
        return (self.hits[depth][rank] + weight * prior) / (self.offered[depth][rank] + weight)

    def compute_rates(self) -> list[list[float]]:
        return [[self.rate(depth, rank) for rank in range(MAX_WIDTH)] for depth in range(MAX_DEPTH)]


def compute_expected_length(plan: SpeculationPlan, rates: list[list[float]]) -> float:
    """Expected tokens per sequence and forward: one, plus the best `num_draft_tokens` path chances of the tree."""
    heap: list[tuple[float, int]] = [(-rate, 1) for rate in rates[0][: plan.width]] if plan.depth else []
    heapq.heapify(heap)
    total = 1.0
    for _ in range(plan.num_draft_tokens):
        if not heap:
            break
        chance, depth = heapq.heappop(heap)
        total -= chance
        if depth < plan.depth:
            for rate in rates[depth][: plan.width]:
                heapq.heappush(heap, (chance * rate, depth + 1))
    return total


class _Ratio:
    """A running ratio of measured to predicted, robust to outliers by clipping each step."""

    def __init__(self, value: float = 1.0, rate: float = 0.1) -> None:
        self.value, self.rate = value, rate

    def observe(self, measured: float, predicted: float) -> None:
        ratio = min(max(measured / (predicted * self.value), 0.5), 2.0)
        self.value = min(max(self.value * ratio**self.rate, 0.1), 10.0)


class AutoPlanner:
    """Takes the plan with the most expected tokens per second, and keeps learning whether that is true.

    A plan must promise `margin` more than plain decoding. Every real step corrects the costs: the time of
    its forward corrects the table near its number of tokens (plain steps, as sequences finish, visit what
    trees would cost), the times of drafting and sampling their own ratios; so a wrong or stale profile
    heals. Acceptance is corrected likewise. Where plain decoding is chosen although speculation is near to
    paying, a cheap trial step is made after a wait that doubles each time, so that what a bad drafter can
    cost stays bounded.
    """

    name = "auto"

    def __init__(
        self,
        profile: HardwareProfile,
        *,
        margin: float = 1.03,
        max_num_tokens: int | None = None,
        trial_wait: int = 32,
        max_trial_wait: int = 512,
        trial_floor: float = 0.85,
    ) -> None:
        self.profile = profile
        self.margin = margin
        self.max_num_tokens = max_num_tokens or 2 * profile.num_tokens[-1]
        self.acceptance = AcceptanceTable()
        self.trial_wait, self.max_trial_wait, self.trial_floor = trial_wait, max_trial_wait, trial_floor
        self._wait = trial_wait
        self._plain_steps = trial_wait  # the first trial may come at once
        self._draft_cost = _Ratio()
        self._sample_cost = _Ratio()
        self._length = _Ratio(rate=0.05)
        self._expected: dict[SpeculationPlan, float] = {}
        self._age = 0
        self._current = PLAIN

    def predict_step_s(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Seconds of a step with this plan."""
        batch, profile = inputs.num_seqs, self.profile
        emitted = batch * self._predict_length(plan)
        seconds = profile.fixed_s + profile.sample_s * emitted * self._sample_cost.value
        seconds += profile.compute_target_s(batch * (1 + plan.num_draft_tokens))
        return seconds + self._predict_draft_s(plan, batch) * self._draft_cost.value

    def _predict_draft_s(self, plan: SpeculationPlan, batch: int) -> float:
        if plan.is_plain:
            return 0.0
        reading = self.profile.compute_draft_s(batch * self._predict_length(plan))
        return reading + (plan.depth - 1) * self.profile.compute_draft_s(batch * plan.width)

    def _predict_length(self, plan: SpeculationPlan) -> float:
        if plan.is_plain:
            return 1.0
        if plan not in self._expected:
            self._expected[plan] = compute_expected_length(plan, self.acceptance.compute_rates())
        return 1 + (self._expected[plan] - 1) * self._length.value

    def _predict_rate(self, plan: SpeculationPlan, inputs: PlanInputs) -> float:
        """Tokens per second; the price of switching on is spread over the steps until it is asked again."""
        seconds = self.predict_step_s(plan, inputs)
        if not plan.is_plain and self._current.is_plain:
            seconds += self._draft_cost.value * self.profile.compute_draft_s(inputs.num_unread) / self.trial_wait
        return inputs.num_seqs * self._predict_length(plan) / seconds

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        fitting = [p for p in _GRID if inputs.num_seqs * (1 + p.num_draft_tokens) <= self.max_num_tokens]
        plain_rate = self._predict_rate(PLAIN, inputs)
        rates = {p: self._predict_rate(p, inputs) for p in fitting}
        best = max(rates, key=rates.__getitem__, default=PLAIN)
        if best.is_plain:
            chosen = PLAIN
        elif rates[best] > self.margin * plain_rate:
            keep = self._current in rates and rates[self._current] * self.margin > rates[best]
            chosen = self._current if keep else best
        else:
            chosen = self._trial(rates, plain_rate)
        self._plain_steps = self._plain_steps + 1 if chosen.is_plain else 0
        self._current = chosen
        return chosen

    def _trial(self, rates: dict[SpeculationPlan, float], plain_rate: float) -> SpeculationPlan:
        """Plain decoding, but for a cheap trial once in a while where speculation is near to paying."""
        cheapest = min(rates, key=lambda p: (p.num_draft_tokens, -rates[p]))
        if self._plain_steps < self._wait or rates[cheapest] < self.trial_floor * plain_rate:
            return PLAIN
        self._wait = min(2 * self._wait, self.max_trial_wait)
        return cheapest

    def observe(self, record: StepRecord) -> None:
        plan = record.plan
        self.profile = self.profile.corrected(record.num_tokens, record.target_s)
        if self.profile.sample_s:
            self._sample_cost.observe(record.verify_s, self.profile.sample_s * record.num_emitted)
        if plan.is_plain or not record.offered:
            return  # nothing was drafted, so neither the cost nor the acceptance of a draft was seen
        predicted_s = self._predict_draft_s(plan, record.num_seqs)
        if predicted_s:
            self._draft_cost.observe(record.draft_s, predicted_s)
        self._length.observe(record.acceptance_length - 0.9, self._predict_length(plan) - 0.9)
        self.acceptance.observe(record)
        self._age += 1
        if self._age % 8 == 0:
            self._expected.clear()
        if record.acceptance_length > 1.5:
            self._wait = self.trial_wait

    def begin(self) -> None:
        self._wait = self.trial_wait
        self._current = PLAIN
        self._expected.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "profile": asdict(self.profile),
            "offered": self.acceptance.offered,
            "hits": self.acceptance.hits,
            "draft_cost": self._draft_cost.value,
            "sample_cost": self._sample_cost.value,
            "length": self._length.value,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AutoPlanner:
        """The planner that `state_dict` described."""
        profile: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in state["profile"].items()
        }
        planner = cls(HardwareProfile(**profile))
        planner.acceptance.offered = [list(row) for row in state["offered"]]
        planner.acceptance.hits = [list(row) for row in state["hits"]]
        planner._draft_cost.value = float(state["draft_cost"])
        planner._sample_cost.value = float(state["sample_cost"])
        planner._length.value = float(state["length"])
        return planner


def build_planner(
    speculation: str | SpeculationPlan,
    *,
    fixed: SpeculationPlan,
    measure: Callable[[], HardwareProfile],
) -> Planner:
    """The planner behind a `speculation` key: auto, paper, fixed, off, or a plan of one's own.

    Args:
        fixed: the plan of `fixed`.
        measure: called only by the planners that need the machine's costs.

    Raises:
        ValueError: an unknown key; names the known ones.
    """
    if isinstance(speculation, SpeculationPlan):
        return FixedPlanner(fixed=speculation)
    if speculation == "off":
        return FixedPlanner()
    if speculation == "fixed":
        return FixedPlanner(fixed=fixed)
    if speculation == "paper":
        return PaperPlanner(capacity=measure().capacity)
    if speculation == "auto":
        return AutoPlanner(measure())
    raise ValueError(f"speculation must be one of auto, paper, fixed, off, or a SpeculationPlan, got {speculation!r}")
