"""A rollout without a model: recorded facts in the place of drafts and verdicts, a table in the place of a clock."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgrpo.lengths import LengthPredictor
from fastgrpo.planner import PlanInputs, Planner
from fastgrpo.scheduler import Scheduler
from fastgrpo.simulation.costs import Costs, StepWork
from fastgrpo.simulation.facts import Facts
from fastgrpo.simulation.trees import PlanTrees, TreeTables
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan, StepRecord

Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One completion to replay.

    Args:
        prompt_len: tokens of its prompt, at least 1.
        group: requests of one number are of one prompt, computed once.
        positions: [tokens] of the facts, whose draft stands for the one at each of its own positions.
        num_skipped: first tokens of its prompt that the drafter never reads.
    """

    prompt_len: int
    group: int
    positions: NDArray[np.int64]
    num_skipped: int = 0

    def __post_init__(self) -> None:
        if self.prompt_len < 1 or len(self.positions) < 1:
            raise ValueError(
                f"a request needs a prompt and a completion of at least one token each, got {self.prompt_len} and "
                f"{len(self.positions)}"
            )

    @property
    def prompt_ids(self) -> list[int]:
        """A prompt of its length that no other group has."""
        return [self.group] * self.prompt_len


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of a simulated rollout.

    Args:
        exact_share: of the drafts, in [0, 1], whose tree is known to be the one the plan would have made.
    """

    records: list[StepRecord]
    exact_share: float

    @property
    def total_s(self) -> float:
        return sum(record.step_s for record in self.records)

    @property
    def num_emitted(self) -> int:
        return sum(record.num_emitted for record in self.records)


def build_requests(facts: Facts) -> list[Request]:
    """The recorded rollout itself."""
    return [
        Request(
            prompt_len=int(prompt_len),
            group=int(group),
            positions=start + np.arange(length),
            num_skipped=facts.count_skipped(int(prompt_len)),
        )
        for prompt_len, group, start, length in zip(
            facts.prompt_lens, facts.groups, facts.starts, facts.lengths, strict=True
        )
    ]


def replay(
    tables: TreeTables,
    requests: ListOf[Request],
    planner: Planner,
    costs: Costs,
    *,
    max_num_seqs: int,
    lengths: LengthPredictor | None = None,
) -> Replay:
    """Simulate one rollout of all requests, step by step as `Engine.step` would take them.

    Args:
        tables: recorded facts; plans wider or deeper than their trees get what was recorded of theirs.
        max_num_seqs: sequences decoded together; others wait, in the scheduler's own order.
        lengths: what the scheduler knows of earlier completions; it learns of these.

    Raises:
        ValueError: there is no request, or no slot.
    """
    if not requests:
        raise ValueError("nothing to replay: give at least one request")
    run = Run(tables, requests, Scheduler(max_num_seqs, lengths))
    planner.begin()
    costs.begin()
    records = []
    while run.scheduler.has_work:
        record = run.step(planner, costs)
        planner.observe(record)
        records.append(record)
    return Replay(records=records, exact_share=run.num_exact / max(run.num_drafts, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Drafted:
    """What the drafts of one step came to; arrays have one entry for each live sequence."""

    num_verified: NDArray[np.int64]
    num_accepted: NDArray[np.int64]
    num_promised: float = 0.0
    offered: Counts = ()  # by depth and sibling rank, as `StepRecord` has them
    hits: Counts = ()


class Run:
    """A rollout under way; arrays are by request, `live` lists the requests in slot order."""

    def __init__(self, tables: TreeTables, requests: ListOf[Request], scheduler: Scheduler) -> None:
        self.tables, self.scheduler = tables, scheduler
        self.prompt_lens = np.array([request.prompt_len for request in requests])
        self.lengths = np.array([len(request.positions) for request in requests])
        self.positions = np.concatenate([request.positions for request in requests])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.num_emitted = np.zeros(len(requests), dtype=np.int64)
        self.num_drafter_read = np.array([request.num_skipped for request in requests])
        self.groups = [request.group for request in requests]
        self.known_prompts: set[int] = set()
        self.live = np.array([], dtype=np.int64)
        self.num_drafts = self.num_exact = 0
        for index, request in enumerate(requests):
            scheduler.add(_build_sequence(index, request))

    def step(self, planner: Planner, costs: Costs) -> StepRecord:
        num_prefilled = self.admit()
        inputs = self.build_inputs()
        plan = planner.plan(inputs)
        return self.take(plan, self._draft(plan, inputs, planner), inputs, num_prefilled, costs)

    def build_inputs(self) -> PlanInputs:
        cached = self._count_cached()
        return PlanInputs(
            num_seqs=len(self.live),
            num_waiting=len(self.scheduler.waiting),
            num_read=int(cached.sum()),
            num_unread=int((cached - self.num_drafter_read[self.live]).sum()),
        )

    def take(
        self, plan: SpeculationPlan, drafted: Drafted, inputs: PlanInputs, num_prefilled: int, costs: Costs
    ) -> StepRecord:
        """Emit what was accepted of a draft, and price the step."""
        live = self.live
        num_tokens = len(live) + int(drafted.num_verified.sum())
        emitted = np.minimum(drafted.num_accepted + 1, self.lengths[live] - self.num_emitted[live])
        self.num_emitted[live] += emitted
        num_emitted = int(emitted.sum())
        self._retire()
        seconds = costs.price(
            StepWork(
                plan=plan,
                num_seqs=len(live),
                num_tokens=num_tokens,
                num_read=inputs.num_read,
                num_unread=inputs.num_unread,
                num_emitted=num_emitted,
                num_prefilled=num_prefilled,
            )
        )
        return StepRecord(
            num_seqs=len(live),
            num_waiting=inputs.num_waiting,
            plan=plan,
            num_tokens=num_tokens,
            num_emitted=num_emitted,
            num_read=inputs.num_read,
            num_prefilled=num_prefilled,
            offered=drafted.offered,
            hits=drafted.hits,
            prefill_s=seconds.prefill_s,
            draft_s=seconds.draft_s,
            target_s=seconds.target_s,
            verify_s=seconds.verify_s,
            step_s=seconds.step_s,
            num_unread=inputs.num_unread,
            num_promised=drafted.num_promised,
        )

    @property
    def rows(self) -> NDArray[np.int64]:
        """[B] of the facts, the position that each live sequence drafts from."""
        return self.positions[self.starts[self.live] + self.num_emitted[self.live]]

    def _draft(self, plan: SpeculationPlan, inputs: PlanInputs, planner: Planner) -> Drafted:
        """Draft and verify for every live sequence, from the recorded facts of its next position."""
        live = self.live
        if plan.is_plain:
            return Drafted(num_verified=np.zeros_like(live), num_accepted=np.zeros_like(live))
        trees = self.tables.find(plan)
        rows = self.rows
        verified = choose_nodes(trees, rows, plan, inputs, planner)
        num_accepted = (trees.places[rows] <= verified[:, None]).sum(1)
        offered, hits = count_hits(trees, rows, num_accepted, plan.width)
        self.num_drafter_read[live] = self._count_cached()
        self.num_drafts += len(live)
        self.num_exact += int(trees.is_exact[rows].sum())
        return Drafted(
            num_verified=verified,
            num_accepted=num_accepted,
            num_promised=_sum_chances(trees, rows, verified),
            offered=offered,
            hits=hits,
        )

    def _count_cached(self) -> NDArray[np.int64]:
        """[B] cached tokens of each live sequence: all but the pending one."""
        return self.prompt_lens[self.live] + self.num_emitted[self.live] - 1

    def admit(self) -> int:
        """Let waiting requests in; returns the prompt tokens computed, each prompt's once, its last token left out."""
        admitted = self.scheduler.admit()
        num_prefilled = 0
        for sequence in admitted:
            group = self.groups[sequence.request_id]
            if group not in self.known_prompts:
                self.known_prompts.add(group)
                num_prefilled += len(sequence.prompt_ids) - 1
        if admitted:
            self._list_live()
        return num_prefilled

    def _retire(self) -> None:
        """Close the slots of finished sequences in the engine's order."""
        finished = np.flatnonzero(self.num_emitted[self.live] == self.lengths[self.live])
        for slot in finished[::-1].tolist():
            sequence = self.scheduler.running[slot]
            sequence.token_ids = [0] * int(self.lengths[sequence.request_id])
            self.scheduler.remove(slot)
        if len(finished):
            self._list_live()

    def _list_live(self) -> None:
        self.live = np.array([sequence.request_id for sequence in self.scheduler.running], dtype=np.int64)


