"""`fastgrpo bench rollout`: the engine alone, its ways to speculate in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from fastgrpo.bench.measure import (
    RolloutResult,
    break_down,
    choose_turn_tokens,
    compute_equal_share,
    compute_median,
    describe_run,
    interleave,
    match_rates,
    measure_rollout,
)
from fastgrpo.data import build_task_dataset
from fastgrpo.drafters import Drafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_files import find_shipped_head, load_head
from fastgrpo.engine import Engine
from fastgrpo.learner import Learner
from fastgrpo.loading import Opened, encode_prompts, open_model, quiet_libraries
from fastgrpo.memory import describe_bytes
from fastgrpo.metrics import compute_ratio
from fastgrpo.model import TargetModel
from fastgrpo.options import RolloutOptions, parse_speculation
from fastgrpo.planner import SPECULATION, AutoPlanner
from fastgrpo.report import plot_rollout, say, write_json
from fastgrpo.types import SamplingParams

BASELINE, SHOWN = "off", "auto"


def run_rollout_bench(options: RolloutOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results; returns them.

    Raises:
        ValueError: the model, the drafter or the task cannot be used.
    """
    console = Console()
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    model = opened.model
    warmup, prompts, params = _build_requests(options, opened)
    taught, learned = _warm_up(options, model, warmup, params)
    engines = {name: _build_engine(options, model, name, taught) for name in options.speculation}

    def build_params(repeat: int) -> SamplingParams:
        return dataclasses.replace(params, seed=options.seed + repeat)

    turn_tokens = choose_turn_tokens(next(iter(engines.values())))
    # calibration, auto's own acceptance, and first touches of as much memory as all take together: not measured
    interleave(engines, prompts, lambda _: build_params(options.repeats), 1, turn_tokens=turn_tokens)
    result = describe_run(command, dataclasses.asdict(options)) | {"warmup": learned}

    def keep(results: dict[str, list[RolloutResult]]) -> None:
        result["workload"] = _describe_workload(next(iter(results.values())), params.max_tokens)
        result["variants"] = {name: _describe_variant(name, results) for name in results}
        result["comparison"] = compare_variants(result["variants"])
        if options.output is not None:
            write_json(result, options.output, indent=1)

    results = interleave(engines, prompts, build_params, options.repeats, turn_tokens=turn_tokens, on_repeat=keep)
    _print(result, console)
    if options.output is not None:
        say(console, f"written: {options.output}")
        if SHOWN in results:
            picture = options.output.with_name(f"{options.output.stem}-{SHOWN}.png")
            _plot(results, engines[SHOWN], picture, options)
            say(console, f"written: {picture}")
    return result


def _build_requests(
    options: RolloutOptions, opened: Opened
) -> tuple[list[list[list[int]]], list[list[int]], SamplingParams]:
    """Prompts of each warm-up rollout, the measured ones, and how they are sampled."""
    assert options.max_tokens is not None  # set by the record itself
    count = options.num_prompts
    dataset = build_task_dataset(options.task, size=count * (1 + options.warmup_steps), seed=options.seed)
    encoded = encode_prompts(opened.tokenizer, dataset["prompt"])
    rollouts = [
        [ids for ids in encoded[start : start + count] for _ in range(options.num_generations)]
        for start in range(0, len(encoded), count)
    ]
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        stop_token_ids=opened.stop_token_ids,
    )
    return rollouts[1:], rollouts[0], params


def _build_engine(
    options: RolloutOptions, model: PreTrainedModel, speculation: str, taught: EagleDrafter | None
) -> Engine:
    """The variant's engine; plain decoding keeps no features either, it is as good as we have it."""
    drafter: str | Drafter = options.drafter
    if speculation == BASELINE:
        drafter = "none"
    elif taught is not None:
        drafter = EagleDrafter(TargetModel(model), head=taught.head)
        drafter.acceptance = taught.acceptance
    return Engine(model, drafter=drafter, speculation=parse_speculation(speculation), max_num_seqs=options.max_num_seqs)


