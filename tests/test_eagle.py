"""The head learns what it will be asked, without disturbing the run; its files are EAGLE-3's and are not trusted."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from conftest import HIDDEN_SIZE, VOCAB_SIZE, build_model, shared_model
from fastgrpo import draft_loss, unroll
from fastgrpo.draft_loss import LOSSES, DraftLoss
from fastgrpo.drafters import DraftContext, build_drafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.learner import Learner
from fastgrpo.model import TargetModel
from fastgrpo.objective import EagleObjective
from fastgrpo.planner import PlanInputs
from fastgrpo.sampling import SamplingBatch, sample, stream_key
from fastgrpo.tree import check_draft, compute_ancestors, compute_depths
from fastgrpo.types import PLAIN, SamplingParams, Sequence, SpeculationPlan, StepRecord
from fastgrpo.unroll import NUM_STEPS, collate, compute_outputs, count_pairs, pack

PROMPTS = [[3, 1, 4, 1, 5], [7, 7], list(range(12)), [9, 8, 7, 6]]


def build_drafter_for(model: PreTrainedModel, **settings: object) -> EagleDrafter:
    return EagleDrafter(TargetModel(model), **settings)


def collect_rollouts(model: PreTrainedModel, count: int = 8, max_tokens: int = 24) -> list[FinishedRollout]:
    """What a rollout leaves for the learner."""
    engine = Engine(model, drafter=build_drafter_for(model), speculation="off")
    rollouts: list[FinishedRollout] = []
    engine.on_finish.append(rollouts.append)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    engine.generate(prompts, SamplingParams(max_tokens=max_tokens, seed=3))
    return rollouts


def build_learner(drafter: EagleDrafter, rollouts: list[FinishedRollout], **settings: object) -> Learner:
    learner = Learner(drafter, **settings)
    for rollout in rollouts:
        learner.add(rollout)
    return learner


def head_bits(drafter: EagleDrafter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in drafter.head.state_dict().items()}


def assert_same_head(drafter: EagleDrafter, bits: dict[str, torch.Tensor]) -> None:
    for name, value in drafter.head.state_dict().items():
        assert torch.equal(value, bits[name]), name


# -- drafting ----------------------------------------------------------------------------------------------


def draft_chains(drafter: EagleDrafter, rollout: FinishedRollout, num_pairs: int, depth: int) -> list[torch.Tensor]:
    """The head's outputs while it drafts a chain behind `num_pairs` pairs, held to the true tokens."""
    target = drafter.target
    cache = target.build_cache(with_features=True)
    cache.reserve(1, len(rollout.features) + 1)
    cache.add_rows(1)
    cache.features.data[0, 0, : len(rollout.features)] = rollout.features
    cache.lengths = [num_pairs]
    tokens = rollout.prompt_ids + rollout.token_ids
    sequence = Sequence(
        request_id=0, prompt_ids=tokens[: num_pairs + 1], params=SamplingParams(), max_tokens=99, stream_key=1
    )
    context = DraftContext(
        sequences=[sequence],
        sampling=SamplingBatch.build([sequence], torch.device("cpu")),
        pending_token_ids=torch.tensor([tokens[num_pairs]]),
        cache=cache,
    )
    outputs: list[torch.Tensor] = []

    def follow(output: torch.Tensor, noise_rows: SamplingBatch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        outputs.append(output[0, 0])
        chosen = tokens[num_pairs + len(outputs)]
        return output.new_zeros(1, 1, 1), torch.tensor([[[chosen]]])

    drafter.rank_level = follow
    drafter.begin()
    with target.rollout_mode():
        drafter.propose(context, SpeculationPlan(depth=depth, width=1, num_draft_tokens=depth))
    return outputs


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


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "plan",
    [
        SpeculationPlan(depth=1, width=1, num_draft_tokens=1),
        SpeculationPlan(depth=4, width=1, num_draft_tokens=4),
        SpeculationPlan(depth=3, width=4, num_draft_tokens=12),
        SpeculationPlan(depth=3, width=8, num_draft_tokens=136),
        SpeculationPlan(depth=2, width=200, num_draft_tokens=100),
    ],
    ids=["one", "chain", "tree", "whole_pool", "wider_than_the_vocabulary"],
)
def test_drafts_keep_their_promises_and_their_plan(plan, temperature):
    model = shared_model("qwen2")
    drafter = build_drafter_for(model, draft_vocab_size=50)
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
        assert compute_depths(compute_ancestors(draft.parents)).max() <= plan.depth
        assert draft.token_ids[:, 1:].max() < 50


@dataclass
class _EveryOtherStep:
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


