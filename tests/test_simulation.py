"""The simulator: what it replays is what the engine does, and what it cuts out of a tree is what would have grown."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SMALL_CPU, SyntheticClockPlanner, shared_model
from fastgrpo.bench import recording
from fastgrpo.bench import simulate as simulate_bench
from fastgrpo.bench.recording import record_facts
from fastgrpo.cli import main
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import Engine
from fastgrpo.model import TargetModel
from fastgrpo.options import SimulateOptions, words
from fastgrpo.planner import AutoPlanner, BanditPlanner, FixedPlanner, PaperPlanner, Planner
from fastgrpo.planner.costs import IDLE_S
from fastgrpo.planner.grid import GRID
from fastgrpo.profile_files import save_profile
from fastgrpo.report.predictions import build_predictions
from fastgrpo.simulation import (
    DEVICES,
    MODELS,
    PLANNERS,
    Facts,
    ProfileCosts,
    Replay,
    Request,
    StepWork,
    TreeTables,
    build_requests,
    build_roofline_profile,
    draw_lengths,
    draw_requests,
    fit_corrections,
    load_facts,
    predict_planners,
    replay,
    replay_settled,
    replay_told,
    save_facts,
)
from fastgrpo.simulation.facts import NO_PARENT
from fastgrpo.simulation.predict import FIXED_GRID
from fastgrpo.simulation.trees import OUTSIDE, restrict_trees
from fastgrpo.types import PLAIN, SamplingParams, SpeculationPlan, StepRecord
from tiny import save_tiny_model

RECORDED = SpeculationPlan(depth=5, width=6, num_draft_tokens=150)  # all that is drafted
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6]] * 3 + [[8, 8, 7]] * 3 + [list(range(90))] * 2
PARAMS = SamplingParams(temperature=0.6, max_tokens=24, seed=5)
STOPPING = dataclasses.replace(PARAMS, stop_token_ids=tuple(range(0, 120, 15)))
PLANS = (
    SpeculationPlan(depth=1, width=1, num_draft_tokens=1),
    SpeculationPlan(depth=3, width=3, num_draft_tokens=8),
    SpeculationPlan(depth=4, width=6, num_draft_tokens=30),
    SpeculationPlan(depth=2, width=6, num_draft_tokens=20),
    SpeculationPlan(depth=3, width=4, num_draft_tokens=4, most_draft_tokens=12),
    SpeculationPlan(depth=5, width=6, num_draft_tokens=10, most_draft_tokens=40),
)
COSTS = ProfileCosts(profile=SMALL_CPU)
FACTS_OF_STEP = (
    "num_seqs", "num_waiting", "plan", "num_tokens", "num_emitted", "num_read", "num_unread", "num_prefilled",
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def build_drafter() -> EagleDrafter:
    """A head in float64 that begins from the target's own weights, the same at each call."""
    return copy.deepcopy(_build_head_drafter())


@functools.cache
def _build_head_drafter() -> EagleDrafter:
    return EagleDrafter(TargetModel(shared_model("llama")), draft_vocab_size=80)


@functools.cache
def record(params: SamplingParams = PARAMS, num_prompts: int = 8) -> Facts:
    return record_facts(shared_model("llama"), build_drafter(), PROMPTS[:num_prompts], params, plan=RECORDED)


def run_engine(planner: Planner, params: SamplingParams, max_num_seqs: int) -> list[StepRecord]:
    engine = Engine(shared_model("llama"), drafter=build_drafter(), speculation="off", max_num_seqs=max_num_seqs)
    engine.planner = planner
    engine.generate(PROMPTS, params)
    return engine.records


def simulate(planner: Planner, params: SamplingParams = PARAMS, max_num_seqs: int = 64) -> Replay:
    facts = record(params)
    return replay(TreeTables(facts), build_requests(facts), planner, COSTS, max_num_seqs=max_num_seqs)


# -- the replay is the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [64, 3])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_replay_repeats_the_engine_step_by_step(plan: SpeculationPlan, max_num_seqs: int) -> None:
    theirs = run_engine(FixedPlanner(fixed=plan), PARAMS, max_num_seqs)
    simulated = simulate(FixedPlanner(fixed=plan), max_num_seqs=max_num_seqs)
    assert simulated.exact_share == 1
    assert len(simulated.records) == len(theirs)
    for ours, real in zip(simulated.records, theirs, strict=True):
        for name in (*FACTS_OF_STEP, "offered", "hits"):
            assert getattr(ours, name) == getattr(real, name), name
        assert ours.num_promised == pytest.approx(real.num_promised, rel=1e-4)
    assert sum(sum(map(sum, record.hits)) for record in theirs) > 0 or plan.depth == 1


