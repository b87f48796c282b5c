"""A head learns where it helps, rests where it does not, and never stays worse than it was."""

from __future__ import annotations

import json
import math

import pytest
import torch

from conftest import build_model, shared_model
from fastgrpo.draft_control import Judgement, LearningControl, Outcome
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine
from fastgrpo.learner import Learner
from fastgrpo.types import SamplingParams, SpeculationPlan
from test_eagle import build_drafter_for
from test_heads import assert_same_head, build_learner, collect_rollouts, head_bits


def play(control: LearningControl, losses: list[float]) -> list[tuple[Outcome, float]]:
    """Judge heads of these losses in turn on text that stays as hard as it is, each beside the best so far."""
    best: float | None = None
    judged = []
    for loss in losses:
        judgement = control.judge(loss, best)
        if judgement.outcome is Outcome.ADOPT:
            best = loss
        judged.append((judgement.outcome, judgement.effort))
    return judged


def test_a_head_that_improves_is_adopted_and_learns_with_all_its_time() -> None:
    assert play(LearningControl(), [2.0 * 0.98**step for step in range(10)]) == [(Outcome.ADOPT, 1.0)] * 10


def test_a_head_that_no_longer_improves_rests_but_never_stops() -> None:
    efforts = [effort for _, effort in play(LearningControl(), [1.0] * 8)]
    assert efforts == [1.0, 0.5, 0.25, 0.125, 0.125, 0.125, 0.125, 0.125]


def test_slow_decay_is_rolled_back_as_well_as_a_fall() -> None:
    slow = [outcome for outcome, _ in play(LearningControl(), [1.0 + 0.0049 * step for step in range(8)])]
    assert slow == [Outcome.ADOPT] + [Outcome.KEEP] * 6 + [Outcome.ROLL_BACK]
    assert [outcome for outcome, _ in play(LearningControl(), [1.0, 1.5])][1] is Outcome.ROLL_BACK


def test_rest_ends_when_the_policy_moves_away() -> None:
    control = LearningControl()
    play(control, [1.0] * 6)
    assert control.judge(1.3, 1.3).effort == 1.0  # both heads find the new text harder


def test_rest_comes_back_where_the_text_stays_as_hard_and_gains_are_long_past() -> None:
    control = LearningControl()
    play(control, [1.0] * 6)
    assert [control.judge(1.3, 1.3).effort for _ in range(6)] == [1.0, 1.0, 1.0, 0.5, 0.25, 0.125]
    assert play(LearningControl(), [1.0, 0.9, *[0.9] * 20])[-1] == (Outcome.KEEP, 0.125)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_becomes_the_reference(bad: float) -> None:
    control = LearningControl()
    assert control.judge(bad, None).outcome is Outcome.KEEP
    assert control.judge(bad, 1.0).outcome is Outcome.ROLL_BACK
    assert control.judge(1.0, bad) == Judgement(Outcome.KEEP, 1.0)
    assert control.judge(0.9, 1.0) == Judgement(Outcome.ADOPT, 1.0)


def test_a_restored_control_goes_on() -> None:
    first, second = LearningControl(), LearningControl()
    play(first, [1.0, 0.9, 0.95, 0.94])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in (0.93, 0.92, 1.2):
        assert first.judge(loss, 0.94) == second.judge(loss, 0.94)
    play(first, [1.0] * 4)
    second = LearningControl()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.effort, second.judge(1.3, 1.3).effort) == (0.125, 1.0), "it rests until the loss climbs"


# -- in the learner --------------------------------------------------------------------------------------------


def build_taught_learner() -> tuple[Learner, list]:
    """A learner whose head learnt for a while, and rollouts it has not seen."""
    model = shared_model("llama", torch.float32)
    rollouts = collect_rollouts(model, 24)
    learner = build_learner(build_drafter_for(model), rollouts[:16], learning_rate=5e-3)
    for _ in range(4):
        learner.learn(budget_s=1.0)
    for rollout in rollouts[16:20]:
        learner.add(rollout)
    assert not learner.learn(budget_s=0.0).is_rolled_back
    return learner, rollouts[20:]


def test_a_head_that_got_worse_is_rolled_back() -> None:
    learner, unseen = build_taught_learner()
    good = head_bits(learner.drafter)
    with torch.no_grad():
        for parameter in learner.drafter.head.midlayer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for rollout in unseen:
        learner.add(rollout)
    learner.update = lambda batch: (1.0, 1)  # what comes after the roll-back is not looked at here
    report = learner.learn(budget_s=0.0)
    assert report.is_rolled_back
    assert learner.rate_scale == 0.5
    assert not learner._optimizer.state
    differences = [(v - good[k]).abs().max() for k, v in learner.drafter.head.state_dict().items() if "midlayer" in k]
    assert max(differences) < 0.1, "back to a head of the last calls, not to the damaged one"
    for parameter, kept in zip(learner.drafter.fast_head.parameters(), learner.drafter.head.parameters(), strict=True):
        assert torch.equal(parameter, kept.to(parameter.dtype)), "and it is the one that drafts"
    assert_plain_tokens(learner.drafter)


def assert_plain_tokens(drafter: EagleDrafter) -> None:
    """Whatever became of the head, the tokens are those of plain decoding."""
    model = drafter.target.model
    params = SamplingParams(max_tokens=30, seed=3)
    prompts = [[3, 1, 4, 1, 5], [7, 7]]
    plan = SpeculationPlan(depth=3, width=2, num_draft_tokens=6)
    drafted = Engine(model, drafter=drafter, speculation=plan).generate(prompts, params)
    plain = Engine(model, drafter="none").generate(prompts, params)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]


def test_new_rollouts_are_judged_before_they_are_learnt_from() -> None:
    learner, unseen = build_taught_learner()
    before = head_bits(learner.drafter)
    for rollout in unseen:
        learner.add(rollout)
    learner.update = lambda batch: (1.0, 1)
    report = learner.learn(budget_s=0.0)
    assert_same_head(learner.drafter, before)
    assert math.isfinite(report.held_out_loss)
    again = learner.learn(budget_s=0.0)
    assert math.isnan(again.held_out_loss), "nothing new to judge by"


def test_effort_bounds_the_time() -> None:
    model = build_model("llama", torch.float32)
    learner = build_learner(build_drafter_for(model), collect_rollouts(model, 16))
    counts = []
    learner.update = lambda batch: counts.append(1) or (1.0, 1)
    learner.control.judge = lambda *_: Judgement(Outcome.KEEP, 1e-9)
    learner.learn(budget_s=1.0)
    assert len(counts) == 1
