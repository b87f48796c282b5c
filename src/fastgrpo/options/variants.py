"""How the trainers of a benchmark are written: `auto`, or with keys of their own, `auto:skip_zero_advantages=false`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgrpo.options.words import TRAINING_VARIANTS


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A trainer of a benchmark.

    Args:
        kind: "trl" for TRL's own, else the speculation of ours.
        keys: of its config, with their values as written.
    """

    kind: str
    keys: dict[str, str] = field(default_factory=dict)


def parse_variant(word: str) -> Variant:
    """Read `KIND` or `KIND:KEY=VALUE:KEY=VALUE`; whether there are such keys is the trainer's to say.

    Raises:
        ValueError: there is no such kind, or a part is no KEY=VALUE.
    """
    kind, *parts = word.split(":")
    if kind not in TRAINING_VARIANTS:
        raise ValueError(f"a variant begins with one of {', '.join(TRAINING_VARIANTS)}, got {word!r}")
    for part in parts:
        key, is_given, _ = part.partition("=")
        if not (key and is_given):
            raise ValueError(f"the keys of a variant are written {kind}:KEY=VALUE, got {word!r}")
    return Variant(kind=kind, keys=dict(part.split("=", 1) for part in parts))
