"""Trainers on the demo's workload: ours and TRL's own, alike in all but their rollouts."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from fastgrpo.bench.measure import RolloutResult
from fastgrpo.data import build_task_dataset
from fastgrpo.grpo import FastGRPOConfig, FastGRPOTrainer
from fastgrpo.grpo.arguments import read_keys
from fastgrpo.loading import encode_prompts, resolve_model
from fastgrpo.options import Workload, parse_variant
from fastgrpo.rewards import answer_reward, format_reward

STOCK = "trl"


def build_trainer(
    workload: Workload,
    *,
    variant: str,
    steps: int,
    output_dir: Path,
    trainer_class: type[Any] | None = None,
    reward_funcs: Any = None,
) -> Any:
    """A trainer for `steps` steps.

    Args:
        variant: "trl" for TRL's own trainer, else the speculation of ours; either with keys, see `parse_variant`.
        trainer_class: a subclass of the variant's trainer to use instead.
        reward_funcs: instead of those that check the task's answers.

    Raises:
        ValueError: the variant, or one of its keys, cannot be used.
    """
    chosen = parse_variant(variant)
    is_stock = chosen.kind == STOCK
    keys = _build_keys(workload, steps, output_dir)
    if not is_stock:  # plain decoding needs no drafter, and no features kept for one
        keys |= {"speculation": chosen.kind, "drafter": "none" if chosen.kind == "off" else workload.drafter}
        keys |= {"max_num_seqs": workload.max_num_seqs}
    config = GRPOConfig if is_stock else FastGRPOConfig
    keys |= read_keys(config, chosen.keys, f"variant {variant}")
    if reward_funcs is None:
        reward_funcs = [answer_reward, format_reward] if workload.format_weight else answer_reward
    else:
        keys["reward_weights"] = None
    trainer_class = trainer_class or find_trainer_class(variant)
    torch.manual_seed(workload.seed)  # the same LoRA weights for all
    return trainer_class(
        model=resolve_model(workload.model),
        reward_funcs=reward_funcs,
        args=config(**keys),
        train_dataset=build_task_dataset(
            workload.task,
            size=workload.prompts_per_step * steps,
            seed=workload.seed,
            num_examples=workload.prompt_examples,
        ),
        peft_config=_build_lora(workload.lora_rank) if workload.lora_rank else None,
    )


def find_trainer_class(variant: str) -> type[Any]:
    """TRL's for "trl", else ours."""
    trainer_class: type[Any] = GRPOTrainer if parse_variant(variant).kind == STOCK else FastGRPOTrainer
    return trainer_class


def _build_keys(workload: Workload, steps: int, output_dir: Path) -> dict[str, Any]:
    """What both configurations share: one group a micro-batch, no checkpoints, nothing drawn but tokens."""
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": workload.num_generations,
        "gradient_accumulation_steps": workload.prompts_per_step,
        "num_generations": workload.num_generations,
        "max_completion_length": workload.max_completion_length,
        "temperature": workload.temperature,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": workload.dtype == "bfloat16",
        "fp16": workload.dtype == "float16",
        "gradient_checkpointing": False,  # the model is small: recomputing costs more than it saves
        "model_init_kwargs": {"dtype": workload.dtype},
        "reward_weights": [1.0, workload.format_weight] if workload.format_weight else None,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": workload.seed,
    }


def _build_lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def select_prompts(trainer: Any, num_prompts: int) -> list[list[int]]:
    """The first prompts of the training data as TRL encodes them, each once for every completion."""
    chats = trainer.train_dataset[:num_prompts]["prompt"]
    encoded = encode_prompts(trainer.processing_class, chats)
    return [ids for ids in encoded for _ in range(trainer.num_generations)]


def measure_stock_rollout(trainer: Any, prompts: list[list[int]]) -> RolloutResult:
    """One rollout by TRL's own generation: transformers' `generate` on the padded batch, LoRA unmerged.

    Call while `trainer` trains: only then is its model as TRL generates with it.
    """
    stock = GRPOTrainer._generate_single_turn
    offered = {"images": None, "multimodal_fields": {}, "num_generations": trainer.num_generations}
    taken = {name: value for name, value in offered.items() if name in inspect.signature(stock).parameters}
    started = time.perf_counter()
    output = stock(trainer, prompts, **taken)
    return RolloutResult(token_ids=output[0], generation_s=time.perf_counter() - started)
