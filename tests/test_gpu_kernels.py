"""The GPU kernels against PyTorch's operators: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import EagerRecorder, build_model, expected_tokens
from fastgrpo import attention
from fastgrpo.drafters.beams import rank_candidates
from fastgrpo.engine import Engine
from fastgrpo.kernels import cpu, gpu
from fastgrpo.model import TargetModel, _warn_of
from fastgrpo.sampling import SamplingBatch, gumbel_noise, gumbel_noise_of, sample, stream_key
from fastgrpo.types import SamplingParams, SpeculationPlan

pytest.importorskip("triton")
from triton.compiler.errors import CompilationError

from fastgrpo.kernels import gpu_attention, gpu_decoder, gpu_linear, gpu_ranking, gpu_sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, F32 = torch.bfloat16, torch.float32
HALF = BF16 if DEVICE.type == "cuda" else torch.float16  # the interpreter multiplies no matrices in bfloat16


@pytest.fixture
def gpu_path(layouts_found_anew, monkeypatch):
    """What asks whether there are GPU kernels hears yes, and the CPU's are not there."""
    monkeypatch.setattr(gpu, "runs_on", lambda _: True)
    monkeypatch.setattr(cpu, "is_available", lambda: False)


@pytest.fixture
def operators(layouts_found_anew, monkeypatch):
    """PyTorch's operators alone."""
    monkeypatch.setattr(gpu, "runs_on", lambda _: False)
    monkeypatch.setattr(cpu, "is_available", lambda: False)


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
    expected, expected_logprobs, expected_entropies = sample(logits, rows, build_vocabulary(width))
    assert torch.equal(tokens, expected)
    assert torch.allclose(logprobs, expected_logprobs, atol=1e-5)
    assert torch.allclose(entropies, expected_entropies, atol=1e-4)
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


