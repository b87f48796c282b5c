"""Drafters: one file each, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.drafters.drafter import DraftContext, Drafter

if TYPE_CHECKING:
    from fastgrpo.model import TargetModel

__all__ = ["DraftContext", "Drafter", "build_drafter"]


def build_drafter(drafter: str | Path | Drafter, target: TargetModel) -> Drafter:
    """The drafter behind a `drafter` key: eagle, eagle-new, ngram, none, a folder with a head, or a `Drafter`.

    "eagle" begins with the head that ships for the target where there is one, "eagle-new" never does.

    Raises:
        ValueError: neither a known name nor a folder that holds a head that fits the target.
    """
    if not isinstance(drafter, str | Path):
        return drafter
    if drafter == "none":
        from fastgrpo.drafters.none import NoDrafter

        return NoDrafter()
    if drafter == "ngram":
        from fastgrpo.drafters.ngram import NgramDrafter

        return NgramDrafter()
    from fastgrpo.drafters.eagle import EagleDrafter
    from fastgrpo.drafters.eagle_files import find_shipped_head

    if drafter in ("eagle", "eagle-new"):
        shipped = find_shipped_head(target) if drafter == "eagle" else None
        return EagleDrafter.load(shipped, target) if shipped else EagleDrafter(target)
    if Path(drafter).is_dir():
        return EagleDrafter.load(Path(drafter), target)
    raise ValueError(f"drafter must be eagle, eagle-new, ngram, none, or a folder with a saved head; got '{drafter}'")
