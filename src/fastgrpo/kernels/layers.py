"""Whole decoders in one call (`layer.c`), where every product is our own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu
from fastgrpo.kernels.linear import PackedLinear
from fastgrpo.places import find_place

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    weight: Float[Tensor, " H"]
    eps: float

    @property
    def place(self) -> tuple[object, ...]:
        return find_place(self.weight), self.eps


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A decoder layer's weights, its linear layers packed; a norm of None is one that it does not have."""

    before_attention: Norm | None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    before_mlp: Norm
    states: PackedLinear
    output: PackedLinear
    gate_and_up: PackedLinear
    down: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        return self.states, self.output, self.gate_and_up, self.down

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        return self.before_attention, self.query_norm, self.key_norm, self.before_mlp

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for layers that compute the same with weights in the same places."""
        norms = [None if norm is None else norm.place for norm in self.norms]
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.scale)
        return (*norms, *(linear.place for linear in self.linears), *sizes)


class NormRecord(ctypes.Structure):
    _fields_ = (("weight", _Pointer), ("eps", ctypes.c_float))

    @classmethod
    def point_to(cls, norm: Norm | None) -> NormRecord:
        return cls() if norm is None else cls(norm.weight.data_ptr(), norm.eps)


class LinearRecord(ctypes.Structure):
    _fields_ = (("layout", _Pointer), ("bias", _Pointer), ("inputs", _Number), ("outputs", _Number))

    @classmethod
    def point_to(cls, linear: PackedLinear) -> LinearRecord:
        own = linear.own
        assert own is not None, "its product is not our own"
        bias = None if own.bias is None else own.bias.data_ptr()
        return cls(own.weight.data_ptr(), bias, linear.num_inputs, own.num_outputs)


class LayerRecord(ctypes.Structure):
    _fields_ = (
        *((name, NormRecord) for name in ("before_attention", "query_norm", "key_norm", "before_mlp")),
        *((name, LinearRecord) for name in ("states", "output", "gate_and_up", "down")),
        *((name, _Number) for name in ("heads", "kv_heads", "width")),
        ("scale", ctypes.c_float),
    )

    @classmethod
    def point_to(cls, layer: LayerWeights) -> LayerRecord:
        sizes = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.scale)
        return cls(*map(NormRecord.point_to, layer.norms), *map(LinearRecord.point_to, layer.linears), *sizes)


class _DecoderRecord(ctypes.Structure):
    _fields_ = (
        *(("layers", _Pointer), ("count", _Number)),
        *(("embeddings", _Pointer), ("vocabulary", _Number)),
        ("last", NormRecord),
    )


class _BatchRecord(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("cosine", "sine", "ids", "positions", "places", "keys", "values")),
        ("plane", _Number),
        *((name, _Pointer) for name in ("starts", "nodes", "lengths", "blocks", "visible")),
        *((name, _Number) for name in ("tokens", "rows", "most_blocks", "most_nodes", "seen")),
    )


class CachedRows:
    """Packed nodes and where their rows stand in the cache: what layers that run in one call are told.

    Args:
        cos, sin: of all positions that the nodes may have.
        keys, values: of all layers.
    """

    def __init__(
        self,
        *,
        cos: Float[Tensor, "C d"],
        sin: Float[Tensor, "C d"],
        token_ids: Int[Tensor, " T"],
        positions: Int[Tensor, " T"],
        places: Int[Tensor, " T"],
        keys: Float[Tensor, "L P kvd"],
        values: Float[Tensor, "L P kvd"],
        starts: Int[Tensor, " B"],
        num_nodes: Int[Tensor, " B"],
        lengths: Int[Tensor, " B"],
        blocks: Int[Tensor, "B K"],
        visible: Bool[Tensor, "B N E"],
    ) -> None:
        blocks, visible = blocks.contiguous(), visible.contiguous()
        cached = (cos, sin, token_ids, positions, places, keys, values)
        rows = (starts, num_nodes, lengths, blocks, visible)
        sizes = (len(token_ids), len(starts), blocks.shape[1], *visible.shape[1:])
        self.num_tokens, self.num_rows, self.token_ids = *sizes[:2], token_ids
        self._tensors = (*cached, *rows)  # kept alive for as long as the record points to them
        pointers = [tensor.data_ptr() for tensor in self._tensors]
        self.record = _BatchRecord(*pointers[:7], keys.stride(0), *pointers[7:], *sizes)


class Room:
    """Memory that calls write to one after the other, kept since new pages of it would cost more than what is written.

    What stands there is valid until it is asked for again.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Float[Tensor, " N"]:
        size = count * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype)


