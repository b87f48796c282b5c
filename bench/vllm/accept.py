"""Greedy acceptance length of a chain: `python bench/vllm/accept.py ours|vllm PROMPTS.json HEAD OUTPUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DEPTH, MAX_TOKENS = 3, 128


def measure_ours(work: dict[str, Any], head: str) -> dict[str, Any]:
    from fastgrpo import Engine, SamplingParams
    from fastgrpo.types import SpeculationPlan

    plan = SpeculationPlan(depth=DEPTH, width=1, num_draft_tokens=DEPTH)
    engine = Engine.from_pretrained(work["model"], dtype="bfloat16", drafter=head, speculation=plan)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=tuple(work["stop_token_ids"]))
    completions = engine.generate(work["prompts"], params)
    steps = [record for record in engine.records if not record.plan.is_plain]
    drafts = sum(record.num_seqs for record in steps)
    accepted = [sum(sum(r.hits[d]) for r in steps if len(r.hits) > d) / drafts for d in range(DEPTH)]
    return _describe(accepted, drafts, [completion.token_ids for completion in completions])


def measure_vllm(work: dict[str, Any], head: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=work["model"],
        dtype="bfloat16",
        max_model_len=1024,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": head, "num_speculative_tokens": DEPTH},
    )
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=work["stop_token_ids"])
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in work["prompts"]], params)
    drafts, accepted = 0, [0] * DEPTH
    for metric in engine.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts += metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = [a + b for a, b in zip(accepted, metric.values, strict=True)]
    return _describe([count / drafts for count in accepted], drafts, [list(o.outputs[0].token_ids) for o in outputs])


def _describe(accepted: list[float], drafts: int, token_ids: list[list[int]]) -> dict[str, Any]:
    return {"acceptance_length": 1 + sum(accepted), "by_depth": accepted, "num_drafts": drafts, "token_ids": token_ids}


def main() -> None:
    engine, prompts, head, output = sys.argv[1:]
    measure = {"ours": measure_ours, "vllm": measure_vllm}[engine]
    result = {"engine": engine, "depth": DEPTH, **measure(json.loads(Path(prompts).read_text()), head)}
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "token_ids"})


if __name__ == "__main__":
    main()
