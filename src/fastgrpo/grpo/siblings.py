"""Siblings meet in one micro-batch: the rows of an optimiser step are dealt out by their prompts.

TRL shuffles what was generated and cuts it into micro-batches, so the completions of a prompt are spread over all that
one optimiser step accumulates, and each of them computes the prompt again. Where a row's weight in the step's gradient
does not depend on its neighbours, it may stand in any of them: the gradient is the same up to rounding.

What TRL logs are means over micro-batches, which do depend on who stands in which. So once the scores of a step are all
known they are put back into TRL's own micro-batches, and TRL's loss reads them there, without a model, for its log.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.grpo.scoring import find_own_loss

logger = logging.getLogger(__name__)

_PLACE = "place_in_step"  # of a row, in TRL's order
_TURN = "turn_in_step"  # of a micro-batch, from 0
_FREE_LOSSES = ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")  # of TRL's; `bnpo` is not


def find_regrouping_obstacle(trainer: Any) -> str | None:
    """Why rows must stay in the micro-batches that TRL put them in; None if they may move within an optimiser step."""
    args, own = trainer.args, find_own_loss(trainer)
    steps, accumulated = args.steps_per_generation, args.gradient_accumulation_steps
    obstacles = {
        f"{own} may read a whole micro-batch": own is not None,
        f"loss_type={trainer.loss_type} is not known to weigh each row by itself": trainer.loss_type
        not in _FREE_LOSSES,
        "the entropy bonus is a mean over a micro-batch": getattr(trainer, "_entropy_bonus_enabled", False),
        "top_entropy_quantile ranks the tokens of a micro-batch": trainer.top_entropy_quantile < 1.0,
        "use_liger_kernel replaces layers, which was not tried": getattr(args, "use_liger_kernel", False),
        f"steps_per_generation={steps} and gradient_accumulation_steps={accumulated} do not divide one another": (
            steps % accumulated != 0 and accumulated % steps != 0
        ),
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


class Siblings:
    """One trainer's: regroups each generation, keeps a step's scores, and gives them back in TRL's micro-batches."""

    def __init__(self, trainer: Any, *, is_on: bool) -> None:
        steps = trainer.args.steps_per_generation
        self._num_joined = math.gcd(steps, trainer.args.gradient_accumulation_steps)
        obstacle = find_regrouping_obstacle(trainer)
        self.is_on = is_on and self._num_joined > 1 and obstacle is None
        self._regrouped: list[dict[str, Any]] | None = None
        self._scored: list[MicroBatch] = []
        if is_on and self._num_joined > 1 and obstacle is not None:
            logger.info("siblings stay in the micro-batches they were shuffled to: %s", obstacle)

    def regroup(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of a generation, regrouped once; what was regrouped is given back as it is."""
        if not self.is_on or batches is self._regrouped:
            return batches
        count = self._num_joined
        steps = [batches[start : start + count] for start in range(0, len(batches), count)]
        self._regrouped, self._scored = [batch for step in steps for batch in regroup_step(step)], []
        return self._regrouped

    def begin(self, batches: list[dict[str, Any]] | None, step: int) -> list[dict[str, Any]] | None:
        """As a training begins: after one that broke off amid an optimiser step, steps no longer end where what is
        regrouped does, and rows stay where TRL has put them.

        Args:
            batches: what is left of a generation.
            step: TRL's count of micro-batches.

        Returns:
            The micro-batches to go on with.
        """
        if not self.is_on or step % self._num_joined == 0:
            return batches
        self.is_on = False
        logger.info("siblings stay in the micro-batches they were shuffled to: a training broke off amid a step")
        return self.undo(batches)

    def undo(self, batches: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """What is left of a generation in TRL's micro-batches and order again, if it was regrouped."""
        if not batches or not all(map(is_regrouped, batches)):
            return batches
        count = self._num_joined
        return [each for start in range(0, len(batches), count) for each in _put_back(batches[start : start + count])]

    def keep(self, batch: MicroBatch) -> list[MicroBatch]:
        """Note what a micro-batch scored.

        Returns:
            With the last of a step, the step's rows and scores as TRL had cut them; else nothing.
        """
        if not is_regrouped(batch.inputs):
            return []
        if int(batch.inputs[_TURN]) == 0:
            self._scored.clear()  # of a step that broke off
        self._scored.append(batch)
        if len(self._scored) < self._num_joined:
            return []
        scored, self._scored = self._scored, []
        return restore_step(scored)


def is_regrouped(inputs: dict[str, Any]) -> bool:
    return _TURN in inputs


def regroup_step(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in as many micro-batches of the same size, siblings together.

    Args:
        batches: what one optimiser step accumulates, as TRL buffers it.
    """
    rows = _join(batches)
    order = _order_by_prompt(rows["prompt_ids"], rows["prompt_mask"].bool())
    return [
        _pick(rows, chosen) | {_PLACE: chosen, _TURN: torch.tensor(turn)}
        for turn, chosen in enumerate(order.chunk(len(batches)))
    ]


def restore_step(scored: Sequence[MicroBatch]) -> list[MicroBatch]:
    """TRL's micro-batches, with scores that are all known.

    Args:
        scored: those of `regroup_step`, in their order.
    """
    scores = {name: torch.cat([getattr(batch, name) for batch in scored]) for name in ("logps", "entropies")}
    places = torch.cat([batch.inputs[_PLACE] for batch in scored]).argsort().chunk(len(scored))
    return [
        MicroBatch.of_known(inputs, scores["logps"][chosen], scores["entropies"][chosen])
        for inputs, chosen in zip(_put_back([batch.inputs for batch in scored]), places, strict=True)
    ]


def _put_back(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Undo `regroup_step`: the rows in TRL's micro-batches and order, whatever their values are now."""
    rows = _join(batches)
    places = rows.pop(_PLACE).argsort()
    del rows[_TURN]
    return [_pick(rows, chosen) for chosen in places.chunk(len(batches))]


@contextlib.contextmanager
def unlogged(metrics: dict[str, Any]) -> Iterator[None]:
    """Drops what is appended to `metrics["train"]` within."""
    kept, metrics["train"] = metrics["train"], defaultdict(list)
    try:
        yield
    finally:
        metrics["train"] = kept


def _order_by_prompt(prompt_ids: Int[Tensor, "B P"], is_used: Bool[Tensor, "B P"]) -> Int[Tensor, " B"]:
    """Rows by prompt, the largest groups first: fewest are cut where micro-batches end."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, used) in enumerate(zip(prompt_ids, is_used, strict=True)):
        groups.setdefault(tuple(ids[used].tolist()), []).append(row)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return torch.tensor([row for group in ordered for row in group], device=prompt_ids.device)


def _join(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate micro-batches; values without rows are the same in all of them."""
    return _map_rows(
        batches[0],
        lambda key, _: torch.cat([batch[key] for batch in batches]),
        lambda key, _: [each for batch in batches for each in batch[key]],
    )


def _pick(rows: dict[str, Any], chosen: Int[Tensor, " R"]) -> dict[str, Any]:
    return _map_rows(rows, lambda _, value: value[chosen], lambda _, value: [value[row] for row in chosen.tolist()])


def _map_rows(
    rows: dict[str, Any],
    of_tensor: Callable[[str, Tensor], Tensor],
    of_list: Callable[[str, list[Any]], list[Any]],
) -> dict[str, Any]:
    """A micro-batch with each value that has rows mapped; values without rows stay."""
    mapped = dict(rows)
    for key, value in rows.items():
        if isinstance(value, Tensor) and value.ndim:
            mapped[key] = of_tensor(key, value)
        elif isinstance(value, list):
            mapped[key] = of_list(key, value)
    return mapped
