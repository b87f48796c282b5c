"""What a head drafts from, as tensors: uploaded one by one, or as one table of numbers that recordings are fed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastgrpo.cache import SlotCache
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.graphs import round_blocks, round_size
from fastgrpo.sampling import SamplingBatch
from fastgrpo.transfer import stage, upload
from fastgrpo.types import SpeculationPlan

_COLUMNS = 6  # of a table, before a row's unread tokens and its blocks


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """B sequences; pair i of a sequence is (feature of token i, token i + 1)."""

    sampling: SamplingBatch
    pending_token_ids: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]  # cached tokens of the target, as many pairs are read by the draft's first level
    num_read: Int[Tensor, " B"]  # pairs that were read before
    unread: Int[Tensor, "B N"]  # token i + 1 of the pairs that were not; padded behind them
    counts: tuple[int, ...] | None  # of those; None: padding is computed too, and nobody looks at what comes of it
    blocks: Int[Tensor, "B K"]  # of the target's cache
    own_blocks: Int[Tensor, "B J"]  # of the head's

    @staticmethod
    def gather(context: DraftContext, num_read: list[int], own: SlotCache) -> HeadInputs:
        """Those of the running sequences, as many numbers as there are."""
        lengths, device = context.cache.lengths, context.pending_token_ids.device
        counts = [length - read for length, read in zip(lengths, num_read, strict=True)]
        width = max(counts)
        tokens = [
            sequence.last_token_ids(count) + [0] * (width - count)
            for sequence, count in zip(context.sequences, counts, strict=True)
        ]
        return HeadInputs(
            sampling=context.sampling,
            pending_token_ids=context.pending_token_ids,
            lengths=upload(lengths, device),
            num_read=upload(num_read, device),
            unread=upload(tokens, device),
            counts=tuple(counts),
            blocks=context.cache.blocks,
            own_blocks=own.blocks,
        )


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """The sizes of a table, and what else makes one draft launch other work than another."""

    plan: SpeculationPlan
    rows: int
    blocks: int
    own_blocks: int
    is_warped: bool
    is_noisy: bool
    is_greedy: bool
    with_noise: bool

    @staticmethod
    def find(context: DraftContext, plan: SpeculationPlan, own: SlotCache, *, with_noise: bool) -> TableShape:
        """The smallest that holds the running sequences."""
        sampling = context.sampling
        return TableShape(
            plan=plan,
            rows=round_size(len(context.sequences)),
            blocks=round_blocks(context.cache.table.shape[1]),
            own_blocks=round_blocks(own.table.shape[1]),
            is_warped=sampling.is_warped,
            is_noisy=sampling.is_noisy,
            is_greedy=sampling.is_greedy,
            with_noise=with_noise,
        )

    @property
    def most_unread(self) -> int:
        """Of a sequence that a draft of this plan was verified for."""
        return self.plan.depth + 1

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of unread tokens and of both tables of blocks."""
        return self.most_unread, self.blocks, self.own_blocks

    def build(self, device: torch.device) -> Int[Tensor, "R C"]:
        return torch.zeros(self.rows, _COLUMNS + sum(self.widths), dtype=torch.int64, device=device)

    def fill(self, table: Int[Tensor, "R C"], context: DraftContext, num_read: list[int], own: SlotCache) -> None:
        """Copy what `read` gives back, in one go; rows without a sequence write to the scratch block."""
        sequences, lengths = context.sequences, context.cache.lengths
        count = len(sequences)
        values = np.zeros(table.shape, dtype=np.int64)
        temperatures = np.array([sequence.params.temperature for sequence in sequences], dtype=np.float64)
        columns: tuple[Any, ...] = (
            [sequence.pending_token_id for sequence in sequences],
            lengths,
            num_read,
            [sequence.stream_key for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
            temperatures.view(np.int64),
        )
        for place, column in enumerate(columns):
            values[:count, place] = column
        unread, blocks, own_blocks = np.split(values[:, _COLUMNS:], np.cumsum(self.widths)[:-1], axis=1)
        for row, (sequence, length, read) in enumerate(zip(sequences, lengths, num_read, strict=True)):
            unread[row, : length - read] = sequence.last_token_ids(length - read)
        blocks[:count, : context.cache.table.shape[1]] = context.cache.table
        own_blocks[:count, : own.table.shape[1]] = own.table
        own_blocks[count:] = own.take_scratch()
        table.copy_(stage(torch.from_numpy(values), table.device), non_blocking=True)

    def read(self, table: Int[Tensor, "R C"]) -> HeadInputs:
        pending, lengths, num_read, stream_keys, positions, temperature = table[:, :_COLUMNS].T.contiguous()
        unread, blocks, own_blocks = table[:, _COLUMNS:].split(self.widths, dim=1)
        sampling = SamplingBatch(
            stream_keys=stream_keys,
            positions=positions,
            temperature=temperature.view(torch.float64).float(),
            top_k=torch.zeros_like(pending),
            top_p=torch.ones_like(pending, dtype=torch.float32),
            is_warped=self.is_warped,
            is_truncated=False,  # drafts are ranked before truncation
            is_noisy=self.is_noisy,
            is_greedy=self.is_greedy,
        )
        return HeadInputs(
            sampling=sampling,
            pending_token_ids=pending,
            lengths=lengths,
            num_read=num_read,
            unread=unread.contiguous(),
            counts=None,
            blocks=blocks.contiguous(),
            own_blocks=own_blocks.contiguous(),
        )
