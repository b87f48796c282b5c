"""Do the laws hold on this device: the same tokens with speculation and without.

`python bench/gpu/laws.py --model demo --output docs/results/gpu-laws.json`. In float32 every completion must be equal.
In bfloat16 sums are rounded by the shape of the batch, and two tokens whose scores are that near can change places:
the share of completions that part, parted tokens for each token compared, and at each parting the gap between both
tokens' scores (logit / temperature + noise, recomputed from transformers' own forward in float32).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from limits import build_parser, describe, finish, run_bench
from transformers import PreTrainedModel

from fastgrpo import Engine, SamplingParams, SpeculationPlan
from fastgrpo.data import build_task_dataset
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.sampling import gumbel_noise, stream_key

_PLAN = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)


def compare(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, drafter: str
) -> tuple[list[dict[str, Any]], int, int]:
    """(partings: request, position and the two tokens; tokens compared; completions equal)."""
    plain = Engine(model, drafter="none", speculation="off").generate(prompts, params)
    drafted = Engine(model, drafter=drafter, speculation=_PLAN).generate(prompts, params)
    partings, num_compared, num_equal = [], 0, 0
    for request, (ours, theirs) in enumerate(zip(plain, drafted, strict=True)):
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        num_compared += len(pairs) if place is None else place + 1
        num_equal += ours.token_ids == theirs.token_ids
        if place is not None:
            before = ours.token_ids[:place]
            partings.append({"request": request, "position": place, "tokens": pairs[place], "before": before})
    return partings, num_compared, num_equal


@torch.no_grad()
def measure_gaps(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams, partings: list[dict[str, Any]]
) -> list[float]:
    """Distance of the two tokens' scores at each parting, in float32."""
    gaps = []
    for parting in partings:
        ids = torch.tensor([prompts[parting["request"]] + parting["before"]], device=model.device)
        logits = model(ids).logits[0, -1].float()
        key = stream_key(params.seed, params.stream + parting["request"])
        noise = gumbel_noise(
            torch.tensor([key], device=model.device),
            torch.tensor([parting["position"]], device=model.device),
            torch.tensor(parting["tokens"], dtype=torch.int32, device=model.device),
        )[0]
        first, second = logits[list(parting["tokens"])] / params.temperature + noise
        gaps.append(abs(float(first - second)))
    return gaps


def run_type(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    opened = open_model(options.model, dtype=dtype, device=options.device)
    dataset = build_task_dataset("chain_sum", size=options.num_prompts, seed=7)
    prompts = [ids for ids in encode_prompts(opened.tokenizer, dataset["prompt"]) for _ in range(8)]
    params = SamplingParams(max_tokens=options.max_tokens, stop_token_ids=opened.stop_token_ids)
    partings, num_compared, num_equal = compare(opened.model, prompts, params, options.drafter)
    exact = opened.model if dtype == "float32" else opened.model.float()
    gaps = measure_gaps(exact, prompts, params, partings)
    return {
        "num_completions": len(prompts),
        "num_equal": num_equal,
        "num_compared_tokens": num_compared,
        "partings_per_token": len(partings) / max(num_compared, 1),
        "gaps": sorted(gaps),
    }


def main() -> None:
    parser = build_parser("Compare tokens with speculation and without.")
    parser.add_argument("--model", default="demo", help="a folder, a hub id, or 'demo'")
    parser.add_argument("--drafter", default="eagle", help="eagle, eagle-new or ngram")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts, of 8 completions each")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest completion")
    options = parser.parse_args()
    if options.tiny:
        options.num_prompts, options.max_tokens = 1, 12
    quiet_libraries()
    torch.backends.cuda.matmul.allow_tf32 = False
    types = {dtype: run_type(options, dtype) for dtype in ("float32", "bfloat16")}
    for dtype, found in types.items():
        gaps = found["gaps"]
        widest = f"; the widest gap {gaps[-1]:.3g}" if gaps else ""
        print(f"{dtype}: {found['num_equal']} of {found['num_completions']} completions are equal{widest}")
    finish(describe(options) | {"types": types}, options)
    if types["float32"]["gaps"]:
        raise SystemExit("the law is broken in float32")


if __name__ == "__main__":
    run_bench(main)
