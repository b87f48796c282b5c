"""An EAGLE-3-shaped head (arXiv:2503.01840) that drafts trees ranked with the target's own noise.

Pair i is (target feature of token i, embedding of token i + 1); the head's output for it predicts token
i + 2. Pairs with the target's features are read lazily, when a draft is asked for; the nodes of a tree
use the head's own outputs as features.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.cache import locate_each
from fastgrpo.drafters.beams import grow_trees
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.eagle_files import load_head, save_head
from fastgrpo.drafters.eagle_head import EagleHead, build_head, start_from_target
from fastgrpo.drafters.eagle_layer import FusedMidLayer, compile_head, is_plain
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.drafters.head_inputs import HeadInputs
from fastgrpo.drafters.pools import LEVEL_PENALTY, build_draft
from fastgrpo.kernels.heads import CompiledHead, DraftRows, DraftShape
from fastgrpo.kernels.linear import pack_modules
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.transfer import upload
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan

_POINTING = ("_layer", "_compiled")  # attributes that hold addresses of the fast copy's weights
_MOST_KEPT = 2**16  # bytes of a mask that is kept for later steps; larger ones are not worth their memory


class EagleDrafter(HeadDrafter[EagleHead]):
    """Drafts with an `EagleHead`, one level at a time."""

    name = "eagle"
    num_prompt_tokens = 32

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

    def check_like(self, head: EagleHead, folder: Path) -> None:
        if head.norm_before_residual != self.head.norm_before_residual:
            raise ValueError(
                f"the head in {folder} has norm_before_residual {head.norm_before_residual}, and this one has "
                f"{self.head.norm_before_residual}: set drafter to the head that the run began with"
            )

    def prepare(self) -> None:
        head, memory = self.fast_head, self._memory
        memory.begin()
        self._layer = FusedMidLayer(head, memory) if FusedMidLayer.covers(head) else None
        pack_modules(head, leave=() if self._layer is None else ("midlayer",), memory=memory)
        self._compiled = None if self._layer is None else compile_head(self.fast_head, self._layer)

    def __getstate__(self) -> dict[str, Any]:
        """All but what holds addresses of the fast copy's weights: a copy of the drafter builds its own."""
        return {name: value for name, value in super().__getstate__().items() if name not in _POINTING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.prepare()

    @property
    def dtype(self) -> torch.dtype:
        """The type that drafts are computed in."""
        return self._rows.cache.keys.data.dtype

    def draft(self, inputs: HeadInputs, plan: SpeculationPlan) -> Draft:
        if self._compiled is not None and inputs.counts is not None and is_plain(self.target.embed_tokens, self.dtype):
            return self._draft_at_once(self._compiled, inputs, plan)
        return grow_trees(inputs, plan, _EagleLevels(self, inputs, self._read_pairs(inputs)), self.calibration)

    def _draft_at_once(self, head: CompiledHead, inputs: HeadInputs, plan: SpeculationPlan) -> Draft:
        """The draft that `grow_trees` would grow, bit for bit, in one call of a compiled kernel."""
        assert self._cache is not None and self._cache.features is not None
        assert inputs.counts is not None and inputs.most_pairs is not None
        own, sampling, embeddings = self._rows.cache, inputs.sampling, self.target.embed_tokens.weight
        cos, sin = self._rotation.cover_up_to(inputs.most_pairs + plan.depth, own.keys.data.dtype)
        rows = DraftRows(
            cos=cos,
            sin=sin,
            keys=own.keys.data,
            values=own.values.data,
            own_blocks=inputs.own_blocks,
            features=self._cache.features.flat(0),
            blocks=inputs.blocks,
            roots=inputs.pending_token_ids,
            lengths=inputs.lengths,
            num_read=inputs.num_read,
            counts=inputs.counts,
            unread=inputs.unread,
            stream_keys=sampling.stream_keys,
            positions=sampling.positions,
            temperature=sampling.temperature,
        )
        shape = DraftShape(
            depth=plan.depth,
            width=plan.width,
            most_nodes=plan.tree_size,
            lines=[self.calibration.line(depth) for depth in range(1, plan.depth + 1)],
            penalty=LEVEL_PENALTY,
            with_noise=self.ranks_with_noise and sampling.is_noisy,
        )
        return build_draft(*head.draft(rows, shape, embeddings, self.head.draft_vocab))

    def _read_pairs(self, inputs: HeadInputs) -> Float[Tensor, "B H"]:
        """Run the head over the pairs that have not been read; returns the output for each row's last pair."""
        (num_rows, width), device = inputs.unread.shape, inputs.unread.device
        counts = (width,) * num_rows if inputs.counts is None else inputs.counts
        is_kept = device.type == "cpu" and num_rows * width**2 <= _MOST_KEPT
        visible = _see_before(num_rows, width) if is_kept else _build_triangles(num_rows, width, device)
        batch = ForwardBatch.build(
            token_ids=inputs.unread,
            num_nodes=torch.full_like(inputs.num_read, width) if inputs.counts is None else upload(counts, device),
            visible=visible,
            blocks=inputs.own_blocks,
            lengths=inputs.num_read,
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
            counts=counts,
        )
        rows = torch.arange(num_rows, device=device).repeat_interleave(batch.num_nodes, output_size=sum(counts))
        hidden = self._read_features(locate_each(inputs.blocks, rows, batch.positions))
        return self._run(batch, hidden)[batch.row_starts + (inputs.lengths - inputs.num_read) - 1]

    def catch_up(self, context: DraftContext) -> None:
        """Store keys and values of all unread pairs but each row's last: only that one's output is drafted from."""
        tokens: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        own: list[int] = []
        for row, (sequence, read) in enumerate(zip(context.sequences, self._rows.num_read, strict=True)):
            last = context.cache.lengths[row] - 1
            tokens += sequence.all_token_ids[read + 1 : last + 1]
            positions += range(read, last)
            own += range(read - self._rows.starts[row], last - self._rows.starts[row])
            rows += [row] * (last - read)
        token_ids, at_rows, at, own_at = (
            upload(values, self.target.device) for values in (tokens, rows, positions, own)
        )
        hidden = self._read_features(context.cache.locate(at_rows, at))
        cos, sin = self._rotation(own_at, hidden)
        places = self._rows.cache.locate(at_rows, own_at)
        if self._layer is not None:
            self._layer.store(self.target.embed_tokens, token_ids, hidden, cos, sin, places, self._rows)
            return
        embedded = self.target.embed_tokens(token_ids).to(hidden.dtype)
        _, key, value = self.fast_head.attention_inputs(embedded, hidden, cos, sin)
        self._rows.write(0, places, key, value)

    def _read_features(self, places: Int[Tensor, " T"]) -> Float[Tensor, "T H"]:
        """The head's input for the target's features at these places of the target's cache."""
        hidden: Tensor = self.fast_head.fc(self._take_features(places))
        return hidden

    def expand(
        self, batch: ForwardBatch, hidden: Float[Tensor, "B A H"], above: Int[Tensor, "B W"]
    ) -> Float[Tensor, "T H"]:
        """Outputs of a level's nodes, W in each row; their keys and values are written behind the row.

        Args:
            hidden: outputs of the A nodes of each row that were expanded before.
            above: index among those of each node's parent.
        """
        num_rows, num_above = hidden.shape[:2]
        places = (torch.arange(num_rows, device=above.device) * num_above)[:, None] + above
        return self._run(batch, hidden.flatten(0, 1)[places.flatten()])

    def _run(self, batch: ForwardBatch, hidden: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        """One pass of the head over packed pairs, kernel by kernel."""
        head, target = self.fast_head, self.target
        cos, sin = self._rotation(batch.positions, hidden)
        if self._layer is not None:
            return self._layer.run(target.embed_tokens, hidden, cos, sin, batch, self._rows)
        embedded = target.embed_tokens(batch.token_ids).to(hidden.dtype)
        query, key, value = head.attention_inputs(embedded, hidden, cos, sin)
        return head.finish(hidden, self._rows.attend(0, batch, query, key, value))

    def rank_level(
        self, output: Float[Tensor, "B W H"], noise_rows: SamplingBatch, width: int
    ) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The `width` most promising tokens after each output: log chance of being chosen, token id."""
        return self.rank(self.fast_head.compute_logits(output), noise_rows, width)


def _build_triangles(num_rows: int, width: int, device: torch.device) -> Bool[Tensor, "B N N"]:
    """Causal masks: each new pair of a row sees itself and those before it."""
    return torch.ones(num_rows, width, width, dtype=torch.bool, device=device).tril()


@functools.lru_cache(maxsize=256)
def _see_before(num_rows: int, width: int) -> Bool[Tensor, "B N N"]:
    """`_build_triangles` on the host, kept for later steps; not for recordings, which need memory of their own."""
    return _build_triangles(num_rows, width, torch.device("cpu"))


class _EagleLevels:
    """Runs the levels of a draft through the head, with its own outputs as features; see `grow_trees`."""

    def __init__(self, drafter: EagleDrafter, inputs: HeadInputs, output: Float[Tensor, "B H"]) -> None:
        self.drafter, self.inputs = drafter, inputs
        self.hidden = output[:, None]  # outputs of the nodes expanded last

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        return self.drafter.rank_level(self.hidden, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        drafter, inputs = self.drafter, self.inputs
        batch = ForwardBatch.build(
            token_ids=token_ids,
            num_nodes=torch.full_like(inputs.lengths, token_ids.shape[1]),
            visible=visible,
            blocks=inputs.own_blocks,
            lengths=inputs.lengths,
            dtype=drafter.target.dtype,
            num_repeats=drafter.target.num_repeats,
            counts=(token_ids.shape[1],) * len(token_ids),
        )
        self.hidden = drafter.expand(batch, self.hidden, above).unflatten(0, token_ids.shape)
