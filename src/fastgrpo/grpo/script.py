"""`fastgrpo train`: what `trl grpo` does, with our trainer, live progress and a report at the end."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
from trl import get_dataset, get_peft_config, get_quantization_config

from fastgrpo import rewards
from fastgrpo.data import build_task_dataset, load_prompts
from fastgrpo.disk import named_write_errors
from fastgrpo.grpo.arguments import Arguments, format_help, name_nearest, parse_arguments
from fastgrpo.grpo.reporting import ReportCallback, attach_report, write_report
from fastgrpo.grpo.trainer import FastGRPOTrainer
from fastgrpo.loading import quiet_progress, resolve_model
from fastgrpo.machine import describe_origin
from fastgrpo.report import LiveProgress, RunHistory, describe_commit, describe_machine, say

if TYPE_CHECKING:
    from datasets import Dataset

INTERRUPTED: Final = 130  # exit code of a command stopped by Ctrl-C
_OWN_REWARDS = ("answer_reward", "math_reward", "format_reward")
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def run_training(argv: list[str]) -> None:
    """Train as the command line and its YAML file say; returns when the model and the report are saved.

    Raises:
        ValueError: a key, a value, the data or a reward is wrong; nothing has been started.
        OSError: a file or model is missing.
        SystemExit: 130 after Ctrl-C, once it has been said how to go on.
    """
    if {"-h", "--help"} & set(argv):
        print(format_help(), end="")
        return
    quiet_progress()
    arguments = parse_arguments(argv)
    meta = _describe_run(arguments, argv)  # before it runs: another commit may be made meanwhile
    trainer = build_trainer(arguments)
    is_main = trainer.is_world_process_zero()
    console = Console() if is_main else Console(quiet=True)
    progress = LiveProgress(console)
    callback = attach_report(trainer, progress)
    try:
        trainer.train(resume_from_checkpoint=_resume(arguments))
    except KeyboardInterrupt:
        say(console, f"\nstopped. {_stop(trainer, callback, argv)}")
        raise SystemExit(INTERRUPTED) from None
    finally:
        progress.stop()  # which gives the terminal back its cursor, whatever went wrong
    with named_write_errors(Path(arguments.training.output_dir)):
        trainer.save_model(arguments.training.output_dir)
    if is_main:
        history = RunHistory(
            log_rows=trainer.state.log_history,
            rollouts=callback.rollouts,
            timelines=callback.timelines,
            meta=meta,
        )
        write_report(history, Path(arguments.training.output_dir), console)
        say(console, f"model: {arguments.training.output_dir}")
    if arguments.training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18 and later close the trackers here
        trainer.end()


def build_trainer(arguments: Arguments) -> FastGRPOTrainer:
    """The trainer that these arguments describe; data and rewards are checked before a model is loaded.

    Raises:
        ValueError: model, data or rewards are missing or wrong.
    """
    script, training, model = arguments.script, arguments.training, arguments.model
    if not model.model_name_or_path:
        raise ValueError("no model: set model_name_or_path to a folder, a hub id, or 'demo'")
    reward_funcs = build_rewards(script.reward_funcs, script.reward_model_name_or_path)
    train_dataset, eval_dataset = load_datasets(arguments)
    _resume(arguments)
    training.disable_tqdm = True  # LiveProgress stands in its place
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model)
    return FastGRPOTrainer(
        model=resolve_model(model.model_name_or_path),
        reward_funcs=reward_funcs,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
        **({"quantization_config": quantization} if quantization else {}),
    )


def build_rewards(names: list[str] | None, reward_model: str | None = None) -> list[Any]:
    """Reward functions by name: ours, TRL's, or dotted paths; a reward model by its path.

    Raises:
        ValueError: none at all, or one that cannot be found.
    """
    found: list[Any] = [reward_model] if reward_model else []
    found += [_find_reward(name) for name in names or []]
    if not found:
        raise ValueError(f"no reward: set reward_funcs to {', '.join(_OWN_REWARDS)}, or the dotted path of a function")
    return found


def _find_reward(name: str) -> Any:
    if name in _OWN_REWARDS:
        return getattr(rewards, name)
    if name in _TRL_REWARDS:
        reward = getattr(importlib.import_module("trl.rewards"), name)
        return reward(max_completion_len=1280, soft_punish_cache=256) if name.startswith("get_") else reward
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        known = (*_OWN_REWARDS, *_TRL_REWARDS)
        raise ValueError(f"unknown reward '{name}'{name_nearest(name, known) or '.'} Known are {', '.join(known)}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward '{name}': no module named '{error.name}' here or installed") from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(
            f"reward '{name}': {module_name} has no function '{attribute}'{name_nearest(attribute, dir(module))}"
        )
    return getattr(module, attribute)


def load_datasets(arguments: Arguments) -> tuple[Dataset, Dataset | None]:
    """The training prompts, and those for evaluation where `eval_strategy` asks for them.

    Raises:
        ValueError: no source of prompts, more than one, or no prompts to evaluate on.
    """
    script, mixture = arguments.script, arguments.mixture
    sources = {
        "task": script.task,
        "prompts": script.prompts,
        "dataset_name": script.dataset_name,
        "datasets": mixture.datasets,
    }
    named = [name for name, value in sources.items() if value]
    if len(named) != 1:
        given = f"{len(named)} sources of prompts ({', '.join(named)})" if named else "no prompts"
        raise ValueError(f"{given}: set one of {', '.join(sources)}")
    needs_eval = arguments.training.eval_strategy != "no"
    if script.task:
        size, seed = script.task_size, script.task_seed
        train = build_task_dataset(script.task, size=size, seed=seed)
        return train, build_task_dataset(script.task, size=max(1, size // 10), seed=seed + 1) if needs_eval else None
    if script.prompts:
        if needs_eval:
            raise ValueError("prompts has no part to evaluate on: set eval_strategy to 'no', or use dataset_name")
        return load_prompts(script.prompts, skip_broken=script.skip_broken), None
    splits = get_dataset(mixture) if mixture.datasets else _load_named(script)
    wanted = [script.dataset_train_split, *([script.dataset_test_split] if needs_eval else [])]
    for split in wanted:
        if split not in splits:
            raise ValueError(f"the dataset has no split '{split}', only {', '.join(splits)}; see dataset_train_split")
    return splits[wanted[0]], splits[wanted[1]] if needs_eval else None


def _load_named(script: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _resume(arguments: Arguments) -> str | bool | None:
    """`resume_from_checkpoint` as the trainer takes it: a folder, or True for the last one of `output_dir`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    value = arguments.training.resume_from_checkpoint
    if value is None or str(value).lower() in ("false", "none", "no"):
        return None
    folder = arguments.training.output_dir
    if str(value).lower() in ("true", "yes"):
        if not Path(folder).is_dir() or get_last_checkpoint(folder) is None:
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {folder}")
        return True
    if not Path(value).is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {value}")
    return str(value)


