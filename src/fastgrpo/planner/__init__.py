"""How much to speculate: pure decisions from counted facts. No torch, no clock, one file a planner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastgrpo.planner.acceptance import AcceptanceTable, Rates, compute_expected_length
from fastgrpo.planner.auto import AutoPlanner
from fastgrpo.planner.bandit import BanditPlanner
from fastgrpo.planner.costs import StepCosts
from fastgrpo.planner.fixed import FixedPlanner
from fastgrpo.planner.forecast import Forecast, describe_gains, find_break_even, forecast_gains, lower_gains
from fastgrpo.planner.paper import PaperPlanner
from fastgrpo.planner.planner import PlanInputs, Planner
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.types import SpeculationPlan

__all__ = [
    "MEASURED",
    "SPECULATION",
    "AcceptanceTable",
    "AutoPlanner",
    "BanditPlanner",
    "FixedPlanner",
    "Forecast",
    "HardwareProfile",
    "PaperPlanner",
    "PlanInputs",
    "Planner",
    "StepCosts",
    "build_planner",
    "compute_expected_length",
    "describe_gains",
    "find_break_even",
    "forecast_gains",
    "lower_gains",
    "restore_planner",
]

SPECULATION = ("auto", "off", "paper", "paper-own", "bandit", "fixed")
MEASURED = ("auto", "paper", "bandit")  # those that ask what the machine costs


def build_planner(
    speculation: str | SpeculationPlan,
    *,
    fixed: SpeculationPlan,
    measure: Callable[[], HardwareProfile],
    acceptance: Rates | None = None,
) -> Planner:
    """The planner behind a `speculation` key: one of `SPECULATION`, or a plan of one's own.

    Args:
        fixed: the plan of `fixed`.
        measure: called only by the planners that need the machine's costs.
        acceptance: of the drafter by depth and rank, where it was measured before.

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
    if speculation == "paper-own":
        return PaperPlanner.with_own_capacity()
    if speculation == "bandit":
        return BanditPlanner(max_num_tokens=measure().num_tokens[-1])
    if speculation == "auto":
        return AutoPlanner(measure(), acceptance=acceptance)
    raise ValueError(f"speculation must be one of {', '.join(SPECULATION)}, or a SpeculationPlan, got {speculation!r}")


def restore_planner(name: str, state: Mapping[str, Any]) -> Planner | None:
    """The planner whose name and `state_dict` these are; None for a kind that has nothing to remember."""
    if name == "auto":
        return AutoPlanner.from_state(state)
    if name == "paper":
        return PaperPlanner(capacity=float(state["capacity"]))
    if name == "bandit":
        return BanditPlanner.from_state(state)
    return None
