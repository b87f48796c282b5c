"""The GPU kernels against PyTorch's operators: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrpo import sampling
from fastgrpo.kernels import cpu, gpu
from fastgrpo.sampling import SamplingBatch, gumbel_noise, gumbel_noise_of, sample, stream_key

pytest.importorskip("triton")
from fastgrpo.kernels import gpu_sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def gpu_path(monkeypatch):
    """What asks whether there are GPU kernels hears yes, and the CPU's are not there."""
    monkeypatch.setattr(gpu, "runs_on", lambda _: True)
    monkeypatch.setattr(sampling, "has_kernels", lambda _: False)


@pytest.fixture
def operators(monkeypatch):
    """PyTorch's operators alone."""
    monkeypatch.setattr(gpu, "runs_on", lambda _: False)
    monkeypatch.setattr(sampling, "has_kernels", lambda _: False)


def build_rows(num_rows, temperature=1.0, seed=3):
    blank = SamplingBatch.build_blank(num_rows, DEVICE)
    return replace(
        blank,
        stream_keys=torch.tensor([stream_key(seed, row) for row in range(num_rows)], device=DEVICE),
        positions=torch.arange(num_rows, device=DEVICE) * 977,
        temperature=torch.full((num_rows,), temperature, device=DEVICE),
        is_warped=temperature != 1,
        is_noisy=temperature > 0,
    )


def build_logits(num_rows, width, dtype=F32, seed=1):
    return (torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 4).to(DEVICE, dtype)


def build_vocabulary(width):
    return torch.arange(width, dtype=torch.int32, device=DEVICE)


# -- noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 50, 1024, 3000])
def test_noise_is_that_of_the_operators(width, operators):
    """The integers are the same; the logarithms may differ in the last place, which moves a token only where two
    scores are as near as that."""
    rows, ids = build_rows(5), torch.randperm(50000)[:width].int().to(DEVICE)
    ours = gpu_sampling.gumbel_noise(rows.stream_keys, rows.positions, ids)
    assert torch.allclose(ours, gumbel_noise(rows.stream_keys, rows.positions, ids), rtol=3e-7, atol=3e-7)
    assert torch.equal(ours, gpu_sampling.gumbel_noise(rows.stream_keys, rows.positions, ids.expand(5, -1)))
    assert torch.equal(ours[:, -1:], gpu_sampling.gumbel_noise(rows.stream_keys, rows.positions, ids[-1:]))


@pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")
def test_noise_is_that_of_the_cpu_kernels():
    """To the last bit on a GPU; the interpreter has no fused product and sum."""
    rows, ids = build_rows(4), build_vocabulary(5000)
    ours = gpu_sampling.gumbel_noise(rows.stream_keys, rows.positions, ids).cpu()
    theirs = cpu.gumbel_noise(rows.stream_keys.cpu(), rows.positions.cpu(), ids.cpu())
    assert torch.equal(ours, theirs) if DEVICE.type == "cuda" else torch.allclose(ours, theirs, rtol=2e-7, atol=2e-7)


def test_the_law_takes_its_noise_from_the_kernel(gpu_path):
    rows, ids = build_rows(3), build_vocabulary(100)
    expected = gpu_sampling.gumbel_noise(rows.stream_keys, rows.positions, ids)
    assert torch.equal(gumbel_noise(rows.stream_keys, rows.positions, ids), expected)
    assert torch.equal(gumbel_noise_of(rows.stream_keys, rows.positions, ids.expand(3, -1)), expected)


# -- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("width", [5, 2048, 5003])
def test_sampled_tokens_are_those_of_the_operators(dtype, temperature, width, operators):
    rows, logits = build_rows(7, temperature), build_logits(7, width, dtype)
    logits[2, 1:] = -math.inf
    every = torch.arange(7, device=DEVICE)
    tokens, logprobs, entropies = run(logits, every, rows)
    expected, expected_logprobs = sample(logits, rows, build_vocabulary(width))
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, expected_logprobs, atol=1e-5)
    divisor = temperature or 1.0
    reference = torch.distributions.Categorical(logits=logits.float() / divisor).entropy()
    assert torch.allclose(entropies, reference, atol=1e-4)


def run(logits, index, rows):
    return gpu_sampling.sample(logits, index, rows.stream_keys, rows.positions, rows.temperature)


def test_many_seeds_give_the_tokens_of_the_operators(operators):
    logits = build_logits(6, 700)
    for seed in range(12):
        rows = build_rows(6, 0.9, seed)
        tokens = run(logits, torch.arange(6, device=DEVICE), rows)[0]
        assert torch.equal(tokens, sample(logits, rows, build_vocabulary(700))[0])


def test_only_rows_that_are_asked_for_are_read():
    logits, rows = build_logits(9, 3000), build_rows(5)
    index = torch.tensor([4, -1, 0, 8, -1], device=DEVICE)
    tokens, logprobs, entropies = run(logits, index, rows)
    poisoned = logits.clone()
    poisoned[[1, 2, 3, 5, 6, 7]] = math.nan
    for ours, theirs in zip((tokens, logprobs, entropies), run(poisoned, index, rows), strict=True):
        assert torch.equal(ours, theirs)
    assert tokens[[1, 4]].tolist() == [-1, -1] and logprobs[[1, 4]].tolist() == [0, 0]
    alone = run(logits, index[3:4], rows.rows(torch.tensor([3], device=DEVICE)))
    assert torch.equal(tokens[3:4], alone[0]) and torch.equal(logprobs[3:4], alone[1]), "whatever stands beside it"
    assert run(logits, index[:0], rows.rows(index[:0]))[0].shape == (0,)


def test_equal_scores_give_the_first_token(gpu_path):
    logits = torch.zeros(1, 9000, device=DEVICE)
    logits[0, [4040, 4041, 5999, 8999]] = 1.0
    assert sample(logits, build_rows(1, 0.0), build_vocabulary(9000))[0].tolist() == [4040]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_logprob(bad, gpu_path):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 2500] = bad
    logits[2, 7] = -math.inf
    tokens, logprobs = sample(logits, build_rows(3), build_vocabulary(5000))
    assert logprobs.isnan().tolist() == [False, True, False]
    assert bool(((tokens >= 0) & (tokens < 5000)).all())


def test_truncated_rows_are_left_to_the_operators(gpu_path):
    rows = replace(build_rows(4), is_truncated=True, top_k=torch.full((4,), 1, device=DEVICE))
    logits = build_logits(4, 300)
    assert torch.equal(sample(logits, rows, build_vocabulary(300))[0], logits.argmax(-1))


# -- all of them ---------------------------------------------------------------------------------------------


def test_every_kernel_compiles_for_a_hopper_gpu():
    """The interpreter forgives what the compiler does not."""
    script = Path(__file__).with_name("compile_gpu_kernels.py")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(" STACK:0 " in line for line in done.stdout.splitlines() if "STACK" in line), "registers are spilled"
