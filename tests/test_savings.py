"""What the update leaves out changes nothing: gradients, metrics and weights are those of TRL's own loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOTrainer

import conftest
import test_tools
from fastgrpo import FastGRPOConfig, FastGRPOTrainer
from fastgrpo.families import base_model_of
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.grpo.rollout_facts import ENTROPIES, LOGPS, STEP, RolloutFacts, Turn
from fastgrpo.grpo.savings import Savings
from fastgrpo.grpo.segments import SegmentMask
from fastgrpo.types import Completion, SamplingParams
from test_trainer import assert_same_weights, build_model, build_tokenizer, weights_of

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
OF_TIME = (
    "step_time",
    "time/",
    "rollout/",
    "plan/",
    "draft/",
    "train_",
    "eval_runtime",
    "eval_samples",
    "eval_steps",
    "eval_model",
    "eval_rollout/",
    "eval_plan/",
)


class StockTrainer(FastGRPOTrainer):
    """Our rollouts, and everything behind them as TRL has it."""

    _generate_and_score_completions = GRPOTrainer._generate_and_score_completions
    _prepare_inputs = GRPOTrainer._prepare_inputs
    _compute_loss = GRPOTrainer._compute_loss
    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies
    training_step = GRPOTrainer.training_step


class Watch(TrainerCallback):
    """The gradient of each optimiser step, and the rows of each forward of the policy outside its rollouts."""

    def __init__(self, trainer: FastGRPOTrainer) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rows: list[int] = []
        self.trainer = trainer
        backbone = base_model_of(trainer.accelerator.unwrap_model(trainer.model)).model
        trainer.add_callback(self)
        backbone.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.trainer.model.training:
            mask = kwargs["attention_mask"]  # rows that share a prompt are packed into one
            self.rows.append(len(mask.segments) if isinstance(mask, SegmentMask) else len(kwargs["input_ids"]))

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


def half_reward(prompts: list, completion_ids: list[list[int]], **_: object) -> list[float]:
    """Groups of odd questions get one reward for all."""
    texts = [prompt[-1]["content"] for prompt in prompts]
    odd = [int("".join(c for c in text.split("+")[0] if c.isdigit())) % 2 for text in texts]
    return [1.0 if is_odd else sum(ids) % 5.0 for is_odd, ids in zip(odd, completion_ids, strict=True)]


def other_half_reward(prompts: list, completion_ids: list[list[int]], **_: object) -> list[float]:
    """Another scale, and 0 where `half_reward` tells completions apart in none of them."""
    return [
        10.0 * (len(ids) % 3) * (reward != 1.0)
        for ids, reward in zip(completion_ids, half_reward(prompts, completion_ids), strict=True)
    ]


def constant_reward(completions: list, **_: object) -> list[float]:
    return [0.5] * len(completions)


def patchy_reward(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """None for some completions, and for whole groups."""
    return [None if index % 3 == 0 or index >= 4 else sum(ids) % 5.0 for index, ids in enumerate(completion_ids)]


def build(
    kind: type,
    folder: Path,
    *,
    reward: Any = half_reward,
    peft: bool = False,
    family: str | None = None,
    rollout_func: Callable | None = None,
    **keys: Any,
) -> Any:
    prompts = [[{"role": "user", "content": f"what is {i}+{i}?"}] for i in range(16)]
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 7, "max_steps": 3,
        "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "report_to": "none", "bf16": False, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "speculation": "off",
    }  # fmt: skip
    if kind is StockTrainer:
        settings |= {"skip_zero_advantages": False, "old_logps": "forward"}
    return kind(
        build_model() if family is None else conftest.build_model(family, torch.float32),
        reward,
        FastGRPOConfig(str(folder), **(settings | keys)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:4]}),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian") if peft else None,
        rollout_func=rollout_func,
    )


def train(kind: type, folder: Path, **keys: Any) -> tuple[FastGRPOTrainer, Watch]:
    trainer = build(kind, folder, **keys)
    watch = Watch(trainer)
    trainer.train()
    return trainer, watch


def assert_same_training(ours: tuple[FastGRPOTrainer, Watch], stock: tuple[FastGRPOTrainer, Watch]) -> None:
    """Gradients to 1e-5 of the largest, step by step, and every metric of TRL's."""
    assert_same_gradients(ours[1], stock[1])
    assert_same_logs(ours[0], stock[0])


