"""Finished rollouts on file, for what learns from them later: safetensors, features end to end."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgrpo.engine import FinishedRollout

Steps = list[list[FinishedRollout]]


def save_rollouts(steps: Steps, path: Path) -> None:
    """Write the rollouts of some steps; those without features are left out."""
    kept = [(number, r) for number, step in enumerate(steps) for r in step if r.features is not None]
    features = [r.features.cpu() for _, r in kept if r.features is not None]
    tensors = {
        "features": torch.cat(features) if features else torch.zeros(0, 0),
        "counts": torch.tensor([[number, len(r.prompt_ids), len(r.token_ids)] for number, r in kept]).view(-1, 3),
        "tokens": torch.tensor([token for _, r in kept for token in (*r.prompt_ids, *r.token_ids)], dtype=torch.int64),
        "temperature": torch.tensor([r.temperature for _, r in kept], dtype=torch.float64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def load_rollouts(path: Path) -> Steps:
    """Read what `save_rollouts` wrote.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            counts, tokens, features, temperature = (
                file.get_tensor(name) for name in ("counts", "tokens", "features", "temperature")
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no recorded rollouts: {error}") from error
    steps: Steps = [[] for _ in range(int(counts[:, 0].max()) + 1 if len(counts) else 0)]
    token, feature = 0, 0
    for (number, num_prompt, num_tokens), heat in zip(counts.tolist(), temperature.tolist(), strict=True):
        ids = tokens[token : token + num_prompt + num_tokens].tolist()
        steps[number].append(
            FinishedRollout(
                prompt_ids=ids[:num_prompt],
                token_ids=ids[num_prompt:],
                temperature=heat,
                features=features[feature : feature + len(ids) - 1].clone(),
            )
        )
        token, feature = token + len(ids), feature + len(ids) - 1
    return steps
