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

from fastgrpo.kernels import cpu, gpu, trees
from fastgrpo.transfer import copy_to, is_host
from fastgrpo.tree import Draft
from fastgrpo.verify import Verdict

_FILE = "calibration.json"
_LEVELS = 8  # deeper levels share the last line
_MOST_ODDS = 8.0  # log-odds beyond are clamped; `kernels/trees.c` and `kernels/gpu_trees.py` know it too
_BINS = 33  # of log-odds, evenly from -_MOST_ODDS to _MOST_ODDS
_DECAY = 0.995  # of the counts, for each step that drafts
_MOST_UNFOLDED = 2000  # such steps, whose counts are far from too large for a float32
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
        self._unfolded: Tensor | None = None  # [2, levels, bins], since the last fold, whose next step has weight 1
        self._unfolded_steps = 0
        self.slope, self.offset = np.ones(_LEVELS), np.zeros(_LEVELS)
        self._lines: Tensor | None = None  # both by level, on a device

    def line(self, depth: int) -> tuple[float, float]:
        """Slope and offset through the log-odds of nodes at `depth`, 1 for the children of the root."""
        level = _find_level(depth)
        return float(self.slope[level]), float(self.offset[level])

    def line_on(self, device: torch.device, depth: int) -> Float[Tensor, " 2"]:
        """`line` on a device: `fit` writes the new one over the old one, so that recorded drafts read it there."""
        if self._lines is None or self._lines.device != device:
            self._lines = torch.empty(_LEVELS, 2, dtype=torch.float32, device=device)
            self._write_lines()
        return self._lines[_find_level(depth)]

    def _write_lines(self) -> None:
        if self._lines is not None:
            copy_to(self._lines, np.stack((self.slope, self.offset), 1).astype(np.float32))

    def __call__(self, log_chances: Float[Tensor, "*n"], depth: int) -> Float[Tensor, "*n"]:
        """Calibrated log chances of nodes at `depth`, 1 for the children of the root; -inf stays -inf."""
        slope, offset = self.line(depth)
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
        if is_host(log_chances) and cpu.is_available():
            self._fold()
            links = (verdict.path, draft.parents, log_chances.float())
            trees.count_judged_(self.offered, self.hits, *links, _DECAY)
            return
        if self._unfolded_steps >= _MOST_UNFOLDED:
            self._fold()
        weight = _DECAY**-self._unfolded_steps  # later steps count more, until all are folded
        if gpu.runs_on(log_chances):
            from fastgrpo.kernels import gpu_walk  # in Triton, which is imported only where it runs

            if self._unfolded is None:
                self._unfolded = torch.zeros(2, _LEVELS, _BINS, dtype=torch.float32, device=log_chances.device)
            gpu_walk.count_judged_(self._unfolded, verdict.path, draft.parents, log_chances, weight)
        else:
            new = weight * _count_judged(draft, verdict, log_chances)
            self._unfolded = new if self._unfolded is None else self._unfolded + new
        self._unfolded_steps += 1
        if is_host(log_chances):
            self._fold()

    def _fold(self) -> None:
        """Take over what was counted since; the last step's counts are whole."""
        if self._unfolded is not None:
            last = _DECAY ** (self._unfolded_steps - 1)
            for table, new in zip((self.offered, self.hits), self._unfolded.double().cpu().numpy(), strict=True):
                table *= _DECAY**self._unfolded_steps
                table += last * new
        self._unfolded, self._unfolded_steps = None, 0

    def fit(self) -> None:
        """Logistic regression of hits on log-odds, level by level, drawn to the level above where trials are few."""
        self._fold()
        prior = (1.0, 0.0)
        for level in range(_LEVELS):
            prior = _fit_line(self.offered[level], self.hits[level], prior)
            self.slope[level], self.offset[level] = prior
        self._write_lines()

    def save(self, folder: Path) -> None:
        self._fold()
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
        self._unfolded, self._unfolded_steps = None, 0
        self.fit()


def _find_level(depth: int) -> int:
    return min(depth, _LEVELS) - 1


def _compute_log_odds(log_chances: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    miss = -torch.expm1(log_chances.clamp(max=-1e-6))
    return (log_chances - miss.log()).clamp(-_MOST_ODDS, _MOST_ODDS)


def _count_judged(draft: Draft, verdict: Verdict, log_chances: Tensor) -> Float[Tensor, "2 levels bins"]:
    """Children of walked nodes by level and chance, and those of them that the target chose."""
    num_rows, width = draft.parents.shape
    depths = torch.arange(verdict.path.shape[1], device=draft.parents.device).expand_as(verdict.path)
    depth_of = draft.parents.new_full((num_rows, width + 1), -1)  # of walked nodes; -1: the target did not walk here
    depth_of.scatter_(1, torch.where(verdict.path >= 0, verdict.path, width), depths)
    depth_of = depth_of[:, :width]
    above = depth_of.gather(1, draft.parents.clamp(min=0)).masked_fill(draft.parents < 0, -1)
    is_judged = (above >= 0) & (log_chances > -torch.inf)
    odds = _compute_log_odds(log_chances.masked_fill(~is_judged, 0.0))
    place = (
        above.clamp(0, _LEVELS - 1) * _BINS + ((odds + _MOST_ODDS) * ((_BINS - 1) / (2 * _MOST_ODDS))).round().long()
    )
    tables = torch.zeros(2, _LEVELS * _BINS, dtype=torch.float64, device=place.device)
    for table, is_counted in zip(tables, (is_judged, is_judged & (depth_of >= 0)), strict=True):
        table.index_add_(0, place.flatten(), is_counted.flatten().double())
    return tables.unflatten(1, (_LEVELS, _BINS))


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
