"""What a draft head is trained for: to follow the target, and to be accepted."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LossName = Literal["kl", "kl+tv", "lk", "overlap", "coupled"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
DEFAULT_LOSS: LossName = "kl+tv"
_CHUNK_ELEMENTS = 32 * 4096
_CPU_CHUNK_ROWS, _CHUNK_ROWS = 128, 1024  # whose logits exist at once
_LK_DECAY = 3.0
_LEAST_OVERLAP = 0.05  # -log of less would drown the other rows


class DraftLoss(torch.autograd.Function):
    """Divergence of a draft distribution q from the target's p, its gradient found in the same pass.

    Every loss is a mix, row by row, of the Kullback-Leibler divergence KL(p | q) and the total variation TV, with
    the overlap a = sum min(p, q) = 1 - TV, the most that rejection sampling can accept and close to what shared
    noise does:

    - `kl`: KL.
    - `kl+tv`: KL + TV.
    - `lk`: m KL + (1 - m) TV with m = exp(-3 a), a taken as a number (LK losses, arXiv:2602.23881).
    - `overlap`: -log a, whose gradient is that of TV / a (the same paper).
    - `coupled`: -log((1 - TV) / (1 + TV)), the least that shared noise accepts at width 1 (arXiv:2408.07978).

    Logits over the draft vocabulary exist for a chunk of rows at a time, the draft's and the target's, and the
    gradient is kept by hidden size. Within a chunk the target's distribution is computed once for all steps, and on
    a CPU a few rows at a time: what lies between logits and gradient never leaves a core's cache.

    `apply` takes:
        hidden: what meets the output rows at each of K steps of a draft.
        rows: the output rows, the target's own; they get no gradient.
        target_hidden: the target's final hidden states that predict the same tokens.
        temperature: of each row.
        weights: of each row at each step.
        name: of the loss.

    It returns the K weighted sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "K M H"],
        rows: Float[Tensor, "V H"],
        target_hidden: Float[Tensor, "M H"],
        temperature: Float[Tensor, " M"],
        weights: Float[Tensor, "K M"],
        name: LossName = DEFAULT_LOSS,
    ) -> Float[Tensor, " K"]:
        gradient = torch.empty_like(hidden)
        totals = weights.new_zeros(len(hidden))
        size = _CPU_CHUNK_ROWS if rows.device.type == "cpu" else _CHUNK_ROWS
        for part in (slice(start, start + size) for start in range(0, hidden.shape[1], size)):
            own = hidden[:, part].to(rows.dtype)
            logits = F.linear(own.flatten(0, 1), rows).unflatten(0, own.shape[:2])
            target_logits = F.linear(target_hidden[part].to(rows.dtype), rows)
            found, of_logits = _compare(logits, target_logits, temperature[part], weights[:, part], name)
            totals += found
            gradient[:, part] = torch.mm(of_logits.flatten(0, 1), rows).view(own.shape).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return totals

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype)[:, None, None], None, None, None, None, None


def _compare(
    logits: Float[Tensor, "K M V"],
    target_logits: Float[Tensor, "M V"],
    temperature: Float[Tensor, " M"],
    weights: Float[Tensor, "K M"],
    name: LossName,
) -> tuple[Float[Tensor, " K"], Float[Tensor, "K M V"]]:
    """The weighted sums, and their gradient by the logits."""
    gradient = torch.empty_like(logits)
    totals = weights.new_zeros(len(logits))
    num_rows = target_logits.shape[0]
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1]) if logits.device.type == "cpu" else max(1, num_rows)
    for part in (slice(start, start + size) for start in range(0, num_rows, size)):
        scale = temperature[part, None]
        log_p = (target_logits[part].float() / scale).log_softmax(-1)
        p = log_p.exp()
        certainty = torch.linalg.vecdot(p, log_p)
        for step in range(len(logits)):
            weight = weights[step, part]
            log_q = (logits[step, part].float() / scale).log_softmax(-1)
            divergence = certainty - torch.linalg.vecdot(p, log_q)
            q = log_q.exp_()
            difference = q - p  # the gradient of KL
            sign = difference.sign()
            variation = torch.linalg.vecdot(sign, difference) / 2
            loss, of_divergence, of_variation = _mix(name, divergence, variation)
            totals[step] += (loss * weight).sum()
            sign -= torch.linalg.vecdot(q, sign)[:, None]  # q times it, halved, is the gradient of TV
            difference.mul_((of_divergence * weight)[:, None])
            difference.addcmul_(q, sign.mul_((of_variation * weight / 2)[:, None]))
            gradient[step, part] = difference.div_(scale)
    return totals, gradient


def _mix(
    name: LossName, divergence: Float[Tensor, " M"], variation: Float[Tensor, " M"]
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
    """The loss of each row, and its derivatives by divergence and by variation."""
    one, zero = torch.ones_like(variation), torch.zeros_like(variation)
    if name == "kl":
        return divergence, one, zero
    if name == "kl+tv":
        return divergence + variation, one, one
    if name == "lk":
        share = (-_LK_DECAY * (1 - variation)).exp()
        return share * divergence + (1 - share) * variation, share, 1 - share
    overlap = (1 - variation).clamp(min=_LEAST_OVERLAP)
    if name == "overlap":
        return -overlap.log(), zero, 1 / overlap
    return (2 - overlap).log() - overlap.log(), zero, 1 / (2 - overlap) + 1 / overlap


def check_loss(name: str) -> LossName:
    """The loss of this name.

    Raises:
        ValueError: there is none.
    """
    for known in LOSSES:
        if name == known:
            return known
    raise ValueError(f"draft_loss must be one of {', '.join(LOSSES)}; got {name!r}")
