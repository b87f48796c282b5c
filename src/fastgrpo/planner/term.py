"""For how long a decision stands."""

from __future__ import annotations

import math

from fastgrpo.planner.planner import PlanInputs

NUM_STEPS, MOST_STEPS = 7, 23  # that a decision stands for without asking again: twice as many where it did before


class Term:
    """A decision stands for some steps, while about as many sequences run, they read about as much, and nobody joins.

    About: the same octave of sequences, and room for as many drafts; half to twice the cached positions.
    """

    def __init__(self) -> None:
        self._decided_for: tuple[int, int | None] | None = None  # octave of sequences; room
        self._decided_read = 0  # cached positions that forwards read then
        self._last_num_seqs = 0
        self._steps_left = 0
        self._num_steps = NUM_STEPS

    def goes_on(self, inputs: PlanInputs) -> bool:
        """Whether what was decided last is done in this step, too."""
        nobody_joined = inputs.num_seqs <= self._last_num_seqs
        self._last_num_seqs = inputs.num_seqs
        if self._steps_left > 0 and nobody_joined and self._is_alike(inputs):
            self._steps_left -= 1
            return True
        return False

    def begin(self, inputs: PlanInputs, *, stands: bool, most_steps: float = math.inf) -> None:
        """Something was decided.

        Args:
            stands: it is what was decided before.
            most_steps: after this one, that it stands for.
        """
        stands = stands and self._is_alike(inputs)
        self._num_steps = min(2 * self._num_steps + 1, MOST_STEPS) if stands else NUM_STEPS
        self._steps_left = int(min(self._num_steps, most_steps))
        self._decided_for, self._decided_read = _find_state(inputs), inputs.num_read

    def forget(self) -> None:
        """The next step decides anew."""
        self._decided_for = None

    def _is_alike(self, inputs: PlanInputs) -> bool:
        is_as_long = self._decided_read <= 2 * inputs.num_read <= 4 * self._decided_read
        return is_as_long and _find_state(inputs) == self._decided_for


def _find_state(inputs: PlanInputs) -> tuple[int, int | None]:
    return inputs.num_seqs.bit_length(), inputs.max_draft_tokens
