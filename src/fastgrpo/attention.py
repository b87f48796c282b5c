"""Attention over packed tree nodes and ragged cache rows, entered through transformers' own interface."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from fastgrpo.block_store import BlockStore
from fastgrpo.cache import locate
from fastgrpo.kernels import cpu, gpu
from fastgrpo.kernels.layers import CachedRows
from fastgrpo.kernels.linear import wants_round_rows
from fastgrpo.transfer import is_host, upload

ATTENTION_NAME = "fastgrpo_tree"
_MOST_NODES = 64  # nodes of a row that the attention kernel for CPUs takes, where oneDNN computes the products
MOST_GPU_NODES = 256  # nodes of a row that a kernel lays out on a GPU, and that are recorded: prompts have more
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
    num_nodes: Int[Tensor, " B"]  # packed tokens of each row
    blocks: Int[Tensor, "B K"]  # flat cache index of the first position of each block of each row
    lengths: Int[Tensor, " B"]  # cached positions that every node of the row sees
    visible: Bool[Tensor, "B N E"]  # node n sees position lengths[b] + e
    pad_index: Int[Tensor, " T"] | None  # row * N + node of each token; None if no row is padded
    dtype: torch.dtype  # of the attention
    num_repeats: int  # query heads for each key head
    laid_out_words: Int[Tensor, "B N W"] | None = None  # `words`, where a kernel has them

    @staticmethod
    def build(
        *,
        token_ids: Int[Tensor, "B N"],
        num_nodes: Int[Tensor, " B"],
        visible: Bool[Tensor, "B N E"],
        blocks: Int[Tensor, "B K"],
        lengths: Int[Tensor, " B"],
        dtype: torch.dtype,
        num_repeats: int,
        counts: Sequence[int] | None = None,
    ) -> ForwardBatch:
        """Lay out the nodes of each row behind its `lengths` cached positions.

        Args:
            token_ids: nodes in topological order, padded behind `num_nodes`.
            visible: `[b, i, e]` True iff new node i attends to node e, where the last N of the E
                nodes are the new ones and the others stand in the cache already; a node sees itself
                and its ancestors, so the number it sees gives its position.
            blocks: where the rows stand in the cache, as `SlotCache.blocks` says; there is room for the nodes.
            lengths: positions of those rows that every node sees.
            dtype, num_repeats: of the attention: its type, and query heads for each key head.
            counts: `num_nodes` where the host knows it. If it does not, a device computes the padding too, behind its
                row's own nodes, and nobody reads the results; each row must then have room for N nodes.
        """
        width = visible.shape[1]
        if counts is None and not is_host(num_nodes):
            num_nodes = torch.full_like(num_nodes, width)
            counts = (width,) * len(num_nodes)
        pad_index = _find_used(num_nodes, width, counts)
        words = None
        if pad_index is None and width <= MOST_GPU_NODES and gpu.runs_on(token_ids):
            from fastgrpo.kernels import gpu_trees  # in Triton, which is imported only where it runs

            *places, words = gpu_trees.lay_out(visible, lengths, blocks)
            packed = (token_ids.flatten(), *places)
        else:
            packed = _lay_out(token_ids, num_nodes, visible, lengths, blocks, pad_index)
        return ForwardBatch(
            **dict(zip(("token_ids", "positions", "write_index", "row_starts"), packed, strict=True)),
            laid_out_words=words,
            num_nodes=num_nodes,
            blocks=blocks,
            lengths=lengths,
            visible=visible,
            pad_index=pad_index,
            dtype=dtype,
            num_repeats=num_repeats,
        )

    @property
    def most_nodes(self) -> int:
        """N, nodes of the largest row."""
        return self.visible.shape[1]

    @property
    def num_before(self) -> int:
        """Positions behind `lengths` that are in the cache already: earlier nodes of the trees."""
        return self.visible.shape[2] - self.most_nodes

    @functools.cached_property
    def words(self) -> Int[Tensor, "B N W"]:
        """`visible` as bits of 64-bit words, the first in the lowest bit."""
        if self.laid_out_words is not None:
            return self.laid_out_words
        num_words = -(-self.visible.shape[2] // 64)
        padded = nn.functional.pad(self.visible, (0, num_words * 64 - self.visible.shape[2]))
        bits = torch.arange(64, device=padded.device)
        return (padded.unflatten(2, (num_words, 64)).long() << bits).sum(-1)

    @functools.cached_property
    def read_length(self) -> int:
        """S: positions read of every row where no kernel reads each row by itself; a multiple of READ_BLOCK."""
        return -(-(int((self.lengths + self.num_nodes).max()) + self.num_before) // READ_BLOCK) * READ_BLOCK

    @functools.cached_property
    def read_index(self) -> Int[Tensor, "B S"]:
        """Flat cache index of the first `read_length` positions of each row."""
        slot = torch.arange(self.read_length, device=self.lengths.device)
        return locate(self.blocks, slot.expand(len(self.blocks), -1))

    @functools.cached_property
    def mask(self) -> Float[Tensor, "B 1 repN S"]:
        """The additive attention mask, repeated for each query head that shares a key head."""
        return self.build_mask(None)

    @functools.cached_property
    def _masks(self) -> dict[int, Float[Tensor, "B 1 repN S"]]:
        return {}

    def mask_within(self, window: int | None) -> Float[Tensor, "B 1 repN S"]:
        """`mask` where a node sees only the last `window` tokens, itself included; None: all before it."""
        if window is None:
            return self.mask
        if window not in self._masks:
            self._masks[window] = self.build_mask(window)
        return self._masks[window]

    def build_mask(self, window: int | None) -> Float[Tensor, "B 1 repN S"]:
        """`mask_within`, computed anew."""
        slot = torch.arange(self.read_length, device=self.lengths.device)
        node = slot - self.lengths[:, None]  # node that a slot holds
        is_node = (node >= 0) & (node < self.visible.shape[2])
        held = node.clamp(0, self.visible.shape[2] - 1)[:, None].expand(-1, self.most_nodes, -1)
        mask = (node < 0)[:, None] | (is_node[:, None] & self.visible.gather(2, held))
        if window is None:
            mask[..., 0] = True  # true of every node; keeps padded nodes finite
        else:
            depth = self.visible.cumsum(2) - 1  # what a node sees of its tree is a path
            place = torch.where((node < 0)[:, None], node[:, None], depth.gather(2, held))  # behind the cached ones
            mask &= depth[..., -1:] - place < window
            mask[..., 0] |= ~mask.any(-1)  # of padded nodes
        additive = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
        return additive[:, None].repeat(1, 1, self.num_repeats, 1)


def _lay_out(
    token_ids: Int[Tensor, "B N"],
    num_nodes: Int[Tensor, " B"],
    visible: Bool[Tensor, "B N E"],
    lengths: Int[Tensor, " B"],
    blocks: Int[Tensor, "B K"],
    pad_index: Int[Tensor, " T"] | None,
) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " B"]]:
    """Packed token ids, positions and places in the cache, and the first packed token of each row."""
    if is_host(token_ids) and cpu.is_available():
        num_tokens = token_ids.numel() if pad_index is None else len(pad_index)
        return cpu.lay_out(token_ids, num_nodes, visible, lengths, blocks, num_tokens)
    width, num_visible = visible.shape[1:]
    index = torch.arange(width, device=token_ids.device)
    flat = locate(blocks, (lengths + (num_visible - width))[:, None] + index)
    positions = lengths[:, None] + visible.sum(-1) - 1
    tokens, positions, flat = (
        values.flatten() if pad_index is None else values.flatten()[pad_index]
        for values in (token_ids, positions, flat)
    )
    return tokens, positions, flat, num_nodes.cumsum(0) - num_nodes


def _find_used(num_nodes: Int[Tensor, " B"], width: int, counts: Sequence[int] | None) -> Int[Tensor, " T"] | None:
    """row * width + node of each node in use; None if all are."""
    if counts is None:
        used = torch.arange(width) < num_nodes[:, None]
        return None if bool(used.all()) else used.view(-1).nonzero()[:, 0]
    if min(counts) == width:
        return None
    places = [row * width + node for row, count in enumerate(counts) for node in range(count)]
    return upload(places, num_nodes.device)


def pack_queries(
    query: Float[Tensor, "1 heads T d"], num_kv_heads: int, batch: ForwardBatch
) -> Float[Tensor, "B kv repN d"]:
    """Queries of the heads that share a key head side by side, so that keys are never repeated."""
    _, num_heads, _, head_dim = query.shape
    num_rows = len(batch.row_starts)
    tokens = query[0].transpose(0, 1)
    if batch.pad_index is not None:
        padded = tokens.new_zeros(num_rows * batch.most_nodes, num_heads, head_dim)
        tokens = padded.index_copy_(0, batch.pad_index, tokens)
    repeats = num_heads // num_kv_heads
    grouped = tokens.reshape(num_rows, batch.most_nodes, num_kv_heads, repeats, head_dim).permute(0, 2, 3, 1, 4)
    return grouped.reshape(num_rows, num_kv_heads, repeats * batch.most_nodes, head_dim)


def unpack_outputs(
    output: Float[Tensor, "B kv repN d"], num_heads: int, batch: ForwardBatch
) -> Float[Tensor, "1 T heads d"]:
    """The inverse of `pack_queries`, token first."""
    num_rows, num_kv_heads, _, head_dim = output.shape
    grouped = output.view(num_rows, num_kv_heads, num_heads // num_kv_heads, batch.most_nodes, head_dim)
    tokens = grouped.permute(0, 3, 1, 2, 4).reshape(num_rows * batch.most_nodes, num_heads, head_dim)
    return (tokens if batch.pad_index is None else tokens[batch.pad_index])[None]


def tree_attention(
    module: Any,
    query: Float[Tensor, "1 heads T d"],
    key: Float[Tensor, "B kv S d"],
    value: Float[Tensor, "B kv S d"],
    attention_mask: Float[Tensor, "_ 1 _ _"] | None,
    *,
    tree_batch: ForwardBatch | None = None,
    windows: Sequence[int | None] = (),
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 T heads d"], None]:
    """transformers' attention interface over packed nodes and ragged rows.

    Args:
        key, value: of the batch's rows; where the GPU kernel runs, of the whole cache as one row.
        attention_mask: ignored: the batch has its own.
        windows: for each layer, how many tokens a node sees, itself included; None: all before it.

    Raises:
        RuntimeError: the model was called from outside the engine during a rollout, as by a callback or a streamed
            reward.
    """
    if tree_batch is None:
        raise RuntimeError(
            "this model is in a rollout, whose attention reads the engine's cache alone: call it once the rollout has "
            "ended or is closed, or call a copy of it"
        )
    num_heads, num_kv_heads, window = query.shape[1], key.shape[1], windows[module.layer_idx]
    if window is None and has_gpu_kernel(key):
        heads, keys, values = (states[0].transpose(0, 1) for states in (query.to(key.dtype), key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend_to_blocks(heads, keys.flatten(1), values.flatten(1), tree_batch, scale)[None], None
    packed = pack_queries(query.to(key.dtype), num_kv_heads, tree_batch)
    mask = tree_batch.mask_within(window)
    with gpu.without_cudnn_attention():
        output = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return unpack_outputs(output, num_heads, tree_batch), None


def attend_to_rows(
    query: Float[Tensor, "M hd"],
    keys: BlockStore,
    values: BlockStore,
    layer: int,
    batch: ForwardBatch,
    *,
    head_dim: int,
    scale: float,
) -> Float[Tensor, "_ hd"]:
    """Attention of packed nodes to the cached rows, their own keys and values included.

    Queries may be padded: results behind the batch's T tokens are undefined. Kernels, where they run, read of each row
    its own positions alone.
    """
    if has_gpu_kernel(query):
        heads = query.unflatten(-1, (-1, head_dim))
        return _attend_to_blocks(heads, keys.flat(layer), values.flat(layer), batch, scale).flatten(1)
    if has_kernels(query, batch):
        return cpu.attend(
            query,
            keys.flat(layer),
            values.flat(layer),
            starts=batch.row_starts,
            num_nodes=batch.num_nodes,
            lengths=batch.lengths,
            blocks=batch.blocks,
            visible=batch.visible,
            head_dim=head_dim,
            scale=scale,
        )
    num_kv_heads = keys.data.shape[-1] // head_dim
    key, value = (
        store.read(layer, batch.read_index).unflatten(-1, (num_kv_heads, head_dim)).transpose(1, 2)
        for store in (keys, values)
    )
    tokens = query[: len(batch.token_ids)].unflatten(-1, (-1, head_dim))
    packed = pack_queries(tokens.transpose(0, 1)[None], num_kv_heads, batch)
    with gpu.without_cudnn_attention():
        output = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=batch.mask, scale=scale)
    return unpack_outputs(output, query.shape[1] // head_dim, batch)[0].flatten(1)


def describe_rows(
    batch: ForwardBatch, keys: BlockStore, values: BlockStore, cos: Float[Tensor, "C d"], sin: Float[Tensor, "C d"]
) -> CachedRows:
    """The batch as kernels that run whole layers take it; only for batches that `has_kernels` accepts.

    Args:
        cos, sin: of all positions up to the batch's, as `RotationTable.cover` has them.
    """
    return CachedRows(
        cos=cos,
        sin=sin,
        token_ids=batch.token_ids,
        positions=batch.positions,
        places=batch.write_index,
        keys=keys.data,
        values=values.data,
        starts=batch.row_starts,
        num_nodes=batch.num_nodes,
        lengths=batch.lengths,
        blocks=batch.blocks,
        visible=batch.visible,
    )


def _attend_to_blocks(
    query: Float[Tensor, "M h d"],
    keys: Float[Tensor, "P kvd"],
    values: Float[Tensor, "P kvd"],
    batch: ForwardBatch,
    scale: float,
) -> Float[Tensor, "M h d"]:
    from fastgrpo.kernels import gpu_attention  # in Triton, which is imported only where it runs

    return gpu_attention.attend(
        query,
        keys,
        values,
        blocks=batch.blocks,
        starts=batch.row_starts,
        num_nodes=batch.num_nodes,
        lengths=batch.lengths,
        words=batch.words,
        num_before=batch.num_before,
        scale=scale,
    )


def has_gpu_kernel(values: Tensor) -> bool:
    """Whether the attention kernel for GPUs takes keys and values like these."""
    return values.dtype in gpu.DTYPES and gpu.runs_on(values)


def has_kernels(query: Tensor, batch: ForwardBatch) -> bool:
    """Whether the attention kernel for CPUs takes the batch.

    It does not take long prompts where oneDNN has matrix instructions, with which a row's bits depend on its batch
    anyway. Elsewhere it takes all, so that a prompt's bits are its own, and those of its tokens decoded one by one.
    """
    if query.device.type != "cpu" or not cpu.covers(query.dtype, query.dtype):
        return False
    return (batch.most_nodes <= _MOST_NODES or not wants_round_rows(query.dtype)) and cpu.is_available()


AttentionInterface.register(ATTENTION_NAME, tree_attention)
