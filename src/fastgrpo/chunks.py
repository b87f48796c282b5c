"""Long texts cut for forwards of bounded size."""

from __future__ import annotations

from collections.abc import Iterator


def cut_into_forwards(
    left: dict[int, list[int]], *, most_tokens: int, most_of_a_row: int
) -> Iterator[dict[int, list[int]]]:
    """What each forward computes, by slot: the slots with most left go together, since rows are padded to the longest.

    Args:
        left: the tokens to compute, by slot; a slot without any is left out.
        most_tokens: of a forward, padding included; a single row may have more.
        most_of_a_row: tokens of one row in one forward.
    """
    while left := {slot: ids for slot, ids in left.items() if ids}:
        chosen: dict[int, list[int]] = {}
        width = 0
        for slot in sorted(left, key=lambda slot: -len(left[slot])):
            width = width or min(len(left[slot]), most_of_a_row)
            if chosen and (len(chosen) + 1) * width > most_tokens:
                break
            chosen[slot] = left[slot][:most_of_a_row]
        yield chosen
        left |= {slot: left[slot][most_of_a_row:] for slot in chosen}
