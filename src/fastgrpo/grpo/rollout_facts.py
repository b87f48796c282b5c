"""What the rollout knows of its own tokens, kept beside TRL's batch so that the update need not compute it again.

With each token the engine hands out its log-probability and the entropy of its distribution. Tools make a completion
of several turns, with text between them that nobody drew: facts are kept where they line up token for token. A value
depends on the weights and on the tokens before it alone, so whichever request drew the same text knew it.

The facts travel in TRL's batch as tensors of a row each, so its shuffling and splitting carry them along.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fastgrpo.types import Completion

LOGPS, ENTROPIES = "rollout_per_token_logps", "rollout_entropies"
STEP = "rollout_step"  # optimiser steps before the rollout: whether the weights have moved since


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One call of the engine."""

    prompt_ids: list[list[int]]
    completions: list[Completion]


@dataclass(frozen=True, kw_only=True)
class RolloutFacts:
    """Log-prob and entropy of each completion token: NaN where the engine did not draw it, 0 where a tool wrote it.

    Tokens of tools do not count in the loss.
    """

    logps: Float[Tensor, "B C"]
    entropies: Float[Tensor, "B C"]

    @staticmethod
    def build(
        turns: Sequence[Turn],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        tool_mask: list[list[int]] | None,
    ) -> RolloutFacts:
        """Find the rows of a batch in what the engine drew.

        Args:
            turns: the engine's calls for this batch, in their order.
            prompt_ids, completion_ids: the rows as TRL trains on them, a tool's answers included.
            tool_mask: 0 for the tokens of tools, 1 elsewhere; None without tools.
        """
        drawn: dict[tuple[int, ...], list[Completion]] = defaultdict(list)
        for turn in turns:
            for prompt, completion in zip(turn.prompt_ids, turn.completions, strict=True):
                drawn[tuple(prompt)].append(completion)
        later = {len(prompt) for turn in turns[1:] for prompt in turn.prompt_ids}
        logps, entropies = (torch.full((len(prompt_ids), max(map(len, completion_ids))), math.nan) for _ in range(2))
        for row, (prompt, own) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            for start, completion in _find_drawn(drawn, prompt, own, later):
                count = min(len(completion.token_ids), len(own) - start)
                logps[row, start : start + count] = torch.tensor(completion.logprobs[:count])
                entropies[row, start : start + count] = torch.tensor(completion.entropies[:count])
            if tool_mask is not None:
                is_tool = torch.tensor(tool_mask[row]) == 0
                logps[row, : len(own)][is_tool] = entropies[row, : len(own)][is_tool] = 0.0
        return RolloutFacts(logps=logps, entropies=entropies)

    def fit(self, completion_ids: Int[Tensor, "B C2"]) -> RolloutFacts:
        """Padded as TRL has padded the tokens, on their device."""
        padding = (0, completion_ids.shape[1] - self.logps.shape[1])
        logps, entropies = (
            nn.functional.pad(values, padding, value=math.nan).to(completion_ids.device)
            for values in (self.logps, self.entropies)
        )
        return RolloutFacts(logps=logps, entropies=entropies)

    def find_old_logps(
        self, completion_ids: Int[Tensor, "B C2"], attention_mask: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B C2"], Bool[Tensor, " B"]]:
        """Log-probabilities under the weights that generated, 0 where nothing is attended to; rows that miss some."""
        is_padding = attention_mask[:, -completion_ids.shape[1] :] == 0
        logps = self.fit(completion_ids).logps.masked_fill(is_padding, 0.0)
        return logps, logps.isnan().any(1)


def _find_drawn(
    drawn: dict[tuple[int, ...], list[Completion]], prompt: list[int], own: list[int], later: set[int]
) -> Iterator[tuple[int, Completion]]:
    """(place in the completion, what was drawn there) of a row, where prompt and tokens are the row's own."""
    text = prompt + own
    for length in {len(prompt), *(each for each in later if len(prompt) < each < len(text))}:
        rest = text[length:]
        for completion in drawn.get(tuple(text[:length]), ()):
            if completion.token_ids[: len(rest)] == rest[: len(completion.token_ids)]:
                yield length - len(prompt), completion
                break
