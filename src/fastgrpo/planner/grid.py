"""The plans that `auto` chooses from."""

from __future__ import annotations

from fastgrpo.types import SpeculationPlan

GRID = tuple(  # sequences share their budgets; one of them may have three times its share, or all that is drafted
    SpeculationPlan(depth=d, width=w, num_draft_tokens=n, most_draft_tokens=min(w + w * w * (d - 1), 3 * n))
    for d, w, n in (
        *((1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 6), (2, 6, 12)),
        *((3, 1, 3), (3, 2, 6), (3, 3, 6), (3, 3, 8), (3, 4, 12), (3, 6, 24), (3, 8, 48), (4, 2, 8), (4, 4, 12)),
        *((4, 4, 16), (4, 8, 48), (5, 4, 24), (5, 8, 48), (6, 1, 6), (8, 2, 12), (8, 4, 24), (8, 8, 48)),
    )
)
