"""`fastgrpo bench budget`: draft tokens shared among all sequences, beside as many for each of them."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgrpo.bench.measure import describe_run
from fastgrpo.bench.steady import Progress, SteadyRollout, SteadyWorkload
from fastgrpo.engine import Engine
from fastgrpo.loading import open_model, quiet_libraries
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import BudgetOptions, parse_plan
from fastgrpo.report import GREY, PALETTE, RED, say, write_json

UNIFORM, SHARED = "uniform", "shared"
MOST_DIFFERENCE = 0.02  # of verified tokens a sequence, between the two
_NUM_RESAMPLES = 400  # of the bootstrap
_COUNTS = ("num_tokens", "num_forwards")

Row = dict[str, Any]
Pair = tuple[Progress, Progress]  # one request, with uniform trees and with a shared budget


def run_budget_bench(options: BudgetOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results and a plot; returns them.

    Both ways verify as many tokens and are given the same requests in turn; drafting costs are not compared.

    Raises:
        ValueError: the model, the drafter or the task cannot be used.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    workload = SteadyWorkload.build(
        opened, options, tokens_per_seq=options.tokens_per_seq, min_tokens=options.min_tokens
    )
    engines = {}
    for shape in options.plans:
        plan = parse_plan(shape)
        shared = dataclasses.replace(plan, most_draft_tokens=options.most * plan.num_draft_tokens)
        engines[shape] = {
            way: Engine(opened.model, drafter=options.drafter, speculation=used)
            for way, used in ((UNIFORM, plan), (SHARED, shared))
        }
    shapes: list[Row] = []
    rows: list[Row] = []
    skipped: list[Row] = []
    result: dict[str, Any] = {}
    for num_seqs in options.concurrency:
        for shape, pair in engines.items():
            if num_seqs * (1 + parse_plan(shape).num_draft_tokens) > options.max_num_tokens:
                skipped.append({"num_seqs": num_seqs, "plan": shape})
                continue
            shapes.append(_measure(pair, workload, num_seqs, shape, options))
            say(console, _describe(shapes[-1]))
        rows = choose_best(shapes)
        found = {"rows": rows, "shapes": shapes, "skipped": skipped}
        result = describe_run(command, dataclasses.asdict(options)) | found
        if options.output is not None:  # what there is, should the rest not come
            write_json(result, options.output, indent=1)
    console.print(_build_table(rows))
    for left_out in skipped:
        console.print(f"left out with {left_out['num_seqs']} live: {left_out['plan']}, too many tokens a forward")
    if options.output is not None:
        plot_budget(rows, options.output.with_suffix(".png"))
        say(console, f"written: {options.output} and a plot beside it")
    return result


def _measure(
    engines: dict[str, Engine], workload: SteadyWorkload, num_seqs: int, shape: str, options: BudgetOptions
) -> Row:
    rollouts: dict[str, list[SteadyRollout]] = {way: [] for way in engines}
    for repeat in range(options.repeats):
        for way, rollout in workload.roll_out(engines, num_seqs, options.seed + repeat).items():
            rollouts[way].append(rollout)
    return {"num_seqs": num_seqs, "plan": shape} | compare(rollouts[UNIFORM], rollouts[SHARED])


def compare(uniform: Sequence[SteadyRollout], shared: Sequence[SteadyRollout]) -> Row:
    """Acceptance length either way, its gain with a standard error, and how far the verified tokens differ.

    The gain is of the requests that both ways saw, each in the steps that did not end it; its error is a bootstrap
    over them.
    """
    pairs = [
        (one.progress[request], other.progress[request])
        for one, other in zip(uniform, shared, strict=True)
        for request in one.progress.keys() & other.progress.keys()
    ]
    verified = [_count_drafts(rollouts) for rollouts in (uniform, shared)]
    return {
        "acceptance_length": {UNIFORM: _compute_length(uniform), SHARED: _compute_length(shared)},
        "gain": compute_gain(pairs),
        "gain_error": compute_gain_error(pairs),
        "draft_tokens": {UNIFORM: verified[0], SHARED: verified[1]},
        "verified_difference": (1 + verified[1]) / (1 + verified[0]) - 1,
        "num_requests": len(pairs),
        "num_forwards": sum(pair[0].num_forwards for pair in pairs),
    }


def _count_drafts(rollouts: Sequence[SteadyRollout]) -> float:
    """Draft tokens verified for each sequence and forward."""
    records = [record for rollout in rollouts for record in rollout.records]
    num_forwards = sum(record.num_seqs for record in records)
    return compute_ratio(sum(record.num_tokens for record in records) - num_forwards, num_forwards)


def _compute_length(rollouts: Sequence[SteadyRollout]) -> float:
    records = [record for rollout in rollouts for record in rollout.records]
    return compute_ratio(sum(record.num_emitted for record in records), sum(record.num_seqs for record in records))


def compute_gain(pairs: Sequence[Pair]) -> float:
    """Acceptance length with a shared budget over that with uniform trees, less one."""
    tokens, forwards = ([sum(getattr(pair[way], name) for pair in pairs) for way in (0, 1)] for name in _COUNTS)
    return compute_ratio(tokens[1] * forwards[0], forwards[1] * tokens[0]) - 1


def compute_gain_error(pairs: Sequence[Pair]) -> float | None:
    """Standard error of `compute_gain`, from requests drawn again with replacement; None for fewer than two."""
    if len(pairs) < 2:
        return None
    draws = random.Random(0)
    return statistics.stdev(compute_gain(draws.choices(pairs, k=len(pairs))) for _ in range(_NUM_RESAMPLES))


def choose_best(shapes: Sequence[Row]) -> list[Row]:
    """For each concurrency and number of draft tokens, the plan that is best with uniform trees.

    The gain is that plan's own; a plan chosen for what it gains would gain by luck. `best_shared` is the plan that is
    best with a shared budget, which may be another.
    """
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in shapes:
        groups.setdefault((row["num_seqs"], parse_plan(row["plan"]).num_draft_tokens), []).append(row)
    rows = []
    for (_, num_draft_tokens), group in groups.items():
        best, shared = (max(group, key=lambda row: row["acceptance_length"][way]) for way in (UNIFORM, SHARED))
        best_shared = {"plan": shared["plan"], "acceptance_length": shared["acceptance_length"][SHARED]}
        rows.append(best | {"num_draft_tokens": num_draft_tokens, "best_shared": best_shared})
    return rows


def verifies_as_many(row: Row) -> bool:
    """Whether both ways verified as many tokens, so that the gain counts."""
    return bool(abs(row["verified_difference"]) <= MOST_DIFFERENCE)


def _show_gain(row: Row) -> str:
    error = "" if row["gain_error"] is None else f" +- {100 * row['gain_error']:.1f}"
    return f"{100 * row['gain']:+.1f}{error}"


def _describe(row: Row) -> str:
    lengths, difference = row["acceptance_length"], row["verified_difference"]
    unequal = "" if verifies_as_many(row) else " (NOT as many: the gain does not count)"
    return (
        f"{row['num_seqs']} live, {row['plan']}: {lengths[UNIFORM]:.3f} uniform, {lengths[SHARED]:.3f} shared, gain "
        f"{_show_gain(row)} %; verified tokens {difference:+.1%}{unequal}"
    )


def _build_table(rows: Sequence[Row]) -> Table:
    title = "tokens a sequence and forward, as many draft tokens: shared beside uniform"
    table = Table(title=title, title_justify="left")
    for heading in ("live", "drafts", "plan", "uniform", "shared", "gain, %", "best shared", "verified"):
        table.add_column(heading, justify="right")
    for row in rows:
        lengths = (f"{row['acceptance_length'][way]:.3f}" for way in (UNIFORM, SHARED))
        counts = (str(row["num_seqs"]), str(row["num_draft_tokens"]), row["plan"])
        best = f"{row['best_shared']['acceptance_length']:.3f} {row['best_shared']['plan']}"
        verified = f"{row['verified_difference']:+.1%}"
        mark = "" if verifies_as_many(row) else " [red]<>[/]"
        table.add_row(*counts, *lengths, _show_gain(row), best, verified + mark)
    return table


def plot_budget(rows: Sequence[Row], path: Path) -> None:
    """Gain by live sequences, a line for each number of draft tokens; bars are standard errors. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    unequal: list[tuple[float, float]] = []
    budgets = sorted({row["num_draft_tokens"] for row in rows})
    for place, budget in enumerate(budgets):
        own = [row for row in rows if row["num_draft_tokens"] == budget]
        shift = 1.03 ** (place - len(budgets) / 2)  # so that the bars stand side by side
        axes.errorbar(
            [row["num_seqs"] * shift for row in own],
            [100 * row["gain"] for row in own],
            yerr=[100 * (row["gain_error"] or 0.0) for row in own],
            color=PALETTE[place % len(PALETTE)],
            marker="o",
            capsize=2,
            label=f"{budget} draft token{'s' if budget > 1 else ''} a sequence",
        )
        unequal += [(row["num_seqs"] * shift, 100 * row["gain"]) for row in own if not verifies_as_many(row)]
    if unequal:
        axes.plot(
            *zip(*unequal, strict=True), "x", color=RED, markersize=11, zorder=4, label="NOT as many: does not count"
        )
    concurrency = sorted({row["num_seqs"] for row in rows})
    axes.axhline(0, color=GREY, linestyle=":", linewidth=1.5, label="as many for each sequence")
    axes.set_xticks(concurrency, [str(count) for count in concurrency])
    axes.minorticks_off()
    axes.set_xlabel("live sequences")
    axes.set_ylabel("gain in acceptance length by sharing, %\n(bars: standard errors)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
