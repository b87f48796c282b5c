"""What a drafter's own chances are worth: fitted online from the drafts that the target judged.

A node's chance, that the target chooses it if it walks to its parent, decides which nodes are kept, so chances
of different parents and levels must be comparable. Each level has a line through log-odds (Platt scaling),
fitted to hits and misses of walked nodes; the order of siblings never changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastgrpo.tree import Draft
from fastgrpo.verify import Verdict

_FILE = "calibration.json"
_LEVELS = 8  # deeper levels share the last line
_MOST_ODDS = 8.0  # log-odds beyond are clamped
_BINS = 33  # of log-odds, evenly from -_MOST_ODDS to _MOST_ODDS
_DECAY = 0.995  # of the counts, for each step that drafts
_PRIOR_TRIALS = 64.0  # weight of the line a = 1, b = 0
_NEWTON_STEPS = 6
_LEAST_SLOPE, _MOST_SLOPE = 0.3, 3.0
_CENTRES = np.linspace(-_MOST_ODDS, _MOST_ODDS, _BINS)


class Calibration:
    """Maps log chances of a level to calibrated ones; the identity until `fit` is first called.

    Drafters fit between rollouts: within one, a draft depends on its own sequence and on nothing beside it.
    """

    def __init__(self) -> None:
        self.offered = np.zeros((_LEVELS, _BINS))
        self.hits = np.zeros((_LEVELS, _BINS))
        self.slope, self.offset = np.ones(_LEVELS), np.zeros(_LEVELS)

    def __call__(self, log_chances: Float[Tensor, "*n"], depth: int) -> Float[Tensor, "*n"]:
        """Calibrated log chances of nodes at `depth`, 1 for the children of the root; -inf stays -inf."""
        level = min(depth, _LEVELS) - 1
        slope, offset = float(self.slope[level]), float(self.offset[level])
        if (slope, offset) == (1.0, 0.0):
            return log_chances
        calibrated = torch.nn.functional.logsigmoid(slope * _compute_log_odds(log_chances) + offset)
        return calibrated.masked_fill(log_chances == -torch.inf, -torch.inf)

    def observe(self, draft: Draft, verdict: Verdict, log_chances: Float[Tensor, "B N"] | None = None) -> None:
        """Count the children of walked nodes by their chance, and those that the target chose.

        Args:
            log_chances: instead of the draft's own; nodes with -inf are left out.
        """
        log_chances = draft.log_chances if log_chances is None else log_chances
        if log_chances is None:
            return
        chances, levels, is_hit = _find_judged(draft, verdict, log_chances)
        position = (_compute_log_odds(chances) + _MOST_ODDS) * ((_BINS - 1) / (2 * _MOST_ODDS))
        index = (levels.clamp(max=_LEVELS) - 1) * _BINS + position.round().long()
        offered = torch.bincount(index, minlength=_LEVELS * _BINS)
        hits = torch.bincount(index[is_hit], minlength=_LEVELS * _BINS)
        for table, new in ((self.offered, offered), (self.hits, hits)):
            table *= _DECAY
            table += new.cpu().numpy().reshape(_LEVELS, _BINS)

    def fit(self) -> None:
        """Logistic regression of hits on log-odds, level by level, drawn to the level above where trials are few."""
        prior = (1.0, 0.0)
        for level in range(_LEVELS):
            prior = _fit_line(self.offered[level], self.hits[level], prior)
            self.slope[level], self.offset[level] = prior

    def save(self, folder: Path) -> None:
        record = {"offered": self.offered.tolist(), "hits": self.hits.tolist()}
        (folder / _FILE).write_text(json.dumps(record) + "\n")

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote; a folder without it leaves the counts as they are.

        Raises:
            ValueError: the file is damaged.
        """
        if not (folder / _FILE).exists():
            return
        try:
            record = json.loads((folder / _FILE).read_text())
            self.offered[:], self.hits[:] = record["offered"], record["hits"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / _FILE} is damaged ({error}); remove it to start afresh") from error
        self.fit()


def _compute_log_odds(log_chances: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    miss = -torch.expm1(log_chances.clamp(max=-1e-6))
    return (log_chances - miss.log()).clamp(-_MOST_ODDS, _MOST_ODDS)


def _find_judged(draft: Draft, verdict: Verdict, log_chances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log chance, level from 1, whether the target chose it) of each child of a walked node."""
    depth_of = torch.full_like(draft.parents, -1)  # depth of walked nodes; -1: the target did not walk here
    rows, depths = (verdict.path >= 0).nonzero(as_tuple=True)
    depth_of[rows, verdict.path[rows, depths]] = depths
    has_parent = draft.parents >= 0
    above = depth_of.gather(1, draft.parents.clamp(min=0)).masked_fill(~has_parent, -1)
    is_judged = (above >= 0) & (log_chances > -torch.inf)
    return log_chances[is_judged], above[is_judged] + 1, depth_of[is_judged] >= 0


def _fit_line(offered: np.ndarray, hits: np.ndarray, prior: tuple[float, float]) -> tuple[float, float]:
    """Slope and offset by Newton's method, with a quadratic prior worth `_PRIOR_TRIALS`."""
    used = offered > 0
    x, n, k = _CENTRES[used], offered[used], hits[used]
    if not len(x) or n.sum() < 1:
        return prior
    features = np.stack((x, np.ones_like(x)))
    line = centre = np.array(prior)
    weight = np.diag([_PRIOR_TRIALS, _PRIOR_TRIALS / 4])
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-line @ features))
        gradient = features @ (k - n * p) - weight @ (line - centre)
        curvature = (features * (n * p * (1 - p))) @ features.T + weight
        line = line + np.clip(np.linalg.solve(curvature, gradient), -1, 1)
    return float(np.clip(line[0], _LEAST_SLOPE, _MOST_SLOPE)), float(np.clip(line[1], -_MOST_ODDS, _MOST_ODDS))
