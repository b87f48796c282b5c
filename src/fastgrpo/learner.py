"""Online draft learning: after a rollout, the head learns from what the target already computed.

No target forward: features and final hidden states were kept when tokens were verified. The head is
unrolled on its own outputs as it is when it drafts (training-time test of EAGLE-3, arXiv:2503.01840)
and follows the target's distribution at the rollout's temperature: Kullback-Leibler divergence plus
total variation, which bounds the acceptance under shared noise. All completions teach, zero-variance
groups included.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.attention import ForwardBatch
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.engine import FinishedRollout
from fastgrpo.model import TargetModel

_MAX_PAIRS = 1024  # of one rollout; its last ones are used
_CONTEXT_PAIRS = 32  # prompt pairs kept before the completion
_BATCH_PAIRS = 256  # pairs of one optimiser step, padding included
_UNROLL = 3  # steps on the head's own outputs
_UNROLL_DECAY = 0.8
_VARIATION_WEIGHT = 1.0  # of the total variation beside the divergence
_WARMUP_UPDATES, _YOUNG_UPDATES = 20, 300
_NEW_RATE, _TRAINED_RATE = 2e-3, 3e-4
_LOSS_CHUNK_ELEMENTS = 32 * 4096
_RANKS = 4  # sibling ranks whose acceptance is measured


@dataclass(frozen=True, kw_only=True)
class LearnReport:
    """What one call of `Learner.learn` did."""

    loss: float  # divergence (nats a token) plus total variation over the draft vocabulary, first unroll step
    num_tokens: int  # completion tokens learnt from, repetitions counted
    num_updates: int
    num_skipped: int  # batches with a non-finite loss or gradient, and rollouts with such features
    learn_s: float


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Padded rollouts: pair i joins feature i with token i + 1 and predicts token i + 2."""

    features: Float[Tensor, "B T F"]  # low, mid, high features of token i
    target_hidden: Float[Tensor, "B T H"]  # final hidden state of token i + 1
    token_ids: Int[Tensor, "B T"]  # token i + 1
    weights: Float[Tensor, "B T"]  # 1 where the predicted token belongs to the completion
    temperature: Float[Tensor, " B"]


