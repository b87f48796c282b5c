"""What forwards cost: a function of their tokens, and a price for every cached position they read."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, replace

MEASURE_AGAIN = "measure again with fastgrpo profile"


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Measured seconds by tokens per forward, for one model on one machine.

    Args:
        num_tokens: increasing grid of tokens per forward.
        target_s: seconds of a target forward (output head included) at each grid point, nothing cached.
        read_s: seconds a target forward takes longer for each cached position it reads.
        draft_s: seconds of one draft level at each grid point; empty without a neural drafter.
        sample_s: seconds to sample, walk and commit one emitted token.
        fixed_s: seconds of a step that depend on nothing.
        is_one_pass: the drafter computes all levels of a draft in one pass over a position for each, and
            `draft_s` is of such a pass by its positions.

    Raises:
        ValueError: fewer than two points, an unordered grid, or a time that is not finite and positive.
    """

    num_tokens: tuple[int, ...]
    target_s: tuple[float, ...]
    draft_s: tuple[float, ...] = ()
    read_s: float = 0.0
    sample_s: float = 0.0
    fixed_s: float = 0.0
    is_one_pass: bool = False

    def __post_init__(self) -> None:
        grid, num_times = self.num_tokens, (len(self.target_s), len(self.draft_s))
        if len(grid) < 2 or any(b <= a for a, b in itertools.pairwise(grid)) or grid[0] < 1:
            raise ValueError(
                f"a profile needs an increasing grid of at least two token counts, got {grid}; {MEASURE_AGAIN}"
            )
        if num_times[0] != len(grid) or num_times[1] not in (0, len(grid)):
            raise ValueError(
                f"a profile needs one time for each of {len(grid)} points, got {num_times[0]} of the target and "
                f"{num_times[1]} of the drafter; {MEASURE_AGAIN}"
            )
        for name in ("target_s", "draft_s"):
            for num_tokens, seconds in zip(grid, getattr(self, name), strict=False):
                if not (math.isfinite(seconds) and seconds > 0):
                    where = f"{name} at {num_tokens} tokens is {seconds}"
                    raise ValueError(f"profile times must be finite and positive: {where}; {MEASURE_AGAIN}")
        for name in ("read_s", "sample_s", "fixed_s"):  # these may be zero
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                where = f"{name} is {getattr(self, name)}"
                raise ValueError(f"profile times must be finite and positive, or 0: {where}; {MEASURE_AGAIN}")

    def compute_target_s(self, num_tokens: float, num_read: float = 0.0) -> float:
        return _interpolate(self.num_tokens, self.target_s, num_tokens) + self.read_s * num_read

    def compute_draft_s(self, num_tokens: float) -> float:
        return _interpolate(self.num_tokens, self.draft_s, num_tokens) if self.draft_s else 0.0

    def corrected(self, num_tokens: int, measured_s: float, *, num_read: int = 0, rate: float = 0.1) -> HardwareProfile:
        """The profile after one more measured forward: times near `num_tokens` (in octaves) move towards it.

        Tokens and reading share the blame as they share the time; the price of a position, which every
        forward sees, may move faster. One step moves a time by at most a factor 2 ** rate (a position's
        price, 2 ** (3 * rate)), so a stall does little harm.
        """
        predicted_s = self.compute_target_s(num_tokens, num_read)
        ratio = min(max(measured_s / predicted_s, 0.5), 2.0)
        share = self.read_s * num_read / predicted_s
        read_s = self.read_s * ratio ** (rate * min(10 * share, 3))
        weights = [rate * (1 - share) * 0.7 ** abs(math.log2(num_tokens / grid)) for grid in self.num_tokens]
        times = [s * ratio**w for s, w in zip(self.target_s, weights, strict=True)]
        return replace(self, target_s=tuple(itertools.accumulate(times, max)), read_s=read_s)

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


def _interpolate(grid: tuple[int, ...], values: tuple[float, ...], at: float) -> float:
    """Piecewise linear, continued with the last slope (never falling) beyond the grid."""
    right = min(max(bisect.bisect_left(grid, at), 1), len(grid) - 1)
    slope = (values[right] - values[right - 1]) / (grid[right] - grid[right - 1])
    if at > grid[-1]:
        return values[-1] + max(slope, 0.0) * (at - grid[-1])
    return max(values[right - 1] + slope * (at - grid[right - 1]), min(values))
