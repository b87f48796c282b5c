"""Whether a simulation can be believed: real rollouts beside the replay of the same requests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import PreTrainedModel

from fastgrpo.bench.measure import (
    RolloutResult,
    choose_turn_tokens,
    compute_median,
    interleave,
    measure_rollout,
)
from fastgrpo.engine import DEFAULT_FIXED_PLAN, Engine
from fastgrpo.planner import HardwareProfile, build_planner
from fastgrpo.profile_files import find_profile, take_profile
from fastgrpo.simulation import (
    Corrections,
    ProfileCosts,
    Replay,
    TreeTables,
    build_requests,
    fit_corrections,
    replay_settled,
)
from fastgrpo.types import SamplingParams

REPRODUCED = ("off", "fixed", "auto")
LARGEST_ERROR = 0.10  # of total time; above, predictions are not to be trusted


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One planner's rollout, measured and simulated. Errors are simulated over measured seconds, less 1.

    Args:
        measured_s: median over the measured rollouts.
        profile_s: simulated on the profile's costs as they are.
        simulated_s: simulated on these costs, corrected by the rollouts before the measured ones.
        measured_steps, simulated_steps: engine steps, of the first measured rollout and of the simulation.
        measured_tokens, simulated_tokens: emitted in them; they differ where the model's type rounds.
    """

    planner: str
    measured_s: float
    profile_s: float
    simulated_s: float
    measured_steps: int
    simulated_steps: int
    measured_tokens: int
    simulated_tokens: int

    @property
    def error(self) -> float:
        return self.simulated_s / self.measured_s - 1

    @property
    def error_per_token(self) -> float:
        """What is left of the error where completions differ."""
        return (1 + self.error) * self.measured_tokens / self.simulated_tokens - 1

    @property
    def profile_error(self) -> float:
        return self.profile_s / self.measured_s - 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What facts were recorded of, to be run again."""

    model: PreTrainedModel
    drafter: str
    prompts: list[list[int]]
    params: SamplingParams
    max_num_seqs: int


def reproduce(
    workload: Workload, tables: TreeTables, *, profile_file: str | None, repeats: int, noise: float, seed: int
) -> tuple[HardwareProfile, Corrections, tuple[Reproduction, ...]]:
    """Measure rollouts of the recorded requests, planners in turn, and simulate the same.

    Rollouts with other noise take turns with those that are compared, under the same load: corrections are fitted to
    them, and the scheduler's knowledge of lengths is theirs.

    Raises:
        ValueError: the profile is of something else.
    """
    profile = _find_costs(workload, profile_file)
    engines = {
        name: Engine(
            workload.model,
            drafter="none" if name == "off" else workload.drafter,
            speculation=name,
            max_num_seqs=workload.max_num_seqs,
            profile=None if name == "off" else profile,
        )
        for name in REPRODUCED
    }
    other_noise = dataclasses.replace(workload.params, seed=workload.params.seed + 1)
    for engine in engines.values():  # first touches: not measured
        measure_rollout(engine, workload.prompts, other_noise)
    in_turn = (other_noise, workload.params)
    turn_tokens = choose_turn_tokens(engines["off"])
    results = interleave(
        engines, workload.prompts, lambda repeat: in_turn[repeat % 2], 2 * repeats, turn_tokens=turn_tokens
    )
    corrections = fit_corrections(profile, [result.records for own in results.values() for result in own[::2]])
    reproductions = []
    for name, own in results.items():
        measured, earlier = own[1::2], [[len(ids) for ids in own[0].token_ids]]
        believing, corrected = (
            _simulate(
                name,
                workload,
                tables,
                ProfileCosts(profile=profile, corrections=each, noise=noise, seed=seed),
                earlier,
            )
            for each in (Corrections(), corrections)
        )
        reproductions.append(_compare(name, measured, believing, corrected))
    return profile, corrections, tuple(reproductions)


def _compare(name: str, measured: list[RolloutResult], believing: Replay, corrected: Replay) -> Reproduction:
    """Measured rollouts of a planner beside those simulated by the profile as it is, and by the corrected one."""
    return Reproduction(
        planner=name,
        measured_s=compute_median(result.generation_s for result in measured),
        profile_s=believing.total_s,
        simulated_s=corrected.total_s,
        measured_steps=len(measured[0].records),
        simulated_steps=len(corrected.records),
        measured_tokens=measured[0].num_tokens,
        simulated_tokens=corrected.num_emitted,
    )


def _find_costs(workload: Workload, profile_file: str | None) -> HardwareProfile:
    """From a file that was measured of the same, else from the cache, else measured now."""
    engine = Engine(workload.model, drafter=workload.drafter, speculation="fixed")
    if profile_file is not None:
        return take_profile(profile_file, engine.target, engine.drafter)
    with engine.target.rollout_mode():
        return find_profile(engine.target, engine.drafter)


def _simulate(
    name: str, workload: Workload, tables: TreeTables, costs: ProfileCosts, earlier: list[list[int]]
) -> Replay:
    planner = build_planner(name, fixed=DEFAULT_FIXED_PLAN, measure=lambda: costs.profile)
    requests = build_requests(tables.facts)
    slots = workload.max_num_seqs
    return replay_settled(tables, requests, planner, costs, max_num_seqs=slots, earlier=earlier)
