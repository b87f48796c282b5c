"""`fastgrpo bench learning`: how a draft head learns through a training run, with each loss, and not at all.

One real run is trained and its rollouts are kept. What is drafted never changes what is sampled, so the same
rollouts would have come whatever head had learnt from them: every variant is then taken through them in
order, measured on each rollout before it learns from it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.bench.acceptance import PLANS, measure_plan
from fastgrpo.bench.measure import describe_run
from fastgrpo.bench.training import build_trainer
from fastgrpo.data import build_task_dataset
from fastgrpo.draft_loss import check_loss
from fastgrpo.drafters import build_drafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.engine import FinishedRollout
from fastgrpo.learner import Learner
from fastgrpo.loading import encode_prompts, open_model, quiet_libraries
from fastgrpo.model import TargetModel
from fastgrpo.options import LearningOptions, check_writable
from fastgrpo.planner import compute_expected_length
from fastgrpo.report import GREY, PALETTE, say, write_json
from fastgrpo.rollouts import Steps, load_rollouts, save_rollouts
from fastgrpo.types import SamplingParams, SpeculationPlan
from fastgrpo.unroll import measure_acceptance

FROZEN = "frozen"
_PLAN = SpeculationPlan(depth=3, width=4, num_draft_tokens=8)  # whose expected length is the curve
_LAST = 5  # steps that an end figure is the mean of, or all where there are fewer
_HELD_OUT_SEED, _HELD_OUT = 1000, 32  # prompts for the trained policy
_LOGGED = ("draft/learn_s", "draft/saved_s", "draft/effort", "draft/rolled_back", "draft/num_updates", "step_time")

Row = dict[str, Any]


def run_learning_bench(options: LearningOptions, command: str) -> dict[str, Any]:
    """Train or read the rollouts, replay them, print, and write what `options.output` asks for; returns the results.

    Raises:
        ValueError: the workload, a loss or the file of rollouts cannot be used.
    """
    console = Console()
    quiet_libraries()
    losses = [check_loss(name) for name in options.losses]
    origin = describe_run(command, dataclasses.asdict(options))
    _check_starts(options)
    run: dict[str, Any] = {}
    if options.rollouts is not None and options.rollouts.exists():
        steps = load_rollouts(options.rollouts)
        say(console, f"{len(steps)} steps of rollouts read from {options.rollouts}")
    else:
        if options.rollouts is not None:
            check_writable("rollouts", options.rollouts)
        steps, run = _train(options, console)
        if options.rollouts is not None:
            save_rollouts(steps, options.rollouts)
    target = _open_target(options)
    curves = []
    with target.rollout_mode():
        for start in options.starts:
            curves += [_replay(start, loss, steps, target, options) for loss in (FROZEN, *losses)]
            for row in curves[-len(losses) - 1 :]:
                say(console, _describe(row))
    result = origin | {"run": run, "curves": curves}
    if options.output is not None:
        write_json(result, options.output, indent=1)
    console.print(_build_table(curves))
    if options.output is not None:
        plot_learning(curves, options.output.with_suffix(".png"))
        say(console, f"written: {options.output} and a plot beside it")
    return result


# -- the run that is replayed ----------------------------------------------------------------------------------


class _Recorder(TrainerCallback):
    """Keeps the rollouts of each training step."""

    def __init__(self) -> None:
        self.steps: Steps = []
        self._current: list[FinishedRollout] = []

    def add(self, rollout: FinishedRollout) -> None:
        assert rollout.features is not None
        self._current.append(dataclasses.replace(rollout, features=rollout.features.to("cpu", torch.bfloat16)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.append(self._current)
        self._current = []


def _train(options: LearningOptions, console: Console) -> tuple[Steps, dict[str, Any]]:
    """The rollouts of a real run, what it logged, and the acceptance of its head at its end."""
    say(console, f"training {options.steps} steps of {options.task} ...")
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(options, variant="auto", steps=options.steps, output_dir=Path(folder))
        if not isinstance(trainer.engine.drafter, EagleDrafter):
            raise ValueError(f"only a head learns: drafter must be eagle or eagle-new, got {options.drafter}")
        trainer.remove_callback(PrinterCallback)
        trainer.engine.on_finish.append(recorder.add)
        trainer.add_callback(recorder)
        trainer.train()
    logged = [
        {key: row[key] for key in (*_LOGGED, "reward") if key in row}
        for row in trainer.state.log_history
        if "reward" in row
    ]
    return recorder.steps, {"steps": logged, "after_training": _measure_trained(trainer, options, console)}


def _measure_trained(trainer: Any, options: LearningOptions, console: Console) -> list[Row]:
    """Acceptance length of the trained policy and its head on prompts that neither has seen, by plan."""
    chats = build_task_dataset(options.task, size=_HELD_OUT, seed=options.seed + _HELD_OUT_SEED)["prompt"]
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_completion_length,
        stop_token_ids=tuple(trainer.eos_token_ids),
        seed=options.seed + _HELD_OUT_SEED,
    )
    engine = trainer.engine
    prompts = encode_prompts(trainer.processing_class, chats)
    rows = []
    for plan in PLANS:
        measured = measure_plan(engine.target.model, engine.drafter, plan, prompts, params, options.max_num_seqs)
        rows.append(dataclasses.asdict(plan) | measured)
        say(console, f"after training, {plan.num_draft_tokens} nodes: {measured['acceptance_length']:.2f} tokens")
    return rows


# -- replays ---------------------------------------------------------------------------------------------------


def _open_target(options: LearningOptions) -> TargetModel:
    return TargetModel(open_model(options.model, dtype=options.dtype, device="auto").model)


def _check_starts(options: LearningOptions) -> None:
    """Before a run that would be lost.

    Raises:
        ValueError: one is no EAGLE-3 head of the model.
    """
    target = _open_target(options)
    for start in options.starts:
        _open_head(start, target)


def _open_head(start: str, target: TargetModel) -> EagleDrafter:
    drafter = build_drafter(start, target)
    if not isinstance(drafter, EagleDrafter):
        raise ValueError(f"starts must be eagle, eagle-new or folders of EAGLE-3 heads, got '{start}'")
    return drafter


def _replay(start: str, loss: str, steps: Steps, target: TargetModel, options: LearningOptions) -> Row:
    """Acceptance on each step's rollouts before they are learnt from."""
    drafter = _open_head(start, target)
    learner = None if loss == FROZEN else Learner(drafter, loss=check_loss(loss), seed=options.seed)
    row: Row = {"start": start, "loss": loss, "first": [], "length": [], "num_tokens": [], "rolled_back": 0}
    row["learn_s"] = 0.0
    num_tokens = 0
    for number, rollouts in enumerate(steps):
        rates = measure_acceptance(drafter, rollouts, seed=number).tolist()
        row["first"].append(rates[0][0])
        row["length"].append(compute_expected_length(_PLAN, rates))
        row["num_tokens"].append(num_tokens)
        if learner is None:
            continue
        for rollout in rollouts:
            learner.add(rollout)
        report = learner.learn(float("inf"), max_updates=options.updates)
        num_tokens += report.num_tokens
        row["learn_s"] += report.learn_s
        row["rolled_back"] += report.is_rolled_back
    return row


