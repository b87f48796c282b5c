"""Online draft learning: after a rollout, the head learns from what the target already computed.

No target forward: features and final hidden states were kept when tokens were verified. The head is
unrolled on its own outputs as it is when it drafts (training-time test of EAGLE-3, arXiv:2503.01840)
and follows the target's distribution at the rollout's temperature, in the sense of one of the losses of
`fastgrpo.draft_loss`. All completions teach, zero-variance groups included. How a kind of head learns
from a rollout is its objective's.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.draft_control import Judgement, LearningControl, Outcome
from fastgrpo.draft_loss import DEFAULT_LOSS, LossName
from fastgrpo.drafters.drafter import TrainableDrafter
from fastgrpo.engine import FinishedRollout
from fastgrpo.head_training import pack
from fastgrpo.kernels.half import float32_products
from fastgrpo.objective import build_objective

_BATCH_PAIRS = 256  # pairs of one optimiser step
_WARMUP_UPDATES, _YOUNG_UPDATES = 20, 300
_NEW_RATE, _TRAINED_RATE = 2e-3, 3e-4


@dataclass(frozen=True, kw_only=True)
class LearnReport:
    """What one call of `Learner.learn` did."""

    loss: float  # the learner's loss at the first unroll step, mean over tokens
    num_tokens: int  # completion tokens learnt from, repetitions counted
    num_updates: int
    num_skipped: int  # batches with a non-finite loss or gradient, and rollouts with such features
    learn_s: float
    held_out_loss: float  # of the head as it came, on new rollouts before they were learnt from; all unroll steps
    effort: float  # share of the budget that was allowed, in (0, 1]
    is_rolled_back: bool  # the head had got worse than the best so far, which took its place


class Learner:
    """Trains the head of a drafter within a time budget.

    Args:
        drafter: its head is trained in float32; the drafting copy is refreshed afterwards.
        learning_rate: of AdamW, constant after a short warm-up; None takes 2e-3 for a new head and 3e-4 for
            one that was trained before, which a larger rate makes worse.
        loss: what the head is trained for, see `DraftLoss`.
        max_replay_bytes: rollouts kept for replay; the oldest go first.
        seed: of the replay's own generator; the run's generators are never touched.
    """

    def __init__(
        self,
        drafter: TrainableDrafter,
        *,
        learning_rate: float | None = None,
        loss: LossName = DEFAULT_LOSS,
        max_replay_bytes: int = 256 * 2**20,
        seed: int = 0,
    ) -> None:
        if learning_rate is None:
            learning_rate = _TRAINED_RATE if drafter.was_trained else _NEW_RATE
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"draft_learning_rate must be a positive number, got {learning_rate}")
        self.drafter = drafter
        self.objective = build_objective(drafter, loss)
        self.learning_rate = learning_rate
        self.max_replay_bytes = max_replay_bytes
        self.control = LearningControl()
        self.num_updates = 0
        self.rate_scale = 1.0  # halved by each roll-back
        self._warm_from = 0  # update that the optimiser was last started at
        self._num_dropped = 0
        self._reference: list[Tensor] | None = None  # weights of the best head so far
        self._new: list[FinishedRollout] = []
        self._replay: deque[FinishedRollout] = deque()
        self._token_counts = torch.zeros(drafter.target.vocab_size, dtype=torch.int64, device=drafter.target.device)
        self._generator = torch.Generator().manual_seed(seed)
        half = drafter.target.dtype in (torch.bfloat16, torch.float16)
        self._working = copy.deepcopy(drafter.head).to(torch.bfloat16 if half else torch.float32)
        self._dtype = next(self._working.parameters()).dtype
        self._optimizer = torch.optim.AdamW(
            _trained(drafter.head),
            lr=learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )

    @property
    def is_young(self) -> bool:
        """The head began from nothing and has hardly learnt yet: what it costs now, it saves later."""
        return not self.drafter.was_trained and self.num_updates < _YOUNG_UPDATES

    def add(self, rollout: FinishedRollout) -> None:
        """Take a finished rollout; an engine's `on_finish` listener. Features that overflowed teach nothing."""
        if rollout.features is None or len(rollout.features) < 2:
            return
        if bool(torch.isfinite(rollout.features).all()):
            self._new.append(rollout)
        else:
            self._num_dropped += 1

    def learn(self, budget_s: float, *, max_updates: int | None = None) -> LearnReport:
        """Judge the head on the new rollouts; learn from them, then from replayed ones while time is left.

        At least one update is made, whatever the budget, so that learning never stops silently.

        Args:
            budget_s: seconds that updates may take; where learning does not help, only a part of them is used.
            max_updates: updates at most, of which a part as well; None leaves it to the time.
        """
        started = time.perf_counter()
        if self._new:
            self._count_tokens()
            self.drafter.select_vocabulary(self._token_counts)
        held_out_loss, judgement = self._judge()
        budget_s *= judgement.effort
        most = math.inf if max_updates is None else max(1, round(max_updates * judgement.effort))
        losses: list[float] = []
        num_tokens = num_updates = 0
        num_skipped, self._num_dropped = self._num_dropped, 0
        slowest = 0.0
        for batch in self._schedule():
            before = time.perf_counter()
            if (losses and before - started + slowest > budget_s) or num_updates >= most:
                break
            loss, count = self.update(batch)
            slowest = max(slowest, time.perf_counter() - before)
            num_skipped += not math.isfinite(loss)
            if math.isfinite(loss):
                losses.append(loss)
                num_tokens += count
                num_updates += 1
        self._remember()
        self.drafter.refresh()
        return LearnReport(
            loss=sum(losses) / len(losses) if losses else math.nan,
            num_tokens=num_tokens,
            num_updates=num_updates,
            num_skipped=num_skipped,
            learn_s=time.perf_counter() - started,
            held_out_loss=held_out_loss,
            effort=judgement.effort,
            is_rolled_back=judgement.outcome is Outcome.ROLL_BACK,
        )

    def keep(self) -> None:
        """Keep the new rollouts for later calls of `learn`; nothing is learnt now."""
        self._count_tokens()
        self._remember()

    def _count_tokens(self) -> None:
        """The draft vocabulary follows what rollouts say, from the next `learn` on."""
        if not self._new:
            return
        token_ids = [token_id for rollout in self._new for token_id in rollout.token_ids]
        counts = torch.bincount(torch.tensor(token_ids), minlength=len(self._token_counts))
        self._token_counts += counts.to(self._token_counts.device)

    @float32_products()
    @torch.no_grad()
    def _judge(self) -> tuple[float, Judgement]:
        """The head's loss on new rollouts, and what follows from it; done before they are learnt from."""
        if not self._new:
            return math.nan, Judgement(Outcome.KEEP, self.control.effort)
        stride = max(1, sum(self.objective.count_rows(rollout) for rollout in self._new) // _BATCH_PAIRS)
        batch = self.objective.collate(self._pack(self._new[::stride])[0], self._dtype)
        own = _trained(self.drafter.head)
        loss = self._evaluate(own, batch)
        judgement = self.control.judge(
            loss, None if self._reference is None else self._evaluate(self._reference, batch)
        )
        if judgement.outcome is Outcome.ADOPT:
            self._reference = [parameter.detach().clone() for parameter in own]
        elif judgement.outcome is Outcome.ROLL_BACK:
            assert self._reference is not None
            _copy(self._reference, own)
            self._optimizer.state.clear()
            self.rate_scale, self._warm_from = self.rate_scale / 2, self.num_updates
        return loss, judgement

    def _evaluate(self, weights: list[Tensor], batch: Any) -> float:
        """Loss of a head with these weights, its steps weighed as in training."""
        losses = self.objective.compute_losses(self._fill_working(weights), batch)
        return float(self.objective.weigh(losses))

    def _fill_working(self, weights: list[Tensor]) -> nn.Module:
        """The working copy with these weights; output rows are the drafter's own, as they are now."""
        _copy(weights, _trained(self._working))
        self._working.lm_head = self.drafter.head.lm_head
        return self._working

    def _schedule(self) -> Iterable[list[FinishedRollout]]:
        """Batches of new rollouts once, then up to three more passes over everything kept."""
        yield from self._shuffled_batches(self._new)
        for _ in range(3):
            yield from self._shuffled_batches([*self._new, *self._replay])

    def _shuffled_batches(self, rollouts: list[FinishedRollout]) -> Iterable[list[FinishedRollout]]:
        order = torch.randperm(len(rollouts), generator=self._generator).tolist()
        return self._pack([rollouts[i] for i in order])

    def _pack(self, rollouts: list[FinishedRollout]) -> list[list[FinishedRollout]]:
        return pack(rollouts, [self.objective.count_rows(rollout) for rollout in rollouts], _BATCH_PAIRS)

    @float32_products()
    def update(self, rollouts: list[FinishedRollout]) -> tuple[float, int]:
        """One optimiser step; returns the first unroll step's loss and the completion tokens used.

        A batch whose loss or gradient is not finite changes nothing and returns (nan, 0).
        """
        trained = _trained(self.drafter.head)
        head = self._fill_working(trained)
        working = _trained(head)
        for copied in working:
            copied.grad = None
        batch = self.objective.collate(rollouts, self._dtype)
        with torch.enable_grad():
            losses = self.objective.compute_losses(head, batch)
            total = self.objective.weigh(losses)
        total.backward()
        for parameter, copied in zip(trained, working, strict=True):
            assert copied.grad is not None
            parameter.grad = copied.grad.to(parameter.dtype)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not (math.isfinite(float(total.detach())) and math.isfinite(float(norm))):
            return math.nan, 0
        self.num_updates += 1
        for group in self._optimizer.param_groups:
            warmth = min(1.0, (self.num_updates - self._warm_from) / _WARMUP_UPDATES)
            group["lr"] = self.learning_rate * self.rate_scale * warmth
        self._optimizer.step()
        return float(losses[0].detach()), self.objective.count_taught(batch)

    def _remember(self) -> None:
        self._replay.extend(self._new)
        self._new = []
        while self._replay and sum(_num_bytes(r) for r in self._replay) > self.max_replay_bytes:
            self._replay.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, counters, reference and replay; the head is saved by its drafter."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "token_counts": self._token_counts,
            "num_updates": self.num_updates,
            "rate_scale": self.rate_scale,
            "warm_from": self._warm_from,
            "control": self.control.state_dict(),
            "reference": self._reference,
            "replay": list(self._replay),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        self._generator.set_state(state["generator"])
        self._token_counts.copy_(state["token_counts"])
        self.num_updates = int(state["num_updates"])
        self.rate_scale, self._warm_from = float(state["rate_scale"]), int(state["warm_from"])
        self.control.load_state_dict(state["control"])
        self._replay = deque(state["replay"])
        reference = state["reference"]
        self._reference = None if reference is None else [x.to(self.drafter.target.device) for x in reference]


def _num_bytes(rollout: FinishedRollout) -> int:
    assert rollout.features is not None
    return rollout.features.numel() * rollout.features.element_size()


def _trained(head: nn.Module) -> list[Tensor]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    with torch.no_grad():
        for new, old in zip(source, target, strict=True):
            old.copy_(new)
