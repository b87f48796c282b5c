"""The TRL integration; nothing outside this folder (and `bench`, which measures TRL itself) imports trl."""

from fastgrpo.grpo.config import FastGRPOConfig
from fastgrpo.grpo.trainer import FastGRPOTrainer

__all__ = ["FastGRPOConfig", "FastGRPOTrainer"]
