"""The simulator's command."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from fastgrpo.options.command_line import about, check_distinct, check_positive
from fastgrpo.options.words import DEVICES, DTYPES, MACHINES, MAX_TOKENS, MODEL_SIZES

_MOST_NOISE = 2.0
_OF_MACHINES = ("models", "mean_lengths", "longest_over_mean", "group_sizes", "num_completions")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """`fastgrpo bench simulate`."""

    record: Path | None = field(
        default=None,
        metadata=about("roll out, write to this file what drafts would have gained, and stop", writes=True),
    )
    facts: Path | None = field(default=None, metadata=about("replay a recorded file; its workload is taken from it"))
    model: str = field(
        default="demo", metadata=about("model to record: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct")
    )
    drafter: str = field(
        default="eagle",
        metadata=about("drafter to record: eagle, eagle-new, block, ngram, or a folder of one"),
    )
    task: str = field(default="chain_sum", metadata=about("reasoning-gym task that makes the recorded prompts"))
    num_prompts: int = field(default=8, metadata=about("prompts to record"))
    num_generations: int = field(default=8, metadata=about("completions to record for each prompt"))
    max_tokens: int = field(default=MAX_TOKENS, metadata=about("longest recorded completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("sampling temperature of the recording; 0 is greedy"))
    dtype: str = field(default="bfloat16", metadata=about("type of the recorded model's weights", choices=DTYPES))
    seed: int = field(default=1000, metadata=about("seed of prompts and noise, and of what a simulation draws"))
    device: str = field(
        default="auto", metadata=about("where rollouts run; auto takes the GPU where there is one", choices=DEVICES)
    )
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    skip_measurement: bool = field(
        default=False, metadata=about("replay only: no rollout is measured, so no error can be stated")
    )
    profile: Path | None = field(
        default=None, metadata=about("costs of this machine, a file of fastgrpo profile (default: measured)")
    )
    repeats: int = field(
        default=3, metadata=about("measured rollouts of each planner, and as many that correct its costs")
    )
    devices: tuple[str, ...] = field(
        default=(), metadata=about("machines to plan for by their roofline, separated by commas", choices=MACHINES)
    )
    models: tuple[str, ...] = field(
        default=("8b",), metadata=about("sizes of models on these machines, separated by commas", choices=MODEL_SIZES)
    )
    mean_lengths: tuple[int, ...] = field(
        default=(2000,), metadata=about("mean completion lengths there, in tokens, separated by commas")
    )
    longest_over_mean: float = field(default=4.0, metadata=about("longest completion there, as a multiple of the mean"))
    group_sizes: tuple[int, ...] = field(
        default=(16,), metadata=about("completions of a prompt there, separated by commas")
    )
    num_completions: int = field(default=256, metadata=about("completions in a rollout there"))
    noise: float = field(
        default=0.0, metadata=about("noise of simulated times: the standard deviation of their logarithm")
    )
    output: Path | None = field(
        default=None,
        metadata=about("JSON file for the results, a plot beside it; without it they are only printed", writes=True),
    )

    def __post_init__(self) -> None:
        if (self.record is None) == (self.facts is None):
            raise ValueError("give either a file to record facts to, or a file of facts to replay: --record or --facts")
        check_positive(
            self, "num_prompts", "num_generations", "max_tokens", "max_num_seqs", "repeats", "num_completions"
        )
        check_distinct(self, "devices", "models", "mean_lengths", "group_sizes")
        if self.drafter in ("none", "auto"):
            raise ValueError(f"a draft must depend on its sequence alone to be replayed, got drafter={self.drafter}")
        if self.skip_measurement and self.profile is None and not self.devices and self.record is None:
            raise ValueError("without a measurement there are no costs: name a profile, or devices to plan for")
        if min((*self.mean_lengths, *self.group_sizes), default=0) < 1:
            raise ValueError(
                f"mean_lengths and group_sizes must be at least 1, got {self.mean_lengths} and {self.group_sizes}"
            )
        if not 1 <= self.longest_over_mean < math.inf:
            raise ValueError(f"longest_over_mean must be finite and at least 1, got {self.longest_over_mean}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be finite and at least 0, got {self.noise}")
        if self.noise > _MOST_NOISE:
            raise ValueError(f"noise must be at most {_MOST_NOISE}, a factor of seven, got {self.noise}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for entry in fields(self):
            if entry.name in _OF_MACHINES and not self.devices and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"{entry.name}={getattr(self, entry.name)} is for machines to plan for, and none is named; name "
                    "them with --devices"
                )
