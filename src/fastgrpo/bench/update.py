"""`fastgrpo bench update`: the update alone, of TRL's trainer and of ours, on the same rows in turn."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgrpo.bench.e2e import compute_phases, describe_settled, train_in_turn
from fastgrpo.bench.measure import compute_median, describe_run
from fastgrpo.bench.training import STOCK
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import UpdateOptions
from fastgrpo.report import say, write_json

_PHASES = ("forward", "backward", "optimiser")


def run_update_bench(options: UpdateOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results; returns them.

    Raises:
        ValueError: a setting does not fit the model.
        RuntimeError: a variant failed.
    """
    console = Console()
    origin = describe_run(command, dataclasses.asdict(options))
    rows, _, memory = train_in_turn(options, console, origin)
    variants = {
        name: {
            "update_s": compute_median(row["update_s"] for row in own[1:] or own),
            "each_update_s": [row["update_s"] for row in own],
            "phases": compute_phases(own),
            "peak_bytes": memory[name]["gpu_bytes"] or memory[name]["rss_bytes"],
        }
        for name, own in rows.items()
    }
    result = origin | {
        "workload": _describe_workload(options, next(iter(rows.values()))[-1]),
        "variants": variants,
        "ratios": _compare(variants),
    }
    if options.output is not None:
        write_json(result, options.output, indent=1)
    console.print(_build_table(result))
    if options.output is not None:
        say(console, f"written: {options.output}")
    return result


def _describe_workload(options: UpdateOptions, row: dict[str, Any]) -> dict[str, float]:
    return {
        "num_rows": options.prompts_per_step * options.num_generations,
        "prompt_length": options.prompt_length,
        "mean_completion_length": row["mean_length"],
        "max_completion_length": row["max_length"],
        "equal_groups": options.equal_groups,
    }


def _compare(variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Against TRL's trainer and, where savings are switched off, against the variant before all that were."""
    names = list(variants)
    ours = next((name for name in names if name != STOCK), None)
    pairs = [(name, STOCK) for name in names if STOCK in names and name != STOCK]
    pairs += [(name, ours) for name in names if ours is not None and name not in (STOCK, ours)]
    return [
        {
            "variant": name,
            "baseline": baseline,
            "update": compute_ratio(variants[baseline]["update_s"], variants[name]["update_s"]),
            "peak_memory": compute_ratio(variants[name]["peak_bytes"], variants[baseline]["peak_bytes"]),
        }
        for name, baseline in pairs
    ]


def _build_table(result: dict[str, Any]) -> Table:
    load = result["workload"]
    table = Table(
        title=f"update of {load['num_rows']} rows: prompts of {load['prompt_length']} tokens, completions of "
        f"{load['mean_completion_length']:.0f} in the mean, {load['max_completion_length']} at most; medians of the "
        f"update, means of its phases, over steps, {describe_settled(result['settings']['steps'])}",
        title_justify="left",
    )
    table.add_column("variant")
    for heading in (
        "update\ns",
        *(f"{phase}\ns" for phase in _PHASES),
        "peak\nGiB",
        "faster than\nTRL",
        "memory\nof TRL's",
    ):
        table.add_column(heading, justify="right")
    beside = {entry["variant"]: entry for entry in result["ratios"] if entry["baseline"] == STOCK}
    for name, own in result["variants"].items():
        seconds = [f"{own['phases'][phase]:.2f}" for phase in _PHASES]
        ratios = (
            [f"{beside[name]['update']:.2f}x", f"{beside[name]['peak_memory']:.2f}"] if name in beside else ["", ""]
        )
        peak = f"{own['peak_bytes'] / 2**30:.2f}"
        table.add_row(name.replace(":", "\n"), f"{own['update_s']:.2f}", *seconds, peak, *ratios)
    return table
