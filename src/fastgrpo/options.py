"""What the commands take: one record for each, read from the command line. Light: no torch, no trl."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
SPECULATION = ("auto", "off", "paper", "fixed")
HEAD_KINDS = ("eagle", "block")
TRAINING_VARIANTS = ("trl", "off", "auto", "paper", "fixed")
MAX_TOKENS, LONG_TAIL_MAX_TOKENS = 96, 320  # of chain_sum; the second is about 5 times its mean length

Record = TypeVar("Record")


def about(help: str, *, choices: tuple[str, ...] = (), many: bool = False) -> dict[str, Any]:
    """What makes a field an option of the command line; the help adds its default, unless that is None.

    Args:
        help: what it does, with its unit.
        choices: the words it takes; a tuple of words takes several, parted by commas.
        many: takes several arguments, parted by spaces.
    """
    return {"help": help, "choices": choices, "many": many}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, on what, and how: the demo's settings, which `bench e2e` shares."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    dtype: str = field(default="bfloat16", metadata=about("type of the base weights", choices=DTYPES))
    task: str = field(default="chain_sum", metadata=about("reasoning-gym task that makes prompts and checks answers"))
    prompts_per_step: int = field(default=4, metadata=about("prompts in a training step"))
    num_generations: int = field(default=8, metadata=about("completions for each prompt (the group of GRPO)"))
    max_completion_length: int = field(default=96, metadata=about("longest completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("sampling temperature, above 0"))
    learning_rate: float = field(default=2e-4, metadata=about("AdamW learning rate of the policy"))
    lora_rank: int = field(
        default=16, metadata=about("rank of LoRA on all linear layers (alpha is twice the rank); 0 trains all weights")
    )
    format_weight: float = field(
        default=0.0, metadata=about("weight of the reward for ending with 'The answer is ...'; 0 leaves it out")
    )
    drafter: str = field(
        default="eagle",
        metadata=about(
            "eagle (a head trained online; begins with the shipped one where there is one), eagle-new (begins from "
            "the target's own weights), block (drafts in one pass), ngram, none, auto (eagle and ngram, whichever "
            "pays), or a folder with a saved head or a small LM of the same tokenizer"
        ),
    )
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together; others wait for a slot"))
    seed: int = field(default=0, metadata=about("seed of weights, data and noise"))

    def __post_init__(self) -> None:
        _check_positive(self, "prompts_per_step", "max_completion_length", "max_num_seqs")
        _check_positive(self, "temperature", "learning_rate")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2 to compare completions, got {self.num_generations}")
        if min(self.lora_rank, self.format_weight) < 0:
            raise ValueError(f"lora_rank and format_weight must be >= 0, got {self.lora_rank}, {self.format_weight}")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Workload):
    """`fastgrpo demo`."""

    steps: int = field(default=24, metadata=about("training steps"))
    repeats: int = field(default=2, metadata=about("rollouts of each kind measured before and after the training"))
    speculation: str = field(default="auto", metadata=about("how drafts are sized", choices=SPECULATION))
    output: Path = field(default=Path("runs/demo"), metadata=about("folder for run.json and run.png"))

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "steps", "repeats")


@dataclass(frozen=True, kw_only=True)
class E2EOptions(Workload):
    """`fastgrpo bench e2e`."""

    steps: int = field(
        default=10, metadata=about("training steps of each variant; the first is left out of the medians")
    )
    variants: tuple[str, ...] = field(
        default=("trl", "off", "auto"),
        metadata=about(
            "trainers that step in turn, parted by commas: trl (TRL's GRPOTrainer, transformers generation), or "
            "FastGRPOTrainer with this speculation",
            choices=TRAINING_VARIANTS,
        ),
    )
    output: Path | None = field(
        default=None, metadata=about("JSON file for the results; without it they are only printed")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "steps")


@dataclass(frozen=True, kw_only=True)
class LearningOptions(Workload):
    """`fastgrpo bench learning`."""

    steps: int = field(default=30, metadata=about("training steps of the run whose rollouts are learnt from"))
    losses: tuple[str, ...] = field(
        default=("kl", "kl+tv", "lk", "overlap", "coupled"), metadata=about("losses to learn with, parted by commas")
    )
    starts: tuple[str, ...] = field(
        default=("eagle", "eagle-new"),
        metadata=about("heads to begin with, parted by commas: eagle (the shipped one), eagle-new, or folders"),
    )
    updates: int = field(default=8, metadata=about("updates after each rollout at most, of about 256 tokens each"))
    rollouts: Path | None = field(
        default=None,
        metadata=about("safetensors file of the rollouts; written by the run, and read instead of a run if it exists"),
    )
    output: Path | None = field(
        default=None, metadata=about("JSON file for the results, a plot beside it; without it they are only printed")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "steps", "updates")


@dataclass(frozen=True, kw_only=True)
class DraftersOptions:
    """`fastgrpo bench drafters`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafters: tuple[str, ...] = field(
        default=("eagle", "ngram", "auto"),
        metadata=about("drafters, parted by commas: names, or folders of saved ones"),
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
    seed: int = field(default=1000, metadata=about("seed of prompts and noise; 0 and 1 made the shipped head's"))
    output: Path | None = field(
        default=None, metadata=about("JSON file for the results; without it they are only printed")
    )

    def __post_init__(self) -> None:
        _check_positive(self, "num_prompts", "num_generations", "epochs", "max_tokens", "max_num_seqs")
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
        default=False, metadata=about("a workload with stragglers: the cap is at least 3 times the mean length")
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
        default=SPECULATION, metadata=about("variants that roll out in turn, parted by commas", choices=SPECULATION)
    )
    drafter: str = field(
        default="eagle", metadata=about("eagle, eagle-new (the shipped head left out), ngram, or none")
    )
    head: Path | None = field(
        default=None, metadata=about("folder with a saved EAGLE-3 head (default: one started from the target)")
    )
    warmup_steps: int = field(
        default=0, metadata=about("rollouts of other prompts on which the eagle head learns first")
    )
    warmup_learn_s: float = field(default=10.0, metadata=about("learning after each warm-up rollout, in seconds"))
    repeats: int = field(default=3, metadata=about("measured rollouts of each variant, after one that is not measured"))
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    seed: int = field(default=0, metadata=about("seed of prompts and noise; repeat r takes seed + r"))
    output: Path | None = field(
        default=None, metadata=about("JSON file for the results; without it they are only printed")
    )

    def __post_init__(self) -> None:
        _check_positive(self, "num_prompts", "num_generations", "repeats", "max_num_seqs")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
        if self.head is not None and self.drafter != "eagle":
            raise ValueError(f"a saved head is drafted with by drafter=eagle, got drafter={self.drafter}")
        if self.drafter not in ("eagle", "eagle-new", "ngram", "none"):
            raise ValueError(f"drafter must be eagle, eagle-new, ngram or none, got '{self.drafter}'")
        if self.max_tokens is None:
            object.__setattr__(self, "max_tokens", LONG_TAIL_MAX_TOKENS if self.long_tail else MAX_TOKENS)


