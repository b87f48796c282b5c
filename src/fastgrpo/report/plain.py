"""Text on a console as it is."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print text as it is: brackets are no markup, numbers have no colours, lines are not broken at the width."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
