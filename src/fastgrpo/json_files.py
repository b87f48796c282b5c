"""JSON files, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fastgrpo.disk import written_whole


def _as_json(value: Any) -> Any:
    """`value` in JSON's own types; numbers that JSON has no word for become null."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(content: Mapping[str, Any], path: Path, *, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all. `nan` is written as null.

    Raises:
        TypeError: `content` holds something that is no number, text, list or mapping.
        OSError: it cannot be written; names `path`.
    """
    text = json.dumps(_as_json(content), allow_nan=False, indent=indent)
    with written_whole(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
