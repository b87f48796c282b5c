"""N-grams of several orders over a sequence, its siblings and the earlier rollouts of its prompt.

The counts act as the draft distribution q and are ranked like any other: log q + the noise of the position.
They are of tokens that the target drew at the rollout's own temperature, top-k and top-p, so q is already warped
and is not divided by the temperature once more.

Drafting from n-grams of several lengths is ANPD (arXiv:2404.08698), from a tree of a prompt's past rollouts SRT
(arXiv:2601.09083). Here both are one counted table, bounded in bytes, and candidates of all orders share one
distribution, whose noise siblings do not share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.drafters.beams import grow_trees
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext
from fastgrpo.drafters.ngram_table import MAX_ORDER, NO_TOKEN, ORDERS, NgramTable
from fastgrpo.graphs import round_size
from fastgrpo.sampling import SamplingBatch, gumbel_noise_of
from fastgrpo.transfer import send
from fastgrpo.tree import Draft
from fastgrpo.types import Sequence, SpeculationPlan
from fastgrpo.verify import Verdict

DEFAULT_MAX_BYTES = 64 * 2**20
_MOST_COLLECTED = 4096  # new tokens kept back until they are counted
_MEAN_NOISE = float(np.euler_gamma)
_TABLE_FILE, _FACTS_FILE = "ngram.safetensors", "ngram.json"


class NgramDrafter:
    """Drafts what followed the same words before; needs no training and no features.

    Counts outlive a rollout: a prompt that comes back in a later epoch finds them, siblings share them at once.
    A group's prompt is text like any other, counted once a rollout.

    Args:
        max_bytes: memory of the counts at most.

    Attributes:
        table: the counts; what was observed since the last draft is not in them yet.
        calibration: what its chances have been worth so far.

    Raises:
        ValueError: `max_bytes` is too small.
    """

    name = "ngram"
    wants_features = False
    position_bytes = 0
    can_be_timed = True

    def __init__(self, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.table = NgramTable(max_bytes)
        self.calibration = Calibration()
        self._groups: dict[Sequence, int] = {}  # of running sequences
        self._prompts: set[int] = set()  # groups whose prompt this rollout has counted
        self._texts = _Texts()

    def begin(self) -> None:
        self._groups.clear()
        self._prompts.clear()
        self.calibration.fit()

    def end(self) -> None:
        self._groups.clear()

    def count_unread(self, sequences: list[Sequence]) -> int:
        return 0

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        group = self._groups.get(sequence)
        if group is None:
            group = self._groups[sequence] = hash_group(sequence.prompt_ids)
            if group not in self._prompts:
                self._prompts.add(group)
                self._texts.append(group, sequence.prompt_ids, len(sequence.prompt_ids))
        if num_new_tokens:
            self._texts.append(group, sequence.last_token_ids(MAX_ORDER + num_new_tokens), num_new_tokens)
        if sequence.finish_reason is not None:
            del self._groups[sequence]
        if self._texts.num_new_tokens >= _MOST_COLLECTED:
            with contextlib.suppress(MemoryError):  # what was emitted is kept; `propose` tries again
                self.count_observed()

    def count_observed(self) -> None:
        """Move what was collected into the table."""
        if self._texts.num_new_tokens:
            self.table.add(*self._texts.to_arrays())
            self._texts = _Texts()

    def judge(self, draft: Draft, verdict: Verdict) -> None:
        self.calibration.observe(draft, verdict)

    def release(self, slot: int, last_slot: int) -> None:
        pass  # a finished sibling goes on predicting for its group

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        """Trees are grown on the host, where tokens and counts are; only the draft goes to the device."""
        self.count_observed()
        sequences, device = context.sequences, context.device
        if device.type != "cpu":
            context = replace(context, device=torch.device("cpu"))
        groups = [self._groups.get(sequence) or hash_group(sequence.prompt_ids) for sequence in sequences]
        tails = [_pad(sequence.last_token_ids(MAX_ORDER)) for sequence in sequences]
        levels = _NgramLevels(self.table, np.array(groups, np.uint64), np.array(tails))
        draft = grow_trees(context, plan, levels, self.calibration)
        assert draft.log_chances is not None and draft.scores is not None
        width = int(draft.num_nodes.max())  # rows may all be shorter than the plan
        if device.type != "cpu":  # where steps are recorded, of few sizes
            width = min(round_size(width), 1 + plan.tree_size)
        return Draft(
            token_ids=send(_widen(draft.token_ids, width, 0), device),
            parents=send(_widen(draft.parents, width, -1), device),
            num_nodes=send(draft.num_nodes, device),
            log_chances=send(_widen(draft.log_chances, width, 0.0), device),
            scores=send(_widen(draft.scores, width, -np.inf), device),
        )

    def save(self, folder: Path) -> None:
        """Write the counts and what they have been worth; raises OSError where that fails."""
        self.count_observed()
        folder.mkdir(parents=True, exist_ok=True)
        arrays = self.table.to_arrays()
        save_file(arrays, folder / _TABLE_FILE)
        facts = {"orders": ORDERS, "checksums": _compute_checksums(arrays)}
        (folder / _FACTS_FILE).write_text(json.dumps(facts) + "\n")
        self.calibration.save(folder)

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote in the place of all counts; a smaller table keeps the newest.

        Raises:
            ValueError: a file is missing or damaged, or counts other orders; names the file.
        """
        path = folder / _FACTS_FILE
        try:
            facts = json.loads(path.read_text())
            orders, checksums = facts["orders"], facts["checksums"]
            if orders != list(ORDERS):
                raise ValueError(f"it counts orders {orders}, this version {list(ORDERS)}")
            path = folder / _TABLE_FILE
            arrays = load_file(path)
            if _compute_checksums(arrays) != checksums:
                raise ValueError("its checksums differ")
            self.table.load_arrays(arrays)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove {folder} to start counting afresh") from error
        self._texts = _Texts()
        self.calibration.restore(folder)


