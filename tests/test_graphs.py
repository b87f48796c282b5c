"""Recorded forwards: which size takes a batch, what padding leaves alone, and when recordings go."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from conftest import EagerRecorder, build_model
from fastgrpo import graphs, memory, profiler
from fastgrpo.attention import ForwardBatch
from fastgrpo.blocks import BLOCK_SIZE, count_blocks
from fastgrpo.drafters import build_drafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine
from fastgrpo.graphs import Bucket, CudaRecorder, GraphRunner, Replays
from fastgrpo.kernels import cpu, gpu
from fastgrpo.model import TargetModel, find_graph_obstacle
from fastgrpo.target_step import TargetStep
from fastgrpo.tree import compute_ancestors
from fastgrpo.types import PLAIN, SamplingParams, SpeculationPlan

TREE = SpeculationPlan(depth=3, width=2, num_draft_tokens=5)

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")


def launch(target, batch, cache):
    output, logits = target.launch(batch, cache)
    return output.last_hidden, logits, output.features


def build_batch(target, cache, parents, lengths, seed=0):
    """Trees of some shapes behind rows of some lengths; where the cache has fewer rows, they stand in the same."""
    width = max(map(len, parents))
    links = torch.tensor([row + [-1] * (width - len(row)) for row in parents])
    draw = torch.Generator().manual_seed(seed)
    return ForwardBatch.build(
        token_ids=torch.randint(0, target.vocab_size, links.shape, generator=draw),
        num_nodes=torch.tensor([len(row) for row in parents]),
        visible=compute_ancestors(links),
        blocks=cache.blocks[torch.arange(len(parents)) % len(cache.blocks)],
        lengths=torch.tensor(lengths),
        dtype=target.dtype,
        num_repeats=target.num_repeats,
    )


@pytest.fixture
def target():
    target = TargetModel(build_model("llama", torch.float32))
    with target.rollout_mode():
        yield target


def build_cache(target, num_rows, length=64, seed=1):
    """Rows of noise whose blocks stand one in turn, behind the scratch block."""
    cache = target.build_cache(with_features=True)
    cache.take_scratch()
    cache.add_rows(num_rows)
    for end in range(BLOCK_SIZE, length + BLOCK_SIZE, BLOCK_SIZE):
        for row in reversed(range(num_rows)):
            cache.reserve(row, end)
    draw = torch.Generator().manual_seed(seed)
    for store in cache.stores:
        store.data.copy_(torch.randn(store.data.shape, generator=draw))
    return cache


TREES = [[[-1, 0, 0]], [[-1], [-1, 0, 1, 0, 2], [-1, 0]], [[-1], [-1], [-1], [-1], [-1]], [[-1, 0, 1, 2]] * 3]


@pytest.mark.parametrize("parents", TREES)
@pytest.mark.parametrize("length", [64, 320])
def test_a_replay_says_what_the_forward_says_and_writes_what_it_writes(target, parents, length):
    ours, theirs = (build_cache(target, len(parents), length) for _ in range(2))
    scratch = ours.take_scratch()
    is_scratch = (torch.arange(ours.keys.data.shape[1]) - scratch).abs() < BLOCK_SIZE
    assert scratch == 0 and is_scratch.sum() == BLOCK_SIZE
    runner = GraphRunner(lambda batch: launch(target, batch, ours), ours, EagerRecorder())
    for seed in range(5):
        lengths = [length - 61 + 7 * row + seed for row in range(len(parents))]
        found = runner(build_batch(target, ours, parents, lengths, seed))
        expected = launch(target, build_batch(target, theirs, parents, lengths, seed), theirs)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        for mine, its in zip(ours.stores, theirs.stores, strict=True):
            live, expected_live = mine.data[:, ~is_scratch], its.data[:, ~is_scratch]
            assert torch.allclose(live, expected_live, atol=1e-5), "padding wrote into a live row"
    assert runner.num_graphs == 1


def test_a_smaller_batch_of_the_same_size_sees_nothing_of_the_one_before(target):
    cache = build_cache(target, 4)
    recorder = EagerRecorder()
    runner = GraphRunner(lambda batch: launch(target, batch, cache), cache, recorder)
    many, few = [[-1, 0, 0]] * 4, [[-1], [-1, 0, 1], [-1, 0, 0], [-1, 0, 1]]
    for _ in range(4):
        runner(build_batch(target, cache, many, [9] * 4))
    batch = build_batch(target, cache, few, [9, 30, 2, 11])
    assert Bucket.find(batch) == Bucket(rows=4, nodes=3, tokens=12, blocks=4)
    replayed = recorder.num_replayed
    hidden = runner(batch)[0]
    assert recorder.num_replayed == replayed + 1
    assert torch.allclose(hidden, launch(target, batch, cache)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("parents", "length", "bucket"),
    [
        ([[-1]] * 5, 64, Bucket(rows=6, nodes=1, tokens=6, blocks=4)),
        ([[-1, 0, 0, 1, 2]] * 9, 256, Bucket(rows=12, nodes=6, tokens=48, blocks=4)),
        ([[-1]] * 5, 257, Bucket(rows=6, nodes=1, tokens=6, blocks=8)),
        ([[-1, *range(255)]], 64, Bucket(rows=1, nodes=256, tokens=256, blocks=4)),
        ([[-1, *range(256)]], 64, None),
        ([[-1]] * 1025, 64, None),
    ],
)
def test_the_smallest_size_that_holds_a_batch(target, parents, length, bucket):
    assert Bucket.find(build_batch(target, build_cache(target, 1, length), parents, [0] * len(parents))) == bucket


def test_a_size_is_recorded_when_it_first_comes_and_the_least_used_goes(target, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    cache, recorder = build_cache(target, 4), EagerRecorder()
    runner = GraphRunner(lambda batch: launch(target, batch, cache), cache, recorder)

    def use(num_rows, times):
        for _ in range(times):
            runner(build_batch(target, cache, [[-1]] * num_rows, [5] * num_rows))

    use(1, 1)
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 0)  # the call itself is made once
    use(1, 4)
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 4)
    use(2, 3)
    assert (recorder.num_recorded, runner.num_graphs) == (2, 2)
    use(1, 1)
    use(3, 3)  # the place of 2 is taken
    use(1, 1)
    assert (recorder.num_recorded, runner.num_graphs) == (3, 2)
    use(2, 1)
    assert recorder.num_recorded == 4


def test_a_larger_recording_serves_until_one_of_the_right_size_is_worth_it():
    recorder, store = EagerRecorder(), torch.zeros(1, 1)
    replays = Replays(lambda size: (torch.full((size,), 7.0),), lambda: [store], recorder)

    def use(size):
        """What a call of this size was padded to."""
        larger = graphs.list_larger(size)
        return len(replays(size, lambda: size, lambda _: None, larger)[0])

    assert graphs.list_larger(64) == [96] and graphs.list_larger(48) == [64] and graphs.list_larger(1) == []
    assert use(64) == 64
    assert [use(48) for _ in range(20)] == [64] * 16 + [48] * 4
    assert use(64) == 64 and recorder.num_recorded == 2
    assert use(32) == 48 and use(16) == 16, "no larger one, or one that is too large"
    assert recorder.num_recorded == 3


def test_nothing_of_a_recorder_is_left_as_the_process_ends(monkeypatch):
    """Nor the memory that its recordings shared: there is no driver to give it back to afterwards."""
    monkeypatch.setattr(graphs, "_REPLAYS", weakref.WeakSet())
    recorder, store = EagerRecorder(), torch.zeros(1, 1)
    held, replays = weakref.ref(recorder), Replays(lambda size: (torch.zeros(size),), lambda: [store], recorder)
    assert replays(2, lambda: 2, lambda _: None) is not None
    del recorder
    gc.collect()
    assert held() is not None
    graphs._drop_recordings()
    assert held() is None and not len(replays) and not replays.num_bytes
    assert replays(2, lambda: 2, lambda _: None) is None, "who decodes on does so without recordings"


def test_recordings_go_when_the_cache_moves(target):
    cache, recorder = build_cache(target, 2), EagerRecorder()
    runner = GraphRunner(lambda batch: launch(target, batch, cache), cache, recorder)
    for _ in range(4):
        runner(build_batch(target, cache, [[-1]] * 2, [5, 6]))
    cache.lengths, size = [5, 6], cache.keys.num_blocks
    cache.reserve(0, 40 * BLOCK_SIZE)
    cache.trim()
    assert cache.keys.num_blocks > size
    batch = build_batch(target, cache, [[-1]] * 2, [5, 6])
    assert torch.allclose(runner(batch)[0], launch(target, batch, cache)[0], atol=1e-5)
    assert recorder.num_recorded == 2


def test_recordings_outlive_a_row_whose_blocks_change(target):
    """Blocks go back to the pool and others are taken: the table is an input, and the scratch block nobody's."""
    cache, recorder = build_cache(target, 3), EagerRecorder()
    runner = GraphRunner(lambda batch: launch(target, batch, cache), cache, recorder)
    for _ in range(3):
        runner(build_batch(target, cache, [[-1, 0]] * 3, [5, 6, 7]))
    cache.lengths = [5, 6, 7]
    cache.remove_row(0)
    cache.reserve(1, 2 * BLOCK_SIZE)
    cache.reserve(0, 2 * BLOCK_SIZE)
    cache.add_rows(1)
    cache.reserve(2, BLOCK_SIZE)
    cache.lengths = [100, 90, 4]
    batch = build_batch(target, cache, [[-1, 0]] * 3, [100, 90, 4])
    expected = launch(target, batch, cache)
    for ours, theirs in zip(runner(batch), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 3)
    assert cache.take_scratch() == 0 and not (cache.blocks == 0).any()
    cache.trim()
    cache.check([100, 90, 4])


