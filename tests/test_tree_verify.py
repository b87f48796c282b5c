"""Trees against brute force, and the vectorised walk against one in plain Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCAB_SIZE
from fastgrpo.kernels import cpu
from fastgrpo.sampling import SamplingBatch, sample, stream_key
from fastgrpo.tree import Draft, check_draft, compute_ancestors
from fastgrpo.types import SamplingParams, Sequence
from fastgrpo.verify import Verdict, find_facts, find_ranks, read_outcome, verify

Node = tuple[int, int]  # (token, parent)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12, num_tokens: int = 5) -> list[Node]:
    """One tree in topological order; few tokens, so that drafts are often right, and distinct siblings."""
    nodes = [(draw(st.integers(0, num_tokens - 1)), -1)]
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        parent, token_id = draw(st.integers(0, len(nodes) - 1)), draw(st.integers(0, num_tokens - 1))
        if (token_id, parent) not in nodes:
            nodes.append((token_id, parent))
    return nodes


def build_draft(rows: list[list[Node]], padding: int = 0) -> Draft:
    width = max(len(row) for row in rows) + padding
    padded = torch.tensor([row + [(0, -1)] * (width - len(row)) for row in rows])
    return Draft(token_ids=padded[..., 0], parents=padded[..., 1], num_nodes=torch.tensor([len(row) for row in rows]))


def ancestors_of(row: list[Node], node: int) -> list[int]:
    """The path from the root to the node, by following parents."""
    path = [node]
    while row[path[0]][1] >= 0:
        path.insert(0, row[path[0]][1])
    return path


@given(rows=st.lists(trees(), min_size=1, max_size=4), padding=st.integers(0, 3))
def test_ancestors_and_depths(rows, padding):
    draft = build_draft(rows, padding)
    check_draft(draft)
    ancestors = compute_ancestors(draft.parents)
    depths = ancestors.sum(-1) - 1
    for index, row in enumerate(rows):
        for node in range(len(row)):
            path = ancestors_of(row, node)
            assert ancestors[index, node].nonzero()[:, 0].tolist() == sorted(path)
            assert depths[index, node] == len(path) - 1
        for unused in range(len(row), draft.token_ids.shape[1]):
            assert ancestors[index, unused].nonzero()[:, 0].tolist() == [unused]
    assert draft.num_tokens == sum(map(len, rows)) == int(draft.node_mask.sum())


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_longest_chain_has_all_its_ancestors(has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    chain = [(i, i - 1) for i in range(70)]
    assert torch.equal(compute_ancestors(build_draft([chain]).parents)[0], torch.ones(70, 70).tril().bool())


def test_the_empty_draft_is_plain_decoding():
    draft = Draft.roots(torch.tensor([4, 9]))
    check_draft(draft)
    assert draft.num_tokens == 2
    assert compute_ancestors(draft.parents).tolist() == [[[True]], [[True]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": torch.tensor([0])}, "uses 0 of 4"),
        ({"num_nodes": torch.tensor([5])}, "uses 5 of 4"),
        ({"parents": torch.tensor([[0, 0, 1, 1]])}, "the root has parent 0"),
        ({"parents": torch.tensor([[-1, 0, 2, 1]])}, "node 2 has parent 2"),
        ({"parents": torch.tensor([[-1, 0, -1, 1]])}, "node 2 has parent -1"),
        ({"parents": torch.tensor([[-1, 0, 3, 1]])}, "node 2 has parent 3"),
        ({"num_nodes": torch.tensor([3])}, "an unused node has a parent"),
        ({"token_ids": torch.tensor([[1, 2, 3, 3]])}, "two siblings carry the same token"),
    ],
)
def test_check_draft_finds_what_is_broken(change, message):
    sound = build_draft([[(1, -1), (2, 0), (3, 1), (4, 1)]])
    check_draft(sound)
    with pytest.raises(AssertionError, match=message):
        check_draft(replace(sound, **change))


# -- the walk ------------------------------------------------------------------------------------------------


def build_batch(count: int, settings: list[SamplingParams], positions: list[int]) -> SamplingBatch:
    sequences = [
        Sequence(
            request_id=index,
            prompt_ids=[0],
            params=settings[index % len(settings)],
            max_tokens=100,
            stream_key=stream_key(9, index),
            token_ids=[0] * positions[index % len(positions)],
        )
        for index in range(count)
    ]
    return SamplingBatch.build(sequences, torch.device("cpu"))


def walk(
    row: list[Node], logits: torch.Tensor, batch: SamplingBatch, index: int
) -> list[tuple[int, int, float, float]]:
    """(node, token chosen there, log-prob, entropy) one node at a time, each sampled alone."""
    vocabulary = torch.arange(logits.shape[1], dtype=torch.int32)
    steps, node = [], 0
    while True:
        one = batch.rows(torch.tensor([index]), len(steps))
        token_id, logprob, entropy = sample(logits[node : node + 1], one, vocabulary)
        steps.append((node, int(token_id), float(logprob), float(entropy)))
        children = [child for child, (_, parent) in enumerate(row) if parent == node]
        matching = [child for child in children if row[child][0] == int(token_id)]
        if not matching:
            return steps
        node = matching[0]


@given(
    rows=st.lists(trees(), min_size=1, max_size=5),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
    settings=st.lists(
        st.sampled_from(
            [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=0.7, top_k=3, top_p=0.9)]
        ),
        min_size=1,
        max_size=3,
    ),
    positions=st.lists(st.integers(0, 50), min_size=1, max_size=5),
)
def test_the_walk_is_that_of_plain_python(rows, padding, seed, settings, positions):
    draft = build_draft(rows, padding)
    counts = [len(row) for row in rows]
    logits = torch.randn(sum(counts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    starts = draft.num_nodes.cumsum(0) - draft.num_nodes
    batch = build_batch(len(rows), settings, positions)
    verdict = verify(logits, draft, starts, batch, torch.arange(5, dtype=torch.int32))
    num_children, ranks = find_ranks(verdict, draft)
    longest = 0
    for index, row in enumerate(rows):
        start = int(starts[index])
        steps = walk(row, logits[start : start + len(row)], batch, index)
        count = len(steps)
        longest = max(longest, count)
        assert verdict.num_accepted[index] == count - 1
        assert verdict.path[index, :count].tolist() == [step[0] for step in steps]
        assert verdict.token_ids[index, :count].tolist() == [step[1] for step in steps]
        assert verdict.logprobs[index, :count].tolist() == [step[2] for step in steps]
        assert verdict.entropies[index, :count].tolist() == [step[3] for step in steps]
        assert (verdict.path[index, count:] == -1).all()
        assert (num_children[index, count:] == 0).all()
        for depth, (node, token_id, *_) in enumerate(steps):
            siblings = [token for token, parent in row if parent == node]
            assert num_children[index, depth] == len(siblings)
            rank = siblings.index(token_id) if token_id in siblings else -1
            assert ranks[index, depth] == rank
    assert verdict.path.shape[1] == longest
    check_hits(verdict, rows)


def check_hits(verdict: Verdict, rows: list[list[Node]]) -> None:
    """Offers and hits against counting one walked node at a time."""
    offered: dict[tuple[int, int], int] = {}
    hits: dict[tuple[int, int], int] = {}
    for index, row in enumerate(rows):
        for depth, node in enumerate(verdict.path[index].tolist()):
            siblings = [token for token, parent in row if parent == node] if node >= 0 else []
            for rank in range(len(siblings)):
                offered[depth, rank] = offered.get((depth, rank), 0) + 1
                is_hit = siblings[rank] == int(verdict.token_ids[index, depth])
                hits[depth, rank] = hits.get((depth, rank), 0) + is_hit
    draft = build_draft(rows)
    counted = read_outcome(find_facts(verdict, draft, draft), len(rows))
    assert {(d, r): n for d, level in enumerate(counted.offered) for r, n in enumerate(level)} == offered
    assert {(d, r): n for d, level in enumerate(counted.hits) for r, n in enumerate(level)} == hits


@given(row=trees(max_nodes=10), seed=st.integers(0, 1000))
def test_a_draft_never_changes_the_first_token(row, seed):
    """What is emitted without a draft is the beginning of what is emitted with one."""
    logits = torch.randn(len(row), 5, generator=torch.Generator().manual_seed(seed))
    batch, vocabulary = build_batch(1, [SamplingParams()], [3]), torch.arange(5, dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int64)
    root = Draft.roots(torch.tensor([row[0][0]]))
    plain = verify(logits[:1], root, start, batch, vocabulary)
    drafted = verify(logits, build_draft([row]), start, batch, vocabulary)
    assert plain.token_ids[0, 0] == drafted.token_ids[0, 0]
    assert plain.logprobs[0, 0] == drafted.logprobs[0, 0]
    assert plain.entropies[0, 0] == drafted.entropies[0, 0]
    counted = read_outcome(find_facts(plain, root, root), 1)
    assert (counted.offered, counted.hits) == ((), ())


def test_a_walk_to_the_end_of_a_deep_chain():
    depth = 40
    tokens = torch.randint(0, VOCAB_SIZE, (depth + 1,), generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(depth + 1, VOCAB_SIZE)
    logits[torch.arange(depth), tokens[1:]] = 50.0
    chain = [(int(token), index - 1) for index, token in enumerate(tokens)]
    batch = build_batch(1, [SamplingParams(temperature=0.0)], [0])
    start = torch.zeros(1, dtype=torch.int64)
    verdict = verify(logits, build_draft([chain]), start, batch, torch.arange(VOCAB_SIZE, dtype=torch.int32))
    assert verdict.num_accepted.tolist() == [depth]
    assert verdict.path[0].tolist() == list(range(depth + 1))
