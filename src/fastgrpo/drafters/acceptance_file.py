"""How often a head's drafts were accepted when it was trained, in a file beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

_FILE = "acceptance.json"


def write_acceptance(folder: Path, rates: list[list[float]]) -> None:
    """Write rates by depth and sibling rank."""
    (folder / _FILE).write_text(json.dumps({"rates": [[round(rate, 4) for rate in row] for row in rates]}) + "\n")


def read_acceptance(folder: Path) -> list[list[float]] | None:
    """Rates by depth and sibling rank; None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        rates = [[float(rate) for rate in row] for row in json.loads(path.read_text())["rates"]]
        if not rates or not all(row and all(0 <= rate <= 1 for rate in row) for row in rates):
            raise ValueError("rates must be numbers from 0 to 1, by depth and rank")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to start without") from error
    return rates
