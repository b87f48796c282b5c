"""Law 4: training with speculation is training without it, bit for bit; and what must survive a break."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastgrpo import FastGRPOConfig, FastGRPOTrainer
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.grpo.clock import StepClock
from fastgrpo.grpo.state import load_state
from fastgrpo.planner import AutoPlanner, HardwareProfile

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+?= :"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<eos>": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def build_model(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=None,
        **overrides,
    )
    return LlamaForCausalLM(config)


def count_reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [float(sum(token % 7 for token in ids) % 5) for ids in completion_ids]


def build_trainer(
    folder: Path, *, model=None, reward=count_reward, chat: bool = True, peft: bool = False, **keys
) -> FastGRPOTrainer:
    questions = [f"what is {i}+{i}?" for i in range(32)]
    prompts = [[{"role": "user", "content": q}] for q in questions] if chat else questions
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = FastGRPOTrainer(
        model or build_model(),
        reward,
        FastGRPOConfig(str(folder), **(settings | keys)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:8]}),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
    )
    if keys.get("speculation", "auto") == "auto":  # a machine on which speculation pays, without timing this one
        grid = (1, 2, 4, 8, 16, 32, 64)
        flat = HardwareProfile(num_tokens=grid, target_s=(1.0,) * 7, draft_s=(1e-3,) * 7, sample_s=1e-6)
        trainer.engine.planner = AutoPlanner(flat)
    return trainer


class FusedRollouts(TrainerCallback):
    """Whether rollouts were decoded by our kernels, step by step."""

    def __init__(self, trainer: FastGRPOTrainer) -> None:
        self.seen: list[bool] = []
        self._is_fused = False
        trainer.engine.on_step.append(
            lambda record: setattr(self, "_is_fused", trainer.engine.target._fused is not None)
        )

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.seen.append(self._is_fused)
        self._is_fused = False


def weights_of(trainer: FastGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"weights differ: {different[:3]}"


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_trls_defaults_keep_the_kernels(tmp_path: Path, peft: bool, bf16: bool, tie_word_embeddings: bool) -> None:
    """Gradient checkpointing is one of them, and leaves a hook at the embeddings; bfloat16 around float32 another."""
    model = build_model(tie_word_embeddings=tie_word_embeddings)
    trainer = build_trainer(tmp_path, model=model, max_steps=2, speculation="off", peft=peft, bf16=bf16)
    trainer.add_callback(fused := FusedRollouts(trainer))
    trainer.train()
    assert trainer.args.gradient_checkpointing and fused.seen == [True, True]
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("peft", [False, True])
def test_speculation_leaves_training_bit_identical(tmp_path: Path, peft: bool) -> None:
    ends, drafted = {}, {}
    for speculation in ("off", "fixed", "auto"):
        trainer = build_trainer(tmp_path / speculation, speculation=speculation, peft=peft)
        start = weights_of(trainer)
        trainer.train()
        ends[speculation] = weights_of(trainer)
        rows = trainer.state.log_history
        drafted[speculation] = sum(row.get("plan/num_draft_tokens") or 0 for row in rows)
        assert any(not torch.equal(start[name], value) for name, value in ends[speculation].items()), (
            "nothing was learnt"
        )
    assert_same_weights(ends["off"], ends["fixed"])
    assert_same_weights(ends["off"], ends["auto"])
    assert drafted["off"] == 0 and drafted["fixed"] > 0 and drafted["auto"] > 0


@pytest.mark.parametrize("drafter", ["eagle", "block"])
def test_a_head_learns_without_neftunes_noise(tmp_path: Path, drafter: str) -> None:
    """Its hook knows rows alone, and draws from the generator that the update draws from."""
    ends = []
    for speculation in ("off", "fixed"):
        keys = {"speculation": speculation, "drafter": drafter, "neftune_noise_alpha": 5.0, "max_steps": 2}
        trainer = build_trainer(tmp_path / speculation, **keys)
        trainer.train()
        ends.append(weights_of(trainer))
    assert_same_weights(*ends)
    assert trainer.state.log_history[0]["draft/num_updates"] > 0


@pytest.mark.parametrize(
    "keys",
    [
        {"num_iterations": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "loss_type": "grpo"},
        {"loss_type": "dr_grpo", "beta": 0.04, "peft": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"chat": False, "eval_strategy": "steps", "eval_steps": 2, "drafter": "ngram", "max_num_seqs": 3},
    ],
)
def test_trl_settings_keep_their_meaning(tmp_path: Path, keys: dict) -> None:
    ends = []
    for speculation in ("off", "fixed"):
        trainer = build_trainer(tmp_path / speculation, speculation=speculation, **keys)
        trainer.train()
        ends.append(weights_of(trainer))
    assert_same_weights(*ends)
    assert any((row.get("draft/num_tokens") or 0) > 0 for row in trainer.state.log_history) or "drafter" in keys
    logged = {key for row in trainer.state.log_history for key in row}
    assert {
        "rollout/spec_accept_length",
        "rollout/tokens_per_s",
        "rollout/cache_peak_bytes",
        "time/rollout_share",
        "plan/num_draft_tokens",
    } <= logged


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_resume_continues_where_it_stopped(tmp_path: Path, eval_strategy: str) -> None:
    """Also where the checkpoint's step has been evaluated, which a resumed run does not do again."""
    keys = {"eval_strategy": eval_strategy, "eval_steps": 1, "per_device_eval_batch_size": 8}
    whole = build_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, **keys)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = build_trainer(tmp_path / "resumed", **keys)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights_of(whole), weights_of(resumed))
    assert not list(checkpoint.rglob("*.pkl")) and (checkpoint / "fastgrpo" / "head" / "model.safetensors").exists()


