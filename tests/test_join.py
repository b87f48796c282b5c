"""Two trees joined keep the best paths of both; a drafter of two drafters changes no token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from conftest import shared_model
from fastgrpo.drafters import auto, find_trainable, join
from fastgrpo.drafters.auto import AutoDrafter
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.join import count_matched, join_drafts
from fastgrpo.drafters.ngram import NgramDrafter
from fastgrpo.drafters.pools import LEVEL_PENALTY
from fastgrpo.engine import Engine
from fastgrpo.grpo.state import load_state, save_state
from fastgrpo.model import TargetModel
from fastgrpo.tree import Draft, check_draft
from fastgrpo.types import PLAIN, SamplingParams, SpeculationPlan
from fastgrpo.verify import Verdict
from test_transfer import CountReads

Tree = dict[tuple[int, ...], float]  # path from the root -> log chance of its last node
PENDING = 7


def build_draft(trees: list[Tree]) -> Draft:
    """Paths as a draft, padded to the largest tree."""
    width = 1 + max(len(tree) for tree in trees)
    tokens, parents, chances = [], [], []
    for tree in trees:
        paths = sorted(tree, key=lambda path: (len(path), -tree[path]))
        place = {(): 0} | {path: index for index, path in enumerate(paths, start=1)}
        pad = width - 1 - len(paths)
        tokens.append([PENDING, *(path[-1] for path in paths), *[0] * pad])
        parents.append([-1, *(place[path[:-1]] for path in paths), *[-1] * pad])
        chances.append([0.0, *(tree[path] for path in paths), *[0.0] * pad])
    return Draft(
        token_ids=torch.tensor(tokens),
        parents=torch.tensor(parents),
        num_nodes=torch.tensor([1 + len(tree) for tree in trees]),
        log_chances=torch.tensor(chances),
    )


def read_paths(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """Paths of a row's nodes, in the order of the nodes."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, int(draft.num_nodes[row])):
        paths.append((*paths[int(draft.parents[row, node])], int(draft.token_ids[row, node])))
    return paths[1:]


def score_paths(first: Tree, second: Tree) -> dict[tuple[int, ...], float]:
    """The rule, by dictionaries: chance from the root, a node's chance the better of what both say."""
    chances = {path: max(first.get(path, -math.inf), second.get(path, -math.inf)) for path in {*first, *second}}
    return {path: sum(chances[path[: i + 1]] - LEVEL_PENALTY for i in range(len(path))) for path in chances}


@st.composite
def build_trees(draw: st.DrawFn) -> Tree:
    tree: Tree = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(0, 3))):
        level = []
        for path in frontier:
            for token in draw(st.lists(st.integers(0, 4), max_size=3, unique=True)):
                tree[(*path, token)] = -draw(st.integers(1, 10**6)) / 10**5
                level.append((*path, token))
        frontier = level
    return tree


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(build_trees(), build_trees()), min_size=1, max_size=3), st.integers(1, 12))
def test_the_best_paths_of_both_are_kept(pairs: list[tuple[Tree, Tree]], count: int) -> None:
    first, second = (build_draft([pair[i] for pair in pairs]) for i in (0, 1))
    joined = join_drafts(first, second, (Calibration(), Calibration()), count, 3)
    check_draft(joined.draft)
    for row, (one, other) in enumerate(pairs):
        paths = read_paths(joined.draft, row)
        scores = score_paths(one, other)
        best = sorted(scores.values(), reverse=True)[:count]
        assert sorted((scores[path] for path in paths), reverse=True) == pytest.approx(best, abs=1e-4)
        for node, path in enumerate(paths, start=1):
            assert float(joined.of_first[row, node]) == pytest.approx(one.get(path, -math.inf))
            assert float(joined.of_second[row, node]) == pytest.approx(other.get(path, -math.inf))
            known = max(one.get(path, -math.inf), other.get(path, -math.inf))
            assert float(joined.draft.log_chances[row, node]) == pytest.approx(known)


def build_verdict(tokens: list[list[int]]) -> Verdict:
    """A verdict by the tokens that the target chose; its path is not that of the draft in question."""
    width = max(map(len, tokens))
    padded = torch.tensor([row + [-1] * (width - len(row)) for row in tokens])
    path = torch.where(padded >= 0, torch.arange(width).expand_as(padded), -1)
    empty = torch.zeros_like(padded)
    return Verdict(
        path=path,
        token_ids=padded,
        logprobs=empty.float(),
        entropies=empty.float(),
        num_accepted=(padded >= 0).sum(1) - 1,
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(build_trees(), build_trees()), min_size=1, max_size=3), st.integers(3, 5))
def test_a_device_is_not_asked_how_deep_trees_are(pairs: list[tuple[Tree, Tree]], depth: int) -> None:
    first, second = (build_draft([pair[i] for pair in pairs]) for i in (0, 1))
    expected = join_drafts(first, second, (Calibration(), Calibration()), 12, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "is_host", lambda _: False)
        with CountReads() as reads:
            joined = join_drafts(first, second, (Calibration(), Calibration()), 12, depth)
    assert not reads.found
    assert torch.equal(joined.draft.token_ids, expected.draft.token_ids)
    assert torch.equal(joined.draft.parents, expected.draft.parents)
    assert torch.equal(joined.draft.scores, expected.draft.scores)