class Learner:
    """Trains the head of an `EagleDrafter` within a time budget.

    Args:
        drafter: its head is trained in float32; the drafting copy is refreshed afterwards.
        learning_rate: of AdamW, constant after a short warm-up; None takes 2e-3 for a new head and 3e-4 for
            one that was trained before, which a larger rate makes worse.
        max_replay_bytes: rollouts kept for replay; the oldest go first.
        seed: of the replay's own generator; the run's generators are never touched.
    """

    def __init__(
        self,
        drafter: EagleDrafter,
        *,
        learning_rate: float | None = None,
        max_replay_bytes: int = 256 * 2**20,
        seed: int = 0,
    ) -> None:
        if learning_rate is None:
            learning_rate = _TRAINED_RATE if drafter.was_trained else _NEW_RATE
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"draft_learning_rate must be a positive number, got {learning_rate}")
        self.drafter = drafter
        self.learning_rate = learning_rate
        self.max_replay_bytes = max_replay_bytes
        self.num_updates = 0
        self._num_dropped = 0
        self._new: list[FinishedRollout] = []
        self._replay: deque[FinishedRollout] = deque()
        self._token_counts = torch.zeros(drafter.target.vocab_size, dtype=torch.int64, device=drafter.target.device)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(
            [p for p in drafter.head.parameters() if p.requires_grad],
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

    def learn(self, budget_s: float) -> LearnReport:
        """Learn from the new rollouts, then from replayed ones while time is left.

        At least one update is made, whatever the budget, so that learning never stops silently.
        """
        started = time.perf_counter()
        self._count_tokens()
        losses: list[float] = []
        num_tokens = num_updates = 0
        num_skipped, self._num_dropped = self._num_dropped, 0
        slowest = 0.0
        for batch in self._schedule():
            before = time.perf_counter()
            if losses and before - started + slowest > budget_s:
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
        )

    def _count_tokens(self) -> None:
        """The draft vocabulary follows what rollouts say."""
        if not self._new:
            return
        token_ids = [token_id for rollout in self._new for token_id in rollout.token_ids]
        counts = torch.bincount(torch.tensor(token_ids), minlength=len(self._token_counts))
        self._token_counts += counts.to(self._token_counts.device)
        self.drafter.select_vocabulary(self._token_counts)
        self.drafter.refresh()

    def _schedule(self) -> Iterable[list[FinishedRollout]]:
        """Batches of new rollouts once, then up to three more passes over everything kept."""
        yield from self._shuffled_batches(self._new)
        for _ in range(3):
            yield from self._shuffled_batches([*self._new, *self._replay])

    def _shuffled_batches(self, rollouts: list[FinishedRollout]) -> Iterable[list[FinishedRollout]]:
        """Rollouts of like length together, batches in random order."""
        batches: list[list[FinishedRollout]] = []
        width = 0
        for rollout in sorted(rollouts, key=_num_pairs):
            width = _num_pairs(rollout)
            if not batches or (len(batches[-1]) + 1) * width > _BATCH_PAIRS:
                batches.append([])
            batches[-1].append(rollout)
        for index in torch.randperm(len(batches), generator=self._generator).tolist():
            yield batches[index]

    def update(self, rollouts: list[FinishedRollout]) -> tuple[float, int]:
        """One optimiser step; returns the first unroll step's loss and the completion tokens used.

        A batch whose loss or gradient is not finite changes nothing and returns (nan, 0).
        """
        head, target = self.drafter.head, self.drafter.target
        batch = _collate(rollouts, target.hidden_size, target.device)
        with torch.enable_grad(), _autocast(target):
            losses = compute_draft_losses(head, self.drafter, batch)
            total = torch.stack([_UNROLL_DECAY**k * loss for k, loss in enumerate(losses)]).sum()
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in head.parameters() if p.requires_grad], 1.0)
        if not (math.isfinite(float(total.detach())) and math.isfinite(float(norm))):
            return math.nan, 0
        self.num_updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, self.num_updates / _WARMUP_UPDATES)
        self._optimizer.step()
        return float(losses[0].detach()), int(batch.weights.sum())

    def _remember(self) -> None:
        self._replay.extend(self._new)
        self._new = []
        while self._replay and sum(_num_bytes(r) for r in self._replay) > self.max_replay_bytes:
            self._replay.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, generator and counters; the head is saved by its drafter, the replay is not saved."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "token_counts": self._token_counts,
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        self._generator.set_state(state["generator"])
        self._token_counts.copy_(state["token_counts"])
        self.num_updates = int(state["num_updates"])


def _autocast(target: TargetModel) -> contextlib.AbstractContextManager[None]:
    """Half-precision products where the target computes so."""
    half = target.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(target.device.type, torch.bfloat16) if half else contextlib.nullcontext()


def _num_pairs(rollout: FinishedRollout) -> int:
    assert rollout.features is not None
    return min(len(rollout.token_ids) + _CONTEXT_PAIRS, len(rollout.features) - 1, _MAX_PAIRS)


def _num_bytes(rollout: FinishedRollout) -> int:
    assert rollout.features is not None
    return rollout.features.numel() * rollout.features.element_size()


def _collate(rollouts: list[FinishedRollout], hidden_size: int, device: torch.device) -> _Batch:
    width = max(_num_pairs(r) for r in rollouts)
    count, hidden = len(rollouts), hidden_size
    features = torch.zeros(count, width, 3 * hidden, device=device)
    target_hidden = torch.zeros(count, width, hidden, device=device)
    token_ids = torch.zeros(count, width, dtype=torch.int64, device=device)
    weights = torch.zeros(count, width, device=device)
    for row, rollout in enumerate(rollouts):
        assert rollout.features is not None
        pairs = _num_pairs(rollout)
        first = len(rollout.features) - 1 - pairs
        tokens = torch.tensor(rollout.prompt_ids + rollout.token_ids, device=device)
        features[row, :pairs] = rollout.features[first : first + pairs, : 3 * hidden]
        target_hidden[row, :pairs] = rollout.features[first + 1 : first + 1 + pairs, 3 * hidden :]
        token_ids[row, :pairs] = tokens[first + 1 : first + 1 + pairs]
        weights[row, max(len(rollout.prompt_ids) - 2 - first, 0) : pairs] = 1
    temperature = torch.tensor([r.temperature or 1.0 for r in rollouts], device=device)
    return _Batch(
        features=features, target_hidden=target_hidden, token_ids=token_ids, weights=weights, temperature=temperature
    )


