"""Files of EAGLE-3 heads: the layout that vLLM and SGLang load, and that of the speculators library.

Safetensors and JSON; nothing is unpickled, and nothing is trusted before it is checked against the target.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.drafters.eagle_head import EagleHead, build_head
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

_ARCHITECTURE = "LlamaForCausalLMEagle3"
_ROWS = 4096  # compared at once
_ROUNDING = 0.01  # relative distance of weights that 16 bits, or some training of the target, leave behind
_SHIPPED = Path(__file__).parent.parent / "heads"


def save_head(
    head: EagleHead,
    folder: Path,
    target: TargetModel,
    *,
    dtype: torch.dtype | None = None,
    compact: bool = False,
    counts: Int[Tensor, " V"] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors` in the EAGLE-3 layout.

    Args:
        dtype, compact, counts: see `collect_tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, rope = target.config, target.rope_parameters
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    tensors = collect_tensors(head, dtype=dtype, compact=compact, counts=counts)
    vocab = head.draft_vocab.long().cpu()
    tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, vocab, True)
    save_file(tensors, folder / "model.safetensors")
    record = {
        "architectures": [_ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": head.hidden_size,
        "intermediate_size": int(config.intermediate_size),
        "num_attention_heads": head.num_heads,
        "num_key_value_heads": head.num_kv_heads,
        "head_dim": head.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(config.rms_norm_eps),
        "num_hidden_layers": 1,
        "max_position_embeddings": target.max_position,
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),  # this and the next are what transformers 4 reads
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": head.draft_vocab_size,
        "norm_before_residual": head.norm_before_residual,
        "torch_dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
        FINGERPRINT: take_fingerprint(target),
    }
    if target.tokenizer_hash is not None and not compact:  # tokenizers of one model differ by source: pad tokens
        record[TOKENIZER] = target.tokenizer_hash
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def load_head(folder: Path, target: TargetModel) -> EagleHead:
    """Read and check a saved head against its target; see `EagleDrafter.load`.

    Both layouts are read: EAGLE-3's, as vLLM and SGLang load it, and that of the speculators library.
    """
    config, tensors = _unify_layout(*read_files(folder), folder)
    _check_config(config, folder, target)
    check_tokenizer(config, folder, target)
    marked = tensors.pop("t2d", None)
    _compare_copy("embed_tokens.weight", tensors.pop("embed_tokens.weight", None), target.embed_tokens.weight, folder)
    vocab = read_vocabulary(_find_offsets(tensors, folder, target), folder, target.vocab_size)
    _check_marks(marked, vocab, folder, target)
    tensors["draft_vocab"] = vocab
    if FINGERPRINT not in config:  # of another program, which may have trained rows; ours are the target's at that time
        _check_computation(config, folder, target)
        if config.get("tie_word_embeddings"):
            tensors.setdefault("lm_head.weight", target.embed_tokens.weight.detach()[vocab.long()])
        _compare_copy("lm_head.weight", tensors.get("lm_head.weight"), target.lm_head.weight, folder, vocab)
    elif not has_fingerprint(target, config[FINGERPRINT]):
        raise ValueError(
            f"the head in {folder} was trained for another target: {FINGERPRINT} differs; train one for this target "
            "(fastgrpo draft train)"
        )
    head = build_head(
        target, len(tensors["draft_vocab"]), norm_before_residual=bool(config.get("norm_before_residual", False))
    )
    fill_head(head, tensors, folder, target)
    return head


def find_shipped_head(target: TargetModel) -> Path | None:
    """The folder of the head that comes with this package for this target, if there is one.

    A target is known by its shape and by its final norm, which training LoRA leaves as it is and
    quantising too.
    """
    for folder in sorted(_SHIPPED.glob("*")):
        config = json.loads((folder / "config.json").read_text())
        try:
            _check_config(config, folder, target)
        except ValueError:
            continue
        if has_fingerprint(target, config[FINGERPRINT]) and _has_same_tokenizer(config, folder, target):
            return folder
    return None


def _has_same_tokenizer(config: dict[str, Any], folder: Path, target: TargetModel) -> bool:
    """Whether a shipped head may be used; nobody named it, so that it is left out with a warning."""
    try:
        check_tokenizer(config, folder, target)
    except ValueError as error:
        warnings.warn(f"the head that ships for this model is left out: {error}", stacklevel=2)
        return False
    return True


def _unify_layout(config: object, tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors under the names of the EAGLE-3 layout."""
    if isinstance(config, dict) and config.get("speculators_model_type") == "eagle3":
        layer = config.get("transformer_layer_config") or {}
        if not isinstance(layer, dict):
            raise ValueError(f"the head in {folder} has transformer_layer_config {layer!r}, which must be a dictionary")
        flat = {**layer, "norm_before_residual": True, **config}  # its flag is set unless the file says otherwise
        named = {name: name.replace("layers.0.", "midlayer.", 1) for name in tensors}
        if twice := sorted(name for name in tensors if named[name] != name and named[name] in tensors):
            raise ValueError(
                f"the head in {folder} has both {twice[0]} and {named[twice[0]]}; take one out of the file"
            )
        return flat, {named[name]: value for name, value in tensors.items()}
    if not isinstance(config, dict) or config.get("architectures") != [_ARCHITECTURE]:
        found = config.get("architectures") if isinstance(config, dict) else config
        is_named_otherwise = isinstance(config, dict) and "midlayer.hidden_norm.weight" in tensors
        remedy = f'; if it is one, write "architectures": ["{_ARCHITECTURE}"] in its config.json'
        raise ValueError(
            f"{folder} holds {found}, not an EAGLE-3 head ({_ARCHITECTURE}){remedy if is_named_otherwise else ''}"
        )
    return config, tensors


