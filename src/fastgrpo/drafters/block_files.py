"""Files of block heads: our own layout, since there is none to share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.drafters.block_head import BlockHead, build_block_head
from fastgrpo.drafters.head_files import (
    FINGERPRINT,
    TOKENIZER,
    check_shape,
    check_tokenizer,
    collect_tensors,
    describe_target,
    fill_head,
    has_fingerprint,
    read_files,
    read_vocabulary,
    take_fingerprint,
)
from fastgrpo.model import TargetModel

BLOCK_ARCHITECTURE = "FastGRPOBlockDraft"
_MOST_POSITIONS, _MOST_LAYERS, _MOST_RANK = 64, 64, 65536  # a damaged size is refused before it is allocated


def save_block_head(
    head: BlockHead,
    folder: Path,
    target: TargetModel,
    *,
    compact: bool = False,
    counts: Int[Tensor, " V"] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`.

    Args:
        compact, counts: see `collect_tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = collect_tensors(head, dtype=None, compact=compact, counts=counts)
    save_file(tensors, folder / "model.safetensors")
    record = _describe(head, target) | {
        "torch_dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
        FINGERPRINT: take_fingerprint(target),
    }
    if target.tokenizer_hash is not None and not compact:
        record[TOKENIZER] = target.tokenizer_hash
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def load_block_head(folder: Path, target: TargetModel) -> BlockHead:
    """Read and check a saved head against its target; see `BlockDrafter.load`."""
    config, tensors = read_files(folder)
    if not isinstance(config, dict) or config.get("architectures") != [BLOCK_ARCHITECTURE]:
        found = config.get("architectures") if isinstance(config, dict) else config
        raise ValueError(f"{folder} holds {found}, not a block head ({BLOCK_ARCHITECTURE})")
    if "d2t" not in tensors:
        raise ValueError(f"the head in {folder} lacks d2t, which names its vocabulary; save it again")
    tensors["draft_vocab"] = read_vocabulary(tensors.pop("d2t"), folder, target.vocab_size)
    head = build_block_head(
        target,
        len(tensors["draft_vocab"]),
        block_size=_read_size(config, "block_size", 2, _MOST_POSITIONS, folder),
        num_layers=_read_size(config, "num_hidden_layers", 1, _MOST_LAYERS, folder),
        rank=_read_size(config, "correction_rank", 1, _MOST_RANK, folder),
    )
    _check_config(config, head, folder, target)
    check_tokenizer(config, folder, target)
    fill_head(head, tensors, folder, target)
    return head


def _describe(head: BlockHead, target: TargetModel) -> dict[str, Any]:
    return {
        "architectures": [BLOCK_ARCHITECTURE],
        **describe_target(target),
        "intermediate_size": int(target.config.intermediate_size),
        "rms_norm_eps": float(target.config.rms_norm_eps),
        "target_layers": list(target.feature_layers),
        "block_size": head.block_size,
        "num_hidden_layers": len(head.layers),
        "correction_rank": head.rank,
        "draft_vocab_size": head.draft_vocab_size,
    }


def _read_size(config: dict[str, Any], key: str, least: int, most: int, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"the head in {folder} has {key} {value!r}, which must be a number from {least} to {most}")
    return value


def _check_config(config: dict[str, Any], head: BlockHead, folder: Path, target: TargetModel) -> None:
    """Every key is known and says what the target says: a flag we do not know would change what is computed."""
    expected = _describe(head, target)
    check_shape(config, expected, folder)
    unknown = sorted(set(config) - set(expected) - {"torch_dtype", FINGERPRINT, TOKENIZER})
    if unknown:
        raise ValueError(f"the head in {folder} sets {unknown[0]}, which is not known here; update fastgrpo")
    if FINGERPRINT not in config or not has_fingerprint(target, config[FINGERPRINT]):
        raise ValueError(
            f"the head in {folder} was trained for another target: {FINGERPRINT} differs; train one with "
            "`fastgrpo draft train --kind block`"
        )
