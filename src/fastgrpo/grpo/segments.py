"""Attention within a packed sequence, told as segments instead of a [T, T] mask.

A group is its prompt, its first completion and then its other completions, each of which sees the prompt and itself.
Every segment is one call of `scaled_dot_product_attention`, so nothing masked is computed but the causal halves, and
memory grows with the longest row as in an ordinary batch. A GPU takes longer to be given many small calls than to make
one larger one: there the other completions of a prompt are one call, padded, where that does not waste much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from fastgrpo.kernels.gpu import without_cudnn_attention

_FEW_TOKENS, _MOST_PADDING = 4096, 2.0  # padded completions that are one call whatever they waste; over what is used


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a packed sequence: a prompt with its first completion, or one more completion of that prompt."""

    num_tokens: int
    """Tokens of the segment: prompt and completion, or completion alone."""
    num_prompt_tokens: int
    is_first: bool
    """Whether it holds the prompt; if not, its tokens see the prompt of the last segment before it that does."""


@dataclass(frozen=True, kw_only=True)
class _Padding:
    """Completions one behind the other, as rows of one length."""

    count: int
    width: int
    places: Int[Tensor, " count*width"]  # of each place of a row, in the completions; behind its end the last one's
    used: Int[Tensor, " T"]  # places of rows that are not behind their ends

    @staticmethod
    def build(lengths: list[int], device: torch.device) -> _Padding:
        width = max(lengths)
        bounds = pairwise([0, *accumulate(lengths)])
        places = [min(start + own, end - 1) for start, end in bounds for own in range(width)]
        used = [row * width + own for row, length in enumerate(lengths) for own in range(length)]
        return _Padding(
            count=len(lengths),
            width=width,
            places=torch.tensor(places, device=device),
            used=torch.tensor(used, device=device),
        )

    def pad(self, states: Float[Tensor, "1 heads T D"]) -> Float[Tensor, "count heads width D"]:
        return states.index_select(2, self.places)[0].unflatten(1, (self.count, self.width)).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A prompt with its first completion, and its other completions."""

    segments: tuple[Segment, ...]
    padding: _Padding | None  # of the others, where they are one call


class SegmentMask(Tensor):
    """Stands where a [1, 1, T, T] mask would: transformers hands it to torch's attention, which hands the call back.

    As `torch.nn.attention.bias.CausalBias` does it. Needs no [T, T] memory, and goes through gradient checkpointing,
    which computes attention once more in the backward pass. Whoever reads its values instead gets an error.
    """

    segments: tuple[Segment, ...]
    groups: tuple[_Group, ...]
    _causal: Tensor | None

    @staticmethod
    def __new__(cls: type[SegmentMask], segments: tuple[Segment, ...], device: torch.device) -> SegmentMask:
        width = sum(segment.num_tokens for segment in segments)
        mask: SegmentMask = Tensor._make_subclass(cls, torch.zeros((), device=device).expand(1, 1, width, width))
        mask.segments = segments
        mask.groups = tuple(_list_groups(segments, device))
        mask._causal = None
        return mask

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            with without_cudnn_attention():
                return _attend(*args, **(kwargs or {}))
        result = super().__torch_function__(func, kinds, args, kwargs)
        if isinstance(result, Tensor) and all(result is not arg for arg in args):
            raise ValueError(  # a TypeError would be lost where an operator tries its operands in turn
                f"{getattr(func, '__name__', func)} reads the mask of completions that share a prompt, which only "
                'torch\'s attention understands; set attn_implementation="sdpa", or share_prompts=False'
            )
        return result

    def build_bias(self, prompt: int, own: int, dtype: torch.dtype) -> Tensor:
        """What lets a completion of so many tokens see its prompt and its own past: [own, prompt + own]."""
        if self.device.type != "cpu":
            return causal_lower_right(own, prompt + own)  # kernels of its own, nothing is stored
        if self._causal is None or self._causal.dtype != dtype:  # one for all layers, which keep it for the gradient
            width = max(s.num_tokens + s.num_prompt_tokens for s in self.segments if not s.is_first)
            self._causal = torch.full((width, width), -torch.inf, dtype=dtype).triu_(1)
        return self._causal[prompt : prompt + own, : prompt + own]


def _list_groups(segments: tuple[Segment, ...], device: torch.device) -> Iterator[_Group]:
    starts = [place for place, segment in enumerate(segments) if segment.is_first]
    for start, end in pairwise([*starts, len(segments)]):
        lengths = [segment.num_tokens for segment in segments[start + 1 : end]]
        is_one_call = len(lengths) > 1 and may_pad(lengths, device)
        yield _Group(segments=segments[start:end], padding=_Padding.build(lengths, device) if is_one_call else None)


def may_pad(lengths: list[int], device: torch.device) -> bool:
    """Whether one padded call takes less time than one for each of these completions."""
    num_padded = len(lengths) * max(lengths)
    return device.type != "cpu" and (num_padded <= _FEW_TOKENS or num_padded <= _MOST_PADDING * sum(lengths))


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
    attend = partial(scaled_dot_product_attention, dropout_p=dropout_p, **kwargs)
    sizes = [sum(segment.num_tokens for segment in group.segments) for group in attn_mask.groups]
    outputs: list[Tensor] = []
    for group, *own in zip(attn_mask.groups, *(x.split(sizes, 2) for x in states), strict=True):
        if group.padding is not None:
            first = group.segments[0]
            bias = attn_mask.build_bias(first.num_prompt_tokens, group.padding.width, dtype)
            outputs += _attend_at_once(attend, first, group.padding, bias, *own)
            continue
        for segment, *parts in _split(group.segments, *own):
            if segment.is_first:
                outputs.append(attend(*parts, is_causal=True))
            else:
                bias = attn_mask.build_bias(segment.num_prompt_tokens, segment.num_tokens, dtype)
                outputs.append(attend(*parts, attn_mask=bias))
    return torch.cat(outputs, 2)


def _attend_at_once(
    attend: Callable[..., Tensor],
    first: Segment,
    padding: _Padding,
    bias: Tensor,
    query: Float[Tensor, "1 heads T D"],
    key: Float[Tensor, "1 kv T D"],
    value: Float[Tensor, "1 kv T D"],
) -> list[Float[Tensor, "1 heads T D"]]:
    """A group in two calls: its prompt with the first completion, and all others behind the same prompt.

    Completions are padded at their ends, which causal masks hide from all that is read.

    Args:
        bias: of a completion as long as the longest.
    """
    parts = [x.split([first.num_tokens, x.shape[2] - first.num_tokens], 2) for x in (query, key, value)]
    (first_query, other_query), (first_key, other_key), (first_value, other_value) = parts
    keys, values = (
        torch.cat((own[:, :, : first.num_prompt_tokens].expand(padding.count, -1, -1, -1), padding.pad(others)), 2)
        for own, others in ((first_key, other_key), (first_value, other_value))
    )
    attended = attend(padding.pad(other_query), keys, values, attn_mask=bias)
    return [
        attend(first_query, first_key, first_value, is_causal=True),
        attended.transpose(0, 1).flatten(1, 2)[None].index_select(2, padding.used),
    ]


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
