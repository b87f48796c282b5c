"""Recordings that outlive a rollout: the next one replays them, and they read the weights and caches of that one.

Without a GPU a tape takes the place of CUDA graphs: it holds the very tensors that a call met, as a graph holds their
addresses, and replays the operations on these; Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from conftest import build_model
from fastgrpo import admission, attention, cache, graphs, memory, rotation, sampling, tree, verify
from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.drafters import calibration, pools
from fastgrpo.engine import Engine
from fastgrpo.graphs import Recording
from fastgrpo.kept_recordings import KeptRecordings
from fastgrpo.kernels import cpu, gpu
from fastgrpo.model import TargetModel
from fastgrpo.types import PLAIN, SamplingParams, SpeculationPlan

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32 = torch.float32
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter multiplies none in bfloat16
TREE = SpeculationPlan(depth=2, width=2, num_draft_tokens=2)
SIZES = {"head_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = [[5, 6, 7], [8, 9]]
PARAMS = [SamplingParams(max_tokens=length, stream=row) for row, length in enumerate((7, 2))]
MODULES = (attention, cache, calibration, pools, rotation, sampling, tree, verify)

_launch = InterpretedFunction.run


class Tape(TorchDispatchMode):
    """What a call does, to be done again in the same memory."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a recorded call must not read"
        args, kwargs = hold((args, kwargs or {}))
        result = operation(*args, **kwargs)
        if operation._schema.is_mutable:
            self.steps.append(lambda: operation(*args, **kwargs))
        elif "empty" not in str(operation):
            memory, outputs = set(map(find_memory, list_tensors((args, kwargs)))), hold(list_tensors(result))
            if not memory.issuperset(map(find_memory, outputs)):  # views are where they were
                self.steps.append(lambda: self._compute_again(operation, args, kwargs, outputs))
        return result

    @staticmethod
    def _compute_again(operation, args, kwargs, outputs):
        for output, new in zip(outputs, list_tensors(operation(*args, **kwargs)), strict=True):
            output.copy_(new)

    def launch(self, kernel, *args, **kwargs):
        with _disable_current_modes():
            args = hold(args)
            _launch(kernel, *args, **kwargs)
        self.steps.append(lambda: _launch(kernel, *args, **kwargs))


def hold(tree):
    """The same memory, whatever becomes of the tensors: another one may be put into a parameter."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def list_tensors(tree):
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def find_memory(tensor):
    return tensor.untyped_storage().data_ptr()


class TapeRecorder:
    num_bytes = 0

    def __init__(self, recorded):
        self.recorded = recorded

    def record(self, run):
        self.recorded.append(run)
        first = run()
        with pytest.MonkeyPatch.context() as patch, Tape() as tape:
            patch.setattr(
                InterpretedFunction, "run", lambda kernel, *args, **given: tape.launch(kernel, *args, **given)
            )
            outputs = run()
        return Recording(first=first, replay=lambda: [step() for step in tape.steps], outputs=outputs)

    def count_free_bytes(self):
        return 2**40


@pytest.fixture
def recorded(layouts_found_anew, monkeypatch):
    """What was recorded so far, in order; on a GPU as there, else by tapes."""
    calls = []
    if DEVICE.type == "cuda":
        record = graphs.CudaRecorder.record
        monkeypatch.setattr(graphs.CudaRecorder, "record", lambda self, run: (calls.append(run), record(self, run))[1])
        return calls
    for module in MODULES:
        if hasattr(module, "is_host"):
            monkeypatch.setattr(module, "is_host", lambda _: False)
    monkeypatch.setattr(gpu, "runs_on", lambda _: True)
    monkeypatch.setattr(gpu, "find_obstacle", lambda: None)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: TapeRecorder(calls))
    return calls


def build(drafter="eagle-new", plan=TREE, **settings):
    own = build_model("llama", F32, **SIZES).to(DEVICE)
    return Engine(own, drafter=drafter, speculation=plan, **settings)


def generate(engine):
    return [completion.token_ids for completion in engine.generate(PROMPTS, PARAMS)]


def leave_kernels(patch):
    """Nothing is recorded, and PyTorch's operators take the kernels' place."""
    patch.setattr(TargetModel, "_build_recorder", lambda _: None)
    patch.setattr(gpu, "runs_on", lambda _: False)


def generate_anew(engine, monkeypatch):
    """What another engine says with the same model."""
    with monkeypatch.context() as patch:
        leave_kernels(patch)
        settings = {"speculation": "off", "compute_dtype": engine.target.compute_dtype}
        return generate(Engine(engine.target.model, drafter="none", **settings))


def shake(model):
    """Change every trained weight in its place, as an optimizer does."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 * torch.randn(parameter.shape, generator=draw) * parameter.cpu().std()).to(parameter)


