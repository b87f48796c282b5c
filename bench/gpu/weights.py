"""Products of few tokens with a model's weights: cuBLAS's, and ours by the size of a program's tile.

`python bench/gpu/weights.py --output docs/results/gpu-weights.json`: from how many tokens on cuBLAS is as fast
(`kernels/gpu_linear.py`), and beside the time that reading the weights takes. Weights take turns, so that they come
from memory as in a model, and launches are recorded, as in the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from limits import build_parser, describe, finish, measure_limits, measure_s, run_bench
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.kernels import gpu_linear
from fastgrpo.loading import resolve_device

_SHAPES = {  # widths that meet the same tokens, and inputs; of an 8B body
    "query, key, value": ((4096, 1024, 1024), 4096),
    "output": ((4096,), 4096),
    "gate, up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
_TILES = ((64, 128, 4), (32, 256, 4), (64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))  # and warps
_TOKENS = (1, 16, 32, 48, 64, 96, 128, 192, 256)
_TURN_BYTES = 2**29  # of weights that take turns: more than a GPU keeps near
_OUT_OF_ROOM = ("OutOfResources", "CompilationError")  # Triton's, of tiles that a processor does not hold

Multiply = Callable[[Tensor, Sequence[Tensor]], Tensor]


def build_ways(device: torch.device) -> dict[str, Multiply]:
    ways: dict[str, Multiply] = {"cuBLAS": lambda x, weights: torch.cat([F.linear(x, w) for w in weights], 1)}
    if device.type == "cuda":
        for tile in _TILES:
            ways["{}x{}, {} warps".format(*tile)] = _build_way(tile)
    return ways


def _build_way(tile: tuple[int, int, int]) -> Multiply:
    return lambda x, weights: gpu_linear.multiply_few(x, weights, [None] * len(weights), tile=tile)


def measure_product(multiply: Multiply, x: Tensor, turns: list[list[Tensor]]) -> float | None:
    """Seconds of one product; None where a processor has no room for its tile."""

    def run() -> None:
        for weights in turns:
            multiply(x, weights)

    try:
        run()
        if x.device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            return measure_s(graph.replay, x.device, runs=7) / len(turns)
        return measure_s(run, x.device) / len(turns)
    except Exception as error:
        if type(error).__name__ in _OUT_OF_ROOM:
            return None
        raise


def measure_shape(
    widths: tuple[int, ...], num_inputs: int, tokens: Sequence[int], device: torch.device, num_turns: int
) -> dict[str, dict[int, float | None]]:
    """By way and tokens."""
    turns = [
        [torch.randn(width, num_inputs, device=device).bfloat16() * num_inputs**-0.5 for width in widths]
        for _ in range(num_turns)
    ]
    taken: dict[str, dict[int, float | None]] = {}
    for (name, multiply), count in itertools.product(build_ways(device).items(), tokens):
        x = torch.randn(count, num_inputs, device=device).bfloat16()
        taken.setdefault(name, {})[count] = measure_product(multiply, x, turns)
    return taken


def main() -> None:
    options = build_parser("Products of few tokens.").parse_args()
    device = resolve_device(options.device)
    read_bytes_per_s = measure_limits(device, tiny=options.tiny)["read_bytes_per_s"]
    found: dict[str, dict[str, Any]] = {}
    for name, (widths, num_inputs) in _SHAPES.items():
        if options.tiny:
            widths, num_inputs = tuple(width // 64 for width in widths), num_inputs // 64
        num_bytes = 2 * sum(widths) * num_inputs
        num_turns = 2 if options.tiny else max(2, -(-_TURN_BYTES // num_bytes))
        taken = measure_shape(widths, num_inputs, _TOKENS[:2] if options.tiny else _TOKENS, device, num_turns)
        found[name] = {"read_s": num_bytes / read_bytes_per_s, "ways": taken}
        print(f"{name}: {1e6 * found[name]['read_s']:.1f} us to read")
        for way, own in taken.items():
            told = [f"{count} {'-' if s is None else f'{1e6 * s:.1f}'}" for count, s in own.items()]
            print(f"  {way}:", "  ".join(told))
    finish(describe(options) | {"products": found}, options)


if __name__ == "__main__":
    run_bench(main)
