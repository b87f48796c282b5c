"""`fastgrpo profile`: what forwards and drafts cost on this machine, and what speculation would gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgrpo.bench.measure import choose_turn_tokens, describe_run, interleave, match_rates
from fastgrpo.data import build_task_dataset, load_prompts
from fastgrpo.draft_timing import TimedDraft
from fastgrpo.engine import Engine
from fastgrpo.idleness import OthersWork
from fastgrpo.loading import Opened, encode_prompts, open_model, quiet_libraries
from fastgrpo.options import ProfileOptions
from fastgrpo.planner import AcceptanceTable, Forecast, HardwareProfile, describe_gains, forecast_gains, lower_gains
from fastgrpo.profile_files import Identity, describe_identity, keep_profile, save_profile
from fastgrpo.profiler import Measurement, TimedForward, measure_costs
from fastgrpo.report import say
from fastgrpo.report.roofline import plot_roofline
from fastgrpo.types import SamplingParams, SpeculationPlan

_CONTEXTS, _WIDTHS = (32, 128, 512, 1024), (1, 4)  # of the forwards that price cached positions
_WIDE = SpeculationPlan(depth=6, width=4, num_draft_tokens=32)  # offers what any smaller plan would
_PATIENCE_S = 20.0  # for repetitions
_ROLLOUT_S, _LEAST_TOKENS = 20.0, 8  # about what the rollout may take, and what each completion has at least
_DRAFT_COLUMNS = ("draft level of so many nodes, ms", "draft of one level for so many sequences, ms")
_CHECKS = 2  # rollouts that a forecast is checked with
_UNMEASURED_CONTEXT = 128  # cached positions of a sequence where no rollout was made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A forecast beside what rollouts then did: tokens per second with so many live sequences, over plain decoding."""

    num_seqs: int
    expected: float
    measured: float

    def describe(self) -> str:
        error = self.expected / self.measured - 1
        loss = (
            " That is a loss: the table and what is said above take every gain for as much smaller."
            if self.is_loss
            else ""
        )
        return (
            f"Tried with {self.num_seqs} live: {self.measured:.2f}x was measured where {self.expected:.2f}x was "
            f"expected, so the forecast is {100 * abs(error):.0f} % too {'high' if error > 0 else 'low'}.{loss}"
        )

    @property
    def is_loss(self) -> bool:
        return self.measured < 1


def run_profile(options: ProfileOptions, command: str) -> dict[str, Any]:
    """Measure, predict, print and, where `options.output` says so, write a profile and a plot; returns what it writes.

    What was measured is put into the user's cache too, so that the engine begins with it.

    Raises:
        ValueError: the model, the drafter or the prompts cannot be used.
        OSError: a file is missing or cannot be written, or the machine's clock stands still.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    engine = Engine(
        opened.model,
        drafter=options.drafter,
        speculation=_WIDE,
        max_num_seqs=options.num_prompts,
        tokenizer=opened.tokenizer,
    )
    prompts = [] if engine.drafter.name == "none" else _load_prompts(options, opened)
    wanted = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    engine.take_requests(prompts, wanted)  # what cannot be asked for is said before anything is measured
    identity = describe_identity(engine.target, engine.drafter)
    others = OthersWork()
    measurement = _measure(engine)
    cores_taken = others.count_cores_taken() if engine.target.device.type == "cpu" else 0.0
    profile = measurement.profile
    table, context_len, check = AcceptanceTable(), _UNMEASURED_CONTEXT, None
    if prompts:
        params = _choose_params(profile, len(prompts), options, opened.stop_token_ids)
        context_len = _count_acceptance(engine, prompts, params, table)
        check = _check_first_gain(engine, prompts, params, profile, table, context_len)
    forecasts = _correct(forecast_gains(profile, table, context_len=context_len), check)
    is_measured = table.offered[0][0] > 0
    verdict = _describe_verdict(engine.drafter.name, forecasts, table, is_measured)
    result = (
        describe_run(command, dataclasses.asdict(options))
        | {"model": options.model, "drafter": engine.drafter.name, "verdict": verdict}
        | _describe_measurement(measurement)
        | {"acceptance": {"is_measured": is_measured, "context_len": context_len, "rates": table.compute_rates()}}
        | {"forecasts": [dataclasses.asdict(forecast) for forecast in forecasts]}
        | {"check": None if check is None else dataclasses.asdict(check), "cores_taken_by_others": cores_taken}
    )
    kept = _keep(measurement, identity, result, options)
    console.print(_build_cost_table(profile))
    console.print(_build_table(forecasts, engine.drafter.name))
    _print_findings(console, verdict, check, cores_taken)
    if options.output is not None:
        say(console, f"written: {options.output} and a plot beside it")
    if kept is not None:
        say(console, f"kept for the engine: {kept}")
    elif cores_taken or not measurement.is_steady:
        console.print("not kept for the engine, which measures for itself", markup=False, highlight=False)
    return result


def _keep(measurement: Measurement, identity: Identity, result: dict[str, Any], options: ProfileOptions) -> Path | None:
    """Write the profile where `options.output` says so, and put it into the user's cache; returns that file."""
    if options.output is not None:
        save_profile(measurement.profile, identity, options.output, result)
        spreads = [each.timing.spread for each in measurement.by_tokens]
        title = f"{options.model}, {identity['dtype']}, {identity['device']}, drafter {result['drafter']}"
        plot_roofline(measurement.profile, spreads, options.output.with_suffix(".png"), title=title)
    return None if result["cores_taken_by_others"] else keep_profile(measurement, identity)


