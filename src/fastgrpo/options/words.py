"""Words and sizes that several commands share."""

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
SPECULATION = ("auto", "off", "paper", "fixed")
HEAD_KINDS = ("eagle", "block")
TRAINING_VARIANTS = ("trl", "off", "auto", "paper", "fixed")
MAX_TOKENS, LONG_TAIL_MAX_TOKENS = 96, 320  # of chain_sum; the second is about 5 times its mean length