class BrokenRecorder(EagerRecorder):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


class UncompiledRecorder(EagerRecorder):
    def record(self, run):
        raise pytest.importorskip("triton.runtime.errors").OutOfResources(required=300, limit=227, name="shared memory")


class FaultyRecorder(EagerRecorder):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def record(self, run):
        run()
        raise self.error


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (FaultyRecorder(AttributeError("no capture_begin in this version")), "no capture_begin"),
        (FaultyRecorder(OSError(28, "No space left on device")), "No space left"),
        (FaultyRecorder(AssertionError()), "AssertionError"),
        (FaultyRecorder(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of memory"),
        (UncompiledRecorder(), "out of resource: shared memory"),
        (BrokenRecorder(), "not permitted when stream is capturing"),
        (EagerRecorder(free_bytes=2**29), "0.5 GiB"),
    ],
)
def test_where_nothing_can_be_recorded_it_is_said_once(target, recorder, reason):
    cache = build_cache(target, 2)
    runner = GraphRunner(lambda batch: launch(target, batch, cache), cache, recorder)
    batch = build_batch(target, cache, [[-1]] * 2, [5, 6])
    with pytest.warns(UserWarning, match=reason) as warned:
        outputs = [runner(batch)[0] for _ in range(6)]
    assert len(warned) == 1 and runner.num_graphs == 0 and reason in runner.obstacle
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_an_error_of_the_call_itself_is_not_put_down_to_recording(target, recwarn):
    cache, errors = build_cache(target, 2), [IndexError("once"), IndexError("of the call itself")]

    def fail(batch):
        raise errors.pop(0)

    runner = GraphRunner(fail, cache, EagerRecorder())
    with pytest.raises(IndexError, match="of the call itself"):
        runner(build_batch(target, cache, [[-1]] * 2, [5, 6]))
    assert runner.obstacle is None and not recwarn.list


