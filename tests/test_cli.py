"""The command line: what it explains, what it refuses and how, and that a tiny run goes through it whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastgrpo.cli import main
from fastgrpo.grpo.arguments import parse_arguments
from fastgrpo.grpo.script import load_datasets
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
    PlansOptions,
    ProfileOptions,
    RewardsOptions,
    RolloutOptions,
    SimulateOptions,
    UpdateOptions,
)
from fastgrpo.report import LiveProgress, load_run
from tiny import save_tiny_model

COMMANDS = {
    ("demo",): DemoOptions,
    ("generate",): GenerateOptions,
    ("profile",): ProfileOptions,
    ("bench", "rollout"): RolloutOptions,
    ("bench", "plans"): PlansOptions,
    ("bench", "budget"): BudgetOptions,
    ("bench", "acceptance"): AcceptanceOptions,
    ("bench", "learning"): LearningOptions,
    ("bench", "drafters"): DraftersOptions,
    ("bench", "simulate"): SimulateOptions,
    ("bench", "rewards"): RewardsOptions,
    ("bench", "e2e"): E2EOptions,
    ("bench", "update"): UpdateOptions,
    ("draft", "train"): DraftTrainOptions,
    ("draft", "export"): DraftExportOptions,
    ("draft", "import"): DraftImportOptions,
}
REWARDS = """
import os

calls = 0

def long_reward(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]

def breaking_reward(completion_ids, **columns):
    global calls
    calls += 1
    if calls == 3:
        raise KeyboardInterrupt
    return [float(len(ids)) for ids in completion_ids]

not_callable = 3
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of rewards and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    sys.modules.pop("tiny_rewards", None)
    chats = [[{"role": "user", "content": f"say {word}"}] for word in ("yes", "no", "maybe", "never")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    return tmp_path


def write_config(folder: Path, model_dir: Path, **changes: object) -> str:
    """A run of two steps; None leaves a key out."""
    keys: dict[str, object] = {
        "model_name_or_path": str(model_dir),
        "prompts": "prompts.jsonl",
        "reward_funcs": "tiny_rewards.long_reward",
        "output_dir": "out",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": "1e-3",
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
        "speculation": "fixed",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (keys | changes).items() if value is not None}))
    return str(path)


