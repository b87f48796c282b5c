"""Rows of random tokens in the place of a rollout, the same for every trainer: what is left of a step is its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrpo.grpo.rollout_facts import ENTROPIES, LOGPS, STEP
from fastgrpo.options import UpdateOptions


def draw_rows(options: UpdateOptions, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """A generation batch as TRL's trainer hands it on: groups of one prompt each, padded outward.

    Completion lengths are spread evenly from the shortest to the longest; the first `equal_groups` groups have no
    advantage, the others' are of two kinds.

    Returns:
        what TRL's loss reads; rows in order, not shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    groups, size = options.prompts_per_step, options.num_generations
    width, count = options.max_completion_length, groups * size
    prompts = torch.randint(vocab_size, (groups, options.prompt_length), generator=generator)
    lengths = torch.linspace(options.min_completion_length, width, count).round()[
        torch.randperm(count, generator=generator)
    ]
    mask = (torch.arange(width) < lengths[:, None]).long()
    advantages = torch.where(torch.arange(count) % 4 == 0, 1.5, -0.5)
    advantages[: options.equal_groups * size] = 0.0
    prompt_ids = prompts.repeat_interleave(size, 0)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": torch.randint(vocab_size, (count, width), generator=generator) * mask,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }


def give_rows(trainer_class: type[Any], options: UpdateOptions, lengths: list[int]) -> type[Any]:
    """A trainer of this class that is handed rows in the place of its rollouts.

    Args:
        lengths: takes those of a step's completions.
    """

    class Given(trainer_class):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            model = self.accelerator.unwrap_model(self.model)
            rows = draw_rows(options, model.config.vocab_size, seed=options.seed + self.state.global_step)
            lengths.extend(rows["completion_mask"].sum(1).tolist())
            if hasattr(self, "savings"):  # what our rollout would have said of its tokens
                nothing = torch.zeros(rows["completion_ids"].shape)
                rows |= {LOGPS: nothing, ENTROPIES: nothing, STEP: torch.tensor(self.state.global_step)}
            return {key: value.to(self.accelerator.device) for key, value in rows.items()}

    return Given
