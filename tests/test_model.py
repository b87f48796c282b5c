"""The adapter leaves the model as it found it, runs it as transformers would, and refuses what it would run wrongly."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import AdaptionPromptConfig, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from conftest import VOCAB_SIZE, build_model, expected_tokens, reference_generate, shared_model
from fastgrpo.decoder import is_model_touched
from fastgrpo.drafters.drafter import TrainableDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.head import add_token_scores
from fastgrpo.kernels import cpu
from fastgrpo.learner import Learner
from fastgrpo.model import TargetModel
from fastgrpo.rollout_modes import RolloutModes
from fastgrpo.rotation import RotationTable
from fastgrpo.types import SamplingParams, SpeculationPlan
from fastgrpo.weights import merged_weights, round_evenly

TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)
PROMPTS = [[3, 1, 4, 1, 5], [7], [3, 1, 4, 1, 5], list(range(20))]
PARAMS = SamplingParams(max_tokens=10, seed=4)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_lora(family: str = "llama", dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    """A model with a random adapter that matters."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ALL_LINEAR, "init_lora_weights": False} | settings
    base = build_model(family, dtype, tie_word_embeddings=bool(settings.pop("is_tied", False)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(**settings))


def copy_weights(model: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    return {name: (value.detach().clone(), value.data_ptr()) for name, value in model.state_dict().items()}


def assert_same_weights(model: nn.Module, before: dict[str, tuple[torch.Tensor, int]]) -> None:
    """The same bits in the same storage, so that an optimiser goes on where it was."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, (value, pointer) in before.items():
        assert now[name].dtype == value.dtype
        assert torch.equal(now[name], value), name
        assert now[name].data_ptr() == pointer, name


def reference_tokens(model: nn.Module, params: SamplingParams = PARAMS) -> list[list[int]]:
    """Without merging and without memory of earlier weights."""
    return [reference_generate(model, tuple(p), params, params.stream + i).token_ids for i, p in enumerate(PROMPTS)]


# -- adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
        {"use_rslora": True, "bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "is_tied": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 5, 7]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "is_tied": True},
    ],
    ids=[
        *("all_linear", "dropout", "rslora_bias", "dora", "modules_to_save", "untied_ends", "tied_embedding"),
        *("new_biases", "some_tokens", "tied_copies"),
    ],
)
def test_tokens_with_merged_lora_are_those_without_merging(settings):
    model = build_lora(**settings)
    model.train()
    before = copy_weights(model)
    engine = Engine(model, drafter="eagle", speculation=TREE)
    tokens = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
    assert_same_weights(model, before)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    model.eval()
    assert tokens == reference_tokens(model)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)],
    ids=["bfloat16", "float16", "cast"],
)
def test_a_young_adapter_is_not_rounded_away(dtype, compute_dtype):
    """A few steps change a weight by a hundredth of what half precision tells apart; all of them together are heard."""
    model = build_lora(dtype=dtype).to(dtype)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        base = layer.get_base_layer().weight
        base.data = base.data.to(compute_dtype or dtype).to(dtype)  # a checkpoint in half precision
        layer.lora_B["default"].weight.data *= 2e-3
    before = copy_weights(model)
    pairs = [(layer.get_base_layer(), layer.get_base_layer().weight.data.double()) for layer in layers]
    wanted = [layer.get_delta_weight("default").double() for layer in layers]
    with merged_weights(model, compute_dtype):
        merged = [linear.weight.data - weight for linear, weight in pairs]
        assert {linear.weight.dtype for linear, _ in pairs} == {compute_dtype or dtype}
    assert_same_weights(model, before)
    size = max(
        float(change.abs().mean() / weight.abs().mean()) for change, (_, weight) in zip(wanted, pairs, strict=True)
    )
    heard = sum(float((made * change).sum()) for made, change in zip(merged, wanted, strict=True))
    assert 1e-6 < size < 2**-9 and heard == pytest.approx(
        sum(float(change.square().sum()) for change in wanted), rel=0.2
    )


def test_a_base_in_float32_is_rounded_as_autocast_does():
    """Only what an adapter adds is rounded evenly: one that adds nothing leaves what training multiplies by."""
    model = build_lora(dtype=torch.float32)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.lora_B["default"].weight.data.zero_()
    expected = [(layer.get_base_layer(), layer.get_base_layer().weight.data.to(torch.bfloat16)) for layer in layers]
    with merged_weights(model, torch.bfloat16):
        assert all(torch.equal(linear.weight, weight) for linear, weight in expected)
    assert {linear.weight.dtype for linear, _ in expected} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_evenly_keeps_sums_and_what_needs_no_rounding(dtype, monkeypatch):
    monkeypatch.setattr("fastgrpo.weights._CHUNK", 1000)
    steps = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    for share in (0.01, 0.3, 0.5, 0.9):
        rounded = round_evenly(torch.full((96, 80), -1 - 2 * steps * share), dtype).double()
        assert {float(value) for value in rounded.unique()} == {-1.0, -1 - 2 * steps}
        for sums in (rounded.mean(0), rounded.mean(1)):
            assert ((-1 - sums) / (2 * steps) - share).abs().max() < 0.03
    held = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(round_evenly(held.float(), dtype), held)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).view(torch.int32)
    odd[0] = 0x7FFFFFFF  # the NaN of a GPU
    assert round_evenly(odd.view(torch.float32), dtype).float().nan_to_num(7.0).tolist()[0] == 7.0
    assert torch.equal(round_evenly(odd[1:].view(torch.float32), dtype).float().view(torch.int32), odd[1:])


@pytest.mark.parametrize("shape", [(), (5,), (70, 300), (3, 5, 7)])
def test_the_kernel_rounds_as_pytorch_does(shape, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).mul(40).exp2()
    if len(shape) == 2:
        values = values.T
        values[:5, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(torch.float32).max])
    ours = round_evenly(values, torch.bfloat16)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    theirs = round_evenly(values, torch.bfloat16)
    assert ours.shape == theirs.shape == values.shape
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan())


def test_tuned_norms_stay_those_that_are_trained():
    """Merging one, PEFT puts it in the place of the base's, and takes the base's for the adapter."""
    config = LNTuningConfig(target_modules=["input_layernorm", "norm"])
    model = get_peft_model(build_model("llama", torch.float32), config)
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data += 0.5
    before, trained = copy_weights(model), [each for each in model.parameters() if each.requires_grad]
    tokens = [c.token_ids for c in Engine(model, drafter="ngram", speculation=TREE).generate(PROMPTS, PARAMS)]
    assert_same_weights(model, before)
    now = [each for each in model.parameters() if each.requires_grad]
    assert all(one is other for one, other in zip(trained, now, strict=True))
    assert tokens == reference_tokens(model.eval())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_every_family_decodes_with_its_adapter(family):
    model = build_lora(family)
    before = copy_weights(model)
    tokens = [c.token_ids for c in Engine(model, drafter="ngram", speculation=TREE).generate(PROMPTS, PARAMS)]
    assert_same_weights(model, before)
    assert tokens == reference_tokens(model.eval())
    with model.disable_adapter():
        assert tokens != reference_tokens(model)


def test_rollouts_follow_weights_that_are_trained_in_between():
    model = build_lora()
    engine = Engine(model, drafter="eagle", speculation=TREE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    seen = []
    for _ in range(3):
        seen.append([c.token_ids for c in engine.generate(PROMPTS, PARAMS)])
        assert seen[-1] == reference_tokens(model.eval())
        loss = model.train()(input_ids=torch.tensor([list(range(20))]), labels=torch.tensor([list(range(20))])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0] != seen[1] != seen[2]


def test_a_disabled_adapter_stays_disabled():
    model = build_lora().eval()
    engine = Engine(model, drafter="none")
    with model.disable_adapter():
        tokens = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
        assert tokens == reference_tokens(model)
    assert tokens != [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_merged_adapter_that_is_disabled_does_not_stay_in_the_base(compute_dtype):
    """PEFT takes it out in the next forward, which in a rollout would be of a copy."""
    model = build_lora(dtype=torch.float32).eval()
    engine = Engine(model, drafter="none", compute_dtype=compute_dtype)
    before = copy_weights(model)
    with model.disable_adapter():
        expected = engine.generate(PROMPTS, PARAMS)
    model.merge_adapter()
    with model.disable_adapter():
        tokens = [each.token_ids for each in engine.generate(PROMPTS, PARAMS)]
    assert tokens == [each.token_ids for each in expected]
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, before[name][0], atol=1e-5), name


# -- whatever happens inside ---------------------------------------------------------------------------------


def describe(model: nn.Module) -> tuple:
    flags = [module.training for module in model.modules()]
    return flags, model.config._attn_implementation, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_model_is_put_back(error, dtype):
    model = build_lora("qwen2", torch.float32, lora_dropout=0.1)
    model.train()
    model.base_model.model.model.layers[1].eval()  # a frozen part stays as its owner left it
    state, before = describe(model), copy_weights(model)
    engine = Engine(model, drafter="eagle", speculation=TREE, compute_dtype=dtype)

    def interrupt(_: object) -> None:
        assert all(layer.merged for layer in model.modules() if hasattr(layer, "merged_adapters"))
        if error is not None and len(engine.records) == 2:
            raise error("in the middle")

    engine.on_step.append(interrupt)
    if error is None:
        engine.generate(PROMPTS, PARAMS)
    else:
        with pytest.raises(error, match="in the middle"):
            engine.generate(PROMPTS, PARAMS)
    assert_same_weights(model, before)
    assert describe(model) == state
    engine.on_step.clear()
    engine.check()
    assert engine.cache.num_bytes == 0
    assert len(engine.generate(PROMPTS, PARAMS)) == len(PROMPTS)
    assert_same_weights(model, before)


def test_an_interrupt_while_merging_is_undone(monkeypatch):
    model = build_lora()
    before = copy_weights(model)
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layers[3], "merge", interrupt)
    with pytest.raises(KeyboardInterrupt), merged_weights(model):
        raise AssertionError("never reached")
    assert_same_weights(model, before)
    assert not any(layer.merged for layer in layers)


def test_gradient_checkpointing_and_gradients_are_left_alone():
    model = build_model("llama", torch.float32).train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([list(range(20))])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    Engine(model, drafter="eagle", speculation=TREE).generate(PROMPTS, PARAMS)
    assert model.is_gradient_checkpointing
    assert model.training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize(
    "build", [lambda: build_model("llama", torch.float32), lambda: build_lora("llama", torch.float32, bias="all")]
)
def test_who_adds_up_gradients_is_left_alone(build: Callable[[], nn.Module]) -> None:
    """DDP hears of gradients there, and of none where PyTorch has made another one."""
    model = build().requires_grad_(True)
    before = {name: p.view_as(p).grad_fn.next_functions[0][0] for name, p in model.named_parameters()}
    Engine(model, speculation=TREE, compute_dtype=torch.bfloat16).generate(PROMPTS, PARAMS)
    assert all(p.view_as(p).grad_fn.next_functions[0][0] is before[name] for name, p in model.named_parameters())


# -- types ---------------------------------------------------------------------------------------------------


def test_computing_in_bfloat16_is_near_to_float32():
    """Near-ties may flip a token; log-probs of the same tokens differ by rounding only."""
    model = build_model("llama", torch.float32)
    engine = Engine(model, drafter="eagle", speculation=TREE, compute_dtype=torch.bfloat16)
    finished: list[FinishedRollout] = []
    engine.on_finish.append(finished.append)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, PARAMS), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 0.3
    assert {rollout.features.dtype for rollout in finished} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle"])
def test_a_bfloat16_model_runs(drafter):
    model = build_model("qwen3", torch.bfloat16)
    completions = Engine(model, drafter=drafter, speculation=TREE).generate(PROMPTS, PARAMS)
    assert all(len(c.token_ids) == 10 for c in completions)
    assert torch.tensor([c.logprobs for c in completions]).isfinite().all()


# -- features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "num_layers", "layers"), [("llama", 3, (2, 1, 0)), ("qwen3", 6, (2, 3, 3))])
@pytest.mark.parametrize("speculation", ["off", TREE], ids=["off", "tree"])
def test_features_are_those_of_a_plain_forward(family, num_layers, layers, speculation):
    model = shared_model(family, num_hidden_layers=num_layers)
    engine = Engine(model, drafter=EagleDrafter(TargetModel(model)), speculation=speculation, max_num_seqs=3)
    assert engine.target.feature_layers == layers
    finished: list[FinishedRollout] = []
    engine.on_finish.append(finished.append)
    completions = engine.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in completions] == expected_tokens(model, PROMPTS, PARAMS)
    assert len(finished) == len(PROMPTS)
    for rollout in finished:
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids[:-1]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0] for layer in layers] + [states[-1][0]], -1)
        torch.testing.assert_close(rollout.features, expected, rtol=0, atol=1e-9)


def test_no_features_are_kept_for_drafters_that_want_none():
    model = shared_model("llama")
    engine = Engine(model, drafter="ngram", speculation=TREE)
    finished: list[FinishedRollout] = []
    engine.on_finish.append(finished.append)
    engine.generate(PROMPTS, PARAMS)
    assert [rollout.features for rollout in finished] == [None] * len(PROMPTS)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


# -- refusals ------------------------------------------------------------------------------------------------


def build_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2))


def build_prompt_tuned() -> nn.Module:
    return get_peft_model(
        build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32)
    )


def build_adaption_prompted() -> nn.Module:
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    return get_peft_model(build_model("llama"), config)


def build_headless() -> nn.Module:
    return build_model("llama").model


def build_with_larger_head() -> nn.Module:
    model = build_model("llama")
    model.lm_head = nn.Linear(32, VOCAB_SIZE + 8, bias=False, dtype=torch.float64)
    return model


def build_alora() -> nn.Module:
    return build_lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")


def rope(rope_type: str, **settings: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, **settings}}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_gpt2, "model family 'gpt2' is not supported; supported are llama, qwen2, qwen3, mistral"),
        (
            lambda: build_model("llama", layer_types=["full_attention", "chunked_attention", "linear_attention"]),
            "'llama' model with layers of chunked_attention, linear_attention is not supported",
        ),
        (lambda: build_model("llama", **rope("dynamic")), "rope_type 'dynamic' is not supported"),
        (
            lambda: build_model("llama", **rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)),
            "rope_type 'longrope' is not supported",
        ),
        (
            lambda: build_model(
                "olmo3",
                torch.float32,
                rope_parameters={
                    "full_attention": rope("dynamic")["rope_parameters"],
                    "sliding_attention": rope("linear")["rope_parameters"],
                },
            ),
            "rope_type 'dynamic' is not supported",
        ),
        (
            lambda: build_model("gemma3_text", torch.float32, final_logit_softcapping=30.0),
            "'gemma3_text' model with final_logit_softcapping=30.0 is not supported",
        ),
        (
            lambda: build_model("gemma3_text", torch.float32, use_bidirectional_attention=True),
            "'gemma3_text' model with use_bidirectional_attention=True is not supported",
        ),
        (build_prompt_tuned, r"PEFT adapter 'default' \(PromptTuningConfig\) prepends virtual tokens"),
        (build_adaption_prompted, r"PEFT adapter 'default' \(AdaptionPromptConfig\) has attention of its own"),
        (build_headless, "LlamaModel has no output head"),
        (build_with_larger_head, "the output head has 128 tokens and the embedding 120"),
        (build_alora, r"PEFT adapter 'default' \(LoraConfig\) begins behind its alora_invocation_tokens"),
    ],
    ids=[
        *("gpt2", "kinds_of_layers", "dynamic_rope", "longrope", "rope_of_some_layers", "softcap", "bidirectional"),
        *("prompt_tuning", "adaption_prompt", "no_head", "larger_head", "alora"),
    ],
)
def test_what_would_run_wrongly_is_refused_by_name(build: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        Engine(build(), drafter="none")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: model.to(torch.bfloat16), "dtype were torch.float32 .* are torch.bfloat16"),
        (lambda model: model.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False), "tokens were 120"),
        (lambda model: setattr(model.config, "num_hidden_layers", 2), "layers were 3 .* are 2"),
    ],
    ids=["dtype", "vocabulary", "layers"],
)
@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle"])
def test_a_model_of_another_kind_than_an_engine_was_built_for_is_refused(change, what, drafter):
    """Caches are laid out for it: kernels would write bfloat16 into room for float32, or beyond it."""
    model = build_model("llama", torch.float32)
    engine = Engine(model, drafter=drafter, speculation="off" if drafter == "none" else TREE)
    engine.generate(PROMPTS, PARAMS)
    change(model)
    with pytest.raises(RuntimeError, match=what):
        engine.generate(PROMPTS, PARAMS)
    again = Engine(model, drafter=drafter, speculation="off" if drafter == "none" else TREE)
    assert all(len(completion.token_ids) == PARAMS.max_tokens for completion in again.generate(PROMPTS, PARAMS))


def test_an_engine_of_another_type_waits_for_a_rollout_that_casts_the_weights():
    model = build_model("llama", torch.float32)
    cast, plain = (Engine(model, drafter="none", compute_dtype=dtype) for dtype in (torch.bfloat16, None))
    rollout = cast.roll_out(cast.take_requests(PROMPTS, PARAMS))
    next(rollout)
    with pytest.raises(RuntimeError, match="a rollout with another compute_dtype may be under way"):
        plain.generate(PROMPTS, PARAMS)
    rollout.close()
    assert [c.token_ids for c in plain.generate(PROMPTS, PARAMS)] == reference_tokens(model)


@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle"])
def test_a_head_that_shares_the_embeddings_weights_computes_in_bfloat16_like_another(drafter):
    """As in SmolLM2, where TRL loads float32 and trains under autocast: the embedding itself is not cast."""
    tied = build_model("llama", torch.float32, tie_word_embeddings=True)
    apart = build_model("llama", torch.float32)
    apart.load_state_dict(tied.state_dict())
    before = copy_weights(tied)
    first, second = (
        Engine(model, drafter=drafter, speculation="off" if drafter == "none" else TREE, compute_dtype=torch.bfloat16)
        for model in (tied, apart)
    )
    assert first.generate(PROMPTS, PARAMS) == second.generate(PROMPTS, PARAMS)
    assert_same_weights(tied, before)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("drafter", ["none", "eagle"])
def test_layers_beyond_the_configs_are_not_run_as_in_transformers(drafter):
    model = build_model("llama", torch.float32)
    model.config.num_hidden_layers = 2
    engine = Engine(model, drafter=drafter, speculation="off" if drafter == "none" else TREE)
    assert [c.token_ids for c in engine.generate(PROMPTS, PARAMS)] == reference_tokens(model)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("first_to_end", [0, 1])
def test_engines_that_take_turns_may_end_in_any_order(first_to_end, compute_dtype):
    """What each found is put back when those that began later are gone: the trained weights are what they were."""
    model = build_lora(dtype=torch.float32)
    model.train()
    weights = copy_weights(model)
    attention = model.get_base_model().config._attn_implementation
    engines = [Engine(model, drafter="none", speculation="off", compute_dtype=compute_dtype) for _ in range(2)]
    params = SamplingParams(max_tokens=12)
    expected = [completion.token_ids for completion in engines[0].generate(PROMPTS, params)]
    requests = [engine.take_requests(PROMPTS, params) for engine in engines]
    rollouts = [engine.roll_out(own) for engine, own in zip(engines, requests, strict=True)]
    for rollout in rollouts:
        next(rollout)
    for index in (first_to_end, 1 - first_to_end):
        assert not model.training
        for _ in rollouts[index]:
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"), "what is the thread's own"
    assert [[sequence.token_ids for sequence in own] for own in requests] == [expected, expected]
    assert model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert model.get_base_model().config._attn_implementation == attention
    assert_same_weights(model, weights)


def _scale_logits(head: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
    return 2 * logits


def test_a_rollout_begun_before_the_last_is_closed_takes_the_head_as_it_is_now():
    model = build_model("llama", torch.float32)
    engine = Engine(model, drafter="none", speculation="off")
    sequences = engine.take_requests(PROMPTS, PARAMS)
    rollout = engine.roll_out(sequences)
    while any(sequence.finish_reason is None for sequence in sequences):
        next(rollout)
    model.lm_head.register_forward_hook(_scale_logits)
    tokens = [each.token_ids for each in engine.generate(PROMPTS, PARAMS)]
    rollout.close()
    assert tokens != [sequence.token_ids for sequence in sequences]
    assert tokens == [each.token_ids for each in engine.generate(PROMPTS, PARAMS)] == reference_tokens(model)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_rollout_begun_before_the_last_is_closed_merges_and_casts_weights_as_they_are_now(compute_dtype):
    model = build_lora(dtype=torch.float32).train()
    before = copy_weights(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = Engine(model, drafter="none", speculation="off", compute_dtype=compute_dtype)
    sequences = engine.take_requests(PROMPTS, PARAMS)
    rollout = engine.roll_out(sequences)
    while any(sequence.finish_reason is None for sequence in sequences):
        next(rollout)
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(2)
    tokens = [each.token_ids for each in engine.generate(PROMPTS, PARAMS)]
    assert model.training
    rollout.close()
    assert tokens != [sequence.token_ids for sequence in sequences]
    assert tokens == [each.token_ids for each in engine.generate(PROMPTS, PARAMS)]
    with torch.no_grad():
        for parameter in trained:
            parameter.div_(2)
    assert_same_weights(model, before)


def find_layout(target):
    own = target._fused._layers[0].states.own
    if own is None:
        pytest.skip("another library multiplies on this processor")
    return own.weight


@pytest.mark.skipif(not cpu.is_available(), reason="no compiled kernels")
def test_weights_are_laid_out_where_the_last_rollout_had_them():
    model = build_model("llama", torch.bfloat16)
    target = TargetModel(model)
    with target.prepared():
        first = find_layout(target)
        with target.prepared():
            assert find_layout(target).data_ptr() != first.data_ptr(), "the outer one goes on"
    before = first.clone()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with target.prepared():
        assert find_layout(target).data_ptr() == first.data_ptr()
        assert not torch.equal(first, before), "the weights as they are now"


@pytest.mark.skipif(not cpu.is_available(), reason="no compiled kernels")
def test_no_memory_is_kept_between_rollouts_where_little_is_free(monkeypatch):
    target = TargetModel(build_model("llama", torch.bfloat16))
    monkeypatch.setattr("fastgrpo.memory.find_available_bytes", lambda device: 2**10)
    with target.prepared():
        layout = weakref.ref(find_layout(target))
    assert layout() is None


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_rollout_may_be_closed_by_another_thread(compute_dtype):
    """Gradients and autocast are each thread's own, and the model is its owner's again."""
    model = build_lora(dtype=torch.float32)
    model.train()
    weights, attention = copy_weights(model), model.get_base_model().config._attn_implementation
    engines = [Engine(model, drafter="none", speculation="off", compute_dtype=compute_dtype) for _ in range(2)]
    rollouts = [engine.roll_out(engine.take_requests(PROMPTS, SamplingParams(max_tokens=12))) for engine in engines]
    for rollout in rollouts:
        next(rollout)

    def describe_thread():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(rollouts[1].close).result()
        assert not model.training, "the first rollout goes on"
        rollouts[0].close()
        assert describe_thread() == pool.submit(describe_thread).result() == (True, False)
    assert model.training and model.get_base_model().config._attn_implementation == attention
    assert_same_weights(model, weights)


def _subclass(model: nn.Module, name: str, scale: float) -> None:
    for layer in model.model.layers:
        kind = type(getattr(layer, name))

        class Scaled(kind):
            def forward(self, x: torch.Tensor | None = None, **kwargs: object) -> object:
                states = {"hidden_states": scale * kwargs.pop("hidden_states")} if x is None else {"x": scale * x}
                return super().forward(**states, **kwargs)

        getattr(layer, name).__class__ = Scaled


class _OtherMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[1], "mlp", _OtherMLP()),
        lambda model: _subclass(model, "mlp", 2.0),
        lambda model: _subclass(model, "self_attn", 2.0),
        lambda model: [setattr(layer.mlp, "act_fn", nn.GELU()) for layer in model.model.layers],
        lambda model: setattr(model.model.embed_tokens, "max_norm", 0.5),
    ],
    ids=["other-mlp", "mlp", "attention", "activation", "max-norm"],
)
def test_what_an_owner_puts_in_place_of_a_part_of_a_layer_is_run(change):
    model = build_model("llama", torch.float32)
    params = SamplingParams(max_tokens=10)
    before = reference_tokens(model, params)
    change(model)
    expected = reference_tokens(copy.deepcopy(model), params)  # a max_norm writes to the table
    assert expected != before
    engine = Engine(model, drafter="none", speculation="off")
    assert [each.token_ids for each in engine.generate(PROMPTS, params)] == expected


def _take_layer(model: PreTrainedModel) -> None:
    model.model.layers[1] = build_model("llama", torch.float64, seed=5).model.layers[1]


def _take_decoder(model: PreTrainedModel) -> None:
    model.model = build_model("llama", model.dtype, seed=5).model


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(_take_layer, torch.float64), (_take_decoder, torch.float32), (_take_decoder, torch.float64)],
    ids=["layer", "decoder", "decoder's-modules"],
)
@pytest.mark.filterwarnings("ignore:decoding goes through transformers' modules")
def test_parts_of_other_models_that_come_between_rollouts_are_run(change, dtype):
    """They have a config of their own, in which attention is looked up."""
    model = build_model("llama", dtype)
    engine = Engine(model, drafter="eagle-new", speculation=TREE)
    before = [each.token_ids for each in engine.generate(PROMPTS, PARAMS)]
    change(model)
    expected = reference_tokens(model)
    assert expected != before
    assert [each.token_ids for each in engine.generate(PROMPTS, PARAMS)] == expected
    assert reference_tokens(model) == expected, "attention is put back everywhere"


def _double(output: Any) -> Any:
    output.logits = 2 * output.logits
    return output


def _subclass_model(model: PreTrainedModel) -> None:
    class Doubled(type(model)):
        def forward(self, *args: object, **kwargs: object) -> object:
            return _double(super().forward(*args, **kwargs))

    model.__class__ = Doubled


def _patch_model(model: PreTrainedModel) -> None:
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: _double(forward(*args, **kwargs)))


def _hook_every_module(model: PreTrainedModel) -> RemovableHandle:
    def change(module: nn.Module, args: object, output: Any) -> Any:
        return 1.5 * output if isinstance(module, nn.Linear) else None

    return register_module_forward_hook(change)


@pytest.mark.parametrize(
    "change",
    [
        _subclass_model,
        _patch_model,
        lambda model: model.register_forward_hook(lambda module, args, output: _double(output)),
        _hook_every_module,
    ],
    ids=["subclass", "patch", "hook", "every-module"],
)
@pytest.mark.filterwarnings("ignore:decoding goes through transformers' modules")
def test_what_an_owner_puts_around_the_whole_model_has_its_say(change):
    model, params = build_model("llama", torch.float32), SamplingParams(max_tokens=8)
    before = reference_tokens(model, params)
    engines = (Engine(model, drafter="none"), Engine(model, drafter="eagle-new", speculation=TREE))
    hook = change(model)
    try:
        expected = reference_tokens(model, params)
        assert expected != before
        for engine in engines:
            assert [each.token_ids for each in engine.generate(PROMPTS, params)] == expected
    finally:
        if hook is not None:
            hook.remove()


def _shift_prompts(module: nn.Module, args: object, kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
    return args, kwargs | {"input_ids": (kwargs["input_ids"] + 1) % 120}


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])  # without it PEFT calls the causal LM itself
@pytest.mark.parametrize("place", ["model", "input", "tuner"])
@pytest.mark.filterwarnings("ignore:decoding goes through transformers' modules")
def test_what_an_owner_puts_around_an_adapted_model_has_its_say(place, task_type):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type=task_type)
    model, params = get_peft_model(build_model("llama", torch.float32), lora).eval(), SamplingParams(max_tokens=8)
    before = reference_tokens(model, params)
    engine = Engine(model, drafter="none")
    if place == "input":
        model.register_forward_pre_hook(_shift_prompts, with_kwargs=True)
    else:
        wrapper = model if place == "model" else model.base_model
        wrapper.register_forward_hook(lambda module, args, output: _double(output))
    expected = reference_tokens(model, params)
    assert (expected != before) == (place != "tuner" or task_type is not None)
    assert [each.token_ids for each in engine.generate(PROMPTS, params)] == expected


def test_a_forward_of_the_owners_that_passes_nothing_on_is_refused_by_name():
    model = build_model("llama", torch.float32)
    model.forward = lambda input_ids: type(model).forward(model, input_ids)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was given takes no \*\*kwargs.*: let it take them"):
        Engine(model, drafter="none").generate(PROMPTS, PARAMS)


def test_what_libraries_wrap_around_a_forward_for_training_takes_no_kernels_away():
    model = build_model("llama", torch.float32)
    add_token_scores(model, temperature=1.0)
    assert "forward" in vars(model) and not is_model_touched(model)
    model._original_forward = model.forward  # as `Accelerator.prepare_model` does
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    assert not is_model_touched(model)
    _patch_model(model)
    assert is_model_touched(model)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle-new", "block"])
def test_a_default_device_of_the_callers_changes_nothing(family, drafter):
    """On the meta device tensors have no address, and kernels that were given one ended the process."""
    model = build_model(family, torch.float32)
    prompts, params = [[3, 1, 4], [1, 5]], SamplingParams(max_tokens=6, seed=2)
    tokens = [each.token_ids for each in Engine(model, drafter="none").generate(prompts, params)]
    with torch.device("meta"):
        completions = Engine(model, drafter=drafter, speculation="fixed").generate(prompts, params)
    assert [each.token_ids for each in completions] == tokens


@pytest.mark.parametrize("drafter", ["eagle-new", "block"])
def test_a_rollout_in_inference_mode_can_be_learnt_from_and_its_engine_goes_on_outside(drafter):
    model = build_model("llama", torch.float32)
    expected, params = reference_tokens(model), replace(PARAMS, max_tokens=40)
    with torch.inference_mode():
        engine = Engine(model, drafter=drafter, speculation=TREE)
    assert isinstance(engine.drafter, TrainableDrafter)
    learner = Learner(engine.drafter)
    engine.on_finish.append(learner.add)
    with torch.inference_mode():
        engine.generate(PROMPTS, params)
    assert learner.learn(1.0, max_updates=1).num_updates == 1
    assert [each.token_ids for each in engine.generate(PROMPTS, PARAMS)] == expected
    with torch.inference_mode():
        assert [each.token_ids for each in engine.generate(PROMPTS, PARAMS)] == expected


@pytest.mark.parametrize(("drafter", "hidden_act"), [("none", "gelu"), ("eagle-new", "silu"), ("block", "silu")])
def test_autocast_around_a_rollout_changes_no_token(drafter, hidden_act):
    """An owner's, of either type; the plain path and heads in bfloat16 would hear of it."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model("llama", dtype, hidden_act=hidden_act)
        engine = Engine(model, drafter=drafter, speculation="off" if drafter == "none" else "fixed")
        params = SamplingParams(max_tokens=12)
        expected = [each.token_ids for each in engine.generate(PROMPTS, params)]
        for around in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", around):
                assert [each.token_ids for each in engine.generate(PROMPTS, params)] == expected
                assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == around


def test_engines_of_several_types_take_turns():
    """Each computes in its own, whoever began last."""
    models = [build_model("llama", torch.float32, seed=seed, hidden_act="gelu") for seed in (0, 1)]
    engines = [
        Engine(model, drafter="none", speculation="off", compute_dtype=dtype)
        for model, dtype in zip(models, (torch.bfloat16, None), strict=True)
    ]
    params = SamplingParams(max_tokens=12)
    expected = [[each.token_ids for each in engine.generate(PROMPTS, params)] for engine in engines]
    requests = [engine.take_requests(PROMPTS, params) for engine in engines]
    for _ in zip(*(engine.roll_out(own) for engine, own in zip(engines, requests, strict=True)), strict=False):
        pass
    assert [[sequence.token_ids for sequence in own] for own in requests] == expected


@pytest.mark.parametrize("is_same_model", [True, False])
def test_a_rollout_may_be_collected_while_another_puts_back(is_same_model):
    """The collector runs where it likes, and what it collects ends in the same thread."""
    modes, ended = RolloutModes(), []
    model = torch.nn.Linear(1, 1)
    other = model if is_same_model else torch.nn.Linear(1, 1)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.callback(ended.append, "first")
    second.callback(ended.append, "second")
    second.callback(modes.leave, other, first)
    modes.enter(other, first)
    modes.enter(model, second)
    leaving = threading.Thread(target=modes.leave, args=(model, second), daemon=True)
    leaving.start()
    leaving.join(timeout=20)
    assert not leaving.is_alive() and sorted(ended) == ["first", "second"] and not modes._entered


def test_another_thread_is_refused_a_model_in_a_rollout():
    """It would find, and put back in the end, what is only so while the first rollout lasts."""
    model = build_model("llama", torch.float32)
    attention, params = model.config._attn_implementation, SamplingParams(max_tokens=6)
    first, second = (Engine(model, drafter="none", speculation="off") for _ in range(2))
    expected = [completion.token_ids for completion in first.generate(PROMPTS, params)]
    requests = [first.take_requests(PROMPTS, params), second.take_requests(PROMPTS, params)]
    rollouts = [engine.roll_out(own) for engine, own in zip((first, second), requests, strict=True)]
    next(rollouts[0])
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="in a rollout of another thread: end that one first"):
            pool.submit(next, rollouts[1]).result()
        for _ in rollouts[0]:
            pass
        assert [c.token_ids for c in pool.submit(second.generate, PROMPTS, params).result()] == expected
    assert [sequence.token_ids for sequence in requests[0]] == expected
    assert model.config._attn_implementation == attention
    model(input_ids=torch.tensor([[1, 2]]))


def test_a_model_that_its_owner_calls_amid_a_rollout_says_what_to_do():
    model, params = build_model("llama", torch.float32), SamplingParams(max_tokens=5)
    engine = Engine(model, drafter="none", speculation="off")
    tokens = torch.tensor(PROMPTS[:1])
    engine.on_step.append(lambda record: model(tokens))
    with pytest.raises(RuntimeError, match=r"is in a rollout.*call a copy of it"):
        engine.generate(PROMPTS, params)
    engine.on_step.clear()
    assert model(tokens).logits.isfinite().all()
    assert [each.token_ids for each in engine.generate(PROMPTS, params)] == reference_tokens(model, params)


def test_a_rollout_that_is_under_way_goes_on_when_another_of_its_engine_is_asked_for():
    engine, params = Engine(shared_model("llama"), drafter="none", speculation="off"), SamplingParams(max_tokens=6)
    expected = [completion.token_ids for completion in engine.generate(PROMPTS, params)]
    sequences = engine.take_requests(PROMPTS, params)
    rollout = engine.roll_out(sequences)
    next(rollout)
    with pytest.raises(RuntimeError, match="in the middle of a rollout: exhaust or close that one first"):
        engine.generate(PROMPTS, params)
    assert len(engine.records) == 1
    for _ in rollout:
        pass
    assert [sequence.token_ids for sequence in sequences] == expected
    assert [completion.token_ids for completion in engine.generate(PROMPTS, params)] == expected


@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle"])
def test_another_rollout_may_begin_once_all_sequences_have_ended(drafter):
    """Ending the first late once dropped what ran in the next one of its engine, without a word."""
    model, params = shared_model("llama"), SamplingParams(max_tokens=6)
    engine = Engine(model, drafter=drafter, speculation=TREE)
    first, second = (engine.take_requests(PROMPTS, params) for _ in range(2))
    rollouts = [engine.roll_out(first), engine.roll_out(second)]
    while any(sequence.finish_reason is None for sequence in first):
        next(rollouts[0])
    next(rollouts[1])
    assert list(rollouts[0]) == []
    assert 1 + len(list(rollouts[1])) == len(engine.records)
    for sequences in (first, second):
        assert [sequence.token_ids for sequence in sequences] == expected_tokens(model, PROMPTS, params)


@pytest.mark.parametrize("part", ["planning", "drafter", "listener"])
def test_an_engine_asked_while_its_rollout_begins_or_ends_refuses_and_goes_on(part):
    """Another thread may ask while costs are measured, a listener after the last step."""
    model, params, refused = shared_model("llama"), SamplingParams(max_tokens=6), []
    engine = Engine(model, drafter="ngram", speculation=TREE)

    def ask(*args):
        with pytest.raises(RuntimeError, match="in the middle of a rollout"):
            engine.generate([[5]], params)
        refused.append(True)

    if part == "listener":
        engine.on_step.append(ask)
    else:
        owner = getattr(engine, part)
        begin = owner.begin
        owner.begin = lambda: (ask(), begin())
    tokens = [completion.token_ids for completion in engine.generate(PROMPTS, params)]
    assert tokens == expected_tokens(model, PROMPTS, params)
    assert len(refused) == (len(engine.records) if part == "listener" else 1)


def test_what_arrives_after_the_last_step_goes_on_in_the_same_rollout():
    model, params = shared_model("llama"), SamplingParams(max_tokens=6)
    engine = Engine(model, drafter="ngram", speculation=TREE)
    sequences = engine.take_requests(PROMPTS, params)
    arriving = sequences[1:]
    for _ in engine.roll_out(sequences[:1]):
        if arriving and not engine.scheduler.has_work:
            engine.scheduler.add(arriving.pop())
    assert [sequence.token_ids for sequence in sequences] == expected_tokens(model, PROMPTS, params)


def test_sequences_go_on_in_another_rollout_until_they_have_ended():
    model, params = shared_model("llama"), SamplingParams(max_tokens=6)
    engine = Engine(model, drafter="ngram", speculation=TREE)
    sequences = engine.take_requests(PROMPTS, params)
    rollout = engine.roll_out(sequences)
    next(rollout)
    rollout.close()
    list(engine.roll_out(sequences))
    assert [sequence.token_ids for sequence in sequences] == expected_tokens(model, PROMPTS, params)
    with pytest.raises(ValueError, match=r"request 0 has ended already \('length'\): leave it out"):
        list(engine.roll_out(sequences))
    new = engine.take_requests(PROMPTS, params)
    with pytest.raises(ValueError, match="request 1 stands twice in a rollout"):
        list(engine.roll_out([*new, new[1]]))
    assert [completion.token_ids for completion in engine.generate(PROMPTS, params)] == [s.token_ids for s in sequences]


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_step_outside_of_a_rollout_says_where_it_belongs(family):
    """Its attention would be transformers' own, which knows of no rows."""
    engine = Engine(shared_model(family), drafter="none")
    engine.scheduler.add(engine.take_requests([[7]], PARAMS)[0])
    with pytest.raises(AssertionError, match="call inside rollout_mode"):
        engine.step()


def test_a_drafter_may_belong_to_another_adapter_of_the_same_model():
    model = shared_model("llama")
    engine = Engine(model, drafter=EagleDrafter(TargetModel(model)), speculation=TREE)
    assert [c.token_ids for c in engine.generate(PROMPTS, PARAMS)] == expected_tokens(model, PROMPTS, PARAMS)


def test_without_speculation_a_named_drafter_keeps_no_features():
    engine = Engine(build_model("llama", torch.float32), drafter="eagle", speculation="off")
    assert engine.cache.features is None and engine.drafter.name == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotations_looked_up_are_those_of_the_module(family, dtype):
    """Bit for bit, whichever positions were asked for before and in whatever order."""
    rotary_emb = shared_model(family, torch.float32).model.rotary_emb
    table, like = RotationTable(rotary_emb), torch.zeros(1, dtype=dtype)
    for positions in ([0], [3, 3, 1], [40], [7, 200, 81], [100, 5]):
        expected = rotary_emb(like, position_ids=torch.tensor([positions]))
        found = table(torch.tensor(positions), like)
        assert all(torch.equal(ours, theirs[0]) for ours, theirs in zip(found, expected, strict=True))
        assert found[0].dtype == dtype
