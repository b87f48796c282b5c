"""Compiles the CPU kernels at first use, once for a machine, a compiler and a source; then a file lookup."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from fastgrpo.cache_folder import find_cache_folder
from fastgrpo.machine import describe_cpu, list_cpu_flags

_HERE = Path(__file__).parent
KERNELS_ENV = "FASTGRPO_KERNELS"  # `off` computes everything with PyTorch's operators
_FLAGS = (
    "-O3", "-march=native", *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
    "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fPIC",
)  # fmt: skip
_OWN_FLAGS = {"noise.c": "-ffp-contract=off", "decoder.c": "-ffp-contract=fast", "attention.c": "-ffp-contract=fast",
              "products.c": "-ffp-contract=fast", "layer.c": "-ffp-contract=fast",
              "trees.c": "-ffp-contract=off", "drafts.c": "-ffp-contract=off",
              "rounding.c": "-ffp-contract=off"}  # fmt: skip
_LONGEST_S = 120.0
_DIGEST_BYTES = hashlib.sha256().digest_size


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be had, which a warning then says once."""
    if os.environ.get(KERNELS_ENV) == "off":
        return None
    try:
        library = _find_library()
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # of another system that shares the folder, or nothing may be run from there
            with contextlib.suppress(OSError):
                library.unlink()
            return ctypes.CDLL(str(_find_library(is_kept=False)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        warnings.warn(
            "the CPU kernels could not be compiled, so that decoding is slower and says the same: "
            f"{output.strip().splitlines()[0] if output.strip() else error!r}; install gcc, or set {KERNELS_ENV}=off",
            stacklevel=2,
        )
        return None


def _find_library(*, is_kept: bool = True) -> Path:
    """The compiled file: in the user's cache, or where that does not work or is not wanted, in a folder that goes."""
    compiler = _find_compiler()
    version = _run(*compiler, "--version")
    texts = [(_HERE / name).read_text() for name in (*_OWN_FLAGS, "common.h", "matrices.h", "records.h")]
    parts = (*texts, *compiler[1:], *_FLAGS, *_OWN_FLAGS.values(), version, describe_cpu(), *list_cpu_flags())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    library = find_cache_folder() / f"kernels-{key}.so"
    if is_kept:
        try:
            if not _is_whole(library):
                library.parent.mkdir(parents=True, exist_ok=True)
                _compile(compiler, library)
            return library
        except (OSError, subprocess.CalledProcessError):  # a home that cannot be written to, or is full
            pass
    folder = Path(tempfile.mkdtemp(prefix="fastgrpo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _compile(compiler, folder / library.name)
    return folder / library.name


def _find_compiler() -> list[str]:
    """The compiler's command.

    Raises:
        OSError: there is none, or CC is no command.
    """
    named = os.environ.get("CC")
    try:
        compiler = shlex.split(named or shutil.which("gcc") or shutil.which("cc") or "")
    except ValueError as error:
        raise OSError(f"CC is {named!r}, which is no command ({error})") from error
    if not compiler:
        raise OSError("no C compiler was found: neither CC is set nor gcc or cc in PATH")
    return compiler


def _is_whole(library: Path) -> bool:
    """Whether a file ends with the digest of what stands before: to load a part of a library may end the process."""
    if not library.is_file():
        return False
    content = library.read_bytes()
    return content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest()


def _compile(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # beside it, so that it appears all at once
        built = Path(scratch) / library.name
        objects = []
        for name, own in _OWN_FLAGS.items():
            objects.append(str(Path(scratch) / f"{name}.o"))
            _run(*compiler, *_FLAGS, own, "-c", str(_HERE / name), "-o", objects[-1])
        _run(*compiler, "-shared", "-fopenmp", *objects, "-o", str(built), "-lm")
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(library)


def _run(*command: str) -> str:
    """What it prints; compilers quote in a way that not every locale can read."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=_LONGEST_S)
    return done.stdout
