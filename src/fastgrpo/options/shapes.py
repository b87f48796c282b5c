"""Fixed plans by their shape, as a person writes them."""

from __future__ import annotations

import re

from fastgrpo.planner import SPECULATION
from fastgrpo.types import SpeculationPlan

SHAPE_FORM = "depth x width x draft tokens, such as 4x4x16"

_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")


def parse_plan(shape: str) -> SpeculationPlan:
    """The plan behind `4x4x16`.

    Raises:
        ValueError: it is of another form, decodes plainly, or has more levels than draft tokens or more draft tokens
            than there are nodes on its levels.
    """
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise ValueError(f"a plan's shape is {SHAPE_FORM}; got '{shape}'")
    depth, width, num_draft_tokens = map(int, match.groups())
    if not depth * width * num_draft_tokens:
        raise ValueError(f"a plan's shape has no zero, got '{shape}'; plain decoding is off")
    if num_draft_tokens > (most := width + width**2 * (depth - 1)):
        raise ValueError(f"the shape '{shape}' cannot be: {depth}x{width} trees have {most} draft tokens at most")
    try:
        return SpeculationPlan(depth=depth, width=width, num_draft_tokens=num_draft_tokens)
    except ValueError as error:
        raise ValueError(f"the shape '{shape}' cannot be: {error}") from error


def parse_speculation(word: str) -> str | SpeculationPlan:
    """A planner's name as it is, a shape as its plan.

    Raises:
        ValueError: it is neither.
    """
    if word in SPECULATION:
        return word
    if not word[:1].isdigit():
        raise ValueError(f"speculation must be one of {', '.join(SPECULATION)}, or {SHAPE_FORM}; got '{word}'")
    return parse_plan(word)


def name_plan(plan: SpeculationPlan) -> str:
    """The shape of a plan, `off` for plain decoding."""
    return "off" if plan.is_plain else f"{plan.depth}x{plan.width}x{plan.num_draft_tokens}"
