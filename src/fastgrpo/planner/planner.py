"""What every planner is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastgrpo.types import SpeculationPlan, StepRecord

Chances = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """What the engine knows before a step.

    Raises:
        ValueError: no sequence is live, or num_waiting, num_read or the room is negative; the message names the value.
    """

    num_seqs: int
    num_waiting: int = 0
    num_read: int = 0  # cached positions of all sequences, which attention will read
    num_unread: int = 0  # tokens the drafter has not read yet: the price of switching on
    max_draft_tokens: int | None = None  # of each sequence, that the cache has room for; None: of any plan

    def __post_init__(self) -> None:
        if self.num_seqs < 1:
            raise ValueError(f"a step is planned for at least 1 live sequence, got {self.num_seqs}")
        if not (self.num_waiting >= 0 and self.num_read >= 0):
            raise ValueError(f"num_waiting and num_read must be at least 0, got {self.num_waiting}, {self.num_read}")
        if self.max_draft_tokens is not None and self.max_draft_tokens < 0:
            raise ValueError(f"max_draft_tokens must be at least 0, or None, got {self.max_draft_tokens}")

    def find_room(self, max_num_tokens: int) -> int:
        """Draft tokens of each sequence at most, with so many tokens in a target forward, roots included."""
        room = max_num_tokens // self.num_seqs - 1
        return room if self.max_draft_tokens is None else min(room, self.max_draft_tokens)


class Planner(Protocol):
    """Decides each step's plan and hears what came of it."""

    @property
    def name(self) -> str: ...

    def begin(self) -> None:
        """A rollout starts, perhaps with a better drafter."""
        ...

    def plan(self, inputs: PlanInputs) -> SpeculationPlan: ...

    def choose_budget(self, plan: SpeculationPlan, inputs: PlanInputs, chances: Chances) -> int:
        """Draft tokens to verify, all sequences together; asked where the plan has them share a budget.

        Args:
            plan: what `plan` returned for the same inputs.
            chances: of being accepted, in [0, 1], of each drafted token of each sequence, in falling order.
        """
        return min(inputs.num_seqs * plan.num_draft_tokens, len(chances))

    def observe(self, record: StepRecord) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...
