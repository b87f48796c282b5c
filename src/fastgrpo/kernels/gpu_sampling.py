"""Sampling on a GPU by the law of `fastgrpo.sampling`: warp, noise, argmax and log-prob in one pass over the logits.

The logarithm is the polynomial of `noise.c`, and products and sums are fused only where it says so, so that a GPU's
noise is a CPU's to the last bit. Blocks of the vocabulary are the same for every row: what a row gives does not depend
on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 2048  # tokens of the vocabulary that one program looks at
_NOISE_BLOCK = 1024
_COLUMNS = ["rows", "stream_keys", "positions", "temperatures"]  # of tables, aligned or not: no reason to compile anew


@triton.jit
def _log_positive(x: tl.tensor) -> tl.tensor:
    """Natural logarithm of positive normal numbers."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # the root of a half, so that the mantissa is around 1
    e = (bits >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    square = f * f
    y = tl.fma(e, -2.12194440e-4, f * square * p)
    y = tl.fma(square, -0.5, y)
    return tl.fma(e, 0.693359375, f + y)


@triton.jit
def position_key(stream_key: tl.tensor, position: tl.tensor) -> tl.tensor:
    value = stream_key.to(tl.uint64) + position.to(tl.uint64) * 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def gumbel(token_ids: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Noise of some tokens at the position of `key`."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = (token_ids.to(tl.uint32) ^ low) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) ^ high
    bits = bits * 0x846CA68B
    bits = (bits ^ (bits >> 16)) * 0x9E3779B1
    bits = (bits ^ (bits >> 15)) & 0x7FFFFFFF
    u = (bits.to(tl.int32).to(tl.float32) + 0.5) * (2.0**-31 - 2.0**-55)
    t = 1.0 - u
    exponential = -(_log_positive(t) - tl.div_rn(u - (1.0 - t), t))  # -log1p(-u)
    return -_log_positive(exponential)


@triton.jit(do_not_specialize=_COLUMNS)
def _sample_blocks(
    logits: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    stream_keys: tl.tensor,
    positions: tl.tensor,
    temperatures: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    means: tl.tensor,
    width: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """For one row and one block of the vocabulary: best score, its token, the largest logit; relative to it, mass and
    sum of mass times logit."""
    row, block = tl.program_id(0), tl.program_id(1)
    source = tl.load(rows + row)
    if source < 0:
        return
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    raw = tl.load(logits + source.to(tl.int64) * stride + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
    is_sound = raw < float("inf")  # neither NaN nor +inf
    temperature = tl.load(temperatures + row)
    scaled = tl.div_rn(tl.where(is_sound, raw, float("-inf")), tl.where(temperature > 0, temperature, 1.0))
    score = scaled
    if temperature > 0:
        key = position_key(tl.load(stream_keys + row), tl.load(positions + row))
        score = gumbel(columns, key) + scaled
    best = tl.max(score, 0)
    top = tl.max(scaled, 0)
    below = scaled - tl.where(top == float("-inf"), 0.0, top)
    mass = tl.exp(below)
    is_broken = tl.max(tl.where(is_sound, 0, 1), 0) > 0
    place = row * num_blocks + block
    tl.store(scores + place, best)
    tl.store(tokens + place, tl.min(tl.where(is_inside & (score == best), columns, 0x7FFFFFFF), 0))
    tl.store(tops + place, top)
    tl.store(masses + place, tl.where(is_broken, float("nan"), tl.sum(mass, 0)))
    tl.store(means + place, tl.sum(mass * tl.where(mass > 0, below, 0.0), 0))


@triton.jit(do_not_specialize=["rows", "temperatures"])
def _join_blocks(
    logits: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    temperatures: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    means: tl.tensor,
    token_ids: tl.tensor,
    logprobs: tl.tensor,
    entropies: tl.tensor,
    num_blocks: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    """One row's token, its log-probability and the entropy from its blocks; -1, 0 and 0 for a row not asked for."""
    row = tl.program_id(0)
    source = tl.load(rows + row)
    if source < 0:
        tl.store(token_ids + row, -1)
        tl.store(logprobs + row, 0.0)
        tl.store(entropies + row, 0.0)
        return
    blocks = tl.arange(0, BLOCKS)
    is_inside = blocks < num_blocks
    place = row * num_blocks + blocks
    score = tl.load(scores + place, mask=is_inside, other=float("-inf"))
    token = tl.load(tokens + place, mask=is_inside, other=0x7FFFFFFF)
    top = tl.load(tops + place, mask=is_inside, other=float("-inf"))
    mass = tl.load(masses + place, mask=is_inside, other=0.0)
    mean = tl.load(means + place, mask=is_inside, other=0.0)
    chosen = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
    most = tl.max(top, 0)
    below = tl.where(top == float("-inf"), 0.0, top - most)
    share = tl.where(top == float("-inf"), 0.0, tl.exp(below))
    total = tl.sum(mass * share, 0)
    weighted = tl.sum(share * (mean + below * mass), 0)
    temperature = tl.load(temperatures + row)
    raw = tl.load(logits + source.to(tl.int64) * stride + chosen).to(tl.float32)
    scaled = tl.div_rn(raw, tl.where(temperature > 0, temperature, 1.0))
    tl.store(token_ids + row, chosen)
    tl.store(logprobs + row, scaled - most - tl.log(total))  # large logits would swallow the logarithm
    tl.store(entropies + row, tl.log(total) - weighted / total)


@triton.jit(do_not_specialize=["stream_keys", "positions"])
def _noise_blocks(
    stream_keys: tl.tensor,
    positions: tl.tensor,
    token_ids: tl.tensor,
    token_stride: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    tokens = tl.load(token_ids + row * token_stride + columns, mask=is_inside, other=0)
    key = position_key(tl.load(stream_keys + row), tl.load(positions + row))
    tl.store(out + row.to(tl.int64) * width + columns, gumbel(tokens, key), mask=is_inside)


def gumbel_noise(
    stream_keys: Int[Tensor, " R"], positions: Int[Tensor, " R"], token_ids: Int[Tensor, "*R V"]
) -> Float[Tensor, "R V"]:
    """See `fastgrpo.sampling.gumbel_noise`; `token_ids` are common to all rows or each row's own."""
    num_rows, width = len(stream_keys), token_ids.shape[-1]
    out = torch.empty(num_rows, width, dtype=torch.float32, device=stream_keys.device)
    if out.numel():
        stride = width if token_ids.dim() > 1 else 0
        grid = (num_rows, triton.cdiv(width, _NOISE_BLOCK))
        _noise_blocks[grid](
            stream_keys, positions, token_ids.contiguous(), stride, out, width,
            BLOCK=_NOISE_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def sample(
    logits: Float[Tensor, "T V"],
    rows: Int[Tensor, " R"],
    stream_keys: Int[Tensor, " R"],
    positions: Int[Tensor, " R"],
    temperature: Float[Tensor, " R"],
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Tokens, their log-probs and entropies in nats as `fastgrpo.sampling` has them, without truncation.

    Args:
        rows: which row of `logits` each result is of; nothing is read for one of -1, which gives token -1, and zeros.
    """
    assert logits.stride(1) == 1, "columns must be adjacent"
    num_rows, width = len(rows), logits.shape[1]
    num_blocks = triton.cdiv(width, _BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    found = (empty(num_rows, dtype=torch.int64), empty(num_rows), empty(num_rows))
    if not num_rows:
        return found
    tokens = empty(num_rows, num_blocks, dtype=torch.int32)
    scores, tops, masses, means = (empty(num_rows, num_blocks) for _ in range(4))
    parts = (scores, tokens, tops, masses, means)
    _sample_blocks[(num_rows, num_blocks)](
        logits, logits.stride(0), rows, stream_keys, positions, temperature, *parts, width, num_blocks,
        BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _join_blocks[(num_rows,)](
        logits, logits.stride(0), rows, temperature, *parts, *found, num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return found
