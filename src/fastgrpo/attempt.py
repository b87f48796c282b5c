"""One attempt at a step: its results, how they are committed, and the record made of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import isnan

from fastgrpo.admission import Admitted
from fastgrpo.cache import SlotCache
from fastgrpo.drafters import Drafter
from fastgrpo.planner import PlanInputs
from fastgrpo.timing import Moment, compute_seconds
from fastgrpo.types import Sequence, SpeculationPlan, StepRecord
from fastgrpo.verify import Outcome


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The results of a step before any of them is committed: an attempt that runs out of memory is made again."""

    inputs: PlanInputs
    plan: SpeculationPlan
    num_tokens: int  # in the forward
    outcome: Outcome
    cache_bytes: int  # in use, drafted nodes included
    scheduled: Moment  # end of admission and prefill in the device's work
    drafted: Moment  # end of drafting
    forwarded: Moment  # end of the target forward
    is_steady: bool  # later steps like it take as long: nothing was recorded, nor is anything still to be recorded
    has_recorded: bool

    def commit(self, running: list[Sequence], cache: SlotCache, drafter: Drafter) -> int:
        """Keep the walked paths in the cache and their tokens in the sequences, and tell the drafter.

        Returns:
            The number of tokens emitted.

        Raises:
            FloatingPointError: logits are not finite; names request and position. Nothing has been kept.
        """
        outcome, counts = self.outcome, [count + 1 for count in self.outcome.num_accepted]
        _check_finite(outcome.logprobs, running)
        cache.advance(counts)
        num_emitted = 0
        for slot, (sequence, count) in enumerate(zip(running, counts, strict=True)):
            logprobs, entropies = outcome.logprobs[slot][:count], outcome.entropies[slot][:count]
            kept = sequence.append(outcome.token_ids[slot][:count], logprobs, entropies)
            cache.truncate(slot, sequence.num_cached)
            drafter.observe(sequence, kept)
            num_emitted += kept
        return num_emitted

    def build_record(
        self, admitted: Admitted, *, num_emitted: int, plan_s: float, started: Moment, started_at: float
    ) -> StepRecord:
        """The facts of the step, timed up to this call.

        Args:
            started: moment at which the step began in the device's work.
            started_at: the same by `time.perf_counter`, seconds.
        """
        step_s = time.perf_counter() - started_at
        moments = (started, self.scheduled, self.drafted, self.forwarded)
        prefill_s, draft_s, target_s = map(compute_seconds, moments, moments[1:])
        return StepRecord(
            num_seqs=self.inputs.num_seqs,
            num_waiting=self.inputs.num_waiting,
            plan=self.plan,
            num_tokens=self.num_tokens,
            num_emitted=num_emitted,
            num_read=self.inputs.num_read,
            num_prefilled=admitted.num_prefilled,
            offered=self.outcome.offered,
            hits=self.outcome.hits,
            prefill_s=prefill_s,
            draft_s=draft_s,
            target_s=target_s,
            verify_s=step_s - prefill_s - draft_s - target_s,
            step_s=step_s,
            num_unread=self.inputs.num_unread,
            num_promised=self.outcome.num_promised,
            num_preempted=admitted.num_preempted,
            cache_bytes=self.cache_bytes,
            plan_s=plan_s,
            is_steady=self.is_steady,
            has_recorded=self.has_recorded,
        )


def _check_finite(logprobs: list[list[float]], running: list[Sequence]) -> None:
    bad = ((row, depth) for row, each in enumerate(logprobs) for depth, value in enumerate(each) if isnan(value))
    row, depth = next(bad, (None, 0))
    if row is None:
        return
    sequence = running[row]
    raise FloatingPointError(
        f"the model's logits are not finite at request {sequence.request_id}, completion position "
        f"{len(sequence.token_ids) + depth}; the weights have probably diverged: lower the learning rate and "
        "resume from the last checkpoint"
    )
