"""Where this user's files are kept that cost time to make again: profiles, kernels, a converted demo model."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "FASTGRPO_CACHE"  # a folder, or `off`: keep no profiles


def has_profile_cache() -> bool:
    return os.environ.get(CACHE_ENV) != "off"


def find_cache_folder() -> Path:
    """`$FASTGRPO_CACHE` where it names a folder, else `fastgrpo` in `$XDG_CACHE_HOME` or `~/.cache`."""
    setting = os.environ.get(CACHE_ENV)
    if setting and setting != "off":
        return Path(setting).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgrpo"
