"""Where the loss takes the log-probabilities of the weights that generated, and what that costs.

TRL needs them where a batch is trained on after the weights have moved: `num_iterations` above 1, or more micro-batches
in a generation than in an optimiser step. It runs a forward over all rows for them.
"""

from __future__ import annotations

from typing import Any, Literal

from fastgrpo.grpo.scoring import find_own_batch, find_own_loss, has_dropout

OldLogps = Literal["none", "update", "rollout", "forward"]
OLD_LOGPS = ("auto", "rollout", "forward")


def choose_old_logps(trainer: Any) -> tuple[OldLogps, str]:
    """(source, why).

    - `none`: every pass is the first.
    - `update`: the first pass over a micro-batch computes them anyway. Where the weights move before it, the rows that
      have a gradient are computed in time. In any type they are what TRL's forward says, and speculation changes no
      bit of them.
    - `rollout`: the engine's, only where they are asked for. In float32 they differ by rounding, with speculation
      otherwise than without. In a smaller type merged adapters and other kernels round otherwise than the update
      does, and the gradient would follow; `sampling/sampling_logp_difference` says by how much.
    - `forward`: TRL's own.
    """
    args = trainer.args
    if args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0:
        return "none", "the weights are the rollout's in every pass"
    if args.old_logps == "forward":
        return "forward", "old_logps is 'forward'"
    if (own := find_own_loss(trainer) or find_own_batch(trainer)) is not None:
        return "forward", f"{own} is not ours"
    if args.old_logps == "rollout":
        return "rollout", "old_logps is 'rollout'"
    if has_dropout(trainer.accelerator.unwrap_model(trainer.model)):
        return "forward", "the model has dropout, of which TRL's forward makes a draw of its own"
    if args.neftune_noise_alpha is not None:
        return "forward", "NEFTune draws noise of its own for TRL's forward"
    if args.torch_compile or getattr(trainer, "aux_loss_enabled", False):
        return "forward", "a compiled model and a router's loss are scored by TRL"
    return "update", "the first pass over a micro-batch computes them"
