"""Folders of small causal LMs that draft: which they are, what they must hold, and whose tokenizer they have."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from fastgrpo.families import SUPPORTED_FAMILIES
from fastgrpo.model import TargetModel


def is_causal_lm(folder: Path) -> bool:
    """Whether a folder's `config.json` describes a whole language model, and not a draft head."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or {"draft_vocab_size", "speculators_model_type"} & config.keys():
        return False
    names = config.get("architectures")
    if not isinstance(names, list):
        return False
    return bool(names) and all(str(name).endswith("ForCausalLM") for name in names)


def load_lm(folder: Path, target: TargetModel) -> nn.Module:
    """The model of a folder in the target's type and on its device, ready to draft; nothing is unpickled.

    Raises:
        ValueError: damaged, missing or not finite weights, or a family that is not supported.
    """
    family = json.loads((folder / "config.json").read_text()).get("model_type")
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"the draft model in {folder} is of the family '{family}', which is not supported; supported are "
            f"{', '.join(SUPPORTED_FAMILIES)}"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=target.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"no readable draft model in {folder}: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"the draft model in {folder} lacks weights, {min(report['missing_keys'])} for one")
    broken = next((name for name, value in model.named_parameters() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise ValueError(f"the draft model in {folder} has values that are not finite in {broken}")
    return model.to(target.device).eval().requires_grad_(False)


def check_tokenizer(lm: TargetModel, target: TargetModel) -> None:
    """An id must mean the same to both; where that cannot be known, sizes must agree and a warning is given.

    Raises:
        ValueError: it does not, or sizes differ and the reason is not known (padding is no reason to refuse).
    """
    names = f"the draft model ({lm.name or 'in memory'}) and the target ({target.name or 'in memory'})"
    hashes = (lm.tokenizer_hash, target.tokenizer_hash)
    if None not in hashes:
        if hashes[0] != hashes[1]:
            raise ValueError(
                f"{names} have different tokenizers (hashes of the vocabularies: {hashes[0]}, {hashes[1]}), so that an "
                "id means another token to each; draft with a smaller model of the target's own family"
            )
        return
    if lm.vocab_size != target.vocab_size:
        raise ValueError(
            f"{names} have vocabularies of {lm.vocab_size} and {target.vocab_size} entries, and not both tokenizers "
            "are known: save each beside its model, or pass the target's as Engine(..., tokenizer=...), to have them "
            "compared"
        )
    warnings.warn(
        f"{names} have vocabularies of {lm.vocab_size} entries, but not both tokenizers are known: token ids were not "
        "compared. If they differ, tokens stay exact and drafts are wrong",
        stacklevel=3,
    )
