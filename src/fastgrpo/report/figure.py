"""One page about a run: reward, acceptance length, concurrency, where the time went, and a step as it passed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.report.colours import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from fastgrpo.report.history import LogRow, RunHistory, compute_mean, read_number
from fastgrpo.report.step_picture import draw_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 40  # a figure with more bars cannot be read


def plot_run(history: RunHistory, path_png: str | Path) -> None:
    """Draw a run on one page: reward, acceptance length, concurrency, where the time went, and a step as it passed.

    Needs matplotlib, but no display.

    Raises:
        ValueError: `history` has no training step.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = history.training_rows
    if not rows:
        raise ValueError("nothing to plot: log_rows has no training step")
    panels = [["reward", "acceptance"], ["concurrency", "time"]]
    height, ratios = 8.5, [4.0, 4.0]
    if history.timelines:
        height, ratios = 11.0, [4.0, 4.0, 2.0]
        panels.append(["steps", "steps"])
    figure = Figure(figsize=(13, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes: dict[str, Axes] = figure.subplot_mosaic(panels, height_ratios=ratios)
    _plot_reward(axes["reward"], rows)
    _plot_acceptance(axes["acceptance"], rows)
    _plot_concurrency(axes["concurrency"], history)
    _plot_time(axes["time"], rows)
    if history.timelines:
        axes["steps"].set_title("Training steps as they passed", loc="left", fontsize=11, fontweight="bold")
        draw_steps(axes["steps"], {f"step {step}": history.timelines[step] for step in sorted(history.timelines)})
    facts = [str(history.meta[key]) for key in ("task", "model") if key in history.meta]
    if "commit" in history.meta:
        facts.append(f"commit {history.meta['commit']}")
    figure.suptitle(" · ".join(facts), fontsize=13)
    path = Path(path_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def _training_steps(rows: Sequence[LogRow]) -> list[float]:
    """The step each row names, or its place where it names none."""
    return [read_number({"step": index} | dict(row), "step") for index, row in enumerate(rows, start=1)]


def _prepare_panel(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.locator_params(axis="x", integer=xlabel == "training step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def _plot_smoothed(axes: Axes, rows: Sequence[LogRow], key: str, colour: str, label: str, linestyle: str = "-") -> None:
    """Every step faint, and bold the mean over a window of a fifth of the run."""
    steps, values = _training_steps(rows), [read_number(row, key) for row in rows]
    window = max(1, len(rows) // 5)
    smooth = [compute_mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        label = f"{label}, mean of {window} steps"
    marker = "o" if len(rows) <= 10 else None
    axes.plot(steps, smooth, color=colour, linewidth=2.2, linestyle=linestyle, label=label, marker=marker)


def _plot_reward(axes: Axes, rows: Sequence[LogRow]) -> None:
    _prepare_panel(axes, "Reward", "training step", "mean reward of the completions")
    _plot_smoothed(axes, rows, "reward", BLUE, "reward")
    axes.legend(frameon=False, loc="best")


def _plot_acceptance(axes: Axes, rows: Sequence[LogRow]) -> None:
    _prepare_panel(axes, "Acceptance length", "training step", "tokens per sequence and target forward")
    for key, colour, linestyle, label in (
        ("rollout/spec_accept_length", BLUE, "-", "all engine steps"),
        ("rollout/spec_accept_length_speculating", ORANGE, "--", "while speculating"),
    ):
        if any(math.isfinite(read_number(row, key)) for row in rows):
            _plot_smoothed(axes, rows, key, colour, label, linestyle)
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1.6, label="plain decoding")
    key = "rollout/spec_first_draft_rate"
    if any(math.isfinite(read_number(row, key)) for row in rows):
        rate_axes = axes.twinx()
        rate_axes.set_ylim(0, 1)
        rate_axes.set_ylabel("first draft token accepted (share)", color=GREEN)
        rate_axes.spines[["top", "left"]].set_visible(False)
        _plot_smoothed(rate_axes, rows, key, GREEN, "first draft token accepted")
    axes.legend(frameon=False, loc="best")


def _plot_concurrency(axes: Axes, history: RunHistory) -> None:
    """One rollout from its start to its end: the batch drains, and speculation fills the gap."""
    _prepare_panel(axes, "One rollout", "seconds since the rollout began", "live sequences")
    rollouts = {step: records for step, records in history.rollouts.items() if records}
    if not rollouts:
        axes.text(0.5, 0.5, "no rollout was kept", transform=axes.transAxes, ha="center", color=GREY)
        return
    tokens_axes = axes.twinx()
    kept = sorted({min(rollouts), max(rollouts)})
    for step in kept:
        records = rollouts[step]
        ends_s = list(accumulate((record.step_s for record in records), initial=0.0))
        bold: dict[str, Any] = {"linewidth": 2.0} if step == kept[-1] else {"linewidth": 1.2, "alpha": 0.4}
        axes.stairs([record.num_seqs for record in records], ends_s, baseline=None, color=BLUE, **bold)
        tokens_axes.stairs([record.num_tokens for record in records], ends_s, baseline=None, color=RED, **bold)
        axes.plot([], [], color=GREY, label=f"training step {step}", **bold)
    capacity = compute_mean([read_number(row, "plan/capacity") for row in history.training_rows])
    top_tokens = tokens_axes.dataLim.y1
    if capacity <= 3 * top_tokens:  # a capacity far above what was verified would flatten the lines
        top_tokens = max(top_tokens, capacity)
        tokens_axes.axhline(capacity, color=RED, linestyle=":", linewidth=1.2)
        axes.plot([], [], color=RED, linestyle=":", label="verification capacity")
    axes.set_xlim(left=0)
    # room above for the legend, and more of it for the sequences: the two lines start apart
    axes.set_ylim(0, 1.6 * axes.dataLim.y1)
    tokens_axes.set_ylim(0, 1.25 * top_tokens)
    axes.yaxis.label.set_color(BLUE)
    tokens_axes.set_ylabel("tokens in a target forward", color=RED)
    tokens_axes.spines[["top", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", ncols=3)


def _time_parts(row: LogRow) -> dict[str, tuple[str, float]]:
    """The parts of one training step, bottom to top: label, colour and seconds. Not measured is 0."""

    def seconds(*keys: str) -> float:
        return sum(max(0.0, value) for value in (read_number(row, key) for key in keys) if math.isfinite(value))

    target_s, draft_s, verify_s = (seconds(f"rollout/{name}_s") for name in ("target", "draft", "verify"))
    unnamed_s = seconds("time/rollout_s") - target_s - draft_s - verify_s
    return {
        "rollout: target": (BLUE, target_s),
        "rollout: draft": (ORANGE, draft_s),
        "rollout: verify": (GREEN, verify_s),
        "rollout: prefill, other": (SKY, max(seconds("rollout/prefill_s", "rollout/other_s"), unnamed_s)),
        "draft learning": (PURPLE, seconds("time/learn_s")),
        "rewards and update": (GREY, seconds("time/reward_s", "time/update_s")),
    }


def _plot_time(axes: Axes, rows: Sequence[LogRow]) -> None:
    bin_size = math.ceil(len(rows) / MAX_BARS)
    title = "Where the time went" + (f" (means of {bin_size} steps)" if bin_size > 1 else "")
    _prepare_panel(axes, title, "training step", "seconds per training step")
    steps, parts = _training_steps(rows), [_time_parts(row) for row in rows]
    bins = [slice(start, start + bin_size) for start in range(0, len(rows), bin_size)]
    centres = [compute_mean(steps[place]) for place in bins]
    width = 0.85 * (min(b - a for a, b in pairwise(centres)) if len(centres) > 1 else 1.0)
    tops_s = [0.0] * len(bins)
    for label, (colour, _) in parts[0].items():
        heights_s = [compute_mean([part[label][1] for part in parts[place]]) for place in bins]
        axes.bar(centres, heights_s, width=width, bottom=tops_s, color=colour, label=label)
        tops_s = [top_s + height_s for top_s, height_s in zip(tops_s, heights_s, strict=True)]
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
