"""What draft learning beside a rollout's tail takes from decoding, and what it takes by itself.

`OMP_NUM_THREADS=1 python bench/side_learning.py --output docs/results/side-learning.json` on a CPU: where PyTorch has a
thread for every core none is idle, and nothing is learnt beside. On a GPU as it is. Rollouts with learning beside them,
and behind them with as many updates, take turns, each with the same noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastgrpo.data import build_task_dataset
from fastgrpo.engine import Engine
from fastgrpo.learner import Learner
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.machine import describe_commit, describe_machine, describe_origin
from fastgrpo.options import check_writable
from fastgrpo.side_learning import SideLearning
from fastgrpo.types import SamplingParams

Row = dict[str, Any]


class School:
    """An engine and its learner; `roll_out` learns beside or behind."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        opened = open_model(options.model, dtype="bfloat16", device=device)
        self.engine = Engine(opened.model, drafter=options.drafter, speculation="auto", tokenizer=opened.tokenizer)
        self.learner = Learner(self.engine.drafter)  # type: ignore[arg-type]  # a head, and so trainable
        self.side = SideLearning(self.learner, self.engine)
        self.engine.on_finish.append(self.learner.add)
        chats = build_task_dataset(options.task, size=options.num_prompts, seed=options.seed)["prompt"]
        self.prompts = [ids for ids in encode_prompts(opened.tokenizer, chats) for _ in range(options.num_generations)]
        self.max_tokens, self.stop_token_ids = options.max_tokens, opened.stop_token_ids

    def roll_out(self, *, seed: int, is_beside: bool, num_updates: int) -> Row:
        """Times of a rollout and of what is learnt of it, once what learning prepares is prepared."""
        params = SamplingParams(max_tokens=self.max_tokens, seed=seed, stop_token_ids=self.stop_token_ids)
        started = time.perf_counter()
        report = None
        if is_beside:
            with self.side.follow():
                self.engine.generate(self.prompts, params)
        else:
            self.engine.generate(self.prompts, params)
        rollout_s = time.perf_counter() - started
        if is_beside:
            if (lesson := self.side.take_lesson()) is not None:
                report = self.learner.finish(lesson)
            self.learner.keep()
        elif num_updates:
            report = self.learner.learn(float("inf"), max_updates=num_updates)
        total_s = time.perf_counter() - started
        records = self.engine.records
        return {
            "way": "beside" if is_beside else "behind",
            "seed": seed,
            "rollout_s": rollout_s,
            "total_s": total_s,
            "num_tokens": sum(record.num_emitted for record in records),
            "num_steps": len(records),
            "num_updates": report.num_updates if report else 0,
            "free_s": report.free_s if report else 0.0,
            "taken_s": self.side.taken_s if is_beside else total_s - rollout_s,
            "update_s": self.learner.update_s,
        }


def take_turns(options: argparse.Namespace) -> list[Row]:
    school, rows = School(options), []
    for seed in range(2):  # prepares kernels, and says what an update takes by itself
        school.roll_out(seed=1000 + seed, is_beside=False, num_updates=4)
    num_updates = 1
    for seed in range(options.repeats):
        for is_beside in (True, False):
            row = school.roll_out(seed=seed, is_beside=is_beside, num_updates=num_updates)
            num_updates = row["num_updates"] if is_beside else num_updates
            rows.append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return rows


def summarise(rows: list[Row]) -> Row:
    """Medians of each way, and what an update takes: of a rollout's time beside it, and by itself."""
    ways = {way: [row for row in rows if row["way"] == way and row["num_updates"]] for way in ("beside", "behind")}
    medians = {
        way: {key: statistics.median(row[key] for row in own) for key in ("rollout_s", "total_s", "num_updates")}
        for way, own in ways.items()
        if own
    }
    beside = ways["beside"]
    num_updates = sum(row["num_updates"] for row in beside)
    return medians | {
        "num_lessons_beside": len(beside),
        "taken_s_an_update": sum(row["taken_s"] for row in beside) / num_updates if num_updates else None,
        "update_s": statistics.median(row["update_s"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What draft learning beside a rollout's tail takes from decoding.")
    parser.add_argument("--model", default="demo", help="a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct")
    parser.add_argument("--drafter", default="eagle", help="of `Engine`, with a head")
    parser.add_argument("--task", default="chain_sum")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-generations", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.output:  # before anything is measured
        check_writable("output", options.output)
    quiet_libraries()
    commit = describe_commit(Path(__file__).parent)  # before it runs: another commit may be made meanwhile
    rows = take_turns(options)
    result = {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python {' '.join(sys.argv)}",
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "commit": commit,
        "machine": describe_machine(),
        **describe_origin(options.model),
        "summary": summarise(rows),
        "rows": rows,
    }
    print(json.dumps(result["summary"], indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
