"""Where a run ran, and of what: every number that is published names its machine and its commit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

COMMIT_ENV = "FASTGRPO_COMMIT"
_CODE = ("py", "c", "h", "toml")


def describe_cpu() -> str:
    """The processor's model name."""
    return _read_cpuinfo("model name") or platform.processor() or platform.machine()


def list_cpu_flags() -> list[str]:
    """What the processor can do, in the words of Linux; empty elsewhere. Unlike its name it is not hidden in clouds."""
    return sorted((_read_cpuinfo("flags") or _read_cpuinfo("Features")).split())


def _read_cpuinfo(name: str) -> str:
    """What Linux says of the first processor; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _find_bfloat16() -> str | None:
    """The best instructions for bfloat16 products on an x86 processor; None without any."""
    flags = list_cpu_flags()
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), None)


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def describe_machine() -> dict[str, Any]:
    """CPU, its bfloat16 instructions, cores, memory in GiB, accelerator (`None` without one), versions that matter."""
    import torch

    installed = {distribution.name for distribution in metadata.distributions()}
    packages = [name for name in ("torch", "transformers", "trl") if name in installed]
    has_affinity = hasattr(os, "sched_getaffinity")  # a container often gets a part of the machine
    return {
        "cpu": describe_cpu(),
        "cpu_bfloat16": _find_bfloat16(),
        "num_cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def describe_origin(model: str | Path | None) -> dict[str, str]:
    """What must be said of a small model in the body of a large one (bench/grow.py), by its folder; else nothing."""
    config = Path(str(model)) / "config.json"
    grown = json.loads(config.read_text(encoding="utf-8")).get("grown_from") if model and config.is_file() else None
    return {"grown_from": grown} if grown else {}


def describe_commit(path: str | Path) -> str:
    """The short commit checked out at `path`, with `-dirty` where code differs from it: results and documents may.

    "unknown" where `path` is in no repository, the repository has no commit, or git is not installed. A copy of the
    code on a machine without its history is told by `FASTGRPO_COMMIT`, which is believed.
    """
    if told := os.environ.get(COMMIT_ENV):
        return told
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(path), "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return "unknown"
    compare = [git, "-C", str(path), "diff", "--quiet", "HEAD", "--", *(f":/*.{suffix}" for suffix in _CODE)]
    differs = subprocess.run(compare, capture_output=True, check=False).returncode != 0
    return answer.stdout.strip() + ("-dirty" if differs else "")
