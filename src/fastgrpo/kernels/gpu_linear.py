"""Products of a few tokens with the weights as they are, on a GPU: bound by reading those once.

cuBLAS splits such products, joins the parts in a launch of its own, and takes another for each of the weights that
meet the same tokens, whose results then have to be put side by side. Here all that is one launch, and what a token
gives does not depend on the tokens beside it. More tokens are left to cuBLAS, which writes side by side too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

MOST_WEIGHTS = 3
_DTYPES = (torch.bfloat16, torch.float16)
_FEW_TOKENS = 16  # matrix units take no fewer
_MOST_TOKENS, _MOST_TOKENS_NARROW = 128, 32  # from more on cuBLAS is as fast (H100, bench/gpu/weights.py)
_NARROW, _VERY_WIDE = 5000, 16384  # outputs: up to the first a program takes fewer, so that all processors have some
_WIDE_TILE, _NARROW_TILE = (64, 128, 4), (32, 256, 4)  # outputs of a program, inputs of one step, warps
_MANY_TOKENS, _VERY_WIDE_TILE = 64, (128, 64, 8)  # of more tokens with as many outputs; with fewer the wide one
_MOST_STAGES = 5  # steps under way: enough to wait for memory and for nothing else


@triton.jit(do_not_specialize=["num_tokens"])
def _multiply(
    x: tl.tensor,
    token_stride: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    first_bias: tl.tensor,
    second_bias: tl.tensor,
    third_bias: tl.tensor,
    first_width: tl.tensor,
    second_width: tl.tensor,
    third_width: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    num_tokens: tl.tensor,
    num_inputs: tl.tensor,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """Some outputs of one of the weights, for all tokens; `IS_EVEN`: `INPUTS` divides the number of inputs."""
    block = tl.program_id(0)
    begin = block * 0
    weight, bias, width = first, first_bias, first_width
    num_first, num_second = tl.cdiv(first_width, OUTPUTS), tl.cdiv(second_width, OUTPUTS)
    if block >= num_first + num_second:
        weight, bias, width = third, third_bias, third_width
        begin, block = first_width + second_width, block - num_first - num_second
    elif block >= num_first:
        weight, bias, width, begin, block = second, second_bias, second_width, first_width, block - num_first
    token, output, number = tl.arange(0, TOKENS), block * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    is_token, is_output = token < num_tokens, output < width
    own = weight + tl.minimum(output, width - 1).to(tl.int64)[:, None] * num_inputs
    given = x + token.to(tl.int64)[None, :] * token_stride
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for start in range(0, num_inputs, INPUTS):
        place = start + number
        if IS_EVEN:
            w = tl.load(own + place[None, :])
            v = tl.load(given + place[:, None], mask=is_token[None, :], other=0.0)
        else:
            is_input = place < num_inputs
            w = tl.load(own + place[None, :], mask=is_input[None, :], other=0.0)
            v = tl.load(given + place[:, None], mask=is_token[None, :] & is_input[:, None], other=0.0)
        total = tl.dot(w, v, total)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    target = out + token.to(tl.int64)[None, :] * out_stride + begin + output[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_token[None, :] & is_output[:, None])


@functools.cache
def _count_stages(device: torch.device, stage_bytes: int) -> int:
    """As many as a processor's shared memory has room for."""
    if device.type != "cuda":
        return _MOST_STAGES
    held: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return max(2, min(_MOST_STAGES, held // stage_bytes))


def takes(num_tokens: int, widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether these products are made here, and not by cuBLAS."""
    is_narrow = len(widths) == 1 and widths[0] <= _NARROW
    return dtype in _DTYPES and num_tokens <= (_MOST_TOKENS_NARROW if is_narrow else _MOST_TOKENS)


def _choose_tile(num_tokens: int, num_outputs: int) -> tuple[int, int, int]:
    if num_tokens > _MANY_TOKENS:
        return _VERY_WIDE_TILE if num_outputs > _VERY_WIDE else _WIDE_TILE
    return _NARROW_TILE if num_outputs <= _NARROW else _WIDE_TILE


def multiply(
    x: Float[Tensor, "M I"], weights: Sequence[Float[Tensor, "_ I"]], biases: Sequence[Tensor | None]
) -> Float[Tensor, "M O"]:
    """Products of the same inputs with a few weights, side by side.

    Args:
        weights: at most three, of one type and on the device of `x`.
        biases: one for each, or None for all.
    """
    widths = [len(weight) for weight in weights]
    num_tokens = len(x)
    if takes(num_tokens, widths, x.dtype) and x.stride(1) == 1:
        return multiply_few(x, weights, biases, tile=_choose_tile(num_tokens, sum(widths)))
    if len(weights) == 1:
        return torch.nn.functional.linear(x, weights[0], biases[0])
    out = torch.empty(num_tokens, sum(widths), dtype=x.dtype, device=x.device)
    for part, weight, bias in zip(out.split(widths, 1), weights, biases, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(bias, x, weight.t(), out=part)
    return out


def multiply_few(
    x: Float[Tensor, "M I"],
    weights: Sequence[Float[Tensor, "_ I"]],
    biases: Sequence[Tensor | None],
    *,
    tile: tuple[int, int, int],
) -> Float[Tensor, "M O"]:
    """`multiply` by our own kernel.

    Args:
        x: its numbers side by side.
        tile: outputs of a program, inputs of one step, and warps.
    """
    widths = [len(weight) for weight in weights]
    num_tokens, num_inputs = x.shape
    out = torch.empty(num_tokens, sum(widths), dtype=x.dtype, device=x.device)
    missing = MOST_WEIGHTS - len(weights)
    given = (*weights, *[weights[0]] * missing)
    added = [weights[0] if bias is None else bias for bias in (*biases, *[biases[0]] * missing)]
    sizes = (*widths, *[0] * missing)
    outputs, inputs, num_warps = tile
    tokens = max(_FEW_TOKENS, triton.next_power_of_2(num_tokens))
    _multiply[(sum(triton.cdiv(width, outputs) for width in widths),)](
        x, x.stride(0), *given, *added, *sizes, out, out.stride(0), num_tokens, num_inputs,
        HAS_BIAS=biases[0] is not None, IS_EVEN=num_inputs % inputs == 0,
        TOKENS=tokens, OUTPUTS=outputs, INPUTS=inputs,
        num_warps=num_warps, num_stages=_count_stages(x.device, 2 * inputs * (outputs + tokens)),
    )  # fmt: skip
    return out
