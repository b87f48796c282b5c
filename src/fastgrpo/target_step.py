"""The target's part of a step: the forward of the draft, the walk along its choices, and moving their state in place.

Where forwards are recorded (on a GPU) the whole part is one recorded call, fed with one table of numbers and the draft:
for a small batch, launching the kernels one by one would take the host longer than the work takes the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.cache import SlotCache
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.graphs import Replays, list_larger, may_record, round_blocks, round_size
from fastgrpo.kept_recordings import KeptRecordings
from fastgrpo.model import ForwardOutput, TargetModel
from fastgrpo.sampling import NUM_COLUMNS, SamplingBatch, SamplingKind
from fastgrpo.timing import DeviceClock, Moment
from fastgrpo.transfer import copy_to, is_host, pack, upload
from fastgrpo.tree import Draft, compute_ancestors
from fastgrpo.verify import Facts, Outcome, Verdict, find_facts, read_outcome, verify

Decode = Callable[[ForwardBatch, SlotCache], tuple[ForwardOutput, Tensor]]

_COLUMNS = 3 + NUM_COLUMNS  # of the table, before a row's blocks: pending token, length, is a sequence; sampling
_DRAFT = ("token_ids", "parents", "scores")  # the fields of `Draft` that a recorded call is fed with


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the target made of a draft, still on its device: nothing has been read yet."""

    verdict: Verdict
    facts: Facts  # the sequences' rows first, padding behind them
    packed: Int[Tensor, " X"] | None  # the known facts in one tensor, see `transfer.pack`; None where not packed
    num_rows: int  # sequences
    num_tokens: int  # in the forward
    forwarded: Moment  # end of the forward, or of the whole part where that is one recorded call
    was_replayed: bool  # the next one like it will take as long

    def read(self) -> Outcome:
        """Wait for the device and read its results: the only read of a step."""
        return read_outcome(self.facts, self.num_rows, self.packed)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What tells recorded calls apart: their sizes, and all else that decides which kernels they launch."""

    rows: int
    nodes: int
    depth: int
    blocks: int
    kind: SamplingKind
    has_scores: bool

    def build(self, device: torch.device) -> _Inputs:
        """Buffers of these sizes, filled with zeros."""
        table = torch.zeros(self.rows, _COLUMNS + self.blocks, dtype=torch.int64, device=device)
        buffers: dict[str, Tensor] = {}
        if self.nodes > 1:
            shape = (self.rows, self.nodes)
            buffers = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in _DRAFT[:2]}
            if self.has_scores:
                buffers["scores"] = torch.zeros(shape, dtype=torch.float32, device=device)
        return _Inputs(shape=self, table=table, draft=buffers)

    def name_facts(self, known: list[Tensor]) -> Facts:
        """The results of such a call by name; they come in the order of `Facts`, without those it does not find."""
        names = [each.name for each in fields(Facts)]
        absent = {"num_promised": not self.has_scores, "num_children": self.nodes == 1, "ranks": self.nodes == 1}
        told = [name for name in names if not absent.get(name)]
        return Facts(**(dict.fromkeys(names) | dict(zip(told, known, strict=True))))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The buffers of a recorded call: R rows, of which the first are sequences and the others padding."""

    shape: _Shape
    table: Int[Tensor, "R C"]  # `_COLUMNS` numbers of each row, then its blocks
    draft: dict[str, Tensor]  # [R, N] each; empty for a plain step, whose only tokens are in the table

    def fill(self, context: DraftContext, draft: Draft | None, scratch: int) -> None:
        """Copy in what `read` gives back; padding rows have no draft, and write to the block at `scratch`."""
        cache, count = context.cache, len(context.sequences)
        values = np.zeros(self.table.shape, dtype=np.int64)
        values[:count, 0] = [sequence.pending_token_id for sequence in context.sequences]
        values[:count, 1], values[:count, 2] = cache.lengths, 1
        values[:count, 3:_COLUMNS] = context.columns.T
        values[:count, _COLUMNS : _COLUMNS + cache.table.shape[1]] = cache.table
        values[count:, _COLUMNS:] = scratch
        copy_to(self.table, values)
        for name, buffer in self.draft.items():
            buffer[:count].copy_(getattr(draft, name))

    def read(self) -> tuple[SamplingBatch, Draft, Int[Tensor, " R"], Int[Tensor, "R K"]]:
        """(sampling state, draft, lengths, blocks) of all rows; launches work only, so that it can be recorded."""
        columns, shape = self.table[:, :_COLUMNS].T.contiguous(), self.shape
        pending, lengths, has_sequence = columns[:3]
        token_ids, parents = pending[:, None], torch.full_like(pending, -1)[:, None]
        if shape.nodes > 1:
            parents = torch.where(has_sequence[:, None] > 0, self.draft["parents"], -1)
            token_ids = self.draft["token_ids"]
        draft = Draft(
            token_ids=token_ids,
            parents=parents,
            num_nodes=torch.full_like(pending, shape.nodes),
            scores=self.draft.get("scores"),
            counts=(shape.nodes,) * shape.rows,
        )
        return SamplingBatch.read(columns[3:], shape.kind), draft, lengths, self.table[:, _COLUMNS:].contiguous()


