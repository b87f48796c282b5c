"""Rollouts with a constant number of live sequences: requests enough, and an end once enough was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fastgrpo.data import build_task_dataset
from fastgrpo.engine import Engine
from fastgrpo.lengths import LengthPredictor
from fastgrpo.loading import Opened, encode_prompts
from fastgrpo.metrics import compute_ratio
from fastgrpo.options.planning import SteadyOptions
from fastgrpo.types import SamplingParams, StepRecord

_SHORTEST = 4  # tokens of a completion, in the mean, for which there are requests enough


class _EnoughSeen(Exception):
    """Ends a rollout; the engine leaves nothing behind, as after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one request emitted in the counted steps that did not end it."""

    num_tokens: int = 0
    num_forwards: int = 0


@dataclass(frozen=True, kw_only=True)
class SteadyRollout:
    """The steps of one rollout in which exactly so many sequences were live and no prompt was computed.

    Args:
        progress: by request.
    """

    records: list[StepRecord]
    progress: dict[int, Progress]


@dataclass(frozen=True, kw_only=True)
class SteadyWorkload:
    """Prompts that requests take in turn, how they are sampled, and when a rollout has shown enough.

    Args:
        min_tokens: counted tokens of a rollout at least, all sequences together.
    """

    prompts: list[list[int]]
    params: SamplingParams
    tokens_per_seq: int
    min_tokens: int

    @classmethod
    def build(cls, opened: Opened, options: SteadyOptions, *, tokens_per_seq: int, min_tokens: int) -> SteadyWorkload:
        """
        Raises:
            ValueError: the task cannot be used.
        """
        chats = build_task_dataset(options.task, size=options.num_prompts, seed=options.seed)["prompt"]
        params = SamplingParams(
            temperature=options.temperature, max_tokens=options.max_tokens, stop_token_ids=opened.stop_token_ids
        )
        prompts = encode_prompts(opened.tokenizer, chats)
        return cls(prompts=prompts, params=params, tokens_per_seq=tokens_per_seq, min_tokens=min_tokens)

    def roll_out(self, engine: Engine, num_seqs: int, seed: int, *, share: float = 1.0) -> SteadyRollout:
        """One rollout with `num_seqs` live sequences, ended once it has emitted enough.

        Every engine is given the same requests in the same order: it forgets the lengths it has seen.

        Args:
            share: of the tokens of a whole one, to warm up with.
        """
        num_tokens = int(share * max(self.tokens_per_seq * num_seqs, self.min_tokens))
        num_requests = num_seqs + num_tokens // _SHORTEST
        prompts = [self.prompts[request % len(self.prompts)] for request in range(num_requests)]
        engine.scheduler.max_num_seqs = num_seqs
        engine.scheduler.lengths = LengthPredictor()
        steps = _Steps(engine, num_seqs, num_tokens)
        with steps.listening(), suppress(_EnoughSeen):
            engine.generate(prompts, dataclasses.replace(self.params, seed=seed))
        return SteadyRollout(records=steps.records, progress=steps.progress)


class _Steps:
    """Listens to an engine and keeps what counts."""

    def __init__(self, engine: Engine, num_seqs: int, num_tokens: int) -> None:
        self.engine, self.num_seqs, self.num_tokens = engine, num_seqs, num_tokens
        self.records: list[StepRecord] = []
        self.progress: dict[int, Progress] = {}
        self._lengths: dict[int, int] = {}  # tokens emitted, by live request
        self._num_emitted = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.engine.on_step.append(self.take)
        try:
            yield
        finally:
            self.engine.on_step.remove(self.take)

    def take(self, record: StepRecord) -> None:
        lengths = {sequence.request_id: len(sequence.token_ids) for sequence in self.engine.scheduler.running}
        if record.num_seqs == self.num_seqs and not record.num_prefilled:
            self.records.append(record)
            self._num_emitted += record.num_emitted
            for request, length in lengths.items():
                seen = self.progress.get(request, Progress())
                self.progress[request] = Progress(
                    num_tokens=seen.num_tokens + length - self._lengths.get(request, 0),
                    num_forwards=seen.num_forwards + 1,
                )
        self._lengths = lengths
        if self._num_emitted >= self.num_tokens:
            raise _EnoughSeen


def compute_rate(records: Sequence[StepRecord]) -> float:
    """Tokens per second, prompts left out."""
    seconds = sum(record.step_s - record.prefill_s for record in records)
    return compute_ratio(sum(record.num_emitted for record in records), seconds)
