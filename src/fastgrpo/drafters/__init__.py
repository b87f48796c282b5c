"""Drafters: one file each, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.drafters.drafter import DraftContext, Drafter, TrainableDrafter

if TYPE_CHECKING:
    from fastgrpo.drafters.eagle import EagleDrafter
    from fastgrpo.model import TargetModel

DRAFTERS = ("eagle", "eagle-new", "ngram", "none", "auto", "block")

__all__ = ["DraftContext", "Drafter", "build_drafter", "find_own_target", "find_trainable"]


def build_drafter(drafter: str | Path | Drafter, target: TargetModel) -> Drafter:
    """The drafter behind a `drafter` key: one of `DRAFTERS`, a folder, or a `Drafter`.

    "eagle" begins with the head that ships for the target where there is one, "eagle-new" never does, "block" begins
    from the target's own weights; "auto" is eagle and ngram, whichever pays, or both. A folder says itself whether
    it holds a head (a trainer's checkpoint and a run of `draft train` do), of which kind, or a small causal LM of the
    target's tokenizer.

    Raises:
        ValueError: neither a known name nor a folder that holds a head or an LM that fits the target.
    """
    if not isinstance(drafter, str | Path):
        if not hasattr(drafter, "propose"):
            raise ValueError(f"drafter must be a name, a folder or a Drafter, got {drafter!r}; 'none' drafts nothing")
        return drafter
    if drafter == "none":
        from fastgrpo.drafters.none import NoDrafter

        return NoDrafter()
    from fastgrpo.drafters.ngram import NgramDrafter

    if drafter == "ngram":
        return NgramDrafter()
    if drafter == "auto":
        from fastgrpo.drafters.auto import AutoDrafter

        return AutoDrafter(_build_eagle(target), NgramDrafter())
    from fastgrpo.drafters.block import BlockDrafter
    from fastgrpo.drafters.block_files import BLOCK_ARCHITECTURE
    from fastgrpo.drafters.eagle import EagleDrafter
    from fastgrpo.drafters.head_files import find_head_folder, read_architecture

    if drafter == "block":
        return BlockDrafter(target)
    if drafter in ("eagle", "eagle-new"):
        return _build_eagle(target) if drafter == "eagle" else EagleDrafter(target)
    folder = find_head_folder(Path(drafter))
    if folder.is_dir():
        from fastgrpo.drafters.lm import LmDrafter
        from fastgrpo.drafters.lm_files import is_causal_lm

        if is_causal_lm(folder):
            return LmDrafter.load(folder, target)
        is_block = read_architecture(folder) == BLOCK_ARCHITECTURE
        return BlockDrafter.load(folder, target) if is_block else EagleDrafter.load(folder, target)
    raise ValueError(
        f"drafter must be {', '.join(DRAFTERS)}, or a folder with a saved head or a small causal LM; got '{drafter}'"
    )


def _build_eagle(target: TargetModel) -> EagleDrafter:
    """With the head that ships for the target, if there is one."""
    from fastgrpo.drafters.acceptance_file import read_acceptance
    from fastgrpo.drafters.eagle import EagleDrafter
    from fastgrpo.drafters.eagle_files import find_shipped_head, load_head
    from fastgrpo.drafters.head_parts import choose_vocab_size

    shipped = find_shipped_head(target)
    if shipped is None:
        return EagleDrafter(target)
    head = load_head(shipped, target)
    head.keep_frequent(choose_vocab_size(target))
    drafter = EagleDrafter(target, head=head)
    drafter.acceptance = read_acceptance(shipped)
    return drafter


def find_own_target(drafter: Drafter, target: TargetModel) -> TargetModel:
    """What the drafter runs the same model through, if it does: so a rollout prepares it for both; else the target."""
    drafters: tuple[Drafter, ...] = (drafter, *getattr(drafter, "members", ()))
    targets = (getattr(each, "target", None) for each in drafters)
    return next((own for own in targets if own is not None and own.is_like(target)), target)


def find_trainable(drafter: Drafter) -> TrainableDrafter | None:
    """The drafter that learns: this one, or one that it consults."""
    consulted: tuple[Drafter, ...] = getattr(drafter, "members", ())
    return next((each for each in (drafter, *consulted) if isinstance(each, TrainableDrafter)), None)
