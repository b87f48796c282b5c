"""Words and sizes that several commands share."""

from __future__ import annotations

from fastgrpo.planner import SPECULATION

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
HEAD_KINDS = ("eagle", "block")
TRAINING_VARIANTS = ("trl", *SPECULATION)
MAX_TOKENS, LONG_TAIL_MAX_TOKENS = 96, 320  # of chain_sum; the second is about 5 times its mean length
MACHINES, MODEL_SIZES = ("a100", "h100", "h200", "b200"), ("1.5b", "8b", "32b", "70b")  # that rooflines are known of
