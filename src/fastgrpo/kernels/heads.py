"""The passes of an EAGLE-3 head in one call each (`layer.c`), where every product is our own."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu
from fastgrpo.kernels.layers import (
    CachedRows,
    LayerRecord,
    LayerWeights,
    LinearRecord,
    Norm,
    NormRecord,
    Room,
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


class CompiledHead:
    """A head whose products are all our own, with the bits of the kernels called one by one.

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
        self._room = Room()

    def read(
        self,
        rows: CachedRows,
        embeddings: Float[Tensor, "V H"],
        features: Float[Tensor, "P W"],
        blocks: Int[Tensor, "B K"],
    ) -> Float[Tensor, "B H"]:
        """The output of each row's last pair.

        Args:
            rows: pairs with true features, behind those that were read before.
            embeddings: of all tokens.
            features: of the target, whose first numbers the head reads.
            blocks: where they stand, from the first position of the head's own rows on.
        """
        assert embeddings.is_contiguous() and features.stride(1) == 1
        last = torch.empty(rows.num_rows, self._hidden_size, dtype=self._dtype)
        scratch = self._room.take(rows.num_tokens * self._num_read, self._dtype)
        records = (ctypes.byref(self._record), ctypes.byref(rows.record), embeddings)
        where = (features, features.stride(0), blocks.contiguous(), blocks.shape[1])
        cpu.compute(self._name("read_pairs", embeddings), *records, *where, last, scratch)
        return last

    def expand(
        self,
        rows: CachedRows,
        embeddings: Float[Tensor, "V H"],
        hidden: Float[Tensor, "B A H"],
        above: Int[Tensor, "B W"],
    ) -> Float[Tensor, "T H"]:
        """Outputs of nodes, W in each row, on hidden states that are outputs themselves.

        Args:
            embeddings: of all tokens.
            above: which of its row's hidden states each node has.
        """
        assert embeddings.is_contiguous()
        out = torch.empty(rows.num_tokens, self._hidden_size, dtype=self._dtype)
        scratch = self._room.take(rows.num_tokens * self._num_between, self._dtype)
        records = (ctypes.byref(self._record), ctypes.byref(rows.record), embeddings)
        where = (hidden.contiguous(), above.contiguous(), hidden.shape[1])
        cpu.compute(self._name("pairs", embeddings), *records, *where, out, scratch)
        return out

    def compute_logits(self, outputs: Float[Tensor, "B W H"]) -> Float[Tensor, "B W C"]:
        """Of the tokens that are drafted, valid until the next call."""
        num_rows, num_columns = outputs.shape[0] * outputs.shape[1], self._record.output.outputs
        scratch = self._room.take(num_rows * (self._hidden_size + num_columns), self._dtype)
        logits, normed = scratch.split((num_rows * num_columns, num_rows * self._hidden_size))
        name = f"score_{cpu.NAMES[self._dtype]}"
        cpu.compute(name, ctypes.byref(self._record), outputs.contiguous(), num_rows, logits, normed)
        return logits.view(*outputs.shape[:2], num_columns)

    def _name(self, what: str, embeddings: Tensor) -> str:
        return f"{what}_{cpu.NAMES[embeddings.dtype]}_{cpu.NAMES[self._dtype]}"
