"""Decoder layers without modules say what transformers' modules say; where they cannot, the modules run."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import VOCAB_SIZE, OracleDrafter, build_model, expected_tokens, shared_model
from fastgrpo import Engine, SamplingParams, SpeculationPlan
from fastgrpo import model as model_module
from fastgrpo.attention import ForwardBatch
from fastgrpo.decoder import NO_KERNELS, find_obstacle
from fastgrpo.kernels import cpu, linear
from fastgrpo.model import TargetModel
from fastgrpo.sampling import stream_key

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TREE = SpeculationPlan(depth=3, width=2, num_draft_tokens=5)
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")


@pytest.fixture
def without_kernels(monkeypatch):
    def switch(off=True):
        monkeypatch.setattr(cpu, "is_available", lambda: not off)

    return switch


@pytest.mark.parametrize("speculation", ["off", TREE], ids=["off", "tree"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_modules(family, speculation, without_kernels):
    model, params = shared_model(family, torch.float32), SamplingParams(max_tokens=16)
    engine = Engine(model, drafter="eagle", speculation=speculation, max_num_seqs=2)
    with engine.target.rollout_mode():
        assert engine.target._fused is not None
    ours = engine.generate(PROMPTS, params)
    assert [c.token_ids for c in ours] == expected_tokens(model, PROMPTS, params)
    without_kernels()
    with engine.target.rollout_mode():
        assert engine.target._fused is None
    theirs = engine.generate(PROMPTS, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=["bfloat16", "autocast"])
def test_half_precision_is_as_near_to_float32_as_the_modules(family, compute_dtype, without_kernels):
    """Packed and padded products, and a LoRA adapter folded in."""
    exact = build_model(family, torch.float32)
    model = build_model(family, torch.float32 if compute_dtype else torch.bfloat16)
    if compute_dtype:
        model, exact = (get_peft_model(each, LoraConfig(target_modules="all-linear")) for each in (model, exact))
        for each in (model, exact):
            torch.manual_seed(1)
            for name, weight in each.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(weight, std=0.2)
    logprobs = []
    for off in (False, True):
        without_kernels(off)
        engine = Engine(model, drafter="none", speculation="off", compute_dtype=compute_dtype)
        completions = engine.generate(PROMPTS, SamplingParams(max_tokens=8))
        with torch.no_grad():
            for prompt, completion in zip(PROMPTS, completions, strict=True):
                logits = exact(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
                chosen = torch.tensor(completion.token_ids)[:, None]
                expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
                logprobs.append((torch.tensor(completion.logprobs) - expected).abs().mean())
    ours, theirs = torch.stack(logprobs[:3]).mean(), torch.stack(logprobs[3:]).mean()
    assert ours < 0.15 and ours < 2 * theirs + 0.02


def _build_chains(target, lengths, nodes):
    """A cache of rows of so many positions, and a batch of chains behind them."""
    cache, most = target.build_cache(with_features=True), max(nodes)
    cache.add_rows(len(lengths))
    for row, length in enumerate(lengths):
        cache.reserve(row, length + most)
    for store in cache.stores:
        store.data.normal_(generator=torch.Generator().manual_seed(1))
    batch = ForwardBatch.build(
        token_ids=torch.arange(len(nodes) * most).view(-1, most),
        num_nodes=torch.tensor(nodes),
        visible=torch.ones(len(nodes), most, most, dtype=torch.bool).tril(),
        blocks=cache.blocks,
        lengths=torch.tensor(lengths),
        dtype=target.dtype,
        num_repeats=target.num_repeats,
        counts=nodes,
    )
    return cache, batch


@pytest.mark.parametrize("num_nodes", [(3, 1, 2), (4, 4, 4)], ids=["padded", "full"])
def test_nodes_are_laid_out_as_by_the_operators(num_nodes, without_kernels):
    """Trees behind two levels that stand in the cache, and behind blocks of any order."""
    visible = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, torch.arange(4), 2 + torch.arange(4)] = True
    found = []
    for off in (False, True):
        without_kernels(off)
        batch = ForwardBatch.build(
            token_ids=torch.arange(24).view(3, 8)[:, ::2],
            num_nodes=torch.tensor(num_nodes),
            visible=visible,
            blocks=64 * torch.tensor([[2, 9, 5], [7, 1, 1], [0, 3, 4]]),
            lengths=torch.tensor([60, 0, 127]),
            dtype=torch.float32,
            num_repeats=1,
        )
        found.append([batch.token_ids, batch.positions, batch.write_index, batch.row_starts])
        assert (batch.pad_index is None) == (min(num_nodes) == 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "compute_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
)
def test_layers_in_one_call_have_the_bits_of_kernels_one_by_one(family, dtype, compute_dtype, monkeypatch):
    """Hidden states, features, logits, and what was written to the cache; whatever the processor multiplies."""
    monkeypatch.setattr(linear, "find_layout", lambda _: linear.OwnLayout)
    target = TargetModel(build_model(family, dtype), compute_dtype=compute_dtype)
    found = []
    with target.rollout_mode():
        for is_compiled in (True, False):
            cache, batch = _build_chains(target, lengths=[70, 0, 5], nodes=[3, 5, 1])
            assert target._fused._compiled is not None
            if not is_compiled:
                target._fused._compiled = None
            output, logits = target.launch(batch, cache)
            assert output.features is not None and output.features.shape == (9, 4 * target.hidden_size)
            found.append([output.last_hidden, output.features, logits, cache.keys.data, cache.values.data])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_token_that_the_model_does_not_know_is_named_and_nothing_is_written(token_id, monkeypatch):
    monkeypatch.setattr(linear, "find_layout", lambda _: linear.OwnLayout)
    target = TargetModel(build_model("llama", torch.float32))
    with target.rollout_mode():
        cache, batch = _build_chains(target, lengths=[70, 0, 5], nodes=[3, 5, 1])
        before = [store.data.clone() for store in cache.stores]
        batch.token_ids[4] = token_id
        with pytest.raises(IndexError, match=f"token {token_id} is none of the model's {VOCAB_SIZE}"):
            target.launch(batch, cache)
        assert all(torch.equal(store.data, kept) for store, kept in zip(cache.stores, before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [(4, 3, 12), (6, 2, 9), (3, 1, 3)], ids=str)
def test_trees_have_the_bits_of_plain_decoding_in_half_precision(family, plan, monkeypatch):
    """With our own products, as on a processor without instructions for bfloat16: log-probabilities to the last bit."""
    monkeypatch.setattr(linear, "find_layout", lambda _: linear.OwnLayout)
    model = build_model(family, torch.bfloat16)
    depth, width, num_draft_tokens = plan
    prompts = [[5, 9, 11], list(range(20)), [7] * 61, list(range(3, 33)), [8, 8]]
    params = SamplingParams(max_tokens=40, seed=4)
    plain = Engine(model, drafter="none", speculation="off").generate(prompts, params)
    answers = {
        (tuple(prompt), stream_key(4, index)): completion.token_ids
        for index, (prompt, completion) in enumerate(zip(prompts, plain, strict=True))
    }
    shape = SpeculationPlan(depth=depth, width=width, num_draft_tokens=num_draft_tokens)
    engine = Engine(model, drafter=OracleDrafter(answers), speculation=shape)
    drafted = engine.generate(prompts, params)
    assert max(record.acceptance_length for record in engine.records) > 1.5
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert [c.logprobs for c in drafted] == [c.logprobs for c in plain]


def _with_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("is_adapted", [False, True])
def test_gradient_checkpointing_takes_no_kernels_away(is_adapted):
    """TRL's default: what it hooks to the embeddings changes no values."""
    model = build_model("llama", torch.float32)
    owner = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if is_adapted else model
    owner.gradient_checkpointing_enable()
    owner.enable_input_require_grads()
    target = TargetModel(owner)
    assert model.model.embed_tokens._forward_hooks
    with target.rollout_mode():
        assert find_obstacle(target.decoder, target.dtype) is None
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: 2 * output)
    with target.rollout_mode():
        assert find_obstacle(target.decoder, target.dtype) == "its modules have hooks or a forward of their own"


