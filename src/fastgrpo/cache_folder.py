"""Where this user's files are kept that cost time to make again: profiles, kernels, a converted demo model."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "FASTGRPO_CACHE"  # a folder, or `off`: keep no profiles
_NO_HOME = Path("/nonexistent")


def has_profile_cache() -> bool:
    return os.environ.get(CACHE_ENV) != "off"


def find_cache_folder() -> Path:
    """`$FASTGRPO_CACHE` where it names a folder, else `fastgrpo` in `$XDG_CACHE_HOME` or `~/.cache`.

    A user without a home, as in some containers, is given a folder that cannot be made: nothing is kept then.
    """
    setting = os.environ.get(CACHE_ENV)
    named = Path(setting) if setting and setting != "off" else None
    try:
        return (named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastgrpo").expanduser()
    except RuntimeError:  # whose home is not known
        return _NO_HOME / "fastgrpo"
