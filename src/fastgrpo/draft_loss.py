"""What a draft head is trained for: divergence from the target, and the chance of being rejected."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_VARIATION_WEIGHT = 1.0  # of the total variation beside the divergence
_CHUNK_ELEMENTS = 32 * 4096


class DraftLoss(torch.autograd.Function):
    """Kullback-Leibler divergence plus total variation, its gradient found in the same pass.

    Total variation bounds the chance that a draft ranked with shared noise is rejected. `apply` takes the logits
    of K unroll steps, the target's over the same tokens, the temperature of each row and the weights of the rows
    at each step; it returns the K weighted sums. The target's distribution is computed once for all steps, and
    on a CPU a few rows at a time: what lies between logits and gradient never leaves a core's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "K M V"],
        target_logits: Float[Tensor, "M V"],
        temperature: Float[Tensor, " M"],
        weights: Float[Tensor, "K M"],
    ) -> Float[Tensor, " K"]:
        gradient = torch.empty_like(logits)
        totals = weights.new_zeros(len(logits))
        num_rows = target_logits.shape[0]
        rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1]) if logits.device.type == "cpu" else max(1, num_rows)
        for part in (slice(start, start + rows) for start in range(0, num_rows, rows)):
            scale = temperature[part, None]
            log_p = (target_logits[part].float() / scale).log_softmax(-1)
            p = log_p.exp()
            certainty = torch.linalg.vecdot(p, log_p)
            for step in range(len(logits)):
                weight = weights[step, part]
                log_q = (logits[step, part].float() / scale).log_softmax(-1)
                divergence = certainty - torch.linalg.vecdot(p, log_q)
                q = log_q.exp_()
                difference = q - p
                sign = difference.sign()
                variation = torch.linalg.vecdot(sign, difference) / 2
                totals[step] += ((divergence + _VARIATION_WEIGHT * variation) * weight).sum()
                sign -= torch.linalg.vecdot(q, sign)[:, None]
                difference.addcmul_(q, sign, value=_VARIATION_WEIGHT / 2)
                torch.mul(difference, weight[:, None] / scale, out=difference)
                gradient[step, part] = difference
        ctx.save_for_backward(gradient)
        return totals

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype)[:, None, None], None, None, None
