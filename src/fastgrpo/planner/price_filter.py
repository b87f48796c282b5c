"""Prices followed through noisy sums of them: an extended Kalman filter over their logarithms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DOUBT = 0.5  # nats; what a price may be off by, before anything was measured
_DRIFT = 0.003  # nats; what a price changes by from step to step
_TEMPO, _TEMPO_KEPT = 0.1, 0.9  # nats that the machine's tempo scatters by at first; of it, from step to step
_LEAST_TEMPO, _MOST_TEMPO, _TEMPO_RATE = 0.02, 0.25, 0.02  # nats; of what two errors in a row say of it
_NOISE_RATE, _MOST_NOISE = 0.02, 0.3  # that an error raises or lowers the noise by; nats
_MEDIAN = 0.674  # of a normal distribution's absolute values, in standard deviations
_OUTLIER, _IMPOSSIBLE = 2.5, 4.0  # standard deviations: more is taken for this; nothing is learnt beyond
_SURPRISE_RATE, _MOST_SURPRISE = 0.25, 1.5  # of the running mean of such deviations; beyond, the prices are doubted
_DOUBT_AGAIN = 0.25  # share of the first doubt's variance that comes back then
_LEAST_S = 1e-12  # of a price that is given as 0

Vector = NDArray[np.float64]


class PriceFilter:
    """Positive prices whose sum, each times what was bought, is what was measured.

    The blame for an error goes where the doubt is. Single outliers move little; when several measurements agree that
    the prices are wrong, they are doubted anew, and soon right.

    Where other work slows a machine for a while, everything takes longer: with `has_tempo` what is measured is also
    multiplied by a tempo, which changes fast and returns to 1, so that a slow second is not taken for dear forwards.

    Args:
        prices: what is believed to begin with.
        noise: nats that measurements scatter by at least; how much they do is learnt.
        alike: correlation of the prices' errors; None takes them for independent.
    """

    def __init__(
        self, prices: Sequence[float], *, noise: float, alike: Vector | None = None, has_tempo: bool = False
    ) -> None:
        self.prices: Vector = np.maximum(np.array(prices, dtype=np.float64), _LEAST_S)
        self.noise, self._least_noise = noise, noise
        self._log_tempo = 0.0
        count = len(self.prices)
        self._prior = np.zeros((count + 1, count + 1))  # the last is the tempo
        self._prior[:count, :count] = _DOUBT**2 * (np.eye(count) if alike is None else alike)
        self.variance = self._prior.copy()
        self.has_tempo = has_tempo
        self._tempo_variance = _TEMPO**2 if has_tempo else 0.0
        self._last_error = 0.0  # beside the prices alone
        self.variance[-1, -1] = self._tempo_variance
        self._surprise = 0.0

    @property
    def tempo(self) -> float:
        """What everything takes now over what it takes as a rule."""
        return math.exp(self._log_tempo)

    @property
    def doubts(self) -> Vector:
        """Variance of each log price."""
        return np.diag(self.variance)[:-1]

    def observe(self, bought: Vector, measured_s: float, num_steps: int = 1) -> None:
        """Learn from one measurement, the mean of so many steps in a row, which scatters as one does.

        What no clock says, seconds that are not positive and finite, teaches nothing.
        """
        spent = self.prices * bought
        predicted_s = float(spent.sum())
        if predicted_s <= 0 or not 0 < measured_s < math.inf:
            return
        self._wait(num_steps)
        shares = np.ones(len(spent) + 1)  # the last is the tempo's
        shares[:-1] = spent / predicted_s
        error = math.log(measured_s / predicted_s)
        if self.has_tempo:
            self._learn_tempo(error)
        error -= self._log_tempo
        spread = self.variance @ shares
        deviation = math.sqrt(float(shares @ spread) + self.noise**2)
        scaled = error / deviation
        clipped = min(max(scaled, -_OUTLIER), _OUTLIER)
        doubt = float(shares[:-1] @ spread[:-1]) / deviation**2  # share of it that is doubt of the prices
        weight = max(doubt, max(1 - (scaled / _IMPOSSIBLE) ** 2, 0.0) ** 2)  # Tukey's biweight where they are known
        moves = spread * (weight * clipped / deviation)
        self.prices *= np.exp(moves[:-1])
        self._log_tempo += float(moves[-1])
        self.variance -= spread[:, None] * (spread / deviation**2)
        self._learn_noise(error, deviation)
        self._surprise += _SURPRISE_RATE * (clipped - self._surprise)
        if abs(self._surprise) > _MOST_SURPRISE:
            self.variance += _DOUBT_AGAIN * self._prior
            self._surprise = 0.0

    def settle(self) -> None:
        """Take the tempo for 1."""
        self._log_tempo = 0.0

    def _wait(self, num_steps: int) -> None:
        """What so many steps do to what is known: prices drift, the tempo returns to 1."""
        kept = _TEMPO_KEPT**num_steps
        self._log_tempo *= kept
        self.variance[-1] *= kept
        self.variance[:, -1] *= kept
        self.variance += num_steps * (_DRIFT / _DOUBT) ** 2 * self._prior
        self.variance[-1, -1] += (1 - kept**2) * self._tempo_variance

    def _learn_tempo(self, error: float) -> None:
        """Noise has no memory, the tempo has: what errors in a row share is the tempo's."""
        error = min(max(error, -_MOST_NOISE), _MOST_NOISE)
        shared = error * self._last_error / _TEMPO_KEPT
        variance = self._tempo_variance + _TEMPO_RATE * (shared - self._tempo_variance)
        self._tempo_variance = min(max(variance, _LEAST_TEMPO**2), _MOST_TEMPO**2)
        self._last_error = error

    def _learn_noise(self, error: float, deviation: float) -> None:
        """Half of all errors should be larger than half of a normal distribution's: outliers count as one each."""
        is_larger = abs(error) > _MEDIAN * deviation
        noise = self.noise * math.exp(_NOISE_RATE * (1 if is_larger else -1))
        self.noise = min(max(noise, self._least_noise), _MOST_NOISE)

    def state_dict(self) -> dict[str, Any]:
        return {
            "prices": self.prices.tolist(),
            "variance": self.variance.tolist(),
            "noise": self.noise,
            "log_tempo": self._log_tempo,
            "tempo_variance": self._tempo_variance,
            "last_error": self._last_error,
            "surprise": self._surprise,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` described.

        Raises:
            ValueError: these are no positive prices, or more or fewer of them.
        """
        prices, variance = np.array(state["prices"], dtype=np.float64), np.array(state["variance"])
        if prices.shape != self.prices.shape or not (np.isfinite(prices) & (prices > 0)).all():
            raise ValueError(f"{len(self.prices)} prices above 0 are expected, got {state['prices']!r:.60}")
        self.prices = prices
        self.variance[: len(variance), : len(variance)] = variance  # older states have no tempo
        self.noise = float(state.get("noise", self.noise))
        self._log_tempo = float(state.get("log_tempo", 0.0))
        self._tempo_variance = float(state.get("tempo_variance", self._tempo_variance))
        self._last_error = float(state.get("last_error", 0.0))
        self._surprise = float(state["surprise"])