def _warm_up(
    options: RolloutOptions, model: PreTrainedModel, rollouts: list[list[list[int]]], params: SamplingParams
) -> tuple[EagleDrafter | None, list[dict[str, float]]]:
    """The drafter whose head all variants share, after it has learnt on rollouts of other prompts."""
    if options.drafter not in ("eagle", "eagle-new"):
        return None, []
    drafter = open_drafter(options, TargetModel(model))
    engine = Engine(model, drafter=drafter, max_num_seqs=options.max_num_seqs)
    assert isinstance(engine.drafter, EagleDrafter)
    learner = Learner(engine.drafter, seed=options.seed)
    engine.on_finish.append(learner.add)
    learned = []
    for step, prompts in enumerate(rollouts, start=1):
        result = measure_rollout(engine, prompts, dataclasses.replace(params, seed=options.seed - step))
        report = learner.learn(options.warmup_learn_s)
        emitted, forwards = (sum(getattr(r, name) for r in result.records) for name in ("num_emitted", "num_seqs"))
        learned.append({"loss": report.loss, "learn_s": report.learn_s, "acceptance_length": emitted / forwards})
    return engine.drafter, learned


def open_drafter(options: RolloutOptions, target: TargetModel) -> str | Path | Drafter:
    """The drafter asked for, its draft vocabulary cut to what is asked for."""
    size = options.draft_vocab_size
    if size is None:
        return options.head or options.drafter
    if options.drafter == "eagle-new":
        return EagleDrafter(target, draft_vocab_size=size)
    folder = options.head or find_shipped_head(target)
    if folder is None:
        raise ValueError(
            "draft_vocab_size cuts the vocabulary of a saved head, and none ships for this model: name one"
        )
    head = load_head(folder, target)
    head.keep_frequent(size)
    if head.draft_vocab_size > size:
        raise ValueError(
            f"the head in {folder} drafts from {head.draft_vocab_size} tokens and does not say which {size} of them "
            "are the most frequent; heads of `fastgrpo draft train --compact` do"
        )
    return EagleDrafter(target, head=head)


def _describe_workload(results: Sequence[RolloutResult], max_tokens: int) -> dict[str, float]:
    lengths = sorted(len(ids) for result in results for ids in result.token_ids)
    mean = sum(lengths) / len(lengths)
    return {
        "num_completions": len(lengths),
        "mean_length": mean,
        "median_length": compute_median(lengths),
        "max_length": lengths[-1],
        "max_tokens": max_tokens,
        "cap_over_mean": max_tokens / mean,
    }


def _describe_variant(name: str, results: dict[str, list[RolloutResult]]) -> dict[str, Any]:
    own, baseline = results[name], results.get(BASELINE)
    records = list(chain.from_iterable(result.records for result in own))
    described: dict[str, Any] = {
        "generation_s": compute_median(result.generation_s for result in own),
        "tokens_per_s": compute_median(result.tokens_per_s for result in own),
        "acceptance_length": compute_ratio(
            sum(record.num_emitted for record in records), sum(record.num_seqs for record in records)
        ),
        "cache_peak_bytes": max(record.cache_bytes for record in records),
        "num_preempted": sum(record.num_preempted for record in records),
        "each": [{"generation_s": result.generation_s, "num_tokens": result.num_tokens} for result in own],
    }
    steps = None if baseline is None else list(chain.from_iterable(result.records for result in baseline))
    described["by_concurrency"] = break_down(records, steps)
    if baseline is not None and steps is not None:
        pairs = zip(own, baseline, strict=True)
        described[f"ratio_to_{BASELINE}"] = compute_median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
        described[f"share_equal_to_{BASELINE}"] = compute_equal_share(own, baseline)
        described[f"matched_ratio_to_{BASELINE}"] = match_rates(records, steps).gain
    return described


def compare_variants(variants: Mapping[str, Any]) -> dict[str, Any]:
    """The best fixed plan, and `auto` beside the best of all others by median tokens/s; None where there is none.

    Completions part where rounding decides, so that whole rollouts are of other tokens: `auto_to_best_matched` holds
    the gains over plain decoding with as many live sequences against each other, where it took its turn.
    """

    def choose(names: Iterable[str]) -> str | None:
        return max(names, key=lambda name: variants[name]["tokens_per_s"], default=None)

    best = choose(name for name in variants if name != SHOWN)
    compared: dict[str, Any] = {
        "best_fixed": choose(name for name in variants if name not in SPECULATION),
        "best_other": best,
        "auto_to_best": None,
        "auto_to_best_each": [],
        "auto_to_best_matched": None,
    }
    if best is None or SHOWN not in variants:
        return compared
    own, other = variants[SHOWN], variants[best]
    ratios = [
        (a["num_tokens"] / a["generation_s"]) / (b["num_tokens"] / b["generation_s"])
        for a, b in zip(own["each"], other["each"], strict=True)
    ]
    compared |= {"auto_to_best": compute_median(ratios), "auto_to_best_each": ratios}
    key = f"matched_ratio_to_{BASELINE}"
    if key in own and key in other:
        compared["auto_to_best_matched"] = compute_ratio(own[key], other[key])
    return compared


