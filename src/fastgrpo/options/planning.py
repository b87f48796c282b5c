"""Commands that measure plans with a constant number of live sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastgrpo.options.command_line import about, check_distinct, check_positive
from fastgrpo.options.shapes import SHAPE_FORM, parse_plan, parse_speculation
from fastgrpo.options.words import DEVICES, DTYPES, LONG_TAIL_MAX_TOKENS


@dataclass(frozen=True, kw_only=True)
class SteadyOptions:
    """What rollouts with a constant number of live sequences are made of; a command adds its own."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafter: str = field(
        default="eagle", metadata=about("eagle, eagle-new, block, ngram, or a folder with a saved one")
    )
    task: str = field(default="gsm_symbolic", metadata=about("reasoning-gym task that makes the prompts"))
    num_prompts: int = field(default=8, metadata=about("distinct prompts; requests take them in turn"))
    max_tokens: int = field(default=128, metadata=about("longest completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("sampling temperature; 0 is greedy"))
    max_num_tokens: int = field(
        default=512, metadata=about("largest target forward, in tokens; plans that need more are left out")
    )
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the weights", choices=DTYPES))
    seed: int = field(default=1000, metadata=about("seed of prompts and noise; 0 to 2 made the shipped head's"))
    output: Path | None = field(
        default=None,
        metadata=about("JSON file for the results, a plot beside it; without it they are only printed", writes=True),
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_prompts", "max_tokens", "max_num_tokens")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.drafter == "none":
            raise ValueError("drafter must name what drafts, got 'none'; plain decoding is added")


@dataclass(frozen=True, kw_only=True)
class PlansOptions(SteadyOptions):
    """`fastgrpo bench plans`."""

    concurrency: tuple[int, ...] = field(
        default=(1, 2, 4, 8, 16, 32, 64), metadata=about("numbers of live sequences, separated by commas")
    )
    plans: tuple[str, ...] = field(
        default=(
            *("1x1x1", "1x3x3", "2x1x2", "2x2x4", "2x3x6", "3x1x3", "3x3x8"),
            *("4x2x8", "4x4x16", "5x4x24", "6x8x32", "8x8x48"),
        ),
        metadata=about(f"fixed plans beside auto and plain decoding, separated by commas: {SHAPE_FORM}"),
    )
    tokens_per_seq: int = field(
        default=40, metadata=about("mean tokens that each live sequence emits in a measured rollout")
    )
    min_tokens: int = field(default=120, metadata=about("fewest tokens in a measured rollout, all sequences together"))
    repeats: int = field(default=3, metadata=about("measured rollouts of each plan, in turn"))
    warmups: int = field(default=2, metadata=about("rollouts in which auto learns first, at each concurrency"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "tokens_per_seq", "min_tokens", "repeats", "warmups")
        check_grid(self.concurrency, self.plans, self.max_num_tokens)
        check_distinct(self, "concurrency", "plans")


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(SteadyOptions):
    """`fastgrpo bench budget`."""

    concurrency: tuple[int, ...] = field(
        default=(2, 4, 8, 16, 32, 64), metadata=about("numbers of live sequences, separated by commas")
    )
    plans: tuple[str, ...] = field(
        default=("1x4x1", "1x4x2", "2x2x2", "2x4x4", "3x2x4", "3x3x8", "4x4x8", "4x4x16", "5x4x16"),
        metadata=about(
            f"plans, separated by commas; among those with equal draft tokens the best counts: {SHAPE_FORM}"
        ),
    )
    most: int = field(
        default=4,
        metadata=about("limit on draft tokens of one sequence under a shared budget, as a multiple of the mean"),
    )
    tokens_per_seq: int = field(
        default=24, metadata=about("mean tokens that each live sequence emits in a measured rollout")
    )
    min_tokens: int = field(default=256, metadata=about("fewest tokens in a measured rollout, all sequences together"))
    repeats: int = field(default=2, metadata=about("measured rollouts of each plan with either budget, in turn"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "tokens_per_seq", "min_tokens", "repeats")
        check_grid(self.concurrency, self.plans, self.max_num_tokens)
        check_distinct(self, "concurrency", "plans")
        if self.most < 2:
            raise ValueError(f"most must be at least 2, got {self.most}; with 1 all sequences get as many")


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """`fastgrpo bench order`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafter: str = field(
        default="eagle", metadata=about("eagle, eagle-new, block, ngram, or a folder with a saved one")
    )
    speculation: str = field(default="auto", metadata=about(f"how it speculates: a planner, or a plan, {SHAPE_FORM}"))
    tasks: tuple[str, ...] = field(
        default=("chain_sum", "products"),
        metadata=about("reasoning-gym tasks with short and with long answers, separated by commas"),
    )
    num_prompts: tuple[int, ...] = field(
        default=(12, 4), metadata=about("prompts of each task, a number for each, separated by commas")
    )
    num_generations: int = field(default=4, metadata=about("completions for each prompt"))
    max_tokens: int = field(default=LONG_TAIL_MAX_TOKENS, metadata=about("longest completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("sampling temperature; 0 is greedy"))
    max_num_seqs: int = field(default=16, metadata=about("sequences decoded together; the others wait"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the weights", choices=DTYPES))
    seed: int = field(default=1000, metadata=about("seed of prompts and noise; 0 to 2 made the shipped head's"))
    repeats: int = field(default=3, metadata=about("measured rollouts in each order, in turn"))
    output: Path | None = field(
        default=None,
        metadata=about("JSON file for the results, a plot beside it; without it they are only printed", writes=True),
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_generations", "max_tokens", "max_num_seqs", "repeats")
        check_distinct(self, "tasks")  # else other prompts of the one are the prompts of the other
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        parse_speculation(self.speculation)
        if not self.tasks or len(self.tasks) != len(self.num_prompts) or min(self.num_prompts) < 1:
            raise ValueError(
                f"num_prompts must have a number of at least 1 for each of tasks={','.join(self.tasks)}, "
                f"got {','.join(map(str, self.num_prompts))}"
            )
        num_requests = sum(self.num_prompts) * self.num_generations
        if num_requests <= self.max_num_seqs:
            raise ValueError(
                f"{num_requests} requests fit into max_num_seqs={self.max_num_seqs} slots, so that nobody waits: "
                "take fewer slots, or more prompts"
            )


def check_grid(concurrency: tuple[int, ...], plans: tuple[str, ...], max_num_tokens: int) -> None:
    """Numbers of live sequences, and shapes of plans of which at least one is measured."""
    if not concurrency or min(concurrency) < 1:
        raise ValueError(
            f"concurrency must name numbers of live sequences of at least 1, got '{','.join(map(str, concurrency))}'"
        )
    if not plans:
        raise ValueError(f"plans must name at least one shape, {SHAPE_FORM}; got none")
    sizes = {shape: 1 + parse_plan(shape).num_draft_tokens for shape in plans}
    smallest = min(sizes, key=sizes.__getitem__)
    if min(concurrency) * sizes[smallest] > max_num_tokens:
        raise ValueError(
            f"max_num_tokens={max_num_tokens} leaves every plan out: {smallest} with {min(concurrency)} live takes "
            f"{min(concurrency) * sizes[smallest]} tokens a forward"
        )
