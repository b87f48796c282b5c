"""The keys of a run: TRL's, and those that fastgrpo adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from fastgrpo.draft_loss import DEFAULT_LOSS, LOSSES, check_loss
from fastgrpo.grpo.old_logps import OLD_LOGPS
from fastgrpo.planner import SPECULATION
from fastgrpo.types import SamplingParams, SpeculationPlan


@dataclass
class FastGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and the keys of speculative rollouts; every other key means what it means in TRL."""

    speculation: str = field(
        default="auto",
        metadata={
            "help": "How drafts are sized: `auto` (measured cost and acceptance decide, plain decoding included), "
            "`paper` (FastGRPO's rule with a calibrated capacity), `paper-own` (with its own capacity, 160), `bandit` "
            "(TLT's, by trial alone), `fixed`, or `off`. Never changes the tokens."
        },
    )
    drafter: str = field(
        default="eagle",
        metadata={
            "help": "`eagle` (a head trained online; begins with the shipped one where this package has one for the "
            "model), `eagle-new` (begins from the target's own weights), `block` (a head that drafts in one pass, "
            "trained online), `ngram`, `auto` (eagle and ngram, whichever pays), `none`, or a folder with a saved "
            "head, which is trained online too, or with a small causal LM of the same tokenizer, which is not."
        },
    )
    num_draft_tokens: int = field(
        default=8, metadata={"help": "Draft tokens of each sequence and step under `speculation=fixed`."}
    )
    draft_depth: int = field(default=3, metadata={"help": "Draft levels under `speculation=fixed`."})
    draft_width: int = field(default=3, metadata={"help": "Children of a node under `speculation=fixed`."})
    draft_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "AdamW learning rate of the draft head. Default: 3e-4 for a head that was trained before (shipped, "
            "or from a folder), 2e-3 for a new one."
        },
    )
    draft_loss: str = field(
        default=DEFAULT_LOSS,
        metadata={
            "help": f"What the draft head is trained for: {', '.join(LOSSES)} (divergence from the target, total "
            "variation, mixes of both, or bounds on the acceptance); see `DraftLoss`."
        },
    )
    draft_time_share: float | None = field(
        default=None,
        metadata={
            "help": "Largest share of a training step spent on draft learning, in [0, 1); 0 freezes the head. Where "
            "one update takes longer, the next steps go without. Default: 0.1 on a CPU, 0.03 on a GPU."
        },
    )
    hide_draft_learning: bool = field(
        default=True,
        metadata={
            "help": "Let the draft head learn while cores or the GPU are idle: beside the last sequences of a rollout "
            "(on a GPU in a stream of its own, on a CPU where a core is idle for each of PyTorch's threads), and while "
            "other processes still decode. What this takes from decoding is measured; where it does not pay, the head "
            "learns between rollouts."
        },
    )
    max_num_seqs: int = field(default=64, metadata={"help": "Sequences decoded together; others wait for a slot."})
    max_cache_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Limit, in bytes, for keys, values and features of a rollout and the drafter's own rows. Where it "
            "is reached, the youngest sequences wait and are computed anew, with the same tokens. Default: most of the "
            "memory that is free when the rollout starts; of processes on one CPU, each takes its share."
        },
    )
    skip_zero_advantages: bool = field(
        default=True,
        metadata={
            "help": "Skip the backward pass of completions whose advantage is 0 (all of a group with equal rewards), "
            "and their forward pass too while the weights are still those of the rollout, which knows what is logged. "
            "The gradient is the same; stays off where these rows count otherwise (beta, entropy bonus, dropout). With "
            "several processes, each computes at least one row of a micro-batch, since the others wait for it, unless "
            "none has anything to compute."
        },
    )
    float32_products: bool = field(
        default=True,
        metadata={
            "help": "On a CPU without bfloat16 instructions, compute the update's bfloat16 products in float32 and "
            "round them, which takes a fraction of the time. Does nothing elsewhere."
        },
    )
    stream_rewards: bool = field(
        default=False,
        metadata={
            "help": "Call reward functions declared `@fastgrpo.per_completion` as completions finish, so that slow "
            "ones (a judge over HTTP, a sandbox) hide behind the tail of the rollout. Rewards, order and errors are "
            "those of the plain call; stays off with tools, environments and rollout_func, whose completions end "
            "later. A reward that only waits costs nothing; one that computes takes cores, or Python's global lock, "
            "from decoding."
        },
    )
    max_reward_calls: int = field(
        default=16,
        metadata={"help": "Streamed reward calls at once: limits the threads, and as many async calls beside them."},
    )
    reward_timeout_s: float = field(
        default=600.0,
        metadata={"help": "Seconds that one call of a streamed reward may take before it is given up by name."},
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Completions of one prompt that stand in one micro-batch are computed with one copy of it, without "
            "padding, in the update and in log-prob passes. The gradient is the same; stays off, with a line in the "
            "log, where the model has dropout, another attention than `sdpa`, or is compiled."
        },
    )
    group_siblings: bool = field(
        default=True,
        metadata={
            "help": "Put completions of one prompt into the same micro-batch of an optimiser step, so that "
            "`share_prompts` finds them. The gradient and what is logged are the same; stays off, with a line in the "
            "log, where the loss is not a sum over rows (`bnpo`, entropy bonus, top_entropy_quantile), or where a "
            "step ends amid a generation."
        },
    )
    old_logps: str = field(
        default="auto",
        metadata={
            "help": "Log-probabilities of the weights that generated, where the loss needs them (`num_iterations` "
            "above 1, or `steps_per_generation` not aligned with `gradient_accumulation_steps`): `auto` (the first "
            "pass over a micro-batch gives them; the gradient is TRL's), `rollout` (the rollout's: no pass at all, but "
            "rounded differently from the update's, visibly so in bfloat16), or `forward` (TRL's own forward, taken in "
            "any case where a subclass has methods of its own for the loss or its batch)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speculation not in SPECULATION:
            raise ValueError(f"speculation must be one of {', '.join(SPECULATION)}, got '{self.speculation}'")
        if self.draft_time_share is not None and not 0 <= self.draft_time_share < 1:
            raise ValueError(f"draft_time_share must be in [0, 1), got {self.draft_time_share}")
        if self.draft_learning_rate is not None and not self.draft_learning_rate > 0:
            raise ValueError(
                f"draft_learning_rate must be positive, got {self.draft_learning_rate}; "
                "draft_time_share=0 freezes the head"
            )
        check_loss(self.draft_loss)
        if self.old_logps not in OLD_LOGPS:
            raise ValueError(f"old_logps must be one of {', '.join(OLD_LOGPS)}, got '{self.old_logps}'")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_reward_calls < 1:
            raise ValueError(f"max_reward_calls must be at least 1, got {self.max_reward_calls}")
        if not self.reward_timeout_s > 0:
            raise ValueError(f"reward_timeout_s must be above 0 seconds, got {self.reward_timeout_s}")
        if self.max_cache_bytes is not None and self.max_cache_bytes < 1:
            raise ValueError(f"max_cache_bytes must be positive, got {self.max_cache_bytes}; None takes what is free")
        if self.speculation == "fixed":
            _ = self.fixed_plan
        check_config(self)

    @property
    def fixed_plan(self) -> SpeculationPlan:
        return SpeculationPlan(depth=self.draft_depth, width=self.draft_width, num_draft_tokens=self.num_draft_tokens)


def check_config(args: GRPOConfig) -> None:
    """Refuse what the engine cannot do yet.

    Raises:
        ValueError: names the key and the remedy.
    """
    refused = {
        "use_vllm": (args.use_vllm, "fastgrpo generates from the trained weights themselves; set use_vllm=False"),
        "use_transformers_continuous_batching": (
            args.use_transformers_continuous_batching,
            "fastgrpo batches continuously by itself; leave it unset",
        ),
        "min_p": (args.min_p not in (None, 0, 0.0), "use top_p or top_k"),
        "repetition_penalty": (
            args.repetition_penalty not in (None, 1, 1.0),
            "it makes a token depend on the whole text; leave it at 1.0",
        ),
        "cache_implementation": (args.cache_implementation is not None, "fastgrpo has its own cache; leave it unset"),
        "generation_kwargs": (bool(args.generation_kwargs), "use temperature, top_k, top_p, max_completion_length"),
        **{
            name: (getattr(args, name), "it casts the trained weights themselves; leave it unset, and set bf16 or fp16")
            for name in ("bf16_full_eval", "fp16_full_eval")
        },
    }
    for name, (is_set, remedy) in refused.items():
        if is_set:
            raise ValueError(f"{name}={getattr(args, name)!r} is not supported by FastGRPOTrainer: {remedy}")
    if isinstance(args.temperature, int | float) and args.temperature <= 0:
        raise ValueError(
            f"temperature={args.temperature!r} is not supported by FastGRPOTrainer: the loss divides logits by it, and "
            "all completions of a prompt would be the same; use a small one such as 0.1"
        )
    _ = SamplingParams(temperature=args.temperature, top_k=args.top_k or 0, top_p=args.top_p)  # which checks them
