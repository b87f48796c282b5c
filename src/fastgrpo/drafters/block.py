"""Drafts whole blocks in one pass of a `BlockHead` (DFlash, arXiv:2602.06036; DSpark, arXiv:2607.05147).

Features of cached tokens become keys and values of the head's layers, read lazily when a draft is asked
for. One pass over the block gives every level its logits; a tree then costs each of its nodes no more than
the low-rank correction by the node's own token. Unlike a chain sampled from those logits, trees are grown
and ranked with the target's own noise, as for every drafter here.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.attention import ForwardBatch
from fastgrpo.cache import locate_each
from fastgrpo.drafters.beams import grow_trees
from fastgrpo.drafters.block_files import load_block_head, save_block_head
from fastgrpo.drafters.block_head import BlockHead, build_block_head, start_from_target
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.drafters.head_inputs import HeadInputs
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.transfer import upload
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan


class BlockDrafter(HeadDrafter[BlockHead]):
    """Drafts with a `BlockHead`, all levels in one pass."""

    name = "block"
    _correction: Tensor = torch.empty(0)
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
            correction = (self.head.lm_head.weight.float() @ self.head.previous_out.weight.float()).to(
                self.target.dtype
            )
        if (self._correction.shape, self._correction.device) == (correction.shape, correction.device):
            self._correction.copy_(correction)  # where recorded drafts read it
        else:
            self._correction = correction

    def list_weights(self) -> list[Tensor]:
        return [*super().list_weights(), self._correction]

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        return super().propose(context, replace(plan, depth=min(plan.depth, self.head.block_size)))

    def catch_up(self, context: DraftContext) -> None:
        cache, own, num_read = context.cache, self._rows, self._rows.num_read
        # if a failed attempt has read all of a row, nothing is left
        counts = [max(length - 1 - read, 0) for length, read in zip(cache.lengths, num_read, strict=True)]
        rows, behind = _spread(counts)
        starts = np.array(own.starts)[rows]
        positions = np.array(own.place(num_read))[rows] + behind
        at_rows, at, own_at = upload(np.stack((rows, positions + starts, positions)), self.target.device)
        self._read(cache.locate(at_rows, at), own.cache.locate(at_rows, own_at), own_at)

    def draft(self, inputs: HeadInputs, plan: SpeculationPlan) -> Draft:
        (num_rows, width), device = inputs.unread.shape, inputs.unread.device
        # where it is not known how much is new, what is read behind a row's last token is written over by its block
        if inputs.counts is None:
            rows, behind = _count(num_rows, width, device)
        else:
            rows, behind = upload(np.stack(_spread(inputs.counts)), device)
        positions = inputs.num_read[rows] + behind
        places, own_places = (locate_each(blocks, rows, positions) for blocks in (inputs.blocks, inputs.own_blocks))
        self._read(places, own_places, positions)
        every_row = torch.arange(num_rows, device=device)
        last = self._fuse(locate_each(inputs.blocks, every_row, (inputs.lengths - 1).clamp(min=0)))
        return grow_trees(inputs, plan, _BlockLevels(self, inputs, last, plan.depth), self.calibration)

    def _read(self, places: Int[Tensor, " T"], own_places: Int[Tensor, " T"], positions: Int[Tensor, " T"]) -> None:
        """Keys and values of cached tokens: where they stand in the target's cache, in the head's, and in its rows."""
        hidden = self._fuse(places)
        cos, sin = self._rotation(positions, hidden)
        for number, layer in enumerate(self.fast_head.layers):
            self._rows.write(number, own_places, *layer.read_context(hidden, cos, sin))

    def _fuse(self, places: Int[Tensor, " T"]) -> Float[Tensor, "T H"]:
        """The context that the head makes of the target's features at these places."""
        context: Tensor = self.fast_head.fc(self._take_features(places))
        return context

    def forward(self, inputs: HeadInputs, last: Float[Tensor, "B H"], depth: int) -> Float[Tensor, "B D H"]:
        """One pass over blocks of `depth` positions, behind those that were read.

        Args:
            last: context of the token before the pending one.
        """
        head, target, pending, num_rows = self.fast_head, self.target, inputs.pending_token_ids, len(last)
        masks = head.mask_embeddings[: depth - 1, None].expand(-1, num_rows, -1)
        embedded = torch.cat((self.embed(pending)[None], masks))
        hidden = head.join(embedded, last).transpose(0, 1).flatten(0, 1)
        batch = ForwardBatch.build(
            token_ids=pending[:, None].expand(-1, depth),
            num_nodes=torch.full_like(pending, depth),
            visible=torch.ones(depth, depth, dtype=torch.bool, device=target.device).tril().expand(num_rows, -1, -1),
            blocks=inputs.own_blocks,
            lengths=inputs.lengths,
            dtype=target.dtype,
            num_repeats=target.num_repeats,
            counts=(depth,) * num_rows,
        )
        cos, sin = self._rotation(batch.positions, hidden)
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


def _spread(counts: ListOf[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row, and place behind the row's first, of so many of each row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def _count(num_rows: int, width: int, device: torch.device) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
    """(row, place in it) of each of `width` places in every row, computed on the device."""
    at = torch.arange(num_rows * width, device=device)
    return at // width, at % width


class _BlockLevels:
    """A block under way: its logits are all there, each level waits for the tokens chosen above it."""

    def __init__(self, drafter: BlockDrafter, inputs: HeadInputs, last: Float[Tensor, "B H"], depth: int) -> None:
        self.drafter = drafter
        self.logits = drafter.compute_level_logits(drafter.forward(inputs, last, depth))
        self.tokens = inputs.pending_token_ids[:, None]  # of the nodes expanded last
        self.level = 0

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        corrected = self.drafter.correct(self.logits[:, self.level], self.tokens)
        return self.drafter.rank(corrected, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        self.tokens = token_ids  # a level is the same below every node but for the node's own token
        self.level += 1
