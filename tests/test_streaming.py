"""Rewards while decoding are those of the plain call: values, order, logs, errors; and nothing runs on behind them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo import FastGRPOTrainer, per_completion
from fastgrpo.grpo.streaming import decode_completion
from fastgrpo.rewards import is_per_completion
from fastgrpo.types import PHASES, STREAMED_REWARD, StepRecord
from test_trainer import assert_same_weights, build_trainer, weights_of

Reward = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while find_reward_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not find_reward_threads()


def find_reward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastgrpo-reward"]


def read_text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def score(prompt: Any, completion: Any, ids: list[int], column: int) -> float | None:
    """Depends on all that a reward is given; None for some."""
    total = len(str(prompt)) + sum(map(ord, read_text(completion))) + sum(ids) + 7 * column
    return None if total % 4 == 0 else float(total % 11)


def build_judge(*, is_async: bool, slow_s: float = 0.0, seen: list[Any] | None = None) -> Reward:
    """A reward that says what it was given, logs, and takes the longer the earlier its completion stands."""

    def judge(prompts: list, completions: list, completion_ids: list, number: list, **given: Any) -> list[float | None]:
        rewards = [score(*each) for each in zip(prompts, completions, completion_ids, number, strict=True)]
        given["log_extra"]("text", [read_text(completion) for completion in completions])
        given["log_metric"]("judge/length", sum(map(len, completion_ids)) / len(completion_ids))
        if seen is not None:
            step = given["trainer_state"].global_step
            seen.extend((step, p, c, tuple(i)) for p, c, i in zip(prompts, completions, completion_ids, strict=True))
        return rewards

    async def judge_later(**given: Any) -> list[float | None]:
        await asyncio.sleep(slow_s)
        return judge(**given)

    def judge_slowly(**given: Any) -> list[float | None]:
        time.sleep(slow_s)
        return judge(**given)

    return per_completion(judge_later if is_async else judge_slowly)


def length_reward(completions: list, **_: Any) -> list[float]:
    """Of the whole batch: how long a completion is beside the longest."""
    most = max(len(read_text(completion)) for completion in completions)
    return [len(read_text(completion)) / max(most, 1) for completion in completions]


def build(folder: Path, reward: Any, *, stream: bool = True, **keys: Any) -> FastGRPOTrainer:
    trainer = build_trainer(folder, reward=reward, stream_rewards=stream, **keys)
    trainer.train_dataset = trainer.train_dataset.add_column("number", list(range(len(trainer.train_dataset))))
    return trainer


def record_rewards(trainer: FastGRPOTrainer) -> list[torch.Tensor]:
    """The rewards of each rollout, as TRL's own `_calculate_rewards` returns them."""
    kept: list[torch.Tensor] = []
    calculate = trainer._calculate_rewards

    def keep(*args: Any) -> torch.Tensor:
        kept.append(calculate(*args))
        return kept[-1]

    trainer._calculate_rewards = keep
    return kept


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("keys", [{}, {"chat": False, "max_num_seqs": 3}])
def test_streamed_rewards_are_the_plain_ones(tmp_path: Path, is_async: bool, keys: dict[str, Any]) -> None:
    rewards, ends, logs, calls = [], [], [], []
    for stream in (False, True):
        seen: list[Any] = []
        functions = [length_reward, build_judge(is_async=is_async, slow_s=0.001, seen=seen)]
        trainer = build(tmp_path / str(stream), functions, stream=stream, max_steps=3, **keys)
        rewards.append(record_rewards(trainer))
        trainer.train()
        ends.append(weights_of(trainer))
        logs.append({name: list(trainer._logs["extra"][name]) for name in ("text",)} | dict(trainer._logs["rewards"]))
        calls.append(seen)
        assert any(row.get("judge/length") for row in trainer.state.log_history)
        assert len(trainer.reward_stream.finished) == (8 if stream else 0)
        assert trainer.reward_funcs == functions
    assert len(rewards[0]) == 3
    for plain, streamed in zip(*rewards, strict=True):
        assert torch.equal(plain.isnan(), streamed.isnan()) and torch.equal(plain.nan_to_num(), streamed.nan_to_num())
    everything = torch.cat(rewards[0])
    assert everything.isnan().any() and all(everything[:, place].unique().numel() > 1 for place in (0, 1))
    assert sorted(calls[0], key=str) == sorted(calls[1], key=str), (
        "each completion was judged once, with the same words"
    )
    assert {name: list(map(str, each)) for name, each in logs[0].items()} == {
        name: list(map(str, each)) for name, each in logs[1].items()
    }
    assert_same_weights(*ends)


