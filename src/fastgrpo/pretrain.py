"""`fastgrpo draft train`: a draft head learns from the target's own answers, before any training run.

First the target answers prompts, then the head learns from the answers in random order, several times
over, with a learning rate that falls to nothing. Both parts are written down as they go, and a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from fastgrpo.answers import (
    Answer,
    AnswerFeatures,
    build_requests,
    compute_features,
    draw_answers,
    keep_answers,
    load_answers,
)
from fastgrpo.bench.measure import describe_run
from fastgrpo.disk import named_write_errors
from fastgrpo.drafters.acceptance_file import write_acceptance
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.drafters.head_files import find_head_folder
from fastgrpo.drafters.head_parts import choose_vocab_size
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.state import load_state, save_state
from fastgrpo.head_training import pack
from fastgrpo.learner import Learner
from fastgrpo.loading import open_model, quiet_libraries
from fastgrpo.model import TargetModel
from fastgrpo.objective import measure_head
from fastgrpo.options import DraftTrainOptions
from fastgrpo.planner import compute_expected_length
from fastgrpo.report import say, write_json
from fastgrpo.types import SpeculationPlan

_LEAST_RATE = 0.02  # of the peak learning rate, at the end
_SAVE_EVERY = 250  # updates
_HELD_OUT = 32  # answers kept back to measure acceptance on
_MIN_ANSWER = 4  # tokens; shorter answers teach nothing
_KINDS: dict[str, type[HeadDrafter[Any]]] = {"eagle": EagleDrafter, "block": BlockDrafter}
_SETTINGS = "settings.json"
_FREE = ("skip_broken",)  # settings that may change when a run goes on: without it, broken lines stop the run at once
_SHOWN_PLANS = (
    SpeculationPlan(depth=1, width=2, num_draft_tokens=2),
    SpeculationPlan(depth=3, width=1, num_draft_tokens=3),
    SpeculationPlan(depth=3, width=3, num_draft_tokens=8),
)


def run_draft_training(options: DraftTrainOptions, command: str) -> dict[str, Any]:
    """Train and save a head; returns what was measured on answers it did not learn from.

    Raises:
        ValueError: the model, a task, the prompts, the answers or the output folder cannot be used.
        FileNotFoundError: there are no answers where they were said to be.
    """
    console = Console()
    quiet_libraries()
    folder = options.output
    _check_folder(folder, options)
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    drafter, counts = _build_drafter(options, TargetModel(opened.model, tokenizer=opened.tokenizer))
    features, path = AnswerFeatures(options.feature_cache_gib), folder / "answers.jsonl"
    if options.answers is None:
        requests = build_requests(options, opened.tokenizer)
        _claim(folder, options)
        answers = draw_answers(options, opened, requests, drafter, path, features, console)
    else:
        answers = load_answers(options.answers, drafter.target)
        _claim(folder, options)
        keep_answers(options.answers, path)
    training = _Training(options, drafter, counts, answers, features)
    with named_write_errors(folder):
        result = training.run(folder, console)
    result |= describe_run(command, dataclasses.asdict(options)) | {
        "num_answers": len(answers),
        "num_tokens": sum(len(answer.token_ids) for answer in answers),
    }
    with named_write_errors(folder):
        training.drafter.save_head(folder / "head", compact=options.compact, counts=training.count_tokens())
    write_acceptance(folder / "head", result["acceptance"])
    write_json(result, folder / "result.json", indent=1)
    say(console, f"written: {folder / 'head'} (use it as drafter={folder / 'head'})")
    return result


def _check_folder(folder: Path, options: DraftTrainOptions) -> None:
    """Refuse a folder that this run could not go on with.

    Raises:
        ValueError: the folder is not empty and holds something else than a run with these settings, or damaged ones.
    """
    known = folder / _SETTINGS
    if known.exists():
        wanted = _list_settings(options)
        found = _list_settings(DraftTrainOptions()) | _read_settings(known)  # a run may be older than an option
        different = next((key for key in wanted if key not in _FREE and found[key] != wanted[key]), None)
        if different is not None:
            raise ValueError(
                f"{folder} holds a run with {different}={found[different]!r}, asked for "
                f"{wanted[different]!r}; choose another --output, or the same settings to go on"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no draft training; choose another --output")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --output") from error


def _claim(folder: Path, options: DraftTrainOptions) -> None:
    """Note the settings of a run that begins, once model and prompts are known to be there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _SETTINGS).exists():
        write_json(_list_settings(options), folder / _SETTINGS, indent=1)


def _list_settings(options: DraftTrainOptions) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return settings