def test_logprobs_of_equal_tokens_at_a_low_temperature(gpu_path):
    logits = torch.tensor([[20.0, 1.0, 20.0]] * 4, device=DEVICE)
    logprobs = sample(logits, build_rows(4, 1e-5), build_vocabulary(3))[1]
    assert torch.allclose(logprobs, torch.full_like(logprobs, -math.log(2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_logprob(bad, gpu_path):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 2500] = bad
    logits[2, 7] = -math.inf
    tokens, logprobs, entropies = sample(logits, build_rows(3), build_vocabulary(5000))
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False]
    assert bool(((tokens >= 0) & (tokens < 5000)).all())


def test_truncated_rows_are_left_to_the_operators(gpu_path):
    rows = replace(build_rows(4), is_truncated=True, top_k=torch.full((4,), 1, device=DEVICE))
    logits = build_logits(4, 300)
    assert torch.equal(sample(logits, rows, build_vocabulary(300))[0], logits.argmax(-1))


# -- candidates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("num_columns", "width"), [(3, 4), (700, 1), (2048, 3), (5003, 8)])
@pytest.mark.parametrize("with_noise", [True, False])
def test_ranked_candidates_are_those_of_the_operators(dtype, temperature, num_columns, width, with_noise, operators):
    rows = build_rows(3, temperature)
    logits = build_logits(6, num_columns, dtype).unflatten(0, (3, 2))
    vocabulary = torch.randperm(50000, generator=torch.Generator().manual_seed(2))[:num_columns].int().to(DEVICE)
    chances, tokens = rank(logits, vocabulary, rows, width, with_noise=with_noise)
    expected, expected_tokens = rank_candidates(logits, vocabulary, rows, width, with_noise=with_noise)
    assert chances.shape == expected.shape == (3, 2, min(width, num_columns))
    assert torch.allclose(chances, expected, atol=2e-5)
    is_tied = torch.zeros_like(expected, dtype=torch.bool)  # with the one before or behind
    is_tied[..., 1:] = expected.diff().abs() < 1e-5
    is_tied[..., :-1] |= is_tied[..., 1:].clone()
    is_tied[..., -1] |= (dtype == BF16) & (not with_noise or temperature == 0)  # perhaps with the one left out
    assert torch.equal(tokens[~is_tied], expected_tokens[~is_tied])


def rank(logits, vocabulary, rows, width, *, with_noise):
    states = (rows.stream_keys, rows.positions, rows.temperature)
    return gpu_ranking.rank(logits, vocabulary, *states, width, with_noise=with_noise and rows.is_noisy)


def test_of_equal_candidates_the_first_is_ranked_first_and_absent_ones_come_last(gpu_path):
    logits = torch.full((1, 1, 5000), -math.inf, device=DEVICE)
    logits[0, 0, [4999, 40, 2047]] = 1.0
    chances, tokens = rank_candidates(logits, build_vocabulary(5000), build_rows(1, 0.0), 5)
    assert tokens[0, 0, :3].tolist() == [40, 2047, 4999]
    assert chances[0, 0].exp().tolist() == pytest.approx([1 / 3] * 3 + [0, 0])
    assert bool(((tokens >= 0) & (tokens < 5000)).all())


def test_the_drafter_takes_its_candidates_from_the_kernel(gpu_path):
    logits, rows, vocabulary = build_logits(2, 900)[None], build_rows(1), build_vocabulary(900)
    for ours, theirs in zip(
        rank_candidates(logits, vocabulary, rows, 3), rank(logits, vocabulary, rows, 3, with_noise=True), strict=True
    ):
        assert torch.equal(ours, theirs)
    wide = rank_candidates(logits, vocabulary, rows, 40)[1]  # left to the operators
    assert wide.shape == (1, 2, 40) and torch.equal(wide[..., :3], rank_candidates(logits, vocabulary, rows, 3)[1])


# -- attention -----------------------------------------------------------------------------------------------


class Rows:
    """Rows of unequal lengths with a random tree behind each, in a cache whose blocks are shuffled."""

    def __init__(self, *, lengths, counts, repeats, head_dim, num_before=0, dtype=F32, kv=2, capacity=None, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.num_before, self.head_dim, self.kv = num_before, head_dim, kv
        self.lengths, self.counts, self.most = lengths, counts, max(counts)
        num_visible = num_before + self.most
        capacity = capacity or -(-(max(lengths) + num_visible) // 64) * 64
        self.visible = torch.rand(len(counts), self.most, num_visible, generator=draw) < 0.4
        node = torch.arange(self.most)
        self.visible[:, node, num_before + node] = True
        self.visible[:, :, num_before:] &= torch.ones(self.most, self.most).tril().bool()
        order = torch.randperm(len(counts) * capacity // 64 + 3, generator=draw)[: len(counts) * capacity // 64]
        self.blocks = (order * 64).view(len(counts), -1)
        size = (len(order) + 3) * 64, kv * head_dim
        self.keys, self.values = (torch.randn(size, generator=draw).to(dtype) for _ in range(2))
        self.query = torch.randn(sum(counts), kv * repeats, head_dim, generator=draw).to(dtype)

    def run(self, blocks=None, keys=None, values=None, rows=None):
        rows = range(len(self.counts)) if rows is None else rows
        starts = [sum(self.counts[:row]) for row in rows]
        given = {
            "blocks": (self.blocks if blocks is None else blocks)[list(rows)],
            "starts": torch.tensor(starts),
            "num_nodes": torch.tensor([self.counts[row] for row in rows]),
            "lengths": torch.tensor([self.lengths[row] for row in rows]),
            "words": pack(self.visible[list(rows)]),
        }
        states = (self.query, self.keys if keys is None else keys, self.values if values is None else values)
        return gpu_attention.attend(
            *(each.to(DEVICE) for each in states),
            **{name: value.to(DEVICE) for name, value in given.items()},
            num_before=self.num_before,
            scale=self.head_dim**-0.5,
        ).cpu()

    def compute_reference(self):
        """One node and head at a time, in float64, over a dense mask."""
        outputs = []
        for row, count in enumerate(self.counts):
            length, last = self.lengths[row], self.lengths[row] + self.num_before + count
            place = (self.blocks[row][:, None] + torch.arange(64)).flatten()[:last]
            keys, values = (x[place].view(last, self.kv, -1).double() for x in (self.keys, self.values))
            start = sum(self.counts[:row])
            mask = torch.ones(count, last, dtype=torch.bool)
            mask[:, length:] = self.visible[row, :count, : last - length]
            query = self.query[start : start + count].double().unflatten(1, (self.kv, -1))
            scores = torch.einsum("ngrd,sgd->ngrs", query, keys) * self.head_dim**-0.5
            weights = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
            outputs.append(torch.einsum("ngrs,sgd->ngrd", weights, values).flatten(1, 2))
        return torch.cat(outputs)


def pack(visible):
    """Bit e of word e // 64, in plain Python."""
    num_words = -(-visible.shape[2] // 64)
    words = torch.zeros(*visible.shape[:2], num_words, dtype=torch.int64)
    for row, node, e in visible.nonzero().tolist():
        bit = 1 << (e % 64)
        words[row, node, e // 64] += bit - (1 << 64) if e % 64 == 63 else bit
    return words


@pytest.mark.parametrize(("head_dim", "repeats"), [(8, 2), (64, 3), (80, 1), (128, 4), (256, 2)])
def test_attention_is_that_of_a_dense_mask(head_dim, repeats):
    rows = Rows(lengths=[0, 63, 300], counts=[1, 4, 6], repeats=repeats, head_dim=head_dim)
    assert torch.allclose(rows.run().double(), rows.compute_reference(), atol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 2], [255, 256], [257, 600]])
def test_any_number_of_stretches_is_joined(lengths):
    rows = Rows(lengths=lengths, counts=[2, 3], repeats=2, head_dim=64, kv=1)
    assert torch.allclose(rows.run().double(), rows.compute_reference(), atol=1e-5)


def test_trees_of_more_nodes_than_a_word_has_bits():
    rows = Rows(lengths=[70, 5], counts=[3, 40], repeats=1, head_dim=64, num_before=30, kv=1)
    assert torch.allclose(rows.run().double(), rows.compute_reference(), atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_attention_in_half_precision(head_dim):
    rows = Rows(lengths=[10, 300], counts=[5, 2], repeats=2, head_dim=head_dim, dtype=HALF)
    assert torch.allclose(rows.run().double(), rows.compute_reference(), atol=2e-2)


def test_wide_heads_of_many_nodes_take_several_tiles():
    rows = Rows(lengths=[10, 70], counts=[17, 3], repeats=4, head_dim=192, dtype=HALF, kv=1)
    assert torch.allclose(rows.run().double(), rows.compute_reference(), atol=2e-2)


@pytest.mark.parametrize(("most_bytes", "num_before"), [(1, 0), (50_000, 70), (150_000, 70)])
def test_what_takes_much_memory_is_computed_part_by_part(most_bytes, num_before, monkeypatch):
    """Parts of rows, and of the nodes of a row, some of which see nodes of earlier parts; bit for bit."""
    rows = Rows(lengths=[3, 300, 200], counts=[36, 2, 20], repeats=1, head_dim=16, num_before=num_before, kv=1)
    whole = rows.run()
    monkeypatch.setattr(gpu_attention, "_MOST_SUM_BYTES", most_bytes)
    assert torch.equal(whole, rows.run())
    assert torch.allclose(whole.double(), rows.compute_reference(), atol=1e-5)


def test_parts_fit_and_are_all_there_is():
    for num_rows, most_nodes, num_heads, context in [(8, 512, 32, 32768), (64, 16, 32, 32768), (1, 512, 128, 512)]:
        node_bytes, least = 4 * num_heads * 130 * (context // 256), 16
        parts = list(gpu_attention.cut_into_parts(num_rows, most_nodes, node_bytes, num_heads, least))
        covered = torch.zeros(num_rows, most_nodes)
        for rows, nodes in parts:
            assert len(covered[rows]) * (nodes.stop - nodes.start) * node_bytes <= 2**29
            assert (nodes.stop - nodes.start) * num_heads < 2**16, "CUDA's limit for a grid"
            assert nodes.start % least == 0
            covered[rows, nodes] += 1
        assert (covered == 1).all()
    assert len(list(gpu_attention.cut_into_parts(64, 16, 4 * 32 * 130 * 8, 32, 16))) == 1, "a usual step is one part"


def test_a_long_prompt_needs_no_dense_mask(gpu_path, monkeypatch):
    """A chunk of more nodes than decoding steps have, beside a shorter one."""
    width, lengths, counts = 257, [40, 0], [257, 3]
    target = TargetModel(build_model("llama", F32, num_attention_heads=1, num_key_value_heads=1, head_dim=16))
    cache = target.build_cache(with_features=False)
    cache.add_rows(2)
    for row, length in enumerate(lengths):
        cache.reserve(row, length + counts[row])
    draw = torch.Generator().manual_seed(1)
    for store in cache.stores:
        store.data.copy_(torch.randn(store.data.shape, generator=draw))
    query = torch.randn(sum(counts), 16, generator=draw)
    batch = attention.ForwardBatch.build(
        token_ids=torch.zeros(2, width, dtype=torch.int64),
        num_nodes=torch.tensor(counts),
        visible=torch.ones(2, width, width, dtype=torch.bool).tril(),
        blocks=cache.blocks,
        lengths=torch.tensor(lengths),
        dtype=F32,
        num_repeats=1,
        counts=counts,
    )

    def attend():
        return attention.attend_to_rows(query, cache.keys, cache.values, 0, batch, head_dim=16, scale=0.25)

    ours = attend()
    assert not {"mask", "read_index"} & set(vars(batch)), "a dense mask was laid out"
    monkeypatch.setattr(gpu, "runs_on", lambda _: False)
    assert torch.allclose(ours, attend(), atol=1e-5) and "mask" in vars(batch)


def test_where_blocks_lie_does_not_matter():
    rows = Rows(lengths=[130, 300], counts=[2, 5], repeats=2, head_dim=64)
    order = torch.randperm(len(rows.keys) // 64)
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order))
    keys, values = (x.view(-1, 64, x.shape[1])[order].flatten(0, 1) for x in (rows.keys, rows.values))
    assert torch.equal(rows.run(), rows.run(blocks=moved[rows.blocks // 64] * 64, keys=keys, values=values))


def test_a_row_does_not_depend_on_its_neighbours_or_on_room_behind_it():
    rows = Rows(lengths=[20, 700], counts=[3, 3], repeats=2, head_dim=64)
    alone = rows.run(blocks=rows.blocks[:, :2], rows=[0])
    assert torch.equal(rows.run()[:3], alone[:3])


def test_only_live_positions_are_read():
    rows = Rows(lengths=[20, 150], counts=[3, 1], repeats=2, head_dim=64)
    before = rows.run()
    for row, count in enumerate(rows.counts):
        place = (rows.blocks[row][:, None] + torch.arange(64)).flatten()[rows.lengths[row] + count :]
        rows.keys[place] = rows.values[place] = math.nan
    assert torch.equal(before, rows.run())


# -- between the products of a decoder layer -----------------------------------------------------------------


@pytest.fixture(params=[F32, BF16])
def dtype(request):
    return request.param


def assert_near(ours, theirs):
    """To a place or two; the interpreter cuts numbers off where it makes them bfloat16."""
    tolerance = 2e-2 if ours.dtype == BF16 else 2e-6
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.allclose(ours.cpu().float(), theirs.float(), rtol=tolerance, atol=tolerance)


needs_compiler = pytest.mark.skipif(not cpu.is_available(), reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("with_delta", [True, False])
def test_norms_are_the_cpus(dtype, with_delta):
    residual, weight = torch.randn(5, 100).to(dtype), torch.randn(100).to(dtype)
    delta = torch.randn(5, 100).to(dtype) if with_delta else None
    ours = residual.to(DEVICE, copy=True)
    moved = delta if delta is None else delta.to(DEVICE)
    found = gpu_decoder.add_norm(ours, moved, weight.to(DEVICE), 1e-5, dtype)
    expected = cpu.add_norm(residual, delta, weight, 1e-5, dtype)
    assert_near(found, expected)
    assert_near(ours, residual)


@needs_compiler
def test_heads_are_normed_as_on_the_cpu(dtype):
    states, weight = torch.randn(4, 100).to(dtype), torch.randn(20).to(dtype)
    ours = states.to(DEVICE, copy=True)
    gpu_decoder.norm_heads_(ours[:, :60], weight.to(DEVICE), 1e-6)
    cpu.norm_heads_(states[:, :60], weight, 1e-6)
    assert_near(ours, states)


@needs_compiler
def test_rotation_and_cache_are_the_cpus(dtype):
    tokens, heads, kv_heads, width = 5, 4, 2, 12
    states = torch.randn(tokens, (heads + 2 * kv_heads) * width).to(dtype)
    cos, sin = (torch.randn(tokens, width).to(dtype) for _ in range(2))
    places = torch.tensor([3, 4, 19, 0, 7])
    theirs = states.clone(), *(torch.zeros(20, kv_heads * width, dtype=dtype) for _ in range(2))
    ours = tuple(each.to(DEVICE, copy=True) for each in theirs)
    gpu_decoder.rotate_and_cache_(ours[0], *(x.to(DEVICE) for x in (cos, sin, places)), *ours[1:])
    cpu.rotate_and_cache_(theirs[0], cos, sin, places, *theirs[1:])
    num_queries = heads * width
    assert_near(ours[0][:, :num_queries], theirs[0][:, :num_queries])
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        assert_near(found, expected)


@needs_compiler
def test_activation_is_the_cpus(dtype):
    both = (torch.randn(3, 2 * 1030) * 8).to(dtype)
    assert_near(gpu_decoder.multiply_silu(both.to(DEVICE), 3), cpu.multiply_silu(both, 3))


# -- the engine on them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["ours", "transformers", "windows"])
def test_a_rollout_says_the_same_with_the_kernels(layers, gpu_path, monkeypatch):
    """Prompts and decoding through our attention, sampling too; in float32. A layer that has a window
    takes PyTorch's, beside others that do not.
    """
    family = {"family": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    family = family if layers == "windows" else {"family": "llama"}
    if layers == "transformers":
        monkeypatch.setattr(TargetModel, "_fuse", lambda *_: None)
    prompts, plan = [[5, 6, 7, 8], list(range(9, 30))], SpeculationPlan(depth=2, width=2, num_draft_tokens=4)
    params = SamplingParams(max_tokens=3, temperature=0.8)
    runs = []
    for has_kernels in (True, False):
        monkeypatch.setattr(gpu, "runs_on", lambda _, has=has_kernels: has)
        monkeypatch.setattr(gpu, "find_obstacle", lambda has=has_kernels: None if has else "they are switched off")
        monkeypatch.setattr(attention, "_MOST_NODES", 8)
        model = build_model(dtype=F32, head_dim=16, num_hidden_layers=2, **family)
        engine = Engine(model.to(DEVICE), drafter="eagle-new", speculation=plan)
        assert engine.target.windows == ((None, 6) if layers == "windows" else (None, None))
        runs.append([completion.token_ids for completion in engine.generate(prompts, params)])
    assert runs[0] == runs[1]


class FailingKernel:
    """A kernel that cannot be compiled."""

    def __init__(self, kernel, fails_after):
        self.kernel, self.num_left = kernel, fails_after

    def __getitem__(self, grid):
        self.num_left -= 1
        if self.num_left < 0:
            raise CompilationError(None, ast.Pass(), "no such operation on this device")
        return self.kernel[grid]


@pytest.fixture
def giving_up(layouts_found_anew, monkeypatch):
    """Kernels run as on a GPU until they are given up."""
    monkeypatch.setattr(gpu, "_GIVEN_UP", [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "runs_on", lambda _: gpu.find_obstacle() is None)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    gpu.find_obstacle.cache_clear()
    _warn_of.cache_clear()
    yield
    gpu.find_obstacle.cache_clear()


@pytest.mark.parametrize(
    ("module", "kernel", "fails_after", "is_recorded"),
    [
        (gpu_attention, "_attend_splits", 0, True),
        (gpu_attention, "_attend_splits", 3, False),
        (gpu_decoder, "_add_norm", 7, True),
        (gpu_ranking, "_rank_blocks", 1, True),
        (gpu_sampling, "_sample_blocks", 2, False),
    ],
)
def test_a_rollout_goes_on_without_a_kernel_that_does_not_compile(
    module, kernel, fails_after, is_recorded, giving_up, monkeypatch
):
    recorder = EagerRecorder() if is_recorded else None
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: recorder if gpu.find_obstacle() is None else None)
    prompts, plan = [[5, 6, 7, 8], list(range(9, 15))], SpeculationPlan(depth=2, width=1, num_draft_tokens=2)
    model = build_model("llama", F32, head_dim=16, num_hidden_layers=1).to(DEVICE)
    params = SamplingParams(max_tokens=4, temperature=0.8)

    def generate():
        engine = Engine(model, drafter="eagle-new", speculation=plan)
        return [one.token_ids for one in engine.generate(prompts, params)]

    monkeypatch.setattr(module, kernel, FailingKernel(getattr(module, kernel), fails_after))
    with pytest.warns(UserWarning, match="no such operation on this device") as warned:
        told = generate()
    assert len(warned) == 1, [str(each.message) for each in warned]
    assert generate() == told == expected_tokens(model, prompts, params)


def test_a_kernel_that_fails_while_costs_are_measured_ends_no_rollout(giving_up, monkeypatch):
    engine = Engine(build_model("llama", F32, head_dim=16, num_hidden_layers=1).to(DEVICE), speculation="off")
    begin = engine.planning.begin
    measure = FailingKernel(None, 0)
    monkeypatch.setattr(engine.planning, "begin", lambda: (gpu.find_obstacle() is None and measure[1, 1]) or begin())
    with pytest.warns(UserWarning, match="no such operation on this device"):
        assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=2))[0].token_ids) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ValueError("not of a kernel")])
def test_kernels_are_not_given_up_for_other_errors(error, giving_up):
    with pytest.raises((MemoryError, ValueError)):
        engine = Engine(build_model("llama", F32, head_dim=16, num_hidden_layers=1).to(DEVICE), speculation="off")
        engine.target.launch = lambda *_: (_ for _ in ()).throw(error)
        engine.generate([[5, 6]], SamplingParams(max_tokens=2))
    assert gpu.find_obstacle() is None


def test_a_failure_is_told_in_one_line():
    inner = CompilationError("source\nof it", ast.Pass(), "what is wrong\nmore")
    outer = CompilationError("source\nof it", ast.Pass())
    outer.__cause__ = inner
    described = [gpu.describe_failure(error) for error in (inner, outer, RuntimeError("one\ntwo"), AssertionError())]
    assert described == ["what is wrong", "what is wrong", "one", "AssertionError()"]


# -- all of them ---------------------------------------------------------------------------------------------


def test_every_kernel_compiles_for_a_hopper_gpu():
    """The interpreter forgives what the compiler does not."""
    script = Path(__file__).with_name("compile_gpu_kernels.py")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "bf16" in line and "STACK" in line]
    assert all(" STACK:0 " in line for line in lines), f"registers are spilled: {lines}"
    held = [int(line.split("DYNAMIC:")[1]) for line in done.stdout.splitlines() if line.startswith("_attend_splits")]
    assert held and max(held) <= 99 * 1024, f"small GPUs have 99 KiB of shared memory for a program: {held}"


# -- products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33, 65, 129])
@pytest.mark.parametrize("widths", [(96,), (64, 40), (80, 24, 70)])
@pytest.mark.parametrize("num_inputs", [256, 300])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("narrow", [5000, 100, 90])  # with which tiles: of 174 outputs each has its own
def test_products_side_by_side_are_those_of_the_operators(
    num_tokens, widths, num_inputs, has_bias, narrow, monkeypatch
):
    monkeypatch.setattr(gpu_linear, "_NARROW", narrow)
    monkeypatch.setattr(gpu_linear, "_VERY_WIDE", 5000 if narrow == 100 else 100)
    draw = torch.Generator().manual_seed(num_tokens)

    def draw_numbers(*shape):
        return torch.randn(shape, generator=draw).to(DEVICE, HALF)

    x = draw_numbers(num_tokens, num_inputs)
    weights = [draw_numbers(width, num_inputs) for width in widths]
    biases = [draw_numbers(width) if has_bias else None for width in widths]
    ours = gpu_linear.multiply(x, weights, biases)
    expected = torch.cat(
        [
            torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            for weight, bias in zip(weights, biases, strict=True)
        ],
        1,
    )
    assert ours.shape == expected.shape and ours.dtype == HALF
    assert torch.allclose(ours.double(), expected, rtol=1e-2, atol=2e-2 * num_inputs**0.5)
    assert float((ours.double() - expected).norm() / expected.norm()) < 4e-3


def test_a_tokens_product_does_not_depend_on_the_tokens_beside_it():
    draw = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(shape, generator=draw).to(DEVICE, HALF) for shape in ((16, 512), (128, 512)))
    together = gpu_linear.multiply(x, [weight], [None])
    for count in (1, 5):
        assert torch.equal(gpu_linear.multiply(x[:count].contiguous(), [weight], [None]), together[:count])