def _print_findings(console: Console, verdict: str, check: Check | None, cores_taken: float) -> None:
    console.print(verdict, markup=False, highlight=False)
    if check is not None:
        console.print(check.describe(), markup=False, highlight=False)
    if cores_taken:
        say(
            console,
            f"Other work took {cores_taken:.1f} cores while this was measured, so everything may look more expensive "
            "than it is: measure again on a quiet machine.",
        )


def _load_prompts(options: ProfileOptions, opened: Opened) -> list[list[int]]:
    if options.prompts is not None:
        chats = list(load_prompts(options.prompts, skip_broken=options.skip_broken)["prompt"])[: options.num_prompts]
    else:
        chats = list(build_task_dataset(options.task, size=options.num_prompts, seed=options.seed)["prompt"])
    return encode_prompts(opened.tokenizer, chats)


def _measure(engine: Engine) -> Measurement:
    target = engine.target
    contexts = tuple(length for length in _CONTEXTS if length <= target.max_position)
    if len(contexts) < 2:
        contexts = _CONTEXTS[:2]
    with target.rollout_mode():
        return measure_costs(target, engine.drafter, contexts=contexts, widths=_WIDTHS, patience_s=_PATIENCE_S)


def _choose_params(
    profile: HardwareProfile, num_seqs: int, options: ProfileOptions, stop_token_ids: tuple[int, ...]
) -> SamplingParams:
    """How the rollouts are sampled: as long as a machine of this speed can afford."""
    step_s = profile.compute_target_s(num_seqs * (1 + _WIDE.num_draft_tokens))
    step_s += profile.compute_draft_s(_WIDE, num_seqs)
    affordable = max(int(_ROLLOUT_S / step_s), _LEAST_TOKENS)  # each step emits a token at least
    return SamplingParams(
        temperature=options.temperature,
        max_tokens=min(options.max_tokens, affordable),
        stop_token_ids=stop_token_ids,
        seed=options.seed,
    )


def _count_acceptance(engine: Engine, prompts: list[list[int]], params: SamplingParams, table: AcceptanceTable) -> int:
    """Fill `table` from a short rollout of wide drafts; returns the cached positions of a sequence in the mean."""
    engine.generate(prompts, params)
    for record in engine.records:
        table.observe(record)
    num_read, num_rows = (sum(getattr(record, key) for record in engine.records) for key in ("num_read", "num_seqs"))
    return round(num_read / num_rows)


def _check_first_gain(
    engine: Engine,
    prompts: list[list[int]],
    params: SamplingParams,
    profile: HardwareProfile,
    table: AcceptanceTable,
    context_len: int,
) -> Check | None:
    """Check the forecast with as many live sequences as it still drafts for; None where it never drafts."""
    concurrencies = tuple(range(len(prompts), 0, -1))
    expected = forecast_gains(profile, table, context_len=context_len, concurrencies=concurrencies)
    drafting = next((forecast for forecast in expected if not forecast.plan.is_plain), None)
    return None if drafting is None else _check_forecast(engine, prompts[: drafting.num_seqs], params, drafting)


