"""What forwards cost: a function of their tokens, and a price for every cached position they read."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.types import SpeculationPlan

MEASURE_AGAIN = "measure again with fastgrpo profile"

LEAST_S, MOST_S = 1e-12, 1e9  # of a forward or a draft: none is as fast, and none as slow


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Measured seconds by tokens per forward, for one model on one machine.

    Args:
        num_tokens: increasing grid of tokens per forward.
        target_s: seconds of a target forward (output head included) at each grid point, nothing cached.
        read_s: seconds a target forward takes longer for each cached position it reads.
        draft_s: seconds of a further draft level over so many nodes; empty if drafts were not timed.
        draft_start_s: seconds of a draft of one level for so many sequences, what they have just accepted read;
            empty takes `draft_s`.
        draft_read_s: seconds the drafter takes for each token more that it has not read yet.
        sample_s: seconds to sample, walk and commit one emitted token.
        walk_s: seconds for each level that walks may go down, however many sequences walk.
        fixed_s: seconds of a step that depend on nothing.
        runs_ahead: work is launched ahead of a device that does it, and both would wait where the host has to hear
            what was drafted before it says what is verified.

    Raises:
        ValueError: fewer than two points, an unordered grid, counts that are no integers, a time that is not finite
            and positive or is longer than years, or times of a draft's start without those of its levels.
    """

    num_tokens: tuple[int, ...]
    target_s: tuple[float, ...]
    draft_s: tuple[float, ...] = ()
    draft_start_s: tuple[float, ...] = ()
    read_s: float = 0.0
    draft_read_s: float = 0.0
    sample_s: float = 0.0
    walk_s: float = 0.0
    fixed_s: float = 0.0
    runs_ahead: bool = False

    def __post_init__(self) -> None:
        grid = self.num_tokens
        are_counts = all(isinstance(each, int) and not isinstance(each, bool) and is_finite(each) for each in grid)
        if not are_counts or len(grid) < 2 or any(b <= a for a, b in itertools.pairwise(grid)) or grid[0] < 1:
            raise ValueError(
                f"a profile needs an increasing grid of at least two token counts, got {grid!r:.60}; {MEASURE_AGAIN}"
            )
        for name in ("target_s", "draft_s", "draft_start_s"):
            num_times = len(getattr(self, name))
            if num_times != len(grid) and (num_times or name == "target_s"):
                raise ValueError(
                    f"a profile needs one time for each of {len(grid)} points, got {num_times} in {name}; "
                    f"{MEASURE_AGAIN}"
                )
            for num_tokens, seconds in zip(grid, getattr(self, name), strict=False):
                if not (is_finite(seconds) and LEAST_S <= seconds <= MOST_S):
                    where = f"{name} at {num_tokens} tokens is {seconds!r:.60}"
                    raise ValueError(
                        f"profile times must be finite and positive, {MOST_S:g} s at most: {where}; {MEASURE_AGAIN}"
                    )
        for name in ("read_s", "draft_read_s", "sample_s", "walk_s", "fixed_s"):  # these may be zero
            if not (is_finite(getattr(self, name)) and 0 <= getattr(self, name) <= MOST_S):
                where = f"{name} is {getattr(self, name)!r:.60}"
                raise ValueError(
                    f"profile times must be finite and positive, or 0, {MOST_S:g} s at most: {where}; {MEASURE_AGAIN}"
                )
        if self.draft_start_s and not self.draft_s:
            raise ValueError(f"a profile with draft_start_s needs draft_s, else drafts were free; {MEASURE_AGAIN}")

    def compute_target_s(self, num_tokens: float, num_read: float = 0.0) -> float:
        return interpolate(self.num_tokens, self.target_s, num_tokens) + self.read_s * num_read

    def compute_draft_s(self, plan: SpeculationPlan, num_seqs: int, num_unread: int = 0) -> float:
        """Seconds of a draft with this plan's depth and width.

        Args:
            num_unread: tokens that the drafter has not read, beyond what the sequences have just accepted.
        """
        if plan.is_plain or not self.draft_s:
            return 0.0
        start_s = interpolate(self.num_tokens, self.draft_start_s or self.draft_s, num_seqs)
        level_s = interpolate(self.num_tokens, self.draft_s, num_seqs * plan.width)
        return start_s + (plan.depth - 1) * level_s + num_unread * self.draft_read_s

    @property
    def floor_s(self) -> float:
        """Seconds of the smallest forward, which reads the weights once: the memory-bound limit of the roofline."""
        return self.target_s[0]

    @property
    def per_token_s(self) -> float:
        """Seconds for each token at the best rate of the grid: the compute-bound limit of the roofline."""
        return min(s / n for n, s in zip(self.num_tokens, self.target_s, strict=True))

    @property
    def capacity(self) -> float:
        """Tokens per forward at the knee of the roofline, where both limits meet, within the grid.

        The paper's C_peak, calibrated: what the machine could compute while it reads the weights once.
        """
        return min(max(self.floor_s / self.per_token_s, 1.0), float(self.num_tokens[-1]))


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def interpolate(grid: Sequence[int], values: Sequence[float], at: float) -> float:
    """Piecewise linear, continued with the last slope (never falling) beyond the grid."""
    right = min(max(bisect.bisect_left(grid, at), 1), len(grid) - 1)
    slope = (values[right] - values[right - 1]) / (grid[right] - grid[right - 1])
    if at > grid[-1]:
        return values[-1] + max(slope, 0.0) * (at - grid[-1])
    return max(values[right - 1] + slope * (at - grid[right - 1]), min(values))