def test_a_replay_follows_a_planner_that_learns_from_its_steps() -> None:
    theirs = run_engine(SyntheticClockPlanner(), PARAMS, 64)
    simulated = simulate(SyntheticClockPlanner())
    assert simulated.exact_share == 1
    for name in (*FACTS_OF_STEP, "offered", "hits"):
        assert [getattr(r, name) for r in simulated.records] == [getattr(r, name) for r in theirs], name
    assert len({record.plan for record in theirs}) > 1


@pytest.mark.parametrize("plan", PLANS[1:5:3], ids=str)
def test_completions_that_stop_are_replayed_too(plan: SpeculationPlan) -> None:
    """What the target would choose behind a stop token is not known, so hits there are not counted."""
    facts = record(STOPPING)
    assert facts.is_stopped.any() and not facts.is_stopped.all()
    theirs = run_engine(FixedPlanner(fixed=plan), STOPPING, 3)
    simulated = simulate(FixedPlanner(fixed=plan), STOPPING, 3)
    for name in FACTS_OF_STEP:
        assert [getattr(r, name) for r in simulated.records] == [getattr(r, name) for r in theirs], name
    for ours, real in zip(simulated.records, theirs, strict=True):
        assert sum(map(sum, ours.hits)) <= sum(map(sum, real.hits))


def test_what_is_recorded_where_memory_ran_out_is_the_same_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that broke off has drafted already; one that is made again may be plain, or of smaller trees."""
    tell, drafted = Engine._tell_drafter, itertools.count()

    def fail_once(engine: Engine, *told: Any) -> None:
        if next(drafted) == 2:
            raise MemoryError
        tell(engine, *told)

    facts = record()
    monkeypatch.setattr(Engine, "_tell_drafter", fail_once)
    with pytest.warns(UserWarning, match="half of them wait"):
        again = record_facts(shared_model("llama"), build_drafter(), PROMPTS, PARAMS, plan=RECORDED)
    for name in ("parents", "path", "lengths"):
        assert np.array_equal(getattr(again, name), getattr(facts, name)), name
    monkeypatch.setattr(recording, "Engine", functools.partial(Engine, max_cache_bytes=300_000))
    with pytest.raises(MemoryError, match=r"no room for drafts of 150 tokens at .* positions of request 0, .*seqs"):
        record_facts(shared_model("llama"), build_drafter(), PROMPTS[:1], PARAMS, plan=RECORDED)


# -- laws of a replay ----------------------------------------------------------------------------------------------


def test_plain_decoding_takes_its_steps_and_emits_the_lengths() -> None:
    simulated = simulate(FixedPlanner())
    lengths, prompts = record().lengths, record().prompt_lens
    assert simulated.num_emitted == lengths.sum()
    assert len(simulated.records) == lengths.max()
    expected_s = SMALL_CPU.compute_target_s(7 + 2 + 89)  # the prompts, each once and without its last token
    for step in range(lengths.max()):
        live = lengths > step
        cached = prompts[live] + step - 1
        expected_s += SMALL_CPU.compute_target_s(int(live.sum()), int(live.sum() * cached.max()))
    assert simulated.total_s == pytest.approx(expected_s + lengths.max() * IDLE_S)


@pytest.mark.parametrize("max_num_seqs", [64, 2])
@pytest.mark.parametrize(
    "planner",
    [
        FixedPlanner(fixed=PLANS[1]),
        PaperPlanner(capacity=60),
        PaperPlanner.with_own_capacity(),
        BanditPlanner(max_num_tokens=256),
        AutoPlanner(SMALL_CPU),
    ],
    ids=lambda planner: planner.name,
)
def test_every_planner_emits_the_same_tokens(planner: Planner, max_num_seqs: int) -> None:
    simulated = simulate(planner, max_num_seqs=max_num_seqs)
    assert simulated.num_emitted == record().lengths.sum()
    assert 0 <= simulated.exact_share <= 1
    assert all(record.num_seqs <= record.num_emitted for record in simulated.records)


def test_noise_is_a_function_of_its_seed() -> None:
    work = StepWork(plan=PLANS[1], num_seqs=4, num_tokens=36, num_read=40, num_unread=9, num_emitted=9, num_prefilled=0)

    def draw(seed: int) -> list[float]:
        costs = ProfileCosts(profile=SMALL_CPU, noise=0.1, seed=seed)
        return [costs.price(work).step_s for _ in range(200)]

    assert draw(1) == draw(1) != draw(2)
    noisy = ProfileCosts(profile=SMALL_CPU, noise=0.1)
    facts = record()
    totals = [
        replay(TreeTables(facts), build_requests(facts), FixedPlanner(), noisy, max_num_seqs=8).total_s
        for _ in range(2)
    ]
    assert totals[0] == totals[1], "planners after one another meet the same noise"
    assert np.exp(np.mean(np.log(draw(1)))) == pytest.approx(COSTS.price(work).step_s, rel=0.03)
    with pytest.raises(ValueError, match="noise must be a finite number >= 0, got -1"):
        ProfileCosts(profile=SMALL_CPU, noise=-1)


# -- trees ---------------------------------------------------------------------------------------------------------

Node = tuple[int, ...]  # sibling ranks from the root


def rank_below(seed: int, node: Node) -> list[float]:
    """Log chances of a node's candidates, falling; some nodes have few."""
    draws = np.random.default_rng([seed, len(node), *node])
    return sorted(-draws.exponential(1.5, size=int(draws.integers(1, 6))) - 1e-4, reverse=True)


