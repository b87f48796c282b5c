"""Bad input gets a clear error before anything runs, and the engine can be used afterwards."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import (
    MAX_POSITION,
    VOCAB_SIZE,
    OracleDrafter,
    build_answers,
    build_model,
    expected_completion,
    expected_tokens,
    shared_model,
)
from fastgrpo import Completion, Engine, SamplingParams, SpeculationPlan
from fastgrpo.drafters.ngram import NgramDrafter

TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)
GOOD = [3, 1, 4]
PARAMS = SamplingParams(max_tokens=8, seed=6)


def assert_usable(engine: Engine) -> None:
    """Nothing is left of what went wrong."""
    engine.check()
    assert not engine.scheduler.has_work
    assert engine.cache.num_bytes == 0
    tokens = [completion.token_ids for completion in engine.generate([GOOD, [7], GOOD], PARAMS)]
    assert tokens == expected_tokens(shared_model("llama"), [GOOD, [7], GOOD], PARAMS)


# -- requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([GOOD, []], "prompt 1 is empty"),
        ([[1] * MAX_POSITION], "prompt 0 has 128 tokens and the model's context ends at 128: no token can be"),
        ([GOOD, [1] * 500], "prompt 1 has 500 tokens"),
        ([[1, 2, VOCAB_SIZE]], "prompt 0 has token id 120 at position 2, outside 0..119"),
        ([GOOD, GOOD, [-1]], "prompt 2 has token id -1 at position 0, outside 0..119"),
        (GOOD, "must be a list of prompts, got one prompt; wrap it in a list"),
        (None, "prompt_token_ids must be a list of prompts, got None"),
        (torch.tensor(3), "prompt_token_ids must be a list of prompts, got tensor(3)"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    engine = Engine(shared_model("llama"), drafter="ngram", speculation=TREE)
    engine.on_step.append(lambda record: pytest.fail("something was generated"))
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.generate(prompts, PARAMS)
    engine.on_step.clear()
    assert_usable(engine)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([GOOD, GOOD], [PARAMS], "got 2 prompts but 1 SamplingParams"),
        ([GOOD], [PARAMS, PARAMS], "got 1 prompts but 2 SamplingParams"),
        ([GOOD], [], "got 1 prompts but 0 SamplingParams"),
        ([GOOD], {"max_tokens": 3}, "sampling parameters must be SamplingParams, one for all or a list, got {"),
        ([GOOD, [1.5, 2.0]], PARAMS, r"prompt 1 must be a list of token ids, got \[1.5, 2.0\]; tokenize text first"),
        (["abc"], PARAMS, "prompt 0 must be a list of token ids, got 'abc'; tokenize text first"),
    ],
)
def test_requests_that_are_none_are_refused(prompts, params, message):
    engine = Engine(shared_model("llama"), drafter="none")
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, params)
    assert_usable(engine)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": -5}, "max_tokens must be at least 1, got -5"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1; use 0 for greedy"),
        ({"temperature": math.nan}, "temperature must be a finite number >= 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number >= 0, got inf"),
        ({"temperature": 1e-38}, "float32 can divide logits, got 1e-38; use 0 for greedy"),
        ({"temperature": 1e39}, "temperature must be 0 or between 1e-30 and 1e+30"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
        ({"top_p": -0.5}, "top_p must be in (0, 1], got -0.5"),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"top_k": 1.0}, "top_k must be an integer, got 1.0"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer, got 2.5"),
        ({"max_tokens": None}, "max_tokens must be an integer, got None"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
        ({"stop_token_ids": torch.tensor(5)}, "stop_token_ids must be a list of token ids, got tensor(5)"),
        ({"temperature": torch.ones(2)}, "temperature must be a number, got tensor([1., 1.])"),
        ({"top_p": np.ones(2)}, "top_p must be a number, got array([1., 1.])"),
        ({"top_k": 2**63}, "top_k must be less than 2^63, got 9223372036854775808; use 0 to keep every token"),
        ({"stop_token_ids": ("a",)}, "each of stop_token_ids must be an integer, got 'a'"),
    ],
)
def test_bad_sampling_params_are_named(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**setting)


def test_sampling_params_are_not_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PARAMS.temperature = 2.0


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_prompts_may_be_any_sequence_of_ids(kind):
    engine = Engine(shared_model("llama"), drafter="none")
    completions = engine.generate([kind(GOOD)], PARAMS)
    assert [c.token_ids for c in completions] == expected_tokens(shared_model("llama"), [GOOD], PARAMS)
    assert all(type(token_id) is int for token_id in completions[0].token_ids)
    assert all(type(logprob) is float for logprob in completions[0].logprobs)


def test_stop_tokens_may_be_a_list():
    assert SamplingParams(stop_token_ids=[1, 2]) == SamplingParams(stop_token_ids=(1, 2))


# -- engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"drafter": "eagel"},
            "drafter must be eagle, eagle-new, ngram, none, auto, block, or a folder with a saved head or a small "
            "causal LM; got 'eagel'",
        ),
        ({"drafter": "/no/such/folder"}, "got '/no/such/folder'"),
        ({"drafter": "ngram", "speculation": "fast"}, "speculation must be one of auto, off, paper, paper-own"),
        ({"drafter": "none", "speculation": "fast"}, "speculation must be one of auto, off, paper, paper-own"),
        ({"drafter": "none", "max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"drafter": "none", "max_num_seqs": 1.5}, "max_num_seqs must be an integer, got 1.5"),
        ({"drafter": "none", "compute_dtype": torch.float32}, "compute_dtype must be bfloat16, float16 or the model's"),
        ({"drafter": None}, "drafter must be a name, a folder or a Drafter, got None; 'none' drafts nothing"),
        ({"drafter": "ngram", "fixed_plan": 8}, "fixed_plan must be a SpeculationPlan, got 8"),
        ({"drafter": "ngram", "profile": 3}, "profile must be a HardwareProfile or a file that holds one, got 3"),
        ({"drafter": "none", "max_cache_bytes": "1GB"}, "max_cache_bytes must be an integer, got '1GB'; None takes"),
        ({"drafter": "none", "max_cache_bytes": 1.5}, "max_cache_bytes must be an integer, got 1.5; None takes"),
        ({"drafter": "none", "max_cache_bytes": 0}, "max_cache_bytes must be positive, got 0; None takes what is free"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine(shared_model("llama"), **settings)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("model", [None, "path-or-id", nn.Linear(2, 2)])
def test_what_is_no_model_is_named(model):
    with pytest.raises(ValueError, match=f"must be a transformers causal LM.* got {type(model).__name__}; Engine.from"):
        Engine(model)


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_name_of_a_type_is_not_the_type():
    with pytest.raises(ValueError, match=r"the model's own torch\.float64, got 'bfloat16'"):
        Engine(shared_model("llama"), drafter="none", compute_dtype="bfloat16")


def test_bounds_may_be_numpys_or_whole_floats():
    engine = Engine(shared_model("llama"), drafter="ngram", max_num_seqs=np.int64(2), max_cache_bytes=1e9)
    assert engine.admission.max_bytes == 10**9 and isinstance(engine.admission.max_bytes, int)
    assert_usable(engine)


@pytest.mark.parametrize("name", ["depth", "width", "num_draft_tokens", "most_draft_tokens"])
@pytest.mark.parametrize("value", [1.5, "3"])
def test_plans_of_other_than_integers_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got {value!r}"):
        SpeculationPlan(**{"depth": 2, "width": 2, "num_draft_tokens": 3, name: value})


def test_an_engine_from_a_folder(tmp_path):
    model = shared_model("qwen2", torch.float32)
    model.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, drafter="ngram", speculation="fixed", max_num_seqs=2)
    completions = engine.generate([GOOD, [7]], PARAMS)
    assert all(isinstance(completion, Completion) for completion in completions)
    assert [c.token_ids for c in completions] == expected_tokens(model, [GOOD, [7]], PARAMS)


def test_a_folder_with_pickled_weights_is_refused(tmp_path, monkeypatch):
    model = shared_model("llama", torch.float32)
    model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("something was unpickled"))
    with pytest.raises(OSError, match="safetensors"):
        Engine.from_pretrained(tmp_path, drafter="none")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        Engine.from_pretrained(tmp_path / "nowhere", drafter="none")


# -- what breaks on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", ["off", TREE], ids=["off", "tree"])
def test_logits_that_are_not_finite_name_request_and_position(plan, temperature):
    """The embedding of one token is broken, and so the first logits after it: the whole tree that drafts it is lost."""
    params = dataclasses.replace(PARAMS, temperature=temperature)
    prompts = [GOOD, [7], [9, 9]]
    answers = build_answers(shared_model("llama"), prompts, params)
    tokens = expected_tokens(shared_model("llama"), prompts, params)
    position, poison = next(
        (place, token_id)
        for place, token_id in enumerate(tokens[1])
        if place >= 2 and all(token_id not in other for other in (*prompts, tokens[0], tokens[2], tokens[1][:place]))
    )
    model = build_model("llama")
    drafter = OracleDrafter(answers) if plan == TREE else NgramDrafter()
    engine = Engine(model, drafter=drafter, speculation=plan)
    healthy = model.model.embed_tokens.weight.data[poison].clone()
    model.model.embed_tokens.weight.data[poison] = math.nan
    message = r"the model's logits are not finite at request 1, completion position (\d+);"
    with pytest.raises(FloatingPointError, match=message) as caught:
        engine.generate(prompts, params)
    depth = 0 if plan == "off" else plan.depth
    assert position + 1 - depth <= int(re.search(message, str(caught.value))[1]) <= position + 1
    model.model.embed_tokens.weight.data[poison] = healthy
    engine.drafter = NgramDrafter()
    assert_usable(engine)


@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle"])
def test_weights_that_have_diverged_stop_at_the_first_token(drafter):
    model = build_model("llama")
    engine = Engine(model, drafter=drafter, speculation="off" if drafter == "none" else TREE)
    healthy = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[5] = math.inf
    with pytest.raises(FloatingPointError, match="request 0, completion position 0"):
        engine.generate([GOOD, [7]], PARAMS)
    model.lm_head.weight.data = healthy
    assert_usable(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["propose", "on_step", "on_finish"])
def test_an_engine_survives_what_breaks_a_rollout(where, error):
    engine = Engine(shared_model("llama"), drafter="ngram", speculation=TREE, max_num_seqs=2)
    propose = engine.drafter.propose

    def fail(*args: object) -> None:
        raise error("broken")

    if where == "propose":
        engine.drafter.propose = fail
    else:
        getattr(engine, where).append(fail)
    with pytest.raises(error, match="broken"):
        engine.generate([GOOD] * 5, PARAMS)
    engine.drafter.propose = propose
    engine.on_step.clear()
    engine.on_finish.clear()
    assert_usable(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_engine_survives_what_breaks_the_end_of_a_rollout(error, monkeypatch):
    engine = Engine(shared_model("llama"), drafter="eagle", speculation=TREE, max_num_seqs=2)

    def fail() -> None:
        raise error("broken")

    with monkeypatch.context() as patch, pytest.raises(error, match="broken"):
        rollout = engine.roll_out(engine.take_requests([GOOD] * 5, PARAMS))
        next(rollout)
        patch.setattr(engine.drafter, "end", fail)
        rollout.close()
    assert engine.cache.num_bytes == 0
    assert_usable(engine)


_LEFT_OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import build_model
from fastgrpo import Engine, SamplingParams

def main():
    engine = Engine(build_model("llama"), drafter="none")
    rollout = engine.roll_out(engine.take_requests([[3, 1, 4]], SamplingParams(max_tokens=8)))
    next(rollout)
    raise ValueError("of the caller")

main()
"""


def test_a_process_that_ends_with_an_open_rollout_says_what_ended_it():
    """And is not aborted by PyTorch, whose tensors cannot be freed once the interpreter has gone."""
    command = [sys.executable, "-c", _LEFT_OPEN, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: of the caller"), done.stderr


def test_a_stop_token_that_is_never_said_changes_nothing():
    engine = Engine(shared_model("llama"), drafter="none")
    expected = expected_completion(shared_model("llama"), tuple(GOOD), PARAMS, 0)
    spare = next(token_id for token_id in range(VOCAB_SIZE) if token_id not in expected.token_ids)
    stopped = engine.generate([GOOD], dataclasses.replace(PARAMS, stop_token_ids=(spare, 10**6, -1)))[0]
    assert stopped.token_ids == expected.token_ids
    assert stopped.finish_reason == "length"
