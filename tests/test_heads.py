"""What holds for heads of every kind: drafts as promised, learning that disturbs no run, files that are not trusted."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from conftest import HIDDEN_SIZE, VOCAB_SIZE, build_model, shared_model
from fastgrpo import draft_loss
from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.draft_control import Judgement, Outcome
from fastgrpo.drafters import DraftContext, build_drafter
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.block_head import DEFAULT_BLOCK_SIZE
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import TrainableDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.drafters.head_parts import DraftHead
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.state import load_state, save_state
from fastgrpo.head_training import pack
from fastgrpo.learner import Learner
from fastgrpo.model import TargetModel
from fastgrpo.objective import BlockObjective, EagleObjective, build_objective, measure_head
from fastgrpo.planner import PlanInputs
from fastgrpo.sampling import SamplingBatch, sample, stream_key
from fastgrpo.tree import check_draft, compute_ancestors
from fastgrpo.types import PLAIN, SamplingParams, Sequence, SpeculationPlan, StepRecord
from fastgrpo.unroll import NUM_STEPS

PROMPTS = [[3, 1, 4, 1, 5], [7, 7], list(range(12)), [9, 8, 7, 6]]
CHAIN = SpeculationPlan(depth=8, width=1, num_draft_tokens=8)
TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=10)
DEEP = SpeculationPlan(depth=12, width=2, num_draft_tokens=20)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs from kind to kind where the law is the same."""

    drafter: type[HeadDrafter]
    objective: type
    num_steps: int  # that have a loss, and an acceptance
    steps_at_once: int  # whose logits exist together
    deepest: float  # levels of its deepest draft
    fewest_taught: Callable[[int], int]  # completion tokens of a short rollout that a batch teaches
    compute_logits: Callable[[Any, torch.Tensor], torch.Tensor]  # of the drafting copy's output
    rank: Callable[[Any, torch.Tensor, SamplingBatch, int], tuple[torch.Tensor, torch.Tensor]]
    num_texts: int  # greedy ones that it learns from at once: a block draws other anchors where one stands twice
    slack: float  # of measured acceptance beside chance

    def build(self, model: PreTrainedModel, **settings: object) -> HeadDrafter:
        return self.drafter(TargetModel(model), **settings)


EAGLE = Kind(
    drafter=EagleDrafter,
    objective=EagleObjective,
    num_steps=NUM_STEPS,
    steps_at_once=NUM_STEPS,
    deepest=math.inf,
    fewest_taught=lambda length: length,
    compute_logits=lambda drafter, output: drafter.fast_head.compute_logits(output),
    rank=EagleDrafter.rank_level,
    num_texts=len(PROMPTS),
    slack=0.02,
)
BLOCK = Kind(
    drafter=BlockDrafter,
    objective=BlockObjective,
    num_steps=DEFAULT_BLOCK_SIZE,
    steps_at_once=1,
    deepest=DEFAULT_BLOCK_SIZE,
    fewest_taught=lambda length: 1,  # those behind one anchor, which may be the last
    compute_logits=BlockDrafter.compute_level_logits,
    rank=lambda drafter, output, noise_rows, width: drafter.rank(
        drafter.compute_level_logits(output), noise_rows, width
    ),
    num_texts=2 * len(PROMPTS),
    slack=0.04,
)


