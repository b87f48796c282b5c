"""Two processes (gloo) under accelerate: the training is the one that TRL's update gives them."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastgrpo import FastGRPOTrainer, per_completion
from fastgrpo.idleness import IdleCores
from test_savings import StockTrainer, assert_same_training, constant_reward, half_reward, train
from test_sharing import ROWS, build_scoring_model, compute_gradient
from test_trainer import build_trainer


def constant_in_one_process(prompts: list, **_: object) -> list[float]:
    """With groups that stay whole, one process has nothing to learn."""
    return [1.0 if os.environ["RANK"] == "1" else float(index % 3) for index in range(len(prompts))]


_turns = itertools.cycle((True, False))


def constant_in_turns(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Every other generation has nothing to learn."""
    return uneven_reward(completion_ids) if next(_turns) else [1.0] * len(completion_ids)


@per_completion
def uneven_reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(ids) % 5.0 for ids in completion_ids]


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
LONG = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
CASES: list[dict[str, Any]] = [
    {"reward": half_reward, **ACCUMULATED},
    {"reward": constant_in_one_process, **ACCUMULATED},
    {"reward": constant_reward, **ACCUMULATED},
    {"reward": constant_reward, "num_iterations": 2, "max_steps": 4, **ACCUMULATED},
    {"reward": uneven_reward, "stream_rewards": True, **ACCUMULATED},
    {"reward": half_reward, "loss_type": "grpo", "beta": 0.04, "peft": True, "num_iterations": 2, **ACCUMULATED},
    {"reward": uneven_reward, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},  # groups are cut
    {"reward": constant_in_turns, "max_steps": 2, "steps_per_generation": 2, **LONG},  # ends, begins without work
]


def run_process(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for keys in CASES:
        stock_keys = {key: value for key, value in keys.items() if key != "stream_rewards"}
        ours = train(FastGRPOTrainer, folder / "ours", **keys)
        stock = train(StockTrainer, folder / "stock", **stock_keys)
        assert ours[0].accelerator.num_processes == 2 and ours[0].siblings.is_on
        assert_same_training(ours, stock)
        assert_same_in_all(ours[0])
        count, stock_count = (sum(watch.rows) for _, watch in (ours, stock))
        if keys["reward"] is constant_in_one_process and rank == 1:
            assert count == 6 < stock_count, (
                "one row of each micro-batch, so that the other process is not left waiting"
            )
        elif keys["reward"] is constant_reward:
            assert (count == 0) == ("num_iterations" not in keys), "nothing to compute, in no process"
        elif keys["reward"] is half_reward and "beta" not in keys:
            assert count < stock_count
    half, _ = train(FastGRPOTrainer, folder / "half", reward=uneven_reward, bf16=True, gradient_checkpointing=False)
    assert_same_in_all(half)
    learn_while_the_other_decodes(rank, folder / "idle")
    model = nn.parallel.DistributedDataParallel(build_scoring_model(), find_unused_parameters=True)
    compute_gradient(model, slice(rank, None, 2), len(ROWS) // 2)
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def assert_same_in_all(trainer: FastGRPOTrainer) -> None:
    """Every process has the same weights."""
    own = nn.utils.parameters_to_vector(trainer.model.parameters())
    assert trainer.accelerator.gather(own[None]).eq(own).all()


def learn_while_the_other_decodes(rank: int, folder: Path) -> None:
    """Each rollout takes the second process longer, and the first learns meanwhile."""
    trainer = build_trainer(folder, max_steps=4, draft_time_share=0.01, learning_rate=1e-3)
    generate = trainer.engine.generate

    def generate_late(*args: Any) -> Any:
        completions = generate(*args)
        time.sleep(rank)
        return completions

    trainer.engine.generate = generate_late
    IdleCores.suffice = True  # each has one of two cores, but other tests may be at work beside
    trainer.train()
    rows = [row for row in trainer.state.log_history if "draft/hidden_s" in row]
    assert len(rows) == 4
    if rank:
        assert all(row["draft/hidden_s"] == 0 for row in rows), "nobody is waited for"
    else:
        assert all(row["draft/hidden_s"] > 0 and row["draft/num_updates"] >= 1 for row in rows), rows
        assert sum(row["draft/hidden_s"] for row in rows) > sum(row["draft/learn_s"] for row in rows)


def test_two_processes_train_as_trl_does_and_agree_with_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_process, (tmp_path, port), nprocs=2)
    model = build_scoring_model()
    compute_gradient(model, slice(None), len(ROWS))
    for rank in (0, 1):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6, msg=name)
