"""A saved run comes back as it was, the figure is written, and the live display never stops a training."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastgrpo.metrics import compute_phase_times, rollout_metrics, step_time_shares, summarise_rollout
from fastgrpo.report import (
    LiveProgress,
    RunHistory,
    describe_commit,
    describe_machine,
    load_run,
    plot_run,
    print_summary,
    save_run,
)
from fastgrpo.report.step_picture import build_step_picture, pack_lanes
from fastgrpo.types import PHASES, PLAIN, Span, SpeculationPlan, StepRecord, Timeline

CAPACITY = 192


def build_step(num_seqs: int, num_draft_tokens: int, acceptance_length: float, num_waiting: int = 0) -> StepRecord:
    """One made-up engine step; a forward costs more once it is wider than the capacity."""
    depth = min(4, num_draft_tokens)
    plan = SpeculationPlan(depth=depth, width=2, num_draft_tokens=num_draft_tokens) if num_draft_tokens else PLAIN
    num_tokens = num_seqs * (1 + num_draft_tokens)
    target_s = 0.02 * max(1.0, num_tokens / CAPACITY)
    draft_s = 0.001 * depth
    return StepRecord(
        num_seqs=num_seqs,
        num_waiting=num_waiting,
        plan=plan,
        num_tokens=num_tokens,
        num_emitted=max(num_seqs, round(num_seqs * (acceptance_length if depth else 1))),
        num_read=num_seqs * 100,
        num_prefilled=0,
        offered=((num_seqs, num_seqs),) * depth,
        hits=((num_seqs, 0),) * depth,
        prefill_s=0.0,
        draft_s=draft_s,
        target_s=target_s,
        verify_s=0.002,
        step_s=target_s + draft_s + 0.003,
    )


def build_rollout(rng: random.Random, acceptance_length: float) -> list[StepRecord]:
    """A batch of 64 that drains: the fewer sequences are live, the more draft tokens each one gets."""
    left = sorted((rng.lognormvariate(5.0, 0.5) for _ in range(64)), reverse=True)
    records = []
    while left:
        num_draft_tokens = min(16, CAPACITY // len(left) - 1)
        records.append(build_step(len(left), num_draft_tokens, acceptance_length))
        left = [length - records[-1].acceptance_length for length in left]
        left = [length for length in left if length > 0]
    return records


def build_history(num_steps: int, seed: int = 0) -> RunHistory:
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    rollouts = {}
    for step in range(1, num_steps + 1):
        records = build_rollout(rng, 1.9 + 1.3 * (1 - math.exp(-3 * step / num_steps)))
        rollout_s = sum(record.step_s for record in records) + 0.2
        summary = summarise_rollout(records, rollout_s=rollout_s)
        row = {"step": step, "reward": 0.7 - 0.5 * math.exp(-2 * step / num_steps) + rng.gauss(0, 0.04)}
        row |= {"completions/mean_length": summary.num_tokens_emitted / 64, "step_time": rollout_s + 2.5}
        row |= rollout_metrics(summary, capacity=CAPACITY) | step_time_shares(rollout_s, 0.6, 1.7, 0.2)
        rows.append(row)
        if step in (1, num_steps):
            rollouts[step] = records
    rows.append({"step": num_steps, "train_runtime": 100.0})
    meta = {
        "task": "count to n",
        "model": "tiny",
        "commit": "0123abc",
        "baseline": [
            {"name": "TRL [paged]", "generation_s": 9.0, "tokens_per_s": 900.0, "ours": {"generation_s": 4.5}},
        ],
    }
    return RunHistory(log_rows=rows, rollouts=rollouts, timelines={1: build_timeline()}, meta=meta)


def build_timeline() -> Timeline:
    """A step of 10 s: a rollout that two rewards run beneath, and an update in two micro-batches."""
    spans = [("rollout", 0.0, 4.0), ("streamed reward", 2.0, 5.0), ("streamed reward", 3.0, 4.5), ("rewards", 4.0, 5.0)]
    spans += [("draft learning", 5.0, 5.5), ("forward", 6.0, 7.0), ("backward", 7.0, 8.0), ("forward", 8.0, 8.5)]
    spans += [("backward", 8.5, 9.0), ("optimiser", 9.0, 9.25)]
    return Timeline(step_s=10.0, spans=tuple(Span(name=name, start_s=start, end_s=end) for name, start, end in spans))


def build_console(is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=is_terminal, color_system=None)


def read_text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


JSON_VALUES = st.none() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), max_size=4), step=st.integers(0, 10**6))
def test_a_saved_run_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], step: int
) -> None:
    records = [build_step(8, 0, 1.0), build_step(4, 6, 2.5, num_waiting=3)]
    history = RunHistory(
        log_rows=rows,
        rollouts={step: records},
        timelines={step: build_timeline(), step + 1: Timeline(step_s=1.5, spans=())},
        meta={"task": "é", "baseline": [{"name": "a"}]},
    )
    directory = tmp_path_factory.mktemp("run")
    save_run(history, directory)
    assert load_run(directory) == history
    assert [path.name for path in directory.iterdir()] == ["run.json"]


def test_what_was_not_measured_is_null_on_disk(tmp_path: Path) -> None:
    rows = [{"reward": math.nan, "kl": math.inf, "reward_std": 0.5}]
    path = save_run(RunHistory(log_rows=rows), tmp_path / "deeper")
    assert json.loads(path.read_text(encoding="utf-8"))["log_rows"] == [{"reward": None, "kl": None, "reward_std": 0.5}]


def test_a_failed_save_leaves_the_old_run(tmp_path: Path) -> None:
    save_run(RunHistory(log_rows=[{"reward": 1.0}]), tmp_path)
    with pytest.raises(TypeError):
        save_run(RunHistory(log_rows=[{"reward": object()}]), tmp_path)
    assert load_run(tmp_path).log_rows == [{"reward": 1.0}]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_is_stopped_leaves_nothing_beside_the_old_run(stop, tmp_path, monkeypatch) -> None:
    save_run(RunHistory(log_rows=[{"reward": 1.0}]), tmp_path)
    write = Path.write_text

    def write_a_part(path: Path, text: str, **keywords: Any) -> int:
        write(path, text[:9], **keywords)
        raise stop

    with monkeypatch.context() as patch, pytest.raises(type(stop), match="run.json could not" if stop.args else None):
        patch.setattr(Path, "write_text", write_a_part)
        save_run(RunHistory(log_rows=[{"reward": 2.0}]), tmp_path)
    assert load_run(tmp_path).log_rows == [{"reward": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        load_run(tmp_path)
    path = save_run(build_history(2), tmp_path)
    good = json.loads(path.read_text(encoding="utf-8"))
    record = good["rollouts"]["1"][0]
    broken = {
        "not JSON": "{",
        "not a run": json.dumps({"format": "other"}),
        "has version 99": json.dumps(good | {"version": 99}),
        "'meta' must be a dict": json.dumps(good | {"meta": 3}),
        "log_rows[0] must be a dict": json.dumps(good | {"log_rows": [1]}),
        "got 'first'": json.dumps(good | {"rollouts": {"first": []}}),
        "rollouts[1][0] lacks ['step_s']": json.dumps(
            good | {"rollouts": {"1": [{name: value for name, value in record.items() if name != "step_s"}]}}
        ),
        "rollouts[1][0].hits must be a list of lists": json.dumps(good | {"rollouts": {"1": [record | {"hits": [1]}]}}),
        "timelines[1].spans[0] lacks ['end_s']": json.dumps(
            good | {"timelines": {"1": {"step_s": 1.0, "spans": [{"name": "rollout", "start_s": 0.0}]}}}
        ),
        "timelines are named by their training step": json.dumps(good | {"timelines": {"a": 1}}),
        "rollouts[1][0].plan must be a dict": json.dumps(good | {"rollouts": {"1": [record | {"plan": 3}]}}),
    }
    for message, text in broken.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(message).replace("not\\ ", "(is no|not|is not) ")):
            load_run(tmp_path)


@pytest.mark.parametrize("num_steps", [1, 6, 100])
def test_the_figure_is_written(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "figures" / "run.png"
    plot_run(build_history(num_steps), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_needs_a_training_step_and_nothing_else(tmp_path: Path) -> None:
    plot_run(RunHistory(log_rows=[{}, {"reward": None}], rollouts={1: []}), tmp_path / "run.png")
    with pytest.raises(ValueError, match="no training step"):
        plot_run(RunHistory(log_rows=[{"train_runtime": 3.0}]), tmp_path / "run.png")


def test_the_summary_names_the_baseline_of_each_speed_up() -> None:
    console = build_console()
    print_summary(build_history(9), console)
    text = read_text(console)
    assert "9 training steps" in text
    assert "2.00x vs TRL [paged]" in text
    assert text.count("vs TRL") == 1  # `ours` does not say how many tokens/s: no speed-up is made up


def test_phases_and_what_lies_between_them_make_the_step() -> None:
    seconds = compute_phase_times(build_timeline())
    assert seconds == {
        "rollout": 4.0, "rewards": 1.0, "draft learning": 0.5, "log-probs": 0.0, "forward": 1.5, "backward": 1.5,
        "optimiser": 0.25, "other": 1.25,
    }  # fmt: skip
    console = build_console()
    print_summary(build_history(3), console)
    table = read_text(console).split("A step by its phases")[1].split("Measured")[0]
    assert re.search(r"forward\W+1\.50", table) and re.search(r"all\W+10\.00", table) and "log-probs" not in table


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=8))
def test_streamed_rewards_of_one_lane_do_not_overlap(starts: list[tuple[int, int]]) -> None:
    spans = [Span(name="streamed reward", start_s=start, end_s=start + length) for start, length in starts]
    lanes = pack_lanes(spans)
    for lane in set(lanes):
        own = sorted((span.start_s, span.end_s) for span, its in zip(spans, lanes, strict=True) if its == lane)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    most = max((sum(s.start_s <= second < s.end_s for s in spans) for second in range(15)), default=0)
    assert len(set(lanes)) == most, "no more lanes than run at once"


def test_the_picture_of_steps_shows_each_second_once() -> None:
    later = Timeline(step_s=4.0, spans=(Span(name="rollout", start_s=1.0, end_s=3.0),))
    (axes,) = build_step_picture({"trl": build_timeline(), "auto": later}, title="two steps").axes
    bars = [bar for bar in axes.patches if bar.get_width()]
    phases = [span for timeline in (build_timeline(), later) for span in timeline.spans]
    assert sorted(bar.get_width() for bar in bars) == sorted([10.0, 4.0, *(s.end_s - s.start_s for s in phases)])
    assert {text.get_text() for text in axes.texts} == {"10.0 s", "4.0 s", "2.0 s", "1.0 s", "0.5 s"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["trl", "auto"]
    shown = {text.get_text() for text in axes.get_legend().get_texts()}
    assert shown == {"streamed reward", *PHASES} - {"log-probs"}
    with pytest.raises(ValueError, match="no step was timed"):
        build_step_picture({}, title="none")


def test_a_baseline_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        print_summary(RunHistory(log_rows=[], meta={"baseline": [{"step_s": 3.0}]}), build_console())


def test_without_ours_the_end_of_training_is_compared() -> None:
    rows = [{"time/rollout_s": 50.0}] + [{"time/rollout_s": 2.0}] * 3
    console = build_console()
    print_summary(RunHistory(log_rows=rows, meta={"baseline": [{"name": "plain", "generation_s": 5.0}]}), console)
    assert "2.50x vs plain" in read_text(console)
    assert "against the last 3 training steps" in read_text(console)


@given(st.dictionaries(st.sampled_from(["reward", "step", "step_time", "eval_loss", "loss"]), JSON_VALUES))
def test_live_progress_survives_any_row(row: dict[str, Any]) -> None:
    for is_terminal in (False, True):
        console = build_console(is_terminal)
        progress = LiveProgress(console)
        progress.stop()
        progress.training_step(row)
        progress.start(3)
        progress.rollout_step(build_step(4, 6, 2.0))
        progress.training_step(row)
        progress.stop()
        progress.stop()
        progress.start(3)
        progress.training_step({"reward": 0.5, "step": 1})  # still shows what can be shown
        progress.stop()
        assert "0.5" in read_text(console)


def test_a_log_file_has_one_plain_line_for_each_training_step() -> None:
    console = build_console()
    seconds = iter(range(100))
    progress = LiveProgress(console, clock=lambda: float(next(seconds)))
    progress.start(10, first_step=4)
    progress.training_step({"step": 4})  # nothing done yet: no guess at the time left
    for step in (5, 6):
        for _ in range(20):
            progress.rollout_step(build_step(4, 6, 2.0))
        progress.training_step({"step": step, "reward": 0.25})
    progress.training_step({"eval_reward": 0.5})
    progress.stop()
    lines = read_text(console).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("left -")
    assert lines[2].startswith("step 6/10 | reward 0.25 | completion - tokens")
    assert lines[2].endswith("left 0:00:06")  # 2 steps in 3 s, 4 to go


def test_the_panel_is_redrawn_four_times_a_second_at_most() -> None:
    now_s = 0.0
    console = build_console(is_terminal=True)
    progress = LiveProgress(console, clock=lambda: now_s)
    progress.start(1)
    drawn = 0
    for _ in range(1000):
        before = len(read_text(console))
        progress.rollout_step(build_step(4, 6, 2.0))
        drawn += len(read_text(console)) > before
        now_s += 0.001
    progress.stop()
    assert drawn == 4
    assert "4 running, 0 waiting" in read_text(console)


def test_a_machine_and_a_commit_can_be_described(tmp_path: Path) -> None:
    machine = describe_machine()
    assert machine["num_cores"] >= 1
    assert machine["torch"]
    assert machine["cpu_bfloat16"] in (None, "amx_bf16", "avx512_bf16")
    assert json.dumps(machine)
    assert describe_commit(tmp_path) == "unknown"


def test_a_commit_is_dirty_where_code_differs_and_clean_where_results_do(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    assert describe_commit(tmp_path) == "unknown", "nothing is committed yet"
    (tmp_path / "src").mkdir()
    code, result = tmp_path / "src" / "code.py", tmp_path / "result.json"
    code.write_text("1\n")
    result.write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "--short", "HEAD").strip()
    result.write_text("2\n")
    assert describe_commit(tmp_path / "src") == commit
    code.write_text("2\n")
    assert describe_commit(tmp_path / "src") == f"{commit}-dirty"
