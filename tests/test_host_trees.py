"""The compiled tree operations of the host against PyTorch's, which a device runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.pools import open_pool
from fastgrpo.kernels import cpu
from fastgrpo.sampling import SamplingBatch
from fastgrpo.tree import Draft, check_draft, compute_ancestors
from fastgrpo.types import SamplingParams, SpeculationPlan
from fastgrpo.verify import find_ranks, verify
from test_tree_verify import build_batch, build_draft, trees

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")

SHAPES = [(1, 3, 3), (3, 1, 3), (3, 3, 8), (4, 4, 40), (8, 8, 48)]
SETTINGS = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=0.7)]


def without_kernels(compute: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "is_available", lambda: False)
        return compute()


def build_plan(shape: tuple[int, int, int]) -> SpeculationPlan:
    return SpeculationPlan(depth=shape[0], width=shape[1], num_draft_tokens=shape[2])


def grow(plan: SpeculationPlan, calibration: Calibration, seed: int, num_trees: int, absent: float) -> Draft:
    """A drafter that says something random, and the same whatever the pool is."""
    generator = torch.Generator().manual_seed(seed)
    pool = open_pool(torch.arange(num_trees), plan, calibration)
    num_nodes, num_expanded = 1, 0
    for depth in range(1, plan.depth + 1):
        shape = (num_trees, num_nodes, min(plan.width, 1 + seed % 9))
        chances = (-5 * torch.rand(shape, generator=generator)).sort(-1, descending=True).values
        chances = chances.masked_fill(torch.rand(shape, generator=generator) < absent, -math.inf)
        tokens = torch.rand(*shape[:2], 50, generator=generator).argsort(-1)[..., : shape[2]] + 100 * depth
        beam = pool.add(chances, tokens)
        if beam is None:
            assert depth == plan.depth, "nothing is expanded after the last level"
            break
        num_nodes, num_expanded = beam.token_ids.shape[1], num_expanded + beam.token_ids.shape[1]
        assert beam.visible.shape == (num_trees, num_nodes, num_expanded)
        assert beam.visible[:, torch.arange(num_nodes), num_expanded - num_nodes + torch.arange(num_nodes)].all()
        assert (beam.visible.sum(-1) == depth).all(), "itself and one ancestor on each level"
        assert (beam.scores.diff(dim=1) <= 0).all() or beam.scores.isinf().any(), "best first"
    return pool.prune()


@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(SHAPES),
    num_trees=st.integers(1, 5),
    absent=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    is_fitted=st.booleans(),
)
def test_a_pool_on_the_host_keeps_what_a_pool_of_tensors_keeps(seed, shape, num_trees, absent, is_fitted):
    plan = build_plan(shape)
    calibration = Calibration()
    if is_fitted:
        calibration.slope[:], calibration.offset[:] = 0.7, -0.3
    own = grow(plan, calibration, seed, num_trees, absent)
    expected = without_kernels(lambda: grow(plan, calibration, seed, num_trees, absent))
    check_draft(own)
    assert torch.equal(own.num_nodes, expected.num_nodes)
    if absent:  # which absent ones are expanded, and so what the random drafter says below others, may differ
        return
    assert torch.equal(own.token_ids, expected.token_ids)
    assert torch.equal(own.parents, expected.parents)
    assert own.scores is not None and own.log_chances is not None
    torch.testing.assert_close(own.scores, expected.scores, rtol=1e-5, atol=2e-6)
    assert torch.equal(own.log_chances, expected.log_chances)


def test_levels_wider_than_a_stack_are_grown_as_by_tensors() -> None:
    plan = SpeculationPlan(depth=2, width=1600, num_draft_tokens=8)

    def prune() -> Draft:
        pool = open_pool(torch.arange(1), plan, Calibration())
        for num_nodes in (1, plan.width):
            generator = torch.Generator().manual_seed(num_nodes)
            chances = -5 * torch.rand(1, num_nodes, plan.width, generator=generator)
            pool.add(chances.sort(-1, descending=True).values, torch.arange(plan.width).expand(1, num_nodes, -1))
        return pool.prune()

    ours, theirs = prune(), without_kernels(prune)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.parents, theirs.parents)


@given(rows=st.lists(trees(), min_size=1, max_size=4), padding=st.integers(0, 3))
def test_ancestors(rows, padding):
    parents = build_draft(rows, padding).parents
    assert torch.equal(compute_ancestors(parents), without_kernels(lambda: compute_ancestors(parents)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    rows=st.lists(trees(), min_size=1, max_size=5),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
    depth=st.sampled_from([None, 12]),
)
def test_a_walk_samples_as_one_node_at_a_time_does(dtype, rows, padding, seed, depth):
    """Same path, tokens, log-probs and entropies, to the last bit: the level-wise walk asks the same kernel."""
    draft = build_draft(rows, padding)
    logits = (2 * torch.randn(draft.num_tokens, 5, generator=torch.Generator().manual_seed(seed))).to(dtype)
    starts = draft.num_nodes.cumsum(0) - draft.num_nodes
    batch, vocabulary = build_batch(len(rows), SETTINGS, [0, 3, 11]), torch.arange(5, dtype=torch.int32)
    verdict = verify(logits, draft, starts, batch, vocabulary, depth)
    expected = walk_by_levels(logits, draft, starts, batch, vocabulary)
    for name in ("path", "token_ids", "logprobs", "entropies", "num_accepted"):
        assert torch.equal(getattr(verdict, name), getattr(expected, name)), name
    ours, theirs = find_ranks(verdict, draft), without_kernels(lambda: find_ranks(expected, draft))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def walk_by_levels(
    logits: torch.Tensor, draft: Draft, starts: torch.Tensor, batch: SamplingBatch, vocabulary: torch.Tensor
) -> Any:
    """`verify` as devices run it, each node sampled by the host's kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgrpo.verify.samples_on_host", lambda *_: False)
        return verify(logits, draft, starts, batch, vocabulary)


