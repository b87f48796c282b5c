"""The weights of a rollout: adapters folded in and linear weights cast, the trained storage untouched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastgrpo.kernels import cpu
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.transfer import is_host

_UNMERGED = ("LNTuningLayer", "TrainableTokensLayer")  # changes places with its base; is asked by its wrapper
_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32, by the type it is rounded to
_STRIDES = (49471, 37345)  # of thresholds in 2^-16, by row and column: the R2 lattice, which fills a square evenly
_CHUNK = 2**22  # numbers rounded at once, of which there are some copies


@contextlib.contextmanager
def merged_weights(
    model: nn.Module, compute_dtype: torch.dtype | None = None, memory: KeptMemory | None = None
) -> Iterator[None]:
    """Fold adapters into copies of the base weights, and cast linear weights, for as long as it lasts.

    Copies stand in for the parameters, which are not written, so that what is trained is bit-identical
    afterwards. Nor is their type changed: PyTorch would add up their gradients elsewhere from then on, where the
    hooks of DDP do not hear of them. A merged layer is taken out of its wrapper, whose forward costs more than a small
    product. Costs one copy of the weights it touches, in `memory` if that is given.

    Half-precision sums of base and adapter are computed in float32 and rounded by `round_evenly`: to the nearest, most
    of a young adapter would be lost.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    _unmerge_disabled(model)
    places = _mergeable_tuners(model)
    types = {} if compute_dtype is None else {id(p): compute_dtype for _, _, p in _castable_weights(model)}
    try:
        for _, _, layer in places:
            base_layer, copies = layer.get_base_layer(), []
            for name, parameter in list(base_layer.named_parameters(recurse=False)):
                dtype = types.get(id(parameter)) or parameter.dtype
                base = parameter.data.to(dtype)  # as autocast takes it in training
                copy = nn.Parameter(base.to(torch.promote_types(dtype, torch.float32), copy=True), requires_grad=False)
                replaced.append((base_layer, name, parameter))
                setattr(base_layer, name, copy)
                copies.append((copy, dtype))
            layer.merge()
            for copy, dtype in copies:
                rounded = round_evenly(copy.data, dtype)
                copy.data = rounded if memory is None else memory.copy(rounded, dtype)
        for parent, name, layer in places:
            setattr(parent, name, layer.get_base_layer())
        if compute_dtype is not None:
            casts: dict[int, nn.Parameter] = {}
            for module, name, parameter in _castable_weights(model):
                if id(parameter) not in casts:
                    if memory is None or parameter.dtype == compute_dtype:
                        cast = parameter.data.to(compute_dtype)
                    else:
                        cast = memory.copy(parameter.data, compute_dtype)
                    casts[id(parameter)] = nn.Parameter(cast, requires_grad=False)
                replaced.append((module, name, parameter))
                setattr(module, name, casts[id(parameter)])
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
            layer.merged_adapters.clear()
        for module, name, parameter in reversed(replaced):
            setattr(module, name, parameter)


def round_evenly(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in `dtype`, of which as many are rounded up as they lie above what `dtype` has below them.

    A weight of a model in bfloat16 changes by nothing or by 2^-8 of itself. Rounded to the nearest, a change of less
    than half of that is lost in every weight; here it is made in a share of them, so that sums over a row or a column
    keep it. Which ones hangs on their place alone, and what `dtype` holds stays as it is.
    """
    if values.dtype != torch.float32 or dtype not in _LOST_BITS:
        return values.to(dtype)
    rows = values.flatten(1) if values.dim() > 1 else values.reshape(-1, 1)
    if dtype == torch.bfloat16 and is_host(values) and cpu.is_available():
        return cpu.round_evenly(rows, *_STRIDES).view(values.shape)
    rounded = torch.empty_like(rows, dtype=dtype)
    step = max(_CHUNK // max(rows.shape[1], 1), 1)
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        rounded[first : first + step] = torch.where(some.isfinite(), _cut(some, first, _LOST_BITS[dtype]), some)
    return rounded.view(values.shape)


def _cut(rows: Float[Tensor, "R C"], first: int, num_lost: int) -> Float[Tensor, "R C"]:
    """Finite numbers without their last bits, after a threshold has been added to these; `first` row of a matrix."""
    size, device = rows.shape, rows.device
    row = torch.arange(first, first + size[0], dtype=torch.int32, device=device) * _STRIDES[0]
    column = torch.arange(size[1], dtype=torch.int32, device=device) * _STRIDES[1]
    thresholds = (row[:, None] + column).bitwise_and_(0xFFFF).bitwise_right_shift_(16 - num_lost)
    bits = thresholds.add_(rows.contiguous().view(torch.int32)).bitwise_and_(-1 << num_lost)
    return bits.view(torch.float32)


def _mergeable_tuners(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of the LoRA layers over floating-point weights of their own.

    Quantised bases decode with their adapters unmerged, and so do tied ones: folding the adapter of an
    embedding into a weight that the output head shares would change the head. And so do those that do not
    merge into the base's own weights.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    num_owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return [
        (parent, name, layer)
        for parent, name, layer in children
        if isinstance(layer, BaseTunerLayer)
        and not layer.disable_adapters
        and not layer.merged
        and _merges_into_base(layer)
        and num_owners[id(layer.get_base_layer().weight)] == 1
    ]


def _unmerge_disabled(model: nn.Module) -> None:
    """Take merged adapters that are disabled out of the base's own weights, as PEFT does in the next forward: in a
    rollout that would be of a copy, and the base would keep them.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.disable_adapters and layer.merged:
            layer.unmerge()


def _merges_into_base(layer: Any) -> bool:
    base = layer.get_base_layer()
    if type(layer).__name__ in _UNMERGED or not hasattr(base, "weight"):  # experts have several
        return False
    has_new_bias = any(getattr(layer, "lora_bias", {}).values()) and base.bias is None
    return base.weight.is_floating_point() and not has_new_bias


def _castable_weights(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, weight) of those that only ever enter a matrix product; a tied embedding does not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    own = [(m, name, p) for m in linear for name, p in m.named_parameters(recurse=False)]
    return [each for each in own if id(each[2]) not in embeddings]