@pytest.fixture(params=[EAGLE, BLOCK], ids=lambda kind: kind.drafter.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def shake(drafter: HeadDrafter, scale: float = 0.05) -> HeadDrafter:
    """Away from the start, where much is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in drafter.head.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    drafter.refresh()
    return drafter


@functools.cache
def _collect_rollouts(
    model: PreTrainedModel, count: int, max_tokens: int, temperature: float
) -> tuple[FinishedRollout, ...]:
    engine = Engine(model, drafter=EAGLE.build(model), speculation="off")
    rollouts: list[FinishedRollout] = []
    engine.on_finish.append(rollouts.append)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    engine.generate(prompts, SamplingParams(max_tokens=max_tokens, seed=3, temperature=temperature))
    return tuple(rollouts)


def collect_rollouts(
    model: PreTrainedModel, count: int = 8, max_tokens: int = 24, temperature: float = 1.0
) -> list[FinishedRollout]:
    """What a rollout leaves for the learner; the same whatever kind of head wants it."""
    return list(_collect_rollouts(model, count, max_tokens, temperature))


def build_learner(drafter: HeadDrafter, rollouts: list[FinishedRollout], **settings: object) -> Learner:
    learner = Learner(drafter, **settings)
    for rollout in rollouts:
        learner.add(rollout)
    return learner


@functools.cache
def _train_head(kind: Kind) -> DraftHead:
    drafter = kind.build(shared_model("llama"), draft_vocab_size=80)
    learner = build_learner(drafter, collect_rollouts(shared_model("llama")), learning_rate=1e-2)
    for _ in range(4):
        learner.learn(budget_s=0.0)
    return drafter.head


def build_trained(kind: Kind) -> HeadDrafter:
    """A drafter for the shared Llama whose head has learnt a little, of 80 tokens."""
    return kind.build(shared_model("llama"), head=copy.deepcopy(_train_head(kind)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["weights", "vocabulary", "another head"])
def test_a_refreshed_head_drafts_as_one_built_anew(kind: Kind, change: str, dtype: torch.dtype) -> None:
    """Its fast copy is written over where it stands, packed weights included."""
    target = TargetModel(build_model("llama", dtype))
    drafter = kind.drafter(target, draft_vocab_size=80)
    x = torch.randn(3, drafter.head.fc.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    fast, before = drafter.fast_head, drafter.fast_head.fc(x)
    if change == "vocabulary":
        drafter.head.resize_vocabulary(64)
    elif change == "another head":
        drafter.head = copy.deepcopy(drafter.head)
    shake(drafter)
    anew = kind.drafter(target, head=copy.deepcopy(drafter.head))
    assert (drafter.fast_head is fast) == (change == "weights")
    assert not torch.equal(drafter.fast_head.fc(x), before)
    for mine, expected in zip(_run_head(drafter, x), _run_head(anew, x), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_did_not_change_is_not_laid_out_again(kind: Kind, dtype: torch.dtype, monkeypatch) -> None:
    """Whether it did is asked of the numbers: a change that autograd does not see counts, too."""
    drafter = kind.drafter(TargetModel(build_model("llama", dtype)), draft_vocab_size=80)
    laid_out: list[int] = []
    prepare = drafter.prepare
    monkeypatch.setattr(drafter, "prepare", lambda: (laid_out.append(0), prepare()))
    for _ in range(2):
        drafter.refresh()
    assert not laid_out
    drafter.head.fc.weight.data[1, 2] += 1.0
    drafter.target.lm_head.weight.data[3] += 1.0
    odd = torch.empty(drafter.head.norm.weight.numel() + 1)[1:]  # not where eight bytes begin
    drafter.head.norm.weight.data = odd.copy_(drafter.head.norm.weight.data)
    drafter.refresh()
    drafter.refresh()
    assert len(laid_out) == 1
    anew = kind.drafter(drafter.target, head=copy.deepcopy(drafter.head))
    x = torch.randn(3, drafter.head.fc.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    for mine, expected in zip(_run_head(drafter, x), _run_head(anew, x), strict=True):
        assert torch.equal(mine, expected)


def test_a_head_rotates_as_the_target_does_now(kind: Kind) -> None:
    """Though it has not changed itself: drafts are those of an engine that is built anew."""
    model = build_model("llama", torch.float32)
    engine = Engine(model, drafter=kind.drafter(TargetModel(model), draft_vocab_size=80), speculation=TREE)
    told: list[list[tuple[int, float | None]]] = []
    params = SamplingParams(max_tokens=12)
    engine.generate(PROMPTS, params)
    model.model.rotary_emb.inv_freq.data.mul_(0.3)
    head = copy.deepcopy(engine.drafter.head)
    anew = Engine(model, drafter=kind.drafter(TargetModel(model), head=head), speculation=TREE)
    for each in (engine, anew):
        each.drafter.calibration = Calibration()
        each.generate(PROMPTS, params)
        told.append([(record.num_emitted, record.num_promised) for record in each.records])
    assert told[0] == told[1]


def _run_head(drafter: HeadDrafter, x: torch.Tensor) -> list[torch.Tensor]:
    """What its packed products say, and all weights."""
    hidden = drafter.fast_head.fc(x)
    return [hidden, drafter.fast_head.lm_head(hidden), *drafter.fast_head.state_dict().values()]


def head_bits(drafter: HeadDrafter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in drafter.head.state_dict().items()}


def assert_same_head(drafter: HeadDrafter, bits: dict[str, torch.Tensor]) -> None:
    assert drafter.head.state_dict().keys() == bits.keys()
    for name, value in drafter.head.state_dict().items():
        assert torch.equal(value, bits[name]), name


# -- drafting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "plan",
    [
        SpeculationPlan(depth=1, width=1, num_draft_tokens=1),
        SpeculationPlan(depth=4, width=1, num_draft_tokens=4),
        CHAIN,
        TREE,
        SpeculationPlan(depth=3, width=4, num_draft_tokens=12),
        DEEP,
        SpeculationPlan(depth=3, width=8, num_draft_tokens=136),
        SpeculationPlan(depth=2, width=200, num_draft_tokens=100),
    ],
    ids=["one", "chain", "long_chain", "tree", "wide_tree", "deep_tree", "whole_pool", "wider_than_the_vocabulary"],
)
def test_drafts_keep_their_promises_and_their_plan(kind, plan, temperature):
    model = shared_model("qwen2")
    drafter = kind.build(model, draft_vocab_size=50)
    engine = Engine(model, drafter=drafter, speculation=plan)
    propose, drafts = drafter.propose, []

    def keep(context: DraftContext, plan: SpeculationPlan) -> object:
        drafts.append(propose(context, plan))
        return drafts[-1]

    drafter.propose = keep
    engine.generate(PROMPTS, SamplingParams(max_tokens=6, temperature=temperature))
    assert drafts
    for draft in drafts:
        check_draft(draft)
        assert draft.num_nodes.max() <= 1 + plan.num_draft_tokens
        assert compute_ancestors(draft.parents).sum(-1).max() - 1 <= min(plan.depth, kind.deepest)
        assert draft.token_ids[:, 1:].max() < 50


@dataclass
class EveryOtherStep:
    """Speculates at every `period`-th step, so that the drafter must catch up."""

    fixed: SpeculationPlan
    period: int
    name: str = "fixed"
    num_steps: int = 0

    def begin(self) -> None:
        self.num_steps = 0

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        self.num_steps += 1
        return PLAIN if self.num_steps % self.period else self.fixed

    def observe(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, object]:
        return {}


@functools.cache
def collect_drafts(kind: Kind, max_num_seqs: int, period: int) -> dict[tuple[int, int], tuple]:
    """Every draft of a rollout whose rows come and go, by sequence and position."""
    model = shared_model("llama")
    drafter = shake(kind.build(model, draft_vocab_size=90))
    engine = Engine(model, drafter=drafter, speculation="off", max_num_seqs=max_num_seqs)
    engine.planner = EveryOtherStep(SpeculationPlan(depth=3, width=3, num_draft_tokens=8), period)
    propose, drafts = drafter.propose, {}

    def keep(context: DraftContext, plan: SpeculationPlan) -> object:
        draft = propose(context, plan)
        for row, sequence in enumerate(context.sequences):
            count = int(draft.num_nodes[row])
            key = (sequence.stream_key, len(sequence.token_ids))
            drafts[key] = (draft.token_ids[row, :count].tolist(), draft.parents[row, :count].tolist())
        return draft

    drafter.propose = keep
    params = [SamplingParams(max_tokens=4 + 7 * (index % 4), stream=index) for index in range(10)]
    engine.generate([PROMPTS[index % len(PROMPTS)] for index in range(10)], params)
    return drafts


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("max_num_seqs", "period"), [(1, 1), (3, 1), (64, 1), (3, 2), (64, 3)])
def test_a_draft_does_not_depend_on_the_rows_beside_it_or_on_when_it_is_asked(kind, max_num_seqs, period):
    """Tokens are exact whatever is drafted; only this tells whether the drafter's own rows move rightly."""
    drafts, expected = collect_drafts(kind, max_num_seqs, period), collect_drafts(kind, 4, 1)
    shared = drafts.keys() & expected.keys()
    assert len(shared) >= 10
    assert {key: drafts[key] for key in shared} == {key: expected[key] for key in shared}
    if period == 1:
        assert drafts.keys() == expected.keys()


def _lie_apart(model: PreTrainedModel) -> None:
    embeddings = model.get_input_embeddings().weight
    embeddings.data = embeddings.data.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.filterwarnings("ignore:decoding goes through transformers' modules")
@pytest.mark.parametrize("change", [_lie_apart, lambda model: setattr(model.model, "norm", nn.Identity())])
def test_embeddings_that_lie_apart_and_norms_without_weights_are_no_obstacle(kind, change):
    model, plan = build_model("llama", torch.float32), SpeculationPlan(depth=3, width=3, num_draft_tokens=8)
    change(model)
    drafting = Engine(model, drafter=kind.drafter(TargetModel(model)), speculation=plan)
    plain, drafted = (
        engine.generate(PROMPTS, SamplingParams(max_tokens=12)) for engine in (Engine(model, drafter="none"), drafting)
    )
    assert [each.token_ids for each in plain] == [each.token_ids for each in drafted]


def test_an_output_head_without_rows_to_take_is_refused_by_name(kind):
    model = build_model("llama", torch.float32)
    model.lm_head = nn.Sequential(nn.Linear(HIDDEN_SIZE, 8), nn.Linear(8, VOCAB_SIZE))
    with pytest.raises(ValueError, match=r'head is a Sequential without a weight of 120 x 32, .* drafter="ngram"'):
        kind.drafter(TargetModel(model))


def test_of_a_long_prompt_the_end_is_read(kind, monkeypatch):
    """From the same block on a draft is that of the text without what stands before."""
    monkeypatch.setattr(kind.drafter, "num_prompt_tokens", 32)
    model = shared_model("llama", torch.float32)
    drafter, found = kind.build(model, draft_vocab_size=50), []
    drafter.ranks_with_noise = False  # it depends on the position in the whole text
    for cut in (0, BLOCK_SIZE):
        cache = drafter.target.build_cache(with_features=True)
        lengths = [104 - cut, 100 - cut]  # of the second, as much is left before it grows
        cache.add_rows(2)
        sequences = []
        for row, length in enumerate(lengths):
            cache.reserve(row, length + 4)
            tokens = [(7 * place + row) % 50 for place in range(cut, cut + length + 1)]
            sequences.append(
                Sequence(request_id=row, prompt_ids=tokens, params=SamplingParams(), max_tokens=9, stream_key=row)
            )
        features = torch.randn(2, 110, cache.features.data.shape[2], generator=torch.Generator().manual_seed(1))
        for row, length in enumerate(lengths):
            places = cache.locate(torch.full((length + 4,), row), torch.arange(length + 4))
            cache.features.write(0, places, features[row, cut : cut + length + 4])
        drafter.begin()
        trees = []
        for num_more in (0, 3):
            for sequence in sequences:
                sequence.token_ids += [5] * num_more
            cache.lengths = [sequence.num_cached for sequence in sequences]
            unread = drafter.count_unread(sequences)
            with drafter.target.rollout_mode():
                context = DraftContext(sequences=sequences, cache=cache, device=torch.device("cpu"))
                trees.append(drafter.propose(context, TREE))
            assert unread == (204 - 2 * BLOCK_SIZE if num_more == 0 else 6)
            assert drafter.count_unread(sequences) == 0
        found.append([part for tree in trees for part in (tree.token_ids, tree.parents, tree.scores)])
        assert drafter._rows.cache.used_bytes == 2 * drafter._rows.cache.block_bytes, "of the prompt's end alone"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("period", [1, 4])
def test_long_prompts_come_and_go_as_short_ones_do(kind, period, monkeypatch):
    monkeypatch.setattr(kind.drafter, "num_prompt_tokens", 8)
    model = shared_model("llama", torch.float32)
    prompts = [[3, 1, 4], [5] * 75, list(range(99)), [9, 8], [2, 3] * 40, [6] * 73]
    params = [SamplingParams(max_tokens=3 + 3 * index, seed=2, stream=index) for index in range(6)]
    plain = Engine(model, drafter="none", speculation="off").generate(prompts, params)
    engine = Engine(model, drafter=kind.build(model), speculation="fixed", max_num_seqs=3)
    engine.planner = EveryOtherStep(TREE, period)
    completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert any(record.offered for record in engine.records)


def test_drafts_are_ranked_with_the_noise_of_their_position(kind):
    """A head that is the target's equal is always right, at any temperature: noise is shared, not drawn again."""
    drafter = kind.build(shared_model("llama"))
    sequences = [
        Sequence(request_id=i, prompt_ids=[0], params=SamplingParams(), max_tokens=9, stream_key=stream_key(0, i))
        for i in range(50)
    ]
    batch = SamplingBatch.build(sequences, torch.device("cpu"))
    output = torch.randn(50, 1, HIDDEN_SIZE, dtype=torch.float64)
    chance, tokens = kind.rank(drafter, output, batch, 3)
    logits = kind.compute_logits(drafter, output)[:, 0]
    expected = sample(logits, batch, torch.arange(VOCAB_SIZE, dtype=torch.int32))[0]
    assert torch.equal(tokens[:, 0, 0], expected)
    assert (chance[..., :-1] >= chance[..., 1:]).all()
    assert (chance.exp().sum(-1) <= 1 + 1e-6).all()


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_noise_the_likeliest_tokens_are_drafted_and_nothing_else_changes(kind):
    model = shared_model("llama")
    drafter, params = kind.build(model), SamplingParams(max_tokens=16, seed=4)
    plan = SpeculationPlan(depth=2, width=3, num_draft_tokens=6)
    texts = []
    for drafter.ranks_with_noise in (True, False):
        texts.append([c.token_ids for c in Engine(model, drafter=drafter, speculation=plan).generate(PROMPTS, params)])
    assert texts[0] == texts[1]
    sequence = Sequence(request_id=0, prompt_ids=[0], params=SamplingParams(), max_tokens=9, stream_key=1)
    output = torch.randn(1, 1, HIDDEN_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chance, tokens = kind.rank(drafter, output, SamplingBatch.build([sequence], torch.device("cpu")), 3)
    expected = kind.compute_logits(drafter, output).log_softmax(-1).topk(3)
    assert torch.equal(tokens, drafter.head.draft_vocab[expected.indices].long())
    assert torch.allclose(chance, expected.values.to(chance.dtype))


def test_tokens_are_those_of_plain_decoding_in_half_precision_too(kind):
    """Weights in float32, rollouts under autocast: the head drafts in the rollout's type."""
    model = shared_model("llama", torch.float32)
    params = SamplingParams(max_tokens=11, seed=2)
    texts = []
    for drafter in (kind.drafter(TargetModel(model, compute_dtype=torch.bfloat16)), "none"):
        engine = Engine(model, drafter=drafter, speculation=TREE, compute_dtype=torch.bfloat16)
        texts.append([c.token_ids for c in engine.generate(PROMPTS, params)])
    agreement = sum(a == b for one, two in zip(*texts, strict=True) for a, b in zip(one, two, strict=True))
    assert agreement > 0.8 * sum(map(len, texts[0])), "near-ties may flip in half precision, and no more than that"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_goes_on_between_half_precision_rollouts(kind, dtype):
    model = shared_model("llama", dtype)
    target = TargetModel(model, compute_dtype=torch.bfloat16)
    engine = Engine(model, drafter=kind.drafter(target), speculation=TREE, compute_dtype=torch.bfloat16)
    learner = Learner(engine.drafter)
    engine.on_finish.append(learner.add)
    for _ in range(2):
        engine.generate(PROMPTS, SamplingParams(max_tokens=8))
        assert math.isfinite(learner.learn(budget_s=0.0).loss)
    assert learner.num_updates == 2


# -- learning --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_a_fixed_batch_falls(kind, dtype):
    model = shared_model("llama", dtype)
    drafter, rollouts = kind.build(model), collect_rollouts(model)
    assert isinstance(drafter, TrainableDrafter)
    objective = build_objective(drafter)
    assert isinstance(objective, kind.objective)
    batch = objective.collate(rollouts, torch.float32)

    def measure() -> torch.Tensor:
        with torch.no_grad():
            return objective.compute_losses(drafter.head, batch)

    before = measure()
    assert before.shape == (kind.num_steps,)
    learner = build_learner(drafter, rollouts, learning_rate=1e-2)
    reports = [learner.learn(budget_s=60.0) for _ in range(6)]  # until each is through its passes
    assert (measure() < 0.7 * before).all()
    assert reports[-1].loss < reports[0].loss
    assert sum(report.num_updates for report in reports) == learner.num_updates
    assert all(report.num_skipped == 0 and report.num_tokens > 0 for report in reports)
    while learner.num_updates < 30:
        loss, num_tokens = learner.update(rollouts)
        assert math.isfinite(loss) and num_tokens == objective.count_taught(batch) == int(batch.is_taught.sum())
    assert (measure() < 0.6 * before).all()


def test_the_gradient_reaches_every_trained_weight_and_never_the_target(kind):
    model = build_model("qwen2", torch.float32)
    drafter, rollouts = shake(kind.build(model)), collect_rollouts(model)
    objective = build_objective(drafter)
    batch = objective.collate(rollouts, torch.float32)
    objective.weigh(objective.compute_losses(drafter.head, batch)).backward()
    for name, parameter in drafter.head.named_parameters():
        if name == "lm_head.weight":
            assert parameter.grad is None
        else:
            assert (parameter.grad.abs().sum(-1) > 0).all(), f"some row of {name}"
    assert all(parameter.grad is None for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = drafter.head.lm_head.weight.clone()
    build_learner(drafter, rollouts).learn(budget_s=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert drafter.head.lm_head.weight.grad is None
    assert torch.equal(drafter.head.lm_head.weight, rows)


def test_logits_never_exist_for_a_whole_batch(kind, monkeypatch):
    monkeypatch.setattr(draft_loss, "_CPU_CHUNK_ROWS", 4)
    model = shared_model("llama", torch.float32)
    drafter, rollouts = kind.build(model), collect_rollouts(model, 4)
    objective = build_objective(drafter)
    batch = objective.collate(rollouts, torch.float32)
    assert len(batch.temperature) > 4
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            shapes.extend(x.shape for x in tree_leaves(output) if isinstance(x, torch.Tensor))
            return output

    with Watch(), torch.enable_grad():
        objective.weigh(objective.compute_losses(drafter.head, batch)).backward()
    of_logits = [shape for shape in shapes if shape[-1:] == (VOCAB_SIZE,) and shape != (HIDDEN_SIZE, VOCAB_SIZE)]
    assert of_logits and max(math.prod(shape[:-1]) for shape in of_logits) <= kind.steps_at_once * 4


def test_batches_are_full_but_never_over():
    assert pack([], [], 10) == []
    assert pack(list("abcde"), [4, 6, 1, 12, 3], 10) == [["a", "b"], ["c"], ["d"], ["e"]]


def measure_emitted(drafter: HeadDrafter, plan: SpeculationPlan, prompts: list[list[int]], **params: Any) -> float:
    """Tokens that a step emits for a sequence."""
    engine = Engine(drafter.target.model, drafter=drafter, speculation=plan)
    engine.generate(prompts, SamplingParams(**params))
    return sum(r.num_emitted for r in engine.records) / sum(r.num_seqs for r in engine.records)


@pytest.mark.usefixtures("unchecked_shapes")
def test_learning_raises_acceptance(kind):
    drafter = kind.build(shared_model("llama", torch.float32))
    settings = {"plan": SpeculationPlan(depth=3, width=2, num_draft_tokens=6), "max_tokens": 20, "seed": 50}
    before = measure_emitted(drafter, prompts=PROMPTS * 4, **settings)
    learner = build_learner(drafter, collect_rollouts(drafter.target.model, 32), learning_rate=1e-2)
    for _ in range(6):
        learner.learn(budget_s=60.0)
    assert measure_emitted(drafter, prompts=PROMPTS * 4, **settings) > before + 0.15


@pytest.mark.usefixtures("unchecked_shapes")
def test_learning_raises_acceptance_and_the_measure_says_how_much(kind):
    """Greedy text of a random model repeats itself: a head that learns anything learns that."""
    drafter = kind.build(shared_model("llama", torch.float32))
    settings = {"plan": CHAIN, "prompts": PROMPTS, "max_tokens": 40, "temperature": 0.0}
    before = measure_emitted(drafter, **settings)
    rollouts = collect_rollouts(drafter.target.model, kind.num_texts, 40, temperature=0.0)
    rates = measure_head(drafter, rollouts)
    assert rates.shape == (kind.num_steps, 4) and ((rates >= 0) & (rates <= 1)).all()
    learner = build_learner(drafter, rollouts, learning_rate=1e-2)
    for _ in range(100):
        learner.update(rollouts)
    drafter.refresh()
    assert measure_emitted(drafter, **settings) > before + 1.5
    assert (measure_head(drafter, rollouts)[:, 0] > rates[:, 0] + 0.1).all()


@pytest.mark.usefixtures("unchecked_shapes")
def test_measured_acceptance_is_that_of_real_drafts(kind):
    drafter = build_trained(kind)
    plan = SpeculationPlan(depth=3, width=1, num_draft_tokens=3)
    engine = Engine(drafter.target.model, drafter=drafter, speculation=plan)
    rollouts: list[FinishedRollout] = []
    engine.on_finish.append(rollouts.append)
    engine.generate([[3, 1, 4, 1, index % 50] for index in range(48)], SamplingParams(max_tokens=48, seed=7))
    expected = measure_head(drafter, rollouts)
    for depth in range(plan.depth):
        steps = [record for record in engine.records if len(record.offered) > depth]
        offered = sum(record.offered[depth][0] for record in steps)
        hits = sum(record.hits[depth][0] for record in steps)
        deviation = 4 * (0.25 / offered) ** 0.5
        assert hits / offered == pytest.approx(float(expected[depth, 0]), abs=deviation + kind.slack)


def test_the_global_generator_is_left_alone(kind, tmp_path):
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model)
    kind.build(model).save(tmp_path)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    drafter = kind.build(model)
    assert torch.equal(torch.random.get_rng_state(), before), "building a head"
    build_learner(drafter, rollouts).learn(budget_s=0.0)
    assert torch.equal(torch.random.get_rng_state(), before), "learning"
    kind.drafter.load(tmp_path, TargetModel(model))
    assert torch.equal(torch.random.get_rng_state(), before), "loading a head"


def test_the_global_generator_is_left_alone_where_the_vocabulary_changes_its_size(kind, tmp_path):
    drafter = kind.build(shared_model("llama", torch.float32), draft_vocab_size=60)
    drafter.select_vocabulary(torch.arange(VOCAB_SIZE))
    drafter.save(tmp_path)
    before = torch.random.get_rng_state()
    drafter.head.keep_frequent(9)
    drafter.restore(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_head_starts_the_same_whatever_was_drawn_before(kind):
    model = shared_model("llama", torch.float32)
    torch.manual_seed(1)
    first = head_bits(kind.build(model))
    torch.manual_seed(2)
    assert_same_head(kind.build(model), first)


def test_at_least_one_update_whatever_the_budget(kind):
    model = shared_model("llama", torch.float32)
    learner = build_learner(kind.build(model), collect_rollouts(model))
    assert learner.learn(budget_s=0.0).num_updates == 1
    again = learner.learn(budget_s=0.0)  # nothing new: from the replay
    assert again.num_updates == 1


def test_learning_from_nothing_does_nothing(kind):
    drafter = kind.build(shared_model("llama", torch.float32))
    before = head_bits(drafter)
    report = Learner(drafter).learn(budget_s=1.0)
    assert (report.num_updates, report.num_tokens, report.num_skipped) == (0, 0, 0)
    assert math.isnan(report.loss)
    assert_same_head(drafter, before)


def test_the_replay_is_bounded_and_drops_the_oldest(kind):
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model)
    each = [rollout.features.numel() * rollout.features.element_size() for rollout in rollouts]
    learner = build_learner(kind.build(model), rollouts[:4], max_replay_bytes=sum(each[3:6]))
    learner.learn(budget_s=0.0)
    for rollout in rollouts[4:6]:
        learner.add(rollout)
    learner.learn(budget_s=0.0)
    assert [id(r) for r in learner._replay] == [id(r) for r in rollouts[3:6]]
    tight = build_learner(kind.build(model), rollouts, max_replay_bytes=1)
    tight.learn(budget_s=0.0)
    assert not tight._replay


def test_rollouts_that_wait_to_be_learnt_from_are_bounded_too(kind, monkeypatch):
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model)
    each = [rollout.features.numel() * rollout.features.element_size() for rollout in rollouts]
    monkeypatch.setattr("fastgrpo.learner._MOST_NEW_BYTES", sum(each[-2:]))
    learner = build_learner(kind.build(model), rollouts, max_replay_bytes=1)
    assert [id(r) for r in learner.begin().rollouts] == [id(r) for r in rollouts[-2:]]


@pytest.mark.parametrize("place", ["judge", "update"])
def test_a_lesson_without_memory_ends_and_the_next_one_is_whole(kind, place, monkeypatch):
    model = shared_model("llama", torch.float32)
    learner = build_learner(kind.build(model), rollouts := collect_rollouts(model, 4))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"learns no more .* ran out \(MemoryError\)"):
        patch.setattr(learner.objective, "collate", lambda *_: (_ for _ in ()).throw(MemoryError()))
        if place == "update":
            patch.setattr(learner, "judge", lambda _: (math.nan, Judgement(Outcome.KEEP, 1.0)))
        report = learner.learn(budget_s=1.0)
    assert (report.num_updates, report.num_tokens, report.num_skipped) == (0, 0, 1)
    for rollout in rollouts:
        learner.add(rollout)
    report = learner.learn(budget_s=10.0, max_updates=2)
    assert report.num_updates == 2 and report.num_skipped == 0


def test_a_rollout_goes_on_where_a_learner_has_no_memory_to_look_at_it(kind, monkeypatch):
    model = shared_model("llama", torch.float32)
    learner = build_learner(kind.build(model), rollouts := collect_rollouts(model, 2))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", lambda _: (_ for _ in ()).throw(MemoryError()))
        learner.add(rollouts[0])
    assert len(learner.begin().rollouts) == 2
    assert learner.learn(budget_s=1.0).num_skipped == 1


@pytest.mark.parametrize("num_good", [1, 2])  # one moment of a parameter is there and the other is not; or the first's
def test_an_update_that_breaks_off_changes_nothing_and_may_be_made_again(kind, num_good, monkeypatch):
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model, 4)
    learners = [build_learner(kind.build(model), rollouts) for _ in range(2)]
    allowed, zeros = iter(range(num_good)), torch.zeros_like

    def fail_late(*args, **kwargs):
        if next(allowed, None) is None:
            raise KeyboardInterrupt
        return zeros(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            learners[0].objective, "weigh", lambda losses: patch.setattr(torch, "zeros_like", fail_late) or losses[0]
        )
        learners[0].update(rollouts)
    for learner in learners:
        learner.update(rollouts)
    own, other = (learner.drafter.head.state_dict() for learner in learners)
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_skipped_and_counted(kind, bad):
    model = shared_model("llama", torch.float32)
    drafter = kind.build(model)
    rollouts = collect_rollouts(model, 4)
    broken = [replace(rollout, features=torch.full_like(rollout.features, bad)) for rollout in rollouts[:2]]
    learner = build_learner(drafter, broken)
    report = learner.learn(budget_s=1.0)
    assert report.num_skipped >= 1
    assert report.num_updates == 0
    for rollout in rollouts[2:]:
        learner.add(rollout)
    for _ in range(4):
        learner.learn(budget_s=1.0)
    assert all(torch.isfinite(value).all() for value in drafter.head.state_dict().values())
    assert learner.num_updates > 0, "one bad rollout must not stop learning for good"


