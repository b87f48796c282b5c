"""How much to speculate: pure decisions from counted facts. No torch, no clock, one file a planner."""

from __future__ import annotations

from collections.abc import Callable

from fastgrpo.planner.acceptance import AcceptanceTable, compute_expected_length
from fastgrpo.planner.auto import AutoPlanner
from fastgrpo.planner.fixed import FixedPlanner
from fastgrpo.planner.paper import PaperPlanner
from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.types import SpeculationPlan

__all__ = [
    "AcceptanceTable",
    "AutoPlanner",
    "FixedPlanner",
    "HardwareProfile",
    "PaperPlanner",
    "PlanInputs",
    "Planner",
    "build_planner",
    "compute_expected_length",
]


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