def _plot(results: dict[str, list[RolloutResult]], engine: Engine, path: Path, options: RolloutOptions) -> None:
    """A picture of the last rollout of `auto`, with plain decoding's of the same requests where it took its turn."""
    shown, plain = results[SHOWN][-1], results.get(BASELINE)
    planner = engine.planner
    plot_rollout(
        shown.records,
        path,
        title=f"{len(shown.token_ids)} completions of {options.task}, {shown.num_tokens} tokens, speculation {SHOWN}",
        plain=plain[-1].records if plain else (),
        capacity=planner.profile.capacity if isinstance(planner, AutoPlanner) else None,
    )


def _print(result: dict[str, Any], console: Console) -> None:
    load = result["workload"]
    console.print(
        f"{load['num_completions']} completions, {load['mean_length']:.0f} tokens in the mean, "
        f"{load['max_length']} at most; the cap of {load['max_tokens']} is {load['cap_over_mean']:.1f} times the mean",
        highlight=False,
    )
    table = Table(title="rollouts, medians", title_justify="left")
    compared_headings = (f"x vs {BASELINE}", "matched", f"= {BASELINE}")
    for heading in ("speculation", "tokens/s", "seconds", "acceptance length", *compared_headings):
        table.add_column(heading, justify="left" if heading == "speculation" else "right")
    for name, own in result["variants"].items():
        compared = _show_comparison(own)
        speed = (f"{own['tokens_per_s']:.1f}", f"{own['generation_s']:.2f}", f"{own['acceptance_length']:.2f}")
        table.add_row(name, *speed, *compared)
    console.print(table)
    peaks = (f"{name} {describe_bytes(own['cache_peak_bytes'])}" for name, own in result["variants"].items())
    say(console, f"cache in use at most: {', '.join(peaks)}")
    console.print(_build_concurrency_table(result["variants"]))
    if line := _describe_comparison(result["comparison"]):
        say(console, line)


def _describe_comparison(compared: dict[str, Any]) -> str:
    parts = [f"best fixed plan: {compared['best_fixed']}"] if compared["best_fixed"] else []
    if compared["auto_to_best"] is not None:
        each = " ".join(f"{ratio:.2f}" for ratio in compared["auto_to_best_each"])
        parts.append(
            f"{SHOWN} makes {compared['auto_to_best']:.3f} of {compared['best_other']}, the best other ({each})"
        )
    if compared["auto_to_best_matched"] is not None:
        parts.append(f"{compared['auto_to_best_matched']:.3f} with as many live sequences")
    return "; ".join(parts)


def _show_comparison(own: dict[str, Any]) -> tuple[str, str, str]:
    """Whole rollouts, steps with as many live sequences, share of equal completions; each against the baseline."""
    if f"ratio_to_{BASELINE}" not in own:
        return "-", "-", "-"
    ratio, matched = own[f"ratio_to_{BASELINE}"], own[f"matched_ratio_to_{BASELINE}"]
    return f"{ratio:.2f}", f"{matched:.2f}", f"{own[f'share_equal_to_{BASELINE}']:.0%}"


def _show_bucket(row: dict[str, float]) -> str:
    gain = f" {row['gain']:.2f}x" if "gain" in row else ""
    return f"{row['tokens_per_s']:.1f} ({row['nodes_per_sequence']:.1f}){gain}"


def _build_concurrency_table(variants: dict[str, Any]) -> Table:
    """Tokens per second of each variant by live sequences, with the nodes it gave each of them."""
    table = Table(title="tokens/s (nodes per sequence), x vs plain, by live sequences", title_justify="left")
    table.add_column("live", justify="right")
    for name in variants:
        table.add_column(name, justify="right")
    rows = {name: {int(row["num_seqs"]): row for row in own["by_concurrency"]} for name, own in variants.items()}
    for least in sorted({least for own in rows.values() for least in own}, reverse=True):
        cells = (own.get(least) for own in rows.values())
        shown = [_show_bucket(cell) if cell else "-" for cell in cells]
        table.add_row(f"{least}-{2 * least - 1}" if least > 1 else "1", *shown)
    return table
