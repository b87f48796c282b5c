"""What each planner would make of a rollout on given costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastgrpo.lengths import LengthPredictor
from fastgrpo.planner import FixedPlanner, HardwareProfile, Planner, build_planner
from fastgrpo.planner.grid import GRID
from fastgrpo.simulation.costs import Costs, ProfileCosts
from fastgrpo.simulation.limit import find_limit
from fastgrpo.simulation.replay import Replay, Request, replay
from fastgrpo.simulation.trees import TreeTables
from fastgrpo.types import SpeculationPlan

BASELINE, BEST_FIXED, LIMIT = "off", "fixed best", "limit"
PLANNERS = (BASELINE, "paper", "paper-own", "bandit", BEST_FIXED, "auto", LIMIT)
FIXED_GRID = tuple(
    SpeculationPlan(depth=depth, width=width, num_draft_tokens=nodes)
    for depth, width, nodes in ((1, 1, 1), (2, 2, 4), (3, 1, 3), (3, 3, 8), (4, 4, 16), (5, 8, 32))
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A planner's simulated rollout.

    Args:
        plan: of "fixed best", the one of `FIXED_GRID` that took least; None for other planners.
        speed_up: how many times sooner it ends than plain decoding of the same requests.
        acceptance_length: tokens emitted a sequence and forward, plain steps included.
        exact_share: see `Replay`; None where nothing was drafted.
    """

    planner: str
    plan: SpeculationPlan | None
    total_s: float
    speed_up: float
    acceptance_length: float
    exact_share: float | None


def predict_planners(
    tables: TreeTables,
    requests: Sequence[Request],
    profile: HardwareProfile,
    costs: ProfileCosts,
    *,
    max_num_seqs: int,
) -> tuple[Prediction, ...]:
    """Every one of `PLANNERS` on the same requests; the last knows the fate of each draft, see `find_limit`.

    Args:
        profile: what planners believe at the start; `costs` are what steps then take.
    """
    plain = replay_settled(tables, requests, FixedPlanner(), costs, max_num_seqs=max_num_seqs)
    predictions = []
    for name in PLANNERS:
        plan = None
        if name == BEST_FIXED:
            tried = {
                each: replay_settled(tables, requests, FixedPlanner(fixed=each), costs, max_num_seqs=max_num_seqs)
                for each in FIXED_GRID
            }
            plan = min(tried, key=lambda each: tried[each].total_s)
            simulated = tried[plan]
        elif name == BASELINE:
            simulated = plain
        elif name == LIMIT:
            known = _learn_lengths(requests, [[len(request.positions) for request in requests]])
            plans = (*GRID, *FIXED_GRID)
            simulated = find_limit(tables, requests, costs, plans=plans, max_num_seqs=max_num_seqs, lengths=known)
        else:
            planner = build_planner(name, fixed=FIXED_GRID[0], measure=lambda: profile)
            simulated = replay_settled(tables, requests, planner, costs, max_num_seqs=max_num_seqs)
        has_drafted = any(not record.plan.is_plain for record in simulated.records)
        num_forwards = sum(record.num_seqs for record in simulated.records)
        predictions.append(
            Prediction(
                planner=name,
                plan=plan,
                total_s=simulated.total_s,
                speed_up=plain.total_s / simulated.total_s,
                acceptance_length=simulated.num_emitted / num_forwards,
                exact_share=simulated.exact_share if has_drafted else None,
            )
        )
    return tuple(predictions)


def replay_settled(
    tables: TreeTables,
    requests: Sequence[Request],
    planner: Planner,
    costs: Costs,
    *,
    max_num_seqs: int,
    earlier: Sequence[Sequence[int]] | None = None,
) -> Replay:
    """A replay that is not the first: the scheduler knows each prompt's lengths, and the planner has learnt once.

    Args:
        earlier: completion lengths of each rollout before it, in the order of the requests; None takes their own.
    """
    known = [[len(request.positions) for request in requests]] if earlier is None else earlier
    if not isinstance(planner, FixedPlanner):  # that learns nothing
        lengths = _learn_lengths(requests, known)
        replay(tables, requests, planner, costs, max_num_seqs=max_num_seqs, lengths=lengths)
    return replay(tables, requests, planner, costs, max_num_seqs=max_num_seqs, lengths=_learn_lengths(requests, known))


def _learn_lengths(requests: Sequence[Request], rollouts: Iterable[Sequence[int]]) -> LengthPredictor:
    """What earlier rollouts of the same prompts leave behind; within each, the shortest end first."""
    lengths = LengthPredictor()
    for rollout in rollouts:
        for request, length in sorted(zip(requests, rollout, strict=True), key=lambda pair: pair[1]):
            lengths.observe(request.prompt_ids, length)
    return lengths
