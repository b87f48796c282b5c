"""The engine: schedule, plan, propose, forward, verify. One path; plain decoding has no draft."""

from __future__ import annotations

import atexit
import contextlib
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastgrpo.admission import Admission
from fastgrpo.attempt import Attempt
from fastgrpo.drafters import Drafter, build_drafter, find_own_target
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.none import NoDrafter
from fastgrpo.kernels import gpu
from fastgrpo.memory import describe_bytes, describe_error, find_available_bytes, is_out_of_memory
from fastgrpo.model import TargetModel, host_by_default
from fastgrpo.planner import HardwareProfile, PlanInputs, Planner
from fastgrpo.planning import Planning
from fastgrpo.prefill import Prefiller
from fastgrpo.requests import build_completion, build_sequences, check_sequences
from fastgrpo.sampling import SamplingRows
from fastgrpo.scheduler import Scheduler
from fastgrpo.target_step import TargetStep
from fastgrpo.timing import DeviceClock
from fastgrpo.tree import Draft
from fastgrpo.types import PLAIN, Completion, SamplingParams, Sequence, SpeculationPlan, StepRecord
from fastgrpo.verify import Verdict

Result = TypeVar("Result")

_MOMENTS = 64  # kept by the clock: a step reads four, and each failed attempt before it leaves up to three
DEFAULT_FIXED_PLAN = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)


