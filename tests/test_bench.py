"""The benchmarks on a tiny model: they end, take turns, and write what they promise. No time is asserted."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastgrpo.bench import drafters, e2e, measure, rollout
from fastgrpo.bench.given_rows import give_rows
from fastgrpo.bench.measure import RolloutResult, break_down, compute_equal_share, match_rates
from fastgrpo.bench.training import build_trainer, find_trainer_class
from fastgrpo.bench.worker import Worker, read_peak_rss_bytes, run_worker
from fastgrpo.cli import main
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_files import save_head
from fastgrpo.drafters.eagle_head import build_head
from fastgrpo.model import TargetModel
from fastgrpo.options import E2EOptions, RolloutOptions, UpdateOptions
from fastgrpo.report import load_run
from fastgrpo.types import PHASES, PLAIN, StepRecord, Timeline
from tiny import save_tiny_model

TINY_WORKLOAD = [
    "--prompts-per-step",
    "2",
    "--num-generations",
    "2",
    "--max-completion-length",
    "6",
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def build_record(num_seqs: int, num_emitted: int, step_s: float) -> StepRecord:
    return StepRecord(
        num_seqs=num_seqs, num_waiting=0, plan=PLAIN, num_tokens=num_seqs, num_emitted=num_emitted, num_read=0,
        num_prefilled=0, offered=(), hits=(), prefill_s=0.0, draft_s=0.0, target_s=step_s, verify_s=0.0, step_s=step_s,
    )  # fmt: skip


def test_steps_are_counted_by_their_live_sequences() -> None:
    records = [build_record(9, 9, 0.3), build_record(8, 16, 0.1), build_record(1, 3, 0.5)]
    wide, narrow = break_down(records)
    assert (wide["num_seqs"], wide["num_steps"], narrow["num_seqs"]) == (8, 2, 1)
    assert wide["tokens_per_s"] == pytest.approx(25 / 0.4)
    assert wide["acceptance_length"] == pytest.approx(25 / 17)
    assert wide["step_ms"] == pytest.approx(200)


def test_matched_rates_ignore_who_the_stragglers_are() -> None:
    plain = [build_record(4, 4, 0.4), build_record(4, 4, 0.6), build_record(1, 1, 0.2)]
    same = [build_record(1, 1, 0.2)] * 7 + [build_record(4, 4, 0.5)] * 3  # as fast, but a longer tail
    assert match_rates(same, plain).gain == pytest.approx(1)
    twice = [build_record(4, 8, 0.5), build_record(1, 2, 0.2)]
    assert match_rates(twice, plain).gain == pytest.approx(2)
    tail = match_rates([*same, build_record(4, 40, 0.5)], plain, max_num_seqs=1)
    assert (tail.own, tail.baseline) == (pytest.approx(5), pytest.approx(5))
    between = match_rates([build_record(2, 2, 0.3)], plain)
    assert between.gain == pytest.approx(1), "0.2 s at 1 and 0.5 s at 4 live sequences make 0.3 s at 2"


def test_equal_completions_are_counted() -> None:
    ours = [RolloutResult(token_ids=[[1, 2], [3]], generation_s=1.0)]
    theirs = [RolloutResult(token_ids=[[1, 2], [4]], generation_s=2.0)]
    assert compute_equal_share(ours, theirs) == 0.5
    assert (ours[0].num_tokens, ours[0].tokens_per_s) == (3, 3.0)


def test_results_name_the_commit_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = measure.describe_run("fastgrpo", {})["commit"]
    monkeypatch.setattr(measure, "describe_commit", lambda _: "committed while it ran")
    assert measure.describe_run("fastgrpo", {})["commit"] == ran


def test_rollout_writes_what_it_measured(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rollout.json"
    argv = ["bench", "rollout", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu", "--max-tokens", "8"]
    argv += ["--num-prompts", "2", "--num-generations", "3", "--repeats", "1", "--warmup-steps", "1"]
    assert main([*argv, "--warmup-learn-s", "0.1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["command"].startswith("fastgrpo bench rollout --model")
    assert {"cpu", "num_cores", "torch", "transformers"} <= result["machine"].keys()
    assert {"commit", "settings", "workload"} <= result.keys()
    assert len(result["warmup"]) == 1
    assert list(result["variants"]) == ["auto", "off", "paper", "fixed"]
    for own in result["variants"].values():
        assert own["share_equal_to_off"] == 1  # float32 on a tiny model: nothing is decided by rounding
        assert own["tokens_per_s"] > 0
        assert {"num_seqs", "tokens_per_s", "step_ms", "nodes_per_sequence"} <= own["by_concurrency"][0].keys()
        assert own["cache_peak_bytes"] > 0 and own["num_preempted"] == 0
    assert result["variants"]["off"]["acceptance_length"] == 1
    text = capsys.readouterr().out
    assert "x vs off" in text and "cache in use at most: auto " in text


def test_a_saved_head_is_measured_with_a_smaller_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    target = TargetModel(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32))
    head = build_head(target, 90)
    counts = torch.arange(target.vocab_size)  # high ids are the frequent ones
    save_head(head, tmp_path / "ranked", target, compact=True, counts=counts)
    save_head(head, tmp_path / "unranked", target)
    options = RolloutOptions(head=tmp_path / "ranked", draft_vocab_size=40)
    drafter = rollout.open_drafter(options, target)
    assert isinstance(drafter, EagleDrafter)
    assert drafter.head.draft_vocab.tolist() == list(range(50, 90))
    fitting = rollout.open_drafter(RolloutOptions(head=tmp_path / "ranked", draft_vocab_size=90), target)
    assert isinstance(fitting, EagleDrafter) and fitting.head.draft_vocab_size == 90
    with pytest.raises(ValueError, match="does not say which 40 of them"):
        rollout.open_drafter(RolloutOptions(head=tmp_path / "unranked", draft_vocab_size=40), target)
    with pytest.raises(ValueError, match="none ships for this model"):
        rollout.open_drafter(RolloutOptions(draft_vocab_size=40), target)
    with pytest.raises(ValueError, match="only heads have a draft_vocab_size"):
        RolloutOptions(drafter="ngram", draft_vocab_size=40)


def test_drafts_are_accepted_oftener_when_ranked_with_the_noise(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    argv = ["bench", "acceptance", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu"]
    argv += ["--task", "chain_sum", "--temperature", "1,0", "--num-prompts", "8", "--max-tokens", "24"]
    assert main([*argv, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["temperature"], row["num_draft_tokens"]) for row in rows] == [
        (temperature, nodes) for temperature in (1.0, 0.0) for nodes in (2, 4, 8, 16, 32)
    ]
    for row in rows:
        assert 1 <= row["without"]["acceptance_length"] <= row["depth"] + 1
        assert len(row["shared"]["by_depth"]) <= row["depth"]
        if row["temperature"] == 0:
            assert row["ratio"] == 1
    assert max(row["ratio"] for row in rows) > 1.05
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_e2e_trains_all_variants_in_turn(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e2e.json"
    other = "fixed:skip_zero_advantages=false:num_draft_tokens=4"
    argv = ["bench", "e2e", "--model", str(model_dir), *TINY_WORKLOAD, "--variants", f"trl,fixed,{other}"]
    argv += ["--steps", "2", "--prompt-examples", "3"]
    ballast = bytearray(b"x" * 2**29)  # this process is large: those it starts must not inherit its peak
    assert main([*argv, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert list(result["steps"]) == ["trl", "fixed", other]
    for rows in result["steps"].values():
        assert len(rows) == 2
        assert all(row["step_s"] >= row["generation_s"] + row["score_s"] + row["learn_s"] for row in rows)
        assert all(sum(row["phases"].values()) == pytest.approx(row["step_s"]) for row in rows)
        assert all(row["phases"][name] > 0 for row in rows for name in ("rollout", "rewards", "forward", "backward"))
        assert all(row["phases"]["other"] > 0 for row in rows)
    assert result["phases"]["trl"]["draft learning"] == 0 < result["phases"]["fixed"]["draft learning"]
    for timeline in result["timelines"].values():
        assert sum(span["name"] == "forward" for span in timeline["spans"]) == 2, "micro-batches"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    named = {(entry["measure"], entry["variant"], entry["baseline"]) for entry in result["ratios"]}
    assert {("generation_s", "fixed", "trl"), ("step_s", "fixed", "trl"), ("rss_bytes", "fixed", "trl")} <= named
    assert {("update_s", other, "fixed"), ("backward", other, "trl")} <= named
    for peak in result["peak_memory"].values():
        assert 2**26 < peak["rss_bytes"] < read_peak_rss_bytes() - len(ballast) // 2
    text = capsys.readouterr().out
    places = [text.index(f"step {step}/2 {name}: ") for step in (1, 2) for name in ("trl", "fixed", other)]
    assert places == sorted(places)


@pytest.mark.parametrize("bench", ["e2e", "update"])
def test_steps_taken_before_a_failure_are_kept(
    bench: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DyingWorker:
        """The second of two variants dies in its second step."""

        def __init__(self, name: str, options: E2EOptions) -> None:
            self.name, self.num_steps = name, 0

        def wait_until_ready(self) -> None:
            pass

        def train_step(self) -> tuple[dict[str, Any], Timeline]:
            self.num_steps += 1
            if self.name == "off" and self.num_steps == 2:
                raise RuntimeError("out of memory")
            return {"step_s": 1.5, "generation_s": 0.5}, Timeline(step_s=1.5, spans=())

        def stop(self) -> None:
            pass

    monkeypatch.setattr(e2e, "Worker", DyingWorker)
    path = tmp_path / "kept.json"
    argv = ["bench", bench, "--model", str(model_dir), "--variants", "trl,off", "--steps", "3", "--output", str(path)]
    with pytest.raises(RuntimeError, match="out of memory"):
        main(argv)
    kept = json.loads(path.read_text())
    assert kept["command"].startswith(f"fastgrpo bench {bench}") and kept["machine"]
    assert {name: len(rows) for name, rows in kept["steps"].items()} == {"trl": 1, "off": 1}


@pytest.mark.parametrize(("num_steps", "settled"), [(1, "the first and only one"), (2, "the first one left out")])
@pytest.mark.parametrize("bench", ["e2e", "update"])
def test_a_table_says_which_steps_it_is_of(
    bench: str,
    num_steps: int,
    settled: str,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class QuickWorker:
        def __init__(self, name: str, options: E2EOptions) -> None:
            self.name = name

        def wait_until_ready(self) -> None:
            pass

        def train_step(self) -> tuple[dict[str, Any], Timeline]:
            figures = ("step_s", "generation_s", "learn_s", "update_s", "tokens_per_s", "s_per_token", "mean_length")
            row: dict[str, Any] = dict.fromkeys((*figures, "max_length", "acceptance_length"), 1.0)
            return row | {"phases": dict.fromkeys(PHASES, 1.0)}, Timeline(step_s=1.0, spans=())

        def finish(self) -> dict[str, int | None]:
            return {"rss_bytes": 2**30, "gpu_bytes": None, "gpu_reserved_bytes": None}

        def stop(self) -> None:
            pass

    monkeypatch.setattr(e2e, "Worker", QuickWorker)
    argv = ["bench", bench, "--model", str(model_dir), "--variants", "trl,off", "--steps", str(num_steps)]
    assert main(argv) == 0
    assert settled in " ".join(capsys.readouterr().out.split())


def test_repeats_before_a_failure_are_kept(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["bench", "rollout", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu", "--max-tokens", "8"]
    argv += ["--num-prompts", "2", "--num-generations", "2", "--warmup-steps", "0", "--speculation", "off"]
    path = tmp_path / "kept.json"
    orders, draw = iter(range(3)), measure.draw_orders  # of the warm-up, and of two repeats

    def draw_thrice(names: Any) -> Any:
        if next(orders, None) is None:
            raise RuntimeError("out of memory")
        return draw(names)

    monkeypatch.setattr(measure, "draw_orders", draw_thrice)
    with pytest.raises(RuntimeError, match="out of memory"):
        main([*argv, "--repeats", "4", "--output", str(path)])
    assert len(json.loads(path.read_text())["variants"]["off"]["each"]) == 2


def test_updates_of_the_same_rows_are_compared(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "update.json"
    argv = ["bench", "update", "--model", str(model_dir), "--dtype", "float32", "--prompts-per-step", "2"]
    argv += ["--num-generations", "4", "--prompt-length", "40", "--max-completion-length", "9", "--equal-groups", "1"]
    argv += ["--min-completion-length", "3", "--steps", "2", "--variants", "trl,off,off:share_prompts=false"]
    assert main([*argv, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["workload"] == {
        "num_rows": 8, "prompt_length": 40, "mean_completion_length": 6, "max_completion_length": 9, "equal_groups": 1,
    }  # fmt: skip
    for own in result["variants"].values():
        assert own["update_s"] == own["each_update_s"][1] > 0 and own["peak_bytes"] > 2**26
        assert own["phases"]["rollout"] == 0 < own["phases"]["backward"]
    pairs = [(entry["variant"], entry["baseline"]) for entry in result["ratios"]]
    assert pairs == [("off", "trl"), ("off:share_prompts=false", "trl"), ("off:share_prompts=false", "off")]
    with pytest.raises(ValueError, match="min_completion_length=9"):
        UpdateOptions(min_completion_length=9, max_completion_length=8)
    with pytest.raises(ValueError, match="equal_groups"):
        UpdateOptions(equal_groups=5, prompts_per_step=4)


def test_given_rows_train_all_variants_alike(model_dir: Path, tmp_path: Path) -> None:
    """What is timed is the same work: the same gradient length, step by step."""
    options = UpdateOptions(model=str(model_dir), dtype="float32", steps=2, equal_groups=1, max_completion_length=20)
    norms = []
    for variant in ("trl", "off", "off:share_prompts=false"):
        lengths: list[int] = []
        trainer_class = give_rows(find_trainer_class(variant), options, lengths)
        trainer = build_trainer(options, variant=variant, steps=2, output_dir=tmp_path, trainer_class=trainer_class)
        trainer.train()
        norms.append([row["grad_norm"] for row in trainer.state.log_history if "loss" in row])
        assert len(lengths) == 64 and min(lengths) == 16 and max(lengths) == 20
    for own in norms[1:]:
        assert own == pytest.approx(norms[0], rel=1e-4)


def test_a_slow_reward_costs_less_while_others_decode(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rewards.json"
    argv = ["bench", "rewards", "--model", str(model_dir), *TINY_WORKLOAD, "--answer-s", "0.4", "--repeats", "1"]
    assert main([*argv, "--max-reward-calls", "2", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    ways = result["ways"]
    assert list(ways) == ["free", "serial", "pooled", "streamed"]
    assert ways["serial"]["reward_s"] >= 4 * 0.4 and ways["pooled"]["reward_s"] >= 2 * 0.4
    assert ways["streamed"]["reward_s"] < ways["serial"]["reward_s"]
    assert ways["free"]["cost_s"] == 0
    asked = {way: sum(span["name"] == "streamed reward" for span in own["spans"]) for way, own in
             result["timelines"].items()}  # fmt: skip
    assert asked == {"free": 0, "serial": 0, "pooled": 0, "streamed": 4}
    assert path.with_suffix(".png").is_file()
    assert "vs pooled (the baseline)" in capsys.readouterr().out


def test_keys_of_a_variant_are_those_of_its_config(model_dir: Path, tmp_path: Path) -> None:
    options = E2EOptions(model=str(model_dir), dtype="float32", steps=1)

    def build(variant: str) -> Any:
        return build_trainer(options, variant=variant, steps=1, output_dir=tmp_path).args

    ours = build("fixed:skip_zero_advantages=false:draft_learning_rate=1e-3:drafter=ngram:num_iterations=2")
    assert (ours.skip_zero_advantages, ours.drafter, ours.num_iterations) == (False, "ngram", 2)
    assert (ours.draft_learning_rate, ours.speculation) == (1e-3, "fixed")
    assert build("trl:beta=0.04").beta == 0.04
    for variant, message in (
        ("trl:skip_zero_advantages=false", "variant trl:skip.*: unknown key 'skip_zero_advantages'"),
        ("auto:skip_zero_advantage=false", "did you mean 'skip_zero_advantages'"),
        ("auto:skip_zero_advantages=maybe", "'maybe' is no bool"),
    ):
        with pytest.raises(ValueError, match=message):
            build(variant)
    for word in ("ours", "auto-skip_zero_advantages", "auto:skip_zero_advantages", "auto:=3"):
        with pytest.raises(ValueError, match=re.escape(repr(word))):
            E2EOptions(variants=(word,))


def test_a_worker_says_what_does_not_fit(model_dir: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    run_worker("fixed", E2EOptions(model=str(model_dir), drafter="nowhere"), theirs)
    failure, message = ours.recv()
    assert failure is ValueError
    assert message.startswith("fixed: drafter must be eagle, eagle-new, ngram, none, auto, block")


def test_a_worker_of_a_benchmark_that_was_killed_ends_without_a_traceback(
    model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    run_worker("fixed", E2EOptions(model=str(model_dir), drafter="nowhere"), theirs)
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_is_stopped_while_it_imports_says_nothing(
    model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = Worker("fixed", E2EOptions(model=str(model_dir), drafter="nowhere"))
    try:
        assert worker._process.pid is not None
        for _ in range(5):
            os.kill(worker._process.pid, signal.SIGINT)
            time.sleep(0.1)
        assert worker._process.is_alive()
    finally:
        worker.stop()
    assert "Traceback" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_the_demo_ends_with_a_report_that_names_its_baselines(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["demo", "--model", str(model_dir), *TINY_WORKLOAD, "--steps", "2", "--repeats", "1"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    assert len(run.training_rows) == 2
    names = [entry["name"] for entry in run.meta["baseline"]]
    assert names == [
        "TRL's transformers generation, untrained",
        "TRL's transformers generation, trained",
        "our engine, speculation off",
        "our engine, speculation off, tail",
    ]
    assert all(entry["ours"]["tokens_per_s"] > 0 for entry in run.meta["baseline"][:3])
    text = capsys.readouterr().out
    assert text.startswith("A language model")
    assert "completions are the same, token for token" in text
    assert (tmp_path / "run" / "run.png").is_file()


def test_learning_replays_a_run_and_measures_before_it_learns(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts, output = tmp_path / "rollouts.safetensors", tmp_path / "learning.json"
    argv = ["bench", "learning", "--model", str(model_dir), *TINY_WORKLOAD, "--steps", "3", "--updates", "2"]
    argv += ["--losses", "kl,lk", "--starts", "eagle-new", "--rollouts", str(rollouts), "--output", str(output)]
    assert main(argv) == 0
    assert "last 3" in capsys.readouterr().out, "the steps that there are"
    first = json.loads(output.read_text())
    assert [row["loss"] for row in first["curves"]] == ["frozen", "kl", "lk"]
    assert len(first["run"]["steps"]) == 3
    assert first["run"]["after_training"][-1]["acceptance_length"] >= 1
    frozen, *learnt = first["curves"]
    assert frozen["num_tokens"] == [0, 0, 0]
    for row in learnt:
        assert row["length"][0] == frozen["length"][0], "measured before anything was learnt"
        assert row["num_tokens"] == sorted(set(row["num_tokens"])), "each step teaches something"
        assert row["length"][1:] != frozen["length"][1:]
    assert output.with_suffix(".png").is_file()
    assert main(argv) == 0  # from the file: nothing is trained, and the curves are the same
    again = json.loads(output.read_text())
    assert again["run"] == {}
    assert [row["length"] for row in again["curves"]] == [row["length"] for row in first["curves"]]
    rollouts.write_bytes(b"not rollouts")
    assert main(argv) == 2
    assert "holds no recorded rollouts" in capsys.readouterr().err
    assert main([*argv, "--losses", "cosine"]) == 2
    assert "draft_loss must be one of kl, kl+tv, lk, overlap, coupled; got 'cosine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--starts", "eagle-new,ngram"], "starts must be eagle, eagle-new or folders of EAGLE-3 heads, got 'ngram'"),
        (["--starts", "eagle-new,nothing"], "drafter must be eagle"),
        (["--starts", "eagle-new", "--rollouts", "/proc/none/rollouts"], "rollouts='/proc/none/rollouts' cannot be"),
    ],
)
def test_learning_refuses_before_it_trains(arguments, message, model_dir, capsys) -> None:
    assert main(["bench", "learning", "--model", str(model_dir), *TINY_WORKLOAD, "--steps", "2", *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "training" not in told.out


def test_drafters_stand_side_by_side(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafters, "_COST_TOKENS", 6)
    monkeypatch.setattr(drafters, "_COST_BATCHES", (1, 2))
    output = tmp_path / "drafters.json"
    argv = ["bench", "drafters", "--model", str(model_dir), "--dtype", "float32", "--device", "cpu"]
    argv += ["--drafters", "eagle-new,ngram,auto", "--num-prompts", "2", "--num-generations", "2", "--max-tokens", "8"]
    assert main([*argv, "--epochs", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [row["drafter"] for row in result["drafters"]] == ["eagle-new", "ngram", "auto"]
    for row in result["drafters"]:
        assert len(row["by_epoch"]) == 2 and all(epoch["acceptance_length"] >= 1 for epoch in row["by_epoch"])
        assert [cost["num_seqs"] for cost in row["draft_cost"]] == [1, 2]
        assert all(cost["share_of_target"] > 0 for cost in row["draft_cost"])
        assert row["tokens_per_s"] > 0 and row["ratio_to_off"] > 0
    assert "ms of a draft by depth" in capsys.readouterr().out
    assert main([*argv, "--drafters", "none"]) == 2
    assert "drafters must name what drafts" in capsys.readouterr().err
