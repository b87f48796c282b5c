"""The keys of `fastgrpo train`: the flat YAML that `trl grpo` takes, our keys beside TRL's."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.utils import DatasetConfig

from fastgrpo.grpo.config import FastGRPOConfig

_STRICT = {"int": "int", "float": "float", "string_to_bool": "bool"}  # argparse types, and how people call them


@dataclass
class FastGRPOScriptArguments(GRPOScriptArguments):
    """TRL's keys for data and rewards, and two more sources of prompts."""

    task: str | None = field(
        default=None,
        metadata={"help": "reasoning-gym task that makes the prompts; `answer_reward` checks the answers."},
    )
    task_size: int = field(default=1000, metadata={"help": "Prompts made for `task`; a tenth more for evaluation."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the prompts of `task`."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "JSONL file of objects with `prompt` (text or chat messages); other keys become columns."},
    )
    skip_broken: bool = field(
        default=False,
        metadata={"help": "Go on without the broken lines of `prompts`; how many were skipped is printed."},
    )


RECORDS = (FastGRPOScriptArguments, FastGRPOConfig, ModelConfig, DatasetMixtureConfig)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The four records a training is described by."""

    script: FastGRPOScriptArguments
    training: FastGRPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


class _Parser(TrlParser):
    """TRL's parser whose errors are raised, in one line, and not printed behind pages of usage."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parse_arguments(argv: list[str]) -> Arguments:
    """The YAML file behind `--config`, overridden by the rest of the command line.

    Raises:
        ValueError: an unknown key or option (the nearest known one is named), a value that does not fit,
            or a file that is no YAML mapping.
        FileNotFoundError: there is no such file.
    """
    first = _Parser((), add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    named, rest = first.parse_known_args(argv)
    parser = _Parser(RECORDS, add_help=False, allow_abbrev=False)
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)  # else TRL's own default for bf16 asks for it
    if named.config is not None:
        config = read_config(Path(named.config))
        environment = config.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ValueError(f"{named.config}: env must map names to values, got {environment!r:.60}")
        parser.set_defaults_with_config(**_check_config(parser, config, named.config))
        os.environ.update({str(key): str(value) for key, value in environment.items()})
    _, unknown = parser.parse_known_args(rest)
    if unknown:
        raise ValueError(_describe_unknown(unknown[0], parser))
    script, training, model, mixture = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    return Arguments(script=script, training=training, model=model, mixture=mixture)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping such as 'learning_rate: 1e-5', got {config!r:.60}")
    return config


def read_keys(record: type, written: Mapping[str, str], where: str) -> dict[str, Any]:
    """Keys of one record with the values that were written for them, converted as those of a config file.

    Args:
        where: named in front of what is wrong.

    Raises:
        ValueError: an unknown key (the nearest known one is named), or a value that does not fit.
    """
    return _check_config(_Parser((record,), add_help=False, allow_abbrev=False), dict(written), where)


def name_nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known word is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _check_config(parser: argparse.ArgumentParser, config: dict[str, Any], path: str) -> dict[str, Any]:
    """The values of a config file as argparse's defaults, converted and checked as its options would be."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # `--no_x` stands behind `--x`
    for key in config:
        if key not in actions:
            raise ValueError(f"{path}: unknown key '{key}'{name_nearest(str(key), [*actions, 'env'])}")
    _check_mixture(config.get("datasets"), path)
    return {key: _convert(actions[key], value, f"{path}: {key}") for key, value in config.items()}


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the option's own; mappings, and what has no strict type, pass as they are."""
    if value is None:
        return None
    if action.nargs == "+":
        values = value if isinstance(value, list) else [value]
        return [_convert_one(action, each, where) for each in values]
    return _convert_one(action, value, where)


def _convert_one(action: argparse.Action, value: Any, where: str) -> Any:
    kind = getattr(action.type, "__name__", "")
    if kind in _STRICT and callable(action.type):
        try:
            value = action.type(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{where}: {str(value)!r} is no {_STRICT[kind]}") from error
    if action.choices and str(value) not in map(str, action.choices):
        raise ValueError(f"{where} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return value


def _check_mixture(entries: Any, path: str) -> None:
    known = [entry.name for entry in dataclasses.fields(DatasetConfig)]
    for index, entry in enumerate(entries or []):
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f"{path}: datasets[{index}] must be a mapping with a path, got {entry!r:.60}")
        for key in entry:
            if key not in known:
                raise ValueError(f"{path}: datasets[{index}]: unknown key '{key}'{name_nearest(str(key), known)}")


def _describe_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument '{word}'"
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    known = {action.dest for action in parser._actions} | {"config"}
    return f"unknown option '{word.partition('=')[0]}'" + name_nearest(name, known).replace("'", "'--", 1)


def format_help() -> str:
    """Our keys with what they do; of TRL's, the names and defaults."""
    lines = [
        "usage: fastgrpo train --config run.yaml [--key value ...]",
        "",
        "Train by GRPO with exact speculative rollouts. The YAML file is flat, as `trl grpo` takes it; each key",
        "is an option too, and the command line comes first. `env:` sets environment variables, `datasets:`",
        "lists a mixture. Ctrl-C stops; `--resume_from_checkpoint true` goes on from the last checkpoint.",
        "",
        "What is trained:",
        *_describe("model_name_or_path", None, "Model: a folder, a hub id, or `demo` for SmolLM2-135M-Instruct."),
        *_describe(
            "reward_funcs",
            None,
            "Rewards: answer_reward, math_reward, format_reward; TRL's names, such as accuracy_reward; or the "
            "dotted path of a function, such as my_rewards.length_reward.",
        ),
        *_own_keys(FastGRPOScriptArguments, GRPOScriptArguments),
        "",
        "How it rolls out (never what is sampled):",
        *_own_keys(FastGRPOConfig, GRPOConfig),
        "",
        "Every key of TRL works as well (name=default; see TRL's GRPOConfig, ModelConfig and `trl grpo --help`):",
    ]
    for record in (GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig):
        shown = " ".join(f"{entry.name}={_default(entry)}" for entry in dataclasses.fields(record) if entry.init)
        lines += [
            "",
            f"  {record.__name__}:",
            *textwrap.wrap(shown, 108, initial_indent=" " * 4, subsequent_indent=" " * 4),
        ]
    return "\n".join(lines) + "\n"


def _own_keys(record: type, parent: type) -> list[str]:
    theirs = {entry.name for entry in dataclasses.fields(parent)}
    own = [entry for entry in dataclasses.fields(record) if entry.name not in theirs]
    return [line for entry in own for line in _describe(entry.name, _default(entry), entry.metadata["help"])]


def _describe(name: str, default: Any, help: str) -> list[str]:
    text = help if default is None else f"{help} [{default}]"
    return textwrap.wrap(text, 110, initial_indent=f"  --{name:<22} ", subsequent_indent=" " * 27)


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else "required"
