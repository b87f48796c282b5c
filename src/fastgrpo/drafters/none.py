"""No drafter: every step is plain decoding."""

from __future__ import annotations

from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan


class NoDrafter:
    """Proposes nothing."""

    name = "none"
    wants_features = False
    position_bytes = 0

    def begin(self) -> None:
        pass

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        return Draft.roots(context.pending_token_ids)

    def count_unread(self, sequences: list[Sequence]) -> int:
        return 0

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        pass

    def release(self, slot: int, last_slot: int) -> None:
        pass
