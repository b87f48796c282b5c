"""What a head drafts from, as tensors: uploaded one by one, or read from the one table that recordings are fed with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastgrpo.cache import SlotCache
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.graphs import round_blocks, round_size
from fastgrpo.sampling import NUM_COLUMNS, SamplingBatch, SamplingKind
from fastgrpo.transfer import copy_to, upload
from fastgrpo.types import SpeculationPlan

_COLUMNS = 3 + NUM_COLUMNS  # of a table, before a row's unread tokens and its blocks


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """B sequences; pair i is (feature of token i, token i + 1), counted from where the sequence's own row begins."""

    sampling: SamplingBatch
    pending_token_ids: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]  # cached tokens of the target, and so pairs to be read before the draft's first level
    num_read: Int[Tensor, " B"]  # pairs that were read before
    unread: Int[Tensor, "B N"]  # token i + 1 of each pair that is still to be read, then padding
    counts: tuple[int, ...] | None  # unread pairs of each row; None: padding is computed too, and ignored
    most_pairs: int | None  # the largest of `lengths`, where the host knows it
    blocks: Int[Tensor, "B K"]  # of the target's cache, from where the sequence's own row begins
    own_blocks: Int[Tensor, "B J"]  # of the head's own cache

    @staticmethod
    def gather(context: DraftContext, num_read: list[int], rows: HeadRows) -> HeadInputs:
        """The inputs for the running sequences, without padding of rows.

        Args:
            num_read: tokens of each sequence that the head has read, counted from its first token.
        """
        lengths, device = context.cache.lengths, context.device
        counts = [length - read for length, read in zip(lengths, num_read, strict=True)]
        width = max(counts)
        tokens = [
            sequence.last_token_ids(count) + [0] * (width - count)
            for sequence, count in zip(context.sequences, counts, strict=True)
        ]
        own_lengths = rows.place(lengths)
        return HeadInputs(
            sampling=context.sampling,
            pending_token_ids=context.pending_token_ids,
            lengths=upload(own_lengths, device),
            num_read=upload(rows.place(num_read), device),
            unread=upload(tokens, device),
            counts=tuple(counts),
            most_pairs=max(own_lengths),
            blocks=upload(rows.shift_table(context.cache.table), device) if any(rows.starts) else context.cache.blocks,
            own_blocks=rows.cache.blocks,
        )


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """What tells recorded drafts apart: their table's sizes, and all else that decides which kernels they launch."""

    plan: SpeculationPlan
    rows: int
    blocks: int
    own_blocks: int
    kind: SamplingKind
    with_noise: bool

    @staticmethod
    def find(context: DraftContext, plan: SpeculationPlan, own: SlotCache, *, with_noise: bool) -> TableShape:
        """The smallest shape that holds the running sequences."""
        return TableShape(
            plan=plan,
            rows=round_size(len(context.sequences)),
            blocks=round_blocks(context.cache.table.shape[1]),
            own_blocks=round_blocks(own.table.shape[1]),
            kind=context.kind,
            with_noise=with_noise,
        )

    @property
    def most_unread(self) -> int:
        """Most unread tokens of a sequence after a draft of this plan was verified."""
        return self.plan.depth + 1

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of the unread tokens, of the target's blocks and of the head's own."""
        return self.most_unread, self.blocks, self.own_blocks

    def build(self, device: torch.device) -> Int[Tensor, "R C"]:
        return torch.zeros(self.rows, _COLUMNS + sum(self.widths), dtype=torch.int64, device=device)

    def fill(self, table: Int[Tensor, "R C"], context: DraftContext, num_read: list[int], rows: HeadRows) -> None:
        """Copy in what `read` gives back, in one go; padding rows write to the scratch block."""
        sequences, lengths, own = context.sequences, context.cache.lengths, rows.cache
        count = len(sequences)
        values = np.zeros(table.shape, dtype=np.int64)
        values[:count, 0] = [sequence.pending_token_id for sequence in sequences]
        values[:count, 1], values[:count, 2] = rows.place(lengths), rows.place(num_read)
        values[:count, 3:_COLUMNS] = context.columns.T
        unread, blocks, own_blocks = np.split(values[:, _COLUMNS:], np.cumsum(self.widths)[:-1], axis=1)
        for row, (sequence, length, read) in enumerate(zip(sequences, lengths, num_read, strict=True)):
            unread[row, : length - read] = sequence.last_token_ids(length - read)
        blocks[:count, : context.cache.table.shape[1]] = rows.shift_table(context.cache.table)
        own_blocks[:count, : own.table.shape[1]] = own.table
        own_blocks[count:] = own.take_scratch()
        copy_to(table, values)

    def read(self, table: Int[Tensor, "R C"]) -> HeadInputs:
        """The inputs that `fill` copied in; launches work only, so that it can be recorded."""
        columns = table[:, :_COLUMNS].T.contiguous()
        pending, lengths, num_read = columns[:3]
        unread, blocks, own_blocks = table[:, _COLUMNS:].split(self.widths, dim=1)
        return HeadInputs(
            sampling=SamplingBatch.read(columns[3:], self.kind),
            pending_token_ids=pending,
            lengths=lengths,
            num_read=num_read,
            unread=unread.contiguous(),
            counts=None,
            most_pairs=None,
            blocks=blocks.contiguous(),
            own_blocks=own_blocks.contiguous(),
        )
