"""What drafters with a head share: weights that learn, a fast copy that drafts, rows that are read lazily."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.cache import SlotCache
from fastgrpo.decoder import count_positions
from fastgrpo.drafters.acceptance_file import read_acceptance, write_acceptance
from fastgrpo.drafters.beams import rank_candidates
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.head_inputs import HeadInputs, TableShape
from fastgrpo.drafters.head_parts import DraftHead, choose_vocab_size
from fastgrpo.drafters.head_rows import HeadRows
from fastgrpo.graphs import list_larger
from fastgrpo.kept_recordings import KeptRecordings
from fastgrpo.kernels.choose import find_kernels
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.kernels.linear import pack_modules
from fastgrpo.model import TargetModel
from fastgrpo.places import find_places
from fastgrpo.rotation import RotationTable
from fastgrpo.sampling import SamplingBatch
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan
from fastgrpo.verify import Verdict

Head = TypeVar("Head", bound=DraftHead)

_PARTS = ("token_ids", "parents", "num_nodes", "log_chances", "scores")  # fields of a draft that a recording returns
_MANY_TOKENS = 8  # unread tokens a row on average; with more, all but each row's last are read by `catch_up`
_PRICED_TOKENS = 512  # unread tokens in all; with fewer, a device spends more time on launches than on reading them


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """The buffers that a recorded draft is fed with."""

    shape: TableShape
    table: Int[Tensor, "R C"]  # laid out as `TableShape` says


class HeadDrafter(ABC, Generic[Head]):
    """Drafts with a head over the target's features; keeps one row of keys and values for each running sequence.

    Args:
        target: the model to draft for; its embedding, RoPE and output rows are used.
        head: trained weights; None builds a head from the target's own weights, and `was_trained` is False.
        draft_vocab_size: output rows of a new head; None takes as many as suit the device.

    Attributes:
        head: the head that is trained, float32.
        fast_head: a copy of it in the target's type, which drafts.
        calibration: how often drafts came true, by the chance that the head gave them.
        acceptance: the chance that the target chooses the child of a sibling rank, by depth and rank, as measured when
            the head was trained (see `objective.measure_head`); None if it was not.
        ranks_with_noise: False drafts the likeliest tokens whatever the noise, as the paper does; for comparison.
    """

    name: str
    wants_features = True
    can_be_timed = True
    num_prompt_tokens: int  # last tokens of each prompt that the head reads, as many as in training
    _cache: SlotCache | None = None  # the target's, whose features were read last in this rollout
    _copied_head: Head | None = None  # the one that `fast_head` was copied from
    _prepared_for = ""  # the kernels that there were when `fast_head` was prepared
    _num_caught_up = 0  # tokens that `catch_up`, which is not recorded, read before the last draft

    def __init__(
        self,
        target: TargetModel,
        *,
        head: Head | None = None,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.target = target
        self.calibration = Calibration()
        self.acceptance: list[list[float]] | None = None
        self.ranks_with_noise = True
        self.was_trained = head is not None
        if head is None:
            head = self.build_head(target, draft_vocab_size or choose_vocab_size(target))
        self.head: Head = head.to(target.device, torch.float32)
        if target.dtype in (torch.bfloat16, torch.float16):
            self.head.lm_head.to(target.dtype)  # not trained: a copy of the target's rows as they are
        self._rows = HeadRows(target, self.head.num_layers, self.num_prompt_tokens)
        self._recordings = KeptRecordings[_Recorded](target, self._rows)
        self._memory = KeptMemory()  # of the fast copy's weights, laid out
        self._rotation = RotationTable(target.rotary_emb, count_positions(target.config))
        self.refresh()

    # -- what a kind of head implements --------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def build_head(target: TargetModel, draft_vocab_size: int) -> Head:
        """A head that starts from the target's own weights."""

    @staticmethod
    @abstractmethod
    def load_head(folder: Path, target: TargetModel) -> Head:
        """Read and check a saved head.

        Raises:
            ValueError: damaged files, or a head of another target; names what differs.
        """

    @abstractmethod
    def save_head(self, folder: Path, *, compact: bool = False, counts: Int[Tensor, " V"] | None = None) -> None:
        """Write the trained head.

        Args:
            compact: write bfloat16, and no output rows: the target has them.
            counts: how often rollouts had each token; a compact head keeps the counts of its vocabulary.
        """

    @abstractmethod
    def check_like(self, head: Head, folder: Path) -> None:
        """Refuse a head that computes something else than this drafter's would with its weights.

        Raises:
            ValueError: it does; names what differs.
        """

    @abstractmethod
    def catch_up(self, context: DraftContext) -> None:
        """Store keys and values of each row's unread tokens but the last."""

    @abstractmethod
    def draft(self, inputs: HeadInputs, plan: SpeculationPlan) -> Draft:
        """Read the tokens that are still unread, then draft. On a GPU it must only launch work: it may be recorded."""

    # -- learning ------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Copy the trained weights into the head that drafts; output rows come from the target as it is now."""
        self.head.take_output_rows(self.target)
        if self._copied_head is self.head and _are_alike(self.fast_head, self.head):
            has_changed = _write_over(self.fast_head, self.head)
            if not has_changed and self._prepared_for == self._name_kernels():
                return
        else:
            self._recordings.forget()
            self.fast_head: Head = copy.deepcopy(self.head).to(self.target.dtype).requires_grad_(False)
            self._copied_head = self.head
        self._prepared_for = self._name_kernels()
        self.prepare()

    def _name_kernels(self) -> str:
        return getattr(find_kernels(self.head.lm_head.weight), "__name__", "none")

    def __getstate__(self) -> dict[str, Any]:
        """All but the engine's cache: a copy of the drafter is given its own engine's."""
        return vars(self) | {"_cache": None}

    def prepare(self) -> None:
        """Pack the weights of `fast_head` for speed; they do not change until the next `refresh`."""
        self._memory.begin()
        pack_modules(self.fast_head, memory=self._memory)

    def _take_rotation(self) -> None:
        """Rotate as the target does now."""
        target = self.target
        self._rotation = RotationTable.renew(self._rotation, target.rotary_emb, count_positions(target.config))

    def select_vocabulary(self, counts: Int[Tensor, " V"]) -> None:
        """Make the most counted tokens the head's vocabulary; drafts use it after the next `refresh`."""
        self.head.select_vocabulary(counts)
        self.head.take_output_rows(self.target)

    def save(self, folder: Path) -> None:
        """Write the trained head, and beside it its calibration and measured acceptance."""
        self.save_head(folder)
        self.calibration.save(folder)
        if self.acceptance is not None:
            write_acceptance(folder, self.acceptance)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote into this head.

        Raises:
            ValueError: damaged files, or a head of another target or shape; names what differs.
        """
        head = self.load_head(folder, self.target)
        self.check_like(head, folder)
        self.head.resize_vocabulary(head.draft_vocab_size)
        self.head.to(self.target.device)  # new rows are made on the CPU
        self.head.lm_head.to(head.lm_head.weight.dtype)
        self.head.load_state_dict(head.state_dict())
        self.calibration.restore(folder)
        self.refresh()

    @classmethod
    def load(cls, folder: Path, target: TargetModel) -> Self:
        """Read a folder that `save` wrote.

        Raises:
            ValueError: damaged files, or a head of another target; names what differs.
        """
        drafter = cls(target, head=cls.load_head(folder, target))
        drafter.calibration.restore(folder)
        drafter.acceptance = read_acceptance(folder)
        return drafter

    # -- drafting ------------------------------------------------------------------------------------

    @property
    def position_bytes(self) -> int:
        return self._rows.cache.position_bytes

    def begin(self) -> None:
        self.calibration.fit()
        self.refresh()
        self._take_rotation()
        self._cache = None
        self._recordings.begin(self._find_place(), self._run_recorded, self._list_stores)

    def end(self) -> None:
        self._cache = None
        self._recordings.end()

    def _find_place(self) -> Hashable:
        """Equal in two rollouts if the one's recordings may be replayed in the other; None where they may not."""
        if self.target.place is None:
            return None
        return self.target.place, self._rotation, self.calibration, find_places(self.list_weights())

    def list_weights(self) -> list[Tensor]:
        """All that drafts read of the head."""
        return [*_list_tensors(self.fast_head).values(), self.head.draft_vocab]

    @property
    def was_replayed(self) -> bool:
        """Whether the next draft like the last one will take as long, what had to be read first set aside."""
        if self._recordings.replays is None:
            return True
        return not self.has_recorded and not 0 < self._num_caught_up < _PRICED_TOKENS

    @property
    def has_recorded(self) -> bool:
        """Whether the last draft was recorded."""
        replays = self._recordings.replays
        return replays is not None and not replays.was_replayed

    def count_unread(self, sequences: list[Sequence]) -> int:
        return self._rows.count_unread(sequences)

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        pass  # features and tokens are read when they are needed

    def judge(self, draft: Draft, verdict: Verdict) -> None:
        self.calibration.observe(draft, verdict)

    def release(self, slot: int, last_slot: int) -> None:
        self._rows.release(slot, last_slot)

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        lengths = context.cache.lengths
        if min(lengths) == 0:  # a one-token prompt has no feature yet
            return Draft.roots(context.pending_token_ids)
        try:
            self._rows.reserve(context.sequences, plan.width * plan.depth)
            draft = self._grow(context, plan)
            self._rows.finish(lengths)
        finally:
            self._rows.trim()  # where memory ran out, too
        return draft

    def _grow(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        """Read what the rows have not read yet, and draft behind it; room for both has been reserved."""
        self._cache = context.cache
        own, replays = self._rows.cache, self._recordings.replays
        lengths = context.cache.lengths  # if a failed attempt has read them all, the last token of each is read again
        num_read = [min(read, length - 1) for read, length in zip(self._rows.num_read, lengths, strict=True)]
        most = max(length - read for length, read in zip(lengths, num_read, strict=True))
        num_unread = sum(lengths) - sum(num_read)
        is_behind = num_unread > _MANY_TOKENS * len(lengths) or (replays is not None and most > plan.depth + 1)
        self._num_caught_up = num_unread if is_behind else 0
        if is_behind:
            self.catch_up(context)
            num_read = [length - 1 for length in lengths]
        if replays is not None:
            own.take_scratch()
            shape = TableShape.find(context, plan, own, with_noise=self.ranks_with_noise)
            found = replays(
                shape,
                lambda: _Recorded(shape=shape, table=shape.build(self.target.device)),
                lambda inputs: inputs.shape.fill(inputs.table, context, num_read, self._rows),
                larger=[replace(shape, rows=rows) for rows in list_larger(shape.rows)],
            )
            if found is not None:
                parts: dict[str, Any] = {name: part[: len(lengths)] for name, part in zip(_PARTS, found, strict=True)}
                return Draft(**parts)
        return self.draft(HeadInputs.gather(context, num_read, self._rows), plan)

    def _run_recorded(self, inputs: _Recorded) -> tuple[Tensor, ...]:
        draft = self.draft(inputs.shape.read(inputs.table), inputs.shape.plan)
        return tuple(getattr(draft, name) for name in _PARTS)

    def _list_stores(self) -> list[Tensor]:
        assert self._cache is not None
        return [*self._rows.cache.list_data(), *self._cache.list_data()]

    def _take_features(self, places: Int[Tensor, " T"]) -> Float[Tensor, "T F"]:
        """The target's features at these places of its cache, without the last hidden state, which no head reads."""
        assert self._cache is not None and self._cache.features is not None
        return self._cache.features.flat(0)[places, : 3 * self.target.hidden_size].to(self.target.dtype)

    def rank(
        self, logits: Float[Tensor, "B W C"], noise_rows: SamplingBatch, width: int
    ) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The `width` most promising tokens by logits over the draft vocabulary: (log chance of being chosen, id)."""
        return rank_candidates(logits, self.head.draft_vocab, noise_rows, width, with_noise=self.ranks_with_noise)


def _are_alike(*heads: DraftHead) -> bool:
    first, second = (
        {name: (tensor.shape, tensor.device) for name, tensor in _list_tensors(head).items()} for head in heads
    )
    return first == second


def _write_over(fast_head: DraftHead, head: DraftHead) -> bool:
    """Bring a fast copy up to date where it stands, since new pages take longer; returns whether anything changed."""
    copies, has_changed = _list_tensors(fast_head), False
    with torch.no_grad():
        for name, tensor in _list_tensors(head).items():
            rounded = tensor.to(copies[name].dtype)
            if not _are_equal(copies[name], rounded):
                copies[name].copy_(rounded)
                has_changed = True
    return has_changed


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Bit by bit, eight bytes at a time: numbers of two bytes compare at a thirtieth of the speed."""
    flat = [each.detach().view(-1) for each in (first, second) if each.is_contiguous()]
    if len(flat) < 2 or any(each.nbytes % 8 or each.storage_offset() * each.element_size() % 8 for each in flat):
        return torch.equal(first, second)
    return torch.equal(*(each.view(torch.int64) for each in flat))


def _list_tensors(head: DraftHead) -> dict[str, Tensor]:
    return dict((*head.named_parameters(), *head.named_buffers()))
