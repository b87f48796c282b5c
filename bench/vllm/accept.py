"""Greedy acceptance length of a chain, in our engine and in vLLM.

`python bench/vllm/accept.py ours|vllm PROMPTS.json HEAD OUTPUT.json`, each in its own environment, then
`python bench/vllm/accept.py compare OURS.json THEIRS.json OUTPUT.json` in ours.
"""

from __future__ import annotations

import argparse
import json
import shlex
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
        gpu_memory_utilization=0.3,  # of the CPU's memory, despite its name
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


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Both results without their tokens, and their ratio."""
    from fastgrpo.report import describe_commit, describe_machine

    pairs = list(zip(ours.pop("token_ids"), theirs.pop("token_ids"), strict=True))
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": describe_commit(Path(__file__).parent),
        "machine": describe_machine(),
        "settings": {"max_tokens": MAX_TOKENS, "num_prompts": len(pairs), "dtype": "bfloat16", "temperature": 0.0},
        "ours": ours,
        "vllm": theirs,
        "ratio": theirs["acceptance_length"] / ours["acceptance_length"],
        "share_equal": sum(a == b for a, b in pairs) / len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy acceptance length of a chain, in our engine and in vLLM.")
    parser.add_argument("mode", choices=("ours", "vllm", "compare"))
    parser.add_argument("first", help="prompts of prompts.py; to compare, what ours wrote")
    parser.add_argument("second", help="folder of the exported head; to compare, what vllm wrote")
    parser.add_argument("output", help="JSON file")
    mode, first, second, output = vars(parser.parse_args()).values()
    work = json.loads(Path(first).read_text())
    if mode == "compare":
        result = compare(work, json.loads(Path(second).read_text()))
    else:
        measure = {"ours": measure_ours, "vllm": measure_vllm}[mode]
        result = {"engine": mode, "task": work["task"], "depth": DEPTH, **measure(work, second)}
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "token_ids"})


if __name__ == "__main__":
    main()