@pytest.mark.parametrize(("drafter", "plan"), [("none", PLAIN), ("eagle-new", TREE), ("block", TREE)])
def test_a_second_rollout_records_nothing(drafter, plan, recorded, monkeypatch):
    engine = build(drafter, plan)
    first, num_recorded = generate(engine), len(recorded)
    assert num_recorded > 1
    assert generate(engine) == first
    assert len(recorded) == num_recorded
    assert all(record.is_steady for record in engine.records[1:])
    shake(engine.target.model)
    later = generate(engine)
    assert len(recorded) == num_recorded, "weights that were written where they stand are read there"
    assert later != first and later == generate_anew(engine, monkeypatch)


def add_lora(own):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(own, config)


@pytest.mark.parametrize("kind", ["merged", "cast", "merged and cast", "tied and cast"])
def test_copies_of_weights_stand_where_the_last_ones_stood(kind, recorded, monkeypatch):
    own = build_model("llama", F32, **SIZES, tie_word_embeddings=kind.startswith("tied"))
    own = add_lora(own.to(DEVICE)) if "merged" in kind else own.to(DEVICE)
    monkeypatch.setattr(cpu, "covers", lambda *_: True)  # float16, which the processor's kernels lack
    engine = Engine(own, drafter="none", speculation="off", compute_dtype=HALF if "cast" in kind else None)
    generate(engine)
    num_recorded, before = len(recorded), {name: each.clone() for name, each in own.named_parameters()}
    shake(own)
    held = torch.empty(2**20, device=DEVICE)  # what is allocated meanwhile takes no place of theirs
    told = generate(engine)
    assert len(recorded) == num_recorded and told == generate_anew(engine, monkeypatch)
    assert len(held) and any(not torch.equal(each, before[name]) for name, each in own.named_parameters())


def move(own):
    for parameter in own.parameters():
        parameter.data = 0.5 * parameter.data


def hook(own):
    own.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 0.5 * output)


def replace_head(own):
    own.lm_head = copy.deepcopy(own.lm_head)
    shake(own.lm_head)


def rotate_otherwise(own):
    own.model.rotary_emb.inv_freq.mul_(0.5)


def rotate_otherwise_unseen(own):
    own.model.rotary_emb.inv_freq.data.mul_(0.5)


def scale_norm(own):
    own.model.norm.variance_epsilon = 50.0


CHANGES = [move, hook, replace_head, rotate_otherwise, rotate_otherwise_unseen, scale_norm]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_recorded_anew(change, recorded, monkeypatch):
    engine = build(plan=PLAIN)
    before, num_recorded = generate(engine), len(recorded)
    change(engine.target.model)
    told = generate(engine)
    assert told == generate_anew(engine, monkeypatch) and told != before
    assert len(recorded) > num_recorded
    if change is hook:
        (hook_id,) = engine.target.model.model.layers[0].mlp._forward_hooks
        del engine.target.model.model.layers[0].mlp._forward_hooks[hook_id]
        assert generate(engine) == before


@pytest.mark.parametrize("kind", ["eagle-new", "block"])
def test_a_place_tells_of_each_weight_and_constant(kind, recorded):
    """Whatever is put elsewhere, or computed otherwise, alone."""
    engine, held = build(kind), []
    target, drafter = engine.target, engine.drafter

    def find_places():
        with target.rollout_mode():
            return target.place, drafter._find_place()

    def move_weight(owner, name):
        held.append(getattr(owner, name))  # whose memory nobody else is given
        getattr(owner, name).data = getattr(owner, name).detach().clone()

    def check(change, of_target):
        before = find_places()
        assert before == find_places(), "nothing has changed"
        change()
        after = find_places()
        assert (before[0] != after[0]) == of_target and before[1] != after[1]

    for module in target.base.modules():
        for name, _ in module.named_parameters(recurse=False):
            held.append(getattr(module, name).detach())
            check(lambda module=module, name=name: move_weight(module, name), of_target=True)
        for name in ("variance_epsilon", "scaling"):
            if hasattr(module, name):
                check(lambda module=module, name=name: setattr(module, name, 0.123), of_target=True)
    for module in drafter.fast_head.modules():
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            held.append(getattr(module, name).detach())
            check(lambda module=module, name=name: move_weight(module, name), of_target=False)
    others = [(drafter.head, "draft_vocab")] + ([(drafter, "_correction")] if kind == "block" else [])
    for owner, name in others:
        held.append(getattr(owner, name).detach())
        check(lambda owner=owner, name=name: move_weight(owner, name), of_target=False)


