"""The law: a token is argmax(warped target logits + noise(seed, position)).

Drafts are ranked with the same noise and accepted iff they equal the target's token, so what is
emitted depends on the model, the prompt, the sampling parameters and the seed, and on nothing
else (Daliri, Musco, Suresh, arXiv:2408.07978). Greedy decoding is the same rule with zero noise.

The noise is counter-based: the value for (stream, position, token) is a hash of the three, so a
row is the same alone or in any batch, on any device, and needs no state. Two 32-bit words of a
SplitMix64 key drive a three-multiply integer finaliser per token; 31 bits of it become a uniform w,
and -log(-log(1 - w)) the noise: floats are densest near 0, so large noise, which decides between rare
tokens, is resolved to 2^-31, and neither end is infinite.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastgrpo.kernels import cpu, gpu
from fastgrpo.transfer import is_host, upload
from fastgrpo.types import SamplingParams, Sequence

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK64 = 2**64 - 1
_FINALISER = ((0x7FEB352D, 15), (0x846CA68B, 16), (0x9E3779B1, 15))  # (multiplier, shift)
_UNIFORM_SCALE = 2.0**-31 - 2.0**-55  # a float32 below 2^-31: rounding up to 2^31 still gives less than 1
_LEAST_LOGPROB = -1000.0  # its probability is 0 in any floating type, and 0 * -inf would be NaN
_NOT_ASKED = (-1, 0, 0)  # token, log-prob and entropy where no row is sampled
_NOISE_CHUNK_ELEMENTS = 4 * 49152  # keeps the integer passes inside a core's L2 cache


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant: torch integers are signed."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix(value: int) -> int:
    """SplitMix64's finaliser."""
    value &= _MASK64
    value = (value ^ (value >> 30)) * _MIX_1 & _MASK64
    value = (value ^ (value >> 27)) * _MIX_2 & _MASK64
    return value ^ (value >> 31)


def stream_key(seed: int, stream: int) -> int:
    """The 64-bit key of one request's noise; distinct (seed, stream) pairs give unrelated keys."""
    return _signed(_mix(_mix(seed * _GOLDEN + 1) + stream * _GOLDEN + 2), 64)


def _position_keys(stream_keys: Int[Tensor, " R"], positions: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
    value = stream_keys + positions * _signed(_GOLDEN, 64)
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _signed(_MIX_1, 64)
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _signed(_MIX_2, 64)
    return value ^ ((value >> 31) & (2**33 - 1))


def _split_key(keys: Int[Tensor, " R"]) -> tuple[Int[Tensor, "R 1"], Int[Tensor, "R 1"]]:
    """Low and high 32-bit words."""
    return ((keys << 32) >> 32).to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]


