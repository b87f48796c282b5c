"""A block head drafts all levels in one pass: exactly, as it was trained, the same whatever stands beside it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from conftest import HIDDEN_SIZE, SMALL_CPU, VOCAB_SIZE, build_model, expected_tokens, shared_model
from fastgrpo import block_training, pretrain
from fastgrpo.block_training import collate, compute_hidden, count_tokens, draw_anchors, measure_block_acceptance
from fastgrpo.drafters import DraftContext, build_drafter
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.block_files import load_block_head, save_block_head
from fastgrpo.drafters.block_head import build_block_head
from fastgrpo.drafters.drafter import TrainableDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.state import load_state, save_state
from fastgrpo.learner import Learner
from fastgrpo.model import TargetModel
from fastgrpo.objective import BlockObjective
from fastgrpo.options import DraftTrainOptions
from fastgrpo.planner import AutoPlanner, PlanInputs
from fastgrpo.profiler import measure_costs
from fastgrpo.sampling import SamplingBatch
from fastgrpo.tree import check_draft, compute_ancestors, compute_depths
from fastgrpo.types import PLAIN, SamplingParams, Sequence, SpeculationPlan, StepRecord
from tiny import save_tiny_model

PROMPTS = [[3, 1, 4, 1, 5], [7, 7], list(range(12)), [9, 8, 7, 6]]
CHAIN = SpeculationPlan(depth=8, width=1, num_draft_tokens=8)
TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=10)
DEEP = SpeculationPlan(depth=12, width=2, num_draft_tokens=20)


def build_block(model: PreTrainedModel, **settings: object) -> BlockDrafter:
    return BlockDrafter(TargetModel(model), **settings)


def shake(drafter: BlockDrafter, scale: float = 0.05) -> BlockDrafter:
    """Away from the start, where much is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in drafter.head.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    drafter.refresh()
    return drafter


def collect_rollouts(
    model: PreTrainedModel, count: int = 8, max_tokens: int = 24, temperature: float = 1.0
) -> list[FinishedRollout]:
    engine = Engine(model, drafter=build_block(model), speculation="off")
    rollouts: list[FinishedRollout] = []
    engine.on_finish.append(rollouts.append)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    engine.generate(prompts, SamplingParams(max_tokens=max_tokens, seed=3, temperature=temperature))
    return rollouts


def build_learner(drafter: BlockDrafter, rollouts: list[FinishedRollout], **settings: object) -> Learner:
    learner = Learner(drafter, **settings)
    for rollout in rollouts:
        learner.add(rollout)
    return learner


def collate_all(rollouts: list[FinishedRollout], drafter: BlockDrafter) -> block_training.BlockBatch:
    return collate(rollouts, drafter.target, torch.float32, block_size=drafter.head.block_size)


def head_bits(drafter: BlockDrafter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in drafter.head.state_dict().items()}


def assert_same_head(drafter: BlockDrafter, bits: dict[str, torch.Tensor]) -> None:
    for name, value in drafter.head.state_dict().items():
        assert torch.equal(value, bits[name]), name


# -- training is drafting --------------------------------------------------------------------------------------


