"""Drafts whole blocks in one pass of a `BlockHead` (DFlash, arXiv:2602.06036; DSpark, arXiv:2607.05147).

Features of cached tokens become keys and values of the head's layers, read lazily when a draft is asked
for. One pass over the block gives every level its logits; a tree then costs each of its nodes no more than
the low-rank correction by the node's own token. Unlike a chain sampled from those logits, trees are grown
and ranked with the target's own noise, as for every drafter here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.attention import ForwardBatch
from fastgrpo.drafters.beams import grow_trees, rank_candidates
from fastgrpo.drafters.block_files import load_block_head, save_block_head
from fastgrpo.drafters.block_head import BlockHead, build_block_head, start_from_target
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.head_parts import choose_vocab_size, select_vocabulary, take_output_rows
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.tree import Draft
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan
from fastgrpo.verify import Verdict


class BlockDrafter:
    """Drafts with a `BlockHead`; keeps one row of context keys and values for each running sequence.

    Args:
        target: the model to draft for; its embedding, RoPE and output rows are used.
        head: trained weights; None starts from the target's own, and `was_trained` is False.
        draft_vocab_size: rows of a new head's reduced output head; None takes what the device is good for.

    Attributes:
        calibration: what its chances have been worth so far.
        ranks_with_noise: False drafts the likeliest tokens whatever the noise; for comparison.
    """

    name = "block"
    wants_features = True
    is_one_pass = True

    def __init__(
        self,
        target: TargetModel,
        *,
        head: BlockHead | None = None,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.target = target
        self.calibration = Calibration()
        self.ranks_with_noise = True
        self.was_trained = head is not None
        if head is None:
            head = build_block_head(target, draft_vocab_size or choose_vocab_size(target))
            start_from_target(head, target)
        self.head = head.to(target.device)
        if target.dtype in (torch.bfloat16, torch.float16):
            self.head.lm_head.to(target.dtype)  # not trained: a copy of the target's rows as they are
        self._rows = HeadRows(target, num_layers=len(head.layers))
        self.refresh()

    def refresh(self) -> None:
        """Take the trained weights into the copy that drafts; output rows come from the target as it is now."""
        take_output_rows(self.head, self.target)
        self.fast_head = copy.deepcopy(self.head).to(self.target.dtype).requires_grad_(False)
        with torch.no_grad():  # the correction's way to the logits as one small matrix
            self._correction = (self.head.lm_head.weight.float() @ self.head.previous_out.weight.float()).to(
                self.target.dtype
            )

    def select_vocabulary(self, counts: Int[Tensor, " V"]) -> None:
        """Draft from the most counted tokens."""
        select_vocabulary(self.head, counts)

    def begin(self) -> None:
        self._rows.clear()
        self.calibration.fit()
        self.refresh()

    def count_unread(self, lengths: list[int]) -> int:
        return self._rows.count_unread(lengths)

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        pass  # features are read when they are needed

    def judge(self, draft: Draft, verdict: Verdict) -> None:
        self.calibration.observe(draft, verdict)

    def release(self, slot: int, last_slot: int) -> None:
        self._rows.release(slot, last_slot)

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        lengths = context.cache.lengths
        if min(lengths) == 0:  # a one-token prompt has no feature yet
            return Draft.roots(context.pending_token_ids)
        plan = replace(plan, depth=min(plan.depth, self.head.block_size))
        self._rows.admit(len(lengths))
        self._rows.reserve(len(lengths), max(lengths) + plan.depth)
        last = self._read_features(context)
        self._rows.num_read = list(lengths)
        levels = _BlockLevels(self, context.pending_token_ids, last, lengths, plan.depth)
        return grow_trees(context, plan, levels, self.calibration)

    def _read_features(self, context: DraftContext) -> Float[Tensor, "B H"]:
        """Keys and values of the cached tokens that are new; returns each row's last context."""
        store = context.cache.features
        assert store is not None
        device = self.target.device
        read, lengths = torch.tensor([self._rows.num_read, context.cache.lengths], device=device)
        counts = lengths - read
        rows = torch.arange(len(counts), device=device).repeat_interleave(counts)
        first = (read - counts.cumsum(0) + counts)[rows]
        positions = first + torch.arange(len(rows), device=device)
        hidden = self._fuse(store.flat(0)[rows * store.capacity + positions])
        cos, sin = (x[0] for x in self.target.decoder.rotary_emb(hidden, position_ids=positions[None]))
        index = rows * self._rows.keys.capacity + positions
        for number, layer in enumerate(self.fast_head.layers):
            self._rows.write(number, index, *layer.read_context(hidden, cos, sin))
        ends = torch.arange(len(counts), device=device) * store.capacity + lengths - 1
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
            rows=slice(0, num_rows),
            row_numbers=torch.arange(num_rows, device=target.device),
            lengths=torch.tensor(lengths, device=target.device),
            store=self._rows.keys,
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

    def rank_level(
        self, logits: Float[Tensor, "B W C"], noise_rows: SamplingBatch, width: int
    ) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The `width` most promising tokens below each node: log chance of being chosen, token id."""
        return rank_candidates(logits, self.head.draft_vocab, noise_rows, width, with_noise=self.ranks_with_noise)

    def measure_level(self, num_tokens: int) -> Callable[[], object]:
        """One pass over `num_tokens` positions and the ranking of each, for the profiler; leaves no row behind."""
        depth = min(self.head.block_size, num_tokens)
        num_rows = num_tokens // depth
        sequences = [
            Sequence(request_id=i, prompt_ids=[0], params=SamplingParams(), max_tokens=1, stream_key=i)
            for i in range(num_rows)
        ]
        noise_rows = SamplingBatch.build(sequences, self.target.device)
        tokens = torch.ones(num_rows, dtype=torch.int64, device=self.target.device)
        last = self.embed(tokens)
        self._rows.reserve(num_rows, depth)

        def run() -> None:
            levels = _BlockLevels(self, tokens, last, [0] * num_rows, depth)
            for _ in range(depth):
                levels.rank(noise_rows, 4)
                levels.advance(tokens[:, None])

        return run

    def save(self, folder: Path) -> None:
        """Write the trained head, what its chances are worth beside it."""
        save_block_head(self.head, folder, self.target)
        self.calibration.save(folder)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote into this head."""
        head = load_block_head(folder, self.target)
        if (head.block_size, len(head.layers), head.rank) != self._shape:
            raise ValueError(
                f"the head in {folder} has block_size, layers and rank {head.block_size}, {len(head.layers)}, "
                f"{head.rank}; this one has {', '.join(map(str, self._shape))}"
            )
        self.head.resize_vocabulary(head.draft_vocab_size)
        self.head.lm_head.to(head.lm_head.weight.dtype)
        self.head.load_state_dict(head.state_dict())
        self.calibration.restore(folder)
        self.refresh()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.head.block_size, len(self.head.layers), self.head.rank

    @classmethod
    def load(cls, folder: Path, target: TargetModel) -> BlockDrafter:
        """Read a folder that `save` wrote.

        Raises:
            ValueError: damaged files, or a head of another target; names what differs.
        """
        return cls(target, head=load_block_head(folder, target))


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
        return self.drafter.rank_level(corrected, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        self.advance(token_ids)  # a level is the same below every node but for the node's own token

    def advance(self, token_ids: Int[Tensor, "B W"]) -> None:
        self.tokens = token_ids
        self.level += 1
