"""A wrong shape is an error in the tests, at the first calls of each function in each of them."""

from __future__ import annotations

import ast
import importlib
import inspect

import jaxtyping
import pytest
import torch
from torch import Tensor

from conftest import CHECKED_MODULES
from fastgrpo import sampling
from shape_checks import CALLS_A_TEST, begin_test, find_function


def test_the_first_calls_of_each_test_are_checked() -> None:
    keys, too_many = torch.arange(3), torch.zeros(3, 2, dtype=torch.int64)
    sampling._split_key(keys)
    for _ in range(2):  # as if in two tests
        begin_test()
        with pytest.raises(jaxtyping.TypeCheckError, match="_split_key"):
            sampling._split_key(too_many)
        for _ in range(CALLS_A_TEST):
            sampling._split_key(keys)
        sampling._split_key(too_many)
        with pytest.raises(jaxtyping.TypeCheckError, match="_mix"):
            sampling._mix("not a number")  # others have their own calls


def test_what_is_returned_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten(keys: Tensor) -> tuple[Tensor, Tensor]:
        return keys, keys

    inner = find_function("fastgrpo.sampling", "_split_key")
    monkeypatch.setattr(inner, "__code__", flatten.__code__)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        sampling._split_key(torch.arange(3))


@pytest.mark.parametrize("module", CHECKED_MODULES)
def test_every_function_can_rest(module: str) -> None:
    """Nor does one define another: that one would be compiled anew, with its check, whenever the outer one runs."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"fastgrpo.{module}")))

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                walk(child, (*names, child.name))
            elif isinstance(child, ast.FunctionDef):
                name = ".".join((*names, child.name))
                assert find_function(f"fastgrpo.{module}", name) is not None, name
                within = [each for each in ast.walk(child) if isinstance(each, ast.FunctionDef) and each is not child]
                assert not within, f"{name} defines {within[0].name}"
            else:
                walk(child, names)

    walk(tree, ())
