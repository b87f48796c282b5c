"""What a run tells people: a live panel while it trains, a file, a figure and two tables afterwards."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib import metadata
from itertools import accumulate, pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from fastgrpo.metrics import compute_ratio, summarise_rollout
from fastgrpo.types import SpeculationPlan, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_FORMAT = "fastgrpo-run"
RUN_VERSION = 1
REFRESH_INTERVAL_S = 0.25
RECENT_STEPS = 64  # engine steps behind the live rates
NUM_COMPARED_STEPS = 3  # training steps at each end of the summary
MAX_BARS = 40  # a figure with more bars cannot be read
# Okabe and Ito (2008): told apart by every common kind of colour vision
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
GREY = "#8C8C8C"

LogRow = Mapping[str, Any]


class Measurement(TypedDict, total=False):
    """What a generation or training run measured; leave out what was not."""

    generation_s: float
    tokens_per_s: float
    step_s: float  # a whole training step


class Baseline(Measurement, total=False):
    """One entry of `meta["baseline"]`: what this run is compared with."""

    name: str  # required: every speed-up names its baseline
    note: str
    ours: Measurement  # this run on the same prompts; without it the last training steps are compared


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """Everything a report is made of.

    Args:
        log_rows: TRL's `log_history`, one row for each training step; other rows are passed over.
        rollouts: the engine steps of one whole rollout, by training step; the first and the last do.
        meta: free facts: `task`, `model`, `machine`, `commit`, `command`, and `baseline`, a list of
            `Baseline` entries.
    """

    log_rows: Sequence[LogRow]
    rollouts: Mapping[int, Sequence[StepRecord]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training_rows(self) -> list[LogRow]:
        return [row for row in self.log_rows if _is_training_row(row)]


def _is_training_row(row: LogRow) -> bool:
    """TRL also logs evaluations and, at the end, the time of the whole run."""
    return "train_runtime" not in row and not any(key.startswith("eval_") for key in row)


def _number(row: LogRow, key: str) -> float:
    """The number under `key`; `nan` where it is missing, `None` or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, Real) else math.nan


def _mean(values: Iterable[float]) -> float:
    """The mean of what was measured."""
    measured = [value for value in values if math.isfinite(value)]
    return compute_ratio(sum(measured), len(measured))


# --- the file ---------------------------------------------------------------------------------


