"""Draft trees grown level by level from what a drafter says of each node, whatever the drafter is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.kernels import cpu
from fastgrpo.sampling import SamplingBatch, add_noise, has_kernels, scale_logits
from fastgrpo.tree import Draft
from fastgrpo.types import SpeculationPlan

_LEVEL_PENALTY = 1e-4  # nats; a child never outranks its parent, not even at chance 1


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


def grow_trees(context: DraftContext, plan: SpeculationPlan, levels: Levels, calibration: Calibration) -> Draft:
    """One tree for each sequence: the best `width` nodes of a level are expanded, the best of all levels kept."""
    pool = _Pool(context, plan, calibration)
    pool.add(levels, above=None, scores=None)
    visible: Tensor | None = None
    width = 1  # nodes expanded on the level above
    for depth in range(2, plan.depth + 1):
        if pool.scores[-1].shape[1] == 0:
            break
        scores, beam = pool.scores[-1].topk(min(plan.width, pool.scores[-1].shape[1]), dim=1)
        above = beam // (pool.scores[-1].shape[1] // width)
        visible = _extend(visible, above, beam)
        levels.expand(pool.tokens[-1].gather(1, beam), above, visible)
        width = beam.shape[1]
        pool.add(levels, above=beam, scores=scores)
        assert len(pool.tokens) == depth
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
    scaled = scale_logits(logits, noise_rows)
    if with_noise and noise_rows.is_noisy:
        scaled = scaled + add_noise(scaled.new_zeros(len(logits), scaled.shape[-1]), noise_rows, vocabulary)[:, None]
    top, column = scaled.topk(min(width, scaled.shape[-1]), dim=-1)
    return top - scaled.logsumexp(-1, keepdim=True), vocabulary[column].long()


def _extend(
    visible: Bool[Tensor, "B V E"] | None, above: Int[Tensor, "B W"], beam: Int[Tensor, "B W"]
) -> Bool[Tensor, "B W F"]:
    """Ancestors of the nodes now expanded, among all expanded ones."""
    own = torch.eye(beam.shape[1], dtype=torch.bool, device=beam.device).expand(len(beam), -1, -1)
    if visible is None:
        return own
    return torch.cat((visible.gather(1, above[..., None].expand(-1, -1, visible.shape[2])), own), -1)


class _Pool:
    """All candidates of all levels, level by level; the root is place 0 and not among them."""

    def __init__(self, context: DraftContext, plan: SpeculationPlan, calibration: Calibration) -> None:
        self.context, self.plan, self.calibration = context, plan, calibration
        self.rows = torch.arange(len(context.sequences), device=context.pending_token_ids.device)
        self.tokens: list[Tensor] = []  # [B, candidates] of each level
        self.chances: list[Tensor] = []  # their log chance below their parent, as the drafter said it
        self.scores: list[Tensor] = []  # calibrated, from the root
        self.parents: list[Tensor] = []  # place of the parent

    def add(self, levels: Levels, *, above: Tensor | None, scores: Tensor | None) -> None:
        """Candidates below the nodes expanded last, which stand at `above` in the level before."""
        depth = len(self.tokens) + 1
        noise_rows = self.context.sampling.ahead(depth - 1)
        chances, tokens = levels.rank(noise_rows, self.plan.width)
        if above is None or scores is None:
            parents, scores = self.rows.new_zeros(len(self.rows), 1), chances.new_zeros(len(self.rows), 1)
        else:
            parents = 1 + sum(level.shape[1] for level in self.tokens[:-1]) + above
        self.tokens.append(tokens.flatten(1))
        self.chances.append(chances.flatten(1))
        self.scores.append((scores[..., None] + self.calibration(chances, depth) - _LEVEL_PENALTY).flatten(1))
        self.parents.append(parents[..., None].expand(tokens.shape).flatten(1))

    def prune(self) -> Draft:
        """The best nodes over all levels, best first; so parents stand before their children.

        Absent candidates, and all below them, score -inf; where they are chosen they fill the end of a row as a
        place of their own, `nowhere`.
        """
        tokens, chances, scores, parents = (
            torch.cat(levels, 1) for levels in (self.tokens, self.chances, self.scores, self.parents)
        )
        nowhere = tokens.shape[1]
        tokens, chances, parents = F.pad(tokens, (0, 1)), F.pad(chances, (0, 1)), F.pad(parents, (0, 1))
        parents[:, nowhere] = nowhere + 1
        best = scores.topk(min(self.plan.tree_size, nowhere), dim=1)
        kept = best.indices.masked_fill(best.values.isneginf(), nowhere)
        count = kept.shape[1]
        place = self.rows.new_zeros(len(self.rows), nowhere + 2)
        place.scatter_(1, kept + 1, torch.arange(1, count + 1, device=self.rows.device).expand_as(kept).contiguous())
        place[:, nowhere + 1] = -1
        roots = Draft.roots(self.context.pending_token_ids)
        return Draft(
            token_ids=torch.cat((roots.token_ids, tokens.gather(1, kept)), 1),
            parents=torch.cat((roots.parents, place.gather(1, parents.gather(1, kept))), 1),
            num_nodes=roots.num_nodes + (kept < nowhere).sum(1),
            log_chances=torch.cat((chances.new_zeros(len(self.rows), 1), chances.gather(1, kept)), 1),
            scores=torch.cat((best.values.new_zeros(len(self.rows), 1), best.values), 1),
        )
