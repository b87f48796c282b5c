"""The head unrolled on its own outputs over finished rollouts, as it runs when it drafts.

Training-time test of EAGLE-3 (arXiv:2503.01840): step 0 reads the target's features; step k replaces the
feature of pair i by the head's own output for pair i - 1 at step k - 1, and sees true keys only up to
pair i - k, as the node at depth k + 1 of a draft does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.drafters.head_parts import rotate
from fastgrpo.engine import FinishedRollout
from fastgrpo.head_training import Draws, attend_packed, pack, round_up
from fastgrpo.model import TargetModel

NUM_STEPS = 3  # unroll steps: the deepest draft that is trained for
_LEAD = NUM_STEPS - 1  # unrolled pairs before the first that teaches: deeper steps build on them
_MAX_PAIRS = 1024  # of one completion that teach; its last ones
_CONTEXT_PAIRS = EagleDrafter.num_prompt_tokens  # pairs before those that teach that are read, as before a draft
_MEASURED_PAIRS = 512  # measured at once


@dataclass(frozen=True, kw_only=True)
class DraftBatch:
    """Rollouts packed end to end: T = C + Q pairs, the first C only read, the head unrolled on the last Q.

    Pair i of a rollout joins feature i with token i + 1 and predicts token i + 2.
    """

    features: Float[Tensor, "T F"]  # low, mid, high features of token i
    token_ids: Int[Tensor, " T"]  # token i + 1
    positions: Int[Tensor, " T"]  # i
    segments: Int[Tensor, " T"]  # which rollout; -1: padding
    target_hidden: Float[Tensor, "Q H"]  # final hidden state of token i + 1
    is_reachable: Bool[Tensor, "K Q"]  # teaches at step k: its token is the completion's, k unrolled pairs stand before
    temperature: Float[Tensor, " Q"]

    @property
    def num_unrolled(self) -> int:
        """Q."""
        return len(self.temperature)

    @property
    def is_taught(self) -> Bool[Tensor, " Q"]:
        """The predicted token belongs to the completion."""
        return self.is_reachable[0]


@dataclass(frozen=True)
class _Extent:
    """The pairs of one rollout: read from `context`, unrolled from `lead`, taught from `taught`, to `end`."""

    context: int
    lead: int
    taught: int
    end: int

    @classmethod
    def of(cls, rollout: FinishedRollout) -> _Extent:
        assert rollout.features is not None
        end = len(rollout.features) - 1
        taught = max(len(rollout.prompt_ids) - 2, end - _MAX_PAIRS, 0)
        return cls(max(taught - _CONTEXT_PAIRS, 0), max(taught - _LEAD, 0), taught, end)


def count_pairs(rollout: FinishedRollout) -> int:
    """Pairs of the rollout that the head is unrolled on."""
    extent = _Extent.of(rollout)
    return extent.end - extent.lead


def collate(rollouts: list[FinishedRollout], target: TargetModel, dtype: torch.dtype) -> DraftBatch:
    """Pack rollouts, features in `dtype`."""
    hidden, device = target.hidden_size, target.device
    extents = [_Extent.of(rollout) for rollout in rollouts]
    num_context = round_up(sum(e.lead - e.context for e in extents))
    num_unrolled = round_up(sum(e.end - e.lead for e in extents))
    size = num_context + num_unrolled
    features = torch.zeros(size, 3 * hidden, dtype=dtype, device=device)
    target_hidden = torch.zeros(num_unrolled, hidden, dtype=dtype, device=device)
    token_ids, positions = torch.zeros(2, size, dtype=torch.int64)
    segments = torch.full((size,), -1)
    before = torch.full((num_unrolled,), -1)  # unrolled pairs of its rollout before it; -1 where nothing is taught
    temperature = torch.ones(num_unrolled)
    read, unrolled = 0, num_context
    for index, (rollout, e) in enumerate(zip(rollouts, extents, strict=True)):
        assert rollout.features is not None
        tokens = torch.tensor(rollout.prompt_ids + rollout.token_ids)
        for first, last, start in ((e.context, e.lead, read), (e.lead, e.end, unrolled)):
            place = slice(start, start + last - first)
            features[place] = rollout.features[first:last, : 3 * hidden].to(dtype)
            token_ids[place] = tokens[first + 1 : last + 1]
            positions[place] = torch.arange(first, last)
            segments[place] = index
        own = slice(unrolled - num_context, unrolled - num_context + e.end - e.lead)
        target_hidden[own] = rollout.features[e.lead + 1 :, 3 * hidden :].to(dtype)
        before[own.start + e.taught - e.lead : own.stop] = torch.arange(e.taught - e.lead, e.end - e.lead)
        temperature[own] = rollout.temperature or 1.0
        read, unrolled = read + e.lead - e.context, unrolled + e.end - e.lead
    return DraftBatch(
        features=features,
        token_ids=token_ids.to(device),
        positions=positions.to(device),
        segments=segments.to(device),
        target_hidden=target_hidden,
        is_reachable=(before >= torch.arange(NUM_STEPS)[:, None]).to(device),
        temperature=temperature.to(device),
    )


def compute_outputs(head: EagleHead, target: TargetModel, batch: DraftBatch) -> Float[Tensor, "K Q H"]:
    """The head's outputs for the unrolled pairs at each step; gradients flow into `head`."""
    layer, dtype = head.midlayer, head.fc.weight.dtype
    attention = layer.self_attn
    projections = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    for_token, for_hidden = projections.split(head.hidden_size, dim=1)
    num_query = head.num_heads * head.head_dim
    with torch.no_grad():
        embedded = target.embed(batch.token_ids).to(dtype)
        cos, sin = (x[0] for x in target.rotary_emb(embedded, position_ids=batch.positions[None]))
    embedded = layer.input_layernorm(embedded)
    hidden = head.fc(batch.features)
    context, hidden = hidden.split((len(hidden) - batch.num_unrolled, batch.num_unrolled))
    read, own = slice(0, len(context)), slice(len(context), None)
    of_context = F.linear(embedded[read], for_token[num_query:])
    of_context = of_context + F.linear(layer.hidden_norm(context), for_hidden[num_query:])
    of_tokens = F.linear(embedded[own], for_token)  # the same at every step
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in range(NUM_STEPS):
        states = of_tokens + F.linear(layer.hidden_norm(hidden), for_hidden)
        query = rotate(states[:, :num_query].unflatten(1, (-1, head.head_dim)), cos[own], sin[own])
        states = states[:, num_query:] if step else torch.cat((of_context, states[:, num_query:]))
        key, value = states.unflatten(1, (2, head.num_kv_heads, head.head_dim)).unbind(1)
        keys.append(rotate(key, cos[own], sin[own]) if step else rotate(key, cos, sin))
        values.append(value)
        output = head.finish(hidden, attend_packed(query, torch.cat(keys), torch.cat(values), _find_seen(batch, step)))
        outputs.append(output)
        hidden = F.pad(output[:-1], (0, 0, 1, 0))
    return torch.stack(outputs)


