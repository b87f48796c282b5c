"""The command line: `fastgrpo demo | train | generate | profile | draft ... | bench ...`.

What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import os
import shlex
import sys
from typing import NamedTuple

from fastgrpo.options import (
    AcceptanceOptions,
    BudgetOptions,
    DemoOptions,
    DraftersOptions,
    DraftExportOptions,
    DraftImportOptions,
    DraftTrainOptions,
    E2EOptions,
    GenerateOptions,
    LearningOptions,
    OrderOptions,
    PlansOptions,
    ProfileOptions,
    RewardsOptions,
    RolloutOptions,
    SimulateOptions,
    UpdateOptions,
    add_options,
    check_outputs,
    read_options,
)

DEBUG_ENV = "FASTGRPO_DEBUG"
USER_ERROR, INTERRUPTED = 2, 130
_EXTRAS = ("reasoning_gym", "math_verify", "gguf", "matplotlib")  # packages of fastgrpo[demo]


class Command(NamedTuple):
    """A word of the command line, the record its options fill, and what is called with it: module:function."""

    name: str
    help: str
    record: type
    function: str


_COMMANDS = (
    Command("demo", "train SmolLM2-135M on a task and time its rollouts beside TRL's", DemoOptions, "demo:run_demo"),
    Command("generate", "complete prompts with a model", GenerateOptions, "generate:run_generate"),
    Command(
        "profile",
        "measure what a model costs on this machine, and predict what speculation gains",
        ProfileOptions,
        "profile:run_profile",
    ),
)
_DRAFT_COMMANDS = (
    Command("train", "train a head on the target's own answers", DraftTrainOptions, "pretrain:run_draft_training"),
    Command("export", "write a head for vLLM or SGLang", DraftExportOptions, "travel:run_draft_export"),
    Command("import", "check a head of another program and take it", DraftImportOptions, "travel:run_draft_import"),
)
_BENCHMARKS = (
    Command(
        "rollout", "the engine alone: ways to speculate, in turn", RolloutOptions, "bench.rollout:run_rollout_bench"
    ),
    Command(
        "plans",
        "auto beside every fixed plan and plain decoding, by live sequences",
        PlansOptions,
        "bench.plans:run_plans_bench",
    ),
    Command(
        "budget",
        "draft tokens shared among all sequences, beside as many for each",
        BudgetOptions,
        "bench.budget:run_budget_bench",
    ),
    Command(
        "order",
        "longest expected completions first, beside the order of arrival",
        OrderOptions,
        "bench.order:run_order_bench",
    ),
    Command(
        "acceptance",
        "drafts ranked with the target's noise and without it",
        AcceptanceOptions,
        "bench.acceptance:run_acceptance_bench",
    ),
    Command(
        "learning",
        "how a head learns through a training run, with each loss and not at all",
        LearningOptions,
        "bench.learning:run_learning_bench",
    ),
    Command(
        "drafters",
        "drafters side by side, and what a draft costs",
        DraftersOptions,
        "bench.drafters:run_drafters_bench",
    ),
    Command(
        "simulate",
        "replay recorded drafts against every planner, here or on larger machines",
        SimulateOptions,
        "bench.simulate:run_simulate_bench",
    ),
    Command(
        "rewards",
        "a slow reward asked for after the rollout, and while others decode",
        RewardsOptions,
        "bench.rewards:run_rewards_bench",
    ),
    Command("e2e", "training steps of TRL's trainer and of ours, in turn", E2EOptions, "bench.e2e:run_e2e_bench"),
    Command(
        "update",
        "the update alone, of TRL's trainer and of ours, on the same rows",
        UpdateOptions,
        "bench.update:run_update_bench",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    2 is a mistake of the user's, told in one line (with `FASTGRPO_DEBUG=1`, with the traceback); 130 is Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that cannot be shown stops no run
    try:
        _run(argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        return _report(error, str(error))
    except (MemoryError, RuntimeError) as error:
        from fastgrpo.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _report(
            error, str(error) or "memory ran out; a smaller model, or fewer and shorter sequences, would fit"
        )
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _report(error, f"this needs the package {error.name}: pip install 'fastgrpo[demo]'")
    return 0


def _report(error: Exception, message: str) -> int:
    notes = getattr(error, "__notes__", [])
    is_of_a_reward = bool(notes) and not isinstance(error, OSError)  # its author needs to see where
    if os.environ.get(DEBUG_ENV) == "1" or is_of_a_reward:
        raise error
    print("\n".join((f"fastgrpo: error: {message}", *notes)), file=sys.stderr)
    return USER_ERROR


def _run(argv: list[str]) -> None:
    if argv[:1] == ["train"]:  # its options are the keys of TRL's records, read by TRL's own parser
        from fastgrpo.grpo.script import run_training

        run_training(argv[1:])
        return
    arguments = build_parser().parse_args(argv)
    options = read_options(arguments.command.record, arguments)
    check_outputs(options)
    module, function = arguments.command.function.split(":")
    run = getattr(importlib.import_module(f"fastgrpo.{module}"), function)
    if "command" in inspect.signature(run).parameters:  # what it measures names the command
        run(options, shlex.join(["fastgrpo", *argv]))
    else:
        run(options)


def build_parser() -> argparse.ArgumentParser:
    """Every command but `train` with its options."""
    parser = argparse.ArgumentParser(
        prog="fastgrpo", description="GRPO training with exact speculative rollouts.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add(commands, _COMMANDS)
    commands.add_parser("train", help="train as a YAML file says; takes every key of `trl grpo`", add_help=False)
    for name, help, title, members in (
        ("draft", "draft models", "commands", _DRAFT_COMMANDS),
        ("bench", "measure this machine", "benchmarks", _BENCHMARKS),
    ):
        parts = commands.add_parser(name, help=help)
        _add(parts.add_subparsers(title=title, metavar=title[:-1].upper(), required=True), members)
    return parser


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], members: tuple[Command, ...]) -> None:
    for command in members:
        description = command.help[0].upper() + command.help[1:] + "."
        parser = commands.add_parser(command.name, help=command.help, description=description, allow_abbrev=False)
        add_options(parser, command.record)
        parser.set_defaults(command=command)


if __name__ == "__main__":
    sys.exit(main())
