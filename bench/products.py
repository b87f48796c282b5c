"""What the matrix products of one forward take, by whose product and by rows: ours, oneDNN's, PyTorch's.

`python bench/products.py --output docs/results/products.json`. Each way has weights of its own for every layer, so that
they come from memory as in a model; ways take turns, and the second least of a number of rounds counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.kernels import cpu, linear, matrices
from fastgrpo.machine import describe_commit, describe_machine
from fastgrpo.options import check_writable

SMOLLM2 = {"layers": 30, "shapes": ((960, 576), (576, 576), (3072, 576), (576, 1536)), "head": (49152, 576)}
"""(outputs, inputs) of what the engine multiplies by: Q, K, V; their output; gate and up; down; the output rows."""

Multiply = Callable[[Tensor], Tensor]


def build_ways(weight: Tensor) -> dict[str, Multiply]:
    half, wide = weight.to(torch.bfloat16), weight
    ours, ours_wide = (linear.OwnLayout([each], None) for each in (half, wide))
    ways: dict[str, Multiply] = {
        "ours, bfloat16": lambda x: _multiply(ours, x, in_registers=False),
        "PyTorch, bfloat16": lambda x: F.linear(x, half),
        "ours, float32": lambda x: ours_wide.multiply(x.float()),
        "PyTorch, float32": lambda x: F.linear(x.float(), wide),
    }
    if matrices.are_taken():
        ways["ours, bfloat16, matrix registers"] = lambda x: _multiply(ours, x, in_registers=True)
    if linear._has_onednn():
        ways["oneDNN's layout, bfloat16"] = linear._OneDNNLayout([half], None).multiply
    return ways


def _multiply(layout: linear.OwnLayout, x: Tensor, *, in_registers: bool) -> Tensor:
    cpu.call("use_matrices", int(in_registers))
    return layout.multiply(x)


def measure(rows: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Milliseconds of all products of a forward, by way and rows."""
    shapes = [shape for shape in SMOLLM2["shapes"] for _ in range(SMOLLM2["layers"])] + [SMOLLM2["head"]]
    products = [(build_ways(torch.randn(shape)), shape[1]) for shape in shapes]
    taken: dict[str, dict[int, float]] = {}
    for count in rows:
        inputs = {width: torch.randn(count, width).to(torch.bfloat16) for width in {width for _, width in products}}
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way in products[0][0]:
                started = time.perf_counter()
                for ways, width in products:
                    ways[way](inputs[width])
                seconds.setdefault(way, []).append(time.perf_counter() - started)
        for way, own in seconds.items():
            taken.setdefault(way, {})[count] = round(1000 * sorted(own)[1], 2)
        print(count, {way: own[count] for way, own in taken.items()}, flush=True)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Products of one forward of SmolLM2-135M: ours, oneDNN's, PyTorch's.")
    parser.add_argument(
        "--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 12, 16, 32, 64, 256]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: the second least counts")
    if options.output:  # before anything is measured
        check_writable("output", options.output)
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": describe_commit(Path(__file__).parent),
        "machine": describe_machine(),
        "milliseconds": measure(options.rows, options.rounds),
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
