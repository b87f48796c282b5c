"""Commands about draft models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastgrpo.options.command_line import about, check_positive
from fastgrpo.options.words import (
    DEVICES,
    DTYPES,
    HEAD_KINDS,
)


@dataclass(frozen=True, kw_only=True)
class DraftTrainOptions:
    """`fastgrpo draft train`."""

    model: str = field(
        default="demo", metadata=about("target: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct")
    )
    kind: str = field(
        default="eagle",
        metadata=about("eagle drafts level by level (EAGLE-3), block all levels in one pass", choices=HEAD_KINDS),
    )
    output: Path = field(
        default=Path("runs/draft"),
        metadata=about("folder for the head and the run's state; an existing one is resumed"),
    )
    data: Path | None = field(
        default=None, metadata=about("JSONL file of objects with 'prompt': text, or a list of chat messages")
    )
    skip_broken: bool = field(
        default=False, metadata=about("skip broken lines of a file of prompts, and print how many")
    )
    answers: Path | None = field(
        default=None,
        metadata=about(
            "answers.jsonl of another run, in place of drawing answers; of a model that says the same: to train heads "
            "of other kinds or sizes, or one in a grown body"
        ),
    )
    task: tuple[str, ...] = field(
        default=("chain_sum",),
        metadata=about(
            "reasoning-gym tasks that make the prompts, separated by commas; without a file of prompts; NAME:3 takes "
            "three times a single share of them"
        ),
    )
    num_prompts: int = field(default=512, metadata=about("prompts of all tasks together; without a file of prompts"))
    num_generations: int = field(default=4, metadata=about("answers of the target to each prompt"))
    max_prompt_length: int = field(default=1024, metadata=about("longer prompts are left out, in tokens"))
    max_tokens: int = field(default=256, metadata=about("longest answer, in tokens"))
    temperature: float = field(
        default=1.0, metadata=about("sampling temperature of the answers; use that of your rollouts")
    )
    updates: int = field(default=4000, metadata=about("optimiser steps"))
    batch_tokens: int = field(
        default=512, metadata=about("answer tokens of one step, about; a GPU can take more in the same time")
    )
    learning_rate: float = field(default=2e-3, metadata=about("peak AdamW learning rate of the head"))
    head: Path | None = field(
        default=None,
        metadata=about("folder with a head of that kind to begin with (default: the target's own last layers)"),
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata=about(
            "tokens that can be drafted: the most frequent of the answers (default: 4096 on a CPU, 16384 on a GPU)"
        ),
    )
    compact: bool = field(
        default=False, metadata=about("save in bfloat16 without output rows, which are the target's own")
    )
    feature_cache_gib: float = field(default=4.0, metadata=about("memory for keeping features between passes, in GiB"))
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the target's weights", choices=DTYPES))
    seed: int = field(default=0, metadata=about("seed of prompts, noise and order"))

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "num_generations", "max_prompt_length", "max_tokens", "updates")
        check_positive(self, "batch_tokens", "temperature", "learning_rate", "feature_cache_gib", "max_num_seqs")
        if self.draft_vocab_size is not None:
            check_positive(self, "draft_vocab_size")
        if self.answers is not None and self.data is not None:
            raise ValueError(f"answers ({self.answers}) and data ({self.data}) are both given: name one of them")
        self.compute_shares()

    def compute_shares(self) -> dict[str, float]:
        """Share of the prompts, in (0, 1], that each task makes."""
        weights: dict[str, float] = {}
        for word in self.task:
            name, _, weight = word.partition(":")
            try:
                weights[name] = weights.get(name, 0.0) + (float(weight) if weight else 1.0)
            except ValueError:
                raise ValueError(f"task {word!r}: the share after the colon must be a number, as in {name}:3") from None
            if not 0 < weights[name] < float("inf"):
                raise ValueError(f"task {word!r}: the share after the colon must be a positive number")
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class DraftExportOptions:
    """`fastgrpo draft export`."""

    model: str = field(
        default="demo", metadata=about("target: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct")
    )
    head: Path | None = field(
        default=None, metadata=about("folder with a head, or a training checkpoint (default: the head that ships)")
    )
    output: Path = field(default=Path("runs/exported"), metadata=about("new folder for the EAGLE-3 checkpoint"))
    dtype: str = field(default="bfloat16", metadata=about("type of the weights on file", choices=DTYPES))


@dataclass(frozen=True, kw_only=True)
class DraftImportOptions:
    """`fastgrpo draft import`."""

    source: Path | None = field(
        default=None, metadata=about("folder with an EAGLE-3 checkpoint, or one in the speculators format; needed")
    )
    model: str = field(
        default="demo", metadata=about("target: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct")
    )
    output: Path = field(default=Path("runs/imported"), metadata=about("new folder for the head"))
    data: Path | None = field(
        default=None, metadata=about("JSONL file of objects with 'prompt', to measure acceptance on")
    )
    skip_broken: bool = field(
        default=False, metadata=about("skip broken lines of a file of prompts, and print how many")
    )
    task: str = field(
        default="chain_sum", metadata=about("reasoning-gym task that makes the prompts; without a file of prompts")
    )
    num_prompts: int = field(default=16, metadata=about("prompts that the target answers"))
    max_tokens: int = field(default=128, metadata=about("longest answer, in tokens"))
    temperature: float = field(default=1.0, metadata=about("sampling temperature of the answers; 0 is greedy"))
    least_acceptance: float = field(
        default=0.1,
        metadata=about("share of first draft tokens that must be accepted, in [0, 1]; a head below it is refused"),
    )
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the target's weights", choices=DTYPES))
    seed: int = field(default=0, metadata=about("seed of prompts and noise"))

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "max_tokens")
        if self.source is None:
            raise ValueError("which head? name its folder with --source")
        if not 0 <= self.least_acceptance <= 1:
            raise ValueError(f"least_acceptance must be in [0, 1], got {self.least_acceptance}")