def draft_logits(drafter: BlockDrafter, rollout: FinishedRollout, num_cached: int, depth: int) -> list[torch.Tensor]:
    """The logits of each level while a chain is drafted behind `num_cached` tokens, held to the true tokens."""
    target = drafter.target
    cache = target.build_cache(with_features=True)
    cache.reserve(1, len(rollout.features) + 1)
    cache.add_rows(1)
    cache.features.data[0, 0, :num_cached] = rollout.features[:num_cached]
    cache.lengths = [num_cached]
    tokens = rollout.prompt_ids + rollout.token_ids
    tokens += [0] * depth  # beyond the end anything may be drafted
    sequence = Sequence(
        request_id=0, prompt_ids=tokens[: num_cached + 1], params=SamplingParams(), max_tokens=99, stream_key=1
    )
    context = DraftContext(
        sequences=[sequence],
        sampling=SamplingBatch.build([sequence], torch.device("cpu")),
        pending_token_ids=torch.tensor([tokens[num_cached]]),
        cache=cache,
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


@pytest.fixture(scope="module")
def trained() -> BlockDrafter:
    """A head that has learnt a little; draft from copies of it."""
    model = shared_model("llama")
    drafter = build_block(model, draft_vocab_size=80)
    learner = build_learner(drafter, collect_rollouts(model, 8), learning_rate=1e-2)
    for _ in range(4):
        learner.learn(budget_s=0.0)
    return drafter


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("plan", [CHAIN, TREE, DEEP], ids=["chain", "tree", "deeper_than_the_block"])
def test_tokens_are_those_of_plain_decoding(trained, plan, temperature, is_trained):
    model = shared_model("llama")
    head = copy.deepcopy(trained.head) if is_trained else None
    engine = Engine(model, drafter=build_block(model, head=head, draft_vocab_size=80), speculation=plan, max_num_seqs=3)
    engine.on_step.append(lambda record: engine.check())
    params = SamplingParams(max_tokens=11, temperature=temperature, seed=2)
    prompts = [*PROMPTS, [7], *PROMPTS[:2]]  # one prompt has no feature at first
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)


def test_tokens_are_those_of_plain_decoding_in_half_precision_too():
    """Weights in float32, rollouts under autocast: the head drafts in the rollout's type."""
    model = build_model("llama", torch.float32)
    params = SamplingParams(max_tokens=11, seed=2)
    texts = []
    for drafter in (BlockDrafter(TargetModel(model, compute_dtype=torch.bfloat16)), "none"):
        engine = Engine(model, drafter=drafter, speculation=TREE, compute_dtype=torch.bfloat16)
        texts.append([c.token_ids for c in engine.generate(PROMPTS, params)])
    agreement = sum(a == b for one, two in zip(*texts, strict=True) for a, b in zip(one, two, strict=True))
    assert agreement > 0.8 * sum(map(len, texts[0])), "near-ties may flip in half precision, and no more than that"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_goes_on_between_half_precision_rollouts(dtype):
    model = build_model("llama", dtype)
    target = TargetModel(model, compute_dtype=torch.bfloat16)
    engine = Engine(model, drafter=BlockDrafter(target), speculation=TREE, compute_dtype=torch.bfloat16)
    learner = Learner(engine.drafter)
    engine.on_finish.append(learner.add)
    for _ in range(2):
        engine.generate(PROMPTS, SamplingParams(max_tokens=8))
        assert math.isfinite(learner.learn(budget_s=0.0).loss)
    assert learner.num_updates == 2


@pytest.mark.parametrize("plan", [CHAIN, TREE, DEEP, SpeculationPlan(depth=2, width=200, num_draft_tokens=100)])
def test_drafts_keep_their_promises_and_their_plan(plan):
    model = shared_model("qwen2")
    drafter = build_block(model, draft_vocab_size=50)
    engine = Engine(model, drafter=drafter, speculation=plan)
    propose, drafts = drafter.propose, []

    def keep(context: DraftContext, plan: SpeculationPlan) -> object:
        drafts.append(propose(context, plan))
        return drafts[-1]

    drafter.propose = keep
    engine.generate(PROMPTS, SamplingParams(max_tokens=6))
    assert drafts
    for draft in drafts:
        check_draft(draft)
        assert draft.num_nodes.max() <= 1 + plan.num_draft_tokens
        assert compute_depths(compute_ancestors(draft.parents)).max() <= min(plan.depth, drafter.head.block_size)
        assert draft.token_ids[:, 1:].max() < 50


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


class _EveryOtherStep:
    """Speculates at every `period`-th step, so that the drafter must catch up."""

    name = "fixed"

    def __init__(self, plan: SpeculationPlan, period: int) -> None:
        self.fixed, self.period, self.num_steps = plan, period, 0

    def begin(self) -> None:
        self.num_steps = 0

    def plan(self, inputs: PlanInputs) -> SpeculationPlan:
        self.num_steps += 1
        return PLAIN if self.num_steps % self.period else self.fixed

    def observe(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, object]:
        return {}