def assert_same_gradients(ours: Watch, stock: Watch) -> None:
    assert len(ours.gradients) == len(stock.gradients) > 0
    for gradients, expected in zip(ours.gradients, stock.gradients, strict=True):
        scale = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() <= 1e-5 * max(scale, 1e-3), name


def assert_same_logs(ours: FastGRPOTrainer, stock: FastGRPOTrainer) -> None:
    for row, expected in zip(ours.state.log_history, stock.state.log_history, strict=True):
        for key, value in expected.items():
            if not key.startswith(OF_TIME):
                assert row[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key


CASES = {
    "one pass": ({}, "none"),
    "truncated completions": ({"mask_truncated_completions": True, "max_completion_length": 40, "top_k": 20}, "none"),
    "accumulated": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, "none"),
    "two iterations": ({"num_iterations": 2, "max_steps": 4}, "update"),
    "two iterations, accumulated": (
        {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4},
        "update",
    ),
    "two iterations, adapters and a reference": (
        {"num_iterations": 2, "max_steps": 4, "beta": 0.04, "peft": True},
        "update",
    ),
    "a generation of four steps": (
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 5},
        "update",
    ),
    "a generation across steps": (
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 3},
        "update",
    ),
    "a reference, a generation of two steps": (
        {"per_device_train_batch_size": 4, "steps_per_generation": 2, "beta": 0.04, "peft": True},
        "update",
    ),
    "old from the rollout": (
        {"num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2, "old_logps": "rollout"},
        "rollout",
    ),
    "sequences": ({"num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"}, "update"),
    "checkpointing": ({"num_iterations": 2, "gradient_checkpointing": True, "loss_type": "cispo"}, "update"),
    "scaled over the batch": ({"scale_rewards": "batch"}, "none"),
    "not scaled": ({"scale_rewards": "none", "loss_type": "dr_grpo"}, "none"),
    "rewards scaled one by one": (
        {"reward": [half_reward, other_half_reward], "multi_objective_aggregation": "normalize_then_sum"},
        "none",
    ),
    "clipped higher": ({"num_iterations": 2, "max_steps": 4, "epsilon_high": 0.28, "loss_type": "bnpo"}, "update"),
    "divergence corrected": (
        {"num_iterations": 2, "max_steps": 4, "beta": 0.04, "use_bias_correction_kl": True, "peft": True},
        "update",
    ),
    "divergence not corrected": (
        {"num_iterations": 2, "max_steps": 4, "beta": 0.04, "use_bias_correction_kl": False, "peft": True},
        "update",
    ),
    "Qwen2": ({"family": "qwen2", "num_iterations": 2, "max_steps": 2}, "update"),
    "Mistral with a window, adapters": ({"family": "mistral_window", "peft": True, "max_steps": 2}, "none"),
    "Qwen3, adapters": ({"family": "qwen3", "peft": True, "gradient_checkpointing": True}, "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_trls(tmp_path: Path, case: str) -> None:
    keys, source = CASES[case]
    ours, stock = train(FastGRPOTrainer, tmp_path / "ours", **keys), train(StockTrainer, tmp_path / "stock", **keys)
    assert ours[0].savings.old_logps_from == source
    assert_same_training(ours, stock)
    assert sum(ours[1].rows) < sum(stock[1].rows) or keys.get("beta"), "something was left out"


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_what_an_earlier_training_left_is_not_fresh(tmp_path: Path, num_iterations: int) -> None:
    """TRL goes on with the rest of a generation, whose number of steps begins at 0 again."""
    keys = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": num_iterations}
    trained = []
    for kind in (FastGRPOTrainer, StockTrainer):
        trained.append(train(kind, tmp_path / kind.__name__, **keys))
        trained[-1][0].train()
    assert_same_training(*trained)


def test_rows_without_advantage_cost_nothing_while_the_weights_are_the_rollouts(tmp_path: Path) -> None:
    """With two iterations the second computes them, as their entropy is another's then."""
    trainer, watch = train(FastGRPOTrainer, tmp_path, num_iterations=2, max_steps=4)
    shares = [row["update/unscored_share"] for row in trainer.state.log_history if "loss" in row]
    skipped = [row["update/skipped_share"] for row in trainer.state.log_history if "loss" in row]
    assert shares[0::2] == skipped[0::2] and shares[1::2] == [0.0, 0.0] and 0 < sum(shares[0::2]) < 2
    assert sum(watch.rows) == sum(round(8 * (1 - share)) for share in shares)


@pytest.mark.parametrize("keys", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}])
def test_a_step_without_any_advantage_runs_the_model_never(tmp_path: Path, keys: dict) -> None:
    keys = {"reward": constant_reward, "optim": "adamw_torch", **keys}
    ours, stock = train(FastGRPOTrainer, tmp_path / "ours", **keys), train(StockTrainer, tmp_path / "stock", **keys)
    assert ours[1].rows == [] and len(stock[1].rows) > 0
    assert_same_training(ours, stock)
    assert all(row["entropy"] > 0 for row in ours[0].state.log_history if "loss" in row)
    assert_same_weights(weights_of(ours[0]), weights_of(stock[0]))


