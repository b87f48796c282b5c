"""`fastgrpo bench simulate`: recorded drafts replayed against every planner, here or by a roofline."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgrpo.bench.measure import describe_run
from fastgrpo.bench.recording import record_facts
from fastgrpo.bench.reproduction import LARGEST_ERROR, Reproduction, Workload, reproduce
from fastgrpo.data import build_task_dataset
from fastgrpo.drafters import build_drafter
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.model import TargetModel
from fastgrpo.options import SimulateOptions
from fastgrpo.profile_files import read_profile
from fastgrpo.report import say, write_json
from fastgrpo.report.predictions import plot_predictions
from fastgrpo.simulation import (
    Corrections,
    Facts,
    Prediction,
    ProfileCosts,
    TreeTables,
    build_requests,
    build_roofline_profile,
    draw_lengths,
    draw_requests,
    load_facts,
    predict_planners,
    save_facts,
)
from fastgrpo.simulation.facts import RECORD_AGAIN
from fastgrpo.types import SamplingParams

_WORKLOAD = (
    *("model", "drafter", "task", "num_prompts", "num_generations", "max_tokens", "temperature", "dtype", "seed"),
    "max_num_seqs",
)
Row = dict[str, Any]
Drawn = dict[tuple[int, int], NDArray[np.int64]]  # completion lengths by their mean and the group size


def run_simulate_bench(options: SimulateOptions, command: str) -> dict[str, Any]:
    """Record facts, or replay them; print and, where `options.output` says so, write the results; returns them.

    Raises:
        ValueError: the model, the drafter, the task or the facts cannot be used.
        OSError: a file is missing or cannot be written.
    """
    console = Console()
    quiet_libraries()
    if options.record is not None:
        result = _record(options, command, options.record, console)
    else:
        assert options.facts is not None  # the record itself sees to it
        result = _replay(options, command, load_facts(options.facts), console)
    _keep(result, options)
    if options.output is not None:
        if result.get("predictions"):
            plot_predictions(result["predictions"], options.output.with_suffix(".png"))
        say(console, f"written: {options.output}")
    return result


def _record(options: SimulateOptions, command: str, path: Path, console: Console) -> dict[str, Any]:
    workload = _open_workload(options)
    drafter = build_drafter(workload.drafter, TargetModel(workload.model))
    settings = {name: getattr(options, name) for name in _WORKLOAD}
    about = describe_run(command, settings)
    facts = record_facts(
        workload.model,
        drafter,
        workload.prompts,
        workload.params,
        max_num_seqs=workload.max_num_seqs,
        about=about,
    )
    save_facts(facts, path)
    say(
        console,
        f"{facts.num_completions} completions, {facts.num_positions} positions; written: {path} "
        f"({path.stat().st_size / 1e6:.1f} MB)",
    )
    return about | {"facts": _describe_facts(facts)}


def _open_workload(options: SimulateOptions) -> Workload:
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    chats = build_task_dataset(options.task, size=options.num_prompts, seed=options.seed)["prompt"]
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        stop_token_ids=opened.stop_token_ids,
        seed=options.seed,
    )
    prompts = [ids for ids in encode_prompts(opened.tokenizer, chats) for _ in range(options.num_generations)]
    return Workload(
        model=opened.model,
        drafter=options.drafter,
        prompts=prompts,
        params=params,
        max_num_seqs=options.max_num_seqs,
    )


def _take_workload(options: SimulateOptions, facts: Facts) -> SimulateOptions:
    """The options with the workload that the facts were recorded of; what cannot be one is refused."""
    settings = facts.about.get("settings")
    if not isinstance(settings, dict) or sorted(settings) != sorted(_WORKLOAD):
        raise ValueError(f"these facts do not say of which workload they are; {RECORD_AGAIN}, or skip the measurement")
    for name, value in settings.items():
        expected = type(getattr(options, name))
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"these facts are of a workload with {name}={value!r:.60}; {RECORD_AGAIN}")
    return dataclasses.replace(options, **settings)


def _find_slots(options: SimulateOptions, facts: Facts) -> int:
    """Sequences that were decoded together when the facts were recorded; the options' where they do not say."""
    return (_take_workload(options, facts) if facts.about.get("settings") else options).max_num_seqs


