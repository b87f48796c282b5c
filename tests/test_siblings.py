"""Siblings stand together in a micro-batch; gradients and logs are those of TRL's own micro-batches."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from fastgrpo import FastGRPOTrainer
from fastgrpo.grpo import scoring
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.grpo.siblings import Siblings, find_regrouping_obstacle, regroup_step, restore_step
from test_savings import StockTrainer, Watch, assert_same_gradients, assert_same_training, build, half_reward, train

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_completion_length": 9}


def uneven_reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(ids) % 5.0 for ids in completion_ids]


CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo, a reference": {"loss_type": "grpo", "beta": 0.04, "peft": True},
    "dr_grpo, two iterations": {"loss_type": "dr_grpo", "num_iterations": 2, "max_steps": 4, "learning_rate": 0.01},
    "cispo, two steps a generation": {
        "loss_type": "cispo",
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
    "sapo, two generations a step": {"loss_type": "sapo", "steps_per_generation": 2},
    "luspo, sequences": {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "vespo, truncated": {
        "loss_type": "vespo",
        "mask_truncated_completions": True,
        "max_completion_length": 40,
        "top_k": 20,
    },
    "some groups without an advantage": {"reward": half_reward, "num_iterations": 2, "max_steps": 4},
    "groups of three": {"per_device_train_batch_size": 3, "num_generations": 3},
    "off-policy sequences masked": {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "max_steps": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_trls(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "pays", lambda *_: True)
    keys = {**ACCUMULATED, "reward": uneven_reward, **CASES[case]}
    ours, stock = train(FastGRPOTrainer, tmp_path / "ours", **keys), train(StockTrainer, tmp_path / "stock", **keys)
    assert ours[0].siblings.is_on
    assert_same_training(ours, stock)


def test_each_prompt_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four groups of four in four micro-batches: one prompt in each, where shuffling brings several."""
    num_prompts: dict[bool, list[int]] = {True: [], False: []}
    for is_on, counts in num_prompts.items():

        def note(packed: Any, _: int, counts: list[int] = counts) -> bool:
            counts.append(sum(segment.is_first for segment in packed.mask.segments))
            return True

        monkeypatch.setattr(scoring, "pays", note)
        train(FastGRPOTrainer, tmp_path, reward=uneven_reward, group_siblings=is_on, **ACCUMULATED)
    assert num_prompts[True] == [1] * 12
    assert sum(num_prompts[False]) > 24


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 4))
def test_regrouping_moves_rows_whole_and_is_undone(kinds: list[int], num_batches: int) -> None:
    size = len(kinds)
    rows = torch.arange(num_batches * size)
    prompts = torch.tensor([kinds[row % size] for row in rows.tolist()])
    batch = {
        "prompt_ids": torch.stack([torch.zeros_like(rows), 5 + prompts], 1),
        "prompt_mask": torch.tensor([[0, 1]]).expand(len(rows), 2),
        "completion_ids": rows[:, None],
        "names": [str(row) for row in rows.tolist()],
        "count": torch.tensor(7),
        "nothing": None,
    }
    batches = [
        {
            key: value if key in ("count", "nothing") else value[i * size : (i + 1) * size]
            for key, value in batch.items()
        }
        for i in range(num_batches)
    ]
    regrouped = regroup_step(batches)
    assert [len(each["names"]) for each in regrouped] == [size] * num_batches
    order = [name for each in regrouped for name in each["names"]]
    assert order == [str(row) for each in regrouped for row in each["completion_ids"][:, 0].tolist()]
    assert sorted(order, key=int) == batch["names"]
    dealt = [int(prompts[int(name)]) for name in order]
    assert sum(a != b for a, b in itertools.pairwise(dealt)) == len(set(dealt)) - 1, "siblings stand together"
    scored = []
    for each in regrouped:
        micro_batch = MicroBatch.of_all(each["completion_ids"])
        micro_batch.inputs, scores = each, each["completion_ids"].float()
        micro_batch.logps, micro_batch.entropies = scores, scores + 0.5
        scored.append(micro_batch)
    for restored, expected in zip(restore_step(scored), batches, strict=True):
        assert restored.inputs.keys() == expected.keys()
        assert torch.equal(restored.inputs["completion_ids"], expected["completion_ids"])
        assert restored.inputs["names"] == expected["names"] and restored.inputs["count"] == 7
        logps, entropies = restored.begin_scores()
        assert torch.equal(logps, expected["completion_ids"].float()) and torch.equal(entropies, logps + 0.5)
        assert list(restored.split(None)) == []


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"loss_type": "bnpo"}, "bnpo"),
        ({"entropy_coef": 0.01}, "entropy bonus"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"steps_per_generation": 6, "num_generations": 2}, "do not divide"),
    ],
)
def test_where_neighbours_matter_rows_stay(
    tmp_path: Path, keys: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fastgrpo"):
        trainer = build(FastGRPOTrainer, tmp_path, **{**ACCUMULATED, **keys})
    assert not trainer.siblings.is_on
    assert reason in str(find_regrouping_obstacle(trainer))
    assert [r.message for r in caplog.records if "siblings stay" in r.message and reason in r.message]
    if "steps_per_generation" not in keys:  # which here are longer than the prompts last
        stock = train(StockTrainer, tmp_path / "stock", **{**ACCUMULATED, **keys})
        assert_same_training(train(FastGRPOTrainer, tmp_path / "ours", **{**ACCUMULATED, **keys}), stock)


class OwnLossTrainer(FastGRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super()._compute_loss(model, inputs)


def test_rows_stay_for_a_loss_of_ones_own(tmp_path: Path) -> None:
    trainer = build(OwnLossTrainer, tmp_path, **ACCUMULATED)
    assert not trainer.siblings.is_on and "OwnLossTrainer" in str(find_regrouping_obstacle(trainer))


def test_one_micro_batch_a_step_has_nothing_to_regroup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastgrpo"):
        trainer = build(FastGRPOTrainer, tmp_path, loss_type="bnpo")
    assert not trainer.siblings.is_on and not any("siblings" in record.message for record in caplog.records)


def test_a_step_that_broke_off_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = build(FastGRPOTrainer, tmp_path, reward=uneven_reward, **ACCUMULATED)
    watch = Watch(trainer)
    plan, calls = trainer.savings.plan, iter(range(100))

    def interrupted(inputs: dict[str, Any], step: int) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return plan(inputs, step)

    trainer.savings.plan = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer._buffered_inputs = None  # as a new process begins
    trainer._step = 0
    trainer.train()
    assert len(watch.gradients) == 3
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3 and all(math.isfinite(row["entropy"]) for row in logged)
    assert isinstance(trainer.siblings, Siblings)


class InterruptOnce(TrainerCallback):
    has = False

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        if not self.has:
            self.has = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_after_a_step_that_broke_off_rows_stay_where_trl_has_them(tmp_path: Path, num_iterations: int) -> None:
    """TRL goes on amid the generation, and from then on each optimiser step ends amid one."""
    watches = []
    for kind in (FastGRPOTrainer, StockTrainer):
        keys = ACCUMULATED | {"reward": uneven_reward, "num_iterations": num_iterations}
        trainer = build(kind, tmp_path / kind.__name__, **keys)
        watches.append(Watch(trainer))
        trainer.add_callback(InterruptOnce())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
    assert_same_gradients(*watches)


class ChangeLoss(TrainerCallback):
    """Changes what the loss is behind the first optimiser step, as schedules do."""

    def __init__(self, trainer: Any, **changes: object) -> None:
        self.trainer, self.changes = trainer, changes

    def on_step_end(self, *_: Any, **__: Any) -> None:
        vars(self.trainer).update(self.changes)


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.3}, {"top_entropy_quantile": 0.5}, {"_entropy_bonus_enabled": True, "entropy_coef": 0.1}],
    ids=["beta", "quantile", "bonus"],
)
def test_a_loss_that_a_callback_changes_is_trls(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Amid a generation, where its reference is there; rows that have a gradient now are no longer left out."""
    runs = []
    for kind in (FastGRPOTrainer, StockTrainer):
        keys = {"reward": half_reward, "peft": True, "gradient_accumulation_steps": 2}
        keys |= {"steps_per_generation": 2} if "beta" in changes else {"steps_per_generation": 4}
        trainer = build(kind, tmp_path / kind.__name__, **ACCUMULATED | keys)
        runs.append(Watch(trainer))
        trainer.add_callback(ChangeLoss(trainer, **changes))
        trainer.train()
    assert_same_gradients(*runs)
