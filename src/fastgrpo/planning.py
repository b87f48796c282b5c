"""An engine's planner: built from a key, its costs measured when first needed, its own time taken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fastgrpo.drafters import Drafter, find_trainable
from fastgrpo.model import TargetModel
from fastgrpo.planner import (
    MEASURED,
    FixedPlanner,
    HardwareProfile,
    PlanInputs,
    Planner,
    build_planner,
    restore_planner,
)
from fastgrpo.profile_files import find_profile, take_profile
from fastgrpo.timing import Stopwatch
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan, StepRecord


class Planning:
    """Builds and asks the planner that a `speculation` key names.

    Args:
        speculation, fixed, profile: as `Engine` takes them; `fixed` is the plan of "fixed".
        drafter: the one that the profile must have been measured with.

    Attributes:
        planner: None until costs are known; may be replaced.
        profile_s: seconds that looking up or measuring the costs took.

    Raises:
        ValueError: an unknown key, or a plan or profile that cannot be used.
        FileNotFoundError: there is no such profile.
    """

    def __init__(
        self,
        speculation: str | SpeculationPlan,
        *,
        fixed: SpeculationPlan,
        profile: HardwareProfile | str | Path | None,
        target: TargetModel,
        drafter: Drafter,
    ) -> None:
        if not isinstance(fixed, SpeculationPlan):
            raise ValueError(f"fixed_plan must be a SpeculationPlan, got {fixed!r}")
        self.speculation, self.fixed = speculation, fixed
        self.target, self.drafter = target, drafter
        self.profile = None if profile is None else take_profile(profile, target, drafter)
        self.planner: Planner | None = None
        if speculation not in MEASURED:
            self.planner = build_planner(speculation, fixed=fixed, measure=_refuse_to_measure)
        self.profile_s = 0.0
        self._watch = Stopwatch()

    @property
    def name(self) -> str:
        return self.planner.name if self.planner else str(self.speculation)

    def turn_off(self) -> None:
        """Decode plainly, whatever the key was: there is no drafter to speculate with."""
        self.speculation, self.planner = "off", FixedPlanner()

    def restore(self, name: str, state: Mapping[str, Any]) -> None:
        """Take over a saved planner's measurements; those of a planner of another name are ignored."""
        if name == self.speculation:
            self.planner = restore_planner(name, state) or self.planner

    def begin(self) -> None:
        """A rollout starts; call inside `target.rollout_mode`."""
        self._watch.take_s()
        self._ensure().begin()

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        planner = self._ensure()
        with self._watch:
            return planner.plan(inputs)

    def spend_budget(self, pool: Draft, plan: SpeculationPlan, inputs: PlanInputs) -> Draft:
        """The draft to verify: all of the pool, or under a shared budget the likeliest nodes over all sequences."""
        if plan.most_draft_tokens is None or pool.scores is None:
            return pool
        chances, rows = pool.rank_nodes()
        planner = self._ensure()
        with self._watch:
            budget = planner.choose_budget(plan, inputs, chances)
        if budget == len(chances):
            return pool
        counts = [1] * len(pool.num_nodes)
        for row in rows[:budget]:
            counts[row] += 1
        return pool.keep(counts)

    def observe(self, record: StepRecord) -> None:
        planner = self._ensure()
        with self._watch:
            planner.observe(record)

    def take_s(self) -> float:
        """Seconds that the planner took since the last call."""
        return self._watch.take_s()

    def _ensure(self) -> Planner:
        """The planner; at first use, its costs are looked up or measured."""
        if self.planner is None:
            started = time.perf_counter()
            self.planner = build_planner(
                self.speculation,
                fixed=self.fixed,
                measure=lambda: self.profile or find_profile(self.target, self.drafter),
                acceptance=getattr(find_trainable(self.drafter), "acceptance", None),
            )
            self.profile_s = time.perf_counter() - started
        return self.planner


def _refuse_to_measure() -> NoReturn:
    raise AssertionError("this planner needs no measurement")