def _stop(trainer: FastGRPOTrainer, callback: ReportCallback, argv: list[str]) -> str:
    """After Ctrl-C: keep the last whole step where that is possible, and say how to go on."""
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    folder, step = Path(trainer.args.output_dir), trainer.state.global_step
    wants_checkpoints = trainer.args.save_strategy != SaveStrategy.NO
    if wants_checkpoints and step > 0 and not callback.is_updating and not (folder / f"checkpoint-{step}").exists():
        _save_undisturbed(trainer)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None:
        return "There is no checkpoint to go on from" + ("." if wants_checkpoints else ": save_strategy is 'no'.")
    command = shlex.join(["fastgrpo", "train", *_without_resume(argv), "--resume_from_checkpoint", "true"])
    return f"The last checkpoint is {last}. Go on with:\n  {command}"


def _save_undisturbed(trainer: FastGRPOTrainer) -> None:
    """A second Ctrl-C must not leave half a checkpoint."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main_thread else None
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    finally:
        if is_main_thread:
            signal.signal(signal.SIGINT, before)


def _without_resume(argv: list[str]) -> list[str]:
    """The command line without an earlier `--resume_from_checkpoint`."""
    kept, skip = [], False
    for word in argv:
        name, has_value, _ = word.replace("-", "_").partition("=")
        if name == "__resume_from_checkpoint":
            skip = not has_value
            continue
        if not skip:
            kept.append(word)
        skip = False
    return kept


def _describe_run(arguments: Arguments, argv: list[str]) -> dict[str, Any]:
    script = arguments.script
    task = script.task or script.prompts or script.dataset_name or "a mixture of datasets"
    return {
        "task": task,
        "model": arguments.model.model_name_or_path,
        "machine": describe_machine(),
        "commit": describe_commit(Path(__file__).parent),
        "command": shlex.join(["fastgrpo", "train", *argv]),
        **describe_origin(arguments.model.model_name_or_path),
    }