def grow(seed: int, plan: SpeculationPlan) -> list[tuple[float, Node]]:
    """The tree of a plan, best node first: what `drafters.beams.grow_trees` does, in plain Python."""
    expanded: list[tuple[float, Node]] = [(0.0, ())]
    pool: list[tuple[float, Node]] = []
    for _ in range(plan.depth):
        level = [
            (score + chance, (*node, rank))
            for score, node in expanded
            for rank, chance in enumerate(rank_below(seed, node)[: plan.width])
        ]
        pool += level
        expanded = sorted(level, reverse=True)[: plan.width]
    return sorted(pool, reverse=True)[: plan.num_draft_tokens]


def build_facts(trees: list[list[tuple[float, Node]]], walks: list[Node], plan: SpeculationPlan) -> Facts:
    """One completion whose position i has tree i, and a target that would choose `walks[i]` from there."""
    shape = (len(trees), 1 + plan.num_draft_tokens)
    parents, scores = np.full(shape, NO_PARENT, dtype=np.uint8), np.full(shape, -np.inf)
    path = np.full((len(trees), plan.depth), -1, dtype=np.int16)
    for row, (tree, walk) in enumerate(zip(trees, walks, strict=True)):
        index = {(): 0} | {node: place for place, (_, node) in enumerate(tree, start=1)}
        for place, (score, node) in enumerate(tree, start=1):
            parents[row, place], scores[row, place] = index[node[:-1]], score
        for level in range(plan.depth):
            if walk[: level + 1] not in index:
                break
            path[row, level] = index[walk[: level + 1]]
    count = len(trees)
    return Facts(
        plan=plan, parents=parents, scores=scores, path=path, lengths=np.array([count]), prompt_lens=np.array([3]),
        groups=np.array([0]), is_stopped=np.array([False]), num_ahead=np.array([plan.depth]),
    )  # fmt: skip


@st.composite
def draw_plans(draw: st.DrawFn) -> tuple[SpeculationPlan, SpeculationPlan]:
    """A recorded plan, and a smaller one."""
    depth, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    least = draw(st.integers(1, depth))
    nodes = draw(st.integers(least, 12))
    recorded = SpeculationPlan(depth=depth, width=width, num_draft_tokens=draw(st.integers(max(depth, nodes), 80)))
    return recorded, SpeculationPlan(depth=least, width=draw(st.integers(1, width)), num_draft_tokens=nodes)


@given(draw_plans(), st.integers(0, 10**6))
def test_a_tree_cut_out_is_the_tree_that_would_have_grown(
    plans: tuple[SpeculationPlan, SpeculationPlan], seed: int
) -> None:
    recorded, plan = plans
    walks = [tuple(np.random.default_rng([seed, row]).integers(0, 3, size=5).tolist()) for row in range(6)]
    facts = build_facts([grow(seed + row, recorded) for row in range(6)], walks, recorded)
    trees = restrict_trees(facts, plan)
    for row, walk in enumerate(walks):
        own = [node for _, node in grow(seed + row, plan)]
        if not trees.is_exact[row]:
            continue
        assert trees.num_nodes[row] == len(own)
        chances = [np.exp(score) for score, _ in grow(seed + row, plan)]
        assert trees.chances[row, : len(own)] == pytest.approx(chances, rel=1e-5)
        assert not trees.chances[row, len(own) :].any()
        for level in range(plan.depth):
            is_inside, parent = walk[: level + 1] in own, walk[:level]
            is_walked = parent in own or level == 0
            assert trees.places[row, level] == (own.index(walk[: level + 1]) + 1 if is_inside else OUTSIDE)
            assert trees.ranks[row, level] == (walk[level] if is_inside else -1)
            siblings = sum(node[:-1] == parent for node in own)
            assert trees.num_children[row, level] == (siblings if is_walked else 0)


