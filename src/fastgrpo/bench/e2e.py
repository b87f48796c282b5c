"""`fastgrpo bench e2e`: whole training steps of TRL's trainer and of ours, in turn."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from fastgrpo.bench.baton import Baton, TurnCallback, run_in_turn
from fastgrpo.bench.measure import compute_median, describe_run
from fastgrpo.bench.training import STOCK, build_trainer, find_trainer_class
from fastgrpo.loading import quiet_libraries
from fastgrpo.metrics import compute_ratio
from fastgrpo.options import E2EOptions, Workload
from fastgrpo.report import write_json

NUM_MEMORY_STEPS = 3
_MEDIANS = ("generation_s", "learn_s", "update_s", "step_s", "tokens_per_s", "s_per_token", "mean_length", "max_length")


@dataclasses.dataclass(kw_only=True)
class _Phases:
    """Seconds and lengths of the training step that runs now."""

    generation_s: float = 0.0
    generate_and_score_s: float = 0.0  # generation, rewards and draft learning
    lengths: list[int] = dataclasses.field(default_factory=list)


class _Variant:
    """One trainer, and a row for each of its steps."""

    def __init__(self, name: str, options: E2EOptions, baton: Baton, output_dir: Path, console: Console) -> None:
        self.rows: list[dict[str, float]] = []
        self._name, self._steps, self._console = name, options.steps, console
        self._phases = _Phases()
        timed = _time_phases(find_trainer_class(name), self)
        self.trainer = build_trainer(
            options, variant=name, steps=options.steps, output_dir=output_dir, trainer_class=timed
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(TurnCallback(baton, name, self._finish_step))

    @property
    def phases(self) -> _Phases:
        return self._phases

    def _finish_step(self, step_s: float) -> None:
        phases, engine = self._phases, getattr(self.trainer, "engine", None)
        self._phases = _Phases()
        learn_s = self.trainer._metrics["train"].get("draft/learn_s", [])[-1:]
        records = engine.records if engine else []
        num_tokens = sum(phases.lengths)
        self.rows.append(
            {
                "step_s": step_s,
                "generation_s": phases.generation_s,
                "learn_s": sum(learn_s),
                "score_s": phases.generate_and_score_s - phases.generation_s - sum(learn_s),
                "update_s": step_s - phases.generate_and_score_s,
                "num_tokens": num_tokens,
                "tokens_per_s": num_tokens / phases.generation_s,
                "s_per_token": phases.generation_s / num_tokens,
                "mean_length": num_tokens / len(phases.lengths),
                "max_length": max(phases.lengths),
                "acceptance_length": compute_ratio(
                    sum(record.num_emitted for record in records), sum(record.num_seqs for record in records)
                ),
            }
        )
        place = f"{self._name:>5} step {len(self.rows)}/{self._steps}"
        self._console.print(f"{place}: {step_s:.1f} s, of it generation {phases.generation_s:.1f} s", highlight=False)


def _time_phases(trainer_class: type[Any], variant: _Variant) -> type[Any]:
    """A trainer of this class that tells `variant` how long its rollouts take."""

    class Timed(trainer_class):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = super()._generate_single_turn(*args, **kwargs)
            variant.phases.generation_s += time.perf_counter() - started
            variant.phases.lengths += [len(ids) for ids in output[0]]
            return output

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            variant.phases.generate_and_score_s += time.perf_counter() - started
            return output

    return Timed


def run_e2e_bench(options: E2EOptions, command: str, console: Console | None = None) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results; returns them.

    Raises:
        ValueError: a setting does not fit the model.
        RuntimeError: a process of `--memory` failed.
    """
    console = console or Console()
    quiet_libraries()
    memory = _measure_memory(options, console) if options.memory else {}  # first: this process is still small
    rows = _train_in_turn(options, console)
    medians = {name: _compute_medians(own) for name, own in rows.items()}
    result = describe_run(command, dataclasses.asdict(options)) | {
        "medians": medians,
        "ratios": _compute_ratios(medians) + _compute_memory_ratios(memory),
        "least_generation_ratio": _compute_least_ratio(rows),
        "peak_memory": {"rss_bytes": read_peak_rss_bytes(), "gpu_bytes": _read_peak_gpu_bytes()},
        "memory": memory,
        "steps": rows,
    }
    _print(result, console)
    if options.output is not None:
        write_json(result, options.output, indent=1)
        console.print(f"written: {options.output}", markup=False, highlight=False, soft_wrap=True)
    return result


