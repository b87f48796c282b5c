"""FastGRPO's rule (arXiv:2509.21792)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastgrpo.planner.planner import PlanInputs
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord


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
