"""Families and attention that our kernels do not cover: transformers' own modules, the same laws, one warning."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import (
    OracleDrafter,
    build_answers,
    build_model,
    expected_tokens,
    reference_generate,
    shared_model,
)
from fastgrpo import model as model_module
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.lm import LmDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.families import SUPPORTED_FAMILIES
from fastgrpo.model import TargetModel
from fastgrpo.planner import FixedPlanner
from fastgrpo.types import SamplingParams, SpeculationPlan

TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=10)
DEEP = SpeculationPlan(depth=5, width=1, num_draft_tokens=5)
GROUP = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [GROUP, [7], GROUP, [8, 8], list(range(60))]
PARAMS = SamplingParams(seed=3, max_tokens=14)
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TWO_ROPES = {"full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "sliding_attention": ROPE}
SCALED_ROPE = ROPE | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 16}  # later queries are larger
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int | None, ...]]] = {
    "mistral, 6 tokens": ("mistral", {"sliding_window": 6}, (6, 6, 6)),
    "mistral, 2 tokens": ("mistral", {"sliding_window": 2}, (2, 2, 2)),
    "mistral, itself": ("mistral", {"sliding_window": 1}, (1, 1, 1)),
    "qwen2, upper layers": ("qwen2", WINDOWED, (None, 6, 6)),
    "qwen3, upper layers": ("qwen3", WINDOWED, (None, 6, 6)),
    "exaone4, rotation where windows are": ("exaone4", MIXED, (6, None, 6)),
    "gemma": ("gemma", {}, (None, None, None)),
    "gemma3, two rotations": ("gemma3_text", MIXED | {"query_pre_attn_scalar": 30}, (6, None, 6)),
    "ministral3, 6 tokens": ("ministral3", {"sliding_window": 6, "rope_parameters": SCALED_ROPE}, (6, 6, 6)),
    "mixtral": ("mixtral", {}, (None, None, None)),
    "mixtral, 5 tokens": ("mixtral", {"sliding_window": 5}, (5, 5, 5)),
    "olmo2": ("olmo2", {}, (None, None, None)),
    "olmo3, two rotations": ("olmo3", MIXED | {"rope_parameters": TWO_ROPES}, (6, None, 6)),
    "olmoe": ("olmoe", {}, (None, None, None)),
    "phi3": ("phi3", {}, (None, None, None)),
    "phi3, 6 tokens": ("phi3", {"sliding_window": 6}, (6, 6, 6)),
    "qwen3_moe": ("qwen3_moe", {}, (None, None, None)),
    "seed_oss": ("seed_oss", {}, (None, None, None)),
    "smollm3": ("smollm3", {}, (None, None, None)),
    "smollm3, layers without rotation": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5},
        (None, 5, None),
    ),
}


IN_FLOAT32 = ("gemma", "gemma3_text", "mixtral", "olmoe", "qwen3_moe")  # by their norms, or PyTorch's experts


@functools.cache
def build(case: str) -> Any:
    family, settings, _ = CASES[case]
    return build_model(family, torch.float32 if family in IN_FLOAT32 else torch.float64, **settings)


@pytest.mark.parametrize("plan", [None, TREE, DEEP], ids=["off", "tree", "chain"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_a_plain_loop(case: str, plan: SpeculationPlan | None) -> None:
    model, (_, _, windows) = build(case), CASES[case]
    expected = expected_tokens(model, PROMPTS, PARAMS)
    for drafter in ("ngram", "eagle-new", "block"):
        engine = Engine(model, drafter=drafter, speculation=plan or "off", max_num_seqs=3)
        assert engine.target.windows == windows
        assert [c.token_ids for c in engine.generate(PROMPTS, PARAMS)] == expected, drafter
        engine.check()


@pytest.mark.parametrize("case", CASES)
def test_right_drafts_are_accepted_whole(case: str) -> None:
    """Else a wrong mask of trees would only make drafts fail."""
    model = build(case)
    engine = Engine(model, drafter=OracleDrafter(build_answers(model, PROMPTS, PARAMS)), speculation="off")
    engine.planner = FixedPlanner(fixed=TREE)
    assert [c.token_ids for c in engine.generate(PROMPTS, PARAMS)] == expected_tokens(model, PROMPTS, PARAMS)
    assert [record.acceptance_length for record in engine.records] == [4.0, 4.0, 4.0, 2.0]


@pytest.mark.parametrize("case", ["mistral, 6 tokens", "qwen2, upper layers", "olmo2", "olmo3, two rotations"])
def test_features_are_those_of_a_plain_forward(case: str) -> None:
    model, finished = build(case), list[FinishedRollout]()
    engine = Engine(model, drafter=EagleDrafter(TargetModel(model)), speculation=TREE)
    engine.on_finish.append(finished.append)
    engine.generate(PROMPTS, PARAMS)
    for rollout in finished:
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids[:-1]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0] for layer in (*engine.target.feature_layers, -1)], -1)
        torch.testing.assert_close(rollout.features, expected, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the cache is full")
@pytest.mark.parametrize("family", ["mistral", "olmo2"])
def test_who_waits_for_memory_says_the_same_afterwards(family: str) -> None:
    """Over several blocks, the window's end in an earlier one."""
    model = shared_model(family, sliding_window=70, max_position_embeddings=512)
    prompts, params = [7 * GROUP, GROUP, 9 * GROUP], SamplingParams(seed=3, max_tokens=90)
    expected = expected_tokens(model, prompts, params)
    block_bytes = Engine(model, drafter="none").cache.block_bytes
    engine = Engine(model, drafter="ngram", speculation=TREE, max_cache_bytes=4 * block_bytes)
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected
    assert sum(record.num_preempted for record in engine.records) > 0
    assert Engine(model, drafter="none").generate(prompts, params)[0].token_ids == expected[0]


