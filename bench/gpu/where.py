"""Where a step's time goes on this device: the parts of steps by plan, and what kernels and calls take.

`python bench/gpu/where.py --model runs/8b --drafter runs/8b/head --output docs/results/gpu-8b-where.json --tables
runs/where`. The medians are of steps that are left alone; PyTorch's profiler and cProfile look at others of the same
rollout, and their tables go to a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from limits import build_parser, describe, finish, run_bench

from fastgrpo import Engine, SamplingParams, SpeculationPlan
from fastgrpo.loading import open_model, quiet_libraries
from fastgrpo.types import StepRecord

_PLANS = {
    "plain": SpeculationPlan(),
    "3x1x3": SpeculationPlan(depth=3, width=1, num_draft_tokens=3),
    "3x3x8": SpeculationPlan(depth=3, width=3, num_draft_tokens=8),
}
_PARTS = ("step_s", "prefill_s", "draft_s", "target_s", "verify_s", "plan_s")
_PROFILED = 4  # steps that a profiler looks at
_LINES = 40  # of a table


def measure_plan(model: Any, plan: SpeculationPlan, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of steady steps of `rows` sequences, none of which ends."""
    draw = torch.Generator().manual_seed(rows)
    prompts = torch.randint(model.config.vocab_size, (rows, options.context), generator=draw).tolist()
    engine = Engine(model, drafter=options.drafter, speculation=plan, max_num_seqs=rows)
    params = SamplingParams(max_tokens=(1 + plan.depth) * (2 * options.steps + 2 * _PROFILED))
    with contextlib.closing(engine.roll_out(engine.take_requests(prompts, params))) as steps:
        taken = [next(steps) for _ in range(options.steps)]
        steady = [record for record in taken[options.steps // 2 :] if record.is_steady]
        if options.tables is not None:
            write_tables(steps, options.tables / f"{rows}-{plan.depth}x{plan.width}x{plan.num_draft_tokens}.txt")
    assert steady, f"none of {options.steps} steps was steady"
    found = {name: statistics.median(getattr(record, name) for record in steady) for name in _PARTS}
    return found | {"acceptance_length": statistics.fmean(record.acceptance_length for record in steady)}


def write_tables(steps: Iterator[StepRecord], path: Path) -> None:
    """What some steps launch, and what they call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as launched:
        for _ in range(_PROFILED):
            next(steps)
    calls, called = cProfile.Profile(), io.StringIO()
    calls.enable()
    for _ in range(_PROFILED):
        next(steps)
    calls.disable()
    for order in ("tottime", "cumtime"):
        pstats.Stats(calls, stream=called).sort_stats(order).print_stats(_LINES)
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = launched.key_averages().table(sort_by=order, row_limit=_LINES, max_name_column_width=70)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{table}\n{called.getvalue()}")


def main() -> None:
    parser = build_parser("Take steps apart.")
    parser.add_argument("--model", required=True, help="a folder of bench/grow.py, a hub id, or 'demo'")
    parser.add_argument("--drafter", default="eagle-new", help="eagle, eagle-new or a folder with a head")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt, which are random")
    parser.add_argument("--steps", type=int, default=60, help="steps of each plan, the first half left out")
    parser.add_argument("--tables", type=Path, help="folder for what kernels and calls take")
    options = parser.parse_args()
    if options.tiny:
        options.context, options.steps = min(options.context, 32), 12
    quiet_libraries()
    model = open_model(options.model, dtype="bfloat16", device=options.device).model
    found: dict[str, dict[str, Any]] = {}
    for rows in (1, 2) if options.tiny else (1, 8, 64):
        for name, plan in _PLANS.items():
            found[f"{name} of {rows}"] = parts = measure_plan(model, plan, rows, options)
            print(f"{name} of {rows}:", "  ".join(f"{part} {1e3 * parts[part]:.2f} ms" for part in _PARTS))
    finish(describe(options) | {"plans": found}, options)


if __name__ == "__main__":
    run_bench(main)
