"""`fastgrpo bench plans`: what `auto` loses to the best fixed plan, by live sequences."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from fastgrpo.bench.measure import compute_median, describe_run
from fastgrpo.bench.steady import SteadyWorkload, compute_rate
from fastgrpo.engine import Engine
from fastgrpo.loading import open_model, quiet_libraries
from fastgrpo.metrics import compute_ratio, summarise_rollout
from fastgrpo.options import PlansOptions, name_plan, parse_plan
from fastgrpo.report import BLUE, GREEN, GREY, RED, say, write_json
from fastgrpo.types import StepRecord

AUTO, PLAIN = "auto", "off"
LEAST_OF_BEST, LEAST_OF_PLAIN = 0.95, 0.98  # of the best fixed plan's tokens/s, and of plain decoding's
MOST_PLAN_SHARE, MOST_PLAN_MS, MANY_SEQS = 0.01, 0.2, 64  # of a step; and milliseconds with so many sequences
_LITTLE = 0.02  # of the time, that recording may take before it is said
_WARM_UP_SHARE = 0.2  # of a measured rollout, for what has nothing to learn

Row = dict[str, Any]


def run_plans_bench(options: PlansOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results and a plot; returns them.

    At each concurrency all plans take short turns on the same requests. Steps count in which exactly so many sequences
    were live and no prompt was computed. `auto` keeps what it learns from one concurrency to the next.

    Raises:
        ValueError: the model, the drafter or the task cannot be used.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    workload = SteadyWorkload.build(
        opened, options, tokens_per_seq=options.tokens_per_seq, min_tokens=options.min_tokens
    )
    engines = _build_engines(opened.model, options)
    rows: list[Row] = []
    result: dict[str, Any] = {}
    for num_seqs in options.concurrency:
        rows.append(_measure(engines, workload, num_seqs, options))
        say(console, _describe(rows[-1]))
        result = describe_run(command, dataclasses.asdict(options)) | {"rows": rows, "verdicts": judge(rows)}
        if options.output is not None:  # what there is, should the rest not come
            write_json(result, options.output, indent=1)
    console.print(_build_table(rows))
    console.print(_build_grid_table(rows))
    console.print(_build_planning_table(rows))
    say(console, "\n".join(result["verdicts"]))
    if options.output is not None:
        plot_plans(rows, options.output.with_suffix(".png"))
        say(console, f"written: {options.output} and a plot beside it")
    return result


def _build_engines(model: PreTrainedModel, options: PlansOptions) -> dict[str, Engine]:
    """Plain decoding (no drafter, no features), each fixed plan, and `auto`; the model is shared."""
    fixed = {shape: Engine(model, drafter=options.drafter, speculation=parse_plan(shape)) for shape in options.plans}
    return {PLAIN: Engine(model, drafter="none"), **fixed, AUTO: Engine(model, drafter=options.drafter)}


def _measure(engines: dict[str, Engine], workload: SteadyWorkload, num_seqs: int, options: PlansOptions) -> Row:
    skipped = [s for s in options.plans if num_seqs * (1 + parse_plan(s).num_draft_tokens) > options.max_num_tokens]
    arms = {name: engine for name, engine in engines.items() if name not in skipped}
    for name, engine in arms.items():  # calibration, first touches, and what auto learns: not measured
        for turn in range(options.warmups if name == AUTO else 1):
            seed = options.seed + options.repeats + turn
            workload.warm_up(engine, num_seqs, seed, share=1.0 if name == AUTO else _WARM_UP_SHARE)
    rollouts: dict[str, list[list[StepRecord]]] = {name: [] for name in arms}
    for repeat in range(options.repeats):
        for name, rollout in workload.roll_out(arms, num_seqs, options.seed + repeat).items():
            rollouts[name].append(rollout.records)
    return describe_concurrency(num_seqs, rollouts) | {"skipped": skipped}


def describe_concurrency(num_seqs: int, rollouts: dict[str, list[list[StepRecord]]]) -> Row:
    """What each plan made of its steps, and `auto` beside the best of the others and beside plain decoding.

    Plans share the turns of a rollout, and with them what else the machine did: they are compared within each rollout,
    and the medians of those ratios count.

    On a GPU each rollout records anew what it replays then, which would be a small part of a longer one: rates without
    those steps stand beside the others, as `steady_*`.

    The best of many is best by luck as well: `auto_to_best_chosen_apart` holds each of auto's rollouts against the plan
    that is best in the other repeats.

    Args:
        rollouts: steps by plan and repeat, `auto` and `off` among them.
    """
    arms = {name: _describe_arm(each) for name, each in rollouts.items()}
    others = [name for name in arms if name != AUTO]

    def compare(ours: str, theirs: str) -> list[float]:
        rates = (arms[name]["each_tokens_per_s"] for name in (ours, theirs))
        return [compute_ratio(one, other) for one, other in zip(*rates, strict=True)]

    for name, arm in arms.items():
        arm["over_plain"] = compute_median(compare(name, PLAIN))
        arm["steady_over_plain"] = compute_ratio(arm["steady_tokens_per_s"], arms[PLAIN]["steady_tokens_per_s"])
    best = max(others, key=lambda name: arms[name]["over_plain"])
    best_steady = max(others, key=lambda name: arms[name]["steady_over_plain"])
    to_best, to_plain = compare(AUTO, best), compare(AUTO, PLAIN)
    return {
        "num_seqs": num_seqs,
        "best": best,
        "auto_to_best": compute_median(to_best),
        "auto_to_best_chosen_apart": _compare_apart(rollouts, others),
        "auto_to_plain": compute_median(to_plain),
        "steady_best": best_steady,
        "steady_auto_to_best": compute_ratio(
            arms[AUTO]["steady_tokens_per_s"], arms[best_steady]["steady_tokens_per_s"]
        ),
        "each_auto_to_best": to_best,
        "each_auto_to_plain": to_plain,
        "arms": arms,
    }


def _compare_apart(rollouts: dict[str, list[list[StepRecord]]], others: list[str]) -> float | None:
    """Tokens/s of `auto` over those of the plan that the other repeats name; None with one repeat."""
    repeats = range(len(rollouts[AUTO]))
    if len(repeats) < 2:
        return None
    chosen: list[StepRecord] = []
    for repeat in repeats:
        elsewhere = {
            name: compute_rate(_join(rollouts[name][other] for other in repeats if other != repeat)) for name in others
        }
        chosen += rollouts[max(others, key=elsewhere.__getitem__)][repeat]
    return compute_ratio(compute_rate(_join(rollouts[AUTO])), compute_rate(chosen))


def _join(rollouts: Any) -> list[StepRecord]:
    return list(itertools.chain.from_iterable(rollouts))


def _describe_arm(rollouts: list[list[StepRecord]]) -> Row:
    records = _join(rollouts)
    steps_s = sum(record.step_s - record.prefill_s for record in records)
    summary = summarise_rollout(records, rollout_s=steps_s)
    plan_s = sum(record.plan_s for record in records)
    shapes = Counter(name_plan(record.plan) for record in records)
    each = [compute_rate(rollout) for rollout in rollouts]
    steady = [record for record in records if record.is_steady]
    steady_s = sum(record.step_s - record.prefill_s for record in steady)
    return {
        "steady_tokens_per_s": compute_rate(steady) if steady else 0.0,
        "recording_share": 1 - compute_ratio(steady_s, steps_s),
        "tokens_per_s": compute_median(each),  # over the rollouts: a second that stood still is in one of them
        "each_tokens_per_s": each,
        "acceptance_length": summary.acceptance_length,
        "mean_draft_tokens": summary.mean_draft_tokens,
        "share_speculating": summary.share_speculating,
        "num_steps": summary.num_steps,
        "step_ms": 1000 * compute_ratio(steps_s, len(records)),
        "plan_ms": 1000 * compute_ratio(plan_s, len(records)),
        "plan_share": compute_ratio(plan_s, steps_s),
        "share_by_plan": {shape: count / len(records) for shape, count in shapes.most_common()},
    }


def judge(rows: Sequence[Row]) -> list[str]:
    """The laws in a sentence each: met, or where not and by how much."""
    return [
        _judge(
            f"auto makes at least {LEAST_OF_BEST} of the best plan's tokens/s",
            [f"{r['auto_to_best']:.3f} at {r['num_seqs']}" for r in rows if not r["auto_to_best"] >= LEAST_OF_BEST],
        ),
        _judge(
            f"auto makes at least {LEAST_OF_PLAIN} of plain decoding's tokens/s",
            [f"{r['auto_to_plain']:.3f} at {r['num_seqs']}" for r in rows if not r["auto_to_plain"] >= LEAST_OF_PLAIN],
        ),
        _judge(
            f"planning takes less than {MOST_PLAN_SHARE:.0%} of a step",
            [
                f"{r['arms'][AUTO]['plan_share']:.2%} at {r['num_seqs']}"
                for r in rows
                if not r["arms"][AUTO]["plan_share"] < MOST_PLAN_SHARE
            ],
        ),
        _judge(
            f"planning takes less than {MOST_PLAN_MS} ms with {MANY_SEQS} live sequences",
            [
                f"{r['arms'][AUTO]['plan_ms']:.2f} ms at {r['num_seqs']}"
                for r in rows
                if r["num_seqs"] == MANY_SEQS and not r["arms"][AUTO]["plan_ms"] < MOST_PLAN_MS
            ],
            is_measured=any(r["num_seqs"] == MANY_SEQS for r in rows),
        ),
    ]


def _judge(law: str, misses: list[str], *, is_measured: bool = True) -> str:
    if not is_measured:
        return f"{law}: not measured"
    return f"{law}: MISSED, {', '.join(misses)}" if misses else f"{law}: met"


def _describe(row: Row) -> str:
    left_out = f"; left out, too many tokens a forward: {', '.join(row['skipped'])}" if row["skipped"] else ""
    auto = row["arms"][AUTO]
    if auto["recording_share"] > _LITTLE:
        left_out += (
            f"; {auto['recording_share']:.0%} of auto's time went to recording, without which it makes "
            f"{row['steady_auto_to_best']:.3f} of {row['steady_best']} and {auto['steady_over_plain']:.3f} of plain"
        )
    return (
        f"{row['num_seqs']} live: best {row['best']}, auto {row['auto_to_best']:.3f} of it and "
        f"{row['auto_to_plain']:.3f} of plain{left_out}"
    )


def _build_table(rows: Sequence[Row]) -> Table:
    table = Table(title="tokens/s with a constant number of live sequences", title_justify="left")
    for heading in ("live", "plain", "best", "auto", "x best", "chosen apart", "x plain", "tokens a forward", "drafts"):
        table.add_column(heading, justify="right")
    for row in rows:
        auto, best, apart = row["arms"][AUTO], row["arms"][row["best"]], row["auto_to_best_chosen_apart"]
        table.add_row(
            str(row["num_seqs"]),
            f"{row['arms'][PLAIN]['tokens_per_s']:.1f}",
            f"{best['tokens_per_s']:.1f} {row['best']}",
            f"{auto['tokens_per_s']:.1f}",
            _mark(row["auto_to_best"], LEAST_OF_BEST),
            "-" if apart is None else f"{apart:.3f}",
            _mark(row["auto_to_plain"], LEAST_OF_PLAIN),
            f"{auto['acceptance_length']:.2f}",
            f"{auto['mean_draft_tokens']:.1f}",
        )
    return table


def _build_grid_table(rows: Sequence[Row]) -> Table:
    table = Table(title="tokens/s of each plan over plain decoding's, by live sequences", title_justify="left")
    table.add_column("plan")
    for row in rows:
        table.add_column(str(row["num_seqs"]), justify="right")
    for name in dict.fromkeys(name for row in rows for name in row["arms"] if name != PLAIN):
        cells = [f"{compute_rise(row, name):.2f}" if name in row["arms"] else "-" for row in rows]
        table.add_row(name, *cells)
    return table


def compute_rise(row: Row, name: str) -> float:
    """Tokens/s of a plan as a multiple of plain decoding's."""
    return float(row["arms"][name]["over_plain"])


