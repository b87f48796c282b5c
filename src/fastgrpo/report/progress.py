"""While it trains: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from fastgrpo.metrics import compute_ratio, summarise_rollout
from fastgrpo.report.history import LogRow, is_training_row, read_number
from fastgrpo.report.plain import say
from fastgrpo.report.summary import format_number
from fastgrpo.types import StepRecord

REFRESH_INTERVAL_S = 0.25
RECENT_STEPS = 64  # engine steps behind the live rates


def _format_duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


class LiveProgress:
    """A panel that follows training on a terminal; elsewhere one plain line for each training step.

    A log row without some key shows a dash there and never stops the training. Rows of evaluations
    and the closing row of a run are passed over.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
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
        if not is_training_row(logs):
            return
        step = read_number(logs, "step")
        self._step = int(step) if math.isfinite(step) else self._step + 1
        self._row = dict(logs)
        if self._live is not None:
            self._refresh()
        else:
            say(self._console, self._plain_line())

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
        return format_number(read_number(self._row, key))

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
            f"acceptance length [bold]{format_number(summary.acceptance_length)}[/]   "
            f"[bold]{format_number(summary.tokens_per_s)}[/] tokens/s"
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