@pytest.mark.parametrize("name", ["fp32_precision", "allow_bf16_reduced_precision_reduction"])
def test_products_of_another_precision_are_recorded_anew(name, recorded):
    """cuBLAS rounds as PyTorch's settings said when it was recorded."""
    engine = build(plan=PLAIN)
    generate(engine)
    generate(engine)
    num_recorded, settings = len(recorded), torch.backends.cuda.matmul
    before = getattr(settings, name)
    setattr(settings, name, "tf32" if name == "fp32_precision" else not before)
    try:
        generate(engine)
    finally:
        setattr(settings, name, before)
    assert len(recorded) == 2 * num_recorded


def learn(drafter):
    shake(drafter.head)


def calibrate(drafter):
    drafter.calibration.offered[:], drafter.calibration.hits[:] = 100.0, 3.0


def calibrate_anew(drafter):
    drafter.calibration = calibration.Calibration()


def take_other_words(drafter):
    drafter.select_vocabulary(torch.arange(drafter.target.vocab_size, device=DEVICE).flip(0))


def rank_without_noise(drafter):
    drafter.ranks_with_noise = False


def move_target(drafter):
    move(drafter.target.model)
    shake(drafter.target.model)


FACTS = ("num_seqs", "num_tokens", "num_emitted", "offered", "hits")


@pytest.mark.parametrize("kind", ["eagle-new", "block"])
def test_kept_drafts_are_those_of_the_head_as_it_is_now(kind, recorded, monkeypatch):
    """Beside an engine that goes through the same and records nothing."""
    torch.manual_seed(5)
    engine = build(kind)
    with monkeypatch.context() as patch:
        leave_kernels(patch)
        torch.manual_seed(5)
        twin = build(kind)
    num_recorded = []
    for change in (None, learn, calibrate, take_other_words, calibrate_anew, rank_without_noise, move_target):
        if change is not None:
            change(engine.drafter)
            change(twin.drafter)
        told = generate(engine)
        num_recorded.append(len(recorded))
        with monkeypatch.context() as patch:
            leave_kernels(patch)
            assert generate(twin) == told
        for one, other in zip(engine.records, twin.records, strict=True):
            assert all(getattr(one, name) == getattr(other, name) for name in FACTS)
            assert one.num_promised == pytest.approx(other.num_promised, rel=1e-3)
    assert num_recorded[0] == num_recorded[1] == num_recorded[2] == num_recorded[3]
    assert num_recorded[3] < num_recorded[4] < num_recorded[5] < num_recorded[6]


def test_a_table_of_rotations_that_is_gone_is_not_taken_for_a_later_one(recorded):
    """Which may be given its place."""
    engine, places = build(), set()
    with engine.target.rollout_mode():
        for _ in range(8):
            engine.target.model.model.rotary_emb.inv_freq.mul_(0.9)
            engine.drafter._take_rotation()
            places.add(engine.drafter._find_place())
    assert len(places) == 8


def test_recordings_go_where_memory_is_scarce(recorded, monkeypatch):
    engine = build()
    expected, num_recorded = generate(engine), len(recorded)
    assert engine.cache.num_bytes and engine.drafter._rows.cache.num_bytes
    num_bytes = engine.cache.num_bytes + engine._verify._recordings.replays.num_bytes
    monkeypatch.setattr(memory, "find_available_bytes", lambda _: 16 * num_bytes - 16)
    assert generate(engine) == expected and len(recorded) == num_recorded
    assert not engine.cache.num_bytes and engine._verify._recordings.replays is None
    assert engine.drafter._rows.cache.num_bytes or DEVICE.type == "cuda", "which takes less"
    assert generate(engine) == expected and len(recorded) > num_recorded


