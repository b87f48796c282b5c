"""Tables about a run: its start beside its end, a step by its phases, and each baseline beside this run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastgrpo.metrics import compute_phase_times, compute_ratio
from fastgrpo.report.history import Baseline, LogRow, RunHistory, compute_mean, read_number

NUM_COMPARED_STEPS = 3  # training steps at each end of the summary


def format_number(value: float) -> str:
    """Three digits that count, or a dash for what was not measured."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_summary(history: RunHistory, console: Console) -> None:
    """Print the start of a run beside its end, a step by its phases, and each baseline beside this run.

    Raises:
        ValueError: a baseline has no name.
    """
    rows = history.training_rows
    first, last = rows[:NUM_COMPARED_STEPS], rows[-NUM_COMPARED_STEPS:]
    table = Table(title=f"{len(rows)} training steps", title_justify="left")
    table.add_column("mean of")
    for heading in (f"first {len(first)} steps", f"last {len(last)} steps", "last / first"):
        table.add_column(heading, justify="right")
    for label, key in (
        ("reward", "reward"),
        ("acceptance length (tokens / sequence / forward)", "rollout/spec_accept_length"),
        ("first draft token accepted (share)", "rollout/spec_first_draft_rate"),
        ("rollout speed (tokens/s)", "rollout/tokens_per_s"),
        ("completion length (tokens)", "completions/mean_length"),
        ("training step (s)", "step_time"),
        ("rollout (s)", "time/rollout_s"),
    ):
        before, after = (compute_mean([read_number(row, key) for row in part]) for part in (first, last))
        table.add_row(label, *(format_number(value) for value in (before, after, compute_ratio(after, before))))
    console.print(table)
    if history.timelines:
        console.print(_phase_table(history))
    if history.meta.get("baseline"):
        console.print(_baseline_table(history.meta["baseline"], last))


def _phase_table(history: RunHistory) -> Table:
    """What the first and the last step did, in seconds."""
    steps = sorted(history.timelines)
    table = Table(title="A step by its phases, in seconds", title_justify="left")
    table.add_column("phase")
    for step in steps:
        table.add_column(f"step {step}", justify="right")
    parts = [compute_phase_times(history.timelines[step]) for step in steps]
    for phase in parts[0]:
        if any(part[phase] for part in parts):
            table.add_row(phase, *(f"{part[phase]:.2f}" for part in parts))
    table.add_row("all", *(f"{history.timelines[step].step_s:.2f}" for step in steps))
    return table


def _baseline_table(baselines: Sequence[Baseline], last: Sequence[LogRow]) -> Table:
    """One line for each thing measured on both sides. A speed-up above 1 means this run is faster."""
    keys = {"generation_s": "time/rollout_s", "tokens_per_s": "rollout/tokens_per_s", "step_s": "step_time"}
    labels = {"generation_s": "generation (s)", "tokens_per_s": "generation (tokens/s)", "step_s": "training step (s)"}
    from_training = {name: compute_mean([read_number(row, key) for row in last]) for name, key in keys.items()}
    table = Table(title="Measured speed-up", title_justify="left")
    for heading in ("measure", "baseline", "this run", "speed-up", "note"):
        table.add_column(heading, justify="right" if heading in ("baseline", "this run") else "left")
    for entry in baselines:
        if not entry.get("name"):
            raise ValueError(f"each baseline needs a name to be compared by, got {entry}")
        ours: LogRow = entry.get("ours", from_training)
        note = entry.get("note") or ("" if "ours" in entry else f"against the last {len(last)} training steps")
        for measure, label in labels.items():
            theirs, mine = read_number(entry, measure), read_number(ours, measure)
            ratio = compute_ratio(mine, theirs) if measure == "tokens_per_s" else compute_ratio(theirs, mine)
            if math.isfinite(ratio):
                speed_up = escape(f"{ratio:.2f}x vs {entry['name']}")
                table.add_row(label, format_number(theirs), format_number(mine), speed_up, escape(note))
    return table
