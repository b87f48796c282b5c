"""Draft state beside a checkpoint: head or counts, draft optimiser, planner, lengths seen.

Safetensors and JSON, nothing pickled.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from fastgrpo.drafters.drafter import StatefulDrafter, TrainableDrafter
from fastgrpo.engine import Engine
from fastgrpo.learner import Learner
from fastgrpo.lengths import LengthPredictor
from fastgrpo.profile_files import describe_identity, list_differences
from fastgrpo.rollouts import load_rollouts, save_rollouts

_COUNTERS = ("num_updates", "rate_scale", "warm_from", "control")
_REFERENCE = "reference."
_REPLAY = "replay.safetensors"
_DRAFTER = "drafter.json"
_RUN = "run.json"
_PLANNER_VERSION = 2  # of what planners remember


def save_state(folder: Path, engine: Engine, learner: Learner | None, *, run: int = 0) -> None:
    """Write head or counts, draft optimiser, replayed rollouts, planner and lengths as safetensors and JSON.

    Args:
        run: which `train` of its trainer the checkpoint is of; their noise differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RUN).write_text(json.dumps({"run": run}) + "\n")
    (folder / _DRAFTER).write_text(json.dumps({"name": engine.drafter.name}) + "\n")
    (folder / "lengths.json").write_text(json.dumps(engine.scheduler.lengths.state_dict()) + "\n")
    if engine.planner is not None:
        saved = {
            "version": _PLANNER_VERSION,
            "identity": describe_identity(engine.target, engine.drafter),
            "name": engine.planner.name,
            "state": engine.planner.state_dict(),
        }
        (folder / "planner.json").write_text(json.dumps(saved) + "\n")
    if isinstance(engine.drafter, TrainableDrafter):
        engine.drafter.save(folder / "head")
    elif isinstance(engine.drafter, StatefulDrafter):
        engine.drafter.save(folder / "drafter")
    if learner is None:
        return
    state = learner.state_dict()
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, moments in state["optimizer"]["state"].items()
        for name, value in moments.items()
    }
    tensors |= {"generator": state["generator"], "token_counts": state["token_counts"].cpu()}
    tensors |= {f"{_REFERENCE}{i}": value.cpu().contiguous() for i, value in enumerate(state["reference"] or [])}
    save_file(tensors, folder / "learner.safetensors")
    record = {key: state[key] for key in _COUNTERS} | {"param_groups": state["optimizer"]["param_groups"]}
    save_rollouts([state["replay"]], folder / _REPLAY)
    (folder / "learner.json").write_text(json.dumps(record) + "\n")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's own state comes last."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def load_state(folder: Path, engine: Engine, learner: Learner | None) -> int:
    """Read what `save_state` wrote; returns its `run`.

    What a planner has learnt of another machine, model or drafter, or with an earlier version, is named in a warning
    and learnt anew; so is what belongs to another kind of drafter.

    Raises:
        ValueError: a file is damaged or belongs to another model.
    """
    try:
        is_same_drafter = _is_same_drafter(folder, engine)
        if is_same_drafter and isinstance(engine.drafter, TrainableDrafter) and (folder / "head").is_dir():
            engine.drafter.restore(folder / "head")
        elif is_same_drafter and isinstance(engine.drafter, StatefulDrafter) and (folder / "drafter").is_dir():
            engine.drafter.restore(folder / "drafter")
        if (folder / "planner.json").exists():
            _load_planner(folder / "planner.json", engine)
        if (folder / "lengths.json").exists():
            engine.scheduler.lengths = LengthPredictor.from_state(json.loads((folder / "lengths.json").read_text()))
        if is_same_drafter and learner is not None and (folder / "learner.json").exists():
            learner.load_state_dict(_read_learner(folder))
        return int(json.loads((folder / _RUN).read_text())["run"]) if (folder / _RUN).exists() else 0
    except (OSError, KeyError, TypeError, json.JSONDecodeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the draft state in {folder} is damaged ({error}); remove the folder to start it afresh"
        ) from error


def _is_same_drafter(folder: Path, engine: Engine) -> bool:
    """Whether head, counts and learner are for this engine's kind of drafter; what is left out goes to a warning."""
    own = engine.drafter.name
    saved = json.loads((folder / _DRAFTER).read_text())["name"] if (folder / _DRAFTER).exists() else own
    if saved != own and isinstance(engine.drafter, TrainableDrafter | StatefulDrafter):
        warnings.warn(
            f"the drafter '{own}' begins anew: {folder} is of '{saved}'; to go on with that one, set drafter as before",
            stacklevel=3,
        )
    return bool(saved == own)


def _load_planner(path: Path, engine: Engine) -> None:
    saved = json.loads(path.read_text())
    if not isinstance(saved, dict):
        raise TypeError(f"{path.name} holds no mapping")
    version = saved.get("version")
    if version != _PLANNER_VERSION:
        reason = f"it has version {version!r}, this fastgrpo reads {_PLANNER_VERSION}"
    else:
        reason = list_differences(saved["identity"], describe_identity(engine.target, engine.drafter))
    if reason:
        warnings.warn(f"the planner measures anew, {path} is left out: {reason}", stacklevel=3)
        return
    try:
        engine.planning.restore(saved["name"], saved["state"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the planner measures anew") from error


def _read_learner(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "learner.json").read_text())
    tensors = load_file(folder / "learner.safetensors")
    generator, token_counts = tensors.pop("generator"), tensors.pop("token_counts")
    names = sorted(
        (name for name in tensors if name.startswith(_REFERENCE)), key=lambda name: int(name[len(_REFERENCE) :])
    )
    reference = [tensors.pop(name) for name in names] or None
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, moment = name.split(".", 1)
        state.setdefault(int(index), {})[moment] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in record["param_groups"]
    ]
    return {
        "optimizer": {"state": state, "param_groups": groups},
        "generator": generator,
        "token_counts": token_counts,
        "reference": reference,
        "replay": [r for step in load_rollouts(folder / _REPLAY) for r in step] if (folder / _REPLAY).exists() else [],
        **{key: record[key] for key in _COUNTERS},
    }
