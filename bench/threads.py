"""Is a core idle while few sequences decode? A plain step of some live sequences, with one thread and with more.

`python bench/threads.py --output docs/results/threads.json`. Processes with so many OpenMP threads take turns; medians
of all steps. Where a second core wins nothing it stands idle in the tail of a rollout, and drafts could learn on it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastgrpo.engine import Engine
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.machine import describe_commit, describe_machine
from fastgrpo.options import check_writable
from fastgrpo.types import SamplingParams

QUESTION = [[{"role": "user", "content": "Write a long story about a river that wanted to see the mountains."}]]
NUM_SEQS = (1, 2, 4, 8, 16, 32)


def measure_steps(num_tokens: int) -> dict[int, list[float]]:
    """Milliseconds of each step but the first, by live sequences, in this process."""
    quiet_libraries()
    opened = open_model("demo", dtype="bfloat16", device="cpu")
    engine = Engine(opened.model, drafter="none", speculation="off")
    prompt = encode_prompts(opened.tokenizer, QUESTION)[0]
    steps = {}
    for num_seqs in NUM_SEQS:
        engine.generate([prompt] * num_seqs, SamplingParams(max_tokens=num_tokens, seed=1))  # nothing stops it
        steps[num_seqs] = [1000 * record.step_s for record in engine.records[1:]]
    return steps


def take_turns(threads: list[int], rounds: int, num_tokens: int) -> dict[int, dict[int, float]]:
    taken: dict[int, dict[int, list[float]]] = {count: {n: [] for n in NUM_SEQS} for count in threads}
    for turn in range(rounds):
        for count in threads:
            own = subprocess.run(
                [sys.executable, __file__, "--steps", str(num_tokens)],
                env=os.environ | {"OMP_NUM_THREADS": str(count)},
                stdout=subprocess.PIPE,
                check=True,
            )
            for num_seqs, steps in json.loads(own.stdout).items():
                taken[count][int(num_seqs)] += steps
            print(f"round {turn + 1}/{rounds}, {count} threads: done", flush=True)
    return {count: {n: round(statistics.median(steps), 2) for n, steps in own.items()} for count, own in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="A plain step of some live sequences, with one thread and with more.")
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, help="measure so many tokens in this process and print every step")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.output:  # before anything is measured
        check_writable("output", options.output)
    if options.steps:
        print(json.dumps(measure_steps(options.steps)))
        return
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": describe_commit(Path(__file__).parent),
        "machine": describe_machine(),
        "milliseconds": take_turns(options.threads, options.rounds, options.num_tokens),
    }
    print(json.dumps(result["milliseconds"]))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