def _check_forecast(engine: Engine, prompts: list[list[int]], params: SamplingParams, expected: Forecast) -> Check:
    """Rollouts by the plan that was forecast for as many live sequences, in turn with plain ones; other noise."""
    model, speculating = engine.target.model, engine.drafter
    engines = {
        "plain": Engine(model, drafter="none", speculation="off", max_num_seqs=len(prompts)),
        "planned": Engine(model, drafter=speculating, speculation=expected.plan, max_num_seqs=len(prompts)),
    }
    results = interleave(
        engines,
        prompts,
        lambda repeat: dataclasses.replace(params, seed=params.seed + 1 + repeat),
        _CHECKS,
        turn_tokens=choose_turn_tokens(engine),
    )
    plain, planned = (
        [record for result in results[name] for record in result.records if record.num_seqs == len(prompts)]
        for name in engines
    )
    return Check(num_seqs=len(prompts), expected=expected.speed_up, measured=match_rates(planned, plain).gain)


def _correct(forecasts: Sequence[Forecast], check: Check | None) -> Sequence[Forecast]:
    """Where what was expected to pay was tried and lost, all gains are by as much smaller."""
    if check is None or not check.is_loss:
        return forecasts
    return lower_gains(forecasts, check.measured / check.expected)


def _describe_verdict(drafter: str, forecasts: Sequence[Forecast], table: AcceptanceTable, is_measured: bool) -> str:
    """Whether it pays."""
    if is_measured:
        return describe_gains(drafter, forecasts)
    assumed = f"Nothing was measured of its drafts: {100 * table.prior:.0f} % of the first ones are assumed accepted"
    if drafter == "none":
        assumed += ", at no cost; name a drafter to have it measured"
    return f"{describe_gains('any drafter' if drafter == 'none' else drafter, forecasts)} {assumed}."


def _describe_measurement(measurement: Measurement) -> dict[str, Any]:
    """Every measured point, for the file."""
    profile = measurement.profile
    return {
        "floor_s": profile.floor_s,
        "per_token_s": profile.per_token_s,
        "worst_spread": measurement.worst[1].spread,
        "by_tokens": [_describe_forward(each) for each in measurement.by_tokens],
        "by_context": [_describe_forward(each) for each in measurement.by_context],
        "drafts": [_describe_draft(each) for each in measurement.drafts],
    }


def _describe_forward(forward: TimedForward) -> dict[str, Any]:
    shape = {"num_tokens": forward.num_tokens, "num_seqs": forward.num_seqs, "context_len": forward.context_len}
    return shape | dataclasses.asdict(forward.timing)


def _describe_draft(draft: TimedDraft) -> dict[str, Any]:
    shape = {"num_seqs": draft.num_seqs, "plan": dataclasses.asdict(draft.plan), "num_new": draft.num_new}
    return shape | dataclasses.asdict(draft.timing)


def _build_cost_table(profile: HardwareProfile) -> Table:
    title = (
        f"knee at {profile.capacity:.0f} tokens a forward; {1e6 * profile.sample_s:.0f} us for a sampled token, "
        f"{1e6 * profile.fixed_s:.0f} us for a step, {1e6 * profile.read_s:.2f} us for a cached position"
    )
    table = Table(title=title, title_justify="left")
    columns = ["tokens a forward", "target, ms", "tokens/s", *(_DRAFT_COLUMNS if profile.draft_s else ())]
    for heading in columns:
        table.add_column(heading, justify="right")
    for index, count in enumerate(profile.num_tokens):
        seconds = profile.target_s[index]
        cells = [str(count), f"{1000 * seconds:.1f}", f"{count / seconds:.0f}"]
        drafts = (profile.draft_s[index : index + 1], profile.draft_start_s[index : index + 1])
        table.add_row(*cells, *(f"{1000 * each:.2f}" for times in drafts for each in times))
    return table


def _build_table(forecasts: Sequence[Forecast], drafter: str) -> Table:
    table = Table(
        title=f"expected with drafter {drafter} and so many live sequences, before any training", title_justify="left"
    )
    table.add_column("live", justify="right")
    table.add_column("plan of auto")
    for heading in ("acceptance length", "x plain"):
        table.add_column(heading, justify="right")
    for forecast in forecasts:
        plan = forecast.plan
        shape = (
            f"{plan.num_draft_tokens} node{'s' * (plan.num_draft_tokens > 1)}, depth {plan.depth}, width {plan.width}"
        )
        cells = ("plain" if plan.is_plain else shape, f"{forecast.acceptance_length:.2f}", f"{forecast.speed_up:.2f}x")
        table.add_row(str(forecast.num_seqs), *cells)
    return table
