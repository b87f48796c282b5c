"""A small model in the body of a larger one says the same, and so does its head."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastgrpo import Engine, SamplingParams, SpeculationPlan
from fastgrpo.bench.measure import describe_run
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.model import TargetModel
from tiny import save_tiny_model

_SPEC = importlib.util.spec_from_file_location("grow", Path(__file__).parent.parent / "bench" / "grow.py")
grow = sys.modules["grow"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(grow)

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
BODY = grow.Body(num_layers=11, hidden_size=96, num_heads=12, num_kv_heads=3, head_dim=16, intermediate_size=112)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def _grow(model, body=BODY):
    return grow.grow_model(model, body, dtype=torch.float32, device="cpu")


def test_a_grown_model_says_the_same(small):
    large, ids = _grow(small), torch.randint(0, 97, (3, 40))
    assert torch.allclose(large(ids).logits, small(ids).logits, atol=1e-3)
    layer = large.model.layers[0]
    assert sum((parameter == 0).all() for parameter in layer.parameters()) == 0
    for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
        assert (linear.weight != 0).all(), "what is not used is random"
    assert (large.lm_head.weight != 0).all()
    assert (large.config.hidden_size, large.config.num_hidden_layers, large.config.head_dim) == (96, 11, 16)
    assert large.config.grown_from == "a small model, 8 layers of 32"


def test_a_grown_model_learns_the_same_direction(small):
    large, ids = _grow(small), torch.randint(0, 97, (2, 20))
    for model in (small, large):
        model(ids, labels=ids).loss.backward()
    old, new = small.model.layers[3].mlp.up_proj.weight, large.model.layers[3].mlp.up_proj.weight
    assert large.config.num_hidden_layers == 11 and old.grad.norm() > 0
    assert torch.allclose(new.grad[:48, :32], old.grad, rtol=1e-2, atol=1e-5)


def test_a_grown_head_drafts_the_same(small, tmp_path):
    old, large = TargetModel(small), TargetModel(_grow(small))
    drafter = EagleDrafter(old, draft_vocab_size=60)
    head = grow.grow_head(drafter.head, old, large, BODY)
    grow.save_head(head, tmp_path, large)
    plan, prompts = SpeculationPlan(depth=3, width=2, num_draft_tokens=5), [[5, 6, 7], [8, 9]]
    small_engine = Engine(small, drafter=drafter, speculation=plan)
    large_engine = Engine(large.model, drafter=tmp_path, speculation=plan)
    params = SamplingParams(max_tokens=24, temperature=0.7)
    tokens = [[c.token_ids for c in engine.generate(prompts, params)] for engine in (small_engine, large_engine)]
    assert tokens[0] == tokens[1]
    hits = [[record.hits for record in engine.records] for engine in (small_engine, large_engine)]
    assert hits[0] == hits[1] and any(map(any, hits[0]))


def test_a_head_that_would_read_other_layers_is_refused():
    shallow = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 4})))
    old, large = TargetModel(shallow), TargetModel(_grow(shallow))
    with pytest.raises(ValueError, match=r"reads the inputs of layers \(2, 2, 1\); in a body of 11 it would"):
        grow.grow_head(EagleDrafter(old, draft_vocab_size=60).head, old, large, BODY)


def test_a_body_too_small_or_a_model_of_another_kind_is_refused(small):
    with pytest.raises(ValueError, match="the body has hidden_size=16, the model has 32"):
        _grow(small, dataclasses.replace(BODY, hidden_size=16))
    with pytest.raises(ValueError, match="head_dim=12 must be a multiple of the model's 8"):
        _grow(small, dataclasses.replace(BODY, head_dim=12))
    for sizes, message in (
        ({"num_heads": 16}, "num_heads=16 must be a multiple of its num_kv_heads=3"),
        ({"num_kv_heads": 0}, "the body has num_kv_heads=0, the model has 2"),
        ({"hidden_size": 100}, "hidden_size=100 must be a multiple of its num_heads=12"),
        ({"head_dim": 0}, "head_dim=0 must be a multiple of the model's 8"),
    ):
        with pytest.raises(ValueError, match=message):
            _grow(small, dataclasses.replace(BODY, **sizes))
    with pytest.raises(ValueError, match="got model_type='qwen2'"):
        sizes = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 48}
        grow.Plan(Qwen2ForCausalLM(Qwen2Config(**sizes)).config, BODY)


def test_the_command_writes_a_folder_that_every_command_takes(tmp_path, model_dir):
    body = grow.Body(num_layers=5, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96)
    grow.BODIES["tiny"] = body
    grow.main([str(tmp_path / "grown"), "--body", "tiny", "--model", str(model_dir), "--dtype", "float32"])
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype="float32")
    ids = torch.randint(0, 40, (2, 30))
    small = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    assert torch.allclose(grown(ids).logits, small(ids).logits, atol=1e-3)
    record = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert record["grown_from"].endswith("in the body of a tiny model")
    assert (tmp_path / "grown" / "tokenizer.json").exists()
    assert describe_run("", {"model": str(tmp_path / "grown")})["grown_from"] == record["grown_from"]
    assert "grown_from" not in describe_run("", {"model": str(model_dir)}) | describe_run("", {"model": "demo"})
