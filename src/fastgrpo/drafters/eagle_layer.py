"""The layer of an EAGLE-3 head on a CPU without the modules in between, as `decoder` runs those of the target."""

from __future__ import annotations

from typing import TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastgrpo.attention import ForwardBatch, attend_to_rows, describe_rows, has_kernels
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.kernels import cpu
from fastgrpo.kernels.layers import CompiledLayers, LayerWeights, Norm, PairLayer
from fastgrpo.kernels.linear import PackedLinear


class FusedMidLayer:
    """Four products and kernels between them, in one call where all are ours; the weights as they are when it is built.

    Args:
        head: one that `covers` accepts, in the type it drafts in.
    """

    def __init__(self, head: EagleHead) -> None:
        layer, attention = head.midlayer, head.midlayer.self_attn
        self._head = head
        embedded, hidden, norm = (
            Norm(norm.weight.data, norm.eps)
            for norm in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        )
        self._weights = LayerWeights(
            before_attention=None,  # two norms side by side, here
            before_mlp=norm,
            states=PackedLinear((attention.q_proj, attention.k_proj, attention.v_proj)),
            output=PackedLinear((attention.o_proj,)),
            gate_and_up=PackedLinear((layer.mlp.gate_proj, layer.mlp.up_proj)),
            down=PackedLinear((layer.mlp.down_proj,)),
            num_heads=head.num_heads,
            num_kv_heads=head.num_kv_heads,
            head_dim=head.head_dim,
            scale=head.head_dim**-0.5,
        )
        self._stored = PackedLinear((attention.k_proj, attention.v_proj))
        self._compiled: PairLayer | None = None
        if CompiledLayers.covers([self._weights]):
            self._compiled = PairLayer(self._weights, embedded, hidden, keeps_normed=head.norm_before_residual)

    @staticmethod
    def covers(head: EagleHead) -> bool:
        """Whether there are kernels for a head's type and device."""
        weight = head.fc.weight
        return weight.device.type == "cpu" and cpu.covers(weight.dtype, weight.dtype) and cpu.is_available()

    def run(
        self,
        embed_tokens: nn.Module,
        hidden: Float[Tensor, "P H"],
        above: Int[Tensor, " T"] | None,
        cos: Float[Tensor, "T d"],
        sin: Float[Tensor, "T d"],
        batch: ForwardBatch,
        rows: HeadRows,
    ) -> Float[Tensor, "T H"]:
        """The layer's output for packed pairs; keys and values are written behind each row.

        Args:
            above: which of the hidden states each pair has; None: its own.
        """
        keys, values = rows.cache.keys, rows.cache.values
        if self._compiled is not None and has_kernels(hidden, batch) and _is_plain(embed_tokens, hidden):
            place = describe_rows(batch, keys, values, cos, sin)
            return self._compiled.run(place, embed_tokens.weight, batch.token_ids, hidden.contiguous(), above)
        head, layer, weights = self._head, self._head.midlayer, self._weights
        hidden = hidden if above is None else hidden[above]
        embedded = embed_tokens(batch.token_ids).to(hidden.dtype)
        normed = layer.hidden_norm(hidden)
        states = weights.states(torch.cat((layer.input_layernorm(embedded), normed), -1))
        cpu.rotate_and_cache_(states, cos, sin, batch.write_index, keys.flat(0), values.flat(0))
        query = states[:, : weights.num_heads * weights.head_dim]
        attended = attend_to_rows(query, keys, values, 0, batch, head_dim=weights.head_dim, scale=weights.scale)
        residual = (normed if head.norm_before_residual else hidden).clone()
        norm = weights.before_mlp
        x = cpu.add_norm(residual, weights.output(attended), norm.weight, norm.eps, hidden.dtype)
        return residual.add_(weights.down(cpu.multiply_silu(weights.gate_and_up(x), len(x))))

    def store(
        self,
        embed_tokens: nn.Module,
        token_ids: Int[Tensor, " T"],
        hidden: Float[Tensor, "T H"],
        cos: Float[Tensor, "T d"],
        sin: Float[Tensor, "T d"],
        places: Int[Tensor, " T"],
        rows: HeadRows,
    ) -> None:
        """Write keys and values of pairs whose outputs nobody needs.

        Args:
            places: of each pair in the cache.
        """
        layer, keys, values = self._head.midlayer, rows.cache.keys, rows.cache.values
        embedded = embed_tokens(token_ids).to(hidden.dtype)
        x = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), -1)
        cpu.rotate_and_cache_(self._stored(x), cos, sin, places, keys.flat(0), values.flat(0))


def _is_plain(embed_tokens: nn.Module, hidden: Tensor) -> TypeGuard[nn.Embedding]:
    """Whether it only looks up rows of a table in the type of the hidden states."""
    return type(embed_tokens) is nn.Embedding and embed_tokens.weight.dtype == hidden.dtype