def test_what_another_draft_would_have_had_accepted() -> None:
    tree = {(1,): -0.1, (2,): -0.2, (1, 3): -0.1, (1, 3, 4): -0.3}
    draft = build_draft([tree] * 5)
    verdict = build_verdict([[1, 3, 4, 9], [1, 4], [2, 3], [5], [1, 3]])
    assert count_matched(draft, verdict).tolist() == [3, 1, 1, 0, 2]


def test_calibration_learns_what_chances_are_worth() -> None:
    """Children whose chance is said to be p and who are chosen with p squared, and siblings keep their order."""
    calibration = Calibration()
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        chances = torch.rand(64, 1, generator=generator) * 0.9 + 0.05
        draft = build_draft([{(1,): math.log(float(chance))} for chance in chances])
        is_hit = torch.rand(64, generator=generator) < chances[:, 0] ** 2
        path = torch.stack((torch.zeros(64, dtype=torch.int64), torch.where(is_hit, 1, -1)), 1)
        verdict = build_verdict([[1, 1]] * 64)
        calibration.observe(draft, Verdict(**{**vars(verdict), "path": path}))
    known = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    assert torch.equal(calibration(known.log(), 1), known.log()), "the identity until it is fitted"
    calibration.fit()
    assert (calibration(known.log(), 1).exp() - known**2).abs().max() < 0.04
    assert (calibration(known.log(), 1).diff() > 0).all()
    deeper = calibration(known.log(), 3).exp()
    assert (deeper - known**2).abs().max() < 0.04, "a level without trials takes the line of the one above"
    absent = calibration(torch.tensor([-math.inf, 0.0]), 1)
    assert absent[0] == -math.inf and torch.isfinite(absent[1])


# -- the drafter of two drafters -----------------------------------------------------------------------------


def build_auto(model: PreTrainedModel) -> AutoDrafter:
    return AutoDrafter(EagleDrafter(TargetModel(model)), NgramDrafter())


PROMPTS = [[3, 1, 4, 1, 5], [3, 1, 4, 1, 5], [7, 7], list(range(12))]


@pytest.mark.parametrize("plan", [PLAIN, SpeculationPlan(depth=3, width=2, num_draft_tokens=6), "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_plain_decoding(plan: SpeculationPlan | str, temperature: float) -> None:
    model = shared_model("llama")
    params = SamplingParams(temperature=temperature, max_tokens=40, seed=5)
    plain = Engine(model, drafter="none").generate(PROMPTS, params)
    engine = Engine(model, drafter=build_auto(model), speculation=plan, max_num_seqs=3)
    for _ in range(2):
        assert [c.token_ids for c in engine.generate(PROMPTS, params)] == [c.token_ids for c in plain]


def test_it_drafts_with_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that repeats itself: n-grams are right, an untrained head is not; either draft takes as long."""
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=itertools.count(0.0).__next__))
    model = shared_model("llama", torch.float32)  # many steps of our own decoder, which is the faster one
    drafter = build_auto(model)
    plan = SpeculationPlan(depth=4, width=2, num_draft_tokens=6)
    engine = Engine(model, drafter=drafter, speculation=plan)
    params = SamplingParams(temperature=0.0, max_tokens=100)
    for _ in range(12):  # greedy, so that every epoch is the first one again
        engine.generate([[3, 1, 4, 1, 5]], params)
    ledger = drafter._find_ledger(1)
    lengths = {way: mean.value for way, mean in ledger.lengths.items()}
    assert lengths["ngram"] >= lengths["eagle"] + 1  # of seven trials, or more: how many depends on the time they take
    assert lengths["joined"] >= lengths["eagle"] + 1
    assert drafter.choose_way(1) in ("ngram", "joined")
    assert sum(drafter.way_shares.values()) == pytest.approx(1)
    records = [record.acceptance_length for record in engine.records]
    assert sum(records) / len(records) > 3
    ledger.draft_s["ngram"].value = ledger.draft_s["joined"].value = 100.0
    assert drafter.choose_way(1) == "eagle", "a draft that takes too long does not pay"
    ledger.draft_s["ngram"].value = 1e-6
    assert drafter.choose_way(1) == "ngram"


def test_on_a_gpu_what_a_draft_takes_is_the_devices_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In trials, which wait for it; other steps do not, and time nothing."""
    clock = {"host": 0.0, "device": 0.0}  # what each has been given to do, seconds

    def wait(device: torch.device) -> None:
        clock["host"] = clock["device"] = max(clock.values())

    def launch(device_s: float) -> None:
        clock["host"] += 0.001
        clock["device"] = max(clock.values()) + device_s

    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: clock["host"]))
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    tokens, parents = torch.tensor([[5, 6]]), torch.tensor([[-1, 0]])
    chances = torch.tensor([[0.0, -0.1]])
    draft = Draft(token_ids=tokens, parents=parents, num_nodes=torch.tensor([2]), log_chances=chances, scores=chances)

    def build_member(name: str, device_s: float) -> SimpleNamespace:
        def propose(context: object, plan: SpeculationPlan) -> Draft:
            launch(device_s)
            return draft

        return SimpleNamespace(
            name=name, wants_features=False, propose=propose, judge=lambda *_: None, calibration=Calibration()
        )

    drafter = AutoDrafter(build_member("slow", 0.02), build_member("quick", 0.004))
    context = SimpleNamespace(sequences=[None], device=torch.device("cuda"))
    values = torch.zeros(1, 2)
    verdict = Verdict(
        path=parents + 1, token_ids=tokens + 1, logprobs=values, entropies=values, num_accepted=torch.tensor([1])
    )
    for _ in range(8):
        drafter.propose(context, SpeculationPlan(depth=1, width=1, num_draft_tokens=1))
        launch(0.1)
        drafter.judge(draft, verdict)
    ledger = drafter._find_ledger(1)
    found = {way: mean.value for way, mean in ledger.draft_s.items()}
    assert found == pytest.approx({"slow": 0.021, "quick": 0.005, "joined": 0.026})
    assert ledger.rest_s.value == pytest.approx(0.101) and ledger.rest_s.num_values == auto._FIRST_TRIALS


