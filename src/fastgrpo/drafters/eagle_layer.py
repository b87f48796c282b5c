"""The layer of an EAGLE-3 head on a CPU without the modules in between, as `decoder` runs those of the target."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fastgrpo.attention import ForwardBatch, attend_to_rows, describe_rows, has_kernels
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.kernels import cpu
from fastgrpo.kernels.layers import CompiledLayers, LayerWeights, Norm
from fastgrpo.kernels.linear import PackedLinear


class FusedMidLayer:
    """Four products and kernels between them, in one call where all are ours; the weights as they are when it is built.

    Args:
        head: one that `covers` accepts, in the type it drafts in.
    """

    def __init__(self, head: EagleHead) -> None:
        layer, attention = head.midlayer, head.midlayer.self_attn
        self._head = head
        norm, dtype = layer.post_attention_layernorm, head.fc.weight.dtype
        self._weights = LayerWeights(
            before_attention=None,  # two norms side by side, here
            before_mlp=Norm(norm.weight.data, norm.eps),
            states=PackedLinear((attention.q_proj, attention.k_proj, attention.v_proj)),
            output=PackedLinear((attention.o_proj,)),
            gate_and_up=PackedLinear((layer.mlp.gate_proj, layer.mlp.up_proj)),
            down=PackedLinear((layer.mlp.down_proj,)),
            num_heads=head.num_heads,
            num_kv_heads=head.num_kv_heads,
            head_dim=head.head_dim,
            scale=head.head_dim**-0.5,
        )
        is_own = CompiledLayers.covers([self._weights])
        self._compiled = CompiledLayers([self._weights], dtype, dtype) if is_own else None

    @staticmethod
    def covers(head: EagleHead) -> bool:
        """Whether there are kernels for a head's type and device."""
        weight = head.fc.weight
        return weight.device.type == "cpu" and cpu.covers(weight.dtype, weight.dtype) and cpu.is_available()

    def run(
        self,
        embedded: Float[Tensor, "T H"],
        hidden: Float[Tensor, "T H"],
        cos: Float[Tensor, "T d"],
        sin: Float[Tensor, "T d"],
        batch: ForwardBatch,
        rows: HeadRows,
    ) -> Float[Tensor, "T H"]:
        """The layer's output for packed pairs; keys and values are written behind each row."""
        head, layer = self._head, self._head.midlayer
        normed = layer.hidden_norm(hidden)
        x = torch.cat((layer.input_layernorm(embedded), normed), -1)
        residual = (normed if head.norm_before_residual else hidden).clone()
        keys, values = rows.cache.keys, rows.cache.values
        cos, sin = cos.contiguous(), sin.contiguous()
        if self._compiled is not None and has_kernels(keys.data, batch):
            return residual.add_(self._compiled.finish(describe_rows(batch, keys, values, cos, sin), x, residual))
        weights = self._weights
        states = weights.states(x)
        cpu.rotate_and_cache_(states, cos, sin, batch.write_index, keys.flat(0), values.flat(0))
        query = states[:, : weights.num_heads * weights.head_dim]
        attended = attend_to_rows(query, keys, values, 0, batch, head_dim=weights.head_dim, scale=weights.scale)
        norm = weights.before_mlp
        x = cpu.add_norm(residual, weights.output(attended), norm.weight, norm.eps, hidden.dtype)
        return residual.add_(weights.down(cpu.multiply_silu(weights.gate_and_up(x), len(x))))
