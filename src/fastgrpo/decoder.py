"""A model's decoder layers without the modules in between: its matrix products, and fastgrpo's kernels around them.

transformers' layers are chains of small operators, some forty for each layer; dispatching them on a CPU, and running
them on a GPU, takes longer than a small batch's products. Here the same weights meet nine kernels a layer, rounded
where transformers rounds; where the products are fastgrpo's too, the whole forward is one call (`kernels/layer.c`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module

from fastgrpo.attention import MOST_GPU_NODES, ForwardBatch, attend_to_rows, describe_rows, has_kernels
from fastgrpo.cache import SlotCache
from fastgrpo.kernels import cpu
from fastgrpo.kernels.choose import find_kernels
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.kernels.layers import CompiledDecoder, LayerWeights, Norm, has_own_products
from fastgrpo.kernels.linear import PackedLinear, may_pack, round_up, wants_round_rows
from fastgrpo.places import find_place
from fastgrpo.rotation import RotationTable

NO_KERNELS = "the kernels are not compiled"
_ONLY_TRAINING = (  # hooks that leave the values of a rollout as they are
    *("make_inputs_require_grads", "make_inputs_require_grad", "neftune_post_forward_hook"),
)
_LIBRARIES = ("torch.nn.", "transformers.")  # whose forwards are what `FusedDecoder` computes
_WRAPPERS = (  # around a whole model's forward
    *("accelerate.", "fastgrpo.", "liger_kernel.", "peft.", "torch._dynamo.", "trl."),
)
_LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer")
_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
_ACTIVATIONS = ("SiLUActivation", "SiLU")
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def _read_norm(module: Any) -> Norm:
    return Norm(module.weight.data, float(module.variance_epsilon))


def _read_layer(layer: Any, may_pack: bool, memory: KeptMemory | None) -> LayerWeights:
    """The weights of one decoder layer, as they are while a rollout lasts."""
    attention, mlp = layer.self_attn, layer.mlp
    states, output, gate_and_up, down = (
        PackedLinear(linears, may_pack=may_pack, memory=memory)
        for linears in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
    )
    query_norm, key_norm = (
        _read_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
    )
    return LayerWeights(
        before_attention=_read_norm(layer.input_layernorm),
        query_norm=query_norm,
        key_norm=key_norm,
        before_mlp=_read_norm(layer.post_attention_layernorm),
        states=states,
        output=output,
        gate_and_up=gate_and_up,
        down=down,
        num_heads=int(attention.q_proj.out_features) // attention.head_dim,
        num_kv_heads=int(attention.k_proj.out_features) // attention.head_dim,
        head_dim=int(attention.head_dim),
        scale=float(attention.scaling),
    )


class FusedDecoder:
    """Runs the layers of a Llama, Qwen2, Qwen3 or Mistral model; built anew for each rollout.

    Args:
        decoder: transformers' model without its head, adapters merged.
        dtype: of the matrix products, and of keys and values.
        output: from hidden states to logits; None where PyTorch computes that product.
        memory: where laid-out weights are to stand; None takes new memory.
        rotation: of an earlier rollout, used again where the frequencies are the same.
    """

    def __init__(
        self,
        decoder: Any,
        dtype: torch.dtype,
        output: PackedLinear | None = None,
        memory: KeptMemory | None = None,
        rotation: RotationTable | None = None,
    ) -> None:
        self._decoder, self._dtype = decoder, dtype
        self._kernels = find_kernels(decoder.embed_tokens.weight)
        assert self._kernels is not None, "ask find_obstacle first"
        packs = self._kernels is cpu and may_pack(decoder)
        self._rounds_rows = packs and wants_round_rows(dtype)
        layers = decoder.layers[: decoder.config.num_hidden_layers]
        self._layers = [_read_layer(layer, packs, memory) for layer in layers]
        self._norm = _read_norm(decoder.norm)
        self.rotation = RotationTable.renew(rotation, decoder.rotary_emb, count_positions(decoder.config))
        self._compiled: CompiledDecoder | None = None
        if self._kernels is cpu and has_own_products(self._layers):
            has_output = output is not None and output.own is not None and output.own.weight.dtype == dtype
            self._compiled = CompiledDecoder(
                self._layers,
                embeddings=decoder.embed_tokens.weight,
                last=self._norm,
                output=output if has_output else None,
                dtype=dtype,
            )

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for decoders whose recorded forwards may take each other's place."""
        layers = tuple(layer.place for layer in self._layers)
        return self._dtype, find_place(self._decoder.embed_tokens.weight), layers, self._norm.place, self.rotation

    def run(
        self, batch: ForwardBatch, cache: SlotCache, kept: tuple[int, ...] | None, *, wants_logits: bool = False
    ) -> tuple[Float[Tensor, "T H"], Float[Tensor, "T W"] | None, Float[Tensor, "T V"] | None]:
        """Normed hidden states; writes keys and values.

        Args:
            kept: layers whose inputs are wanted.

        Returns:
            the states; those inputs and the states side by side, None if none are wanted; the logits where they come
            at the same time, else None. Features that come with logits are valid until the next call, as these are.
        """
        embeddings = self._decoder.embed_tokens.weight
        if self._compiled is not None and has_kernels(cache.keys.data, batch):
            table = self.rotation.cover(batch.positions, embeddings.dtype)
            rows = describe_rows(batch, cache.keys, cache.values, *table)
            return self._compiled.run(rows, kept, wants_logits=wants_logits)
        residual = F.embedding(batch.token_ids, embeddings)
        rotation = self.rotation(batch.positions, residual)
        with torch.autocast(residual.device.type, enabled=False):
            inputs, delta = self._run_layers(batch, cache, residual, rotation, kept or ())
            hidden = self._add_norm(residual, delta, self._norm)[: len(residual)]
        return hidden, None if kept is None else join_features(inputs, kept, hidden, cache), None

    def _run_layers(
        self,
        batch: ForwardBatch,
        cache: SlotCache,
        residual: Float[Tensor, "T H"],
        rotation: tuple[Float[Tensor, "T d"], Float[Tensor, "T d"]],
        kept: tuple[int, ...],
    ) -> tuple[dict[int, Float[Tensor, "T H"]], Float[Tensor, "M H"]]:
        """Layer by layer, kernel by kernel; returns what is kept, and what is still to be added to the residual."""
        num_tokens, delta = len(residual), None
        inputs: dict[int, Tensor] = {}
        kernels = self._kernels
        for number, layer in enumerate(self._layers):
            assert layer.before_attention is not None
            x = self._add_norm(residual, delta, layer.before_attention)
            if number in kept:
                inputs[number] = residual.clone()
            states = layer.states(x)
            widths = (layer.num_heads * layer.head_dim, *[layer.num_kv_heads * layer.head_dim] * 2)
            query, key, _ = states.split(widths, dim=1)
            for own, norm in ((query, layer.query_norm), (key, layer.key_norm)):
                if norm is not None:
                    kernels.norm_heads_(own[:num_tokens], norm.weight, norm.eps)
            keys, values = cache.keys.flat(number), cache.values.flat(number)
            kernels.rotate_and_cache_(states, *rotation, batch.write_index, keys, values)
            attended = attend_to_rows(
                query, cache.keys, cache.values, number, batch, head_dim=cache.head_dim, scale=layer.scale
            )
            x = self._add_norm(residual, layer.output(attended), layer.before_mlp)
            delta = layer.down(kernels.multiply_silu(layer.gate_and_up(x), num_tokens))
        assert delta is not None, "a decoder has layers"
        return inputs, delta

    def _add_norm(self, residual: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
        padded = round_up(len(residual)) if self._rounds_rows else None
        return self._kernels.add_norm(residual, delta, norm.weight, norm.eps, self._dtype, padded=padded)


def join_features(
    inputs: Mapping[int, Float[Tensor, "T H"]], kept: tuple[int, ...], hidden: Float[Tensor, "T H"], cache: SlotCache
) -> Float[Tensor, "T W"]:
    """Inputs of some layers and the hidden states behind all of them side by side, as the cache has them."""
    return torch.cat([*(inputs[layer] for layer in kept), hidden], -1).to(cache.keys.data.dtype)


def count_positions(config: Any) -> int:
    """Positions that nodes may have: those of the longest sequence, and of a tree behind it."""
    return int(config.max_position_embeddings) + MOST_GPU_NODES


def find_obstacle(decoder: Any, dtype: torch.dtype) -> str | None:
    """Why the layers must run as transformers has them; None where they need not.

    Args:
        decoder, dtype: as for `FusedDecoder`.
    """
    weight = decoder.embed_tokens.weight
    if has_hooks_on_every_module():
        return "there are hooks on every module"
    if not cpu.covers(weight.dtype, dtype):
        return f"there are no kernels for {weight.dtype} with products in {dtype}"
    if (activation := getattr(decoder.config, "hidden_act", "silu")) != "silu":
        return f"the activation is {activation!r}"
    if type(decoder.embed_tokens) is not nn.Embedding:
        return f"its embedding is a {type(decoder.embed_tokens).__name__}"
    if decoder.embed_tokens.max_norm is not None:
        return f"its embedding has a max_norm of {decoder.embed_tokens.max_norm}"
    rotated = 2 * len(getattr(decoder.rotary_emb, "inv_freq", ()))  # 0: not known
    for layer in decoder.layers:
        if type(layer).__name__ not in _LAYERS:
            return f"its layers are of type {type(layer).__name__}"
        if rotated not in (0, layer.self_attn.head_dim):  # kernels would read past the end of cos and sin
            return f"{rotated} of {layer.self_attn.head_dim} numbers of a head are rotated"
        for part in (layer.self_attn, layer.mlp):
            if is_touched(part):
                return f"{type(part).__name__} modules have hooks or a forward of their own"
        if (activation := type(layer.mlp.act_fn).__name__) not in _ACTIVATIONS:
            return f"the activation is a {activation}"
        for name in _LINEARS:
            linear = layer.get_submodule(name)
            dtypes = {parameter.dtype for parameter in linear.parameters()}
            if type(linear) is not nn.Linear or dtypes != {dtype}:
                found = f"{type(linear).__name__} in {', '.join(sorted(map(str, dtypes)))}"
                return f"{name} is a {found}, and not linear in {dtype}"
    norms = {name: module for name, module in decoder.named_modules() if name.endswith("norm")}
    kinds = {type(norm).__name__ for norm in norms.values()}
    if not kinds <= set(_NORMS):
        return f"its norms are of type {', '.join(sorted(kinds))}"
    for name, norm in norms.items():
        if norm.weight.dtype != weight.dtype:
            return f"{name} is in {norm.weight.dtype}, and the embedding in {weight.dtype}"
    for name, parameter in decoder.named_parameters():
        if not parameter.is_contiguous():
            return f"{name} is not contiguous"
    if any(is_touched(module) for module in decoder.modules()):
        return "its modules have hooks or a forward of their own"
    return NO_KERNELS if find_kernels(weight) is None else None


def is_touched(module: nn.Module) -> bool:
    """Whether a module computes something else than its weights say."""
    has_own_forward = "forward" in vars(module) or not type(module).forward.__module__.startswith(_LIBRARIES)
    return has_own_forward or has_hooks(module)


def is_model_touched(model: Any) -> bool:
    """Whether a causal LM, or PEFT's model of one, says something else than its head does of its decoder's states.

    What libraries wrap around a forward for training changes no logits.
    """
    forward = model.forward
    if _is_from(forward, ("accelerate.",)):  # keeps what it has wrapped in autocast
        forward = vars(model).get("_original_forward", forward)
    return not _is_from(forward, (*_LIBRARIES, *_WRAPPERS)) or has_hooks(model)


def _is_from(forward: Any, libraries: tuple[str, ...]) -> bool:
    """Whether a function was written in one of these; decorators that take its name count by where they were."""
    function = getattr(forward, "__func__", forward)
    written_in = getattr(function, "__globals__", {}).get("__name__", "")
    return str(function.__module__).startswith(libraries) and str(written_in).startswith(libraries)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks may change what a module computes."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return has_hooks_on_every_module() or any(getattr(hook, "__name__", "") not in _ONLY_TRAINING for hook in hooks)


def has_hooks_on_every_module() -> bool:
    """Whether hooks are registered that PyTorch calls for all modules."""
    return bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks)
