"""Matrix products with weights laid out once for oneDNN, where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 32  # of inputs that the layout is chosen for; others are as fast within a few percent
_STEPS = ((16, 8), (128, 16), (512, 32), (4096, 128))  # (up to so many rows, rounded up to a multiple of)
_MOST_BYTES = 4 * 2**30  # of weights that are laid out anew


class PackedLinear:
    """Linear layers of one input side by side, in one product.

    In bfloat16 on a CPU the weights are copied into oneDNN's own layout, which saves it from doing so in every product:
    SmolLM2-135M's products for one token fall from 24 to 12 ms, those for 64 from 29 to 17 ms (dev/LOG.md). In other
    types, and where `may_pack` is False, the layers' own weights are used.

    Args:
        linears: with as many inputs, and all with a bias or all without.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, may_pack: bool = True) -> None:
        self._linears = linears
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None
        if may_pack and can_pack(linears):
            weights = [linear.weight.data for linear in linears]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
            if linears[0].bias is not None:
                self._bias = torch.cat([linear.bias.data for linear in linears])

    def __call__(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        if self._packed is not None:
            flat = x.reshape(-1, x.shape[-1])
            num_rows = len(flat)
            if num_rows != round_up(num_rows):
                flat = F.pad(flat, (0, 0, 0, round_up(num_rows) - num_rows))
            product = torch.ops.mkldnn._linear_pointwise(flat, self._packed, self._bias, "none", [], "")
            return product[:num_rows].view(*x.shape[:-1], -1)
        outputs = [F.linear(x, linear.weight, linear.bias) for linear in self._linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def round_up(num_rows: int) -> int:
    """Rows that a product is best given: oneDNN compiles one for each number it meets, which takes milliseconds."""
    step = next((step for most, step in _STEPS if num_rows <= most), _STEPS[-1][1])
    return -(-num_rows // step) * step


class _PackedModule(nn.Module):
    """A linear layer that is not trained, packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.packed = linear.weight, PackedLinear([linear])

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        return self.packed(x)


def pack_modules(module: nn.Module) -> None:
    """Pack the linear layers inside a module that will not change any more, where that can be done."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and can_pack([child]):
            setattr(module, name, _PackedModule(child))
        else:
            pack_modules(child)


def can_pack(linears: Sequence[nn.Linear]) -> bool:
    """Whether oneDNN can lay out these weights anew."""
    return (
        all(
            linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.bfloat16
            and (linear.bias is None) == (linears[0].bias is None)
            for linear in linears
        )
        and _is_supported()
    )


def may_pack(model: nn.Module) -> bool:
    """Whether a second copy of a model's weights is small enough to be kept while a rollout lasts."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) <= _MOST_BYTES


def _is_supported() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