class _Training:
    """The learner over all answers; features that are not kept are computed by the target when they are needed."""

    def __init__(
        self,
        options: DraftTrainOptions,
        drafter: HeadDrafter[Any],
        counted_before: Int[Tensor, " V"],
        answers: list[Answer],
        features: AnswerFeatures,
    ) -> None:
        self.options, self.drafter = options, drafter
        self._counted_before, self._features = counted_before, features
        self.learner = Learner(drafter, learning_rate=options.learning_rate, seed=options.seed)
        self.engine = Engine(drafter.target.model, drafter=drafter, speculation="off")  # what the state is saved with
        self._answers = answers
        kept = [number for number, answer in enumerate(answers) if len(answer.token_ids) >= _MIN_ANSWER]
        num_held_out = min(_HELD_OUT, len(kept) // 10)
        self.held_out, self.taught = kept[:num_held_out], kept[num_held_out:]  # by their numbers
        if not self.taught:
            raise ValueError(f"no answer has {_MIN_ANSWER} tokens to learn from; raise max_tokens, with another output")
        self._shown: list[FinishedRollout] = []  # those held out, once their features are there

    def run(self, folder: Path, console: Console) -> dict[str, Any]:
        """Learn, saving as it goes; returns the acceptance on what was kept back."""
        state = folder / "state"
        _restore(state)
        if state.is_dir():
            load_state(state, self.engine, self.learner)
        else:
            self._select_vocabulary()
        first, total = self.learner.num_updates, self.options.updates
        started = time.monotonic()
        with self.drafter.target.rollout_mode():
            kept_back = f"{len(self.held_out)} more" if self.held_out else "one of them, there being few,"
            say(
                console,
                f"{len(self.taught)} answers to learn from, {kept_back} to measure on; "
                f"before learning {_describe(self.measure())}",
            )
            batches = itertools.islice(self._batches(), first, None)
            for before, numbers in zip(range(first, total), batches, strict=False):
                self.learner.learning_rate = self.options.learning_rate * _anneal(before / total)
                loss, _ = self.learner.update([self._build_rollout(number) for number in numbers])
                done = before + 1
                if done % _SAVE_EVERY == 0 or done == total:
                    _save(state, self.engine, self.learner)
                    left_s = (time.monotonic() - started) / (done - first) * (total - done)
                    say(
                        console,
                        f"update {done} of {total}, loss {loss:.2f}, {_describe(self.measure())}, {left_s:.0f} s left",
                    )
            after = self.measure()
        return {"acceptance": after.tolist(), "num_held_out": len(self.held_out), "updates": total}

    def measure(self) -> Tensor:
        """Acceptance by depth and rank on the answers kept back."""
        self._shown = self._shown or [self._build_rollout(number) for number in self.held_out or self.taught[:1]]
        self.drafter.refresh()
        return measure_head(self.drafter, self._shown)

    def count_tokens(self) -> Int[Tensor, " V"]:
        """How often each token was said in all that the head has learnt from, as far as that is known."""
        ids = torch.tensor([token_id for number in self.taught for token_id in self._answers[number].token_ids])
        return self._counted_before + torch.bincount(ids, minlength=self.drafter.target.vocab_size)

    def _select_vocabulary(self) -> None:
        self.drafter.select_vocabulary(self.count_tokens().to(self.drafter.target.device))
        self.drafter.refresh()

    def _batches(self) -> Iterator[list[int]]:
        """Answers in random order, again and again; the same ones after a resume."""
        for epoch in itertools.count():
            order = list(range(len(self.taught)))
            random.Random(self.options.seed + epoch).shuffle(order)
            numbers = [self.taught[index] for index in order]
            widths = [len(self._answers[number].token_ids) for number in numbers]
            yield from pack(numbers, widths, self.options.batch_tokens)

    def _build_rollout(self, number: int) -> FinishedRollout:
        answer, features = self._answers[number], self._features.find(number)
        if features is None:
            features = compute_features(self.drafter.target, answer.prompt_ids, answer.token_ids)
            self._features.keep(number, features)
        return FinishedRollout(
            prompt_ids=answer.prompt_ids,
            token_ids=answer.token_ids,
            temperature=self.options.temperature,
            features=features,
        )


def _build_drafter(options: DraftTrainOptions, target: TargetModel) -> tuple[HeadDrafter[Any], Int[Tensor, " V"]]:
    """A new head of the kind asked for or the one to begin with, and how often it has met each token."""
    kind = _KINDS[options.kind]
    size = options.draft_vocab_size or choose_vocab_size(target)
    counts = torch.zeros(target.vocab_size, dtype=torch.int64)
    head = None if options.head is None else kind.load_head(find_head_folder(options.head), target)
    if head is not None:
        if head.vocab_counts is not None:
            counts[head.draft_vocab.long()] = head.vocab_counts
        head.resize_vocabulary(size)
    return kind(target, head=head, draft_vocab_size=size), counts


def _anneal(progress: float) -> float:
    """Half a cosine from 1 to `_LEAST_RATE`; the learner warms up by itself."""
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def _save(state: Path, engine: Engine, learner: Learner) -> None:
    """The state before is kept until the new one is whole."""
    fresh, old = state.with_suffix(".new"), state.with_suffix(".old")
    shutil.rmtree(fresh, ignore_errors=True)
    save_state(fresh, engine, learner)
    shutil.rmtree(old, ignore_errors=True)
    if state.is_dir():
        state.rename(old)
    fresh.rename(state)
    shutil.rmtree(old, ignore_errors=True)


def _restore(state: Path) -> None:
    """A stop between the two renames of `_save` left the state under its old name."""
    if not state.is_dir() and state.with_suffix(".old").is_dir():
        state.with_suffix(".old").rename(state)


def _describe(acceptance: Tensor) -> str:
    rates = acceptance.tolist()
    lengths = (compute_expected_length(plan, rates) for plan in _SHOWN_PLANS)
    shown = ", ".join(
        f"{length:.2f} ({plan.num_draft_tokens} nodes, depth {plan.depth})"
        for plan, length in zip(_SHOWN_PLANS, lengths, strict=True)
    )
    return f"first draft accepted {rates[0][0]:.0%}; expected tokens a forward {shown}"
