"""Tree attention on a GPU with split keys, as in flash-decoding: only live positions are read, and no mask is laid out.

A row's positions stand in the cache in blocks, found through a table, so that rows may lie anywhere. One
program takes a stretch of `SPLIT` positions for one key head, with the queries of all its heads and nodes in one tile;
a second kernel joins the stretches. These begin at fixed positions: a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.blocks import BLOCK_SIZE

SPLIT = 256  # positions that one program reads
_TILE, _SMALL_TILE = 64, 16  # positions read at once: of half precision, of float32
_WIDE, _WIDE_TILE = 128, 32  # of heads wider than so many numbers fewer: small GPUs have 99 KiB for a program
_LEAST_QUERIES, _MOST_QUERIES = 16, 64  # in one tile; matrix units take 16 at least
_LEAST_WIDTH = 16  # numbers of a head, likewise
_CHUNK = 8  # stretches joined at once
_MOST_SUM_BYTES = 2**29  # of what is to be joined: rows and nodes that would take more are computed part by part
_MOST_JOINED = 2**16 - 1  # heads of nodes in one launch: CUDA's limit for a grid's second side
_CHANGING = ["most_nodes", "num_before", "num_splits"]  # no reason to compile anew
_ROWS = ["starts", "num_nodes", "lengths"]  # nor whether these are aligned: in tables of one row or three some are not
_PARTS = ["tops", "masses"]  # likewise, behind the sums of an odd number of queries: a model may have 9 heads


@triton.jit
def _attend_tile(
    q: tl.tensor,
    top: tl.tensor,
    mass: tl.tensor,
    total: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    position_stride: tl.tensor,
    blocks: tl.tensor,
    words: tl.tensor,
    num_words: tl.tensor,
    is_query: tl.tensor,
    start: tl.tensor,
    last: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NODES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Positions `start`.. of a row joined to what was found before: largest score, mass, weighted values.

    Args:
        keys, values: of one head.
        words: where each query's begin: bit e of them says whether it sees position `length` + e.
        HAS_NODES: there may be positions that not every query sees, or none.
    """
    numbers = tl.arange(0, WIDTH)
    position = start + tl.arange(0, TILE)
    is_live = position < last
    block = tl.load(blocks + start // BLOCK).to(tl.int64)  # tiles do not cross the end of a block
    column = (block + start % BLOCK + tl.arange(0, TILE)) * position_stride
    place = column[:, None] + numbers[None, :]
    is_read = is_live[:, None] & (numbers < HEAD_DIM)[None, :]
    if not HAS_NODES and WIDTH == HEAD_DIM:
        k, v = tl.load(keys + place), tl.load(values + place)
    else:
        k, v = tl.load(keys + place, mask=is_read, other=0.0), tl.load(values + place, mask=is_read, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_NODES:
        beyond = position - length
        word = tl.maximum(start - length, 0) // 64  # the tile's nodes stand in this one and the next
        at = tl.where(is_query, word, num_words)
        low = tl.load(words + word, mask=at < num_words, other=0)
        high = tl.load(words + word + 1, mask=at + 1 < num_words, other=0)
        bits = tl.where((beyond // 64 == word)[None, :], low[:, None], high[:, None])
        is_seen = (beyond < 0)[None, :] | (((bits >> (beyond & 63)[None, :]) & 1) != 0)
        score = tl.where(is_live[None, :] & is_seen, score, float("-inf"))
    highest = tl.maximum(top, tl.max(score, 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(score - shift[:, None])
    fade = tl.exp(top - shift)
    mass = mass * fade + tl.sum(weight, 1)
    total = total * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return highest, mass, total


@triton.jit(do_not_specialize=[*_CHANGING, *_ROWS, *_PARTS, "blocks", "num_blocks", "words", "num_words"])
def _attend_splits(
    query: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    position_stride: tl.tensor,
    blocks: tl.tensor,
    num_blocks: tl.tensor,
    starts: tl.tensor,
    num_nodes: tl.tensor,
    lengths: tl.tensor,
    words: tl.tensor,
    num_words: tl.tensor,
    most_nodes: tl.tensor,
    num_before: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    num_kv_heads: tl.tensor,
    num_splits: tl.tensor,
    scale: tl.tensor,
    REPEATS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """For one row, key head, stretch of positions and tile of queries: weighted values, largest score, mass."""
    row, group = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    split, tile = tl.program_id(1), tl.program_id(2)
    count, length = tl.load(num_nodes + row), tl.load(lengths + row)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, length + num_before + count)
    if (first >= last) | (tile * QUERIES >= count * REPEATS):
        return
    queries = tile * QUERIES + tl.arange(0, QUERIES)
    node, head = queries // REPEATS, group * REPEATS + queries % REPEATS
    is_query = node < count
    token = tl.load(starts + row) + node
    numbers = tl.arange(0, WIDTH)
    is_number = numbers < HEAD_DIM
    own = token.to(tl.int64) * token_stride + head * head_stride
    q = tl.load(query + own[:, None] + numbers[None, :], mask=is_query[:, None] & is_number[None, :], other=0.0)
    own_words = words + (row * most_nodes + node) * num_words
    own_blocks = blocks + row * num_blocks
    own_keys, own_values = keys + group * HEAD_DIM, values + group * HEAD_DIM
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    mass = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, WIDTH], tl.float32)
    cached = first + tl.maximum(tl.minimum(last, length) - first, 0) // TILE * TILE
    for start in range(first, cached, TILE):  # all queries see all of these
        top, mass, total = _attend_tile(
            q, top, mass, total, own_keys, own_values, position_stride, own_blocks, own_words, num_words,
            is_query, start, last, length, scale, HEAD_DIM, WIDTH, TILE, BLOCK, HAS_NODES=False,
        )  # fmt: skip
    for start in range(cached, last, TILE):
        top, mass, total = _attend_tile(
            q, top, mass, total, own_keys, own_values, position_stride, own_blocks, own_words, num_words,
            is_query, start, last, length, scale, HEAD_DIM, WIDTH, TILE, BLOCK, HAS_NODES=True,
        )  # fmt: skip
    index = (tl.program_id(0) * most_nodes * REPEATS + queries).to(tl.int64) * num_splits + split
    tl.store(tops + index, top, mask=is_query)
    tl.store(masses + index, mass, mask=is_query)
    out = sums + index[:, None] * HEAD_DIM + numbers[None, :]
    tl.store(out, total, mask=is_query[:, None] & is_number[None, :])


@triton.jit(do_not_specialize=[*_CHANGING, *_ROWS, *_PARTS])
def _join_splits(
    out: tl.tensor,
    starts: tl.tensor,
    num_nodes: tl.tensor,
    lengths: tl.tensor,
    most_nodes: tl.tensor,
    num_before: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    masses: tl.tensor,
    num_kv_heads: tl.tensor,
    num_splits: tl.tensor,
    REPEATS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """One head of one node from the stretches of its row."""
    row, num_heads = tl.program_id(0), num_kv_heads * REPEATS
    node, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    count = tl.load(num_nodes + row)
    if node >= count:
        return
    num_live = tl.cdiv(tl.load(lengths + row) + num_before + count, SPLIT)
    numbers = tl.arange(0, WIDTH)
    is_number = numbers < HEAD_DIM
    queries = (row * num_kv_heads + head // REPEATS) * most_nodes * REPEATS + node * REPEATS + head % REPEATS
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    start = 0
    while start < num_live:
        split = start + tl.arange(0, CHUNK)
        is_live = split < num_live
        index = queries.to(tl.int64) * num_splits + split
        each = tl.load(tops + index, mask=is_live, other=float("-inf"))
        highest = tl.maximum(top, tl.max(each, 0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        share, fade = tl.exp(each - shift), tl.exp(top - shift)
        part = sums + index[:, None] * HEAD_DIM + numbers[None, :]
        part = tl.load(part, mask=is_live[:, None] & is_number[None, :], other=0.0)
        mass = mass * fade + tl.sum(share * tl.load(masses + index, mask=is_live, other=0.0), 0)
        total = total * fade + tl.sum(share[:, None] * part, 0)
        top = highest
        start += CHUNK
    token = tl.load(starts + row) + node
    target = out + (token.to(tl.int64) * num_heads + head) * HEAD_DIM + numbers
    tl.store(target, (total / mass).to(out.dtype.element_ty), mask=is_number)


def choose_tile(most_queries: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(queries, positions read at once, warps) of a program, where a row has at most so many queries of a key head."""
    width = find_width(head_dim)
    is_half = dtype != torch.float32
    most = _MOST_QUERIES if is_half else _LEAST_QUERIES  # float32 tiles take twice the registers
    num_queries = min(max(triton.next_power_of_2(most_queries), _LEAST_QUERIES), most)
    tile = _SMALL_TILE if not is_half else _TILE if width <= _WIDE else _WIDE_TILE
    fits_registers = num_queries < _MOST_QUERIES or head_dim == width <= _WIDE
    return num_queries, tile, 4 if fits_registers else 8


def find_width(head_dim: int) -> int:
    """Numbers of a tile's row, which is padded."""
    return max(int(triton.next_power_of_2(head_dim)), _LEAST_WIDTH)


def attend(
    query: Float[Tensor, "M h d"],
    keys: Float[Tensor, "P kvd"],
    values: Float[Tensor, "P kvd"],
    *,
    blocks: Int[Tensor, "B K"],
    starts: Int[Tensor, " B"],
    num_nodes: Int[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    words: Int[Tensor, "B N W"],
    num_before: int,
    scale: float,
) -> Float[Tensor, "M h d"]:
    """Attention of packed nodes to their row's own cached positions, and to no others.

    Args:
        query: tokens and heads may stand apart, a head's numbers may not.
        keys, values: a layer's, by flat index of a position; head by head.
        blocks: flat index of the first position of each block of a row (`fastgrpo.blocks.BLOCK_SIZE` positions).
        starts, num_nodes: of each row's tokens in `query`.
        lengths: cached positions that all nodes of a row see.
        words: bit e of node n's words: it sees position `lengths[b] + e`.
        num_before: positions of each row behind `lengths` that its nodes do not write themselves.
    """
    assert query.stride(2) == 1 and keys.stride(1) == values.stride(1) == 1, "numbers of a head must be adjacent"
    (num_tokens, num_heads, head_dim), (num_rows, most_nodes, _) = query.shape, words.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    repeats = num_heads * head_dim // keys.shape[1]
    tile = choose_tile(most_nodes * repeats, head_dim, query.dtype)
    node_bytes = 4 * num_heads * _count_splits(blocks) * (head_dim + 2)
    parts = list(cut_into_parts(num_rows, most_nodes, node_bytes, num_heads, max(tile[0] // repeats, 1)))
    run = functools.partial(_attend_part, out, query, keys, values, scale=scale, tile=tile)
    if len(parts) == 1:
        run(blocks, starts, num_nodes, lengths, words, num_before)
        return out
    for rows, nodes in parts:  # nodes of earlier parts are in the cache, as if they had been drafted before
        counts = (num_nodes[rows] - nodes.start).clamp(0, nodes.stop - nodes.start)
        own_words = words[rows, nodes].contiguous()
        run(blocks[rows], starts[rows] + nodes.start, counts, lengths[rows], own_words, num_before + nodes.start)
    return out


def cut_into_parts(
    num_rows: int, most_nodes: int, node_bytes: int, num_heads: int, least: int
) -> Iterator[tuple[slice, slice]]:
    """Rows, and nodes of each, whose sums take up to `_MOST_SUM_BYTES` before they are joined, or are of one tile.

    Args:
        node_bytes: of one node's sums.
        least: nodes of a tile; of fewer the keys would be read more often.
    """
    fitting = min(_MOST_SUM_BYTES // node_bytes, _MOST_JOINED // num_heads)
    nodes_at_once = min(max(fitting // least, 1) * least, most_nodes)
    rows_at_once = max(_MOST_SUM_BYTES // (node_bytes * nodes_at_once), 1)
    for row in range(0, num_rows, rows_at_once):
        for node in range(0, most_nodes, nodes_at_once):
            yield slice(row, row + rows_at_once), slice(node, min(node + nodes_at_once, most_nodes))


def _count_splits(blocks: Int[Tensor, "B K"]) -> int:
    """Stretches of the longest row that such a table has room for."""
    return -(-blocks.shape[1] * BLOCK_SIZE // SPLIT)


def _attend_part(
    out: Float[Tensor, "M h d"],
    query: Float[Tensor, "M h d"],
    keys: Float[Tensor, "P kvd"],
    values: Float[Tensor, "P kvd"],
    blocks: Int[Tensor, "B K"],
    starts: Int[Tensor, " B"],
    num_nodes: Int[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    words: Int[Tensor, "B N W"],
    num_before: int,
    *,
    scale: float,
    tile: tuple[int, int, int],
) -> None:
    """`attend` for some rows and nodes, into `out`, by programs as `choose_tile` has them."""
    _, num_heads, head_dim = query.shape
    num_rows, most_nodes, num_words = words.shape
    num_kv_heads = keys.shape[1] // head_dim
    repeats = num_heads // num_kv_heads
    most_queries, num_splits = most_nodes * repeats, _count_splits(blocks)
    parts = torch.empty(
        num_rows * num_kv_heads * most_queries * num_splits, head_dim + 2, dtype=torch.float32, device=query.device
    ).flatten()
    sums, tops, masses = parts.split([parts.numel() // (head_dim + 2) * size for size in (head_dim, 1, 1)])
    shape = {"REPEATS": repeats, "HEAD_DIM": head_dim, "WIDTH": find_width(head_dim), "SPLIT": SPLIT}
    num_queries, num_positions, num_warps = tile
    rows = (starts, num_nodes, lengths)
    _attend_splits[(num_rows * num_kv_heads, num_splits, triton.cdiv(most_queries, num_queries))](
        query, query.stride(0), query.stride(1), keys, values, keys.stride(0), blocks, blocks.shape[1],
        *rows, words, num_words, most_nodes, num_before, sums, tops, masses, num_kv_heads, num_splits, scale,
        QUERIES=num_queries, TILE=num_positions, BLOCK=BLOCK_SIZE, **shape,
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    _join_splits[(num_rows, most_nodes * num_heads)](
        out, *rows, most_nodes, num_before, sums, tops, masses, num_kv_heads, num_splits,
        CHUNK=_CHUNK, num_warps=1, **shape,
    )  # fmt: skip
