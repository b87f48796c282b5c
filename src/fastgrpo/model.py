"""The target model: an unmodified transformers causal LM run over packed tree nodes and a slot cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from fastgrpo.cache import RowStore, SlotCache

ATTENTION_NAME = "fastgrpo_tree"
SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies depend on the batch's longest sequence


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One forward: T packed tokens of B rows, each row a tree (or a chain) behind its cached prefix."""

    token_ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    write_index: Int[Tensor, " T"]  # flat cache index of each token
    row_starts: Int[Tensor, " B"]  # first packed token of each row
    rows: slice | Int[Tensor, " B"]  # cache rows read
    read_length: int  # cache positions read, the new tokens included
    num_nodes: int  # N, the largest row
    pad_index: Int[Tensor, " T"] | None  # row * N + node of each token; None if no row is padded
    mask: Float[Tensor, "B 1 repN S"]  # additive, once for each query head that shares a key head

    @staticmethod
    def build(
        *,
        token_ids: Int[Tensor, "B N"],
        num_nodes: Int[Tensor, " B"],
        visible: Bool[Tensor, "B N E"],
        rows: slice | Int[Tensor, " B"],
        row_numbers: Int[Tensor, " B"],
        lengths: Int[Tensor, " B"],
        store: RowStore,
        dtype: torch.dtype,
        num_repeats: int,
    ) -> ForwardBatch:
        """Lay out the nodes of each row behind its `lengths` cached positions.

        Args:
            token_ids: nodes in topological order, padded behind `num_nodes`.
            visible: `[b, i, e]` True iff new node i attends to node e, where the last N of the E
                nodes are the new ones and the others stand in the cache already; a node sees itself
                and its ancestors, so the number it sees gives its position.
            rows, row_numbers: the cache rows, as a slice where they are contiguous, and as a tensor.
            lengths: positions of those rows that every node sees.
            store: where the tokens will be written, for its capacity.
            dtype, num_repeats: of the attention: its type, and query heads for each key head.
        """
        device = token_ids.device
        width, num_visible = visible.shape[1:]
        index = torch.arange(width, device=device)
        used = index < num_nodes[:, None]
        offset = num_visible - width
        read_length = int((lengths + num_nodes).max()) + offset
        slot = torch.arange(read_length, device=device)
        node = slot - lengths[:, None]  # node that a slot holds
        is_node = (node >= 0) & (node < num_visible)
        sees = visible.gather(2, node.clamp(0, num_visible - 1)[:, None].expand(-1, width, -1))
        mask = (node < 0)[:, None] | (is_node[:, None] & sees)
        mask[..., 0] = True  # true of every node; keeps padded nodes finite
        additive = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, float("-inf"))
        flat = (row_numbers * store.capacity + lengths + offset)[:, None] + index
        positions = lengths[:, None] + visible.sum(-1) - 1
        return ForwardBatch(
            token_ids=token_ids[used],
            positions=positions[used],
            write_index=flat[used],
            row_starts=num_nodes.cumsum(0) - num_nodes,
            rows=rows,
            read_length=read_length,
            num_nodes=width,
            pad_index=None if bool(used.all()) else used.view(-1).nonzero()[:, 0],
            mask=additive[:, None].repeat(1, 1, num_repeats, 1),
        )


@dataclass(frozen=True, kw_only=True)
class ForwardOutput:
    """Hidden states of a forward, one row for each packed token."""

    last_hidden: Float[Tensor, "T H"]  # normed, the head's input
    features: Float[Tensor, "T W"] | None  # [low, mid, high, last_hidden] side by side


def pack_queries(
    query: Float[Tensor, "1 heads T d"], num_kv_heads: int, batch: ForwardBatch
) -> Float[Tensor, "B kv repN d"]:
    """Queries of the heads that share a key head side by side, so that keys are never repeated."""
    _, num_heads, _, head_dim = query.shape
    num_rows = len(batch.row_starts)
    tokens = query[0].transpose(0, 1)
    if batch.pad_index is not None:
        padded = tokens.new_zeros(num_rows * batch.num_nodes, num_heads, head_dim)
        tokens = padded.index_copy_(0, batch.pad_index, tokens)
    repeats = num_heads // num_kv_heads
    grouped = tokens.reshape(num_rows, batch.num_nodes, num_kv_heads, repeats, head_dim).permute(0, 2, 3, 1, 4)
    return grouped.reshape(num_rows, num_kv_heads, repeats * batch.num_nodes, head_dim)