KINDS = {
    "of one kind": [SamplingParams(max_tokens=length, stream=row) for row, length in enumerate((30, 12, 22))],
    "of many": [
        SamplingParams(max_tokens=30, temperature=0.0),
        SamplingParams(max_tokens=12, temperature=0.6, top_k=7, stream=1),
        SamplingParams(max_tokens=22, top_p=0.8, stream=2),
    ],
}
SHARED = SpeculationPlan(depth=2, width=2, num_draft_tokens=2, most_draft_tokens=4)
WIDE = SpeculationPlan(depth=2, width=17, num_draft_tokens=290)  # more nodes than are recorded
FACTS = ("num_seqs", "num_tokens", "num_emitted", "offered", "hits")


@pytest.mark.parametrize("plan", [PLAIN, TREE, SHARED, WIDE], ids=["plain", "tree", "shared", "wide"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_says_the_same_with_recordings(plan, kind, monkeypatch):
    """Sequences that end, a cache that grows, several sizes: the same tokens, features and facts of the steps."""
    prompts, told, recorder = [[5, 6, 7], [8, 9], [3, 4, 5, 6]], [], EagerRecorder()
    for build in (lambda _: None, lambda _: recorder):
        monkeypatch.setattr(TargetModel, "_build_recorder", build)
        engine = Engine(build_model("llama", torch.float32), drafter="eagle-new", speculation=plan)
        finished = {}
        engine.on_finish.append(lambda rollout, finished=finished: finished.update({rollout.request_id: rollout}))
        completions = engine.generate(prompts, KINDS[kind])
        told.append((completions, finished, engine.records))
    (launched, features, records), (replayed, other_features, other_records) = told
    for one, other in zip(launched, replayed, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.entropies == pytest.approx(other.entropies, abs=1e-4)
    for request, rollout in features.items():
        assert torch.allclose(rollout.features, other_features[request].features, atol=1e-4)
    for one, other in zip(records, other_records, strict=True):
        assert all(getattr(one, name) == getattr(other, name) for name in FACTS)
        assert other.cache_bytes == one.cache_bytes + engine.cache.block_bytes  # the scratch block
        assert other.num_promised == pytest.approx(one.num_promised, rel=1e-4)
    assert recorder.num_recorded >= 2 and recorder.num_replayed > recorder.num_recorded


@pytest.mark.parametrize("plan", [PLAIN, TREE], ids=["plain", "tree"])
def test_a_recorded_step_is_the_whole_of_it(plan, monkeypatch):
    """From the table of numbers to what the host reads: nothing of a steady step is launched beside it."""
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: EagerRecorder())
    engine = Engine(build_model("llama", torch.float32), drafter="eagle-new", speculation=plan)
    engine.planning.plan = lambda _: plan
    inside, outside, run = [], [], TargetStep._run_recorded

    def watch(self, inputs):
        inside.append(True)
        found = run(self, inputs)
        inside.pop()
        return found

    monkeypatch.setattr(TargetStep, "_run_recorded", watch)
    forward = TargetModel.forward
    monkeypatch.setattr(
        TargetModel, "forward", lambda *args: (inside or outside.append(len(engine.records)), forward(*args))[1]
    )
    engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=30))
    assert len(engine.records) > 8
    launched = [record for record in engine.records if not record.is_steady]
    assert {step for step in outside if step} <= {engine.records.index(record) for record in launched}
    assert len(launched) < len(engine.records) / 2


