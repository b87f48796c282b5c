"""Files that cannot be written: safetensors and PyTorch say so by errors that are no `OSError`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_NOT_WRITTEN = ("inline_container", "PytorchStreamWriter")  # words in the RuntimeErrors of torch.save


@contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """While `folder` is written.

    Raises:
        OSError: in place of a library's own error; names the folder, and what is free there.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _NOT_WRITTEN):
            raise
        there = next(each for each in (folder, *folder.parents) if each.is_dir())
        free_mib = shutil.disk_usage(there).free / 2**20
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{folder} could not be written ({reason}); {free_mib:.0f} MiB are free there") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place in the end; of one that is not finished nothing is left.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise OSError(f"{path} could not be written ({error})") from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
