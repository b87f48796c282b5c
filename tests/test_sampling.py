"""The sampler draws from the softmax, its noise is counted and not drawn, and it truncates as transformers does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fastgrpo.sampling import (
    SamplingBatch,
    SamplingKind,
    SamplingRows,
    add_noise,
    gumbel_noise,
    gumbel_noise_of,
    list_columns,
    sample,
    scale_logits,
    stream_key,
    truncate_logits,
)
from fastgrpo.types import SamplingParams, Sequence

INT64 = st.integers(-(2**63), 2**63 - 1)


def build_batch(params: list[SamplingParams], positions: list[int] | None = None) -> SamplingBatch:
    """The sampling state of one row for each of the params, `positions` tokens into its completion."""
    sequences = [
        Sequence(
            request_id=index,
            prompt_ids=[0],
            params=each,
            max_tokens=each.max_tokens,
            stream_key=stream_key(each.seed, each.stream),
            token_ids=[0] * (positions[index] if positions else 0),
        )
        for index, each in enumerate(params)
    ]
    return SamplingBatch.build(sequences, torch.device("cpu"))


def build_rows(count: int, *, position: int = 0, seed: int = 0, **settings: float) -> SamplingBatch:
    """`count` streams of one seed at one position."""
    one = build_batch([SamplingParams(seed=seed, **settings)], [position])
    keys = torch.tensor([stream_key(seed, stream) for stream in range(count)])
    rows = one.rows(torch.zeros(count, dtype=torch.int64))
    return SamplingBatch(**(vars(rows) | {"stream_keys": keys}))


def draw(logits: torch.Tensor, batch: SamplingBatch) -> np.ndarray:
    rows = logits.expand(len(batch.stream_keys), -1)
    return sample(rows, batch, torch.arange(logits.shape[-1], dtype=torch.int32))[0].numpy()


def chi_square_p(tokens: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the counts; rare tokens are pooled so that each cell expects at least ten."""
    assert probs[tokens].min() > 0, "a token outside the truncation was drawn"
    counts, expected = np.bincount(tokens, minlength=len(probs)), probs * len(tokens)
    is_common = expected >= 10
    observed = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(expected[is_common], expected[~is_common].sum())
    keep = wanted > 1e-9
    return stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue


# -- the distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "num_tokens", "settings"),
    [
        (0.0, 10, {}),
        (1.0, 200, {}),
        (4.0, 50, {}),
        (2.0, 2, {}),
        (2.0, 60, {"temperature": 0.7}),
        (1.0, 40, {"temperature": 1.8}),
        (2.0, 60, {"top_k": 7}),
        (1.5, 80, {"top_p": 0.6}),
        (1.5, 80, {"temperature": 0.8, "top_k": 30, "top_p": 0.9}),
    ],
)
def test_tokens_follow_the_warped_softmax(spread, num_tokens, settings):
    logits = torch.randn(1, num_tokens, generator=torch.Generator().manual_seed(3)) * spread
    batch = build_rows(20_000, **settings)
    one = batch.rows(torch.zeros(1, dtype=torch.int64))
    probs = truncate_logits(scale_logits(logits, one), one).double().softmax(-1)[0].numpy()
    assert chi_square_p(draw(logits, batch), probs) > 1e-3


@pytest.mark.parametrize("axis", ["positions", "streams", "seeds", "tokens"])
def test_draws_are_independent(axis):
    """Joint counts of neighbouring draws against the product of the softmax with itself."""
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    count = 40_000
    first = draw(logits, build_rows(count))
    if axis == "positions":
        second = draw(logits, build_rows(count, position=1))
    elif axis == "streams":
        first, second = first[0::2], first[1::2]
    elif axis == "seeds":
        second = draw(logits, build_rows(count, seed=1))
    else:  # another part of the vocabulary at the same place
        noise = add_noise(logits.expand(count, -1), build_rows(count), torch.arange(6, 12, dtype=torch.int32))
        second = noise.argmax(-1).numpy()
    probs = logits.double().softmax(-1)[0].numpy()
    assert chi_square_p(first * 6 + second, np.outer(probs, probs).ravel()) > 1e-3


