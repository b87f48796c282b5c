"""Seconds of a forward against sequences and nodes, beside the limits of the device measured in the same run.

`python bench/gpu/steps.py --model runs/8b --output docs/results/gpu-8b-steps.json`, with a body of `bench/grow.py`.
A forward must read its weights and the live positions once and do its products: the larger of the two times at the
measured limits is the floor, and `share` the floor over the time. Whole plain steps of the engine stand beside it.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from limits import build_parser, describe, finish, measure_limits, measure_s, run_bench
from torch import nn

from fastgrpo import Engine, SamplingParams
from fastgrpo.attention import ForwardBatch
from fastgrpo.loading import open_model, quiet_libraries
from fastgrpo.model import TargetModel

ROWS, NODES = (1, 4, 16, 64), (1, 2, 4, 8)


def measure_forward(target: TargetModel, rows: int, nodes: int, context: int) -> float:
    """A forward of chains of `nodes` behind `context` positions of noise."""
    cache = target.build_cache(with_features=False)
    cache.add_rows(rows)
    for row in range(rows):
        cache.reserve(row, context + nodes)
    for store in (cache.keys, cache.values):
        for layer in store.data:
            layer.normal_()
    device = target.device
    batch = ForwardBatch.build(
        token_ids=torch.randint(target.vocab_size, (rows, nodes), device=device),
        num_nodes=torch.full((rows,), nodes, device=device),
        visible=torch.ones(rows, nodes, nodes, dtype=torch.bool, device=device).tril(),
        blocks=cache.blocks,
        lengths=torch.full((rows,), context, device=device),
        dtype=target.dtype,
        num_repeats=target.num_repeats,
        counts=[nodes] * rows,
    )
    return measure_s(lambda: target.decode(batch, cache), device)


def compute_floor(target: TargetModel, rows: int, nodes: int, context: int, limits: dict[str, float]) -> float:
    """Seconds that the weights and live positions take to be read, or the products to be done, whichever is longer."""
    linear = sum(module.weight.numel() for module in target.base.modules() if isinstance(module, nn.Linear))
    size = target.lm_head.weight.element_size()
    cached = 2 * target.num_layers * target.num_kv_heads * target.head_dim * size * rows * (context + nodes)
    read_s = (linear * size + cached) / max(limits["read_bytes_per_s"], limits["copy_bytes_per_s"])
    pairs = rows * nodes * (context + nodes) * target.num_layers * target.num_kv_heads * target.num_repeats
    flops = 2 * linear * rows * nodes + 4 * pairs * target.head_dim
    return max(read_s, flops / limits["bf16_flops_per_s"])


def measure_plain_step(model: Any, rows: int, context: int, num_steps: int) -> float:
    """Median seconds of a whole plain step of the engine, host and sampling included."""
    draw = torch.Generator().manual_seed(rows)
    prompts = torch.randint(model.config.vocab_size, (rows, context), generator=draw).tolist()
    engine = Engine(model, drafter="none", speculation="off", max_num_seqs=rows)
    engine.generate(prompts, SamplingParams(max_tokens=num_steps))
    return statistics.median(record.step_s for record in engine.records[num_steps // 3 :])


def measure_grid(model: Any, options: argparse.Namespace, limits: dict[str, float]) -> list[dict[str, Any]]:
    target, points = TargetModel(model), []
    with target.rollout_mode():
        for rows in options.rows:
            plain_s = 0.0
            for nodes in options.nodes:
                forward_s = measure_forward(target, rows, nodes, options.context)
                plain_s = plain_s or forward_s
                floor_s = compute_floor(target, rows, nodes, options.context, limits)
                points.append(
                    {"rows": rows, "nodes": nodes, "forward_s": forward_s, "floor_s": floor_s}
                    | {"share": floor_s / forward_s, "over_plain": forward_s / plain_s}
                )
    return points


def main() -> None:
    parser = build_parser("Time forwards against sequences and nodes.")
    parser.add_argument("--model", required=True, help="a folder of bench/grow.py, a hub id, or 'demo'")
    parser.add_argument("--context", type=int, default=1024, help="cached positions of each sequence")
    options = parser.parse_args()
    options.rows, options.nodes = ((1, 2), (1, 2)) if options.tiny else (ROWS, NODES)
    quiet_libraries()
    model = open_model(options.model, dtype="bfloat16", device=options.device).model
    limits = measure_limits(model.device, tiny=options.tiny)
    points = measure_grid(model, options, limits)
    steps = {
        rows: measure_plain_step(model, rows, options.context, 12 if options.tiny else 48) for rows in options.rows
    }
    for point in points:
        print("  ".join(f"{name} {value:.4g}" for name, value in point.items()))
    for rows, step_s in steps.items():
        print(f"a whole plain step of {rows}: {1e3 * step_s:.2f} ms")
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    grown_from = getattr(model.config, "grown_from", None)
    result = {"limits": limits, "points": points, "plain_step_s": steps, "peak_bytes": peak, "grown_from": grown_from}
    finish(describe(options) | result, options)


if __name__ == "__main__":
    run_bench(main)
