"""What commands load: a model by name, its tokenizer, and prompts as the model wants them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from fastgrpo.data import load_demo_model_dir

DEMO_MODEL = "demo"


def quiet_progress() -> None:
    """No progress bars but ours, and no warnings about what TRL and transformers pass to each other."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Leave the terminal to our own lines."""
    quiet_progress()
    logging.set_verbosity_error()


def resolve_model(name: str) -> str:
    """The folder or hub id behind a model's name.

    Raises:
        ValueError: the demo model is asked for and no source has it, a path leads to no folder, or its weights are
            damaged.
    """
    if name != DEMO_MODEL:
        is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1  # a hub id has one slash at most
        if is_path and not Path(name).is_dir():
            raise ValueError(f"there is no model folder '{name}'; give a folder, a hub id, or '{DEMO_MODEL}'")
        _check_weights(Path(name), "copy it there again")
        return name
    try:
        folder = load_demo_model_dir()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    _check_weights(folder, f"remove {folder}, and the demo model is fetched again")
    return str(folder)


def _check_weights(folder: Path, remedy: str) -> None:
    """Read the headers of a folder's weights, which say how long each file is.

    Raises:
        ValueError: a file is damaged; names it and the remedy.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ValueError: `cuda` is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; use device=cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_model(path: str, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal LM in safetensors; `dtype` auto keeps the type it is saved in.

    Raises:
        OSError: there is no such model, or it has no safetensors.
    """
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).to(device)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: it has none that can be read; names the folder.
        OSError: there is no such model.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {path} cannot be read ({error})") from error


@dataclass(frozen=True)
class Opened:
    """A model, what reads and writes its text, and what ends its completions."""

    model: PreTrainedModel
    tokenizer: Any
    stop_token_ids: tuple[int, ...]


def open_model(name: str, *, dtype: str, device: str) -> Opened:
    """What a command works on.

    Args:
        name: a folder, a hub id, or the demo's.
        dtype: of the weights; "auto" keeps the type they are saved in.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: there is no such device, or no source has the demo model.
        OSError: there is no such model, or it has no safetensors.
    """
    path = resolve_model(name)
    model, tokenizer = load_model(path, dtype=dtype, device=resolve_device(device)), load_tokenizer(path)
    return Opened(model, tokenizer, find_stop_token_ids(model, tokenizer))


def encode_prompts(
    tokenizer: Any, prompts: Iterable[str | list[dict[str, Any]]], *, raw: bool = False
) -> list[list[int]]:
    """Token ids of texts or chats, through the tokenizer's chat template where it has one.

    Args:
        prompts: a text is one user message.
        raw: take texts as they are, without the template.

    Raises:
        ValueError: a list of messages, but no template that may turn it into text.
    """
    has_template = tokenizer.chat_template is not None and not raw
    encoded = []
    for index, prompt in enumerate(prompts):
        if has_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        elif isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            reason = "--raw leaves it out" if raw else "this tokenizer has none"
            raise ValueError(f"prompt {index} is a list of messages and needs a chat template: {reason}; give text")
        encoded.append(list(ids))
    return encoded


def find_stop_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """What ends a completion: the end tokens of the generation config and of the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    known = ids if isinstance(ids, list) else [ids]
    return tuple(sorted({int(i) for i in (*known, tokenizer.eos_token_id) if i is not None}))