def test_rewards_are_asked_for_while_others_decode(tmp_path: Path) -> None:
    sizes: list[int] = []

    @per_completion
    def judge(completions: list, **_: Any) -> list[float]:
        sizes.append(len(completions))
        return [1.0]

    trainer = build(tmp_path, [judge, length_reward], max_steps=1, max_num_seqs=2)
    early: list[int] = []

    def look(record: StepRecord) -> None:
        time.sleep(0.01)
        if record.num_waiting:
            early.append(len(sizes))

    trainer.engine.on_step.append(look)
    trainer.train()
    assert sizes == [1] * 8
    assert max(early) > 0, "some were judged before others had begun"


def test_calls_keep_to_their_bound(tmp_path: Path) -> None:
    for is_async in (False, True):
        running, most, lock = [0], [0], threading.Lock()

        def enter(by: int, running: list[int] = running, most: list[int] = most, lock: Any = lock) -> None:
            with lock:
                running[0] += by
                most[0] = max(most[0], running[0])

        def judge(enter: Reward = enter, **_: Any) -> list[float]:
            enter(1)
            time.sleep(0.1)
            enter(-1)
            return [1.0]

        async def judge_later(enter: Reward = enter, **_: Any) -> list[float]:
            enter(1)
            await asyncio.sleep(0.1)
            enter(-1)
            return [1.0]

        reward = per_completion(judge_later if is_async else judge)
        build(tmp_path / str(is_async), reward, max_steps=1, max_reward_calls=3).train()
        assert most == [3]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_is_the_one_of_the_plain_call(tmp_path: Path, is_async: bool) -> None:
    raised = []
    for stream in (False, True):
        done: list[str] = []

        def judge(completions: list, done: list[str] = done, **_: Any) -> list[float]:
            rewards = []
            for completion in completions:
                text = read_text(completion)
                if len(text.split()) % 2:
                    raise LookupError(f"cannot judge {text}")
                time.sleep(0.02)
                rewards.append(1.0)
                done.append(text)
            return rewards

        async def judge_later(judge: Reward = judge, **given: Any) -> list[float]:
            return judge(**given)

        trainer = build(tmp_path / str(stream), per_completion(judge_later if is_async else judge), stream=stream)
        texts: list[str] = []
        trainer.engine.on_finish.append(
            lambda rollout, texts=texts, own=trainer: texts.append(
                read_text(decode_completion(own, [{"role": "user", "content": ""}], [], rollout.token_ids))
            )
        )
        with pytest.raises(LookupError) as caught:
            trainer.train()
        raised.append((type(caught.value), caught.value.args))
        if stream:
            assert sorted(done) == sorted(text for text in texts if len(text.split()) % 2 == 0) != []
            assert trainer.reward_func_names[0] in caught.value.__notes__[0]
    assert raised[0] == raised[1]


def test_a_wrong_number_of_rewards_is_named(tmp_path: Path) -> None:
    @per_completion
    def judge(**_: Any) -> list[float]:
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="'judge' returned 2 rewards for completion 0 alone"):
        build(tmp_path, judge).train()


@pytest.mark.parametrize("kind", ["sync", "async", "stubborn"])
def test_a_reward_that_hangs_is_timed_out_by_name(tmp_path: Path, kind: str) -> None:
    release, count = threading.Event(), [0]

    def judge(**_: Any) -> list[float]:
        count[0] += 1
        if count[0] in (2, 3):
            release.wait(30)
        return [1.0]

    async def judge_later(**_: Any) -> list[float]:
        count[0] += 1
        if count[0] in (2, 3):
            await asyncio.sleep(30)
        return [1.0]

    async def judge_on(**_: Any) -> list[float]:
        """Will not be cancelled."""
        own = count[0] = count[0] + 1
        while own in (2, 3) and not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
        return [1.0]

    reward = per_completion({"sync": judge, "async": judge_later, "stubborn": judge_on}[kind])
    trainer = build(tmp_path, reward, reward_timeout_s=0.3, max_reward_calls=2)
    with pytest.raises(TimeoutError, match=r"function 'judge.*' gave no reward for completion \d within 0.3 s \(\["):
        trainer.train()
    assert count[0] == 8, "two that hang do not keep the others from their turn"
    release.set()


def test_an_async_reward_that_blocks_its_loop_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo.grpo.reward_calls._LOOP_ANSWERS_S", 0.1)
    release = threading.Event()

    @per_completion
    async def judge(**_: Any) -> list[float]:
        release.wait(30)
        return [1.0]

    with pytest.raises(TimeoutError, match="'judge' gave no reward") as caught:
        build(tmp_path, judge, reward_timeout_s=0.2).train()
    assert "blocks its event loop" in caught.value.__notes__[0]
    release.set()


