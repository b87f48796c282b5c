"""The CPU kernels as functions of tensors: what a decoding step does between its matrix products, and sampling.

Each is one pass over its data where PyTorch makes several, and is called without PyTorch's dispatcher. Tensors are
contiguous, on the CPU, in float32 or bfloat16; `covers` says whether a model's types are among those. Where tokens
are padded (M), so that products meet few sizes, what stands behind the T real ones is left as it is and never read.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.kernels.build import load_library
from fastgrpo.kernels.kept import KeptMemory

NAMES = {torch.bfloat16: "bf16", torch.float32: "float"}
DTYPES = tuple(NAMES)
_NO_MEMORY = -1  # as in common.h
_RESIDUALS = {  # (type of residual and norms, type of the products)
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)
}  # fmt: skip


def is_available() -> bool:
    """Whether there are compiled kernels; compiles them at first use."""
    return load_library() is not None


def covers(residual: torch.dtype, product: torch.dtype) -> bool:
    """Whether there are kernels for norms and residual in one type and products in the other."""
    return (residual, product) in _RESIDUALS


def gumbel_noise(
    stream_keys: Int[Tensor, " R"], positions: Int[Tensor, " R"], token_ids: Int[Tensor, "*R V"]
) -> Float[Tensor, "R V"]:
    """See `fastgrpo.sampling.gumbel_noise`; `token_ids` are common to all rows or each row's own."""
    num_rows, width = len(stream_keys), token_ids.shape[-1]
    out = torch.empty(num_rows, width, dtype=torch.float32)
    stride = width if token_ids.dim() > 1 else 0
    call("gumbel", stream_keys, positions, token_ids.contiguous(), num_rows, width, stride, out)
    return out


def sample(
    logits: Float[Tensor, "R V"],
    stream_keys: Int[Tensor, " R"],
    positions: Int[Tensor, " R"],
    temperature: Float[Tensor, " R"],
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """See `fastgrpo.sampling.sample`, without truncation."""
    num_rows, width = logits.shape
    assert logits.stride(1) == 1, "columns must be adjacent"
    out = [torch.empty(num_rows, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32)]
    name = f"sample_{NAMES[logits.dtype]}"
    call(name, logits, logits.stride(0), stream_keys, positions, temperature, num_rows, width, *out)
    token_ids, logprobs, entropies = out
    return token_ids, logprobs, entropies


def rank(
    logits: Float[Tensor, "B W C"],
    vocabulary: Int[Tensor, " C"],
    stream_keys: Int[Tensor, " B"],
    positions: Int[Tensor, " B"],
    temperature: Float[Tensor, " B"],
    width: int,
    *,
    with_noise: bool,
) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
    """See `fastgrpo.drafters.beams.rank_candidates`; of equal candidates the first."""
    num_trees, num_nodes, num_columns = logits.shape
    most = min(width, num_columns)
    chances = torch.empty(num_trees, num_nodes, most, dtype=torch.float32)
    token_ids = torch.empty(num_trees, num_nodes, most, dtype=torch.int64)
    sizes = (*logits.shape, most, int(with_noise))
    rows = (vocabulary, stream_keys, positions, temperature)
    compute(f"rank_{NAMES[logits.dtype]}", logits.contiguous(), *rows, *sizes, chances, token_ids)
    return chances, token_ids


def find_most(values: Int[Tensor, " T"]) -> int:
    """The largest of some numbers, none of which is negative; 0 of none."""
    return int(call("find_most", values, len(values)))


def lay_out(
    token_ids: Int[Tensor, "B N"],
    num_nodes: Int[Tensor, " B"],
    visible: Bool[Tensor, "B N E"],
    lengths: Int[Tensor, " B"],
    blocks: Int[Tensor, "B K"],
    num_tokens: int,
) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " B"]]:
    """Packed token ids, positions and places in the cache, and each row's start; see `attention.ForwardBatch.build`."""
    tokens, positions, places = (torch.empty(num_tokens, dtype=torch.int64) for _ in range(3))
    starts = torch.empty_like(lengths)
    rows = (token_ids.contiguous(), num_nodes, visible.contiguous(), lengths, blocks.contiguous())
    call("lay_out", *rows, *visible.shape, blocks.shape[1], tokens, positions, places, starts)
    return tokens, positions, places, starts


def add_norm(
    residual: Float[Tensor, "T H"],
    delta: Float[Tensor, "_ H"] | None,
    weight: Float[Tensor, " H"],
    eps: float,
    dtype: torch.dtype,
    *,
    padded: int | None = None,
) -> Float[Tensor, "M H"]:
    """Add `delta` to the residual in place; the RMS norm of the sum, in `dtype`, with `padded` rows."""
    out = torch.empty(padded or len(residual), residual.shape[1], dtype=dtype)
    name = f"add_norm_{NAMES[residual.dtype]}_{NAMES[dtype]}"
    call(name, residual, delta, weight, out, *residual.shape, eps)
    return out