class TargetStep:
    """Verifies drafts of running sequences.

    Args:
        clock: marks the end of the forward.
    """

    def __init__(self, target: TargetModel, cache: SlotCache, clock: DeviceClock) -> None:
        self._target, self._cache, self._clock = target, cache, clock
        self._vocabulary = torch.arange(target.vocab_size, dtype=torch.int32, device=target.device)
        self._recordings = KeptRecordings[_Inputs](target, cache)

    def begin(self) -> None:
        """A rollout starts; call inside `target.rollout_mode`."""
        self._recordings.begin(self._target.place, self._run_recorded, self._cache.list_data)

    def end(self) -> None:
        """A rollout ended: the cache is cleared."""
        self._recordings.end()

    def leave_kernels(self) -> None:
        """Go on without recordings in this rollout."""
        self._recordings.forget()

    def __call__(self, context: DraftContext, draft: Draft | None, pool: Draft | None, depth: int) -> Answer:
        """Forward, verify, and move the state of walked nodes behind each row; the cache's lengths stay as they are.

        Args:
            draft: the trees to verify, of at most `depth` levels; None is plain decoding.
            pool: everything that was drafted; `draft` is the first nodes of each of its rows, or the pool itself.

        Raises:
            MemoryError, OSError, torch.OutOfMemoryError: there is no room for the nodes; nothing is kept.
        """
        num_nodes = 1 if draft is None else draft.token_ids.shape[1]
        for row, length in enumerate(self._cache.lengths):
            self._cache.reserve(row, length + num_nodes)
        replays = self._recordings.replays
        if replays is None or draft is not pool or not _may_record(draft, len(context.sequences)):
            return self._launch(context, draft, pool, depth, self._target.decode)
        answer = self._replay(replays, context, draft, min(depth, num_nodes - 1))
        if answer is None:
            answer = self._launch(context, draft, pool, depth, self._target.launch)
        return replace(answer, was_replayed=replays.was_replayed)

    def _replay(
        self, replays: Replays[_Inputs], context: DraftContext, draft: Draft | None, depth: int
    ) -> Answer | None:
        """The whole part as one recorded call; None where nothing was recorded and it is still to be launched."""
        cache, num_rows = self._cache, len(context.sequences)
        num_nodes = 1 if draft is None else draft.token_ids.shape[1]
        shape = _Shape(
            rows=round_size(num_rows),
            nodes=num_nodes,
            depth=depth,
            blocks=round_blocks(cache.table.shape[1]),
            kind=context.kind,
            has_scores=draft is not None and num_nodes > 1 and draft.scores is not None,
        )
        scratch = cache.take_scratch()  # which may move the cache, and so comes first
        found = replays(
            shape,
            lambda: shape.build(self._target.device),
            lambda inputs: inputs.fill(context, draft, scratch),
            larger=[replace(shape, rows=rows) for rows in list_larger(shape.rows)],
        )
        if found is None:
            return None
        path, packed, *known = found
        facts = shape.name_facts(known)
        return Answer(
            verdict=Verdict(
                path=path[:num_rows],
                token_ids=facts.token_ids[:num_rows],
                logprobs=facts.logprobs[:num_rows],
                entropies=facts.entropies[:num_rows],
                num_accepted=facts.num_accepted[:num_rows],
            ),
            facts=facts,
            packed=packed,
            num_rows=num_rows,
            num_tokens=num_rows * num_nodes,
            forwarded=self._clock.mark(),
            was_replayed=True,
        )

    def _run_recorded(self, inputs: _Inputs) -> tuple[Tensor, ...]:
        sampling, draft, lengths, blocks = inputs.read()
        depth = inputs.shape.depth
        batch = self._lay_out(draft, depth, lengths, blocks)
        output, logits = self._target.launch(batch, self._cache)
        verdict = verify(logits, draft, batch.row_starts, sampling, self._vocabulary, depth)
        gather_path(verdict.path, batch, output.features, self._cache)
        known = find_facts(verdict, draft, draft).list_known().values()
        return (verdict.path, pack(*known), *known)

    def _launch(
        self, context: DraftContext, draft: Draft | None, pool: Draft | None, depth: int, decode: Decode
    ) -> Answer:
        """The same, operation by operation; `decode` may replay the forward, which is most of the work."""
        cache, target = self._cache, self._target
        if draft is None or pool is None:
            draft = pool = Draft.roots(context.pending_token_ids)
        batch = self._lay_out(draft, depth, upload(cache.lengths, target.device), cache.blocks)
        output, logits = decode(batch, cache)
        forwarded = self._clock.mark()
        verdict = verify(logits, draft, batch.row_starts, context.sampling, self._vocabulary, depth)
        gather_path(verdict.path, batch, output.features, cache)
        return Answer(
            verdict=verdict,
            facts=find_facts(verdict, draft, pool),
            packed=None,
            num_rows=len(context.sequences),
            num_tokens=len(batch.token_ids),
            forwarded=forwarded,
            was_replayed=target.was_replayed,
        )

    def _lay_out(
        self, draft: Draft, depth: int, lengths: Int[Tensor, " B"], blocks: Int[Tensor, "B K"]
    ) -> ForwardBatch:
        return ForwardBatch.build(
            token_ids=draft.token_ids,
            num_nodes=draft.num_nodes,
            visible=compute_ancestors(draft.parents, depth),
            blocks=blocks,
            lengths=lengths,
            dtype=self._target.dtype,
            num_repeats=self._target.num_repeats,
            counts=draft.counts,
        )


def _may_record(draft: Draft | None, num_rows: int) -> bool:
    """Whether all rows have the same number of nodes, and few enough that a recording is worth it."""
    if draft is None:
        return may_record(1, round_size(num_rows))
    width = draft.token_ids.shape[1]
    return (draft.counts is None or min(draft.counts) == width) and may_record(width, round_size(num_rows) * width)


def gather_path(
    path: Int[Tensor, "B D"], batch: ForwardBatch, features: Float[Tensor, "T W"] | None, cache: SlotCache
) -> None:
    """Move the keys, values and features of walked nodes to the positions behind each row, in the order of the path."""
    if batch.most_nodes > 1 or (features is not None and is_host(path)):
        cache.gather(path, batch.lengths, batch.blocks, batch.row_starts, features)
    elif features is not None:  # one node a row: keys and values are in place, and no path need be read from a device
        assert cache.features is not None
        cache.features.write(0, batch.write_index, features)