def test_old_logps_cost_no_forward(tmp_path: Path) -> None:
    for keys in ({"num_iterations": 2}, {"per_device_train_batch_size": 4, "steps_per_generation": 2}):
        counts = {}
        for old in ("auto", "rollout", "forward"):
            keys |= {"skip_zero_advantages": False, "max_steps": 2, "old_logps": old}
            counts[old] = sum(train(FastGRPOTrainer, tmp_path / old, **keys)[1].rows)
        late = 4 if "steps_per_generation" in keys else 0  # whose first pass comes after the weights have moved
        assert (counts["auto"], counts["rollout"]) == (counts["forward"] - 8 + late, counts["forward"] - 8)


def test_the_differences_of_rollout_and_update_are_logged(tmp_path: Path) -> None:
    trainer, _ = train(FastGRPOTrainer, tmp_path, num_iterations=2, max_steps=2)
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert 0 <= first["sampling/sampling_logp_difference/mean"] <= first["sampling/sampling_logp_difference/max"] < 1e-4
    assert "sampling/sampling_logp_difference/mean" not in second, "the weights are others'"


def test_the_rollouts_own_are_taken_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """They round otherwise than the update, and with speculation otherwise than without."""
    keys = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
    for more in ({}, {"bf16": True}):
        assert build(FastGRPOTrainer, tmp_path, **keys, **more).savings.old_logps_from == "update"
    assert build(FastGRPOTrainer, tmp_path, **keys, old_logps="rollout").savings.old_logps_from == "rollout"
    dropout = build(FastGRPOTrainer, tmp_path, **keys)
    dropout.model.config.attention_dropout = 0.1
    assert Savings(dropout).old_logps_from == "forward", "each forward draws its own"


def test_evaluation_is_left_as_it_is(tmp_path: Path) -> None:
    logs = []
    for kind in (FastGRPOTrainer, StockTrainer):
        trainer = build(kind, tmp_path / kind.__name__, num_iterations=2, per_device_eval_batch_size=4)
        watch = Watch(trainer)
        trainer.evaluate()
        assert watch.rows == []
        logs.append(trainer)
    assert_same_logs(*logs)
    assert not any("update/" in key or "sampling/" in key for row in logs[0].state.log_history for key in row)


def draw_elsewhere(prompts: list, trainer: FastGRPOTrainer) -> dict[str, Any]:
    """A `rollout_func` of TRL's, which goes past our hooks."""
    ids = [trainer.processing_class(prompt[-1]["content"])["input_ids"] for prompt in prompts]
    completions = trainer.engine.generate(ids, SamplingParams(max_tokens=7, seed=trainer.state.global_step))
    return {"prompt_ids": ids, "completion_ids": [c.token_ids for c in completions], "logprobs": None}


@pytest.mark.parametrize("keys", [{"num_iterations": 2}, {"per_device_train_batch_size": 4, "steps_per_generation": 2}])
def test_what_others_drew_is_computed(tmp_path: Path, keys: dict) -> None:
    keys = {"rollout_func": draw_elsewhere, "max_steps": 2, **keys}
    ours, stock = train(FastGRPOTrainer, tmp_path / "ours", **keys), train(StockTrainer, tmp_path / "stock", **keys)
    assert_same_training(ours, stock)
    assert ours[0].state.log_history[0]["update/unscored_share"] == 0


