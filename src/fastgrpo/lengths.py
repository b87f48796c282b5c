"""Predicts completion lengths from those of finished completions. No torch: counted facts alone."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LEAST_BEGINNING, _MOST_BEGINNING = 8, 4096  # lengths of beginnings, in tokens, that may tell a task
_BEGINNINGS_PER_OCTAVE = 2
_KINDS_PER_PROMPT = 8  # kinds remembered for each prompt that is
_DOUBT = 8.0  # weight, in completions, of a wider kind of prompts beside a narrower one


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
    """Expected completion lengths in tokens: the mean of the same prompt, else an estimate from prompts like it.

    The engine knows no tasks, but prompts of one task begin alike. The estimate starts as the mean of prompts of about
    the same length (or of all). It then moves towards the mean of prompts with the same first 8 tokens, next to that of
    those among them of about the same length, and so on with the first 11, 16, ... tokens: the further, the more
    completions a mean rests on. A beginning that all prompts share (a system prompt) tells none apart.

    Older completions count less, since the policy changes. Within a group the longest end last and so count most, for
    every prompt alike. The predictor outlives rollouts. Memory is bounded: the prompts and beginnings that were
    completed least recently are forgotten.

    Args:
        max_prompts: prompts remembered, at least 1; of beginnings, some times as many.
        decay: factor on a completion's weight at each later completion of its prompt, in (0, 1].
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
        self._kinds: OrderedDict[str, RunningMean] = OrderedDict()  # prompts that begin alike, in the same order
        self._buckets: dict[int, RunningMean] = {}
        self._all = RunningMean()

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    def predict(self, prompt_ids: list[int]) -> float:
        """Expected tokens of a completion; 0 where nothing has been seen yet."""
        if not self._all.weight:
            return 0.0
        if known := self._prompts.get(hash_prompt(prompt_ids)):
            return known.value
        expected = self._buckets.get(_find_bucket(len(prompt_ids)), self._all).value
        for kind in _list_kinds(prompt_ids):
            if known := self._kinds.get(kind):
                expected = (known.total + _DOUBT * expected) / (known.weight + _DOUBT)
        return expected

    def observe(self, prompt_ids: list[int], num_tokens: int) -> None:
        """Learn from a completion of this prompt that ended after `num_tokens`."""
        key = hash_prompt(prompt_ids)
        self._prompts.setdefault(key, RunningMean()).observe(num_tokens, self.decay)
        self._prompts.move_to_end(key)
        if len(self._prompts) > self.max_prompts:
            self._prompts.popitem(last=False)
        for kind in _list_kinds(prompt_ids):
            self._kinds.setdefault(kind, RunningMean()).observe(num_tokens, self.shared_decay)
            self._kinds.move_to_end(kind)
        while len(self._kinds) > _KINDS_PER_PROMPT * self.max_prompts:
            self._kinds.popitem(last=False)
        self._buckets.setdefault(_find_bucket(len(prompt_ids)), RunningMean()).observe(num_tokens, self.shared_decay)
        self._all.observe(num_tokens, self.shared_decay)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; prompts by their hashes alone."""
        return {
            "max_prompts": self.max_prompts,
            "decays": [self.decay, self.shared_decay],
            "prompts": [[key, mean.total, mean.weight] for key, mean in self._prompts.items()],
            "kinds": [[kind, mean.total, mean.weight] for kind, mean in self._kinds.items()],
            "buckets": [[bucket, mean.total, mean.weight] for bucket, mean in self._buckets.items()],
            "all": [self._all.total, self._all.weight],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LengthPredictor:
        """The predictor that `state_dict` described."""
        decay, shared_decay = state["decays"]
        predictor = cls(max_prompts=state["max_prompts"], decay=decay, shared_decay=shared_decay)
        predictor._prompts.update((key, RunningMean(total, weight)) for key, total, weight in state["prompts"])
        kinds = state.get("kinds", ())  # older states have none
        predictor._kinds.update((kind, RunningMean(total, weight)) for kind, total, weight in kinds)
        predictor._buckets.update((int(key), RunningMean(total, weight)) for key, total, weight in state["buckets"])
        predictor._all = RunningMean(*state["all"])
        return predictor


def hash_prompt(prompt_ids: list[int]) -> str:
    """64 bits of the token ids as hex digits, the same in every process."""
    return hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=8).hexdigest()


def _list_kinds(prompt_ids: list[int]) -> Iterator[str]:
    """Keys of the kinds of prompts that this one belongs to, the widest first.

    For each length of beginning: prompts that begin with the same tokens, then those among them of about its length.
    """
    bucket, digest, begun = _find_bucket(len(prompt_ids)), hashlib.blake2b(digest_size=8), 0
    for length in _BEGINNINGS:
        if length > len(prompt_ids):
            return
        digest.update(array("q", prompt_ids[begun:length]).tobytes())
        begun, kind = length, digest.hexdigest()
        yield kind
        yield f"{kind} {bucket}"


_BEGINNINGS = tuple(
    round(_LEAST_BEGINNING * 2 ** (step / _BEGINNINGS_PER_OCTAVE))
    for step in range(1 + _BEGINNINGS_PER_OCTAVE * round(math.log2(_MOST_BEGINNING / _LEAST_BEGINNING)))
)


def _find_bucket(num_tokens: int) -> int:
    """Prompt lengths in quarters of an octave: a bucket's longest prompt has about 1.2 times its shortest's tokens."""
    return round(4 * math.log2(num_tokens))
