"""What a run tells people: a live panel while it trains, a file, a figure and two tables afterwards."""

from fastgrpo.json_files import write_json
from fastgrpo.machine import describe_commit, describe_machine
from fastgrpo.report.colours import BLUE, GREEN, GREY, PALETTE, RED
from fastgrpo.report.figure import plot_run
from fastgrpo.report.history import Baseline, LogRow, Measurement, RunHistory, load_run, save_run
from fastgrpo.report.plain import say
from fastgrpo.report.progress import LiveProgress
from fastgrpo.report.rollout_picture import plot_rollout
from fastgrpo.report.step_picture import plot_steps
from fastgrpo.report.summary import print_summary

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "PALETTE",
    "RED",
    "Baseline",
    "LiveProgress",
    "LogRow",
    "Measurement",
    "RunHistory",
    "describe_commit",
    "describe_machine",
    "load_run",
    "plot_rollout",
    "plot_run",
    "plot_steps",
    "print_summary",
    "save_run",
    "say",
    "write_json",
]