def _check_config(config: dict[str, Any], folder: Path, target: TargetModel) -> None:
    check_shape(config, describe_target(target), folder)
    if (num_layers := config.get("num_hidden_layers", 1)) != 1:
        raise ValueError(
            f"the head in {folder} has num_hidden_layers {num_layers}; only heads of one layer are supported"
        )
    if not isinstance(flag := config.get("norm_before_residual") or False, bool):
        raise ValueError(f"the head in {folder} has norm_before_residual {flag!r}, which must be true or false")
    if config.get("target_hidden_size") not in (None, target.hidden_size):
        raise ValueError(
            f"the head in {folder} has target_hidden_size {config['target_hidden_size']}, the target has "
            f"{target.hidden_size}"
        )
    norms = [key for key, value in config.items() if key.startswith("norm_") and value]
    unknown = [key for key in norms if key != "norm_before_residual"]
    if unknown:
        raise ValueError(
            f"the head in {folder} sets {unknown[0]}, which is not known here; only norm_before_residual is"
        )
    _check_layers(config, folder, target)


def _check_layers(config: dict[str, Any], folder: Path, target: TargetModel) -> None:
    """Explicit feature layers mean different things in different engines; ours are the default ones."""
    nested = config.get("eagle_config")
    for settings in (config, nested if isinstance(nested, dict) else {}):
        layers = settings.get("eagle_aux_hidden_state_layer_ids")
        if layers not in (None, [], list(target.feature_layers)):  # none of them means the default ones, as in vLLM
            raise ValueError(
                f"the head in {folder} reads target layers {layers}; only the default ones, "
                f"{list(target.feature_layers)}, are supported"
            )


