"""`fastgrpo generate`: completions of a model, by the engine alone."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from fastgrpo.data import load_prompts
from fastgrpo.disk import written_whole
from fastgrpo.engine import Engine
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.metrics import summarise_rollout
from fastgrpo.options import GenerateOptions
from fastgrpo.types import Completion, SamplingParams


def run_generate(options: GenerateOptions) -> None:
    """Print the completions, a closing line, and write `options.output` where it is given.

    Raises:
        ValueError: a prompt, the model or a setting cannot be used; nothing has been generated.
        OSError: a file is missing or cannot be written.
    """
    console = Console(highlight=False)
    params = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    prompts = [prompt for prompt in _read_prompts(options) for _ in range(options.num_generations)]
    quiet_libraries()
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    encoded = encode_prompts(opened.tokenizer, prompts, raw=options.raw)
    engine = Engine(
        opened.model,
        drafter=options.drafter,
        speculation=options.speculation,
        max_num_seqs=options.max_num_seqs,
        tokenizer=opened.tokenizer,
    )
    started = time.perf_counter()
    params = dataclasses.replace(params, stop_token_ids=opened.stop_token_ids)
    completions = engine.generate(encoded, params)
    generation_s = time.perf_counter() - started - engine.planning.profile_s
    rows = [_build_row(opened.tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
    if options.output is not None:  # first: whoever reads what is printed may have left
        with written_whole(options.output) as unfinished:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _print(rows, console)
    console.print(_build_closing_line(engine, rows, generation_s), style="bold", soft_wrap=True)
    if options.output is not None:
        console.print(f"written: {options.output}", markup=False, soft_wrap=True)


def _read_prompts(options: GenerateOptions) -> list[Any]:
    if options.prompts is None:
        return list(options.prompt)
    return list(load_prompts(options.prompts, skip_broken=options.skip_broken)["prompt"])


def _build_row(tokenizer: Any, prompt: Any, completion: Completion) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completion": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        "finish_reason": completion.finish_reason,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
    }


def _print(rows: Iterable[dict[str, Any]], console: Console) -> None:
    for index, row in enumerate(rows):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        console.rule(f"{index + 1}: {len(row['token_ids'])} tokens, {row['finish_reason']}", align="left")
        console.print(prompt, style="dim", markup=False)
        console.print(row["completion"], markup=False)
    console.rule()


def _build_closing_line(engine: Engine, rows: list[dict[str, Any]], generation_s: float) -> str:
    summary = summarise_rollout(engine.records, rollout_s=generation_s)
    calibration = f"; calibrated once in {engine.planning.profile_s:.1f} s" if engine.planning.profile_s >= 0.05 else ""
    return (
        f"{len(rows)} completions, {summary.num_tokens_emitted} tokens in {generation_s:.2f} s: "
        f"{summary.tokens_per_s:.1f} tokens/s, acceptance length {summary.acceptance_length:.2f} tokens per sequence "
        f"and forward (drafter {engine.drafter.name}, speculation {engine.planning.name}){calibration}"
    )