def test_a_group_does_not_collapse_into_one_completion():
    logits = torch.zeros(1, 1000)
    assert len(set(draw(logits, build_rows(64)).tolist())) > 50


@pytest.mark.parametrize("num_tokens", [7, 120, 5000])
@pytest.mark.parametrize("truncation", [{"top_p": 0.1}, {"top_p": 0.3, "top_k": 2}])
def test_greedy_says_the_first_of_equals_whatever_is_truncated(num_tokens, truncation):
    """Half precision has many equals, of which a sort puts any first; beside sampled rows and alone."""
    logits = torch.zeros(2, num_tokens).index_fill(1, torch.arange(2, num_tokens), 3.0)
    greedy, other = SamplingParams(temperature=0.0, **truncation), SamplingParams(top_p=0.5)
    assert not build_batch([greedy]).is_truncated
    for params in ([greedy, greedy], [greedy, other]):
        assert sample(logits, build_batch(params), torch.arange(num_tokens, dtype=torch.int32))[0][0] == 2


def test_temperature_zero_takes_the_largest_logit():
    logits = torch.randn(40, 30)
    params = [SamplingParams(temperature=0.0, stream=i, top_k=i % 5, top_p=1.0 - (i % 2) / 2) for i in range(40)]
    tokens, logprobs, entropies = sample(logits, build_batch(params), torch.arange(30, dtype=torch.int32))
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logprobs_and_entropies_are_those_of_the_scaled_distribution_before_truncation(dtype):
    logits = (torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    params = [SamplingParams(temperature=0.5 + i / 50, stream=i, top_k=5, top_p=0.8) for i in range(50)]
    tokens, logprobs, entropies = sample(logits, build_batch(params), torch.arange(30, dtype=torch.int32))
    temperature = torch.tensor([p.temperature for p in params])[:, None]
    scaled = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), scaled.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), -(scaled.exp() * scaled).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1e-2, 1e-5, 1e-30])
def test_logprobs_of_equal_tokens_at_a_low_temperature(dtype, temperature):
    """Their logits are large beside the logarithm of two."""
    logits = torch.tensor([[20.0, 1.0, 20.0]] * 8).to(dtype)
    batch = build_batch([SamplingParams(temperature=temperature, stream=i) for i in range(8)])
    tokens, logprobs, _ = sample(logits, batch, torch.arange(3, dtype=torch.int32))
    assert set(tokens.tolist()) <= {0, 2}
    torch.testing.assert_close(logprobs, torch.full((8,), -math.log(2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logprobs_and_entropies_tell_logits_that_are_not_finite(bad):
    logits = torch.randn(4, 20)
    logits[2, 7] = bad
    for settings in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}):
        batch = build_batch([SamplingParams(stream=i, **settings) for i in range(4)])
        _, logprobs, entropies = sample(logits, batch, torch.arange(20, dtype=torch.int32))
        assert torch.isnan(logprobs).tolist() == torch.isnan(entropies).tolist() == [False, False, True, False]


# -- the noise -----------------------------------------------------------------------------------------------


def test_noise_is_standard_gumbel():
    keys = torch.tensor([stream_key(7, stream) for stream in range(200)])
    noise = gumbel_noise(keys, torch.arange(200), torch.arange(5000, dtype=torch.int32)).double().numpy().ravel()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=5e-3)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=2e-2)
    assert stats.kstest(noise[:200_000], "gumbel_r").pvalue > 1e-3
    tail = noise[noise > 7]  # P(noise > 7) = 9.1e-4: what decides between rare tokens
    assert len(tail) == pytest.approx(len(noise) * -math.expm1(-math.exp(-7)), rel=0.1)


# (stream of seed 0, token id) at position 0 whose hash has its low 24 bits set
_EXTREME = ((119, 7580), (549, 5287), (789, 11397), (1110, 33985))


