"""Rollouts with a constant number of live sequences: requests enough, and an end once enough was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fastgrpo.bench.measure import TURN_TOKENS, Rollouts, draw_orders, open_together, take_turn
from fastgrpo.data import build_task_dataset
from fastgrpo.engine import Engine
from fastgrpo.lengths import LengthPredictor
from fastgrpo.loading import Opened, encode_prompts
from fastgrpo.metrics import compute_ratio
from fastgrpo.options.planning import SteadyOptions
from fastgrpo.types import SamplingParams, StepRecord

_MOST_TOKENS = 2  # of what is enough: turns end with whole steps, and not all steps count
_SHORTEST = 4  # tokens of a completion, in the mean, for which there are requests enough


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
        """The workload that these options describe.

        Raises:
            ValueError: the task cannot be used.
        """
        chats = build_task_dataset(options.task, size=options.num_prompts, seed=options.seed)["prompt"]
        params = SamplingParams(
            temperature=options.temperature, max_tokens=options.max_tokens, stop_token_ids=opened.stop_token_ids
        )
        prompts = encode_prompts(opened.tokenizer, chats)
        return cls(prompts=prompts, params=params, tokens_per_seq=tokens_per_seq, min_tokens=min_tokens)

    def roll_out(self, engines: Mapping[str, Engine], num_seqs: int, seed: int) -> dict[str, SteadyRollout]:
        """One rollout of each engine with `num_seqs` live sequences, a few tokens in turn until all emitted enough.

        It ends early where completions are so short that one runs out of requests. Every engine is given the same
        requests in the same order: it forgets the lengths it has seen.

        Raises:
            ValueError: an engine made no step that counts.
        """
        num_tokens = max(self.tokens_per_seq * num_seqs, self.min_tokens)
        with self._open(engines, num_seqs, num_tokens, seed) as (rollouts, seen):
            for order in draw_orders(engines, seed):
                for name in order:
                    take_turn(engines[name], rollouts[name], TURN_TOKENS)
                is_enough = all(steps.num_emitted >= num_tokens for steps in seen.values())
                if is_enough or not all(engine.scheduler.has_work for engine in engines.values()):
                    break
        if not all(steps.records for steps in seen.values()):
            raise ValueError(
                f"nothing was measured with {num_seqs} live sequences: with max_tokens={self.params.max_tokens} every "
                "step computed a prompt, or had fewer live; take longer completions"
            )
        return {name: SteadyRollout(records=steps.records, progress=steps.progress) for name, steps in seen.items()}

    def warm_up(self, engine: Engine, num_seqs: int, seed: int, *, share: float = 1.0) -> None:
        """A rollout that is not measured.

        Args:
            share: of the tokens of a measured one.
        """
        num_tokens = int(share * max(self.tokens_per_seq * num_seqs, self.min_tokens))
        with self._open({"": engine}, num_seqs, num_tokens, seed) as (rollouts, seen):
            for _ in rollouts[""]:
                if seen[""].num_emitted >= num_tokens:
                    break

    @contextmanager
    def _open(
        self, engines: Mapping[str, Engine], num_seqs: int, num_tokens: int, seed: int
    ) -> Iterator[tuple[Rollouts, dict[str, _Steps]]]:
        """Rollouts of more requests than are needed, and what is seen of their steps."""
        num_requests = num_seqs + _MOST_TOKENS * num_tokens // _SHORTEST
        prompts = [self.prompts[request % len(self.prompts)] for request in range(num_requests)]
        rollouts, seen = {}, {}
        with ExitStack() as stack:
            for name, engine in engines.items():
                engine.scheduler.max_num_seqs = num_seqs
                engine.scheduler.lengths = LengthPredictor()
                seen[name] = stack.enter_context(_Steps(engine, num_seqs).listening())
                sequences = engine.take_requests(prompts, dataclasses.replace(self.params, seed=seed))
                rollouts[name] = engine.roll_out(sequences)
            yield stack.enter_context(open_together(rollouts)), seen


class _Steps:
    """Listens to an engine and keeps what counts of its steps."""

    def __init__(self, engine: Engine, num_seqs: int) -> None:
        self.engine, self.num_seqs = engine, num_seqs
        self.records: list[StepRecord] = []
        self.progress: dict[int, Progress] = {}
        self.num_emitted = 0
        self._lengths: dict[int, int] = {}  # tokens emitted, by live request

    @contextmanager
    def listening(self) -> Iterator[_Steps]:
        self.engine.on_step.append(self.take)
        try:
            yield self
        finally:
            self.engine.on_step.remove(self.take)

    def take(self, record: StepRecord) -> None:
        lengths = {sequence.request_id: len(sequence.token_ids) for sequence in self.engine.scheduler.running}
        if record.num_seqs == self.num_seqs and not record.num_prefilled:
            self.records.append(record)
            self.num_emitted += record.num_emitted
            for request, length in lengths.items():
                seen = self.progress.get(request, Progress())
                self.progress[request] = Progress(
                    num_tokens=seen.num_tokens + length - self._lengths.get(request, 0),
                    num_forwards=seen.num_forwards + 1,
                )
        self._lengths = lengths


def compute_rate(records: Sequence[StepRecord]) -> float:
    """Tokens per second, prompts left out."""
    seconds = sum(record.step_s - record.prefill_s for record in records)
    return compute_ratio(sum(record.num_emitted for record in records), seconds)
