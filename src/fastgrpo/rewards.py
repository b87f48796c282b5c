"""Rewards that can be checked, in TRL's signature: `f(prompts, completions, completion_ids, **columns)`.

A completion is a string or, for chat prompts, a list of messages. Whatever the model wrote, a reward
is a number: text that cannot be read earns 0. Nothing here knows a trainer or a tensor.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

Chat = str | list[dict[str, Any]]

AnyReward = TypeVar("AnyReward", bound=Callable[..., Any])

FORMAT_REWARD: Final = 0.2  # a fifth of a right answer: enough to shape the form
MATH_TIMEOUT_S: Final = 2

_NUMBER = re.compile(r"(?<![\w.)])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w)])[-+]?\.\d+", re.ASCII)
_ANSWER_MARKER = re.compile(r"answer\W{0,3}(?:is\b|:)|####|\\boxed\s*\{", re.IGNORECASE)
_NUMBER_MARKER = re.compile(_ANSWER_MARKER.pattern + "|=", re.IGNORECASE)
_ENDS_WITH_ANSWER = re.compile(rf"(?:{_ANSWER_MARKER.pattern})[^\n\w]*\w[^\n]{{0,40}}\Z", re.IGNORECASE)
_MAX_CHARS_OF_ENDING = 120
_DECORATION = " \t\r\n*:$`"
_HUGE_FLOAT = re.compile(r"\d[eE][-+]?\d{3}")
_MAX_CHARS_TO_NUMBER = 80  # a number further than this behind its marker does not belong to it
_MAX_EVALUATED_CHARS = 1000
_MAX_EXPONENT = 9

_MATH_FUNCTIONS = frozenset({"sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "sqrt", "Abs", "Rational"})
_PLAIN_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.List, ast.Tuple,
    ast.Set, ast.Dict, ast.Call, ast.Load, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.unaryop, ast.boolop,
    ast.cmpop,
)  # fmt: skip


def per_completion(reward: AnyReward) -> AnyReward:
    """Declare that each reward of a function depends on its own completion alone, and not on the rest of the batch.

    The function keeps TRL's signature and may be sync or async. With `stream_rewards` it is called as completions
    finish, with lists of one, several calls at once: sync ones in threads, so they must be thread-safe. What
    `log_extra` and `log_metric` say is heard in the order of the completions; a metric is then averaged over calls, as
    TRL averages it over batches. `trainer_state` is the one of the step, but for its count of tokens seen, which does
    not have this rollout's yet.
    Worth it for rewards that wait (a judge over HTTP, a sandbox); one that computes takes the cores of the decoding.

    Raises:
        TypeError: the object takes no attribute, as a bound method.
    """
    try:
        reward.is_per_completion = True  # type: ignore[attr-defined]
    except AttributeError:
        raise TypeError(
            f"{reward!r} takes no declaration: decorate the function that it is made of, or wrap it in one"
        ) from None
    return reward


def is_per_completion(reward: Any) -> bool:
    """Whether a reward was declared `per_completion`; of a class, its `__call__` may be."""
    while isinstance(reward, functools.partial) and not hasattr(reward, "is_per_completion"):
        reward = reward.func
    return any(getattr(part, "is_per_completion", False) for part in (reward, type(reward).__call__))


def answer_reward(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 where the answer stated last is right by reasoning-gym's own scoring, else 0.0.

    Where the reference answer is a number, the number behind the last "answer is", "Answer:", "####",
    "\\boxed{" or "=" counts, and the last number of the text where there is no such marker. Other
    answers are read off the text behind the last marker, "=" not being one.

    Args:
        columns: needs `entry` (JSON of a reasoning-gym entry) and `task` (its dataset's name), as
            made by `data.build_task_dataset`; others are ignored.

    Raises:
        ValueError: a needed column is missing.
    """
    entries, tasks = (_column(columns, name, "answer_reward") for name in ("entry", "task"))
    return [
        _score_completion(task, completion_text(completion), json.loads(entry))
        for completion, task, entry in zip(completions, tasks, entries, strict=True)
    ]


