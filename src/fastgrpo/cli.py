"""The command line: `fastgrpo demo | train | generate | draft ... | bench ...`.

What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable

from fastgrpo.options import (
    AcceptanceOptions,
    DemoOptions,
    DraftExportOptions,
    DraftImportOptions,
    DraftTrainOptions,
    E2EOptions,
    GenerateOptions,
    RolloutOptions,
    add_options,
    read_options,
)

DEBUG_ENV = "FASTGRPO_DEBUG"
USER_ERROR, INTERRUPTED = 2, 130
_EXTRAS = ("reasoning_gym", "math_verify", "gguf", "matplotlib")  # packages of fastgrpo[demo]


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    2 is a mistake of the user's, told in one line (with `FASTGRPO_DEBUG=1`, with the traceback); 130 is Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        _run(argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        return _report(error, str(error))
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
    run: Callable[[argparse.Namespace, str], None] = arguments.run
    run(arguments, shlex.join(["fastgrpo", *argv]))


def build_parser() -> argparse.ArgumentParser:
    """Every command but `train` with its options."""
    parser = argparse.ArgumentParser(
        prog="fastgrpo", description="GRPO training with exact speculative rollouts.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add(commands, "demo", "train SmolLM2-135M on a task and time its rollouts beside TRL's", DemoOptions, _run_demo)
    commands.add_parser("train", help="train as a YAML file says; takes every key of `trl grpo`", add_help=False)
    _add(commands, "generate", "complete prompts with a model", GenerateOptions, _run_generate)
    draft = commands.add_parser("draft", help="draft models").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    _add(draft, "train", "train an EAGLE-3 head on the target's own answers", DraftTrainOptions, _run_draft_train)
    _add(draft, "export", "write a head for vLLM or SGLang", DraftExportOptions, _run_draft_export)
    _add(draft, "import", "check a head of another program and take it", DraftImportOptions, _run_draft_import)
    bench = commands.add_parser("bench", help="measure this machine").add_subparsers(
        title="benchmarks", metavar="BENCHMARK", required=True
    )
    _add(bench, "rollout", "the engine alone: ways to speculate, in turn", RolloutOptions, _run_rollout)
    _add(
        bench, "acceptance", "drafts ranked with the target's noise and without it", AcceptanceOptions, _run_acceptance
    )
    _add(bench, "e2e", "training steps of TRL's trainer and of ours, in turn", E2EOptions, _run_e2e)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    record: type,
    run: Callable[[argparse.Namespace, str], None],
) -> None:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    add_options(parser, record)
    parser.set_defaults(run=run)


def _run_demo(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(DemoOptions, arguments)
    from fastgrpo.demo import run_demo

    run_demo(options, command)


def _run_generate(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(GenerateOptions, arguments)
    from fastgrpo.generate import run_generate

    run_generate(options)


def _run_draft_train(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(DraftTrainOptions, arguments)
    from fastgrpo.pretrain import run_draft_training

    run_draft_training(options, command)


def _run_draft_export(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(DraftExportOptions, arguments)
    from fastgrpo.travel import run_draft_export

    run_draft_export(options)


def _run_draft_import(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(DraftImportOptions, arguments)
    from fastgrpo.travel import run_draft_import

    run_draft_import(options)


def _run_rollout(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(RolloutOptions, arguments)
    from fastgrpo.bench.rollout import run_rollout_bench

    run_rollout_bench(options, command)


def _run_acceptance(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(AcceptanceOptions, arguments)
    from fastgrpo.bench.acceptance import run_acceptance_bench

    run_acceptance_bench(options, command)


def _run_e2e(arguments: argparse.Namespace, command: str) -> None:
    options = read_options(E2EOptions, arguments)
    from fastgrpo.bench.e2e import run_e2e_bench

    run_e2e_bench(options, command)


if __name__ == "__main__":
    sys.exit(main())
