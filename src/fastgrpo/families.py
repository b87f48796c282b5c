"""Which models the engine runs rightly, and how far their layers see."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

SUPPORTED_FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral"),
    *("mixtral", "olmo2", "phi3", "qwen3_moe", "smollm3"),  # through transformers' modules
)
_WITHOUT_WINDOWS = ("llama", "olmo2")  # whatever their config says
_ATTENTION_KINDS = ("full_attention", "sliding_attention")
_POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies depend on the batch's longest sequence


def find_windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """For each layer of a supported model, how many tokens a token sees, itself included; None: all before it."""
    return tuple(_find_window(layer, model.config) for layer in model.model.layers)


def _find_window(layer: Any, config: Any) -> int | None:
    """The layer's window, taken from the config where its attention module names none."""
    found = getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
    if config.model_type in _WITHOUT_WINDOWS or not found or found >= config.max_position_embeddings:
        return None
    return int(found)


def base_model_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_supported(model: PreTrainedModel) -> None:
    """Refuse models that the engine would run wrongly.

    Raises:
        ValueError: the family or a kind of attention is not supported, RoPE depends on the batch, or the output head is
            missing or has not one row for each token; names what was found.
    """
    config = model.config
    family = config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"model family '{family}' is not supported; supported are {', '.join(SUPPORTED_FAMILIES)}. "
            "Train it with trl.GRPOTrainer instead"
        )
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION_KINDS)):
        raise ValueError(
            f"'{family}' model with layers of {', '.join(others)} is not supported; supported are "
            f"{', '.join(_ATTENTION_KINDS)}. Train it with trl.GRPOTrainer instead"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _POSITION_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type '{rope['rope_type']}' is not supported: its frequencies depend on the longest sequence of "
            "a batch, so a completion would depend on its neighbours. Use 'default', 'linear', 'yarn' or 'llama3'"
        )
    head, num_tokens = model.get_output_embeddings(), len(model.get_input_embeddings().weight)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so it cannot generate; load a causal LM")
    if (num_outputs := getattr(head, "out_features", num_tokens)) != num_tokens:
        raise ValueError(
            f"the output head has {num_outputs} tokens and the embedding {num_tokens}, which is not supported: use "
            "model.resize_token_embeddings"
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse PEFT methods that a rollout would leave out.

    Raises:
        ValueError: an adapter is more than weights beside weights; names it.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        obstacles = {
            "prepends virtual tokens": getattr(config, "is_prompt_learning", False),
            "has attention of its own": getattr(config, "is_adaption_prompt", False),
            "begins behind its alora_invocation_tokens": getattr(config, "alora_invocation_tokens", None),
        }
        for obstacle, is_so in obstacles.items():
            if is_so:
                raise ValueError(
                    f"PEFT adapter '{name}' ({type(config).__name__}) {obstacle}, which is not supported; use LoRA"
                )