def _replay(options: SimulateOptions, command: str, facts: Facts, console: Console) -> dict[str, Any]:
    tables = TreeTables(facts)
    drawn = _draw_all_lengths(options)  # before minutes of measurement: they may be impossible
    result = describe_run(command, dataclasses.asdict(options)) | {"facts": _describe_facts(facts) | dict(facts.about)}
    reproductions: tuple[Reproduction, ...] = ()
    profile, corrections, machine = None, Corrections(), "this machine"
    if options.profile is not None:
        profile, measured_of = read_profile(options.profile)
        if options.skip_measurement:  # else it is compared with what is measured
            machine = f"the machine of {options.profile} ({measured_of.get('cpu')}, {measured_of.get('device')})"
    if not options.skip_measurement:
        profile, corrections, reproductions = reproduce(
            _open_workload(_take_workload(options, facts)),
            tables,
            profile_file=None if options.profile is None else str(options.profile),
            repeats=options.repeats,
            noise=options.noise,
            seed=options.seed,
        )
        _print_reproduction(reproductions, console)
    errors = {each.planner: each.error for each in reproductions}
    rows: list[Row] = []
    result |= {
        "corrections": corrections.describe(),
        "reproduction": [_describe_reproduction(each) for each in reproductions],
        "verdict": _describe_error(errors, bool(options.devices)),
        "predictions": rows,
    }
    costs = None
    if profile is not None:
        costs = ProfileCosts(profile=profile, corrections=corrections, noise=options.noise, seed=options.seed)
    _keep(result, options)
    here = () if costs is None else (_predict_here(options, tables, costs, machine, errors),)
    for own in itertools.chain(here, _predict_larger_machines(options, tables, errors, drawn)):
        scenario = own[0]["scenario"]
        console.print(_build_table(scenario, own, was_measured=scenario == machine))
        rows += own
        _keep(result, options)
    say(console, result["verdict"])
    return result


def _keep(result: dict[str, Any], options: SimulateOptions) -> None:
    """Write what there is, should the rest not come: many scenarios take long."""
    if options.output is not None:
        write_json(result, options.output, indent=1)


def _describe_reproduction(each: Reproduction) -> dict[str, Any]:
    errors = {name: getattr(each, name) for name in ("error", "error_per_token", "profile_error")}
    return dataclasses.asdict(each) | errors


def _predict_here(
    options: SimulateOptions, tables: TreeTables, costs: ProfileCosts, machine: str, errors: dict[str, float]
) -> list[Row]:
    """The recorded rollout itself on the costs of `machine`."""
    requests, slots = build_requests(tables.facts), _find_slots(options, tables.facts)
    predicted = predict_planners(tables, requests, costs.profile, costs, max_num_seqs=slots)
    return _describe_predictions({"scenario": machine}, predicted, errors)


def _describe_facts(facts: Facts) -> dict[str, Any]:
    return {
        "plan": dataclasses.asdict(facts.plan),
        "num_completions": facts.num_completions,
        "num_positions": facts.num_positions,
        "mean_length": float(np.mean(facts.lengths)),
        "max_length": int(np.max(facts.lengths)),
    }


def _draw_all_lengths(options: SimulateOptions) -> Drawn:
    """Completion lengths on larger machines, by mean and group size; none without such machines.

    Raises:
        ValueError: there are no such lengths.
    """
    if not options.devices:
        return {}
    return {
        (mean, group_size): draw_lengths(
            options.num_completions,
            mean=mean,
            longest_over_mean=options.longest_over_mean,
            group_size=group_size,
            seed=options.seed,
        )
        for mean, group_size in itertools.product(options.mean_lengths, options.group_sizes)
    }


