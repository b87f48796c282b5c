"""What token ids mean: a short name for a tokenizer's vocabulary, compared before ids change hands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LENGTH = 16  # hexadecimal digits


def hash_vocabulary(vocab: Mapping[str, int]) -> str:
    """16 hexadecimal digits that are the same iff every id stands for the same token.

    Each token counts with its length, so that no two vocabularies are written alike.
    """
    digest = hashlib.sha256()
    for token_id, token in sorted((token_id, token) for token, token_id in vocab.items()):
        text = token.encode("utf-8", "surrogatepass")
        digest.update(b"%d %d " % (token_id, len(text)) + text)
    return digest.hexdigest()[:_LENGTH]


def find_tokenizer(folder: str | Path | None) -> Any:
    """The tokenizer saved in a local folder, or None: no folder, no tokenizer files, or none that can be read here.

    Neither a hub is asked nor code of the folder run.
    """
    if not folder or not any((Path(folder) / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError):  # damaged, of an unknown kind, or its library is not installed
        return None
