"""The benchmarks of planners on a tiny model, and the arithmetic behind what they say. No time is asserted."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fastgrpo.bench import order
from fastgrpo.bench.budget import choose_best, compare, compute_gain, compute_gain_error, plot_budget
from fastgrpo.bench.measure import TURN_TOKENS, interleave
from fastgrpo.bench.plans import describe_concurrency, judge, plot_plans
from fastgrpo.bench.rollout import compare_variants
from fastgrpo.bench.steady import Progress, SteadyRollout, SteadyWorkload
from fastgrpo.cli import main
from fastgrpo.engine import Engine
from fastgrpo.loading import load_model
from fastgrpo.options import (
    AcceptanceOptions,
    BudgetOptions,
    DraftersOptions,
    E2EOptions,
    LearningOptions,
    OrderOptions,
    PlansOptions,
    RolloutOptions,
    UpdateOptions,
    name_plan,
    parse_plan,
    parse_speculation,
)
from fastgrpo.planner import FixedPlanner
from fastgrpo.report.rollout_picture import (
    build_rollout_picture,
    compute_plain_rates,
    find_stretches,
    plot_rollout,
    set_trials_apart,
)
from fastgrpo.scheduler import Scheduler
from fastgrpo.types import PLAIN, SamplingParams, Sequence, SpeculationPlan, StepRecord
from tiny import save_tiny_model

TREE = SpeculationPlan(depth=2, width=2, num_draft_tokens=3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def build_record(num_seqs: int, num_emitted: int, step_s: float, *, plan: SpeculationPlan = PLAIN) -> StepRecord:
    return StepRecord(
        num_seqs=num_seqs, num_waiting=0, plan=plan, num_tokens=num_seqs * (1 + plan.num_draft_tokens),
        num_emitted=num_emitted, num_read=0, num_prefilled=0, offered=(), hits=(), prefill_s=0.0, draft_s=0.0,
        target_s=step_s, verify_s=0.0, step_s=step_s, plan_s=0.02 * step_s,
    )  # fmt: skip


# -- shapes ------------------------------------------------------------------------------------------


def test_a_shape_is_a_plan_and_back() -> None:
    assert parse_plan("4x3x16") == SpeculationPlan(depth=4, width=3, num_draft_tokens=16)
    assert name_plan(parse_plan("4x3x16")) == "4x3x16"
    assert name_plan(PLAIN) == "off"
    assert parse_speculation("bandit") == "bandit"
    assert parse_speculation("1x2x2") == SpeculationPlan(depth=1, width=2, num_draft_tokens=2)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("4x4", "a plan's shape is depth x width x draft tokens, such as 4x4x16; got '4x4'"),
        ("4x4x16x", "such as 4x4x16; got '4x4x16x'"),
        ("4x0x16", "has no zero, got '4x0x16'; plain decoding is off"),
        ("4x4x3", "the shape '4x4x3' cannot be: num_draft_tokens 3 cannot fill a depth of 4"),
        ("1x1x5", "the shape '1x1x5' cannot be: 1x1 trees have 1 draft tokens at most"),
        ("2x2x7", "2x2 trees have 6 draft tokens at most"),
        ("always", "speculation must be one of auto, off, paper, paper-own, bandit, fixed, or depth x width"),
        ("", "got ''"),
    ],
)
def test_a_word_that_is_neither_planner_nor_shape_is_refused(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_speculation(word)
    assert main(["bench", "rollout", "--speculation", f"off,{word}"]) == 2
    assert message in capsys.readouterr().err


def test_options_refuse_what_cannot_be_measured() -> None:
    for options, changes, message in (
        (PlansOptions, {"plans": ("off",)}, "such as 4x4x16; got 'off'"),
        (PlansOptions, {"plans": ()}, "plans must name at least one shape"),
        (PlansOptions, {"concurrency": (0, 4)}, "at least 1, got '0,4'"),
        (PlansOptions, {"drafter": "none"}, "plain decoding is added"),
        (BudgetOptions, {"most": 1}, "most must be at least 2, got 1"),
        (BudgetOptions, {"concurrency": ()}, "concurrency must name"),
        (BudgetOptions, {"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        (RolloutOptions, {"speculation": ("auto", "3x3")}, "got '3x3'"),
        (RolloutOptions, {"speculation": ("auto", "auto")}, "must name each once, got auto twice in 'auto,auto'"),
        (PlansOptions, {"concurrency": (1, 4, 1)}, "concurrency must name each once, got 1 twice in '1,4,1'"),
        (BudgetOptions, {"plans": ("1x1x1", "1x1x1")}, "plans must name each once, got 1x1x1 twice"),
        (PlansOptions, {"max_num_tokens": 1}, "max_num_tokens=1 leaves every plan out: 1x1x1 with 1 live takes 2"),
        (BudgetOptions, {"max_num_tokens": 3}, "leaves every plan out: 1x4x1 with 2 live takes 4 tokens a forward"),
        (E2EOptions, {"variants": ("off", "off")}, "variants must name each once, got off twice in 'off,off'"),
        (UpdateOptions, {"variants": ("off", "off")}, "variants must name each once, got off twice in 'off,off'"),
        (LearningOptions, {"losses": ("kl", "kl")}, "losses must name each once, got kl twice in 'kl,kl'"),
        (LearningOptions, {"starts": ("eagle", "eagle")}, "starts must name each once, got eagle twice"),
        (DraftersOptions, {"drafters": ("ngram", "ngram")}, "drafters must name each once"),
        (AcceptanceOptions, {"temperature": (1.0, 1.0)}, "temperature must name each once, got 1.0 twice"),
        (OrderOptions, {"tasks": ("chain_sum", "chain_sum")}, "tasks must name each once, got chain_sum twice"),
    ):
        with pytest.raises(ValueError, match=message):
            options(**changes)


# -- a constant number of live sequences -------------------------------------------------------------


def build_workload(min_tokens: int) -> SteadyWorkload:
    params = SamplingParams(max_tokens=7, seed=0)
    return SteadyWorkload(prompts=[[5, 6, 7], [8, 9]], params=params, tokens_per_seq=4, min_tokens=min_tokens)


def roll_out(engine: Engine, num_seqs: int, min_tokens: int) -> SteadyRollout:
    return build_workload(min_tokens).roll_out({"": engine}, num_seqs, seed=1)[""]


def test_only_full_steps_count_and_the_rollout_ends_with_enough(model_dir: Path) -> None:
    engine = Engine(load_model(str(model_dir), dtype="float32", device="cpu"), drafter="ngram", speculation=TREE)
    rollout = roll_out(engine, 3, min_tokens=40)
    assert {record.num_seqs for record in rollout.records} == {3}
    assert not any(record.num_prefilled for record in rollout.records)
    emitted = [record.num_emitted for record in rollout.records]
    assert 40 <= sum(emitted) < 40 + 3 * (TURN_TOKENS + 3), "it ends with the turn that has shown enough"
    walked = sum(seen.num_forwards for seen in rollout.progress.values())
    assert 0 < walked < 3 * len(emitted), "steps that end a request are left out"
    assert all(seen.num_tokens >= seen.num_forwards for seen in rollout.progress.values())
    assert not engine.on_step and not engine.scheduler.has_work
    engine.check()
    again = roll_out(engine, 3, min_tokens=40)
    assert {request: seen.num_tokens for request, seen in again.progress.items()}.keys() == rollout.progress.keys()
    build_workload(min_tokens=40).warm_up(engine, 3, seed=1, share=0.2)
    assert 0 < len(engine.records) < len(emitted)


def test_a_rollout_of_a_step_each_counts_each_token_once(model_dir: Path) -> None:
    engine = Engine(load_model(str(model_dir), dtype="float32", device="cpu"), drafter="none")
    rollout = roll_out(engine, 2, min_tokens=10)
    assert all(seen.num_tokens == seen.num_forwards for seen in rollout.progress.values()), "plain: one a forward"


def test_a_rollout_in_which_no_step_counts_is_no_measurement(model_dir: Path) -> None:
    engine = Engine(load_model(str(model_dir), dtype="float32", device="cpu"), drafter="none")
    prompts = [[5, 6, index] for index in range(300)]  # none of them has a sibling, whose prompt would be there already
    workload = replace(build_workload(10), prompts=prompts, params=SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="nothing was measured with 3 live sequences: with max_tokens=1"):
        workload.roll_out({"": engine}, 3, seed=1)


def test_engines_that_take_turns_in_a_rollout_do_what_they_do_alone(model_dir: Path) -> None:
    """They share a model, which each of them puts back as it found it: the first one done must not."""
    model = load_model(str(model_dir), dtype="float32", device="cpu").train()
    before = model.config._attn_implementation
    engines = {
        "short": Engine(model, drafter="none"),
        "tree": Engine(model, drafter="ngram", speculation=TREE),
        "few": Engine(model, drafter="none", max_num_seqs=2),
    }
    prompts, params = [[5, 6, 7], [8, 9], [3, 4, 4, 4]], SamplingParams(max_tokens=30, seed=3)
    alone = {
        name: interleave({name: engine}, prompts, lambda _: params, 1)[name][0] for name, engine in engines.items()
    }
    together = interleave(engines, prompts, lambda _: params, 1, turn_tokens=4)
    for name, engine in engines.items():
        assert together[name][0].token_ids == alone[name].token_ids
        assert sum(record.num_emitted for record in together[name][0].records) == together[name][0].num_tokens
        assert together[name][0].generation_s >= sum(record.step_s for record in together[name][0].records)
        assert not engine.scheduler.has_work
        engine.check()
    assert model.training and model.config._attn_implementation == before
    assert torch.is_grad_enabled()


def test_engines_that_take_turns_leave_nothing_behind_when_one_fails(model_dir: Path) -> None:
    model = load_model(str(model_dir), dtype="float32", device="cpu").train()
    engines = {name: Engine(model, drafter="none") for name in ("first", "second")}

    def fail(record: StepRecord) -> None:
        raise RuntimeError("stop here")

    engines["second"].on_step.append(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        interleave(engines, [[5, 6, 7]], lambda _: SamplingParams(max_tokens=30), 1, turn_tokens=4)
    assert model.training and torch.is_grad_enabled()
    assert not any(engine.scheduler.has_work for engine in engines.values())


# -- what is read off --------------------------------------------------------------------------------


def test_auto_stands_beside_the_best_plan_and_plain_decoding() -> None:
    rollouts = {
        "off": [[build_record(2, 2, 0.1)], [build_record(2, 2, 0.1)]],
        "1x1x1": [[build_record(2, 4, 0.1, plan=TREE)], [build_record(2, 2, 0.1, plan=TREE)]],
        "3x3x8": [[build_record(2, 3, 0.1, plan=TREE)], [build_record(2, 4, 0.1, plan=TREE)]],
        "auto": [[build_record(2, 3, 0.1, plan=TREE)], [build_record(2, 3, 0.1)]],
    }
    row = describe_concurrency(2, rollouts)
    assert row["best"] == "3x3x8"
    assert row["auto_to_best"] == pytest.approx(7 / 8), "within each rollout, then the median"
    assert row["auto_to_plain"] == pytest.approx(6 / 4)
    assert row["each_auto_to_best"] == pytest.approx([1, 3 / 4])
    assert row["auto_to_best_chosen_apart"] == pytest.approx(6 / 5), "3x3x8 leads the second, 1x1x1 the first repeat"
    assert row["arms"]["auto"]["share_speculating"] == 0.5
    assert row["arms"]["auto"]["share_by_plan"] == {"2x2x3": 0.5, "off": 0.5}
    assert row["arms"]["auto"]["plan_share"] == pytest.approx(0.02)
    once = describe_concurrency(2, {name: each[:1] for name, each in rollouts.items()})
    assert once["best"] == "1x1x1" and once["auto_to_best_chosen_apart"] is None


def test_what_recording_takes_of_short_rollouts_is_told_apart() -> None:
    slow = {"step_s": 0.9, "is_steady": False}
    plain, drafted = build_record(2, 2, 0.1), build_record(2, 4, 0.1, plan=TREE)
    rollouts = {
        "off": [[plain, plain]],
        "2x2x3": [[replace(drafted, **slow), drafted]],
        "auto": [[replace(drafted, **slow), drafted, plain]],
        "1x1x1": [[replace(drafted, **slow)]],
    }
    row = describe_concurrency(2, rollouts)
    assert (row["best"], row["steady_best"]) == ("off", "2x2x3"), "recording is most of what drafts take here"
    assert row["arms"]["2x2x3"]["recording_share"] == pytest.approx(0.9)
    assert row["arms"]["2x2x3"]["steady_over_plain"] == pytest.approx(2)
    assert row["steady_auto_to_best"] == pytest.approx((6 / 0.2) / (4 / 0.1))
    assert row["arms"]["off"]["recording_share"] == pytest.approx(0)
    assert row["arms"]["1x1x1"]["steady_tokens_per_s"] == 0


def test_each_law_is_judged_plainly() -> None:
    def build_row(num_seqs: int, to_best: float, to_plain: float, plan_ms: float, plan_share: float) -> dict:
        arms = {"auto": {"plan_ms": plan_ms, "plan_share": plan_share}}
        return {"num_seqs": num_seqs, "auto_to_best": to_best, "auto_to_plain": to_plain, "arms": arms}

    met = judge([build_row(1, 0.96, 1.5, 0.5, 0.009), build_row(64, 0.95, 0.98, 0.19, 0.001)])
    assert all(verdict.endswith(": met") for verdict in met)
    missed = judge([build_row(1, 0.94, 1.5, 0.5, 0.02), build_row(64, 0.95, 0.97, 0.25, 0.001)])
    assert [verdict.split(": ")[1] for verdict in missed] == [
        "MISSED, 0.940 at 1", "MISSED, 0.970 at 64", "MISSED, 2.00% at 1", "MISSED, 0.25 ms at 64",
    ]  # fmt: skip
    assert judge([build_row(8, 1.0, 1.0, 0.1, 0.001)])[-1].endswith("not measured")


def build_rollout(counts: list[tuple[int, int]], num_tokens: int) -> SteadyRollout:
    progress = {i: Progress(num_tokens=tokens, num_forwards=forwards) for i, (tokens, forwards) in enumerate(counts)}
    record = build_record(2, sum(tokens for tokens, _ in counts), 0.1)
    return SteadyRollout(records=[replace(record, num_tokens=num_tokens)], progress=progress)


def test_the_gain_of_sharing_is_of_the_same_requests() -> None:
    uniform, shared = build_rollout([(10, 10), (20, 10)], 8), build_rollout([(12, 10), (21, 10), (99, 1)], 10)
    row = compare([uniform], [shared])
    assert row["gain"] == pytest.approx(33 / 30 - 1), "the third request was seen one way only"
    assert row["draft_tokens"] == {"uniform": pytest.approx(3), "shared": pytest.approx(4)}
    assert row["verified_difference"] == pytest.approx(0.25)
    assert row["num_forwards"] == 20 and row["gain_error"] > 0
    same = [(seen, Progress(num_tokens=2 * seen.num_tokens, num_forwards=2 * seen.num_forwards))
            for seen in uniform.progress.values()]  # fmt: skip
    assert compute_gain(same) == pytest.approx(0)
    assert compute_gain_error(same) == pytest.approx(0)
    assert compute_gain_error(same[:1]) is None


def test_the_best_plan_is_chosen_without_looking_at_its_gain() -> None:
    shapes = [
        {"num_seqs": 2, "plan": plan, "acceptance_length": {"uniform": uniform, "shared": shared}}
        for plan, uniform, shared in (("2x2x4", 1.8, 2.5), ("3x2x4", 1.9, 2.0), ("1x4x1", 1.4, 1.5))
    ]
    four, one = choose_best(shapes)
    assert (four["plan"], four["num_draft_tokens"]) == ("3x2x4", 4)
    assert four["best_shared"] == {"plan": "2x2x4", "acceptance_length": 2.5}
    assert (one["plan"], one["num_draft_tokens"], one["best_shared"]["plan"]) == ("1x4x1", 1, "1x4x1")


def test_variants_are_compared_with_the_best_of_the_others() -> None:
    def build(rates: list[float], matched: float) -> dict:
        each = [{"num_tokens": rate, "generation_s": 1.0} for rate in rates]
        return {"tokens_per_s": sorted(rates)[1], "each": each, "matched_ratio_to_off": matched}

    variants = {
        "off": build([100, 100, 100], 1.0),
        "bandit": build([150, 130, 140], 1.4),
        "3x3x8": build([120, 120, 120], 1.2),
        "4x4x16": build([90, 130, 125], 1.3),
        "auto": build([150, 143, 126], 1.47),
    }
    compared = compare_variants(variants)
    assert (compared["best_fixed"], compared["best_other"]) == ("4x4x16", "bandit")
    assert compared["auto_to_best_each"] == pytest.approx([1.0, 1.1, 0.9])
    assert compared["auto_to_best"] == pytest.approx(1.0)
    assert compared["auto_to_best_matched"] == pytest.approx(1.05)
    alone = compare_variants({"auto": variants["auto"]})
    assert alone["best_other"] is None and alone["auto_to_best"] is None and alone["best_fixed"] is None


# -- planning time -----------------------------------------------------------------------------------


def test_a_step_says_how_long_its_planner_took(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    class SlowPlanner(FixedPlanner):
        def plan(self, inputs: object) -> SpeculationPlan:
            pass_time(1.0)
            return self.fixed

        def choose_budget(self, *arguments: object) -> int:
            pass_time(10.0)
            return 2

        def observe(self, record: StepRecord) -> None:
            pass_time(100.0)

    monkeypatch.setattr("fastgrpo.timing.perf_counter", lambda: now_s)
    model = load_model(str(model_dir), dtype="float32", device="cpu")
    engine = Engine(model, drafter="eagle-new", speculation=TREE)
    for plan, own_s in ((PLAIN, 1.0), (TREE, 1.0), (replace(TREE, most_draft_tokens=6), 11.0)):
        engine.planner = SlowPlanner(fixed=plan)
        for _ in range(2):  # the second rollout is not charged with the end of the first
            engine.generate([[5, 6, 7]], SamplingParams(max_tokens=12))
            planning_s = [record.plan_s for record in engine.records]
            assert planning_s == [own_s, *[own_s + 100.0] * (len(planning_s) - 1)]


# -- the picture -------------------------------------------------------------------------------------


def test_a_rollout_is_cut_where_its_plan_changes(tmp_path: Path) -> None:
    records = [build_record(4, 4, 1.0), build_record(4, 4, 1.0)] + [build_record(2, 4, 0.5, plan=TREE)] * 3
    stretches = find_stretches([*records, build_record(1, 1, 2.0)])
    assert [(s.plan.is_plain, s.start_s, s.end_s) for s in stretches] == [
        (True, 0.0, 2.0), (False, 2.0, 3.5), (True, 3.5, 5.5),
    ]  # fmt: skip
    assert set_trials_apart(stretches) == (stretches, []), "what is left to go back to is another plan"
    tried = [*records[:2], build_record(4, 4, 0.5, plan=TREE), *records[:2], *records[2:]]
    lasting, trials = set_trials_apart(find_stretches(tried))
    assert [(s.plan.is_plain, s.start_s, s.end_s, s.num_steps) for s in lasting] == [
        (True, 0, 4.5, 4),
        (False, 4.5, 6, 3),
    ]
    assert [(s.plan.is_plain, s.start_s, s.end_s, s.num_steps) for s in trials] == [(False, 2.0, 2.5, 1)]
    _, axes, *_ = build_rollout_picture(tried, title="a rollout").axes
    assert {"plan changes", "another one is tried"} <= {each.get_label() for each in axes.collections}
    plain = [build_record(4, 4, 1.0), build_record(4, 4, 2.0), build_record(4, 4, 9.0), build_record(1, 1, 0.25)]
    assert compute_plain_rates(records, plain) == pytest.approx([2.0, 2.0, 8.0, 8.0, 8.0]), "1 is nearest to 2"
    for name, others in (("beside.png", plain), ("alone.png", [])):
        plot_rollout(records, tmp_path / name, title="a rollout", plain=others, capacity=9.0)
        assert (tmp_path / name).stat().st_size > 20_000
    for capacity, is_drawn in ((20.0, True), (100.0, False)):
        _, axes, *_ = build_rollout_picture(records, title="a rollout", capacity=capacity).axes
        lines = [line for line in axes.lines if line.get_label() == f"knee: {capacity:.0f} tokens"]
        assert len(lines) == is_drawn
        assert axes.get_ylim()[1] > 20 or not is_drawn, "what is named is in the picture"
        assert {text.get_text() for text in axes.texts} == {"plain", "2x2x3"}
    with pytest.raises(ValueError, match="the rollout has no step"):
        plot_rollout([], tmp_path / "none.png", title="nothing")


# -- whole commands ----------------------------------------------------------------------------------

TINY = [
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--max-num-tokens",
    "30",
    "--tokens-per-seq",
    "6",
    "--min-tokens",
    "12",
]


def test_plans_are_measured_by_live_sequences(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plans.json"
    argv = ["bench", "plans", "--model", str(model_dir), *TINY, "--concurrency", "1,4", "--plans", "1x1x1,3x3x8"]
    assert main([*argv, "--repeats", "2", "--warmups", "1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    one, four = result["rows"]
    assert (one["skipped"], four["skipped"]) == ([], ["3x3x8"])
    assert list(one["arms"]) == ["off", "1x1x1", "3x3x8", "auto"] and list(four["arms"]) == ["off", "1x1x1", "auto"]
    for row in (one, four):
        plain, auto = row["arms"]["off"], row["arms"]["auto"]
        assert plain["share_speculating"] == 0 and plain["acceptance_length"] == 1
        assert row["arms"]["1x1x1"]["share_by_plan"] == {"1x1x1": 1.0}
        assert len(auto["each_tokens_per_s"]) == 2
        assert auto["plan_ms"] > plain["plan_ms"] > 0
    assert len(result["verdicts"]) == 4
    text = capsys.readouterr().out
    assert "left out, too many tokens a forward: 3x3x8" in text
    assert "planning takes less than 0.2 ms with 64 live sequences: not measured" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_pictures_say_what_does_not_count_and_hide_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"num_seqs": 4, "num_draft_tokens": 2, "gain": 0.1, "gain_error": None, "verified_difference": 0.0}
    for difference, num_crosses in ((0.02, 0), (-0.03, 1)):
        plot_budget([row, row | {"num_seqs": 8, "verified_difference": difference}], tmp_path / "budget.png")
        axes = drawn[-1].axes[0]
        crosses = [line for line in axes.lines if line.get_label() == "NOT as many: does not count"]
        assert len(crosses) == num_crosses and "standard errors" in axes.get_ylabel()
    arms = {"off": {"over_plain": 1.0}, "1x1x1": {"over_plain": 1.5}, "auto": {"over_plain": 1.6}}
    plot_plans([{"num_seqs": 4, "best": "1x1x1", "auto_to_best": 1.07, "arms": arms}], tmp_path / "plans.png")
    heights = {text.get_text(): text.xy[1] + text.xyann[1] / 100 for text in drawn[-1].axes[0].texts}
    assert heights["1x1x1"] > 1.6 and heights["1.07"] < 1.5, "above and below both lines"


def test_budgets_are_compared_at_as_many_verified_tokens(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "budget.json"
    argv = ["bench", "budget", "--model", str(model_dir), *TINY, "--concurrency", "2,4"]
    assert main([*argv, "--plans", "1x4x1,2x2x4,3x2x4,3x3x8", "--repeats", "1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [(row["num_seqs"], row["num_draft_tokens"]) for row in result["rows"]] == [
        (2, 1), (2, 4), (2, 8), (4, 1), (4, 4),
    ]  # fmt: skip
    assert len(result["shapes"]) == 7 and result["skipped"] == [{"num_seqs": 4, "plan": "3x3x8"}]
    for row in result["shapes"]:
        assert abs(row["verified_difference"]) <= 0.02
        assert row["draft_tokens"]["uniform"] == parse_plan(row["plan"]).num_draft_tokens
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "left out with 4 live: 3x3x8" in capsys.readouterr().out


def test_who_waits_goes_by_what_is_known_of_lengths(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "order.json"
    argv = ["bench", "order", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu", "--max-tokens", "12"]
    argv += ["--num-generations", "2", "--drafter", "eagle-new", "--repeats", "1"]
    assert main([*argv, "--num-prompts", "2"]) == 2
    assert "a number of at least 1 for each of tasks=chain_sum,products" in capsys.readouterr().err
    argv += ["--num-prompts", "3,1"]
    assert main([*argv, "--max-num-seqs", "8"]) == 2
    assert "8 requests fit into max_num_seqs=8 slots" in capsys.readouterr().err
    assert main([*argv, "--max-num-seqs", "3", "--output", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "medians of seconds, tokens/s and gain, means of the rest" in text
    result = json.loads(path.read_text())
    ways = result["ways"]
    assert list(ways) == ["order of arrival", "lengths of other prompts", "lengths of an earlier epoch"]
    assert ways["order of arrival"]["gain"] == 1 and result["workload"]["num_completions"] == 8
    assert len({own["each"][0]["num_tokens"] for own in ways.values()}) == 1  # in float32 the order changes no token
    steps = result["plain_steps"]
    assert list(steps) == [*ways, "true lengths"]
    assert 8 * result["workload"]["mean_length"] / 3 <= steps["true lengths"] <= 4 / 3 * min(steps.values())
    assert path.with_suffix(".png").stat().st_size > 10_000


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 5))
def test_steps_are_those_of_the_scheduler(lengths: list[int], num_slots: int) -> None:
    scheduler, num_steps = Scheduler(num_slots), 0
    for number, length in enumerate(lengths):
        params = SamplingParams()
        scheduler.add(
            Sequence(request_id=number, prompt_ids=[number], params=params, max_tokens=length, stream_key=number)
        )
    while scheduler.has_work:
        scheduler.admit()
        num_steps += 1
        for slot in reversed(range(len(scheduler.running))):
            sequence = scheduler.running[slot]
            sequence.append([0], [0.0], [0.0])
            if len(sequence.token_ids) == sequence.max_tokens:
                scheduler.remove(slot)
    assert order.count_steps(lengths, num_slots) == num_steps


def test_orders_that_were_measured_are_kept_should_the_rest_not_come(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, count = order.measure_rollout, itertools.count()

    def stop_in_the_second_repeat(*arguments: Any) -> Any:
        if next(count) == 2 + 3 + 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(order, "measure_rollout", stop_in_the_second_repeat)
    argv = ["bench", "order", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu", "--max-tokens", "4"]
    argv += ["--speculation", "off", "--num-prompts", "2,1", "--num-generations", "1", "--max-num-seqs", "2"]
    assert main([*argv, "--output", str(tmp_path / "order.json")]) == 130
    kept = json.loads((tmp_path / "order.json").read_text())
    assert [len(way["each"]) for way in kept["ways"].values()] == [1, 1, 1]


def test_rollouts_take_plans_by_shape_and_draw_one(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rollout.json"
    argv = ["bench", "rollout", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu", "--max-tokens", "8"]
    argv += ["--num-prompts", "2", "--num-generations", "2", "--repeats", "1", "--drafter", "eagle-new"]
    assert main([*argv, "--speculation", "off,2x2x4,1x1x1,auto", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert list(result["variants"]) == ["off", "2x2x4", "1x1x1", "auto"]
    assert all(own["share_equal_to_off"] == 1 for own in result["variants"].values())
    assert result["variants"]["2x2x4"]["by_concurrency"][0]["nodes_per_sequence"] == 5
    compared = result["comparison"]
    assert compared["best_fixed"] in ("2x2x4", "1x1x1") and compared["best_other"] != "auto"
    assert compared["auto_to_best"] > 0 and compared["auto_to_best_matched"] > 0
    assert (tmp_path / "rollout-auto.png").stat().st_size > 20_000
    assert f"best fixed plan: {compared['best_fixed']}; auto makes " in capsys.readouterr().out
