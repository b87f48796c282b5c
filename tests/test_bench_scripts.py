"""Scripts of `bench/` explain themselves, and say in a line what cannot be done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "bench"


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ["vllm/accept.py", "vllm/prompts.py"])
def test_help_is_printed_and_nothing_written(script, tmp_path):
    done = run(tmp_path, script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu/limits.py", ("--device", "nonsense"), "invalid choice: 'nonsense'"),
        ("gpu/limits.py", ("--tiny", "--device", "cpu", "--output", "/proc/no/out.json"), "cannot be written"),
        ("gpu/laws.py", ("--tiny", "--device", "cpu", "--model", "/no/where"), "/no/where"),
        ("side_learning.py", ("--model", "/no/where"), "/no/where"),
        ("grow.py", ("grown", "--model", "/no/where"), "/no/where"),
    ],
)
def test_what_cannot_be_done_is_a_line(script, arguments, message, tmp_path):
    done = run(tmp_path, script, *arguments)
    assert done.returncode and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_results_name_the_command_that_made_them(tmp_path):
    run(tmp_path, "products.py", "--rows", "1", "--rounds", "2", "--output", "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["command"].endswith("products.py --rows 1 --rounds 2 --output out.json")


def test_the_folder_of_results_is_made_before_anything_is_measured(tmp_path):
    run(tmp_path, "products.py", "--rows", "1", "--rounds", "2", "--output", "new/out.json")
    assert (tmp_path / "new" / "out.json").is_file()
    done = run(tmp_path, "products.py", "--rows", "1", "--rounds", "2", "--output", "/proc/none/out.json")
    assert "output='/proc/none/out.json' cannot be written" in done.stderr and not done.stdout
