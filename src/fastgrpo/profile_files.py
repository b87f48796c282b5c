"""Profiles on file: what they were measured of, one given by the user, and the cache of those measured here."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from fastgrpo.cache_folder import CACHE_ENV, find_cache_folder, has_profile_cache
from fastgrpo.drafters import DRAFTERS, find_trainable
from fastgrpo.idleness import OthersWork
from fastgrpo.json_files import write_json
from fastgrpo.kernels import cpu
from fastgrpo.machine import describe_machine
from fastgrpo.model import TargetModel
from fastgrpo.planner import HardwareProfile
from fastgrpo.planner.profile import MEASURE_AGAIN, is_finite
from fastgrpo.profiler import Measurement, measure_costs

if TYPE_CHECKING:
    from fastgrpo.drafters import Drafter

PROFILE_FORMAT, PROFILE_VERSION = "fastgrpo-profile", 3
_SIZES = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
)
_LISTS = ("num_tokens", "target_s", "draft_s", "draft_start_s")
_FLAG = "runs_ahead"
_LIBRARIES = ("torch", "transformers")
_COSTS = 7  # goes up when a step or a draft of ours takes notably less or more than before
_VERSIONS = (*_LIBRARIES, "costs")  # a profile that is given outlives their updates, a cached one does not

Identity = dict[str, Any]


def describe_identity(target: TargetModel, drafter: Drafter) -> Identity:
    """What a profile depends on: machine, threads, versions, kernels, model (sizes and types), drafter."""
    machine = describe_machine()
    device = target.device
    return {
        "cpu": machine["cpu"],
        "cpu_bfloat16": machine["cpu_bfloat16"],
        "num_cores": machine["num_cores"],
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **{name: machine[name] for name in _LIBRARIES},
        "costs": _COSTS,
        **{name: getattr(target.config, name, None) for name in _SIZES},
        "dtype": str(target.dtype).removeprefix("torch."),
        "kernels": device.type == "cpu" and cpu.is_available(),
        "weight_dtype": str(target.embed_tokens.weight.dtype).removeprefix("torch."),
        "drafter": drafter.name,
        "draft_parameters": _count_draft_parameters(drafter),
    }


def _count_draft_parameters(drafter: Drafter) -> int:
    """Parameters of the drafter's head or small LM; 0 without one."""
    trainable = find_trainable(drafter)
    module = trainable.head if trainable is not None else getattr(getattr(drafter, "lm", None), "base", None)
    return sum(parameter.numel() for parameter in module.parameters()) if isinstance(module, nn.Module) else 0


# -- one file --------------------------------------------------------------------------------------------------


