"""How hard a draft head learns, and when it goes back: judged on rollouts that it has not learnt from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Outcome(Enum):
    """What becomes of a head beside its reference, the best head so far."""

    ADOPT = "adopt"  # it is the better one: the reference from now on
    KEEP = "keep"  # no better, within tolerance: it may go on
    ROLL_BACK = "roll back"  # it got worse: the reference takes its place


@dataclass(frozen=True)
class Judgement:
    outcome: Outcome
    effort: float  # share of the time budget that learning may take now, in (0, 1]


class LearningControl:
    """Compares head and reference on the newest rollouts, before these are learnt from.

    A head whose loss is more than `tolerance` above the reference's is rolled back. Where learning has stopped
    to lower the loss on unseen text the effort halves; it doubles where it lowers it, and is whole at
    once when the loss itself climbs, as it does when the policy moves away.

    Args:
        tolerance: relative rise of the loss over the reference's that is still noise.
        least_gain: relative fall of the loss by one call of learning that is worth its time.
        least_effort: effort at rest.
        climb: relative rise of the loss over its trend that ends the rest.
        smoothing: weight of the newest value in the running means of gain and loss, in (0, 1].
    """

    def __init__(
        self,
        *,
        tolerance: float = 0.03,
        least_gain: float = 0.001,
        least_effort: float = 0.125,
        climb: float = 0.1,
        smoothing: float = 0.3,
    ) -> None:
        self.tolerance, self.least_gain, self.climb = tolerance, least_gain, climb
        self.least_effort, self.smoothing = least_effort, smoothing
        self.effort = 1.0
        self._gain: float | None = None
        self._trend: float | None = None

    def judge(self, loss: float, reference_loss: float | None) -> Judgement:
        """What to do with a head of this loss.

        Args:
            loss: of the head on text it has not learnt from, in the learner's units; NaN where it cannot be computed.
            reference_loss: of the reference on the same text; None where there is no reference yet.
        """
        if reference_loss is None:
            is_known = math.isfinite(loss)
            self._trend = loss if is_known else None
            return Judgement(Outcome.ADOPT if is_known else Outcome.KEEP, self.effort)
        if not math.isfinite(reference_loss):
            return Judgement(Outcome.KEEP, self.effort)
        gain = (reference_loss - loss) / reference_loss if math.isfinite(loss) and reference_loss else -math.inf
        if gain < -self.tolerance:
            self._gain = None
            return Judgement(Outcome.ROLL_BACK, self.effort)
        self._gain = gain if self._gain is None else self._gain + self.smoothing * (gain - self._gain)
        factor = 2.0 if self._gain > self.least_gain else 0.5
        self.effort = min(max(self.effort * factor, self.least_effort), 1.0)
        if self._trend is not None and loss > (1 + self.climb) * self._trend:
            self.effort = 1.0
        self._trend = loss if self._trend is None else self._trend + self.smoothing * (loss - self._trend)
        return Judgement(Outcome.ADOPT if gain > 0 else Outcome.KEEP, self.effort)

    def state_dict(self) -> dict[str, Any]:
        return {"effort": self.effort, "gain": self._gain, "trend": self._trend}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.effort = float(state["effort"])
        self._gain = None if state["gain"] is None else float(state["gain"])
        self._trend = None if state["trend"] is None else float(state["trend"])