def test_rollouts_too_short_to_learn_from_are_left_out(kind):
    model = shared_model("llama", torch.float32)
    learner = Learner(kind.build(model))
    rollout = collect_rollouts(model, 1)[0]
    learner.add(replace(rollout, features=None))
    learner.add(replace(rollout, prompt_ids=[1], token_ids=[2], features=rollout.features[:1]))
    assert learner.learn(budget_s=0.0).num_updates == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_short_completions_teach_what_they_can(kind, max_tokens):
    model = shared_model("llama", torch.float32)
    learner = build_learner(kind.build(model), collect_rollouts(model, 4, max_tokens))
    report = learner.learn(budget_s=0.0)
    assert math.isfinite(report.loss) and math.isfinite(report.held_out_loss)
    assert 4 * kind.fewest_taught(max_tokens) <= report.num_tokens <= 4 * max_tokens


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_learning_rate_is_refused(kind, rate):
    drafter = kind.build(shared_model("llama", torch.float32))
    with pytest.raises(ValueError, match="draft_learning_rate must be a positive number"):
        Learner(drafter, learning_rate=rate)


def test_a_restored_learner_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    """From the files of a checkpoint, and from the state in memory beside a saved head."""
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model)
    engines = [Engine(model, drafter=kind.build(model, draft_vocab_size=60), speculation="off") for _ in range(2)]
    learner, restored = (Learner(engine.drafter) for engine in engines)
    for rollout in rollouts[:4]:
        learner.add(rollout)
    learner.learn(budget_s=0.0)
    save_state(tmp_path, engines[0], learner)
    load_state(tmp_path, engines[1], restored)
    loaded = Learner(kind.drafter.load(tmp_path / "head", TargetModel(model)), learning_rate=learner.learning_rate)
    loaded.load_state_dict(copy.deepcopy(learner.state_dict()))
    learners = (learner, restored, loaded)
    for each in learners:
        for rollout in rollouts[4:]:
            each.add(rollout)
    reports = [each.learn(60.0, max_updates=4) for each in learners]  # more than the new ones fill
    for each, report in zip(learners, reports, strict=True):
        assert replace(report, learn_s=0.0) == replace(reports[0], learn_s=0.0)
        assert_same_head(each.drafter, head_bits(learner.drafter))
        assert each.num_updates == 1 + round(4 * report.effort) >= 3
        assert report.effort == 1.0 or kind is BLOCK, "so few texts do not make a block better at others"
        assert [r.token_ids for r in each._replay] == [r.token_ids for r in rollouts]


