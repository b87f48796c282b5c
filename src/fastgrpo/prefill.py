"""Prompts: each computed once for all its siblings, in forwards of bounded size."""

from __future__ import annotations

import torch

from fastgrpo.attention import ForwardBatch
from fastgrpo.cache import RowPrefix, SlotCache
from fastgrpo.model import TargetModel
from fastgrpo.scheduler import Scheduler
from fastgrpo.types import Sequence

_PREFILL_TOKENS = 4096  # prompt tokens in one forward, padding included
_PREFILL_CHUNK = 512  # prompt tokens of one row in one forward


class Prefiller:
    """Fills the rows of new sequences; keeps prompts of groups of which some still wait."""

    def __init__(self, target: TargetModel, cache: SlotCache, scheduler: Scheduler) -> None:
        self.target, self.cache, self.scheduler = target, cache, scheduler
        self._prefixes: dict[tuple[int, ...], RowPrefix] = {}

    def clear(self) -> None:
        self._prefixes.clear()

    def prefill(self, admitted: list[Sequence]) -> int:
        """Compute the prompts of new sequences, each once for all its siblings; returns tokens computed.

        All but a prompt's last token is cached; the last is pending and becomes the first root.
        """
        if not admitted:
            return 0
        running = self.scheduler.running
        first = len(running) - len(admitted)
        self.cache.reserve(len(running), max(len(s.prompt_ids) for s in admitted) + 1)
        self.cache.add_rows(len(admitted))
        siblings: dict[tuple[int, ...], list[int]] = {}
        for slot in range(first, len(running)):
            siblings.setdefault(running[slot].group_key, []).append(slot)
        leaders = [slots[0] for key, slots in siblings.items() if self._find_prefix(key, first) is None]
        num_tokens = self._prefill_rows(leaders)
        for key, slots in siblings.items():
            prefix = self._find_prefix(key, first) or self.cache.snapshot(slots[0], len(key) - 1)
            rest = [slot for slot in slots if self.cache.lengths[slot] < len(key) - 1]
            self.cache.restore(rest, prefix)
            if not self.scheduler.has_waiting_sibling(running[slots[0]]):
                self._prefixes.pop(key, None)
        return num_tokens

    def _find_prefix(self, key: tuple[int, ...], num_old: int) -> RowPrefix | None:
        """The cached prompt of a group: from a sibling that runs already, or kept aside."""
        for slot, sequence in enumerate(self.scheduler.running[:num_old]):
            if sequence.group_key == key:
                return self.cache.snapshot(slot, len(key) - 1)
        return self._prefixes.get(key)

    def keep(self, slot: int, sequence: Sequence) -> None:
        """Before the last running sibling goes, keep the prompt for those that wait."""
        key = sequence.group_key
        if not self.scheduler.has_waiting_sibling(sequence):
            return
        if not any(other is not sequence and other.group_key == key for other in self.scheduler.running):
            self._prefixes[key] = self.cache.snapshot(slot, len(key) - 1)

    def _prefill_rows(self, slots: list[int]) -> int:
        """Prompts of some rows, in forwards of bounded size; longest rows together."""
        running, total = self.scheduler.running, 0
        left = {slot: running[slot].prompt_ids[:-1] for slot in slots}
        while left := {slot: ids for slot, ids in left.items() if ids}:
            chosen: list[int] = []
            width = 0
            for slot in sorted(left, key=lambda s: -len(left[s])):
                width = width or min(len(left[slot]), _PREFILL_CHUNK)
                if chosen and (len(chosen) + 1) * width > _PREFILL_TOKENS:
                    break
                chosen.append(slot)
            chunks = [left[slot][:_PREFILL_CHUNK] for slot in chosen]
            self._prefill_chunks(chosen, chunks)
            for slot, chunk in zip(chosen, chunks, strict=True):
                left[slot] = left[slot][len(chunk) :]
                total += len(chunk)
        return total

    def _prefill_chunks(self, slots: list[int], chunks: list[list[int]]) -> None:
        device = self.target.device
        width = max(len(chunk) for chunk in chunks)
        self.cache.reserve(len(self.cache.lengths), max(self.cache.lengths[slot] for slot in slots) + width)
        rows = torch.tensor(slots, device=device)
        batch = ForwardBatch.build(
            token_ids=torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=device),
            num_nodes=torch.tensor([len(chunk) for chunk in chunks], device=device),
            visible=torch.ones(len(slots), width, width, dtype=torch.bool, device=device).tril(),
            rows=rows,
            row_numbers=rows,
            lengths=torch.tensor([self.cache.lengths[slot] for slot in slots], device=device),
            store=self.cache.keys,
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
            counts=[len(chunk) for chunk in chunks],
        )
        output = self.target.forward(batch, self.cache)
        if self.cache.features is not None and output.features is not None:
            self.cache.features.write(0, batch.write_index, output.features)
        for slot, chunk in zip(slots, chunks, strict=True):
            self.cache.lengths[slot] += len(chunk)