@pytest.mark.filterwarnings("ignore:the costs of this machine scatter")
def test_what_was_measured_leaves_no_cache_behind(monkeypatch):
    """A rollout begins behind it, whose own cache takes what is free."""
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: EagerRecorder())
    monkeypatch.setattr(profiler, "_LEAST_TOKENS", 4)
    monkeypatch.setattr(profiler, "_MOST_TOKENS", 4)
    target = TargetModel(build_model("llama", torch.float32))
    drafter = build_drafter("eagle-new", target)
    with target.rollout_mode():
        profiler.measure_costs(target, drafter, contexts=(8, 32), patience_s=0.0)
        assert target._runner is None and drafter._cache is None


GROUP = [(7 * index) % 120 for index in range(70)]


def spoil_scratch(cache):
    place = cache.take_scratch()
    for store in cache.stores:
        store.data[:, place : place + BLOCK_SIZE] = torch.nan


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full")
@pytest.mark.parametrize("num_blocks", [None, 7])
def test_the_bound_counts_the_scratch_block(num_blocks, monkeypatch):
    """Rows of several blocks, siblings and rows that had to wait say the same, whatever stands in the scratch block."""
    prompts, told = [GROUP, [7], GROUP, [8, 8]], []
    params = [SamplingParams(max_tokens=200 - 40 * row, stream=row) for row in range(len(prompts))]
    plan, recorder = SpeculationPlan(depth=2, width=2, num_draft_tokens=3), EagerRecorder()
    for build in (lambda _: None, lambda _: recorder):
        monkeypatch.setattr(TargetModel, "_build_recorder", build)
        model = build_model("llama", torch.float32, max_position_embeddings=512)
        engine = Engine(model, drafter="eagle-new", speculation=plan)
        if build(None) is not None:
            engine.admission.max_bytes = num_blocks and num_blocks * engine.cache.block_bytes
            engine.on_step.append(lambda _, cache=engine.cache: spoil_scratch(cache))
        engine.on_step.append(lambda _, engine=engine: engine.check())
        told.append([completion.token_ids for completion in engine.generate(prompts, params)])
    assert told[0] == told[1] and recorder.num_replayed > recorder.num_recorded
    assert (sum(record.num_preempted for record in engine.records) > 0) == (num_blocks is not None)
    assert num_blocks is None or engine.cache.peak_bytes <= num_blocks * engine.cache.block_bytes


