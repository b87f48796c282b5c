"""Whether our own kernel makes bfloat16 products in matrix registers (AMX): given, right, no slower than oneDNN's."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fastgrpo.json_files import write_json
from fastgrpo.kernels import cpu
from fastgrpo.timing import measure_timing

Multiply = Callable[[Float[Tensor, "M I"]], Float[Tensor, "M O"]]

_SHAPE, _ROWS = (1536, 576), (4, 64)  # of the product that is timed: outputs and inputs; rows
_OUTRUN = 1.5  # times as long as oneDNN takes: then it is left to that


@functools.cache
def are_taken() -> bool:
    """Take them where the processor has them, the system gives them and the kernel was compiled for them.

    What comes out of them is held against what comes out without; were it wrong, a warning would say so once.
    """
    if not (cpu.is_available() and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()):
        return False
    draws = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 100, generator=draws).to(torch.bfloat16) for rows in (37, 70))
    layout = cpu.pack_weights([weight])
    expected = cpu.multiply(x, layout, None, len(weight))
    if not cpu.call("use_matrices", 1):
        return False
    if torch.allclose(cpu.multiply(x, layout, None, len(weight)).float(), expected.float(), rtol=2**-7, atol=1e-3):
        return True
    leave()
    warnings.warn("products in this processor's matrix registers (AMX) are wrong, and left to oneDNN", stacklevel=2)
    return False


def leave() -> None:
    """Make products without them again."""
    cpu.call("use_matrices", 0)


def are_outrun(build_own: Callable[[Tensor], Multiply], build_theirs: Callable[[Tensor], Multiply]) -> bool:
    """Whether oneDNN's products are clearly faster than those in matrix registers.

    Timed once for a compiled library and written beside it: two runs on a machine must not round differently.

    Args:
        build_own, build_theirs: from weights [O, I] to a product with them.
    """
    note = Path(cpu.find_library()).with_suffix(".json")
    try:
        return bool(json.loads(note.read_text(encoding="utf-8"))["is_outrun"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        pass
    weight = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    try:
        own_s, their_s = (_time(build(weight), weight) for build in (build_own, build_theirs))
    except OSError:  # the clock stands still
        return False
    is_outrun = own_s > _OUTRUN * their_s
    with contextlib.suppress(OSError):  # nowhere to write: for this process
        write_json({"is_outrun": is_outrun, "own_s": own_s, "onednn_s": their_s}, note)
    return is_outrun


def _time(multiply: Multiply, weight: Float[Tensor, "O I"]) -> float:
    return math.fsum(measure_timing(functools.partial(multiply, weight[:rows])).least_s for rows in _ROWS)
