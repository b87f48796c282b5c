"""The record a report is made of, and the file it is kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict

from fastgrpo.json_files import write_json
from fastgrpo.metrics import compute_ratio
from fastgrpo.types import Span, SpeculationPlan, StepRecord, Timeline

RUN_FORMAT = "fastgrpo-run"
RUN_VERSION = 1

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
        timelines: when a training step did what, by its number; the first and the last do.
        meta: free facts: `task`, `model`, `machine`, `commit`, `command`, and `baseline`, a list of
            `Baseline` entries.
    """

    log_rows: Sequence[LogRow]
    rollouts: Mapping[int, Sequence[StepRecord]] = field(default_factory=dict)
    timelines: Mapping[int, Timeline] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training_rows(self) -> list[LogRow]:
        return [row for row in self.log_rows if is_training_row(row)]


def is_training_row(row: LogRow) -> bool:
    """TRL also logs evaluations and, at the end, the time of the whole run."""
    return "train_runtime" not in row and not any(key.startswith("eval_") for key in row)


def read_number(row: LogRow, key: str) -> float:
    """The number under `key`; `nan` where it is missing, `None` or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, Real) else math.nan


def compute_mean(values: Iterable[float]) -> float:
    """The mean of what was measured."""
    measured = [value for value in values if math.isfinite(value)]
    return compute_ratio(sum(measured), len(measured))


def save_run(history: RunHistory, directory: str | Path) -> Path:
    """Write `directory/run.json`, as `write_json` does, and return its path."""
    path = Path(directory) / "run.json"
    content = {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "meta": history.meta,
        "log_rows": history.log_rows,
        "rollouts": {step: [asdict(record) for record in kept] for step, kept in history.rollouts.items()},
        "timelines": {step: asdict(kept) for step, kept in history.timelines.items()},
    }
    write_json(content, path)
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
    return RunHistory(
        log_rows=content["log_rows"],
        rollouts=rollouts,
        timelines=_read_timelines(content.get("timelines", {}), path),
        meta=content["meta"],
    )


def _read_timelines(raw: Any, path: Path) -> dict[int, Timeline]:
    """Runs saved by earlier versions have none."""
    if not (isinstance(raw, dict) and all(step.isdigit() for step in raw)):
        raise ValueError(f"{path}: timelines are named by their training step, got {raw!r:.60}")
    timelines = {}
    for step, kept in raw.items():
        where = f"{path}: timelines[{step}]"
        spans = _read_fields(kept, Timeline, where)["spans"]
        if not isinstance(spans, list):
            raise ValueError(f"{where}.spans must be a list, got {spans!r:.60}")
        read = [Span(**_read_fields(span, Span, f"{where}.spans[{index}]")) for index, span in enumerate(spans)]
        timelines[int(step)] = Timeline(step_s=kept["step_s"], spans=tuple(read))
    return timelines


def _read_record(raw: Any, where: str) -> StepRecord:
    known = _read_fields(raw, StepRecord, where)
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in known.items()}
    values["plan"] = SpeculationPlan(**_read_fields(values["plan"], SpeculationPlan, f"{where}.plan"))
    for name in ("offered", "hits"):
        if not (isinstance(values[name], list) and all(isinstance(ranks, list) for ranks in values[name])):
            raise ValueError(f"{where}.{name} must be a list of lists, got {values[name]!r:.60}")
        values[name] = tuple(tuple(ranks) for ranks in values[name])
    return StepRecord(**values)


def _read_fields(raw: Any, record: type, where: str) -> dict[str, Any]:
    """`raw` itself, once it is known to name exactly the fields of `record`."""
    names = {entry.name for entry in fields(record)}
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be a dict, got {raw!r:.60}")
    if raw.keys() != names:
        raise ValueError(f"{where} lacks {sorted(names - raw.keys())} and has unknown {sorted(raw.keys() - names)}")
    return raw
