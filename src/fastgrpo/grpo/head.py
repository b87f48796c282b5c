"""Log-probabilities and entropies behind the output head, a few tokens at a time: no [tokens, vocabulary] tensor.

TRL's fused head has tiles of 4096 x 32768 logits. Where Triton folds them in place they cost one buffer; elsewhere
each of some six temporaries is 512 MiB, and every position is scored, prompts too. Here a tile is a few tokens by the
whole vocabulary: it stays in the caches, and the gradient of a hidden state is one product, summed in float32 inside
it and rounded once.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction

_TILE_ELEMENTS = 2**23  # of float32: 32 MiB a temporary; half or twice as many took as long on two cores
_TRITON_TILE_WIDTH = 32768  # as in TRL

Scores = tuple[Float[Tensor, " N"], Float[Tensor, " N"]]


def add_token_scores(model: Any, *, temperature: float, in_float32: bool = False) -> None:
    """Let `model(..., predicted_at=positions, labels=tokens)` return log-probability and entropy of those tokens.

    `predicted_at` [N] counts through the flattened batch: where the hidden states stand that predict `labels` [N].
    Without it the forward is the one it was.

    Args:
        model: a causal language model below PEFT and wrappers.
        temperature: what the logits are divided by.
        in_float32: the head runs in float32, outside autocast (TRL's `cast_lm_head_to_fp32`).
    """
    plain_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, predicted_at: Tensor | None = None, labels: Any = None, **kwargs: Any) -> Any:
        if predicted_at is None:
            return plain_forward(*args, **kwargs) if labels is None else plain_forward(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)[predicted_at]
        if not in_float32:
            return score_tokens(hidden, self.get_output_embeddings(), labels, temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            return score_tokens(hidden.float(), self.get_output_embeddings(), labels, temperature)

    model.forward = types.MethodType(forward, model)


def score_tokens(
    hidden: Float[Tensor, "N H"], head: nn.Module, labels: Int[Tensor, " N"], temperature: float
) -> Scores:
    """Log-probability of each label and entropy of its distribution, in nats and float32, with gradients."""
    weight, bias = head.weight, getattr(head, "bias", None)
    if bias is not None or hidden.device.type != "cpu":
        arguments = (temperature, _TRITON_TILE_WIDTH, None, 1.0, ("log_probs", "entropy"))
        logprobs, entropies, *_ = ChunkedLogProbFunction.apply(hidden, weight, bias, labels, *arguments)
        return logprobs, entropies
    scores: Scores = _TileScores.apply(hidden, weight, labels, 1 / temperature)
    return scores


class _TileScores(torch.autograd.Function):
    """Logits are computed a tile at a time, and once more for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], labels: Int[Tensor, " N"], scale: float
    ) -> Scores:
        ctx.set_materialize_grads(False)
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.scale = scale
        head = weight.to(ctx.dtype)
        logprobs, entropies, log_sums = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for tile in _split(len(hidden), len(weight)):
            logits = _compute_logits(hidden[tile], head, scale)
            log_sum = log_sums[tile] = logits.logsumexp(1)
            logprobs[tile] = logits.gather(1, labels[tile, None])[:, 0] - log_sum
            chances = (logits - log_sum[:, None]).exp_()
            entropies[tile] = log_sum - torch.linalg.vecdot(chances, logits)
        ctx.save_for_backward(hidden, weight, labels, log_sums, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sums, entropies = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight.to(ctx.dtype)
        by_hidden = torch.empty_like(hidden) if needs_hidden else None
        by_weight = torch.zeros(weight.shape, device=weight.device) if needs_weight else None  # float32: many are added
        by_logprob = torch.zeros_like(log_sums) if by_logprob is None else by_logprob
        for tile in _split(len(hidden), len(weight)):
            logs = _compute_logits(hidden[tile], head, ctx.scale).sub_(log_sums[tile, None])
            by_logit = logs.exp()  # d log p(label) / d logit = 1[label] - p, d entropy / d logit = -p (log p + entropy)
            pull = by_logprob[tile, None]
            if by_entropy is not None:
                pull = logs.add_(entropies[tile, None]).mul_(by_entropy[tile, None]).add_(pull)
            by_logit.mul_(pull).neg_().scatter_add_(1, labels[tile, None], by_logprob[tile, None]).mul_(ctx.scale)
            if by_hidden is not None:
                by_hidden[tile] = torch.mm(by_logit.to(ctx.dtype), head)
            if by_weight is not None:
                by_weight.addmm_(by_logit.T, hidden[tile].float())
        return by_hidden, None if by_weight is None else by_weight.to(weight.dtype), None, None


def _split(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(_TILE_ELEMENTS // vocab_size, 16)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _compute_logits(hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"], scale: float) -> Float[Tensor, "N V"]:
    return torch.mm(hidden.to(head.dtype), head.T).float().mul_(scale)
