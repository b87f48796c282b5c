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
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.data import build_task_dataset, load_prompts
from fastgrpo.drafters.acceptance_file import write_acceptance
from fastgrpo.drafters.block import BlockDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.drafters.head_parts import choose_vocab_size
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.grpo.state import load_state, save_state
from fastgrpo.head_training import pack, round_up
from fastgrpo.learner import Learner
from fastgrpo.loading import Opened, encode_prompts, open_model, quiet_libraries
from fastgrpo.model import TargetModel
from fastgrpo.objective import measure_head
from fastgrpo.options import DraftTrainOptions
from fastgrpo.planner import compute_expected_length
from fastgrpo.report import describe_commit, describe_machine, say, write_json
from fastgrpo.types import SamplingParams, SpeculationPlan

_ROUND = 64  # prompts answered between two writes
_FULL = 8  # times as many requests as are decoded together, on a device that is fast with many: few run at the end
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion of the target, as it stands in `answers.jsonl`."""

    source: str  # task, or the file of prompts
    prompt_ids: list[int]
    token_ids: list[int]


def run_draft_training(options: DraftTrainOptions, command: str) -> dict[str, Any]:
    """Train and save a head; returns what was measured on answers it did not learn from.

    Raises:
        ValueError: the model, a task, the prompts or the output folder cannot be used.
    """
    console = Console()
    quiet_libraries()
    folder = options.output
    _check_folder(folder, options)
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    drafter, counts = _build_drafter(options, TargetModel(opened.model, tokenizer=opened.tokenizer))
    requests = _build_requests(options, opened.tokenizer)
    _claim(folder, options)
    features = _Features(options.feature_cache_gib)
    answers = _draw_answers(options, opened, requests, drafter, folder / "answers.jsonl", features, console)
    training = _Training(options, drafter, counts, answers, features)
    result = training.run(folder, console)
    result |= {
        "command": command,
        "commit": describe_commit(Path(__file__).parent),
        "machine": describe_machine(),
        "settings": dataclasses.asdict(options),
        "num_answers": len(answers),
        "num_tokens": sum(len(answer.token_ids) for answer in answers),
    }
    training.drafter.save_head(folder / "head", compact=options.compact, counts=training.count_tokens())
    write_acceptance(folder / "head", result["acceptance"])
    write_json(result, folder / "result.json", indent=1)
    say(console, f"written: {folder / 'head'} (use it as drafter={folder / 'head'})")
    return result


def _check_folder(folder: Path, options: DraftTrainOptions) -> None:
    """Refuse a folder that this run could not go on with.

    Raises:
        ValueError: the folder is not empty and holds something else than a run with these settings.
    """
    known = folder / _SETTINGS
    if known.exists():
        wanted = _list_settings(options)
        found = _list_settings(DraftTrainOptions()) | json.loads(known.read_text())  # a run may be older than an option
        different = next((key for key in wanted if key not in _FREE and found[key] != wanted[key]), None)
        if different is not None:
            raise ValueError(
                f"{folder} holds a run with {different}={found[different]!r}, asked for "
                f"{wanted[different]!r}; choose another --output, or the same settings to go on"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no draft training; choose another --output")


def _claim(folder: Path, options: DraftTrainOptions) -> None:
    """Note the settings of a run that begins, once model and prompts are known to be there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _SETTINGS).exists():
        write_json(_list_settings(options), folder / _SETTINGS, indent=1)


def _list_settings(options: DraftTrainOptions) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return settings


# -- the target's answers --------------------------------------------------------------------------------------


class _Features:
    """Features of answers, by their number; the least recently used are dropped first.

    Args:
        most_gib: memory for them, in GiB; those of one answer are kept whatever they take.
    """

    def __init__(self, most_gib: float) -> None:
        self._most_bytes = most_gib * 2**30
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._num_bytes = 0

    def find(self, number: int) -> Tensor | None:
        if number not in self._kept:
            return None
        self._kept.move_to_end(number)
        return self._kept[number]

    def keep(self, number: int, features: Tensor) -> None:
        self._kept[number] = features
        self._num_bytes += features.nbytes
        while self._num_bytes > self._most_bytes and len(self._kept) > 1:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes

    def has_room(self, features: Tensor) -> bool:
        return self._num_bytes + features.nbytes <= self._most_bytes


