"""Drafts whole blocks in one pass of a `BlockHead` (DFlash, arXiv:2602.06036; DSpark, arXiv:2607.05147).

Features of cached tokens become keys and values of the head's layers, read lazily when a draft is asked
for. One pass over the block gives every level its logits; a tree then costs each of its nodes no more than
the low-rank correction by the node's own token. Unlike a chain sampled from those logits, trees are grown
and ranked with the target's own noise, as for every drafter here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.attention import ForwardBatch
from fastgrpo.drafters.beams import grow_trees
from fastgrpo.drafters.block_files import load_block_head, save_block_head
from fastgrpo.drafters.block_head import BlockHead, build_block_head, start_from_target
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.transfer import upload
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan


class BlockDrafter(HeadDrafter[BlockHead]):
    """Drafts with a `BlockHead`, all levels in one pass."""

    name = "block"
    num_prompt_tokens = 512

    @staticmethod
    def build_head(target: TargetModel, draft_vocab_size: int) -> BlockHead:
        head = build_block_head(target, draft_vocab_size)
        start_from_target(head, target)
        return head

    @staticmethod
    def load_head(folder: Path, target: TargetModel) -> BlockHead:
        return load_block_head(folder, target)

    def save_head(self, folder: Path, *, compact: bool = False, counts: Int[Tensor, " V"] | None = None) -> None:
        save_block_head(self.head, folder, self.target, compact=compact, counts=counts)

    def check_like(self, head: BlockHead, folder: Path) -> None:
        found, own = ((each.block_size, each.num_layers, each.rank) for each in (head, self.head))
        if found != own:
            raise ValueError(
                f"the head in {folder} has block_size, layers and rank {', '.join(map(str, found))}; this one has "
                f"{', '.join(map(str, own))}"
            )

    def refresh(self) -> None:
        super().refresh()
        with torch.no_grad():  # the correction's way to the logits as one small matrix
            self._correction = (self.head.lm_head.weight.float() @ self.head.previous_out.weight.float()).to(
                self.target.dtype
            )

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        return super().propose(context, replace(plan, depth=min(plan.depth, self.head.block_size)))

    def grow(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        last = self._read_features(context)
        lengths = self._rows.place(context.cache.lengths)
        levels = _BlockLevels(self, context.pending_token_ids, last, lengths, plan.depth)
        return grow_trees(context, plan, levels, self.calibration)

    def _read_features(self, context: DraftContext) -> Float[Tensor, "B H"]:
        """Keys and values of the cached tokens that are new; returns each row's last context."""
        store = context.cache.features
        assert store is not None
        device = self.target.device
        read, lengths, starts = upload([self._rows.num_read, context.cache.lengths, self._rows.starts], device)
        counts = lengths - read
        num_unread = sum(context.cache.lengths) - sum(self._rows.num_read)
        rows = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=num_unread)
        first = (read - counts.cumsum(0) + counts)[rows]
        positions = first + torch.arange(len(rows), device=device)
        hidden = self._fuse(store.flat(0)[context.cache.locate(rows, positions)])
        own = positions - starts[rows]
        cos, sin = (x[0] for x in self.target.decoder.rotary_emb(hidden, position_ids=own[None]))
        index = self._rows.cache.locate(rows, own)
        for number, layer in enumerate(self.fast_head.layers):
            self._rows.write(number, index, *layer.read_context(hidden, cos, sin))
        ends = context.cache.locate(torch.arange(len(counts), device=device), lengths - 1)
        return self._fuse(store.flat(0)[ends])

    def _fuse(self, features: Float[Tensor, "T F"]) -> Float[Tensor, "T H"]:
        return self.fast_head.fc(features[:, : 3 * self.target.hidden_size].to(self.target.dtype))

    def forward(
        self, pending_token_ids: Int[Tensor, " B"], last: Float[Tensor, "B H"], lengths: list[int], depth: int
    ) -> Float[Tensor, "B D H"]:
        """One pass over blocks of `depth` positions.

        Args:
            last: context of the token before the pending one.
            lengths: positions read of each row, behind which its block stands.
        """
        head, target, num_rows = self.fast_head, self.target, len(lengths)
        masks = head.mask_embeddings[: depth - 1, None].expand(-1, num_rows, -1)
        embedded = torch.cat((self.embed(pending_token_ids)[None], masks))
        hidden = head.join(embedded, last).transpose(0, 1).flatten(0, 1)
        batch = ForwardBatch.build(
            token_ids=pending_token_ids[:, None].expand(-1, depth),
            num_nodes=torch.full_like(pending_token_ids, depth),
            visible=torch.ones(depth, depth, dtype=torch.bool, device=target.device).tril().expand(num_rows, -1, -1),
            blocks=self._rows.cache.blocks,
            lengths=upload(lengths, target.device),
            dtype=target.dtype,
            num_repeats=target.num_repeats,
        )
        cos, sin = (x[0] for x in target.decoder.rotary_emb(hidden, position_ids=batch.positions[None]))
        for number, layer in enumerate(head.layers):
            attended = self._rows.attend(number, batch, *layer.read_block(hidden, cos, sin))
            hidden = layer.finish(hidden, attended)
        return hidden.unflatten(0, (num_rows, depth))

    def embed(self, token_ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n H"]:
        return self.target.embed_tokens(token_ids).to(self.target.dtype)

    def compute_level_logits(self, output: Float[Tensor, "B D H"]) -> Float[Tensor, "B D C"]:
        """Logits of each level before their correction."""
        head = self.fast_head
        return head.lm_head(head.norm(output))

    def correct(self, logits: Float[Tensor, "B C"], token_ids: Int[Tensor, "B W"]) -> Float[Tensor, "B W C"]:
        """Logits of one level below nodes with these tokens."""
        return logits[:, None] + F.linear(self.fast_head.previous_in(self.embed(token_ids)), self._correction)


class _BlockLevels:
    """A block under way: its logits are all there, each level waits for the tokens chosen above it."""

    def __init__(
        self,
        drafter: BlockDrafter,
        pending_token_ids: Int[Tensor, " B"],
        last: Float[Tensor, "B H"],
        lengths: list[int],
        depth: int,
    ) -> None:
        self.drafter = drafter
        self.logits = drafter.compute_level_logits(drafter.forward(pending_token_ids, last, lengths, depth))
        self.tokens = pending_token_ids[:, None]  # of the nodes expanded last
        self.level = 0

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        corrected = self.drafter.correct(self.logits[:, self.level], self.tokens)
        return self.drafter.rank(corrected, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        self.advance(token_ids)  # a level is the same below every node but for the node's own token

    def advance(self, token_ids: Int[Tensor, "B W"]) -> None:
        self.tokens = token_ids
        self.level += 1
