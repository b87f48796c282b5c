"""From fields to command-line options and back."""

from __future__ import annotations

import argparse
import math
import tempfile
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def about(help: str, *, choices: tuple[str, ...] = (), many: bool = False, writes: bool = False) -> dict[str, Any]:
    """What makes a field an option of the command line; the help adds its default, unless that is None.

    Args:
        help: what it does, with its unit.
        choices: the words it takes; a tuple of words takes several, separated by commas.
        many: takes several arguments, separated by spaces.
        writes: names a file that is written in the end, a picture beside it.
    """
    return {"help": help, "choices": choices, "many": many, "writes": writes}


def check_positive(record: Any, *names: str) -> None:
    for name in names:
        if not getattr(record, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(record, name)}")
        if getattr(record, name) == math.inf:
            raise ValueError(f"{name} must be finite, got {getattr(record, name)}")


def check_distinct(record: Any, *names: str) -> None:
    """What is named twice would be measured once, or beside itself."""
    for name in names:
        values = getattr(record, name)
        twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
        if twice is not None:
            raise ValueError(f"{name} must name each once, got {twice} twice in '{','.join(map(str, values))}'")


def add_options(parser: argparse.ArgumentParser, record: type) -> None:
    """One `--option` for each field of a record that says what it is `about`."""
    hints = get_type_hints(record)
    for entry in fields(record):
        hint, help, choices = hints[entry.name], entry.metadata["help"], entry.metadata["choices"]
        if choices:
            help = f"{help}: {', '.join(choices)}"
        if entry.default is not None and entry.default != () and entry.default is not False:
            shown = ",".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
            help = f"{help} (default: {shown})"
        keywords: dict[str, Any] = {"dest": entry.name, "default": entry.default, "help": help}
        if hint is bool:
            keywords |= {"action": "store_true"}
        elif entry.metadata["many"]:
            keywords |= {"nargs": "+", "metavar": "TEXT"}
        else:
            keywords |= {"type": _build_reader(hint, choices), "metavar": _metavar(hint)}
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **keywords)


def read_options(record: type[Record], namespace: argparse.Namespace) -> Record:
    """The record that `add_options` described.

    Raises:
        ValueError: a value is out of its range.
    """
    values = {entry.name: getattr(namespace, entry.name) for entry in fields(record)}  # type: ignore[arg-type]
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_outputs(options: Any) -> None:
    """Before anything is measured, since results that cannot be written would be lost; makes their folders.

    Raises:
        ValueError: a file that is to be written has no name, that of a picture, or that of another file here, which
            would be lost.
        OSError: it cannot be written there.
    """
    for entry in fields(options):
        path = getattr(options, entry.name)
        if not entry.metadata["writes"] or path is None:
            continue
        if not path.name or path.is_dir():
            raise ValueError(f"{entry.name} must be a file, got the folder '{path}'; name a file in it")
        if path.suffix == ".png":
            raise ValueError(f"{entry.name}='{path}' is the name of the picture beside it; take another ending")
        for other in (each.name for each in fields(options) if each.name != entry.name):
            theirs = getattr(options, other)
            if isinstance(theirs, Path) and theirs.resolve() == path.resolve():
                raise ValueError(f"{entry.name} would overwrite {other}: both are '{path}'; name another")
        check_writable(entry.name, path)


def check_writable(name: str, path: Path) -> None:
    """Make the folder of a file that an option names.

    Raises:
        OSError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{name}='{path}' cannot be written ({error}); name another file") from error


def _plain_type(hint: Any) -> type:
    """`X` of `X | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    plain: type = hint
    return plain


def _metavar(hint: Any) -> str:
    names = {int: "N", float: "X", Path: "PATH", str: "NAME"}
    return names.get(_plain_type(hint), "NAME,...")


def _build_reader(hint: Any, choices: tuple[str, ...]) -> Callable[[str], Any]:
    """From an argument's text to its value; argparse shows what an `ArgumentTypeError` says."""
    kind = _plain_type(hint)

    def read(text: str) -> Any:
        words = text.split(",") if get_origin(kind) is tuple else [text]
        for word in words if choices else ():
            if word not in choices:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
        if get_origin(kind) is not tuple:
            return kind(text)
        try:
            return tuple(get_args(kind)[0](word) for word in words)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{error} in {text!r}; numbers are separated by commas, as in 1,4"
            ) from error

    read.__name__ = getattr(kind, "__name__", "value")
    return read
