"""Log-probabilities and entropies of completions for TRL's loss: what the loss reads is computed, and no more.

Exact: the loss, its gradient and the logged metrics are TRL's, up to the rounding of float32.
- Only completion tokens meet the output head, a few at a time (`head`).
- Rows are packed: no padding is computed, and a prompt once for all its completions (`sharing`).
- A row whose advantage is 0 has no gradient, so none is computed (`find_rows_to_train`); where the rollout has said
  what is logged of it, nothing is (`micro_batch`).
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from trl import GRPOTrainer

from fastgrpo.families import SUPPORTED_FAMILIES, base_model_of, find_windows
from fastgrpo.grpo.head import add_token_scores
from fastgrpo.grpo.sharing import pack_rows, pays

logger = logging.getLogger(__name__)

_MOST_DIFFERENT = 0.05  # of the largest number: roundings of half precision, through all layers


def find_skipping_obstacle(trainer: Any) -> str | None:
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
        "use_liger_kernel replaces layers, which was not tried": getattr(args, "use_liger_kernel", False),
        "a compiled model takes no hooks": args.torch_compile,
        "DeepSpeed keeps the gradients itself": getattr(trainer, "is_deepspeed_enabled", False),
        "the model has dropout, whose draws depend on the rows computed": has_dropout(model),
        "NEFTune's noise depends on the rows computed": args.neftune_noise_alpha is not None,
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


def find_sharing_obstacle(trainer: Any) -> str | None:
    """Why completions of one prompt cannot be computed with one copy of it; None if they can."""
    models = _find_models(trainer)
    configs = [model.config for model in models]
    backends = {config._attn_implementation for config in configs} - {"sdpa"}
    families = {config.model_type for config in configs} - set(SUPPORTED_FAMILIES)
    kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    windows = set() if families else {window for model in models for window in find_windows(model)} - {None}
    obstacles = {
        f"attn_implementation={', '.join(backends)} cannot take the mask; 'sdpa' can": backends,
        f"the family {', '.join(families)} is not one it was tried with": families,
        f"layers of {', '.join(kinds)} do not see the whole prompt": kinds,
        f"layers that see the last {', '.join(map(str, windows))} tokens do not see the whole prompt": windows,
        "a compiled model is left as it is": trainer.args.torch_compile,
        "the router's auxiliary loss is over all positions": getattr(trainer, "aux_loss_enabled", False),
        "the model has dropout, whose draws depend on the tokens computed": any(map(has_dropout, models)),
        "NEFTune's noise is the less, the longer a row is": trainer.args.neftune_noise_alpha is not None,
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


def _find_models(trainer: Any) -> list[Any]:
    """Policy and, where it is another model, reference, below wrappers and adapters."""
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    return [base_model_of(trainer.accelerator.unwrap_model(model)) for model in models]


def add_heads(trainer: Any) -> None:
    """Teach the models to score tokens, as `score_completions` asks them to."""
    for model in _find_models(trainer):
        add_token_scores(model, temperature=trainer.temperature, in_float32=trainer.args.cast_lm_head_to_fp32)


def can_share_prompts(trainer: Any) -> bool:
    """Whether completions of one prompt can be computed with one copy of it; logs why, if not."""
    obstacle = find_sharing_obstacle(trainer)
    if obstacle is None and not getattr(trainer, "is_deepspeed_enabled", False):  # whose weights may be elsewhere
        obstacle = next(filter(None, map(find_mask_obstacle, _find_models(trainer))), None)
    if obstacle is not None:
        logger.warning("share_prompts is off: %s", obstacle)
    return obstacle is None


@torch.no_grad()
def find_mask_obstacle(model: Any) -> str | None:
    """Why a model does not take the mask of packed rows, though its kind does; found by asking it. None if it does."""
    tokens = torch.arange(9, device=model.device) % model.config.vocab_size
    rows = torch.stack([tokens[[0, 1, 2, last, last + 1]] for last in (3, 5, 7)])  # three completions of one prompt
    packed = pack_rows(rows, torch.ones_like(rows, dtype=torch.bool), num_kept=2)
    try:
        expected = model.model(input_ids=rows).last_hidden_state[:, 2:4].flatten(0, 1).float()
        output = model.model(
            input_ids=packed.input_ids, attention_mask=packed.mask, position_ids=packed.position_ids
        ).last_hidden_state[0, packed.predicted_at]
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return f"{type(model).__name__} does not take the mask ({error})"
    difference = float((output.float() - expected).abs().max() / expected.abs().max())
    return None if difference < _MOST_DIFFERENT else f"{type(model).__name__} does not keep to the mask"


def has_dropout(model: nn.Module) -> bool:
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    config = getattr(model, "config", None)
    rates += [getattr(config, key, 0.0) or 0.0 for key in ("attention_dropout", "hidden_dropout", "resid_pdrop")]
    return any(rate > 0 for rate in rates)


_LOSS_METHODS = (
    *("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies"),
    *("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"),
)
_BATCH_METHODS = ("_generate", "_generate_and_score_completions", "_prepare_inputs")


def find_own_loss(trainer: Any) -> str | None:
    """A method of the loss that is not fastgrpo's or GRPOTrainer's: a subclass's (TRL has such too), another parent's,
    or one put in its place; None without any.
    """
    return _find_own(trainer, _LOSS_METHODS)


def find_own_batch(trainer: Any) -> str | None:
    """A method behind the rollout that is not fastgrpo's or GRPOTrainer's, so it may read or change the whole batch."""
    return _find_own(trainer, _BATCH_METHODS)


def _find_own(trainer: Any, names: tuple[str, ...]) -> str | None:
    kinds = list(itertools.takewhile(lambda kind: kind is not GRPOTrainer, type(trainer).__mro__))
    for name in names:
        methods = [getattr(trainer, name), *(vars(kind)[name] for kind in kinds if name in vars(kind))]
        modules = {str(getattr(method, "__module__", "")) for method in methods}
        if any(module != GRPOTrainer.__module__ and module.partition(".")[0] != "fastgrpo" for module in modules):
            return f"{type(trainer).__name__}.{name}"
    return None


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
    """Set gradients to zero where a whole step had nothing to learn: momentum still moves the weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if all(p.grad is None for p in trained):
        for p in trained:
            p.grad = torch.zeros_like(p)


