"""An EAGLE-3 head without the modules in between, as `decoder` runs the target's layers."""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastgrpo.attention import ForwardBatch, attend_to_rows
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.kernels import cpu
from fastgrpo.kernels.choose import find_kernels
from fastgrpo.kernels.heads import CompiledHead
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.kernels.layers import LayerWeights, Norm, has_own_products
from fastgrpo.kernels.linear import PackedLinear, find_packed


class FusedMidLayer:
    """Four products and kernels between them; the weights as they are when it is built.

    Args:
        head: one that `covers` accepts, in the type it drafts in.
        memory: where laid-out weights are to stand.
    """

    def __init__(self, head: EagleHead, memory: KeptMemory) -> None:
        layer, attention = head.midlayer, head.midlayer.self_attn
        pack = functools.partial(PackedLinear, memory=memory)
        self._head = head
        self._kernels = find_kernels(head.fc.weight)
        assert self._kernels is not None, "ask covers first"
        embedded, hidden, norm = (
            Norm(norm.weight.data, norm.eps)
            for norm in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        )
        self.pair_norms = embedded, hidden
        self.weights = LayerWeights(
            before_attention=None,  # two norms side by side, here
            before_mlp=norm,
            states=pack((attention.q_proj, attention.k_proj, attention.v_proj)),
            output=pack((attention.o_proj,)),
            gate_and_up=pack((layer.mlp.gate_proj, layer.mlp.up_proj)),
            down=pack((layer.mlp.down_proj,)),
            num_heads=head.num_heads,
            num_kv_heads=head.num_kv_heads,
            head_dim=head.head_dim,
            scale=head.head_dim**-0.5,
        )
        self._stored = pack((attention.k_proj, attention.v_proj))

    @staticmethod
    def covers(head: EagleHead) -> bool:
        """Whether there are kernels for a head's type and device."""
        weight = head.fc.weight
        return cpu.covers(weight.dtype, weight.dtype) and find_kernels(weight) is not None

    def run(
        self,
        embed_tokens: nn.Module,
        hidden: Float[Tensor, "T H"],
        cos: Float[Tensor, "T d"],
        sin: Float[Tensor, "T d"],
        batch: ForwardBatch,
        rows: HeadRows,
    ) -> Float[Tensor, "T H"]:
        """The layer's output for packed pairs; keys and values are written behind each row."""
        keys, values = rows.cache.keys, rows.cache.values
        kernels, weights = self._kernels, self.weights
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
            for states, norm in zip((embedded.to(hidden.dtype), hidden), self.pair_norms, strict=True)
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


def compile_head(head: EagleHead, layer: FusedMidLayer) -> CompiledHead | None:
    """The head in one call a pass; None where some product is not our own.

    Args:
        head: packed, in the type it drafts in.
        layer: its layer.
    """
    dtype = layer.weights.before_mlp.weight.dtype
    features, output = find_packed(head.fc), find_packed(head.lm_head)
    is_own = features is not None and output is not None and features.own is not None and output.own is not None
    if not is_own or not has_own_products([layer.weights]) or head.lm_head.weight.dtype != dtype:
        return None
    assert features is not None and output is not None
    embedded, hidden = layer.pair_norms
    return CompiledHead(
        layer.weights,
        embedded=embedded,
        hidden=hidden,
        keeps_normed=head.norm_before_residual,
        features=features,
        last=Norm(head.norm.weight.data, head.norm.eps),
        output=output,
        dtype=dtype,
    )


def is_plain(embed_tokens: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Embedding]:
    """Whether it only looks up rows of a table that kernels read for products in this type."""
    if type(embed_tokens) is not nn.Embedding:
        return False
    return cpu.covers(embed_tokens.weight.dtype, dtype) and embed_tokens.weight.is_contiguous()