def math_reward(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 where math-verify finds the completion equal to the `answer` column (LaTeX or plain), else 0.0.

    Raises:
        ValueError: the column `answer` is missing.
    """
    answers = _column(columns, "answer", "math_reward")
    return [
        float(_is_math_equal(str(answer), completion_text(completion)))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def format_reward(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> list[float]:
    """`FORMAT_REWARD` where the completion ends with a marked answer ("The answer is 7."), else 0.0."""
    return [
        FORMAT_REWARD if _ENDS_WITH_ANSWER.search(completion_text(completion).rstrip()[-_MAX_CHARS_OF_ENDING:]) else 0.0
        for completion in completions
    ]


def completion_text(completion: Chat) -> str:
    """The text of a completion: the string itself, or the content of its last assistant message."""
    if isinstance(completion, str):
        return completion
    spoken = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = spoken[-1].get("content") if spoken else None
    if isinstance(content, list):  # parts, as multimodal chats have them
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def extract_number(text: str) -> str | None:
    """The number a text gives as its answer, in plain spelling ("+1,050.0" is "1050"); None without one.

    >>> extract_number("3 + 4 = 7, so the answer is 7.")
    '7'
    """
    for marker in reversed(list(_NUMBER_MARKER.finditer(text))):
        number = _NUMBER.search(_line_after(text, marker.end()))
        if number:
            return _plain_number(number.group())
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def extract_lines(text: str, num_lines: int = 1) -> str:
    """The `num_lines` lines behind the last answer marker, or the last ones of a text without a marker."""
    markers = list(_ANSWER_MARKER.finditer(text))
    if not markers:
        return "\n".join(text.strip().splitlines()[-num_lines:])
    rest = text[markers[-1].end() :]
    if markers[-1].group().startswith("\\"):
        rest = _up_to_closing_brace(rest)
    return "\n".join(rest.lstrip(_DECORATION).splitlines()[:num_lines]).rstrip()


def score_answer(task: str, answer: str, entry: dict[str, Any]) -> float:
    """reasoning-gym's score in [0, 1] of a bare answer; 0.0 for text its scorer cannot, or must not, read."""
    if answer != entry.get("answer") and not is_safe_to_evaluate(answer):
        return 0.0
    try:
        return float(_scorer(task)(answer, entry))
    except Exception:  # a hundred scorers parse free text, each with its own way to fail on it
        return 0.0


def is_safe_to_evaluate(text: str) -> bool:
    """Whether a scorer may evaluate this text, as several of reasoning-gym's do (`eval`, sympy).

    True for arithmetic with small exponents, for literals, and for text that is no Python expression;
    False for anything that could call, look up or run forever.
    """
    if len(text) > _MAX_EVALUATED_CHARS or _HUGE_FLOAT.search(text):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes and literals are no news in model text
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "!" not in text  # sympy reads "!" as the factorial
    nodes = list(ast.walk(tree))
    has_sequence = any(
        isinstance(node, (ast.List, ast.Tuple)) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        for node in nodes
    )
    has_product = any(isinstance(node, ast.Mult) for node in nodes)
    return all(_is_plain_node(node) for node in nodes) and not (has_sequence and has_product)


def _is_plain_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _MATH_FUNCTIONS and not node.keywords
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        exponent = node.right
        is_small = isinstance(exponent, ast.Constant) and exponent.value in range(_MAX_EXPONENT + 1)
        return is_small and not any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left))
    return isinstance(node, _PLAIN_NODES)


def _score_completion(task: str, text: str, entry: dict[str, Any]) -> float:
    reference = entry.get("answer")
    if isinstance(reference, str) and _NUMBER.fullmatch(reference.strip()):
        number = extract_number(text)
        # scorers compare spellings: hand over the reference's own where the numbers are equal
        is_equal = number == _plain_number(reference.strip())
        candidates = {reference if is_equal else number} if number else set()
    else:
        lines = extract_lines(text, len(reference.strip().splitlines()) if isinstance(reference, str) else 1)
        candidates = {lines, lines.strip(_DECORATION + ".\"'"), lines.split("=")[0].strip(_DECORATION)}
    return float(any(score_answer(task, candidate, entry) >= 1.0 for candidate in candidates if candidate))


@functools.lru_cache(maxsize=32)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    return scorer


def _is_math_equal(answer: str, text: str) -> bool:
    from math_verify import parse, verify

    # math-verify stops runaway expressions by a signal, which only the main thread may set
    timeout_s = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    try:
        parsed = parse(text, parsing_timeout=timeout_s)
        return bool(verify(parse(gold, parsing_timeout=timeout_s), parsed, timeout_seconds=timeout_s))
    except Exception:  # sympy on free text: what it cannot read is not the answer
        return False


def _column(columns: dict[str, Any], name: str, reward: str) -> Sequence[Any]:
    if columns.get(name) is None:
        present = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"{reward} needs the dataset column {name!r}, got {present}; see data.build_task_dataset")
    column: Sequence[Any] = columns[name]
    return column


def _line_after(text: str, start: int) -> str:
    """The rest of the line, or the next line where the marker ends its own."""
    return text[start : start + _MAX_CHARS_TO_NUMBER].lstrip(_DECORATION).partition("\n")[0]


def _up_to_closing_brace(text: str) -> str:
    depth = 1
    for index, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:index]
    return text


def _plain_number(number: str) -> str:
    """Without plus sign, thousands separators and zeros that say nothing; never "-0"."""
    sign = "-" if number.startswith("-") else ""
    whole, _, fraction = number.lstrip("+-").replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    digits = (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return digits if digits == "0" else sign + digits