def norm_heads_(states: Float[Tensor, "T hd"], weight: Float[Tensor, " d"], eps: float) -> None:
    """The RMS norm of each head, in place; tokens may stand apart."""
    width = len(weight)
    name = f"head_norm_{NAMES[weight.dtype]}_{NAMES[states.dtype]}"
    call(name, states, states.stride(0), weight, len(states), states.shape[1] // width, width, eps)


def rotate_and_cache_(
    states: Float[Tensor, "M hd_2kvd"],
    cos: Float[Tensor, "T d"],
    sin: Float[Tensor, "T d"],
    places: Int[Tensor, " T"],
    keys: Float[Tensor, "P kvd"],
    values: Float[Tensor, "P kvd"],
) -> None:
    """Rotate queries in place; write rotated keys, and values, at their `places` in the cache.

    Args:
        states: queries, keys and values of each token side by side.
    """
    width, num_cached = cos.shape[1], keys.shape[1]
    num_heads = (states.shape[1] - 2 * num_cached) // width
    name = f"rotate_{NAMES[cos.dtype]}_{NAMES[states.dtype]}"
    call(name, states, cos, sin, None, len(cos), num_heads, num_cached // width, width, places, keys, values)


def attend(
    query: Float[Tensor, "M hd"],
    keys: Float[Tensor, "P kvd"],
    values: Float[Tensor, "P kvd"],
    *,
    starts: Int[Tensor, " B"],
    num_nodes: Int[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    blocks: Int[Tensor, "B K"],
    visible: Bool[Tensor, "B N E"],
    head_dim: int,
    scale: float,
) -> Float[Tensor, "M hd"]:
    """Attention of packed nodes to their row's own cached positions, and to no others.

    Args:
        query: tokens may stand apart.
        starts, num_nodes: of each row's tokens in `query`.
        lengths: cached positions that all nodes of a row see.
        blocks: where each block of a row's positions begins in the cache (`fastgrpo.blocks.BLOCK_SIZE` of them).
        visible: `[b, n, e]`: node n sees position `lengths[b] + e`.
    """
    out = query.new_empty(query.shape)
    sizes = (visible.shape[1], visible.shape[2], query.shape[1] // head_dim, keys.shape[1] // head_dim, head_dim)
    rows = (len(starts), starts, num_nodes, lengths, blocks.contiguous(), blocks.shape[1], visible.contiguous())
    compute(f"attend_{NAMES[query.dtype]}", query, query.stride(0), keys, values, out, *rows, *sizes, scale)
    return out


def multiply_silu(both: Float[Tensor, "M J"], num_tokens: int) -> Float[Tensor, "M I"]:
    """silu(gate) * up, of gate and up side by side."""
    out = both.new_empty(len(both), both.shape[1] // 2)
    call(f"silu_{NAMES[both.dtype]}", both, out, num_tokens, out.shape[1])
    return out


def round_evenly(values: Float[Tensor, "R C"], by_row: int, by_column: int) -> Float[Tensor, "R C"]:
    """See `fastgrpo.weights.round_evenly`: float32 in bfloat16, by thresholds that rise by so much, in 2^-16."""
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    call("round_evenly", values.contiguous(), out, *values.shape, by_row, by_column)
    return out


def pack_weights(weights: list[Float[Tensor, "_ I"]], memory: KeptMemory | None = None) -> Float[Tensor, "P J W"]:
    """Weights of linear layers side by side, in the layout of `multiply`.

    Args:
        memory: where the layout is to stand; None takes new memory.
    """
    assert all(weight.is_contiguous() for weight in weights), "weights must be contiguous"
    num_outputs, num_inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
    width = _load().fastgrpo_block_width()
    shape = (-(-num_outputs // width), _pad_inputs(num_inputs), width)
    layout = (memory or KeptMemory()).take(shape, weights[0].dtype)
    first = 0
    for weight in weights:
        call(f"pack_{NAMES[weight.dtype]}", weight, layout, first, *weight.shape)
        first += len(weight)
    return layout


def multiply(
    x: Float[Tensor, "M I"], layout: Float[Tensor, "P J W"], bias: Float[Tensor, " O"] | None, num_outputs: int
) -> Float[Tensor, "M O"]:
    """x W^T + bias, summed in float32; a row's result does not depend on the rows beside it."""
    assert x.dtype == layout.dtype and _pad_inputs(x.shape[1]) == layout.shape[1], f"{x.shape} by {layout.shape}"
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(x), num_outputs)
    compute(f"product_{NAMES[x.dtype]}", x, x.stride(0), layout, bias, out, *x.shape, num_outputs)
    return out


def _pad_inputs(num_inputs: int) -> int:
    step = _load().fastgrpo_block_inputs()
    return int(-(-num_inputs // step) * step)


def find_library() -> str:
    """The file that the kernels were loaded from."""
    return _load()._name


def call(name: str, *arguments: Any) -> Any:
    """Call a kernel with tensors (their first number), numbers, and what ctypes passes by itself."""
    return getattr(_load(), f"fastgrpo_{name}")(*map(_pass, arguments))


def compute(name: str, *arguments: Any) -> int:
    """`call` of a kernel that takes memory for what it computes in between; returns what it does.

    Raises:
        MemoryError: there was none.
    """
    found = int(call(name, *arguments))
    if found == _NO_MEMORY:
        raise MemoryError(f"there is no memory for what {name} computes in between")
    return found


def _load() -> ctypes.CDLL:
    library = load_library()
    assert library is not None, "call is_available first"
    return library


def _pass(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