def collect_drafts(model: PreTrainedModel, max_num_seqs: int, period: int) -> dict[tuple[int, int], tuple]:
    """Every draft of a rollout whose rows come and go, by sequence and position."""
    drafter = build_drafter_for(model, draft_vocab_size=90)
    planner = _EveryOtherStep(SpeculationPlan(depth=3, width=3, num_draft_tokens=8), period)
    engine = Engine(model, drafter=drafter, speculation="off", max_num_seqs=max_num_seqs)
    engine.planner = planner
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
    """Tokens are exact whatever is drafted; only this tells whether the drafter's own rows move rightly."""
    model = shared_model("llama")
    drafts, expected = collect_drafts(model, max_num_seqs, period), collect_drafts(model, 4, 1)
    shared = drafts.keys() & expected.keys()
    assert len(shared) >= 10
    assert {key: drafts[key] for key in shared} == {key: expected[key] for key in shared}
    if period == 1:
        assert drafts.keys() == expected.keys()


def test_drafts_are_ranked_with_the_noise_of_their_position():
    """A head that is the target's equal is always right, at any temperature: noise is shared, not drawn again."""
    model = shared_model("llama")
    drafter = build_drafter_for(model)
    sequences = [
        Sequence(request_id=i, prompt_ids=[0], params=SamplingParams(), max_tokens=9, stream_key=stream_key(0, i))
        for i in range(50)
    ]
    batch = SamplingBatch.build(sequences, torch.device("cpu"))
    hidden = torch.randn(50, 1, HIDDEN_SIZE, dtype=torch.float64)
    chance, tokens = drafter.rank_level(hidden, batch, 3)
    logits = drafter.fast_head.compute_logits(hidden)[:, 0]
    expected, _ = sample(logits, batch, torch.arange(VOCAB_SIZE, dtype=torch.int32))
    assert torch.equal(tokens[:, 0, 0], expected)
    assert (chance[..., :-1] >= chance[..., 1:]).all()
    assert (chance.exp().sum(-1) <= 1 + 1e-6).all()


