"""What a forward takes against its tokens, and the two limits of the machine behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.planner import HardwareProfile
from fastgrpo.report.colours import BLUE, GREEN, GREY, ORANGE, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_roofline(profile: HardwareProfile, spreads: Sequence[float], path: Path, *, title: str) -> None:
    """Write the figure of `build_roofline`. Needs matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    build_roofline(profile, spreads, title=title).savefig(path, dpi=120)


def build_roofline(profile: HardwareProfile, spreads: Sequence[float], *, title: str) -> Figure:
    """Time and tokens per second of a target forward against its tokens, with both limits and the knee.

    Args:
        spreads: how much longer the median run took at each grid point, as a share of the time shown; drawn as bars.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(11, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    time_axes, rate_axes = figure.subplots(1, 2, sharex=True)
    for axes in (time_axes, rate_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")  # before the limits of what is drawn are set
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # within a decade or two
    _plot_times(time_axes, profile, spreads)
    _plot_rates(rate_axes, profile)
    for axes in (time_axes, rate_axes):
        axes.axvline(profile.capacity, color=RED, linestyle=":", label=f"knee: {profile.capacity:.0f} tokens")
        axes.set_xticks(profile.num_tokens, [str(count) for count in profile.num_tokens])
        axes.set_xlabel("tokens in a forward")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(framealpha=0.9, edgecolor="none", fontsize=9)  # the knee goes behind it
    figure.suptitle(title, fontsize=11)
    return figure


def _plot_times(axes: Axes, profile: HardwareProfile, spreads: Sequence[float]) -> None:
    grid, times_ms = profile.num_tokens, [1000 * seconds for seconds in profile.target_s]
    above = [ms * spread for ms, spread in zip(times_ms, spreads, strict=True)]
    axes.errorbar(
        grid, times_ms, yerr=([0.0] * len(grid), above), color=BLUE, marker="o", capsize=2, label="target forward"
    )
    if profile.draft_s:
        drafts_ms = [1000 * seconds for seconds in profile.draft_s]
        axes.plot(grid, drafts_ms, color=GREEN, marker="s", label="draft level of so many nodes")
    axes.axhline(1000 * profile.floor_s, color=GREY, linestyle="--", label="memory-bound: the weights, read once")
    compute_ms = [1000 * profile.per_token_s * count for count in grid]
    axes.plot(grid, compute_ms, color=ORANGE, linestyle="--", label="compute-bound: the best rate")
    drawn_ms = [*times_ms, *(1000 * seconds for seconds in profile.draft_s)]
    axes.set_ylim(0.5 * min(drawn_ms), 3 * max(drawn_ms))
    axes.set_title("Time (bars: up to the median run)", loc="left", fontsize=10)
    axes.set_ylabel("ms")


def _plot_rates(axes: Axes, profile: HardwareProfile) -> None:
    grid = profile.num_tokens
    rates = [count / seconds for count, seconds in zip(grid, profile.target_s, strict=True)]
    axes.plot(grid, rates, color=BLUE, marker="o", label="target forward")
    axes.plot(grid, [count / profile.floor_s for count in grid], color=GREY, linestyle="--", label="memory-bound")
    axes.axhline(1 / profile.per_token_s, color=ORANGE, linestyle="--", label="compute-bound")
    axes.set_ylim(0.5 * min(rates), 2 * max(rates))
    axes.set_title("Rate", loc="left", fontsize=10)
    axes.set_ylabel("tokens/s")
