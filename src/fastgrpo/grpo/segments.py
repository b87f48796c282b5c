"""Attention within a packed sequence, told as segments instead of a [T, T] mask.

A group is its prompt, its first completion and then its other completions, each of which sees the prompt and itself.
Every segment is one call of `scaled_dot_product_attention`, so nothing masked is computed but the causal halves, and
memory grows with the longest row as in an ordinary batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a packed sequence: a prompt with its first completion, or one more completion of that prompt."""

    num_tokens: int
    """Of its own: prompt and completion, or completion alone."""
    num_prompt_tokens: int
    is_first: bool
    """Whether the prompt stands in it; else its tokens see that of the last segment in which one does."""


class SegmentMask(Tensor):
    """Stands where a [1, 1, T, T] mask would: transformers hands it to torch's attention, which hands the call back.

    As `torch.nn.attention.bias.CausalBias` does it. Needs no [T, T] memory, and goes through gradient checkpointing,
    which computes attention once more in the backward pass. Whoever reads its values instead gets an error.
    """

    segments: tuple[Segment, ...]
    _causal: Tensor | None

    @staticmethod
    def __new__(cls: type[SegmentMask], segments: tuple[Segment, ...], device: torch.device) -> SegmentMask:
        width = sum(segment.num_tokens for segment in segments)
        mask: SegmentMask = Tensor._make_subclass(cls, torch.zeros((), device=device).expand(1, 1, width, width))
        mask.segments = segments
        mask._causal = None
        return mask

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        result = super().__torch_function__(func, kinds, args, kwargs)
        if isinstance(result, Tensor) and all(result is not arg for arg in args):
            raise ValueError(  # a TypeError would be lost where an operator tries its operands in turn
                f"{getattr(func, '__name__', func)} reads the mask of completions that share a prompt, which only "
                'torch\'s attention understands; set attn_implementation="sdpa", or share_prompts=False'
            )
        return result

    def build_bias(self, segment: Segment, dtype: torch.dtype) -> Tensor:
        """What lets a completion see its prompt and its own past: [own tokens, prompt and own tokens]."""
        prompt, own = segment.num_prompt_tokens, segment.num_tokens
        if self.device.type != "cpu":
            return causal_lower_right(own, prompt + own)  # kernels of its own, nothing is stored
        if self._causal is None or self._causal.dtype != dtype:  # one for all layers, which keep it for the gradient
            width = max(s.num_tokens + s.num_prompt_tokens for s in self.segments if not s.is_first)
            self._causal = torch.full((width, width), -torch.inf, dtype=dtype).triu_(1)
        return self._causal[prompt : prompt + own, : prompt + own]


def _attend(
    query: Float[Tensor, "1 heads T D"],
    key: Float[Tensor, "1 heads T D"],
    value: Float[Tensor, "1 heads T D"],
    attn_mask: SegmentMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Float[Tensor, "1 heads T D"]:
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    states = [x.to(dtype) for x in (query, key, value)]  # once; the kernels behind a causal bias know no autocast
    outputs = []
    for segment, own_query, own_key, own_value in _split(attn_mask.segments, *states):
        bias = None if segment.is_first else attn_mask.build_bias(segment, dtype)
        outputs.append(
            scaled_dot_product_attention(
                own_query, own_key, own_value, attn_mask=bias, dropout_p=dropout_p, is_causal=bias is None, **kwargs
            )
        )
    return torch.cat(outputs, 2)


def _split(
    segments: tuple[Segment, ...], query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[Segment, Tensor, Tensor, Tensor]]:
    """Queries of each segment, and the keys and values that they may see.

    By `split`, whose gradient is one concatenation; that of a slice would be as long as the whole sequence.
    """
    sizes = [segment.num_tokens for segment in segments]
    prompt_key = prompt_value = key
    for segment, own_query, own_key, own_value in zip(
        segments, *(states.split(sizes, 2) for states in (query, key, value)), strict=True
    ):
        if segment.is_first:
            prompt_key, prompt_value = (states[:, :, : segment.num_prompt_tokens] for states in (own_key, own_value))
            yield segment, own_query, own_key, own_value
        else:
            yield segment, own_query, torch.cat([prompt_key, own_key], 2), torch.cat([prompt_value, own_value], 2)