def read_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake is answered with."""
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fastgrpo: error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in dataclasses.fields(COMMANDS[command]):
        place = text.index(f"--{entry.name.replace('_', '-')}", text.index("options:"))
        explained = text[place:].split(" --")[0]
        assert len(explained.split()) > 3
        if isinstance(entry.default, int | float | str) and entry.default is not False:
            assert f"(default: {entry.default})" in re.sub(r"- (?=\S)", "-", explained)


def test_help_of_train_begins_with_our_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("--speculation") < text.index("--drafter") < text.index("learning_rate=")
    assert max(map(len, text.splitlines())) <= 120
    for key in ("task_size", "prompts", "draft_time_share", "num_iterations=1", "lora_r=16", "test_split_size="):
        assert key in text


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "trl", "matplotlib"}
    code = f"import sys, fastgrpo.cli as cli; cli.build_parser(); print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path) -> None:
    config = write_config(folder, model_dir, speculaton="auto")
    assert "unknown key 'speculaton'; did you mean 'speculation'?" in read_error(capsys, "train", "--config", config)
    config = write_config(folder, model_dir)
    for option, near in (("--num_generation", "--num_generations"), ("--lr-scheduler-typ=x", "--lr_scheduler_type")):
        message = read_error(capsys, "train", "--config", config, option, "4")
        assert f"did you mean '{near}'?" in message
    mixture = [{"path": "json", "spilt": "train"}]
    config = write_config(folder, model_dir, prompts=None, datasets=mixture)
    assert "unknown key 'spilt'; did you mean 'split'?" in read_error(capsys, "train", f"--config={config}")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "no model: set model_name_or_path"),
        ({"prompts": None}, "no prompts: set one of task, prompts, dataset_name, datasets"),
        ({"task": "chain_sum"}, "2 sources of prompts (task, prompts)"),
        ({"reward_funcs": None}, "no reward: set reward_funcs"),
        ({"reward_funcs": ["answer_rewad"]}, "unknown reward 'answer_rewad'; did you mean 'answer_reward'?"),
        ({"reward_funcs": [".xyz"]}, "unknown reward '.xyz'. Known are answer_reward, "),
        ({"reward_funcs": ["nowhere.reward"]}, "no module named 'nowhere'"),
        ({"reward_funcs": ["tiny_rewards.lang_reward"]}, "did you mean 'long_reward'?"),
        ({"reward_funcs": ["tiny_rewards.not_callable"]}, "has no function 'not_callable'"),
        ({"max_steps": 2.5}, "max_steps: '2.5' is no int"),
        ({"reward_weights": [1.0, "heavy"]}, "reward_weights: 'heavy' is no float"),
        ({"max_steps": True}, "max_steps: 'True' is no int"),
        ({"use_peft": 3}, "use_peft: "),
        ({"dtype": "float23"}, "dtype must be one of auto, bfloat16"),
        ({"speculation": "always"}, "speculation must be one of auto, off, paper, paper-own"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "prompts has no part to evaluate on"),
        ({"env": [1]}, "env must map names to values"),
        ({"resume_from_checkpoint": True}, "there is no checkpoint in out"),
        ({"resume_from_checkpoint": "nowhere"}, "there is no folder nowhere"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_run_that_cannot_be_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path, changes: dict[str, object], message: str
) -> None:
    assert message in read_error(capsys, "train", "--config", write_config(folder, model_dir, **changes))


def test_train_leaves_broken_prompts_out_if_told_to(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path
) -> None:
    with (folder / "prompts.jsonl").open("a") as file:
        file.write("{}\n")
    config = write_config(folder, model_dir)
    assert "1 of 5 lines of prompts.jsonl are broken; the first is line 5" in read_error(
        capsys, "train", "--config", config
    )
    for told in (["--skip-broken"], ["--skip_broken", "true"]):
        with pytest.warns(UserWarning, match="1 of 5 lines of prompts.jsonl are broken"):
            rows, _ = load_datasets(parse_arguments(["--config", config, *told]))
        assert len(rows) == 4


def test_a_file_that_is_no_config_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "no config file at nowhere.yaml" in read_error(capsys, "train", "--config", "nowhere.yaml")
    for text, message in (("- 1\n", "must hold a mapping"), ("a: [", "is not YAML"), ("", "must hold a mapping")):
        (folder / "bad.yaml").write_text(text)
        assert message in read_error(capsys, "train", "--config", "bad.yaml")


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "--config", "nowhere.yaml"])


def test_train_goes_from_a_config_to_a_report(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path
) -> None:
    shutil.copytree(model_dir, grown := folder / "grown")
    facts = json.loads((grown / "config.json").read_text()) | {"grown_from": "a small model"}
    (grown / "config.json").write_text(json.dumps(facts))
    config = write_config(folder, grown, max_steps=7, reward_weights=[1], env={"TINY_SETTING": "set"})
    overrides = "--max_steps 2 --use_peft --lora_target_modules all-linear"
    assert main(["train", "--config", config, *overrides.split()]) == 0
    text = capsys.readouterr().out
    assert "step 1/2 | reward " in text
    assert "2 training steps" in text
    run = load_run(folder / "out")
    assert [row["step"] for row in run.training_rows] == [1, 2]
    assert sorted(run.rollouts) == [1, 2]
    assert run.meta["command"].endswith(overrides) and run.meta["grown_from"] == "a small model"
    assert (folder / "out" / "run.png").is_file()
    assert (folder / "out" / "adapter_model.safetensors").is_file()


def test_train_can_be_interrupted_and_resumed(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path
) -> None:
    config = write_config(folder, model_dir, reward_funcs=["tiny_rewards.breaking_reward"], max_steps=4)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", config])
    assert stopped.value.code == 130
    text = capsys.readouterr().out
    assert "checkpoint-2. Go on with:" in text
    command = text.strip().splitlines()[-1].split()
    assert command[:2] == ["fastgrpo", "train"]
    assert command[-2:] == ["--resume_from_checkpoint", "true"]
    assert main(command[1:]) == 0
    assert [row["step"] for row in load_run(folder / "out").training_rows] == [1, 2, 3, 4]


def test_generate_prints_completions_and_their_speed(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path
) -> None:
    argv = ["generate", "--model", str(model_dir), "--max-tokens", "8", "--num-generations", "2"]
    for drafter, output in (("ngram", "a.jsonl"), ("none", "b.jsonl")):
        asked = ["--prompt", "one", "two, three", "--drafter", drafter, "--speculation", "fixed", "--output", output]
        assert main(argv + asked) == 0
        text = capsys.readouterr().out
        assert re.search(r"4 completions, \d+ tokens in .* tokens/s, acceptance length \d", text)
        assert "two, three" in text
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "one", "two, three", "two, three"]
    assert all(len(row["token_ids"]) == len(row["logprobs"]) <= 8 for row in rows)
    others = [json.loads(line)["token_ids"] for line in Path("b.jsonl").read_text().splitlines()]
    assert [row["token_ids"] for row in rows] == others  # speculation changed nothing
    assert main([*argv, "--prompts", "prompts.jsonl"]) == 0
    with Path("prompts.jsonl").open("a") as file:
        file.write('{"prompt": []}\n')
    with pytest.warns(UserWarning, match=r"1 of \d+ lines of prompts.jsonl are broken"):
        assert main([*argv, "--prompts", "prompts.jsonl", "--skip-broken"]) == 0
    assert "1 of" in read_error(capsys, *argv, "--prompts", "prompts.jsonl")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give prompts"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "x" * 600], "the model's context ends at 512"),
        (["--prompts", "prompts.jsonl", "--raw"], "needs a chat template: --raw leaves it out"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompt", "x", "--model", "./no/where"], "there is no model folder './no/where'; give a folder, a hub id"),
        (["--prompt", "x", "--drafter", "nowhere"], "drafter must be eagle, eagle-new, ngram, none, auto, block"),
    ],
)
def test_generate_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path, argv: list[str], message: str
) -> None:
    assert message in read_error(capsys, "generate", "--model", str(model_dir), *argv)


@pytest.mark.parametrize("command", [["profile"], ["bench", "plans"], ["bench", "order"], ["bench", "budget"]])
def test_results_that_could_not_be_written_are_refused_before_anything_is_measured(command, tmp_path, capsys):
    (tmp_path / "a file").write_text("")
    for output, message in (
        (tmp_path, "output must be a file, got the folder"),
        (tmp_path / "a.png", "is the name of the picture beside it; take another ending"),
        (tmp_path / "a file" / "b.json", "cannot be written"),
    ):
        assert main([*command, "--model", str(tmp_path / "nowhere"), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_results_overwrite_nothing_that_the_same_command_names(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").write_text("dear")
    mine = str(tmp_path / "mine")
    for argv in (
        ["profile", "--prompts", mine],
        ["generate", "--prompts", str(tmp_path / ".." / tmp_path.name / "mine")],
        ["bench", "simulate", "--facts", mine],
        ["bench", "simulate", "--facts", "facts.npz", "--profile", mine],
    ):
        assert main([*argv, "--output", mine]) == 2
        assert f"output would overwrite {argv[-2][2:]}: both are '{mine}'; name another" in capsys.readouterr().err
    assert main(["bench", "simulate", "--record", mine, "--output", mine]) == 2
    assert "record would overwrite output" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "dear"


@pytest.mark.parametrize(
    "error", [MemoryError("64 tokens would fit"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_memory_that_runs_out_is_said_in_one_line(error, monkeypatch, capsys):
    def run_out(options):
        raise error

    monkeypatch.setattr("fastgrpo.bench.order.run_order_bench", run_out)
    assert main(["bench", "order"]) == 2
    assert capsys.readouterr().err == f"fastgrpo: error: {error}\n"


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf"])
def test_seconds_of_learning_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    message = read_error(capsys, "bench", "rollout", "--warmup-learn-s", seconds)
    assert f"warmup_learn_s must be seconds above 0, got {float(seconds)}" in message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["demo", "--format-weight", "nan"], "format_weight must be finite and >= 0, got nan"),
        (["demo", "--learning-rate", "inf"], "learning_rate must be finite, got inf"),
        (["bench", "rewards", "--answer-s", "inf"], "answer_s must be finite, got inf"),
    ],
)
def test_numbers_that_train_nothing_are_refused(capsys: pytest.CaptureFixture[str], command, message: str) -> None:
    assert message in read_error(capsys, *command)


def test_lists_that_hold_no_numbers_are_refused_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "plans", "--concurrency", "1,x"])
    assert "'x' in '1,x'; numbers are separated by commas" in capsys.readouterr().err


def run_apart(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose standard output nobody reads where `environment` is empty."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        return subprocess.run(
            [sys.executable, "-m", "fastgrpo.cli", *argv],
            env=os.environ | environment,
            stdout=subprocess.PIPE if environment else write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_end)


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["profile"]])
def test_what_was_measured_is_on_file_before_it_is_printed(folder: Path, model_dir: Path, command: list[str]) -> None:
    workload = ["--model", str(model_dir), "--max-tokens", "4", "--drafter", "none"]
    done = run_apart(*command, *workload, "--output", "a.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (folder / "a.json").stat().st_size > 0


def test_letters_that_cannot_be_shown_stop_nothing(folder: Path, model_dir: Path) -> None:
    argv = ["generate", "--model", str(model_dir), "--prompt", "caf\u00e9", "--max-tokens", "4", "--drafter", "none"]
    done = run_apart(*argv, "--output", "caf\u00e9 1.jsonl", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert r"written: caf\xe9 1.jsonl" in done.stdout and (folder / "caf\u00e9 1.jsonl").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is damaged ("),
        ("tokenizer.json", "the tokenizer of {} cannot be read ("),
    ],
)
def test_a_model_that_was_cut_off_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, model_dir: Path, name: str, message: str
) -> None:
    damaged = shutil.copytree(model_dir, folder / "damaged")
    (damaged / name).write_bytes((model_dir / name).read_bytes()[:-600])
    assert message.format(damaged) in read_error(capsys, "generate", "--model", str(damaged), "--prompt", "x")
    if name == "model.safetensors":
        assert message in read_error(capsys, "demo", "--model", str(damaged), "--output", "out")
        assert message in read_error(capsys, "train", "--config", write_config(folder, damaged))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("a reward failed")])
def test_a_terminal_has_its_cursor_again_when_a_training_stops(
    folder: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    shown: list[LiveProgress] = []

    def fail(progress: LiveProgress, record: object) -> None:
        shown.append(progress)
        raise failure

    monkeypatch.setattr(LiveProgress, "rollout_step", fail)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to Rich
    config = write_config(folder, model_dir, save_strategy="no")
    demo = ["demo", "--model", str(model_dir), "--steps", "1", "--drafter", "ngram", "--output", "demo"]
    for argv in (demo, ["train", "--config", config]):
        with contextlib.suppress(SystemExit):
            main(argv)
    assert len(shown) == 2 and all(progress._live is None for progress in shown)
