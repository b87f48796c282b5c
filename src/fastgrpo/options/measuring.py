"""Commands that measure the engine alone, or what is below it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from fastgrpo.options.command_line import about, check_distinct, check_positive
from fastgrpo.options.shapes import SHAPE_FORM, parse_speculation
from fastgrpo.options.words import (
    DEVICES,
    DTYPES,
    LONG_TAIL_MAX_TOKENS,
    MAX_TOKENS,
    SPECULATION,
)


@dataclass(frozen=True, kw_only=True)
class DraftersOptions:
    """`fastgrpo bench drafters`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafters: tuple[str, ...] = field(
        default=("eagle", "ngram", "auto"),
        metadata=about("drafters, separated by commas: names, or folders of saved ones"),
    )
    task: str = field(default="chain_sum", metadata=about("reasoning-gym task that makes the prompts"))
    num_prompts: int = field(default=4, metadata=about("prompts in a rollout"))
    num_generations: int = field(default=8, metadata=about("completions for each prompt"))
    epochs: int = field(default=3, metadata=about("rollouts of the same prompts, each with other noise"))
    max_tokens: int = field(default=MAX_TOKENS, metadata=about("longest completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("sampling temperature; 0 is greedy"))
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the weights", choices=DTYPES))
    seed: int = field(default=1000, metadata=about("seed of prompts and noise; 0 to 2 made the shipped head's"))
    output: Path | None = field(
        default=None, metadata=about("JSON file for the results; without it they are only printed", writes=True)
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "num_generations", "epochs", "max_tokens", "max_num_seqs")
        check_distinct(self, "drafters")
        if not self.drafters or "none" in self.drafters:
            raise ValueError(
                f"drafters must name what drafts, got {','.join(self.drafters)!r}; plain decoding is added"
            )


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """`fastgrpo bench rollout`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the weights", choices=DTYPES))
    task: str = field(default="chain_sum", metadata=about("reasoning-gym task that makes the prompts"))
    long_tail: bool = field(
        default=False,
        metadata=about(f"a workload with stragglers: without --max-tokens a cap of {LONG_TAIL_MAX_TOKENS} tokens"),
    )
    num_prompts: int = field(default=4, metadata=about("prompts in a rollout"))
    num_generations: int = field(default=8, metadata=about("completions for each prompt"))
    max_tokens: int | None = field(
        default=None,
        metadata=about(
            f"longest completion, in tokens (default: {MAX_TOKENS}; {LONG_TAIL_MAX_TOKENS} with --long-tail)"
        ),
    )
    temperature: float = field(default=1.0, metadata=about("sampling temperature; 0 is greedy"))
    speculation: tuple[str, ...] = field(
        default=("auto", "off", "paper", "fixed"),
        metadata=about(
            f"variants that roll out in turn, separated by commas: {', '.join(SPECULATION)}, or fixed plans by their "
            f"shape, {SHAPE_FORM}"
        ),
    )
    drafter: str = field(
        default="eagle", metadata=about("eagle, eagle-new (the shipped head left out), ngram, or none")
    )
    head: Path | None = field(
        default=None, metadata=about("folder with a saved EAGLE-3 head (default: what the drafter begins with)")
    )
    draft_vocab_size: int | None = field(
        default=None,
        metadata=about("draft from this many of the head's most frequent tokens (default: 4096 on a CPU, or all)"),
    )
    warmup_steps: int = field(
        default=0, metadata=about("rollouts of other prompts on which the eagle head learns first")
    )
    warmup_learn_s: float = field(default=10.0, metadata=about("learning after each warm-up rollout, in seconds"))
    repeats: int = field(default=3, metadata=about("measured rollouts of each variant, after one that is not measured"))
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    seed: int = field(default=0, metadata=about("seed of prompts and noise; repeat r takes seed + r"))
    output: Path | None = field(
        default=None,
        metadata=about(
            "JSON file for the results, a picture of a rollout beside it; without it they are only printed", writes=True
        ),
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "num_generations", "repeats", "max_num_seqs")
        check_distinct(self, "speculation")
        for word in self.speculation:
            parse_speculation(word)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
        if not 0 < self.warmup_learn_s < math.inf:
            raise ValueError(f"warmup_learn_s must be seconds above 0, got {self.warmup_learn_s}")
        if self.head is not None and self.drafter != "eagle":
            raise ValueError(f"a saved head is drafted with by drafter=eagle, got drafter={self.drafter}")
        if self.draft_vocab_size is not None:
            check_positive(self, "draft_vocab_size")
            if self.drafter not in ("eagle", "eagle-new"):
                raise ValueError(f"only heads have a draft_vocab_size, got drafter={self.drafter}")
        if self.drafter not in ("eagle", "eagle-new", "ngram", "none"):
            raise ValueError(f"drafter must be eagle, eagle-new, ngram or none, got '{self.drafter}'")
        if self.max_tokens is None:
            object.__setattr__(self, "max_tokens", LONG_TAIL_MAX_TOKENS if self.long_tail else MAX_TOKENS)


@dataclass(frozen=True, kw_only=True)
class AcceptanceOptions:
    """`fastgrpo bench acceptance`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafter: str = field(default="eagle", metadata=about("eagle, eagle-new, block, or a folder with a saved head"))
    task: tuple[str, ...] = field(
        default=("gsm_symbolic", "chain_sum"),
        metadata=about("reasoning-gym tasks that make the prompts, separated by commas"),
    )
    temperature: tuple[float, ...] = field(
        default=(1.0, 0.6, 0.0), metadata=about("sampling temperatures, separated by commas; 0 is greedy")
    )
    num_prompts: int = field(default=32, metadata=about("prompts of each task, one completion each"))
    max_tokens: int = field(default=96, metadata=about("longest completion, in tokens"))
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the weights", choices=DTYPES))
    seed: int = field(default=1000, metadata=about("seed of prompts and noise; 0 made the shipped head's"))
    output: Path | None = field(
        default=None,
        metadata=about("JSON file for the results, a plot beside it; without it they are only printed", writes=True),
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "max_tokens", "max_num_seqs")
        check_distinct(self, "task", "temperature")
        if not all(temperature >= 0 for temperature in self.temperature):
            raise ValueError(f"temperature must be >= 0, got {','.join(map(str, self.temperature))}")


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """`fastgrpo profile`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafter: str = field(
        default="eagle",
        metadata=about("eagle, eagle-new, block, ngram, auto, none, or a folder with a saved head or a small LM"),
    )
    prompts: Path | None = field(
        default=None,
        metadata=about("JSONL file of objects with 'prompt' that drafts are measured on (default: those of the task)"),
    )
    skip_broken: bool = field(
        default=False, metadata=about("skip broken lines of a file of prompts, and print how many")
    )
    task: str = field(
        default="chain_sum", metadata=about("reasoning-gym task that makes the prompts where no file is given")
    )
    num_prompts: int = field(default=8, metadata=about("prompts, one completion each, that drafts are measured on"))
    max_tokens: int = field(
        default=48, metadata=about("longest completion, in tokens; fewer on a machine that is too slow")
    )
    temperature: float = field(default=1.0, metadata=about("sampling temperature; 0 is greedy"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the weights", choices=DTYPES))
    seed: int = field(default=1000, metadata=about("seed of prompts and noise; 0 to 2 made the shipped head's"))
    output: Path | None = field(
        default=None,
        metadata=about(
            "JSON file for the profile, a plot beside it; without it they are only printed and cached", writes=True
        ),
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "max_tokens")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