@dataclass(frozen=True, kw_only=True)
class FinishedRollout:
    """One finished sequence, as a learner takes it.

    `features[i]` belongs to token i of prompt + completion; the last token has none. `features` is None where the
    drafter wants none, or where there was no memory for a copy. `request_id` is the index of its prompt in the call of
    `Engine.generate`; None for a rollout that comes from elsewhere, such as a file.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    temperature: float
    features: Float[Tensor, "T W"] | None
    request_id: int | None = None


class Engine:
    """Exact speculative generation with a transformers causal LM, which is left as it was found.

    Args:
        model: a causal LM or a PEFT model of one. Llama, Qwen2, Qwen3 and Mistral run through fastgrpo's kernels; the
            other `families.SUPPORTED_FAMILIES` and models with sliding windows through transformers' modules.
        drafter: "eagle" (the head shipped for the model, if there is one), "eagle-new" (never the shipped one),
            "block" (a head that drafts in one pass), "ngram", "auto" (eagle and ngram, whichever pays), "none", a
            folder with a saved head or with a small causal LM of the same tokenizer, or a `Drafter`.
        speculation: "auto", "paper", "paper-own", "bandit", "fixed", "off", or a `SpeculationPlan` used at every step.
        max_num_seqs: sequences decoded together; the others wait, those expected to be longest at the front.
        fixed_plan: the plan that `speculation="fixed"` uses.
        compute_dtype: run under autocast in this type; None computes in the model's own.
        tokenizer: the model's, compared with that of a drafter from a folder; None looks where the model came from.
        profile: what forwards and drafts cost: a profile, or a file that `fastgrpo profile` wrote. None takes the
            cached profile of this machine, model and drafter (see `profile_files`), or measures one at first use.
        max_cache_bytes: limit for keys, values, features and the drafter's own rows together. Where it is reached, the
            youngest sequences wait and are computed anew. None takes most of what is free when a rollout starts.

    Attributes:
        records: the facts of each step of the current or last rollout.
        on_step, on_finish: functions called with each step's record, and with each finished sequence.
        is_alone: set to False while other work runs beside the steps: the planner then ignores their times.

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
        target = TargetModel(model, compute_dtype=compute_dtype, tokenizer=tokenizer)
        with torch.inference_mode(False), host_by_default():  # its weights are written to in every rollout, and trained
            self.drafter = build_drafter(drafter, target)
        self.target = find_own_target(self.drafter, target)
        self.planning = Planning(
            speculation, fixed=fixed_plan, profile=profile, target=self.target, drafter=self.drafter
        )
        if speculation == "off" and isinstance(drafter, str | Path):
            self.drafter = NoDrafter()  # a named drafter is checked all the same, but keeps no features
        if self.drafter.name == "none":
            self.planning.turn_off()
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
        self.records: list[StepRecord] = []
        self.is_alone = True
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.on_finish: list[Callable[[FinishedRollout], None]] = []
        self._clock = DeviceClock(self.target.device, _MOMENTS)
        self._verify = TargetStep(self.target, self.cache, self._clock)
        self._rows = SamplingRows()
        self._rollout: object | None = None  # the one under way, which is reset once
        self._preparation = contextlib.ExitStack()  # of the model, for as long as that lasts
        self._is_busy = False  # a rollout begins, makes a step, or ends

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
            Completions in the order of the prompts; each depends on the model, its prompt and its params alone.

        Raises:
            ValueError: a prompt is empty, too long or has ids out of range, or does not fit the bound on memory with
                the tokens it may get; nothing has been generated.
            RuntimeError: the engine or the model cannot start a rollout now; see `roll_out`.
            MemoryError: memory ran out at the start, or with one sequence left running; names what to make smaller.
            FloatingPointError: the model's logits are not finite; names request and position.
        """
        sequences = self.take_requests(prompt_token_ids, params)
        for _ in self.roll_out(sequences):
            pass
        return [build_completion(sequence) for sequence in sequences]

    def take_requests(
        self,
        prompt_token_ids: list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[Sequence]:
        """Check what `generate` would be given and build its sequences for `roll_out`; arguments and errors as there.

        Raises:
            ValueError: a prompt is empty, too long or has ids out of range; names it.
        """
        return build_sequences(
            prompt_token_ids,
            SamplingParams() if params is None else params,
            vocab_size=self.target.vocab_size,
            max_position=self.target.max_position,
        )

    def roll_out(self, sequences: list[Sequence]) -> Generator[StepRecord]:
        """`generate` step by step: fills the sequences in place and yields each step's facts; errors as there.

        The model stays prepared for decoding until the generator is exhausted or closed; it may be closed early, from
        any thread, and what has not ended may be given to another rollout, which goes on with it. Once all sequences
        have ended, another rollout of this engine may begin before that, with the weights as they are then. Engines of
        one model may take turns: the model is as it was found once the last of them ends. Between steps, PyTorch's own
        state (gradients, autocast, device) is the caller's.

        Raises:
            ValueError: a sequence has ended already, or stands there twice.
            RuntimeError: this engine already has a rollout under way, or the model has one in another thread (both go
                on); or the model's type, device, vocabulary or layers have changed since the engine was built.
        """
        self._check_idle()
        check_sequences(sequences)
        self.records = []
        if not sequences:
            return
        self._end()  # a rollout whose sequences have ended, and nobody has closed it: weights may have changed since
        own, self._is_busy = object(), True
        self._rollout = own
        _ENGINES.add(self)
        try:
            with contextlib.ExitStack() as self._preparation:
                self._begin(sequences, self._preparation)
                while self._rollout is own and self.scheduler.has_work:
                    self._is_busy = True
                    with self.target.computing():
                        record = self.step()
                        self.records.append(record)
                        for listener in self.on_step:
                            listener(record)
                    self._is_busy = False
                    yield record
        finally:
            if self._rollout is own:
                self._reset()

    @property
    def planner(self) -> Planner | None:
        """Chooses each step's plan; None until what steps cost is known."""
        return self.planning.planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self.planning.planner = planner

    def step(self) -> StepRecord:
        """Advance every running sequence by at least one token; call inside `target.rollout_mode`."""
        started, started_at = self._clock.mark(), time.perf_counter()
        attempt = self._retry_without_kernels(lambda: self.admission.retry_until_it_fits(self._attempt))
        num_emitted = attempt.commit(self.scheduler.running, self.cache, self.drafter)
        self._retire()
        admitted, plan_s = self.admission.take_admitted(), self.planning.take_s()
        record = attempt.build_record(
            admitted, num_emitted=num_emitted, plan_s=plan_s, started=started, started_at=started_at
        )
        self.planning.observe(record if self.is_alone else replace(record, is_steady=False))
        return record

    def check(self) -> None:
        """Assert the conservation laws of scheduler and cache."""
        self.scheduler.check()
        self.cache.check([sequence.num_cached for sequence in self.scheduler.running])

    def _check_idle(self) -> None:
        if self._is_busy or self.scheduler.has_work:
            raise RuntimeError(
                "this engine is in the middle of a rollout: exhaust or close that one first, or build another engine "
                "of the same model, which may take turns with it"
            )

    def _begin(self, sequences: list[Sequence], rollout: contextlib.ExitStack) -> None:
        """Prepare the model for as long as `rollout` is open, and everything else for these sequences.

        Raises:
            MemoryError: there is no memory for it; names what to make smaller.
        """
        try:
            rollout.enter_context(self.target.prepared())
            with self.target.computing():
                self._retry_without_kernels(self.planning.begin)
                self.drafter.begin()
                self._verify.begin()
                self.admission.begin(sequences)
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"memory ran out before the first step ({describe_error(error)}): {self._describe_start()}"
            ) from error
        for sequence in sequences:
            self.scheduler.add(sequence)

    def _describe_start(self) -> str:
        """What a rollout needs before its first step, and what to make smaller."""
        available = find_available_bytes(self.target.device)
        free = "" if available is None else f"; {describe_bytes(available)} are free"
        profile = "" if self.planner else ", name a profile (costs are measured at first use)"
        most = describe_bytes(self.target.weight_bytes)
        return (
            f"a rollout copies the weights that it merges, casts or lays out, {most} "
            f"at most for each of these{free}. Use a smaller model or draft{profile}, or a machine with more memory"
        )

    def _retry_without_kernels(self, attempt: Callable[[], Result]) -> Result:
        """Call `attempt`, and again by PyTorch's operators if a GPU kernel cannot be compiled or launched.

        Args:
            attempt: must commit nothing where it fails.
        """
        try:
            return attempt()
        except Exception as error:
            if is_out_of_memory(error) or not gpu.comes_from_kernels(error):
                raise
            gpu.give_up(error)
        self.target.leave_kernels()
        self._verify.leave_kernels()
        self.drafter.begin()  # as if the rollout began with the running sequences
        for sequence in self.scheduler.running:
            self.drafter.observe(sequence, 0)
        return attempt()

    # -- parts of `step` -----------------------------------------------------------------------------

    def _attempt(self, is_plain: bool) -> Attempt:
        """Schedule, plan, propose, forward, verify."""
        self.admission.admit()
        scheduled = self._clock.mark()
        context = DraftContext(
            sequences=self.scheduler.running, cache=self.cache, device=self.target.device, rows=self._rows
        )
        inputs = self._build_inputs()
        plan = PLAIN if is_plain else self._plan(inputs)
        pool = None if plan.is_plain else self.drafter.propose(context, plan)
        draft = None if pool is None else self.planning.spend_budget(pool, plan, inputs)
        drafted = self._clock.mark()
        answer = self._verify(context, draft, pool, plan.depth)
        self._tell_drafter(draft, answer.verdict)
        return Attempt(
            inputs=inputs,
            plan=plan,
            outcome=answer.read(),
            num_tokens=answer.num_tokens,
            cache_bytes=self.cache.used_bytes,
            scheduled=scheduled,
            drafted=drafted,
            forwarded=answer.forwarded,
            is_steady=answer.was_replayed and (plan.is_plain or getattr(self.drafter, "was_replayed", True)),
            has_recorded=not answer.was_replayed
            or (not plan.is_plain and getattr(self.drafter, "has_recorded", False)),
        )

    def _build_inputs(self) -> PlanInputs:
        running = self.scheduler.running
        return PlanInputs(
            num_seqs=len(running),
            num_waiting=len(self.scheduler.waiting),
            num_read=sum(self.cache.lengths),
            num_unread=self.drafter.count_unread(running),
            max_draft_tokens=self.admission.count_room(),
        )

    def _plan(self, inputs: PlanInputs) -> SpeculationPlan:
        """The planner's plan, with no more nodes than the cache has room for."""
        plan = self.planning.plan(inputs).limit(inputs.max_draft_tokens)
        return plan if plan.is_plain or self.admission.fits(plan) else PLAIN

    def _tell_drafter(self, draft: Draft | None, verdict: Verdict) -> None:
        judge: Callable[[Draft, Verdict], None] | None = getattr(self.drafter, "judge", None)
        if judge is not None and draft is not None:
            judge(draft, verdict)

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
            token_ids=list(sequence.token_ids),  # the completion's own list may be changed by its owner
            temperature=sequence.params.temperature,
            features=self._read_features(slot),
            request_id=sequence.request_id,
        )

    def _read_features(self, slot: int) -> Float[Tensor, "T W"] | None:
        """A copy for the learner; None where features are not kept, or memory for the copy is lacking."""
        try:
            return self.cache.read_features(slot)
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _end(self) -> None:
        """End the rollout under way, if there is one, in the place of whoever was to close it."""
        if self._rollout is not None:
            self._reset()
            self._preparation.close()

    def _become_idle(self) -> None:
        self._rollout, self._is_busy = None, False

    def _reset(self) -> None:
        """Leave nothing behind, whether the rollout ended or broke off; the other parts, too, where one breaks off."""
        self._is_busy = True
        end: Callable[[], None] | None = getattr(self.drafter, "end", None)
        with contextlib.ExitStack() as parts:  # the last one first
            parts.callback(self._become_idle)
            for forget in (self.prefiller.clear, end, self._rows.forget, self._verify.end):
                if forget is not None:
                    parts.callback(forget)
            self.scheduler.abort()


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()  # that have begun a rollout


@atexit.register
def _end_rollouts() -> None:
    """Those that nobody has closed, before the process ends: PyTorch aborts where tensors are freed after that."""
    for engine in list(_ENGINES):
        if not engine._is_busy:  # else it is another thread's
            engine._end()
