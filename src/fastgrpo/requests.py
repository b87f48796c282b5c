"""Requests: what a caller asks for, checked before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace

from fastgrpo.sampling import stream_key
from fastgrpo.types import Completion, SamplingParams, Sequence


def build_sequences(
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
    *,
    vocab_size: int,
    max_position: int,
) -> list[Sequence]:
    """One sequence for each prompt, to end with the model's context at the latest.

    Args:
        params: one for all (request i takes the noise stream `stream + i`) or one for each.

    Raises:
        ValueError: the counts differ, or a prompt is not one; names the request and the remedy.
    """
    if not all(isinstance(each, SamplingParams) for each in (params if isinstance(params, list) else [params])):
        raise ValueError(f"sampling parameters must be SamplingParams, one for all or a list, got {params!r:.80}")
    try:
        prompts = list(prompts)
    except TypeError:
        raise ValueError(f"prompt_token_ids must be a list of prompts, got {prompts!r:.60}") from None
    if isinstance(params, SamplingParams):
        params = [replace(params, stream=params.stream + i) for i in range(len(prompts))]
    if any(isinstance(prompt, int) for prompt in prompts):
        raise ValueError("prompt_token_ids must be a list of prompts, got one prompt; wrap it in a list")
    if len(params) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts but {len(params)} SamplingParams; give one, or one for each")
    sequences = []
    for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        ids = check_prompt(prompt, index, vocab_size, max_position)
        sequences.append(
            Sequence(
                request_id=index,
                prompt_ids=ids,
                params=param,
                max_tokens=min(param.max_tokens, max_position - len(ids)),
                stream_key=stream_key(param.seed, param.stream),
            )
        )
    return sequences


def check_sequences(sequences: list[Sequence]) -> None:
    """Refuse what one rollout cannot fill in place.

    Raises:
        ValueError: a sequence has ended already, or stands there twice; names the request and the remedy.
    """
    seen: set[int] = set()
    for sequence in sequences:
        if sequence.finish_reason is not None:
            raise ValueError(
                f"request {sequence.request_id} has ended already ('{sequence.finish_reason}'): leave it out, or build "
                "it anew by take_requests"
            )
        if id(sequence) in seen:
            raise ValueError(f"request {sequence.request_id} stands twice in a rollout: take_requests builds another")
        seen.add(id(sequence))


def check_prompt(prompt: Iterable[int], index: int, vocab_size: int, max_position: int) -> list[int]:
    """The prompt as a list of ints.

    Raises:
        ValueError: it is no list of integers, is empty, leaves no room for a token, or has an unknown id.
    """
    try:
        ids = list(map(operator.index, prompt))
    except TypeError:
        raise ValueError(
            f"prompt {index} must be a list of token ids, got {prompt!r:.60}; tokenize text first"
        ) from None
    if not ids:
        raise ValueError(f"prompt {index} is empty; give at least one token, e.g. the tokenizer's BOS")
    if len(ids) >= max_position:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens and the model's context ends at {max_position}: no token can be "
            "generated; shorten the prompt"
        )
    bad = next((i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size), None)
    if bad is not None:
        raise ValueError(f"prompt {index} has token id {ids[bad]} at position {bad}, outside 0..{vocab_size - 1}")
    return ids


def build_completion(sequence: Sequence) -> Completion:
    return Completion(
        token_ids=sequence.token_ids,
        logprobs=sequence.logprobs,
        entropies=sequence.entropies,
        finish_reason=sequence.finish_reason or "length",
    )