class _NgramLevels:
    """Nodes of a draft as the last tokens of their paths."""

    def __init__(self, table: NgramTable, groups: UInt64[np.ndarray, " B"], tails: Int[np.ndarray, "B M"]) -> None:
        self.table, self.groups = table, groups
        self.contexts = torch.from_numpy(tails)[:, None]  # [B, W, MAX_ORDER] of the nodes expanded last

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[Float[Tensor, "B W K"], Int[Tensor, "B W K"]]:
        """The best of log q + noise. Its chance: the share of the noisy mass, tokens never seen included.

        The best of those is log escape + a noise that is not looked up, so its mean stands for it.
        """
        num_rows, num_nodes, _ = self.contexts.shape
        predicted = self.table.predict(self.groups.repeat(num_nodes), self.contexts.flatten(0, 1).numpy())
        token_ids, chances, escape = (torch.from_numpy(each).unflatten(0, (num_rows, num_nodes)) for each in predicted)
        scores, unseen = chances.log(), escape.log()[..., None]
        if noise_rows.is_noisy:
            noise = gumbel_noise_of(noise_rows.stream_keys, noise_rows.positions, token_ids.flatten(1))
            is_noisy = (noise_rows.temperature > 0)[:, None, None]
            scores = scores + noise.view_as(scores) * is_noisy
            unseen = unseen + _MEAN_NOISE * is_noisy
        top, column = scores.topk(min(width, scores.shape[-1]), dim=-1)
        num_columns = int((~top.isneginf()).any(1).any(0).sum())  # best first: the absent stand last
        log_chances = top - torch.cat((scores, unseen), -1).logsumexp(-1, keepdim=True)
        return log_chances[..., :num_columns], token_ids.gather(-1, column)[..., :num_columns].long()

    def expand(self, token_ids: Int[Tensor, "B W"], above: Int[Tensor, "B W"], visible: Bool[Tensor, "B W E"]) -> None:
        path = self.contexts.gather(1, above[..., None].expand(-1, -1, MAX_ORDER))
        self.contexts = torch.cat((path[..., 1:], token_ids[..., None]), -1)


class _Texts:
    """Pieces of text on their way into the table: each its context, then its new tokens."""

    def __init__(self) -> None:
        self.num_new_tokens = 0
        self._groups: list[int] = []
        self._lengths: list[int] = []  # new tokens of each piece
        self._tokens: list[int] = []

    def append(self, group: int, token_ids: list[int], num_new_tokens: int) -> None:
        """The last `num_new_tokens` of `token_ids`, of which at most MAX_ORDER more are looked at."""
        self._groups.append(group)
        self._lengths.append(num_new_tokens)
        self._tokens += _pad(token_ids, MAX_ORDER + num_new_tokens)
        self.num_new_tokens += num_new_tokens

    def to_arrays(
        self,
    ) -> tuple[UInt64[np.ndarray, " n"], Int[np.ndarray, "n M"], Int[np.ndarray, " n"]]:
        """(group, tokens before, token) of each new token, as `NgramTable.add` takes them."""
        tokens, lengths = np.array(self._tokens), np.array(self._lengths)
        piece = np.repeat(np.arange(len(lengths)), lengths)
        index = np.arange(len(piece)) + (piece + 1) * MAX_ORDER
        before = tokens[index[:, None] - np.arange(MAX_ORDER, 0, -1)]
        return np.array(self._groups, np.uint64)[piece], before, tokens[index]


def _widen(values: Shaped[Tensor, "B N"], width: int, filler: int | float) -> Shaped[Tensor, "B W"]:
    """The first `width` nodes; those that there are not are unused."""
    return F.pad(values[:, :width], (0, max(width - values.shape[1], 0)), value=filler)


def hash_group(prompt_ids: list[int]) -> int:
    """64-bit key of a prompt's group, the same in every process; never 0."""
    digest = hashlib.blake2b(np.array(prompt_ids, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _pad(token_ids: list[int], count: int = MAX_ORDER) -> list[int]:
    return [NO_TOKEN] * (count - len(token_ids)) + token_ids


def _compute_checksums(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(np.ascontiguousarray(array).tobytes()) for name, array in arrays.items()}
