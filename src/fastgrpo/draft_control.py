"""How hard a draft head learns, and when it goes back: judged on rollouts that it has not learnt from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_TOLERANCE = 0.03  # relative rise of a head's loss over the reference's that is still noise
_LEAST_GAIN = 0.001  # relative fall of the loss by one call of learning that is worth its time
_LEAST_EFFORT = 0.125  # at rest
_CLIMB = 0.1  # relative rise of the loss over its trend that ends the rest
_SMOOTHING = 0.3  # weight of the newest value in the running means of gain and loss


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

    A head whose loss is clearly above the reference's is rolled back. Where learning has stopped
    to lower the loss on unseen text the effort halves; it doubles where it lowers it, and is whole at
    once when the loss itself climbs, as it does when the policy moves away.
    """

    def __init__(self) -> None:
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
        if gain < -_TOLERANCE:
            self._gain = None
            return Judgement(Outcome.ROLL_BACK, self.effort)
        self._gain = gain if self._gain is None else self._gain + _SMOOTHING * (gain - self._gain)
        factor = 2.0 if self._gain > _LEAST_GAIN else 0.5
        self.effort = min(max(self.effort * factor, _LEAST_EFFORT), 1.0)
        if self._trend is not None and loss > (1 + _CLIMB) * self._trend:
            self.effort = 1.0
        self._trend = loss if self._trend is None else self._trend + _SMOOTHING * (loss - self._trend)
        return Judgement(Outcome.ADOPT if gain > 0 else Outcome.KEEP, self.effort)

    def state_dict(self) -> dict[str, Any]:
        return {"effort": self.effort, "gain": self._gain, "trend": self._trend}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.effort = float(state["effort"])
        self._gain = None if state["gain"] is None else float(state["gain"])
        self._trend = None if state["trend"] is None else float(state["trend"])
