"""What a rollout records (CUDA graphs on a GPU), left to the next one that finds everything where it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from fastgrpo.graphs import Outputs, Replays
from fastgrpo.memory import may_stay
from fastgrpo.model import TargetModel

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


class Storage(Protocol):
    """Rows of running sequences."""

    @property
    def num_bytes(self) -> int: ...

    def clear(self, *, keeps_storage: bool = False) -> None:
        """Drop all rows; the memory in which they stood stays if `keeps_storage`."""
        ...


class KeptRecordings(Generic[Inputs]):
    """Recordings of one call, and the storage that it writes to: both outlive a rollout, or neither does.

    They do where together they take little of the memory that is free then (`memory.may_stay`). A copy of this has
    recorded nothing.

    Args:
        target: the model that is run, or drafted for: where it records nothing, nothing is recorded here.
        storage: cleared as each rollout begins and ends.

    Attributes:
        replays: the recordings; None outside of rollouts if none are kept, and where nothing is recorded.
    """

    def __init__(self, target: TargetModel, storage: Storage) -> None:
        self._target, self._storage = target, storage
        self._place: Hashable = None
        self._is_kept = False
        self.replays: Replays[Inputs] | None = None

    def begin(
        self, place: Hashable, run: Callable[[Inputs], Outputs], list_stores: Callable[[], Sequence[Tensor]]
    ) -> None:
        """A rollout starts; call inside `target.rollout_mode`.

        Args:
            run, list_stores: as for `Replays`; methods, the same at each rollout, of what this is a part of.
            place: of all that the call reads besides its inputs and the stores. What was kept is replayed if that is
                equal to the last rollout's. None is never equal.
        """
        if not self._is_kept or place is None or place != self._place:
            self.forget()
        self._storage.clear(keeps_storage=self.replays is not None)
        self._place, self._is_kept = place, False
        if self.replays is None and (recorder := self._target.open_recorder()) is not None:
            self.replays = Replays(_hold_weakly(run), _hold_weakly(list_stores), recorder)

    def end(self) -> None:
        """A rollout ended, whether it began or not."""
        self._is_kept = False
        try:
            self._is_kept = self._place is not None and self._may_stay()
        finally:
            if not self._is_kept:
                self.forget()
            self._storage.clear(keeps_storage=self._is_kept)

    def forget(self) -> None:
        """Drop what was recorded, and record nothing until the next `begin`."""
        self.replays = self._place = None

    def _may_stay(self) -> bool:
        replays = self.replays
        if replays is None or replays.obstacle is not None or not len(replays):
            return False
        return may_stay(replays.num_bytes + self._storage.num_bytes, self._target.device)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"replays": None, "_place": None, "_is_kept": False}


def _hold_weakly(method: Callable[..., Result]) -> Callable[..., Result]:
    """The method, which keeps nothing alive: in a cycle, memory would wait for Python to look for cycles, which knows
    nothing of a device's.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Result:
        found = reference()
        assert found is not None, "what recorded is gone, and its recordings with it"
        return found(*args)

    return call