def test_the_draft_vocabulary_follows_what_was_said(kind):
    model = shared_model("llama", torch.float32)
    drafter, rollouts = kind.build(model, draft_vocab_size=10), collect_rollouts(model)
    build_learner(drafter, rollouts).learn(budget_s=0.0)
    counts = torch.bincount(torch.tensor([t for r in rollouts for t in r.token_ids]), minlength=VOCAB_SIZE)
    vocab = drafter.head.draft_vocab.long()
    assert (vocab[1:] > vocab[:-1]).all()
    assert counts[vocab].sum() == counts.topk(10).values.sum()
    assert torch.equal(drafter.head.lm_head.weight, model.lm_head.weight[vocab])


# -- files -----------------------------------------------------------------------------------------------------


def test_a_head_is_saved_and_read_back(kind, tmp_path):
    model = build_model("qwen3", torch.float32)
    drafter = kind.build(model, draft_vocab_size=60)
    build_learner(drafter, collect_rollouts(model)).learn(budget_s=0.0)
    drafter.save(tmp_path)
    assert_same_head(kind.drafter.load(tmp_path, TargetModel(model)), head_bits(drafter))
    for folder in (tmp_path, str(tmp_path)):
        loaded = build_drafter(folder, TargetModel(model))
        assert isinstance(loaded, kind.drafter) and loaded.was_trained
    fresh = build_drafter(kind.drafter.name, TargetModel(model))
    assert isinstance(fresh, kind.drafter) and not fresh.was_trained
    fresh.restore(tmp_path)
    assert_same_head(fresh, head_bits(drafter))