def list_paths(draft):
    """Of each row the tokens from the root to each node, in an order of their own: scores may be as good as equal."""
    rows = []
    for tokens, parents, count in zip(
        draft.token_ids.tolist(), draft.parents.tolist(), draft.num_nodes.tolist(), strict=True
    ):
        paths = []
        for token, parent in zip(tokens[:count], parents[:count], strict=True):
            paths.append((paths[parent] if parent >= 0 else ()) + (token,))
        rows.append(sorted(paths))
    return rows


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("drafter", ["eagle-new", "block"])
@pytest.mark.parametrize("plan", [SpeculationPlan(depth=3, width=1, num_draft_tokens=3), TREE])
def test_a_replayed_draft_is_the_one_that_is_launched(plan, drafter, monkeypatch):
    """Rows that come, go and fall behind while others draft; what stands in the scratch blocks is anything."""
    prompts, drafts = [GROUP, [7], GROUP, [8, 8], [9, 3, 4]], []
    params = [SamplingParams(max_tokens=90 - 15 * row, stream=row, temperature=0.5) for row in range(len(prompts))]
    for recorder in (None, EagerRecorder()):
        monkeypatch.setattr(TargetModel, "_build_recorder", lambda _, recorder=recorder: recorder)
        engine = Engine(build_model("llama", torch.float32), drafter=drafter, speculation=plan, max_num_seqs=3)
        steps, propose = iter(range(10**6)), engine.drafter.propose
        # now and then nothing is drafted, so that more is unread than a table has columns for
        monkeypatch.setattr(engine, "_plan", lambda _, steps=steps: PLAIN if next(steps) % 20 > 13 else plan)
        told = []

        def listen(*args, told=told, propose=propose):
            draft = propose(*args)
            told.append((list_paths(draft), None if draft.scores is None else draft.scores.clone()))
            return draft

        monkeypatch.setattr(engine.drafter, "propose", listen)
        if recorder is not None:
            engine.on_step.append(lambda _, engine=engine: spoil_scratch(engine.drafter._rows.cache))
        counts = []
        engine.on_step.append(
            lambda _, drafter=engine.drafter, counts=counts: counts.append(drafter._recordings.replays)
        )
        completions = engine.generate(prompts, params)
        assert recorder is None or any(counts)
        assert (engine.drafter._recordings.replays is None) == (recorder is None), "the next rollout may replay them"
        drafts.append((told, [completion.token_ids for completion in completions]))
    assert recorder.num_replayed > 2 * recorder.num_recorded
    (launched, expected), (replayed, tokens) = drafts
    assert tokens == expected and len(launched) == len(replayed)
    for (paths, scores), (expected_paths, expected_scores) in zip(replayed, launched, strict=True):
        assert paths == expected_paths
        assert (scores is None) == (expected_scores is None)
        assert scores is None or torch.allclose(scores, expected_scores, atol=1e-5)


@pytest.mark.parametrize("is_shared", [True, False], ids=["one drafter", "two drafters"])
def test_drafts_of_a_drafter_that_was_built_apart_are_recorded_too(is_shared, monkeypatch):
    """It runs the engine's model: what a rollout prepares serves both, and other engines that take turns with it."""
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: EagerRecorder())
    model = build_model("llama", torch.float32)
    drafter = EagleDrafter(TargetModel(model))
    engines = [Engine(model, drafter=drafter, speculation=TREE)]
    engines.append(Engine(model, drafter=drafter if is_shared else EagleDrafter(TargetModel(model)), speculation=TREE))
    assert engines[0].target is drafter.target and (engines[1].target is drafter.target) == is_shared
    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(max_tokens=30)
    counts = []
    engines[0].on_step.append(lambda _: counts.append(len(drafter._recordings.replays or ())))
    expected = [completion.token_ids for completion in engines[0].generate(prompts, params)]
    assert any(counts), "drafts were launched one by one"
    if not is_shared:
        sequences = [engine.take_requests(prompts, params) for engine in engines]
        outer, inner = (engine.roll_out(own) for engine, own in zip(engines, sequences, strict=True))
        next(outer)
        for _ in inner:
            pass
        for _ in outer:
            pass
        assert [[sequence.token_ids for sequence in own] for own in sequences] == [expected, expected]
    assert engines[0].target._fused is None and not engines[0].target.records


