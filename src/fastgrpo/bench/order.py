"""`fastgrpo bench order`: what it gains to begin with the longest completions, on a skewed workload."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgrpo.bench.measure import RolloutResult, compute_median, describe_run, draw_orders, measure_rollout
from fastgrpo.data import build_task_dataset
from fastgrpo.engine import Engine
from fastgrpo.lengths import LengthPredictor
from fastgrpo.loading import Opened, encode_prompts, open_model, quiet_libraries
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import OrderOptions, parse_speculation
from fastgrpo.report import BLUE, GREEN, GREY, say, write_json
from fastgrpo.types import SamplingParams

ARRIVAL, KIN, EPOCH = "order of arrival", "lengths of other prompts", "lengths of an earlier epoch"
TRUE = "true lengths"  # as if they were known
_NUM_ARRIVALS = 200  # orders of arrival that steps are counted for
_COLOURS = {ARRIVAL: GREY, KIN: GREEN, EPOCH: BLUE}


def run_order_bench(options: OrderOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results and a plot; returns them.

    One engine rolls out the same requests with nothing known of their lengths, with what other prompts of the same
    tasks taught, and with what one earlier rollout of the same prompts taught, in turns of random order. They arrive in
    another order in each repeat.

    A few rollouts of some seconds hide gains of a few percent, so the steps that plain decoding takes are counted, too,
    from the lengths that came out, over many orders of arrival: where a step costs the same whatever is live, as on a
    GPU, their ratio is the gain.

    Raises:
        ValueError: the model, the drafter or a task cannot be used.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    groups, others = _build_groups(options, opened)
    engine = Engine(
        opened.model,
        drafter="none" if options.speculation == "off" else options.drafter,
        speculation=parse_speculation(options.speculation),
        max_num_seqs=options.max_num_seqs,
    )
    params = SamplingParams(
        temperature=options.temperature, max_tokens=options.max_tokens, stop_token_ids=opened.stop_token_ids
    )
    # neither is measured: they teach lengths, and the planner
    known: dict[str, dict[str, Any]] = {ARRIVAL: LengthPredictor().state_dict()}
    for way, taught in ((KIN, others), (EPOCH, groups)):
        engine.scheduler.lengths = LengthPredictor()
        seed = options.seed + options.repeats
        measure_rollout(engine, _shuffle(taught, seed), dataclasses.replace(params, seed=seed))
        known[way] = engine.scheduler.lengths.state_dict()
    results: dict[str, list[RolloutResult]] = {way: [] for way in known}
    result = describe_run(command, dataclasses.asdict(options))
    orders = itertools.islice(draw_orders(results), 1, 1 + options.repeats)  # the first is as given
    for repeat, turns in enumerate(orders):
        seed = options.seed + repeat
        for way in turns:
            engine.scheduler.lengths = LengthPredictor.from_state(known[way])
            results[way].append(measure_rollout(engine, _shuffle(groups, seed), dataclasses.replace(params, seed=seed)))
        result["workload"] = _describe_workload(results[ARRIVAL])
        result["plain_steps"] = _count_plain_steps(results[ARRIVAL], groups, known, options)
        result["ways"] = {
            way: _describe_way(own, results[ARRIVAL], options.max_num_seqs) for way, own in results.items()
        }
        if options.output is not None:  # what there is, should the rest not come
            write_json(result, options.output, indent=1)
    console.print(_build_table(result, options.max_num_seqs))
    if options.output is not None:
        _plot(results, options.output.with_suffix(".png"), options)
        say(console, f"written: {options.output} and a plot beside it")
    return result


def _build_groups(options: OrderOptions, opened: Opened) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Siblings of each prompt, of all tasks; and as many of other prompts."""
    groups: list[list[list[int]]] = []
    others: list[list[list[int]]] = []
    for task, count in zip(options.tasks, options.num_prompts, strict=True):
        chats = build_task_dataset(task, size=2 * count, seed=options.seed)["prompt"]
        siblings = [[ids] * options.num_generations for ids in encode_prompts(opened.tokenizer, chats)]
        groups += siblings[:count]
        others += siblings[count:]
    return groups, others


def _shuffle(groups: list[list[list[int]]], seed: int) -> list[list[int]]:
    """Requests in a random order, siblings together."""
    return list(itertools.chain.from_iterable(random.Random(seed).sample(groups, len(groups))))


def _describe_workload(results: Sequence[RolloutResult]) -> dict[str, float]:
    lengths = [len(ids) for result in results for ids in result.token_ids]
    mean = sum(lengths) / len(lengths)
    return {
        "num_completions": len(results[0].token_ids),
        "mean_length": mean,
        "median_length": compute_median(lengths),
        "max_length": max(lengths),
        "max_over_mean": max(lengths) / mean,
    }


