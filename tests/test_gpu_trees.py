"""Trees on a GPU against PyTorch's operators: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from fastgrpo import attention, cache, sampling, tree, verify
from fastgrpo.attention import MOST_GPU_NODES, ForwardBatch
from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.cache import locate_each
from fastgrpo.drafters import calibration, pools
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.kernels import cpu, gpu
from fastgrpo.rotation import RotationTable
from fastgrpo.sampling import SamplingBatch
from fastgrpo.tree import Draft, check_draft, compute_ancestors
from fastgrpo.types import SpeculationPlan
from fastgrpo.verify import Verdict

pytest.importorskip("triton")
from fastgrpo.kernels import gpu_walk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = (attention, cache, calibration, pools, sampling, tree, verify)
PARENTS = [  # rows of one batch are as long: a root alone fills the rest with nodes that nobody uses
    [[-1]] * 3,
    [[-1, 0, 1, 2], [-1, 0, 0, 0], [-1, 0, 0, 2], [-1, -1, -1, -1], [-1, 0, 1, -1]],
    [[-1, *(n // 2 for n in range(69))], [-1, *range(69)]],
]


@pytest.fixture
def operators(layouts_found_anew, monkeypatch):
    """PyTorch's operators, the device's way."""
    for module in MODULES:
        if hasattr(module, "is_host"):
            monkeypatch.setattr(module, "is_host", lambda _: False)
    monkeypatch.setattr(gpu, "runs_on", lambda _: False)
    monkeypatch.setattr(cpu, "is_available", lambda: False)


@pytest.fixture
def both(operators, monkeypatch):
    """Calls something twice: with kernels, and with PyTorch's operators."""

    def call(run):
        monkeypatch.setattr(gpu, "runs_on", lambda _: True)
        ours = run()
        monkeypatch.setattr(gpu, "runs_on", lambda _: False)
        return ours, run()

    return call


def draw_ints(most, *shape, seed=0):
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw_chances(*shape, seed=0):
    """Not so far from even that calibration takes them for the same."""
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul(5).add(0.05).to(DEVICE)


def build_draft(parents, most_tokens=4, seed=0):
    """Trees whose siblings carry distinct tokens, and their chances."""
    links = torch.tensor(parents, device=DEVICE)
    tokens = draw_ints(most_tokens, *links.shape, seed=seed)
    for row, nodes in enumerate(parents):
        for node in range(1, len(nodes)):
            siblings = [n for n in range(1, node) if nodes[n] == nodes[node]]
            while int(tokens[row, node]) in [int(tokens[row, n]) for n in siblings]:
                tokens[row, node] += 1
    is_used = (links >= 0) | (torch.arange(links.shape[1], device=DEVICE) == 0)
    return Draft(
        token_ids=tokens,
        parents=links,
        num_nodes=is_used.sum(1),
        log_chances=draw_chances(*links.shape, seed=seed).masked_fill(~is_used, -torch.inf),
    )


@pytest.mark.parametrize("parents", PARENTS)
@pytest.mark.parametrize("depth", [None, 1, 3])
def test_ancestors(parents, depth, both):
    ours, expected = both(lambda: compute_ancestors(torch.tensor(parents, device=DEVICE), depth))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("parents", PARENTS)
