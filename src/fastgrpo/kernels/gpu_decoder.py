"""What a decoder layer does between its matrix products on a GPU: the functions of `fastgrpo.kernels.cpu`, in Triton.

Each is one launch where PyTorch makes several, and rounds where transformers rounds. Weights stay where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 1024  # numbers of one program of the activation
_WIDE = 2048  # from here on a row is shared by more warps


@triton.jit
def _add_norm(
    residual: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    HAS_DELTA: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    columns = tl.arange(0, WIDTH)
    is_inside = columns < width
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(residual + place, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + place, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(residual + place, x.to(residual.dtype.element_ty), mask=is_inside)
        x = x.to(residual.dtype.element_ty).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)).to(residual.dtype.element_ty).to(tl.float32)
    scaled = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32) * normed
    tl.store(out + place, scaled.to(residual.dtype.element_ty).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _norm_heads(
    states: tl.tensor, token_stride: tl.tensor, weight: tl.tensor, width: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr
) -> None:
    columns = tl.arange(0, WIDTH)
    is_inside = columns < width
    place = tl.program_id(0).to(tl.int64) * token_stride + tl.program_id(1) * width + columns
    x = tl.load(states + place, mask=is_inside, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)).to(states.dtype.element_ty).to(tl.float32)
    scaled = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32) * normed
    tl.store(states + place, scaled.to(states.dtype.element_ty), mask=is_inside)


@triton.jit
def _rotate_and_cache(
    states: tl.tensor,
    token_stride: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    places: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    width: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    """One head of one token: a query, a key or a value."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = width // 2
    low = tl.arange(0, HALF)
    is_inside = low < half
    own = states + token * token_stride + head * width + low
    first = tl.load(own, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(own + half, mask=is_inside, other=0.0).to(tl.float32)
    if head < num_heads + num_kv_heads:
        angle = token * width + low
        cos_low = tl.load(cos + angle, mask=is_inside, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angle + half, mask=is_inside, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angle, mask=is_inside, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angle + half, mask=is_inside, other=0.0).to(tl.float32)
        left = (first * cos_low).to(cos.dtype.element_ty).to(tl.float32)
        right = (second * sin_low).to(cos.dtype.element_ty).to(tl.float32)
        above = (second * cos_high).to(cos.dtype.element_ty).to(tl.float32)
        beside = (first * sin_high).to(cos.dtype.element_ty).to(tl.float32)
        first, second = left - right, above + beside
    if head < num_heads:
        tl.store(own, first.to(states.dtype.element_ty), mask=is_inside)
        tl.store(own + half, second.to(states.dtype.element_ty), mask=is_inside)
    else:
        cached = tl.load(places + token) * num_kv_heads * width + (head - num_heads) % num_kv_heads * width + low
        if head < num_heads + num_kv_heads:
            tl.store(keys + cached, first.to(keys.dtype.element_ty), mask=is_inside)
            tl.store(keys + cached + half, second.to(keys.dtype.element_ty), mask=is_inside)
        else:
            tl.store(values + cached, first.to(values.dtype.element_ty), mask=is_inside)
            tl.store(values + cached + half, second.to(values.dtype.element_ty), mask=is_inside)


@triton.jit
def _multiply_silu(both: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    gate = tl.load(both + 2 * token * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(both + (2 * token + 1) * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * width + columns, (activated * up).to(out.dtype.element_ty), mask=is_inside)


def add_norm(
    residual: Float[Tensor, "T H"],
    delta: Float[Tensor, "T H"] | None,
    weight: Float[Tensor, " H"],
    eps: float,
    dtype: torch.dtype,
    *,
    padded: int | None = None,
) -> Float[Tensor, "T H"]:
    """Add `delta` to the residual in place; the RMS norm of the sum, in `dtype`. Nothing is padded on a GPU."""
    assert padded is None and residual.is_contiguous() and (delta is None or delta.is_contiguous())
    num_tokens, width = residual.shape
    out = torch.empty_like(residual, dtype=dtype)
    _add_norm[(num_tokens,)](
        residual, residual if delta is None else delta, weight, out, width, eps,
        HAS_DELTA=delta is not None, WIDTH=triton.next_power_of_2(width), num_warps=8 if width > _WIDE else 4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def norm_heads_(states: Float[Tensor, "T hd"], weight: Float[Tensor, " d"], eps: float) -> None:
    """The RMS norm of each head, in place; tokens may stand apart."""
    width = len(weight)
    _norm_heads[(len(states), states.shape[1] // width)](
        states, states.stride(0), weight, width, eps,
        WIDTH=triton.next_power_of_2(width), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def rotate_and_cache_(
    states: Float[Tensor, "T hd_2kvd"],
    cos: Float[Tensor, "T d"],
    sin: Float[Tensor, "T d"],
    places: Int[Tensor, " T"],
    keys: Float[Tensor, "P kvd"],
    values: Float[Tensor, "P kvd"],
) -> None:
    """Rotate queries in place; write rotated keys, and values, at their `places` in the cache; see the CPU's."""
    width, num_cached = cos.shape[1], keys.shape[1]
    num_kv_heads = num_cached // width
    num_heads = (states.shape[1] - 2 * num_cached) // width
    _rotate_and_cache[(len(cos), num_heads + 2 * num_kv_heads)](
        states, states.stride(0), cos, sin, places, keys, values, num_heads, num_kv_heads, width,
        HALF=triton.next_power_of_2(width // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def multiply_silu(both: Float[Tensor, "T J"], num_tokens: int) -> Float[Tensor, "T I"]:
    """silu(gate) * up, of gate and up side by side."""
    width = both.shape[1] // 2
    out = both.new_empty(len(both), width)
    _multiply_silu[(num_tokens, triton.cdiv(width, _BLOCK))](both, out, width, BLOCK=_BLOCK)
    return out
