"""Log-probabilities and entropies of completions for TRL's loss: what the loss reads is computed, and no more.

Exact: the loss, its gradient and the logged metrics are TRL's, up to the rounding of float32.
- Only completion tokens meet the output head. Where Triton is missing, TRL's fused head scores the prompt too.
- Columns that are padding in every row are cut.
- A row whose advantage is 0 has no gradient, so none is computed (`find_rows_to_train`); where the rollout has said
  what is logged of it, nothing is (`micro_batch.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def find_obstacle(trainer: Any) -> str | None:
    """Why rows without advantage must be computed all the same; None if they need not."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    own = find_own_loss(trainer)
    obstacles = {
        f"{own} may read every row": own is not None,
        "beta is not 0: the divergence from the reference model has a gradient of its own": trainer.beta != 0.0,
        "the entropy bonus has a gradient of its own": getattr(trainer, "_entropy_bonus_enabled", False),
        "the router's auxiliary loss has a gradient of its own": getattr(trainer, "aux_loss_enabled", False),
        "top_entropy_quantile ranks the tokens of all rows": trainer.top_entropy_quantile < 1.0,
        "vespo logs a mean over all rows": trainer.loss_type == "vespo",
        "use_liger_kernel computes the loss elsewhere": getattr(args, "use_liger_kernel", False),
        "processes must run the model equally often": trainer.accelerator.num_processes > 1,
        "a compiled model takes no hooks": args.torch_compile,
        "DeepSpeed keeps the gradients itself": getattr(trainer, "is_deepspeed_enabled", False),
        "the model has dropout, whose draws depend on the rows computed": has_dropout(model),
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


def has_dropout(model: nn.Module) -> bool:
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    config = getattr(model, "config", None)
    rates += [getattr(config, key, 0.0) or 0.0 for key in ("attention_dropout", "hidden_dropout", "resid_pdrop")]
    return any(rate > 0 for rate in rates)


def find_own_loss(trainer: Any) -> str | None:
    """The method in which a subclass of somebody else's computes the loss."""
    names = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
    owners = ((name, getattr(type(trainer), name).__module__.partition(".")[0]) for name in names)
    own = next((name for name, owner in owners if owner not in ("fastgrpo", "trl")), None)
    return None if own is None else f"{type(trainer).__name__}.{own}"


def find_counted(inputs: dict[str, Any]) -> Bool[Tensor, "B C"]:
    """Tokens that loss and metrics count: the policy's own, not cut off."""
    mask = inputs["completion_mask"]
    counted: Tensor = (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask) != 0
    return counted


def find_rows_to_train(inputs: dict[str, Any]) -> Bool[Tensor, " B"]:
    """Rows of a micro-batch whose loss has a gradient: an advantage other than 0, and a token that counts."""
    advantages = inputs["advantages"]
    chosen: Tensor = (advantages.reshape(len(advantages), -1) != 0).any(1) & find_counted(inputs).any(1)
    return chosen


def fill_missing_gradients(model: nn.Module) -> None:
    """Zeros where a whole step had nothing to learn: an optimiser with momentum moves the weights all the same."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if all(p.grad is None for p in trained):
        for p in trained:
            p.grad = torch.zeros_like(p)


def score_completions(
    model: nn.Module, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], num_kept: int
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Log-probability and entropy of each of the last `num_kept` tokens; 0 where the attention mask is.

    Args:
        model: TRL's policy or reference, wrapped or not, whose forward takes `fused_lm_head`.
        input_ids: prompts and completions, padded outward.
    """
    used = attention_mask.any(0).nonzero()[:, 0]
    first, last = int(used[0]), int(used[-1]) + 1
    num_cut = input_ids.shape[1] - last  # columns of padding behind the longest completion
    input_ids, attention_mask = input_ids[:, first:last], attention_mask[:, first:last]
    is_scored = attention_mask[:, num_cut - num_kept :].bool()
    labels = input_ids[:, num_cut - num_kept :][is_scored]
    with _only_at(find_backbone(model), is_scored):
        outputs = model(
            input_ids=input_ids, attention_mask=attention_mask, shift_labels=labels[None], fused_lm_head=True
        )
    logprobs, entropies = (
        nn.functional.pad(x.new_zeros(is_scored.shape).masked_scatter(is_scored, x[0]), (0, num_cut))
        for x in (outputs.log_probs, outputs.entropy)
    )
    return logprobs, entropies


@torch.no_grad()
def score_rows(model: nn.Module, inputs: dict[str, Any], rows: Bool[Tensor, " B"]) -> Float[Tensor, "R C"]:
    """Log-probabilities of some rows of a micro-batch of TRL's, without a gradient."""
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)[rows]
    mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)[rows]
    num_kept = inputs["completion_ids"].shape[1]
    return score_completions(model, ids, mask, num_kept)[0] if len(ids) else torch.zeros(0, num_kept, device=ids.device)


def find_backbone(model: Any) -> nn.Module:
    """The decoder below wrappers, adapters and output head."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DDP and the like
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    backbone: nn.Module = model.base_model
    return backbone


@contextlib.contextmanager
def _only_at(backbone: nn.Module, is_scored: Bool[Tensor, "B C"]) -> Iterator[None]:
    """Inside, `backbone` hands on only the hidden states that predict the marked of its last C tokens, as one row."""

    def select(_: nn.Module, __: Any, output: Any) -> Any:
        before = output.last_hidden_state[:, -1 - is_scored.shape[1] : -1]
        output.last_hidden_state = before[is_scored][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