def test_a_step_is_steady_whatever_happened_to_the_member_that_did_not_draft() -> None:
    """A head's draft was recorded in the last trial; n-grams, which pay, have drafted since."""
    draft = Draft.roots(torch.tensor([1]))
    recorded, other = (
        SimpleNamespace(name=name, wants_features=False, was_replayed=replayed, propose=lambda *_: draft)
        for name, replayed in (("eagle", False), ("ngram", True))
    )
    drafter = AutoDrafter(recorded, other)
    context = SimpleNamespace(sequences=[None], device=torch.device("cpu"))
    ledger = drafter._find_ledger(1)
    for next_trial, way, was_replayed in ((0, "eagle", False), (9, "ngram", True), (9, "eagle", False)):
        ledger.next_trial, ledger.way = next_trial, way
        drafter.propose(context, SpeculationPlan(depth=1, width=1, num_draft_tokens=1))
        assert drafter.was_replayed == was_replayed


def test_trials_become_rare_where_they_change_nothing() -> None:
    model = shared_model("llama", torch.float32)  # many steps of our own decoder, which is the faster one
    drafter = build_auto(model)
    engine = Engine(model, drafter=drafter, speculation=SpeculationPlan(depth=1, width=1, num_draft_tokens=1))
    params = SamplingParams(temperature=0.0, max_tokens=100)
    engine.generate([[3, 1, 4, 1, 5]], params)
    ledger = drafter._find_ledger(1)
    ledger.draft_s["ngram"].value = ledger.draft_s["joined"].value = 100.0  # the choice is clear, and stays so
    gaps = set()
    for _ in range(12):
        for way in ("ngram", "joined"):
            ledger.draft_s[way].value = 100.0
        engine.generate([[3, 1, 4, 1, 5]], params)
        gaps.add(ledger.gap)
    assert ledger.gap == max(gaps) >= 64
    joined = drafter.way_shares["joined"]
    assert joined <= 0.05, f"{joined:.0%} of the drafts were still trials"
    ledger.way = "ngram"  # what would be chosen is another way now
    ledger.next_trial = 0
    engine.generate([[3, 1, 4, 1, 5]], dataclasses.replace(params, max_tokens=8))
    assert ledger.gap == 16, "a change is looked at again soon"


def test_what_both_know_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_FIRST_TRIALS", 1000)  # both draft at every step, whatever the time they take
    model = shared_model("llama")
    plan = SpeculationPlan(depth=3, width=2, num_draft_tokens=6)
    params = SamplingParams(max_tokens=30, seed=1)
    engine = Engine(model, drafter=build_auto(model), speculation=plan)
    engine.generate(PROMPTS, params)
    save_state(tmp_path, engine, None)
    restored = Engine(model, drafter=build_auto(model), speculation=plan)
    load_state(tmp_path, restored, None)
    for each in (engine, restored):
        each.generate(PROMPTS, params)
    assert [r.hits for r in engine.records] == [r.hits for r in restored.records]
    assert [r.offered for r in engine.records] == [r.offered for r in restored.records]


def test_the_head_inside_learns() -> None:
    model = shared_model("llama")
    assert find_trainable(build_auto(model)).name == "eagle"
    assert find_trainable(NgramDrafter()) is None
    engine = Engine(model, drafter="auto")
    assert [member.name for member in engine.drafter.members] == ["eagle", "ngram"]
