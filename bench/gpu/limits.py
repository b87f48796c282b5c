"""What this device can do at most: bytes a second moved and read, bf16 operations a second.

`python bench/gpu/limits.py --output docs/results/gpu-limits.json`. Other benches here measure the same in their own
run, and hold what they find beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgrpo.bench.measure import describe_run
from fastgrpo.loading import resolve_device
from fastgrpo.report import write_json

_GIB, _TINY_BYTES = 2**30, 2**20
_RUNS = 20


def build_parser(description: str) -> argparse.ArgumentParser:
    """What all benches of this folder are asked with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal, whose numbers say nothing")
    parser.add_argument("--output", type=_check_output, help="JSON file")
    return parser


def _check_output(name: str) -> Path:
    """Said before anything is measured."""
    try:
        (path := Path(name)).parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from error
    return path


def run_bench(main: Callable[[], None]) -> None:
    """What cannot be done is one line, as on the command line."""
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, commit, command, and the versions that a GPU adds."""
    command = shlex.join(["python", *sys.argv])
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return describe_run(command, plain) | {
        "cuda": torch.version.cuda,
        "driver": _read_driver(),
        "triton": importlib.metadata.version("triton") if "triton" in installed else None,
    }


def _read_driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


def measure_s(run: Callable[[], object], device: torch.device, runs: int = _RUNS) -> float:
    """Median seconds of a call on the device, by its own clock where it has one."""
    from fastgrpo.timing import measure_on

    if device.type != "cuda":
        return measure_on(run, device).least_s
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return sorted(begin.elapsed_time(end) for begin, end in events)[runs // 2] / 1e3


def measure_limits(device: torch.device, *, tiny: bool = False) -> dict[str, float]:
    """Bytes a second copied (read and written both counted) and read, and bf16 operations a second of a product."""
    num_bytes = _TINY_BYTES if tiny else 4 * _GIB
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied_s = measure_s(lambda: target.copy_(source), device)
    read_s = measure_s(lambda: source.sum(), device)
    size = 256 if tiny else 8192
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product_s = measure_s(lambda: left @ right, device)
    return {
        "copy_bytes_per_s": 2 * num_bytes / copied_s,
        "read_bytes_per_s": num_bytes / read_s,
        "bf16_flops_per_s": 2 * size**3 / product_s,
    }


def finish(result: dict[str, Any], options: argparse.Namespace) -> None:
    if options.output is not None:
        write_json(result, options.output, indent=1)
        print(f"written: {options.output}")


def main() -> None:
    options = build_parser("Measure a device's limits.").parse_args()
    limits = measure_limits(resolve_device(options.device), tiny=options.tiny)
    for name, value in limits.items():
        print(f"{name}: {value:.3g}")
    finish(describe(options) | {"limits": limits}, options)


if __name__ == "__main__":
    run_bench(main)
