"""What every drafter is asked."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from fastgrpo.cache import SlotCache
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch, SamplingKind, SamplingRows, list_columns
from fastgrpo.transfer import upload
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan


@dataclass(frozen=True, kw_only=True)
class DraftContext:
    """The running sequences at the start of a step, in slot order; as tensors where they are asked for."""

    sequences: list[Sequence]
    cache: SlotCache  # read only: features of every cached token, if the drafter wants them
    device: torch.device  # of the tensors
    rows: SamplingRows = field(default_factory=SamplingRows)  # that `sampling` is built by

    @functools.cached_property
    def sampling(self) -> SamplingBatch:
        """Rows at the position of the first draft token."""
        return self.rows.build(self.sequences, self.device)

    @functools.cached_property
    def kind(self) -> SamplingKind:
        return SamplingKind.find(self.sequences)

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """What a recorded step reads `sampling` from, on the host."""
        return list_columns(self.sequences)

    @functools.cached_property
    def pending_token_ids(self) -> Int[Tensor, " B"]:
        return upload([sequence.pending_token_id for sequence in self.sequences], self.device)


class Drafter(Protocol):
    """Proposes draft trees. Any proposal is exact; a good one is accepted.

    `name` is what users type and logs show; `wants_features` asks the engine to keep target features.
    `position_bytes` is what a position takes in the rows that the drafter itself keeps of running sequences, 0 without
    any; a row holds no more than the sequence's cached tokens, its pending one and, while `propose` runs,
    `plan.width * plan.depth` nodes, in blocks of `fastgrpo.blocks.BLOCK_SIZE`.
    Two methods are optional: `judge(draft, verdict)` hears what the target chose of the draft proposed last, and
    `end()` that no sequence runs any more, so that memory for them goes back. Two attributes too, for the profiler:
    `can_be_timed` True says that `propose` may be called for sequences that are made up, after which `begin` forgets
    them; of a drafter with `members`, the first is timed in its place.
    """

    name: str
    wants_features: bool

    @property
    def position_bytes(self) -> int: ...

    def begin(self) -> None:
        """A rollout starts: no sequence runs."""
        ...

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        """At most `plan.tree_size` nodes a row and `plan.depth` levels; rows may get fewer.

        Called only with a plan that is not plain; steps may pass between two calls.
        """
        ...

    def count_unread(self, sequences: list[Sequence]) -> int:
        """Cached tokens of the running sequences, in slot order, that the drafter must read before it can propose."""
        ...

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        """`sequence` has emitted its last `num_new_tokens` tokens (0: it has just been admitted)."""
        ...

    def release(self, slot: int, last_slot: int) -> None:
        """The sequence of `slot` is finished; the one of `last_slot` moves there."""
        ...


@runtime_checkable
class TrainableDrafter(Drafter, Protocol):
    """A drafter with a head that learns from finished rollouts; see `fastgrpo.objective`."""

    was_trained: bool  # the head did not begin from nothing

    @property
    def target(self) -> TargetModel: ...

    @property
    def head(self) -> nn.Module:
        """float32; its `lm_head` holds rows of the target's own and is not trained."""
        ...

    def refresh(self) -> None:
        """Take the trained weights into the copy that drafts; output rows come from the target as it is now."""
        ...

    def select_vocabulary(self, counts: Int[Tensor, " V"]) -> None:
        """Learn to draft from the most counted tokens; drafts do after the next `refresh`."""
        ...

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote into this head.

        Raises:
            ValueError: damaged files, or a head of another target; names what differs.
        """
        ...


@runtime_checkable
class StatefulDrafter(Drafter, Protocol):
    """A drafter that remembers earlier rollouts and goes on with them after a restart."""

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None:
        """Take what `save` wrote in the place of what is remembered.

        Raises:
            ValueError: a file is missing or damaged; names it.
        """
        ...