def collect_drafts(model: PreTrainedModel, max_num_seqs: int, period: int) -> dict[tuple[int, int], tuple]:
    """Every draft of a rollout whose rows come and go, by sequence and position."""
    drafter = shake(build_block(model, draft_vocab_size=90))
    engine = Engine(model, drafter=drafter, speculation="off", max_num_seqs=max_num_seqs)
    engine.planner = _EveryOtherStep(SpeculationPlan(depth=3, width=3, num_draft_tokens=8), period)
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
def test_a_draft_does_not_depend_on_the_rows_beside_it_or_on_when_it_is_asked(max_num_seqs, period):
    model = shared_model("llama")
    drafts, expected = collect_drafts(model, max_num_seqs, period), collect_drafts(model, 4, 1)
    shared = drafts.keys() & expected.keys()
    assert len(shared) >= 10
    assert {key: drafts[key] for key in shared} == {key: expected[key] for key in shared}
    if period == 1:
        assert drafts.keys() == expected.keys()


# -- what it costs ---------------------------------------------------------------------------------------------


def test_the_planner_charges_one_pass_for_a_block():
    profile = replace(SMALL_CPU, is_one_pass=True)
    inputs = PlanInputs(num_seqs=1, num_waiting=0, num_read=0, num_unread=0)
    chains = [SpeculationPlan(depth=depth, width=1, num_draft_tokens=8) for depth in (1, 8)]
    block, levels = AutoPlanner(profile), AutoPlanner(SMALL_CPU)
    costs = [[planner._predict_draft_s(plan, 1) for plan in chains] for planner in (block, levels)]
    assert costs[0] == [SMALL_CPU.compute_draft_s(1), SMALL_CPU.compute_draft_s(8)]
    assert costs[1][1] > 4 * costs[0][1]
    assert block.predict_step_s(PLAIN, inputs) == levels.predict_step_s(PLAIN, inputs)


def test_the_profile_says_what_kind_of_drafter_it_is_of_and_old_ones_still_load():
    model = shared_model("llama", torch.float32)
    drafter, target = build_block(model), TargetModel(model)
    with target.rollout_mode():
        profile = measure_costs(target, drafter).profile
        of_levels = measure_costs(target, EagleDrafter(target)).profile
    assert profile.is_one_pass and not of_levels.is_one_pass
    assert len(profile.draft_s) == len(profile.num_tokens)
    assert drafter.count_unread([]) == 0 and drafter._rows.num_read == []
    state = json.loads(json.dumps(AutoPlanner(profile).state_dict()))
    assert AutoPlanner.from_state(state).profile == profile
    del state["profile"]["is_one_pass"]
    assert AutoPlanner.from_state(state).profile == replace(profile, is_one_pass=False)


# -- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_a_fixed_batch_falls(dtype):
    model = build_model("llama", dtype)
    drafter, rollouts = build_block(model), collect_rollouts(model, 8)
    assert isinstance(drafter, TrainableDrafter)
    objective = BlockObjective(drafter.target, drafter.head.block_size)
    batch = collate_all(rollouts, drafter)
    with torch.no_grad():
        before = objective.compute_losses(drafter.head, batch)
    learner = build_learner(drafter, rollouts, learning_rate=1e-2)
    for _ in range(30):
        loss, num_tokens = learner.update(rollouts)
        assert math.isfinite(loss) and num_tokens == int(batch.is_taught.sum())
    with torch.no_grad():
        after = objective.compute_losses(drafter.head, batch)
    assert before.shape == (8,)
    assert (after < 0.6 * before).all()


