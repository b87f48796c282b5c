"""A small causal LM of the target's tokenizer that drafts trees ranked with the target's own noise.

It reads a sequence's tokens when a draft is asked for, and keeps its own rows of keys and values. Nodes of
a tree stand behind what a row has read and are dropped afterwards: accepted ones are read again, as tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastgrpo.attention import ForwardBatch
from fastgrpo.blocks import count_blocks
from fastgrpo.chunks import cut_into_forwards
from fastgrpo.drafters.beams import grow_trees, rank_candidates
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.lm_files import check_tokenizer, load_lm
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.transfer import upload
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan
from fastgrpo.verify import Verdict

_READ_TOKENS = 4096  # read in one forward, padding included
_READ_CHUNK = 512  # of one row in one forward


class LmDrafter:
    """Drafts with a causal LM; keeps one row of keys and values for each running sequence.

    Args:
        target: the model to draft for.
        model: of a family that `TargetModel` runs, on the target's device; stays its owner's, and is
            not trained.
        tokenizer: the LM's; None looks in the folder it came from.

    Attributes:
        calibration: what its chances have been worth so far.

    Raises:
        ValueError: the LM is of another tokenizer, or of a kind that is not supported.
    """

    name = "lm"
    wants_features = False
    can_be_timed = True

    def __init__(self, target: TargetModel, model: nn.Module, *, tokenizer: Any = None) -> None:
        self.lm = TargetModel(model, tokenizer=tokenizer)
        check_tokenizer(self.lm, target)
        self.calibration = Calibration()
        self.cache = self.lm.build_cache(with_features=False)  # its lengths: tokens read, by slot
        num_common = min(self.lm.vocab_size, target.vocab_size)  # beyond, there is padding at most
        self._vocabulary = torch.arange(num_common, dtype=torch.int32, device=self.lm.device)
        self._prepared = contextlib.ExitStack()  # the LM, while a rollout lasts: its weights are laid out once
        self._is_prepared = False

    @classmethod
    def load(cls, folder: Path, target: TargetModel) -> LmDrafter:
        """Read a model folder (safetensors only) in the target's type.

        Raises:
            ValueError: damaged files, another family or another tokenizer; names what differs.
        """
        return cls(target, load_lm(folder, target))

    @property
    def position_bytes(self) -> int:
        return self.cache.position_bytes

    def begin(self) -> None:
        self.end()
        self.calibration.fit()
        self._prepared.enter_context(self.lm.prepared())
        self._is_prepared = True

    def end(self) -> None:
        self.cache.clear()
        self._is_prepared = False
        self._prepared.close()

    def count_unread(self, sequences: list[Sequence]) -> int:
        """Tokens to read, the pending ones included; rows that are too long for the LM are not read any more."""
        lengths = [sequence.num_cached for sequence in sequences]
        read = self.cache.lengths + [0] * (len(lengths) - len(self.cache.lengths))
        return sum(
            length + 1 - done for length, done in zip(lengths, read, strict=True) if length < self.lm.max_position
        )

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        pass  # tokens are read when they are needed

    def judge(self, draft: Draft, verdict: Verdict) -> None:
        self.calibration.observe(draft, verdict)

    def release(self, slot: int, last_slot: int) -> None:
        self.cache.release(slot, last_slot)

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        """Trees for the rows whose draft fits into the LM's context; the others get none."""
        last_positions = [len(s.prompt_ids) + len(s.token_ids) + plan.depth - 2 for s in context.sequences]
        fits = [last < self.lm.max_position for last in last_positions]
        if not any(fits):
            return Draft.roots(context.pending_token_ids)
        try:
            with self._drafting():
                last_hidden = self._read(context.sequences, fits, room=plan.width * plan.depth)
                draft = grow_trees(context, plan, _LmLevels(self, last_hidden), self.calibration)
        finally:
            self.cache.trim()  # where memory ran out, too
        return draft if all(fits) else _keep_rows(draft, fits)

    @contextlib.contextmanager
    def _drafting(self) -> Iterator[None]:
        """The LM in its own type, whatever the rollout around it computes in."""
        mode = contextlib.nullcontext() if self._is_prepared else self.lm.prepared()  # a draft outside of rollouts
        with mode, self.lm.computing():
            yield

    # -- reading -------------------------------------------------------------------------------------

    def _read(self, sequences: list[Sequence], fits: list[bool], room: int) -> Float[Tensor, "B H"]:
        """Read what is new in the rows that fit; returns the hidden states at the pending tokens, zeros elsewhere.

        Where a step is made again, the pending tokens have been read before; they are read once more.
        """
        cache = self.cache
        slots = [slot for slot, is_fit in enumerate(fits) if is_fit]
        cache.add_rows(len(sequences) - len(cache.lengths))
        self._share_prompts(sequences, slots)
        for slot in slots:
            cache.lengths[slot] = min(cache.lengths[slot], sequences[slot].num_cached)
        last_hidden = self._read_tokens({slot: sequences[slot].all_token_ids[cache.lengths[slot] :] for slot in slots})
        for slot in range(len(sequences)):  # rows that do not fit, too: their nodes are computed beside the others
            cache.reserve(slot, cache.lengths[slot] + room)
        return last_hidden

    def _share_prompts(self, sequences: list[Sequence], slots: list[int]) -> None:
        """Siblings that have read nothing get the prompt, but for its last token, from one that reads it."""
        lengths = self.cache.lengths
        if all(lengths[slot] for slot in slots):
            return
        siblings: dict[tuple[int, ...], list[int]] = {}
        for slot in sorted(slots, key=lambda slot: -lengths[slot]):  # one that has read the prompt leads
            siblings.setdefault(sequences[slot].group_key, []).append(slot)
        fresh = {key: [slot for slot in group[1:] if not lengths[slot]] for key, group in siblings.items()}
        leaders = {key: siblings[key][0] for key, rest in fresh.items() if rest}
        self._read_tokens({slot: list(key[lengths[slot] : -1]) for key, slot in leaders.items()})
        for key, leader in leaders.items():
            self.cache.share(leader, fresh[key], len(key) - 1)

    def _read_tokens(self, left: dict[int, list[int]]) -> Float[Tensor, "B H"]:
        """Run tokens of some slots, in forwards of bounded size; returns the last hidden state of every slot."""
        lm = self.lm
        last_hidden = torch.zeros(len(self.cache.lengths), lm.hidden_size, dtype=lm.dtype, device=lm.device)
        for chunks in cut_into_forwards(left, most_tokens=_READ_TOKENS, most_of_a_row=_READ_CHUNK):
            slots = sorted(chunks)
            hidden = self._read_chunks(slots, [chunks[slot] for slot in slots])
            last_hidden[upload(slots, lm.device)] = hidden
        return last_hidden

    def _read_chunks(self, slots: list[int], chunks: list[list[int]]) -> Float[Tensor, "B H"]:
        device, width = self.lm.device, max(len(chunk) for chunk in chunks)
        for slot, chunk in zip(slots, chunks, strict=True):
            self.cache.reserve(slot, self.cache.lengths[slot] + len(chunk))
        num_nodes = upload([len(chunk) for chunk in chunks], device)
        visible = torch.ones(len(slots), width, width, dtype=torch.bool, device=device).tril()
        longest = max(self.cache.lengths[slot] + len(chunk) for slot, chunk in zip(slots, chunks, strict=True))
        batch = self.lay_out(
            token_ids=upload([chunk + [0] * (width - len(chunk)) for chunk in chunks], device),
            num_nodes=num_nodes,
            visible=visible,
            slots=upload(slots, device),
            most_blocks=count_blocks(longest),
            counts=[len(chunk) for chunk in chunks],
        )
        hidden = self.lm.forward(batch, self.cache).last_hidden
        for slot, chunk in zip(slots, chunks, strict=True):
            self.cache.lengths[slot] += len(chunk)
        return hidden[batch.row_starts + num_nodes - 1]

    # -- forwards ------------------------------------------------------------------------------------

    def lay_out(
        self,
        *,
        token_ids: Int[Tensor, "B N"],
        num_nodes: Int[Tensor, " B"],
        visible: Bool[Tensor, "B N E"],
        slots: slice | Int[Tensor, " B"],
        most_blocks: int | None = None,
        counts: list[int] | None = None,
    ) -> ForwardBatch:
        """Nodes behind what the rows at `slots` have read; ids that the LM lacks stand as its last one.

        Args:
            most_blocks: of these rows with their nodes; None: as many as any row has. Kernels make room for all of a
                table.
            counts: as for `ForwardBatch.build`.
        """
        return ForwardBatch.build(
            token_ids=token_ids.clamp(max=self.lm.vocab_size - 1),
            num_nodes=num_nodes,
            visible=visible,
            blocks=self.cache.blocks[:, :most_blocks][slots],
            lengths=upload(self.cache.lengths, self.lm.device)[slots],
            dtype=self.lm.dtype,
            num_repeats=self.lm.num_repeats,
            counts=counts,
        )

    def rank_level(
        self, hidden: Float[Tensor, "B W H"], noise_rows: SamplingBatch, width: int
    ) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The `width` most promising tokens after each node: log chance of being chosen, token id."""
        logits = self.lm.compute_logits(hidden.flatten(0, 1))[:, : len(self._vocabulary)]
        return rank_candidates(logits.unflatten(0, hidden.shape[:2]), self._vocabulary, noise_rows, width)


class _LmLevels:
    """Nodes of a draft run through the LM, behind what each row has read."""

    def __init__(self, drafter: LmDrafter, last_hidden: Float[Tensor, "B H"]) -> None:
        self.drafter = drafter
        self.hidden = last_hidden[:, None]  # of the nodes expanded last

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        return self.drafter.rank_level(self.hidden, noise_rows, width)

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        drafter = self.drafter
        batch = drafter.lay_out(
            token_ids=token_ids,
            num_nodes=torch.full_like(token_ids[:, 0], token_ids.shape[1]),
            visible=visible,
            slots=slice(0, len(token_ids)),
        )
        self.hidden = drafter.lm.forward(batch, drafter.cache).last_hidden.view(*token_ids.shape, -1)


def _keep_rows(draft: Draft, is_kept: list[bool]) -> Draft:
    """The draft with only the root left in the other rows."""
    kept = upload(is_kept, draft.token_ids.device, torch.bool)
    return Draft(
        token_ids=draft.token_ids,
        parents=draft.parents.masked_fill(~kept[:, None], -1),
        num_nodes=torch.where(kept, draft.num_nodes, 1),
        log_chances=draft.log_chances,
        scores=None if draft.scores is None else draft.scores.masked_fill(~kept[:, None], -torch.inf),
    )
