"""The benches that wait for a GPU, rehearsed whole on the CPU with a tiny model."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgrpo.cli import build_parser
from fastgrpo.options import read_options
from tiny import save_tiny_model

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "gpu"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run(name, monkeypatch, path, *arguments):
    """What the bench writes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    command = [f"{name}.py", "--device", "cpu", "--tiny", "--output", str(path), *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", command)
    importlib.import_module(name).main()
    written = json.loads(path.read_text())
    assert written["machine"]["torch"] and written["commit"] and name in written["command"]
    assert {"cuda", "driver", "triton"} <= set(written)
    return written


def test_every_command_of_the_queue_can_be_read():
    """A mistyped option would cost a start of a machine that is lent for half an hour."""
    commands = re.findall(r"`(fastgrpo [^`]+)`", (FOLDER / "README.md").read_text())
    assert len(commands) > 12
    for command in commands:
        namespace = build_parser().parse_args(shlex.split(command)[1:])
        read_options(namespace.command.record, namespace)


def test_every_script_of_the_queue_is_there_and_has_the_options_it_is_given():
    text, shared = (FOLDER / "README.md").read_text(), (FOLDER / "limits.py").read_text()
    commands = re.findall(r"\bpython (bench/\S+\.py)([^`&]*)", text)
    assert {path for path, _ in commands} >= {str(path.relative_to(ROOT)) for path in FOLDER.glob("*.py")}
    for path, arguments in commands:
        source = (ROOT / path).read_text()
        known = source + shared if "from limits import" in source else source
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in known, f"{path} has no {option}"


def test_every_item_of_the_queue_names_its_command_and_its_result():
    rows = [line.split(" | ") for line in (FOLDER / "README.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) > 25
    for number, _, command, result in (row[:4] for row in rows):
        assert re.search(r"`.*(python|fastgrpo) .*`|its result", command), f"{number}: {command}"
        assert result.strip(" |"), number


def test_limits(monkeypatch, tmp_path):
    limits = run("limits", monkeypatch, tmp_path / "out.json")["limits"]
    assert set(limits) == {"copy_bytes_per_s", "read_bytes_per_s", "bf16_flops_per_s"}
    assert all(value > 0 for value in limits.values())


def test_laws(monkeypatch, tmp_path, model_dir):
    written = run("laws", monkeypatch, tmp_path / "out.json", "--model", model_dir, "--drafter", "eagle-new")
    exact = written["types"]["float32"]
    assert exact["num_equal"] == exact["num_completions"] == 8 and exact["gaps"] == []
    assert len(written["types"]["bfloat16"]["gaps"]) == 8 - written["types"]["bfloat16"]["num_equal"]


def test_steps(monkeypatch, tmp_path, model_dir):
    written = run("steps", monkeypatch, tmp_path / "out.json", "--model", model_dir, "--context", 32)
    assert [(point["rows"], point["nodes"]) for point in written["points"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(0 < point["share"] == point["floor_s"] / point["forward_s"] for point in written["points"])
    assert set(written["plain_step_s"]) == {"1", "2"}


def test_prefill(monkeypatch, tmp_path, model_dir):
    points = run("prefill", monkeypatch, tmp_path / "out.json", "--model", model_dir)["points"]
    assert [(point["rows"], point["nodes"], point["context"]) for point in points] == [(2, 16, 0), (1, 16, 32)]
    assert all(point["floor_s"] > 0 and point[way]["seconds"] > 0 for point in points for way in ("kernel", "mask"))


def test_where(monkeypatch, tmp_path, model_dir):
    arguments = ("--model", model_dir, "--context", 32, "--tables", tmp_path / "tables")
    plans = run("where", monkeypatch, tmp_path / "out.json", *arguments)["plans"]
    assert set(plans) == {f"{plan} of {rows}" for plan in ("plain", "3x1x3", "3x3x8") for rows in (1, 2)}
    for name, parts in plans.items():
        assert 0 < parts["target_s"] < parts["step_s"]
        assert parts["acceptance_length"] == 1 if name.startswith("plain") else parts["acceptance_length"] >= 1
    tables = [path.read_text() for path in (tmp_path / "tables").iterdir()]
    assert len(tables) == 6 and all("aten::" in table and "engine.py" in table for table in tables)


def test_start(monkeypatch, tmp_path, model_dir):
    """What the timed process does, in this one; that two are begun, and with the same caches."""
    monkeypatch.syspath_prepend(str(FOLDER))
    start, told = importlib.import_module("start"), []
    sizes = {"model": str(model_dir), "drafter": "none", "device": "cpu", "rows": 2, "started": time.time()}
    own = start.begin(argparse.Namespace(**sizes))
    assert 0 < own["loaded_s"] < own["first_step_s"] <= own["steady_step_s"]

    def answer(command, *, env, **_):
        options = dict(zip(command[2::2], command[3::2], strict=True))
        assert options["--model"] == str(model_dir) and float(options["--started"]) <= time.time()
        told.append([env[name] for name in ("FASTGRPO_CACHE", "TRITON_CACHE_DIR")])
        return subprocess.CompletedProcess(command, 0, stdout=f"loading\n{json.dumps(own)}\n")

    monkeypatch.setattr(start, "subprocess", SimpleNamespace(run=answer, PIPE=subprocess.PIPE))
    starts = run("start", monkeypatch, tmp_path / "out.json", "--model", model_dir)["starts"]
    assert starts == {"first": own, "again": own} and told[0] == told[1]


def test_syncs(monkeypatch, tmp_path, model_dir):
    plans = run("syncs", monkeypatch, tmp_path / "out.json", "--model", model_dir, "--drafter", "eagle-new")["plans"]
    assert all(plan["steps"] and set(plan["waits_by_step"]) == {"0"} for plan in plans.values())


def test_side_learning(monkeypatch, tmp_path, model_dir):
    config, path = json.loads((model_dir / "config.json").read_text()), tmp_path / "out.json"
    grown = tmp_path / "grown"
    shutil.copytree(model_dir, grown)
    (grown / "config.json").write_text(json.dumps(config | {"grown_from": "a small model"}))
    sizes = "--drafter eagle-new --num-prompts 1 --num-generations 2 --max-tokens 8 --repeats 1"
    command = ["side_learning.py", "--model", str(grown), *sizes.split(), "--output", str(path)]
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.setattr(sys, "argv", command)
    importlib.import_module("side_learning").main()
    written = json.loads(path.read_text())
    assert written["grown_from"] == "a small model" and written["machine"]["torch"] and written["commit"]
    assert "side_learning.py" in written["command"] and len(written["rows"]) == 2


@pytest.mark.parametrize("whole", [[], ["--whole"]])
def test_training(monkeypatch, tmp_path, model_dir, whole):
    arguments = ("--model", model_dir, "--variants", "off,trl", "--steps", 3, *whole)
    variants = run("training", monkeypatch, tmp_path / "out.json", *arguments)["variants"]
    assert set(variants) == {"off", "trl"}
    for own in variants.values():
        assert len(own["each_step_s"]) == 2 and own["step_s"] == own["each_step_s"][1] > 0
        assert any(entry["name"].startswith("aten::") and entry["ms"] > 0 for entry in own["host"])


def test_weights(monkeypatch, tmp_path):
    products = run("weights", monkeypatch, tmp_path / "out.json")["products"]
    assert set(products) == {"query, key, value", "output", "gate, up", "down"}
    for own in products.values():
        assert own["read_s"] > 0 and all(seconds > 0 for seconds in own["ways"]["cuBLAS"].values())
