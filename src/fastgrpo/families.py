"""Which models the engine runs rightly, and how far their layers see."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

SUPPORTED_FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral"),
    *("exaone4", "gemma", "gemma3_text", "ministral3", "mixtral", "olmo2", "olmo3"),  # through transformers' modules
    *("olmoe", "phi3", "qwen3_moe", "seed_oss", "smollm3"),
)
_WITHOUT_WINDOWS = ("llama", "olmo2")  # whatever their config says
FULL_ATTENTION = "full_attention"
_ATTENTION_KINDS = (FULL_ATTENTION, "sliding_attention")
_UNSEEN_SETTINGS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
_POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies depend on the batch's longest sequence


def find_windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """For each layer of a supported model, how many tokens a token sees, itself included; None: all before it."""
    return tuple(_find_window(layer, model.config) for layer in model.model.layers)


def _find_window(layer: Any, config: Any) -> int | None:
    """The layer's window, taken from the config where its attention module names none."""
    found = getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
    sees_all = config.model_type in _WITHOUT_WINDOWS or not getattr(layer.self_attn, "is_sliding", True)
    if sees_all or not found or found >= config.max_position_embeddings:
        return None
    return int(found)


def list_rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Of the model, or of each kind of its layers where these differ."""
    found = getattr(config, "rope_parameters", None) or {}
    return [each for each in found.values() if each] if all(map(_is_nested, found.values())) else [found]


def _is_nested(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def base_model_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_supported(model: PreTrainedModel) -> None:
    """Refuse models that the engine would run wrongly.

    Raises:
        ValueError: the family, a kind of attention or a setting is not supported, RoPE depends on the batch, or the
            output head is missing or has not one row for each token; names what was found.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(
            f"the model must be a transformers causal LM, or a PEFT model of one, got {type(model).__name__}; "
            "Engine.from_pretrained loads one, and what wraps one has to be taken off"
        )
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
    for rope in list_rope_parameters(config):
        if rope.get("rope_type") in _POSITION_DEPENDENT_ROPE:
            raise ValueError(
                f"rope_type '{rope['rope_type']}' is not supported: its frequencies depend on the longest sequence of "
                "a batch, so a completion would depend on its neighbours. Use 'default', 'linear', 'yarn' or 'llama3'"
            )
    for name in _UNSEEN_SETTINGS:
        if value := getattr(config, name, None):
            raise ValueError(
                f"'{family}' model with {name}={value} is not supported, since neither attention nor sampling here "
                "knows of it. Train it with trl.GRPOTrainer instead"
            )
    head, num_tokens = model.get_output_embeddings(), len(model.get_input_embeddings().weight)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so it cannot generate; load a causal LM")
    if (num_outputs := _count_outputs(head, num_tokens)) != num_tokens:
        raise ValueError(
            f"the output head has {num_outputs} tokens and the embedding {num_tokens}, which is not supported: use "
            "model.resize_token_embeddings"
        )


def _count_outputs(head: Any, default: int) -> int:
    """Rows of an output head; a quantised weight is packed, and PEFT's copy of a tied one swaps its two sizes."""
    weight = getattr(head, "weight", None)
    if weight is not None and weight.is_floating_point():
        return len(weight)
    return int(getattr(head, "out_features", default))


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