@given(draw_plans(), st.integers(0, 10**6))
def test_the_recorded_plan_and_complete_recordings_are_exact(
    plans: tuple[SpeculationPlan, SpeculationPlan], seed: int
) -> None:
    recorded, plan = plans
    everything = dataclasses.replace(recorded, num_draft_tokens=recorded.width + 4 * recorded.width**2)
    facts = build_facts([grow(seed, everything)], [(0,) * 5], everything)
    assert restrict_trees(facts, everything).is_exact.all()
    as_wide = dataclasses.replace(plan, width=recorded.width)
    assert restrict_trees(facts, as_wide).is_exact.all(), "as wide a draft expands the same nodes"
    deeper = dataclasses.replace(everything, depth=recorded.depth + 1)
    assert not restrict_trees(facts, deeper).is_exact.any()


def test_a_cut_recording_still_counts_the_nodes_that_were_drafted() -> None:
    plan = SpeculationPlan(depth=4, width=3, num_draft_tokens=4)
    facts = build_facts([grow(0, plan)], [(0, 0, 0, 0)], plan)
    larger = SpeculationPlan(depth=4, width=3, num_draft_tokens=9)
    trees = restrict_trees(facts, larger)
    assert trees.num_nodes.tolist() == [9] and not trees.is_exact[0]
    assert np.count_nonzero(trees.chances) == 4


# -- facts on file -------------------------------------------------------------------------------------------------


def test_facts_come_back_from_their_file(tmp_path: Path) -> None:
    facts = dataclasses.replace(record(), about={"model": "tiny"})
    save_facts(facts, tmp_path / "facts.npz")
    loaded = load_facts(tmp_path / "facts.npz")
    assert loaded.about == {"model": "tiny"} and loaded.plan == facts.plan
    assert loaded.most_prompt_tokens == EagleDrafter.num_prompt_tokens
    for name in ("parents", "path", "lengths", "prompt_lens", "groups", "is_stopped", "num_ahead"):
        assert np.array_equal(getattr(loaded, name), getattr(facts, name)), name
    used = facts.parents != NO_PARENT
    assert loaded.scores[used] == pytest.approx(facts.scores[used], rel=1e-3)
    again = replay(TreeTables(loaded), build_requests(loaded), FixedPlanner(fixed=PLANS[1]), COSTS, max_num_seqs=64)
    assert [r.hits for r in again.records] == [r.hits for r in simulate(FixedPlanner(fixed=PLANS[1])).records]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": float("nan")}, "noise must be finite and at least 0, got nan"),
        ({"longest_over_mean": 0.5}, "longest_over_mean must be finite and at least 1, got 0.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"devices": ("h100", "h100")}, "devices must name each once, got h100 twice"),
        ({"models": ("8b", "70b", "8b")}, "models must name each once, got 8b twice"),
        ({"mean_lengths": (50, 50)}, "mean_lengths must name each once, got 50 twice"),
        ({"group_sizes": (4, 4)}, "group_sizes must name each once, got 4 twice"),
        ({"models": ("70b",)}, r"models=\('70b',\) is for machines to plan for, .* --devices"),
        ({"num_completions": 64}, "num_completions=64 is for machines to plan for, .* --devices"),
    ],
)
def test_settings_are_refused_before_anything_is_measured(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulateOptions(facts=Path("facts.npz"), **change)


def test_damaged_facts_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "facts.npz"
    with pytest.raises(FileNotFoundError, match=r"no facts at .*facts\.npz"):
        load_facts(path)
    save_facts(record(), path)
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # of the archive's directory; its flags and its way of packing follow
    encrypted, unknown = (whole[: entry + at] + b"\x7f" + whole[entry + at + 1 :] for at in (8, 10))
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:-200] + bytes(200), encrypted, unknown):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"facts\.npz holds no recorded facts.*record again"):
            load_facts(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"damaged ones: it is no \.npz; record again"):
        load_facts(path)
    path.write_bytes(whole)
    with np.load(path) as content:
        arrays = dict(content)
    backward = arrays["parents"].copy()
    backward[0, 1] = 7
    beyond = arrays["path"].copy()  # from the last token on
    beyond[-1, :2] = 1, arrays["parents"][-1].tolist().index(1)
    gap = arrays["parents"].copy()
    gap[0, 1] = NO_PARENT
    unknown, surer = (
        np.where(np.arange(arrays["scores"].shape[1]) == 1, score, arrays["scores"]) for score in (np.nan, 0.5)
    )
    for change, message in (
        ({"parents": backward}, "a node stands before its parent"),
        ({"parents": gap}, "an unused node stands before a used one"),
        ({"prompt_lens": np.zeros_like(arrays["prompt_lens"])}, "each completion and prompt at least one token"),
        ({"path": arrays["path"][:-1]}, r"path must have shape \(192, 5\), got \(191, 5\)"),
        ({"lengths": arrays["lengths"][:, None]}, r"lengths must have shape \(8,\), got \(8, 1\)"),
        ({"num_ahead": 0 * arrays["num_ahead"], "path": beyond}, "goes on where the target's choices are not known"),
        ({"path": np.full_like(arrays["path"], 300)}, "a path leaves its tree"),
        ({"path": np.full_like(arrays["path"], 2)}, "does not go from parent to child"),
        ({"scores": unknown.astype(np.float16)}, "scores must be log chances"),
        ({"scores": surer.astype(np.float16)}, "scores must be log chances"),
        ({"lengths": arrays["lengths"].astype(float)}, "lengths is of type float64"),
        ({"header": np.array("{}")}, "format"),
        ({"header": np.array(str(arrays["header"]).replace('"about": {}', '"about": []'))}, r"about must be .*\[\]"),
    ):
        np.savez(path, **(arrays | change))
        with pytest.raises(ValueError, match=message):
            load_facts(path)
    np.savez(path, **{name: value for name, value in arrays.items() if name != "scores"})
    with pytest.raises(ValueError, match="scores missing; record again"):
        load_facts(path)
    started = b"\x93NUMPY\x01\x00"
    boundless = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 25)}\n"
    for entry in (b"", started + bytes([9, 0]) + 9 * b"(", started + bytes([len(boundless), 0]) + boundless):
        np.savez(path, **{name: value for name, value in arrays.items() if name != "parents"})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("parents.npy", entry)
        with pytest.raises(ValueError, match=r"facts\.npz holds no recorded facts.*record again"):
            load_facts(path)