def test_each_train_has_noise_of_its_own_and_resuming_repeats_that_of_its_run(tmp_path: Path) -> None:
    """Also in a process that has drawn for the same step before, and of a checkpoint of the second `train`."""
    keys = {"speculation": "off", "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.0}
    drawn: list[list[int]] = []

    def note(completion_ids: list[list[int]], **_: object) -> list[float]:
        drawn.append(completion_ids)
        return count_reward(completion_ids)

    def train(trainer: FastGRPOTrainer, checkpoint: Path | None = None) -> list[list[int]]:
        drawn.clear()
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return list(drawn)

    trainer = build_trainer(tmp_path / "run", reward=note, **keys)
    first = train(trainer)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert train(trainer, checkpoint) == first[1:]
    second = train(trainer)
    assert [one != other for one, other in zip(first, second, strict=True)] == [True, True]
    assert train(build_trainer(tmp_path / "other", reward=note, **keys), checkpoint) == second[1:]
    assert train(trainer) not in (first, second)


@pytest.mark.parametrize("drafter", ["auto", "block"])
def test_other_drafters_leave_training_bit_identical_and_go_on(tmp_path: Path, drafter: str) -> None:
    plain = build_trainer(tmp_path / "off", speculation="off")
    plain.train()
    keys = {"speculation": "fixed", "drafter": drafter}
    whole = build_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, **keys)
    whole.train()
    resumed = build_trainer(tmp_path / "resumed", **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for each in (whole, resumed):
        assert_same_weights(weights_of(plain), weights_of(each))
    steps = [row for row in whole.state.log_history if "reward" in row]
    assert steps[0]["draft/num_tokens"] > 0, "later ones may have an update longer than its share to pay for"
    assert all((row["draft/num_tokens"] > 0) == (row["draft/num_updates"] > 0) for row in steps)
    shares = {key for row in whole.state.log_history for key in row if key.startswith("draft/share_")}
    assert shares == ({"draft/share_eagle", "draft/share_ngram", "draft/share_joined"} if drafter == "auto" else set())


def test_head_optimiser_and_planner_are_restored(tmp_path: Path) -> None:
    whole = build_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    whole.train()
    restored = build_trainer(tmp_path / "other")
    load_state(tmp_path / "run" / "checkpoint-2" / "fastgrpo", restored.engine, restored.learner)
    assert isinstance(whole.engine.drafter, EagleDrafter) and isinstance(restored.engine.drafter, EagleDrafter)
    heads = [trainer.engine.drafter.head.state_dict() for trainer in (whole, restored)]
    for head in heads:
        head.pop("lm_head.weight")  # always the policy's own rows, and the two policies differ here
    assert_same_weights(*heads)
    first, second = whole.learner.state_dict(), restored.learner.state_dict()
    assert first["num_updates"] == second["num_updates"] > 0
    assert torch.equal(first["token_counts"], second["token_counts"])
    for index, moments in first["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second["optimizer"]["state"][index][name])
    assert json.dumps(whole.engine.planner.state_dict()) == json.dumps(restored.engine.planner.state_dict())


DRAFTERS = ("eagle", "block", "ngram", "auto")


@pytest.mark.parametrize("before", DRAFTERS)
def test_another_drafter_begins_anew_and_leaves_training_as_it_is(tmp_path: Path, before: str) -> None:
    whole = build_trainer(tmp_path / "run", speculation="fixed", drafter=before, save_strategy="steps", save_steps=3)
    whole.train()
    for drafter in set(DRAFTERS) - {before}:
        resumed = build_trainer(tmp_path / drafter, speculation="fixed", drafter=drafter)
        with pytest.warns(UserWarning, match=f"the drafter '{drafter}' begins anew: .* is of '{before}'"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        assert_same_weights(weights_of(whole), weights_of(resumed))


def test_damaged_state_is_named(tmp_path: Path) -> None:
    build_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "fastgrpo" / "head" / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="head"):
        build_trainer(tmp_path / "other").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1166784 vs 1166676"),
    ],
    ids=["ours", "safetensors", "torch"],
)
def test_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = build_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler

    def fill_disk(output_dir: str) -> None:
        if trainer.state.global_step == 2:
            raise error
        save(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fill_disk)
    with pytest.raises(OSError, match=r"No space left|checkpoint-2 could not be written .* MiB are free") as caught:
        trainer.train()
    assert "earlier checkpoints are untouched" in caught.value.__notes__[0]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    build_trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError])
