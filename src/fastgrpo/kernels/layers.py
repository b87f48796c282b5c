"""Whole decoder layers in one call (`layer.c`), where every product is our own."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu
from fastgrpo.kernels.linear import PackedLinear

_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    weight: Float[Tensor, " H"]
    eps: float


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


class _NormRecord(ctypes.Structure):
    _fields_ = (("weight", _Pointer), ("eps", ctypes.c_float))


class _LinearRecord(ctypes.Structure):
    _fields_ = (("layout", _Pointer), ("bias", _Pointer), ("inputs", _Number), ("outputs", _Number))


class _LayerRecord(ctypes.Structure):
    _fields_ = (
        *((name, _NormRecord) for name in ("before_attention", "query_norm", "key_norm", "before_mlp")),
        *((name, _LinearRecord) for name in ("states", "output", "gate_and_up", "down")),
        *((name, _Number) for name in ("heads", "kv_heads", "width")),
        ("scale", ctypes.c_float),
    )


class _BatchRecord(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("cosine", "sine", "places", "keys", "values")),
        ("plane", _Number),
        *((name, _Pointer) for name in ("starts", "nodes", "lengths", "blocks", "visible")),
        *((name, _Number) for name in ("tokens", "rows", "most_blocks", "most_nodes", "seen")),
    )


class _PairingRecord(ctypes.Structure):
    _fields_ = (("embedded", _NormRecord), ("hidden", _NormRecord), ("keeps_normed", _Number))


class CachedRows:
    """Packed nodes and where their rows stand in the cache: what `cpu.rotate_and_cache_` and `cpu.attend` are told.

    Args:
        keys, values: of all layers.
    """

    def __init__(
        self,
        *,
        cos: Float[Tensor, "T d"],
        sin: Float[Tensor, "T d"],
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
        cached = (cos, sin, places, keys, values)
        rows = (starts, num_nodes, lengths, blocks, visible)
        sizes = (len(cos), len(starts), blocks.shape[1], *visible.shape[1:])
        self._tensors = (*cached, *rows)  # kept alive for as long as the record points to them
        self.record = _BatchRecord(*map(_point, cached), keys.stride(0), *map(_point, rows), *sizes)


class CompiledLayers:
    """Layers that run in one call, with the bits of the kernels called one by one.

    Args:
        layers: that `covers` accepts.
        residual: type of residual, norms and rotation.
        dtype: of the products, and of keys and values.
    """

    def __init__(self, layers: Sequence[LayerWeights], residual: torch.dtype, dtype: torch.dtype) -> None:
        self._layers, self._dtype = tuple(layers), dtype  # the weights live as long as the records
        self._num_between = max(map(_count_between, layers))
        self._records = (_LayerRecord * len(layers))(*map(_record, layers))
        self._name = f"{cpu.NAMES[residual]}_{cpu.NAMES[dtype]}"

    @staticmethod
    def covers(layers: Sequence[LayerWeights]) -> bool:
        return all(linear.own is not None for layer in layers for linear in layer.linears)

    def run(
        self, rows: CachedRows, residual: Float[Tensor, "T H"], kept: Mapping[int, Float[Tensor, "T H"]]
    ) -> Float[Tensor, "T H"]:
        """All layers; the residual changes in place, and what is returned is still to be added to it.

        Args:
            kept: where to put the inputs of some layers.
        """
        delta = residual.new_empty(residual.shape, dtype=self._dtype)
        number = len(self._records)
        pointers = (_Pointer * number)(*(kept[n].data_ptr() if n in kept else None for n in range(number)))
        batch = ctypes.byref(rows.record)
        scratch = delta.new_empty(len(delta), delta.shape[1] + self._num_between)
        cpu.call(f"layers_{self._name}", self._records, number, batch, residual, pointers, delta, scratch)
        return delta


class PairLayer:
    """The layer of an EAGLE-3 head in one call, with the bits of the kernels called one by one.

    Args:
        layer: that `CompiledLayers.covers` accepts; it has no norm before attention, but these two:
        embedded, hidden: side by side the layer's input.
        keeps_normed: the residual is the normed hidden state.
    """

    def __init__(self, layer: LayerWeights, embedded: Norm, hidden: Norm, *, keeps_normed: bool) -> None:
        self._weights = (layer, embedded, hidden)  # alive for as long as the records
        self._layer, self._num_between = _record(layer), _count_between(layer)
        norms = (_NormRecord(_point(norm.weight), norm.eps) for norm in (embedded, hidden))
        self._pairing = _PairingRecord(*norms, keeps_normed)

    def run(
        self,
        rows: CachedRows,
        embeddings: Float[Tensor, "V H"],
        token_ids: Int[Tensor, " T"],
        hidden: Float[Tensor, "P H"],
        above: Int[Tensor, " T"] | None,
    ) -> Float[Tensor, "T H"]:
        """The layer's output for packed pairs.

        Args:
            embeddings: of all tokens.
            above: which of the hidden states each pair has; None: its own.
        """
        assert embeddings.dtype == hidden.dtype and embeddings.is_contiguous() and hidden.is_contiguous()
        out = hidden.new_empty(len(token_ids), hidden.shape[1])
        records = (ctypes.byref(self._pairing), ctypes.byref(self._layer), ctypes.byref(rows.record))
        scratch = out.new_empty(len(out), 3 * out.shape[1] + self._num_between)
        cpu.call(f"pairs_{cpu.NAMES[hidden.dtype]}", *records, embeddings, token_ids, hidden, above, out, scratch)
        return out


def _count_between(layer: LayerWeights) -> int:
    """Numbers that one token takes inside a layer: states, attended, normed, gate and up, their product."""
    states, output, down = (_record_linear(linear) for linear in (layer.states, layer.output, layer.down))
    return int(states.outputs + layer.num_heads * layer.head_dim + output.outputs + 3 * down.inputs)


def _record(layer: LayerWeights) -> _LayerRecord:
    norms = (layer.before_attention, layer.query_norm, layer.key_norm, layer.before_mlp)
    return _LayerRecord(
        *(_NormRecord() if norm is None else _NormRecord(_point(norm.weight), norm.eps) for norm in norms),
        *map(_record_linear, layer.linears),
        *(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.scale),
    )


def _record_linear(linear: PackedLinear) -> _LinearRecord:
    own = linear.own
    assert own is not None, "ask covers first"
    bias = None if own.bias is None else _point(own.bias)
    return _LinearRecord(_point(own.weight), bias, own.weight.shape[1], own.num_outputs)


def _point(tensor: Tensor) -> int:
    return tensor.data_ptr()
