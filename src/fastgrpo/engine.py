"""The engine: schedule, plan, propose, forward, verify. One path; plain decoding is an empty draft."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastgrpo.admission import Admission
from fastgrpo.attention import ForwardBatch
from fastgrpo.cache import list_walked
from fastgrpo.drafters import Drafter, build_drafter
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.none import NoDrafter
from fastgrpo.memory import is_out_of_memory
from fastgrpo.model import ForwardOutput, TargetModel
from fastgrpo.planner import (
    MEASURED,
    FixedPlanner,
    HardwareProfile,
    PlanInputs,
    Planner,
    build_planner,
    restore_planner,
)
from fastgrpo.prefill import Prefiller
from fastgrpo.profile_files import find_profile, take_profile
from fastgrpo.sampling import SamplingBatch, stream_key
from fastgrpo.scheduler import Scheduler
from fastgrpo.timing import Stopwatch
from fastgrpo.transfer import download, upload
from fastgrpo.tree import Draft, compute_ancestors
from fastgrpo.types import PLAIN, Completion, SamplingParams, Sequence, SpeculationPlan, StepRecord
from fastgrpo.verify import Outcome, Verdict, read_outcome, verify

DEFAULT_FIXED_PLAN = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)


@dataclass(frozen=True, kw_only=True)
class FinishedRollout:
    """One finished sequence as a learner wants it.

    `features[i]` belongs to token i of prompt + completion; the last token has none. `request_id` is the place of its
    prompt among those of `Engine.generate`; None for one that comes from elsewhere, such as a file.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    temperature: float
    features: Float[Tensor, "T W"] | None
    request_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """What a step has computed before anything is kept of it: if memory runs out on the way, it is made again."""

    inputs: PlanInputs
    plan: SpeculationPlan
    pool: Draft  # all that was drafted
    draft: Draft  # what was verified of it
    batch: ForwardBatch
    output: ForwardOutput
    verdict: Verdict
    outcome: Outcome
    prefilled: float  # times at which a part ended
    drafted: float
    forwarded: float


