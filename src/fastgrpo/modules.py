"""A forward through transformers' own modules, for models that fastgrpo's kernels do not cover."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache

from fastgrpo.attention import ForwardBatch, has_gpu_kernel
from fastgrpo.block_store import BlockStore
from fastgrpo.cache import SlotCache


def run_modules(
    decoder: Any,
    batch: ForwardBatch,
    cache: SlotCache,
    windows: tuple[int | None, ...],
    kept: tuple[int, ...],
    *,
    whole: Any = None,
    wants_logits: bool,
) -> tuple[Float[Tensor, "T H"], dict[int, Float[Tensor, "T H"]], Float[Tensor, "T V"] | None]:
    """Run packed tokens, writing their keys and values; `tree_attention` must be the model's attention.

    Args:
        decoder: of the causal LM.
        windows: for each layer, how many tokens a token sees, itself included; None: all before it.
        kept: layers whose inputs are wanted.
        whole: the model as its owner calls it, which is run in place of the decoder alone; None runs that.
        wants_logits: of a model that is run whole.

    Returns:
        Last hidden states, normed; inputs of the layers in `kept`; logits where they are wanted and the model is run
        whole, else None.
    """
    captured: dict[int, Tensor] = {}
    states: list[Tensor] = []
    hooks = [
        decoder.layers[layer].register_forward_pre_hook(functools.partial(_keep_input, captured, layer))
        for layer in set(kept)
    ]
    hooks.append(decoder.register_forward_hook(functools.partial(_keep_states, states)))
    model = decoder if whole is None else functools.partial(whole, logits_to_keep=0 if wants_logits else 1)
    try:
        output = model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            attention_mask=batch.visible.new_zeros(1, 1, 1, 1, dtype=batch.dtype),  # else one would be built
            past_key_values=_CacheView(cache, batch, windows),
            use_cache=True,
            tree_batch=batch,
            windows=windows,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return states[0], captured, output.logits[0] if whole is not None and wants_logits else None


class _CacheView(Cache):
    """The slot cache as a decoder layer of transformers sees it: takes new keys and values, gives whole rows back."""

    def __init__(self, cache: SlotCache, batch: ForwardBatch, windows: tuple[int | None, ...]) -> None:
        super().__init__(layers=[])
        self._cache, self._batch, self._windows = cache, batch, windows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            self._write(store, states, layer_idx)
            for store, states in ((self._cache.keys, key_states), (self._cache.values, value_states))
        )

    def _write(self, store: BlockStore, states: Float[Tensor, "1 kv T d"], layer: int) -> Float[Tensor, "B kv S d"]:
        batch, cache = self._batch, self._cache
        store.write(layer, batch.write_index, states[0].transpose(0, 1).flatten(1).to(store.data.dtype))
        if self._windows[layer] is None and has_gpu_kernel(store.data):  # the kernel finds each row's positions
            return store.flat(layer).unflatten(-1, (cache.num_kv_heads, cache.head_dim)).transpose(0, 1)[None]
        rows = store.read(layer, batch.read_index)
        return rows.unflatten(-1, (cache.num_kv_heads, cache.head_dim)).transpose(1, 2)


def _keep_input(captured: dict[int, Tensor], layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook before a layer. Not a closure: the tests' shape checks would compile its signature at each forward."""
    captured[layer] = args[0][0]


def _keep_states(states: list[Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook behind the decoder."""
    states.append(output.last_hidden_state[0])


def check_takes_rows(model: nn.Module) -> None:
    """Refuse a forward of the owner's that does not pass on what attention is told.

    Raises:
        ValueError: it takes no keyword arguments but its own; says what to change.
    """
    if all(each.kind is not each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values()):
        raise ValueError(
            f"the forward that {type(model).__name__} was given takes no **kwargs, in which attention is told where "
            "its rows stand: let it take them, and pass them on to the model's own"
        )
