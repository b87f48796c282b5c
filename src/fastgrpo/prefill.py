"""Prefill: each prompt is computed once for all its siblings, in forwards of bounded size."""

from __future__ import annotations

import torch

from fastgrpo.attention import ForwardBatch
from fastgrpo.blocks import count_blocks
from fastgrpo.cache import RowPrefix, SlotCache
from fastgrpo.chunks import cut_into_forwards
from fastgrpo.model import TargetModel
from fastgrpo.scheduler import Scheduler
from fastgrpo.transfer import upload
from fastgrpo.types import Sequence

_PREFILL_TOKENS = 4096  # prompt tokens in one forward, padding included
_PREFILL_CHUNK = 512  # prompt tokens of one row in one forward


class Prefiller:
    """Fills the cache rows of new sequences, and keeps the prompts of groups of which some sequences still wait."""

    def __init__(self, target: TargetModel, cache: SlotCache, scheduler: Scheduler) -> None:
        self.target, self.cache, self.scheduler = target, cache, scheduler
        self._kept: dict[tuple[int, ...], RowPrefix] = {}
        self._num_filled = 0  # tokens, since `take_num_filled`

    def clear(self) -> None:
        """Forget all kept prompts; call after the cache was cleared."""
        self._kept.clear()
        self._num_filled = 0

    def take_num_filled(self) -> int:
        """Tokens computed since the last call, those of attempts that ran out of memory included."""
        num_filled, self._num_filled = self._num_filled, 0
        return num_filled

    def prefill(self) -> None:
        """Compute what the rows of running sequences lack.

        All but each sequence's last token is cached; the last is pending, and becomes the root of its tree. A prompt is
        computed once for all siblings, the tokens that a preempted sequence had emitted for it alone.
        """
        running, lengths = self.scheduler.running, self.cache.lengths
        lacking = [slot for slot, sequence in enumerate(running) if lengths[slot] < sequence.num_cached]
        if lacking:
            self._fill_prompts(lacking)
            self._fill({slot: running[slot].all_token_ids[lengths[slot] : -1] for slot in lacking})

    def has_prompt(self, sequence: Sequence) -> bool:
        """Whether the sequence would share its prompt, with a running sibling or a kept prefix."""
        key = sequence.group_key
        return key in self._kept or any(other.group_key == key for other in self.scheduler.running)

    def keep(self, slot: int, sequence: Sequence) -> None:
        """Keep the prompt for siblings that wait, if this sequence, about to leave, is the last one that runs."""
        key = sequence.group_key
        if key in self._kept or not self.scheduler.has_waiting_sibling(sequence):
            return
        if not any(other is not sequence and other.group_key == key for other in self.scheduler.running):
            self._kept[key] = self.cache.hold(slot, len(key) - 1)

    def drop_kept(self) -> bool:
        """Give up all kept prompts; returns whether there was one."""
        had_any = bool(self._kept)
        for key in list(self._kept):
            self._drop(key)
        return had_any

    def _drop(self, key: tuple[int, ...]) -> None:
        prefix = self._kept.pop(key, None)
        if prefix is not None:
            self.cache.drop(prefix)

    def _fill_prompts(self, lacking: list[int]) -> None:
        """Compute each group's prompt in the row of its first sequence, unless some row has it; the others share it."""
        running, lengths = self.scheduler.running, self.cache.lengths
        groups: dict[tuple[int, ...], list[int]] = {}
        for slot in lacking:
            if lengths[slot] < len(running[slot].prompt_ids) - 1:
                groups.setdefault(running[slot].group_key, []).append(slot)
        sources = {key: self._find_source(key) for key in groups}
        leaders = [slots[0] for key, slots in groups.items() if sources[key] is None and key not in self._kept]
        self._fill({slot: running[slot].prompt_ids[lengths[slot] : -1] for slot in leaders})
        for key, slots in groups.items():
            rest = [slot for slot in slots if lengths[slot] < len(key) - 1]
            source = sources[key]
            if source is None and key in self._kept:
                self.cache.restore(rest, self._kept[key])
            else:
                self.cache.share(slots[0] if source is None else source, rest, len(key) - 1)
            if not self.scheduler.has_waiting_sibling(running[slots[0]]):
                self._drop(key)

    def _find_source(self, key: tuple[int, ...]) -> int | None:
        """The slot of a running sibling whose row holds the prompt."""
        for slot, sequence in enumerate(self.scheduler.running):
            if self.cache.lengths[slot] >= len(key) - 1 and sequence.group_key == key:
                return slot
        return None

    def _fill(self, left: dict[int, list[int]]) -> None:
        """Compute tokens behind rows, in forwards of bounded size.

        Args:
            left: the tokens to compute, by slot.
        """
        for chunks in cut_into_forwards(left, most_tokens=_PREFILL_TOKENS, most_of_a_row=_PREFILL_CHUNK):
            self._fill_chunks(list(chunks), list(chunks.values()))
            self._num_filled += sum(map(len, chunks.values()))

    def _fill_chunks(self, slots: list[int], chunks: list[list[int]]) -> None:
        device, lengths = self.target.device, self.cache.lengths
        width = max(len(chunk) for chunk in chunks)
        for slot, chunk in zip(slots, chunks, strict=True):
            self.cache.reserve(slot, lengths[slot] + len(chunk))
        longest = max(lengths[slot] + len(chunk) for slot, chunk in zip(slots, chunks, strict=True))
        own_blocks = self.cache.blocks[:, : count_blocks(longest)]  # kernels make room for all that a table could hold
        batch = ForwardBatch.build(
            token_ids=upload([chunk + [0] * (width - len(chunk)) for chunk in chunks], device),
            num_nodes=upload([len(chunk) for chunk in chunks], device),
            visible=torch.ones(len(slots), width, width, dtype=torch.bool, device=device).tril(),
            blocks=own_blocks[upload(slots, device)],
            lengths=upload([lengths[slot] for slot in slots], device),
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
            counts=[len(chunk) for chunk in chunks],
        )
        output = self.target.forward(batch, self.cache)
        if self.cache.features is not None and output.features is not None:
            self.cache.features.write(0, batch.write_index, output.features)
        for slot, chunk in zip(slots, chunks, strict=True):
            lengths[slot] += len(chunk)
