"""One micro-batch of an update: what must be computed, what the rollout has computed already, and the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.grpo.rollout_facts import ENTROPIES, LOGPS, STEP
from fastgrpo.grpo.scoring import find_counted, find_rows_to_train

OLD_LOGPS = "old_per_token_logps"  # TRL's name


@dataclass(kw_only=True)
class MicroBatch:
    """The rows of a micro-batch by what they need, and their scores once they are known.

    A row without an advantage has no gradient, but its entropy is logged: where the rollout has computed it, and the
    weights are still the rollout's, the row is not computed at all.
    """

    inputs: dict[str, Any]  # what TRL's loss reads
    is_counted: Bool[Tensor, "B C"]  # completion tokens that take part in loss and log
    rows_to_train: Bool[Tensor, " B"]  # computed with a gradient
    rows_known: Bool[Tensor, " B"]  # not computed; never rows to train
    rollout: tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]] | None  # log-probs and entropies of the same weights
    old_logps: Float[Tensor, "B C"] | None  # to be filled in with this pass's log-probs, for later passes
    logps: Float[Tensor, "B C"] | None = None  # this pass's
    entropies: Float[Tensor, "B C"] | None = None  # this pass's, nats

    @staticmethod
    def plan(
        inputs: dict[str, Any], *, step: int, skips_rows: bool, awaits_old_logps: bool, keeps_step: bool = False
    ) -> MicroBatch:
        """Decide what to compute.

        Args:
            inputs: TRL's slice of the batch.
            step: optimiser steps so far.
            skips_rows: rows without advantage need no gradient.
            awaits_old_logps: the first pass over a batch, whose weights are the rollout's, fills the old log-probs in.
            keeps_step: other processes wait for this one in every pass, so at least one row is computed.

        Raises:
            RuntimeError: the old log-probs are needed, and no first pass has filled them in.
        """
        is_fresh = STEP in inputs and int(inputs[STEP]) == step
        old_logps = inputs.get(OLD_LOGPS) if awaits_old_logps else None
        if old_logps is not None and is_fresh:
            inputs = {key: value for key, value in inputs.items() if key != OLD_LOGPS}
        elif old_logps is not None:
            check_old_logps(old_logps)
            old_logps = None
        is_counted = find_counted(inputs)
        rows = find_rows_to_train(inputs) if skips_rows else torch.ones_like(is_counted[:, 0])
        rollout = (inputs[LOGPS], inputs[ENTROPIES]) if is_fresh and LOGPS in inputs else None
        is_missing = is_counted if rollout is None else is_counted & rollout[0].isnan()
        rows_known = ~rows & ~is_missing.any(1)
        if keeps_step:
            rows_known[0] &= not bool(rows_known.all())
            rows = ~rows_known
        return MicroBatch(
            inputs=inputs,
            is_counted=is_counted,
            rows_to_train=rows,
            rows_known=rows_known,
            rollout=rollout,
            old_logps=old_logps,
        )

    @staticmethod
    def of_all(completion_ids: Int[Tensor, "B C"]) -> MicroBatch:
        """Every row is computed, with a gradient where gradients are on: for scores that TRL wants outside its loss."""
        is_counted = torch.ones_like(completion_ids, dtype=torch.bool)
        rows = is_counted.new_ones(len(is_counted))
        return MicroBatch(
            inputs={}, is_counted=is_counted, rows_to_train=rows, rows_known=~rows, rollout=None, old_logps=None
        )

    @staticmethod
    def of_known(inputs: dict[str, Any], logps: Float[Tensor, "B C"], entropies: Float[Tensor, "B C"]) -> MicroBatch:
        """No row is computed: `logps` and `entropies` are the scores."""
        everything = torch.ones_like(logps, dtype=torch.bool)
        rows = everything.new_ones(len(everything))
        return MicroBatch(
            inputs=inputs,
            is_counted=everything,
            rows_to_train=~rows,
            rows_known=rows,
            rollout=(logps, entropies),
            old_logps=None,
        )

    def begin_scores(self) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
        """Log-probs and entropies with the known rows filled in; the caller puts in those it computes."""
        shape, device = self.is_counted.shape, self.is_counted.device
        logps, entropies = self.inputs.get(OLD_LOGPS), torch.zeros(shape, device=device)
        logps = torch.zeros(shape, device=device) if logps is None else logps  # old or equal ones: a ratio of 1
        if self.rollout is None:
            return logps, entropies
        is_known = self.rows_known[:, None] & self.is_counted
        return torch.where(is_known, self.rollout[0], logps), torch.where(is_known, self.rollout[1], entropies)

    def split(self, batch_size: int | None) -> Iterator[tuple[Tensor, bool]]:
        """(rows, whether they need a gradient) that must be computed, at most `batch_size` at once."""
        for rows, has_gradient in ((self.rows_to_train, True), (~self.rows_to_train & ~self.rows_known, False)):
            chosen = rows.nonzero()[:, 0]
            if len(chosen):
                yield from ((part, has_gradient) for part in chosen.split(batch_size or len(chosen)))

    def keep_old_logps(self) -> None:
        """Fill in this pass's log-probs, in place: TRL hands the same tensor to the passes to come."""
        if self.old_logps is not None and self.logps is not None:
            self.old_logps.copy_(self.logps)

    def compare(self) -> Float[Tensor, " 2"]:
        """Mean and largest difference between the rollout's log-probs and this pass's; NaN where there are none."""
        difference = torch.full((1,), math.nan, device=self.is_counted.device)
        if self.rollout is not None and self.logps is not None:
            both = self.is_counted & ~self.rows_known[:, None] & ~self.rollout[0].isnan()
            difference = (self.logps - self.rollout[0])[both].abs() if bool(both.any()) else difference
        return torch.stack((difference.mean(), difference.max()))


def check_old_logps(old_logps: Float[Tensor, "B C"]) -> None:
    """Refuse old log-probs that no pass has filled in.

    Raises:
        RuntimeError: some are NaN.
    """
    if bool(old_logps.isnan().any()):
        raise RuntimeError(
            f"{OLD_LOGPS} are missing: they come from the first pass over a batch, and this batch had none before the "
            "weights moved; set old_logps='forward'"
        )