def _find_seen(batch: DraftBatch, step: int) -> Bool[Tensor, "Q S"]:
    """Which keys each unrolled pair i sees at step k: S = T true keys, then the Q own keys of each earlier step.

    True keys of its own rollout up to i - k; of the keys of step j those at pair i - k + j, a chain up to itself.
    """
    count = batch.num_unrolled
    segments, positions = batch.segments[-count:, None], batch.positions[-count:, None]
    seen = (batch.segments == segments) & (batch.positions <= positions - step)
    row = torch.arange(count, device=segments.device)
    chain = [row == row[:, None] - step + j for j in range(1, step + 1)]  # the last one: itself
    return torch.cat((seen, *chain), 1)


@torch.no_grad()
def measure_acceptance(
    drafter: EagleDrafter, rollouts: list[FinishedRollout], *, seed: int = 0
) -> Float[Tensor, "depth rank"]:
    """The chance that the target chooses the child of sibling rank r of a walked node at depth d.

    Tokens are drawn anew from the target's distribution at every position of the rollouts, with noise
    that the draft is ranked with: what verification would do, without a target forward. The head is as it
    drafts: refresh the drafter first.
    """
    head, target = drafter.fast_head, drafter.target
    generator = torch.Generator(target.device).manual_seed(seed)
    offered: list[Tensor] = []
    hits: list[Tensor] = []
    for part in pack(rollouts, [count_pairs(rollout) for rollout in rollouts], _MEASURED_PAIRS):
        batch = collate(part, target, target.dtype)
        taught = batch.is_taught
        draws = Draws.draw(target, batch.target_hidden[taught], batch.temperature[taught], generator)
        reachable = batch.is_reachable[:, taught]
        found = [
            draws.find_ranks(head.compute_logits(output[taught]), drafter.head.draft_vocab)
            for output in compute_outputs(head, target, batch)
        ]
        hits.append((torch.stack(found) & reachable[..., None]).sum(1).cpu())
        offered.append(reachable.sum(1).cpu())
    return torch.stack(hits).sum(0) / torch.stack(offered).sum(0).clamp(min=1)[:, None]
