"""How long a completion will be, guessed from those that have ended. No torch: counted facts alone."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class RunningMean:
    """A mean in which older values count less."""

    total: float = 0.0
    weight: float = 0.0

    def observe(self, value: float, decay: float) -> None:
        self.total, self.weight = decay * self.total + value, decay * self.weight + 1

    @property
    def value(self) -> float:
        return self.total / self.weight


class LengthPredictor:
    """Expected completion lengths in tokens: of the same prompt, else of prompts as long, else of all.

    The engine knows no tasks, so the length of a prompt stands for what it asks. Means follow a policy that changes;
    within a group, those that end last are the longest and count most, for every prompt alike. It outlives rollouts.
    Memory is bounded: the prompts least recently completed are forgotten.

    Args:
        max_prompts: prompts remembered, at least 1.
        decay: what a completion's weight is multiplied by at each later one of its prompt, in (0, 1].
        shared_decay: the same for the means of many prompts.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    def __init__(self, *, max_prompts: int = 4096, decay: float = 0.9, shared_decay: float = 0.99) -> None:
        if max_prompts < 1:
            raise ValueError(f"max_prompts must be at least 1, got {max_prompts}")
        if not (0 < decay <= 1 and 0 < shared_decay <= 1):
            raise ValueError(f"decays must be in (0, 1], got {decay} and {shared_decay}")
        self.max_prompts, self.decay, self.shared_decay = max_prompts, decay, shared_decay
        self._prompts: OrderedDict[str, RunningMean] = OrderedDict()  # least recently completed first
        self._buckets: dict[int, RunningMean] = {}
        self._all = RunningMean()

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    def predict(self, prompt_ids: list[int]) -> float:
        """Expected tokens of a completion; 0 where nothing has been seen yet."""
        if not self._all.weight:
            return 0.0
        known = self._prompts.get(hash_prompt(prompt_ids)) or self._buckets.get(_find_bucket(len(prompt_ids)))
        return (known or self._all).value

    def observe(self, prompt_ids: list[int], num_tokens: int) -> None:
        """A completion of this prompt has ended after so many tokens."""
        key = hash_prompt(prompt_ids)
        self._prompts.setdefault(key, RunningMean()).observe(num_tokens, self.decay)
        self._prompts.move_to_end(key)
        if len(self._prompts) > self.max_prompts:
            self._prompts.popitem(last=False)
        self._buckets.setdefault(_find_bucket(len(prompt_ids)), RunningMean()).observe(num_tokens, self.shared_decay)
        self._all.observe(num_tokens, self.shared_decay)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; prompts by their hashes alone."""
        return {
            "max_prompts": self.max_prompts,
            "decays": [self.decay, self.shared_decay],
            "prompts": [[key, mean.total, mean.weight] for key, mean in self._prompts.items()],
            "buckets": [[bucket, mean.total, mean.weight] for bucket, mean in self._buckets.items()],
            "all": [self._all.total, self._all.weight],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LengthPredictor:
        """The predictor that `state_dict` described."""
        decay, shared_decay = state["decays"]
        predictor = cls(max_prompts=state["max_prompts"], decay=decay, shared_decay=shared_decay)
        predictor._prompts.update((key, RunningMean(total, weight)) for key, total, weight in state["prompts"])
        predictor._buckets.update((int(key), RunningMean(total, weight)) for key, total, weight in state["buckets"])
        predictor._all = RunningMean(*state["all"])
        return predictor


def hash_prompt(prompt_ids: list[int]) -> str:
    """64 bits of the token ids as hex digits, the same in every process."""
    return hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=8).hexdigest()


def _find_bucket(num_tokens: int) -> int:
    """Prompt lengths in quarters of an octave: a bucket's longest prompt has about 1.2 times its shortest's tokens."""
    return round(4 * math.log2(num_tokens))
