"""GRPO training with exact speculative rollouts: the same run, sooner.

`FastGRPOConfig` and `FastGRPOTrainer` take the place of TRL's; `Engine` generates on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgrpo.rewards import per_completion
from fastgrpo.types import Completion, SamplingParams, SpeculationPlan

if TYPE_CHECKING:
    from fastgrpo.engine import Engine
    from fastgrpo.grpo import FastGRPOConfig, FastGRPOTrainer

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Engine",
    "FastGRPOConfig",
    "FastGRPOTrainer",
    "SamplingParams",
    "SpeculationPlan",
    "__version__",
    "per_completion",
]


def __getattr__(name: str) -> Any:
    """Engine and trainer are imported when they are asked for: planners need no torch, the engine no TRL."""
    if name == "Engine":
        from fastgrpo.engine import Engine

        return Engine
    if name in ("FastGRPOConfig", "FastGRPOTrainer"):
        from fastgrpo import grpo

        return getattr(grpo, name)
    raise AttributeError(f"module 'fastgrpo' has no attribute '{name}'")