def test_the_gradient_reaches_every_trained_weight_and_never_the_target():
    model = build_model("qwen2", torch.float32)
    drafter, rollouts = shake(build_block(model)), collect_rollouts(model)
    objective = BlockObjective(drafter.target, drafter.head.block_size)
    objective.weigh(objective.compute_losses(drafter.head, collate_all(rollouts, drafter))).backward()
    for name, parameter in drafter.head.named_parameters():
        if name == "lm_head.weight":
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert (drafter.head.mask_embeddings.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build_learner(drafter, rollouts).learn(budget_s=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_levels_far_down_weigh_less():
    objective = BlockObjective(TargetModel(shared_model("llama")), 8)
    weights = torch.stack([objective.weigh(row) for row in torch.eye(8)])
    torch.testing.assert_close(weights, torch.exp(-torch.arange(8) / 4))


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_short_completions_teach_what_they_can(max_tokens):
    model = build_model("llama", torch.float32)
    learner = build_learner(build_block(model), collect_rollouts(model, 4, max_tokens))
    report = learner.learn(budget_s=0.0)
    assert math.isfinite(report.loss) and math.isfinite(report.held_out_loss)
    assert report.num_tokens > 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_learning_raises_acceptance_and_the_measure_says_how_much():
    """Greedy text of a random model repeats itself: a head that learns anything learns that."""
    model = shared_model("llama", torch.float32)
    drafter = build_block(model)
    params = SamplingParams(max_tokens=40, temperature=0.0)

    def measure() -> float:
        engine = Engine(model, drafter=drafter, speculation=CHAIN)
        engine.generate(PROMPTS * 2, params)
        return sum(r.num_emitted for r in engine.records) / sum(r.num_seqs for r in engine.records)

    before = measure()
    rollouts = collect_rollouts(model, 8, 40, temperature=0.0)
    rates = measure_block_acceptance(drafter, rollouts)
    assert rates.shape == (8, 4) and ((rates >= 0) & (rates <= 1)).all()
    learner = build_learner(drafter, rollouts, learning_rate=1e-2)
    for _ in range(100):
        learner.update(rollouts)
    drafter.refresh()
    assert measure() > before + 1.5
    assert (measure_block_acceptance(drafter, rollouts)[:, 0] > rates[:, 0] + 0.1).all()


def test_measured_acceptance_is_that_of_real_drafts(trained):
    drafter = build_block(shared_model("llama"), head=copy.deepcopy(trained.head))
    plan = SpeculationPlan(depth=3, width=1, num_draft_tokens=3)
    engine = Engine(drafter.target.model, drafter=drafter, speculation=plan)
    rollouts: list[FinishedRollout] = []
    engine.on_finish.append(rollouts.append)
    engine.generate([[3, 1, 4, 1, index % 50] for index in range(48)], SamplingParams(max_tokens=48, seed=7))
    expected = measure_block_acceptance(drafter, rollouts)
    for depth in range(plan.depth):
        steps = [record for record in engine.records if len(record.offered) > depth]
        offered = sum(record.offered[depth][0] for record in steps)
        hits = sum(record.hits[depth][0] for record in steps)
        deviation = 4 * (0.25 / offered) ** 0.5
        assert hits / offered == pytest.approx(float(expected[depth, 0]), abs=deviation + 0.04)


def test_a_restored_learner_goes_on_as_if_nothing_had_happened(tmp_path):
    model = build_model("llama", torch.float32)
    rollouts = collect_rollouts(model, 8)
    engines = [Engine(model, drafter=build_block(model, draft_vocab_size=60), speculation="off") for _ in range(2)]
    learners = [Learner(engine.drafter) for engine in engines]
    for rollout in rollouts[:4]:
        learners[0].add(rollout)
    learners[0].learn(budget_s=0.0)
    save_state(tmp_path, engines[0], learners[0])
    load_state(tmp_path, engines[1], learners[1])
    for each in learners:
        for rollout in rollouts[4:]:
            each.add(rollout)
    reports = [each.learn(60.0, max_updates=4) for each in learners]  # more than the new ones fill
    assert reports[0].loss == reports[1].loss and reports[0].held_out_loss == reports[1].held_out_loss
    assert_same_head(engines[1].drafter, head_bits(engines[0].drafter))
    assert learners[0].num_updates == learners[1].num_updates >= 3


def test_the_draft_vocabulary_follows_what_was_said():
    model = build_model("llama", torch.float32)
    drafter, rollouts = build_block(model, draft_vocab_size=10), collect_rollouts(model, 8)
    build_learner(drafter, rollouts).learn(budget_s=0.0)
    counts = torch.bincount(torch.tensor([t for r in rollouts for t in r.token_ids]), minlength=VOCAB_SIZE)
    vocab = drafter.head.draft_vocab.long()
    assert counts[vocab].sum() == counts.topk(10).values.sum()
    assert torch.equal(drafter.head.lm_head.weight, model.lm_head.weight[vocab])


def test_the_global_generator_is_left_alone():
    model = build_model("llama", torch.float32)
    rollouts = collect_rollouts(model)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = build_block(model)
    build_learner(first, rollouts).learn(budget_s=0.0)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- files -------------------------------------------------------------------------------------------------------


def test_a_head_is_saved_and_read_back(tmp_path):
    model = build_model("qwen3", torch.float32)
    drafter = build_block(model, draft_vocab_size=60)
    build_learner(drafter, collect_rollouts(model)).learn(budget_s=0.0)
    drafter.save(tmp_path)
    assert_same_head(BlockDrafter.load(tmp_path, TargetModel(model)), head_bits(drafter))
    loaded = build_drafter(str(tmp_path), TargetModel(model))
    assert isinstance(loaded, BlockDrafter) and loaded.was_trained
    assert isinstance(build_drafter("block", TargetModel(model)), BlockDrafter)
    EagleDrafter(TargetModel(model)).save(tmp_path / "eagle")
    assert isinstance(build_drafter(tmp_path / "eagle", TargetModel(model)), EagleDrafter)


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


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["previous_in.weight"][3, 4] = math.nan


def set_repeated_token(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] -= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no readable draft head in"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "no readable draft head in"),
        (lambda f: edit_config(f, architectures=["LlamaForCausalLMEagle3"]), "num_hidden_layers 2, the target has 1"),
        (lambda f: edit_config(f, hidden_size=64), "hidden_size 64, the target has 32"),
        (lambda f: edit_config(f, vocab_size=32000), "vocab_size 32000, the target has 120"),
        (lambda f: edit_config(f, target_layers=[0, 1, 2]), r"target_layers \[0, 1, 2\], the target has"),
        (lambda f: edit_config(f, block_size=1), "block_size 1, which must be a number from 2 to 64"),
        (lambda f: edit_config(f, correction_rank="many"), "correction_rank 'many', which must be a number"),
        (lambda f: edit_config(f, block_size=5), r"mask_embeddings is \(7, 32\), expected \(4, 32\)"),
        (lambda f: edit_config(f, num_hidden_layers=3), "does not fit this target: layers.2"),
        (lambda f: edit_config(f, is_causal=False), "sets is_causal, which is not known here"),
        (lambda f: edit_config(f, target_final_norm=[2.0] * 32), "was trained for another target"),
        (lambda f: edit_config(f, target_final_norm="smooth"), "was trained for another target"),
        (lambda f: edit_tensors(f, lambda t: t.pop("d2t")), "lacks d2t"),
        (lambda f: edit_tensors(f, lambda t: t.pop("fc.weight")), "does not fit this target: fc.weight"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "does not fit this target: extra"),
        (lambda f: edit_tensors(f, set_nan), "not finite in previous_in.weight"),
        (lambda f: edit_tensors(f, set_repeated_token), "d2t that repeats a token"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path, damage, message):
    model = shared_model("llama", torch.float32)
    build_block(model, draft_vocab_size=60).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Engine(model, drafter=tmp_path)
    assert str(tmp_path) in str(caught.value)


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
