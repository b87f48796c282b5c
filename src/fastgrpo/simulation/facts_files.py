"""Facts on file: one compressed .npz."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastgrpo.disk import written_whole
from fastgrpo.simulation.facts import RECORD_AGAIN, Facts
from fastgrpo.types import SpeculationPlan

FACTS_FORMAT, FACTS_VERSION = "fastgrpo-facts", 1
_TYPES = {
    "parents": np.uint8,
    "scores": np.float16,  # three digits of a log chance
    "path": np.int16,
    "lengths": np.int32,
    "prompt_lens": np.int32,
    "groups": np.int32,
    "is_stopped": np.bool_,
    "num_ahead": np.uint8,
}


def save_facts(facts: Facts, path: Path) -> None:
    """Write facts, whole or not at all; scores are rounded to float16."""
    header = {
        "format": FACTS_FORMAT,
        "version": FACTS_VERSION,
        "plan": asdict(facts.plan),
        "most_prompt_tokens": facts.most_prompt_tokens,
        "about": dict(facts.about),
    }
    arrays = {name: getattr(facts, name).astype(kind) for name, kind in _TYPES.items()}
    with written_whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)


def load_facts(path: Path) -> Facts:
    """What `save_facts` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no facts of this version, or damaged ones; names file and remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no facts at {path}; fastgrpo bench simulate --record writes them")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz")
        with np.load(path, allow_pickle=False) as content:
            missing = [name for name in ("header", *_TYPES) if name not in content]
            if missing:
                raise ValueError(f"{', '.join(missing)} missing")
            header = json.loads(str(content["header"]))
            arrays = {name: content[name] for name in _TYPES}
        if header["format"] != FACTS_FORMAT or header["version"] != FACTS_VERSION:
            raise ValueError(f"its format is {header['format']!r}, version {header['version']!r}")
        for name, kind in _TYPES.items():
            if arrays[name].dtype != kind:
                raise ValueError(f"{name} is of type {arrays[name].dtype}, not {np.dtype(kind)}")
        if not isinstance(header["about"], dict):
            raise ValueError(f"about must be a mapping, got {header['about']!r:.60}")
        arrays["scores"] = arrays["scores"].astype(np.float32)
        most = header.get("most_prompt_tokens")  # older files have none
        if not (most is None or type(most) is int):
            raise ValueError(f"most_prompt_tokens must be an integer or null, got {most!r:.60}")
        plan = SpeculationPlan(**header["plan"])
        return Facts(plan=plan, most_prompt_tokens=most, about=header["about"], **arrays)
    except Exception as error:  # of a dozen kinds, whatever NumPy and zipfile stumble over
        raise ValueError(f"{path} holds no recorded facts, or damaged ones: {error}; {RECORD_AGAIN}") from error
