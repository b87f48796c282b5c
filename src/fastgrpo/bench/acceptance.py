"""`fastgrpo bench acceptance`: one head, its drafts ranked with the target's own noise and without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from fastgrpo.bench.measure import describe_run
from fastgrpo.data import build_task_dataset
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.engine import Engine
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import AcceptanceOptions
from fastgrpo.report import BLUE, GREY, say, write_json
from fastgrpo.types import SamplingParams, SpeculationPlan, StepRecord

PLANS = tuple(
    SpeculationPlan(depth=depth, width=width, num_draft_tokens=nodes)
    for depth, width, nodes in ((2, 1, 2), (3, 2, 4), (4, 3, 8), (5, 4, 16), (5, 8, 32))
)
SHARED, WITHOUT = "shared", "without"  # noise that drafts are ranked with

_LABELS = {SHARED: "ranked with the target's noise", WITHOUT: "ranked without noise"}


def run_acceptance_bench(options: AcceptanceOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results and a plot; returns them.

    Both rankings draft for the same completions: the law of sampling does not care what is drafted.

    Raises:
        ValueError: the model, the head or a task cannot be used.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    model = opened.model
    engine = Engine(model, drafter=options.drafter, speculation=PLANS[0], max_num_seqs=options.max_num_seqs)
    drafter = engine.drafter
    if not isinstance(drafter, HeadDrafter):
        raise ValueError(f"only drafts of a head are ranked with noise or without; got drafter={options.drafter}")
    rows = []
    for task in options.task:
        chats = build_task_dataset(task, size=options.num_prompts, seed=options.seed)["prompt"]
        prompts = encode_prompts(opened.tokenizer, chats)
        for temperature in options.temperature:
            params = SamplingParams(
                temperature=temperature,
                max_tokens=options.max_tokens,
                stop_token_ids=opened.stop_token_ids,
                seed=options.seed,
            )
            for plan in PLANS:
                row = {"task": task, "temperature": temperature, **dataclasses.asdict(plan)}
                for ranking in (SHARED, WITHOUT):
                    if temperature == 0 and ranking == WITHOUT:
                        row[ranking] = row[SHARED]  # there is no noise
                        continue
                    drafter.ranks_with_noise = ranking == SHARED
                    row[ranking] = measure_plan(model, drafter, plan, prompts, params, options.max_num_seqs)
                row["ratio"] = compute_ratio(row[SHARED]["acceptance_length"], row[WITHOUT]["acceptance_length"])
                rows.append(row)
                console.print(_describe(row), highlight=False, markup=False)
    result = describe_run(command, dataclasses.asdict(options)) | {"rows": rows}
    if options.output is not None:
        write_json(result, options.output, indent=1)
    console.print(_build_table(rows))
    if options.output is not None:
        plot_acceptance(rows, options.output.with_suffix(".png"))
        say(console, f"written: {options.output} and a plot beside it")
    return result


def measure_plan(
    model: PreTrainedModel,
    drafter: HeadDrafter[Any],
    plan: SpeculationPlan,
    prompts: list[list[int]],
    params: SamplingParams,
    max_num_seqs: int,
) -> dict[str, Any]:
    """Acceptance of one rollout with this plan at every step; chances are taken as the drafter says them."""
    drafter.calibration = Calibration()
    engine = Engine(model, drafter=drafter, speculation=plan, max_num_seqs=max_num_seqs)
    engine.generate(prompts, params)
    return summarise_acceptance(engine.records)


def summarise_acceptance(records: Iterable[StepRecord]) -> dict[str, Any]:
    """Acceptance length of speculating steps, and the share of walked nodes at each depth whose child was right."""
    steps = [record for record in records if not record.plan.is_plain]
    forwards = sum(record.num_seqs for record in steps)
    depth = max((len(record.offered) for record in steps), default=0)
    walked = [sum(record.offered[d][0] for record in steps if len(record.offered) > d) for d in range(depth)]
    hits = [sum(sum(record.hits[d]) for record in steps if len(record.hits) > d) for d in range(depth)]
    return {
        "acceptance_length": compute_ratio(sum(record.num_emitted for record in steps), forwards),
        "by_depth": [compute_ratio(hit, count) for hit, count in zip(hits, walked, strict=True)],
        "num_forwards": forwards,
    }


def _describe(row: dict[str, Any]) -> str:
    lengths = ", ".join(f"{row[ranking]['acceptance_length']:.2f} {label}" for ranking, label in _LABELS.items())
    return f"{row['task']}, T = {row['temperature']:g}, {row['num_draft_tokens']} nodes: {lengths}"


def _build_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="acceptance length (tokens a sequence and forward)", title_justify="left")
    table.add_column("task")
    for heading in ("T", "depth", "width", "nodes", "shared noise", "without", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        shape = (f"{row['temperature']:g}", *(str(row[key]) for key in ("depth", "width", "num_draft_tokens")))
        lengths = (f"{row[ranking]['acceptance_length']:.2f}" for ranking in (SHARED, WITHOUT))
        table.add_row(row["task"], *shape, *lengths, f"{row['ratio']:.2f}x")
    return table


def plot_acceptance(rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance length against draft tokens, one panel for each task and temperature. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    tasks, temperatures = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "temperature"))
    size = (4 * len(temperatures), 3.2 * len(tasks))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    panels = figure.subplots(len(tasks), len(temperatures), squeeze=False, sharex=True, sharey=True)
    for line, task in zip(panels, tasks, strict=True):
        for axes, temperature in zip(line, temperatures, strict=True):
            own = [row for row in rows if (row["task"], row["temperature"]) == (task, temperature)]
            nodes = [row["num_draft_tokens"] for row in own]
            for ranking, colour, style in ((SHARED, BLUE, "-"), (WITHOUT, GREY, "--")):
                lengths = [row[ranking]["acceptance_length"] for row in own]
                axes.plot(nodes, lengths, style, color=colour, marker="o", label=_LABELS[ranking])
            axes.set_xscale("log", base=2)
            axes.set_xticks(nodes, [str(count) for count in nodes])
            axes.set_title(f"{task}, T = {temperature:g}", loc="left", fontsize=10)
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("tokens a sequence\nand forward")
    for axes in panels[-1]:
        axes.set_xlabel("draft tokens a sequence")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
