"""Commands that train a policy: a workload, and what is done with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from fastgrpo.options.command_line import about, check_distinct, check_positive
from fastgrpo.options.variants import parse_variant
from fastgrpo.options.words import DTYPES, SPECULATION, TRAINING_VARIANTS


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, on what, and how: the demo's settings, which `bench e2e` shares."""

    model: str = field(default="demo", metadata=about("model: a folder, a hub id, or 'demo' for SmolLM2-135M-Instruct"))
    dtype: str = field(default="bfloat16", metadata=about("type of the base weights", choices=DTYPES))
    task: str = field(default="chain_sum", metadata=about("reasoning-gym task that makes prompts and checks answers"))
    prompt_examples: int = field(
        default=0, metadata=about("solved problems before each question, the same for all, to make prompts longer")
    )
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
        check_positive(self, "prompts_per_step", "max_completion_length", "max_num_seqs")
        check_positive(self, "temperature", "learning_rate")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2 to compare completions, got {self.num_generations}")
        for name in ("lora_rank", "format_weight", "prompt_examples"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Workload):
    """`fastgrpo demo`."""

    steps: int = field(default=24, metadata=about("training steps"))
    repeats: int = field(default=2, metadata=about("rollouts of each kind measured before and after the training"))
    speculation: str = field(default="auto", metadata=about("how drafts are sized", choices=SPECULATION))
    output: Path = field(default=Path("runs/demo"), metadata=about("folder for run.json and run.png"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "repeats")


@dataclass(frozen=True, kw_only=True)
class E2EOptions(Workload):
    """`fastgrpo bench e2e`."""

    steps: int = field(
        default=10, metadata=about("training steps of each variant; the first is left out of the medians")
    )
    variants: tuple[str, ...] = field(
        default=("trl", "off", "auto"),
        metadata=about(
            "trainers that step in turn, separated by commas: trl (TRL's GRPOTrainer, transformers generation), or "
            f"FastGRPOTrainer with this speculation: {', '.join(TRAINING_VARIANTS)}; each may have keys of its config, "
            "such as auto:skip_zero_advantages=false",
        ),
    )
    output: Path | None = field(
        default=None,
        metadata=about(
            "JSON file for the results, a picture of a step beside it; without it they are only printed", writes=True
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps")
        check_distinct(self, "variants")
        for word in self.variants:
            parse_variant(word)


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(E2EOptions):
    """`fastgrpo bench update`."""

    variants: tuple[str, ...] = field(
        default=("trl", "off"),
        metadata=about(
            "trainers that update in turn, separated by commas: trl, or off (FastGRPOTrainer); each may have keys of "
            "its config, such as off:share_prompts=false",
        ),
    )
    prompt_length: int = field(default=100, metadata=about("tokens of each prompt, drawn at random"))
    min_completion_length: int = field(
        default=16, metadata=about("shortest completion; lengths are spread evenly from here to the longest")
    )
    equal_groups: int = field(default=0, metadata=about("groups of equal rewards: their rows have no advantage"))
    output: Path | None = field(
        default=None, metadata=about("JSON file for the results; without it they are only printed", writes=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "prompt_length", "min_completion_length")
        if self.min_completion_length > self.max_completion_length:
            raise ValueError(
                f"min_completion_length={self.min_completion_length} is above "
                f"max_completion_length={self.max_completion_length}"
            )
        if not 0 <= self.equal_groups <= self.prompts_per_step:
            raise ValueError(
                f"equal_groups must be 0 to prompts_per_step={self.prompts_per_step}, got {self.equal_groups}"
            )


@dataclass(frozen=True, kw_only=True)
class RewardsOptions(Workload):
    """`fastgrpo bench rewards`."""

    answer_s: float = field(default=2.0, metadata=about("seconds after which the judge answers"))
    max_reward_calls: int = field(default=16, metadata=about("calls to the judge at once, one completion each"))
    repeats: int = field(default=3, metadata=about("measured steps of each way, after one that is not measured"))
    speculation: str = field(default="auto", metadata=about("how drafts are sized", choices=SPECULATION))
    output: Path | None = field(
        default=None,
        metadata=about(
            "JSON file for the results, a picture of a step beside it; without it they are only printed", writes=True
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "answer_s", "max_reward_calls", "repeats")


@dataclass(frozen=True, kw_only=True)
class LearningOptions(Workload):
    """`fastgrpo bench learning`."""

    steps: int = field(default=30, metadata=about("training steps of the run whose rollouts are learnt from"))
    losses: tuple[str, ...] = field(
        default=("kl", "kl+tv", "lk", "overlap", "coupled"), metadata=about("losses to learn with, separated by commas")
    )
    starts: tuple[str, ...] = field(
        default=("eagle", "eagle-new"),
        metadata=about("heads to begin with, separated by commas: eagle (the shipped one), eagle-new, or folders"),
    )
    updates: int = field(default=8, metadata=about("limit on updates after each rollout, of about 256 tokens each"))
    rollouts: Path | None = field(
        default=None,
        metadata=about("safetensors file of the rollouts; written by the run, and read instead of a run if it exists"),
    )
    output: Path | None = field(
        default=None,
        metadata=about("JSON file for the results, a plot beside it; without it they are only printed", writes=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "updates")
        check_distinct(self, "losses", "starts")
