"""Facts for the simulator: what a drafter would have proposed at every position of a plain rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fastgrpo.drafters import Drafter
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.engine import Engine
from fastgrpo.simulation import Facts
from fastgrpo.simulation.facts import NO_PARENT
from fastgrpo.tree import Draft
from fastgrpo.types import Completion, SamplingParams, Sequence, SpeculationPlan

RECORDED_PLAN = SpeculationPlan(depth=8, width=8, num_draft_tokens=64)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tree:
    """One row of a draft."""

    token_ids: NDArray[np.int64]
    parents: NDArray[np.int64]
    scores: NDArray[np.float32]


class RecordingDrafter:
    """Has another drafter propose, keeps its trees, and hands out empty drafts: the engine emits a token a step.

    What the target chose of its drafts is kept from the other drafter, for nothing is verified.

    A step that ran out of memory is made again, with another draft or none, so that trees go by their position.

    Args:
        plan: that is to be recorded; a smaller tree is not kept.

    Attributes:
        trees: by request and position of its completion, the tree drafted there.
    """

    def __init__(self, drafter: Drafter, plan: SpeculationPlan) -> None:
        self.drafter, self.plan = drafter, plan
        self.name, self.wants_features = drafter.name, drafter.wants_features
        self.trees: dict[int, dict[int, _Tree]] = {}

    @property
    def position_bytes(self) -> int:
        return self.drafter.position_bytes

    def begin(self) -> None:
        self.trees.clear()
        self.drafter.begin()

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        draft = self.drafter.propose(context, plan)
        if draft.scores is None and draft.num_tokens > len(context.sequences):
            raise ValueError(f"drafts of {self.name} carry no scores, so smaller ones cannot be cut out of them")
        token_ids, parents = draft.token_ids.cpu().numpy(), draft.parents.cpu().numpy()
        scores = np.zeros(parents.shape) if draft.scores is None else draft.scores.float().cpu().numpy()
        for row, sequence in enumerate(context.sequences):
            tree = _Tree(token_ids=token_ids[row], parents=parents[row], scores=scores[row])
            if plan == self.plan:
                self.trees.setdefault(sequence.request_id, {})[len(sequence.token_ids)] = tree
        return Draft.roots(context.pending_token_ids)

    def collect(self, request_id: int, length: int) -> list[_Tree]:
        """The trees at the first `length` positions of a completion.

        Raises:
            MemoryError: one is lacking, since there was no room for it.
        """
        trees = self.trees.get(request_id, {})
        missing = [position for position in range(length) if position not in trees]
        if missing:
            raise MemoryError(
                f"memory had no room for drafts of {self.plan.num_draft_tokens} tokens at {len(missing)} of {length} "
                f"positions of request {request_id}, so they cannot be recorded; record fewer sequences at once "
                "(--max-num-seqs), or shorter ones (--max-tokens)"
            )
        return [trees[position] for position in range(length)]

    def count_unread(self, sequences: list[Sequence]) -> int:
        return self.drafter.count_unread(sequences)

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        self.drafter.observe(sequence, num_new_tokens)

    def release(self, slot: int, last_slot: int) -> None:
        self.drafter.release(slot, last_slot)


def record_facts(
    model: PreTrainedModel,
    drafter: Drafter,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    max_num_seqs: int = 64,
    plan: SpeculationPlan = RECORDED_PLAN,
    about: Mapping[str, Any] | None = None,
) -> Facts:
    """Roll out plainly, draft at every position, and walk each tree along what the target then chose.

    Completions that `params.max_tokens` ends are generated a draft's depth further, to know those walks to their end.

    Args:
        drafter: one whose drafts depend on their sequence alone, as heads' do; n-grams are recorded as they were
            counted in this very order.
        plan: of the recorded trees; smaller ones are cut out of them.
        about: kept with the facts.

    Raises:
        ValueError: the drafter does not say how likely its nodes are, or a prompt cannot be used.
        MemoryError: there was no room for a draft at every position.
    """
    recorder = RecordingDrafter(drafter, plan)
    engine = Engine(model, drafter=recorder, speculation=plan, max_num_seqs=max_num_seqs)
    completions = engine.generate(prompts, replace(params, max_tokens=params.max_tokens + plan.depth))
    lengths = np.array([min(len(each.token_ids), params.max_tokens) for each in completions])
    num_ahead = np.array([len(each.token_ids) for each in completions]) - lengths
    ends = [completion.finish_reason == "stop" for completion in completions]
    walked = [
        _walk(recorder.collect(index, length), completion, plan)
        for index, (length, completion) in enumerate(zip(lengths.tolist(), completions, strict=True))
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(map(tuple, prompts)))}
    parents, scores, path = (np.concatenate(arrays) for arrays in zip(*walked, strict=True))
    return Facts(
        plan=plan,
        parents=parents,
        scores=scores,
        path=path,
        lengths=lengths,
        prompt_lens=np.array([len(prompt) for prompt in prompts]),
        groups=np.array([numbers[tuple(prompt)] for prompt in prompts]),
        is_stopped=np.array(ends) & (num_ahead == 0),
        num_ahead=num_ahead,
        most_prompt_tokens=getattr(drafter, "num_prompt_tokens", None),
        about=about or {},
    )


def _walk(
    trees: list[_Tree], completion: Completion, plan: SpeculationPlan
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int16]]:
    """Parents, scores and walked paths of one completion's trees, as `Facts` has them."""
    shape = (len(trees), 1 + plan.num_draft_tokens)
    token_ids, parents = np.full(shape, -1), np.full(shape, -1)
    scores = np.full(shape, -np.inf, dtype=np.float32)
    for row, tree in enumerate(trees):
        count = len(tree.parents)
        token_ids[row, :count], parents[row, :count], scores[row, :count] = tree.token_ids, tree.parents, tree.scores
    path = np.full((len(trees), plan.depth), -1, dtype=np.int16)
    chosen = np.array(completion.token_ids + [-2] * plan.depth)  # past the end no node matches
    node = np.zeros(len(trees), dtype=np.int64)
    for level in range(plan.depth):
        is_chosen = (parents == node[:, None]) & (token_ids == chosen[level : level + len(trees), None])
        node = np.where(is_chosen.any(1), is_chosen.argmax(1), -2)  # nobody's parent
        path[:, level] = np.maximum(node, -1)
    return np.where(parents < 0, NO_PARENT, parents).astype(np.uint8), scores, path