def save_profile(
    profile: HardwareProfile, identity: Identity, path: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write a profile, and facts beside it that nobody reads back."""
    content = {
        "format": PROFILE_FORMAT,
        "version": PROFILE_VERSION,
        "identity": identity,
        "profile": asdict(profile),
        "capacity": profile.capacity,
    }
    write_json(content | dict(facts or {}), path, indent=1)


def read_profile(path: Path) -> tuple[HardwareProfile, Identity]:
    """What `save_profile` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no profile of this version, or holds impossible values; names file, value and remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no profile at {path}; fastgrpo profile writes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {MEASURE_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != PROFILE_FORMAT:
        raise ValueError(f"{path} is no profile: its format is not {PROFILE_FORMAT!r}; {MEASURE_AGAIN}")
    if content.get("version") != PROFILE_VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}, this fastgrpo reads {PROFILE_VERSION}; {MEASURE_AGAIN}"
        )
    try:
        profile, capacity = _build_profile(content.get("profile")), content.get("capacity")
        if not (_is_number(capacity) and is_finite(capacity) and capacity >= 1):
            raise ValueError(f"capacity must be at least 1 token, got {capacity!r:.60}; {MEASURE_AGAIN}")
        if not math.isclose(capacity, profile.capacity, rel_tol=1e-6):
            raise ValueError(
                f"capacity is {capacity!r:.60}, the times beside it say {profile.capacity:.1f} tokens; {MEASURE_AGAIN}"
            )
        if not isinstance(content.get("identity"), dict):
            raise ValueError(f"identity must be a mapping, got {content.get('identity')!r:.60}; {MEASURE_AGAIN}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return profile, content["identity"]


def _build_profile(raw: Any) -> HardwareProfile:
    names = [entry.name for entry in fields(HardwareProfile)]
    if not isinstance(raw, dict) or sorted(raw) != sorted(names):
        raise ValueError(f"profile must be a mapping of {', '.join(names)}, got {raw!r:.60}; {MEASURE_AGAIN}")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        is_list = name in _LISTS
        numbers = value if is_list and isinstance(value, list) else [value]
        is_sound = isinstance(value, bool) if name == _FLAG else all(_is_number(each) for each in numbers)
        if not is_sound:
            raise ValueError(f"profile: {name} is {value!r:.60}; {MEASURE_AGAIN}")
        values[name] = tuple(numbers) if is_list else value
    return HardwareProfile(**values)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def take_profile(profile: HardwareProfile | str | Path, target: TargetModel, drafter: Drafter) -> HardwareProfile:
    """A profile that was given: as it is, or from a file, if that was measured of the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no profile, or one of another machine, model, type or drafter; names all that differs.
    """
    if isinstance(profile, HardwareProfile):
        return profile
    if not isinstance(profile, str | Path):
        raise ValueError(f"profile must be a HardwareProfile or a file that holds one, got {profile!r}")
    path = Path(profile)
    taken, theirs = read_profile(path)
    ours = describe_identity(target, drafter)
    if listed := list_differences(theirs, ours):
        drafting = f"--drafter {drafter.name if drafter.name in DRAFTERS else 'DRAFTER'} --dtype {ours['dtype']}"
        remedy = f"fastgrpo profile --model {target.name or 'MODEL'} {drafting} --output {path}"
        raise ValueError(f"the profile {path} was measured of something else: {listed}; measure again: {remedy}")
    return taken


def list_differences(theirs: Identity, ours: Identity) -> str:
    """All that differs but versions, by name; empty where nothing does."""
    names = [name for name in dict.fromkeys((*ours, *theirs)) if name not in _VERSIONS]
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in differing)


# -- the cache -------------------------------------------------------------------------------------------------


def find_profile(target: TargetModel, drafter: Drafter) -> HardwareProfile:
    """The profile of exactly this from the cache, else measured now and kept. Call inside `target.rollout_mode`.

    A file that cannot be read is named in a warning and replaced. What was measured on a CPU beside other work is used,
    with a warning, and not kept.
    """
    identity = describe_identity(target, drafter)
    path = _build_path(identity)
    if has_profile_cache():
        try:
            profile, theirs = read_profile(path)
            if theirs == identity:
                return profile
            warnings.warn(f"the cached profile {path} is of something else and is measured anew", stacklevel=2)
        except FileNotFoundError:
            pass
        except (ValueError, OSError) as error:  # a home of somebody else is not even looked into
            warnings.warn(f"a cached profile is left out and measured anew: {error}", stacklevel=2)
    others = OthersWork()
    measurement = measure_costs(target, drafter)
    cores_taken = others.count_cores_taken() if target.device.type == "cpu" else 0.0
    if cores_taken:
        warnings.warn(
            f"other work took {cores_taken:.1f} cores while costs were measured: the planner begins with them and "
            "learns from its steps; they are not kept, so that the next process measures again",
            stacklevel=2,
        )
    else:
        keep_profile(measurement, identity)
    return measurement.profile


def keep_profile(measurement: Measurement, identity: Identity) -> Path | None:
    """Put a measurement into the cache, if there is one and the runs agreed; returns the file.

    A folder that cannot be written is named in a warning: the next process measures again.
    """
    if not (has_profile_cache() and measurement.is_steady):
        return None
    path = _build_path(identity)
    try:
        save_profile(measurement.profile, identity, path)
    except OSError as error:
        warnings.warn(f"the profile could not be kept ({error}); {CACHE_ENV} names another folder", stacklevel=2)
        return None
    return path


def _build_path(identity: Identity) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return find_cache_folder() / f"profile-{digest[:20]}.json"