def test_what_its_chances_are_worth_is_read_back_with_a_head(kind, tmp_path):
    drafter = build_trained(kind)
    model = drafter.target.model
    Engine(model, drafter=drafter, speculation=TREE).generate(PROMPTS, SamplingParams(max_tokens=12))
    drafter.save(tmp_path)
    drafter.calibration.fit()
    known = drafter.calibration
    assert known.offered.sum() > 100 and (known.slope != 1).any()
    loaded, restored = kind.drafter.load(tmp_path, TargetModel(model)), build_trained(kind)
    restored.restore(tmp_path)
    for each in (loaded, build_drafter(tmp_path, TargetModel(model)), restored):
        for name, value in vars(known).items():
            assert np.all(vars(each.calibration)[name] == value), name
    (tmp_path / "calibration.json").unlink()
    assert kind.drafter.load(tmp_path, TargetModel(model)).calibration.offered.sum() == 0, "it may be missing"
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calibration.json is damaged .* remove it to start afresh"):
        kind.drafter.load(tmp_path, TargetModel(model))


def test_what_was_accepted_of_a_head_is_read_back_and_planned_with(kind, tmp_path):
    model = shared_model("llama")
    drafter = kind.build(model, draft_vocab_size=60)
    drafter.save(tmp_path / "unmeasured")
    assert kind.drafter.load(tmp_path / "unmeasured", drafter.target).acceptance is None
    drafter.acceptance = [[0.6, 0.2], [0.5, 0.1]]
    drafter.save(tmp_path / "head")
    engine = Engine(model, drafter=tmp_path / "head", speculation="auto")
    engine.generate(PROMPTS[:1], SamplingParams(max_tokens=1))
    assert engine.drafter.acceptance == drafter.acceptance
    assert engine.planner.expectation.table.known == drafter.acceptance
    for text in ("{}", '{"rates": []}', '{"rates": [[1.5]]}', '{"rates": [[NaN]]}', "["):
        (tmp_path / "head" / "acceptance.json").write_text(text)
        with pytest.raises(ValueError, match=r"acceptance\.json is damaged"):
            kind.drafter.load(tmp_path / "head", drafter.target)