def _hash(token_ids: Int[Tensor, "*R V"], low: Int[Tensor, "B 1"], high: Int[Tensor, "B 1"]) -> Int[Tensor, "B V"]:
    bits = token_ids ^ low
    shifted = torch.empty_like(bits)
    for multiplier, shift in _FINALISER:
        bits.mul_(_signed(multiplier, 32))
        torch.bitwise_right_shift(bits, shift, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
        if multiplier == _FINALISER[0][0]:
            bits.bitwise_xor_(high)
    return bits


def _gumbel(bits: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Finite standard Gumbel noise from 32 random bits, which are overwritten."""
    uniform = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(_UNIFORM_SCALE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    stream_keys: Int[Tensor, " R"], positions: Int[Tensor, " R"], token_ids: Int[Tensor, " V"]
) -> Float[Tensor, "R V"]:
    """Standard Gumbel noise, one row for each (stream, position), one column for each token id.

    Args:
        stream_keys: int64 keys from `stream_key`.
        positions: int64, tokens of the completion before the one to be drawn.
        token_ids: int32 ids of the columns, the whole vocabulary or any part of it.

    Returns:
        float32 noise; a value depends on its own (key, position, token id) only.
    """
    if has_kernels(stream_keys):
        return cpu.gumbel_noise(stream_keys, positions, token_ids)
    if gpu.runs_on(stream_keys):
        return _gpu_sampling().gumbel_noise(stream_keys, positions, token_ids)
    keys = _position_keys(stream_keys, positions)
    low, high = _split_key(keys)
    out = torch.empty(len(keys), len(token_ids), dtype=torch.float32, device=keys.device)
    rows = max(1, _NOISE_CHUNK_ELEMENTS // max(1, len(token_ids)))
    for start in range(0, len(keys), rows):
        part = slice(start, start + rows)
        out[part] = _gumbel(_hash(token_ids, low[part], high[part]))
    return out


def gumbel_noise_of(
    stream_keys: Int[Tensor, " R"], positions: Int[Tensor, " R"], token_ids: Int[Tensor, "R K"]
) -> Float[Tensor, "R K"]:
    """The values of `gumbel_noise` for a few tokens of each row's own, bit for bit; arguments as there."""
    if has_kernels(stream_keys):
        return cpu.gumbel_noise(stream_keys, positions, token_ids)
    if gpu.runs_on(stream_keys):
        return _gpu_sampling().gumbel_noise(stream_keys, positions, token_ids)
    low, high = _split_key(_position_keys(stream_keys, positions))
    return _gumbel(_hash(token_ids, low, high))


def has_kernels(values: Tensor) -> bool:
    return values.device.type == "cpu" and cpu.is_available()


def _gpu_sampling() -> Any:
    """The kernels in Triton, which is imported only where they run."""
    from fastgrpo.kernels import gpu_sampling

    return gpu_sampling


@dataclass(frozen=True, kw_only=True)
class SamplingKind:
    """What the parameters of some sequences ask for: it decides which kernels are launched."""

    is_warped: bool  # some temperature is not 1
    is_truncated: bool  # some top_k or top_p is active beside noise
    is_noisy: bool  # some temperature is not 0
    is_greedy: bool  # some temperature is 0

    @staticmethod
    def find(sequences: list[Sequence]) -> SamplingKind:
        params = [sequence.params for sequence in sequences]
        return SamplingKind(
            is_warped=any(p.temperature != 1 for p in params),
            is_truncated=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params),
            is_noisy=any(p.temperature > 0 for p in params),
            is_greedy=any(p.temperature == 0 for p in params),
        )


NUM_COLUMNS = 5


def list_columns(sequences: list[Sequence]) -> np.ndarray:
    """The sampling state as int64 [5, R], for `SamplingBatch.read`; floats as the bits of float64."""
    params = [sequence.params for sequence in sequences]
    columns = np.empty((NUM_COLUMNS, len(sequences)), dtype=np.int64)
    columns[0] = [sequence.stream_key for sequence in sequences]
    columns[1] = [len(sequence.token_ids) for sequence in sequences]
    columns[2] = [p.top_k for p in params]
    columns[3:].view(np.float64)[:] = [[p.temperature for p in params], [p.top_p for p in params]]
    return columns


@dataclass(frozen=True, kw_only=True)
class SamplingBatch(SamplingKind):
    """The sampling state of some sequences as tensors, one row each."""

    stream_keys: Int[Tensor, " R"]  # int64
    positions: Int[Tensor, " R"]  # int64, completion tokens emitted so far
    temperature: Float[Tensor, " R"]
    top_k: Int[Tensor, " R"]
    top_p: Float[Tensor, " R"]

    @staticmethod
    def build(sequences: list[Sequence], device: torch.device) -> SamplingBatch:
        kind = SamplingKind.find(sequences)
        if device.type != "cpu":
            return SamplingBatch.read(upload(list_columns(sequences), device), kind)
        params = [sequence.params for sequence in sequences]
        integers = (
            [sequence.stream_key for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
            [p.top_k for p in params],
        )
        fractions = ([p.temperature for p in params], [p.top_p for p in params])
        columns = [*np.array(integers, dtype=np.int64), *np.array(fractions, dtype=np.float32)]
        return SamplingBatch(**_name_columns(map(torch.from_numpy, columns), kind))

    @staticmethod
    def read(columns: Int[Tensor, "5 R"], kind: SamplingKind) -> SamplingBatch:
        """What `list_columns` wrote."""
        values = (*columns[:3], *columns[3:].view(torch.float64).float())
        return SamplingBatch(**_name_columns(values, kind))

    @staticmethod
    def build_blank(num_rows: int, device: torch.device) -> SamplingBatch:
        """Rows of default parameters at the start of a completion, each with noise of its own; to time what samples."""
        sequences = [
            Sequence(request_id=row, prompt_ids=[0], params=SamplingParams(), max_tokens=1, stream_key=row)
            for row in range(num_rows)
        ]
        return SamplingBatch.build(sequences, device)

    def rows(self, index: Int[Tensor, " R2"], advance: Int[Tensor, " R2"] | int = 0) -> SamplingBatch:
        """The rows at `index`, `advance` tokens further along."""
        return replace(
            self,
            stream_keys=self.stream_keys[index],
            positions=self.positions[index] + advance,
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
        )

    def ahead(self, advance: int) -> SamplingBatch:
        """All rows, `advance` tokens further along."""
        return replace(self, positions=self.positions + advance) if advance else self


class SamplingRows:
    """Builds the `SamplingBatch` of each step; on the host, only positions are renewed while the same sequences run.

    After a forward, whose weights have driven all else out of the processor's caches, each line of Python costs tens of
    microseconds.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._last: tuple[SamplingBatch, np.ndarray] | None = None  # and a view of its positions, to be overwritten

    def build(self, sequences: list[Sequence], device: torch.device) -> SamplingBatch:
        """`SamplingBatch.build`, valid until the next call; a running sequence's parameters and key must not change."""
        if device.type != "cpu" or self._last is None or not self._knows(sequences):
            batch = SamplingBatch.build(sequences, device)
            if is_host(batch.positions):
                self._sequences, self._last = list(sequences), (batch, batch.positions.numpy())
            return batch
        batch, positions = self._last
        positions[:] = [len(sequence.token_ids) for sequence in sequences]
        return batch

    def forget(self) -> None:
        """Drop the last batch and its sequences."""
        self._sequences, self._last = [], None

    def _knows(self, sequences: list[Sequence]) -> bool:
        return len(sequences) == len(self._sequences) and all(map(operator.is_, sequences, self._sequences))


def _name_columns(values: Iterable[Tensor], kind: SamplingKind) -> dict[str, Any]:
    """Fields of a `SamplingBatch` in the order of `list_columns`."""
    names = ("stream_keys", "positions", "top_k", "temperature", "top_p")
    return vars(kind) | dict(zip(names, values, strict=True))


def scale_logits(logits: Float[Tensor, "R *n V"], batch: SamplingBatch) -> Float[Tensor, "R *n V"]:
    """Logits divided by the temperature of their row, in float32 at least; greedy rows stay as they are."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not batch.is_warped:
        return logits
    temperature = torch.where(batch.temperature > 0, batch.temperature, 1.0).to(logits.dtype)
    return logits / temperature.view(-1, *[1] * (logits.dim() - 1))


def truncate_logits(scaled: Float[Tensor, "R V"], batch: SamplingBatch) -> Float[Tensor, "R V"]:
    """Top-k, then top-p, as in vLLM and transformers: tokens outside get -inf.

    Greedy rows keep all of the likeliest tokens, of which the first is said, whatever their top-p.
    """
    if not batch.is_truncated:
        return scaled
    ordered, order = scaled.sort(dim=-1, descending=True)
    num_tokens = scaled.shape[-1]
    limit = torch.where(batch.top_k > 0, batch.top_k.clamp(max=num_tokens), num_tokens)
    kth = ordered.gather(-1, limit[:, None] - 1)  # ties with the k-th value stay, as in transformers
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    is_active = (batch.top_p < 1) & (batch.temperature > 0)
    outside = (before >= batch.top_p.to(before.dtype)[:, None]) & is_active[:, None]
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(scaled).scatter_(-1, order, ordered)


def add_noise(scores: Float[Tensor, "R V"], batch: SamplingBatch, token_ids: Int[Tensor, " V"]) -> Float[Tensor, "R V"]:
    """Scores plus the noise of each row's position; greedy rows get none."""
    if not batch.is_noisy:
        return scores
    noise = gumbel_noise(batch.stream_keys, batch.positions, token_ids).to(scores.dtype)
    if batch.is_greedy:
        noise *= (batch.temperature > 0)[:, None]
    return noise.add_(scores)


def sample(
    logits: Float[Tensor, "R V"], batch: SamplingBatch, vocabulary: Int[Tensor, " V"]
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Draw one token a row by the law.

    Args:
        logits: raw target logits, any floating type.
        batch: the rows' sampling state.
        vocabulary: int32 arange over V on the same device.

    Returns:
        token ids int64, their log-probabilities under softmax(logits / temperature), and that distribution's
        entropy in nats; log-probability and entropy are NaN exactly where a row of logits has a NaN or +inf, or nothing
        but -inf.
    """
    if samples_on_host(logits, batch):
        return cpu.sample(logits, batch.stream_keys, batch.positions, batch.temperature)
    if _samples_on_gpu(logits, batch):
        rows = torch.arange(len(logits), device=logits.device)
        return _gpu_sampling().sample(logits, rows, batch.stream_keys, batch.positions, batch.temperature)
    scaled = scale_logits(logits, batch)
    token_ids = add_noise(truncate_logits(scaled, batch), batch, vocabulary).argmax(-1)
    logprobs = scaled.log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])[:, 0]
    if _has_host_kernels(logits):  # a row keeps the bits that it has beside others, none of them truncated
        likeliest, own, entropies = cpu.sample(logits, batch.stream_keys, batch.positions, batch.temperature)
        return token_ids, torch.where(likeliest == token_ids, own, chosen), entropies
    share = logprobs.exp().mul_(logprobs.clamp_(min=_LEAST_LOGPROB))
    return token_ids, chosen, -share.sum(-1)


def sample_rows(
    logits: Float[Tensor, "T V"], rows: Int[Tensor, " R"], batch: SamplingBatch, vocabulary: Int[Tensor, " V"]
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """`sample` for chosen rows of the logits, without waiting for a device to say which; returns as there.

    Args:
        rows: index into `logits` for each row of `batch`; a row with -1 is not sampled and gives token -1, log-prob 0
            and entropy 0.
    """
    if _samples_on_gpu(logits, batch):
        return _gpu_sampling().sample(logits, rows, batch.stream_keys, batch.positions, batch.temperature)
    is_asked = rows >= 0
    if not is_host(rows):
        found = sample(logits[rows.clamp(min=0)], batch, vocabulary)
        token_ids, logprobs, entropies = (
            value.masked_fill(~is_asked, empty) for value, empty in zip(found, _NOT_ASKED, strict=True)
        )
        return token_ids, logprobs, entropies
    asked = is_asked.nonzero()[:, 0]
    if len(asked) == len(rows):
        return sample(logits[rows], batch, vocabulary)
    found = sample(logits[rows[asked]], batch.rows(asked), vocabulary)
    token_ids, logprobs, entropies = (
        value.new_full((len(rows),), empty).scatter_(0, asked, value)
        for value, empty in zip(found, _NOT_ASKED, strict=True)
    )
    return token_ids, logprobs, entropies


def samples_on_host(logits: Tensor, batch: SamplingBatch) -> bool:
    """Whether the compiled CPU kernels can sample from these logits."""
    return _has_host_kernels(logits) and not batch.is_truncated


def _has_host_kernels(logits: Tensor) -> bool:
    return has_kernels(logits) and logits.dtype in cpu.DTYPES


def _samples_on_gpu(logits: Tensor, batch: SamplingBatch) -> bool:
    return gpu.runs_on(logits) and logits.dtype in gpu.DTYPES and not batch.is_truncated
