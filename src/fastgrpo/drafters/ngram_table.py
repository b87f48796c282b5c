"""Counted n-grams of many prompts' rollouts in a bounded hash table; numpy on the host, no Python per token.

An entry belongs to one context: a group (the hash of a prompt) and the last o tokens, for each order o of
`ORDERS`. It counts up to `_BUCKET` continuations. Entries lie in sets of `_WAYS`; in a full set the one that was
counted longest ago gives way, so memory is fixed and what a run still visits stays.

Keys are 64-bit hashes, kept and compared whole: of n contexts two share one with chance n^2 / 2^65, and a draft
that follows a false one is only a bad draft.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64, UInt64

# One token back is almost always known, five tell a text that repeats itself; between them each step adds less.
# A level costs its share of memory and time, so 4 and what lies beyond 5 are left out.
ORDERS = (1, 2, 3, 5)
MAX_ORDER = ORDERS[-1]
NO_TOKEN = -1  # before the start of a text; no context reaches over it

_BUCKET = 8  # continuations of an entry; more only matter where nothing is predictable
_WAYS = 8  # entries of a set: their keys are one cache line
_ENTRY_BYTES = 8 + 4 + 2 + (4 + 2) * _BUCKET  # key, stamp, total, (token, count) each
_MOST_TOTAL = 255  # an entry with more halves its counts, so those of older policies fade
_CHUNK_TOKENS = 4096  # counted at once; with `_MOST_TOTAL` it fits 16-bit counts
_SALT, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class NgramTable:
    """Continuation counts of contexts.

    Args:
        max_bytes: memory at most; the largest power-of-two number of sets that fits is used.

    Attributes:
        num_evicted: entries that gave way or found no room.

    Raises:
        ValueError: `max_bytes` has no room for one set.
    """

    def __init__(self, max_bytes: int) -> None:
        set_bytes = _WAYS * _ENTRY_BYTES
        if max_bytes < set_bytes:
            raise ValueError(f"max_bytes must be at least {set_bytes}, got {max_bytes}")
        self._num_sets = 1 << (max_bytes // set_bytes).bit_length() - 1
        size = self._num_sets * _WAYS
        self._keys = np.zeros((self._num_sets, _WAYS), np.uint64)  # 0: empty
        self._stamps = np.zeros((self._num_sets, _WAYS), np.uint32)  # `_clock` when last counted
        self._totals = np.zeros(size, np.uint16)  # continuations seen, those no longer kept included
        self._tokens = np.zeros((size, _BUCKET), np.int32)
        self._counts = np.zeros((size, _BUCKET), np.uint16)  # 0: the token means nothing
        self._clock = 0
        self.num_evicted = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays, never more than `max_bytes`."""
        return sum(a.nbytes for a in (self._keys, self._stamps, self._totals, self._tokens, self._counts))

    # -- counting ------------------------------------------------------------------------------------

    def add(
        self,
        groups: UInt64[np.ndarray, " n"],
        contexts: Int[np.ndarray, "n M"],
        token_ids: Int[np.ndarray, " n"],
    ) -> None:
        """Count each token behind its context at every order.

        Args:
            groups: keys of the texts' groups.
            contexts: the tokens before, newest last, `NO_TOKEN` before the start of the text.
            token_ids: what followed.
        """
        for start in range(0, len(token_ids), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            keys = hash_contexts(groups[part], contexts[part])
            is_context = keys != 0
            tokens = np.broadcast_to(token_ids[part, None], keys.shape)[is_context].astype(np.int64)
            known, entry = np.unique(keys[is_context], return_inverse=True)
            pairs, times = np.unique(entry.astype(np.int64) << 32 | tokens, return_counts=True)
            slots = self._place(known)[pairs >> 32]
            has_room = slots >= 0
            self._count(slots[has_room], pairs[has_room] & 0x7FFFFFFF, times[has_room])

    def _place(self, keys: UInt64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Slots of distinct keys, new ones in the place of what is oldest in their set; -1 where none is free.

        What was counted in this same call does not give way.
        """
        self._clock += 1
        slots, is_known = self._find(keys)
        sets = slots // _WAYS
        self._stamps.reshape(-1)[slots[is_known]] = self._clock
        new = np.flatnonzero(~is_known)
        new = new[np.argsort(sets[new], kind="stable")]
        rank = _rank_in_runs(sets[new])
        ages = np.argsort(self._stamps[sets[new]], axis=1, kind="stable")
        way = ages[np.arange(len(new)), np.minimum(rank, _WAYS - 1)]
        has_room = (rank < _WAYS) & (self._stamps[sets[new], way] != self._clock)
        taken, way = new[has_room], way[has_room]
        slots[new] = -1
        slots[taken] = sets[taken] * _WAYS + way
        flat_keys = self._keys.reshape(-1)
        self.num_evicted += len(new) - len(taken) + int((flat_keys[slots[taken]] != 0).sum())
        flat_keys[slots[taken]] = keys[taken]
        self._stamps.reshape(-1)[slots[taken]] = self._clock
        self._totals[slots[taken]] = 0
        self._counts[slots[taken]] = 0
        return slots

    def _count(
        self, slots: Int[np.ndarray, " m"], token_ids: Int[np.ndarray, " m"], times: Int[np.ndarray, " m"]
    ) -> None:
        """Add to distinct (slot, token) pairs.

        In a full bucket the most frequent newcomer takes the place of the least counted; the others only
        places whose count they reach, or one batch of rare tokens would wipe the bucket out.
        """
        added = times.astype(np.uint16)
        np.add.at(self._totals, slots, added)
        is_match = (self._tokens[slots] == token_ids[:, None]) & (self._counts[slots] > 0)
        is_known = is_match.any(1)
        self._counts[slots[is_known], is_match.argmax(1)[is_known]] += added[is_known]
        new = np.flatnonzero(~is_known)
        new = new[np.lexsort((-times[new], slots[new]))]
        rank = _rank_in_runs(slots[new])
        old = self._counts[slots[new]]
        least = np.argsort(old, axis=1, kind="stable")
        column = least[np.arange(len(new)), np.minimum(rank, _BUCKET - 1)]
        is_taken = (rank == 0) | ((rank < _BUCKET) & (times[new] >= old[np.arange(len(new)), column]))
        new, column = new[is_taken], column[is_taken]
        self._tokens[slots[new], column] = token_ids[new]
        self._counts[slots[new], column] = added[new]
        full = np.unique(slots[self._totals[slots] > _MOST_TOTAL])
        while len(full):
            self._counts[full] >>= 1
            self._totals[full] >>= 1
            full = full[self._totals[full] > _MOST_TOTAL]

    # -- predicting ----------------------------------------------------------------------------------

    def predict(
        self, groups: UInt64[np.ndarray, " n"], contexts: Int[np.ndarray, "n M"]
    ) -> tuple[Int32[np.ndarray, "n C"], Float[np.ndarray, "n C"], Float[np.ndarray, " n"]]:
        """What follows each context: the orders interpolated, each by its number of distinct continuations d_o
        (Witten and Bell 1991, PPM's method C): q_o(v) = (count_o(v) + e_o q_{o-1}(v)) / (total_o + d_o).

        e_o is d_o and the counts of tokens that lost their place: what is not known is left to the shorter context,
        and at last to tokens never seen, so chances and escape add up to 1.

        Returns:
            token ids, their chances (0: no candidate; distinct where positive), and the escape mass.
        """
        keys = hash_contexts(groups, contexts)
        slots, is_known = (each.reshape(keys.shape) for each in self._find(keys.reshape(-1)))
        levels = np.flatnonzero(is_known.any(0))
        slots, is_known = slots[:, levels], is_known[:, levels]
        tokens = self._tokens[slots]
        counts = (self._counts[slots] * is_known[..., None]).astype(np.float32)
        totals = (self._totals[slots] * is_known).astype(np.float32)
        distinct = (counts > 0).sum(-1, dtype=np.float32)
        weight = 1 / np.maximum(totals + distinct, 1)
        share = np.where(is_known, (totals - counts.sum(-1) + distinct) * weight, np.float32(1))
        candidates = tokens.reshape(len(keys), -1)
        is_candidate = counts.reshape(candidates.shape) > 0
        chances = np.zeros(candidates.shape, np.float32)
        for level in range(len(levels)):
            is_same = candidates[:, :, None] == tokens[:, level, None]
            here = (is_same * counts[:, level, None]).sum(-1)
            chances = here * weight[:, level, None] + chances * share[:, level, None]
            below = slice(0, level * _BUCKET)
            is_candidate[:, below] &= here[:, below] == 0  # the same token once more, at a longer context
        return candidates, chances * is_candidate, share.prod(1)

    def look_up(self, group: int, context: list[int]) -> dict[int, int]:
        """Counts behind one context of a length in `ORDERS`; empty where it is unknown."""
        padded = np.array([[NO_TOKEN] * (MAX_ORDER - len(context)) + context])
        keys = hash_contexts(np.array([group], np.uint64), padded)[:, ORDERS.index(len(context))]
        slots, is_known = self._find(keys)
        if not is_known[0]:
            return {}
        pairs = zip(self._tokens[slots[0]].tolist(), self._counts[slots[0]].tolist(), strict=True)
        return {token_id: count for token_id, count in pairs if count}

    def _find(self, keys: UInt64[np.ndarray, " k"]) -> tuple[Int64[np.ndarray, " k"], Bool[np.ndarray, " k"]]:
        """(a slot of its set, whether it holds the key); key 0 is no context and never found."""
        sets = (keys & np.uint64(self._num_sets - 1)).astype(np.int64)
        is_match = self._keys[sets] == keys[:, None]
        return sets * _WAYS + is_match.argmax(1), is_match.any(1) & (keys != 0)

    # -- state ---------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The entries in use, newest first."""
        used = np.flatnonzero(self._keys.reshape(-1))
        used = used[np.argsort(self._stamps.reshape(-1)[used], kind="stable")[::-1]]
        return {
            "keys": self._keys.reshape(-1)[used],
            "stamps": self._stamps.reshape(-1)[used],
            "totals": self._totals[used],
            "tokens": self._tokens[used],
            "counts": self._counts[used],
        }

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take these entries in the place of all; of those without room the oldest are left out.

        Raises:
            ValueError: an array is missing, or of another type or shape.
        """
        size = len(arrays["keys"]) if "keys" in arrays else 0
        shapes = {"keys": (size,), "stamps": (size,), "totals": (size,), "tokens": (size, _BUCKET)}
        shapes["counts"] = shapes["tokens"]
        for name, shape in shapes.items():
            dtype = getattr(self, f"_{name}").dtype
            if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != dtype:
                raise ValueError(f"{name} must be {dtype} of shape {list(shape)}")
        for own in (self._keys, self._stamps, self._totals, self._counts):
            own[...] = 0
        slots = self._place(arrays["keys"])
        kept = slots >= 0
        slots = slots[kept]
        self._stamps.reshape(-1)[slots] = arrays["stamps"][kept]
        self._totals[slots] = arrays["totals"][kept]
        self._tokens[slots] = arrays["tokens"][kept]
        self._counts[slots] = arrays["counts"][kept]
        self._clock = int(self._stamps.max())


def hash_contexts(groups: UInt64[np.ndarray, " n"], contexts: Int[np.ndarray, "n M"]) -> UInt64[np.ndarray, "n O"]:
    """Key of the last o tokens for each order; 0 where the text is shorter."""
    tokens = contexts.astype(np.uint64)
    keys = np.zeros((len(groups), len(ORDERS)), np.uint64)
    value = groups
    for order in range(1, MAX_ORDER + 1):
        value = _mix(value + (tokens[:, -order] + np.uint64(1)) * _SALT)  # order by order another mixing of all
        if order in ORDERS:
            has_context = contexts[:, -order] != NO_TOKEN
            keys[:, ORDERS.index(order)] = np.where(has_context, np.maximum(value, np.uint64(1)), np.uint64(0))
    return keys


def _mix(value: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's finaliser."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _rank_in_runs(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Place of each value within its run of equal ones."""
    index = np.arange(len(values))
    is_start = np.ones(len(values), bool)
    is_start[1:] = values[1:] != values[:-1]
    return index - np.maximum.accumulate(np.where(is_start, index, 0))