def _end(row: Row, key: str) -> float:
    return fmean(row[key][-_LAST:])


def _describe(row: Row) -> str:
    return (
        f"{row['start']}, {row['loss']}: {row['length'][0]:.2f} -> {_end(row, 'length'):.2f} tokens a forward, first "
        f"drafts {row['first'][0]:.0%} -> {_end(row, 'first'):.0%}, learning {row['learn_s']:.0f} s"
    )


def compare_with_frozen(curves: Sequence[Row], row: Row) -> tuple[float, float]:
    """Gain in expected length over the frozen head from the same start: at the end, and in the worst step."""
    frozen = next(each for each in curves if each["start"] == row["start"] and each["loss"] == FROZEN)
    gains = [own - theirs for own, theirs in zip(row["length"], frozen["length"], strict=True)]
    return fmean(gains[-_LAST:]), min(gains)


def _build_table(curves: Sequence[Row]) -> Table:
    title = f"expected tokens a forward ({_PLAN.num_draft_tokens} nodes), on rollouts not learnt from yet"
    table = Table(title=title, title_justify="left")
    for heading in ("start", "loss"):
        table.add_column(heading)
    last = len(curves[0]["length"][-_LAST:])
    for heading in ("first step", f"last {last}", "over frozen", "worst step", "rolled back"):
        table.add_column(heading, justify="right")
    for row in curves:
        gain, worst = compare_with_frozen(curves, row)
        figures = (f"{row['length'][0]:.2f}", f"{_end(row, 'length'):.2f}", f"{gain:+.2f}", f"{worst:+.2f}")
        table.add_row(row["start"], row["loss"], *figures, str(row["rolled_back"]))
    return table


def plot_learning(curves: Sequence[Row], path: Path) -> None:
    """Expected length against tokens learnt, a panel for each start. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    starts = list(dict.fromkeys(row["start"] for row in curves))
    figure = Figure(figsize=(6 * len(starts), 4.2), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts, strict=True):
        own = [row for row in curves if row["start"] == start]
        most = max((row["num_tokens"] for row in own), key=lambda tokens: tokens[-1])
        for row, colour in zip(own, (GREY, *PALETTE), strict=False):
            is_frozen = row["loss"] == FROZEN
            tokens = [count / 1000 for count in (most if is_frozen else row["num_tokens"])]
            axes.plot(tokens, row["length"], color=colour, alpha=0.25, linewidth=1)
            label = "frozen (against tokens seen by the others)" if is_frozen else row["loss"]
            axes.plot(tokens, _smooth(row["length"]), "--" if is_frozen else "-", color=colour, label=label)
        axes.set_title(f"drafter={start}", loc="left", fontsize=11)
        axes.set_xlabel("tokens learnt from before, thousands (repetitions counted)")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel(f"expected tokens a forward ({_PLAN.num_draft_tokens} nodes)")
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and its two neighbours on either side."""
    return [fmean(values[max(0, i - 2) : i + 3]) for i in range(len(values))]
