"""What the update leaves out because the rollout, or an earlier pass, has said it: from the engine to TRL's loss."""

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
    find_obstacle,
    find_own_loss,
    find_rows_to_train,
    score_rows,
)
from fastgrpo.types import Completion

logger = logging.getLogger(__name__)


class Savings:
    """One trainer's. A training generation goes through `begin`, `hear` and `line_up` to `attach`; an update plans each
    micro-batch, TRL's loss scores what the plan says (`take_batch`), and `finish` keeps and measures the scores.

    What cannot be left out, and why, goes to the log once.
    """

    def __init__(self, trainer: Any) -> None:
        args, own, obstacle = trainer.args, find_own_loss(trainer), find_obstacle(trainer)
        self.has_own_loss = own is not None
        self.skips_rows = args.skip_zero_advantages and obstacle is None
        self.shares_prompts = args.share_prompts and can_share_prompts(trainer)
        self.old_logps_from, reason = choose_old_logps(trainer)
        self._turns: list[Turn] = []
        self._facts: RolloutFacts | None = None  # of the generation under way
        self._facts_for_old: RolloutFacts | None = None  # while TRL's next question is for the old log-probs
        self._batch: MicroBatch | None = None
        self._reward_names = trainer.reward_func_names
        self._sum = trainer.accelerator.reduce if trainer.accelerator.num_processes > 1 else None
        self._has_work = True  # some process has, in the first pass over the generation
        if own is not None:
            logger.warning("the update computes every row as TRL does: %s is not ours and may read them all", own)
        elif args.skip_zero_advantages and obstacle is not None:
            logger.info("rows without advantage are computed like the others: %s", obstacle)
        if self.old_logps_from != "none":
            logger.info("old log-probabilities come from: %s, as %s", self.old_logps_from, reason)

    # -- generation ----------------------------------------------------------------------------------

    def begin(self) -> None:
        self._turns, self._facts, self._facts_for_old, self._batch = [], None, None, None

    def hear(self, prompt_ids: list[list[int]], completions: list[Completion]) -> None:
        """One call of the engine."""
        self._turns.append(Turn(prompt_ids=prompt_ids, completions=completions))

    def line_up(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], tool_mask: list[list[int]] | None
    ) -> None:
        """The rows that TRL will train on."""
        self._facts = RolloutFacts.build(self._turns, prompt_ids, completion_ids, tool_mask)
        self._facts_for_old = self._facts if self.old_logps_from in ("update", "rollout") else None

    def answer_old_logps(
        self,
        score: Callable[[Tensor], Tensor],
        completion_ids: Int[Tensor, "B C"],
        attention_mask: Int[Tensor, "B L"],
    ) -> Float[Tensor, "B C"] | None:
        """The old log-probs if TRL asks for them now: the rollout's, or NaN that the first pass will fill in.

        Args:
            score: computes the log-probs of the rows it is given, for those that the rollout does not know whole.
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
        """Put the facts beside TRL's batch; of several processes each calls it once they have met over the rewards."""
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
        """
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
            keeps_step=self._sum is not None and (self._has_work or step != int(inputs.get(STEP, -1))),
        )
        return self._batch

    def fill_old_logps(self, batches: Sequence[dict[str, Any]], model: nn.Module) -> None:
        """Before the weights move: the old log-probs of micro-batches whose first pass is still to come.

        Args:
            batches: all of a generation.
        """
        for inputs in batches if self.old_logps_from == "update" else ():
            old_logps = inputs[OLD_LOGPS]
            if bool(old_logps.isnan().any()):
                rows = find_rows_to_train(inputs) if self.skips_rows else find_counted(inputs).any(1)
                old_logps.zero_()  # rows without a gradient make no use of them
                old_logps[rows] = score_rows(model, inputs, rows, shares_prompts=self.shares_prompts)

    def age(self, batches: Sequence[dict[str, Any]], model: nn.Module) -> None:
        """What an earlier training has left of a generation is no longer fresh: its steps were counted anew.

        Args:
            batches: all of that generation; changed in place.
        """
        self.fill_old_logps(batches, model)
        for inputs in batches:
            inputs.pop(STEP, None)

    def expect(self, batch: MicroBatch) -> None:
        """Of TRL's loss that comes next."""
        self._batch = batch

    def take_batch(self, completion_ids: Int[Tensor, "B C"]) -> MicroBatch:
        """What to score now: the planned micro-batch, once, or every row of what TRL asks outside its loss."""
        batch, self._batch = self._batch or MicroBatch.of_all(completion_ids), None
        return batch

    def finish(self, batch: MicroBatch, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Keep the scores for later passes; what is logged of them.

        Args:
            gather: of all processes' values.
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