def test_a_compact_head_loads_like_any(kind, tmp_path):
    drafter = build_trained(kind)
    drafter.save_head(tmp_path / "full")
    drafter.save_head(tmp_path / "compact", compact=True)
    full, compact = (
        kind.drafter.load_head(tmp_path / name, drafter.target).state_dict() for name in ("full", "compact")
    )
    assert "lm_head.weight" not in load_file(tmp_path / "compact" / "model.safetensors")
    for name, value in full.items():
        assert torch.allclose(value.float(), compact[name].float(), rtol=2**-8), name


def test_a_compact_head_is_cut_to_its_frequent_tokens(kind, tmp_path):
    drafter = kind.build(shared_model("llama"), draft_vocab_size=40)
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    counts[10:60] = torch.arange(50).roll(7)  # 40 tokens are drafted; those before 17 were said most, then the last
    drafter.select_vocabulary(counts)
    drafter.refresh()
    drafter.save_head(tmp_path, compact=True, counts=counts)
    head = kind.drafter.load_head(tmp_path, drafter.target)
    vocab = [*range(10, 17), *range(27, 60)]
    assert head.draft_vocab.tolist() == vocab
    assert head.vocab_counts.tolist() == counts[vocab].tolist()
    head.keep_frequent(64)
    assert head.draft_vocab_size == 40, "nothing to cut"
    frequent = [*range(10, 17), *range(52, 60)]
    for size, kept in ((15, frequent), (9, [*range(10, 17), 58, 59])):
        head.keep_frequent(size)
        assert head.draft_vocab.tolist() == kept
        assert head.vocab_counts.tolist() == counts[kept].tolist(), "it can be cut again"
        cut = kind.build(shared_model("llama"), head=copy.deepcopy(head))
        assert torch.equal(cut.head.lm_head.weight, cut.target.lm_head.weight[kept])
    drafter.save_head(tmp_path / "full", counts=counts)
    full = kind.drafter.load_head(tmp_path / "full", drafter.target)
    full.keep_frequent(15)
    assert full.vocab_counts is None and full.draft_vocab.tolist() == vocab, "only a compact head knows its counts"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def assert_refused(kind: Kind, folder: Path, damage: Callable[[Path], object], message: str) -> None:
    """A head that fits is not read once it is damaged so, and the folder is named."""
    model = shared_model("llama", torch.float32)
    kind.build(model, draft_vocab_size=60).save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Engine(model, drafter=folder)
    assert str(folder) in str(caught.value)


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"][3, 4] = math.nan