def test_what_comes_behind_a_checkpoint_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    """Ctrl-C while older checkpoints are removed, or a hub that does not answer: the new one is all there is."""
    trainer = build_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, save_total_limit=1)

    def remove(**_: object) -> None:
        if trainer.state.global_step == 2:
            shutil.rmtree(tmp_path / "run" / "checkpoint-1")
            raise error

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", remove)
    with pytest.raises(error) as caught:
        trainer.train()
    assert "checkpoint-2 is whole" in caught.value.__notes__[0]
    build_trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_process_that_does_not_write_the_checkpoint_removes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(tmp_path / "run", save_strategy="steps", save_steps=1)
    monkeypatch.setattr(FastGRPOConfig, "should_save", False)

    def fill_disk(folder: str) -> None:
        Path(folder).mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", fill_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer.train()
    assert "may be incomplete" in caught.value.__notes__[0]
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_interrupt_in_a_rollout_leaves_the_model_whole(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "run", peft=True)
    before = weights_of(trainer)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    trainer.engine.on_step.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_weights(before, weights_of(trainer))
    assert trainer.model.training and not trainer.engine.scheduler.has_work
    trainer.engine.on_step.remove(interrupt)
    trainer.train()


def test_wrong_rewards_are_named(tmp_path: Path) -> None:
    def too_few(completions: list, **_: object) -> list[float]:
        return [1.0] * (len(completions) - 1)

    def broken(completions: list, **_: object) -> list[float]:
        raise RuntimeError("judge unreachable")

    for reward, message in ((too_few, "too_few.* returned 7"), (broken, "judge unreachable")):
        with pytest.raises((ValueError, RuntimeError), match=message) as caught:
            build_trainer(tmp_path / "run", reward=reward).train()
        assert reward.__name__ in caught.value.__notes__[0]


async def async_reward(completions: list, **_: object) -> list[float]:
    return [float(len(c[0]["content"])) for c in completions]


def test_several_rewards_sync_and_async(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "run", reward=[count_reward, async_reward], max_steps=1)
    trainer.train()
    assert "rewards/async_reward/mean" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_vllm": True}, "use_vllm"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_p": 0.1}, "min_p"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True is not supported .* casts the trained weights"),
        ({"fp16_full_eval": True}, "fp16_full_eval=True is not supported .* casts the trained weights"),
        ({"temperature": 0.0}, "temperature=0.0 .* use a small one"),
        ({"temperature": -1.0}, "temperature=-1.0 .* use a small one"),
        ({"top_k": -1}, "top_k must be >= 0, got -1; use 0"),
        ({"top_p": 0.0}, "top_p must be in .*, got 0.0; use 1"),
        ({"speculation": "maybe"}, "speculation"),
        ({"draft_time_share": 1.5}, "draft_time_share"),
        ({"draft_learning_rate": 0.0}, "draft_learning_rate"),
        ({"draft_loss": "mse"}, "draft_loss must be one of kl, kl\\+tv, lk, overlap, coupled; got 'mse'"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"speculation": "fixed", "draft_depth": 9, "num_draft_tokens": 3}, "draft_depth"),
        ({"drafter": "no-such-folder"}, "drafter"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path / "run", **keys)


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_new_tokens", 4), ("min_p", 0.2), ("suppress_tokens", [5]), ("num_beams", 2), ("typical_p", 0.5)],
)
def test_what_the_model_asks_of_generate_is_obeyed_or_refused(tmp_path: Path, name: str, value: object) -> None:
    """TRL's generation takes from the model what the trainer's settings leave open."""
    model = build_model()
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"{name}=.* in the model's generation_config.* set model.generation_config"):
        build_trainer(tmp_path / "run", model=model, speculation="off")
    model = build_model()
    model.generation_config.update(top_k=3, max_new_tokens=4, temperature=0.1, repetition_penalty=1.5)
    model.generation_config.begin_suppress_tokens = []
    own, open_ = (
        build_trainer(tmp_path / "run", model=model, speculation="off", **keys)._build_params(1)[0]
        for keys in ({}, {"top_k": None, "max_completion_length": None})
    )
    assert (own.top_k, own.max_tokens, own.temperature) == (0, 10, 1.0)
    assert (open_.top_k, open_.max_tokens) == (3, 4)


