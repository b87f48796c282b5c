"""An EAGLE-3-shaped head (arXiv:2503.01840) that drafts trees ranked with the target's own noise.

Pair i is (target feature of token i, embedding of token i + 1); the head's output there predicts token
i + 2. Pairs with true features are read lazily, when a draft is asked for; the nodes of a tree use the
head's own outputs as features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.drafters.beams import grow_trees, rank_candidates
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.eagle_files import load_head, save_head
from fastgrpo.drafters.eagle_head import EagleHead, build_head, start_from_target
from fastgrpo.drafters.head_parts import choose_vocab_size, select_vocabulary, take_output_rows
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.tree import Draft
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan
from fastgrpo.verify import Verdict


class EagleDrafter:
    """Drafts with an `EagleHead`; keeps one row of keys and values for each running sequence.

    Args:
        target: the model to draft for; its embedding, RoPE and output rows are used.
        head: trained weights; None starts from the target's own, and `was_trained` is False.
        draft_vocab_size: rows of a new head's reduced output head; None takes what the device is good for.

    Attributes:
        calibration: what its chances have been worth so far.
        ranks_with_noise: False drafts the likeliest tokens whatever the noise, as the paper does; for comparison.
    """

    name = "eagle"
    wants_features = True

    def __init__(
        self,
        target: TargetModel,
        *,
        head: EagleHead | None = None,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.target = target
        self.calibration = Calibration()
        self.ranks_with_noise = True
        self.was_trained = head is not None
        if head is None:
            head = build_head(target, draft_vocab_size or choose_vocab_size(target))
            start_from_target(head, target)
        self.head = head.to(target.device)
        if target.dtype in (torch.bfloat16, torch.float16):
            self.head.lm_head.to(target.dtype)  # not trained: a copy of the target's rows as they are
        self._rows = HeadRows(target, num_layers=1)  # of pairs
        self.refresh()

    def refresh(self) -> None:
        """Take the trained weights into the copy that drafts; output rows come from the target as it is now."""
        take_output_rows(self.head, self.target)
        self.fast_head = copy.deepcopy(self.head).to(self.target.dtype).requires_grad_(False)

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
        pass  # features and tokens are read when they are needed

    def judge(self, draft: Draft, verdict: Verdict) -> None:
        self.calibration.observe(draft, verdict)

    def release(self, slot: int, last_slot: int) -> None:
        self._rows.release(slot, last_slot)

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        lengths = context.cache.lengths
        if min(lengths) == 0:  # a one-token prompt has no feature yet
            return Draft.roots(context.pending_token_ids)
        self._rows.admit(len(lengths))
        self._rows.reserve(len(lengths), max(lengths) + plan.width * plan.depth)
        output = self._read_pairs(context)
        self._rows.num_read = list(lengths)
        return grow_trees(context, plan, _EagleLevels(self, context, output), self.calibration)

    def _read_pairs(self, context: DraftContext) -> Float[Tensor, "B H"]:
        """Run the pairs whose true features are new; returns each row's last output."""
        lengths, device = context.cache.lengths, self.target.device
        counts = [length - read for length, read in zip(lengths, self._rows.num_read, strict=True)]
        width = max(counts)
        tokens = [
            (s.all_token_ids[-count:] if count else []) + [0] * (width - count)
            for s, count in zip(context.sequences, counts, strict=True)
        ]
        num_nodes = torch.tensor(counts, device=device)
        index = torch.arange(len(lengths), device=device)
        batch = ForwardBatch.build(
            token_ids=torch.tensor(tokens, device=device),
            num_nodes=num_nodes,
            visible=torch.ones(len(lengths), width, width, dtype=torch.bool, device=device).tril(),
            rows=slice(0, len(lengths)),
            row_numbers=index,
            lengths=torch.tensor(self._rows.num_read, device=device),
            store=self._rows.keys,
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
        )
        store = context.cache.features
        assert store is not None
        rows = index.repeat_interleave(num_nodes)
        features = store.flat(0)[rows * store.capacity + batch.positions, : 3 * self.target.hidden_size]
        hidden = self.fast_head.fc(features.to(self.target.dtype))
        return self.forward(batch, hidden)[batch.row_starts + num_nodes - 1]

    def forward(self, batch: ForwardBatch, hidden: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        """One pass of the head over packed pairs, keys and values written behind each row."""
        head, target = self.fast_head, self.target
        embedded = target.embed_tokens(batch.token_ids).to(hidden.dtype)
        cos, sin = target.decoder.rotary_emb(hidden, position_ids=batch.positions[None])
        query, key, value = head.attention_inputs(embedded, hidden, cos[0], sin[0])
        return head.finish(hidden, self._rows.attend(0, batch, query, key, value))

    def rank_level(
        self, output: Float[Tensor, "B W H"], noise_rows: SamplingBatch, width: int
    ) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The `width` most promising tokens after each output: log chance of being chosen, token id."""
        logits = self.fast_head.compute_logits(output)
        return rank_candidates(logits, self.head.draft_vocab, noise_rows, width, with_noise=self.ranks_with_noise)

    def measure_level(self, num_tokens: int) -> Callable[[], object]:
        """One draft level over `num_tokens` nodes, for the profiler to time; leaves no row behind."""
        device, rows = self.target.device, min(num_tokens, 64)
        width = num_tokens // rows
        sequences = [
            Sequence(request_id=i, prompt_ids=[0], params=SamplingParams(), max_tokens=1, stream_key=i)
            for i in range(rows)
        ]
        noise_rows = SamplingBatch.build(sequences, device)
        hidden = torch.zeros(num_tokens, self.target.hidden_size, dtype=self.target.dtype, device=device)
        self._rows.reserve(rows, width)
        batch = ForwardBatch.build(
            token_ids=torch.ones(rows, width, dtype=torch.int64, device=device),
            num_nodes=torch.full((rows,), width, device=device),
            visible=torch.eye(width, dtype=torch.bool, device=device).expand(rows, -1, -1),
            rows=slice(0, rows),
            row_numbers=torch.arange(rows, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            store=self._rows.keys,
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
        )
        return lambda: self.rank_level(self.forward(batch, hidden).view(rows, width, -1), noise_rows, 4)

    def save(self, folder: Path) -> None:
        """Write the trained head as an EAGLE-3 checkpoint, what its chances are worth beside it."""
        save_head(self.head, folder, self.target)
        self.calibration.save(folder)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote into this head."""
        head = load_head(folder, self.target)
        self.head.resize_vocabulary(head.draft_vocab_size)
        self.head.lm_head.to(head.lm_head.weight.dtype)
        self.head.load_state_dict(head.state_dict())
        self.calibration.restore(folder)
        self.refresh()

    @classmethod
    def load(cls, folder: Path, target: TargetModel) -> EagleDrafter:
        """Read a folder that `save` wrote.

        Raises:
            ValueError: damaged files, or a head of another target; names what differs.
        """
        head = load_head(folder, target)
        return cls(target, head=head)


class _EagleLevels:
    """Nodes of a draft run through the head, on its own outputs."""

    def __init__(self, drafter: EagleDrafter, context: DraftContext, output: Float[Tensor, "B H"]) -> None:
        self.drafter = drafter
        self.rows = torch.arange(len(output), device=output.device)
        self.lengths = torch.tensor(context.cache.lengths, device=output.device)
        self.hidden = output[:, None]  # outputs of the nodes expanded last

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        return self.drafter.rank_level(self.hidden, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        drafter = self.drafter
        batch = ForwardBatch.build(
            token_ids=token_ids,
            num_nodes=torch.full_like(self.rows, token_ids.shape[1]),
            visible=visible,
            rows=slice(0, len(self.rows)),
            row_numbers=self.rows,
            lengths=self.lengths,
            store=drafter._rows.keys,
            dtype=drafter.target.dtype,
            num_repeats=drafter.target.num_repeats,
        )
        hidden = self.hidden.gather(1, above[..., None].expand(-1, -1, self.hidden.shape[2]))
        self.hidden = drafter.forward(batch, hidden.flatten(0, 1)).view(hidden.shape)
