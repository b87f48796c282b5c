"""`fastgrpo bench e2e`: whole training steps of TRL's trainer and of ours, in turn."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgrpo.bench.measure import compute_median, describe_run
from fastgrpo.bench.training import STOCK
from fastgrpo.bench.worker import Row, Worker
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import E2EOptions, parse_variant
from fastgrpo.report import plot_steps, say, write_json
from fastgrpo.types import BACKWARD, FORWARD, Timeline

_MEDIANS = ("generation_s", "learn_s", "update_s", "step_s", "tokens_per_s", "s_per_token", "mean_length", "max_length")
_MEASURES = ("generation_s", "s_per_token", "update_s", "step_s")

Memory = dict[str, dict[str, int | None]]


def run_e2e_bench(options: E2EOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results; returns them.

    Raises:
        ValueError: a setting does not fit the model.
        RuntimeError: a variant failed.
    """
    console = Console()
    origin = describe_run(command, dataclasses.asdict(options))
    rows, timelines, memory = train_in_turn(options, console, origin)
    medians = {name: _compute_medians(own) for name, own in rows.items()}
    phases = {name: compute_phases(own) for name, own in rows.items()}
    shown = {name: timelines[name][_find_median_step(own)] for name, own in rows.items()}
    result = origin | {
        "medians": medians,
        "phases": phases,
        "peak_memory": memory,
        "ratios": _compute_ratios(medians) + _compute_phase_ratios(phases) + _compute_memory_ratios(memory),
        "least_step_ratio": _compute_least_ratio(rows),
        "timelines": {name: dataclasses.asdict(timeline) for name, timeline in shown.items()},
        "steps": rows,
    }
    if options.output is not None:
        write_json(result, options.output, indent=1)
    _print(result, console)
    if options.output is not None:
        written = str(options.output)
        if importlib.util.find_spec("matplotlib") is not None:
            plot_steps(shown, options.output.with_suffix(".png"), title=_name_workload(options))
            written += " and a picture beside it"
        say(console, f"written: {written}")
    return result


def _name_workload(options: E2EOptions) -> str:
    count = f"{options.prompts_per_step} x {options.num_generations} completions"
    return (
        f"A training step of each, of median length: {options.task}, {count} of {options.max_completion_length} tokens"
    )


def train_in_turn(
    options: E2EOptions, console: Console, origin: dict[str, Any]
) -> tuple[dict[str, list[Row]], dict[str, list[Timeline]], Memory]:
    """The steps of each variant, A B C A B C, one process at work at a time; when each did what, and its memory.

    After each step those taken so far are written to `options.output`, below `origin`, should the rest not come.
    """
    workers = [Worker(name, options) for name in dict.fromkeys(options.variants)]
    rows: dict[str, list[Row]] = {worker.name: [] for worker in workers}
    timelines: dict[str, list[Timeline]] = {worker.name: [] for worker in workers}
    try:
        for worker in workers:
            worker.wait_until_ready()
        for step in range(1, options.steps + 1):
            for worker in workers:
                row, timeline = worker.train_step()
                timelines[worker.name].append(timeline)
                rows[worker.name].append(row)
                place = f"step {step}/{options.steps} {worker.name}"
                console.print(
                    f"{place}: {row['step_s']:.1f} s, generation {row['generation_s']:.1f} s", highlight=False
                )
            if options.output is not None:
                write_json(origin | {"steps": rows}, options.output, indent=1)
        return rows, timelines, {worker.name: worker.finish() for worker in workers}
    finally:
        for worker in workers:
            worker.stop()


def _compute_medians(rows: list[Row]) -> Row:
    """Over all steps but the first, which calibrates and touches memory for the first time."""
    settled = rows[1:] or rows
    return {key: compute_median(row[key] for row in settled) for key in (*_MEDIANS, "acceptance_length")}


def compute_phases(rows: list[Row]) -> dict[str, float]:
    """Mean seconds of each phase over the same steps: unlike medians, they add up to the step."""
    settled = rows[1:] or rows
    return {name: statistics.fmean(row["phases"][name] for row in settled) for name in settled[0]["phases"]}


def describe_settled(num_steps: int) -> str:
    """Which of so many steps medians and means are over."""
    return "the first one left out" if num_steps > 1 else "the first and only one"


