"""Attention over packed tree nodes and ragged cache rows, entered through transformers' own interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from fastgrpo.cache import RowStore

ATTENTION_NAME = "fastgrpo_tree"
READ_BLOCK = 16
"""Rows are read up to a multiple of this. A partly filled last block is summed in another order, so
without it a row's half-precision result would depend on the length of its neighbours (PyTorch's CPU
kernel; measured in dev/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One forward: T packed tokens of B rows, each row a tree (or a chain) behind its cached prefix."""

    token_ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    write_index: Int[Tensor, " T"]  # flat cache index of each token
    row_starts: Int[Tensor, " B"]  # first packed token of each row
    rows: slice | Int[Tensor, " B"]  # cache rows read
    read_length: int  # cache positions read, the new tokens included; a multiple of READ_BLOCK
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
        read_length = -(-(int((lengths + num_nodes).max()) + offset) // READ_BLOCK) * READ_BLOCK
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
