"""TRL's GRPO trainer, with completions from `fastgrpo.Engine`."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from fastgrpo.disk import named_write_errors
from fastgrpo.engine import Engine
from fastgrpo.families import base_model_of
from fastgrpo.grpo.checks import check_advantages, check_columns, check_generation, check_rewards
from fastgrpo.grpo.clock import StepClock, attach_clock
from fastgrpo.grpo.config import FastGRPOConfig
from fastgrpo.grpo.draft_learning import DraftLearning
from fastgrpo.grpo.micro_batch import MicroBatch
from fastgrpo.grpo.savings import Savings
from fastgrpo.grpo.scoring import add_heads, fill_missing_gradients, score_completions
from fastgrpo.grpo.siblings import Siblings, is_regrouped, unlogged
from fastgrpo.grpo.state import is_whole, load_state, save_state
from fastgrpo.grpo.streaming import RewardStream
from fastgrpo.kernels.half import float32_products
from fastgrpo.metrics import rollout_metrics, summarise_rollout
from fastgrpo.planner import AutoPlanner, PaperPlanner
from fastgrpo.sampling import stream_key
from fastgrpo.types import SamplingParams, Timeline

_STATE_FOLDER = "fastgrpo"  # inside a checkpoint
_NOWHERE = (-1, 0)  # (global step, calls within it) of no rollout yet


class FastGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose completions come from `fastgrpo.Engine`; takes the same arguments.

    Rollouts use the policy as it is being trained, so they are on-policy and exact. The draft head learns
    while cores or a GPU are idle, otherwise between rollout and update. The head, its optimiser and the
    planner are saved with checkpoints.

    Raises:
        TypeError: `args` is not a `FastGRPOConfig`.
        ValueError: the model or a setting is not supported; names it and the remedy.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "fastgrpo"]
    _buffered_inputs: list[dict[str, Any]] | None  # TRL's: the micro-batches of a generation

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: FastGRPOConfig | None = None, *others: Any, **kwargs: Any
    ) -> None:
        if args is not None and not isinstance(args, FastGRPOConfig):
            raise TypeError(f"args must be a FastGRPOConfig, got {type(args).__name__}; it takes the same keys")
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = FastGRPOConfig(f"{str(name).rstrip('/').split('/')[-1]}-FastGRPO")
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self._check_supported()
        self.engine = Engine(
            self.accelerator.unwrap_model(self.model),
            drafter=args.drafter,
            speculation=args.speculation,
            max_num_seqs=args.max_num_seqs,
            fixed_plan=args.fixed_plan,
            compute_dtype=_compute_dtype(args),
            tokenizer=self.processing_class,
            max_cache_bytes=args.max_cache_bytes,
        )
        log = self._log_in_training
        self._clock = StepClock(log)
        self.learning = DraftLearning(args, self.engine, self._clock, log)
        self.learner = self.learning.learner
        self.reward_stream = RewardStream(self)
        self.engine.on_finish.extend([self.reward_stream.observe] if self.reward_stream.is_on else [])
        self._choose_savings()
        add_heads(self)
        self._scoring_temperature = self.temperature  # what the update divides logits by, as in TRL for the whole run
        attach_clock(self, self._clock)
        self._rollout_places = {True: _NOWHERE, False: _NOWHERE}  # by whether in training
        self._run = self._last_run = 0  # the number of this `train`, of those that began at the first step; the highest

    def _check_supported(self) -> None:
        if getattr(self, "_is_vlm", False):
            raise ValueError("vision-language models are not supported by FastGRPOTrainer; use trl.GRPOTrainer")
        check_columns(self.train_dataset, self.eval_dataset)
        self._find_generation_config()
        if self.is_fsdp_enabled or getattr(self.accelerator.state, "zero_stage", None) == 3 or _is_zero3(self):
            raise ValueError(
                "weights sharded by FSDP or DeepSpeed ZeRO-3 are not supported by FastGRPOTrainer; "
                "use DDP or ZeRO-2, or trl.GRPOTrainer"
            )

    def _choose_savings(self) -> None:
        self.savings = Savings(self)
        self._choose_siblings()

    def _choose_siblings(self) -> None:
        self.siblings = Siblings(self, is_on=self.args.group_siblings and self.savings.shares_prompts)
        self._loss_terms = self._find_loss_terms()

    def _find_loss_terms(self) -> tuple[Any, ...]:
        """What a callback may change in a run, and the savings hang on."""
        has_bonus = getattr(self, "_entropy_bonus_enabled", False)
        return self.beta != 0, has_bonus, self.top_entropy_quantile < 1, self.loss_type

    def _follow_loss(self) -> None:
        """Choose anew what the update leaves out where the loss has other terms than before."""
        if self._loss_terms != self._find_loss_terms():
            batches = self.siblings.undo(self._buffered_inputs)
            self.savings.choose_rows(self)
            self._choose_siblings()
            self._buffered_inputs = self.siblings.begin(batches, self._step)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.savings.is_of(self):  # methods were put in place since
            self._choose_savings()
        if self._buffered_inputs:
            with self.accelerator.autocast():
                self.savings.age(self._buffered_inputs, self.model)
        self._buffered_inputs = self.siblings.begin(self._buffered_inputs, self._step)
        if self._rollout_places[True] != _NOWHERE:  # as TRL goes on with the random state of the process
            self._run = self._last_run = self._last_run + 1
        self._rollout_places[True] = _NOWHERE
        return super().train(*args, **kwargs)

    @property
    def timeline(self) -> Timeline | None:
        """What the last training step did when; None before the first has ended."""
        return self._clock.timeline

    def _log_in_training(self, key: str, value: float) -> None:
        self._metrics["train"][key].append(value)

    # -- generation ----------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], None]:
        if any(images is not None for images in (args[:1] or (kwargs.get("images"),))):
            raise ValueError("image inputs are not supported by FastGRPOTrainer; use trl.GRPOTrainer")
        started = time.perf_counter()
        with (
            profiling_context(self, "fastgrpo.generate"),
            self.learning.beside(),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ),
        ):
            params = self._build_params(len(prompt_ids))
            completions = self.engine.generate(prompt_ids, params)
        if all(each.temperature == self._scoring_temperature for each in params):
            self.savings.hear(prompt_ids, completions)
        rollout_s = time.perf_counter() - started
        self._clock.rollout_s += rollout_s
        self.learning.hear_rollout()
        self._log_rollout(rollout_s)
        if not self.tools:  # after tool calls, some processes decode again and others do not
            self.learning.learn_while_others_decode()
        return [completion.token_ids for completion in completions], None

    def _generate(self, prompts: list[Any]) -> Any:
        self.savings.begin()
        output = super()._generate(prompts)
        if self.model.training:
            self.savings.line_up(*output[:3])
        return output

    def _build_params(self, count: int) -> list[SamplingParams]:
        """Parameters with noise of its own for every completion of every process, call, step and `train`; a resumed run
        draws the same noise, except that it does not repeat evaluations made before the checkpoint.
        """
        is_training: bool = self.model.training
        step, calls = self._rollout_places[is_training]
        calls = calls + 1 if step == self.state.global_step else 0
        self._rollout_places[is_training] = (self.state.global_step, calls)
        seed, place = self.args.seed, (self.state.global_step, calls, int(is_training), self.accelerator.process_index)
        for part in (*place, self._run) if self._run else place:
            seed = stream_key(seed, part)
        config = self._find_generation_config()
        return [
            SamplingParams(
                temperature=config.temperature if config.do_sample else 0.0,
                top_k=config.top_k,
                top_p=config.top_p,
                max_tokens=config.max_new_tokens or self.engine.target.max_position,
                stop_token_ids=tuple(self.eos_token_ids),
                seed=seed,
                stream=index,
            )
            for index in range(count)
        ]

    def _find_generation_config(self) -> Any:
        """What TRL's own generation would go by now: the trainer's settings, which a callback may have changed, and the
        model's where those are None.
        """
        model = base_model_of(self.accelerator.unwrap_model(self.model))
        config, _ = model._prepare_generation_config(self.generation_config)
        check_generation(config)
        return config

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.perf_counter()
        before = self._clock.rollout_s + self._clock.learn_s
        self.learning.begin(is_training=self.model.training)
        with self.reward_stream.follow(inputs):
            output = super()._generate_and_score_completions(inputs)
        if self.savings.has_own_loss:  # it may never call `_compute_loss` of this class, which checks too
            check_advantages(output["advantages"], self.state.global_step, self.reward_func_names)
        self.savings.attach(output, self.state.global_step, is_training=self.model.training)
        others_s = self._clock.rollout_s + self._clock.learn_s - before
        self._clock.reward_s += time.perf_counter() - started - others_s
        self.learning.learn()
        return output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        if self.reward_stream.complete(inputs, prompts, completions, completion_ids_list):
            self.learning.learn(is_free=self.reward_stream.is_waiting)
        try:
            with self.reward_stream.collect(self._clock.note):
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            check_rewards(rewards, self.reward_func_names)
            return rewards
        except Exception as error:
            names = ", ".join(self.reward_func_names)
            error.add_note(
                f"raised while computing rewards ({names}) at step {self.state.global_step}; nothing was trained on "
                "this batch: correct the reward function and resume from the last checkpoint"
            )
            raise

    # -- loss ----------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.model.training:
            self._follow_loss()
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or not self.siblings.is_on:
            return inputs
        batches = self._buffered_inputs = self.siblings.regroup(self._buffered_inputs or [])
        return batches[self._step % self.args.steps_per_generation]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with float32_products(enabled=self.args.float32_products):
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                with self.accelerator.autocast():
                    self.savings.fill_old_logps(self._buffered_inputs or (), self.model)
        if self.accelerator.sync_gradients and self.savings.skips_rows:
            fill_missing_gradients(self.model)
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if self.savings.has_own_loss or not (torch.is_grad_enabled() and self.model.training):
            check_advantages(inputs["advantages"], self.state.global_step, self.reward_func_names)
            return super()._compute_loss(model, inputs)
        batch = self.savings.plan(inputs, self.state.global_step)
        with unlogged(self._metrics) if is_regrouped(inputs) else contextlib.nullcontext():
            loss = super()._compute_loss(model, batch.inputs)
        for key, value in self.savings.finish(batch, self.accelerator.gather).items():
            self._metrics["train"][key].append(value)
        for known in self.siblings.keep(batch):
            self.savings.expect(known)
            with torch.no_grad():
                super()._compute_loss(model, known.inputs)  # only for what it logs
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        completion_ids = input_ids[:, -logits_to_keep:]

        def score(rows: torch.Tensor) -> torch.Tensor:
            scored: torch.Tensor = self._get_per_token_logps_and_entropies(
                model, input_ids[rows], attention_mask[rows], logits_to_keep, batch_size
            )[0]
            return scored

        if (old := self.savings.answer_old_logps(score, completion_ids, attention_mask)) is not None:
            return old, None, None
        # the router's loss needs all positions; a compiled model takes no hooks
        if compute_aux_loss or self.args.torch_compile:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **kwargs,
            )
        batch = self.savings.take_batch(completion_ids)
        logprobs, entropies = self._score_batch(model, batch, input_ids, attention_mask, batch_size)
        return logprobs, entropies if compute_entropy else None, None

    def _score_batch(
        self,
        model: Any,
        batch: MicroBatch,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        batch_size: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the batch's completions, [B, C] each, computed for the rows that it plans."""
        logprobs, entropies = batch.begin_scores()
        logits_to_keep = logprobs.shape[1]
        shares = self.savings.shares_prompts
        for part, has_gradient in batch.split(batch_size):
            with (
                float32_products(enabled=self.args.float32_products),
                self.accelerator.autocast(),
                contextlib.nullcontext() if has_gradient else torch.no_grad(),
            ):
                ids, mask = input_ids[part], attention_mask[part]
                scores = score_completions(model, ids, mask, logits_to_keep, shares_prompts=shares)
            logprobs = logprobs.index_put((part,), scores[0])
            entropies = entropies.index_put((part,), scores[1])
        if torch.is_grad_enabled() and not logprobs.requires_grad:
            logprobs.requires_grad_(True)  # no row has a gradient: TRL's backward still needs a loss that takes one
        batch.logps, batch.entropies = logprobs.detach(), entropies.detach()
        return logprobs, entropies

    def _log_rollout(self, rollout_s: float) -> None:
        mode = "train" if self.model.training else "eval"
        planner = self.engine.planner
        capacity = None
        if isinstance(planner, AutoPlanner):
            capacity = planner.profile.capacity
        elif isinstance(planner, PaperPlanner):
            capacity = planner.capacity
        summary = summarise_rollout(self.engine.records, rollout_s=rollout_s)
        for key, value in rollout_metrics(summary, capacity=capacity).items():
            self._metrics[mode][key].append(value)
        for way, share in getattr(self.engine.drafter, "way_shares", {}).items():  # only `AutoDrafter` has any
            self._metrics[mode][f"draft/share_{way}"].append(share)

    # -- checkpoints ---------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """fastgrpo's state first, then TRL's: older checkpoints are only removed once the new one is whole."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        was_whole = is_whole(folder)
        try:
            with named_write_errors(folder):
                if self.args.should_save:
                    save_state(folder / _STATE_FOLDER, self.engine, self.learner, run=self._run)
                super()._save_checkpoint(model, trial)
        except BaseException as error:  # whatever it was, a part of a checkpoint must not be taken for the last one
            if not self.args.should_save or was_whole:
                error.add_note(f"{folder} may be incomplete: this came while it was written")
            elif is_whole(folder):
                error.add_note(f"{folder} is whole: this came behind it")
            else:
                shutil.rmtree(folder, ignore_errors=True)
                error.add_note(f"{folder} could not be written and was removed; earlier checkpoints are untouched")
            raise

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / _STATE_FOLDER).is_dir():
            self._run = load_state(Path(checkpoint) / _STATE_FOLDER, self.engine, self.learner)
            self._last_run = max(self._last_run, self._run)


def _is_zero3(trainer: GRPOTrainer) -> bool:
    plugin = getattr(trainer.args, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def _compute_dtype(args: GRPOConfig) -> torch.dtype | None:
    """The type that TRL's own generation would autocast to; None where it would not."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
