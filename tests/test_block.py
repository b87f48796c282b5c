"""A block head drafts all levels in one pass: exactly, and as it was trained."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from conftest import HIDDEN_SIZE, VOCAB_SIZE, build_model, expected_tokens, shared_model
from fastgrpo import block_training, pretrain
from fastgrpo.block_training import collate, compute_hidden, count_tokens, draw_anchors
from fastgrpo.cache import locate
from fastgrpo.drafters import DraftContext
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.block_files import load_block_head, save_block_head
from fastgrpo.drafters.block_head import build_block_head
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.model import TargetModel
from fastgrpo.objective import BlockObjective
from fastgrpo.options import DraftTrainOptions
from fastgrpo.planner import AutoPlanner
from fastgrpo.profiler import measure_costs
from fastgrpo.sampling import SamplingBatch
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan
from test_heads import (
    BLOCK,
    CHAIN,
    DEEP,
    PROMPTS,
    TREE,
    assert_refused,
    build_trained,
    collect_rollouts,
    edit_config,
    edit_tensors,
    shake,
)
from tiny import save_tiny_model


def build_block(model: PreTrainedModel, **settings: object) -> BlockDrafter:
    return BlockDrafter(TargetModel(model), **settings)


def collate_all(rollouts: list[FinishedRollout], drafter: BlockDrafter) -> block_training.BlockBatch:
    return collate(rollouts, drafter.target, torch.float32, block_size=drafter.head.block_size)


# -- training is drafting --------------------------------------------------------------------------------------


def draft_logits(drafter: BlockDrafter, rollout: FinishedRollout, num_cached: int, depth: int) -> list[torch.Tensor]:
    """The logits of each level while a chain is drafted behind `num_cached` tokens, held to the true tokens."""
    target = drafter.target
    cache = target.build_cache(with_features=True)
    cache.add_rows(1)
    cache.reserve(0, len(rollout.features) + 1)
    index = locate(cache.blocks, torch.arange(num_cached)[None])[0]
    cache.features.write(0, index, rollout.features[:num_cached])
    cache.lengths = [num_cached]
    tokens = rollout.prompt_ids + rollout.token_ids
    tokens += [0] * depth  # beyond the end anything may be drafted
    sequence = Sequence(
        request_id=0, prompt_ids=tokens[: num_cached + 1], params=SamplingParams(), max_tokens=99, stream_key=1
    )
    context = DraftContext(
        sequences=[sequence],
        cache=cache,
        device=torch.device("cpu"),
    )
    levels: list[torch.Tensor] = []

    def follow(logits: torch.Tensor, noise_rows: SamplingBatch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        levels.append(logits[0, 0])
        return logits.new_zeros(1, 1, 1), torch.tensor([[[tokens[num_cached + len(levels)]]]])

    drafter.rank = follow
    drafter._rows.clear()
    with target.rollout_mode():
        drafter.propose(context, SpeculationPlan(depth=depth, width=1, num_draft_tokens=depth))
    return levels


@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_head_is_trained_on_what_it_computes_when_it_drafts(family, is_short):
    """Level k behind anchor n in training is level k of a draft whose pending token is token n."""
    model = build_model(family, torch.float32)
    drafter = shake(build_block(model, draft_vocab_size=90))
    rollouts = collect_rollouts(model, 4)[1:4:2] if is_short else collect_rollouts(model, 3)
    batch = collate_all(rollouts, drafter)
    with torch.no_grad():
        logits = drafter.head.lm_head(compute_hidden(drafter.head, drafter.target, batch))
    checked = 0
    for place, (anchor, segment) in enumerate(zip(batch.anchors.tolist(), batch.anchor_segments.tolist(), strict=True)):
        if segment < 0:
            assert not batch.is_taught[:, place].any()
            continue
        rollout = rollouts[segment]
        drafted = draft_logits(drafter, rollout, anchor, drafter.head.block_size)
        for level, row in enumerate(drafted):
            is_text = anchor + level < len(rollout.features)
            assert bool(batch.is_taught[level, place]) == is_text
            if is_text:
                torch.testing.assert_close(row, logits[level, place], rtol=1e-4, atol=1e-4)
                hidden = rollout.features[anchor + level, 3 * HIDDEN_SIZE :]
                assert torch.equal(batch.target_hidden[level, place], hidden)
                checked += 1
    assert checked > 20


def test_a_shorter_block_is_the_beginning_of_a_longer_one():
    model = shared_model("llama")
    drafter, rollout = shake(build_block(model)), collect_rollouts(model, 1)[0]
    deep = draft_logits(drafter, rollout, 9, 8)
    for depth in (1, 2, 5):
        for level, row in enumerate(draft_logits(drafter, rollout, 9, depth)):
            torch.testing.assert_close(row, deep[level], rtol=1e-9, atol=1e-9)


def test_a_level_depends_on_the_token_before_and_on_no_other():
    """The correction's only door: other tokens of the draft do not enter."""
    model = shared_model("llama")
    drafter, rollout = shake(build_block(model)), collect_rollouts(model, 1)[0]
    before = draft_logits(drafter, rollout, 9, 4)
    ids = list(rollout.token_ids)
    ids[9 + 1 - len(rollout.prompt_ids)] = (ids[9 + 1 - len(rollout.prompt_ids)] + 1) % VOCAB_SIZE
    after = draft_logits(drafter, replace(rollout, token_ids=ids), 9, 4)  # the first draft token is another
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])