@pytest.mark.parametrize("case", ["mistral, 6 tokens", "qwen3_moe"])
def test_they_draft_for_others(case: str) -> None:
    model, family = shared_model("llama"), build(case)
    tokenizer = type("Tokenizer", (), {"get_vocab": staticmethod(dict)})
    drafter = LmDrafter(TargetModel(model, tokenizer=tokenizer), family, tokenizer=tokenizer)
    engine = Engine(model, drafter=drafter, speculation=TREE)
    assert [c.token_ids for c in engine.generate(PROMPTS, PARAMS)] == expected_tokens(model, PROMPTS, PARAMS)


@pytest.mark.parametrize("family", ["olmo2", "phi3", "smollm3", "qwen3_moe", "gemma3_text"])
def test_they_decode_with_their_adapters(family: str) -> None:
    base = build_model(family, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = [c.token_ids for c in Engine(model, drafter="ngram", speculation=TREE).generate(PROMPTS, PARAMS)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert tokens == [reference_generate(model, tuple(p), PARAMS, i).token_ids for i, p in enumerate(PROMPTS)]


def test_bfloat16_runs() -> None:
    for family in SUPPORTED_FAMILIES:
        model = build_model(family, torch.bfloat16)
        completions = Engine(model, drafter="eagle-new", speculation=TREE).generate(PROMPTS, PARAMS)
        assert all(len(c.token_ids) == 14 for c in completions), family


@pytest.mark.parametrize(
    ("build_other", "reason"),
    [
        (lambda: build_model("mistral", torch.float32, sliding_window=6), "no more than the last 6 tokens"),
        (lambda: build_model("smollm3", torch.float32), "its layers are of type SmolLM3DecoderLayer"),
    ],
)
def test_one_warning_names_the_reason(build_other: Any, reason: str) -> None:
    model_module._warn_of.cache_clear()
    model: nn.Module = build_other()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            Engine(model, drafter="ngram", speculation=TREE).generate(PROMPTS, PARAMS)
    found = [str(warning.message) for warning in caught if "takes longer" in str(warning.message)]
    assert len(found) == 1 and reason in found[0]


def test_a_window_as_long_as_the_context_is_none() -> None:
    """Mistral v0.1's matters to sequences of more than 4096 tokens alone."""
    model = build_model("mistral", torch.float32, sliding_window=4096)
    engine = Engine(model, drafter="none")
    assert engine.target.windows == (None,) * 3
    with engine.target.rollout_mode():
        assert engine.target._find_window_obstacle() is None


def test_a_head_that_rotates_a_part_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = build_model("phi3", rope_parameters=rope)
    with pytest.raises(ValueError, match=r'partial_rotary_factor 0.5 is not supported .* drafter="ngram"'):
        Engine(model, drafter="eagle-new")
    engine = Engine(model, drafter="ngram", speculation=TREE)
    tokens = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
    assert tokens == [reference_generate(model, tuple(p), PARAMS, i).token_ids for i, p in enumerate(PROMPTS)]


def test_heads_rotate_as_layers_that_see_all() -> None:
    target, positions = TargetModel(build("olmo3, two rotations")), torch.arange(9)[None]
    rotary, like = target.decoder.rotary_emb, torch.zeros(1)
    expected, other = (rotary(like, positions, kind)[0] for kind in ("full_attention", "sliding_attention"))
    assert torch.equal(target.rotary_emb(like, position_ids=positions)[0], expected)
    assert not torch.equal(expected, other)


def test_new_heads_take_what_norms_multiply_by() -> None:
    """Gemma's by one more than their weight."""
    model = build_model("gemma3_text", torch.float32)
    torch.nn.init.constant_(model.model.norm.weight, 0.5)
    torch.nn.init.constant_(model.model.layers[-1].input_layernorm.weight, -0.25)
    head = EagleDrafter(TargetModel(model)).head
    assert head.norm.weight.unique().tolist() == [1.5]
    assert head.midlayer.hidden_norm.weight.unique().tolist() == [0.75]