@pytest.mark.parametrize(("stream", "token_id"), _EXTREME)
def test_noise_is_finite_at_its_extremes(stream, token_id):
    """Infinite noise would emit its token whatever the model says: at 49152 tokens, once in 341 draws."""
    keys = torch.tensor([stream_key(0, stream)])
    noise = gumbel_noise(keys, torch.zeros(1, dtype=torch.int64), torch.tensor([token_id], dtype=torch.int32))
    assert bool(torch.isfinite(noise).all())
    logits = torch.zeros(1, token_id + 1).index_fill_(1, torch.tensor([token_id]), -1000.0)
    batch = build_batch([SamplingParams(seed=0, stream=stream)])
    assert draw(logits, batch).item() != token_id
    logits[0, token_id] = -math.inf
    assert draw(logits, batch).item() != token_id


@given(
    keys=st.lists(INT64, min_size=1, max_size=6),
    position=st.integers(0, 2**20),
    num_tokens=st.integers(1, 400),
    data=st.data(),
)
def test_a_row_is_the_same_alone_in_any_batch_and_for_any_token_ids(keys, position, num_tokens, data):
    vocabulary = torch.arange(num_tokens, dtype=torch.int32)
    rows = torch.tensor(keys)
    positions = torch.arange(len(keys)) + position
    together = gumbel_noise(rows, positions, vocabulary)
    chosen = data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=20))
    for index in range(len(keys)):
        alone = gumbel_noise(rows[index : index + 1], positions[index : index + 1], vocabulary)
        assert torch.equal(alone[0], together[index])
        part = gumbel_noise(rows[index : index + 1], positions[index : index + 1], vocabulary[chosen])
        assert torch.equal(part[0], together[index, chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [120, 5003])
def test_a_row_is_sampled_alike_alone_and_beside_truncated_ones(dtype, num_tokens):
    """Token, log-prob and entropy, bit for bit."""
    settings = [{"top_k": 50}, {"temperature": 0.7, "top_p": 0.9}, {}, {"temperature": 0.7}, {"temperature": 0.0}]
    params = [SamplingParams(seed=index, **each) for index, each in enumerate(settings * 4)]
    logits = (torch.randn(len(params), num_tokens, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    vocabulary = torch.arange(num_tokens, dtype=torch.int32)
    together = sample(logits, build_batch(params), vocabulary)
    alone = [sample(logits[i, None], build_batch([each]), vocabulary) for i, each in enumerate(params)]
    for values, own in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(values, torch.cat(own))


def test_a_row_is_the_same_beyond_the_chunk_of_one_pass():
    keys = torch.tensor([stream_key(1, stream) for stream in range(11)])
    vocabulary = torch.arange(50_000, dtype=torch.int32)
    together = gumbel_noise(keys, torch.arange(11), vocabulary)
    assert torch.equal(gumbel_noise(keys[10:], torch.tensor([10]), vocabulary)[0], together[10])


@given(
    keys=st.lists(INT64, min_size=1, max_size=5),
    positions=st.lists(st.integers(0, 2**20), min_size=5, max_size=5),
    num_tokens=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_noise_of_scattered_tokens_is_that_of_the_whole_row(keys, positions, num_tokens, seed):
    rows, places = torch.tensor(keys), torch.tensor(positions[: len(keys)])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(1000, (len(keys), num_tokens), generator=generator)
    whole = gumbel_noise(rows, places, torch.arange(1000, dtype=torch.int32))
    assert torch.equal(gumbel_noise_of(rows, places, chosen.int()), whole.gather(1, chosen))


def test_streams_have_keys_of_their_own():
    keys = [stream_key(seed, stream) for seed in range(-2, 100) for stream in range(200)]
    assert len(set(keys)) == 102 * 200
    assert all(-(2**63) <= key < 2**63 for key in keys)
    bits = np.array([[key >> bit & 1 for bit in range(64)] for key in keys[::4]])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.04


def test_advancing_a_row_is_moving_its_position():
    batch = build_batch([SamplingParams(stream=i) for i in range(3)], [4, 0, 2])
    rows = batch.rows(torch.tensor([2, 0]), 3)
    assert rows.positions.tolist() == [5, 7]
    assert rows.stream_keys.tolist() == batch.stream_keys[[2, 0]].tolist()


# -- truncation ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**16),
    num_tokens=st.integers(1, 60),
    spread=st.floats(0.1, 6),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1),
    temperature=st.floats(0.1, 3),
)
def test_truncation_keeps_what_transformers_keeps(seed, num_tokens, spread, top_k, top_p, temperature):
    """Temperature, then top-k, then top-p. Rows with other settings stand beside, and change nothing."""
    logits = torch.randn(3, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    batch = build_batch([SamplingParams(), params, SamplingParams(top_k=1)])
    kept = truncate_logits(scale_logits(logits, batch), batch)
    expected = logits / batch.temperature.double()[:, None]
    row = expected[1:2]
    if top_k:
        row = TopKLogitsWarper(top_k)(None, row)
    if top_p < 1:
        row = TopPLogitsWarper(float(batch.top_p[1]))(None, row)
    assert torch.equal(torch.isfinite(kept[1]), torch.isfinite(row[0]))
    assert torch.equal(kept[0], expected[0])
    assert torch.isfinite(kept[2]).sum() == 1
    assert torch.equal(kept[1][torch.isfinite(row[0])], row[0][torch.isfinite(row[0])])


def test_tokens_that_tie_with_the_last_kept_one_stay():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    batch = build_batch([SamplingParams(top_k=2)])
    assert torch.isfinite(truncate_logits(logits, batch)).tolist() == [[True, True, True, True, False]]


def test_one_token_is_always_kept():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    batch = build_batch([SamplingParams(top_p=1e-6)])
    assert torch.isfinite(truncate_logits(logits, batch)).sum() == 1


def test_state_built_on_the_host_is_what_a_device_reads():
    params = [
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=0.0, top_p=0.9),
        SamplingParams(seed=3, stream=9),
    ]
    sequences = [
        Sequence(request_id=i, prompt_ids=[1], params=p, max_tokens=9, stream_key=stream_key(3, i), token_ids=[4] * i)
        for i, p in enumerate(params)
    ]
    host = SamplingBatch.build(sequences, torch.device("cpu"))
    device = SamplingBatch.read(torch.from_numpy(list_columns(sequences)), SamplingKind.find(sequences))
    for name in ("stream_keys", "positions", "temperature", "top_k", "top_p"):
        ours, theirs = getattr(host, name), getattr(device, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert (host.is_warped, host.is_truncated, host.is_noisy, host.is_greedy) == (True, True, True, True)


def test_the_sampling_state_of_the_same_sequences_follows_their_positions():
    """Beside others, in another order, or with one less, it is theirs: all is as if it were built anew."""
    rows, device = SamplingRows(), torch.device("cpu")
    sequences = [
        Sequence(
            request_id=index,
            prompt_ids=[0],
            params=SamplingParams(temperature=0.5 * index, top_k=index, top_p=1 - 0.1 * index),
            max_tokens=8,
            stream_key=stream_key(3, index),
        )
        for index in range(3)
    ]
    for running in (sequences, sequences, sequences[:2], sequences[1::-1], sequences):
        for sequence in running:
            sequence.token_ids.append(1)
        built, expected = rows.build(running, device), SamplingBatch.build(running, device)
        for name, value in vars(expected).items():
            assert torch.equal(torch.as_tensor(getattr(built, name)), torch.as_tensor(value)), name
        elsewhere = rows.build(running, torch.device("meta"))  # n-grams draft on the host, a GPU verifies
        assert {value.device.type for value in vars(elsewhere).values() if isinstance(value, torch.Tensor)} == {"meta"}
