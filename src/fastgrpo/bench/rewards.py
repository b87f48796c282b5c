"""`fastgrpo bench rewards`: what a reward over HTTP costs a training step, asked for after the rollout or during it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import importlib.util
import json
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgrpo.bench.measure import compute_median, describe_run
from fastgrpo.bench.training import build_trainer
from fastgrpo.loading import quiet_libraries
from fastgrpo.metrics import compute_phase_times, compute_ratio
from fastgrpo.options import RewardsOptions
from fastgrpo.report import plot_steps, say, write_json
from fastgrpo.rewards import completion_text, per_completion
from fastgrpo.types import LEARNING, REWARDS, ROLLOUT, Timeline

FREE, SERIAL, POOLED, STREAMED = "free", "serial", "pooled", "streamed"
WAYS = {
    FREE: "no judge: what the rest of TRL's call takes",
    SERIAL: "after the rollout, one completion after the other",
    POOLED: "after the rollout, as many at once as when streamed",
    STREAMED: "stream_rewards: as completions finish",
}
_BASELINES = (POOLED, SERIAL)

Row = dict[str, Any]


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers a text with a reward after `answer_s` seconds."""

    answer_s: float

    def do_POST(self) -> None:  # http.server's name for it
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        time.sleep(self.answer_s)
        answer = json.dumps({"reward": rate(text)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait to be accepted: more than are ever asked for at once


def rate(text: str) -> float:
    """A reward in [0, 1) that is the same for the same text."""
    return zlib.crc32(text.encode()) % 1000 / 1000


@contextlib.contextmanager
def serve_judge(answer_s: float) -> Iterator[str]:
    """A judge on this machine for as long as the block lasts; yields its address."""
    handler = type("Handler", (_Handler,), {"answer_s": answer_s})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="judge", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Judge:
    """A reward that asks the judge, in the way that is set.

    Args:
        url: the judge's.
        most: completions that it is asked about at once.
    """

    __name__ = "judge"

    def __init__(self, url: str, most: int) -> None:
        self.way = FREE
        self._url, self._most = url, most

    @per_completion
    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        if self.way == FREE:
            return [rate(text) for text in texts]
        if self.way == POOLED:
            with ThreadPoolExecutor(self._most) as pool:
                return list(pool.map(self._ask, texts))
        return [self._ask(text) for text in texts]

    def _ask(self, text: str) -> float:
        with urllib.request.urlopen(self._url, data=text.encode()) as answer:
            return float(json.load(answer)["reward"])


class _TurnCallback(TrainerCallback):
    """Trains each step in the next way, and tells what it took."""

    def __init__(self, trainer: Any, judge: Judge, tell: Callable[[str, Row, Timeline], None]) -> None:
        self._trainer, self._judge, self._tell = trainer, judge, tell

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._judge.way = list(WAYS)[state.global_step % len(WAYS)]
        self._trainer.reward_stream.is_on = self._judge.way == STREAMED

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        phases = compute_phase_times(self._trainer.timeline)
        num_tokens = sum(record.num_emitted for record in self._trainer.engine.records)
        row = {
            "reward_s": phases[REWARDS],
            "rollout_s": phases[ROLLOUT],
            "learn_s": phases[LEARNING],
            "step_s": self._trainer.timeline.step_s,
            "tokens_per_s": num_tokens / phases[ROLLOUT],
        }
        self._tell(self._judge.way, row, self._trainer.timeline)


def run_rewards_bench(options: RewardsOptions, command: str) -> dict[str, Any]:
    """Measure, print and, where `options.output` says so, write the results and a picture; returns them.

    One trainer trains; in turn its reward costs nothing, asks the judge after the rollout in two ways, and asks it
    while others decode. A way's cost is what its step waits for rewards, less what the free one's does.

    Raises:
        ValueError: the model, the task or a setting cannot be used.
    """
    console = Console()
    quiet_libraries()
    rows: dict[str, list[Row]] = {way: [] for way in WAYS}
    timelines: dict[str, Timeline] = {}

    def tell(way: str, row: Row, timeline: Timeline) -> None:
        rows[way].append(row)
        timelines[way] = timeline
        console.print(f"{way}: rewards {row['reward_s']:.2f} s of a step of {row['step_s']:.1f} s", highlight=False)

    with serve_judge(options.answer_s) as url, tempfile.TemporaryDirectory() as folder:
        judge = Judge(url, options.max_reward_calls)
        streaming = f"stream_rewards=true:max_reward_calls={options.max_reward_calls}"
        trainer = build_trainer(
            options,
            variant=f"{options.speculation}:{streaming}",
            steps=len(WAYS) * (1 + options.repeats),
            output_dir=Path(folder),
            reward_funcs=judge,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_TurnCallback(trainer, judge, tell))
        trainer.train()
    ways = {way: _describe_way(own[1:], rows[FREE][1:]) for way, own in rows.items()}
    result = describe_run(command, dataclasses.asdict(options)) | {
        "ways": ways,
        "cost_falls": {way: 1 - compute_ratio(ways[STREAMED]["cost_s"], ways[way]["cost_s"]) for way in _BASELINES},
        "timelines": {way: dataclasses.asdict(timeline) for way, timeline in timelines.items()},
        "steps": rows,
    }
    if options.output is not None:
        write_json(result, options.output, indent=1)
    _print(result, options, console)
    if options.output is not None:
        if importlib.util.find_spec("matplotlib") is not None:
            title = f"A training step with a reward of {options.answer_s:g} s per completion over HTTP"
            plot_steps(timelines, options.output.with_suffix(".png"), title=title)
        say(console, f"written: {options.output}")
    return result


def _describe_way(own: list[Row], free: list[Row]) -> dict[str, float]:
    """Medians of the steps but the first, and what the reward costs one."""
    medians = {key: compute_median(row[key] for row in own) for key in own[0]}
    return medians | {"cost_s": medians["reward_s"] - compute_median(row["reward_s"] for row in free)}


def _print(result: dict[str, Any], options: RewardsOptions, console: Console) -> None:
    count = options.prompts_per_step * options.num_generations
    table = Table(
        title=f"{count} completions, a judge that answers after {options.answer_s:g} s, at most "
        f"{options.max_reward_calls} calls at once; medians",
        title_justify="left",
    )
    table.add_column("reward")
    for heading in ("cost\ns a step", "rollout\ntokens/s", "draft learning\ns", "step\ns"):
        table.add_column(heading, justify="right")
    table.add_column("what it is")
    for way, own in result["ways"].items():
        seconds = (
            f"{own['cost_s']:.2f}",
            f"{own['tokens_per_s']:.1f}",
            f"{own['learn_s']:.2f}",
            f"{own['step_s']:.1f}",
        )
        table.add_row(way, *seconds, WAYS[way])
    console.print(table)
    for way, falls in result["cost_falls"].items():
        line = f"the reward's cost falls by {falls:.0%} vs {way}" + (" (the baseline)" if way == POOLED else "")
        console.print(line, highlight=False)
