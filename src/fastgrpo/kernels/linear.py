"""Products with weights laid out once: by our own kernel, or by oneDNN where a processor can do what that cannot."""

from __future__ import annotations

import functools
import platform
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.kernels import cpu, gpu, matrices
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.places import find_places

_ROWS = 32  # of inputs that oneDNN's layout is chosen for; others are as fast within a few percent
_STEPS = ((16, 8), (128, 16), (512, 32), (4096, 128))  # (up to so many rows, rounded up to a multiple of)
_MOST_BYTES = 4 * 2**30  # of weights that are laid out anew


class _Layout(Protocol):
    """Weights as somebody's product wants them."""

    def multiply(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]: ...


class _OneDNNLayout:
    """Compiles a product for each number of rows it meets, which takes milliseconds: give it few (`round_up`)."""

    def __init__(self, weights: list[Tensor], bias: Tensor | None, memory: KeptMemory | None = None) -> None:
        del memory  # oneDNN takes its own
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._bias = bias

    def multiply(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        num_rows = len(x)
        if num_rows != round_up(num_rows):
            x = F.pad(x, (0, 0, 0, round_up(num_rows) - num_rows))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product[:num_rows]


class OwnLayout:
    """For `kernels/products.c`, where a row's result does not depend on the rows beside it."""

    def __init__(self, weights: list[Tensor], bias: Tensor | None, memory: KeptMemory | None = None) -> None:
        self.num_outputs = sum(len(weight) for weight in weights)
        self.weight, self.bias = cpu.pack_weights(weights, memory), bias

    def multiply(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        return cpu.multiply(x, self.weight, self.bias, self.num_outputs)


class PackedLinear:
    """Linear layers of one input side by side, in one product.

    On a CPU the weights are copied into a layout that is read in order, which a plain product makes anew each time
    or does without (dev/LOG.md has what that saves). In types without such a layout, and where `may_pack` is False, the
    layers' own weights are used.

    Args:
        linears: with as many inputs, and all with a bias or all without.
        memory: where the layout is to stand, where that is our own; None takes new memory.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], *, may_pack: bool = True, memory: KeptMemory | None = None
    ) -> None:
        self._linears = linears
        self._layout: _Layout | None = None
        kind = find_layout(linears[0].weight.dtype) if may_pack and can_pack(linears) else None
        if kind is not None:
            biases = [linear.bias.data for linear in linears if linear.bias is not None]
            weights = [linear.weight.data for linear in linears]
            self._layout = kind(weights, torch.cat(biases) if biases else None, memory)

    @property
    def num_inputs(self) -> int:
        return self._linears[0].in_features

    @property
    def num_outputs(self) -> int:
        return sum(linear.out_features for linear in self._linears)

    @property
    def place(self) -> tuple[object, ...]:
        """Where the layers' own weights stand."""
        return find_places(each for linear in self._linears for each in (linear.weight, linear.bias))

    @property
    def own(self) -> OwnLayout | None:
        """The weights as `kernels/products.c` has them, where that is whose product this is."""
        return self._layout if isinstance(self._layout, OwnLayout) else None

    def __call__(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        if self._layout is not None:
            return self._layout.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        if gpu.runs_on(x):
            return self._multiply_on_gpu(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        outputs = [F.linear(x, linear.weight, linear.bias) for linear in self._linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _multiply_on_gpu(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        from fastgrpo.kernels import gpu_linear  # in Triton, which is imported only where it runs

        linears = self._linears
        return gpu_linear.multiply(x, [each.weight for each in linears], [each.bias for each in linears])


def round_up(num_rows: int) -> int:
    """Rows that oneDNN's product is best given, so that it meets few sizes."""
    step = next((step for most, step in _STEPS if num_rows <= most), _STEPS[-1][1])
    return -(-num_rows // step) * step


class _PackedModule(nn.Module):
    """A linear layer that is not trained, packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self._linears = linear.weight, (linear,)  # out of sight: its parameters are not named twice

    def pack(self, memory: KeptMemory | None) -> None:
        """Take the weights as they are now."""
        self.packed = PackedLinear(self._linears, memory=memory)

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        return self.packed(x)


def find_packed(module: nn.Module) -> PackedLinear | None:
    """What `pack_modules` has put in the place of a linear layer."""
    return module.packed if isinstance(module, _PackedModule) else None


def pack_modules(module: nn.Module, *, leave: Collection[str] = (), memory: KeptMemory | None = None) -> None:
    """Pack the linear layers inside a module, where that can be done; call it again once their weights have changed.

    Args:
        leave: names of children that stay as they are.
        memory: where the layouts are to stand; None takes new memory.
    """
    for name, child in module.named_children():
        if name in leave:
            continue
        if type(child) is nn.Linear and can_pack([child]):
            child = _PackedModule(child)
            setattr(module, name, child)
        if isinstance(child, _PackedModule):
            child.pack(memory)
        else:
            pack_modules(child, memory=memory)


def can_pack(linears: Sequence[nn.Linear]) -> bool:
    """Whether there is a layout for these weights."""
    dtype, has_bias = linears[0].weight.dtype, linears[0].bias is not None
    return (
        all(
            linear.weight.device.type == "cpu"
            and linear.weight.is_contiguous()
            and linear.weight.dtype == dtype
            and (linear.bias is not None) == has_bias
            for linear in linears
        )
        and find_layout(dtype) is not None
    )


def has_own_product(linear: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether a `PackedLinear` of it multiplies inputs of this type otherwise than the layer itself does."""
    if linear.weight.dtype != dtype:
        return False
    return can_pack([linear]) or (gpu.runs_on(linear.weight) and linear.weight.is_contiguous())


def may_pack(model: nn.Module) -> bool:
    """Whether a second copy of a model's weights is small enough to be kept while a rollout lasts."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) <= _MOST_BYTES


@functools.cache
def find_layout(dtype: torch.dtype) -> type[_OneDNNLayout | OwnLayout] | None:
    """Whose product is fastest for weights of this type on this processor; None: that of the weights as they are."""
    has_onednn = dtype == torch.bfloat16 and _has_onednn()
    if has_onednn and _is_left_to_onednn():
        return _OneDNNLayout
    if dtype in cpu.DTYPES and cpu.is_available() and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        return OwnLayout
    return _OneDNNLayout if has_onednn else None


def wants_round_rows(dtype: torch.dtype) -> bool:
    """Whether products of this type are best given `round_up` rows."""
    return find_layout(dtype) is _OneDNNLayout


def _is_left_to_onednn() -> bool:
    """Whether bfloat16 products are: of processors that our kernel has no instructions of, and of those with AMX where
    our kernel cannot use it, or is clearly slower with it.
    """
    if not _is_x86():
        return True
    if not torch.cpu._is_amx_tile_supported():
        return False
    if not matrices.are_taken():
        return True
    own, theirs = (lambda weight, kind=kind: kind([weight], None).multiply for kind in (OwnLayout, _OneDNNLayout))
    if is_outrun := matrices.are_outrun(own, theirs):
        matrices.leave()
    return is_outrun


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it: without them oneDNN's products take longer than float32's."""
    if not _is_x86():
        return True  # as oneDNN itself says
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
