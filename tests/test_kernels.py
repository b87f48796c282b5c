"""The CPU kernels against the same in PyTorch's operators."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import pickle
import pwd
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgrpo import sampling
from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.cache import locate
from fastgrpo.cache_folder import find_cache_folder
from fastgrpo.drafters import beams
from fastgrpo.drafters.beams import rank_candidates
from fastgrpo.kernels import build, cpu, linear, matrices
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.kernels.linear import PackedLinear
from fastgrpo.machine import list_cpu_flags
from fastgrpo.sampling import SamplingBatch, gumbel_noise, gumbel_noise_of, sample, stream_key
from fastgrpo.types import SamplingParams, Sequence

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")
BF16, F32 = torch.bfloat16, torch.float32
TYPES = [(BF16, BF16), (F32, F32), (F32, BF16)]


def _rows(num_rows, **params):
    return SamplingBatch.build(
        [
            Sequence(
                request_id=i, prompt_ids=[0], params=SamplingParams(**params), max_tokens=9, stream_key=stream_key(3, i)
            )
            for i in range(num_rows)
        ],
        torch.device("cpu"),
    )


def _without_kernels(monkeypatch):
    monkeypatch.setattr(sampling, "has_kernels", lambda _: False)


@pytest.mark.parametrize("width", [1, 15, 16, 50, 3000])
def test_noise_is_that_of_the_operators(width, monkeypatch):
    rows, ids = _rows(7), torch.randperm(50000)[:width].int()
    ours = gumbel_noise(rows.stream_keys, rows.positions, ids)
    assert torch.equal(ours[:, -1:], gumbel_noise(rows.stream_keys, rows.positions, ids[-1:])), "wherever it stands"
    assert torch.equal(ours, gumbel_noise_of(rows.stream_keys, rows.positions, ids.expand(7, -1)))
    _without_kernels(monkeypatch)
    theirs = gumbel_noise(rows.stream_keys, rows.positions, ids)
    assert torch.allclose(ours, theirs, rtol=3e-7, atol=3e-7)
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", ["random", "rising", "falling", "flat", "late spike", "few", "far apart"])
def test_no_token_that_wins_is_passed_over(dtype, shape):
    """Noise is computed of tokens near the best alone: the winner is that of all noise, wherever large logits stand."""
    rows, width = _rows(400), 5003
    logits = torch.randn(400, width, generator=torch.Generator().manual_seed(1))
    if shape == "rising":
        logits += torch.linspace(0, 30, width)
    elif shape == "falling":
        logits -= torch.linspace(0, 30, width)
    elif shape == "flat":
        logits.zero_()
    elif shape == "late spike":
        logits[:, 4500] += 20 * torch.rand(400)
    elif shape == "few":
        logits[:, torch.arange(width) % 997 != 3] = -math.inf
    elif shape == "far apart":
        logits *= 40
    logits = logits.to(dtype)
    noise = gumbel_noise(rows.stream_keys, rows.positions, torch.arange(width, dtype=torch.int32))
    tokens, logprobs, _ = sample(logits, rows, torch.arange(width, dtype=torch.int32))
    assert torch.equal(tokens, (noise + logits.float()).argmax(-1))
    expected = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("width", [5, 16, 1024, 1040, 5003])
def test_sampled_tokens_are_those_of_the_operators(dtype, temperature, width, monkeypatch):
    rows, vocabulary = _rows(9, temperature=temperature), torch.arange(width, dtype=torch.int32)
    logits = (torch.randn(9, width, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    logits[2, 1:] = -math.inf
    ours = sample(logits, rows, vocabulary)
    alone = [sample(logits[i : i + 1], rows.rows(torch.tensor([i])), vocabulary) for i in range(9)]
    for together, apart in zip(ours, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))
    _without_kernels(monkeypatch)
    theirs = sample(logits, rows, vocabulary)
    assert torch.equal(ours[0], theirs[0])
    assert torch.allclose(ours[1], theirs[1], atol=1e-5)
    assert torch.allclose(ours[2], theirs[2], atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 40.0, 1e30])
def test_entropies_are_those_of_float64(dtype, spread):
    """From a flat distribution to a certain one; the greatest logit may stand in any block."""
    width = 5003
    logits = (torch.randn(12, width, generator=torch.Generator().manual_seed(2)) * spread).to(dtype)
    logits[3] = logits[3].sort().values
    logits[4] = logits[4].sort(descending=True).values
    logits[5, :4000] = -math.inf
    logits[6, 4000:] = torch.finfo(dtype).min
    logits[7, 1:] = -math.inf
    entropies = sample(logits, _rows(12), torch.arange(width, dtype=torch.int32))[2]
    expected = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    assert torch.allclose(entropies.double(), expected, rtol=2e-6, atol=1e-6)
    assert (entropies >= 0).all() and entropies[7] == 0


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("with_noise", [True, False])
@pytest.mark.parametrize("width, most", [(5, 9), (64, 1), (1000, 8), (4096, 3)])
def test_candidates_are_those_of_the_operators(dtype, temperature, with_noise, width, most, monkeypatch):
    rows = _rows(4, temperature=temperature)
    vocabulary = torch.randperm(50000, generator=torch.Generator().manual_seed(2))[:width].sort().values.int()
    logits = torch.randn(4, 3, width, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    if temperature == 0 or not with_noise:  # no two alike: of equal ones the operators choose as they like
        logits = (torch.arange(width) * 0.25).to(F32 if width > 256 else dtype)[torch.rand(4, 3, width).argsort(-1)]
    ours = rank_candidates(logits, vocabulary, rows, most, with_noise=with_noise)
    monkeypatch.setattr(beams, "has_kernels", lambda _: False)
    theirs = rank_candidates(logits, vocabulary, rows, most, with_noise=with_noise)
    assert torch.equal(ours[1], theirs[1])
    assert torch.allclose(ours[0], theirs[0], atol=2e-5)


def test_equal_candidates_stand_in_the_order_of_the_vocabulary():
    logits = torch.zeros(1, 1, 300)
    logits[0, 0, [7, 130, 131, 299]] = 2.0
    tokens = rank_candidates(logits, 3 * torch.arange(300, dtype=torch.int32), _rows(1, temperature=0.0), 6)[1]
    assert tokens[0, 0].tolist() == [21, 390, 393, 897, 0, 3]


def test_equal_scores_give_the_first_token():
    logits = torch.zeros(1, 3000)
    logits[0, [40, 41, 1999, 2999]] = 1.0
    assert sample(logits, _rows(1, temperature=0.0), torch.arange(3000, dtype=torch.int32))[0].tolist() == [40]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_logprob(bad):
    logits = torch.zeros(3, 2000)
    logits[1, 1500] = bad
    logits[2, 7] = -math.inf
    _, logprobs, entropies = sample(logits, _rows(3), torch.arange(2000, dtype=torch.int32))
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("residual_type", "dtype"), TYPES)
@pytest.mark.parametrize("with_delta", [True, False])
def test_norm_rounds_as_transformers_does(residual_type, dtype, with_delta):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm = LlamaRMSNorm(100, eps=1e-5).to(residual_type)
    norm.weight.data.normal_()
    residual, delta = torch.randn(33, 100).to(residual_type), torch.randn(33, 100).to(dtype)
    expected = residual + delta if with_delta else residual.clone()
    out = cpu.add_norm(residual, delta if with_delta else None, norm.weight.data, 1e-5, dtype)
    assert out.dtype == dtype and torch.equal(residual, expected)
    theirs = norm(expected).to(dtype).float()
    tolerance = 2e-6 if dtype == F32 else 2**-7  # the last bit of a bfloat16
    assert torch.allclose(out.float(), theirs, rtol=tolerance, atol=1e-6)
    assert (out.float() == theirs).float().mean() > 0.9 or dtype == F32


@pytest.mark.parametrize(("weight_type", "dtype"), TYPES)
def test_heads_are_normed_each_for_itself(weight_type, dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm, states = Qwen3RMSNorm(20).to(weight_type), torch.randn(5, 100).to(dtype)
    norm.weight.data.normal_()
    expected = norm(states[:, :60].unflatten(1, (3, 20))).flatten(1).to(dtype)
    rest = states[:, 60:].clone()
    cpu.norm_heads_(states[:, :60], norm.weight.data, norm.variance_epsilon)
    assert torch.allclose(states[:, :60].float(), expected.float(), rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-6)
    assert torch.equal(states[:, 60:], rest)


@pytest.mark.parametrize(("cos_type", "dtype"), TYPES)
def test_rotation_rounds_as_transformers_does(cos_type, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    tokens, heads, kv_heads, width = 5, 4, 2, 12
    query, key, value = (torch.randn(tokens, n * width).to(dtype) for n in (heads, kv_heads, kv_heads))
    cos, sin = (torch.randn(tokens, width).to(cos_type) for _ in range(2))
    shaped = [x.view(1, tokens, -1, width).transpose(1, 2) for x in (query, key)]
    expected = [
        x.transpose(1, 2).reshape(tokens, -1).to(dtype) for x in apply_rotary_pos_emb(*shaped, cos[None], sin[None])
    ]
    keys, values = (torch.zeros(20, kv_heads * width, dtype=dtype) for _ in range(2))
    places = torch.tensor([3, 4, 19, 0, 7])
    states = torch.cat((query, key, value), -1)
    cpu.rotate_and_cache_(states, cos, sin, places, keys, values)
    query = states[:, : heads * width]
    assert torch.allclose(query.float(), expected[0].float(), rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-6)
    assert torch.equal(keys[places], expected[1]) or torch.allclose(
        keys[places].float(), expected[1].float(), atol=1e-6
    )
    assert torch.equal(values[places], value) and not keys[1].any()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_activation(dtype):
    gate, up = torch.randn(7, 50).to(dtype) * 8, torch.randn(7, 50).to(dtype)
    expected = F.silu(gate) * up
    assert torch.allclose(
        cpu.multiply_silu(torch.cat((gate, up), -1), 7).float(), expected.float(), rtol=1e-2 if dtype == BF16 else 1e-6
    )


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 16), (4, 4, 20), (9, 3, 64)])
def test_attention_is_that_of_the_dense_mask(dtype, heads, kv_heads, width):
    torch.manual_seed(0)
    lengths, num_nodes, seen, num_blocks = [0, 5, 64, 130, 63], [1, 4, 3, 4, 2], 6, 3
    most, before = max(num_nodes), 2  # two of the seen positions are of nodes cached before
    visible = torch.rand(len(lengths), most, seen) < 0.5
    visible[:, :, before:] = torch.tril(visible[:, :, before:])
    visible[:, torch.arange(most), before + torch.arange(most)] = True
    num_positions = len(lengths) * num_blocks * BLOCK_SIZE
    keys, values = (torch.randn(num_positions, kv_heads * width).to(dtype) for _ in range(2))
    query = torch.randn(sum(num_nodes), heads * width).to(dtype)
    blocks = torch.randperm(len(lengths) * num_blocks).view(-1, num_blocks) * BLOCK_SIZE
    blocks[4, 0] = blocks[3, 0]  # shared, as a prompt is
    counts = torch.tensor(num_nodes)
    given = {"head_dim": width, "scale": 0.3}

    def attend(rows):
        starts = counts[rows].cumsum(0) - counts[rows]
        packed = torch.cat([query[int(counts[:r].sum()) :][: counts[r]] for r in rows])
        tensors = {"num_nodes": counts[rows], "lengths": torch.tensor(lengths)[rows], "blocks": blocks[rows]}
        return cpu.attend(packed, keys, values, starts=starts, visible=visible[rows], **tensors, **given)

    ours = attend(list(range(5)))
    assert torch.equal(ours, torch.cat([attend([row]) for row in range(5)])), "each row is its own"
    token = 0
    for row, (length, count) in enumerate(zip(lengths, num_nodes, strict=True)):
        total = length + before + count
        own = locate(blocks[row, None], torch.arange(total)[None])[0]
        k, v = (x[own].view(total, kv_heads, width).transpose(0, 1).float() for x in (keys, values))
        q = query[token : token + count].view(count, heads, width).transpose(0, 1).float()
        mask = torch.ones(count, total, dtype=torch.bool)
        mask[:, length:] = visible[row, :count, : before + count]
        repeats = heads // kv_heads
        args = (q, k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0))
        expected = F.scaled_dot_product_attention(*args, attn_mask=mask, scale=0.3).transpose(0, 1).flatten(1)
        got = ours[token : token + count].float()
        assert torch.allclose(got, expected, rtol=1e-2 if dtype == BF16 else 1e-4, atol=1e-2 if dtype == BF16 else 1e-5)
        token += count


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", [0, 5, 28, 31, 32, 60, 63, 64, 94, 124, 127, 128, 160])
def test_a_node_of_a_tree_has_the_bits_of_its_path_in_a_row(dtype, length):
    """Where chunks, blocks and segments end, too: the path of a deep node goes on in the next ones."""
    torch.manual_seed(length)
    kv_heads, repeats, width = 2, 3, 64
    parents = [-1, 0, 0, 1, 2, 2, 4, 6, 1, 7]
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    visible = torch.zeros(1, len(parents), len(parents), dtype=torch.bool)
    for node, path in enumerate(paths):
        visible[0, node, path] = True
    blocks = torch.tensor([[3, 0, 2]]) * BLOCK_SIZE
    keys, values = (torch.randn(4 * BLOCK_SIZE, kv_heads * width).to(dtype) for _ in range(2))
    query = torch.randn(len(parents), kv_heads * repeats * width).to(dtype)

    def attend(query, keys, values, length, visible):
        counts = torch.tensor([len(query)])
        rows = {"starts": torch.tensor([0]), "num_nodes": counts, "lengths": torch.tensor([length]), "blocks": blocks}
        return cpu.attend(query, keys, values, visible=visible, head_dim=width, scale=0.2, **rows)

    tree = attend(query, keys, values, length, visible)
    places = locate(blocks, torch.arange(length + len(parents))[None])[0]
    for node, path in enumerate(paths):
        row_keys, row_values = keys.clone(), values.clone()
        for position, each in enumerate(path):
            row_keys[places[length + position]] = keys[places[length + each]]
            row_values[places[length + position]] = values[places[length + each]]
        seen = torch.ones(1, 1, 1, dtype=torch.bool)
        alone = attend(query[node, None], row_keys, row_values, length + len(path) - 1, seen)
        assert torch.equal(tree[node], alone[0]), node


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_that_share_a_prompt_have_the_bits_of_each_alone(dtype):
    """More of them than are read for together, on one thread and on two; some are still at the end of the prompt."""
    torch.manual_seed(0)
    rows, kv_heads, repeats, width = 40, 2, 3, 64
    lengths = torch.randint(2 * BLOCK_SIZE - 40, 3 * BLOCK_SIZE, (rows,))
    blocks = torch.arange(rows * 4).view(rows, 4) * BLOCK_SIZE
    blocks[3:37, :2] = blocks[3, :2]
    counts, visible = torch.randint(1, 4, (rows,)), torch.ones(rows, 3, 3, dtype=torch.bool).tril()
    keys, values = (torch.randn(rows * 4 * BLOCK_SIZE, kv_heads * width).to(dtype) for _ in range(2))
    query = torch.randn(int(counts.sum()), kv_heads * repeats * width).to(dtype)
    starts = counts.cumsum(0) - counts

    def attend(chosen):
        packed = torch.cat([query[starts[row] : starts[row] + counts[row]] for row in chosen])
        own = {"starts": counts[chosen].cumsum(0) - counts[chosen], "num_nodes": counts[chosen]}
        own |= {"lengths": lengths[chosen], "blocks": blocks[chosen], "visible": visible[chosen]}
        return cpu.attend(packed, keys, values, **own, head_dim=width, scale=0.2)

    alone = torch.cat([attend([row]) for row in range(rows)])
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attend(list(range(rows))), alone), threads
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_row_that_overflowed_leaves_the_others_as_they_are(dtype):
    """One thread, so that the rows behind it are read into where it was."""
    torch.manual_seed(0)
    keys, values = (torch.randn(3 * BLOCK_SIZE, 64).to(dtype) for _ in range(2))
    values[:BLOCK_SIZE] = math.inf
    query, one = torch.randn(3, 64).to(dtype), torch.ones(1, 1, 1, dtype=torch.bool)

    def attend(rows):
        given = {"starts": torch.arange(len(rows)), "num_nodes": torch.ones(len(rows), dtype=torch.int64)}
        given |= {"lengths": torch.tensor([40, 3, 35])[rows], "blocks": torch.tensor(rows)[:, None] * BLOCK_SIZE}
        visible = one.expand(len(rows), 1, 1)
        return cpu.attend(query[rows], keys, values, **given, visible=visible, head_dim=64, scale=0.2)

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together, alone = attend([0, 1, 2]), torch.cat([attend([row]) for row in (1, 2)])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.isfinite(together[1:]).all() and torch.equal(together[1:], alone)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", [0, 29, 40])
def test_a_node_that_overflowed_leaves_those_that_do_not_see_it_as_they_are(dtype, length):
    torch.manual_seed(length)
    paths = ([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4])
    visible = torch.zeros(1, 5, 5, dtype=torch.bool)
    for node, path in enumerate(paths):
        visible[0, node, path] = True
    keys, values = (torch.randn(BLOCK_SIZE, 64).to(dtype) for _ in range(2))
    given = {"starts": torch.tensor([0]), "num_nodes": torch.tensor([5]), "lengths": torch.tensor([length])}
    given |= {"blocks": torch.tensor([[0]]), "visible": visible, "head_dim": 64, "scale": 0.2}
    query = torch.randn(5, 64).to(dtype)
    whole = cpu.attend(query, keys, values, **given)
    for node in range(1, 5):
        broken = values.clone()
        broken[length + node] = math.inf
        kept = ~visible[0, :, node]
        assert torch.equal(cpu.attend(query, keys, broken, **given)[kept], whole[kept]), node


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", [0, 100])
def test_a_long_prompt_has_the_bits_of_each_of_its_tokens_alone(dtype, length):
    """Beside a short row; more nodes than a task has, over several segments."""
    torch.manual_seed(length)
    kv_heads, repeats, width, count = 2, 3, 64, 300
    blocks = torch.arange(2 * 7).flip(0).view(2, 7) * BLOCK_SIZE
    keys, values = (torch.randn(14 * BLOCK_SIZE, kv_heads * width).to(dtype) for _ in range(2))
    query = torch.randn(count + 1, kv_heads * repeats * width).to(dtype)
    visible = torch.ones(count, count, dtype=torch.bool).tril().expand(2, count, count)
    given = {"head_dim": width, "scale": 0.2}

    def attend(query, counts, lengths, blocks, visible):
        counts = torch.tensor(counts)
        rows = {"starts": counts.cumsum(0) - counts, "num_nodes": counts, "lengths": torch.tensor(lengths)}
        return cpu.attend(query, keys, values, **rows, blocks=blocks, visible=visible, **given)

    both = attend(query, [count, 1], [length, 150], blocks, visible)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert torch.equal(both[-1], attend(query[-1:], [1], [150], blocks[1:], one)[0])
    for node in (0, 1, 31, 63, 64, 65, 127, 128, 200, 255, 299):
        alone = attend(query[node, None], [1], [length + node], blocks[:1], one)
        assert torch.equal(both[node], alone[0]), node


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process has")
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_long_row_of_many_nodes_takes_little_memory_and_keeps_its_bits(dtype):
    """All segments' sums of both key heads would take 42 MB, those of one are few enough to be kept."""
    torch.manual_seed(0)
    counts, lengths, repeats, width = torch.tensor([64, 3]), torch.tensor([4030, 100]), 16, 128
    blocks = torch.arange(128).view(2, 64) * BLOCK_SIZE
    keys, values = (torch.randn(128 * BLOCK_SIZE, 2 * width).to(dtype) for _ in range(2))
    query = torch.randn(67, 2 * repeats * width).to(dtype)
    rows = {"starts": counts.cumsum(0) - counts, "num_nodes": counts, "lengths": lengths, "blocks": blocks}
    rows["visible"] = torch.ones(2, 64, 64, dtype=torch.bool).tril()

    def attend(heads):
        own = (x.unflatten(1, (2, -1))[:, heads].flatten(1).contiguous() for x in (query, keys, values))
        return cpu.attend(*own, **rows, head_dim=width, scale=0.1)

    apart = torch.cat([attend([head]) for head in range(2)], 1)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + (28 << 20), limits[1]))
    try:
        together = attend([0, 1])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("inputs", [33, 64, 768])