def compute_draft_losses(head: EagleHead, drafter: EagleDrafter, batch: _Batch) -> list[Tensor]:
    """How far the draft distribution is from the target's for each unroll step, averaged over completion tokens.

    Step 0 uses true features; step k replaces the feature of pair i by the head's own output for pair
    i - 1 of step k - 1, and sees true keys only up to i - k, as the node at depth k + 1 of a draft does.
    """
    rows = head.lm_head.weight.detach()
    mask = batch.weights > 0
    scale = batch.temperature[:, None].expand_as(mask)[mask]
    with torch.no_grad():
        target_logits = F.linear(batch.target_hidden[mask].to(rows.dtype), rows)
    losses = []
    for step, output in enumerate(compute_outputs(head, drafter, batch)):
        valid = _reachable(mask, step)
        weights = valid / valid.sum().clamp(min=1)
        losses.append(_DraftLoss.apply(head.compute_logits(output[mask]), target_logits, scale, weights))
    return losses


class _DraftLoss(torch.autograd.Function):
    """Weighted sum over rows of divergence and total variation, its gradient found in the same pass.

    On a CPU a few rows at a time: what lies between logits and gradient never leaves a core's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "M V"],
        target_logits: Float[Tensor, "M V"],
        temperature: Float[Tensor, " M"],
        weights: Float[Tensor, " M"],
    ) -> Float[Tensor, ""]:
        gradient = torch.empty_like(logits)
        total = weights.new_zeros(())
        rows = max(1, _LOSS_CHUNK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        for part in (slice(start, start + rows) for start in range(0, len(logits), rows)):
            scale, weight = temperature[part, None], weights[part, None]
            log_p, log_q = ((x[part].float() / scale).log_softmax(-1) for x in (target_logits, logits))
            p, q = log_p.exp(), log_q.exp()
            difference = q - p
            sign = difference.sign()
            divergence = torch.linalg.vecdot(p, log_p.sub_(log_q))
            variation = torch.linalg.vecdot(sign, difference) / 2
            total += ((divergence + _VARIATION_WEIGHT * variation) * weight[:, 0]).sum()
            sign -= torch.linalg.vecdot(q, sign)[:, None]
            difference.addcmul_(q, sign, value=_VARIATION_WEIGHT / 2)
            gradient[part] = difference.mul_(weight / scale)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


@torch.no_grad()
def measure_acceptance(
    drafter: EagleDrafter, rollouts: list[FinishedRollout], *, seed: int = 0
) -> Float[Tensor, "depth rank"]:
    """The chance that the target chooses the child of sibling rank r of a walked node at depth d.

    Tokens are drawn anew from the target's distribution at every position of the rollouts, with noise
    that the draft is ranked with: what verification would do, without a target forward.
    """
    head, target = drafter.head, drafter.target
    generator = torch.Generator(target.device).manual_seed(seed)
    offered = torch.zeros(_UNROLL)
    hits = torch.zeros(_UNROLL, _RANKS)
    vocab = head.draft_vocab.long()
    for batch in (_collate([rollout], target.hidden_size, target.device) for rollout in rollouts):
        mask = batch.weights > 0
        logits = target.compute_logits(batch.target_hidden[mask].to(target.lm_head.weight.dtype)).float()
        noise = -torch.empty_like(logits).exponential_(generator=generator).log_()
        chosen = (logits / batch.temperature[0] + noise).argmax(-1)
        for depth, output in enumerate(_compute_all_outputs(head, drafter, batch)):
            scores = head.compute_logits(output[mask]).float() / batch.temperature[0] + noise[:, vocab]
            ranked = vocab[scores.topk(min(_RANKS, len(vocab)), dim=-1).indices]
            valid = _reachable(mask, depth)
            offered[depth] += valid.sum().cpu()
            hits[depth, : ranked.shape[1]] += ((ranked == chosen[:, None]) * valid[:, None]).sum(0).cpu()
    return hits / offered.clamp(min=1)[:, None]


def _compute_all_outputs(head: EagleHead, drafter: EagleDrafter, batch: _Batch) -> list[Tensor]:
    with _autocast(drafter.target):
        return list(compute_outputs(head, drafter, batch))


@torch.no_grad()
def compute_features(target: TargetModel, prompt_ids: list[int], token_ids: list[int]) -> Float[Tensor, "T W"]:
    """Features of all but the last token of a finished text, by one target forward; call in `rollout_mode`."""
    ids, device = (prompt_ids + token_ids)[:-1], target.device
    cache = target.build_cache(with_features=True)
    cache.reserve(1, len(ids))
    cache.add_rows(1)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = ForwardBatch.build(
        token_ids=torch.tensor([ids], device=device),
        num_nodes=zero + len(ids),
        visible=torch.ones(1, len(ids), len(ids), dtype=torch.bool, device=device).tril(),
        rows=slice(0, 1),
        row_numbers=zero,
        lengths=zero,
        store=cache.keys,
        dtype=target.dtype,
        num_repeats=target.num_repeats,
    )
    features = target.forward(batch, cache).features
    assert features is not None
    return features


def compute_outputs(head: EagleHead, drafter: EagleDrafter, batch: _Batch) -> Iterable[Float[Tensor, "B T H"]]:
    """The head's outputs for each unroll step."""
    with torch.no_grad():
        embedded = drafter.target.embed_tokens(batch.token_ids).float()
        positions = torch.arange(batch.token_ids.shape[1], device=embedded.device)[None]
        cos, sin = drafter.target.decoder.rotary_emb(embedded, position_ids=positions)
    hidden = head.fc(batch.features)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for _ in range(_UNROLL):
        query, key, value = head.attention_inputs(embedded, hidden, cos, sin)
        keys.append(key)
        values.append(value)
        output = head.finish(hidden, _attend(query, keys, values))
        yield output
        hidden = F.pad(output[:, :-1], (0, 0, 1, 0))