@dataclass(frozen=True, kw_only=True)
class AcceptanceOptions:
    """`fastgrpo bench acceptance`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    drafter: str = field(default="eagle", metadata=about("eagle, eagle-new, or a folder with a saved EAGLE-3 head"))
    task: tuple[str, ...] = field(
        default=("gsm_symbolic", "chain_sum"),
        metadata=about("reasoning-gym tasks that make the prompts, parted by commas"),
    )
    temperature: tuple[float, ...] = field(
        default=(1.0, 0.6, 0.0), metadata=about("sampling temperatures, parted by commas; 0 is greedy")
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
        metadata=about("JSON file for the results, a plot beside it; without it they are only printed"),
    )

    def __post_init__(self) -> None:
        _check_positive(self, "num_prompts", "max_tokens", "max_num_seqs")
        if not all(temperature >= 0 for temperature in self.temperature):
            raise ValueError(f"temperature must be >= 0, got {','.join(map(str, self.temperature))}")


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
        default=Path("runs/draft"), metadata=about("folder for the head and the run's state; the same one goes on")
    )
    data: Path | None = field(
        default=None, metadata=about("JSONL file of objects with 'prompt': text, or a list of chat messages")
    )
    skip_broken: bool = field(
        default=False, metadata=about("go on without the broken lines of a file of prompts; how many is said")
    )
    task: tuple[str, ...] = field(
        default=("chain_sum",),
        metadata=about(
            "reasoning-gym tasks that make the prompts, parted by commas; without a file of prompts; NAME:3 takes "
            "three times a single share of them"
        ),
    )
    num_prompts: int = field(default=512, metadata=about("prompts of all tasks together; without a file of prompts"))
    num_generations: int = field(default=4, metadata=about("answers of the target to each prompt"))
    max_prompt_length: int = field(default=1024, metadata=about("longer prompts are left out, in tokens"))
    max_tokens: int = field(default=256, metadata=about("longest answer, in tokens"))
    temperature: float = field(default=1.0, metadata=about("of the answers; train at the one you will roll out with"))
    updates: int = field(default=4000, metadata=about("optimiser steps, of about 512 tokens each"))
    learning_rate: float = field(default=2e-3, metadata=about("peak AdamW learning rate of the head"))
    head: Path | None = field(
        default=None,
        metadata=about("folder with a head of that kind to begin with (default: the target's own last layers)"),
    )
    draft_vocab_size: int = field(
        default=8192, metadata=about("tokens that can be drafted: the most frequent of the answers")
    )
    compact: bool = field(
        default=False, metadata=about("save in bfloat16 without output rows, which are the target's own")
    )
    feature_cache_gib: float = field(default=4.0, metadata=about("memory for features that are used again, in GiB"))
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the target's weights", choices=DTYPES))
    seed: int = field(default=0, metadata=about("seed of prompts, noise and order"))

    def __post_init__(self) -> None:
        _check_positive(self, "num_prompts", "num_generations", "max_prompt_length", "max_tokens", "updates")
        _check_positive(self, "temperature", "learning_rate", "feature_cache_gib", "max_num_seqs", "draft_vocab_size")
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
        default=False, metadata=about("go on without the broken lines of a file of prompts; how many is said")
    )
    task: str = field(
        default="chain_sum", metadata=about("reasoning-gym task that makes the prompts; without a file of prompts")
    )
    num_prompts: int = field(default=16, metadata=about("prompts that the target answers"))
    max_tokens: int = field(default=128, metadata=about("longest answer, in tokens"))
    temperature: float = field(default=1.0, metadata=about("of the answers; 0 is greedy"))
    least_acceptance: float = field(
        default=0.1, metadata=about("share of first drafts that must be accepted, in [0, 1]; less is refused")
    )
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(default="bfloat16", metadata=about("type of the target's weights", choices=DTYPES))
    seed: int = field(default=0, metadata=about("seed of prompts and noise"))

    def __post_init__(self) -> None:
        _check_positive(self, "num_prompts", "max_tokens")
        if self.source is None:
            raise ValueError("which head? name its folder with --source")
        if not 0 <= self.least_acceptance <= 1:
            raise ValueError(f"least_acceptance must be in [0, 1], got {self.least_acceptance}")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """`fastgrpo generate`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    prompt: tuple[str, ...] = field(default=(), metadata=about("prompts, each an argument of its own", many=True))
    prompts: Path | None = field(
        default=None, metadata=about("JSONL file of objects with 'prompt': text, or a list of chat messages")
    )
    skip_broken: bool = field(
        default=False, metadata=about("go on without the broken lines of a file of prompts; how many is said")
    )
    raw: bool = field(default=False, metadata=about("give the text to the model as it is, without its chat template"))
    num_generations: int = field(default=1, metadata=about("completions for each prompt"))
    max_tokens: int = field(default=128, metadata=about("longest completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("divides the logits; 0 is greedy"))
    top_k: int = field(default=0, metadata=about("keep this many of the most likely tokens; 0 keeps all"))
    top_p: float = field(default=1.0, metadata=about("keep the most likely tokens up to this probability, in (0, 1]"))
    seed: int = field(default=0, metadata=about("names the noise: the same seed gives the same tokens"))
    drafter: str = field(
        default="ngram",
        metadata=about("ngram, eagle, eagle-new, block, auto, none, or a folder with a saved head or a small LM"),
    )
    speculation: str = field(
        default="auto", metadata=about("how drafts are sized; never changes the tokens", choices=SPECULATION)
    )
    max_num_seqs: int = field(default=64, metadata=about("sequences decoded together; others wait for a slot"))
    device: str = field(
        default="auto", metadata=about("where it runs; auto takes the GPU where there is one", choices=DEVICES)
    )
    dtype: str = field(
        default="auto",
        metadata=about("type of the weights; auto keeps the type they are saved in", choices=("auto", *DTYPES)),
    )
    output: Path | None = field(default=None, metadata=about("JSONL file for the completions, one object for each"))

    def __post_init__(self) -> None:
        _check_positive(self, "num_generations")
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError("give prompts: either --prompt TEXT ... or --prompts FILE.jsonl")


def _check_positive(record: Any, *names: str) -> None:
    for name in names:
        if not getattr(record, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(record, name)}")


def add_options(parser: argparse.ArgumentParser, record: type) -> None:
    """One `--option` for each field of a record that says what it is `about`."""
    hints = get_type_hints(record)
    for entry in fields(record):
        hint, help, choices = hints[entry.name], entry.metadata["help"], entry.metadata["choices"]
        if choices:
            help = f"{help}: {', '.join(choices)}"
        if entry.default is not None and entry.default != () and entry.default is not False:
            shown = ",".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
            help = f"{help} (default: {shown})"
        keywords: dict[str, Any] = {"dest": entry.name, "default": entry.default, "help": help}
        if hint is bool:
            keywords |= {"action": "store_true"}
        elif entry.metadata["many"]:
            keywords |= {"nargs": "+", "metavar": "TEXT"}
        else:
            keywords |= {"type": _build_reader(hint, choices), "metavar": _metavar(hint)}
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **keywords)


def read_options(record: type[Record], namespace: argparse.Namespace) -> Record:
    """The record that `add_options` described.

    Raises:
        ValueError: a value is out of its range.
    """
    values = {entry.name: getattr(namespace, entry.name) for entry in fields(record)}  # type: ignore[arg-type]
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _plain_type(hint: Any) -> type:
    """`X` of `X | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    plain: type = hint
    return plain


def _metavar(hint: Any) -> str:
    names = {int: "N", float: "X", Path: "PATH", str: "NAME"}
    return names.get(_plain_type(hint), "NAME,...")


def _build_reader(hint: Any, choices: tuple[str, ...]) -> Callable[[str], Any]:
    """From an argument's text to its value; argparse shows what an `ArgumentTypeError` says."""
    kind = _plain_type(hint)

    def read(text: str) -> Any:
        words = text.split(",") if get_origin(kind) is tuple else [text]
        for word in words if choices else ():
            if word not in choices:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
        return tuple(get_args(kind)[0](word) for word in words) if get_origin(kind) is tuple else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")
    return read