def test_rows_have_the_same_products_whoever_lays_their_tiles(dtype, inputs):
    """Each thread all of them, or each some; up to the rows that are computed at a time, and beyond."""
    torch.manual_seed(inputs)
    outputs, counts = 100, (1, 5, 12, 13, 24, 100, 170, 171, 240, 241, 500)
    x, bias = torch.randn(max(counts), inputs).to(dtype), torch.randn(outputs).to(dtype)
    layout = cpu.pack_weights([torch.randn(outputs, inputs).to(dtype)])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([cpu.multiply(row[None], layout, bias, outputs) for row in x])
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for count in counts:
                assert torch.equal(cpu.multiply(x[:count], layout, bias, outputs), alone[:count]), (threads, count)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_have_no_products(dtype):
    layout = cpu.pack_weights([torch.randn(8, 4, dtype=dtype)])
    assert cpu.multiply(torch.empty(0, 4, dtype=dtype), layout, None, 8).shape == (0, 8)


def test_without_a_compiler_it_says_so_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "missing"))
    build.load_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="could not be compiled.*install gcc, or set FASTGRPO_KERNELS=off"):
            assert not cpu.is_available()
        assert not cpu.is_available()
    finally:
        build.load_library.cache_clear()


def test_a_damaged_library_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path))
    build.load_library.cache_clear()
    try:
        library = build._find_library()
        whole = library.read_bytes()
        assert build._is_whole(library)
        for damaged in (whole[:4], whole[:-1], whole[:60_000], bytes(len(whole))):  # whose loading may end the process
            library.write_bytes(damaged)
            assert not build._is_whole(library)
        assert cpu.is_available()
        assert build._is_whole(library)
    finally:
        build.load_library.cache_clear()