def count_steps(lengths: Iterable[int], num_slots: int) -> int:
    """Steps of plain decoding until the last of these completions ends, where they are admitted in this order."""
    ends = [0] * num_slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _count_plain_steps(
    results: Sequence[RolloutResult],
    groups: list[list[list[int]]],
    known: Mapping[str, dict[str, Any]],
    options: OrderOptions,
) -> dict[str, float]:
    """By who goes first, in the mean over repeats and `_NUM_ARRIVALS` orders of arrival of each one's completions."""
    draws, size, counts = random.Random(options.seed), options.num_generations, dict.fromkeys((*known, TRUE), 0)
    predictors = {way: LengthPredictor.from_state(state) for way, state in known.items() if way != ARRIVAL}
    for repeat, result in enumerate(results):
        requests = _shuffle(groups, options.seed + repeat)
        lengths = [len(ids) for ids in result.token_ids]
        starts = range(0, len(requests), size)  # of siblings
        expected = {way: {at: own.predict(requests[at]) for at in starts} for way, own in predictors.items()}
        for _ in range(_NUM_ARRIVALS):
            arrived = draws.sample(starts, len(starts))
            orders = {way: sorted(arrived, key=own.__getitem__, reverse=True) for way, own in expected.items()}
            for way, order in (orders | {ARRIVAL: arrived}).items():
                each = itertools.chain.from_iterable(lengths[at : at + size] for at in order)
                counts[way] += count_steps(each, options.max_num_seqs)
        counts[TRUE] += _NUM_ARRIVALS * count_steps(sorted(lengths, reverse=True), options.max_num_seqs)
    return {way: count / (len(results) * _NUM_ARRIVALS) for way, count in counts.items()}


def _describe_way(own: Sequence[RolloutResult], arrival: Sequence[RolloutResult], max_num_seqs: int) -> dict[str, Any]:
    """Completions part where rounding decides, so tokens per second are compared, repeat by repeat."""
    records = list(itertools.chain.from_iterable(result.records for result in own))
    ratios = [compute_ratio(a.tokens_per_s, b.tokens_per_s) for a, b in zip(own, arrival, strict=True)]
    return {
        "generation_s": compute_median(result.generation_s for result in own),
        "tokens_per_s": compute_median(result.tokens_per_s for result in own),
        "gain": compute_median(ratios),
        "each_gain": ratios,
        "num_steps": len(records) / len(own),
        "mean_num_seqs": sum(record.num_seqs for record in records) / len(records),
        "share_of_time_full": compute_ratio(
            sum(record.step_s for record in records if record.num_seqs == max_num_seqs),
            sum(record.step_s for record in records),
        ),
        "each": [{"generation_s": result.generation_s, "num_tokens": result.num_tokens} for result in own],
    }


def _build_table(result: Mapping[str, Any], max_num_seqs: int) -> Table:
    load = result["workload"]
    table = Table(
        title=f"{load['num_completions']} completions in {max_num_seqs} slots, {load['mean_length']:.0f} tokens in the "
        f"mean, {load['max_length']} at most; medians of seconds, tokens/s and gain, means of the rest",
        title_justify="left",
    )
    table.add_column("who goes first")
    for heading in ("seconds", "tokens/s", "gain", "each", "steps", "plain steps", "mean live", "time with all slots"):
        table.add_column(heading, justify="right")
    for way, own in result["ways"].items():
        speed = (f"{own['generation_s']:.2f}", f"{own['tokens_per_s']:.1f}", f"{own['gain']:.3f}x")
        each = " ".join(f"{gain:.2f}" for gain in own["each_gain"])
        steps = (f"{own['num_steps']:.0f}", f"{result['plain_steps'][way]:.0f}")
        live = (f"{own['mean_num_seqs']:.1f}", f"{own['share_of_time_full']:.0%}")
        table.add_row(way, *speed, each, *steps, *live)
    table.add_row(TRUE, *["-"] * 5, f"{result['plain_steps'][TRUE]:.0f}", "-", "-")
    return table


def _plot(results: Mapping[str, Sequence[RolloutResult]], path: Path, options: OrderOptions) -> None:
    """Live sequences over time, of the last rollout of each way."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots()
    for way, own in results.items():
        records = own[-1].records
        ends_s = list(itertools.accumulate(record.step_s for record in records))
        label = f"{way}: {ends_s[-1]:.1f} s"
        axes.step(
            [0.0, *ends_s], [records[0].num_seqs, *(r.num_seqs for r in records)], color=_COLOURS[way], label=label
        )
    load = f"{len(results[ARRIVAL][0].token_ids)} completions of {', '.join(options.tasks)}"
    axes.set_title(f"{load} in {options.max_num_seqs} slots")
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel("seconds")
    axes.set_ylabel("live sequences")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
