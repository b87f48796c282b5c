"""Online draft learning: the head learns from what the target already computed in its rollouts.

No target forward is needed: features and final hidden states were kept when tokens were verified. The
head is unrolled on its own outputs, as when it drafts (training-time test of EAGLE-3, arXiv:2503.01840),
and learns the target's distribution at the rollout's temperature by one of the losses in
`fastgrpo.draft_loss`. All completions teach, zero-variance groups included. How each kind of head learns
from a rollout is said in `fastgrpo.objective`.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fastgrpo.memory import describe_error, is_out_of_memory
from fastgrpo.objective import build_objective

_BATCH_PAIRS = 256  # pairs of one optimiser step
_WARMUP_UPDATES, _YOUNG_UPDATES = 20, 300
_NEW_RATE, _TRAINED_RATE = 2e-3, 3e-4
_MOST_NEW_BYTES = 2 * 2**30  # limit for rollouts that are still to be learnt from; they lie in the device's memory
_NUM_REPLAYS = 3  # passes over new and kept rollouts, after the first, which is over the new ones alone


@dataclass(frozen=True, kw_only=True)
class LearnReport:
    """What one call of `Learner.learn` did."""

    loss: float  # mean loss over tokens at the first unroll step; NaN without an update
    num_tokens: int  # completion tokens learnt from, repetitions counted
    num_updates: int
    num_skipped: int  # batches with a non-finite loss or gradient or without memory, rollouts with non-finite features
    learn_s: float
    free_s: float  # the part of `learn_s` that did not lengthen the run
    held_out_loss: float  # of the head before it learnt, on the new rollouts, over all unroll steps; NaN without any
    effort: float  # share of the budget that was allowed, in (0, 1]
    is_rolled_back: bool  # the head had become worse than the best one so far, which has replaced it


class Lesson:
    """One bout of learning, a piece at a time: the head is judged on rollouts it has not learnt from, then taught.

    It is taught the new rollouts once, then up to three times these and all that were kept. Pieces may run beside
    decoding, in another thread: what drafts changes with `Learner.finish` alone.

    Attributes:
        learn_s: seconds of all pieces.
        updates_s: seconds of each update tried.
        free_s: the part of `learn_s` that did not lengthen the run; set by the caller, who knows.
        effort: see `LearnReport`.
    """

    def __init__(self, learner: Learner, rollouts: list[FinishedRollout], replay: list[FinishedRollout]) -> None:
        self.rollouts = rollouts
        self.learn_s = self.free_s = 0.0
        self.updates_s: list[float] = []
        self.num_skipped = 0
        self.effort = learner.control.effort
        self._judged: tuple[float, bool] = (math.nan, False)  # loss on the new rollouts, rolled back
        self._losses: list[float] = []
        self._num_tokens = 0
        self._pieces = self._list_pieces(learner, replay)

    @property
    def num_updates(self) -> int:
        """Updates made; batches that were skipped do not count."""
        return len(self._losses)

    @property
    def slowest_s(self) -> float:
        """Seconds of the longest update."""
        return max(self.updates_s, default=0.0)

    def advance(self) -> bool:
        """Do the next piece; False where none was left."""
        started = time.perf_counter()
        try:
            return next(self._pieces, None) is not None
        finally:
            self.learn_s += time.perf_counter() - started

    def build_report(self) -> LearnReport:
        return LearnReport(
            loss=sum(self._losses) / len(self._losses) if self._losses else math.nan,
            num_tokens=self._num_tokens,
            num_updates=self.num_updates,
            num_skipped=self.num_skipped,
            learn_s=self.learn_s,
            free_s=self.free_s,
            held_out_loss=self._judged[0],
            effort=self.effort,
            is_rolled_back=self._judged[1],
        )

    def _list_pieces(self, learner: Learner, replay: list[FinishedRollout]) -> Iterator[bool]:
        """The pieces: each does its work when it is asked for, and yields True."""
        loss, judgement = learner.judge(self.rollouts)
        self.effort, self._judged = judgement.effort, (loss, judgement.outcome is Outcome.ROLL_BACK)
        yield True
        for kept in ((), *(replay,) * _NUM_REPLAYS):
            for batch in learner.shuffle([*self.rollouts, *kept]):
                started = time.perf_counter()
                loss, num_tokens = learner.update(batch)
                self.updates_s.append(time.perf_counter() - started)
                if math.isfinite(loss):
                    self._losses.append(loss)
                    self._num_tokens += num_tokens
                else:
                    self.num_skipped += 1
                yield True


class Learner:
    """Trains the head of a drafter within a time budget.

    Args:
        drafter: its head is trained in float32; the drafting copy is refreshed afterwards.
        learning_rate: of AdamW, constant after a short warm-up; None takes 2e-3 for a new head and 3e-4 for
            one that was trained before, which a larger rate makes worse.
        loss: name of the loss, see `fastgrpo.draft_loss`.
        max_replay_bytes: limit for rollouts kept for replay; the oldest are dropped first.
        seed: of the learner's own generator; the run's generators are never touched.

    Raises:
        ValueError: the learning rate is not a positive number, or the loss is unknown.
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
        self.update_s: float | None = None  # seconds of an update that runs alone; None until measured
        self._is_prepared = False  # a first lesson, slower than others, has been given: times may be measured
        self.rate_scale = 1.0  # halved by each roll-back
        self._warm_from = 0  # `num_updates` when the optimiser was last started: the warm-up counts from there
        self._num_dropped = 0  # rollouts with non-finite features or unseen ones, since the last report
        self._reference: list[Tensor] | None = None  # weights of the best head so far
        self._new: deque[FinishedRollout] = deque()
        self._replay: deque[FinishedRollout] = deque()
        self._token_counts = torch.zeros(drafter.target.vocab_size, dtype=torch.int64)
        self._has_counted = False  # whether tokens were counted since the vocabulary was last chosen
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
        """Whether the head began untrained and has hardly learnt yet: the time it takes now is saved later."""
        return not self.drafter.was_trained and self.num_updates < _YOUNG_UPDATES

    def add(self, rollout: FinishedRollout) -> None:
        """Take a finished rollout; a listener for `Engine.on_finish`. Rollouts with non-finite features are dropped,
        and those that there is no memory to look at.

        Where the rollouts that wait to be learnt from exceed their memory limit, the oldest are dropped.
        """
        if rollout.features is None or len(rollout.features) < 2:
            return
        if _is_finite(rollout.features):
            self._new.append(rollout)
            _drop_oldest((self._new,), max(_MOST_NEW_BYTES, self.max_replay_bytes))
            self._has_counted = True
            self._token_counts += torch.bincount(torch.tensor(rollout.token_ids), minlength=len(self._token_counts))
        else:
            self._num_dropped += 1

    def learn(
        self,
        budget_s: float,
        *,
        max_updates: int | None = None,
        is_free: Callable[[], bool] = lambda: False,
        lesson: Lesson | None = None,
    ) -> LearnReport:
        """Judge the head on the new rollouts; learn from them, then from replayed ones while time is left.

        At least one update is tried, whatever the budget, so that learning never stops silently. Where memory runs out,
        a warning says so and the lesson ends: what the run is for goes on.

        Args:
            budget_s: seconds that updates may take; where learning does not help, only a part of them is used.
            max_updates: limit on updates, reduced in the same way; None leaves it to the time.
            is_free: whether the machine would be idle now: what is then learnt is not charged to the budget.
            lesson: one that `begin` returned, pieces of which may be done already; None begins one.
        """
        started = time.perf_counter()
        self.choose_vocabulary()
        lesson, num_before = lesson or self.begin(), len(lesson.updates_s) if lesson else 0
        lesson.learn_s += time.perf_counter() - started
        is_still_free = is_free()
        while lesson.num_updates < (math.inf if max_updates is None else max(1, round(max_updates * lesson.effort))):
            expected_s = lesson.learn_s - lesson.free_s + lesson.slowest_s
            if lesson.updates_s and not is_still_free and expected_s > budget_s * lesson.effort:
                break
            before_s = lesson.learn_s
            if not _advance(lesson):
                break
            is_still_free = is_still_free and is_free()
            if is_still_free:
                lesson.free_s += lesson.learn_s - before_s
        own_s = lesson.updates_s[num_before:]
        if self._is_prepared and own_s:
            self.update_s = statistics.median(own_s)
        self._is_prepared = self._is_prepared or bool(own_s)
        return self.finish(lesson)

    def begin(self) -> Lesson:
        """Begin a lesson on the rollouts that are new now; `finish` ends it."""
        rollouts = list(self._new)
        self._new.clear()
        return Lesson(self, rollouts, list(self._replay))

    def finish(self, lesson: Lesson) -> LearnReport:
        """Keep the lesson's rollouts for replay, and let the drafter use what the head has learnt."""
        started = time.perf_counter()
        self._replay.extend(lesson.rollouts)
        self.keep()
        self.drafter.refresh()
        lesson.learn_s += time.perf_counter() - started
        lesson.num_skipped += self._num_dropped
        self._num_dropped = 0
        return lesson.build_report()

    def put_back(self, lesson: Lesson) -> None:
        """Give up a lesson: its rollouts count as new again."""
        self._new.extendleft(reversed(lesson.rollouts))

    def choose_vocabulary(self) -> None:
        """Make the most frequent tokens of rollouts the draft vocabulary, from the next `finish` on."""
        if self._has_counted:
            self._has_counted = False
            self.drafter.select_vocabulary(self._token_counts.to(self.drafter.target.device))

    def keep(self) -> None:
        """Drop the oldest rollouts, learnt from or not, until the others are within `max_replay_bytes`."""
        _drop_oldest((self._replay, self._new), self.max_replay_bytes)

    @float32_products()
    @torch.no_grad()
    def judge(self, rollouts: list[FinishedRollout]) -> tuple[float, Judgement]:
        """The head's loss on rollouts that it has not learnt from, and what was done about it: see `LearningControl`.

        The head is kept, or becomes the reference, or is replaced by the reference, with a new optimiser and half the
        learning rate.
        """
        if not rollouts:
            return math.nan, Judgement(Outcome.KEEP, self.control.effort)
        stride = max(1, sum(self.objective.count_rows(rollout) for rollout in rollouts) // _BATCH_PAIRS)
        batch = self.objective.collate(self._pack(rollouts[::stride])[0], self._dtype)
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
        """Loss of a head with these weights, with its unroll steps weighted as in training."""
        losses = self.objective.compute_losses(self._fill_working(weights), batch)
        return float(self.objective.weigh(losses))

    def _fill_working(self, weights: list[Tensor]) -> nn.Module:
        """The working copy with these weights; output rows are the drafter's own, as they are now."""
        _copy(weights, _trained(self._working))
        self._working.lm_head = self.drafter.head.lm_head
        return self._working

    def shuffle(self, rollouts: list[FinishedRollout]) -> list[list[FinishedRollout]]:
        """These rollouts in random order, in batches of about `_BATCH_PAIRS` pairs."""
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
        for group in self._optimizer.param_groups:
            warmth = min(1.0, (self.num_updates + 1 - self._warm_from) / _WARMUP_UPDATES)
            group["lr"] = self.learning_rate * self.rate_scale * warmth
        self._step()
        self.num_updates += 1
        return float(losses[0].detach()), self.objective.count_taught(batch)

    def _step(self) -> None:
        """A step of the optimiser; one that breaks off while it makes room for moments may be made again.

        AdamW takes a parameter that has half of them for one that has both.
        """
        try:
            self._optimizer.step()
        except BaseException:
            state = self._optimizer.state
            for parameter in [parameter for parameter, own in state.items() if "exp_avg_sq" not in own]:
                del state[parameter]
            raise

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator, counters, reference weights and rollouts; the head itself is saved by its drafter."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "token_counts": self._token_counts,
            "num_updates": self.num_updates,
            "rate_scale": self.rate_scale,
            "warm_from": self._warm_from,
            "control": self.control.state_dict(),
            "reference": self._reference,
            "replay": [*self._replay, *self._new],
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


def _is_finite(features: Tensor) -> bool:
    """Whether all of them are; False where there is no memory to look: the rollout they are of goes on."""
    try:
        return bool(torch.isfinite(features).all())
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False


def _advance(lesson: Lesson) -> bool:
    """Do the lesson's next piece; False where none was left, or where there is no memory for it."""
    try:
        return lesson.advance()
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lesson.num_skipped += 1
        warnings.warn(
            f"the draft head learns no more from this rollout, memory ran out ({describe_error(error)}): shorter "
            "completions or a smaller draft would leave room, draft_time_share=0 stops its learning",
            stacklevel=3,
        )
        return False


def _drop_oldest(queues: Sequence[deque[FinishedRollout]], most_bytes: int) -> None:
    """Drop rollouts, the first queue's before the next one's, until all queues together are within `most_bytes`."""
    num_bytes = sum(_num_bytes(rollout) for queue in queues for rollout in queue)
    for queue in queues:
        while queue and num_bytes > most_bytes:
            num_bytes -= _num_bytes(queue.popleft())


def _num_bytes(rollout: FinishedRollout) -> int:
    assert rollout.features is not None
    return rollout.features.numel() * rollout.features.element_size()


def _trained(head: nn.Module) -> list[Tensor]:
    """The parameters that are trained, always in the same order."""
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    with torch.no_grad():
        for new, old in zip(source, target, strict=True):
            old.copy_(new)
