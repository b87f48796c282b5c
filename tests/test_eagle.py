"""An EAGLE head learns what it will be asked, by the loss that is written down; its files are EAGLE-3's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from conftest import HIDDEN_SIZE, VOCAB_SIZE, build_model, shared_model
from fastgrpo import draft_loss, unroll
from fastgrpo.cache import locate
from fastgrpo.draft_loss import LOSSES, DraftLoss
from fastgrpo.drafters import DraftContext, head_drafter
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_layer import FusedMidLayer
from fastgrpo.engine import FinishedRollout
from fastgrpo.kernels import cpu, linear
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan
from fastgrpo.unroll import NUM_STEPS, collate, compute_outputs, count_pairs
from test_heads import assert_same_head, collect_rollouts, edit_tensors, head_bits


def build_drafter_for(model: PreTrainedModel, **settings: object) -> EagleDrafter:
    return EagleDrafter(TargetModel(model), **settings)


# -- drafting ----------------------------------------------------------------------------------------------


def draft_chains(drafter: EagleDrafter, rollout: FinishedRollout, num_pairs: int, depth: int) -> list[torch.Tensor]:
    """The head's outputs while it drafts a chain behind `num_pairs` pairs, held to the true tokens."""
    target = drafter.target
    cache = target.build_cache(with_features=True)
    cache.add_rows(1)
    cache.reserve(0, len(rollout.features) + 1)
    cache.features.write(0, locate(cache.blocks, torch.arange(len(rollout.features))[None])[0], rollout.features)
    cache.lengths = [num_pairs]
    tokens = rollout.prompt_ids + rollout.token_ids
    sequence = Sequence(
        request_id=0, prompt_ids=tokens[: num_pairs + 1], params=SamplingParams(), max_tokens=99, stream_key=1
    )
    context = DraftContext(
        sequences=[sequence],
        cache=cache,
        device=torch.device("cpu"),
    )
    outputs: list[torch.Tensor] = []

    def follow(output: torch.Tensor, noise_rows: SamplingBatch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        outputs.append(output[0, 0])
        chosen = tokens[num_pairs + len(outputs)]
        return output.new_zeros(1, 1, 1), torch.tensor([[[chosen]]])

    drafter.rank_level = follow
    drafter.begin()
    drafter._compiled = None  # which asks nobody between its levels
    with target.rollout_mode():
        drafter.propose(context, SpeculationPlan(depth=depth, width=1, num_draft_tokens=depth))
    return outputs


@pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")
@pytest.mark.parametrize(
    ("dtype", "compute_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_a_draft_in_one_call_has_the_bits_of_kernels_in_turn(dtype, compute_dtype, norm_before_residual, monkeypatch):
    """Trees of several rows of unlike lengths, shallow and deep, narrow and wide, and what was written to the cache."""
    monkeypatch.setattr(linear, "find_layout", lambda _: linear.OwnLayout)
    target = TargetModel(build_model("llama", dtype), compute_dtype=compute_dtype)
    head = EagleDrafter.build_head(target, VOCAB_SIZE)
    head.norm_before_residual = norm_before_residual
    drafter = EagleDrafter(target, head=head)
    drafter.calibration.slope[:], drafter.calibration.offset[:] = np.linspace(0.7, 1.4, 8), np.linspace(-0.5, 0.5, 8)
    monkeypatch.setattr(drafter.calibration, "fit", lambda: None)
    shapes = [(1, 1, 1, True), (1, 5, 3, True), (4, 3, 9, True), (4, 3, 9, False), (8, 2, 40, True), (2, 9, 60, True)]
    for depth, width, num_draft_tokens, with_noise in shapes:
        plan = SpeculationPlan(depth=depth, width=width, num_draft_tokens=num_draft_tokens)
        drafter.ranks_with_noise = with_noise
        found = []
        for is_compiled in (True, False):
            drafter.begin()
            drafter.prepare()  # what was taken away before is there again
            assert drafter._layer is not None and drafter._compiled is not None
            assert drafter.fast_head.norm_before_residual == norm_before_residual
            if not is_compiled:
                drafter._compiled = None
            with drafter.target.rollout_mode():
                draft = drafter.propose(build_context(drafter.target, [3, 9, 60]), plan)
            cache = drafter._rows.cache
            assert draft.counts == tuple(draft.num_nodes.tolist())
            found.append([getattr(draft, name) for name in head_drafter._PARTS] + [cache.keys.data, cache.values.data])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True)), plan


@pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")
def test_a_head_with_fewer_tokens_than_a_level_is_wide_drafts_what_there_is(monkeypatch):
    monkeypatch.setattr(linear, "find_layout", lambda _: linear.OwnLayout)
    drafter = EagleDrafter(TargetModel(build_model("llama", torch.float32)), draft_vocab_size=2)
    plan, found = SpeculationPlan(depth=3, width=3, num_draft_tokens=30), []
    for is_compiled in (True, False):
        drafter.begin()
        if not is_compiled:
            drafter._compiled = None
        with drafter.target.rollout_mode():
            draft = drafter.propose(build_context(drafter.target, [3, 9]), plan)
        found.append([getattr(draft, name) for name in head_drafter._PARTS])
    assert found[0][0].shape == (2, 1 + 2 + 2 * 2 + 3 * 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def build_context(target: TargetModel, lengths: list[int]) -> DraftContext:
    """Sequences with so many cached tokens, whose features are any numbers."""
    cache = target.build_cache(with_features=True)
    cache.add_rows(len(lengths))
    for row, length in enumerate(lengths):
        cache.reserve(row, length)
    cache.features.data.normal_(generator=torch.Generator().manual_seed(1))
    cache.lengths = list(lengths)
    sequences = [
        Sequence(
            request_id=row,
            prompt_ids=[(7 * i + row) % VOCAB_SIZE for i in range(length + 1)],
            params=SamplingParams(),
            max_tokens=99,
            stream_key=row,
        )
        for row, length in enumerate(lengths)
    ]
    return DraftContext(
        sequences=sequences,
        cache=cache,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("kind", [EagleDrafter, BlockDrafter])
def test_a_step_made_again_may_let_in_a_long_text(kind):
    """The row of the failed attempt has been read to its end, and drafts what it drafted before."""
    drafter = kind(TargetModel(build_model("llama", torch.float32)))
    plan = SpeculationPlan(depth=3, width=2, num_draft_tokens=5)
    beside, context = (build_context(drafter.target, lengths) for lengths in ([9, 60], [9]))
    cache = context.cache
    drafter.begin()
    with drafter.target.rollout_mode():
        before = drafter.propose(context, plan)
        cache.add_rows(1)
        cache.reserve(1, 60)
        cache.lengths = [9, 60]
        draft = drafter.propose(replace(beside, cache=cache), plan)
    assert draft.token_ids[0].tolist() == before.token_ids[0].tolist()
    assert torch.allclose(draft.scores[0], before.scores[0], atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_long_text_is_read_by_its_keys_and_values_alone(dtype, tolerance, monkeypatch):
    """What no draft begins from has no output; the trees, and what is kept of the text, are the same."""
    drafter = build_drafter_for(build_model("llama", dtype))
    context, plan = build_context(drafter.target, [3, 1, 60, 9]), SpeculationPlan(depth=3, width=3, num_draft_tokens=8)
    found = []
    for most, num_passes in ((10**9, 0), (0, 1)):
        monkeypatch.setattr(head_drafter, "_MANY_TOKENS", most)
        passes = []
        monkeypatch.setattr(drafter, "catch_up", lambda c, p=passes: p.append(1) or EagleDrafter.catch_up(drafter, c))
        drafter.begin()
        with drafter.target.rollout_mode():
            draft = drafter.propose(context, plan)
            cache = drafter._rows.cache
            rows = torch.tensor([0, *[2] * 60])
            places = cache.locate(rows, torch.tensor([2, *range(60)]))
            found.append((draft, cache.keys.flat(0)[places], cache.values.flat(0)[places]))
        assert len(passes) == num_passes
    (draft, *states), (expected, *expected_states) = found
    assert torch.equal(draft.token_ids, expected.token_ids) and torch.equal(draft.parents, expected.parents)
    for ours, theirs in zip((draft.scores, *states), (expected.scores, *expected_states), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().nan_to_num(0, 0, 0).max()))


@pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_the_fused_layer_is_that_of_the_modules(dtype, tolerance, norm_before_residual, monkeypatch):
    model = build_model("llama", dtype)
    rollout = collect_rollouts(model, 1)[0]
    outputs = []
    for covers in (True, False):
        monkeypatch.setattr(FusedMidLayer, "covers", staticmethod(lambda head, covers=covers: covers))
        drafter = build_drafter_for(model)
        drafter.head.norm_before_residual = norm_before_residual
        outputs.append(torch.stack(draft_chains(drafter, rollout, 4, 4)).float())
        assert (drafter._layer is not None) == covers
    assert torch.allclose(outputs[0], outputs[1], atol=tolerance * float(outputs[1].abs().max()))
    assert outputs[1].std() > 0.1


@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_head_is_trained_on_what_it_computes_when_it_drafts(family, is_short):
    """Unroll step k at pair i is the output at depth k + 1 of a chain behind the first i - k + 1 pairs."""
    model = build_model(family, torch.float32)
    drafter = build_drafter_for(model)
    other, rollout = collect_rollouts(model, 4)[1:4:2] if is_short else collect_rollouts(model, 3)[:3:2]
    with torch.no_grad():
        for parameter in drafter.head.parameters():  # away from the start, where much is zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = collate([other, rollout], drafter.target, torch.float32)
    count = len(rollout.prompt_ids) - 2  # of its pairs, two are unrolled before those that teach, the others only read
    first = count_pairs(other) - max(count - 2, 0)  # where its pair 0 would stand among the unrolled ones
    with torch.no_grad():
        steps = compute_outputs(drafter.head, drafter.target, batch)
    assert len(steps) == NUM_STEPS
    length = len(rollout.features) - 1
    for num_pairs in (max(count - 1, 1), count + 1, count + 4, length - 2):
        outputs = draft_chains(drafter, rollout, num_pairs, len(steps))
        for depth, output in enumerate(outputs):
            pair = num_pairs - 1 + depth
            if pair >= count:
                assert batch.is_reachable[depth, first + pair]
                torch.testing.assert_close(output, steps[depth, first + pair], rtol=1e-4, atol=1e-4)


# -- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("chunk", "rows_at_once"), [(1, 128), (100, 3), (10**6, 128)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(chunk, rows_at_once, name, monkeypatch):
    monkeypatch.setattr(draft_loss, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(draft_loss, "_CPU_CHUNK_ROWS", rows_at_once)
    monkeypatch.setattr(draft_loss, "_LEAST_OVERLAP", 1e-6)
    generator = torch.Generator().manual_seed(0)
    hidden, target_hidden, rows = (torch.randn(*shape, generator=generator) for shape in ((3, 7, 8), (7, 8), (50, 8)))
    temperature, weights = torch.rand(7, generator=generator) + 0.5, torch.rand(3, 7, generator=generator)
    scale = torch.tensor([1.0, 2.0, 0.5])
    gradients, values = [], []
    for is_ours in (True, False):
        leaf = hidden.clone().requires_grad_(True)
        if is_ours:
            losses = DraftLoss.apply(leaf, rows, target_hidden, temperature, weights, name)
        else:
            log_q, log_p = ((x @ rows.T / temperature[:, None]).log_softmax(-1) for x in (leaf, target_hidden))
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            variation = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
            overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
            share = (-3 * overlap.detach()).exp()
            each = {
                "kl": divergence,
                "kl+tv": divergence + variation,
                "lk": share * divergence + (1 - share) * variation,
                "overlap": -overlap.log(),
                "coupled": -(overlap / (2 - overlap)).log(),
            }
            losses = (each[name] * weights).sum(-1)
        (losses @ scale).backward()
        gradients.append(leaf.grad)
        values.append(losses.detach())
    tolerance = 2e-4 if name in ("overlap", "coupled") else 1e-5  # 1 - TV of rows that hardly overlap has few digits
    assert torch.allclose(*values, rtol=tolerance)
    assert torch.allclose(*gradients, rtol=tolerance, atol=1e-6)


def test_a_long_completion_teaches_its_end(monkeypatch):
    """Bounded memory: of a completion longer than the limit, the last pairs teach and those before them are read."""
    model = shared_model("llama", torch.float32)
    rollout = collect_rollouts(model, 1)[0]
    drafter = build_drafter_for(model)
    whole = collate([rollout], drafter.target, torch.float32)
    monkeypatch.setattr(unroll, "_MAX_PAIRS", 9)
    part = collate([rollout], drafter.target, torch.float32)
    assert int(part.is_taught.sum()) == 9
    end = count_pairs(rollout)
    taught = part.is_taught.nonzero()[:, 0]
    assert torch.equal(taught, torch.arange(end - 9, end))
    with torch.no_grad():
        outputs = [compute_outputs(drafter.head, drafter.target, batch) for batch in (whole, part)]
    last = int(whole.is_taught.nonzero()[-1])
    torch.testing.assert_close(outputs[1][:, end - 9 : end], outputs[0][:, last - 8 : last + 1], rtol=1e-4, atol=1e-4)


# -- files ------------------------------------------------------------------------------------------------------


def test_files_have_the_names_and_shapes_of_eagle_3(tmp_path):
    model = build_model("llama", torch.float32)
    drafter = build_drafter_for(model, draft_vocab_size=60)
    drafter.select_vocabulary(torch.arange(VOCAB_SIZE))
    drafter.refresh()
    drafter.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    hidden, inner, heads, kv_heads, head_dim, size = HIDDEN_SIZE, 64, 4, 2, 8, 60
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (heads * head_dim, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (size, hidden),
        "d2t": (size,),
        "t2d": (VOCAB_SIZE,),
    }
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    target_ids = torch.arange(size) + tensors["d2t"]
    assert target_ids.tolist() == list(range(VOCAB_SIZE - size, VOCAB_SIZE))
    assert tensors["t2d"].nonzero()[:, 0].tolist() == target_ids.tolist()
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight[target_ids])
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
    expected |= {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": VOCAB_SIZE, "draft_vocab_size": size}
    expected |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    expected |= {"torch_dtype": "float32", "tie_word_embeddings": False, "attention_bias": False}
    assert expected.items() <= config.items()
    assert {"rope_theta", "rope_parameters", "rms_norm_eps", "hidden_act", "max_position_embeddings"} <= config.keys()


def test_a_published_head_with_a_copy_of_the_embedding_is_read(tmp_path):
    """`embed_tokens.weight` is optional in EAGLE-3 checkpoints; the target's own is used."""
    model = shared_model("llama", torch.float32)
    drafter = build_drafter_for(model)
    drafter.save(tmp_path)
    embedding = model.get_input_embeddings().weight.detach()
    edit_tensors(tmp_path, lambda t: t.update({"embed_tokens.weight": embedding.bfloat16()}))
    assert_same_head(EagleDrafter.load(tmp_path, TargetModel(model)), head_bits(drafter))
    edit_tensors(tmp_path, lambda t: t.update({"embed_tokens.weight": torch.zeros_like(embedding)}))
    with pytest.warns(UserWarning, match="embed_tokens.weight of its own, 100% away from the target's, and"):
        assert_same_head(EagleDrafter.load(tmp_path, TargetModel(model)), head_bits(drafter))
    edit_tensors(tmp_path, lambda t: t.update({"embed_tokens.weight": embedding[:-1].clone()}))
    with pytest.raises(ValueError, match=rf"\({VOCAB_SIZE - 1}, 32\), the target's is \({VOCAB_SIZE}, 32\)"):
        EagleDrafter.load(tmp_path, TargetModel(model))
