"""Candidates of a draft on a GPU: warp, noise, the best few and the sum of all in one pass over the draft logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.kernels.gpu import MOST_CANDIDATES
from fastgrpo.kernels.gpu_sampling import gumbel, position_key

_BLOCK = 2048  # tokens of the draft vocabulary that one program looks at
_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["stream_keys", "positions", "temperatures", "num_expanded", "count"])
def _rank_blocks(
    logits: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    stream_keys: tl.tensor,
    positions: tl.tensor,
    temperatures: tl.tensor,
    scores: tl.tensor,
    columns: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    width: tl.tensor,
    num_blocks: tl.tensor,
    num_expanded: tl.tensor,
    count: tl.tensor,
    WITH_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """For one node and one block of the vocabulary: best scores, their columns, and the mass relative to the best."""
    node, block = tl.program_id(0), tl.program_id(1)
    row = node // num_expanded
    column = block * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < width
    raw = tl.load(logits + node.to(tl.int64) * stride + column, mask=is_inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    score = tl.div_rn(raw, tl.where(temperature > 0, temperature, 1.0))
    if WITH_NOISE:  # noqa: SIM102  (one is known when it is compiled, the other is not)
        if temperature > 0:
            key = position_key(tl.load(stream_keys + row), tl.load(positions + row))
            score = gumbel(tl.load(vocabulary + column, mask=is_inside, other=0), key) + score
    top = tl.max(score, 0)
    place = node * num_blocks + block
    tl.store(tops + place, top)
    tl.store(masses + place, tl.sum(tl.exp(score - tl.where(top == float("-inf"), 0.0, top)), 0))
    for rank in range(count):  # not unrolled: one kernel for plans of any width
        best = tl.max(score, 0)
        first = tl.min(tl.where(is_inside & (score == best), column, _NONE), 0)
        tl.store(scores + place * count + rank, best)
        tl.store(columns + place * count + rank, first)
        score = tl.where(column == first, float("-inf"), score)


@triton.jit(do_not_specialize=["count"])
def _join_ranks(
    vocabulary: tl.tensor,
    scores: tl.tensor,
    columns: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    chances: tl.tensor,
    token_ids: tl.tensor,
    width: tl.tensor,
    num_blocks: tl.tensor,
    count: tl.tensor,
    BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    """One node's best candidates from those of its blocks: log chance and token id."""
    node = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    top = tl.load(tops + node * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    mass = tl.load(masses + node * num_blocks + block, mask=block < num_blocks, other=0.0)
    most = tl.max(top, 0)
    total = tl.sum(tl.where(top == float("-inf"), 0.0, mass * tl.exp(top - most)), 0)
    place = tl.arange(0, CANDIDATES)
    is_there = place < num_blocks * count
    score = tl.load(scores + node * num_blocks * count + place, mask=is_there, other=float("-inf"))
    column = tl.load(columns + node * num_blocks * count + place, mask=is_there, other=_NONE)
    for rank in range(count):
        best = tl.max(score, 0)
        first = tl.min(tl.where(score == best, column, _NONE), 0)
        tl.store(chances + node * count + rank, best - (most + tl.log(total)))
        tl.store(token_ids + node * count + rank, tl.load(vocabulary + tl.minimum(first, width - 1)).to(tl.int64))
        score = tl.where(column == first, float("-inf"), score)


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
    """See `fastgrpo.drafters.beams.rank_candidates`; at most `MOST_CANDIDATES`, of equal ones the first."""
    num_rows, num_expanded, num_columns = logits.shape
    count, num_blocks = min(width, num_columns), triton.cdiv(num_columns, _BLOCK)
    assert count <= MOST_CANDIDATES, f"{count} candidates"
    flat = logits.flatten(0, 1)
    assert flat.stride(1) == 1, "columns must be adjacent"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    parts = (len(flat), num_blocks)
    scores, columns = empty(*parts, count), empty(*parts, count, dtype=torch.int32)
    tops, masses = empty(*parts), empty(*parts)
    shape = (num_rows, num_expanded, count)
    chances, token_ids = empty(*shape), empty(*shape, dtype=torch.int64)
    if not token_ids.numel():
        return chances, token_ids
    _rank_blocks[(len(flat), num_blocks)](
        flat, flat.stride(0), vocabulary, stream_keys, positions, temperature, scores, columns, tops, masses,
        num_columns, num_blocks, num_expanded, count,
        WITH_NOISE=with_noise, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _join_ranks[(len(flat),)](
        vocabulary, scores, columns, tops, masses, chances, token_ids, num_columns, num_blocks, count,
        BLOCKS=triton.next_power_of_2(num_blocks),
        CANDIDATES=triton.next_power_of_2(num_blocks * MOST_CANDIDATES), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return chances, token_ids