def _hook_head(head):
    head.register_forward_hook(lambda module, args, output: 3 * output)


def _cast_head(head):
    """As TRL's `cast_lm_head_to_fp32` does."""
    head.float().forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight)


@pytest.mark.parametrize(
    ("dtype", "change"), [(torch.float32, _hook_head), (torch.float32, _cast_head), (torch.bfloat16, _cast_head)]
)
def test_an_output_head_with_hooks_or_a_forward_of_its_own_is_called(dtype, change):
    model = build_model("llama", dtype)
    change(model.lm_head)
    params = SamplingParams(max_tokens=8)
    completion = Engine(model, drafter="ngram", speculation="fixed").generate([[3, 1, 4]], params)[0]
    ids = torch.tensor([[3, 1, 4, *completion.token_ids]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)[2:-1].gather(1, ids[0, 3:, None])[:, 0]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(torch.tensor(completion.logprobs), logprobs, atol=tolerance)


def _with_own_layer(model):
    class MyDecoderLayer(type(model.model.layers[0])):
        pass

    model.model.layers[0].__class__ = MyDecoderLayer


def _with_own_linear(model):
    class Scaled(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Scaled


def _lie_apart(parameter):
    parameter.data = parameter.data.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", lambda model: model.model.norm.bfloat16()),
        ("llama", lambda model: model.model.layers[1].input_layernorm.bfloat16()),
        ("qwen3", lambda model: model.model.layers[0].self_attn.k_norm.bfloat16()),
        ("llama", lambda model: _lie_apart(model.model.layers[0].post_attention_layernorm.weight)),
        ("llama", lambda model: _lie_apart(model.model.layers[0].mlp.down_proj.weight)),
        ("llama", lambda model: _lie_apart(model.model.embed_tokens.weight)),
        ("llama", lambda model: _lie_apart(model.lm_head.weight)),
    ],
)
@pytest.mark.filterwarnings("ignore:decoding goes through transformers' modules")
def test_weights_of_other_types_and_layouts_say_what_they_say_in_transformers(family, change):
    model = build_model(family, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 3.0)
    change(model)
    completion = Engine(model, drafter="none", speculation="off").generate([[5, 6, 7, 8]], SamplingParams(max_tokens=8))
    ids = torch.tensor([[5, 6, 7, 8, *completion[0].token_ids]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)[3:-1].gather(1, ids[0, 4:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion[0].logprobs), logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_hook, "hooks or a forward of their own"),
        (_with_own_layer, "of type MyDecoderLayer"),
        (_with_own_linear, "mlp.up_proj is a Scaled"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "the activation is 'gelu'"),
        (lambda model: model.double(), "no kernels for torch.float64"),
    ],
)
def test_what_is_not_covered_runs_as_it_is_and_is_named_once(change, reason):
    model = build_model("llama", torch.float32)
    change(model)
    model_module._warn_of.cache_clear()
    target = TargetModel(model)
    assert reason in (find_obstacle(target.decoder, target.dtype) or "")
    engine = Engine(model, drafter="none", speculation="off")
    with pytest.warns(UserWarning, match="goes through transformers' modules.*" + reason):
        engine.generate(PROMPTS, SamplingParams(max_tokens=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(PROMPTS, SamplingParams(max_tokens=3))


def test_a_model_that_rotates_a_part_of_heads_is_left_to_its_modules():
    """Its attention cannot run; kernels would read cos and sin beyond their end, and say something."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = build_model("llama", torch.float32, rope_parameters=rope)
    target = TargetModel(model)
    assert find_obstacle(target.decoder, target.dtype) == "4 of 8 numbers of a head are rotated"
    with pytest.warns(UserWarning, match="4 of 8 numbers"), pytest.raises(RuntimeError, match="size of tensor"):
        Engine(model, drafter="ngram", speculation=TREE).generate(PROMPTS, SamplingParams(max_tokens=3))


def test_a_missing_compiler_is_said_by_the_kernels_alone(without_kernels):
    without_kernels()
    target = TargetModel(shared_model("llama", torch.float32))
    assert find_obstacle(target.decoder, target.dtype) == NO_KERNELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with target.rollout_mode():
            pass
