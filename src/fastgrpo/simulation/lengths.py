"""Rollouts as long as reasoning runs have them, made of recorded completions."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fastgrpo.simulation.facts import Facts
from fastgrpo.simulation.replay import Request

_LARGEST_SIGMA = 4.0
_MOST_TOKENS = 100_000_000  # of a rollout: a position of each is held
_SIBLING_SHARE = 0.5  # of the variance of the logarithm; siblings share what their prompt asks


def draw_lengths(
    num_completions: int, *, mean: float, longest_over_mean: float, group_size: int, seed: int
) -> NDArray[np.int64]:
    """[num_completions] tokens: lognormal quantiles with exactly this mean (but for rounding) and this longest one.

    Siblings, which stand together, are alike: half of the variance of the logarithm is their prompt's. The seed
    decides who is long; the lengths themselves are the same for every seed.

    Raises:
        ValueError: no lognormal spread gives such a longest one, or a value is out of its range.
    """
    if num_completions < 2 or not 1 <= group_size <= num_completions:
        raise ValueError(
            f"lengths need at least 2 completions and groups of 1 to all of them, got {num_completions} and groups of "
            f"{group_size}"
        )
    if not (math.isfinite(mean) and mean >= 1):
        raise ValueError(f"the mean length must be at least 1 token, got {mean}")
    if num_completions * mean > _MOST_TOKENS:
        raise ValueError(
            f"{num_completions} completions of {mean} tokens in the mean are more than the {_MOST_TOKENS:,} tokens of "
            "a rollout that can be simulated; simulate fewer, or shorter ones"
        )
    quantiles = _compute_quantiles(num_completions, longest_over_mean)
    lengths = np.maximum(np.rint(mean * quantiles), 1).astype(np.int64)
    draws = np.random.default_rng(seed)
    num_groups = -(-num_completions // group_size)
    of_prompt = np.repeat(draws.standard_normal(num_groups), group_size)[:num_completions]
    own = draws.standard_normal(num_completions)
    merit = math.sqrt(_SIBLING_SHARE) * of_prompt + math.sqrt(1 - _SIBLING_SHARE) * own
    return lengths[np.argsort(np.argsort(merit))]


def _compute_quantiles(count: int, longest_over_mean: float) -> NDArray[np.float64]:
    """Evenly spaced quantiles of a lognormal with mean 1 and this largest one, rising."""
    normal = np.array([NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)])

    def find_longest(sigma: float) -> float:
        return float(np.exp(sigma * normal[-1]) / np.mean(np.exp(sigma * normal)))

    low, high = 0.0, _LARGEST_SIGMA
    if not 1 <= longest_over_mean <= find_longest(high):
        raise ValueError(
            f"the longest of {count} completions can be 1 to {find_longest(high):.1f} times their mean, got "
            f"{longest_over_mean}; change the ratio, or simulate more completions"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if find_longest(middle) < longest_over_mean else (low, middle)
    values = np.exp(high * normal)
    scaled: NDArray[np.float64] = values / values.mean()
    return scaled


def draw_requests(
    facts: Facts, lengths: NDArray[np.int64], *, prompt_len: int, group_size: int, seed: int
) -> list[Request]:
    """Requests of these lengths, whose positions are whole recorded completions, drawn and put one after another.

    Positions of a stopped completion from which the target's choices end before a recorded path can are left out:
    they would cut walks short where a long completion goes on.
    """
    depth = facts.plan.depth
    pieces = []
    for start, length, ahead in zip(facts.starts, facts.lengths, facts.num_ahead, strict=True):
        whole = int(length) + int(ahead) - depth + 1
        pieces.append(start + np.arange(min(int(length), whole) if whole > 0 else int(length)))
    draws = np.random.default_rng(seed)
    requests, num_skipped = [], facts.count_skipped(prompt_len)
    for index, wanted in enumerate(lengths.tolist()):
        drawn: list[NDArray[np.int64]] = []
        missing = wanted
        while missing > 0:
            piece = pieces[int(draws.integers(len(pieces)))][:missing]
            drawn.append(piece)
            missing -= len(piece)
        positions = np.concatenate(drawn)
        requests.append(
            Request(prompt_len=prompt_len, group=index // group_size, positions=positions, num_skipped=num_skipped)
        )
    return requests
