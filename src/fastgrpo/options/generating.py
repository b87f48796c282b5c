"""`fastgrpo generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastgrpo.options.command_line import about, check_positive
from fastgrpo.options.words import (
    DEVICES,
    DTYPES,
    SPECULATION,
)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """`fastgrpo generate`."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    prompt: tuple[str, ...] = field(default=(), metadata=about("prompts, one argument each", many=True))
    prompts: Path | None = field(
        default=None, metadata=about("JSONL file of objects with 'prompt': text, or a list of chat messages")
    )
    skip_broken: bool = field(
        default=False, metadata=about("skip broken lines of a file of prompts, and print how many")
    )
    raw: bool = field(default=False, metadata=about("give the text to the model as it is, without its chat template"))
    num_generations: int = field(default=1, metadata=about("completions for each prompt"))
    max_tokens: int = field(default=128, metadata=about("longest completion, in tokens"))
    temperature: float = field(default=1.0, metadata=about("divides the logits; 0 is greedy"))
    top_k: int = field(default=0, metadata=about("keep this many of the most likely tokens; 0 keeps all"))
    top_p: float = field(default=1.0, metadata=about("keep the most likely tokens up to this probability, in (0, 1]"))
    seed: int = field(default=0, metadata=about("seed of the noise: the same seed gives the same tokens"))
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
    output: Path | None = field(
        default=None, metadata=about("JSONL file for the completions, one object for each", writes=True)
    )

    def __post_init__(self) -> None:
        check_positive(self, "num_generations")
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError("give prompts: either --prompt TEXT ... or --prompts FILE.jsonl")
