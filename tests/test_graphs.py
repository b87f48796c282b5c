"""Recorded forwards: which size takes a batch, what padding leaves alone, and when recordings go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from fastgrpo import graphs
from fastgrpo.attention import ForwardBatch
from fastgrpo.engine import Engine
from fastgrpo.graphs import Bucket, GraphRunner
from fastgrpo.kernels import cpu, gpu
from fastgrpo.model import TargetModel, find_graph_obstacle
from fastgrpo.tree import compute_ancestors
from fastgrpo.types import PLAIN, SamplingParams, SpeculationPlan

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")


class EagerRecorder:
    """Runs the call again and writes its outputs where the first ones stand, as a device's recording does."""

    def __init__(self, free_bytes=2**40):
        self.free_bytes, self.num_recorded, self.num_replayed = free_bytes, 0, 0

    def record(self, run):
        self.num_recorded += 1
        outputs = tuple(output.clone() for output in run())

        def replay():
            self.num_replayed += 1
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)

        return replay, outputs

    def count_free_bytes(self):
        return self.free_bytes


def build_batch(target, cache, parents, lengths, seed=0):
    """Trees of some shapes behind rows of some lengths."""
    width = max(map(len, parents))
    links = torch.tensor([row + [-1] * (width - len(row)) for row in parents])
    draw = torch.Generator().manual_seed(seed)
    return ForwardBatch.build(
        token_ids=torch.randint(0, target.vocab_size, links.shape, generator=draw),
        num_nodes=torch.tensor([len(row) for row in parents]),
        visible=compute_ancestors(links),
        rows=slice(0, len(parents)),
        row_numbers=torch.arange(len(parents)),
        lengths=torch.tensor(lengths),
        store=cache.keys,
        dtype=target.dtype,
        num_repeats=target.num_repeats,
    )


@pytest.fixture
def target():
    target = TargetModel(build_model("llama", torch.float32))
    with target.rollout_mode():
        yield target


def build_cache(target, num_rows, length=64, seed=1):
    cache = target.build_cache(with_features=True)
    cache.reserve(num_rows + 1, length)
    cache.add_rows(num_rows)
    draw = torch.Generator().manual_seed(seed)
    for store in cache.stores:
        store.data.copy_(torch.randn(store.data.shape, generator=draw))
    return cache


TREES = [[[-1, 0, 0]], [[-1], [-1, 0, 1, 0, 2], [-1, 0]], [[-1], [-1], [-1], [-1], [-1]], [[-1, 0, 1, 2]] * 3]


@pytest.mark.parametrize("parents", TREES)
def test_a_replay_says_what_the_forward_says_and_writes_what_it_writes(target, parents):
    ours, theirs = (build_cache(target, len(parents)) for _ in range(2))
    runner = GraphRunner(lambda batch: target._decode(batch, ours), ours, EagerRecorder())
    for seed in range(5):
        lengths = [3 + 7 * row + seed for row in range(len(parents))]
        found = runner(build_batch(target, ours, parents, lengths, seed))
        expected = target._decode(build_batch(target, theirs, parents, lengths, seed), theirs)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        for mine, its in zip(ours.stores, theirs.stores, strict=True):
            assert torch.allclose(mine.data[:, :-1], its.data[:, :-1], atol=1e-5), "padding wrote into a live row"
    assert runner.num_graphs == 1


def test_a_smaller_batch_of_the_same_size_sees_nothing_of_the_one_before(target):
    cache = build_cache(target, 4)
    recorder = EagerRecorder()
    runner = GraphRunner(lambda batch: target._decode(batch, cache), cache, recorder)
    many, few = [[-1, 0, 0]] * 4, [[-1], [-1, 0, 1], [-1, 0, 0], [-1, 0, 1]]
    for _ in range(4):
        runner(build_batch(target, cache, many, [9] * 4))
    batch = build_batch(target, cache, few, [9, 30, 2, 11])
    assert Bucket.find(batch) == Bucket(rows=4, nodes=3, tokens=12)
    replayed = recorder.num_replayed
    hidden = runner(batch)[0]
    assert recorder.num_replayed == replayed + 1
    assert torch.allclose(hidden, target._decode(batch, cache)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("parents", "bucket"),
    [
        ([[-1]] * 5, Bucket(rows=6, nodes=1, tokens=6)),
        ([[-1, 0, 0, 1, 2]] * 9, Bucket(rows=12, nodes=6, tokens=48)),
        ([[-1, *range(64)]], None),
        ([[-1]] * 1025, None),
    ],
)
def test_the_smallest_size_that_holds_a_batch(target, parents, bucket):
    assert Bucket.find(build_batch(target, build_cache(target, 1), parents, [0] * len(parents))) == bucket


