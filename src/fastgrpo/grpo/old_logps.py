"""Where the loss takes the log-probabilities of the weights that generated, and what that costs.

TRL needs them where a batch is trained on after the weights have moved: `num_iterations` above 1, or more micro-batches
in a generation than in an optimiser step. It runs a forward over all rows for them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from fastgrpo.grpo.scoring import find_own_loss, has_dropout

OldLogps = Literal["none", "update", "rollout", "forward"]
OLD_LOGPS = ("auto", "rollout", "forward")


def choose_old_logps(trainer: Any) -> tuple[OldLogps, str]:
    """(source, why).

    - `none`: every pass is the first.
    - `update`: the first pass over a batch, which is all of one optimiser step, computes them anyway; in any type they
      are what TRL's forward would say.
    - `rollout`: the engine's. In float32 they differ by rounding. In a smaller type its merged adapters and other
      kernels round otherwise than the update does, by 1 % of a probability and more, and so would the gradient.
    - `forward`: TRL's own.
    """
    args = trainer.args
    if args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0:
        return "none", "the weights are the rollout's in every pass"
    if args.old_logps == "forward":
        return "forward", "old_logps is 'forward'"
    if (own := find_own_loss(trainer)) is not None:
        return "forward", f"{own} is not ours"
    if args.old_logps == "rollout":
        return "rollout", "old_logps is 'rollout'"
    if has_dropout(trainer.accelerator.unwrap_model(trainer.model)):
        return "forward", "the model has dropout, which the rollout has not"
    is_scored_here = not (args.torch_compile or getattr(trainer, "aux_loss_enabled", False))
    if args.steps_per_generation == args.gradient_accumulation_steps and is_scored_here:
        return "update", "the first pass over a batch computes them"
    if _is_float32(trainer):
        return "rollout", "rollout and update compute in float32"
    return "forward", "outside float32 the rollout rounds otherwise than the update; old_logps='rollout' takes its own"


def _is_float32(trainer: Any) -> bool:
    """Whether rollout and update compute in float32 or better, TF32 not among them."""
    types = {p.dtype for p in trainer.accelerator.unwrap_model(trainer.model).parameters()}
    is_wide = (types | {trainer.engine.target.dtype}) <= {torch.float32, torch.float64}
    is_cast = trainer.args.bf16 or trainer.args.fp16
    return is_wide and not is_cast and torch.get_float32_matmul_precision() == "highest"
