"""What a trainable drafter learns from finished rollouts: its training loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fastgrpo import block_training
from fastgrpo.block_training import BlockBatch, measure_block_acceptance
from fastgrpo.draft_loss import DEFAULT_LOSS, DraftLoss, LossName
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.block_head import BlockHead
from fastgrpo.drafters.drafter import TrainableDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.engine import FinishedRollout
from fastgrpo.model import TargetModel
from fastgrpo.unroll import DraftBatch, collate, compute_outputs, count_pairs, measure_acceptance

_UNROLL_DECAY = 0.8


class Objective(Protocol):
    """How a kind of head learns; each has its own head and its own batches. The gradient never reaches the target."""

    def count_rows(self, rollout: FinishedRollout) -> int:
        """Rows that the rollout takes in a batch: what its teaching costs."""
        ...

    def collate(self, rollouts: list[FinishedRollout], dtype: torch.dtype) -> Any:
        """Rollouts as one batch, features in `dtype`."""
        ...

    def count_taught(self, batch: Any) -> int:
        """Completion tokens that the batch teaches."""
        ...

    def compute_losses(self, head: Any, batch: Any) -> Float[Tensor, " K"]:
        """Loss at each of K steps of a draft, averaged over the tokens that teach there."""
        ...

    def weigh(self, losses: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """The losses as one."""
        ...


class EagleObjective:
    """An EAGLE-3 head unrolled on its own outputs (training-time test, arXiv:2503.01840)."""

    def __init__(self, target: TargetModel, loss: LossName = DEFAULT_LOSS) -> None:
        self.target, self.loss = target, loss

    def count_rows(self, rollout: FinishedRollout) -> int:
        return count_pairs(rollout)

    def collate(self, rollouts: list[FinishedRollout], dtype: torch.dtype) -> DraftBatch:
        return collate(rollouts, self.target, dtype)

    def count_taught(self, batch: DraftBatch) -> int:
        return int(batch.is_taught.sum())

    def compute_losses(self, head: EagleHead, batch: DraftBatch) -> Float[Tensor, " K"]:
        hidden = head.read_out(compute_outputs(head, self.target, batch))
        return compare_with_target(
            hidden, head.lm_head.weight, batch.target_hidden, batch.temperature, batch.is_reachable, self.loss
        )

    def weigh(self, losses: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """What is far down a draft is seldom reached."""
        return losses @ _UNROLL_DECAY ** torch.arange(len(losses), device=losses.device)


class BlockObjective:
    """A block head behind anchors of the text, each level against the target's distribution at its place.

    Levels weigh exp(-k / gamma), and gamma is half the block as in DFlash (arXiv:2602.06036) for blocks of 8.
    DSpark (arXiv:2607.05147) adds a head that is trained to say what a draft is worth; here that is fitted.
    """

    def __init__(self, target: TargetModel, block_size: int, loss: LossName = DEFAULT_LOSS) -> None:
        self.target, self.block_size, self.loss = target, block_size, loss

    def count_rows(self, rollout: FinishedRollout) -> int:
        return block_training.count_tokens(rollout)

    def collate(self, rollouts: list[FinishedRollout], dtype: torch.dtype) -> BlockBatch:
        return block_training.collate(rollouts, self.target, dtype, block_size=self.block_size)

    def count_taught(self, batch: BlockBatch) -> int:
        return int(batch.is_taught.sum())

    def compute_losses(self, head: BlockHead, batch: BlockBatch) -> Float[Tensor, " K"]:
        hidden = block_training.compute_hidden(head, self.target, batch)
        losses = [
            compare_with_target(own[None], head.lm_head.weight, theirs, batch.temperature, taught[None], self.loss)
            for own, theirs, taught in zip(hidden, batch.target_hidden, batch.is_taught, strict=True)
        ]
        return torch.cat(losses)

    def weigh(self, losses: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """What is far down a draft is seldom reached."""
        level = torch.arange(len(losses), device=losses.device)
        return losses @ torch.exp(-level / (self.block_size / 2))


def build_objective(drafter: TrainableDrafter, loss: LossName = DEFAULT_LOSS) -> Objective:
    """The objective of this kind of drafter."""
    if isinstance(drafter, BlockDrafter):
        return BlockObjective(drafter.target, drafter.head.block_size, loss)
    assert isinstance(drafter, EagleDrafter), f"no objective for {type(drafter).__name__}"
    return EagleObjective(drafter.target, loss)


def measure_head(drafter: TrainableDrafter, rollouts: list[FinishedRollout]) -> Float[Tensor, "depth rank"]:
    """How often the target would choose a draft, by depth and sibling rank, on finished rollouts."""
    if isinstance(drafter, BlockDrafter):
        return measure_block_acceptance(drafter, rollouts)
    assert isinstance(drafter, EagleDrafter), f"no measure for {type(drafter).__name__}"
    return measure_acceptance(drafter, rollouts)


def compare_with_target(
    hidden: Float[Tensor, "K Q H"],
    rows: Float[Tensor, "C H"],
    target_hidden: Float[Tensor, "Q H"],
    temperature: Float[Tensor, " Q"],
    is_taught: Tensor,
    loss: LossName,
) -> Float[Tensor, " K"]:
    """Mean loss of each step against the target's distribution over the draft vocabulary.

    Args:
        hidden: what meets the output rows, for Q tokens at each of K steps.
        rows: the target's output rows for the draft vocabulary.
        target_hidden: final hidden states of the target that predict the same tokens.
        is_taught: [K, Q], which rows count.
    """
    with torch.no_grad():
        counted = is_taught.float()
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
    losses: Tensor = DraftLoss.apply(hidden, rows.detach(), target_hidden, temperature, weights, loss)
    return losses
