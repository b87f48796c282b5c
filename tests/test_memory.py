"""Memory: a bound is kept by letting the youngest wait, with the same tokens afterwards, and nothing grows."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from conftest import SyntheticClockPlanner, build_model, lose_memory_behind_drafts, shared_model
from fastgrpo import admission, memory
from fastgrpo.attention import ForwardBatch
from fastgrpo.blocks import BLOCK_SIZE, count_blocks
from fastgrpo.cache import SlotCache
from fastgrpo.drafters import Drafter, build_drafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.lengths import LengthPredictor
from fastgrpo.memory import describe_bytes, find_available_bytes, is_out_of_memory
from fastgrpo.model import TargetModel
from fastgrpo.planner import FixedPlanner, Planner
from fastgrpo.sampling import stream_key
from fastgrpo.types import Completion, SamplingParams, Sequence, SpeculationPlan
from test_engine_laws import HAS_OWN_BITS, TREE, assert_nothing_is_left, build_test_drafter

GROUP = [(7 * index) % 120 for index in range(70)]
PROMPTS = [GROUP, [7], GROUP, [8, 8], GROUP, [5, 4, 3, 2, 1], [7]]
PARAMS = [SamplingParams(seed=3, stream=index, max_tokens=190 - 25 * index) for index in range(len(PROMPTS))]
SHORT = [replace(params, max_tokens=8) for params in PARAMS]
NUM_BLOCKS = 7  # the longest sequence comes to five
FEWER_BLOCKS = 6  # where a row of the drafter is as large as the target's: fewer get in, and fit for longer
PLANNERS: dict[str, Callable[[], Planner]] = {
    "off": FixedPlanner,
    "tree": lambda: FixedPlanner(fixed=TREE),
    "auto": SyntheticClockPlanner,
}


def build_engine(
    drafter: str | Drafter, plan: str = "tree", num_blocks: int | None = None, dtype: torch.dtype = torch.float32
) -> Engine:
    """An engine for long sequences that may hold so many blocks and checks its books after every step."""
    model = shared_model("llama", dtype, max_position_embeddings=512)
    if isinstance(drafter, str):
        drafter = build_test_drafter(drafter, model, list(zip(PROMPTS, PARAMS, strict=True)))
    engine = Engine(model, drafter=drafter, speculation="off")
    if num_blocks is not None:
        bound = num_blocks * compute_block_bytes(engine) + engine.cache.block_bytes - 1  # the rest is no whole block
        engine = Engine(model, drafter=drafter, speculation="off", max_cache_bytes=bound)
    engine.planner = PLANNERS[plan]()
    engine.on_step.append(lambda record: engine.check())
    return engine


def compute_block_bytes(engine: Engine) -> int:
    """A block of the target's rows and of the drafter's."""
    return BLOCK_SIZE * (engine.cache.position_bytes + engine.drafter.position_bytes)


@functools.cache
def generate_freely(dtype: torch.dtype) -> list[Completion]:
    """Plain decoding with all the memory it wants."""
    engine = build_engine("none", "off", dtype=dtype)
    completions = engine.generate(PROMPTS, PARAMS)
    assert sum(record.num_preempted for record in engine.records) == 0
    return completions


# -- the bound -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full")
@pytest.mark.parametrize(
    ("drafter", "plan", "dtype"),
    [
        ("none", "off", torch.float64),
        ("eagle_untrained", "tree", torch.float64),
        ("none", "off", torch.float32),
        *((drafter, plan, torch.float32) for drafter in ("ngram", "eagle_untrained") for plan in ("tree", "auto")),
        *(pytest.param(drafter, "tree", torch.bfloat16, marks=HAS_OWN_BITS) for drafter in ("none", "eagle_untrained")),
        ("lm", "tree", torch.float32),
    ],
)
def test_who_had_to_wait_says_the_same(drafter, plan, dtype):
    engine = build_engine(drafter, plan, FEWER_BLOCKS if drafter == "lm" else NUM_BLOCKS, dtype)
    engine.on_step.append(lambda record: taken.append(engine.cache.used_bytes))
    taken: list[int] = []
    completions = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in completions] == [c.token_ids for c in generate_freely(dtype)]
    assert [c.finish_reason for c in completions] == [c.finish_reason for c in generate_freely(dtype)]
    assert sum(record.num_preempted for record in engine.records) > 0
    assert max(*taken, *(record.cache_bytes for record in engine.records)) <= engine.cache.peak_bytes
    assert engine.cache.peak_bytes <= engine.admission.max_bytes
    assert_nothing_is_left(engine)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full")
@pytest.mark.parametrize("drafter", ["none", "eagle_untrained"])
def test_nobody_is_preempted_before_those_let_in_last_have_had_a_further_block(drafter):
    """Else prompts and completions would be computed again and again."""
    engine = build_engine(drafter, "off", NUM_BLOCKS)
    engine.generate(PROMPTS, PARAMS)
    num_waiting, last_in, gaps = len(PROMPTS), 0, []
    for step, record in enumerate(engine.records):
        if record.num_preempted:
            gaps.append(step - last_in)
        if record.num_waiting < num_waiting + record.num_preempted:
            last_in = step
        num_waiting = record.num_waiting
    assert gaps and min(gaps) >= BLOCK_SIZE, gaps


@pytest.mark.parametrize("plan", ["tree", "auto"])
def test_where_the_cache_has_little_room_trees_are_smaller(plan):
    """The same is said; with a block more trees are as large as ever."""
    prompt, params, sizes = [[5, 6, 7]], SamplingParams(seed=1, max_tokens=2 * BLOCK_SIZE - 2), {}
    expected = build_engine("none", "off").generate(prompt, params)[0].token_ids
    for num_blocks in (2, 3):
        engine = build_engine("ngram", plan, num_blocks)
        assert engine.generate(prompt, params)[0].token_ids == expected
        last = [record for record in engine.records if record.num_read > 2 * BLOCK_SIZE - TREE.tree_size]
        assert all(record.num_read + record.num_tokens <= num_blocks * BLOCK_SIZE for record in last)
        sizes[num_blocks] = {record.plan.tree_size for record in last}
    if plan == "tree":
        assert sizes[3] == {TREE.tree_size} and len(sizes[2]) > 1 and 0 < max(sizes[2]) < TREE.tree_size


class MemoryMeter:
    """The most that blocks of several caches came to at once, looked at whenever one is taken."""

    def __init__(self, *caches: SlotCache) -> None:
        self.caches, self.peak_bytes = caches, 0
        for cache in caches:
            cache._pool.take = functools.partial(self._take, cache._pool.take)

    def _take(self, take: Callable[[], int]) -> int:
        block = take()
        self.peak_bytes = max(self.peak_bytes, sum(cache.used_bytes for cache in self.caches))
        return block


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full", "ignore:memory ran out")
@pytest.mark.parametrize("num_failures", [0, 1])
@pytest.mark.parametrize("drafter", ["eagle_untrained", "lm"])
def test_the_bound_counts_the_rows_of_the_drafter(drafter, num_failures):
    """Both together at every moment, nodes under way included, also after a draft for which there was no memory."""
    engine = build_engine(drafter, "tree", FEWER_BLOCKS if drafter == "lm" else NUM_BLOCKS)
    rows = engine.drafter.cache if drafter == "lm" else engine.drafter._rows.cache
    failures = [MemoryError("no room")] * num_failures
    meter, reserve = MemoryMeter(engine.cache, rows), rows.reserve

    def fail_late(row: int, length: int) -> None:
        reserve(row, length)
        if row and failures:
            raise failures.pop()

    rows.reserve = fail_late
    completions = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in completions] == [c.token_ids for c in generate_freely(torch.float32)]
    assert any(not record.plan.is_plain for record in engine.records) and not failures
    assert sum(record.num_preempted for record in engine.records) > 0
    assert rows.block_bytes == BLOCK_SIZE * engine.drafter.position_bytes > 0
    assert engine.cache.peak_bytes < meter.peak_bytes <= engine.admission.max_bytes


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("drafter", ["eagle_untrained", "lm"])
def test_a_draft_of_more_nodes_than_are_verified_keeps_to_the_bound(drafter):
    """Its nodes would take a second block of the drafter's row where those verified still stand in the first."""
    engine = build_engine(drafter)
    engine.planner = FixedPlanner(fixed=SpeculationPlan(depth=5, width=6, num_draft_tokens=5))
    engine.admission.max_bytes = compute_block_bytes(engine)
    meter = MemoryMeter(engine.cache, engine.drafter.cache if drafter == "lm" else engine.drafter._rows.cache)
    engine.generate([[7]], SamplingParams(max_tokens=BLOCK_SIZE))
    assert any(not record.plan.is_plain for record in engine.records)
    assert meter.peak_bytes == engine.admission.max_bytes