def set_offset(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] = VOCAB_SIZE


def set_negative_offset(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] = -6


def set_repeated_token(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] -= 1


def set_counts(counts: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update(vocab_counts=counts))


def damage_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no readable draft head in"),
        (lambda f: (f / "config.json").unlink(), "no readable draft head in"),
        (damage_weights, "no readable draft head in"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "no readable draft head in"),
        (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1})), "no readable draft head in"),
        (lambda f: (f / "config.json").write_text("{"), "no readable draft head in"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "no readable draft head in"),
        (lambda f: (f / "config.json").write_text("[1, 2]"), "EAGLE-3|no readable draft head"),
        (lambda f: edit_config(f, architectures=["LlamaForCausalLM"]), "not an EAGLE-3 head"),
        (lambda f: edit_config(f, hidden_size=64), "hidden_size 64, the target has 32"),
        (
            lambda f: edit_config(f, num_attention_heads=8, head_dim=4),
            "(heads|head_dim) [48], the target",
        ),
        (lambda f: edit_config(f, vocab_size=32000), "vocab_size 32000, the target has 120"),
        (lambda f: edit_tensors(f, lambda t: t.pop("d2t")), "lacks d2t"),
        (lambda f: edit_tensors(f, lambda t: t.pop("fc.weight")), "does not fit this target: fc.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "target: extra is not known here"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"fc.weight": torch.zeros(32, 64)})),
            r"fc.weight is \(32, 64\), expected \(32, 96\)",
        ),
        (lambda f: edit_tensors(f, set_nan), "not finite in fc.weight"),
        (lambda f: edit_tensors(f, set_offset), "d2t that repeats a token or leaves 0..119"),
        (lambda f: edit_tensors(f, set_negative_offset), "d2t that repeats a token or leaves 0..119"),
        (lambda f: edit_tensors(f, set_repeated_token), "d2t that repeats a token"),
        (
            lambda f: edit_tensors(f, lambda t: t.update(d2t=t["d2t"] + 0.5)),
            r"d2t of type torch.float32 and shape \(60,\)",
        ),
        (lambda f: edit_tensors(f, lambda t: t.update(d2t=torch.tensor(3))), r"d2t of type torch.int64 and shape \(\)"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)})),
            "fc.weight of type torch.float8_e4m3fn, whose scale is not known here; save it in bfloat16",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)})),
            "fc.weight of type torch.int8",
        ),
        (set_counts(torch.full((60,), -1)), "vocab_counts that do not count its 60 draft tokens"),
        (set_counts(torch.ones(59, dtype=torch.int32)), "vocab_counts that do not count its 60 draft tokens"),
        (set_counts(torch.ones(60)), "vocab_counts that do not count its 60 draft tokens"),
    ],
    ids=[
        "no_weights",
        "no_config",
        "cut_weights",
        "empty_weights",
        "pickle",
        "broken_json",
        "not_text",
        "json_list",
        "foreign_architecture",
        "other_width",
        "other_heads",
        "other_vocabulary",
        "no_d2t",
        "missing_tensor",
        "unknown_tensor",
        "wrong_shape",
        "nan",
        "token_beyond_the_vocabulary",
        "negative_token",
        "repeated_token",
        "tokens_that_are_not_whole",
        "one_token",
        "8_bit_weights",
        "whole_weights",
        "negative_counts",
        "too_few_counts",
        "counts_that_are_not_whole",
    ],
)
def test_a_head_that_does_not_fit_is_refused(kind, tmp_path, damage, message):
    assert_refused(kind, tmp_path, damage, message)


