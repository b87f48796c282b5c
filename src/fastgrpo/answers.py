"""A target's own answers to prompts, written down as they are drawn, and their features: what `draft train` teaches."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.data import build_task_dataset, load_prompts
from fastgrpo.drafters.head_drafter import HeadDrafter
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.head_training import round_up
from fastgrpo.loading import Opened, encode_prompts
from fastgrpo.model import TargetModel
from fastgrpo.options import DraftTrainOptions
from fastgrpo.report import say
from fastgrpo.types import SamplingParams

_ROUND = 64  # prompts answered between two writes
_FULL = 8  # times as many requests as are decoded together, on a device that is fast with many: few run at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion of the target, as it stands in `answers.jsonl`."""

    source: str  # task, or the file of prompts
    prompt_ids: list[int]
    token_ids: list[int]


class AnswerFeatures:
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


def build_requests(options: DraftTrainOptions, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(source, prompt) of every answer, siblings side by side, sources mixed.

    Raises:
        ValueError: a task or the file of prompts cannot be used, or every prompt is too long; names the remedy.
    """
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


def draw_answers(
    options: DraftTrainOptions,
    opened: Opened,
    requests: list[tuple[str, list[int]]],
    drafter: HeadDrafter[Any],
    path: Path,
    features: AnswerFeatures,
    console: Console,
) -> list[Answer]:
    """Answers to every prompt: those on file, then the missing ones.

    Args:
        requests: source and prompt of each.
        drafter: what features are kept for; it does not draft.
        features: takes those of answers that are drawn now, while there is room.

    Raises:
        ValueError: the file is damaged, or holds answers to other prompts; names it.
    """
    answers = _read_answers(path)
    _check_prompts(answers, requests, path)
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


def load_answers(path: Path, target: TargetModel) -> list[Answer]:
    """The answers of another run, which is only read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds no answer, or one that the target cannot have given; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no answers at {path}; draft train writes answers.jsonl into its output folder")
    answers = _parse([line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()], path)
    if not answers:
        raise ValueError(f"{path} holds no answers")
    for number, answer in enumerate(answers, 1):
        text = [*answer.prompt_ids, *answer.token_ids]
        if not answer.prompt_ids or len(text) > target.max_position:
            raise ValueError(
                f"line {number} of {path} has {len(answer.prompt_ids)} tokens of prompt and {len(answer.token_ids)} of "
                f"answer; a prompt has one at least, and both together are at most {target.max_position} for this model"
            )
        unknown = next((each for each in text if type(each) is not int or not 0 <= each < target.vocab_size), None)
        if unknown is not None:
            raise ValueError(
                f"line {number} of {path} has the token id {unknown!r}, outside 0..{target.vocab_size - 1}: it was "
                "drawn from another model"
            )
    return answers


def keep_answers(path: Path, own: Path) -> None:
    """Copy another run's answers, so that this one goes on with them.

    Raises:
        ValueError: they have changed since.
    """
    if own.exists():
        if own.read_bytes() != path.read_bytes():
            raise ValueError(
                f"{path} has changed since it was copied to {own}; choose another --output, or put it back"
            )
        return
    unfinished = own.with_suffix(".new")
    shutil.copyfile(path, unfinished)
    unfinished.replace(own)


def _read_answers(path: Path) -> list[Answer]:
    """What stands on file; a line that was cut off by a stop is drawn again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]
    if lines[-1]:
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    try:
        return _parse(whole, path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to draw the answers again") from error


def _parse(lines: list[str], path: Path) -> list[Answer]:
    try:
        answers = [Answer(**json.loads(line)) for line in lines]
        if not all(isinstance(ids, list) for answer in answers for ids in (answer.prompt_ids, answer.token_ids)):
            raise TypeError("prompt_ids and token_ids must be lists")
        return answers
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _check_prompts(answers: list[Answer], requests: list[tuple[str, list[int]]], path: Path) -> None:
    """Answers on file are the first of those asked for: else some prompts would be taught twice, others never."""
    asked = [ids for _, ids in requests]
    for number, answer in enumerate(answers):
        if asked[number : number + 1] != [answer.prompt_ids]:
            raise ValueError(
                f"line {number + 1} of {path} answers another prompt than is asked now: the prompts have changed, or "
                "the model's tokenizer or chat template; choose another --output, or put them back to go on"
            )


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
