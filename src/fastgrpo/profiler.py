"""Measured costs of this model on this machine: the planner's facts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastgrpo.attention import ForwardBatch
from fastgrpo.model import TargetModel
from fastgrpo.planner import HardwareProfile
from fastgrpo.sampling import SamplingBatch, sample

if TYPE_CHECKING:
    from fastgrpo.drafters import Drafter

_LEAST_TOKENS, _MOST_TOKENS = 256, 4096  # where the grid of tokens per forward may end
_LINEAR = 1.45  # twice the tokens take so many times as long: past the knee, where few plans pay
_ROWS = 8  # sequences that share the tokens of a measured forward
_READ_ROWS, _READ_CONTEXTS = 16, (32, 512)  # forwards whose difference prices a cached position
_REPEATS = 3


def measure_profile(target: TargetModel, drafter: Drafter) -> HardwareProfile:
    """Time target forwards, draft levels and sampling over a grid of tokens per forward; price cached positions.

    Takes about a second on a small model. Call inside `target.rollout_mode`.
    """
    measure_level = getattr(drafter, "measure_level", None)
    grid: list[int] = []
    target_s: list[float] = []
    draft_s: list[float] = []
    while not grid or grid[-1] < _LEAST_TOKENS or (target_s[-1] < _LINEAR * target_s[-2] and grid[-1] < _MOST_TOKENS):
        grid.append(2 * grid[-1] if grid else 1)
        rows = min(grid[-1], _ROWS)
        target_s.append(_measure(_build_forward(target, rows, grid[-1] // rows), target.device))
        if measure_level is not None:
            draft_s.append(_measure(measure_level(grid[-1]), target.device))
    return HardwareProfile(
        num_tokens=tuple(grid),
        target_s=tuple(_rising(target_s)),
        draft_s=tuple(_rising(draft_s)),
        read_s=_measure_read_s(target),
        sample_s=_measure_sample_s(target),
        is_one_pass=bool(getattr(drafter, "is_one_pass", False)),
    )


def _measure(run: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a few runs after one warm-up: other work on the machine only ever adds."""
    run()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _rising(times: list[float]) -> list[float]:
    """More tokens never cost less: noise that says otherwise is levelled."""
    return [max(times[: i + 1]) for i in range(len(times))]


def _measure_read_s(target: TargetModel) -> float:
    """Seconds for each cached position of one row."""
    short_s, long_s = (
        _measure(_build_forward(target, _READ_ROWS, 1, context), target.device) for context in _READ_CONTEXTS
    )
    return max(long_s - short_s, 0.0) / (_READ_ROWS * (_READ_CONTEXTS[1] - _READ_CONTEXTS[0]))


def _build_forward(target: TargetModel, rows: int, width: int, context: int = 1) -> Callable[[], object]:
    """A target forward of `rows` sequences with `width` tokens each behind `context` cached ones."""
    cache = target.build_cache(with_features=False)
    cache.reserve(rows, context + width)
    cache.add_rows(rows)
    device = target.device
    batch = ForwardBatch.build(
        token_ids=torch.ones(rows, width, dtype=torch.int64, device=device),
        num_nodes=torch.full((rows,), width, device=device),
        visible=torch.ones(rows, width, width, dtype=torch.bool, device=device).tril(),
        rows=slice(0, rows),
        row_numbers=torch.arange(rows, device=device),
        lengths=torch.full((rows,), context, device=device),
        store=cache.keys,
        dtype=target.dtype,
        num_repeats=target.num_repeats,
    )
    return lambda: target.compute_logits(target.forward(batch, cache).last_hidden)


def _measure_sample_s(target: TargetModel) -> float:
    """Seconds for each sampled row."""
    rows = 16
    batch = SamplingBatch.build_blank(rows, target.device)
    logits = torch.zeros(rows, target.vocab_size, dtype=target.dtype, device=target.device)
    vocabulary = torch.arange(target.vocab_size, dtype=torch.int32, device=target.device)
    return _measure(lambda: sample(logits, batch, vocabulary), target.device) / rows