def test_the_cache_that_was_kept_is_there_for_the_next_rollout(recorded, monkeypatch):
    """It counts as taken for the device, and as free for a longest sequence that fits a new engine."""
    engine = build("none", PLAIN)
    length, block_bytes = 32, engine.cache.block_bytes
    num_bytes = (engine.admission._compute_row_bytes(len(PROMPTS[0]) + length - 1) + block_bytes) / 0.8
    monkeypatch.setattr(admission, "find_available_bytes", lambda _: num_bytes + 2 - engine.cache.num_bytes)
    engine.generate(PROMPTS[:1], SamplingParams(max_tokens=2))
    assert engine.cache.num_bytes
    (told,) = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=length))
    assert len(told.token_ids) == length


@pytest.mark.parametrize("kind", ["eagle-new", "block"])
def test_an_engine_that_is_dropped_gives_its_memory_back(kind, recorded):
    """At once, and not when Python comes to look for cycles, which knows nothing of a GPU's memory."""
    engine = build(kind)
    generate(engine)
    parts = [weakref.ref(part) for part in (engine.cache, engine._verify, engine.drafter)]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert not any(part() for part in parts)
    finally:
        gc.enable()


def assert_finite(cache):
    for store in cache.stores:
        assert store.data.isfinite().all()


def test_kept_storage_counts_and_is_clean(recorded):
    """A later rollout may use less of it, or more; what stood there is gone, were it no numbers."""
    engine = build(plan=PLAIN)
    expected, num_bytes = generate(engine), engine.cache.num_bytes
    assert engine.cache.used_bytes == 0
    for store in engine.cache.stores:
        store.data.fill_(torch.nan)
    engine.on_step.append(lambda _: engine.check())
    engine.on_step.append(lambda _: assert_finite(engine.cache))
    assert generate(engine) == expected and engine.cache.num_bytes == num_bytes
    engine.admission.max_bytes = 4 * engine.cache.block_bytes
    assert num_bytes > engine.admission.max_bytes
    sizes = []
    engine.on_step.append(lambda _: sizes.append(engine.cache.num_bytes))
    assert generate(engine) == expected and max(sizes) == engine.admission.max_bytes


