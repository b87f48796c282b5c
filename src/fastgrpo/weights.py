"""The weights of a rollout: adapters folded in and linear weights cast, the trained storage untouched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_UNMERGED = ("LNTuningLayer", "TrainableTokensLayer")  # changes places with its base; is asked by its wrapper


@contextlib.contextmanager
def merged_weights(model: nn.Module, compute_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Fold adapters into copies of the base weights, and cast linear weights, for as long as it lasts.

    The parameters' own storage is set aside, not written, so that what is trained is bit-identical
    afterwards. A merged layer is taken out of its wrapper, whose forward costs more than a small
    product. Costs one copy of the weights it touches.
    """
    saved: list[tuple[nn.Parameter, Tensor]] = []
    places = _mergeable_tuners(model)
    try:
        for _, _, layer in places:
            for parameter in layer.get_base_layer().parameters(recurse=False):
                saved.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()
            layer.merge()
        for parent, name, layer in places:
            setattr(parent, name, layer.get_base_layer())
        if compute_dtype is not None:
            for parameter in _castable_weights(model):
                saved.append((parameter, parameter.data))
                parameter.data = parameter.data.to(compute_dtype)
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
            layer.merged_adapters.clear()
        for parameter, data in reversed(saved):
            parameter.data = data


def _mergeable_tuners(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of the LoRA layers over floating-point weights of their own.

    Quantised bases decode with their adapters unmerged, and so do tied ones: folding the adapter of an
    embedding into a weight that the output head shares would change the head. And so do those that do not
    merge into the base's own weights.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    num_owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return [
        (parent, name, layer)
        for parent, name, layer in children
        if isinstance(layer, BaseTunerLayer)
        and not layer.disable_adapters
        and not layer.merged
        and _merges_into_base(layer)
        and num_owners[id(layer.get_base_layer().weight)] == 1
    ]


def _merges_into_base(layer: Any) -> bool:
    base = layer.get_base_layer()
    if type(layer).__name__ in _UNMERGED or not hasattr(base, "weight"):  # experts have several
        return False
    has_new_bias = any(getattr(layer, "lora_bias", {}).values()) and base.bias is None
    return base.weight.is_floating_point() and not has_new_bias


def _castable_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that only ever enter a matrix product; a tied embedding does not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [p for m in linear for p in m.parameters(recurse=False) if id(p) not in embeddings]
