"""What speculation would gain, before anything is trained: the planner's own predictions, by concurrency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgrpo.planner.acceptance import AcceptanceTable, compute_expected_length
from fastgrpo.planner.auto import AutoPlanner
from fastgrpo.planner.planner import PlanInputs
from fastgrpo.planner.profile import HardwareProfile
from fastgrpo.types import PLAIN, SpeculationPlan

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What `auto` would do with so many live sequences, and what comes of it.

    Args:
        acceptance_length: expected tokens a sequence and forward, next token included.
        speed_up: expected tokens per second, as a multiple of plain decoding's.
    """

    num_seqs: int
    plan: SpeculationPlan
    acceptance_length: float
    speed_up: float


def forecast_gains(
    profile: HardwareProfile,
    acceptance: AcceptanceTable,
    *,
    context_len: int,
    concurrencies: Sequence[int] = CONCURRENCIES,
) -> tuple[Forecast, ...]:
    """The plan of `auto` at each concurrency, trials left out, and its gain.

    Args:
        acceptance: what was counted of the drafter; empty, its prior and first levels alone are planned with.
        context_len: cached positions of each sequence.
    """
    rates = acceptance.compute_rates()
    forecasts = []
    for num_seqs in concurrencies:
        planner = AutoPlanner(profile, trial_share=0.0)
        planner.expectation.table = acceptance
        inputs = PlanInputs(num_seqs=num_seqs, num_read=num_seqs * context_len)
        plan = planner.plan(inputs)
        length = compute_expected_length(plan, rates)
        speed_up = length * planner.predict_step_s(PLAIN, inputs) / planner.predict_step_s(plan, inputs)
        forecasts.append(Forecast(num_seqs=num_seqs, plan=plan, acceptance_length=length, speed_up=speed_up))
    return tuple(forecasts)


def lower_gains(forecasts: Sequence[Forecast], measured_over_expected: float) -> tuple[Forecast, ...]:
    """The same where all drafts bring so much less than was forecast: plain decoding where nothing is left to gain."""
    lowered = [(each, each.speed_up * measured_over_expected) for each in forecasts]
    return tuple(
        replace(each, speed_up=gain)
        if gain > 1 and not each.plan.is_plain
        else replace(each, plan=PLAIN, acceptance_length=1.0, speed_up=1.0)
        for each, gain in lowered
    )


def find_break_even(forecasts: Sequence[Forecast]) -> int | None:
    """The least concurrency from which on every forecast is plain decoding, or None if the last one speculates."""
    break_even = None
    for forecast in reversed(forecasts):
        if not forecast.plan.is_plain:
            break
        break_even = forecast.num_seqs
    return break_even


def describe_gains(drafter: str, forecasts: Sequence[Forecast]) -> str:
    """In one sentence: whether speculation will pay, by how much, and with how many live sequences it does not."""
    break_even = find_break_even(forecasts)
    fewest, most = forecasts[0].num_seqs, forecasts[-1].num_seqs
    if break_even == fewest:
        return (
            f"Speculation with {drafter} will not pay here: with {fewest} to {most} live sequences nothing is expected "
            "to beat plain decoding, which auto then does."
        )
    best = max(forecasts, key=lambda forecast: forecast.speed_up)
    gain = f"Speculation with {drafter} pays here: {best.speed_up:.2f}x is expected with {best.num_seqs} live"
    speculating_until = math.inf if break_even is None else break_even
    plain = [each.num_seqs for each in forecasts if each.plan.is_plain and each.num_seqs < speculating_until]
    if plain:
        gain += f", but not with {', '.join(map(str, plain))}, where auto decodes plainly"
    if break_even is None:
        return f"{gain}, and it still pays with {most}."
    return f"{gain}; from {break_even} live sequences on it stops paying, and auto decodes plainly."
