"""Draft trees grown level by level from what a drafter says of each node, whatever the drafter is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.pools import open_pool
from fastgrpo.kernels import cpu, gpu
from fastgrpo.sampling import SamplingBatch, add_noise, has_kernels, scale_logits
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan


@runtime_checkable
class Roots(Protocol):
    """What trees grow from: a `DraftContext`, or the inputs of a head."""

    @property
    def sampling(self) -> SamplingBatch: ...

    @property
    def pending_token_ids(self) -> Int[Tensor, " B"]: ...


@runtime_checkable
class Levels(Protocol):
    """A draft under way: B trees whose W expanded nodes of one level have candidates below them."""

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """At most `width` candidates below each node expanded last, best first; at the start below the root.

        Returns:
            their log chance of being the target's choice, and their token ids; siblings differ. A node with
            fewer than K candidates is filled with absent ones: log chance -inf, any token id. K may be 0.
        """
        ...

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        """Compute the chosen candidates as nodes of the next level; what is below an absent one is not drafted.

        Args:
            above: place of each one's parent among the nodes expanded before (0 for the root).
            visible: ancestors among all nodes expanded so far, the W new ones last; a node sees itself.
        """
        ...


def grow_trees(roots: Roots, plan: SpeculationPlan, levels: Levels, calibration: Calibration) -> Draft:
    """One tree for each sequence: the best `width` nodes of a level are expanded, the best of all levels kept."""
    pool = open_pool(roots.pending_token_ids, plan, calibration)
    beam = pool.add(*levels.rank(roots.sampling, plan.width))
    for depth in range(1, plan.depth):
        if beam is None or beam.token_ids.shape[1] == 0:
            break
        levels.expand(beam.token_ids, beam.above, beam.visible)
        beam = pool.add(*levels.rank(roots.sampling.ahead(depth), plan.width))
    return pool.prune()


def rank_candidates(
    logits: Float[Tensor, "B W C"],
    vocabulary: Int[Tensor, " C"],
    noise_rows: SamplingBatch,
    width: int,
    *,
    with_noise: bool = True,
) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
    """The `width` candidates most likely to be the target's choice: the best of log q + noise.

    Nodes of one level share their position, and so one row of noise.

    Args:
        logits: draft logits over `vocabulary`.
        vocabulary: int32 target ids of the columns.
        noise_rows: sampling state of each sequence at the position of the candidates.
        with_noise: False takes the likeliest tokens whatever the noise, as the paper does; for comparison.

    Returns:
        log chance of being chosen, and token id.
    """
    if has_kernels(logits) and logits.dtype in cpu.DTYPES:
        rows = (noise_rows.stream_keys, noise_rows.positions, noise_rows.temperature)
        return cpu.rank(logits, vocabulary, *rows, width, with_noise=with_noise and noise_rows.is_noisy)
    if gpu.runs_on(logits) and logits.dtype in gpu.DTYPES and width <= gpu.MOST_CANDIDATES:
        from fastgrpo.kernels import gpu_ranking  # in Triton, which is imported only where it runs

        rows = (noise_rows.stream_keys, noise_rows.positions, noise_rows.temperature)
        return gpu_ranking.rank(logits, vocabulary, *rows, width, with_noise=with_noise and noise_rows.is_noisy)
    scaled = scale_logits(logits, noise_rows)
    if with_noise and noise_rows.is_noisy:
        scaled = scaled + add_noise(scaled.new_zeros(len(logits), scaled.shape[-1]), noise_rows, vocabulary)[:, None]
    top, column = scaled.topk(min(width, scaled.shape[-1]), dim=-1)
    return top - scaled.logsumexp(-1, keepdim=True), vocabulary[column].long()
