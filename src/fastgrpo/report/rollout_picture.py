"""One rollout at a glance: who was live, what was verified, what came of it, and when the plan changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.metrics import compute_ratio
from fastgrpo.report.colours import BLUE, GREEN, GREY, ORANGE, RED, SKY
from fastgrpo.types import SpeculationPlan, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WINDOWS = 40  # windows that a rollout is smoothed over
_SHADE = "#EFEFEF"
_MOST_LINES = 40  # switches that are drawn through all panels
_MOST_TRIED = 3  # steps of a plan, between two stretches with one other: a trial
_NAMED_SHARE = 0.045  # of the rollout's seconds: a shorter stretch with one plan has no room for its shape


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Neighbouring steps with one plan, in seconds since the rollout began."""

    plan: SpeculationPlan
    start_s: float
    end_s: float
    num_steps: int


def find_stretches(records: Sequence[StepRecord]) -> list[Stretch]:
    """The rollout cut where its plan changes."""
    ends_s = [0.0, *accumulate(record.step_s for record in records)]
    stretches, first = [], 0
    for plan, steps in groupby(records, key=lambda record: record.plan):
        last = first + len(list(steps))
        stretches.append(Stretch(plan=plan, start_s=ends_s[first], end_s=ends_s[last], num_steps=last - first))
        first = last
    return stretches


def _is_trial(stretch: Stretch, before: Stretch, after: Stretch) -> bool:
    return stretch.num_steps <= min(_MOST_TRIED, before.num_steps, after.num_steps)


def set_trials_apart(stretches: Sequence[Stretch]) -> tuple[list[Stretch], list[Stretch]]:
    """The stretches, those before and after a trial joined over it; and the trials: a few steps with another plan."""
    lasting: list[Stretch] = []
    trials: list[Stretch] = []
    for stretch, after in zip(stretches, [*stretches[1:], None], strict=True):
        before = lasting[-1] if lasting else None
        if before and after and before.plan == after.plan and _is_trial(stretch, before, after):
            trials.append(stretch)
        elif before and before.plan == stretch.plan:
            num_steps = before.num_steps + stretch.num_steps
            lasting[-1] = replace(before, end_s=stretch.end_s, num_steps=num_steps)
        else:
            lasting.append(stretch)
    return lasting, trials