def _train_in_turn(options: E2EOptions, console: Console) -> dict[str, list[dict[str, float]]]:
    """The rows of each variant's steps."""
    names = list(dict.fromkeys(options.variants))
    baton = Baton(names)
    with tempfile.TemporaryDirectory() as folder:
        variants = {name: _Variant(name, options, baton, Path(folder) / name, console) for name in names}
        runners: dict[str, Callable[[], object]] = {name: own.trainer.train for name, own in variants.items()}
        run_in_turn(baton, runners)
    return {name: own.rows for name, own in variants.items()}


def _compute_medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Over all steps but the first, which calibrates and touches memory for the first time."""
    settled = rows[1:] or rows
    medians = {key: compute_median(row[key] for row in settled) for key in _MEDIANS}
    return medians | {"acceptance_length": compute_median(row["acceptance_length"] for row in settled)}


def _compute_ratios(medians: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """How many times faster each variant is than each one before it."""
    names = list(medians)
    return [
        {
            "measure": measure,
            "variant": name,
            "baseline": baseline,
            "ratio": compute_ratio(medians[baseline][measure], medians[name][measure]),
        }
        for index, name in enumerate(names)
        for baseline in names[:index]
        for measure in ("generation_s", "s_per_token", "step_s")
    ]


def _compute_memory_ratios(memory: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as much memory a variant takes as TRL's trainer."""
    baseline = memory.get(STOCK)
    if baseline is None:
        return []
    return [
        {"measure": "rss_bytes", "variant": name, "baseline": STOCK, "ratio": own["rss_bytes"] / baseline["rss_bytes"]}
        for name, own in memory.items()
        if name != STOCK
    ]


def _compute_least_ratio(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any] | None:
    """The worst step of `auto` after the first: its tokens per second beside those of `off` in the same step."""
    if not {"off", "auto"} <= rows.keys():
        return None
    pairs = list(zip(rows["off"], rows["auto"], strict=True))[1:]
    ratios = [auto["tokens_per_s"] / off["tokens_per_s"] for off, auto in pairs]
    return {"measure": "tokens_per_s", "variant": "auto", "baseline": "off", "ratio": min(ratios)} if ratios else None


def read_peak_rss_bytes() -> int:
    """Most memory this process has held.

    `getrusage` of a process started by vfork begins with its parent's peak, so Linux's own count of
    this program's memory comes first.
    """
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read_peak_gpu_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _measure_memory(options: E2EOptions, console: Console) -> dict[str, dict[str, Any]]:
    """Peak memory of each variant, each in a process of its own."""
    memory = {}
    for name in dict.fromkeys(options.variants):
        console.print(f"peak memory of {name}: {NUM_MEMORY_STEPS} steps in a process of its own", highlight=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [
                sys.executable,
                "-m",
                "fastgrpo.cli",
                "bench",
                "e2e",
                *_build_memory_arguments(options, name, path),
            ]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode != 0:
                raise RuntimeError(f"the memory run of {name} failed:\n{answer.stderr[-2000:]}")
            memory[name] = json.loads(path.read_text(encoding="utf-8"))["peak_memory"]
    return memory


def _build_memory_arguments(options: E2EOptions, name: str, path: Path) -> list[str]:
    shared = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(Workload)}
    chosen = {**shared, "variants": name, "steps": NUM_MEMORY_STEPS, "output": path}
    return [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table(title="medians over training steps", title_justify="left")
    table.add_column("variant")
    for heading in ("generation s", "update s", "step s", "tokens/s", "ms/token", "length", "acceptance"):
        table.add_column(heading, justify="right")
    for name, own in result["medians"].items():
        seconds = [f"{own[key]:.2f}" for key in ("generation_s", "update_s", "step_s")]
        rates = [f"{own['tokens_per_s']:.1f}", f"{1000 * own['s_per_token']:.2f}", f"{own['mean_length']:.0f}"]
        acceptance = own["acceptance_length"]
        table.add_row(name, *seconds, *rates, f"{acceptance:.2f}" if acceptance == acceptance else "-")
    console.print(table)
    least = result["least_generation_ratio"]
    for entry in result["ratios"]:
        words = "the memory" if entry["measure"] == "rss_bytes" else "faster"
        console.print(
            f"{entry['measure']}: {entry['variant']} {entry['ratio']:.2f}x {words} vs {entry['baseline']}",
            highlight=False,
        )
    if least is not None:
        console.print(f"tokens/s: auto {least['ratio']:.2f}x of off in its worst step", highlight=False)