def _as_json(value: Any) -> Any:  # noqa: ANN401
    """`value` in JSON's own types; numbers that JSON has no word for become null."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def save_run(history: RunHistory, directory: str | Path) -> Path:
    """Write `directory/run.json`, whole or not at all, and return its path. `nan` is written as null.

    Raises:
        TypeError: `history` holds something that is no number, text, list or mapping.
    """
    content = {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "meta": _as_json(history.meta),
        "log_rows": _as_json(history.log_rows),
        "rollouts": _as_json({step: [asdict(record) for record in kept] for step, kept in history.rollouts.items()}),
    }
    path = Path(directory) / "run.json"
    text = json.dumps(content, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def load_run(directory: str | Path) -> RunHistory:
    """Read what `save_run` wrote.

    Raises:
        FileNotFoundError: there is no `run.json` in `directory`.
        ValueError: the file is no run of this version; the message says where.
    """
    path = Path(directory) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run at {path}; give the directory that save_run wrote to")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != RUN_FORMAT:
        raise ValueError(f"{path} is not a run saved by fastgrpo: its format is not {RUN_FORMAT!r}")
    if content.get("version") != RUN_VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}, this fastgrpo reads version {RUN_VERSION}")
    for name, kind in (("meta", dict), ("log_rows", list), ("rollouts", dict)):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: {name!r} must be a {kind.__name__}, got {content.get(name)!r:.60}")
    for index, row in enumerate(content["log_rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: log_rows[{index}] must be a dict, got {row!r:.60}")
    rollouts = {}
    for step, raw_records in content["rollouts"].items():
        if not (step.isdigit() and isinstance(raw_records, list)):
            raise ValueError(f"{path}: rollouts are lists named by their training step, got {step!r}")
        where = f"{path}: rollouts[{step}]"
        rollouts[int(step)] = [_read_record(raw, f"{where}[{index}]") for index, raw in enumerate(raw_records)]
    return RunHistory(log_rows=content["log_rows"], rollouts=rollouts, meta=content["meta"])


def _read_record(raw: Any, where: str) -> StepRecord:  # noqa: ANN401
    known = _read_fields(raw, StepRecord, where)
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in known.items()}
    values["plan"] = SpeculationPlan(**_read_fields(values["plan"], SpeculationPlan, f"{where}.plan"))
    for name in ("offered", "hits"):
        if not (isinstance(values[name], list) and all(isinstance(ranks, list) for ranks in values[name])):
            raise ValueError(f"{where}.{name} must be a list of lists, got {values[name]!r:.60}")
        values[name] = tuple(tuple(ranks) for ranks in values[name])
    return StepRecord(**values)


def _read_fields(raw: Any, record: type, where: str) -> dict[str, Any]:  # noqa: ANN401
    """`raw` itself, once it is known to name exactly the fields of `record`."""
    names = {entry.name for entry in fields(record)}
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be a dict, got {raw!r:.60}")
    if raw.keys() != names:
        raise ValueError(f"{where} lacks {sorted(names - raw.keys())} and has unknown {sorted(raw.keys() - names)}")
    return raw


# --- where a run ran --------------------------------------------------------------------------


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; elsewhere the platform knows a coarser name
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def describe_machine() -> dict[str, Any]:
    """CPU, usable cores, memory in GiB, accelerator (`None` without one) and the versions that matter."""
    import torch

    installed = {distribution.name for distribution in metadata.distributions()}
    packages = [name for name in ("torch", "transformers", "trl") if name in installed]
    has_affinity = hasattr(os, "sched_getaffinity")  # a container often gets a part of the machine
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def describe_commit(path: str | Path) -> str:
    """The short commit checked out at `path`, with `-dirty` where tracked files differ from it.

    "unknown" where `path` is in no repository, the repository has no commit, or git is not installed.
    """
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(path), "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


# --- the figure -------------------------------------------------------------------------------


def plot_run(history: RunHistory, path_png: str | Path) -> None:
    """Draw a run on one page: reward, acceptance length, concurrency, and where the time went.

    Needs matplotlib, but no display.

    Raises:
        ValueError: `history` has no training step.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = history.training_rows
    if not rows:
        raise ValueError("nothing to plot: log_rows has no training step")
    figure = Figure(figsize=(13, 8.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    _plot_reward(top_left, rows)
    _plot_acceptance(top_right, rows)
    _plot_concurrency(bottom_left, history)
    _plot_time(bottom_right, rows)
    facts = [str(history.meta[key]) for key in ("task", "model") if key in history.meta]
    if "commit" in history.meta:
        facts.append(f"commit {history.meta['commit']}")
    figure.suptitle(" · ".join(facts), fontsize=13)
    path = Path(path_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def _training_steps(rows: Sequence[LogRow]) -> list[float]:
    """The step each row names, or its place where it names none."""
    return [_number({"step": index} | dict(row), "step") for index, row in enumerate(rows, start=1)]


def _prepare_panel(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.locator_params(axis="x", integer=xlabel == "training step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def _plot_smoothed(axes: Axes, rows: Sequence[LogRow], key: str, colour: str, label: str, linestyle: str = "-") -> None:
    """Every step faint, and bold the mean over a window of a tenth of the run."""
    steps, values = _training_steps(rows), [_number(row, key) for row in rows]
    window = max(1, len(rows) // 10)
    smooth = [_mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
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
        if any(math.isfinite(_number(row, key)) for row in rows):
            _plot_smoothed(axes, rows, key, colour, label, linestyle)
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1.6, label="plain decoding")
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
    capacity = _mean([_number(row, "plan/capacity") for row in history.training_rows])
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
        return sum(max(0.0, value) for value in (_number(row, key) for key in keys) if math.isfinite(value))

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
    centres = [_mean(steps[place]) for place in bins]
    width = 0.85 * (min(b - a for a, b in pairwise(centres)) if len(centres) > 1 else 1.0)
    tops_s = [0.0] * len(bins)
    for label, (colour, _) in parts[0].items():
        heights_s = [_mean([part[label][1] for part in parts[place]]) for place in bins]
        axes.bar(centres, heights_s, width=width, bottom=tops_s, color=colour, label=label)
        tops_s = [top_s + height_s for top_s, height_s in zip(tops_s, heights_s, strict=True)]
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


# --- the tables -------------------------------------------------------------------------------


def _format_number(value: float) -> str:
    """Three digits that count, or a dash for what was not measured."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_summary(history: RunHistory, console: Console | None = None) -> None:
    """Print the start of a run beside its end, and each baseline beside this run.

    Raises:
        ValueError: a baseline has no name.
    """
    console = console or Console()
    rows = history.training_rows
    first, last = rows[:NUM_COMPARED_STEPS], rows[-NUM_COMPARED_STEPS:]
    table = Table(title=f"{len(rows)} training steps", title_justify="left")
    table.add_column("mean of")
    for heading in (f"first {len(first)} steps", f"last {len(last)} steps", "last / first"):
        table.add_column(heading, justify="right")
    for label, key in (
        ("reward", "reward"),
        ("acceptance length (tokens / sequence / forward)", "rollout/spec_accept_length"),
        ("rollout speed (tokens/s)", "rollout/tokens_per_s"),
        ("completion length (tokens)", "completions/mean_length"),
        ("training step (s)", "step_time"),
        ("rollout (s)", "time/rollout_s"),
    ):
        before, after = (_mean([_number(row, key) for row in part]) for part in (first, last))
        table.add_row(label, *(_format_number(value) for value in (before, after, compute_ratio(after, before))))
    console.print(table)
    if history.meta.get("baseline"):
        console.print(_baseline_table(history.meta["baseline"], last))


def _baseline_table(baselines: Sequence[Baseline], last: Sequence[LogRow]) -> Table:
    """One line for each thing measured on both sides. A speed-up above 1 means this run is faster."""
    keys = {"generation_s": "time/rollout_s", "tokens_per_s": "rollout/tokens_per_s", "step_s": "step_time"}
    labels = {"generation_s": "generation (s)", "tokens_per_s": "generation (tokens/s)", "step_s": "training step (s)"}
    from_training = {name: _mean([_number(row, key) for row in last]) for name, key in keys.items()}
    table = Table(title="Measured speed-up", title_justify="left")
    for heading in ("measure", "baseline", "this run", "speed-up", "note"):
        table.add_column(heading, justify="right" if heading in ("baseline", "this run") else "left")
    for entry in baselines:
        if not entry.get("name"):
            raise ValueError(f"each baseline needs a name to be compared by, got {entry}")
        ours: LogRow = entry.get("ours", from_training)
        note = entry.get("note") or ("" if "ours" in entry else f"against the last {len(last)} training steps")
        for measure, label in labels.items():
            theirs, mine = _number(entry, measure), _number(ours, measure)
            ratio = compute_ratio(mine, theirs) if measure == "tokens_per_s" else compute_ratio(theirs, mine)
            if math.isfinite(ratio):
                speed_up = escape(f"{ratio:.2f}x vs {entry['name']}")
                table.add_row(label, _format_number(theirs), _format_number(mine), speed_up, escape(note))
    return table


# --- while it trains --------------------------------------------------------------------------


def _format_duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


class LiveProgress:
    """A panel that follows training on a terminal; elsewhere one plain line for each training step.

    A log row without some key shows a dash there and never stops the training. Rows of evaluations
    and the closing row of a run are passed over.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._live: Live | None = None
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._row: LogRow = {}
        self._first_step = self._step = self._total_steps = 0
        self._started_s = clock()
        self._shown_s = -math.inf

    def start(self, total_steps: int, *, first_step: int = 0) -> None:
        """Begin to show. `first_step` is the number of training steps done before, after a resume."""
        self.stop()
        self._first_step = self._step = first_step
        self._total_steps = total_steps
        self._started_s = self._clock()
        if self._console.is_terminal:
            self._live = Live(self._build_panel(), console=self._console, auto_refresh=False)
            self._live.start()

    def rollout_step(self, record: StepRecord) -> None:
        """Take note of an engine step. Cheap: the panel is redrawn a few times a second at most."""
        self._recent.append(record)
        if self._live is not None and self._clock() - self._shown_s >= REFRESH_INTERVAL_S:
            self._refresh()

    def training_step(self, logs: LogRow) -> None:
        """Take note of a log row. It may name its `step`; without one, each row is one step further."""
        if not _is_training_row(logs):
            return
        step = _number(logs, "step")
        self._step = int(step) if math.isfinite(step) else self._step + 1
        self._row = dict(logs)
        if self._live is not None:
            self._refresh()
        else:
            self._console.print(self._plain_line(), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the last state on the screen. Safe to call twice, or before `start`."""
        if self._live is not None:
            self._refresh()
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        assert self._live is not None
        self._shown_s = self._clock()
        self._live.update(self._build_panel(), refresh=True)

    def _remaining_s(self) -> float:
        elapsed_s = self._clock() - self._started_s
        per_step_s = compute_ratio(elapsed_s, self._step - self._first_step)
        return per_step_s * max(0, self._total_steps - self._step)

    def _value(self, key: str) -> str:
        return _format_number(_number(self._row, key))

    def _plain_line(self) -> str:
        parts = (
            f"step {self._step}/{self._total_steps}",
            f"reward {self._value('reward')}",
            f"completion {self._value('completions/mean_length')} tokens",
            f"acceptance length {self._value('rollout/spec_accept_length')}",
            f"{self._value('rollout/tokens_per_s')} tokens/s",
            f"rollout {self._value('time/rollout_s')} s of {self._value('step_time')} s",
            f"left {_format_duration(self._remaining_s())}",
        )
        return " | ".join(parts)

    def _rollout_line(self) -> str:
        """The engine now: who runs, how it speculates, and the rates of the most recent steps."""
        if not self._recent:
            return "waiting for the first rollout"
        newest, rollout_s = self._recent[-1], sum(record.step_s for record in self._recent)
        summary = summarise_rollout(self._recent, rollout_s=rollout_s)
        plan = newest.plan
        shape = "plain" if plan.is_plain else f"{plan.num_draft_tokens} tokens, depth {plan.depth}, width {plan.width}"
        return (
            f"[bold]{newest.num_seqs}[/] running, {newest.num_waiting} waiting   draft [bold]{shape}[/]   "
            f"acceptance length [bold]{_format_number(summary.acceptance_length)}[/]   "
            f"[bold]{_format_number(summary.tokens_per_s)}[/] tokens/s"
        )

    def _build_panel(self) -> Panel:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step [bold]{self._step}[/] / {self._total_steps}",
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=30),
            f"time left {_format_duration(self._remaining_s())}",
        )
        body = Table.grid()
        body.add_row(head)
        body.add_row(
            f"reward [bold]{self._value('reward')}[/]   completion [bold]{self._value('completions/mean_length')}[/] "
            f"tokens   rollout {self._value('time/rollout_s')} s of {self._value('step_time')} s"
        )
        body.add_row(self._rollout_line())
        return Panel(body, title="fastgrpo", title_align="left", expand=False)