def _build_sequence(index: int, request: Request) -> Sequence:
    """What the scheduler knows of a request."""
    return Sequence(
        request_id=index,
        prompt_ids=request.prompt_ids,
        params=SamplingParams(max_tokens=len(request.positions)),
        max_tokens=2**31,  # the scheduler must not learn how long it will be
        stream_key=0,
    )


def choose_nodes(
    trees: PlanTrees, rows: NDArray[np.int64], plan: SpeculationPlan, inputs: PlanInputs, planner: Planner
) -> NDArray[np.int64]:
    """[B] draft nodes that are verified of each live sequence's tree: all, or the likeliest over all sequences."""
    if plan.most_draft_tokens is None:
        return trees.num_nodes[rows]
    chances = trees.chances[rows]
    ranked = np.argsort(-chances, axis=None, kind="stable")
    drafted = chances.ravel()[ranked[: np.count_nonzero(chances)]].tolist()
    budget = planner.choose_budget(plan, inputs, drafted)
    return np.bincount(ranked[:budget] // chances.shape[1], minlength=len(rows))


def _sum_chances(trees: PlanTrees, rows: NDArray[np.int64], verified: NDArray[np.int64]) -> float:
    chances = trees.chances[rows]
    return float(chances[np.arange(chances.shape[1]) < verified[:, None]].sum())


def count_hits(
    trees: PlanTrees, rows: NDArray[np.int64], num_accepted: NDArray[np.int64], width: int
) -> tuple[Counts, Counts]:
    """(offered, hits) by depth and sibling rank, as `verify.count_hits` has them.

    Args:
        num_accepted: [B], so that nodes of depth 0 to this many were walked.
    """
    depths, ranks = np.arange(trees.places.shape[1]), np.arange(width)
    is_walked = depths <= num_accepted[:, None]
    children = np.where(is_walked, trees.num_children[rows], 0)
    chosen = np.where(is_walked, trees.ranks[rows], -1)
    offered = (children[..., None] > ranks).sum(0)
    hits = (chosen[..., None] == ranks).sum(0)
    widths = children.max(0).tolist()
    counted = [depth for depth, most in enumerate(widths) if most]
    return (
        tuple(tuple(offered[depth, : widths[depth]].tolist()) for depth in counted),
        tuple(tuple(hits[depth, : widths[depth]].tolist()) for depth in counted),
    )