def plot_rollout(
    records: Sequence[StepRecord],
    path: Path,
    *,
    title: str,
    plain: Sequence[StepRecord] = (),
    capacity: float | None = None,
) -> None:
    """Write the figure of `build_rollout_picture`. Needs matplotlib.

    Raises:
        ValueError: there is no step to draw.
    """
    figure = build_rollout_picture(records, title=title, plain=plain, capacity=capacity)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def build_rollout_picture(
    records: Sequence[StepRecord],
    *,
    title: str,
    plain: Sequence[StepRecord] = (),
    capacity: float | None = None,
) -> Figure:
    """Four panels over seconds; where the rollout decoded plainly they are shaded.

    Args:
        plain: steps of the same rollout decoded plainly, drawn faintly for comparison.
        capacity: tokens per forward at the knee of the roofline.

    Raises:
        ValueError: there is no step to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not records:
        raise ValueError("nothing to draw: the rollout has no step")
    figure = Figure(figsize=(11, 10), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    panels = figure.subplots(4, 1, sharex=True)
    stretches = find_stretches(records)
    for axes, title_of_panel, ylabel in zip(
        panels,
        (
            "Live sequences",
            "Tokens in each target forward (above: plans, as depth x width x draft tokens)",
            "Acceptance length",
            "Speed",
        ),
        ("sequences", "tokens", "tokens a sequence\nand forward", "tokens/s"),
        strict=True,
    ):
        _prepare(axes, title_of_panel, ylabel, stretches)
    _plot_sequences(panels[0], records, plain)
    _plot_verified(panels[1], records, stretches, capacity)
    _plot_acceptance(panels[2], records)
    _plot_speed(panels[3], records, plain)
    ends_s = [sum(record.step_s for record in steps) for steps in (records, plain)]
    panels[3].set_xlim(0, 1.01 * min(max(ends_s), 2 * ends_s[0]))  # a plain one far longer would squeeze what is shown
    panels[3].set_xlabel("seconds since the rollout began")
    for axes in panels:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title, fontsize=12)
    return figure


def _prepare(axes: Axes, title: str, ylabel: str, stretches: Sequence[Stretch]) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    for stretch in stretches:
        if stretch.plan.is_plain:
            axes.axvspan(stretch.start_s, stretch.end_s, color=_SHADE, linewidth=0, zorder=0)
    lasting, _ = set_trials_apart(stretches)
    if len(lasting) <= _MOST_LINES:
        for stretch in lasting[1:]:
            axes.axvline(stretch.start_s, color=RED, linewidth=0.7, alpha=0.45, zorder=1)


def _ends_s(records: Sequence[StepRecord]) -> list[float]:
    return list(accumulate((record.step_s for record in records), initial=0.0))


def _middles_s(records: Sequence[StepRecord]) -> list[float]:
    return [(start + end) / 2 for start, end in pairwise(_ends_s(records))]


def _smooth(records: Sequence[StepRecord], compute: Callable[[Sequence[StepRecord]], float]) -> list[float]:
    """What `compute` says of the steps around each step."""
    reach = max(1, len(records) // (2 * _WINDOWS))
    return [compute(records[max(0, place - reach) : place + reach + 1]) for place in range(len(records))]


def _plot_sequences(axes: Axes, records: Sequence[StepRecord], plain: Sequence[StepRecord]) -> None:
    if plain:
        ends_s = _ends_s(plain)
        counts = [record.num_seqs for record in plain]
        axes.stairs(counts, ends_s, baseline=None, color=GREY, linewidth=1.4, label=f"plain: {ends_s[-1]:.1f} s")
    ends_s = _ends_s(records)
    counts = [record.num_seqs for record in records]
    axes.stairs(counts, ends_s, baseline=None, color=BLUE, linewidth=2, label=f"this rollout: {ends_s[-1]:.1f} s")
    if any(record.num_waiting for record in records):
        waiting = [record.num_waiting for record in records]
        axes.stairs(waiting, ends_s, baseline=None, color=SKY, linewidth=1.4, linestyle="--", label="waiting")
    if any(record.plan.is_plain for record in records):
        axes.fill_between([], [], color=_SHADE, label="no speculation (all panels)")
    axes.set_ylim(bottom=0)


def _plot_verified(
    axes: Axes, records: Sequence[StepRecord], stretches: Sequence[Stretch], capacity: float | None
) -> None:
    """Roots and drafts, stacked; above them the shape of each plan that lasted, ticks for changes and trials."""
    ends_s = _ends_s(records)
    roots, totals = [record.num_seqs for record in records], [record.num_tokens for record in records]
    axes.stairs(totals, ends_s, baseline=roots, fill=True, color=ORANGE, label="drafts to verify")
    axes.stairs(roots, ends_s, fill=True, color=BLUE, label="one a sequence")
    highest = float(max(totals))
    if capacity is not None and capacity <= 3 * highest:  # one far above would flatten what is drawn
        highest = max(highest, capacity)
        axes.axhline(capacity, color=RED, linestyle=":", linewidth=1.5, label=f"knee: {capacity:.0f} tokens")
    top = 1.05 * highest
    axes.set_ylim(0, 1.3 * top)
    lasting, trials = set_trials_apart(stretches)
    if switches_s := [stretch.start_s for stretch in lasting[1:]]:
        axes.vlines(switches_s, 1.02 * top, 1.09 * top, color=RED, linewidth=1.2, label="plan changes")
    if trials:
        tried_s = [(stretch.start_s + stretch.end_s) / 2 for stretch in trials]
        axes.vlines(tried_s, 1.02 * top, 1.06 * top, color=GREY, linewidth=1.2, label="another one is tried")
    for stretch in lasting:
        if stretch.end_s - stretch.start_s >= _NAMED_SHARE * ends_s[-1]:
            middle_s = (stretch.start_s + stretch.end_s) / 2
            axes.text(middle_s, 1.12 * top, _name(stretch.plan), ha="center", va="bottom", fontsize=8)


def _name(plan: SpeculationPlan) -> str:
    return "plain" if plan.is_plain else f"{plan.depth}x{plan.width}x{plan.num_draft_tokens}"


def _plot_acceptance(axes: Axes, records: Sequence[StepRecord]) -> None:
    def compute(steps: Sequence[StepRecord]) -> float:
        return compute_ratio(sum(record.num_emitted for record in steps), sum(record.num_seqs for record in steps))

    middles_s = _middles_s(records)
    raw = [record.acceptance_length for record in records]
    axes.plot(middles_s, raw, color=GREEN, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(middles_s, _smooth(records, compute), color=GREEN, linewidth=2.2, label="smoothed")
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1.5, label="plain decoding")
    axes.set_ylim(bottom=0.8)


def _plot_speed(axes: Axes, records: Sequence[StepRecord], plain: Sequence[StepRecord]) -> None:
    def compute(steps: Sequence[StepRecord]) -> float:
        seconds = sum(record.step_s - record.prefill_s for record in steps)
        return compute_ratio(sum(record.num_emitted for record in steps), seconds)

    middles_s = _middles_s(records)
    if plain:
        rates = compute_plain_rates(records, plain)
        axes.plot(middles_s, rates, color=GREY, linewidth=1.6, label="plain, as many live")
    axes.plot(middles_s, _smooth(records, compute), color=BLUE, linewidth=2.2, label="this rollout, smoothed")
    axes.set_ylim(bottom=0)


def compute_plain_rates(records: Sequence[StepRecord], plain: Sequence[StepRecord]) -> list[float]:
    """Tokens per second that plain decoding makes with as many live sequences as each step had.

    A number of sequences that plain decoding never had takes the time of the nearest one.
    """
    seconds: dict[int, list[float]] = {}
    for record in plain:
        seconds.setdefault(record.num_seqs, []).append(record.step_s - record.prefill_s)
    times_s = {num_seqs: statistics.median(each) for num_seqs, each in seconds.items()}
    nearest = {n: min(times_s, key=lambda seen: abs(seen - n)) for n in {record.num_seqs for record in records}}
    return [record.num_seqs / times_s[nearest[record.num_seqs]] for record in records]