def _find_median_step(rows: list[Row]) -> int:
    """The step that took as long as half of the settled ones."""
    ranked = sorted(range(len(rows) > 1, len(rows)), key=lambda index: float(rows[index]["step_s"]))
    return ranked[len(ranked) // 2]


def _compute_phase_ratios(phases: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """How many times faster the update's forward and backward passes are than those of TRL's trainer."""
    baseline = phases.get(STOCK, {})
    return [
        {"measure": phase, "variant": name, "baseline": STOCK, "ratio": compute_ratio(baseline[phase], own[phase])}
        for phase in (FORWARD, BACKWARD)
        for name, own in phases.items()
        if baseline and name != STOCK
    ]


def _compute_ratios(medians: dict[str, Row]) -> list[dict[str, Any]]:
    """How many times faster each variant is than each one before it."""
    names = list(medians)
    return [
        {
            "measure": measure,
            "variant": name,
            "baseline": baseline,
            "ratio": compute_ratio(medians[baseline][measure], medians[name][measure]),
        }
        for index, name in enumerate(names)
        for baseline in names[:index]
        for measure in _MEASURES
    ]


def _compute_memory_ratios(memory: Memory) -> list[dict[str, Any]]:
    """How many times as much memory a variant takes as TRL's trainer."""
    baseline = memory.get(STOCK, {})
    return [
        {"measure": measure, "variant": name, "baseline": STOCK, "ratio": (own[measure] or 0) / theirs}
        for measure, theirs in baseline.items()
        for name, own in memory.items()
        if theirs and name != STOCK
    ]


def _compute_least_ratio(rows: dict[str, list[Row]]) -> dict[str, Any] | None:
    """The worst step of `auto` after the first: its tokens per second beside those of `off` in the same step."""
    if not {"off", "auto"} <= rows.keys():
        return None
    pairs = list(zip(rows["off"], rows["auto"], strict=True))
    ratio = min(auto["tokens_per_s"] / off["tokens_per_s"] for off, auto in pairs[1:] or pairs)
    return {"measure": "tokens_per_s", "variant": "auto", "baseline": "off", "ratio": ratio}


def _print(result: dict[str, Any], console: Console) -> None:
    settled = describe_settled(result["settings"]["steps"])
    table = Table(title=f"medians over training steps, {settled}", title_justify="left")
    table.add_column("variant")
    for heading in (
        "generation\ns",
        "update\ns",
        "step\ns",
        "tokens/s",
        "ms/token",
        "length",
        "accepted",
        "memory\nGiB",
    ):
        table.add_column(heading, justify="right")
    for name, own in result["medians"].items():
        seconds = [f"{own[key]:.2f}" for key in ("generation_s", "update_s", "step_s")]
        rates = [f"{own['tokens_per_s']:.1f}", f"{1000 * own['s_per_token']:.2f}", f"{own['mean_length']:.0f}"]
        acceptance = "-" if parse_variant(name).kind == STOCK else f"{own['acceptance_length']:.2f}"
        table.add_row(name, *seconds, *rates, acceptance, _describe_memory(result["peak_memory"][name]))
    console.print(table)
    console.print(_build_phase_table(result["phases"]))
    for entry in result["ratios"]:
        what = "as much" if entry["measure"].endswith("bytes") else "faster"
        line = f"{entry['measure']}: {entry['variant']} {entry['ratio']:.2f} times {what} vs {entry['baseline']}"
        console.print(line, highlight=False)
    least = result["least_step_ratio"]
    if least is not None:
        console.print(f"tokens_per_s: auto {least['ratio']:.2f} of off in its worst step", highlight=False)


def _describe_memory(memory: dict[str, int | None]) -> str:
    """The host's, or a GPU's and what PyTorch had set aside of it."""
    known = [memory[name] for name in ("gpu_bytes", "gpu_reserved_bytes") if memory[name]] or [memory["rss_bytes"]]
    return " of ".join(f"{(num_bytes or 0) / 2**30:.1f}" for num_bytes in known)


def _build_phase_table(phases: dict[str, dict[str, float]]) -> Table:
    table = Table(title="seconds of each phase, means over the same steps", title_justify="left")
    table.add_column("phase")
    for name in phases:
        table.add_column(name.replace(":", "\n"), justify="right")
    for phase in next(iter(phases.values())):
        if any(own[phase] for own in phases.values()):
            table.add_row(phase, *(f"{own[phase]:.2f}" for own in phases.values()))
    table.add_row("all", *(f"{sum(own.values()):.2f}" for own in phases.values()))
    return table
