"""FastGRPO's rule (arXiv:2509.21792)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord

OWN_CAPACITY = 160.0  # tokens per target forward


@dataclass(kw_only=True)
class PaperPlanner(Planner):
    """FastGRPO's open-loop rule: N_verify = capacity / B, K = min(N_verify - 1, K_max), L from a logarithm.

    Differs from the reference code where nodes are few: with fewer than two a sequence it decodes plainly, and L is no
    more than the draft tokens, instead of drafting levels that cannot be used.

    `paper` takes the capacity measured on the machine at hand, `paper-own` the paper's own (see `with_own_capacity`);
    the other constants are the paper's either way.

    Args:
        capacity: tokens per target forward at the knee of the roofline (the paper's C_peak), roots included.
        alpha: divides N_verify under the logarithm; stands for the quality of the drafter.
        max_width: K_max.
        min_depth: least L, where there are nodes to fill it.
        max_depth: L_max.
        max_verify: N_verify at most, root included.

    Raises:
        ValueError: a capacity below one token or not finite, or another constant that is out of its range; the
            message names it.
    """

    capacity: float
    alpha: float = 0.75
    max_width: int = 8
    min_depth: int = 3
    max_depth: int = 5
    max_verify: int = 160
    name: str = "paper"

    def __post_init__(self) -> None:
        if not 1 <= self.capacity < math.inf:
            raise ValueError(f"verification capacity must be at least 1 token, got {self.capacity}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 1 <= self.min_depth <= self.max_depth:
            raise ValueError(f"depths must be 1 <= min <= max, got {self.min_depth} and {self.max_depth}")
        if self.max_width < 1 or self.max_verify < 1:
            raise ValueError(f"max_width and max_verify must be at least 1, got {self.max_width}, {self.max_verify}")

    @classmethod
    def with_own_capacity(cls) -> PaperPlanner:
        """The rule as the paper's code has it: capacity 160, whatever the model and the machine.

        The code sets one number for every model and GPU and names no machine it was found on; a fork measured a
        knee of 2785 tokens for Qwen3-4B on a B200. Nothing is measured here, so nothing fits this machine but by luck.
        """
        return cls(capacity=OWN_CAPACITY, name="paper-own")

    def begin(self) -> None:
        pass

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        num_verify = min(int(self.capacity / inputs.num_seqs), self.max_verify)
        if num_verify < 2:
            return PLAIN
        width = min(num_verify - 1, self.max_width)
        depth = max(self.min_depth, int(min(math.log2(num_verify / self.alpha), self.max_depth)))
        num_draft = min(num_verify - 1, width + width * width * (depth - 1))
        return SpeculationPlan(depth=min(depth, num_draft), width=width, num_draft_tokens=num_draft)

    def observe(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"capacity": self.capacity}