# -- larger machines and longer runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_a_roofline_table_keeps_to_its_limits(device: str, model: str) -> None:
    roofline = build_roofline_profile(device, model, cached_positions=100_000)
    profile, machine, shape = roofline.profile, DEVICES[device], MODELS[model]
    assert list(profile.target_s) == sorted(profile.target_s) and list(profile.draft_s) == sorted(profile.draft_s)
    overhead_s = shape.num_layers * 10e-6
    weights_s = 2 * shape.read_parameters / (0.8 * machine.bandwidth_bytes_per_s * roofline.num_devices)
    assert profile.floor_s == pytest.approx(weights_s + overhead_s)
    flops_s = 2 * shape.read_parameters / (0.6 * machine.flops_per_s * roofline.num_devices)
    assert profile.per_token_s == pytest.approx(flops_s, rel=0.05), "at the largest forward overheads are small"
    needed = 2 * shape.num_parameters + 100_000 * shape.position_bytes
    assert needed <= 0.9 * machine.memory_bytes * roofline.num_devices
    assert roofline.num_devices == 1 or needed > 0.45 * machine.memory_bytes * roofline.num_devices
    assert all(draft_s < target_s for draft_s, target_s in zip(profile.draft_s, profile.target_s, strict=True))


def test_model_sizes_are_the_published_ones() -> None:
    billions = {name: shape.num_parameters / 1e9 for name, shape in MODELS.items()}
    assert billions == pytest.approx({"1.5b": 1.54, "8b": 8.03, "32b": 32.76, "70b": 70.55}, rel=0.01)
    assert MODELS["8b"].position_bytes == 131072
    with pytest.raises(ValueError, match="unknown device 'v100'; there are a100, h100, h200, b200"):
        build_roofline_profile("v100", "8b", cached_positions=0)


@given(st.integers(8, 300), st.integers(500, 4000), st.floats(1.0, 5.0), st.integers(1, 64), st.integers(0, 2**31))
def test_lengths_have_the_mean_and_the_longest_asked_for(
    count: int, mean: int, ratio: float, group_size: int, seed: int
) -> None:
    group_size = min(group_size, count)
    settings = {"mean": mean, "longest_over_mean": ratio, "group_size": group_size}
    try:
        lengths = draw_lengths(count, seed=seed, **settings)
    except ValueError as error:
        assert "simulate more completions" in str(error) and count < 12
        return
    assert lengths.min() >= 1 and len(lengths) == count
    assert lengths.mean() == pytest.approx(mean, abs=1)
    assert lengths.max() == pytest.approx(ratio * mean, rel=0.01)
    assert np.array_equal(draw_lengths(count, seed=seed, **settings), lengths)
    assert np.array_equal(np.sort(draw_lengths(count, seed=seed + 1, **settings)), np.sort(lengths))


def test_half_of_how_lengths_vary_is_their_prompts() -> None:
    lengths = draw_lengths(800, mean=1000, longest_over_mean=4.0, group_size=8, seed=0)
    groups = np.log(lengths).reshape(100, 8)
    assert groups.var(axis=1, ddof=1).mean() / groups.var() == pytest.approx(0.5, abs=0.1)