def test_the_rows_of_two_drafters_add_up():
    target = TargetModel(shared_model("llama"))
    auto, eagle = build_drafter("auto", target), build_drafter("eagle", target)
    assert auto.position_bytes == eagle.position_bytes == eagle._rows.cache.position_bytes > 0
    assert build_drafter("block", target).position_bytes > 0
    assert build_drafter("ngram", target).position_bytes == build_drafter("none", target).position_bytes == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_fits_only_without_the_rows_of_the_drafter_is_refused():
    params = SamplingParams(max_tokens=2 * BLOCK_SIZE + 1 - len(GROUP))
    engine = build_engine("eagle_untrained", "tree", 2)
    needed = 2 * compute_block_bytes(engine)
    engine.admission.max_bytes = needed - 1
    assert 2 * engine.cache.block_bytes < needed
    with pytest.raises(ValueError, match=rf" 64 tokens would fit: .* raise max_cache_bytes to {needed}$"):
        engine.generate([GROUP], params)
    engine.admission.max_bytes = needed
    assert len(engine.generate([GROUP], params)[0].token_ids) == params.max_tokens


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full")
def test_listeners_and_lengths_hear_of_every_sequence_once_and_features_are_whole():
    rollouts: dict[bool, list[FinishedRollout]] = {}
    for is_bound in (False, True):
        engine = build_engine("eagle_untrained", "tree", NUM_BLOCKS if is_bound else None)
        engine.scheduler.lengths = LengthPredictor(shared_decay=1.0)
        finished = rollouts[is_bound] = []
        engine.on_finish.append(finished.append)
        completions = engine.generate(PROMPTS, PARAMS)
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        assert engine.scheduler.lengths.state_dict()["all"] == [num_tokens, len(PROMPTS)]
        assert len(finished) == len(PROMPTS)
        assert (sum(record.num_preempted for record in engine.records) > 0) == is_bound
        assert sum(record.num_emitted for record in engine.records) == num_tokens
    free, bound = (sorted(each, key=lambda r: (r.prompt_ids, r.token_ids)) for each in rollouts.values())
    for one, other in zip(free, bound, strict=True):
        assert one.token_ids == other.token_ids
        assert len(other.features) == len(other.prompt_ids) + len(other.token_ids) - 1
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full")
@pytest.mark.parametrize("drafter", ["ngram", "eagle_untrained"])
def test_late_arrivals_wait_for_memory(drafter):
    engine = build_engine(drafter, "tree", NUM_BLOCKS)
    arriving = [
        Sequence(
            request_id=index,
            prompt_ids=prompt,
            params=params,
            max_tokens=params.max_tokens,
            stream_key=stream_key(params.seed, params.stream),
        )
        for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    sequences, num_preempted, num_steps = list(arriving), 0, 0
    with engine.target.rollout_mode():
        engine.planner.begin()
        engine.drafter.begin()
        engine.admission.begin(arriving)
        while arriving or engine.scheduler.has_work:
            if arriving and num_steps % 5 == 0:
                engine.scheduler.add(arriving.pop(0))
            record = engine.step()
            num_steps += 1
            engine.check()
            num_preempted += record.num_preempted
    assert num_preempted > 0
    assert [sequence.token_ids for sequence in sequences] == [c.token_ids for c in generate_freely(torch.float32)]


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_draft_that_does_not_fit_is_left_out():
    """The bound is that of one sequence to its last token."""
    params = SamplingParams(max_tokens=2 * BLOCK_SIZE + 1 - len(GROUP))
    free = build_engine("ngram").generate([GROUP], params)
    engine = build_engine("ngram", "tree", 2)
    assert [c.token_ids for c in engine.generate([GROUP], params)] == [c.token_ids for c in free]
    plans = [record.plan for record in engine.records]
    assert TREE in plans and plans[-1].is_plain
    assert engine.cache.peak_bytes == 2 * engine.cache.block_bytes


def test_what_can_never_fit_is_refused_at_once():
    params = SamplingParams(max_tokens=2 * BLOCK_SIZE + 2 - len(GROUP))
    engine = build_engine("none", "off", 2)
    engine.on_step.append(lambda record: pytest.fail("something was generated"))
    block = engine.cache.block_bytes
    message = (
        f"request 1 may come to 129 tokens (a prompt of 70 and 60 more): they need {describe_bytes(3 * block)} of "
        f"cache ({describe_bytes(block / 64)} a token), and the limit is {describe_bytes(3 * block - 1)}. 128 "
        f"tokens would fit: lower max_tokens, shorten the prompt, or raise max_cache_bytes to {3 * block}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.generate([[7], GROUP], params)
    engine.on_step.pop()
    assert_nothing_is_left(engine)
    assert len(engine.generate([[7], GROUP[:-1]], params)[1].token_ids) == params.max_tokens


def test_of_several_that_do_not_fit_the_longest_is_named():
    """So that the bound it asks for is enough."""
    params = [SamplingParams(max_tokens=count) for count in (BLOCK_SIZE + 5, 3 * BLOCK_SIZE, 2 * BLOCK_SIZE)]
    engine = build_engine("eagle_untrained", "off", 1)
    with pytest.raises(ValueError, match=r"request 1 may come to 192 tokens .* to \d+$") as caught:
        engine.generate([[7]] * 3, params)
    engine.admission.max_bytes = int(str(caught.value).split()[-1])
    lengths = [len(completion.token_ids) for completion in engine.generate([[7]] * 3, params)]
    assert lengths == [each.max_tokens for each in params]


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_a_bound_it_is_what_is_free(monkeypatch):
    engine = build_engine("none", "off")
    expected = generate_freely(torch.float32)
    free = int(NUM_BLOCKS * engine.cache.block_bytes / 0.8) + 1
    monkeypatch.setattr(admission, "find_available_bytes", lambda device: free)
    with pytest.warns(UserWarning, match=r"the cache is full with \d sequences running: the youngest wait") as caught:
        completions = engine.generate(PROMPTS, PARAMS)
    said = str(caught[0].message)
    assert len(caught) == 1 and f"of {describe_bytes(NUM_BLOCKS * engine.cache.block_bytes)}" in said
    longest = max(len(prompt) + each.max_tokens - 1 for prompt, each in zip(PROMPTS, PARAMS, strict=True))
    fitting = NUM_BLOCKS // count_blocks(longest)
    assert fitting == 1 and f"1 sequence of {longest} tokens would fit: max_num_seqs=1, or a larger" in said
    again = build_engine("none", "off", NUM_BLOCKS)
    again.scheduler.max_num_seqs = fitting
    again.generate(PROMPTS, PARAMS)
    assert not sum(record.num_preempted for record in again.records)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert engine.cache.peak_bytes <= NUM_BLOCKS * engine.cache.block_bytes


# -- memory runs out -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("place", ["forward", "propose"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), MemoryError("no room"), OSError(12, "no room")], ids=lambda e: type(e)
)
def test_where_memory_runs_out_fewer_go_on(place, error):
    """Whatever fails with more than two sequences, every one ends with its tokens."""
    engine = build_engine("eagle_untrained", "tree")
    owner = engine.target if place == "forward" else engine.drafter
    work, sizes = getattr(owner, place), []

    def fail(first: object, second: object) -> object:
        sizes.append(len(first.lengths if place == "forward" else first.sequences))
        if sizes[-1] > 2:
            raise error
        return work(first, second)

    setattr(owner, place, fail)
    message = r"memory ran out with 7 sequences running \(.*no room.*\): half of them wait, and go on with the same"
    with pytest.warns(UserWarning, match=message) as caught:
        completions = engine.generate(PROMPTS, SHORT)
    assert len(caught) == 1
    assert "3 sequences of 77 tokens may fit: max_num_seqs=3" in str(caught[0].message)
    assert [c.token_ids for c in completions] == [c.token_ids[:8] for c in generate_freely(torch.float32)]
    assert sum(size > 2 for size in sizes) <= 3, "no more than fitted are tried again"
    assert_nothing_is_left(engine)


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_no_more_run_than_the_half_that_memory_was_left_to():
    engine, sizes = build_engine("none", "off"), []
    decode = engine.target.decode

    def fail_beyond_three(batch: ForwardBatch, cache: SlotCache) -> object:
        sizes.append(len(batch.lengths))
        if sizes[-1] > 3:
            raise MemoryError("no room")
        return decode(batch, cache)

    engine.target.decode = fail_beyond_three
    completions = engine.generate(PROMPTS, SHORT)
    assert [c.token_ids for c in completions] == [c.token_ids[:8] for c in generate_freely(torch.float32)]
    assert [size for size in sizes if size > 3] == [7] and max(sizes[1:]) == 3


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:the cache is full", "ignore:memory ran out")
@pytest.mark.parametrize("due", ["preempted", "prefilled"])
def test_what_a_failed_attempt_did_is_counted(due):
    """Who had to go before memory ran out, and the tokens that had been computed by then."""
    engine = build_engine("none", "off", NUM_BLOCKS)
    counts = {"preempted": 0, "prefilled": 0, "failed": 0}
    preempt, decode, fill_chunks = engine.scheduler.preempt, engine.target.decode, engine.prefiller._fill_chunks

    def count_preempted(slot: int) -> Sequence:
        counts["preempted"] += 1
        return preempt(slot)

    def count_prefilled(slots: list[int], chunks: list[list[int]]) -> None:
        fill_chunks(slots, chunks)
        counts["prefilled"] += sum(map(len, chunks))

    def fail_once(batch: ForwardBatch, cache: SlotCache) -> object:
        if counts[due] and not counts["failed"]:
            counts["failed"] += 1
            raise MemoryError("no room")
        return decode(batch, cache)

    engine.scheduler.preempt, engine.prefiller._fill_chunks = count_preempted, count_prefilled
    engine.target.decode = fail_once
    completions = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in completions] == [c.token_ids for c in generate_freely(torch.float32)]
    assert counts["failed"]
    assert sum(record.num_preempted for record in engine.records) == counts["preempted"]
    assert sum(record.num_prefilled for record in engine.records) == counts["prefilled"]


