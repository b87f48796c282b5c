"""Rows of a batch as one sequence without padding, each prompt once for all its completions.

Siblings are rows with equal prompt tokens, wherever they stand: TRL shuffles and splits groups. The forward and
backward pass of the prompt is then one for all of them, and autograd adds up what they ask of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastgrpo.grpo.segments import Segment, SegmentMask

# In tokens that take as long: 64 rows of 15 tokens took as long as 64 of 16 in a batch (hidden size 576, one core).
_SEGMENT_COST_CPU = 2
# Launches of small kernels. Not measured, so high: short rows stay a batch.
_SEGMENT_COST_ELSEWHERE = 64


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """A padded batch without its padding: what the model is given, and where to find its outputs."""

    input_ids: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    mask: SegmentMask
    predicted_at: Int[Tensor, " N"]
    """Index of the hidden state that predicts each completion token, rows in the order of the batch."""


def pack_rows(input_ids: Int[Tensor, "B L"], is_used: Bool[Tensor, "B L"], num_kept: int) -> PackedRows:
    """Prompts and completions, which are the last `num_kept` columns, one behind the other.

    The last token of a completion predicts nothing: it is left out, and so are rows without a completion.
    """
    first = input_ids.shape[1] - num_kept
    cut = [(ids[:first][used[:first]], ids[first:][used[first:]]) for ids, used in zip(input_ids, is_used, strict=True)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, completion) in enumerate(cut):
        if len(completion):
            groups.setdefault(tuple(prompt.tolist()), []).append(row)
    tokens, positions, segments = [], [], []
    predicted_at: dict[int, Tensor] = {}
    num_tokens = 0
    for prompt_ids, rows in groups.items():
        num_prompt, last_of_prompt = len(prompt_ids), num_tokens + len(prompt_ids) - 1
        for row in rows:
            prompt, completion = cut[row]
            own = completion[:-1]
            is_first = row == rows[0]
            tokens += [prompt, own] if is_first else [own]
            num_own = len(own) + is_first * num_prompt
            positions.append(torch.arange(num_prompt + len(own) - num_own, num_prompt + len(own)))
            if num_own:
                segments.append(Segment(num_tokens=num_own, num_prompt_tokens=num_prompt, is_first=is_first))
            num_tokens += num_own
            own_at = torch.arange(num_tokens - len(own), num_tokens)
            predicted_at[row] = torch.cat([torch.tensor([last_of_prompt]), own_at])
    device = input_ids.device
    return PackedRows(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat(positions)[None].to(device),
        mask=SegmentMask(tuple(segments), device),
        predicted_at=torch.cat([predicted_at[row] for row in sorted(predicted_at)]).to(device),
    )


def pays(packed: PackedRows, num_padded: int) -> bool:
    """Whether packed rows cost less than a batch of `num_padded` tokens, padding and repeated prompts included.

    Attention never costs more: it leaves out what a batch masks. Each segment costs calls of its own, in every layer.
    One token alone is left to a batch: transformers folds the heads of a single query into its length.
    """
    num_tokens = packed.input_ids.shape[1]
    cost = _SEGMENT_COST_CPU if packed.input_ids.device.type == "cpu" else _SEGMENT_COST_ELSEWHERE
    return num_tokens > 1 and num_tokens + cost * len(packed.mask.segments) < num_padded