def _reachable(mask: Bool[Tensor, "B T"], step: int) -> Float[Tensor, " M"]:
    """1 for completion pairs that have `step` pairs before them."""
    position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return (position[mask] >= step).float()


def _attend(query: Float[Tensor, "B T h d"], keys: list[Tensor], values: list[Tensor]) -> Float[Tensor, "B T hd"]:
    """Attention of unroll step k = len(keys) - 1: true keys up to i - k, then the chain of own keys.

    The chain's element j (of step j) stands at position i - k + j.
    """
    step = len(keys) - 1
    length, head_dim = query.shape[1], query.shape[3]
    repeats = query.shape[2] // keys[0].shape[2]
    keys = [key.repeat_interleave(repeats, 2) for key in keys]
    values = [value.repeat_interleave(repeats, 2) for value in values]
    scores = torch.einsum("bihd,bjhd->bhij", query, keys[0]).float()
    index = torch.arange(length, device=query.device)
    scores = scores.masked_fill(index[None, :] > index[:, None] - step, float("-inf"))
    parts = [scores]
    for j in range(1, step + 1):
        shifted = _shift(keys[j], step - j)
        own = (query * shifted).sum(-1).float().transpose(1, 2)
        parts.append(own.masked_fill(index < step - j, float("-inf"))[..., None])
    weights = (torch.cat(parts, -1) * head_dim**-0.5).softmax(-1).to(values[0].dtype)
    output = torch.einsum("bhij,bjhd->bihd", weights[..., :length], values[0])
    for j in range(1, step + 1):
        own = weights[..., length + j - 1].transpose(1, 2)[..., None]
        output = output + own * _shift(values[j], step - j)
    return output.flatten(2)


def _shift(x: Float[Tensor, "B T h d"], by: int) -> Float[Tensor, "B T h d"]:
    """Position i of the result is position i - by of x."""
    return F.pad(x[:, : x.shape[1] - by], (0, 0, 0, 0, by, 0)) if by else x
