"""Work that the update leaves out because the rollout, or an earlier pass, has done it already."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastgrpo.grpo.checks import check_advantages
from fastgrpo.grpo.micro_batch import OLD_LOGPS, MicroBatch
from fastgrpo.grpo.old_logps import choose_old_logps
from fastgrpo.grpo.rollout_facts import ENTROPIES, LOGPS, STEP, RolloutFacts, Turn
from fastgrpo.grpo.scoring import (
    can_share_prompts,
    find_counted,
    find_own_batch,
    find_own_loss,
    find_rows_to_train,
    find_skipping_obstacle,
    score_rows,
)
from fastgrpo.types import Completion

logger = logging.getLogger(__name__)


class Savings:
    """What one trainer's updates leave out: rows without advantage, repeated prompts, passes for old log-probs.

    A training generation calls `begin`, `hear` for each call of the engine, `line_up` and `attach`. An update calls
    `plan` for each micro-batch; TRL's loss then scores what the plan says (`take_batch`), and `finish` keeps and
    measures the scores. What cannot be left out, and why, is logged once.
    """

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        self._own_methods = own, own_batch = _find_own_methods(trainer)
        self.has_own_loss, self._has_own_batch = own is not None, own_batch is not None
        self.shares_prompts = args.share_prompts and can_share_prompts(trainer)
        self.old_logps_from, reason = choose_old_logps(trainer)
        self._turns: list[Turn] = []
        self._facts: RolloutFacts | None = None  # of the generation under way
        self._facts_for_old: RolloutFacts | None = None  # set while the next scores TRL asks for are the old log-probs
        self._batch: MicroBatch | None = None  # planned, and not scored yet
        self._reward_names = trainer.reward_func_names
        self._sum = trainer.accelerator.reduce if trainer.accelerator.num_processes > 1 else None
        self._has_work = True  # whether some process has rows to compute in the first pass over the generation
        self._met_in = -1  # the last optimiser step in which processes had to meet
        if own is not None:
            logger.warning("the update computes every row as TRL does: %s is not ours and may read them all", own)
        if own_batch is not None:
            logger.info("the update asks the rollout for nothing: %s is not ours and may change the batch", own_batch)
        self.choose_rows(trainer)
        if self.old_logps_from != "none":
            logger.info("old log-probabilities come from: %s, as %s", self.old_logps_from, reason)

    def is_of(self, trainer: Any) -> bool:
        """Whether the trainer has the methods that it had when this was chosen."""
        return self._own_methods == _find_own_methods(trainer)

    def choose_rows(self, trainer: Any) -> None:
        """Whether rows without advantage are left out, by what the trainer's loss is now."""
        obstacle = find_skipping_obstacle(trainer)
        self.skips_rows = trainer.args.skip_zero_advantages and obstacle is None
        if trainer.args.skip_zero_advantages and obstacle is not None and not self.has_own_loss:
            logger.info("rows without advantage are computed like the others: %s", obstacle)

    # -- generation ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A generation starts."""
        self._turns, self._facts, self._facts_for_old, self._batch = [], None, None, None

    def hear(self, prompt_ids: list[list[int]], completions: list[Completion]) -> None:
        """Take in what one call of the engine generated."""
        self._turns.append(Turn(prompt_ids=prompt_ids, completions=completions))

    def line_up(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], tool_mask: list[list[int]] | None
    ) -> None:
        """Match what the engine generated with the rows that TRL will train on, prompt and completion apart."""
        if self._has_own_batch:
            return
        self._facts = RolloutFacts.build(self._turns, prompt_ids, completion_ids, tool_mask)
        self._facts_for_old = self._facts if self.old_logps_from in ("update", "rollout") else None

    def answer_old_logps(
        self,
        score: Callable[[Tensor], Tensor],
        completion_ids: Int[Tensor, "B C"],
        attention_mask: Int[Tensor, "B L"],
    ) -> Float[Tensor, "B C"] | None:
        """The old log-probs, if those are what TRL asks for now; else None.

        They are the rollout's, or NaN where the update's first pass is to fill them in.

        Args:
            score: computes the log-probs of given rows; asked for rows of which the rollout does not know every token.
        """
        facts, self._facts_for_old = self._facts_for_old, None
        if facts is None:
            return None
        if self.old_logps_from == "update":
            return torch.full(completion_ids.shape, math.nan, device=completion_ids.device)
        logps, is_missing = facts.find_old_logps(completion_ids, attention_mask)
        if bool(is_missing.any()):
            logps[is_missing] = score(is_missing)
        return logps

    def attach(self, output: dict[str, Any], step: int, *, is_training: bool) -> None:
        """Add the facts to TRL's batch, and end the generation; all processes call it together in training."""
        if is_training and self._sum is not None:
            self._has_work = bool(self._sum(self._count_work(output)) > 0)
        if self._facts is not None:
            facts = self._facts.fit(output["completion_ids"])
            output |= {LOGPS: facts.logps, ENTROPIES: facts.entropies, STEP: torch.tensor(step)}
        self.begin()

    def _count_work(self, output: dict[str, Any]) -> Int[Tensor, ""]:
        """Rows that the first pass must compute."""
        is_counted = find_counted(output)
        if self._facts is None or not self.skips_rows:
            return is_counted.any(1).sum()
        is_missing = is_counted & self._facts.fit(output["completion_ids"]).logps.isnan()
        return (find_rows_to_train(output) | is_missing.any(1)).sum()

    # -- update --------------------------------------------------------------------------------------

    def plan(self, inputs: dict[str, Any], step: int) -> MicroBatch:
        """Choose the rows of a micro-batch to compute; `take_batch` hands them out.

        Raises:
            FloatingPointError: advantages are not finite.
        """
        check_advantages(inputs["advantages"], step, self._reward_names)
        awaits_old_logps = self.old_logps_from == "update"
        self._batch = MicroBatch.plan(
            inputs,
            step=step,
            skips_rows=self.skips_rows,
            awaits_old_logps=awaits_old_logps,
            keeps_step=self._sum is not None and self._meets(inputs, step),
        )
        return self._batch

    def _meets(self, inputs: dict[str, Any], step: int) -> bool:
        """Whether processes meet in this pass over a micro-batch; all of them say the same.

        Once they have met in an optimiser step they do so to its end: its last pass adds up what all have gathered.
        """
        if self._has_work or step != int(inputs.get(STEP, -1)):
            self._met_in = step
        return self._met_in == step

    def fill_old_logps(self, batches: Sequence[dict[str, Any]], model: nn.Module) -> None:
        """Compute the old log-probs of micro-batches whose first pass is still to come, before the weights change.

        Args:
            batches: all micro-batches of a generation; changed in place.
        """
        for inputs in batches if self.old_logps_from == "update" else ():
            old_logps = inputs[OLD_LOGPS]
            if bool(old_logps.isnan().any()):
                rows = find_rows_to_train(inputs) if self.skips_rows else find_counted(inputs).any(1)
                old_logps.zero_()  # rows without a gradient do not use them
                old_logps[rows] = score_rows(model, inputs, rows, shares_prompts=self.shares_prompts)

    def age(self, batches: Sequence[dict[str, Any]], model: nn.Module) -> None:
        """Mark a generation left over from an earlier `train` as no longer fresh, since steps are counted anew.

        Args:
            batches: all micro-batches of that generation; changed in place.
        """
        self.fill_old_logps(batches, model)
        for inputs in batches:
            inputs.pop(STEP, None)

    def expect(self, batch: MicroBatch) -> None:
        """Hand out this micro-batch for the next call of TRL's loss."""
        self._batch = batch

    def take_batch(self, completion_ids: Int[Tensor, "B C"]) -> MicroBatch:
        """What to score now: the planned micro-batch, once; or every row, where TRL asks outside its loss."""
        batch, self._batch = self._batch or MicroBatch.of_all(completion_ids), None
        return batch

    def finish(self, batch: MicroBatch, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Keep the scores of a micro-batch for later passes; returns the metrics to log.

        Args:
            gather: collects a tensor's values from all processes, as `Accelerator.gather` does.
        """
        self._batch = None
        batch.keep_old_logps()
        metrics = {}
        if self.skips_rows:
            metrics["update/skipped_share"] = 1 - float(batch.rows_to_train.float().mean())
            metrics["update/unscored_share"] = float(batch.rows_known.float().mean())
        if batch.rollout is not None:
            means, largest = gather(batch.compare()[None]).unbind(1)
            metrics["sampling/sampling_logp_difference/mean"] = float(means.nanmean())
            metrics["sampling/sampling_logp_difference/max"] = max(
                (value for value in largest.tolist() if not math.isnan(value)), default=math.nan
            )
        return metrics


def _find_own_methods(trainer: Any) -> tuple[str | None, str | None]:
    return find_own_loss(trainer), find_own_batch(trainer)
