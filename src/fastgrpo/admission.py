"""Which sequences run within the bound on cache memory: admits those that fit, and preempts the youngest."""

from __future__ import annotations

import bisect
import heapq
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastgrpo.blocks import BLOCK_SIZE, count_blocks
from fastgrpo.cache import SlotCache
from fastgrpo.drafters import Drafter
from fastgrpo.memory import describe_bytes, describe_error, find_available_bytes, is_out_of_memory
from fastgrpo.model import TargetModel
from fastgrpo.prefill import Prefiller
from fastgrpo.scheduler import Scheduler
from fastgrpo.types import PLAIN, Sequence, SpeculationPlan

_SHARE = 0.8  # share of the memory free at the start that the cache may take; the rest is for forwards
_MOST_NODES = 64  # nodes of a draft behind a full row, for which there is room from the first
_LARGEST = SpeculationPlan(depth=8, width=8, num_draft_tokens=_MOST_NODES - 1)  # larger plans fit whole or not at all

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What admission did before a step, in failed attempts too."""

    num_prefilled: int  # tokens computed for admitted sequences
    num_preempted: int  # sequences


def _take_bytes(max_bytes: float | None) -> int | None:
    """The bound as an int, where it is one or a whole float, such as 8e9."""
    if max_bytes is None:
        return None
    is_whole = max_bytes.is_integer() if isinstance(max_bytes, float) else hasattr(max_bytes, "__index__")
    if not is_whole:
        raise ValueError(f"max_cache_bytes must be an integer, got {max_bytes!r}; None takes what is free")
    if max_bytes < 1:
        raise ValueError(f"max_cache_bytes must be positive, got {max_bytes}; None takes what is free")
    return int(max_bytes)


class Admission:
    """Keeps the cache and the drafter's own rows together within one bound, checked in blocks before each step.

    Where the next plain step does not fit, the running sequences with the fewest emitted tokens go back to the queue
    and are computed anew when there is room. A sequence is admitted only if a further block is left for every row, so
    that it is not soon preempted. Tokens do not depend on who waited. The drafter's rows are counted as if it had read
    all of each sequence, since it reads late and may share no prompts.

    Args:
        max_bytes: limit for keys, values, features and the drafter's rows; None takes most of the memory that is free
            when a rollout starts, and sets no bound where the system does not say what is free.
        target: the model that the cache is for; where its forwards are recorded, it needs a scratch block.

    Raises:
        ValueError: `max_bytes` is no integer, or not positive.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: SlotCache,
        prefiller: Prefiller,
        drafter: Drafter,
        *,
        max_bytes: float | None,
        target: TargetModel,
    ) -> None:
        self.scheduler, self.cache, self.prefiller, self.drafter = scheduler, cache, prefiller, drafter
        self.max_bytes, self.target = _take_bytes(max_bytes), target
        self._bound = self.max_bytes  # bytes, in this rollout
        self._most_running = scheduler.max_num_seqs  # fewer once memory ran out
        self._most_positions = 0  # of the longest sequence, if it comes to its limit
        self._num_preempted = 0  # since `take_admitted`
        self._has_warned = False

    def begin(self, sequences: list[Sequence]) -> None:
        """A rollout of these sequences starts.

        Raises:
            ValueError: one of them does not fit the bound even alone; names the longest, and how many tokens would fit.
        """
        self._most_running, self._num_preempted = self.scheduler.max_num_seqs, 0
        self._bound = self.max_bytes
        if self._bound is None and (available := find_available_bytes(self.target.device)) is not None:
            self._bound = int(_SHARE * (available + self.cache.num_bytes))  # kept from the last rollout, for this one
        longest = max(sequences, key=lambda s: len(s.prompt_ids) + s.max_tokens)
        self._most_positions = most = len(longest.prompt_ids) + longest.max_tokens - 1
        if self._bound is not None and self._compute_row_bytes(most) > self._bound - self._scratch_bytes:
            raise ValueError(
                f"request {longest.request_id} may come to {most} tokens (a prompt of {len(longest.prompt_ids)} and "
                f"{longest.max_tokens} more): {self._describe_needs(most)}"
            )
        blocks = (count_blocks(len(s.prompt_ids) + s.max_tokens + _MOST_NODES) for s in sequences)
        expected = sum(heapq.nlargest(self.scheduler.max_num_seqs, blocks))
        limit = None if self._bound is None else self._bound // self.cache.block_bytes
        self.cache.begin(expected_blocks=expected + self.target.records, limit=limit)
        if self.target.records:
            self.cache.take_scratch()

    def admit(self) -> None:
        """Make room for the next plain step; if no sequence had to be preempted for it, admit others and prefill.

        Raises:
            ValueError: a sequence has outgrown the bound; names how many tokens would fit.
        """
        if self._make_room():
            self._let_in()
        self.prefiller.prefill()

    def take_admitted(self) -> Admitted:
        """What was done since the last call."""
        num_preempted, self._num_preempted = self._num_preempted, 0
        return Admitted(num_prefilled=self.prefiller.take_num_filled(), num_preempted=num_preempted)

    def fits(self, plan: SpeculationPlan) -> bool:
        """Whether every running row can take a step of this plan."""
        num_nodes, left = 1 + plan.tree_size, self._compute_left(plan) / self.cache.block_bytes
        most = len(self.scheduler.running) * (2 + count_blocks(num_nodes))  # blocks, however full the rows' last ones
        return most <= left or self._count_missing(num_nodes) <= left

    def count_room(self) -> int | None:
        """Draft tokens for which every running row has room; None where it has for `_LARGEST`, and no limit is set."""
        if self.fits(_LARGEST):
            return None

        def is_too_many(count: int) -> bool:
            return not self.fits(SpeculationPlan(depth=1, width=count, num_draft_tokens=count))

        return bisect.bisect_left(range(1, _MOST_NODES), True, key=is_too_many)

    def retry_until_it_fits(self, attempt: Callable[[bool], Result]) -> Result:
        """Call `attempt` until memory suffices, in case it runs out in spite of the bound: again without prompts kept
        for waiting sequences, then without a draft, then with ever fewer sequences.

        Args:
            attempt: makes a step, given whether it must decode plainly; must commit nothing where it fails.

        Raises:
            MemoryError: not even a single sequence fits; names what to make smaller.
        """
        is_plain = False
        while True:
            try:
                return attempt(is_plain)
            except (MemoryError, OSError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.prefiller.drop_kept():
                    continue
                if len(self.scheduler.running) > 1 or is_plain:
                    self._shrink(error)
                is_plain = True

    # -- memory ran out ------------------------------------------------------------------------------

    def _shrink(self, error: BaseException) -> None:
        """Preempt the younger half, and run no more than the older half in the rest of this rollout."""
        running = self.scheduler.running
        if len(running) < 2:
            num_positions = max((s.num_cached + 1 for s in running), default=0)
            raise MemoryError(
                f"memory ran out with one sequence of {num_positions} tokens running and "
                f"{describe_bytes(self.cache.used_bytes)} of cache in use ({describe_error(error)}): "
                f"{max(self.cache.lengths, default=0)} of them fitted; lower max_tokens, use a smaller model or draft, "
                "or a machine with more memory"
            ) from error
        self._most_running = len(running) // 2
        self._warn(
            f"memory ran out with {len(running)} sequences running ({describe_error(error)}): half of them wait",
            f"{_describe_count(self._most_running)} of {self._most_positions} tokens may fit",
        )
        while len(running) > self._most_running:
            self._preempt_youngest()

    # -- the bound -----------------------------------------------------------------------------------

    def _make_room(self) -> bool:
        """Preempt until a plain step fits; returns whether it fitted without."""
        had_room = True
        while not self.fits(PLAIN):
            if self.prefiller.drop_kept():
                continue
            if len(self.scheduler.running) == 1:
                num_positions = self.scheduler.running[0].num_cached + 1
                raise ValueError(f"a sequence has {num_positions} tokens: {self._describe_needs(num_positions)}")
            self._warn(
                f"the cache is full with {len(self.scheduler.running)} sequences running: the youngest wait",
                f"{_describe_count(self._count_fitting())} of {self._most_positions} tokens would fit",
            )
            self._preempt_youngest()
            had_room = False
        return had_room

    def _compute_left(self, plan: SpeculationPlan) -> float:
        """Bytes that the cache may still take, those set aside that the drafter's rows take in a step of this plan."""
        if self._bound is None:
            return math.inf
        draft_block, num_drafted = self._draft_block_bytes, 1 + plan.width * plan.depth
        blocks = sum(count_blocks(s.num_cached + num_drafted) for s in self.scheduler.running) if draft_block else 0
        return self._bound - self.cache.used_bytes - blocks * draft_block

    def _count_missing(self, num_nodes: int) -> int:
        """Blocks that the cache needs to append `num_nodes` to every running row."""
        running = enumerate(self.scheduler.running)
        return sum(self.cache.count_missing(row, sequence.num_cached + num_nodes) for row, sequence in running)

    def _compute_entering(self, sequence: Sequence) -> int:
        """Bytes that a waiting sequence would take for its next step, and for one more block."""
        num_shared = (len(sequence.prompt_ids) - 1) // BLOCK_SIZE if self.prefiller.has_prompt(sequence) else 0
        return self._compute_row_bytes(sequence.num_cached + 1 + BLOCK_SIZE) - num_shared * self.cache.block_bytes

    def _compute_row_bytes(self, num_positions: int) -> int:
        """Bytes of a row with `num_positions` that shares none, and of the drafter's row beside it."""
        return count_blocks(num_positions) * (self.cache.block_bytes + self._draft_block_bytes)

    def _let_in(self) -> None:
        """Admit while there is room for a step of each, and for a further block of every row."""
        running = self.scheduler.running
        if not self.scheduler.waiting:
            return
        left = self._compute_left(PLAIN) - self._count_missing(1) * self.cache.block_bytes
        left -= len(running) * self._compute_row_bytes(BLOCK_SIZE)

        def may_enter(sequence: Sequence) -> bool:
            nonlocal left
            needed = self._compute_entering(sequence)
            if running and (needed > left or len(running) >= self._most_running):
                return False
            if needed > left:
                self.prefiller.drop_kept()  # alone, it fits beside nothing else
            left -= needed
            return True

        def may_all_enter() -> bool:
            waiting = self.scheduler.waiting
            fits = len(running) + len(waiting) <= self._most_running
            return fits and sum(map(self._compute_entering, waiting)) <= left

        admitted = self.scheduler.admit(may_enter, may_all_enter)
        self.cache.add_rows(len(running) - len(self.cache.lengths))  # before anything that may run out of memory
        for sequence in admitted:
            self.drafter.observe(sequence, 0)

    def _preempt_youngest(self) -> None:
        running = self.scheduler.running
        slot = min(reversed(range(len(running))), key=lambda slot: len(running[slot].token_ids))
        self.drafter.release(slot, len(running) - 1)
        self.cache.remove_row(slot)
        self.scheduler.preempt(slot)
        self._num_preempted += 1

    @property
    def _scratch_bytes(self) -> int:
        """Bytes of the scratch blocks, which are in use and belong to no row."""
        return (self.cache.block_bytes + self._draft_block_bytes) * self.target.records

    @property
    def _draft_block_bytes(self) -> int:
        return BLOCK_SIZE * self.drafter.position_bytes

    # -- words ---------------------------------------------------------------------------------------

    def _describe_needs(self, num_positions: int) -> str:
        """The end of an error message: what `num_positions` take, what would fit, and what to do about it."""
        needed, bound = self._compute_row_bytes(num_positions), self._bound or 0
        position_bytes = self.cache.position_bytes + self.drafter.position_bytes
        num_fitting = (bound - self._scratch_bytes) // (BLOCK_SIZE * position_bytes) * BLOCK_SIZE
        return (
            f"they need {describe_bytes(needed)} of cache ({describe_bytes(position_bytes)} a token), and the limit is "
            f"{describe_bytes(bound)}. {max(num_fitting, 0)} tokens would fit: lower max_tokens, shorten the prompt, "
            f"or raise max_cache_bytes to {needed + self._scratch_bytes}"
        )

    def _count_fitting(self) -> int:
        """How many of the longest sequences of this rollout the bound holds at once, none sharing its prompt."""
        assert self._bound is not None, "without a bound nothing is full"
        return (self._bound - self._scratch_bytes) // self._compute_row_bytes(self._most_positions)

    def _warn(self, what: str, fitting: str) -> None:
        """Warn once for each engine; `fitting` begins with how many sequences would have fitted."""
        if not self._has_warned:
            self._has_warned = True
            limit = "without a limit" if self._bound is None else f"with a limit of {describe_bytes(self._bound)}"
            warnings.warn(
                f"{what}, and go on with the same tokens when there is room ({describe_bytes(self.cache.used_bytes)} "
                f"of cache in use, {limit}). {fitting}: "
                f"max_num_seqs={fitting.split()[0]}, or a larger max_cache_bytes, would save computing them twice",
                stacklevel=2,
            )


def _describe_count(count: int) -> str:
    return f"{count} sequence{'' if count == 1 else 's'}"
