"""Seconds and memory of a long prompt's chunk: attention by the kernel, and by PyTorch with a dense mask.

`python bench/gpu/prefill.py --model runs/8b --output docs/results/gpu-8b-prefill.json`, with a body of
`bench/grow.py`. A chunk stands behind what its prompt has cached; `floor_s` is what weights, positions and products
take at the limits measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from limits import build_parser, describe, finish, measure_limits, run_bench
from steps import compute_floor, measure_forward

from fastgrpo import attention, modules
from fastgrpo.loading import open_model, quiet_libraries
from fastgrpo.model import TargetModel

_SIZES = (
    (8, 288, 0),
    (8, 512, 0),
    (8, 512, 1536),
    (1, 512, 7680),
    (1, 512, 32256),
)  # rows, nodes (too many to be recorded), cached
_TINY_SIZES = ((2, 16, 0), (1, 16, 32))


@contextlib.contextmanager
def masked() -> Iterator[None]:
    """PyTorch's attention with a dense mask, where the kernel would run."""
    with (
        mock.patch.object(attention, "has_gpu_kernel", lambda _: False),
        mock.patch.object(modules, "has_gpu_kernel", lambda _: False),
    ):
        yield


def measure_chunk(target: TargetModel, rows: int, nodes: int, context: int) -> dict[str, float | None]:
    """Seconds of a forward, and bytes that it takes beside weights and cache at most; None on a CPU."""
    has_device = target.device.type == "cuda"
    if has_device:
        torch.cuda.reset_peak_memory_stats(target.device)
    before = torch.cuda.memory_allocated(target.device) if has_device else 0
    seconds = measure_forward(target, rows, nodes, context)
    peak = torch.cuda.max_memory_allocated(target.device) - before if has_device else None
    return {"seconds": seconds, "bytes": peak}


def measure_all(model: Any, options: argparse.Namespace, limits: dict[str, float]) -> list[dict[str, Any]]:
    target, points = TargetModel(model), []
    with target.rollout_mode():
        for rows, nodes, context in _TINY_SIZES if options.tiny else _SIZES:
            point: dict[str, Any] = {"rows": rows, "nodes": nodes, "context": context}
            point["floor_s"] = compute_floor(target, rows, nodes, context, limits)
            point["kernel"] = measure_chunk(target, rows, nodes, context)
            with masked():
                point["mask"] = measure_chunk(target, rows, nodes, context)
            print(point)
            points.append(point)
    return points


def main() -> None:
    parser = build_parser("Time chunks of long prompts.")
    parser.add_argument("--model", required=True, help="a folder of bench/grow.py, a hub id, or 'demo'")
    options = parser.parse_args()
    quiet_libraries()
    model = open_model(options.model, dtype="bfloat16", device=options.device).model
    limits = measure_limits(model.device, tiny=options.tiny)
    points = measure_all(model, options, limits)
    grown_from = getattr(model.config, "grown_from", None)
    finish(describe(options) | {"limits": limits, "points": points, "grown_from": grown_from}, options)


if __name__ == "__main__":
    run_bench(main)
