"""What must hold of prompts, and of rewards and advantages before anything is learnt from them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

_MOST_NAMED = 5

_NEUTRAL: dict[str, float | None] = {  # what `generate` obeys and the engine does not: the value that changes nothing
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("guidance_scale", "num_beams"), 1),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "stop_strings", "max_time", "top_h")),
    **dict.fromkeys(("watermarking_config", "token_healing")),
}


def check_columns(*datasets: Any) -> None:
    """Refuse datasets with images.

    Args:
        datasets: as TRL takes them: each a dataset, a dict of several, or None.

    Raises:
        ValueError: one has images.
    """
    for each in datasets:
        for dataset in each.values() if isinstance(each, dict) else [each]:
            for name in ("image", "images"):
                if name in (getattr(dataset, "column_names", None) or ()):
                    raise ValueError(
                        f"the dataset has a column '{name}', and image inputs are not supported by FastGRPOTrainer; "
                        "remove the column, or use trl.GRPOTrainer"
                    )


def check_generation(config: Any) -> None:
    """Refuse settings by which transformers' `generate` would draw other tokens than the engine.

    Args:
        config: a `GenerationConfig` as `generate` would use it, the model's own values filled in.

    Raises:
        ValueError: names the setting and the remedy.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in (None, [], neutral) and value is not False:
            raise ValueError(
                f"{name}={value!r} in the model's generation_config, which TRL's generation obeys, is not supported by "
                f"FastGRPOTrainer; set model.generation_config.{name} = {neutral!r}, or use trl.GRPOTrainer"
            )


def check_rewards(rewards: Float[Tensor, "B F"], names: list[str]) -> None:
    """Refuse infinite rewards, which give no advantage; NaN, as TRL reads None, leaves a completion out of its reward.

    Raises:
        ValueError: names the reward function, the completions and the value.
    """
    for index, name in enumerate(names):
        rows = rewards[:, index].isinf().nonzero()[:, 0].tolist()
        if rows:
            raise ValueError(
                f"the reward function '{name}' returned {float(rewards[rows[0], index])} for completion "
                f"{_list(rows)} of the batch; return a finite number, or None to leave a completion out"
            )


def check_advantages(advantages: Float[Tensor, " B *C"], step: int, names: list[str]) -> None:
    """Refuse advantages that are not finite.

    Raises:
        FloatingPointError: some are not finite; names the rows, and the rewards that they come from.
    """
    rows = (~advantages.reshape(len(advantages), -1).isfinite()).any(1).nonzero()[:, 0].tolist()
    if rows:
        raise FloatingPointError(
            f"the advantages of row {_list(rows)} of a micro-batch of step {step} are not finite, and so would be the "
            f"weights; nothing was trained on it. They come from the rewards {', '.join(names)}: return finite "
            "numbers, or None to leave a completion out"
        )


def _list(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:_MOST_NAMED])) + (", ..." if len(rows) > _MOST_NAMED else "")
