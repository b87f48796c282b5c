"""What forwards cost, followed step by step: an extended Kalman filter over the logarithms of a profile's times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fastgrpo.planner.profile import HardwareProfile

_DOUBT = 0.5  # nats; what a time of the profile may be off by, before anything was measured
_ALIKE = 0.9  # correlation of the errors of two points an octave apart: a slower machine is slower everywhere
_DRIFT = 0.003  # nats; what a time changes by from step to step
_NOISE = 0.05  # nats; what steps scatter by
_OUTLIER = 2.5  # standard deviations; more is taken for this much
_SURPRISE_RATE, _MOST_SURPRISE = 0.25, 1.5  # of the running mean of such deviations; beyond, the times are doubted
_DOUBT_AGAIN = 0.25  # share of the first doubt's variance that comes back then


class FollowedProfile:
    """A profile whose target times follow those of real steps.

    A step's time is the sum of its tokens' and its positions' times; the blame for an error goes where the doubt is,
    so that rollouts in which contexts grow while sequences finish tell both apart. Single outliers move little; when
    several steps agree that the times are wrong, they are doubted anew, and soon right.

    Args:
        start: what was measured before, perhaps long ago.
    """

    def __init__(self, start: HardwareProfile) -> None:
        self.start = self.profile = start
        octaves = np.log2(np.array(start.num_tokens))
        alike = _ALIKE ** np.abs(octaves[:, None] - octaves)
        self._prior = np.eye(len(octaves) + 1)  # the last is the price of a cached position
        self._prior[:-1, :-1] = alike
        self._logs = np.zeros(len(self._prior))  # of each time over its start
        self._variance = _DOUBT**2 * self._prior
        self._surprise = 0.0

    def observe(self, num_tokens: int, num_read: int, measured_s: float) -> None:
        """A target forward of so many tokens that read so many cached positions took so long."""
        predicted_s = self.profile.compute_target_s(num_tokens, num_read)
        shares = self._find_shares(num_tokens, num_read, predicted_s)
        self._variance += _DRIFT**2 * self._prior
        spread = self._variance @ shares
        deviation = float(np.sqrt(shares @ spread + _NOISE**2))
        scaled = float(np.log(measured_s / predicted_s)) / deviation
        scaled = min(max(scaled, -_OUTLIER), _OUTLIER)
        self._logs += spread * (scaled / deviation)
        self._variance -= np.outer(spread, spread) / deviation**2
        self._surprise += _SURPRISE_RATE * (scaled - self._surprise)
        if abs(self._surprise) > _MOST_SURPRISE:
            self._variance += _DOUBT_AGAIN * _DOUBT**2 * self._prior
            self._surprise = 0.0
        self._rebuild()

    def _find_shares(self, num_tokens: int, num_read: int, predicted_s: float) -> np.ndarray:
        """Of a forward's time, what each point of the grid and the cached positions account for; sums to about 1."""
        grid, times = self.profile.num_tokens, self.profile.target_s
        right = min(max(int(np.searchsorted(grid, num_tokens)), 1), len(grid) - 1)
        weight = (num_tokens - grid[right - 1]) / (grid[right] - grid[right - 1])
        shares = np.zeros(len(grid) + 1)
        shares[right - 1], shares[right] = (1 - weight) * times[right - 1], weight * times[right]
        shares[-1] = self.profile.read_s * num_read
        return shares / predicted_s

    def _rebuild(self) -> None:
        start = np.log(self.start.target_s)
        self._logs[:-1] = _level(start + self._logs[:-1], 1 / np.diag(self._variance)[:-1]) - start
        factors = np.exp(self._logs).tolist()
        times = tuple(seconds * factor for seconds, factor in zip(self.start.target_s, factors, strict=False))
        self.profile = replace(self.start, target_s=times, read_s=self.start.read_s * factors[-1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": asdict(self.start),
            "logs": self._logs.tolist(),
            "variance": self._variance.tolist(),
            "surprise": self._surprise,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FollowedProfile:
        """The profile that `state_dict` described."""
        start: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in state["start"].items()
        }
        followed = cls(HardwareProfile(**start))
        followed._logs, followed._variance = np.array(state["logs"]), np.array(state["variance"])
        followed._surprise = float(state["surprise"])
        followed._rebuild()
        return followed


def _level(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest values that never fall, by weighted least squares: neighbours that do are pooled."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            before, its_weight, its_count = pools.pop()
            mean = (mean * total + before * its_weight) / (total + its_weight)
            total, count = total + its_weight, count + its_count
        pools.append((mean, total, count))
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])
