"""`fastgrpo bench drafters`: drafters side by side on one workload, and what a draft costs each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from fastgrpo.bench.acceptance import summarise_acceptance
from fastgrpo.bench.measure import (
    RolloutResult,
    choose_turn_tokens,
    compute_median,
    describe_run,
    interleave,
    match_rates,
    measure_rollout,
)
from fastgrpo.data import build_task_dataset
from fastgrpo.engine import Engine
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.options import DraftersOptions
from fastgrpo.report import say, write_json
from fastgrpo.types import SamplingParams, SpeculationPlan, StepRecord

OFF = "off"
_PLAN = SpeculationPlan(depth=4, width=3, num_draft_tokens=8)
_LEVELS = tuple(SpeculationPlan(depth=depth, width=3, num_draft_tokens=max(depth, 8)) for depth in (1, 2, 3, 4))
_COST_BATCHES = (1, 8, 32)
_COST_TOKENS, _COST_WARMUP = 48, 4  # tokens of a costed rollout, and its first steps that are left out

Row = dict[str, Any]


def run_drafters_bench(options: DraftersOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results; returns them.

    Each drafter keeps its state over the rollouts, which are of the same prompts with other noise: epochs.

    Raises:
        ValueError: the model, a drafter or the task cannot be used.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    model = opened.model
    chats = build_task_dataset(options.task, size=max(options.num_prompts, *_COST_BATCHES), seed=options.seed)["prompt"]
    distinct = encode_prompts(opened.tokenizer, chats)
    prompts = [ids for ids in distinct[: options.num_prompts] for _ in range(options.num_generations)]
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        stop_token_ids=opened.stop_token_ids,
    )
    rows: list[Row] = []
    result = describe_run(command, dataclasses.asdict(options)) | {"drafters": rows}

    def keep() -> None:  # what there is, should the rest not come
        if options.output is not None:
            write_json(result, options.output, indent=1)

    for name in options.drafters:
        rows.append({"drafter": name, "by_epoch": _measure_acceptance(model, name, prompts, params, options)})
        keep()
    for name, row in zip(options.drafters, rows, strict=True):
        row["draft_cost"] = [_measure_cost(model, name, distinct[:count], options) for count in _COST_BATCHES]
        keep()
    for row, speed in zip(rows, _measure_speed(model, prompts, params, options), strict=True):
        row |= speed
    keep()
    console.print(_build_table(rows))
    console.print(_build_cost_table(rows))
    if options.output is not None:
        say(console, f"written: {options.output}")
    return result


def _measure_acceptance(
    model: PreTrainedModel, name: str, prompts: list[list[int]], params: SamplingParams, options: DraftersOptions
) -> list[Row]:
    """Acceptance with one plan at every step, so that drafters are given the same number of nodes."""
    engine = Engine(model, drafter=name, speculation=_PLAN, max_num_seqs=options.max_num_seqs)
    epochs = []
    for epoch in range(options.epochs):
        measure_rollout(engine, prompts, dataclasses.replace(params, seed=options.seed + epoch))
        nodes = sum(record.num_tokens for record in engine.records) / sum(record.num_seqs for record in engine.records)
        epochs.append(summarise_acceptance(engine.records) | {"nodes_per_sequence": nodes})
    return epochs


def _measure_cost(model: PreTrainedModel, name: str, prompts: list[list[int]], options: DraftersOptions) -> Row:
    """Milliseconds of a draft of each depth, and of a plain target forward, with these sequences live."""
    params = SamplingParams(temperature=options.temperature, max_tokens=_COST_TOKENS, seed=options.seed)
    plain = _measure_steps(Engine(model, drafter="none", max_num_seqs=len(prompts)), prompts, params)
    target_ms = 1000 * compute_median(record.target_s for record in plain)
    drafts = []
    for plan in _LEVELS:
        engine = Engine(model, drafter=name, speculation=plan, max_num_seqs=len(prompts))
        steps = _measure_steps(engine, prompts, params)
        drafts.append(1000 * compute_median(record.draft_s for record in steps))
    return {
        "num_seqs": len(prompts),
        "target_ms": target_ms,
        "draft_ms_by_depth": drafts,
        "share_of_target": drafts[-1] / target_ms,
    }


def _measure_steps(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[StepRecord]:
    """Steps with all sequences live, the first ones left out, of a second rollout."""
    for _ in range(2):
        engine.generate(prompts, params)
    full = [record for record in engine.records if record.num_seqs == len(prompts)]
    return full[_COST_WARMUP:] or full


def _measure_speed(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, options: DraftersOptions
) -> list[Row]:
    """Rollouts as they are run, plans by `auto`, in turn with plain decoding."""
    engines = {OFF: Engine(model, drafter="none", speculation=OFF, max_num_seqs=options.max_num_seqs)}
    engines |= {name: Engine(model, drafter=name, max_num_seqs=options.max_num_seqs) for name in options.drafters}
    for engine in engines.values():  # calibration and first touches: not measured
        measure_rollout(engine, prompts, dataclasses.replace(params, seed=options.seed + options.epochs))
    results = interleave(
        engines,
        prompts,
        lambda repeat: dataclasses.replace(params, seed=options.seed + repeat),
        options.epochs,
        turn_tokens=choose_turn_tokens(engines[OFF]),
    )
    return [_describe_speed(results[name], results[OFF]) for name in options.drafters]


def _describe_speed(own: list[RolloutResult], plain: list[RolloutResult]) -> Row:
    records, baseline = ([record for result in each for record in result.records] for each in (own, plain))
    return {
        "tokens_per_s": compute_median(result.tokens_per_s for result in own),
        "ratio_to_off": compute_median(a.tokens_per_s / b.tokens_per_s for a, b in zip(own, plain, strict=True)),
        "matched_ratio_to_off": match_rates(records, baseline).gain,
        "share_speculating": sum(not record.plan.is_plain for record in records) / len(records),
    }


def _build_table(rows: list[Row]) -> Table:
    title = f"{_PLAN.num_draft_tokens} nodes (depth {_PLAN.depth}), and rollouts with plans by auto"
    table = Table(title=title, title_justify="left")
    table.add_column("drafter")
    for heading in ("acceptance length, epoch 1", "last epoch", "tokens/s", "x off", "x off, as many live"):
        table.add_column(heading, justify="right")
    for row in rows:
        lengths = (f"{row['by_epoch'][i]['acceptance_length']:.2f}" for i in (0, -1))
        ratios = (f"{row['ratio_to_off']:.2f}", f"{row['matched_ratio_to_off']:.2f}")
        table.add_row(row["drafter"], *lengths, f"{row['tokens_per_s']:.0f}", *ratios)
    return table


def _build_cost_table(rows: list[Row]) -> Table:
    table = Table(title="ms of a draft by depth, of a plain target forward, and their ratio", title_justify="left")
    table.add_column("drafter")
    for heading in ("live", *(f"depth {plan.depth}" for plan in _LEVELS), "target", f"depth {_LEVELS[-1].depth} / it"):
        table.add_column(heading, justify="right")
    for row in rows:
        for cost in row["draft_cost"]:
            drafts = (f"{ms:.1f}" for ms in cost["draft_ms_by_depth"])
            shares = (f"{cost['target_ms']:.1f}", f"{cost['share_of_target']:.2f}")
            table.add_row(row["drafter"], str(cost["num_seqs"]), *drafts, *shares)
    return table
