"""How often a step waits for the device: PyTorch's own count of synchronising calls.

`python bench/gpu/syncs.py --model demo --output docs/results/gpu-syncs.json`. Steps that compute prompts or end a
sequence are left out. On a CPU nothing waits, and the count is 0; `tests/test_transfer.py` counts there by operator.
"""

from __future__ import annotations

import collections
import warnings
from typing import Any

import torch
from limits import build_parser, describe, finish, run_bench

from fastgrpo import Engine, SamplingParams, SpeculationPlan
from fastgrpo.loading import open_model, quiet_libraries

_PLANS = {
    "plain": SpeculationPlan(),
    "chain": SpeculationPlan(depth=3, width=1, num_draft_tokens=3),
    "tree": SpeculationPlan(depth=3, width=3, num_draft_tokens=8),
    "shared budget": SpeculationPlan(depth=3, width=3, num_draft_tokens=4, most_draft_tokens=8),
}


def count_waits(model: Any, plan: SpeculationPlan, drafter: str, max_tokens: int) -> dict[str, Any]:
    """Synchronising calls of steady steps, most often first, and where in our code the first ones stand."""
    engine = Engine(model, drafter=drafter, speculation=plan, max_num_seqs=8)
    counts: list[int] = []
    places: collections.Counter[str] = collections.Counter()
    take_step = engine.step

    def step() -> Any:
        num_running = len(engine.scheduler.running)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if model.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                record = take_step()
            finally:
                if model.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        waits = [each for each in caught if "synchroniz" in str(each.message)]
        if not record.num_prefilled and num_running == len(engine.scheduler.running):
            counts.append(len(waits))
            places.update(f"{each.filename.rsplit('fastgrpo/', 1)[-1]}:{each.lineno}" for each in waits)
        return record

    engine.step = step  # type: ignore[method-assign]
    engine.generate([[row + 5, 6, 7, 8] for row in range(8)], SamplingParams(max_tokens=max_tokens))
    return {"steps": len(counts), "waits_by_step": collections.Counter(counts), "places": dict(places.most_common(8))}


def main() -> None:
    parser = build_parser("Count how often a step waits for the device.")
    parser.add_argument("--model", default="demo", help="a folder, a hub id, or 'demo'")
    parser.add_argument("--drafter", default="eagle", help="eagle or eagle-new")
    options = parser.parse_args()
    quiet_libraries()
    model = open_model(options.model, dtype="bfloat16", device=options.device).model
    plans = {}
    for name, plan in _PLANS.items():
        plans[name] = count_waits(model, plan, options.drafter, 12 if options.tiny else 64)
        print(f"{name}: steps by how often they wait {dict(plans[name]['waits_by_step'])}, at {plans[name]['places']}")
    finish(describe(options) | {"plans": plans}, options)


if __name__ == "__main__":
    run_bench(main)