def test_one_sequence_goes_on_without_a_draft_before_it_gives_up():
    engine = build_engine("ngram")
    propose = engine.drafter.propose
    engine.drafter.propose = lambda context, plan: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    completions = engine.generate([GROUP], SHORT[0])
    assert completions[0].token_ids == generate_freely(torch.float32)[0].token_ids[:8]
    assert all(record.plan.is_plain for record in engine.records)
    engine.drafter.propose = propose
    engine.target.forward = lambda batch, cache: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    with pytest.raises(
        MemoryError,
        match=r"with one sequence of 70 tokens running and .* of cache in use \(no room\): \d+ of them fitted; ",
    ):
        engine.generate([GROUP], SHORT[0])
    del engine.target.forward
    assert_nothing_is_left(engine)
    assert engine.generate([GROUP], SHORT[0])[0].token_ids == generate_freely(torch.float32)[0].token_ids[:8]


@pytest.mark.parametrize("due", ["merge", "_fuse", "begin"])
def test_memory_that_ends_before_the_first_step_says_what_was_copied(due, monkeypatch):
    """While adapters are merged, weights are laid out, or a drafter's are; model and engine are as they were."""
    torch.manual_seed(0)
    adapted = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build_model("llama", torch.float32), adapted)
    engine = Engine(model, drafter="eagle", speculation=TREE)
    expected = [completion.token_ids for completion in engine.generate([[7], [3, 1]], SHORT[0])]
    before = [(weight, weight.data_ptr(), weight.clone()) for weight in model.parameters()]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    owner = {"merge": LoraLinear, "_fuse": engine.target, "begin": engine.drafter}[due]
    with monkeypatch.context() as patch:
        patch.setattr(owner, due, lambda *args: (_ for _ in ()).throw(MemoryError()))
        message = (
            rf"before the first step \(MemoryError\): .* {re.escape(describe_bytes(num_bytes))} at most .* are free"
        )
        with pytest.raises(MemoryError, match=message):
            engine.generate([[7], [3, 1]], SHORT[0])
    assert_nothing_is_left(engine)
    assert all(weight.data_ptr() == place and torch.equal(weight, value) for weight, place, value in before)
    assert [completion.token_ids for completion in engine.generate([[7], [3, 1]], SHORT[0])] == expected


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    engine = build_engine("none", "off")
    for error in (RuntimeError("shapes differ"), OSError(2, "no such file")):
        engine.target.launch = lambda batch, cache, error=error: (_ for _ in ()).throw(error)
        with pytest.raises(type(error), match=re.escape(str(error))):
            engine.generate([[7]], SHORT[0])
    on_device = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
    for words in ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", *on_device):
        assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(ValueError(words))


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_prompts_that_are_kept_go_before_a_rollout_is_given_up():
    """One runs at a time, and the prompt of the first is kept for the third while the second needs its room."""
    prompts, params = [GROUP * 5, [7], GROUP * 5], [SamplingParams(max_tokens=count) for count in (4, 100, 4)]
    expected = build_engine("none", "off").generate(prompts, params)
    engine = build_engine("none", "off")
    engine.scheduler.max_num_seqs = 1
    pool, take = engine.cache._pool, engine.cache._pool.take

    def take_one_of_few() -> int:
        if pool.num_taken >= 6:
            raise MemoryError("no room")
        return take()

    pool.take = take_one_of_few
    assert [c.token_ids for c in engine.generate(prompts, params)] == [c.token_ids for c in expected]