def test_every_position_of_a_completion_can_be_an_anchor_and_none_of_the_prompt_but_the_last():
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model, 4)
    seen: set[tuple[int, int]] = set()
    for shift in range(60):  # other text, other anchors
        other = [replace(r, token_ids=[(t + shift) % VOCAB_SIZE for t in r.token_ids]) for r in rollouts]
        drawn = draw_anchors(other)
        assert all(torch.equal(a, b) for a, b in zip(drawn, draw_anchors(other), strict=True)), "the batch is the seed"
        seen |= {(index, anchor) for index, own in enumerate(drawn) for anchor in own.tolist()}
    expected = {
        (index, anchor) for index, r in enumerate(rollouts) for anchor in range(len(r.prompt_ids) - 1, len(r.features))
    }
    assert seen == expected
    assert [count_tokens(r) for r in rollouts] == [len(r.token_ids) for r in rollouts]


def test_a_long_completion_teaches_its_end(monkeypatch):
    """Bounded memory: the last tokens are anchors, a bounded number before them is read."""
    model = shared_model("llama", torch.float32)
    rollout, drafter = collect_rollouts(model, 1)[0], build_block(model)
    monkeypatch.setattr(block_training, "_MAX_TAUGHT", 9)
    monkeypatch.setattr(block_training, "_MAX_CONTEXT", 5)
    batch = collate_all([rollout], drafter)
    end = len(rollout.features)
    own = batch.anchors[batch.anchor_segments == 0]
    assert own.min() >= end - 9 and own.max() == end - 1
    assert batch.positions[batch.segments == 0].tolist() == list(range(end - 14, end - 1))


# -- drafting ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("plan", [CHAIN, TREE, DEEP], ids=["chain", "tree", "deeper_than_the_block"])
def test_tokens_are_those_of_plain_decoding(plan, temperature, is_trained):
    """As for every drafter (test_engine_laws.py)."""
    model = shared_model("llama")
    drafter = build_trained(BLOCK) if is_trained else build_block(model, draft_vocab_size=80)
    engine = Engine(model, drafter=drafter, speculation=plan, max_num_seqs=3)
    engine.on_step.append(lambda record: engine.check())
    params = SamplingParams(max_tokens=11, temperature=temperature, seed=2)
    prompts = [*PROMPTS, [7], *PROMPTS[:2]]  # one prompt has no feature at first
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)


def test_a_draft_is_one_pass_however_deep():
    model = shared_model("llama")
    drafter = build_block(model)
    forward, passes = drafter.forward, []

    def count(*args: object) -> torch.Tensor:
        passes.append(args[-1])
        return forward(*args)

    drafter.forward = count
    engine = Engine(model, drafter=drafter, speculation=CHAIN)
    engine.generate(PROMPTS, SamplingParams(max_tokens=9))
    assert passes == [8] * len(engine.records)


# -- what it costs ---------------------------------------------------------------------------------------------


