"""Simulated planners side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.report.colours import GREY, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_SCENARIOS = 24  # a figure with more cannot be read


def plot_predictions(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure of `build_predictions`. Needs matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    build_predictions(rows).savefig(path, dpi=120)


def build_predictions(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Speed-up of each planner over plain decoding, one group of bars a scenario; says which are left out.

    Args:
        rows: with `scenario`, `planner`, `speed_up` and `error` (a share of total time, or None).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    known = list(dict.fromkeys(row["scenario"] for row in rows))
    scenarios = known[:_MOST_SCENARIOS]
    planners = list(dict.fromkeys(row["planner"] for row in rows if row["planner"] != "off"))
    size = (8, 1.2 + 0.24 * (1 + len(planners)) * len(scenarios))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots()
    height = 0.85 / len(planners)
    for place, (planner, colour) in enumerate(zip(planners, PALETTE, strict=False)):
        own = {row["scenario"]: row for row in rows if row["planner"] == planner}
        at = [index + (place - (len(planners) - 1) / 2) * height for index in range(len(scenarios))]
        gains = [own[scenario]["speed_up"] for scenario in scenarios]
        bars = [gain * abs(own[scenario]["error"] or 0) for gain, scenario in zip(gains, scenarios, strict=True)]
        axes.barh(at, gains, height=height, xerr=bars, color=colour, ecolor=GREY, label=planner)
    axes.axvline(1, color=GREY, linestyle="--")
    axes.set_yticks(range(len(scenarios)), scenarios, fontsize=8)
    axes.invert_yaxis()
    if len(known) > len(scenarios):
        axes.set_title(f"the first {len(scenarios)} of {len(known)} scenarios; the JSON file has all", fontsize=10)
    is_known = any(row["error"] is not None for row in rows)
    error = "bars: the simulation's error on the machine that measured it" if is_known else "its error is not known"
    axes.set_xlabel(f"x plain decoding, simulated\n({error})")
    axes.set_xlim(left=0)  # an error above 100 % would show gains below nothing
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure
