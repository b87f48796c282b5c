"""A block head over finished rollouts, as it runs when it drafts: anchors, their blocks, the target's answers.

An anchor is a token that could have been pending. Its block sees the features of the tokens before it, as
when it drafts; each output follows the target's distribution at its place, the tokens before it being the
text's own, as an accepted draft's are. DFlash (arXiv:2602.06036) draws 512 anchors from a sequence, here it
is one in every few tokens, so that a rollout costs what it is long.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.block_head import BlockHead
from fastgrpo.engine import FinishedRollout
from fastgrpo.head_training import Draws, attend_packed, pack, round_up
from fastgrpo.model import TargetModel

_STRIDE = 4  # tokens, of which one is an anchor: with blocks of 8, a token is taught at two levels
_MAX_TAUGHT = 1024  # tokens of one completion that may be anchors; its last ones
_MAX_CONTEXT = BlockDrafter.num_prompt_tokens  # tokens before those that are read, as before a draft
_ROUND_ANCHORS = 8
_MEASURED_TOKENS = 512  # measured at once


@dataclass(frozen=True, kw_only=True)
class BlockBatch:
    """Blocks of K positions behind A anchors, and the T packed context tokens of their rollouts.

    Position k of a block stands for token n + k, where the anchor is token n, and predicts token n + k + 1.
    """

    features: Float[Tensor, "T F"]  # low, mid, high features of the context
    positions: Int[Tensor, " T"]
    segments: Int[Tensor, " T"]  # which rollout; -1: padding
    anchors: Int[Tensor, " A"]  # n
    anchor_segments: Int[Tensor, " A"]  # -1: padding
    last_context: Int[Tensor, " A"]  # where token n - 1 stands among the context
    token_ids: Int[Tensor, "K A"]  # token n + k; the block itself sees that of k = 0 alone
    target_hidden: Float[Tensor, "K A H"]  # final hidden state of token n + k
    is_taught: Bool[Tensor, "K A"]  # the rollout has a token n + k + 1
    temperature: Float[Tensor, " A"]


@dataclass(frozen=True)
class _Extent:
    """Tokens of one rollout: features are read from `context`, anchors drawn from `first` to `end` (excluded)."""

    context: int
    first: int
    end: int

    @classmethod
    def of(cls, rollout: FinishedRollout) -> _Extent:
        """Features end one token before the text, and each predicts a token: the last anchor predicts the last one."""
        assert rollout.features is not None
        end = len(rollout.features)
        first = max(len(rollout.prompt_ids) - 1, end - _MAX_TAUGHT, 1)  # token 0 has no context
        return cls(max(first - _MAX_CONTEXT, 0), first, end)


def count_tokens(rollout: FinishedRollout) -> int:
    """Tokens of the rollout that may be anchors."""
    extent = _Extent.of(rollout)
    return max(extent.end - extent.first, 0)


def draw_anchors(rollouts: list[FinishedRollout]) -> list[Int[Tensor, " A"]]:
    """One anchor in every `_STRIDE` tokens of each rollout, at random.

    The batch itself is the seed: a run that was stopped draws them again, and other company in a batch, as
    shuffling brings it, draws others.
    """
    text = [token_id for rollout in rollouts for token_id in rollout.token_ids]
    seed = zlib.crc32(torch.tensor(text).numpy().tobytes())
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for extent in map(_Extent.of, rollouts):
        starts = torch.arange(extent.first, extent.end, _STRIDE)
        shift = torch.randint(_STRIDE, starts.shape, generator=generator)
        drawn.append((starts + shift).clamp(max=extent.end - 1))
    return drawn


def collate(rollouts: list[FinishedRollout], target: TargetModel, dtype: torch.dtype, *, block_size: int) -> BlockBatch:
    """Pack rollouts, features in `dtype`."""
    hidden, device = target.hidden_size, target.device
    extents, drawn = [_Extent.of(rollout) for rollout in rollouts], draw_anchors(rollouts)
    size = round_up(sum(e.end - 1 - e.context for e in extents))
    num_anchors = round_up(sum(map(len, drawn)), _ROUND_ANCHORS)
    features = torch.zeros(size, 3 * hidden, dtype=dtype, device=device)
    target_hidden = torch.zeros(block_size, num_anchors, hidden, dtype=dtype, device=device)
    positions, segments = torch.zeros(size, dtype=torch.int64), torch.full((size,), -1)
    anchors, anchor_segments = torch.zeros(num_anchors, dtype=torch.int64), torch.full((num_anchors,), -1)
    last_context = torch.zeros(num_anchors, dtype=torch.int64)
    token_ids = torch.zeros(block_size, num_anchors, dtype=torch.int64)
    is_taught = torch.zeros(block_size, num_anchors, dtype=torch.bool)
    temperature = torch.ones(num_anchors)
    read, placed = 0, 0
    for index, (rollout, e, own) in enumerate(zip(rollouts, extents, drawn, strict=True)):
        assert rollout.features is not None
        place = slice(read, read + e.end - 1 - e.context)
        features[place] = rollout.features[e.context : e.end - 1, : 3 * hidden].to(dtype)
        positions[place] = torch.arange(e.context, e.end - 1)
        segments[place] = index
        block = slice(placed, placed + len(own))
        behind = own + torch.arange(block_size)[:, None]
        last = behind.clamp(max=e.end - 1)
        anchors[block], anchor_segments[block] = own, index
        last_context[block] = read + own - 1 - e.context
        token_ids[:, block] = torch.tensor(rollout.prompt_ids + rollout.token_ids)[last]
        target_hidden[:, block] = rollout.features[:, 3 * hidden :][last.to(device)].to(dtype)
        is_taught[:, block] = behind < e.end
        temperature[block] = rollout.temperature or 1.0
        read, placed = place.stop, block.stop
    return BlockBatch(
        features=features,
        positions=positions.to(device),
        segments=segments.to(device),
        anchors=anchors.to(device),
        anchor_segments=anchor_segments.to(device),
        last_context=last_context.to(device),
        token_ids=token_ids.to(device),
        target_hidden=target_hidden,
        is_taught=is_taught.to(device),
        temperature=temperature.to(device),
    )


def compute_hidden(head: BlockHead, target: TargetModel, batch: BlockBatch) -> Float[Tensor, "K A H"]:
    """What meets the output rows at each position of each block; gradients flow into `head`."""
    dtype, (num_levels, num_anchors) = head.fc.weight.dtype, batch.token_ids.shape
    context = head.fc(batch.features)
    with torch.no_grad():
        embedded = target.embed(batch.token_ids).to(dtype)
        level = torch.arange(num_levels, device=target.device)
        positions = torch.cat((batch.positions, (batch.anchors + level[:, None]).flatten()))
        cos, sin = (x[0] for x in target.rotary_emb(context, position_ids=positions[None]))
        seen = _find_seen(batch)
    masks = head.mask_embeddings[:, None].expand(-1, num_anchors, -1)
    hidden = head.join(torch.cat((embedded[:1], masks)), context[batch.last_context]).flatten(0, 1)
    read, own = slice(0, len(context)), slice(len(context), None)
    for layer in head.layers:
        keys, values = layer.read_context(context, cos[read], sin[read])
        query, own_keys, own_values = layer.read_block(hidden, cos[own], sin[own])
        attended = attend_packed(query, torch.cat((keys, own_keys)), torch.cat((values, own_values)), seen)
        hidden = layer.finish(hidden, attended)
    return head.read_out(hidden.unflatten(0, (num_levels, num_anchors)), embedded)


def _find_seen(batch: BlockBatch) -> Bool[Tensor, "Q S"]:
    """What each of the Q = K A positions sees: context before its anchor, and its own block up to itself."""
    num_levels, num_anchors = batch.token_ids.shape
    context = (batch.segments == batch.anchor_segments[:, None]) & (batch.positions < batch.anchors[:, None])
    same = torch.eye(num_anchors, dtype=torch.bool, device=context.device)
    earlier = torch.ones(num_levels, num_levels, dtype=torch.bool, device=context.device).tril()
    block = earlier[:, None, :, None] & same[None, :, None, :]
    return torch.cat((context.repeat(num_levels, 1), block.flatten(2).flatten(0, 1)), 1)


@torch.no_grad()
def measure_block_acceptance(drafter: BlockDrafter, rollouts: list[FinishedRollout]) -> Float[Tensor, "depth rank"]:
    """The chance that the target chooses the child of sibling rank r of a walked node at depth d.

    Tokens are drawn anew behind the anchors of the rollouts, as `unroll.measure_acceptance` does.
    """
    head, target = drafter.fast_head, drafter.target
    generator = torch.Generator(target.device).manual_seed(0)
    offered: list[Tensor] = []
    hits: list[Tensor] = []
    for part in pack(rollouts, [count_tokens(rollout) for rollout in rollouts], _MEASURED_TOKENS):
        batch = collate(part, target, target.dtype, block_size=head.block_size)
        found = []
        for own, theirs, taught in zip(
            compute_hidden(head, target, batch), batch.target_hidden, batch.is_taught, strict=True
        ):
            draws = Draws.draw(target, theirs, batch.temperature, generator)
            found.append(draws.find_ranks(head.lm_head(own), drafter.head.draft_vocab) & taught[:, None])
        hits.append(torch.stack(found).sum(1).cpu())
        offered.append(batch.is_taught.sum(1).cpu())
    return torch.stack(hits).sum(0) / torch.stack(offered).sum(0).clamp(min=1)[:, None]