# -- tools ---------------------------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.

    Returns:
        Their sum.
    """
    return a + b


def describe(model: torch.nn.Module, prompt: list[int], ids: list[int]) -> Completion:
    """A completion that was not drawn, with what the model says of it."""
    is_training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    model.train(is_training)
    return Completion(
        token_ids=ids,
        logprobs=logits.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(),
        entropies=torch.special.entr(logits.exp()).sum(-1).tolist(),
        finish_reason="stop",
    )


def train_with_a_tool(kind: type, folder: Path, reward: Callable, **keys: Any) -> tuple[FastGRPOTrainer, Watch]:
    """Two of four completions call a tool at first; all of them go on as the policy draws."""
    tokenizer = test_tools.build_tokenizer()
    if kind is StockTrainer:
        keys |= {"skip_zero_advantages": False, "old_logps": "forward"}
    trainer = kind(
        test_tools.build_model(len(tokenizer)),
        reward,
        FastGRPOConfig(
            str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=160, optim="sgd",
            report_to="none", bf16=False, use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
            speculation="off", learning_rate=0.05, max_grad_norm=0.0, lr_scheduler_type="constant", **keys,
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "20+3"}]] * 4}),
        processing_class=tokenizer,
        tools=[add],
    )  # fmt: skip
    generate, rounds = trainer.engine.generate, []

    def call_a_tool_at_first(prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        completions = generate(prompts, params)
        rounds.append(prompts)
        if len(prompts) == 4:
            for index in (1, 2):
                completions[index] = describe(trainer.model, prompts[index], tokenizer(test_tools.CALL)["input_ids"])
        return completions

    trainer.engine.generate = call_a_tool_at_first
    watch = Watch(trainer)
    trainer.train()
    assert [len(prompts) for prompts in rounds][:2] == [4, 2]
    return trainer, watch


def length_reward(completions: list, **_: object) -> list[float]:
    return [float(index) for index in range(len(completions))]


def test_turns_line_up_around_tools(tmp_path: Path) -> None:
    ours = train_with_a_tool(FastGRPOTrainer, tmp_path / "ours", constant_reward, max_steps=1)
    stock = train_with_a_tool(StockTrainer, tmp_path / "stock", constant_reward, max_steps=1)
    assert_same_training(ours, stock)
    assert ours[1].rows == [] and ours[0].state.log_history[0]["update/unscored_share"] == 1


def test_old_logps_around_tools(tmp_path: Path) -> None:
    keys = {"num_iterations": 2, "max_steps": 2}
    ours = train_with_a_tool(FastGRPOTrainer, tmp_path / "ours", length_reward, old_logps="rollout", **keys)
    stock = train_with_a_tool(StockTrainer, tmp_path / "stock", length_reward, **keys)
    assert_same_training(ours, stock)
    assert sum(stock[1].rows) - sum(ours[1].rows) == 4


# -- what lines up -------------------------------------------------------------------------------------------


def draw(*token_ids: int) -> Completion:
    """A completion whose facts say its tokens."""
    values = [float(token_id) for token_id in token_ids]
    return Completion(token_ids=list(token_ids), logprobs=[-v for v in values], entropies=values, finish_reason="stop")


def entropies_of(turns: list[Turn], prompts: list, completions: list, tools: list | None = None) -> list[list[float]]:
    facts = RolloutFacts.build(turns, prompts, completions, tools)
    assert torch.equal(facts.logps.nan_to_num(-1), facts.entropies.neg().nan_to_num(-1) + 0.0)
    return [row[: len(own)] for row, own in zip(facts.entropies.tolist(), completions, strict=True)]


def test_facts_go_where_their_tokens_are() -> None:
    prompts = [[1, 2], [1, 2], [3]]
    first = Turn(prompt_ids=prompts, completions=[draw(5, 6), draw(7), draw(8, 9)])
    assert entropies_of([first], prompts, [[5, 6], [7], [8, 9]]) == [[5, 6], [7], [8, 9]]
    assert entropies_of([first], prompts, [[5], [7], [8]]) == [[5], [7], [8]], "cut short"
    later = Turn(prompt_ids=[[1, 2, 7, 4, 4]], completions=[draw(6, 6, 6)])
    own = [[5, 6], [7, 4, 4, 6, 6], [8, 9]]
    tools = [[1, 1], [1, 0, 0, 1, 1], [1, 1]]
    assert entropies_of([first, later], prompts, own, tools) == [[5, 6], [7, 0, 0, 6, 6], [8, 9]]


def test_facts_that_do_not_line_up_are_not_known() -> None:
    turn = Turn(prompt_ids=[[1, 2]] * 2, completions=[draw(5, 6), draw(7)])
    changed, longer = entropies_of([turn], [[1, 2]] * 2, [[5, 4], [7, 8]])
    assert all(map(math.isnan, changed)) and longer[0] == 7 and math.isnan(longer[1])
    assert all(map(math.isnan, entropies_of([turn], [[1, 3]], [[5, 6]])[0])), "another prompt"
    assert all(map(math.isnan, entropies_of([], [[1, 2]], [[5, 6]])[0])), "drawn by somebody else"


def build_inputs(**more: Any) -> dict[str, Any]:
    known = torch.tensor([[1.0, 2.0], [3.0, math.nan], [4.0, math.nan], [5.0, 6.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])
    advantages = torch.tensor([0.0, 0.0, 0.0, 1.0])
    facts = {LOGPS: -known, ENTROPIES: known, STEP: torch.tensor(5)}
    return {"completion_mask": mask, "advantages": advantages, **facts, **more}


def test_only_rows_known_whole_are_left_out() -> None:
    keys = {"skips_rows": True, "awaits_old_logps": False}
    batch = MicroBatch.plan(build_inputs(), step=5, **keys)
    assert batch.rows_known.tolist() == [True, False, True, False]
    assert batch.begin_scores()[1].tolist() == [[1, 2], [0, 0], [4, 0], [0, 0]]
    assert [(rows.tolist(), grad) for rows, grad in batch.split(None)] == [([3], True), ([1], False)]
    assert not MicroBatch.plan(build_inputs(), step=6, **keys).rows_known.any(), "the weights have moved"
    tools = build_inputs(tool_mask=torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]))
    assert MicroBatch.plan(tools, step=5, **keys).rows_known.tolist() == [True, True, True, False]


def test_old_logps_without_a_first_pass_are_missed(tmp_path: Path) -> None:
    inputs = build_inputs(old_per_token_logps=torch.full((4, 2), math.nan))
    with pytest.raises(RuntimeError, match="set old_logps='forward'"):
        MicroBatch.plan(inputs, step=6, skips_rows=True, awaits_old_logps=True)
    batch = MicroBatch.plan(inputs, step=5, skips_rows=True, awaits_old_logps=True)
    assert "old_per_token_logps" not in batch.inputs
    batch.logps = torch.ones(4, 2)
    batch.keep_old_logps()
    assert inputs["old_per_token_logps"].eq(1).all()


# -- bad input -----------------------------------------------------------------------------------------------


class OwnLossTrainer(FastGRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return super()._compute_loss(model, inputs) * 1.0


def test_savings_step_aside_for_a_loss_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"num_iterations": 2, "max_steps": 2}
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        ours = train(OwnLossTrainer, tmp_path / "ours", **keys)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fastgrpo")]
    assert len(lines) == 1 and "OwnLossTrainer._compute_loss is not ours" in lines[0]
    stock = train(StockTrainer, tmp_path / "stock", **keys)
    assert_same_training(ours, stock)
    assert sum(ours[1].rows) == sum(stock[1].rows)


class OtherLossTrainer(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return super()._compute_loss(model, inputs) * 2.0


OtherLossTrainer._compute_loss.__module__ = "trl.experimental.other"  # as GMPOTrainer's


@pytest.mark.parametrize("parents", [(OtherLossTrainer, FastGRPOTrainer), (FastGRPOTrainer, OtherLossTrainer)])
def test_savings_step_aside_for_the_loss_of_another_of_trls_trainers(tmp_path: Path, parents: tuple) -> None:
    keys = {"num_iterations": 2, "max_steps": 2}
    ours = train(type("Ours", parents, {}), tmp_path / "ours", **keys)
    stock = train(type("Stock", (OtherLossTrainer, StockTrainer), {}), tmp_path / "stock", old_logps="forward", **keys)
    assert ours[0].savings.has_own_loss
    assert_same_training(ours, stock)


class OwnMaskTrainer(FastGRPOTrainer):
    """A part of the loss alone, which reads what ours does not compute."""

    def get_off_policy_mask(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return GRPOTrainer.get_off_policy_mask(*args, **kwargs)


def test_savings_step_aside_for_a_part_of_the_loss_of_ones_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        trainer = build(OwnMaskTrainer, tmp_path)
    assert "OwnMaskTrainer.get_off_policy_mask is not ours" in caplog.text
    assert trainer.savings.has_own_loss and not trainer.siblings.is_on


def test_savings_step_aside_for_a_loss_that_is_put_in_place_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, seen = build(FastGRPOTrainer, tmp_path), []
    before = trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        seen.append(len(inputs["advantages"]))
        return before(model, inputs)

    trainer._compute_loss = compute_loss
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        trainer.train()
    assert seen and trainer.savings.has_own_loss
    assert caplog.text.count("_compute_loss is not ours") == 1


def take_divergence_off(output: dict[str, Any]) -> dict[str, Any]:
    divergences = ((output["old_per_token_logps"] - output["ref_per_token_logps"]) * output["completion_mask"]).sum(1)
    return output | {"advantages": output["advantages"] - 0.5 * divergences}


def train_on_another_prompt(output: dict[str, Any]) -> dict[str, Any]:
    return output | {"prompt_ids": output["prompt_ids"].roll(1, 0)}


def leave_the_first_out(output: dict[str, Any]) -> dict[str, Any]:
    rows = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "old_per_token_logps")
    return output | {name: output[name][1:] for name in rows if name in output}


def mask_within(output: dict[str, Any]) -> dict[str, Any]:
    mask = output["completion_mask"].clone()
    mask[::2, 0] = mask[1::2, 2] = 0
    return output | {"completion_mask": mask}


def make_anew(output: dict[str, Any]) -> dict[str, Any]:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
    return {name: output[name] for name in (*names, "old_per_token_logps")}


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (take_divergence_off, {"num_iterations": 2, "beta": 0.04, "peft": True}),
        (train_on_another_prompt, {"num_iterations": 2, "old_logps": "rollout"}),
        (leave_the_first_out, {}),
        (mask_within, {}),
        (make_anew, {"num_iterations": 2}),
    ],
)
def test_savings_step_aside_for_a_batch_of_ones_own(tmp_path: Path, change: Callable, keys: dict[str, Any]) -> None:
    """A subclass changes what TRL is about to learn from, and sees what TRL shows it."""

    class OwnBatchTrainer(FastGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return change(super()._generate_and_score_completions(inputs))

    class StockOwnBatchTrainer(StockTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return change(GRPOTrainer._generate_and_score_completions(self, inputs))

    ours = train(OwnBatchTrainer, tmp_path / "ours", max_steps=2, **keys)
    stock_keys = keys | {"skip_zero_advantages": False, "old_logps": "forward"}
    assert_same_training(ours, train(StockOwnBatchTrainer, tmp_path / "stock", max_steps=2, **stock_keys))


class AllOwnLossTrainer(FastGRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return next(p for p in model.parameters() if p.requires_grad).sum() * inputs["advantages"].sum()


def test_advantages_that_are_not_finite_never_reach_a_loss_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = GRPOTrainer._generate_and_score_completions

    def spoil(self: Any, inputs: Any) -> dict[str, Any]:
        output = given(self, inputs)
        return output | {"advantages": output["advantages"] * math.nan}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", spoil)
    trainer = build(AllOwnLossTrainer, tmp_path)
    with pytest.raises(FloatingPointError, match="half_reward"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_none_leaves_a_completion_out_as_in_trl(tmp_path: Path) -> None:
    ours = train(FastGRPOTrainer, tmp_path / "ours", reward=patchy_reward)
    stock = train(StockTrainer, tmp_path / "stock", reward=patchy_reward)
    assert_same_training(ours, stock)
    assert sum(ours[1].rows) < sum(stock[1].rows)


def test_infinite_rewards_and_advantages_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def endless(completions: list, **_: object) -> list[float]:
        return [math.inf if index == 3 else 1.0 for index in range(len(completions))]

    class OwnAdvantagesTrainer(FastGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            return output | {"advantages": output["advantages"] * math.nan}

    for trainer, error, message in (
        (build(FastGRPOTrainer, tmp_path, reward=endless), ValueError, "'endless' returned inf for completion 3 of"),
        (build(OwnAdvantagesTrainer, tmp_path), FloatingPointError, "of row 0, 1, 2, 3, 4, ... of .* half_reward"),
    ):
        before = weights_of(trainer)
        with pytest.raises(error, match=message):
            trainer.train()
        assert_same_weights(before, weights_of(trainer))


def test_old_logps_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="old_logps must be one of auto, rollout, forward, got 'mine'"):
        build(FastGRPOTrainer, tmp_path, old_logps="mine")