@pytest.mark.filterwarnings("ignore:memory ran out")
@pytest.mark.parametrize("num_good", range(0, 24, 3))
def test_tokens_that_there_is_no_memory_to_count_are_emitted_all_the_same(num_good, monkeypatch):
    monkeypatch.setattr("fastgrpo.drafters.ngram._MOST_COLLECTED", 1)
    engine = build_engine("ngram", "tree")
    count, due = engine.drafter.table.add, [num_good]

    def fail_once(*args):
        due[0] -= 1
        if due[0] == -1:
            raise MemoryError("no room")
        count(*args)

    engine.drafter.table.add = fail_once
    expected = [completion.token_ids[:8] for completion in generate_freely(torch.float32)]
    assert [completion.token_ids for completion in engine.generate(PROMPTS, SHORT)] == expected


@pytest.mark.parametrize("drafter", ["eagle_untrained"])
def test_what_was_drafted_before_memory_ran_out_is_drafted_again(drafter):
    """A prompt that is kept goes first, and the step is made again as it was planned."""
    expected = build_engine("none", "off").generate([GROUP] * 3, SHORT[0])
    engine = build_engine(drafter, "tree")
    engine.scheduler.max_num_seqs = 1
    failures = lose_memory_behind_drafts(engine)
    assert [c.token_ids for c in engine.generate([GROUP] * 3, SHORT[0])] == [c.token_ids for c in expected]
    assert not failures