def test_the_profiler_can_time_a_block():
    model = shared_model("llama", torch.float32)
    drafter, target = build_block(model), TargetModel(model)
    with target.rollout_mode():
        profile = measure_costs(target, drafter).profile
    assert len(profile.draft_s) == len(profile.draft_start_s) == len(profile.num_tokens)
    assert drafter.count_unread([]) == 0 and drafter._rows.num_read == []
    planner = AutoPlanner(profile)  # whose prices are never 0, though measured ones may be
    assert AutoPlanner.from_state(json.loads(json.dumps(planner.state_dict()))).profile == planner.profile


# -- learning ----------------------------------------------------------------------------------------------------


def test_levels_far_down_weigh_less():
    objective = BlockObjective(TargetModel(shared_model("llama")), 8)
    weights = torch.stack([objective.weigh(row) for row in torch.eye(8)])
    torch.testing.assert_close(weights, torch.exp(-torch.arange(8) / 4))


# -- files -------------------------------------------------------------------------------------------------------


def test_another_shape_of_head_is_read_and_not_restored_into(tmp_path):
    model = build_model("llama", torch.float32)
    target = TargetModel(model)
    head = build_block_head(target, 60, block_size=5, num_layers=1, rank=3)
    save_block_head(head, tmp_path, target, compact=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_block_head(tmp_path, target)
    assert (loaded.block_size, len(loaded.layers), loaded.rank) == (5, 1, 3)
    assert torch.allclose(loaded.fc.weight, head.fc.weight, rtol=2**-8)
    with pytest.raises(ValueError, match=r"block_size, layers and rank 5, 1, 3; this one has 8, 2, 64"):
        build_block(model).restore(tmp_path)
    params = SamplingParams(max_tokens=9)
    engine = Engine(model, drafter=tmp_path, speculation=CHAIN)
    plain = Engine(model, drafter="none").generate(PROMPTS, params)
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] == [c.token_ids for c in plain]


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["previous_in.weight"][3, 4] = math.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_config(f, architectures=["LlamaForCausalLMEagle3"]),
            "num_hidden_layers 2; only heads of one layer are",
        ),
        (lambda f: edit_config(f, target_layers=[0, 1, 2]), r"target_layers \[0, 1, 2\], the target has"),
        (lambda f: edit_config(f, block_size=1), "block_size 1, which must be a number from 2 to 64"),
        (lambda f: edit_config(f, correction_rank="many"), "correction_rank 'many', which must be a number"),
        (lambda f: edit_config(f, block_size=5), r"mask_embeddings is \(7, 32\), expected \(4, 32\)"),
        (lambda f: edit_config(f, num_hidden_layers=3), "does not fit this target: layers.2"),
        (lambda f: edit_config(f, is_causal=False), "sets is_causal, which is not known here"),
        (lambda f: edit_config(f, target_final_norm=[2.0] * 32), "was trained for another target"),
        (lambda f: edit_config(f, target_final_norm="smooth"), "was trained for another target"),
        (lambda f: edit_tensors(f, set_nan), "not finite in previous_in.weight"),
    ],
    ids=[
        "said_to_be_of_eagle",
        "other_layers",
        "too_short_a_block",
        "no_number",
        "shorter_block",
        "one_layer_more",
        "unknown_setting",
        "other_target",
        "no_fingerprint",
        "nan",
    ],
)
def test_a_block_head_that_does_not_fit_is_refused(tmp_path, damage, message):
    assert_refused(BLOCK, tmp_path, damage, message)


def test_a_block_head_is_trained_before_any_run(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    settings = {"dtype": "float32", "device": "cpu", "num_prompts": 6, "num_generations": 2, "max_tokens": 16}
    options = DraftTrainOptions(model=str(folder), output=tmp_path / "run", kind="block", updates=6, **settings)
    result = pretrain.run_draft_training(options, "")
    assert len(result["acceptance"]) == 8
    engine = Engine.from_pretrained(folder, drafter=tmp_path / "run" / "head", speculation=TREE, device="cpu")
    assert isinstance(engine.drafter, BlockDrafter)
    assert engine.generate([[5, 6, 7]], SamplingParams(max_tokens=5))[0].token_ids
    with pytest.raises(ValueError, match=r"holds a run with kind='block', asked for 'eagle'"):
        pretrain.run_draft_training(replace(options, kind="eagle"), "")
    with pytest.raises(ValueError, match="not a block head"):
        EagleDrafter(engine.target).save(tmp_path / "eagle")
        pretrain.run_draft_training(replace(options, output=tmp_path / "other", head=tmp_path / "eagle"), "")