def _predict_larger_machines(
    options: SimulateOptions, tables: TreeTables, errors: dict[str, float], drawn: Drawn
) -> Iterator[list[Row]]:
    """Every device with every model, mean length and group size; drafts are accepted as they were recorded."""
    facts = tables.facts
    prompt_len = int(np.median(facts.prompt_lens))
    for device, model, mean, group_size in itertools.product(
        options.devices, options.models, options.mean_lengths, options.group_sizes
    ):
        cached_positions = min(options.max_num_seqs, options.num_completions) * (prompt_len + mean)
        roofline = build_roofline_profile(device, model, cached_positions=cached_positions)
        lengths = drawn[mean, group_size]
        requests = draw_requests(facts, lengths, prompt_len=prompt_len, group_size=group_size, seed=options.seed)
        costs = ProfileCosts(profile=roofline.profile, noise=options.noise, seed=options.seed)
        predicted = predict_planners(tables, requests, roofline.profile, costs, max_num_seqs=options.max_num_seqs)
        about = {
            "scenario": f"{roofline.num_devices} x {device}, {model}, mean {mean}, groups of {group_size}",
            "device": device,
            "num_devices": roofline.num_devices,
            "model": model,
            "mean_length": mean,
            "max_length": int(lengths.max()),
            "group_size": group_size,
            "capacity": roofline.profile.capacity,
        }
        yield _describe_predictions(about, predicted, errors)


def _describe_predictions(about: Row, predictions: Sequence[Prediction], errors: dict[str, float]) -> list[Row]:
    """One row a planner; its error is its own where it was measured, else the largest that was, of `error_of`."""
    largest = _find_largest(errors)
    rows = []
    for each in predictions:
        measured = each.planner if each.planner in errors else largest
        error = None if measured is None else errors[measured]
        rows.append(about | dataclasses.asdict(each) | {"error": error, "error_of": measured})
    return rows


def _find_largest(errors: dict[str, float]) -> str | None:
    return max(errors, key=lambda name: abs(errors[name]), default=None)


def _print_reproduction(reproductions: Sequence[Reproduction], console: Console) -> None:
    table = Table(title="the recorded requests, measured and replayed", title_justify="left")
    table.add_column("planner")
    for heading in ("seconds", "replay", "error", "a token", "by profile", "steps", "replay"):
        table.add_column(heading, justify="right")
    for each in reproductions:
        seconds = (f"{each.measured_s:.2f}", f"{each.simulated_s:.2f}")
        errors = (f"{100 * error:+.1f} %" for error in (each.error, each.error_per_token, each.profile_error))
        table.add_row(each.planner, *seconds, *errors, str(each.measured_steps), str(each.simulated_steps))
    console.print(table)


def _describe_error(errors: dict[str, float], has_rooflines: bool) -> str:
    """How far predictions can be believed, in a few sentences."""
    planner = _find_largest(errors)
    if planner is None:
        text = "Nothing was measured beside the simulation: its error is not known."
    else:
        text = f"The simulation is off by at most {100 * abs(errors[planner]):.1f} % of total time here ({planner})."
        if abs(errors[planner]) > LARGEST_ERROR:
            text += f" That is more than {100 * LARGEST_ERROR:.0f} %: do not judge planners by it."
        text += " Planners that were not measured stand with the largest error of those that were, its planner named."
    if has_rooflines:
        text += (
            " Computed cost tables add an error of their own, which is not known, and drafts are taken to be accepted "
            "as those of the recorded model."
        )
    return text


def _build_table(scenario: str, rows: Sequence[Row], *, was_measured: bool) -> Table:
    """The results of one scenario, a row for each planner.

    Args:
        was_measured: the errors are of this scenario; else they are those of this machine.
    """
    table = Table(title=Text(f"simulated: {scenario}", style="table.title"), title_justify="left")
    table.add_column("planner")
    error_heading = "error" if was_measured else "error here"
    for heading in ("seconds", "x off", error_heading, "tokens a forward", "exact trees"):
        table.add_column(heading, justify="right")
    for row in rows:
        plan, name = row["plan"], row["planner"]
        if plan is not None:
            name += f" ({plan['depth']}, {plan['width']}, {plan['num_draft_tokens']})"
        error = "not known" if row["error"] is None else f"{100 * row['error']:+.1f} %"
        error += f" ({row['error_of']})" if row["error_of"] not in (None, row["planner"]) else ""
        exact = "-" if row["exact_share"] is None else f"{row['exact_share']:.0%}"
        speed = (f"{row['total_s']:.2f}", f"{row['speed_up']:.2f}", error, f"{row['acceptance_length']:.2f}", exact)
        table.add_row(name, *speed)
    return table