def test_an_interrupt_leaves_no_call_waiting(tmp_path: Path) -> None:
    release, count = threading.Event(), [0]

    @per_completion
    def judge(**_: Any) -> list[float]:
        count[0] += 1
        release.wait(30)
        return [1.0]

    trainer = build(tmp_path, judge, max_reward_calls=1, max_num_seqs=2)

    def interrupt(record: StepRecord) -> None:
        if not record.num_waiting:
            raise KeyboardInterrupt

    trainer.engine.on_step.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (thread,) = find_reward_threads()
    assert thread.daemon, "the program can end all the same"
    release.set()
    thread.join(5)
    assert count[0] == 1 and not find_reward_threads(), "those that waited for their turn never had it"
    trainer.engine.on_step.remove(interrupt)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("drafter", ["eagle", "block"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reward_may_change_the_tokens_it_is_given(tmp_path: Path, stream: bool, drafter: str) -> None:
    """As TRL trains on, and a head learns from, what was drawn."""

    @per_completion
    def strip(completion_ids: list[list[int]], **_: object) -> list[float]:
        scores = [float(sum(ids) % 5) for ids in completion_ids]
        for ids in completion_ids:
            ids.clear()
        return scores

    trainer = build(tmp_path, strip, stream=stream, drafter=drafter, max_steps=2)
    trainer.train()
    rows = trainer.state.log_history
    assert rows[0]["completions/mean_length"] > 1 and rows[0]["draft/num_tokens"] > 0
    assert all(math.isfinite(row["loss"]) for row in rows[:2])
    assert len(trainer.reward_stream.finished) == (8 if stream else 0)


def test_completions_changed_behind_the_engine_are_judged_anew(tmp_path: Path) -> None:
    """What TRL hands over at the end decides, not what was streamed."""
    seen: list[Any] = []
    trainer = build(tmp_path, build_judge(is_async=False, seen=seen), max_steps=1)
    generate = trainer.engine.generate

    def cut_the_first(*args: Any) -> list[Any]:
        first, *others = generate(*args)
        return [dataclasses.replace(first, token_ids=first.token_ids[:2]), *others]

    trainer.engine.generate = cut_the_first
    rewards = record_rewards(trainer)
    trainer.train()
    assert len(seen) == 9
    cut = next(call for call in trainer.reward_stream.finished if call.index == 0)
    assert len(cut.completion_ids) == 2
    assert tuple(cut.completion_ids) in [ids for _, _, _, ids, *_ in seen], "streamed ones may end behind it"
    expected = score(cut.prompt, cut.completion, cut.completion_ids, cut.columns["number"])
    assert rewards[0][0, 0].nan_to_num(-1) == (-1 if expected is None else expected)


def test_evaluation_is_streamed_too(tmp_path: Path) -> None:
    keys = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    metrics = []
    for stream in (False, True):
        reward = per_completion(lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids])
        trainer = build_trainer(tmp_path / str(stream), reward=reward, stream_rewards=stream, **keys)
        trainer.train()
        metrics.append([row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row])
    assert metrics[0] == metrics[1] != []


def test_the_clock_sees_every_phase_and_what_runs_beneath(tmp_path: Path) -> None:
    trainer = build(tmp_path, build_judge(is_async=False, slow_s=0.05), max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.timeline is not None
    spans = trainer.timeline.spans
    counts = {name: sum(span.name == name for span in spans) for name in (*PHASES, STREAMED_REWARD)}
    assert counts["forward"] == counts["backward"] == 2 and counts["rollout"] == 1 and counts[STREAMED_REWARD] == 16
    assert counts["draft learning"] == 1 and counts["optimiser"] == 2, "clipping and the step"
    phases = sorted((span.start_s, span.end_s) for span in spans if span.name in PHASES)
    assert all(start <= end for start, end in phases)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(phases))
    assert phases[0][0] >= 0 and phases[-1][1] <= trainer.timeline.step_s
    (rollout,) = (span for span in spans if span.name == "rollout")
    assert all(span.start_s >= rollout.start_s for span in spans if span.name == STREAMED_REWARD)


def test_it_stays_off_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, length_reward, max_steps=1)
    assert not trainer.reward_stream.is_on
    assert "stream_rewards stays off: no reward function is declared per_completion" in caplog.text
    trainer.train()
    for keys, message in (({"max_reward_calls": 0}, "max_reward_calls"), ({"reward_timeout_s": 0}, "reward_timeout_s")):
        with pytest.raises(ValueError, match=message):
            build_trainer(tmp_path, **keys)


def test_what_declares_itself() -> None:
    class Judge:
        @per_completion
        def __call__(self, **_: Any) -> list[float]:
            return [1.0]

        def score(self, **_: Any) -> list[float]:
            return [1.0]

    assert is_per_completion(Judge()) and is_per_completion(functools.partial(build_judge(is_async=False), a=1))
    assert not is_per_completion(length_reward) and not is_per_completion(Judge().score)
    with pytest.raises(TypeError, match="takes no declaration"):
        per_completion(Judge().score)
