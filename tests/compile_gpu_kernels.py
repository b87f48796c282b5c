"""Compiles every Triton kernel for a Hopper GPU, which needs none; prints what each takes of registers.

Run by test_gpu_kernels.py in a process of its own, where Triton is not in its interpreter.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.kernels.gpu_attention import choose_tile, find_width

HOPPER = GPUTarget("cuda", 90, 32)
INTS = (
    *("stride", "width", "num_blocks", "token_stride", "head_stride", "position_stride", "num_words", "most_nodes"),
    *("num_before", "num_kv_heads", "num_splits", "num_heads"),
    *("num_expanded", "count"),
    *("num_children", "num_seen", "num_levels", "capacity", "num_filled", "num_chosen", "level", "depth"),
    *("first_width", "second_width", "third_width", "out_stride", "num_tokens", "num_inputs"),
)
LONGS = ("rows", "stream_keys", "positions", "token_ids", "blocks", "starts", "num_nodes", "lengths", "words", "places")
TYPES = {"tokens": "*i32", "scale": "fp32", "eps": "fp32"} | dict.fromkeys(INTS, "i32") | dict.fromkeys(LONGS, "*i64")


SETTLED = ("stride", "_kv_heads", "num_heads", "width", "_width", "num_inputs", "num_blocks", "scale", "eps")
COLUMNS = ("stream_keys", "positions", "temperatures", "lengths", "num_nodes", "starts", "rows")
PARTS = {"gpu_attention": ("tops", "masses")}  # of one tensor: where they begin changes
_EVEN = {"HAS_BIAS": False, "IS_EVEN": True}


def list_kernels() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any], int]]:
    """(module, kernel, types that differ from TYPES, constants, warps)."""
    for dtype in ("*bf16", "*fp16", "*fp32"):
        yield "gpu_sampling", "_sample_blocks", {"logits": dtype}, {"BLOCK": 2048}, 8
        yield "gpu_sampling", "_join_blocks", {"logits": dtype}, {"BLOCKS": 64}, 1
        ranked = {"WITH_NOISE": True, "BLOCK": 2048}
        yield "gpu_ranking", "_rank_blocks", {"logits": dtype, "vocabulary": "*i32", "columns": "*i32"}, ranked, 8
    joined = {"BLOCKS": 16, "CANDIDATES": 256}
    yield "gpu_ranking", "_join_ranks", {"vocabulary": "*i32", "columns": "*i32"}, joined, 1
    yield "gpu_sampling", "_noise_blocks", {"token_ids": "*i32"}, {"BLOCK": 1024}, 4
    for dtype in ("*bf16", "*fp32"):
        layer = dict.fromkeys(
            ("residual", "delta", "weight", "out", "states", "cos", "sin", "keys", "values", "both"), dtype
        )
        yield "gpu_decoder", "_add_norm", layer, {"HAS_DELTA": True, "WIDTH": 4096}, 8
        yield "gpu_decoder", "_norm_heads", layer, {"WIDTH": 128}, 1
        yield "gpu_decoder", "_rotate_and_cache", layer, {"HALF": 64}, 1
        yield "gpu_decoder", "_multiply_silu", layer, {"BLOCK": 1024}, 4
        if dtype == "*bf16":
            names = ("x", "first", "second", "third", "first_bias", "second_bias", "third_bias", "out")
            tiles = ((16, 64, 128, 4), (64, 64, 128, 4), (128, 64, 128, 4), (16, 32, 256, 4), (128, 128, 64, 8))
            for tokens, outputs, inputs, warps in tiles:
                sizes = {"TOKENS": tokens, "OUTPUTS": outputs, "INPUTS": inputs}
                yield "gpu_linear", "_multiply", dict.fromkeys(names, dtype), sizes | _EVEN, warps
        for head_dim in (8, 64, 80, 128, 192, 256):
            shape = {"REPEATS": 4, "HEAD_DIM": head_dim, "WIDTH": find_width(head_dim), "SPLIT": 256}
            types = dict.fromkeys(("query", "keys", "values", "out"), dtype)
            real = torch.bfloat16 if dtype == "*bf16" else torch.float32
            for queries, tile, warps in sorted({choose_tile(most, head_dim, real) for most in (1, 32, 64, 1024)}):
                sizes = {"QUERIES": queries, "TILE": tile, "BLOCK": BLOCK_SIZE}
                yield "gpu_attention", "_attend_splits", types, shape | sizes, warps
            yield "gpu_attention", "_join_splits", types, shape | {"CHUNK": 8}, 1


def list_tree_kernels() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any], int]]:
    """Likewise."""
    longs = (
        *("tokens", "places", "pool_tokens", "pool_parents", "out_tokens", "out_above", "out_places", "parents"),
        *("roots", "out_parents", "out_counts", "path", "chosen", "out_path", "out_chosen", "out_accepted"),
        *("num_children", "ranks", "sources", "targets", "positions", "words", "starts", "rows", "lengths", "blocks"),
    )
    types = dict.fromkeys(longs, "*i64") | {"num_nodes": "i32", "visible": "*u8", "out_visible": "*u8"}
    types |= dict.fromkeys(("penalty", "weight"), "fp32")
    yield "gpu_trees", "_grow_level", types | {"num_children": "i32"}, {"WIDTH": 64, "SEEN": 32}, 1
    yield "gpu_trees", "_prune", types, {"WIDTH": 512}, 1
    yield "gpu_trees", "_find_ancestors", types, {"NODES": 64}, 1
    yield "gpu_trees", "_lay_out", types, {"BLOCK": BLOCK_SIZE, "SEEN": 64}, 1
    yield "gpu_walk", "_walk_level", types, {"NODES": 64}, 1
    yield "gpu_walk", "_find_ranks", types, {"NODES": 64}, 1
    yield "gpu_walk", "_count_judged", types, {"LEVELS": 8, "BINS": 33, "NODES": 64}, 1
    yield "gpu_walk", "_locate_path", types, {"BLOCK": BLOCK_SIZE}, 1


def compile_kernel(module: str, name: str, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    kernel = getattr(importlib.import_module(f"fastgrpo.kernels.{module}"), name)
    signature = {
        argument: "constexpr" if argument in constants
        else types.get(argument) or TYPES.get(argument, "*fp32")
        for argument in kernel.arg_names
    }  # fmt: skip
    is_specialized = {parameter.name: not parameter.do_not_specialize for parameter in kernel.params}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, type_) in enumerate(signature.items())
        if (type_.startswith("*") or argument.endswith(("_stride", "_inputs"))) and is_specialized[argument]
    }  # as the launcher finds them
    changing = {name for name, type_ in signature.items() if type_ == "i32" and not name.endswith(SETTLED)}
    anew = [name for name in (*changing, *COLUMNS, *PARTS.get(module, ())) if is_specialized.get(name)]
    assert not anew, f"{name} would be compiled anew when {', '.join(anew)} change"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": warps,
        "num_stages": 5 if module == "gpu_linear" else 2,
        "enable_fp_fusion": module != "gpu_sampling",
    }
    compiled = triton.compile(source, target=HOPPER, options=options)
    return f"{count_registers(compiled.asm['cubin'])} DYNAMIC:{compiled.metadata.shared}"


def count_registers(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return "compiled"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", text))


if __name__ == "__main__":
    for kernel in (*list_kernels(), *list_tree_kernels()):
        print(kernel[1], kernel[2], kernel[3], compile_kernel(*kernel))