def _check_computation(config: dict[str, Any], folder: Path, target: TargetModel) -> None:
    """Refuse a head of another program whose layer is another one, and warn of one that rotates or norms otherwise.

    What its file does not say is what transformers' LlamaConfig says, as in vLLM and SGLang.
    """
    nested = config.get("eagle_config")
    said = (nested if isinstance(nested, dict) else {}) | config
    eps = float(target.config.rms_norm_eps)
    kinds = said.get("layer_types") or ["full_attention"]
    facts: dict[str, tuple[Any, Any]] = {  # what it has, and what is computed here
        "hidden_act": (said.get("hidden_act", "silu"), "silu"),
        "logit_scale": (said.get("logit_scale", 1.0), 1.0),
        "use_aux_hidden_state": (said.get("use_aux_hidden_state", True), True),
        "layer_types": (kinds, ["full_attention"]),
    }
    for name, (own, here) in facts.items():
        if own != here:
            raise ValueError(
                f"the head in {folder} has {name} {own!r}, and heads compute with {here!r} here; train one for this "
                "target (fastgrpo draft train)"
            )
    found, rope = _read_rope(said), _read_rope({"rope_parameters": target.rope_parameters})
    if found != rope:
        _warn_of_difference(folder, f"RoPE {found}", f"{rope}, the target's")
    if not math.isclose(found_eps := _read_number(said, "rms_norm_eps", 1e-6, folder), eps, rel_tol=1e-3):
        _warn_of_difference(folder, f"rms_norm_eps {found_eps}", f"{eps}, the target's")


def _warn_of_difference(folder: Path, own: str, here: str) -> None:
    """A head goes on from weights that were trained with something else."""
    warnings.warn(
        f"the head in {folder} has {own}, and drafts with {here}: fewer drafts are accepted than it was trained for, "
        "until it has learnt",
        stacklevel=2,
    )


def _read_number(config: dict[str, Any], name: str, default: float, folder: Path) -> float:
    found = config.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"the head in {folder} has {name} {found!r}, which must be a number")
    return float(found)


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters by their names in transformers 5, which has one dictionary of them."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    found = dict(found) if isinstance(found, dict) else {"rope_type": found}
    kind = found.pop("type", None) or "default"
    read = {"rope_type": kind, "rope_theta": config.get("rope_theta") or 10000.0} | found
    return {name: value for name, value in read.items() if value is not None}


def _compare_copy(
    name: str, own: Tensor | None, target_weight: Tensor, folder: Path, rows: Tensor | None = None
) -> None:
    """Warn of weights in a file that are not the target's, which heads use here.

    Args:
        rows: of the target's weight that the head's must equal; None: all.
    """
    if own is None:
        return
    theirs = target_weight.detach() if rows is None else target_weight.detach()[rows.long().to(target_weight.device)]
    if own.shape != theirs.shape:
        raise ValueError(
            f"the head in {folder} has {name} of {tuple(own.shape)}, the target's is {tuple(theirs.shape)}"
        )
    moved = size = 0.0  # squares, summed part by part: in float32 the rows of a large model take gigabytes
    for mine, target_s in zip(own.split(_ROWS), theirs.split(_ROWS), strict=True):
        here = target_s.float().cpu()
        moved += float((mine.float() - here).square().sum())
        size += float(here.square().sum())
    if (distance := (moved / size) ** 0.5 if size else moved) > _ROUNDING:
        _warn_of_difference(folder, f"{name} of its own, {distance:.0%} away from the target's", "the target's")


def _check_marks(marked: Tensor | None, vocab: Tensor, folder: Path, target: TargetModel) -> None:
    """Refuse a t2d, which marks the drafted tokens, that marks others than d2t leads to."""
    if marked is not None and not torch.equal(
        marked.bool(), torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, vocab.long(), True)
    ):
        raise ValueError(
            f"the head in {folder} has a d2t that leads to other tokens than t2d marks: d2t must hold what to add to "
            "each draft id for its target id, not the target id"
        )


def _find_offsets(tensors: dict[str, Tensor], folder: Path, target: TargetModel) -> Tensor:
    """d2t: what to add to each draft id for its target id; zeros where the whole vocabulary is drafted."""
    if "d2t" in tensors:
        return tensors.pop("d2t")
    rows = tensors.get("lm_head.weight")
    if rows is None or rows.shape != (target.vocab_size, target.hidden_size):
        raise ValueError(f"the head in {folder} lacks d2t although its vocabulary is reduced; export it again")
    return torch.zeros(target.vocab_size, dtype=torch.int64)