def unpack_outputs(
    output: Float[Tensor, "B kv repN d"], num_heads: int, batch: ForwardBatch
) -> Float[Tensor, "1 T heads d"]:
    """The inverse of `pack_queries`, token first."""
    num_rows, num_kv_heads, _, head_dim = output.shape
    grouped = output.view(num_rows, num_kv_heads, num_heads // num_kv_heads, batch.num_nodes, head_dim)
    tokens = grouped.permute(0, 3, 1, 2, 4).reshape(num_rows * batch.num_nodes, num_heads, head_dim)
    return (tokens if batch.pad_index is None else tokens[batch.pad_index])[None]


def tree_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads T d"],
    key: Float[Tensor, "B kv S d"],
    value: Float[Tensor, "B kv S d"],
    attention_mask: Float[Tensor, "B 1 repN S"],
    *,
    tree_batch: ForwardBatch,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 T heads d"], None]:
    """transformers' attention interface over packed nodes and ragged rows."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    packed = pack_queries(query.to(key.dtype), num_kv_heads, tree_batch)
    output = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return unpack_outputs(output, num_heads, tree_batch), None


AttentionInterface.register(ATTENTION_NAME, tree_attention)


class _CacheView(Cache):
    """What a decoder layer sees: it writes its new keys and values and gets whole rows back."""

    def __init__(self, cache: SlotCache, batch: ForwardBatch) -> None:
        super().__init__(layers=[])
        self._cache, self._batch = cache, batch

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            self._write(store, states, layer_idx)
            for store, states in ((self._cache.keys, key_states), (self._cache.values, value_states))
        )

    def _write(self, store: RowStore, states: Float[Tensor, "1 kv T d"], layer: int) -> Float[Tensor, "B kv S d"]:
        batch, cache = self._batch, self._cache
        store.write(layer, batch.write_index, states[0].transpose(0, 1).flatten(1).to(store.data.dtype))
        rows = store.data[layer, batch.rows, : batch.read_length]
        return rows.unflatten(-1, (cache.num_kv_heads, cache.head_dim)).transpose(1, 2)


class TargetModel:
    """Adapter around a transformers causal LM (or a PEFT model of one). The weights stay the owner's.

    Args:
        model: Llama, Qwen2, Qwen3 or Mistral without sliding-window layers.
        compute_dtype: run under autocast with linear weights cast once for each rollout;
            None computes in the model's own type.

    Raises:
        ValueError: the family, attention kind, RoPE kind or PEFT method is not supported; names it.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.base = base_model_of(model)
        self.config: Any = self.base.config
        check_supported(self.base)
        _check_peft(model)
        self.decoder: Any = self.base.model
        weight = self.embed_tokens.weight
        self.compute_dtype = None if compute_dtype == weight.dtype else compute_dtype
        config = self.config
        self.num_layers = int(config.num_hidden_layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(weight.shape[0])
        self.num_kv_heads = int(config.num_key_value_heads)
        self.num_repeats = int(config.num_attention_heads) // self.num_kv_heads
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.max_position = int(config.max_position_embeddings)

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.base.get_input_embeddings()

    @property
    def lm_head(self) -> Any:
        return self.base.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys, values and features."""
        return self.compute_dtype or self.decoder.layers[0].mlp.down_proj.weight.dtype

    @property
    def feature_layers(self) -> tuple[int, int, int]:
        """Layers whose inputs are the drafter's features, as in EAGLE-3 (arXiv:2503.01840)."""
        last = self.num_layers - 1
        low, mid, high = 2, self.num_layers // 2, self.num_layers - 3
        return min(low, last), min(mid, last), min(max(high, 0), last)

    @property
    def feature_width(self) -> int:
        return 4 * self.hidden_size

    def build_cache(self, *, with_features: bool) -> SlotCache:
        return SlotCache(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            feature_width=self.feature_width if with_features else 0,
            dtype=self.dtype,
            device=self.device,
        )

    @contextlib.contextmanager
    def rollout_mode(self) -> Iterator[None]:
        """Evaluation mode, merged LoRA, tree attention; everything is put back, whatever happens inside."""
        training = [module for module in self.model.modules() if module.training]
        attention = self.config._attn_implementation
        autocast = (
            torch.autocast(self.device.type, dtype=self.compute_dtype)
            if self.compute_dtype
            else contextlib.nullcontext()
        )
        try:
            self.model.eval()
            self.config._attn_implementation = ATTENTION_NAME
            with torch.no_grad(), merged_weights(self.model, self.compute_dtype), autocast:
                yield
        finally:
            self.config._attn_implementation = attention
            for module in training:
                module.training = True

    def forward(self, batch: ForwardBatch, cache: SlotCache) -> ForwardOutput:
        """Run the packed tokens, writing their keys and values; call inside `rollout_mode`."""
        captured: dict[int, Tensor] = {}
        hooks = []
        if cache.features is not None:
            for layer in set(self.feature_layers):

                def keep(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
                    captured[layer] = args[0]

                hooks.append(self.decoder.layers[layer].register_forward_pre_hook(keep))
        try:
            output = self.decoder(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                attention_mask=batch.mask,
                past_key_values=_CacheView(cache, batch),
                use_cache=True,
                tree_batch=batch,
            )
        finally:
            for hook in hooks:
                hook.remove()
        hidden = output.last_hidden_state[0]
        if cache.features is None:
            return ForwardOutput(last_hidden=hidden, features=None)
        parts = [captured[layer][0] for layer in self.feature_layers] + [hidden]
        return ForwardOutput(last_hidden=hidden, features=torch.cat(parts, -1).to(cache.features.data.dtype))

    def compute_logits(self, hidden: Float[Tensor, "T H"]) -> Float[Tensor, "T V"]:
        return self.lm_head(hidden)


def base_model_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def merged_weights(model: nn.Module, compute_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Fold adapters into copies of the base weights, and cast linear weights, for as long as it lasts.

    The parameters' own storage is set aside, not written, so that what is trained is bit-identical
    afterwards. Costs one copy of the weights it touches.
    """
    saved: list[tuple[nn.Parameter, Tensor]] = []
    tuners = _mergeable_tuners(model)
    try:
        for layer in tuners:
            for parameter in layer.get_base_layer().parameters(recurse=False):
                saved.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()
            layer.merge()
        if compute_dtype is not None:
            for parameter in _castable_weights(model):
                saved.append((parameter, parameter.data))
                parameter.data = parameter.data.to(compute_dtype)
        yield
    finally:
        for layer in tuners:
            layer.merged_adapters.clear()
        for parameter, data in reversed(saved):
            parameter.data = data


def _mergeable_tuners(model: nn.Module) -> list[Any]:
    """LoRA layers over floating-point weights; quantised bases decode with their adapters unmerged."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [
        layer
        for layer in tuners
        if not layer.disable_adapters and not layer.merged and layer.get_base_layer().weight.is_floating_point()
    ]


def _castable_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that only ever enter a matrix product; a tied embedding does not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [p for m in linear for p in m.parameters(recurse=False) if id(p) not in embeddings]


def check_supported(model: PreTrainedModel) -> None:
    """Refuse by name what the engine would run wrongly.

    Raises:
        ValueError: unknown family, sliding-window layers, or RoPE that depends on the batch.
    """
    config = model.config
    family = config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"model family '{family}' is not supported; supported are {', '.join(SUPPORTED_FAMILIES)}. "
            "Train it with trl.GRPOTrainer instead"
        )
    layer_types = getattr(config, "layer_types", None) or []
    has_window = family == "mistral" and getattr(config, "sliding_window", None) is not None
    if has_window or "sliding_attention" in layer_types:
        raise ValueError(
            f"'{family}' model with sliding_window={config.sliding_window} is not supported: its cache would differ. "
            "Set sliding_window=None (use_sliding_window=False) if your sequences are shorter than the window"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _POSITION_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type '{rope['rope_type']}' is not supported: its frequencies depend on the longest sequence of "
            "a batch, so a completion would depend on its neighbours. Use 'default', 'linear', 'yarn' or 'llama3'"
        )


def _check_peft(model: nn.Module) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT adapter '{name}' ({type(config).__name__}) prepends virtual tokens, which is not supported; "
                "use LoRA"
            )
