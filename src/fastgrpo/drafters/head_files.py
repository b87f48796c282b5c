"""Files of draft heads, whatever their kind: a config and safetensors, checked against the target before use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.drafters.head_parts import DraftHead
from fastgrpo.drafters.lm_files import is_causal_lm
from fastgrpo.model import TargetModel

FINGERPRINT = "target_final_norm"
TOKENIZER = "tokenizer_hash"
_COUNTS = "vocab_counts"
_WHOLE = (torch.int64, torch.int32, torch.int16)
_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LIKENESS = 0.05  # relative distance of final norms that training on the same model stays below


def read_files(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors as they are on file.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        with_heads = [each for each in folder.glob("checkpoint-*") if find_head_folder(each) != each]
        newest = max(with_heads, key=lambda each: each.stat().st_mtime, default=None)
        remedy = "" if newest is None else f"; {newest} has one"
        others = sorted(each.name for pattern in ("*.safetensors", "*.bin") for each in folder.glob(pattern))
        if others and not (folder / "model.safetensors").exists():
            remedy = f"; weights are read from that file alone, write those of {', '.join(others)} to it"
        raise ValueError(f"no readable draft head in {folder}: {error}{remedy}") from error


def find_head_folder(folder: Path) -> Path:
    """Where a head lies: in the folder itself, in a trainer's checkpoint, or in a run of `draft train`.

    A checkpoint of full fine-tuning is a whole language model, and so is a folder of one that drafts. Where there is no
    head it is the folder itself.
    """
    state = folder / "fastgrpo"
    of_checkpoint = [state / "head", state / "drafter" / "eagle"]  # the second: of a drafter of two
    is_model = is_causal_lm(folder)
    inside = of_checkpoint if is_model else [folder, *of_checkpoint, folder / "head"]
    return next((each for each in inside if (each / "config.json").exists()), folder)


def read_architecture(folder: Path) -> str | None:
    """What the folder says it holds, or None where it says nothing readable."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def collect_tensors(
    head: DraftHead, *, dtype: torch.dtype | None, compact: bool, counts: Int[Tensor, " V"] | None
) -> dict[str, Tensor]:
    """Weights as they go on file, the draft vocabulary as d2t: what to add to each draft id for its target id.

    Args:
        dtype: of the weights; None leaves them as they are.
        compact: bfloat16, and without the output rows, which the target has itself: half the size, for
            heads that ship with a package.
        counts: how often each token was said; a compact head keeps those of its vocabulary, so that it can be cut on
            small machines and goes on counting.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    vocab = tensors.pop("draft_vocab").long()
    if compact:
        del tensors["lm_head.weight"]
        dtype = torch.bfloat16
    if dtype is not None:
        narrow = {name: value.to(dtype) for name, value in tensors.items()}
        lost = next((name for name in tensors if bool((narrow[name].isinf() & tensors[name].isfinite()).any())), None)
        if lost is not None:
            raise ValueError(
                f"{lost} has values beyond {dtype}, up to {float(tensors[lost].abs().max()):.3g}: take bfloat16"
            )
        tensors = narrow
    tensors["d2t"] = vocab - torch.arange(len(vocab))
    if compact and counts is not None:
        tensors[_COUNTS] = counts.cpu()[vocab].int()
    return tensors


def describe_target(target: TargetModel) -> dict[str, int]:
    """The sizes in which a head and its target must agree."""
    return {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_attention_heads": int(target.config.num_attention_heads),
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
    }


def check_shape(config: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse a head whose configuration differs where it says something."""
    for key, expected in wanted.items():
        said = config.get(key)
        if said not in (None, expected):
            raise ValueError(f"the head in {folder} has {key} {said!r}, the target has {expected!r}")


def take_fingerprint(target: TargetModel) -> list[float]:
    """The first values of the final norm's weight, which training LoRA leaves as it is and quantising too."""
    return [round(float(value), 4) for value in target.decoder.norm.weight.detach()[:32]]


def has_fingerprint(target: TargetModel, fingerprint: Any) -> bool:
    """Whether the target is the one that the fingerprint was taken of, up to some training."""
    own = take_fingerprint(target)
    if not isinstance(fingerprint, list) or len(fingerprint) != len(own):
        return False
    if not all(isinstance(value, int | float) for value in fingerprint):
        return False
    known = torch.tensor(fingerprint, dtype=torch.float32)
    return bool((torch.tensor(own) - known).norm() <= _LIKENESS * known.norm())  # equal where both are zero


def check_tokenizer(config: dict[str, Any], folder: Path, target: TargetModel) -> None:
    """Refuse a head of another tokenizer: its ids may mean other tokens. Where one is not known, nothing is compared.

    Raises:
        ValueError: the tokenizers differ.
    """
    known = config.get(TOKENIZER)
    if known is None or target.tokenizer_hash in (None, known):
        return
    raise ValueError(
        f"the head in {folder} was trained with another tokenizer ({TOKENIZER} {known}) than the target's "
        f"({target.tokenizer_hash}, {target.name or 'in memory'}): its token ids mean other tokens. Train one for this "
        f"target (fastgrpo draft train); if the ids it drafts are the same, remove {TOKENIZER} from its config.json"
    )


def read_vocabulary(offsets: Tensor, folder: Path, vocab_size: int) -> Tensor:
    """Target ids of the draft vocabulary from d2t's offsets."""
    if offsets.dim() != 1 or offsets.dtype not in _WHOLE:
        raise ValueError(
            f"the head in {folder} has a d2t of type {offsets.dtype} and shape {tuple(offsets.shape)}, which must be a "
            "list of whole numbers: what to add to each draft id"
        )
    ids = offsets.long() + torch.arange(len(offsets))
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(ids.unique()) != len(ids):
        raise ValueError(f"the head in {folder} has a d2t that repeats a token or leaves 0..{vocab_size - 1}")
    return ids.to(torch.int32)


def fill_head(head: DraftHead, tensors: dict[str, Tensor], folder: Path, target: TargetModel) -> None:
    """Give the tensors to a head, once they are known to fit; output rows that are not on file are the target's.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite; names it.
    """
    counts = tensors.pop(_COUNTS, None)
    if counts is not None:
        size = head.draft_vocab_size
        if counts.shape != (size,) or counts.is_floating_point() or bool((counts < 0).any()):
            raise ValueError(f"the head in {folder} has {_COUNTS} that do not count its {size} draft tokens")
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = target.lm_head.weight.detach()[tensors["draft_vocab"].long()]
    wanted = head.state_dict()
    missing = [f"{name} is missing" for name in sorted(set(wanted) - set(tensors))]
    unknown = [f"{name} is not known here, and would be left out" for name in sorted(set(tensors) - set(wanted))]
    problems = [*missing, *unknown] or [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if tensors[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"the head in {folder} does not fit this target: {problems[0]}")
    packed = next((name for name in wanted if name != "draft_vocab" and tensors[name].dtype not in _WEIGHTS), None)
    if packed is not None:
        raise ValueError(
            f"the head in {folder} has {packed} of type {tensors[packed].dtype}, whose scale is not known here; save "
            "it in bfloat16, float16 or float32"
        )
    broken = next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)
    if broken is not None:
        raise ValueError(f"the head in {folder} has values that are not finite in {broken}")
    head.load_state_dict(tensors)
    head.vocab_counts = None if counts is None else counts.long()
