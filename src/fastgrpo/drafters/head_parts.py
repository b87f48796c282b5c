"""What draft heads are built of, whatever their kind: norm, MLP, rotation, output rows of the target's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.families import list_rope_parameters
from fastgrpo.kernels import cpu
from fastgrpo.model import TargetModel

_CPU_VOCAB_SIZE, _VOCAB_SIZE = 4096, 16384
_NORMS_PLUS_ONE = ("GemmaRMSNorm", "Gemma3RMSNorm")  # which multiply by one more than their weight


def choose_vocab_size(target: TargetModel) -> int:
    """Tokens worth drafting from on this device.

    More tokens hold more of what the target says, and a draft level reads an output row and makes noise for each: on
    a CPU that decides what a level costs (dev/LOG.md), on a GPU it is next to nothing.
    """
    return min(_CPU_VOCAB_SIZE if target.device.type == "cpu" else _VOCAB_SIZE, target.vocab_size)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        is_covered = x.device.type == "cpu" and cpu.covers(x.dtype, x.dtype) and self.weight.dtype == x.dtype
        if is_covered and not torch.is_grad_enabled() and cpu.is_available():
            flat = x.reshape(-1, x.shape[-1])
            return cpu.add_norm(flat.contiguous(), None, self.weight, self.eps, x.dtype).view(x.shape)
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x: Float[Tensor, "*n heads d"], cos: Float[Tensor, "*#n d"], sin: Float[Tensor, "*#n d"]) -> Tensor:
    """Rotary position embedding in transformers' half-split convention."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return x * cos + torch.cat((-second, first), -1) * sin


class DraftHead(nn.Module):
    """What heads of every kind have: output rows of the target's own for a reduced vocabulary, not trained.

    `draft_vocab` lists the target ids of the rows in increasing order.
    """

    draft_vocab: Tensor  # int32 target ids, increasing
    vocab_counts: Tensor | None = None  # how often each was said in what the head learnt from, where that is known

    def __init__(self, target: TargetModel) -> None:
        super().__init__()
        for rope in list_rope_parameters(target.config):
            if (factor := rope.get("partial_rotary_factor") or 1.0) != 1.0:
                raise ValueError(
                    f"partial_rotary_factor {factor} is not supported by draft heads, which rotate all of a head; use "
                    'drafter="ngram"'
                )
        self.hidden_size, self.target_vocab_size = target.hidden_size, target.vocab_size
        shape = (self.target_vocab_size, self.hidden_size)
        if getattr(getattr(target.lm_head, "weight", None), "shape", None) != shape:
            raise ValueError(
                f"the model's output head is a {type(target.lm_head).__name__} without a weight of {shape[0]} x "
                f'{shape[1]}, of which draft heads take their output rows; use drafter="ngram"'
            )

    @property
    def num_layers(self) -> int:
        """Decoder layers that keep keys and values."""
        return 1

    @property
    def draft_vocab_size(self) -> int:
        return self.lm_head.out_features

    def resize_vocabulary(self, size: int) -> None:
        """Output rows for the first `size` tokens, or for all; the drafter fills them from the target."""
        size = min(size, self.target_vocab_size)
        rows = nn.utils.skip_init(nn.Linear, self.hidden_size, size, bias=False)  # draws nothing
        nn.init.zeros_(rows.weight)
        self.lm_head = rows.requires_grad_(False)
        self.register_buffer("draft_vocab", torch.arange(size, dtype=torch.int32))
        self.vocab_counts = None

    def select_vocabulary(self, counts: Int[Tensor, " V"]) -> None:
        """Output rows for the most counted tokens; among equals those drafted already, then low ids, stay.

        The output rows are the target's own, so a change of rows costs nothing that was learnt.
        """
        score = counts.double() * 2
        score[self.draft_vocab.long()] += 1
        order = torch.argsort(score, descending=True, stable=True)
        chosen = order[: self.draft_vocab_size].sort().values
        self.draft_vocab.copy_(chosen.to(torch.int32))
        self.vocab_counts = counts[chosen]

    def keep_frequent(self, size: int) -> None:
        """Output rows for the `size` most frequent tokens of this vocabulary, where their frequency is known."""
        if self.vocab_counts is None or size >= self.draft_vocab_size:
            return
        order = self.vocab_counts.argsort(descending=True, stable=True)[:size].sort().values
        kept, counts = self.draft_vocab[order], self.vocab_counts[order]
        self.resize_vocabulary(size)
        self.draft_vocab.copy_(kept)
        self.vocab_counts = counts

    def take_output_rows(self, target: TargetModel) -> None:
        """Fill the output rows from the target as it is now."""
        own, rows = self.lm_head.weight, target.lm_head.weight
        with torch.no_grad():
            if own.dtype == rows.dtype and own.device == rows.device:
                torch.index_select(rows, 0, self.draft_vocab, out=own)
            else:
                own.copy_(rows[self.draft_vocab.long()])


def copy_layer(layer: Any, places: Mapping[str, Tensor], num_kv_states: int) -> None:
    """Copy a decoder layer's weights where they are wanted, by the names that Llama gives them.

    Of families whose layers are built otherwise, what they have of it; the rest stays as it is.

    Args:
        places: for each name, what takes the weight.
        num_kv_states: numbers of all keys of a token.
    """
    parts = {name: _read_weight(module) for name, module in layer.named_modules() if hasattr(module, "weight")}
    found = {name.rpartition(".")[2]: weight for name, weight in parts.items()}
    if (fused := found.get("qkv_proj")) is not None:  # Phi-3's
        sizes = (len(fused) - 2 * num_kv_states, num_kv_states, num_kv_states)
        found |= dict(zip(("q_proj", "k_proj", "v_proj"), fused.split(sizes), strict=True))
    if (fused := found.get("gate_up_proj")) is not None:
        found |= dict(zip(("gate_proj", "up_proj"), fused.chunk(2), strict=True))
    for name, place in places.items():
        if name in found and found[name].shape == place.shape:
            place.copy_(found[name])


def copy_norm(norm: Any, place: Tensor) -> None:
    """Copy a norm's weight where it is wanted; where a model has another kind of norm, the place stays as it is."""
    if getattr(norm, "weight", None) is not None and norm.weight.shape == place.shape:
        place.copy_(_read_weight(norm))


def _read_weight(module: Any) -> Tensor:
    """A module's weight; of a norm, what it multiplies by."""
    weight: Tensor = module.weight
    return weight + 1 if type(module).__name__ in _NORMS_PLUS_ONE else weight


@contextlib.contextmanager
def same_random_weights(target: TargetModel) -> Iterator[None]:
    """What is drawn here is always the same; the run's generators are neither read nor moved."""
    with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