def test_a_rollout_that_broke_off_leaves_nothing_wrong(recorded):
    engine = build()
    expected = generate(engine)
    engine.on_step.append(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(engine)
    engine.on_step.clear()
    assert generate(engine) == expected


def test_engines_of_one_model_keep_their_own(recorded):
    first = build()
    second = Engine(first.target.model, drafter="eagle-new", speculation=TREE)
    expected = generate(first)
    assert generate(second) == expected
    num_recorded = len(recorded)
    assert [generate(engine) for engine in (first, second)] == [expected] * 2
    assert len(recorded) == num_recorded


@pytest.mark.parametrize("kind", ["eagle-new", "block"])
def test_a_copy_of_a_drafter_has_no_recordings(kind, recorded):
    engine = build(kind)
    expected, num_recorded = generate(engine), len(recorded)
    twin = copy.deepcopy(engine.drafter)
    assert engine.drafter._recordings.replays is not None and twin._recordings.replays is None and twin._cache is None
    assert generate(Engine(twin.target.model, drafter=twin, speculation=TREE)) == expected
    assert len(recorded) == 2 * num_recorded


def test_nothing_is_kept_where_pytorch_frees_what_cublas_works_in(recorded, monkeypatch):
    """As `torch.compile` does in its mode "reduce-overhead": a recording would write to memory of somebody else's."""
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", sys)
    engine = build(plan=PLAIN)
    expected, num_recorded = generate(engine), len(recorded)
    assert engine._verify._recordings.replays is None and not engine.cache.num_bytes
    assert generate(engine) == expected and len(recorded) == 2 * num_recorded


class Owner:
    """What records a call, beside a storage that says what it was told."""

    num_bytes = 40

    def __init__(self, recorder, device):
        self.store, self.kept = torch.zeros(1, 1), []
        self.device, self.recorder = device, recorder
        self.recordings = KeptRecordings(self, self)

    def open_recorder(self):
        return self.recorder

    def clear(self, *, keeps_storage=False):
        self.kept.append(keeps_storage)

    def run(self, inputs):
        return (inputs + 1,)

    def list_stores(self):
        return [self.store]

    def begin(self, place):
        self.recordings.begin(place, self.run, self.list_stores)
        return self.recordings.replays

    def call(self):
        return self.recordings.replays("key", lambda: torch.zeros(1), lambda inputs: None)


class PlainRecorder:
    num_bytes, error = 60, None

    def record(self, run):
        if self.error is not None:
            raise self.error
        return Recording(first=run(), replay=lambda: None, outputs=())

    def count_free_bytes(self):
        return 2**40


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setattr(memory, "find_available_bytes", lambda _: 1600)
    return Owner(PlainRecorder(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("first", "second", "is_kept"), [("here", "here", True), ("here", "there", False), ("here", None, False)]
)
def test_what_was_recorded_is_kept_for_the_same_place_alone(first, second, is_kept, owner):
    replays = owner.begin(first)
    owner.call()
    owner.recordings.end()
    assert owner.recordings.replays is replays
    assert (owner.begin(second) is replays) == is_kept
    assert owner.kept == [False, True, is_kept]


def test_what_was_recorded_without_an_end_is_dropped(owner):
    """Beside caches that were made to measure, which are gone."""
    replays = owner.begin("here")
    owner.call()
    assert owner.begin("here") is not replays and not any(owner.kept)


def test_a_place_that_is_not_known_is_that_of_no_rollout(owner):
    replays = owner.begin(None)
    owner.call()
    assert owner.begin(None) is not replays, "a rollout that begins anew without an end"
    owner.call()
    owner.recordings.end()
    assert owner.recordings.replays is None and not any(owner.kept)


@pytest.mark.parametrize(
    ("available", "is_kept"), [(1600, True), (1599, False), (None, False)], ids=["little", "much", "not known"]
)
def test_recordings_and_storage_stay_where_both_are_little(available, is_kept, owner, monkeypatch):
    monkeypatch.setattr(memory, "find_available_bytes", lambda _: available)
    owner.begin("here")
    owner.call()
    owner.recordings.end()
    assert (owner.recordings.replays is not None, owner.kept[-1]) == (is_kept, is_kept)


def test_nothing_stays_where_nothing_was_recorded_or_can_be(owner):
    owner.recordings.end()  # of a rollout that did not begin
    owner.begin("here")
    owner.recordings.end()
    assert owner.recordings.replays is None
    owner.begin("here")
    owner.call()
    owner.recorder.error = torch.OutOfMemoryError("no more")
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert owner.recordings.replays("other key", lambda: torch.zeros(1), lambda inputs: None) is None
    assert owner.call() is None and not len(owner.recordings.replays), "what was recorded has gone, too"
    owner.recordings.end()
    assert owner.recordings.replays is None and not any(owner.kept)


def test_an_end_that_fails_leaves_nothing(owner, monkeypatch):
    owner.begin("here")
    owner.call()
    monkeypatch.setattr(memory, "find_available_bytes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        owner.recordings.end()
    assert owner.recordings.replays is None and not any(owner.kept)
    owner.begin("here")
    owner.recordings.forget()
    monkeypatch.setattr(memory, "find_available_bytes", lambda _: 1600)
    owner.recordings.end()
    assert not any(owner.kept)


def test_storage_at_the_same_address_is_another_one_if_it_is_larger(owner):
    """Its layers stand elsewhere."""
    memory_of_both, num_recorded = torch.zeros(1, 4), []
    record = owner.recorder.record
    owner.recorder.record = lambda run: (num_recorded.append(run), record(run))[1]
    for width in (2, 3):
        owner.store = memory_of_both[:, :width]
        owner.begin("here")
        owner.call()
        owner.recordings.end()
    assert len(num_recorded) == 2


def test_kept_storage_is_cleaned_once(monkeypatch):
    """Not again as more of it comes into use, with rows in it."""
    monkeypatch.setattr(cache, "_LEAST_BLOCKS", 1)
    own = TargetModel(build_model("llama", F32, **SIZES)).build_cache(with_features=False)
    for keeps_storage in (True, False):
        own.begin()
        own.add_rows(1)
        own.reserve(0, 1)
        own.keys.data[:, 0] = 5.0
        own.reserve(0, 4 * BLOCK_SIZE)
        assert (own.keys.data[:, 0] == 5.0).all()
        own.clear(keeps_storage=keeps_storage)
