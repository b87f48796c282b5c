"""Training steps at a glance: when each did what, drawn to one scale beneath each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.report.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from fastgrpo.types import (
    BACKWARD,
    BESIDE,
    FORWARD,
    LEARNING,
    LOG_PROBS,
    OPTIMISER,
    PHASES,
    REWARDS,
    ROLLOUT,
    STREAMED_REWARD,
    Span,
    Timeline,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = {
    ROLLOUT: BLUE,
    REWARDS: GREEN,
    LEARNING: PURPLE,
    LOG_PROBS: SKY,
    FORWARD: ORANGE,
    BACKWARD: RED,
    OPTIMISER: BLACK,
    STREAMED_REWARD: "#7CCFB5",  # a light green
    BESIDE: "#E3B5D3",  # a light purple
}
_BESIDE_PHASES = (STREAMED_REWARD, BESIDE)
_NAMED_SHARE = 0.05  # of the longest step: a shorter stretch has no room for its seconds
_BAR, _LANES, _MIDDLE = 0.5, 0.3, -0.15  # heights, and where the bar is, of a row of height 1


def plot_steps(timelines: Mapping[str, Timeline], path: Path, *, title: str) -> None:
    """Write the figure of `build_step_picture`. Needs matplotlib.

    Raises:
        ValueError: there is no step to draw.
    """
    figure = build_step_picture(timelines, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def build_step_picture(timelines: Mapping[str, Timeline], *, title: str) -> Figure:
    """One row for each step, named; what runs beside its phases is drawn beneath them.

    Raises:
        ValueError: there is no step to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not timelines:
        raise ValueError("nothing to draw: no step was timed")
    figure = Figure(figsize=(11, 1.6 + 0.9 * len(timelines)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    draw_steps(figure.subplots(), timelines)
    figure.suptitle(title, fontsize=12)
    return figure


def draw_steps(axes: Axes, timelines: Mapping[str, Timeline]) -> None:
    """Draw the rows, the first on top, and a legend of what they show."""
    longest_s = max(timeline.step_s for timeline in timelines.values())
    for row, timeline in enumerate(timelines.values()):
        _draw_phases(axes, timeline, row, longest_s)
        _draw_beside(axes, timeline, row)
    axes.set_yticks([row + _MIDDLE for row in range(len(timelines))], list(timelines))
    axes.set_ylim(len(timelines) - 0.4, -0.5)
    axes.set_xlim(0, 1.09 * longest_s)
    axes.set_xlabel("seconds since the step began")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    seen = {span.name for timeline in timelines.values() for span in timeline.spans}
    for name in (*PHASES, *_BESIDE_PHASES):
        if name in seen:
            axes.barh([0], [0], color=PHASE_COLOURS[name], label=name)
    axes.legend(
        frameon=False, fontsize=9, ncols=len(seen), loc="lower right", bbox_to_anchor=(1.0, 1.0), columnspacing=1
    )


def pack_lanes(spans: Sequence[Span]) -> list[int]:
    """A lane for each span, as few as there must be for those of one lane not to overlap."""
    ends_s: list[float] = []
    lanes = [0] * len(spans)
    for place in sorted(range(len(spans)), key=lambda place: spans[place].start_s):
        span = spans[place]
        lane = next((lane for lane, end_s in enumerate(ends_s) if end_s <= span.start_s), len(ends_s))
        ends_s[lane : lane + 1] = [span.end_s]
        lanes[place] = lane
    return lanes


def _draw_phases(axes: Axes, timeline: Timeline, row: int, longest_s: float) -> None:
    middle = row + _MIDDLE
    axes.barh(middle, timeline.step_s, height=_BAR, color="#EFEFEF", zorder=1)  # what lies between the phases
    for span in timeline.spans:
        if span.name not in PHASES:
            continue
        length_s = _length_s(span)
        axes.barh(middle, length_s, left=span.start_s, height=_BAR, color=PHASE_COLOURS[span.name], zorder=2)
        if length_s >= _NAMED_SHARE * longest_s:
            centre_s, text = span.start_s + length_s / 2, f"{length_s:.1f} s"
            axes.text(centre_s, middle, text, ha="center", va="center", fontsize=9, color="white", zorder=3)
    axes.text(timeline.step_s + 0.01 * longest_s, middle, f"{timeline.step_s:.1f} s", va="center", fontsize=9)


def _draw_beside(axes: Axes, timeline: Timeline, row: int) -> None:
    spans = [span for span in timeline.spans if span.name in _BESIDE_PHASES]
    lanes = pack_lanes(spans)
    height = _LANES / (max(lanes, default=0) + 1)
    for span, lane in zip(spans, lanes, strict=True):
        middle = row + _MIDDLE + _BAR / 2 + height * (lane + 0.5)
        axes.barh(middle, _length_s(span), left=span.start_s, height=0.8 * height, color=PHASE_COLOURS[span.name])


def _length_s(span: Span) -> float:
    return span.end_s - span.start_s
