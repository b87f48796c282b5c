"""Seconds from the start of a process to the end of its first step, and of its first one that repeats.

`python bench/gpu/start.py --model demo --output docs/results/gpu-start.json`. Two processes in turn: in the first one
kernels are compiled and the machine is measured, the second finds both in caches. Loading the model is counted; where
the demo model has still to be unpacked, that is done before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from limits import build_parser, describe, finish, run_bench

from fastgrpo.loading import resolve_model

_CACHES = ("FASTGRPO_CACHE", "TRITON_CACHE_DIR")
_MOST_TOKENS = 64  # of which some step repeats an earlier one


def begin(options: argparse.Namespace) -> dict[str, float | None]:
    """What a new process does; seconds from `options.started`, of this machine's clock. None: no step has repeated."""
    from fastgrpo import Engine, SamplingParams
    from fastgrpo.loading import open_model, quiet_libraries

    quiet_libraries()
    opened = open_model(options.model, dtype="bfloat16", device=options.device)
    loaded_s = time.time() - options.started
    engine = Engine(opened.model, drafter=options.drafter, tokenizer=opened.tokenizer)
    requests = engine.take_requests([[5, 6, 7, 8]] * options.rows, SamplingParams(max_tokens=_MOST_TOKENS))
    first_step_s = steady_step_s = None
    with contextlib.closing(engine.roll_out(requests)) as steps:
        for record in steps:
            first_step_s = first_step_s or time.time() - options.started
            if record.is_steady:
                steady_step_s = time.time() - options.started
                break
    return {"loaded_s": loaded_s, "first_step_s": first_step_s, "steady_step_s": steady_step_s}


def measure_start(options: argparse.Namespace, model: str, caches: dict[str, str]) -> dict[str, Any]:
    """One process, whose caches stand in these folders."""
    sizes = ("--model", model, "--drafter", options.drafter, "--device", options.device)
    command = [sys.executable, __file__, *map(str, sizes), "--rows", str(options.rows)]
    command += ["--started", repr(time.time())]
    done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process that was timed ended with {done.returncode}, see above")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    parser = build_parser("Time a start.")
    parser.add_argument("--model", default="demo", help="a folder, a hub id, or 'demo'")
    parser.add_argument("--drafter", default="eagle", help="eagle, eagle-new or a folder with a head")
    parser.add_argument("--rows", type=int, default=8, help="sequences")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # in the process that is timed
    options = parser.parse_args()
    if options.started is not None:
        print(json.dumps(begin(options)))
        return
    model = str(resolve_model(options.model))  # unpacked here, where the demo model has still to be
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: os.path.join(folder, name) for name in _CACHES}
        starts = {name: measure_start(options, model, caches) for name in ("first", "again")}
    for name, own in starts.items():
        print(f"{name}:", "  ".join(f"{part} {'-' if s is None else f'{s:.1f} s'}" for part, s in own.items()))
    finish(describe(options) | {"starts": starts}, options)


if __name__ == "__main__":
    run_bench(main)
