"""The same plan at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.types import PLAIN, SpeculationPlan, StepRecord


@dataclass(kw_only=True)
class FixedPlanner(Planner):
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