@given(rows=st.lists(trees(), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_judged_drafts_are_counted_alike(rows, seed):
    draft, generator = build_draft(rows), torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(draft.num_tokens, 5, generator=generator)
    starts = draft.num_nodes.cumsum(0) - draft.num_nodes
    batch, vocabulary = build_batch(len(rows), SETTINGS, [0, 3, 11]), torch.arange(5, dtype=torch.int32)
    verdict = verify(logits, draft, starts, batch, vocabulary)
    chances = (-6 * torch.rand(draft.token_ids.shape, generator=generator)).masked_fill(
        torch.rand(draft.token_ids.shape, generator=generator) < 0.2, -math.inf
    )

    def count() -> tuple[Any, Any]:
        calibration = Calibration()
        calibration.observe(draft, verdict, chances)
        return calibration.offered, calibration.hits

    for own, expected in zip(count(), without_kernels(count), strict=True):
        assert own.sum() == expected.sum()
        assert abs(own - expected).sum() <= 2, "a chance between two bins may fall to either side"


@given(rows=st.lists(trees(), min_size=1, max_size=5), padding=st.integers(0, 2), seed=st.integers(0, 1000))
def test_what_a_draft_promises_is_the_sum_of_its_chances(rows, padding, seed):
    draft, generator = build_draft(rows, padding), torch.Generator().manual_seed(seed)
    scores = (-6 * torch.rand(draft.token_ids.shape, generator=generator)).masked_fill(~draft.node_mask, -math.inf)
    draft = replace(draft, scores=scores)
    torch.testing.assert_close(draft.num_promised, without_kernels(lambda: draft.num_promised))


@given(rows=st.lists(trees(), min_size=1, max_size=9), padding=st.integers(0, 2), seed=st.integers(0, 1000))
def test_nodes_of_all_rows_in_order_of_their_chances(rows, padding, seed):
    """Few different scores, so that many are equal: then the earlier row's come first."""
    draft, generator = build_draft(rows, padding), torch.Generator().manual_seed(seed)
    drawn = torch.randint(-5, 0, draft.token_ids.shape, generator=generator).float()
    scores = drawn.sort(dim=1, descending=True).values.masked_fill(~draft.node_mask, -math.inf)
    draft = replace(draft, scores=scores)
    (chances, owners), expected = draft.rank_nodes(), without_kernels(draft.rank_nodes)
    assert owners == expected[1] and sorted(chances, reverse=True) == chances
    assert chances == pytest.approx(expected[0], rel=1e-6)
    assert [owners.count(row) for row in range(len(rows))] == (draft.num_nodes - 1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_the_best_nodes_that_a_draft_keeps(shape, seed):
    """From roots alone to all of them; a row may be left with fewer than it has."""
    drafted = grow(build_plan(shape), Calibration(), seed, num_trees=5, absent=0.2)
    generator = torch.Generator().manual_seed(seed)
    counts = [int(torch.randint(1, int(most) + 1, (), generator=generator)) for most in drafted.num_nodes]
    kept, expected = drafted.keep(counts), without_kernels(lambda: drafted.keep(counts))
    for name in ("token_ids", "parents", "num_nodes", "log_chances", "scores"):
        assert torch.equal(getattr(kept, name), getattr(expected, name)), name
    assert kept.counts == expected.counts == tuple(counts)
    check_draft(kept)
