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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
INTS = {"stride", "width", "num_blocks", "token_stride"}
TYPES = {
    "rows": "*i64", "stream_keys": "*i64", "positions": "*i64", "token_ids": "*i64", "temperatures": "*fp32",
    "tokens": "*i32",
}  # fmt: skip


def list_kernels() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any], int]]:
    """(module, kernel, types that differ from TYPES, constants, warps)."""
    for dtype in ("*bf16", "*fp16", "*fp32"):
        yield "gpu_sampling", "_sample_blocks", {"logits": dtype}, {"BLOCK": 2048}, 8
        yield "gpu_sampling", "_join_blocks", {"logits": dtype}, {"BLOCKS": 64}, 1
    yield "gpu_sampling", "_noise_blocks", {"token_ids": "*i32"}, {"BLOCK": 1024}, 4


def compile_kernel(module: str, name: str, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    kernel = getattr(importlib.import_module(f"fastgrpo.kernels.{module}"), name)
    signature = {
        argument: "constexpr" if argument in constants
        else types.get(argument) or ("i32" if argument in INTS else TYPES.get(argument, "*fp32"))
        for argument in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=HOPPER, options=options)
    return count_registers(compiled.asm["cubin"])


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
    for kernel in list_kernels():
        print(kernel[1], kernel[2], kernel[3], compile_kernel(*kernel))
