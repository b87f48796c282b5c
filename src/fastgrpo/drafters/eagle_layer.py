"""The layer of an EAGLE-3 head without the modules in between, as `decoder` runs those of the target."""

from __future__ import annotations

from typing import TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastgrpo.attention import ForwardBatch, attend_to_rows, describe_rows, has_kernels
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.kernels import cpu
from fastgrpo.kernels.choose import find_kernels
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
        self._kernels = find_kernels(head.fc.weight)
        assert self._kernels is not None, "ask covers first"
        embedded, hidden, norm = (
            Norm(norm.weight.data, norm.eps)
            for norm in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        )
        self._pair_norms = embedded, hidden
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
        if self._kernels is cpu and CompiledLayers.covers([self._weights]):
            self._compiled = PairLayer(self._weights, embedded, hidden, keeps_normed=head.norm_before_residual)

    @staticmethod
    def covers(head: EagleHead) -> bool:
        """Whether there are kernels for a head's type and device."""
        weight = head.fc.weight
        return cpu.covers(weight.dtype, weight.dtype) and find_kernels(weight) is not None

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
        kernels, weights = self._kernels, self._weights
        hidden = hidden if above is None else hidden[above]
        pairs, normed = self._norm_pairs(embed_tokens(batch.token_ids), hidden)
        states = weights.states(pairs)
        kernels.rotate_and_cache_(states, cos, sin, batch.write_index, keys.flat(0), values.flat(0))
        query = states[:, : weights.num_heads * weights.head_dim]
        attended = attend_to_rows(query, keys, values, 0, batch, head_dim=weights.head_dim, scale=weights.scale)
        residual = (normed if self._head.norm_before_residual else hidden).clone()
        norm = weights.before_mlp
        x = kernels.add_norm(residual, weights.output(attended), norm.weight, norm.eps, hidden.dtype)
        return residual.add_(weights.down(kernels.multiply_silu(weights.gate_and_up(x), len(x))))

    def _norm_pairs(
        self, embedded: Float[Tensor, "T H"], hidden: Float[Tensor, "T H"]
    ) -> tuple[Float[Tensor, "T 2H"], Float[Tensor, "T H"]]:
        """What the attention's products take, and the normed hidden states, its second half."""
        parts = [
            self._kernels.add_norm(states.contiguous(), None, norm.weight, norm.eps, hidden.dtype)
            for states, norm in zip((embedded.to(hidden.dtype), hidden), self._pair_norms, strict=True)
        ]
        return torch.cat(parts, -1), parts[1]

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
        keys, values = rows.cache.keys, rows.cache.values
        pairs, _ = self._norm_pairs(embed_tokens(token_ids), hidden)
        self._kernels.rotate_and_cache_(self._stored(pairs), cos, sin, places, keys.flat(0), values.flat(0))


def _is_plain(embed_tokens: nn.Module, hidden: Tensor) -> TypeGuard[nn.Embedding]:
    """Whether it only looks up rows of a table in the type of the hidden states."""
    return type(embed_tokens) is nn.Embedding and embed_tokens.weight.dtype == hidden.dtype
