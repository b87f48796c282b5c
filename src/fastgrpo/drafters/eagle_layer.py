"""The layer of an EAGLE-3 head on a CPU without the modules in between, as `decoder` runs those of the target."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fastgrpo.attention import ForwardBatch, attend_to_rows
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.kernels import cpu
from fastgrpo.kernels.linear import PackedLinear


class FusedMidLayer:
    """Four products, and kernels between them; the weights as they are when it is built.

    Args:
        head: one that `covers` accepts, in the type it drafts in.
    """

    def __init__(self, head: EagleHead) -> None:
        layer, attention = head.midlayer, head.midlayer.self_attn
        self._head = head
        self._num_queries = int(attention.q_proj.out_features)
        self._states = PackedLinear((attention.q_proj, attention.k_proj, attention.v_proj))
        self._output = PackedLinear((attention.o_proj,))
        self._gate_and_up = PackedLinear((layer.mlp.gate_proj, layer.mlp.up_proj))
        self._down = PackedLinear((layer.mlp.down_proj,))

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
        states = self._states(torch.cat((layer.input_layernorm(embedded), normed), -1))
        keys, values = rows.cache.keys, rows.cache.values
        places = (batch.write_index, keys.flat(0), values.flat(0))
        cpu.rotate_and_cache_(states, cos.contiguous(), sin.contiguous(), *places)
        query, scale = states[:, : self._num_queries], head.head_dim**-0.5
        attended = attend_to_rows(query, keys, values, 0, batch, head_dim=head.head_dim, scale=scale)
        residual = (normed if head.norm_before_residual else hidden).clone()
        norm = layer.post_attention_layernorm
        x = cpu.add_norm(residual, self._output(attended), norm.weight, norm.eps, hidden.dtype)
        return residual.add_(self._down(cpu.multiply_silu(self._gate_and_up(x), len(x))))
