"""`fastgrpo draft export` and `draft import`: heads for and from other programs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgrpo.bench.measure import describe_run
from fastgrpo.data import build_task_dataset, load_prompts
from fastgrpo.disk import named_write_errors
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_files import find_shipped_head, load_head, save_head
from fastgrpo.drafters.head_files import find_head_folder
from fastgrpo.engine import Engine, FinishedRollout
from fastgrpo.loading import (
    Opened,
    encode_prompts,
    load_model,
    open_model,
    quiet_libraries,
    resolve_device,
    resolve_model,
)
from fastgrpo.model import TargetModel
from fastgrpo.options import DraftExportOptions, DraftImportOptions
from fastgrpo.planner import compute_expected_length
from fastgrpo.report import say, write_json
from fastgrpo.types import SamplingParams, SpeculationPlan
from fastgrpo.unroll import measure_acceptance

_SHOWN_PLAN = SpeculationPlan(depth=3, width=4, num_draft_tokens=8)


def run_draft_export(options: DraftExportOptions) -> None:
    """Write a head in the layout that vLLM and SGLang load.

    Raises:
        ValueError: no head, a damaged one, or one of another target; an output folder that is in use.
    """
    console = Console()
    quiet_libraries()
    _check_unused(options.output)
    target = TargetModel(load_model(resolve_model(options.model), dtype="auto", device=resolve_device("cpu")))
    folder = _find_head(options.head, target, options.model)
    head = load_head(folder, target)
    with _emptied_unless_whole(options.output):
        save_head(head, options.output, target, dtype=getattr(torch, options.dtype))
    say(
        console,
        f'written: {options.output}; vLLM takes it as speculative_config={{"method": "eagle3", "model": '
        f'"{options.output}", "num_speculative_tokens": 3}}',
    )


def run_draft_import(options: DraftImportOptions, command: str) -> dict[str, Any]:
    """Check a head of another program, measure its acceptance, and write it for ours; returns what was measured.

    Raises:
        ValueError: a file that does not fit the target, or an acceptance that says that something differs.
    """
    console = Console()
    quiet_libraries()
    assert options.source is not None
    _check_unused(options.output)
    opened = open_model(options.model, dtype=options.dtype, device=options.device)
    target = TargetModel(opened.model, tokenizer=opened.tokenizer)
    drafter = EagleDrafter(target, head=load_head(options.source, target))
    acceptance = measure_acceptance(drafter, _draw_answers(options, opened, drafter))
    first, length = float(acceptance[0, 0]), compute_expected_length(_SHOWN_PLAN, acceptance.tolist())
    say(
        console,
        f"first draft accepted {first:.0%}; expected tokens a forward {length:.2f} "
        f"({_SHOWN_PLAN.num_draft_tokens} nodes, depth {_SHOWN_PLAN.depth})",
    )
    if first < options.least_acceptance:
        raise ValueError(
            f"only {first:.1%} of this head's first drafts are accepted, wanted least_acceptance="
            f"{options.least_acceptance:.0%}: it was probably trained for another model or reads other layers; lower "
            "least_acceptance to take it all the same and let it learn"
        )
    result = describe_run(command, dataclasses.asdict(options)) | {
        "source": str(options.source),
        "acceptance": acceptance.tolist(),
        "expected_length": length,
    }
    with _emptied_unless_whole(options.output):
        save_head(drafter.head, options.output, target)
        write_json(result, options.output / "import.json", indent=1)
    say(console, f"written: {options.output} (use it as drafter={options.output})")
    return result


def _find_head(folder: Path | None, target: TargetModel, model: str) -> Path:
    """The head to export: a folder with one, a checkpoint of a run, or the one that ships."""
    if folder is None:
        shipped = find_shipped_head(target)
        if shipped is None:
            raise ValueError(f"no head ships for {model}; name a folder with --head")
        return shipped
    return find_head_folder(folder)


def _check_unused(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is in use; choose another --output")
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"output='{folder}' cannot be written ({error}); name another folder") from error


@contextmanager
def _emptied_unless_whole(folder: Path) -> Iterator[None]:
    """While a folder that was not in use is written: half a head, after Ctrl-C too, would refuse the next run."""
    try:
        with named_write_errors(folder):
            yield
    except BaseException:
        for path in folder.glob("*"):
            path.unlink()
        raise


def _draw_answers(options: DraftImportOptions, opened: Opened, drafter: EagleDrafter) -> list[FinishedRollout]:
    """The target's own answers with their features."""
    if options.data is not None:
        chats = list(load_prompts(options.data, skip_broken=options.skip_broken)["prompt"])[: options.num_prompts]
    else:
        chats = build_task_dataset(options.task, size=options.num_prompts, seed=options.seed)["prompt"]
    rollouts: list[FinishedRollout] = []
    engine = Engine(opened.model, drafter=drafter, speculation="off")
    engine.on_finish.append(rollouts.append)
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        stop_token_ids=opened.stop_token_ids,
        seed=options.seed,
    )
    engine.generate(encode_prompts(opened.tokenizer, chats), params)
    return rollouts
