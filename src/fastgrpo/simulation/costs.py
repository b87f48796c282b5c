"""What a simulated step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from fastgrpo.planner import HardwareProfile, StepCosts
from fastgrpo.types import SpeculationPlan, StepRecord


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What there is to do in a step; counts as in `StepRecord`.

    Args:
        num_unread: tokens that the drafter reads before it drafts.
    """

    plan: SpeculationPlan
    num_seqs: int
    num_tokens: int
    num_read: int
    num_unread: int
    num_emitted: int
    num_prefilled: int

    @staticmethod
    def of(record: StepRecord) -> StepWork:
        """What a step that was taken had to do."""
        return StepWork(**{field.name: getattr(record, field.name) for field in fields(StepWork)})


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """The parts of a step, in seconds, as `StepRecord` has them."""

    prefill_s: float
    draft_s: float
    target_s: float
    verify_s: float
    between_s: float = 0.0

    @property
    def step_s(self) -> float:
        return self.prefill_s + self.draft_s + self.target_s + self.verify_s + self.between_s


class Costs(Protocol):
    """A machine that a rollout is simulated on."""

    def begin(self) -> None:
        """A rollout starts."""
        ...

    def price(self, work: StepWork) -> StepSeconds: ...


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What measured steps say of a profile; by default they say nothing, and it is believed.

    Args:
        steps: prices of forwards, drafts and the rest, as `auto` follows them: typical ones.
        scale: mean over typical seconds; some steps are held up, and a rollout takes the sum of all.
        prefill: measured over predicted seconds of prompts.
        between_s: seconds that each step takes beside its parts.
    """

    steps: StepCosts | None = None
    scale: float = 1.0
    prefill: float = 1.0
    between_s: float = 0.0

    def describe(self) -> dict[str, Any]:
        """For a file."""
        steps = None if self.steps is None else self.steps.state_dict()
        return {"steps": steps, "scale": self.scale, "prefill": self.prefill, "between_s": self.between_s}


@dataclass(kw_only=True)
class ProfileCosts:
    """Costs by a hardware profile, perhaps corrected, perhaps with noise.

    Args:
        noise: standard deviation of the logarithm of each part's time; 0 gives the same time to the same work.
        seed: of the noise.

    Attributes:
        steps: what the parts of a step take, without noise and scale.

    Raises:
        ValueError: a noise that is negative or not finite.
    """

    profile: HardwareProfile
    corrections: Corrections = Corrections()
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise must be a finite number >= 0, got {self.noise}; 0 simulates without")
        self.steps = self.corrections.steps or StepCosts(self.profile)
        self.begin()

    def begin(self) -> None:
        """Every rollout has the same noise at its first, second, ... step, so that planners are compared alike."""
        self._draws = np.random.default_rng(self.seed)

    def price(self, work: StepWork) -> StepSeconds:
        plan, num_seqs, steps = work.plan, work.num_seqs, self.steps
        draft_s = float(steps.predict_draft_s(plan.depth, plan.width, num_seqs))
        if not plan.is_plain:
            draft_s += steps.predict_reading_s(work.num_unread, num_seqs)
        target_s = float(steps.predict_target_s(work.num_tokens, work.num_read))
        verify_s = float(steps.predict_rest_s(plan.depth, work.num_emitted))
        prefill_s = 0.0
        if work.num_prefilled:
            prefill_s = self.corrections.prefill * self.profile.compute_target_s(work.num_prefilled)
        scale = self.corrections.scale
        factors = np.exp(self.noise * self._draws.standard_normal(4)).tolist() if self.noise else (1.0,) * 4
        return StepSeconds(
            prefill_s=prefill_s * factors[0],
            draft_s=scale * draft_s * factors[1],
            target_s=scale * target_s * factors[2],
            verify_s=scale * verify_s * factors[3],
            between_s=self.corrections.between_s,
        )
