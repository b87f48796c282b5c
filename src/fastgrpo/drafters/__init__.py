"""Drafters: one file each, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.drafters.drafter import DraftContext, Drafter

if TYPE_CHECKING:
    from fastgrpo.model import TargetModel

__all__ = ["DraftContext", "Drafter", "build_drafter"]


def build_drafter(drafter: str | Path | Drafter, target: TargetModel) -> Drafter:
    """The drafter behind a `drafter` key: eagle, ngram, none, a folder with a saved head, or a `Drafter`.

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

    if drafter == "eagle":
        return EagleDrafter(target)
    if Path(drafter).is_dir():
        return EagleDrafter.load(Path(drafter), target)
    raise ValueError(f"drafter must be eagle, ngram, none, or a folder with a saved head; got '{drafter}'")
