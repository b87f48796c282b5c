"""Rewards while decoding: functions declared `per_completion` are called as completions finish.

TRL's own `_calculate_rewards` stays in charge. When it runs, functions that were streamed are stood in for by ones that
return what was collected; batch-level functions, reward models, the conversion of None and the gathering are its own.
What a streamed call was given is compared with what TRL hands over at the end; where they differ, or where a completion
was not streamed, the function is called again, so that a reward is always that of TRL's own input.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational
from trl.trainer.utils import is_async_callable

from fastgrpo.engine import FinishedRollout
from fastgrpo.grpo.reward_calls import RewardCall, RewardCalls, find_failure
from fastgrpo.rewards import is_per_completion
from fastgrpo.types import STREAMED_REWARD

logger = logging.getLogger(__name__)

_OWN_KEYS = ("prompt", "completion", "completion_ids")  # which TRL hands over by themselves


class RewardStream:
    """Calls a trainer's per-completion rewards during its rollouts.

    Args:
        trainer: a `FastGRPOTrainer`, built but for this.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        obstacle = find_streaming_obstacle(trainer) if trainer.args.stream_rewards else None
        if obstacle is not None:
            logger.warning("stream_rewards stays off: %s", obstacle)
        self.is_on = trainer.args.stream_rewards and obstacle is None
        self._inputs: list[dict[str, Any]] | None = None  # of the rollout that runs now
        self._pool: RewardCalls | None = None
        self._calls: dict[tuple[int, int], RewardCall] = {}  # by function and completion
        self.finished: list[RewardCall] = []  # those of the last rollout

    @contextlib.contextmanager
    def follow(self, inputs: list[dict[str, Any]]) -> Iterator[None]:
        """Stream the rewards of the rollout within; whatever happens, no call is left running for it."""
        if not self.is_on:
            yield
            return
        args = self._trainer.args
        loop = getattr(self._trainer, "async_loop", None)
        self._pool = RewardCalls(most=args.max_reward_calls, timeout_s=args.reward_timeout_s, loop=loop)
        self._inputs = inputs
        try:
            yield
        finally:
            self._pool.cancel()
            self._calls, self._inputs, self._pool = {}, None, None

    def observe(self, rollout: FinishedRollout) -> None:
        """Begin the calls for a finished completion; an engine's `on_finish` listener."""
        index = rollout.request_id
        if self._inputs is None or index is None or index >= len(self._inputs):
            return
        prompt = self._inputs[index]["prompt"]
        completion = decode_completion(self._trainer, prompt, rollout.prompt_ids, rollout.token_ids)
        for place in self._find_streamed():
            self._start(place, self._inputs, index, prompt, completion, rollout.token_ids)

    def complete(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], token_ids: list[list[int]]
    ) -> bool:
        """Begin what TRL's input needs and was not streamed; returns whether calls are still running."""
        if self._pool is None:
            return False
        for place in self._find_streamed():
            for index, given in enumerate(zip(prompts, completions, token_ids, strict=True)):
                call = self._calls.get((place, index))
                if call is None or not _is_given(call, *given) or self._inputs is not inputs:
                    self._start(place, inputs, index, *given)
        return self.is_waiting()

    def is_waiting(self) -> bool:
        """Whether calls are still running."""
        return self._pool is not None and not self._pool.is_idle

    @contextlib.contextmanager
    def collect(self, note: Callable[[str, float, float], None]) -> Iterator[None]:
        """Wait for the calls; within, the trainer's streamed functions return what they gave.

        Args:
            note: told when each call began and ended, see `StepClock.note`.
        """
        if self._pool is None:
            yield
            return
        self._pool.wait()
        self.finished = list(self._calls.values())
        for call in self.finished:
            if call.started_s is not None and call.ended_s is not None:
                note(STREAMED_REWARD, call.started_s, call.ended_s)
        functions = self._trainer.reward_funcs
        stand_ins = {place: self._build_stand_in(place) for place in self._find_streamed()}
        self._trainer.reward_funcs = [stand_ins.get(place, each) for place, each in enumerate(functions)]
        try:
            yield
        finally:
            self._trainer.reward_funcs = functions

    def _find_streamed(self) -> list[int]:
        return [place for place, each in enumerate(self._trainer.reward_funcs) if is_per_completion(each)]

    def _start(
        self,
        place: int,
        inputs: list[dict[str, Any]],
        index: int,
        prompt: Any,
        completion: Any,
        token_ids: list[int],
    ) -> None:
        assert self._pool is not None
        call = RewardCall(
            function=self._trainer.reward_funcs[place],
            name=self._trainer.reward_func_names[place],
            index=index,
            prompt=prompt,
            completion=completion,
            completion_ids=token_ids,
            columns={key: inputs[index][key] for key in inputs[0] if key not in _OWN_KEYS},
            trainer_state=self._trainer.state,
        )
        self._calls[place, index] = call
        self._pool.start(call)

    def _build_stand_in(self, place: int) -> Callable[..., Any]:
        """A reward function that returns what was collected; async where the one it stands for is."""
        own = sorted((index, call) for (at, index), call in self._calls.items() if at == place)
        calls = [call for _, call in own]

        def replay(log_extra: Any, log_metric: Any, **_: Any) -> list[Any]:
            for call in calls:
                for column, values in call.extras:
                    log_extra(column, values)
                for name, value in call.metrics:
                    log_metric(name, value)
            error = find_failure(calls)
            if error is not None:
                raise error
            return [reward for call in calls for reward in call.rewards.result()]

        async def replay_later(**given: Any) -> list[Any]:
            return replay(**given)

        return replay_later if is_async_callable(self._trainer.reward_funcs[place]) else replay


def find_streaming_obstacle(trainer: Any) -> str | None:
    """Why rewards cannot be streamed; None if they can."""
    obstacles = {
        "with tools a completion goes on after its calls": bool(trainer.tools),
        "environments are scored when all of them have ended": trainer.environment_factories is not None,
        "rollout_func says what the completions are": trainer.rollout_func is not None,
        "no reward function is declared per_completion (decorate it: @fastgrpo.per_completion)": not any(
            is_per_completion(each) for each in trainer.reward_funcs
        ),
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


def decode_completion(trainer: Any, prompt: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Any:
    """A completion as TRL's `_generate` makes it of its tokens: text, or a message where the prompt is a chat."""
    if not is_conversational({"prompt": prompt}):
        return trainer.processing_class.batch_decode([token_ids], skip_special_tokens=True)[0]
    tokenizer = trainer._tokenizer
    if any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
        return [parse_response(tokenizer, token_ids, prefix=prompt_ids, tools=trainer.tools)]
    content = trainer.processing_class.batch_decode([token_ids], skip_special_tokens=True)[0]
    return [{"role": "assistant", "content": content}]


def _is_given(call: RewardCall, prompt: Any, completion: Any, token_ids: list[int]) -> bool:
    return bool(call.completion_ids == token_ids and call.completion == completion and call.prompt == prompt)