@pytest.mark.parametrize("num_before", [0, 5])
def test_layout(parents, num_before, both):
    """Positions, places and words, of nodes over the end of a block and of rows with fewer blocks than others."""
    links = torch.tensor(parents, device=DEVICE)
    num_rows, width = links.shape
    visible = torch.nn.functional.pad(compute_ancestors(links), (num_before, 0), value=True)
    blocks = BLOCK_SIZE * draw_ints(50, num_rows, 5)
    lengths = torch.tensor([0, 30, 3 * BLOCK_SIZE - 2, 1, 64][:num_rows], device=DEVICE)

    def build():
        return ForwardBatch.build(
            token_ids=draw_ints(90, num_rows, width),
            num_nodes=torch.full_like(lengths, width),
            visible=visible,
            blocks=blocks,
            lengths=lengths,
            dtype=torch.float32,
            num_repeats=1,
            counts=(width,) * num_rows,
        )

    ours, expected = both(build)
    assert ours.laid_out_words is not None and expected.laid_out_words is None
    for name in ("token_ids", "positions", "write_index", "row_starts", "words"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


@pytest.mark.parametrize("plan", [(1, 1, 1), (1, 4, 3), (3, 1, 3), (3, 3, 8), (4, 4, 40), (2, 16, 60)])
@pytest.mark.parametrize("line", [(1.0, 0.0), (0.7, -0.4)])
def test_the_best_candidates_are_kept(plan, line, both):
    """Level by level, with absent candidates and a tree of which nothing is left."""
    depth, width, num_draft_tokens = plan
    plan = SpeculationPlan(depth=depth, width=width, num_draft_tokens=num_draft_tokens)
    fitted, roots = Calibration(), torch.tensor([7, 8, 9], device=DEVICE)
    fitted.slope[:], fitted.offset[:] = line

    def grow():
        pool, beams = pools.open_pool(roots, plan, fitted), []
        nodes = 1
        for level in range(depth):
            chances = draw_chances(3, nodes, width, seed=level)
            chances[:, :, -1:] = chances[:, :, -1:].masked_fill(chances[:, :, -1:] < -2.5, -torch.inf)
            chances[2] = -torch.inf
            tokens = torch.arange(3 * nodes * width, device=DEVICE).view(3, nodes, width) + 1000 * level
            beams.append(pool.add(chances, tokens))
            nodes = min(width, nodes * width)
        return beams, pool.prune()

    (beams, draft), (their_beams, expected) = both(grow)
    assert beams[-1] is None and their_beams[-1] is None
    check_draft(draft)
    is_there = torch.tensor([True, True, False], device=DEVICE)  # what is chosen of absent ones is anything
    for beam, theirs in zip(beams[:-1], their_beams[:-1], strict=True):
        is_finite = theirs.scores.isfinite()
        assert torch.allclose(beam.scores, theirs.scores, atol=1e-5)
        for name in ("token_ids", "above", "places", "visible"):
            found, wanted = getattr(beam, name), getattr(theirs, name)
            assert torch.equal(found[is_finite], wanted[is_finite]), name
    for name in ("token_ids", "parents", "num_nodes"):
        assert torch.equal(getattr(draft, name), getattr(expected, name)), name
    assert torch.allclose(draft.scores, expected.scores, atol=1e-5)
    assert torch.allclose(draft.log_chances, expected.log_chances, atol=1e-5)
    assert draft.num_nodes[~is_there].tolist() == [1]


@pytest.mark.parametrize("broken", [slice(None), slice(0, 1)])
def test_candidates_without_a_number_are_absent(broken, monkeypatch):
    """As a head that has diverged says them, or one that reads a target that has."""
    monkeypatch.setattr(gpu, "runs_on", lambda _: True)
    monkeypatch.setattr(pools, "is_host", lambda _: False)
    pool = pools.open_pool(draw_ints(9, 2), SpeculationPlan(depth=3, width=2, num_draft_tokens=6), Calibration())
    num_nodes = 1
    for level in range(3):
        chances, tokens = draw_chances(2, num_nodes, 2, seed=level), draw_ints(9, 2, num_nodes, 2, seed=level)
        chances[broken] = torch.nan
        beam = pool.add(chances, tokens)
        if beam is not None:
            num_nodes = beam.token_ids.shape[1]
            assert bool(((beam.above >= 0) & (beam.above < chances.shape[1])).all())
    draft = pool.prune()
    assert draft.num_nodes.tolist()[broken] == [1, 1][broken]
    assert not bool(draft.scores.isnan().any())


def walk(draft, logits, num_levels):
    count, width = draft.token_ids.shape
    rows = SamplingBatch.build_blank(count, DEVICE)
    vocabulary = torch.arange(logits.shape[1], dtype=torch.int32, device=DEVICE)
    return verify.verify(logits, draft, torch.arange(count, device=DEVICE) * width, rows, vocabulary, num_levels - 1)


@pytest.mark.parametrize("parents", PARENTS)
@pytest.mark.parametrize("seed", range(3))
def test_walks_and_ranks(parents, seed, both):
    """A small vocabulary, and a first child that is accepted."""
    draft = build_draft(parents, seed=seed)
    num_levels = min(len(parents[0]), 4)
    logits = torch.randn(draft.token_ids.numel(), 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    if num_levels > 1:
        draft.token_ids[:, 1] = walk(draft, logits, 1).token_ids[:, 0]
    ours, expected = both(lambda: walk(draft, logits, num_levels))
    for name in ("path", "token_ids", "num_accepted"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for name in ("logprobs", "entropies"):
        assert torch.allclose(getattr(ours, name), getattr(expected, name), atol=1e-4), name
    children, ranks = both(lambda: verify.find_ranks(expected, draft))
    for mine, theirs in zip(children, ranks, strict=True):
        assert torch.equal(mine, theirs)
    assert len(parents[0]) == 1 or expected.num_accepted[0] > 0, "nothing was accepted"


@pytest.mark.parametrize("num_steps", [1, 4])
def test_what_is_counted_of_walked_nodes(num_steps, both, monkeypatch):
    """Over steps, of which the earlier count less, and with a fold in between."""
    monkeypatch.setattr(calibration, "_MOST_UNFOLDED", 3)

    def count():
        counted = Calibration()
        for step in range(num_steps):
            draft = build_draft(PARENTS[1], seed=step)
            logits = torch.randn(draft.token_ids.numel(), 5, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            counted.observe(draft, walk(draft, logits, 4))
        counted.fit()
        return counted

    ours, expected = both(count)
    assert expected.offered.sum() > 3 * num_steps and expected.hits.sum() > 0
    assert ours.offered == pytest.approx(expected.offered, rel=1e-5)
    assert ours.hits == pytest.approx(expected.hits, rel=1e-5)


def test_chances_near_certainty_fall_where_they_did(both):
    """1 - exp(x) has hardly a digit left there."""
    chances = torch.tensor([[0.0, -1e-7, -1e-5, -3e-4, -0.0199, -0.0201, -0.5, -7.0, -30.0]], device=DEVICE)
    count = chances.shape[1]
    draft = Draft(
        token_ids=torch.arange(count, device=DEVICE)[None],
        parents=torch.tensor([[-1] + [0] * (count - 1)], device=DEVICE),
        num_nodes=torch.tensor([count], device=DEVICE),
        log_chances=chances,
    )
    zeros = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    verdict = Verdict(
        path=zeros, token_ids=zeros, logprobs=zeros.float(), entropies=zeros.float(), num_accepted=zeros[0]
    )

    def count_them():
        counted = Calibration()
        counted.observe(draft, verdict)
        counted._fold()
        return counted.offered

    ours, expected = both(count_them)
    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("num_levels", [1, 4])
def test_where_walked_nodes_belong(num_levels):
    lengths, blocks = torch.tensor([0, 31, 95], device=DEVICE), BLOCK_SIZE * draw_ints(50, 3, 4)
    path = torch.tensor([[0, 2, 5, 7], [0, 3, -1, -1], [0, -1, -1, -1]], device=DEVICE)[:, :num_levels]
    source, target = gpu_walk.locate_path(path, lengths, blocks)
    rows, depth = _list_all(path)
    node = torch.where(path < 0, depth.view_as(path), path).flatten()
    assert torch.equal(source, locate_each(blocks, rows, lengths[rows] + node))
    assert torch.equal(target, locate_each(blocks, rows, lengths[rows] + depth))


def _list_all(path):
    """Rows and depths of all places of a path."""
    rows, depth = (torch.arange(size, device=DEVICE) for size in path.shape)
    return rows.repeat_interleave(path.shape[1]), depth.repeat(path.shape[0])


class _Rotary(torch.nn.Module):
    def forward(self, like, position_ids):
        angles = position_ids[..., None] * torch.tensor([1.0, 0.1, 0.01, 0.001], device=like.device)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def test_there_is_a_table_for_as_long_a_context_as_llama_3_has(monkeypatch):
    monkeypatch.setattr("fastgrpo.rotation.is_host", lambda _: False)
    like = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)

    def rotate(like, position_ids):
        return (like.expand(1, position_ids.shape[1], 128),) * 2

    table = RotationTable(rotate, 131_072 + MOST_GPU_NODES)
    table(torch.tensor([0], device=DEVICE), like)
    assert table._table is not None


@pytest.mark.parametrize(("num_positions", "has_table"), [(50, True), (0, False), (10**9, False)])
def test_a_device_looks_rotations_up(num_positions, has_table, monkeypatch):
    """The same numbers; beyond the table the last one's, so that nothing is read that is not there."""
    monkeypatch.setattr("fastgrpo.rotation.is_host", lambda _: False)
    table, like = RotationTable(_Rotary(), num_positions), torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    positions = torch.tensor([0, 7, 49, 3], device=DEVICE)
    expected = [part[0] for part in _Rotary()(like, positions[None])]
    for found, wanted in zip(table(positions, like), expected, strict=True):
        assert torch.equal(found, wanted)
    assert (table._table is not None) == has_table
    if has_table:
        beyond, last = (table(torch.tensor(at, device=DEVICE), like) for at in ([50, 900], [49, 49]))
        assert all(torch.equal(one, other) for one, other in zip(beyond, last, strict=True))
