"""An EAGLE-3-shaped head (arXiv:2503.01840) that drafts trees ranked with the target's own noise.

Pair i is (target feature of token i, embedding of token i + 1); the head's output there predicts token
i + 2. Pairs with true features are read lazily, when a draft is asked for; the nodes of a tree use the
head's own outputs as features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.eagle_files import load_head, save_head
from fastgrpo.drafters.eagle_head import EagleHead, build_head, start_from_target
from fastgrpo.drafters.eagle_layer import FusedMidLayer
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.kernels.linear import pack_modules
from fastgrpo.model import TargetModel
from fastgrpo.rotation import RotationTable
from fastgrpo.sampling import SamplingBatch
from fastgrpo.transfer import upload
from fastgrpo.types import SpeculationPlan

_MANY_PAIRS = 8  # new ones a row, from which on keys and values of all but the last are computed apart


class EagleDrafter(HeadDrafter[EagleHead]):
    """Drafts with an `EagleHead`, one level at a time."""

    name = "eagle"

    @staticmethod
    def build_head(target: TargetModel, draft_vocab_size: int) -> EagleHead:
        head = build_head(target, draft_vocab_size)
        start_from_target(head, target)
        return head

    @staticmethod
    def load_head(folder: Path, target: TargetModel) -> EagleHead:
        return load_head(folder, target)

    def save_head(self, folder: Path, *, compact: bool = False, counts: Int[Tensor, " V"] | None = None) -> None:
        """Write the trained head as an EAGLE-3 checkpoint; see `HeadDrafter.save_head`."""
        save_head(self.head, folder, self.target, compact=compact, counts=counts)

    def prepare(self) -> None:
        self._rotation = RotationTable(self.target.decoder.rotary_emb)
        self._layer = FusedMidLayer(self.fast_head) if FusedMidLayer.covers(self.fast_head) else None
        pack_modules(self.fast_head, leave=() if self._layer is None else ("midlayer",))

    def start_levels(self, context: DraftContext, plan: SpeculationPlan) -> _EagleLevels:
        return _EagleLevels(self, context, self._read_pairs(context))

    def _read_pairs(self, context: DraftContext) -> Float[Tensor, "B H"]:
        """Run the pairs whose true features are new; returns each row's last output."""
        lengths, num_read, device = context.cache.lengths, self._rows.num_read, self.target.device
        if sum(lengths) - sum(num_read) > _MANY_PAIRS * len(lengths):
            self._store_pairs(context)
            num_read = [length - 1 for length in lengths]
        counts = [length - read for length, read in zip(lengths, num_read, strict=True)]
        width = max(counts)
        tokens = [
            (s.all_token_ids[-count:] if count else []) + [0] * (width - count)
            for s, count in zip(context.sequences, counts, strict=True)
        ]
        num_nodes = upload(counts, device)
        batch = ForwardBatch.build(
            token_ids=upload(tokens, device),
            num_nodes=num_nodes,
            visible=torch.ones(len(lengths), width, width, dtype=torch.bool, device=device).tril(),
            blocks=self._rows.cache.blocks,
            lengths=upload(num_read, device),
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
            counts=counts,
        )
        rows = torch.arange(len(lengths), device=device).repeat_interleave(num_nodes, output_size=sum(counts))
        hidden = self._read_features(context, rows, batch.positions)
        return self.forward(batch, hidden)[batch.row_starts + num_nodes - 1]

    def _store_pairs(self, context: DraftContext) -> None:
        """Keys and values of all new pairs but each row's last, whose output alone is drafted from."""
        tokens: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        for row, (sequence, read) in enumerate(zip(context.sequences, self._rows.num_read, strict=True)):
            last = context.cache.lengths[row] - 1
            tokens += sequence.all_token_ids[read + 1 : last + 1]
            positions += range(read, last)
            rows += [row] * (last - read)
        token_ids, at_rows, at = (upload(values, self.target.device) for values in (tokens, rows, positions))
        hidden = self._read_features(context, at_rows, at)
        cos, sin = self._rotation(at, hidden)
        places = self._rows.cache.locate(at_rows, at)
        if self._layer is not None:
            self._layer.store(self.target.embed_tokens, token_ids, hidden, cos, sin, places, self._rows)
            return
        embedded = self.target.embed_tokens(token_ids).to(hidden.dtype)
        _, key, value = self.fast_head.attention_inputs(embedded, hidden, cos, sin)
        self._rows.write(0, places, key, value)

    def _read_features(
        self, context: DraftContext, rows: Int[Tensor, " T"], positions: Int[Tensor, " T"]
    ) -> Float[Tensor, "T H"]:
        """The head's hidden state for the target's features at these places."""
        store = context.cache.features
        assert store is not None
        features = store.flat(0)[context.cache.locate(rows, positions), : 3 * self.target.hidden_size]
        hidden: Tensor = self.fast_head.fc(features.to(self.target.dtype))
        return hidden

    def forward(
        self, batch: ForwardBatch, hidden: Float[Tensor, "P H"], above: Int[Tensor, " T"] | None = None
    ) -> Float[Tensor, "T H"]:
        """One pass of the head over packed pairs, keys and values written behind each row.

        Args:
            above: which of the hidden states each pair has; None: its own.
        """
        head, target = self.fast_head, self.target
        cos, sin = self._rotation(batch.positions, hidden)
        if self._layer is not None:
            return self._layer.run(target.embed_tokens, hidden, above, cos, sin, batch, self._rows)
        hidden = hidden if above is None else hidden[above]
        embedded = target.embed_tokens(batch.token_ids).to(hidden.dtype)
        query, key, value = head.attention_inputs(embedded, hidden, cos, sin)
        return head.finish(hidden, self._rows.attend(0, batch, query, key, value))

    def rank_level(
        self, output: Float[Tensor, "B W H"], noise_rows: SamplingBatch, width: int
    ) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The `width` most promising tokens after each output: log chance of being chosen, token id."""
        return self.rank(self.fast_head.compute_logits(output), noise_rows, width)


class _EagleLevels:
    """Nodes of a draft run through the head, on its own outputs."""

    def __init__(self, drafter: EagleDrafter, context: DraftContext, output: Float[Tensor, "B H"]) -> None:
        self.drafter = drafter
        self.lengths = upload(context.cache.lengths, output.device)
        self.hidden = output[:, None]  # outputs of the nodes expanded last

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        return self.drafter.rank_level(self.hidden, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        drafter = self.drafter
        batch = ForwardBatch.build(
            token_ids=token_ids,
            num_nodes=torch.full_like(self.lengths, token_ids.shape[1]),
            visible=visible,
            blocks=drafter._rows.cache.blocks,
            lengths=self.lengths,
            dtype=drafter.target.dtype,
            num_repeats=drafter.target.num_repeats,
            counts=(token_ids.shape[1],) * len(token_ids),
        )
        num_rows, num_above = self.hidden.shape[:2]
        places = (torch.arange(num_rows, device=above.device) * num_above)[:, None] + above
        output = drafter.forward(batch, self.hidden.flatten(0, 1), places.flatten())
        self.hidden = output.unflatten(0, token_ids.shape)
