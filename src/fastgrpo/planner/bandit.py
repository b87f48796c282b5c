"""TLT's bandit (arXiv:2511.16665), for comparison."""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

ARMS = tuple(SpeculationPlan(depth=8, width=4, num_draft_tokens=nodes) for nodes in (48, 32, 16, 8))
BUCKETS = (1, 2, 5, 21)  # least live sequences of each bucket
MAX_SPECULATING = 31  # live sequences: TLT speculates below 32, from there on it decodes plainly


@dataclass(kw_only=True)
class BanditPlanner(Planner):
    """Epsilon-greedy over four trees, apart for each bucket of live sequences; no model of what a step costs.

    An arm's reward is what its steps emitted a second (acceptance length x live sequences / step seconds, prompts
    left out), the median of the last `window`. Untried arms are played first, in their order. Below 32 live
    sequences it always speculates: plain decoding is no arm, whatever the drafter is worth.

    Args:
        max_num_tokens: tokens in a target forward at most, roots included; arms beyond it are not played.
        seed: of its own draws, a function of seed and their number: a run repeats, other generators are not touched.
        epsilon: share of draws that take an arm at random, in [0, 1].
        window: rewards remembered for each bucket and arm.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    max_num_tokens: int
    seed: int = 0
    epsilon: float = 0.1
    window: int = 16
    num_draws: int = 0
    rewards: list[list[deque[float]]] = field(init=False)  # tokens per second, by bucket and arm
    name: str = field(default="bandit", init=False)

    def __post_init__(self) -> None:
        if self.max_num_tokens < 1:
            raise ValueError(f"max_num_tokens must be at least 1, got {self.max_num_tokens}")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon must be in [0, 1], got {self.epsilon}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 reward, got {self.window}")
        self.rewards = [[deque(maxlen=self.window) for _ in ARMS] for _ in BUCKETS]

    def begin(self) -> None:
        pass  # the window forgets by itself

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        room = inputs.find_room(self.max_num_tokens)
        arms = [arm for arm, plan in enumerate(ARMS) if plan.num_draft_tokens <= room]
        if inputs.num_seqs > MAX_SPECULATING or not arms:
            return PLAIN
        return ARMS[self._choose(arms, self.rewards[find_bucket(inputs.num_seqs)])]

    def _choose(self, arms: list[int], rewards: list[deque[float]]) -> int:
        untried = [arm for arm in arms if not rewards[arm]]
        if untried:
            return untried[0]
        draws = random.Random(f"{self.seed} {self.num_draws}")
        self.num_draws += 1
        if draws.random() < self.epsilon:
            return draws.choice(arms)
        return max(arms, key=lambda arm: statistics.median(rewards[arm]))

    def observe(self, record: StepRecord) -> None:
        seconds = record.step_s - record.prefill_s
        if record.is_steady and record.plan in ARMS and record.num_seqs <= MAX_SPECULATING:
            rewards = self.rewards[find_bucket(record.num_seqs)][ARMS.index(record.plan)]
            is_sound = 0 < seconds < math.inf  # else a clock stood still or went back: it was played, for nothing
            rewards.append(record.acceptance_length * record.num_seqs / seconds if is_sound else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "max_num_tokens": self.max_num_tokens,
            "seed": self.seed,
            "epsilon": self.epsilon,
            "window": self.window,
            "num_draws": self.num_draws,
            "rewards": [[list(rewards) for rewards in bucket] for bucket in self.rewards],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BanditPlanner:
        """The planner that `state_dict` described."""
        settings = {key: value for key, value in state.items() if key != "rewards"}
        planner = cls(**settings)
        planner.rewards = [[deque(rewards, planner.window) for rewards in bucket] for bucket in state["rewards"]]
        return planner


def find_bucket(num_seqs: int) -> int:
    """The last bucket that begins at or below so many live sequences."""
    return bisect.bisect_right(BUCKETS, num_seqs) - 1
