"""The interface of drafters, and what they are given at each step."""

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
    """The running sequences at the start of a step, in slot order; tensors are built when first asked for."""

    sequences: list[Sequence]
    cache: SlotCache  # read only: features of every cached token, if the drafter wants them
    device: torch.device  # of the tensors
    rows: SamplingRows = field(default_factory=SamplingRows)  # builds `sampling`

    @functools.cached_property
    def sampling(self) -> SamplingBatch:
        """Rows at the position of the first draft token."""
        return self.rows.build(self.sequences, self.device)

    @functools.cached_property
    def kind(self) -> SamplingKind:
        return SamplingKind.find(self.sequences)

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """The numbers of `sampling` on the host, [columns, B]: a recorded step is fed with them."""
        return list_columns(self.sequences)

    @functools.cached_property
    def pending_token_ids(self) -> Int[Tensor, " B"]:
        return upload([sequence.pending_token_id for sequence in self.sequences], self.device)


class Drafter(Protocol):
    """Proposes draft trees. Whatever is proposed, the tokens emitted stay exact; a good proposal gets more accepted.

    `name` is what users type and logs show. `wants_features` asks the engine to keep target features. `position_bytes`
    is the memory that one position takes in the drafter's own rows of running sequences, 0 if it keeps none. A row
    holds no more than the sequence's cached tokens, its pending one and, while `propose` runs,
    `plan.width * plan.depth` nodes, in blocks of `fastgrpo.blocks.BLOCK_SIZE`.

    Optional methods: `judge(draft, verdict)` is told what the target chose of the last draft, and `end()` that no
    sequence runs any more, so that their memory can be given back. Optional attributes:

    - `can_be_timed`: True if `propose` may be called with made-up sequences, which `begin` then forgets.
    - `members`: drafters that it consults. The first is timed in its place, one with a head is trained.
    - `target`: what it runs the target model through; if a member has one, that may be the engine's too.
    - `has_recorded`: True if a CUDA graph of the last draft was recorded.
    - `was_replayed`: False if the next draft like the last one will be faster, as after one that was recorded.
    - `way_shares`: shares of this rollout's drafts by how they came about, for the log.
    """

    name: str
    wants_features: bool

    @property
    def position_bytes(self) -> int: ...

    def begin(self) -> None:
        """A rollout starts: no sequence runs."""
        ...

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        """Draft a tree of at most `plan.tree_size` nodes, root not counted, and `plan.depth` levels for each sequence.

        Called only with a plan that is not plain, and not at every step.
        """
        ...

    def count_unread(self, sequences: list[Sequence]) -> int:
        """Cached tokens of the running sequences, in slot order, that the drafter must read before it can propose."""
        ...

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        """`sequence` has emitted its last `num_new_tokens` tokens (0: it has just been admitted)."""
        ...

    def release(self, slot: int, last_slot: int) -> None:
        """The sequence in `slot` runs no more, finished or preempted; the one in `last_slot` moves there."""
        ...


@runtime_checkable
class TrainableDrafter(Drafter, Protocol):
    """A drafter with a head that learns from finished rollouts; see `fastgrpo.objective`.

    Optional attribute: `acceptance`, which a planner begins with (see `HeadDrafter`).
    """

    was_trained: bool  # the head was loaded, not started from the target's weights

    @property
    def target(self) -> TargetModel: ...

    @property
    def head(self) -> nn.Module:
        """What is trained, float32; its `lm_head` holds rows of the target's output head and is not trained."""
        ...

    def refresh(self) -> None:
        """Copy the trained weights into the head that drafts; output rows come from the target as it is now."""
        ...

    def select_vocabulary(self, counts: Int[Tensor, " V"]) -> None:
        """Make the most counted tokens the vocabulary of the trained head; drafts use it after the next `refresh`."""
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
    """A drafter that remembers earlier rollouts, and can save what it remembers."""

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None:
        """Replace what is remembered with what `save` wrote.

        Raises:
            ValueError: a file is missing or damaged; names it.
        """
        ...