def test_a_learner_does_without_the_features_that_there_is_no_memory_for():
    engine, heard = build_engine("eagle_untrained"), []
    expected = [completion.token_ids for completion in engine.generate(PROMPTS, SHORT)]
    engine.on_finish.append(heard.append)
    read, failures = engine.cache.read_features, [torch.OutOfMemoryError("no room")]

    def fail_once(row: int) -> torch.Tensor | None:
        if failures:
            raise failures.pop()
        return read(row)

    engine.cache.read_features = fail_once
    assert [completion.token_ids for completion in engine.generate(PROMPTS, SHORT)] == expected
    assert [rollout.features is None for rollout in heard] == [True] + [False] * (len(PROMPTS) - 1)


# -- how much is in use --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_rollout_holds_its_live_tokens_and_a_block_a_sequence():
    """Of the target's cache and of the head's, at every step; siblings share their prompt."""
    engine = build_engine("eagle_untrained", "tree")
    shares = []

    def look(record: object) -> None:
        for cache in (engine.cache, engine.drafter._rows.cache):
            token_bytes, num_rows = cache.block_bytes // BLOCK_SIZE, len(cache.lengths)
            assert cache.used_bytes <= 1.05 * sum(cache.lengths) * token_bytes + num_rows * cache.block_bytes
        if engine.cache.lengths:
            shares.append(engine.cache.used_bytes / (sum(map(count_blocks, engine.cache.lengths)) * cache.block_bytes))

    engine.on_step.append(look)
    engine.generate([GROUP] * 8, SamplingParams(max_tokens=60))
    expected = [count_blocks(len(GROUP) + 1) * 8 - 7]  # the first block of eight prompts is one
    assert engine.records[0].cache_bytes == expected[0] * engine.cache.block_bytes
    assert engine.cache.peak_bytes == max(record.cache_bytes for record in engine.records)
    engine.generate([GROUP], SamplingParams(max_tokens=2))
    assert engine.cache.peak_bytes == count_blocks(len(GROUP) + 1) * engine.cache.block_bytes, (
        "each rollout has its own"
    )


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_prompt_is_kept_for_those_who_wait_and_no_longer():
    """One after the other: the prompt is computed once, and the last has the cache for itself."""
    engine = build_engine("none", "off")
    engine.scheduler.max_num_seqs = 1
    beyond = []

    def look(record: object) -> None:
        own = sum(map(count_blocks, engine.cache.lengths))
        beyond.append((record.num_waiting, engine.cache.used_bytes // engine.cache.block_bytes - own))

    engine.on_step.append(look)
    engine.generate([GROUP] * 4, SamplingParams(max_tokens=5))
    assert sum(record.num_prefilled for record in engine.records) == len(GROUP) - 1
    assert {blocks for num_waiting, blocks in beyond if not num_waiting} == {0}
    assert max(blocks for _, blocks in beyond) <= count_blocks(len(GROUP))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("num_blocks", "max_tokens"), [(2, 100), (4, 150)], ids=["to_enter", "to_grow"])
def test_a_prompt_that_is_kept_gives_way_before_a_sequence_does(num_blocks, max_tokens):
    """It stands aside for the last of three, and is computed again when the second has had the room."""
    params = [SamplingParams(max_tokens=count, stream=index) for index, count in enumerate((5, max_tokens, 5))]
    prompts = [GROUP, [7], GROUP]
    free, engine = build_engine("none", "off"), build_engine("none", "off", num_blocks)
    engine.scheduler.max_num_seqs = free.scheduler.max_num_seqs = 1
    expected = [completion.token_ids for completion in free.generate(prompts, params)]
    assert [completion.token_ids for completion in engine.generate(prompts, params)] == expected
    assert sum(record.num_prefilled for record in free.records) == len(GROUP) - 1
    assert sum(record.num_prefilled for record in engine.records) == 2 * (len(GROUP) - 1)
    assert sum(record.num_preempted for record in engine.records) == 0


_MANY_ROLLOUTS = """
import gc, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tiny import save_tiny_model
from fastgrpo import Engine, SamplingParams, SpeculationPlan
torch.set_num_threads(1)
plan = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)
engine = Engine.from_pretrained(save_tiny_model(Path(sys.argv[2])), drafter="eagle-new", speculation=plan)
prompts = [list(range(2, 72))] * 3 + [[5, 6, 7]] * 2
sizes, peaks = [], set()
gc.collect()
gc.freeze()  # what libraries hold is not looked through sixty times
for rollout in range(60):
    engine.generate(prompts, SamplingParams(max_tokens=8, seed=0))
    gc.collect()
    peaks.add((engine.cache.peak_bytes, engine.cache.num_bytes, engine.drafter._rows.cache.peak_bytes))
    sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
print(len(peaks), max(sizes[10:]) - max(sizes[:10]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_memory_does_not_grow_over_fifty_rollouts(tmp_path):
    command = [sys.executable, "-c", _MANY_ROLLOUTS, str(Path(__file__).parent), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    num_peaks, growth = map(int, answer.stdout.split())
    assert num_peaks == 1, "equal rollouts take equal blocks"
    assert growth < 4e6


def test_what_is_free_is_read_from_the_system(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    if Path("/proc/meminfo").is_file():
        assert 0 < find_available_bytes(cpu) < 2**50
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert find_available_bytes(cpu) is None and find_available_bytes(torch.device("meta")) is None
    (tmp_path / "meminfo").write_text("MemTotal:       24000 kB\nMemAvailable:   20000 kB\n")
    assert find_available_bytes(cpu) == 20000 * 1024
    (tmp_path / "memory.max").write_text("10000000\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000000\ninactive_file 1000000\nactive_file 500000\n")
    assert find_available_bytes(cpu) == 4500000
    (tmp_path / "memory.max").write_text("max\n")
    assert find_available_bytes(cpu) == 20000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # another process takes its cache from the same memory
    assert find_available_bytes(cpu) == 10000 * 1024
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=OSError(24, "Too many open files")))
    assert find_available_bytes(cpu) is None, "a rollout that has ended asks, and is not lost for it"


def test_bytes_in_words():
    assert [describe_bytes(n) for n in (512, 12 * 2**10, 410 * 2**20, 3.25 * 2**30)] == [
        "0.5 KiB", "12 KiB", "410 MiB", "3.25 GiB",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the cache is full")
def test_the_longest_go_first_where_memory_and_not_slots_decide_who_waits():
    engine = build_engine("none", "off", num_blocks=NUM_BLOCKS)
    prompts = [[index + 1] * 9 for index in range(16)]
    for index, prompt in enumerate(prompts):
        engine.scheduler.lengths.observe(prompt, 300 if index == 15 else 10)
    begun: list[int] = []
    admit = engine.scheduler.admit
    engine.scheduler.admit = lambda *may: [begun.append(s.request_id) or s for s in admit(*may)]
    engine.generate(prompts, [SamplingParams(stream=index, max_tokens=20) for index in range(16)])
    assert len(begun) == 16 and engine.records[0].num_waiting > 0
    assert begun[0] == 15


def test_a_prompt_beside_longer_rows_is_given_no_more_of_a_table_than_it_fills(monkeypatch):
    """Attention on a GPU makes room for all positions that a table could hold, for each token and head."""
    engine, widths = build_engine("none", "off"), []
    engine.scheduler.max_num_seqs = 2
    forward = engine.target.forward

    def look(batch: ForwardBatch, cache: SlotCache) -> object:
        widths.append((batch.blocks.shape[1], count_blocks(int((batch.lengths + batch.num_nodes).max()))))
        return forward(batch, cache)

    monkeypatch.setattr(engine.target, "forward", look)
    params = [SamplingParams(max_tokens=count) for count in (40, 4, 4)]
    engine.generate([3 * GROUP, [7, 8], [9, 8, 7]], params)
    assert widths == [(4, 4), (1, 1)]