def test_without_noise_the_likeliest_tokens_are_drafted_and_nothing_else_changes():
    model = shared_model("llama")
    drafter, params = build_drafter_for(model), SamplingParams(max_tokens=16, seed=4)
    plan = SpeculationPlan(depth=2, width=3, num_draft_tokens=6)
    texts = []
    for drafter.ranks_with_noise in (True, False):
        texts.append([c.token_ids for c in Engine(model, drafter=drafter, speculation=plan).generate(PROMPTS, params)])
    assert texts[0] == texts[1]
    sequence = Sequence(request_id=0, prompt_ids=[0], params=SamplingParams(), max_tokens=9, stream_key=1)
    hidden = torch.randn(1, 1, HIDDEN_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chance, tokens = drafter.rank_level(hidden, SamplingBatch.build([sequence], torch.device("cpu")), 3)
    expected = drafter.fast_head.compute_logits(hidden).log_softmax(-1).topk(3)
    assert torch.equal(tokens, drafter.head.draft_vocab[expected.indices].long())
    assert torch.allclose(chance, expected.values.to(chance.dtype))


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


def test_logits_never_exist_for_a_whole_batch(monkeypatch):
    monkeypatch.setattr(draft_loss, "_CPU_CHUNK_ROWS", 4)
    model = build_model("llama", torch.float32)
    drafter, rollouts = build_drafter_for(model), collect_rollouts(model, 4)
    objective = EagleObjective(drafter.target)
    batch = objective.collate(rollouts, torch.float32)
    assert batch.num_unrolled > 4
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            shapes.extend(x.shape for x in tree_leaves(output) if isinstance(x, torch.Tensor))
            return output

    with Watch(), torch.enable_grad():
        objective.weigh(objective.compute_losses(drafter.head, batch)).backward()
    of_logits = [shape for shape in shapes if shape[-1:] == (VOCAB_SIZE,) and shape != (HIDDEN_SIZE, VOCAB_SIZE)]
    assert of_logits and max(math.prod(shape[:-1]) for shape in of_logits) <= NUM_STEPS * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_a_fixed_batch_falls(dtype):
    model = build_model("llama", dtype)
    drafter = build_drafter_for(model)
    rollouts = collect_rollouts(model, 8)
    batch = collate(rollouts, drafter.target, torch.float32)
    with torch.no_grad():
        before = [float(loss) for loss in EagleObjective(drafter.target).compute_losses(drafter.head, batch)]
    learner = build_learner(drafter, rollouts, learning_rate=1e-2)
    reports = [learner.learn(budget_s=5.0) for _ in range(6)]
    with torch.no_grad():
        after = [float(loss) for loss in EagleObjective(drafter.target).compute_losses(drafter.head, batch)]
    assert all(b < 0.7 * a for a, b in zip(before, after, strict=True))
    assert reports[-1].loss < reports[0].loss
    assert sum(report.num_updates for report in reports) == learner.num_updates
    assert all(report.num_skipped == 0 and report.num_tokens > 0 for report in reports)


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


def test_batches_are_full_but_never_over():
    assert pack([], [], 10) == []
    assert pack(list("abcde"), [4, 6, 1, 12, 3], 10) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_learning_raises_acceptance():
    model = shared_model("llama", torch.float32)
    drafter = build_drafter_for(model)
    plan = SpeculationPlan(depth=3, width=2, num_draft_tokens=6)

    def measure() -> float:
        engine = Engine(model, drafter=drafter, speculation=plan)
        engine.generate(PROMPTS * 4, SamplingParams(max_tokens=20, seed=50))
        return sum(r.num_emitted for r in engine.records) / sum(r.num_seqs for r in engine.records)

    before = measure()
    learner = build_learner(drafter, collect_rollouts(model, 32), learning_rate=1e-2)
    for _ in range(6):
        learner.learn(budget_s=5.0)
    assert measure() > before + 0.15


def test_the_target_is_not_trained():
    model = build_model("qwen2", torch.float32)
    drafter = build_drafter_for(model)
    learner = build_learner(drafter, collect_rollouts(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lm_head = drafter.head.lm_head.weight.clone()
    learner.learn(budget_s=1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert drafter.head.lm_head.weight.grad is None
    assert torch.equal(drafter.head.lm_head.weight.sort(0).values, lm_head.sort(0).values)


def test_the_global_generator_is_left_alone(tmp_path):
    model = build_model("llama", torch.float32)
    rollouts = collect_rollouts(model)
    build_drafter_for(model).save(tmp_path)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    drafter = build_drafter_for(model)
    assert torch.equal(torch.random.get_rng_state(), before), "building a head"
    learner = build_learner(drafter, rollouts)
    learner.learn(budget_s=0.0)
    assert torch.equal(torch.random.get_rng_state(), before), "learning"
    EagleDrafter.load(tmp_path, TargetModel(model))
    assert torch.equal(torch.random.get_rng_state(), before), "loading a head"


def test_a_head_starts_the_same_whatever_was_drawn_before():
    model = build_model("llama", torch.float32)
    torch.manual_seed(1)
    first = head_bits(build_drafter_for(model))
    torch.manual_seed(2)
    assert_same_head(build_drafter_for(model), first)


def test_at_least_one_update_whatever_the_budget():
    model = build_model("llama", torch.float32)
    learner = build_learner(build_drafter_for(model), collect_rollouts(model))
    assert learner.learn(budget_s=0.0).num_updates == 1
    again = learner.learn(budget_s=0.0)  # nothing new: from the replay
    assert again.num_updates == 1


def test_learning_from_nothing_does_nothing():
    drafter = build_drafter_for(build_model("llama", torch.float32))
    before = head_bits(drafter)
    report = Learner(drafter).learn(budget_s=1.0)
    assert (report.num_updates, report.num_tokens, report.num_skipped) == (0, 0, 0)
    assert math.isnan(report.loss)
    assert_same_head(drafter, before)


def test_the_replay_is_bounded_and_drops_the_oldest():
    model = build_model("llama", torch.float32)
    rollouts = collect_rollouts(model, 8)
    each = [rollout.features.numel() * rollout.features.element_size() for rollout in rollouts]
    learner = build_learner(build_drafter_for(model), rollouts[:4], max_replay_bytes=sum(each[3:6]))
    learner.learn(budget_s=0.0)
    for rollout in rollouts[4:6]:
        learner.add(rollout)
    learner.learn(budget_s=0.0)
    assert [id(r) for r in learner._replay] == [id(r) for r in rollouts[3:6]]
    tight = build_learner(build_drafter_for(model), rollouts, max_replay_bytes=1)
    tight.learn(budget_s=0.0)
    assert not tight._replay


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_skipped_and_counted(bad):
    model = build_model("llama", torch.float32)
    drafter = build_drafter_for(model)
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


def test_rollouts_too_short_to_learn_from_are_left_out():
    model = build_model("llama", torch.float32)
    learner = Learner(build_drafter_for(model))
    rollout = collect_rollouts(model, 1)[0]
    learner.add(replace(rollout, features=None))
    learner.add(replace(rollout, prompt_ids=[1], token_ids=[2], features=rollout.features[:1]))
    assert learner.learn(budget_s=0.0).num_updates == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_short_completions_teach_what_they_can(max_tokens):
    model = build_model("llama", torch.float32)
    learner = build_learner(build_drafter_for(model), collect_rollouts(model, 4, max_tokens))
    report = learner.learn(budget_s=0.0)
    assert math.isfinite(report.loss)
    assert report.num_tokens == 4 * max_tokens


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_learning_rate_is_refused(rate):
    drafter = build_drafter_for(build_model("llama", torch.float32))
    with pytest.raises(ValueError, match="draft_learning_rate must be a positive number"):
        Learner(drafter, learning_rate=rate)


def test_a_restored_learner_goes_on_as_if_nothing_had_happened(tmp_path):
    model = build_model("llama", torch.float32)
    rollouts = collect_rollouts(model, 8)
    drafter = build_drafter_for(model, draft_vocab_size=60)
    learner = build_learner(drafter, rollouts[:4])
    learner.learn(budget_s=0.0)
    drafter.save(tmp_path)
    state = copy.deepcopy(learner.state_dict())
    restored_drafter = EagleDrafter.load(tmp_path, TargetModel(model))
    restored = Learner(restored_drafter, learning_rate=learner.learning_rate)
    restored.load_state_dict(state)
    for each in (learner, restored):
        for rollout in rollouts[4:]:
            each.add(rollout)
    first, second = (each.learn(60.0, max_updates=4) for each in (learner, restored))  # more than the new ones fill
    assert first.loss == second.loss
    assert_same_head(restored_drafter, head_bits(drafter))
    assert restored.num_updates == learner.num_updates == 5
    assert [r.token_ids for r in restored._replay] == [r.token_ids for r in rollouts]


def test_the_draft_vocabulary_follows_what_was_said():
    model = build_model("llama", torch.float32)
    drafter = build_drafter_for(model, draft_vocab_size=10)
    rollouts = collect_rollouts(model, 8)
    build_learner(drafter, rollouts).learn(budget_s=0.0)
    counts = torch.bincount(torch.tensor([t for r in rollouts for t in r.token_ids]), minlength=VOCAB_SIZE)
    vocab = drafter.head.draft_vocab.long()
    assert (vocab[1:] > vocab[:-1]).all()
    assert counts[vocab].sum() == counts.topk(10).values.sum()
    assert torch.equal(drafter.head.lm_head.weight, model.lm_head.weight[vocab])


# -- files ------------------------------------------------------------------------------------------------------


def test_a_head_is_saved_and_read_back(tmp_path):
    model = build_model("qwen3", torch.float32)
    drafter = build_drafter_for(model, draft_vocab_size=60)
    build_learner(drafter, collect_rollouts(model)).learn(budget_s=0.0)
    drafter.save(tmp_path)
    assert_same_head(EagleDrafter.load(tmp_path, TargetModel(model)), head_bits(drafter))
    loaded = build_drafter(tmp_path, TargetModel(model))
    assert isinstance(loaded, EagleDrafter)
    assert isinstance(build_drafter(str(tmp_path), TargetModel(model)), EagleDrafter)


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


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"][3, 4] = math.nan


def set_offset(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] = VOCAB_SIZE


def set_negative_offset(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] = -6


def set_repeated_token(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][5] -= 1


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
        (lambda f: edit_tensors(f, lambda t: t.pop("fc.weight")), "does not fit this target: fc.weight"),
        (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), "does not fit this target: extra"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"fc.weight": torch.zeros(32, 64)})),
            r"fc.weight is \(32, 64\), expected \(32, 96\)",
        ),
        (lambda f: edit_tensors(f, set_nan), "not finite in fc.weight"),
        (lambda f: edit_tensors(f, set_offset), "d2t"),
        (lambda f: edit_tensors(f, set_negative_offset), "d2t"),
        (lambda f: edit_tensors(f, set_repeated_token), "d2t"),
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
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path, damage, message):
    model = shared_model("llama", torch.float32)
    build_drafter_for(model, draft_vocab_size=60).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Engine(model, drafter=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_published_head_with_its_own_embedding_is_read(tmp_path):
    """`embed_tokens.weight` is optional in EAGLE-3 checkpoints; the target's own is used."""
    model = shared_model("llama", torch.float32)
    drafter = build_drafter_for(model)
    drafter.save(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"embed_tokens.weight": torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)}))
    assert_same_head(EagleDrafter.load(tmp_path, TargetModel(model)), head_bits(drafter))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    model = shared_model("llama", torch.float32)
    build_drafter_for(model).save(tmp_path)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("unpickled",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    EagleDrafter.load(tmp_path, TargetModel(model))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable draft head"):
        EagleDrafter.load(tmp_path, TargetModel(model))


def test_a_head_of_another_size_of_the_family_is_refused(tmp_path):
    build_drafter_for(build_model("llama", torch.float32, hidden_size=48)).save(tmp_path)
    with pytest.raises(ValueError, match="hidden_size 48, the target has 32"):
        Engine(shared_model("llama", torch.float32), drafter=str(tmp_path))
