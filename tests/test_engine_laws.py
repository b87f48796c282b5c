"""Same seed, same tokens: whatever drafts, plans, batches and orders, and against a plain Hugging Face loop."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from conftest import (
    MAX_POSITION,
    VOCAB_SIZE,
    AlwaysWrongDrafter,
    OracleDrafter,
    SyntheticClockPlanner,
    build_answers,
    build_model,
    expected_completion,
    expected_tokens,
    shared_model,
)
from fastgrpo import prefill as prefill_module
from fastgrpo import timing
from fastgrpo.attempt import Attempt
from fastgrpo.attention import ForwardBatch
from fastgrpo.drafters import Drafter, build_drafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.lm import LmDrafter
from fastgrpo.drafters.ngram import NgramDrafter
from fastgrpo.drafters.none import NoDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.kernels import cpu, linear
from fastgrpo.learner import Learner
from fastgrpo.lengths import LengthPredictor
from fastgrpo.model import TargetModel
from fastgrpo.planner import SPECULATION, BanditPlanner, FixedPlanner, PaperPlanner, PlanInputs, Planner
from fastgrpo.sampling import stream_key
from fastgrpo.tree import Draft, check_draft
from fastgrpo.types import PLAIN, SamplingParams, Sequence, SpeculationPlan, StepRecord

CHAIN = SpeculationPlan(depth=4, width=1, num_draft_tokens=4)
TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=10)
SHARED = SpeculationPlan(depth=3, width=3, num_draft_tokens=4, most_draft_tokens=20)
PLANNERS: dict[str, Callable[[], Planner]] = {
    "off": FixedPlanner,
    "chain": lambda: FixedPlanner(fixed=CHAIN),
    "tree": lambda: FixedPlanner(fixed=TREE),
    "shared": lambda: FixedPlanner(fixed=SHARED),
    "paper": lambda: PaperPlanner(capacity=20),
    "paper-own": PaperPlanner.with_own_capacity,
    "bandit": lambda: BanditPlanner(max_num_tokens=256, epsilon=0.5),
    "auto": SyntheticClockPlanner,
}
HAS_OWN_BITS = pytest.mark.skipif(
    not cpu.is_available() or linear.find_layout(torch.bfloat16) is not linear.OwnLayout,
    reason="in half precision rows have no own bits here",
)
DRAFTERS = ("none", "ngram", "eagle_untrained", "eagle_trained", "lm", "always_wrong", "oracle")
FAMILIES = ("llama", "qwen2", "qwen3")

GROUP = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [GROUP, [7], GROUP, [8, 8], list(range(60)), GROUP, [7], [5, 4, 3, 2, 1], GROUP]
_SAMPLING = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.9),
]
SETTINGS = [replace(params, seed=index, max_tokens=11) for index, params in enumerate(_SAMPLING)]


def build_requests(setting: int | None) -> list[tuple[list[int], SamplingParams]]:
    """The prompts, each with its noise stream; `None` mixes settings, limits and stop tokens in one batch."""
    if setting is not None:
        return [(prompt, replace(SETTINGS[setting], stream=index)) for index, prompt in enumerate(PROMPTS)]
    stops = [(), tuple(range(0, VOCAB_SIZE, 9)), tuple(range(60))]
    return [
        (prompt, replace(SETTINGS[i % len(SETTINGS)], stream=i, max_tokens=1 + 3 * i, stop_token_ids=stops[i % 3]))
        for i, prompt in enumerate(PROMPTS)
    ]


@functools.cache
def build_trained_drafter(model: PreTrainedModel) -> EagleDrafter:
    """A head that has learnt from a few rollouts; draft from copies of it."""
    drafter = EagleDrafter(TargetModel(model), draft_vocab_size=80)
    engine = Engine(model, drafter=drafter, speculation="off")
    learner = Learner(drafter)
    engine.on_finish.append(learner.add)
    for seed in range(3):
        engine.generate(PROMPTS, SamplingParams(seed=1000 + seed, max_tokens=24))
        learner.learn(budget_s=0.0)
    return drafter


def build_test_drafter(name: str, model: PreTrainedModel, requests: list[tuple[list[int], SamplingParams]]) -> Drafter:
    if name == "none":
        return NoDrafter()
    if name == "ngram":
        return NgramDrafter()
    if name == "lm":
        tokenizer = SimpleNamespace(get_vocab=dict)
        return LmDrafter(TargetModel(model, tokenizer=tokenizer), shared_model("qwen3", seed=1), tokenizer=tokenizer)
    if name == "eagle_untrained":
        return EagleDrafter(TargetModel(model), draft_vocab_size=80)
    if name == "eagle_trained":
        return EagleDrafter(TargetModel(model), head=copy.deepcopy(build_trained_drafter(model).head))
    prompts, params = [prompt for prompt, _ in requests], [each for _, each in requests]
    answers = build_answers(model, prompts, params)
    return OracleDrafter(answers) if name == "oracle" else AlwaysWrongDrafter(answers)


def build_engine(
    model: PreTrainedModel, drafter: str | Drafter, planner: Planner | SpeculationPlan = PLAIN, max_num_seqs: int = 64
) -> Engine:
    """An engine that checks its books after every step."""
    if isinstance(drafter, str):  # by its name an engine without speculation would leave it out
        drafter = build_drafter(drafter, TargetModel(model))
    engine = Engine(model, drafter=drafter, speculation="off", max_num_seqs=max_num_seqs)
    engine.planner = FixedPlanner(fixed=planner) if isinstance(planner, SpeculationPlan) else planner
    engine.on_step.append(lambda record: engine.check())
    return engine


def assert_nothing_is_left(engine: Engine) -> None:
    engine.check()
    assert not engine.scheduler.has_work
    assert engine.cache.num_bytes == 0
    for drafter in getattr(engine.drafter, "members", [engine.drafter]):
        own = getattr(drafter, "cache", None) or getattr(getattr(drafter, "_rows", None), "cache", None)
        assert own is None or own.num_bytes == 0
        assert not hasattr(drafter, "_recordings") or drafter._recordings.replays is None
        assert not getattr(drafter, "_groups", None)


# -- law 1 ---------------------------------------------------------------------------------------------------


# Speculation does nothing without a drafter, and a drafter nothing without speculation but keep features.
PAIRS = [("none", "off"), ("eagle_trained", "off")]
PAIRS += [(drafter, plan) for drafter in DRAFTERS if drafter != "none" for plan in PLANNERS if plan != "off"]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("drafter", "plan"), PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_depend_on_the_seed_alone(family, drafter, plan):
    """Draws from settings x batch composition x order x slots, another draw for each family, drafter and plan."""
    model, rng = shared_model(family), random.Random(f"{family} {drafter} {plan}")
    for max_num_seqs in (rng.choice([3, 64]), rng.choice([1, 3, 64])):
        requests = build_requests(rng.choice([*range(len(SETTINGS)), None]))
        requests = rng.sample(requests, rng.randint(2, len(requests)))
        prompts, params = [prompt for prompt, _ in requests], [each for _, each in requests]
        test_drafter = build_test_drafter(drafter, model, requests)
        engine = build_engine(model, test_drafter, PLANNERS[plan](), max_num_seqs)
        completions = engine.generate(prompts, params)
        assert [c.token_ids for c in completions] == expected_tokens(model, prompts, params)
        expected = [expected_completion(model, tuple(prompt), each, each.stream) for prompt, each in requests]
        assert [c.finish_reason for c in completions] == [e.finish_reason for e in expected]
        assert_nothing_is_left(engine)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("key", SPECULATION)
def test_every_key_draws_the_same_tokens_and_its_planner_goes_on_elsewhere(key):
    """By the names a user gives, costs measured on this machine."""
    model, params = shared_model("qwen2"), SamplingParams(max_tokens=8)
    first, second = (Engine(model, drafter="ngram", speculation=key) for _ in range(2))
    assert [c.token_ids for c in first.generate(PROMPTS, params)] == expected_tokens(model, PROMPTS, params)
    assert first.planning.name == key
    second.planning.restore(first.planner.name, first.planner.state_dict())
    assert second.planner is not None and second.planner.state_dict() == first.planner.state_dict()
    other = Engine(model, drafter="ngram", speculation="off")
    other.planning.restore(first.planner.name, first.planner.state_dict())
    assert other.planner == FixedPlanner()


@pytest.mark.parametrize("drafter", ["ngram", "eagle_trained", "oracle"])
def test_mistral_without_a_window(drafter):
    model, requests = shared_model("mistral"), build_requests(None)
    prompts, params = [prompt for prompt, _ in requests], [each for _, each in requests]
    engine = build_engine(model, build_test_drafter(drafter, model, requests), TREE, max_num_seqs=3)
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"num_hidden_layers": 6, "tie_word_embeddings": True}),
    ],
    ids=["one_layer_no_gqa", "one_kv_head_tied", "linear_rope", "yarn_rope", "biases", "six_layers_tied"],
)
def test_other_shapes_of_the_same_families(family, overrides):
    model = build_model(family, **overrides)
    params = SamplingParams(max_tokens=12)
    engine = build_engine(model, EagleDrafter(TargetModel(model)), TREE, max_num_seqs=4)
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] == expected_tokens(model, PROMPTS, params)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other_default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("other_default_dtype")
@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle", "block"])
def test_tokens_and_logprobs_do_not_depend_on_the_default_dtype(drafter):
    """Which many set to build a model; kernels write float32 whatever it is."""
    model, params = shared_model("llama", torch.float32), SamplingParams(max_tokens=12)
    engine = build_engine(model, drafter, TREE)
    for stream, (prompt, completion) in enumerate(zip(PROMPTS, engine.generate(PROMPTS, params), strict=True)):
        expected = expected_completion(model, tuple(prompt), params, stream)
        assert completion.token_ids == expected.token_ids
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert all(p.dtype == torch.float32 for p in getattr(engine.drafter, "head", nn.Module()).parameters())


@pytest.mark.usefixtures("unchecked_shapes")
def test_alone_equals_first_of_a_batch_and_stream_i_equals_request_i():
    model = shared_model("llama")
    params = SamplingParams(seed=5, max_tokens=10)
    engine = build_engine(model, "eagle", TREE)
    together = engine.generate(PROMPTS, params)
    assert engine.generate(PROMPTS[:1], params)[0].token_ids == together[0].token_ids
    for index, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], replace(params, stream=index))[0]
        assert alone.token_ids == together[index].token_ids


def test_siblings_differ_and_another_seed_differs():
    model = shared_model("qwen2")
    engine = build_engine(model, "none")
    group = engine.generate([GROUP] * 16, SamplingParams(max_tokens=8))
    assert len({tuple(c.token_ids) for c in group}) == 16
    assert len({c.token_ids[0] for c in group}) > 4
    again = engine.generate([GROUP] * 16, SamplingParams(max_tokens=8, seed=1))
    assert not {tuple(c.token_ids) for c in group} & {tuple(c.token_ids) for c in again}
    greedy = engine.generate([GROUP] * 4, SamplingParams(max_tokens=8, temperature=0.0))
    assert len({tuple(c.token_ids) for c in greedy}) == 1


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("drafter", ["ngram", "eagle_trained", "lm"])
def test_an_engine_can_be_used_again(drafter):
    model, requests = shared_model("qwen3"), build_requests(None)
    engine = build_engine(model, build_test_drafter(drafter, model, requests), TREE, max_num_seqs=3)
    rng = random.Random(0)
    for _ in range(3):
        chosen = rng.sample(requests, rng.randint(1, len(requests)))
        prompts, params = [prompt for prompt, _ in chosen], [each for _, each in chosen]
        assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)
        assert_nothing_is_left(engine)
    assert engine.generate([], SamplingParams()) == []


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
@pytest.mark.parametrize("drafter", ["eagle-new", "block", "ngram", "auto"])
def test_a_copy_of_an_engine_has_a_model_of_its_own(drafter, copied):
    model, params = build_model("llama", torch.float32), SamplingParams(max_tokens=11)
    engine = Engine(model, drafter=drafter, speculation=TREE)
    expected = [c.token_ids for c in engine.generate(PROMPTS, params)]
    other = copied(engine)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert [c.token_ids for c in other.generate(PROMPTS, params)] == expected
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] != expected


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("drafter", ["ngram", "eagle_trained", "lm"])
@pytest.mark.parametrize("seed", range(3))
def test_arrivals_while_others_run(drafter, seed):
    """Requests that reach the scheduler in the middle of a rollout."""
    model, requests = shared_model("llama"), build_requests(None)
    engine = build_engine(model, build_test_drafter(drafter, model, requests), TREE, max_num_seqs=4)
    rng = random.Random(seed)
    rng.shuffle(requests)
    arriving = [
        Sequence(
            request_id=index,
            prompt_ids=prompt,
            params=replace(params, max_tokens=9 if index % 2 else 30),
            max_tokens=9 if index % 2 else 30,
            stream_key=stream_key(params.seed, params.stream),
        )
        for index, (prompt, params) in enumerate(requests)
    ]
    sequences = list(arriving)
    with engine.target.rollout_mode():
        engine.planner.begin()
        engine.drafter.begin()
        while arriving or engine.scheduler.has_work:
            if arriving and (rng.random() < 0.15 or not engine.scheduler.has_work):
                engine.scheduler.add(arriving.pop())
            engine.step()
            engine.check()
    for sequence in sequences:
        expected = expected_completion(model, tuple(sequence.prompt_ids), sequence.params, sequence.params.stream)
        assert sequence.token_ids == expected.token_ids


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle_trained"])
@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_the_order_of_admission_changes_no_token(drafter, max_num_seqs):
    """As they came, longest first after an epoch, and by lengths made up: the tokens of plain decoding."""
    model, requests, rng = shared_model("llama"), build_requests(None), random.Random(max_num_seqs)
    prompts, params = [prompt for prompt, _ in requests], [each for _, each in requests]
    expected = expected_tokens(model, prompts, params)
    engine = build_engine(model, build_test_drafter(drafter, model, requests), TREE, max_num_seqs)
    admit, orders = engine.scheduler.admit, []
    engine.scheduler.admit = lambda *may: [orders[-1].append(s.request_id) or s for s in admit(*may)]
    for is_made_up in (False, False, True):
        if is_made_up:
            engine.scheduler.lengths = LengthPredictor()
            for prompt in prompts:
                engine.scheduler.lengths.observe(prompt, rng.randint(1, 99))
        orders.append([])
        assert [c.token_ids for c in engine.generate(prompts, params)] == expected
        assert_nothing_is_left(engine)
    assert orders[0] == sorted(orders[0]) and len({tuple(order) for order in orders}) == 3
    assert sorted(orders[1]) == orders[0]
    groups = [group for group, _ in itertools.groupby(orders[1], key=lambda i: prompts[i])]
    assert len(groups) == len({tuple(prompt) for prompt in prompts}), "siblings are admitted together"


# -- limits and stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["oracle", "eagle_trained"])
@pytest.mark.parametrize("plan", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_stop_token_inside_an_accepted_path_ends_the_completion(drafter, plan):
    model, params = shared_model("llama"), SamplingParams(seed=11, max_tokens=16)
    full = expected_tokens(model, PROMPTS, params)
    requests = []
    for index, tokens in enumerate(full):  # stops at every place of a path in turn
        place = next(i for i in range(index, 16) if tokens.index(tokens[i]) == i)
        requests.append((PROMPTS[index], replace(params, stream=index, stop_token_ids=(tokens[place], VOCAB_SIZE + 5))))
    knowing = [(prompt, replace(each, stop_token_ids=())) for prompt, each in requests]  # it drafts beyond the stop
    engine = build_engine(model, build_test_drafter(drafter, model, knowing), plan)
    finished: list[FinishedRollout] = []
    engine.on_finish.append(finished.append)
    completions = engine.generate([prompt for prompt, _ in requests], [each for _, each in requests])
    for tokens, completion, (_, each) in zip(full, completions, requests, strict=True):
        length = tokens.index(each.stop_token_ids[0]) + 1
        assert completion.token_ids == tokens[:length]
        assert completion.finish_reason == "stop"
        assert len(completion.logprobs) == len(completion.entropies) == length
    for rollout in finished:
        if rollout.features is not None:
            assert len(rollout.features) == len(rollout.prompt_ids) + len(rollout.token_ids) - 1
    assert sum(record.num_emitted for record in engine.records) == sum(len(c.token_ids) for c in completions)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 7])
def test_max_tokens_inside_an_accepted_path(max_tokens):
    model, params = shared_model("qwen2"), SamplingParams(seed=3, max_tokens=16)
    engine = build_engine(model, OracleDrafter(build_answers(model, PROMPTS, params)), CHAIN)
    completions = engine.generate(PROMPTS, replace(params, max_tokens=max_tokens))
    assert [c.token_ids for c in completions] == [t[:max_tokens] for t in expected_tokens(model, PROMPTS, params)]
    assert {c.finish_reason for c in completions} == {"length"}
    assert len(engine.records) == -(-max_tokens // (CHAIN.depth + 1))


@pytest.mark.parametrize("drafter", ["ngram", "eagle_untrained", "lm", "oracle"])
@pytest.mark.parametrize("room", [1, 2, 4])
def test_completions_end_where_the_context_ends(drafter, room):
    model = shared_model("llama")
    prompts = [[i % VOCAB_SIZE for i in range(MAX_POSITION - room)], [7]]
    requests = [(prompt, SamplingParams(seed=2, stream=i, max_tokens=20)) for i, prompt in enumerate(prompts)]
    engine = build_engine(model, build_test_drafter(drafter, model, requests), TREE)
    completions = engine.generate(prompts, SamplingParams(seed=2, max_tokens=20))
    assert [len(c.token_ids) for c in completions] == [room, 20]
    assert [c.token_ids for c in completions] == expected_tokens(model, prompts, SamplingParams(seed=2, max_tokens=20))


def test_a_one_token_prompt_among_long_ones():
    model, params = shared_model("qwen3"), SamplingParams(max_tokens=12)
    prompts = [[7], list(range(30)), [7], [9]]
    for plan in (PLAIN, CHAIN, TREE):
        engine = build_engine(model, "eagle", plan, max_num_seqs=2)
        assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("drafter", ["none", "eagle"])
def test_each_prompt_is_computed_once(max_num_seqs, drafter):
    """Also where a group is admitted in parts, or stands among others."""
    model, params = shared_model("llama"), SamplingParams(max_tokens=6)
    other = list(range(20))
    prompts = [GROUP, other, GROUP, GROUP, [7], other, GROUP, [7], other, GROUP]
    engine = build_engine(model, drafter, TREE, max_num_seqs)
    for _ in range(2):  # as they came, then with lengths known
        completions = engine.generate(prompts, params)
        assert [c.token_ids for c in completions] == expected_tokens(model, prompts, params)
        assert sum(record.num_prefilled for record in engine.records) == len(GROUP) - 1 + len(other) - 1


@pytest.mark.parametrize(("chunk", "tokens"), [(1, 1), (5, 12), (8, 64), (512, 4096)])
def test_long_prompts_are_computed_in_parts(monkeypatch, chunk, tokens):
    monkeypatch.setattr(prefill_module, "_PREFILL_CHUNK", chunk)
    monkeypatch.setattr(prefill_module, "_PREFILL_TOKENS", tokens)
    model, params = shared_model("qwen2"), SamplingParams(max_tokens=8)
    prompts = [list(range(50)), [1] * 17, [2] * 5, [7], list(range(50))]
    engine = build_engine(model, "eagle", CHAIN)
    build, shapes = prefill_module.ForwardBatch.build, []

    def watch(**parts: Any) -> ForwardBatch:
        shapes.append(tuple(parts["token_ids"].shape))
        return build(**parts)

    monkeypatch.setattr(prefill_module, "ForwardBatch", SimpleNamespace(build=watch))
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)
    assert sum(record.num_prefilled for record in engine.records) == 49 + 16 + 4
    assert all(width <= chunk and num_rows * width <= max(tokens, width) for num_rows, width in shapes), shapes
    assert chunk < 512 or shapes == [(3, 49)], "what fits together goes together"


# -- law 3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle"])
def test_logprobs_and_entropies_equal_a_plain_forward_of_the_finished_sequence(family, dtype, tolerance, drafter):
    model = shared_model(family, dtype)
    params = [each for _, each in build_requests(None)]
    completions = build_engine(model, drafter, TREE, max_num_seqs=4).generate(PROMPTS, params)
    for prompt, each, completion in zip(PROMPTS, params, completions, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        scaled = logits / torch.tensor(each.temperature or 1.0, dtype=torch.float32)  # as the batch keeps it
        expected = scaled.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.tensor(completion.logprobs, dtype=dtype).sub(expected).abs().max() < tolerance
        entropies = torch.special.entr(scaled.softmax(-1)).sum(-1)
        assert torch.tensor(completion.entropies, dtype=dtype).sub(entropies).abs().max() < tolerance


# -- law 5 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_the_oracle_reaches_depth_plus_one(depth):
    model, params = shared_model("llama"), SamplingParams(max_tokens=64)
    prompts = PROMPTS[:4]
    plan = SpeculationPlan(depth=depth, width=1, num_draft_tokens=depth)
    engine = build_engine(model, OracleDrafter(build_answers(model, prompts, params)), plan)
    engine.generate(prompts, params)
    assert {record.acceptance_length for record in engine.records} == {depth + 1}
    assert len(engine.records) == 64 // (depth + 1)
    assert engine.records[0].hits == ((len(prompts),),) * depth


def test_the_oracle_in_a_tree_is_found_whatever_its_rank():
    model, params = shared_model("qwen3"), SamplingParams(max_tokens=40)
    prompts = PROMPTS[:4]
    plan = SpeculationPlan(depth=3, width=4, num_draft_tokens=12)
    engine = build_engine(model, OracleDrafter(build_answers(model, prompts, params)), plan)
    engine.generate(prompts, params)
    assert {record.acceptance_length for record in engine.records} == {4}
    first = engine.records[0]
    assert first.offered == ((4, 4, 4, 4),) * 3
    assert first.hits == ((0, 0, 0, 4),) * 3
    assert first.num_tokens == 4 * 13


@pytest.mark.parametrize("plan", [CHAIN, TREE], ids=["chain", "tree"])
def test_the_always_wrong_drafter_reaches_exactly_one(plan):
    model, params = shared_model("llama"), SamplingParams(max_tokens=12)
    engine = build_engine(model, AlwaysWrongDrafter(build_answers(model, PROMPTS, params)), plan)
    engine.generate(PROMPTS, params)
    assert {record.acceptance_length for record in engine.records} == {1}
    assert all(sum(map(sum, record.hits)) == 0 for record in engine.records)
    assert engine.records[0].num_tokens == len(PROMPTS) * (1 + plan.num_draft_tokens)


@pytest.mark.usefixtures("unchecked_shapes")
def test_auto_notices_an_always_wrong_drafter():
    """Counted in tokens per forward: what was wasted before it noticed, and what trials cost later."""
    model, params = build_model("llama", max_position_embeddings=512), SamplingParams(max_tokens=260)
    prompts = [[1, 2], [3]]
    planner = SyntheticClockPlanner()
    engine = build_engine(model, AlwaysWrongDrafter(build_answers(model, prompts, params)), planner)
    engine.generate(prompts, params)
    assert len(engine.records) == 260
    has_tried = [not record.plan.is_plain for record in engine.records]
    assert any(has_tried[:50]), "a planner that never tries cannot know"
    windows = [has_tried[step : step + 24] for step in range(100, 260 - 24 + 1)]
    assert all(sum(window) <= 24 // 8 for window in windows), (
        "trials take one step in eight at most, wherever one looks"
    )
    seconds = [planner.compute_step_s(record) for record in engine.records]
    assert sum(seconds[100:]) <= 1.01 * 160 * planner.machine.compute_target_s(2)


@pytest.mark.usefixtures("unchecked_shapes")
def test_auto_keeps_an_oracle():
    model, params = build_model("llama", max_position_embeddings=512), SamplingParams(max_tokens=200)
    prompts = [[1, 2], [3]]
    engine = build_engine(model, OracleDrafter(build_answers(model, prompts, params)), SyntheticClockPlanner())
    engine.generate(prompts, params)
    assert len(engine.records) < 80
    assert sum(record.plan.is_plain for record in engine.records) < 8


# -- the facts of a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["eagle", "block", "ngram", "auto"])
def test_a_shared_budget_goes_to_the_likeliest_nodes_of_all_sequences(drafter, monkeypatch):
    model, params = shared_model("llama"), SamplingParams(max_tokens=24, temperature=0.0)
    engine = build_engine(model, build_drafter(drafter, TargetModel(model)), SHARED, max_num_seqs=4)
    pools: list[tuple[Draft, Draft]] = []
    spend = engine.planning.spend_budget

    def watch(pool: Draft, plan: SpeculationPlan, inputs: PlanInputs) -> Draft:
        pools.append((pool, spend(pool, plan, inputs)))
        return pools[-1][1]

    monkeypatch.setattr(engine.planning, "spend_budget", watch)
    engine.generate([*PROMPTS, *PROMPTS], params)
    is_ragged = False
    for pool, kept in pools:
        check_draft(kept)
        if pool.scores is None:
            continue
        num_seqs = len(pool.num_nodes)
        assert (pool.num_nodes <= 21).all()
        assert kept.num_tokens == num_seqs + min(4 * num_seqs, pool.num_tokens - num_seqs)
        is_kept = torch.arange(pool.scores.shape[1]) < kept.num_nodes[:, None]
        left_out = pool.scores.masked_fill(is_kept, -torch.inf)
        assert left_out.max() <= kept.scores.masked_fill(~kept.node_mask, torch.inf).min() + 1e-6
        assert (pool.scores.diff(dim=1)[pool.node_mask[:, 1:]] <= 0).all(), "best nodes come first"
        is_ragged |= int(kept.num_nodes.max()) > int(kept.num_nodes.min())
    assert is_ragged, "every tree was the same size: nothing was shared"


def test_step_records_add_up():
    model, params = shared_model("qwen2"), SamplingParams(max_tokens=12, stop_token_ids=tuple(range(20)))
    engine = build_engine(model, "ngram", TREE, max_num_seqs=3)
    seen: list[StepRecord] = []
    engine.on_step.append(seen.append)
    completions = engine.generate(PROMPTS, params)
    assert seen == engine.records and any(record.num_tokens > record.num_seqs for record in seen), "nothing was drafted"
    assert sum(record.num_emitted for record in seen) == sum(len(c.token_ids) for c in completions)
    for record in seen:
        assert 1 <= record.num_seqs <= 3
        assert record.num_seqs <= record.num_emitted <= record.num_seqs * (1 + TREE.depth)
        assert record.num_seqs <= record.num_tokens <= record.num_seqs * (1 + TREE.num_draft_tokens)
        parts_s = record.prefill_s + record.draft_s + record.target_s + record.verify_s
        assert parts_s == pytest.approx(record.step_s, rel=0.05, abs=1e-3)
    assert [record.num_waiting for record in seen] == sorted((r.num_waiting for r in seen), reverse=True)


@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [
        ("prefill_s", prefill_module.Prefiller, "prefill"),
        ("draft_s", NgramDrafter, "propose"),
        ("target_s", TargetModel, "decode"),
        ("verify_s", Attempt, "commit"),
    ],
)
def test_what_takes_long_is_timed_as_its_own_part(part, owner, name, monkeypatch):
    engine, params = build_engine(shared_model("llama"), "ngram", CHAIN), SamplingParams(max_tokens=2)
    usual, clock, late_s = getattr(owner, name), time.perf_counter, [0.0]

    def wait(*arguments: Any, **settings: Any) -> Any:
        late_s[0] += 60
        return usual(*arguments, **settings)

    monkeypatch.setattr(owner, name, wait)
    for module in (time, timing):
        monkeypatch.setattr(module, "perf_counter", lambda: clock() + late_s[0])
    engine.generate([[7]], params)
    record = engine.records[0]
    parts = {each: getattr(record, each) for each in ("prefill_s", "draft_s", "target_s", "verify_s")}
    assert parts == pytest.approx(dict.fromkeys(parts, 0.0) | {part: 60.0}, abs=20)
    assert min(parts.values()) >= 0 and record.step_s == pytest.approx(sum(parts.values()))


def test_generating_leaves_the_global_generators_alone():
    model = shared_model("llama")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    build_engine(model, "eagle", TREE).generate(PROMPTS[:3], SamplingParams(max_tokens=4))
    assert torch.equal(torch.random.get_rng_state(), before)


@HAS_OWN_BITS
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("planner", ["off", "chain", "shared", "paper-own", "auto"])
def test_half_precision_says_the_same_beside_anybody(planner):
    """Short prompts beside long ones, trees of more nodes than run together: the bits are those of each alone."""
    model = shared_model("llama", torch.bfloat16, max_position_embeddings=512)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(count)] for count in (5, 300, 64, 1, 130, 65)]
    params = [SamplingParams(max_tokens=40, seed=8, stream=index) for index in range(len(prompts))]
    alone = [
        Engine(model, drafter="none", speculation="off").generate([p], [q])[0]
        for p, q in zip(prompts, params, strict=True)
    ]
    engine = Engine(model, drafter=NgramDrafter(), speculation="off")
    engine.planner = PLANNERS[planner]()
    together = engine.generate(prompts, params)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.logprobs for c in together] == [c.logprobs for c in alone]
    assert planner in ("off", "auto") or any(record.num_tokens > record.num_seqs for record in engine.records)