def test_a_head_of_another_size_of_the_family_is_refused(kind, tmp_path):
    kind.build(build_model("llama", torch.float32, hidden_size=48)).save(tmp_path)
    with pytest.raises(ValueError, match="hidden_size 48, the target has 32"):
        Engine(shared_model("llama", torch.float32), drafter=str(tmp_path))


def test_a_head_of_another_model_of_the_same_shape_is_refused(kind, tmp_path):
    """Known by its final norm, of which some training leaves most."""
    model = build_model("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    kind.build(model).save(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.02)
    Engine(model, drafter=str(tmp_path))
    with pytest.raises(ValueError, match="was trained for another target: target_final_norm differs; train one"):
        Engine(shared_model("llama", torch.float32), drafter=str(tmp_path))


def test_a_head_of_a_model_whose_norms_are_zero_is_read_back(kind, tmp_path):
    """Gemma's, before any training: its norms multiply by one more."""
    model = shared_model("gemma", torch.float32)
    assert not model.model.norm.weight.any()
    kind.build(model).save(tmp_path)
    Engine(model, drafter=str(tmp_path))


def test_a_run_whose_checkpoints_hold_heads_is_refused_by_naming_one(kind, tmp_path):
    """`drafter=output_dir` of a training is an easy slip; a checkpoint without a head is not offered."""
    kind.build(build_model("llama", torch.float32)).save(tmp_path / "checkpoint-2" / "fastgrpo" / "head")
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match=r"no readable draft head in .*checkpoint-2 has one"):
        Engine(shared_model("llama", torch.float32), drafter=str(tmp_path))
    Engine(shared_model("llama", torch.float32), drafter=str(tmp_path / "checkpoint-2"))


def test_nothing_is_unpickled(kind, tmp_path, monkeypatch):
    model = shared_model("llama", torch.float32)
    kind.build(model).save(tmp_path)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("unpickled",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    kind.drafter.load(tmp_path, TargetModel(model))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable draft head"):
        kind.drafter.load(tmp_path, TargetModel(model))
