"""Whole drafts of an EAGLE-3 head in one call (`drafts.c`), where every product is our own."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu
from fastgrpo.kernels.layers import (
    LayerRecord,
    LayerWeights,
    LinearRecord,
    Norm,
    NormRecord,
    count_between,
)
from fastgrpo.kernels.linear import PackedLinear


class _HeadRecord(ctypes.Structure):
    _fields_ = (
        ("embedded", NormRecord),
        ("hidden", NormRecord),
        ("keeps_normed", ctypes.c_int64),
        ("layer", LayerRecord),
        ("features", LinearRecord),
        ("last", NormRecord),
        ("output", LinearRecord),
    )


_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


class _DraftRecord(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("embeddings", "cosine", "sine", "keys", "values")),
        *(("own_blocks", _Pointer), ("most_own_blocks", _Number)),
        *(("features", _Pointer), ("stride", _Number), ("blocks", _Pointer), ("most_blocks", _Number)),
        *((name, _Pointer) for name in ("roots", "lengths", "num_read", "num_unread", "unread")),
        *((name, _Number) for name in ("rows", "most_unread", "num_tokens")),
        *((name, _Pointer) for name in ("vocabulary", "stream_keys", "positions", "temperatures")),
        *(("is_noisy", _Number), ("lines", _Pointer), ("penalty", ctypes.c_float)),
        *((name, _Number) for name in ("depth", "width", "num_between", "num_between_read")),
    )


@dataclass(frozen=True, kw_only=True)
class DraftRows:
    """What B sequences are drafted from, on the host."""

    cos: Float[Tensor, "C d"]  # of all positions that are drafted, and of more
    sin: Float[Tensor, "C d"]
    keys: Float[Tensor, "1 P kvd"]  # of the head's own rows
    values: Float[Tensor, "1 P kvd"]
    own_blocks: Int[Tensor, "B J"]  # where these stand
    features: Float[Tensor, "F W"]  # of the target, whose first numbers the head reads
    blocks: Int[Tensor, "B K"]  # where they stand, from the first position of the head's own rows on
    roots: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]  # pairs of a row, as many are read before the first candidates
    num_read: Int[Tensor, " B"]  # of these, before the draft
    counts: tuple[int, ...]  # of the others
    unread: Int[Tensor, "B N"]  # their tokens, padded behind them
    stream_keys: Int[Tensor, " B"]
    positions: Int[Tensor, " B"]
    temperature: Float[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class DraftShape:
    """The trees that are asked for.

    Attributes:
        most_nodes: behind the root.
        lines: slope and offset of each level's calibration.
        penalty: nats, taken off the score of each level.
        with_noise: whether candidates are ranked with the target's noise.
    """

    depth: int
    width: int
    most_nodes: int
    lines: Sequence[tuple[float, float]]
    penalty: float
    with_noise: bool

    def count_nodes(self, num_columns: int) -> int:
        """Behind the root, of a head that drafts from so many tokens: a level has no more than there are candidates."""
        children, level, total = min(self.width, num_columns), 1, 0
        for _ in range(self.depth):
            total, level = total + level * children, min(self.width, level * children)
        return min(self.most_nodes, total)


class CompiledHead:
    """A head whose products are all our own.

    Args:
        layer: without a norm before attention; instead there are these two:
        embedded, hidden: side by side the layer's input.
        keeps_normed: the residual is the normed hidden state.
        features: from the target's features to hidden states.
        last: the norm behind the layer.
        output: to logits of the tokens that are drafted.
        dtype: of all of it.
    """

    def __init__(
        self,
        layer: LayerWeights,
        *,
        embedded: Norm,
        hidden: Norm,
        keeps_normed: bool,
        features: PackedLinear,
        last: Norm,
        output: PackedLinear,
        dtype: torch.dtype,
    ) -> None:
        self._tensors = (layer, embedded, hidden, features, last, output)  # alive for as long as the record
        self._dtype, self._hidden_size = dtype, output.num_inputs
        self._record = _HeadRecord(
            NormRecord.point_to(embedded),
            NormRecord.point_to(hidden),
            keeps_normed,
            LayerRecord.point_to(layer),
            LinearRecord.point_to(features),
            NormRecord.point_to(last),
            LinearRecord.point_to(output),
        )
        self._num_between = 3 * self._hidden_size + count_between(layer)
        self._num_read = 2 * self._hidden_size + max(features.num_inputs, self._num_between)

    def draft(
        self, rows: DraftRows, shape: DraftShape, embeddings: Float[Tensor, "V H"], vocabulary: Int[Tensor, " D"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Reads what is unread and grows a tree of each row, with the bits of the passes called one by one.

        Args:
            embeddings: of all tokens.
            vocabulary: int32 target ids of the head's logits.

        Returns:
            token ids, parents, number of nodes, log chances and scores, as `trees.Pool.prune` does.
        """
        assert embeddings.is_contiguous() and rows.features.stride(1) == 1 and vocabulary.dtype == torch.int32
        num_rows, most_unread = rows.unread.shape
        num_unread = (_Number * num_rows)(*rows.counts)
        lines = (ctypes.c_float * (2 * shape.depth))(*itertools.chain.from_iterable(shape.lines))
        blocks, own_blocks = rows.blocks.contiguous(), rows.own_blocks.contiguous()
        at = [tensor.data_ptr() for tensor in (embeddings, rows.cos, rows.sin, rows.keys, rows.values)]
        pairs = [tensor.data_ptr() for tensor in (rows.roots, rows.lengths, rows.num_read)]
        sampling = (vocabulary, rows.stream_keys, rows.positions, rows.temperature)
        record = _DraftRecord(
            *at,
            *(own_blocks.data_ptr(), own_blocks.shape[1]),
            *(rows.features.data_ptr(), rows.features.stride(0), blocks.data_ptr(), blocks.shape[1]),
            *(*pairs, ctypes.addressof(num_unread), rows.unread.data_ptr()),
            *(num_rows, most_unread, sum(rows.counts)),
            *(tensor.data_ptr() for tensor in sampling),
            *(shape.with_noise, ctypes.addressof(lines), shape.penalty),
            *(shape.depth, shape.width, self._num_between, self._num_read),
        )
        records = (ctypes.byref(self._record), ctypes.byref(record))
        count = shape.count_nodes(self._record.output.outputs)
        token_ids, parents = (torch.empty(num_rows, count + 1, dtype=torch.int64) for _ in range(2))
        log_chances, scores = (torch.empty(num_rows, count + 1, dtype=torch.float32) for _ in range(2))
        num_nodes = torch.empty(num_rows, dtype=torch.int64)
        found = (token_ids, parents, num_nodes, log_chances, scores)
        cpu.compute(f"draft_{cpu.NAMES[embeddings.dtype]}_{cpu.NAMES[self._dtype]}", *records, count, *found)
        return found