def _mark(ratio: float, least: float) -> str:
    return f"{ratio:.3f}" if ratio >= least else f"[red]{ratio:.3f} <[/]"


def _build_planning_table(rows: Sequence[Row]) -> Table:
    table = Table(title="what planning takes, and the plans of auto", title_justify="left")
    for heading in ("live", "step, ms", "planning, ms", "share"):
        table.add_column(heading, justify="right")
    table.add_column("plans (share of the steps)")
    for row in rows:
        auto = row["arms"][AUTO]
        plans = ", ".join(f"{shape} {share:.0%}" for shape, share in list(auto["share_by_plan"].items())[:4])
        planning = (f"{auto['step_ms']:.1f}", f"{auto['plan_ms']:.3f}", f"{auto['plan_share']:.2%}")
        table.add_row(str(row["num_seqs"]), *planning, plans)
    return table


def plot_plans(rows: Sequence[Row], path: Path) -> None:
    """Tokens/s over plain decoding's by live sequences: each fixed plan, the best of them, `auto`. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8.5, 5.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    concurrency = [row["num_seqs"] for row in rows]
    shapes = dict.fromkeys(name for row in rows for name in row["arms"] if name not in (AUTO, PLAIN))
    for shape in shapes:
        points = [(row["num_seqs"], compute_rise(row, shape)) for row in rows if shape in row["arms"]]
        axes.plot(*zip(*points, strict=True), color=GREY, alpha=0.45, linewidth=1, marker=".", zorder=1)
    axes.plot([], [], color=GREY, alpha=0.45, marker=".", label="one plan (depth x width x draft tokens)")
    best, own = ([compute_rise(row, name or row["best"]) for row in rows] for name in (None, AUTO))
    axes.plot(concurrency, best, color=GREEN, linestyle="--", label="the best of them and of plain decoding")
    axes.plot(concurrency, own, color=BLUE, linewidth=2.8, marker="o", label="auto, and its share of the best")
    for row, top, bottom in zip(rows, best, own, strict=True):
        texts = ((row["best"], max(bottom, top), 9, GREEN), (f"{row['auto_to_best']:.2f}", min(bottom, top), -17, BLUE))
        for text, height, offset, colour in texts:
            axes.annotate(
                text, (row["num_seqs"], height), xytext=(0, offset), textcoords="offset points", ha="center",
                fontsize=9, color=colour,
            )  # fmt: skip
    axes.axhline(1, color=RED, linestyle=":", linewidth=1.4, label="plain decoding")
    axes.set_xticks(concurrency, [str(count) for count in concurrency])
    axes.minorticks_off()
    axes.set_xlabel("live sequences")
    axes.set_ylabel("tokens/s, as a multiple of plain decoding's")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
