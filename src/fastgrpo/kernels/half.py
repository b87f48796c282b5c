"""bfloat16 products on a CPU that has no instructions for them: computed in float32, rounded where PyTorch rounds.

Such a processor takes oneDNN's bfloat16 products several times as long as float32 ones (dev/LOG.md). The sums are
float32's either way; their order, and with it the last bit of a result, is the library's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.kernels.linear import multiplies_bfloat16

_BF16 = torch.bfloat16
_linear, _attention = F.linear, F.scaled_dot_product_attention


class _Inside(threading.local):
    """How many `float32_products` the thread is in."""

    depth = 0


_inside, _lock = _Inside(), threading.Lock()
_given: list[Any] = []  # PyTorch's functions while others stand in their place
_num_inside = 0  # of all threads


@contextlib.contextmanager
def float32_products(*, enabled: bool = True) -> Iterator[None]:
    """Inside, linear layers, matrix products and attention in bfloat16 on the CPU are computed in float32 and rounded.

    Forward and backward: both must run inside, in this thread; other threads compute as ever. Does nothing where the
    processor multiplies bfloat16.

    PyTorch's functions themselves are replaced for as long as it lasts: what autograd runs later, such as the
    recomputation of a checkpointed layer, must meet them too, and a `TorchFunctionMode` is not active there.
    """
    if not enabled or multiplies_bfloat16():
        yield
        return
    _stand_in()
    _inside.depth += 1
    try:
        yield
    finally:
        _inside.depth -= 1
        _give_back()


def _stand_in() -> None:
    global _num_inside
    with _lock:
        if not _num_inside:
            _given[:] = [getattr(module, name) for module, name, _ in _REPLACEMENTS]
            for module, name, replacement in _REPLACEMENTS:
                setattr(module, name, replacement)
        _num_inside += 1


def _give_back() -> None:
    """The last to leave puts back what was there."""
    global _num_inside
    with _lock:
        _num_inside -= 1
        if not _num_inside:
            for (module, name, _), function in zip(_REPLACEMENTS, _given, strict=True):
                setattr(module, name, function)


def _is_half(operands: tuple[Any, ...]) -> bool:
    """Whether a product of these is one in bfloat16 on the CPU, autocast considered."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if len(tensors) < 2 or any(x.device.type != "cpu" or not x.is_floating_point() for x in tensors[:2]):
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == _BF16 and all(x.dtype != torch.float64 for x in tensors)
    return all(x.dtype == _BF16 for x in tensors[:2])


class _Linear(torch.autograd.Function):
    """Saves what PyTorch's saves: operands in half precision, no float32 copies."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*n I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None
    ) -> Float[Tensor, "*n O"]:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return _linear(x.float(), weight.float(), None if bias is None else bias.float()).to(_BF16)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, "*n O"]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            wide = upstream.float()
            flat = wide.reshape(-1, wide.shape[-1])
            of_x = (wide @ weight.float()).to(_BF16) if needs_x else None
            of_weight = (flat.T @ x.float().reshape(-1, x.shape[-1])).to(_BF16) if needs_weight else None
            return of_x, of_weight, flat.sum(0).to(_BF16) if needs_bias else None


def _apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = _Linear.apply(x.to(_BF16), weight.to(_BF16), None if bias is None else bias.to(_BF16))
    return product


def _multiply(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        product = (a.to(_BF16).float() @ b.to(_BF16).float()).to(_BF16)
    return product if out is None else out.copy_(product)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    wide = [states.to(_BF16).float() for states in (query, key, value)]
    with torch.autocast("cpu", enabled=False):
        if attn_mask is None or type(attn_mask) is Tensor:
            mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            attended: Tensor = _attention(wide[0], wide[1], wide[2], mask, *args, **kwargs)
        else:  # PyTorch's own kind of masks asks whether it is called by the function that stands there
            with _lock:
                standing, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _attention
                try:
                    attended = _attention(wide[0], wide[1], wide[2], attn_mask, *args, **kwargs)
                finally:
                    F.scaled_dot_product_attention = standing
    return attended.to(_BF16)


def _build_replacement(function: Callable[..., Tensor], in_float32: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def multiply(*args: Any, **kwargs: Any) -> Tensor:
        return (in_float32 if _inside.depth and _is_half(args) else function)(*args, **kwargs)

    return multiply


def _build_replacements() -> list[tuple[Any, str, Callable[..., Tensor]]]:
    """(module, name of a function, what stands in its place)."""
    products = ((F, "linear", _apply_linear), (F, "scaled_dot_product_attention", _attend),
                (torch, "mm", _multiply), (torch, "matmul", _multiply))  # fmt: skip
    return [(module, name, _build_replacement(getattr(module, name), function)) for module, name, function in products]


_REPLACEMENTS = _build_replacements()