def has_own_products(layers: Sequence[LayerWeights]) -> bool:
    """Whether layers can run in one call."""
    return all(linear.own is not None for layer in layers for linear in layer.linears)


class CompiledDecoder:
    """A decoder that runs in one call, with the bits of the kernels called one by one.

    Args:
        layers: that `has_own_products`.
        embeddings: of all tokens, in the type of residual, norms and rotation.
        last: the norm behind the layers.
        output: from hidden states to logits, a product of our own; None: there are none.
        dtype: of the products, and of keys and values.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        embeddings: Float[Tensor, "V H"],
        last: Norm,
        output: PackedLinear | None,
        dtype: torch.dtype,
    ) -> None:
        self._tensors = (tuple(layers), embeddings, last, output)  # the weights live as long as the records
        self._dtype, self._residual_dtype, self._hidden_size = dtype, embeddings.dtype, embeddings.shape[1]
        self._num_between = 2 * self._hidden_size + max(map(count_between, layers))
        self._layers = (LayerRecord * len(layers))(*map(LayerRecord.point_to, layers))
        layers_at = ctypes.cast(self._layers, ctypes.c_void_p)
        assert embeddings.is_contiguous(), "rows must be adjacent"
        table = (embeddings.data_ptr(), len(embeddings))
        self._record = _DecoderRecord(layers_at, len(layers), *table, NormRecord.point_to(last))
        self._output = None if output is None else LinearRecord.point_to(output)
        self._name = f"decode_{cpu.NAMES[embeddings.dtype]}_{cpu.NAMES[dtype]}"
        self._residual, self._between, self._features, self._logits = Room(), Room(), Room(), Room()

    def run(
        self, rows: CachedRows, kept: tuple[int, ...] | None, *, wants_logits: bool
    ) -> tuple[Float[Tensor, "T H"], Float[Tensor, "T W"] | None, Float[Tensor, "T V"] | None]:
        """Normed hidden states; features; logits if they are wanted and there are any, and then they and the features
        are valid until the next call that wants some.

        Args:
            kept: layers whose inputs, and the hidden states behind them, are the features; None: there are none.

        Raises:
            IndexError: a token that the model does not know; nothing has been written.
            MemoryError: there is none for what is computed in between; nothing is lost but this forward.
        """
        size, width, dtype = rows.num_tokens, self._hidden_size, self._dtype
        hidden = torch.empty(size, width, dtype=dtype)
        features = logits = output = None
        if kept is not None:
            count = size * (len(kept) + 1) * width
            room = self._features.take(count, dtype) if wants_logits else torch.empty(count, dtype=dtype)
            features = room.view(size, -1)
        if wants_logits and self._output is not None:
            output = ctypes.byref(self._output)
            logits = self._logits.take(size * self._output.outputs, dtype).view(size, -1)
        layers = (ctypes.c_int64 * len(kept or ()))(*(kept or ()))
        scratch = (
            self._residual.take(size * width, self._residual_dtype),
            self._between.take(size * self._num_between, dtype),
        )
        records = (ctypes.byref(self._record), ctypes.byref(rows.record), output)
        unknown = cpu.compute(self._name, *records, layers, len(layers), hidden, features, logits, *scratch)
        if unknown:
            token_id = int(rows.token_ids[unknown - 1])
            raise IndexError(
                f"token {token_id} is none of the model's {self._record.vocabulary}: a drafter may only propose those"
            )
        return hidden, features, logits


def count_between(layer: LayerWeights) -> int:
    """Numbers that one token takes inside a layer: states, attended, normed, gate and up, their product."""
    num_queries = layer.num_heads * layer.head_dim
    return layer.states.num_outputs + num_queries + layer.output.num_outputs + 3 * layer.down.num_inputs