def test_a_size_is_recorded_once_it_is_used_often_and_the_least_used_goes(target, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    cache, recorder = build_cache(target, 4), EagerRecorder()
    runner = GraphRunner(lambda batch: target._decode(batch, cache), cache, recorder)

    def use(num_rows, times):
        for _ in range(times):
            runner(build_batch(target, cache, [[-1]] * num_rows, [5] * num_rows))

    use(1, 2)
    assert recorder.num_recorded == 0
    use(1, 3)
    use(2, 3)
    assert (recorder.num_recorded, runner.num_graphs) == (2, 2)
    use(1, 1)
    use(3, 3)  # the place of 2 is taken
    use(1, 1)
    assert (recorder.num_recorded, runner.num_graphs) == (3, 2)
    use(2, 1)
    assert recorder.num_recorded == 4


def test_recordings_go_when_the_cache_moves(target):
    cache, recorder = build_cache(target, 2), EagerRecorder()
    runner = GraphRunner(lambda batch: target._decode(batch, cache), cache, recorder)
    for _ in range(4):
        runner(build_batch(target, cache, [[-1]] * 2, [5, 6]))
    cache.lengths = [5, 6]
    cache.reserve(3, 300)
    batch = build_batch(target, cache, [[-1]] * 2, [5, 6])
    assert torch.allclose(runner(batch)[0], target._decode(batch, cache)[0], atol=1e-5)
    assert recorder.num_recorded == 2


class BrokenRecorder(EagerRecorder):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [(BrokenRecorder(), "not permitted when stream is capturing"), (EagerRecorder(free_bytes=2**29), "0.5 GiB")],
)
def test_where_nothing_can_be_recorded_it_is_said_once(target, recorder, reason):
    cache = build_cache(target, 2)
    runner = GraphRunner(lambda batch: target._decode(batch, cache), cache, recorder)
    batch = build_batch(target, cache, [[-1]] * 2, [5, 6])
    with pytest.warns(UserWarning, match=reason) as warned:
        outputs = [runner(batch)[0] for _ in range(6)]
    assert len(warned) == 1 and runner.num_graphs == 0 and reason in runner.obstacle
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("plan", [PLAIN, SpeculationPlan(depth=3, width=2, num_draft_tokens=5)])
def test_a_rollout_says_the_same_with_recordings(plan, monkeypatch):
    """Sequences that end, a cache that grows, several sizes."""
    prompts = [[5, 6, 7], [8, 9], [3, 4, 5, 6]]
    params = [SamplingParams(max_tokens=length, stream=row) for row, length in enumerate((30, 12, 22))]
    told, recorder = [], EagerRecorder()
    for build in (lambda _: None, lambda _: recorder):
        monkeypatch.setattr(TargetModel, "_build_recorder", build)
        engine = Engine(build_model("llama", torch.float32), drafter="eagle-new", speculation=plan)
        told.append([dataclasses.astuple(completion)[0] for completion in engine.generate(prompts, params)])
    assert told[0] == told[1]
    assert recorder.num_recorded >= 3 and recorder.num_replayed > recorder.num_recorded


@pytest.mark.parametrize(
    ("capability", "is_available", "dtype", "reason"),
    [
        ((7, 5), True, torch.bfloat16, "no bfloat16"),
        ((9, 0), False, torch.bfloat16, "Triton"),
        ((9, 0), True, torch.float64, "float64"),
        ((9, 0), True, torch.bfloat16, None),
    ],
)
def test_why_a_gpu_decodes_without_recordings(capability, is_available, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "is_available", lambda: is_available)
    gpu.find_obstacle.cache_clear()
    found = find_graph_obstacle(dtype)
    gpu.find_obstacle.cache_clear()
    assert found is None if reason is None else reason in found