class Engine:
    """Exact speculative generation with a transformers causal LM that stays its owner's.

    Args:
        model: a causal LM or a PEFT model of one; Llama, Qwen2, Qwen3, or Mistral without a window.
        drafter: "eagle" (the head shipped for the model, if there is one), "eagle-new" (never the shipped one),
            "block" (a head that drafts in one pass), "ngram", "auto" (eagle and ngram, whichever pays), "none", a
            folder with a saved head or with a small causal LM of the same tokenizer, or a `Drafter`.
        speculation: "auto", "paper", "paper-own", "bandit", "fixed", "off", or a `SpeculationPlan` used at every step.
        max_num_seqs: sequences decoded together; others wait, the longest expected completions at the front.
        fixed_plan: the plan of "fixed".
        compute_dtype: run under autocast in this type; None computes in the model's own.
        tokenizer: the model's, compared with that of a drafter from a folder; None looks where the model came from.
        profile: what forwards and drafts cost: measured before, or a file of `fastgrpo profile`; None takes what the
            cache has of this machine, model and drafter (see `profile_files`), or measures at first use.
        max_cache_bytes: of keys, values and features together; a drafter's own rows are not counted. Where it is
            reached, the youngest sequences wait and are computed anew. None takes most of what is free when a rollout
            starts.

    Raises:
        ValueError: the model, drafter, speculation, profile or bound cannot be used; the message names the remedy.
        FileNotFoundError: there is no such profile.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        drafter: str | Path | Drafter = "eagle",
        speculation: str | SpeculationPlan = "auto",
        max_num_seqs: int = 64,
        fixed_plan: SpeculationPlan = DEFAULT_FIXED_PLAN,
        compute_dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        profile: HardwareProfile | str | Path | None = None,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.target = TargetModel(model, compute_dtype=compute_dtype, tokenizer=tokenizer)
        self.drafter = build_drafter(drafter, self.target)
        self._profile = None if profile is None else take_profile(profile, self.target, self.drafter)
        if speculation == "off" and isinstance(drafter, str | Path):
            self.drafter = NoDrafter()  # a named drafter is checked all the same, but keeps no features
        self._judge: Callable[[Draft, Verdict], None] | None = getattr(self.drafter, "judge", None)
        self.scheduler = Scheduler(max_num_seqs)
        self.cache = self.target.build_cache(with_features=self.drafter.wants_features)
        self.prefiller = Prefiller(self.target, self.cache, self.scheduler)
        self.admission = Admission(
            self.scheduler,
            self.cache,
            self.prefiller,
            self.drafter,
            max_bytes=max_cache_bytes,
            target=self.target,
        )
        self.planner: Planner | None = None
        self._fixed_plan = fixed_plan
        self._speculation = speculation
        self._check_speculation()
        if self.drafter.name == "none":
            self._speculation, self.planner = "off", FixedPlanner()
        self.profile_s = 0.0
        self._planning = Stopwatch()
        self.records: list[StepRecord] = []
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.on_finish: list[Callable[[FinishedRollout], None]] = []
        self._vocabulary = torch.arange(self.target.vocab_size, dtype=torch.int32, device=self.target.device)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Engine:
        """Load a model (safetensors only) and build an engine around it; other arguments as for `Engine`."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=dtype, use_safetensors=True).to(device)
        return cls(model, **kwargs)

    def generate(
        self,
        prompt_token_ids: list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Generate one completion for each prompt.

        Args:
            prompt_token_ids: token ids of each prompt. Equal prompts are siblings: their prompt is
                computed once.
            params: one for all (request i takes the noise stream `stream + i`) or one for each.

        Returns:
            Completions in the order of the prompts, a function of model, prompt, params and seed alone.

        Raises:
            ValueError: a prompt is empty, too long or has ids out of range, or does not fit the bound on memory with
                the tokens it may get; nothing has been generated.
            MemoryError: memory ran out with a single sequence left running; says what would have fitted.
            FloatingPointError: the model's logits are not finite; names request and position.
        """
        sequences = self._build_sequences(prompt_token_ids, SamplingParams() if params is None else params)
        self.records = []
        if not sequences:
            return []
        try:
            with self.target.rollout_mode():
                self._ensure_planner().begin()
                self.drafter.begin()
                self.admission.begin(sequences)
                for sequence in sequences:
                    self.scheduler.add(sequence)
                while self.scheduler.has_work:
                    record = self.step()
                    self.records.append(record)
                    for listener in self.on_step:
                        listener(record)
        finally:
            self._reset()
        return [
            Completion(
                token_ids=s.token_ids,
                logprobs=s.logprobs,
                entropies=s.entropies,
                finish_reason=s.finish_reason or "length",
            )
            for s in sequences
        ]

    @property
    def plan_name(self) -> str:
        return self.planner.name if self.planner else str(self._speculation)

    def step(self) -> StepRecord:
        """Advance every running sequence by at least one token; call inside `target.rollout_mode`."""
        started = time.perf_counter()
        attempt = self._attempt_until_it_fits()
        admitted = self.admission.take_admitted()
        plan, outcome = attempt.plan, attempt.outcome
        num_seqs, cache_bytes = len(self.scheduler.running), self.cache.used_bytes
        num_emitted = self._commit(attempt)
        if self._judge is not None and not plan.is_plain:
            self._judge(attempt.draft, attempt.verdict)
        self._retire()
        finished = time.perf_counter()
        record = StepRecord(
            num_seqs=num_seqs,
            num_waiting=len(self.scheduler.waiting),
            plan=plan,
            num_tokens=len(attempt.batch.token_ids),
            num_emitted=num_emitted,
            num_read=attempt.inputs.num_read,
            num_prefilled=admitted.num_prefilled,
            offered=outcome.offered,
            hits=outcome.hits,
            prefill_s=attempt.prefilled - started,
            draft_s=attempt.drafted - attempt.prefilled,
            target_s=attempt.forwarded - attempt.drafted,
            verify_s=finished - attempt.forwarded,
            step_s=finished - started,
            num_unread=attempt.inputs.num_unread,
            num_promised=outcome.num_promised,
            num_preempted=admitted.num_preempted,
            cache_bytes=cache_bytes,
            plan_s=self._planning.take_s(),
        )
        with self._planning:
            self._ensure_planner().observe(record)
        return record

    def check(self) -> None:
        """Assert the conservation laws of scheduler and cache."""
        self.scheduler.check()
        self.cache.check([sequence.num_cached for sequence in self.scheduler.running])

    # -- the rooms behind `step` ---------------------------------------------------------------------

    def _attempt_until_it_fits(self) -> _Attempt:
        """Where memory runs out, once more without a draft, and with ever fewer sequences."""
        is_plain = False
        while True:
            try:
                return self._attempt(is_plain)
            except (MemoryError, OSError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(self.scheduler.running) > 1 or is_plain:
                    self.admission.shrink(error)
                is_plain = True

    def _attempt(self, is_plain: bool) -> _Attempt:
        """Schedule, plan, propose, forward, verify."""
        self.admission.admit()
        prefilled = time.perf_counter()
        context = self._build_context()
        inputs = self._build_plan_inputs(sum(self.cache.lengths))
        plan = PLAIN if is_plain else self._choose_plan(inputs)
        pool = Draft.roots(context.pending_token_ids) if plan.is_plain else self.drafter.propose(context, plan)
        draft = self._spend_budget(pool, plan, inputs)
        drafted = time.perf_counter()
        batch = self._layout(draft, plan.depth)
        output, logits = self.target.decode(batch, self.cache)
        forwarded = time.perf_counter()
        verdict = verify(logits, draft, batch.row_starts, context.sampling, self._vocabulary, plan.depth)
        return _Attempt(
            inputs=inputs,
            plan=plan,
            pool=pool,
            draft=draft,
            batch=batch,
            output=output,
            verdict=verdict,
            outcome=read_outcome(verdict, draft, pool),
            prefilled=prefilled,
            drafted=drafted,
            forwarded=forwarded,
        )

    def _choose_plan(self, inputs: PlanInputs) -> SpeculationPlan:
        """The planner's, or plain decoding where the cache has no room for its nodes."""
        planner = self._ensure_planner()
        with self._planning:
            plan = planner.plan(inputs)
        return plan if plan.is_plain or self.admission.fits(1 + plan.tree_size) else PLAIN

    def _build_context(self) -> DraftContext:
        running = self.scheduler.running
        device = self.target.device
        return DraftContext(
            sequences=running,
            sampling=SamplingBatch.build(running, device),
            pending_token_ids=upload([s.pending_token_id for s in running], device),
            cache=self.cache,
        )

    def _build_plan_inputs(self, num_read: int) -> PlanInputs:
        return PlanInputs(
            num_seqs=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_read=num_read,
            num_unread=self.drafter.count_unread(self.cache.lengths),
        )

    def _spend_budget(self, pool: Draft, plan: SpeculationPlan, inputs: PlanInputs) -> Draft:
        """What is verified: every node of the pool, or the likeliest ones over all sequences."""
        if plan.most_draft_tokens is None or pool.scores is None:
            return pool
        chances = pool.scores[:, 1:].exp()
        values, places, num_nodes = download(*chances.flatten().sort(descending=True), pool.num_nodes)
        planner = self._ensure_planner()
        with self._planning:
            budget = planner.choose_budget(plan, inputs, values[: int(num_nodes.sum()) - len(num_nodes)])
        rows = places[:budget] // max(chances.shape[1], 1)
        return pool.keep((1 + np.bincount(rows, minlength=len(num_nodes))).tolist())

    def _layout(self, draft: Draft, depth: int) -> ForwardBatch:
        """Room for the draft's nodes, of `depth` levels at most, behind every running row."""
        for row, length in enumerate(self.cache.lengths):
            self.cache.reserve(row, length + draft.token_ids.shape[1])
        return ForwardBatch.build(
            token_ids=draft.token_ids,
            num_nodes=draft.num_nodes,
            visible=compute_ancestors(draft.parents, depth),
            blocks=self.cache.blocks,
            lengths=upload(self.cache.lengths, self.target.device),
            dtype=self.target.dtype,
            num_repeats=self.target.num_repeats,
            counts=draft.counts,
        )

    def _commit(self, attempt: _Attempt) -> int:
        """Keep the walked paths: cache, features, tokens. Returns the number of tokens emitted."""
        running, outcome, features = self.scheduler.running, attempt.outcome, attempt.output.features
        counts = [count + 1 for count in outcome.num_accepted]
        self._check_finite(outcome.logprobs)
        if features is not None:
            self._write_features(attempt.verdict, counts, features, attempt.batch)
        self.cache.commit(attempt.verdict.path, counts)
        num_emitted = 0
        for slot, (sequence, count) in enumerate(zip(running, counts, strict=True)):
            logprobs, entropies = outcome.logprobs[slot][:count], outcome.entropies[slot][:count]
            kept = sequence.append(outcome.token_ids[slot][:count], logprobs, entropies)
            self.cache.truncate(slot, sequence.num_cached)
            self.drafter.observe(sequence, kept)
            num_emitted += kept
        return num_emitted

    def _write_features(
        self, verdict: Verdict, counts: list[int], features: Float[Tensor, "T W"], batch: ForwardBatch
    ) -> None:
        store = self.cache.features
        assert store is not None
        rows, depth = upload(list_walked(counts), features.device)
        index = self.cache.locate(rows, upload(self.cache.lengths, features.device)[rows] + depth)
        store.write(0, index, features[batch.row_starts[rows] + verdict.path[rows, depth]])

    def _check_finite(self, logprobs: list[list[float]]) -> None:
        bad = ((row, depth) for row, each in enumerate(logprobs) for depth, value in enumerate(each) if isnan(value))
        row, depth = next(bad, (None, 0))
        if row is None:
            return
        sequence = self.scheduler.running[row]
        raise FloatingPointError(
            f"the model's logits are not finite at request {sequence.request_id}, completion position "
            f"{len(sequence.token_ids) + depth}; the weights have probably diverged: lower the learning rate and "
            "resume from the last checkpoint"
        )

    def _retire(self) -> None:
        """Hand out finished sequences and close their slots, highest first, so that each moves at most one row."""
        running = self.scheduler.running
        for slot in reversed([i for i, sequence in enumerate(running) if sequence.finish_reason]):
            sequence = running[slot]
            if self.on_finish:
                rollout = self._build_rollout(slot, sequence)
                for listener in self.on_finish:
                    listener(rollout)
            self.prefiller.keep(slot, sequence)
            self.drafter.release(slot, len(running) - 1)
            self.cache.remove_row(slot)
            self.scheduler.remove(slot)

    def _build_rollout(self, slot: int, sequence: Sequence) -> FinishedRollout:
        return FinishedRollout(
            prompt_ids=sequence.prompt_ids,
            token_ids=sequence.token_ids,
            temperature=sequence.params.temperature,
            features=self.cache.read_features(slot),
            request_id=sequence.request_id,
        )

    # -- requests ------------------------------------------------------------------------------------

    def _build_sequences(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Sequence]:
        if isinstance(params, SamplingParams):
            params = [replace(params, stream=params.stream + i) for i in range(len(prompts))]
        if any(isinstance(prompt, int) for prompt in prompts):
            raise ValueError("prompt_token_ids must be a list of prompts, got one prompt; wrap it in a list")
        if len(params) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts but {len(params)} SamplingParams; give one, or one for each")
        sequences = []
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            ids = check_prompt(prompt, index, self.target.vocab_size, self.target.max_position)
            sequences.append(
                Sequence(
                    request_id=index,
                    prompt_ids=ids,
                    params=param,
                    max_tokens=min(param.max_tokens, self.target.max_position - len(ids)),
                    stream_key=stream_key(param.seed, param.stream),
                )
            )
        return sequences

    def _ensure_planner(self) -> Planner:
        """The planner, its costs looked up or measured at first use."""
        if self.planner is None:
            started = time.perf_counter()
            self.planner = build_planner(
                self._speculation,
                fixed=self._fixed_plan,
                measure=lambda: self._profile or find_profile(self.target, self.drafter),
            )
            self.profile_s = time.perf_counter() - started
        return self.planner

    def restore_planner(self, name: str, state: Mapping[str, Any]) -> None:
        """Go on with a saved planner's measurements; one of another kind is left out."""
        if name == self._speculation:
            self.planner = restore_planner(name, state) or self.planner

    def _check_speculation(self) -> None:
        if self._speculation not in MEASURED:
            self.planner = build_planner(self._speculation, fixed=self._fixed_plan, measure=_no_measure)

    def _reset(self) -> None:
        """Leave nothing behind, whether the rollout ended or broke off."""
        self.scheduler.abort()
        self.cache.clear()
        self.prefiller.clear()
        self._planning.take_s()


def _no_measure() -> Any:
    raise AssertionError("this planner needs no measurement")


def check_prompt(prompt: Iterable[int], index: int, vocab_size: int, max_position: int) -> list[int]:
    """The prompt as a list of ints.

    Raises:
        ValueError: it is empty, leaves no room for a token, or has an id outside the vocabulary.
    """
    ids = [int(token_id) for token_id in prompt]
    if not ids:
        raise ValueError(f"prompt {index} is empty; give at least one token, e.g. the tokenizer's BOS")
    if len(ids) >= max_position:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens and the model's context ends at {max_position}: no token can be "
            "generated; shorten the prompt"
        )
    bad = next((i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size), None)
    if bad is not None:
        raise ValueError(f"prompt {index} has token id {ids[bad]} at position {bad}, outside 0..{vocab_size - 1}")
    return ids