def test_an_adapter_in_a_rollout_stays_so_when_another_rollout_of_it_ends():
    target = TargetModel(build_model("llama", torch.float32))
    with target.rollout_mode():
        fused = target._fused
        with target.rollout_mode():
            assert target._fused is not None
        assert target._fused is fused
    assert target._fused is None


def test_what_fits_only_without_the_scratch_block_is_refused(monkeypatch):
    model = build_model("llama", torch.float32, max_position_embeddings=512)
    bound = 2 * Engine(model, drafter="none", speculation="off").cache.block_bytes
    engine = Engine(model, drafter="none", speculation="off", max_cache_bytes=bound)
    params = SamplingParams(max_tokens=2 * BLOCK_SIZE + 1 - len(GROUP))
    assert count_blocks(len(GROUP) + params.max_tokens - 1) == 2
    told = engine.generate([GROUP], params)[0].token_ids
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: EagerRecorder())
    with pytest.raises(ValueError, match=rf" 64 tokens would fit: .* raise max_cache_bytes to {bound * 3 // 2}$"):
        engine.generate([GROUP], params)
    engine.admission.max_bytes = bound * 3 // 2
    assert engine.generate([GROUP], params)[0].token_ids == told


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


def test_no_other_thread_works_on_the_stream_that_is_recorded(monkeypatch):
    """Of PyTorch's 32 streams, which come in turn, a run of many rollouts takes one."""
    drawn = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(next(drawn) % 32))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(graphs, "_STREAMS", graphs._Streams())
    learner = torch.cuda.Stream()
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(graphs, "_capture", lambda *_: (SimpleNamespace(pool=lambda: None, replay=None), ()))
    entered = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: (entered.append(stream), contextlib.nullcontext())[1])
    kept = CudaRecorder()  # by a rollout that another thread goes on with
    for recorder in (*[CudaRecorder() for _ in range(100)], kept):
        recorder.record(tuple)
    assert len(set(entered)) == 1 and learner not in entered
    thread = threading.Thread(target=lambda: kept.record(tuple))
    thread.start()
    thread.join()
    assert entered[-1] not in {learner, *entered[:-1]}


class FakeStream:
    def __init__(self, number=-1):
        self.number, self.awaited = number, []

    def __hash__(self):
        return self.number

    def __eq__(self, other):
        return self.number == other.number

    def wait_stream(self, other):
        self.awaited.append(other)


@pytest.mark.parametrize("fails", ["first call", "recording"])
def test_what_cannot_be_recorded_is_awaited_before_it_is_launched_again(fails, monkeypatch):
    """The first call writes to the cache on a stream of its own, and may be at it when its recording fails."""

    def run():
        if fails == "first call":
            raise RuntimeError("out of memory, amid the launches")
        return ()

    def capture(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    current, own = FakeStream(0), FakeStream(1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    monkeypatch.setattr(graphs, "_STREAMS", SimpleNamespace(find=lambda: own))
    monkeypatch.setattr(graphs, "_capture", capture)
    with pytest.raises(RuntimeError, match=r"amid|capturing"):
        CudaRecorder().record(run)
    assert own.awaited == [current] and current.awaited == [own]


class FakeGraph:
    def capture_begin(self, **_):
        pass

    def capture_end(self):
        raise RuntimeError("the capture was invalidated")


@pytest.mark.parametrize("error", [RuntimeError("of PyTorch"), ValueError("of a kernel"), KeyboardInterrupt()])
def test_random_numbers_are_drawn_as_before_after_a_recording_that_failed(error, monkeypatch):
    """PyTorch leaves a generator as within a recording where a recording's end fails, too."""
    states = []
    generator = SimpleNamespace(clone_state=lambda: "as before", graphsafe_set_state=states.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])

    def fail():
        raise error

    with pytest.raises(type(error)):
        graphs._capture(fail, None)
    assert states == ["as before"]


def test_a_rollout_is_on_the_device_of_its_model(monkeypatch):
    """Kernels are launched on the current one."""
    entered = []

    @contextlib.contextmanager
    def enter(device):
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(TargetModel, "device", property(lambda _: torch.device("cuda", 1)))
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: None)
    monkeypatch.setattr(memory, "find_available_bytes", lambda _: 2**40)
    with TargetModel(build_model("llama", torch.float32)).rollout_mode():
        assert entered == [torch.device("cuda", 1)]
    assert not entered
