"""The records that all other modules share: plain facts about a run, without tensors or torch.

Axis letters used in tensor annotations throughout the package:

| letter | axis                      | letter | axis                 |
|--------|---------------------------|--------|----------------------|
| B      | running sequences         | S      | cache positions      |
| N      | tree nodes (root is 0)    | V      | vocabulary           |
| D      | tree depth                | H      | hidden size          |
| T      | packed tokens (a forward) | L      | layers               |
| K      | blocks of a cache row     |        |                      |
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

# the phases of a training step, as they are listed: TRL computes log-probs before rewards
ROLLOUT, REWARDS, LEARNING, LOG_PROBS = "rollout", "rewards", "draft learning", "log-probs"
FORWARD, BACKWARD, OPTIMISER = "forward", "backward", "optimiser"
PHASES = (ROLLOUT, REWARDS, LEARNING, LOG_PROBS, FORWARD, BACKWARD, OPTIMISER)
STREAMED_REWARD = "streamed reward"  # runs beside the rollout: a finished completion's reward while others decode
BESIDE = "draft learning beside"  # runs beside the rollout's tail, on cores or a GPU that would stand idle

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled.

    Args:
        temperature: divides the logits, from 1e-30 to 1e30; 0 is greedy decoding.
        top_k: keep the k most likely tokens, up to 2^63 - 1; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this share, in (0, 1].
        max_tokens: limit on the completion's tokens, at least 1.
        stop_token_ids: a completion ends with the first of these that is emitted.
        seed: selects the noise. The same seed, stream, prompt and model give the same tokens.
        stream: the noise stream within the seed. One `SamplingParams` given for many prompts
            is read as stream, stream + 1, ... in the order of the prompts.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "max_tokens", "seed", "stream"):
            object.__setattr__(self, name, _take_integer(name, getattr(self, name)))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, _take_number(name, getattr(self, name)))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}; use 0 for greedy")
        if self.temperature and not _LEAST_TEMPERATURE <= self.temperature <= _MOST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 or between {_LEAST_TEMPERATURE:g} and {_MOST_TEMPERATURE:g}, by which float32 "
                f"can divide logits, got {self.temperature}; use 0 for greedy"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}; use 0 to keep every token")
        if self.top_k >= 2**63:
            raise ValueError(f"top_k must be less than 2^63, got {self.top_k}; use 0 to keep every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; use 1 to keep every token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        try:
            stops = tuple(self.stop_token_ids)
        except TypeError:
            raise ValueError(f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}") from None
        stops = tuple(_take_integer("each of stop_token_ids", each) for each in stops)
        object.__setattr__(self, "stop_token_ids", stops)


def _take_integer(name: str, value: Any) -> int:
    """The value as an int; NumPy's and PyTorch's integers are taken too."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _take_number(name: str, value: Any) -> float:
    """The value as a float; NumPy's and PyTorch's numbers are taken too."""
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one request produced.

    `logprobs[i]` is the log-probability of `token_ids[i]` under the softmax of logits / temperature
    (before top-k and top-p; at temperature 0, of the logits), which is what a GRPO loss recomputes.
    `entropies[i]` is that distribution's entropy in nats.
    """

    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    finish_reason: FinishReason


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One request on its way through the engine; the only mutable record here.

    The last of `all_token_ids` is the pending token: emitted (or the last of the prompt) but not
    yet in the cache. It is the root of every draft tree.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int  # `params.max_tokens`, or less where the model's context ends earlier
    stream_key: int  # 64-bit key of this request's noise, see `sampling.stream_key`
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_cached(self) -> int:
        """Tokens in the cache: all but the pending one."""
        return len(self.prompt_ids) + len(self.token_ids) - 1

    @property
    def pending_token_id(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    def last_token_ids(self, count: int) -> list[int]:
        """The last `count` tokens of prompt and completion, or all if there are fewer; copies no more than those."""
        missing = count - len(self.token_ids)
        return self.prompt_ids[-missing:] + self.token_ids if missing > 0 else self.token_ids[-missing:]

    @functools.cached_property
    def group_key(self) -> tuple[int, ...]:
        """Names the group: requests with the same prompt are siblings."""
        return tuple(self.prompt_ids)

    def append(self, token_ids: list[int], logprobs: list[float], entropies: list[float]) -> int:
        """Emit tokens up to the first that ends the sequence; returns how many were kept."""
        emitted = zip(token_ids, logprobs, entropies, strict=True)
        for count, (token_id, logprob, entropy) in enumerate(emitted, start=1):
            self.token_ids.append(token_id)
            self.logprobs.append(logprob)
            self.entropies.append(entropy)
            if token_id in self.params.stop_token_ids:
                self.finish_reason = "stop"
                return count
            if len(self.token_ids) >= self.max_tokens:
                self.finish_reason = "length"
                return count
        return len(token_ids)


@dataclass(frozen=True, kw_only=True)
class SpeculationPlan:
    """The shape of the draft trees of one step. `num_draft_tokens` 0 is plain decoding.

    Args:
        depth: draft levels, the longest path a draft can add.
        width: children considered for a node, and nodes expanded on a level.
        num_draft_tokens: nodes kept for verification in each tree, the root not counted.
        most_draft_tokens: if set, all sequences share one budget of about num_draft_tokens per sequence, of which one
            tree may take up to this many nodes; None gives every tree its own num_draft_tokens.

    Raises:
        ValueError: a value is no integer or negative, or the values contradict each other; the message names them.
    """

    depth: int = 0
    width: int = 0
    num_draft_tokens: int = 0
    most_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        sizes = [_take_integer(name, getattr(self, name)) for name in ("depth", "width", "num_draft_tokens")]
        if self.most_draft_tokens is not None:
            _take_integer("most_draft_tokens", self.most_draft_tokens)
        if min(sizes) < 0:
            raise ValueError(f"a plan needs depth, width and num_draft_tokens >= 0, got {self}")
        if (self.num_draft_tokens == 0) != (self.depth == 0 or self.width == 0):
            raise ValueError(f"a plan is either all zero (plain decoding) or has no zero at all, got {self}")
        if self.num_draft_tokens and self.tree_size < self.depth:
            raise ValueError(
                f"num_draft_tokens {self.num_draft_tokens} cannot fill a depth of {self.depth}; lower draft_depth"
            )
        if self.most_draft_tokens is not None and self.most_draft_tokens < self.num_draft_tokens:
            raise ValueError(
                f"most_draft_tokens {self.most_draft_tokens} must be at least num_draft_tokens {self.num_draft_tokens}"
            )

    @property
    def is_plain(self) -> bool:
        return self.num_draft_tokens == 0

    @property
    def tree_size(self) -> int:
        """Draft tokens that one tree may have."""
        return self.num_draft_tokens if self.most_draft_tokens is None else self.most_draft_tokens

    def limit(self, tree_size: int | None) -> SpeculationPlan:
        """The same plan with at most `tree_size` draft tokens in a tree; below 1 it is plain, None sets no limit."""
        if tree_size is None or self.tree_size <= tree_size:
            return self
        if tree_size < 1:
            return PLAIN
        most = None if self.most_draft_tokens is None else tree_size
        count = min(self.num_draft_tokens, tree_size)
        return replace(self, depth=min(self.depth, tree_size), num_draft_tokens=count, most_draft_tokens=most)


PLAIN = SpeculationPlan()


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Raw facts of one `Engine.step`, read by planner, metrics and reports.

    Of the nodes at depth d on walked paths, `offered[d][r]` counts those that had a draft child of sibling rank r, and
    `hits[d][r]` those at which the target chose that child. Both end at the first depth without children. Children that
    were drafted but not verified count too.
    """

    num_seqs: int
    num_waiting: int
    plan: SpeculationPlan
    num_tokens: int  # tokens in the target forward, roots included
    num_emitted: int  # tokens emitted by this step
    num_read: int  # cached positions that attention read, of all sequences together
    num_prefilled: int  # prompt tokens computed before this step's forward
    offered: tuple[tuple[int, ...], ...]
    hits: tuple[tuple[int, ...], ...]
    prefill_s: float  # seconds of the device's work, as are the next two
    draft_s: float
    target_s: float  # the target forward, its output head included; the walk, too, where both are one recorded call
    verify_s: float  # the rest of the step: committing; sampling and walking, where they are not in `target_s`
    step_s: float  # the whole step, prefill included
    num_unread: int = 0  # cached tokens that the drafter had not read before this step
    num_promised: float = 0.0  # accepted draft tokens that the drafter's chances predicted; 0 where it gives none
    num_preempted: int = 0  # sequences sent back to the queue before this step, to make room
    cache_bytes: int = 0  # in use during the forward by keys, values and features, drafted nodes included
    is_steady: bool = True  # False where its time says little of later steps, as when it recorded a CUDA graph
    has_recorded: bool = False  # whether it did, or the drafter
    plan_s: float = 0.0  # the planner's: this step's plan and budget (in draft_s), the last step's lesson (in no other)

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per sequence and target forward, next token included."""
        return self.num_emitted / self.num_seqs


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a training step, in seconds since it began; `name` is in `PHASES`, `STREAMED_REWARD` or `BESIDE`."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a training step of `step_s` seconds did when. Phases do not overlap; what runs beside them does."""

    step_s: float
    spans: tuple[Span, ...]