def _draw_answers(
    options: DraftTrainOptions,
    opened: Opened,
    requests: list[tuple[str, list[int]]],
    drafter: HeadDrafter[Any],
    path: Path,
    features: _Features,
    console: Console,
) -> list[Answer]:
    """Answers to every prompt: those on file, then the missing ones.

    Args:
        requests: source and prompt of each.
        drafter: what features are kept for; it does not draft.
        features: takes those of answers that are drawn now, while there is room.
    """
    answers = _read_answers(path)
    engine = Engine(opened.model, drafter=drafter, speculation="off", max_num_seqs=options.max_num_seqs)

    def keep(rollout: FinishedRollout) -> None:
        assert rollout.request_id is not None
        if rollout.features is not None and features.has_room(rollout.features):
            features.keep(len(answers) + rollout.request_id, rollout.features)

    engine.on_finish.append(keep)
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        stop_token_ids=opened.stop_token_ids,
        seed=options.seed,
    )
    started, drawn = time.monotonic(), 0
    most = _ROUND * options.num_generations
    if opened.model.device.type != "cpu":
        most = max(most, _FULL * options.max_num_seqs)
    for start in range(len(answers), len(requests), most):
        part = requests[start : start + most]
        completions = engine.generate([ids for _, ids in part], dataclasses.replace(params, stream=start))
        new = [
            Answer(source=source, prompt_ids=ids, token_ids=completion.token_ids)
            for (source, ids), completion in zip(part, completions, strict=True)
        ]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(answer)) + "\n" for answer in new)
        answers += new
        drawn += sum(len(answer.token_ids) for answer in new)
        rate = drawn / (time.monotonic() - started)
        say(console, f"answers {len(answers)} of {len(requests)}, {rate:.0f} tokens/s")
    return answers


def _build_requests(options: DraftTrainOptions, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(source, prompt) of every answer, siblings side by side, sources mixed."""
    if options.data is not None:
        prompts = load_prompts(options.data, skip_broken=options.skip_broken)["prompt"]
        chats = [(str(options.data), prompt) for prompt in prompts]
    else:
        chats = [
            (task, prompt)
            for task, share in options.compute_shares().items()
            for prompt in build_task_dataset(task, size=math.ceil(options.num_prompts * share), seed=options.seed)[
                "prompt"
            ]
        ]
    encoded = encode_prompts(tokenizer, [prompt for _, prompt in chats])
    requests = [
        (source, ids) for (source, _), ids in zip(chats, encoded, strict=True) if len(ids) <= options.max_prompt_length
    ]
    if not requests:
        raise ValueError(f"no prompt has at most max_prompt_length={options.max_prompt_length} tokens; raise it")
    random.Random(options.seed).shuffle(requests)
    return [request for request in requests for _ in range(options.num_generations)]


def _read_answers(path: Path) -> list[Answer]:
    """What stands on file; a line that was cut off by a stop is drawn again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]
    if lines[-1]:
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    try:
        return [Answer(**json.loads(line)) for line in whole]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to draw the answers again") from error


# -- learning from them ----------------------------------------------------------------------------------------


class _Training:
    """The learner over all answers; features that are not kept are computed by the target when they are needed."""

    def __init__(
        self,
        options: DraftTrainOptions,
        drafter: HeadDrafter[Any],
        counted_before: Int[Tensor, " V"],
        answers: list[Answer],
        features: _Features,
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
            raise ValueError(f"no answer has {_MIN_ANSWER} tokens to learn from; raise max_tokens")
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
            say(console, f"{len(self.taught)} answers to learn from; at first {_describe(self.measure())}")
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
    head = None if options.head is None else kind.load_head(options.head, target)
    if head is not None:
        if head.vocab_counts is not None:
            counts[head.draft_vocab.long()] = head.vocab_counts
        head.resize_vocabulary(size)
    return kind(target, head=head, draft_vocab_size=size), counts


@torch.no_grad()
def compute_features(target: TargetModel, prompt_ids: list[int], token_ids: list[int]) -> Float[Tensor, "T W"]:
    """Features of all but the last token of a finished text, by one target forward; call in `rollout_mode`.

    The text is padded behind its end to one of a few lengths, which its features do not see: kernels are prepared
    once for each length, and that took most of the time.
    """
    ids, device = (prompt_ids + token_ids)[:-1], target.device
    width = round_up(len(ids))
    cache = target.build_cache(with_features=True)
    cache.add_rows(1)
    cache.reserve(0, width)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = ForwardBatch.build(
        token_ids=torch.tensor([ids + [0] * (width - len(ids))], device=device),
        num_nodes=zero + width,
        visible=torch.ones(1, width, width, dtype=torch.bool, device=device).tril(),
        blocks=cache.blocks,
        lengths=zero,
        dtype=target.dtype,
        num_repeats=target.num_repeats,
    )
    features = target.forward(batch, cache).features
    assert features is not None
    return features[: len(ids)]


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
