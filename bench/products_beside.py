"""What the matrix products of one forward take with the kernels of this tree and of another, in turns in one process.

`git worktree add --detach runs/before COMMIT`, then `python bench/products_beside.py --before
runs/before/src/fastgrpo/kernels --output docs/results/products-beside.json`. In processes of their own the same kernels
may differ by a half, so that small changes do not show (`bench/products.py`). Both read the same weights: their layout
must not have changed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from products import SMOLLM2
from torch import Tensor

from fastgrpo.kernels import build, cpu
from fastgrpo.machine import describe_commit, describe_machine
from fastgrpo.options import check_writable


def compile_products(folder: Path, into: Path) -> ctypes.CDLL:
    """The products of `folder`'s products.c alone, which names what stands beside it by way of headers."""
    flags = (*build._FLAGS, build._OWN_FLAGS["products.c"])
    subprocess.run(
        [*build._find_compiler(), *flags, "-shared", str(folder / "products.c"), "-o", str(into), "-lm"], check=True
    )
    return ctypes.CDLL(str(into))


def multiply(library: ctypes.CDLL, x: Tensor, layout: Tensor, outputs: int, out: Tensor) -> None:
    pointers = (ctypes.c_void_p(layout.data_ptr()), None, ctypes.c_void_p(out.data_ptr()))
    sizes = map(ctypes.c_int64, (*x.shape, outputs))
    library.fastgrpo_product_bf16(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)), *pointers, *sizes)


def measure(libraries: dict[str, ctypes.CDLL], rows: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Milliseconds of all products of a forward, by kernels, rows and round; the results are held to be equal."""
    shapes = [shape for shape in SMOLLM2["shapes"] for _ in range(SMOLLM2["layers"])] + [SMOLLM2["head"]]
    products = [(cpu.pack_weights([torch.randn(shape).to(torch.bfloat16)]), *shape) for shape in shapes]
    taken: dict[str, dict[int, list[float]]] = {name: {count: [] for count in rows} for name in libraries}
    for count in rows:
        inputs = {width: torch.randn(count, width).to(torch.bfloat16) for *_, width in products}
        outs = {name: torch.empty(count, SMOLLM2["head"][0], dtype=torch.bfloat16) for name in libraries}
        for _ in range(rounds):
            for name, library in libraries.items():
                started = time.perf_counter()
                for layout, outputs, width in products:
                    multiply(library, inputs[width], layout, outputs, outs[name])
                taken[name][count].append(1000 * (time.perf_counter() - started))
        for layout, outputs, width in products[:: SMOLLM2["layers"]]:  # one of each shape
            for name, library in libraries.items():
                multiply(library, inputs[width], layout, outputs, outs[name])
            first, *others = (out.view(-1)[: count * outputs] for out in outs.values())
            assert all(torch.equal(first, other) for other in others), f"with {count} rows the products differ"
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Products of one forward of SmolLM2-135M by two trees' kernels, in turns."
    )
    parser.add_argument("--before", type=Path, required=True, help="the other tree's src/fastgrpo/kernels")
    parser.add_argument(
        "--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 12, 16, 64]
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.output:  # before anything is measured
        check_writable("output", options.output)
    commits = [describe_commit(tree) for tree in (Path(__file__).parent, options.before)]  # of what is measured
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"before": options.before, "this tree": Path(cpu.__file__).parent}
        libraries = {
            name: compile_products(folder, Path(scratch) / f"{number}.so")
            for number, (name, folder) in enumerate(folders.items())
        }
        taken = measure(libraries, options.rows, options.rounds)
    medians = {name: {count: statistics.median(each) for count, each in by.items()} for name, by in taken.items()}
    for count in options.rows:
        print(count, {name: round(by[count], 2) for name, by in medians.items()})
    if options.output is not None:
        result = {
            "command": shlex.join(["python", "bench/products_beside.py", *sys.argv[1:]]),
            "commit": commits[0],
            "before": commits[1],
            "machine": describe_machine(),
            "median_ms": medians,
            "each_ms": taken,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
