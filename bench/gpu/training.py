"""Where a training step's time goes on this device: what the host is at, what the device, and how much is launched.

`python bench/gpu/training.py --output docs/results/gpu-training.json`: updates of given rows, as `fastgrpo bench
update` has them, or with --whole steps of `fastgrpo bench e2e`. The seconds are of steps that are left alone;
PyTorch's profiler looks at the last one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from limits import build_parser, describe, finish, run_bench
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.bench.given_rows import give_rows
from fastgrpo.bench.training import build_trainer, find_trainer_class
from fastgrpo.loading import quiet_libraries
from fastgrpo.options import E2EOptions, UpdateOptions

_LINES = 15  # of what takes longest
_SHORT = {"min_completion_length": 20, "max_completion_length": 96}
_TINY = {"prompts_per_step": 1, "num_generations": 2, "max_completion_length": 12, "dtype": "float32"}


class _Watch(TrainerCallback):
    """Times steps to the device's end, and profiles the last."""

    def __init__(self, steps: int) -> None:
        self.step_s: list[float] = []
        self.profiled: profile | None = None
        self._steps, self._started = steps, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._steps - 1:
            device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiled = profile(activities=[ProfilerActivity.CPU, *device]).__enter__()
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.profiled is None:
            self.step_s.append(time.perf_counter() - self._started)
        else:
            self.profiled.__exit__(None, None, None)


def take_apart(variant: str, options: E2EOptions, steps: int) -> dict[str, Any]:
    """Steps of one trainer, the first left out."""
    watch = _Watch(steps)
    own = find_trainer_class(variant)
    trainer_class = give_rows(own, options, []) if isinstance(options, UpdateOptions) else own
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            options, variant=variant, steps=steps, output_dir=Path(folder), trainer_class=trainer_class
        )
        trainer.add_callback(watch)
        trainer.train()
    assert watch.profiled is not None
    events = watch.profiled.key_averages()
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    return {
        "step_s": statistics.median(watch.step_s[1:]),
        "each_step_s": watch.step_s,
        "device_s": sum(event.self_device_time_total for event in kernels) / 1e6,
        "launches": sum(event.count for event in events if "aunchKernel" in event.key),
        "host": _list_longest(events, "self_cpu_time_total"),
        "device": _list_longest(kernels, "self_device_time_total"),
    }


def _list_longest(events: Any, measure: str) -> list[dict[str, Any]]:
    """In the profiled step."""
    ranked = sorted(events, key=lambda event: -float(getattr(event, measure)))[:_LINES]
    return [
        {"name": event.key, "ms": getattr(event, measure) / 1e3, "calls": event.count}
        for event in ranked
        if getattr(event, measure)
    ]


def main() -> None:
    parser = build_parser("Take training steps apart.")
    parser.add_argument("--model", default="demo", help="a folder, a hub id, or 'demo'")
    parser.add_argument("--variants", default="off,trl", help="as in fastgrpo bench e2e, separated by commas")
    parser.add_argument("--whole", action="store_true", help="rollouts too")
    parser.add_argument("--steps", type=int, default=6, help="of each; the first is left out, the last profiled")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps must be at least 3, got {options.steps}")
    sizes: dict[str, Any] = {"model": options.model} | ({} if options.whole else _SHORT)
    if options.tiny:
        sizes |= _TINY | ({} if options.whole else {"prompt_length": 6, "min_completion_length": 4})
        sizes |= {"drafter": "eagle-new"}
    workload = (E2EOptions if options.whole else UpdateOptions)(**sizes)
    quiet_libraries()
    found: dict[str, dict[str, Any]] = {}
    for variant in options.variants.split(","):
        found[variant] = own = take_apart(variant, workload, options.steps)
        print(f"{variant}: {own['step_s']:.3f} s, the device {own['device_s']:.3f} s, {own['launches']} launches")
        for where in ("host", "device"):
            longest = [f"{entry['name']} {entry['ms']:.1f} ms ({entry['calls']})" for entry in own[where][:5]]
            print(f"  {where}:", ", ".join(longest))
    finish(describe(options) | {"variants": found}, options)


if __name__ == "__main__":
    run_bench(main)
