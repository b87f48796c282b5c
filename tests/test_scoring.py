"""The loss and its gradient are TRL's own, whatever is left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from fastgrpo import FastGRPOTrainer
from fastgrpo.grpo.scoring import find_rows_to_train, find_skipping_obstacle
from test_trainer import FusedRollouts, assert_same_weights, build_trainer, weights_of

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def build_inputs(trainer: FastGRPOTrainer, advantages: list[float], *, is_old: bool = False) -> dict[str, Any]:
    """A micro-batch of ragged prompts and completions, padded outward, some columns padding in all rows."""
    count, prompt_width, width = len(advantages), 9, 12
    generator = torch.Generator().manual_seed(1)
    prompt_mask, completion_mask = torch.zeros(count, prompt_width).long(), torch.zeros(count, width).long()
    for row in range(count):
        prompt_mask[row, 2 + row % 5 :] = 1
        completion_mask[row, : 3 + 2 * row % 7] = 1
    inputs = {
        "prompt_ids": torch.randint(2, 40, (count, prompt_width), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 40, (count, width), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": completion_mask.sum() * 2,
    }
    if is_old:  # as from weights a little older, so that ratios are clipped
        inputs["old_per_token_logps"] = -3.0 + torch.rand(count, width, generator=generator)
    if trainer.beta:
        inputs["ref_per_token_logps"] = -3.0 + torch.rand(count, width, generator=generator)
    return inputs


def compute_loss(trainer: FastGRPOTrainer, inputs: dict[str, Any], *, is_stock: bool) -> tuple[dict, dict]:
    """Gradients by parameter, and what was logged."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = 1
    if is_stock:
        ours = FastGRPOTrainer._get_per_token_logps_and_entropies
        try:
            FastGRPOTrainer._get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies
            loss = GRPOTrainer._compute_loss(trainer, trainer.model, copy.deepcopy(inputs))
        finally:
            FastGRPOTrainer._get_per_token_logps_and_entropies = ours
    else:
        loss = trainer._compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    zero = torch.zeros(())
    gradients = {
        name: zero if p.grad is None else p.grad.clone()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    return gradients, logged | {"loss": float(loss.detach())}


def assert_same_loss(trainer: FastGRPOTrainer, inputs: dict[str, Any]) -> dict[str, float]:
    expected, expected_log = compute_loss(trainer, inputs, is_stock=True)
    gradients, logged = compute_loss(trainer, inputs, is_stock=False)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.expand_as(expected[name]), expected[name], rtol=1e-4, atol=2e-6 * max(scale, 1e-3), msg=name
        )
    for key, value in expected_log.items():
        assert logged[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key
    return logged


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_gradient_is_trls(tmp_path: Path, loss_type: str, is_old: bool) -> None:
    keys = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    trainer = build_trainer(tmp_path, speculation="off", loss_type=loss_type, **keys)
    logged = assert_same_loss(trainer, build_inputs(trainer, [0.0, 1.5, 0.0, -0.7, 0.0, 0.2], is_old=is_old))
    if loss_type != "vespo":
        assert logged["update/skipped_share"] == 0.5


@pytest.mark.parametrize(
    ("keys", "peft"),
    [
        ({"beta": 0.1}, True),  # its reference is the model without adapters
        *[
            (keys, peft)
            for keys in ({"top_entropy_quantile": 0.5}, {"gradient_checkpointing": True}, {})
            for peft in (0, 1)
        ],
    ],
)
def test_the_gradient_is_trls_with(tmp_path: Path, keys: dict, peft: bool) -> None:
    trainer = build_trainer(tmp_path, speculation="off", peft=peft, **keys)
    if "gradient_checkpointing" in keys:  # as `train` does
        trainer.model.gradient_checkpointing_enable()
    if peft:
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert_same_loss(trainer, build_inputs(trainer, [0.0, 1.5, 0.0, -0.7, 0.3, 0.2]))
    assert (find_skipping_obstacle(trainer) is None) == (not keys.keys() & {"beta", "top_entropy_quantile"})


@pytest.mark.parametrize("advantages", [[0.0] * 4, [1.0, -1.0, 0.5, -0.5], [0.0, 0.0, 0.0, 2.0]])
def test_none_some_or_all_rows_teach(tmp_path: Path, advantages: list[float]) -> None:
    trainer = build_trainer(tmp_path, speculation="off")
    logged = assert_same_loss(trainer, build_inputs(trainer, advantages))
    assert logged["update/skipped_share"] == advantages.count(0.0) / 4


def test_rows_without_a_token_that_counts_teach_nothing() -> None:
    mask = torch.tensor([[1, 1], [1, 1], [0, 0], [1, 0]])
    inputs = {"completion_mask": mask, "advantages": torch.tensor([0.0, 1.0, 1.0, 1.0])}
    assert find_rows_to_train(inputs).tolist() == [False, True, False, True]
    inputs["tool_mask"] = torch.tensor([[1, 1], [0, 0], [1, 1], [1, 1]])
    assert find_rows_to_train(inputs).tolist() == [False, False, False, True]
    inputs["advantages"] = torch.zeros(4)
    assert find_rows_to_train(inputs).sum() == 0


def test_dropout_keeps_every_row(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, speculation="off")
    trainer.model.config.attention_dropout = 0.1
    assert "dropout" in str(find_skipping_obstacle(trainer))


def test_neftunes_noise_is_that_of_whole_micro_batches(tmp_path: Path) -> None:
    """Its bound goes by the length of a row, and its draws by what is computed; rollouts have none."""
    everything = {"skip_zero_advantages": False, "share_prompts": False, "old_logps": "forward"}
    ends = []
    for number, keys in enumerate((everything, {})):
        trainer = build_trainer(tmp_path / str(number), speculation="off", neftune_noise_alpha=5.0, max_steps=2, **keys)
        trainer.add_callback(fused := FusedRollouts(trainer))
        trainer.train()
        assert fused.seen == [True, True]
        ends.append(weights_of(trainer))
    assert_same_weights(*ends)


def constant_reward_later(completions: list, trainer_state: Any, **_: object) -> list[float]:
    step = trainer_state.global_step
    return [1.0 if step >= 2 else float(index) for index in range(len(completions))]


def test_a_step_without_any_advantage_still_moves_and_logs(tmp_path: Path) -> None:
    """Momentum moves the weights on: as in TRL, where such a step has gradients of zero."""
    ends = {}
    for skip in (True, False):
        trainer = build_trainer(
            tmp_path / str(skip), reward=constant_reward_later, speculation="off", skip_zero_advantages=skip, peft=True
        )
        trainer.train()
        ends[skip] = weights_of(trainer)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert len(rows) == 4
        assert rows[-1]["grad_norm"] == 0.0
        assert rows[-1]["entropy"] > 0
        assert rows[-1].get("update/skipped_share") == (1.0 if skip else None)
    for name, value in ends[True].items():
        torch.testing.assert_close(value, ends[False][name], rtol=1e-4, atol=1e-5)
