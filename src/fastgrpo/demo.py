"""`fastgrpo demo`: a small model learns a task while its rollouts are timed beside TRL's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.bench.measure import (
    RolloutResult,
    choose_turn_tokens,
    compute_equal_share,
    compute_median,
    describe_run,
    interleave,
    match_rates,
)
from fastgrpo.bench.training import build_trainer, measure_stock_rollout, select_prompts
from fastgrpo.engine import Engine
from fastgrpo.grpo.reporting import attach_report, write_report
from fastgrpo.loading import quiet_libraries
from fastgrpo.options import DemoOptions
from fastgrpo.report import Baseline, LiveProgress, Measurement, RunHistory
from fastgrpo.types import SamplingParams, StepRecord

STOCK, PLAIN, OURS = "trl", "off", "ours"
STOCK_NAME = "TRL's transformers generation"
PLAIN_NAME = "our engine, speculation off"

Results = dict[str, list[RolloutResult]]


class _MeasureFirst(TrainerCallback):
    """Measures before the first step, when the model is as it will be trained."""

    def __init__(self, measure: Any) -> None:
        self._measure = measure
        self.results: Results = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.results = self._measure()


def run_demo(options: DemoOptions, command: str) -> None:
    """Train, measure before and after, and leave `run.json` and `run.png` in `options.output`.

    Raises:
        ValueError: the task, the model or a setting cannot be used.
        OSError: the folder cannot be written.
    """
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    _say(console, _describe_plan(options))
    trainer = build_trainer(options, variant=options.speculation, steps=options.steps, output_dir=options.output)
    plain = _build_plain_engine(trainer, options)
    prompts = select_prompts(trainer, options.prompts_per_step)

    def measure(engines: dict[str, Engine]) -> Results:
        stock = [measure_stock_rollout(trainer, prompts)]
        ours = interleave(
            engines,
            prompts,
            lambda repeat: _build_params(trainer, options, repeat),
            options.repeats,
            turn_tokens=choose_turn_tokens(trainer.engine),
        )
        return {STOCK: stock, **ours}

    _say(console, "Before training: the same prompts by TRL's generation and by our engine, for comparison ...")
    first = _MeasureFirst(lambda: measure({PLAIN: plain}))
    trainer.add_callback(first)
    progress = LiveProgress(console)
    callback = attach_report(trainer, progress)
    try:
        trainer.train()
    finally:
        progress.stop()  # which gives the terminal back its cursor, also after Ctrl-C
    _say(console, "After training: the same prompts again, with and without speculation ...")
    last = measure({PLAIN: plain, OURS: trainer.engine})
    facts = {"task": options.task, "model": options.model, "baseline": build_baselines(first.results, last)}
    history = RunHistory(
        log_rows=trainer.state.log_history,
        rollouts=callback.rollouts,
        timelines=callback.timelines,
        meta=facts | describe_run(command, dataclasses.asdict(options)),
    )
    write_report(history, Path(options.output), console)
    _say(console, describe_equality(last))


def _describe_plan(options: DemoOptions) -> str:
    count = options.prompts_per_step * options.num_generations
    return (
        f"A language model ({options.model}) will learn {options.task} by GRPO in {options.steps} steps: each step it "
        f"answers {options.prompts_per_step} prompts {options.num_generations} times, and what earns more than the "
        f"others becomes more likely. Its {count} answers of at most {options.max_completion_length} tokens are drawn "
        "by speculative decoding, which changes how fast they come and nothing else. On 2 CPU cores this takes 6 to 11 "
        "minutes; Ctrl-C stops it."
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _build_plain_engine(trainer: Any, options: DemoOptions) -> Engine:
    """Plain decoding of the model that trains."""
    target = trainer.engine.target
    return Engine(
        target.model,
        drafter="none",
        speculation="off",
        max_num_seqs=options.max_num_seqs,
        compute_dtype=target.compute_dtype,
    )


def _build_params(trainer: Any, options: DemoOptions, repeat: int) -> SamplingParams:
    return SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_completion_length,
        stop_token_ids=tuple(trainer.eos_token_ids),
        seed=options.seed + repeat,
    )


def build_baselines(first: Results, last: Results) -> list[Baseline]:
    """What this run is compared with: the same prompts, on the same model at the same time, one entry for each.

    TRL draws other tokens than we do, so only tokens per second are compared with it.
    """
    tail = match_rates(_steps(last[OURS]), _steps(last[PLAIN]), max_num_seqs=_tail_size(last[PLAIN]))
    return [
        Baseline(
            name=f"{STOCK_NAME}, untrained",
            tokens_per_s=_rate(first[STOCK]),
            ours=Measurement(tokens_per_s=_rate(first[PLAIN])),
            note="our engine without speculation: LoRA merged, finished rows leave",
        ),
        Baseline(
            name=f"{STOCK_NAME}, trained",
            tokens_per_s=_rate(last[STOCK]),
            ours=Measurement(tokens_per_s=_rate(last[OURS])),
            note="our engine as it trained",
        ),
        Baseline(
            name=PLAIN_NAME,
            generation_s=_seconds(last[PLAIN]),
            tokens_per_s=_rate(last[PLAIN]),
            ours=Measurement(generation_s=_seconds(last[OURS]), tokens_per_s=_rate(last[OURS])),
            note="trained, the same noise",
        ),
        Baseline(
            name=f"{PLAIN_NAME}, tail",
            tokens_per_s=tail.baseline,
            ours=Measurement(tokens_per_s=tail.own),
            note=f"trained, at most {_tail_size(last[PLAIN])} live sequences, as many in each",
        ),
    ]


def _rate(results: list[RolloutResult]) -> float:
    return compute_median(result.tokens_per_s for result in results)


def _seconds(results: list[RolloutResult]) -> float:
    return compute_median(result.generation_s for result in results)


def _tail_size(results: list[RolloutResult]) -> int:
    """An eighth of the batch: the stragglers all others wait for."""
    return max(1, len(results[0].token_ids) // 8)


def _steps(results: list[RolloutResult]) -> list[StepRecord]:
    return [record for result in results for record in result.records]


def describe_equality(results: Results) -> str:
    """Whether speculation changed what was drawn."""
    share = compute_equal_share(results[OURS], results[PLAIN])
    count = sum(len(result.token_ids) for result in results[OURS])
    if share == 1:
        return f"All {count} completions are the same, token for token, with and without speculation."
    return (
        f"{share:.0%} of {count} completions are the same, token for token, with and without speculation. The others "
        "part where rounding decides between two tokens: a batch of another shape rounds otherwise, most of all in "
        "bfloat16 (dtype float32 all but ends it). Both are drawn from the same distribution."
    )