def score_completions(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Int[Tensor, "B L"],
    num_kept: int,
    *,
    shares_prompts: bool = False,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Log-probability and entropy of each of the last `num_kept` tokens; 0 where the attention mask is.

    Args:
        model: policy or reference, wrapped or not, below which `add_token_scores` was called.
        input_ids: prompts and completions, padded outward.
        shares_prompts: pack the rows and compute each prompt once, where that leaves tokens out.
    """
    is_used = attention_mask.bool()
    is_scored = is_used[:, -num_kept:]
    labels = input_ids[:, -num_kept:][is_scored]
    can_pack = shares_prompts and len(labels) and not _has_gaps(is_used, num_kept)
    packed = pack_rows(input_ids, is_used, num_kept) if can_pack else None
    first, end = _find_span(is_used)
    if packed is not None and pays(packed, len(input_ids) * (end - first)):
        inputs = {
            "input_ids": packed.input_ids,
            "attention_mask": packed.mask,
            "position_ids": packed.position_ids,
            "predicted_at": packed.predicted_at,
        }
    else:
        rows, columns = is_scored.nonzero().T
        before = columns + input_ids.shape[1] - num_kept - 1 - first
        inputs = {
            "input_ids": input_ids[:, first:end],
            "attention_mask": attention_mask[:, first:end],
            "predicted_at": rows * (end - first) + before,
        }
    scores = model(**inputs, labels=labels)
    logprobs, entropies = (x.new_zeros(is_scored.shape).masked_scatter(is_scored, x) for x in scores)
    return logprobs, entropies


def _has_gaps(is_used: Bool[Tensor, "B L"], num_kept: int) -> bool:
    """Whether tokens within a prompt or completion are masked: they still stand in a place, and predict the next."""
    prompt, completion = is_used[:, :-num_kept], is_used[:, -num_kept:]
    is_whole = completion.any(1)  # a completion that is masked as a whole is left out
    begins = completion & ~torch.cat((is_whole[:, None], completion[:, :-1]), 1)
    ends = prompt[:, :-1] & ~prompt[:, 1:]
    return bool(begins.any() | ends.any())


def _find_span(is_used: Bool[Tensor, "B L"]) -> tuple[int, int]:
    """(first, end) of the columns outside which every row is padding."""
    columns = is_used.any(0).nonzero()[:, 0]
    return int(columns[0]), int(columns[-1]) + 1


@torch.no_grad()
def score_rows(
    model: nn.Module, inputs: dict[str, Any], rows: Bool[Tensor, " B"], *, shares_prompts: bool
) -> Float[Tensor, "R C"]:
    """Log-probabilities of some rows of one of TRL's micro-batches, without a gradient."""
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)[rows]
    mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)[rows]
    num_kept = inputs["completion_ids"].shape[1]
    if not len(ids):
        return torch.zeros(0, num_kept, device=ids.device)
    return score_completions(model, ids, mask, num_kept, shares_prompts=shares_prompts)[0]