def test_long_completions_are_made_of_recorded_ones() -> None:
    facts, lengths = record(STOPPING), np.array([70, 5, 1, 33])
    requests = draw_requests(facts, lengths, prompt_len=9, group_size=2, seed=3)
    again = draw_requests(facts, lengths, prompt_len=9, group_size=2, seed=3)
    assert [request.group for request in requests] == [0, 0, 1, 1]
    for request, same, length in zip(requests, again, lengths, strict=True):
        assert len(request.positions) == length and np.array_equal(request.positions, same.positions)
        begun = request.positions[np.diff(request.positions, prepend=-2) != 1]
        assert set(begun.tolist()) <= set(facts.starts.tolist()), "each from its beginning on"
        owner = np.searchsorted(facts.starts, request.positions, side="right") - 1
        has_whole_walks = (facts.lengths + facts.num_ahead)[owner] >= facts.plan.depth
        assert (facts.num_known[request.positions][has_whole_walks] == facts.plan.depth).all()
    simulated = replay(TreeTables(facts), requests, FixedPlanner(fixed=PLANS[1]), COSTS, max_num_seqs=2)
    assert simulated.num_emitted == lengths.sum()
    with pytest.raises(ValueError, match="at least one token each, got 0"):
        Request(prompt_len=0, group=0, positions=np.arange(3))