def test_generation_settings_changed_in_a_run_hold_from_the_next_rollout(tmp_path: Path) -> None:
    """As in TRL, whose generation reads `trainer.generation_config` anew each time."""
    trainer = build_trainer(tmp_path / "run", speculation="off")
    trainer.generation_config.update(max_new_tokens=3, temperature=0.5, top_k=2, top_p=0.9)
    changed = trainer._build_params(1)[0]
    assert (changed.max_tokens, changed.temperature, changed.top_k, changed.top_p) == (3, 0.5, 2, 0.9)
    trainer.generation_config.do_sample = False
    assert trainer._build_params(1)[0].temperature == 0


def test_what_was_drawn_at_another_temperature_is_scored_in_the_update(tmp_path: Path) -> None:
    equal = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    trainer = build_trainer(tmp_path / "run", speculation="off", reward=equal, max_steps=1)
    trainer.generation_config.temperature = 0.2
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["update/unscored_share"] == 0
    assert logged["sampling/sampling_logp_difference/mean"] is None, "nothing to compare"


@pytest.mark.parametrize("place", ["train", "eval", "eval of several"])
def test_images_are_refused_before_the_run(tmp_path: Path, place: str) -> None:
    plain = Dataset.from_dict({"prompt": ["a"] * 8})
    pictured = plain.add_column("image", [None] * 8)
    train = pictured if place == "train" else plain
    evaluated = {"train": None, "eval": pictured, "eval of several": {"first": plain, "second": pictured}}[place]
    with pytest.raises(ValueError, match="column 'image', and image inputs are not supported"):
        FastGRPOTrainer(
            build_model(), count_reward, FastGRPOConfig(str(tmp_path), bf16=False, use_cpu=True), train, evaluated,
            build_tokenizer(),
        )  # fmt: skip


def test_arguments_may_be_given_by_place_as_in_trl(tmp_path: Path) -> None:
    data, tokenizer = Dataset.from_dict({"prompt": ["a"] * 8}), build_tokenizer()
    args = FastGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    trainer = FastGRPOTrainer(build_model(), count_reward, args, data, None, tokenizer)
    assert trainer.train_dataset is data and trainer.processing_class is tokenizer


def test_foreign_config_is_refused(tmp_path: Path) -> None:
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="FastGRPOConfig"):
        FastGRPOTrainer(build_model(), count_reward, GRPOConfig(str(tmp_path), bf16=False, use_cpu=True))


def test_learning_takes_a_share_of_the_step_and_of_what_it_saves() -> None:
    clock = StepClock(lambda key, value: None)
    clock.rollout_s, clock.reward_s = 8.0, 2.0
    assert clock.budget_s(0.1) == pytest.approx(1.0), "of the step so far"
    assert clock.budget_s(0.9) == pytest.approx(2.0), "a quarter of the rollout at most"
    assert clock.budget_s(0.1, saved_s=0.6) == pytest.approx(0.3), "half of what was saved"
    assert clock.budget_s(0.1, saved_s=-5.0) == 0
    assert clock.budget_s(0.1, saved_s=50.0) == pytest.approx(1.0)


def test_an_update_longer_than_its_budget_is_paid_for_by_later_steps() -> None:
    """The share holds over many steps; where nothing is saved learning goes on, seldom."""
    for update_s, budget_s, expected in ((0.25, 0.03, 0.03), (0.25, 0.0, 0.005), (0.02, 0.03, 0.02)):
        clock = StepClock()
        clock._last_step_s = 1.0
        for _ in range(1000):
            clock.pay(budget_s)
            if not clock.owes:
                clock.charge(update_s)
        assert clock.learn_s / 1000 == pytest.approx(expected, abs=3 * update_s / 1000)


def test_what_the_first_learning_prepares_and_what_hides_is_not_owed() -> None:
    clock = StepClock()
    for owed_s in (None, 0.0, 0.0):
        clock.pay(0.0)
        assert not clock.owes
        clock.charge(0.25, owed_s=owed_s)
    assert not clock.owes and clock.learn_s == 0.75
    clock.charge(0.25)
    for is_paid in (False, False, True):
        clock.pay(0.1)
        assert clock.owes != is_paid