@pytest.mark.parametrize(
    ("command", "message"), [("gcc '", "CC is .*, which is no command"), ("{} x", "caf. is unknown")]
)
def test_a_compiler_that_is_none_is_said_in_a_warning(command, message, monkeypatch, tmp_path):
    script = tmp_path / "compiler"
    script.write_bytes(b"#!/bin/sh\nprintf 'caf\\351 is unknown' >&2\nexit 1\n")  # in no locale's words
    script.chmod(0o755)
    monkeypatch.setenv("CC", command.format(script))
    build.load_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=message):
            assert build.load_library() is None
    finally:
        build.load_library.cache_clear()


def test_a_compiler_may_be_named_with_arguments(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", f"{shutil.which('gcc') or shutil.which('cc')} -g0")
    monkeypatch.setattr(build, "_compile", lambda compiler, library: commands.append(compiler))
    with_arguments = build._find_library()
    assert commands[0][1:] == ["-g0"]
    monkeypatch.setenv("CC", commands[0][0])
    assert build._find_library() != with_arguments


@pytest.mark.parametrize("setting", [None, "~/kept"])
def test_a_user_without_a_home_keeps_nothing(setting, monkeypatch):
    for name in ("FASTGRPO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv("FASTGRPO_CACHE", setting)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.getpwnam("nobody of that name"))
    folder = find_cache_folder()
    assert folder.is_absolute() and not folder.parent.exists()


@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_are_the_same(bias):
    layers = [nn.Linear(40, outputs, bias=bias).to(BF16) for outputs in (24, 8)]
    packed, plain = PackedLinear(layers), PackedLinear(layers, may_pack=False)
    for tokens in (1, 7, 70):
        x = torch.randn(tokens, 40).to(BF16)
        with torch.no_grad():
            expected = torch.cat([layer(x) for layer in layers], -1)
            assert torch.equal(plain(x), expected)
            assert torch.allclose(packed(x).float(), expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("outputs, inputs", [((5,), 3), ((24, 8, 1), 40), ((96, 33), 700)])
@pytest.mark.parametrize("bias", [True, False])
def test_own_products_are_rounded_sums(dtype, outputs, inputs, bias):
    """Whatever the processor multiplies: in float64, rounded once; a row is the same in any batch."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(count, inputs, generator=generator).to(dtype) for count in outputs]
    shift = torch.randn(sum(outputs), generator=generator).to(dtype) if bias else None
    layout = cpu.pack_weights(weights)
    x = torch.randn(300, 2 * inputs, generator=generator).to(dtype)[:, :inputs]  # rows that stand apart
    exact = F.linear(x.double(), torch.cat(weights).double(), None if shift is None else shift.double())
    whole = cpu.multiply(x, layout, shift, sum(outputs))
    rounding = {BF16: 2**-8, F32: 0.0}[dtype]
    assert torch.allclose(whole.double(), exact, rtol=rounding, atol=3e-6 * float(exact.abs().max()))
    for rows in (1, 2, 3, 5, 7, 11, 12, 13, 25, 119, 121, 239, 241):
        assert torch.equal(cpu.multiply(x[7 : 7 + rows], layout, shift, sum(outputs)), whole[7 : 7 + rows])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("outputs, inputs", [((24, 8, 1), 41), ((96, 33), 700), ((70, 3), 600)])
def test_weights_are_laid_out_over_whatever_stood_in_kept_memory(dtype, outputs, inputs):
    weights = [torch.randn(count, inputs).to(dtype) for count in outputs]
    x, memory = torch.randn(5, inputs).to(dtype), KeptMemory()
    expected = cpu.multiply(x, cpu.pack_weights(weights), None, sum(outputs))
    first = cpu.pack_weights(weights, memory).fill_(torch.nan)
    memory.begin()
    again = cpu.pack_weights(weights, memory)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(cpu.multiply(x, again, None, sum(outputs)), expected)
    other = cpu.pack_weights(weights[:1], memory)
    assert other.data_ptr() != again.data_ptr(), "until memory begins anew, all that was taken is in use"


def test_kept_memory_is_as_large_as_what_was_taken_last():
    memory = KeptMemory()
    first, second = (memory.take((rows, 4), F32) for rows in (3, 5))
    memory.begin()
    assert memory.take((3, 4), F32) is first and memory.take((5, 4), F32) is second
    assert memory.num_bytes == (3 + 5) * 4 * 4
    memory.begin()
    assert memory.take((3, 4), BF16) is not first, "another type"
    assert memory.num_bytes == 3 * 4 * 2, "what stood behind it was for other weights"
    assert pickle.loads(pickle.dumps(memory)).num_bytes == 0


@pytest.mark.parametrize("obstacle", [None, "no such pages", "no memory"])
def test_kept_memory_stands_in_large_pages_where_there_are_some(obstacle, monkeypatch):
    """Larger tensors, side by side, each at a line of the processor's caches; all of them are memory of their own."""
    if obstacle == "no such pages":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif obstacle == "no memory":
        monkeypatch.setattr(mmap, "mmap", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    shapes, memory = [(70001, 7), (2**19, 3), (1, 1), (9 * 2**20, 2), (2**17, 1)], KeptMemory()
    tensors = [memory.take(shape, F32).fill_(number) for number, shape in enumerate(shapes)]
    assert all(tensor.eq(number).all() and tensor.shape == shapes[number] for number, tensor in enumerate(tensors))
    assert memory.num_bytes == sum(tensor.nbytes for tensor in tensors)
    memory.begin()
    assert all(memory.take(shape, F32) is tensor for shape, tensor in zip(shapes, tensors, strict=True))
    if obstacle is None and hasattr(mmap, "MADV_HUGEPAGE"):
        places = [tensor.data_ptr() for tensor in tensors]
        assert places[0] % 2**21 == 0 and places[3] % 2**21 == 0, "a new piece for what the first has no room for"
        assert places[1] - places[0] == -(-tensors[0].nbytes // 128) * 128 and places[4] % 128 == 0


def build_less(name, change, folder):
    """The kernels of one file, compiled with some flags changed."""
    source, library = Path(build.__file__).parent / name, folder / "less.so"
    flags = [change.get(flag, flag) for flag in build._FLAGS]
    build._run(*shlex.split(os.environ.get("CC", "gcc")), *flags, "-shared", str(source), "-o", str(library))
    return library


@pytest.mark.skipif("avx2" not in list_cpu_flags(), reason="another processor")
@pytest.mark.parametrize("change", [{"-march=native": "-march=x86-64-v3"}, {"-Wno-psabi": "-mno-avx512bf16"}])
def test_own_products_of_processors_that_can_do_less(change, monkeypatch, tmp_path):
    library = build_less("products.c", change, tmp_path)
    x, weight = torch.randn(13, 41).to(BF16), torch.randn(33, 41).to(BF16)
    ours = cpu.multiply(x, cpu.pack_weights([weight]), None, 33)
    monkeypatch.setattr(cpu, "load_library", lambda: ctypes.CDLL(str(library)))
    theirs = cpu.multiply(x, cpu.pack_weights([weight]), None, 33)
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-4)
    for dtype in (BF16, F32):
        test_own_products_are_rounded_sums(dtype, (24, 8, 1), 41, True)


@pytest.mark.skipif("avx2" not in list_cpu_flags(), reason="another processor")
@pytest.mark.parametrize("change", [{"-march=native": "-march=x86-64-v3"}, {"-Wno-psabi": "-mno-avx512bf16"}])
def test_attention_of_processors_that_can_do_less(change, monkeypatch, tmp_path):
    library = build_less("attention.c", change, tmp_path)
    monkeypatch.setattr(cpu, "load_library", lambda: ctypes.CDLL(str(library)))
    for dtype in (BF16, F32):
        test_attention_is_that_of_the_dense_mask(dtype, 9, 3, 64)
        test_attention_is_that_of_the_dense_mask(dtype, 4, 4, 20)
        test_a_node_of_a_tree_has_the_bits_of_its_path_in_a_row(dtype, 60)


def load_emulated_matrices(folder: Path) -> ctypes.CDLL:
    """Our products with the matrix instructions in C."""
    source, library = Path(build.__file__).parent / "products.c", folder / "matrices.so"
    flags = (*build._FLAGS, "-ffp-contract=fast", "-mavx512bf16", "-DEMULATED_MATRICES")
    build._run(*shlex.split(os.environ.get("CC", "gcc")), *flags, "-shared", str(source), "-o", str(library))
    return ctypes.CDLL(str(library))


@pytest.mark.skipif("avx512f" not in list_cpu_flags(), reason="another processor")
def test_own_products_in_matrix_registers(monkeypatch, tmp_path):
    """As those without, whatever the sizes; and turned off again, where the processor can do that, too."""
    library = load_emulated_matrices(tmp_path)
    monkeypatch.setattr(cpu, "load_library", lambda: library)
    assert cpu.call("use_matrices", 1) == 1
    for outputs, inputs in (((5,), 3), ((24, 8, 1), 40), ((96, 33), 700), ((64,), 576)):
        test_own_products_are_rounded_sums(BF16, outputs, inputs, True)
    x, layout = torch.randn(9, 41).to(BF16), cpu.pack_weights([torch.randn(33, 41).to(BF16)])
    ours = cpu.multiply(x, layout, None, 33)
    matrices.leave()
    if "avx512_bf16" in list_cpu_flags():
        assert torch.allclose(cpu.multiply(x, layout, None, 33).float(), ours.float(), rtol=2**-7, atol=1e-4)
    test_own_products_are_rounded_sums(F32, (24, 8, 1), 41, True)


@pytest.mark.skipif("avx512_bf16" not in list_cpu_flags(), reason="another processor")
@pytest.mark.parametrize(
    ("is_right", "is_outrun"), [(True, False), (True, True), (False, False)], ids=["fast", "slow", "wrong"]
)
def test_matrix_registers_are_taken_where_they_are_right_and_no_slower(is_right, is_outrun, monkeypatch, tmp_path):
    library = load_emulated_matrices(tmp_path)
    if not is_right:
        monkeypatch.setattr(torch, "allclose", lambda *_, **__: False)
    monkeypatch.setattr(cpu, "load_library", lambda: library)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(linear, "_has_onednn", lambda: True)
    times = iter((2.0, 1.0) if is_outrun else (1.0, 1.0))  # ours and theirs, once
    monkeypatch.setattr(matrices, "_time", lambda multiply, weight: next(times))
    for each in (matrices.are_taken, linear.find_layout):
        each.cache_clear()
    try:
        with contextlib.nullcontext() if is_right else pytest.warns(UserWarning, match="registers .AMX. are wrong"):
            layout = linear.find_layout(BF16)
        assert (layout is linear.OwnLayout) == (is_right and not is_outrun)
        x, weights = torch.tensor([[2.0**30, 1, -(2.0**30), 1]]).to(BF16), cpu.pack_weights([torch.ones(1, 4).to(BF16)])
        sums_apart = float(cpu.multiply(x, weights, None, 1)) == 2  # even and odd inputs, as matrix registers do
        assert sums_apart == (layout is linear.OwnLayout)
        linear.find_layout.cache_clear()
        assert linear.find_layout(BF16) is layout, "as was noted"
    finally:
        for each in (matrices.are_taken, linear.find_layout):
            each.cache_clear()


@pytest.mark.parametrize("note", [None, "{", "{}", "null", "[]"])
def test_products_are_timed_anew_where_the_note_of_it_is_damaged(note, monkeypatch, tmp_path):
    if note is not None:
        (tmp_path / "kernels.json").write_text(note)
    monkeypatch.setattr(cpu, "find_library", lambda: str(tmp_path / "kernels.so"))
    monkeypatch.setattr(matrices, "_time", lambda multiply, weight: multiply)
    assert matrices.are_outrun(lambda weight: 2.0, lambda weight: 1.0)
    assert matrices.are_outrun(lambda weight: 1.0, lambda weight: 1.0), "as was noted"


_STARVED = """
import resource, sys, torch
from pathlib import Path
from fastgrpo.kernels import cpu
torch.set_num_threads(2)
ones = lambda *shape: torch.ones(*shape)
whole = lambda *shape: torch.zeros(*shape, dtype=torch.int64)
rows, inputs, columns = 4096, 2**20, 2**22
x, layout = ones(8, inputs), cpu.pack_weights([ones(1, inputs)])
query, keys = ones(rows, 1024), ones(64, 64)
logits, vocabulary, one = ones(1, 1, columns), torch.arange(columns, dtype=torch.int32), 1 + whole(1)
trees = dict(starts=torch.arange(rows), num_nodes=1 + whole(rows), lengths=whole(rows), blocks=whole(rows, 1))
asked = {
    "product": lambda: cpu.multiply(x, layout, None, 1),  # 32 MiB of tiles
    "attend": lambda: cpu.attend(query, keys, keys, visible=ones(rows, 1, 1).bool(), head_dim=64, scale=1.0, **trees),
    # 42 MiB of queries and sums, beside 16 of what comes out
    "rank": lambda: cpu.rank(logits, vocabulary, one, one, ones(1), 4, with_noise=True)[0],
}[sys.argv[1]]  # 32 MiB of noise and scores
cpu.multiply(ones(8, 8), cpu.pack_weights([ones(8, 8)]), None, 8)  # threads have their stacks
pages = int(Path("/proc/self/statm").read_text().split()[0])
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (24 << 20), hard))
try:
    asked()
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(asked().shape[0])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process has")
@pytest.mark.parametrize(("kernel", "rows"), [("product", 8), ("attend", 4096), ("rank", 1)])
def test_a_kernel_without_memory_says_so_and_works_again(kernel, rows):
    done = subprocess.run([sys.executable, "-c", _STARVED, kernel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, works = done.stdout.splitlines()
    assert f"no memory for what {kernel}_float computes" in error and int(works) == rows


@pytest.mark.parametrize("has_amx", [True, False])
def test_bfloat16_is_left_to_onednn_where_the_processor_has_matrix_instructions(has_amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    linear.find_layout.cache_clear()
    try:
        is_onednn = linear.find_layout(BF16) is linear._OneDNNLayout
        assert is_onednn == linear.wants_round_rows(BF16) == (has_amx and not matrices.are_taken())
        assert not linear.wants_round_rows(F32)
        layer = nn.Linear(40, 24).to(BF16)
        x = torch.randn(7, 40).to(BF16)
        with torch.no_grad():
            assert torch.allclose(PackedLinear([layer])(x).float(), layer(x).float(), rtol=1e-2, atol=1e-2)
    finally:
        linear.find_layout.cache_clear()


def test_a_processor_of_the_same_name_that_can_do_something_else_has_kernels_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, library: library.touch())
    files = set()
    for flags in (["avx2"], ["avx2", "avx512_bf16"], ["avx2"]):
        monkeypatch.setattr(build, "list_cpu_flags", lambda flags=flags: flags)
        files.add(build._find_library())
    assert len(files) == 2


@pytest.mark.parametrize("trouble", ["not a folder", "full", "noexec"])
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(trouble, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGRPO_CACHE", str(tmp_path / ("file/cache" if trouble == "not a folder" else "cache")))
    run, load = build._run, ctypes.CDLL

    def fill(*command):
        if any(str(tmp_path) in word for word in command):
            raise subprocess.CalledProcessError(1, command, stderr="No space left on device")
        return run(*command)

    def refuse(library):
        if library.startswith(str(tmp_path)):
            raise OSError("failed to map segment from shared object")
        return load(library)

    if trouble == "full":
        monkeypatch.setattr(build, "_run", fill)
    elif trouble == "noexec":
        monkeypatch.setattr(ctypes, "CDLL", refuse)
    build.load_library.cache_clear()
    try:
        assert cpu.is_available()
    finally:
        build.load_library.cache_clear()