def test_the_simulator_imports_no_torch() -> None:
    code = "import sys, fastgrpo.simulation; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_records_reproduces_and_predicts(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, output = tmp_path / "facts.npz", tmp_path / "simulate.json"
    argv = ["bench", "simulate", "--device", "cpu"]
    recording = ["--record", str(facts), "--model", str(model_dir), "--dtype", "float32", "--num-prompts", "2"]
    assert main([*argv, *recording, "--num-generations", "2", "--max-tokens", "6"]) == 0
    assert "4 completions" in capsys.readouterr().out
    machines = ["--devices", "h100,b200", "--models", "8b,70b", "--mean-lengths", "40", "--group-sizes", "4,8"]
    machines += ["--num-completions", "16", "--longest-over-mean", "3", "--repeats", "1"]
    assert main([*argv, "--facts", str(facts), *machines, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [each["planner"] for each in result["reproduction"]] == ["off", "fixed", "auto"]
    for each in result["reproduction"]:
        assert each["measured_tokens"] == each["simulated_tokens"]
        assert each["error"] == pytest.approx(each["simulated_s"] / each["measured_s"] - 1)
        assert each["error_per_token"] == pytest.approx(each["error"])
    off, fixed, _ = result["reproduction"]
    assert off["measured_steps"] == off["simulated_steps"] and fixed["measured_steps"] == fixed["simulated_steps"]
    assert len(result["predictions"]) == (1 + 2 * 2 * 2) * len(PLANNERS)
    errors = {each["planner"]: each["error"] for each in result["reproduction"]}
    for row in result["predictions"]:
        assert row["error"] == errors.get(row["planner"], max(errors.values(), key=abs))
        assert row["error"] == errors[row["error_of"]] and (
            row["error_of"] == row["planner"] or row["planner"] not in errors
        )
        assert row["speed_up"] == 1 if row["planner"] == "off" else row["speed_up"] > 0
    assert str(tmp_path) not in json.dumps(result["facts"]["settings"] | {"model": ""})
    printed = capsys.readouterr().out
    assert "The simulation is off by at most" in printed and output.with_suffix(".png").is_file()
    assert printed.count("error here") == 2 * 2 * 2, "all but this machine's own table"


def test_a_replay_without_a_measurement_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.npz"
    save_facts(record(), facts)
    argv = ["bench", "simulate", "--facts", str(facts)]
    profile, damaged = tmp_path / "[/of] mine.json", tmp_path / "damaged.npz"
    save_profile(SMALL_CPU, {}, profile)
    settings = {name: getattr(SimulateOptions(facts=facts), name) for name in simulate_bench._WORKLOAD}
    save_facts(dataclasses.replace(record(), about={"settings": settings | {"max_num_seqs": "many"}}), damaged)
    unsound = ["bench", "simulate", "--facts", str(damaged)]
    shape = ["--devices", "a100", "--mean-lengths", "30", "--num-completions", "16", "--longest-over-mean", "3"]
    assert main([*argv, "--skip-measurement", *shape]) == 0
    printed = capsys.readouterr().out
    assert "its error is not known" in printed and "Computed cost tables add an error of their own" in printed
    assert main([*argv, "--skip-measurement", "--profile", str(profile)]) == 0
    assert "[/of] mine.json" in " ".join(capsys.readouterr().out.split()), "the title may be wrapped"
    for wrong, message in (
        (argv, "do not say of which workload"),
        ([*argv, "--skip-measurement"], "name a profile, or devices"),
        ([*argv, "--record", "here.npz"], "give either a file to record facts to"),
        (["bench", "simulate", "--record", "here.npz", "--drafter", "auto"], "got drafter=auto"),
        ([*argv, "--skip-measurement", *shape, "--num-completions", "1"], "lengths need at least 2 completions"),
        ([*unsound, "--skip-measurement", "--profile", str(profile)], "are of a workload with max_num_seqs='many'"),
        (unsound, "are of a workload with max_num_seqs='many'; record again"),
        ([*argv, *shape, "--group-sizes", "64"], "groups of 1 to all of them"),  # before anything is measured
        ([*argv, *shape, "--mean-lengths", "9999999999999"], "more than the 100,000,000 tokens of a rollout"),
        ([*argv, *shape, "--noise", "1e300"], "noise must be at most 2.0"),
        (["bench", "simulate", "--facts", str(tmp_path / "none.npz")], "no facts at"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_scenarios_that_are_simulated_are_kept_should_the_rest_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, count = simulate_bench.build_roofline_profile, itertools.count()

    def stop_at_the_third(*arguments: Any, **keywords: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return build(*arguments, **keywords)

    monkeypatch.setattr(simulate_bench, "build_roofline_profile", stop_at_the_third)
    facts, output = tmp_path / "facts.npz", tmp_path / "simulated.json"
    save_facts(record(), facts)
    shape = ["--devices", "a100,h100,h200,b200", "--mean-lengths", "9", "--num-completions", "4"]
    shape += ["--longest-over-mean", "1.5", "--group-sizes", "2", "--output", str(output)]
    assert main(["bench", "simulate", "--facts", str(facts), "--skip-measurement", *shape]) == 130
    assert {row["device"] for row in json.loads(output.read_text())["predictions"]} == {"a100", "h100"}


def test_the_picture_says_what_it_leaves_out_and_whether_its_error_is_known() -> None:
    for count, error, title, about in (
        (2, 2.5, "", "bars: the simulation's error"),
        (30, None, "the first 24 of 30 scenarios; the JSON file has all", "its error is not known"),
    ):
        row = {"planner": "auto", "speed_up": 1.5, "error": error}
        axes = build_predictions([row | {"scenario": str(index)} for index in range(count)]).axes[0]
        assert axes.get_title() == title and about in axes.get_xlabel() and axes.get_xlim()[0] == 0


def test_no_share_of_exact_trees_is_said_where_nothing_was_drafted() -> None:
    dear = dataclasses.replace(SMALL_CPU, draft_s=(9.0,) * len(SMALL_CPU.num_tokens))
    tables = TreeTables(record())
    costs = ProfileCosts(profile=dear)
    predicted = predict_planners(tables, build_requests(record()), dear, costs, max_num_seqs=64)
    shares = {each.planner: each.exact_share for each in predicted}
    assert shares["off"] is None and shares["auto"] is None and shares["fixed best"] == 1


def test_predictions_are_beside_plain_decoding_and_the_best_fixed_plan_takes_least() -> None:
    tables, requests = TreeTables(record()), build_requests(record())
    predicted = predict_planners(tables, requests, SMALL_CPU, COSTS, max_num_seqs=3)
    found = {each.planner: each for each in predicted}
    assert tuple(found) == PLANNERS and found["off"].acceptance_length == found["off"].speed_up == 1
    fixed_s = [replay(tables, requests, FixedPlanner(fixed=plan), COSTS, max_num_seqs=3).total_s for plan in FIXED_GRID]
    assert found["fixed best"].total_s <= 1.02 * min(fixed_s) < max(fixed_s), "lengths that are known change the order"
    for each in predicted:
        assert each.speed_up * each.total_s == pytest.approx(found["off"].total_s)
    assert len({each.total_s for each in predicted}) == len(PLANNERS), "each has its own plans"
    best = found["fixed best"]
    assert best.plan in FIXED_GRID and 1 < best.acceptance_length <= 1 + best.plan.depth


@pytest.mark.parametrize("max_num_seqs", [64, 3])
def test_no_planner_is_faster_than_one_that_is_told(max_num_seqs: int) -> None:
    predicted = predict_planners(
        TreeTables(record()), build_requests(record()), SMALL_CPU, COSTS, max_num_seqs=max_num_seqs
    )
    seconds = {each.planner: each.total_s for each in predicted}
    assert seconds.pop("limit") <= min(seconds.values())


def test_who_is_told_verifies_what_is_accepted_with_the_best_of_all_shapes() -> None:
    """The first step by brute force: rates of all shapes, of drafts that are right and read nothing."""
    facts = record(STOPPING)
    tables, requests = TreeTables(facts), build_requests(facts)
    told = replay_told(tables, requests, COSTS, plans=GRID, max_num_seqs=64)
    assert told.num_emitted == facts.lengths.sum()
    assert all(step.num_tokens == step.num_emitted for step in told.records)
    assert any(not step.plan.is_plain for step in told.records)
    first = told.records[0]
    works = []
    for plan in (PLAIN, *GRID):
        places = np.full((len(requests), 1), OUTSIDE) if plan.is_plain else tables.find(plan).places[facts.starts]
        emitted = int(np.minimum((places < OUTSIDE).sum(1) + 1, facts.lengths).sum())
        of_step = {"num_seqs": first.num_seqs, "num_read": first.num_read, "num_prefilled": 0, "num_unread": 0}
        works.append(StepWork(plan=plan, num_tokens=emitted, num_emitted=emitted, **of_step))
    best = max(works, key=lambda work: work.num_emitted / COSTS.price(work).step_s)
    assert (first.plan, first.num_emitted) == (best.plan, best.num_emitted)
    plain = replay_told(tables, requests, COSTS, plans=(), max_num_seqs=2)
    assert plain.total_s == simulate(FixedPlanner(), STOPPING, 2).total_s
    with pytest.raises(ValueError, match="nothing to replay"):
        replay_told(tables, [], COSTS, plans=GRID, max_num_seqs=1)


def test_a_settled_rollout_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are known, so that the longest begins, and a planner has learnt from one before it."""
    tables = TreeTables(record())
    requests = [Request(prompt_len=3, group=group, positions=np.arange(count)) for group, count in enumerate((3, 9, 5))]
    settled = replay_settled(tables, requests, FixedPlanner(), COSTS, max_num_seqs=1)
    assert [step.num_waiting for step in settled.records] == [2] * 9 + [1] * 5 + [0] * 3
    seen: list[StepRecord] = []
    planner = AutoPlanner(SMALL_CPU)
    monkeypatch.setattr(planner, "observe", seen.append)
    kept = replay_settled(tables, requests, planner, COSTS, max_num_seqs=1)
    assert seen[-len(kept.records) :] == kept.records and sum(step.num_emitted for step in seen) == 2 * (3 + 9 + 5)
    again = replay_settled(tables, requests, FixedPlanner(), COSTS, max_num_seqs=1, earlier=[(9, 1, 5)])
    assert [step.num_waiting for step in again.records] == [2] * 3 + [1] * 5 + [0] * 9, "what was said of them"


def test_the_command_knows_every_roofline() -> None:
    assert tuple(DEVICES) == words.MACHINES and tuple(MODELS) == words.MODEL_SIZES


def test_measured_steps_say_how_wrong_a_profile_is() -> None:
    simulated = simulate(FixedPlanner(fixed=PLANS[1])).records
    plain = simulate(FixedPlanner()).records
    slower = []
    for record in (*simulated, *plain):
        parts = {"prefill_s": 3 * record.prefill_s, "draft_s": 0.001 + 1.5 * record.draft_s}
        parts |= {"target_s": 2 * record.target_s, "verify_s": record.verify_s}
        slower.append(dataclasses.replace(record, **parts, step_s=sum(parts.values()) + 0.002))
    fitted = fit_corrections(SMALL_CPU, [slower[: len(simulated)], slower[len(simulated) :]])
    assert fitted.prefill == pytest.approx(3) and fitted.between_s == pytest.approx(0.002)
    steps = ProfileCosts(profile=SMALL_CPU, corrections=fitted)
    for records, kept in ((simulated, slower[: len(simulated)]), (plain, slower[len(simulated) :])):
        priced = [steps.price(StepWork.of(record)) for record in records]
        for part in ("draft_s", "target_s", "prefill_s", "step_s"):
            expected, found = sum(getattr(r, part) for r in kept), sum(getattr(each, part) for each in priced)
            assert found == pytest.approx(expected, rel=0.05)


def test_steps_that_were_held_up_are_in_the_sum() -> None:
    """Prices are those of typical steps, but a rollout takes as long as all of its steps."""
    records, draw = simulate(FixedPlanner(fixed=PLANS[1])).records, random.Random(1)
    held_up = [
        dataclasses.replace(r, draft_s=stall * r.draft_s, target_s=stall * r.target_s, verify_s=stall * r.verify_s)
        for r in records
        for stall in (10.0 if draw.random() < 0.05 else 1.0,)
    ]
    fitted = fit_corrections(SMALL_CPU, [held_up])
    assert fitted.scale > 1.2
    steps = ProfileCosts(profile=SMALL_CPU, corrections=fitted)
    expected_s = sum(r.draft_s + r.target_s + r.verify_s for r in held_up)
    found_s = sum(each.step_s - each.prefill_s for each in (steps.price(StepWork.of(r)) for r in records))
    assert found_s == pytest.approx(expected_s, rel=0.02)
