"""Checks of the shapes in signatures, at the first calls of each function in each test.

A rollout calls the same few functions thousands of times with the same shapes. Checked at each call, that took as long
as the rollout itself.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from beartype import beartype

CALLS_A_TEST = 10

_num_calls: Counter[Callable[..., Any]] = Counter()
_resting: list[Callable[..., Any]] = []  # had their calls, and are not checked until the next test


def check_first_calls(signature: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker for jaxtyping's import hook, which calls it with copies of a function's signature."""
    check = beartype(signature)

    @functools.wraps(signature)
    def count_and_check(*args: Any, **kwargs: Any) -> Any:
        _num_calls[signature] += 1
        if _num_calls[signature] >= CALLS_A_TEST:
            _rest(signature.__module__, signature.__qualname__)
        return check(*args, **kwargs)

    return count_and_check


def begin_test() -> None:
    """All functions are checked again."""
    for function in _resting:
        function.__no_type_check__ = False
    _resting.clear()
    _num_calls.clear()


def _rest(module: str, qualname: str) -> None:
    """Mark the function itself, so that jaxtyping does not even look at its arguments."""
    if (function := find_function(module, qualname)) is not None:
        function.__no_type_check__ = True
        _resting.append(function)


@functools.cache
def find_function(module: str, qualname: str) -> Callable[..., Any] | None:
    """What was written in the file, without its decorators; None for a function inside another."""
    found: Any = sys.modules[module]
    for name in qualname.split("."):
        if (found := inspect.getattr_static(found, name, None)) is None:
            return None
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    elif isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    found = inspect.unwrap(found)
    return found if inspect.isfunction(found) and found.__qualname__ == qualname else None
