"""Counts are those of a plain dict, stay bounded and are ranked with the target's noise; drafts keep their promises."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from conftest import VOCAB_SIZE, build_model, expected_tokens, shared_model
from fastgrpo.drafters.beams import grow_trees
from fastgrpo.drafters.calibration import Calibration
from fastgrpo.drafters.drafter import DraftContext, StatefulDrafter, TrainableDrafter
from fastgrpo.drafters.ngram import NgramDrafter, _widen, hash_group
from fastgrpo.drafters.ngram_table import MAX_ORDER, NO_TOKEN, ORDERS, NgramTable, hash_contexts
from fastgrpo.engine import Engine
from fastgrpo.grpo.state import load_state, save_state
from fastgrpo.model import TargetModel
from fastgrpo.sampling import SamplingBatch, gumbel_noise, stream_key
from fastgrpo.tree import Draft, check_draft, compute_ancestors
from fastgrpo.types import SamplingParams, Sequence, SpeculationPlan

PLAN = SpeculationPlan(depth=4, width=3, num_draft_tokens=8)
ONE_LEVEL = SpeculationPlan(depth=1, width=4, num_draft_tokens=4)
PHRASE = [5, 17, 3, 44, 9, 80]

Counts = dict[tuple[int, tuple[int, ...]], Counter[int]]  # (group, context) -> continuations


def count_plainly(texts: list[tuple[int, list[int]]]) -> Counts:
    """The reference: every context of every text in a dict."""
    counts: Counts = defaultdict(Counter)
    for group, tokens in texts:
        for end in range(1, len(tokens)):
            for order in ORDERS:
                if order <= end:
                    counts[group, tuple(tokens[end - order : end])][tokens[end]] += 1
    return counts


def add_text(table: NgramTable, group: int, tokens: list[int]) -> None:
    padded = np.array([NO_TOKEN] * MAX_ORDER + tokens)
    contexts = np.lib.stride_tricks.sliding_window_view(padded, MAX_ORDER)[: len(tokens)]
    table.add(np.full(len(tokens), group, np.uint64), contexts, np.array(tokens, np.int64))


def build_sequence(prompt: list[int], tokens: list[int], stream: int = 0, temperature: float = 1.0) -> Sequence:
    params = SamplingParams(temperature=temperature, seed=3, stream=stream, max_tokens=10_000)
    return Sequence(
        request_id=stream,
        prompt_ids=prompt,
        params=params,
        max_tokens=10_000,
        stream_key=stream_key(3, stream),
        token_ids=list(tokens),
    )


def build_context(sequences: list[Sequence]) -> DraftContext:
    cache = TargetModel(shared_model("llama")).build_cache(with_features=False)  # nobody looks into it
    return DraftContext(sequences=sequences, cache=cache, device=torch.device("cpu"))


def admit(drafter: NgramDrafter, sequence: Sequence) -> None:
    drafter.observe(sequence, 0)
    if sequence.token_ids:
        drafter.observe(sequence, len(sequence.token_ids))


def draft_of(drafter: NgramDrafter, sequences: list[Sequence], plan: SpeculationPlan = PLAN) -> Draft:
    draft = drafter.propose(build_context(sequences), plan)
    check_draft(draft)
    assert draft.num_nodes.max() <= 1 + plan.num_draft_tokens
    assert draft.token_ids[:, 0].tolist() == [sequence.pending_token_id for sequence in sequences]
    return draft


def assert_same_draft(one: Draft, other: Draft) -> None:
    for name in ("token_ids", "parents", "num_nodes", "log_chances"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


# -- the table -------------------------------------------------------------------------------------------------


@given(
    texts=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 6), max_size=60)), min_size=1, max_size=8
    )
)
def test_counts_are_those_of_a_dict(texts):
    """Seven tokens: no bucket overflows. Groups may repeat."""
    table = NgramTable(2**20)
    for group, tokens in texts:
        add_text(table, group, tokens)
    assert table.num_evicted == 0
    reference = count_plainly(texts)
    for (group, context), counts in reference.items():
        if counts.total() < 256:
            assert table.look_up(group, list(context)) == dict(counts)
    stranger = next(group for group in range(9) if all(group != known for known, _ in texts))
    for _, context in list(reference)[:20]:
        assert table.look_up(stranger, list(context)) == {}


def test_the_order_of_batches_does_not_matter_and_pieces_equal_the_whole():
    rng = random.Random(0)
    sequence = build_sequence([rng.randrange(7) for _ in range(9)], [rng.randrange(7) for _ in range(90)])
    whole, pieces = NgramDrafter(), NgramDrafter()
    admit(whole, sequence)
    whole.count_observed()
    tokens, sequence.token_ids = sequence.token_ids, []
    pieces.observe(sequence, 0)
    while tokens:
        count = min(len(tokens), rng.randint(1, 7))
        sequence.token_ids += tokens[:count]
        del tokens[:count]
        pieces.observe(sequence, count)
        if rng.random() < 0.5:
            pieces.count_observed()
    pieces.count_observed()
    group, text = hash_group(sequence.prompt_ids), sequence.all_token_ids
    reference = count_plainly([(group, text)])
    assert len(reference) > 100
    for (_, context), counts in reference.items():
        assert whole.table.look_up(group, list(context)) == dict(counts)
        assert pieces.table.look_up(group, list(context)) == dict(counts)


def test_old_counts_fade_where_many_are_made():
    table = NgramTable(2**16)
    add_text(table, 1, [4, 5] * 200)
    for _ in range(2):
        add_text(table, 1, [4, 6] * 200)
    counts = table.look_up(1, [4])
    assert sum(counts.values()) <= 255
    assert counts[6] > 2.5 * counts[5] > 0, "two to one if nothing faded"


def test_a_full_bucket_keeps_what_is_frequent():
    table = NgramTable(2**16)
    for _ in range(10):
        for token_id in range(1, 8):
            add_text(table, 1, [0, token_id])
    for token_id in range(100, 200):
        add_text(table, 1, [0, token_id])
    add_text(table, 1, [token for rare in range(200, 220) for token in (0, rare)])
    counts = table.look_up(1, [0])
    assert len(counts) == 8
    assert {token_id for token_id, count in counts.items() if count > 1} == set(range(1, 8))


@given(seed=st.integers(0, 1000))
def test_chances_and_escape_are_a_distribution(seed):
    rng = random.Random(seed)
    table = NgramTable(2**18)
    text = [rng.choice((rng.randrange(4), rng.randrange(30))) for _ in range(300)]
    add_text(table, 9, text)
    ends = [rng.randrange(MAX_ORDER, 300) for _ in range(12)]
    contexts = np.array([text[end - MAX_ORDER : end] for end in ends] + [[77] * MAX_ORDER])
    token_ids, chances, escape = table.predict(np.full(len(contexts), 9, np.uint64), contexts)
    assert np.allclose(chances.sum(1) + escape, 1, atol=1e-5)
    assert (escape[:-1] > 0).all() and escape[-1] == 1
    for row, some in zip(token_ids, chances, strict=True):
        assert len(set(row[some > 0])) == (some > 0).sum(), "a token stands twice"


def test_orders_are_interpolated_by_their_distinct_continuations():
    table = NgramTable(2**16)
    add_text(table, 1, [1, 2, 3])
    add_text(table, 1, [0, 2, 4])
    token_ids, chances, escape = table.predict(np.array([1], np.uint64), np.array([[-1, -1, -1, 1, 2]]))
    found = {token: chance for token, chance in zip(token_ids[0], chances[0], strict=True) if chance > 0}
    # behind 2: 3 and 4 once each, 2 distinct of 2; behind 1 2: only 3, once
    assert found == pytest.approx({3: 1 / 2 + 1 / 2 * 1 / 4, 4: 1 / 2 * 1 / 4})
    assert escape[0] == pytest.approx(1 / 2 * 1 / 2)


def test_contexts_in_one_set_do_not_share_counts():
    """One set of eight entries: every key collides with every other."""
    table = NgramTable(8 * 62)
    texts = [(group, [group, 50 + group]) for group in range(1, 9)]
    for group, tokens in texts:
        add_text(table, group, tokens)
    assert table.num_evicted == 0
    for group, _ in texts:
        assert table.look_up(group, [group]) == {50 + group: 1}
        assert table.look_up(group, [group + 1]) == {}
    add_text(table, 9, [9, 59])
    assert table.num_evicted == 1
    assert table.look_up(1, [1]) == {}, "the oldest gives way"
    assert all(table.look_up(group, [group]) == {50 + group: 1} for group in range(2, 10))


def test_keys_are_all_different_and_short_texts_have_none():
    contexts = np.array(
        [[a, b, c, d, e] for a in (0, 1) for b in (0, 1) for c in (0, 7) for d in (2, 3) for e in (0, 1)]
    )
    keys = hash_contexts(np.full(len(contexts), 5, np.uint64), contexts)
    assert len(np.unique(keys)) == sum(2**order for order in ORDERS)
    one = hash_contexts(np.array([5], np.uint64), np.array([[NO_TOKEN] * 4 + [3]]))
    assert one[0, 0] != 0 and not one[0, 1:].any()


@pytest.mark.parametrize("max_bytes", [496, 5_000, 100_000])
def test_bytes_are_bounded_and_drafts_stay_valid(max_bytes):
    drafter, rng = NgramDrafter(max_bytes=max_bytes), random.Random(1)
    size = drafter.table.num_bytes
    assert max_bytes / 2 < size <= max_bytes
    for epoch in range(6):
        drafter.begin()
        rows = [build_sequence([epoch, i % 3, 7], [], stream=i) for i in range(6)]
        for sequence in rows:
            drafter.observe(sequence, 0)
        for _ in range(10):
            for sequence in rows:
                sequence.token_ids += [rng.choice((rng.randrange(5), rng.randrange(9000))) for _ in range(30)]
                drafter.observe(sequence, 30)
            draft_of(drafter, rows)
    assert drafter.table.num_bytes == size
    assert drafter.table.num_evicted > 1000


def test_a_table_without_room_is_refused():
    with pytest.raises(ValueError, match="max_bytes must be at least 496, got 495"):
        NgramDrafter(max_bytes=495)


# -- trees -----------------------------------------------------------------------------------------------------


class ScriptedLevels:
    """Candidates from a generator, some of them absent."""

    def __init__(self, num_rows: int, seed: int, absent: float) -> None:
        self.generator, self.absent = torch.Generator().manual_seed(seed), absent
        self.num_rows, self.num_nodes = num_rows, 1
        self.offered: list[torch.Tensor] = []

    def rank(self, noise_rows: SamplingBatch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.num_rows, self.num_nodes, width)
        chances = -5 * torch.rand(shape, generator=self.generator)
        is_absent = torch.rand(shape, generator=self.generator) < self.absent
        chances = chances.masked_fill(is_absent, -math.inf).sort(-1, descending=True).values
        self.offered.append(chances)
        token_ids = torch.rand(*shape[:2], 50, generator=self.generator).argsort(-1)[..., :width]
        return chances, token_ids + 1000 * len(self.offered)  # its level can be read off

    def expand(self, token_ids: torch.Tensor, above: torch.Tensor, visible: torch.Tensor) -> None:
        self.num_nodes = token_ids.shape[1]


@given(
    seed=st.integers(0, 10_000),
    absent=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    shape=st.sampled_from([(1, 3, 3), (3, 1, 3), (3, 3, 8), (4, 4, 40)]),
    is_fitted=st.booleans(),
)
def test_absent_candidates_and_all_below_them_are_never_drafted(seed, absent, shape, is_fitted):
    plan = SpeculationPlan(depth=shape[0], width=shape[1], num_draft_tokens=shape[2])
    calibration = Calibration()
    if is_fitted:
        calibration.slope[:], calibration.offset[:] = 0.7, -0.3
    levels = ScriptedLevels(4, seed, absent)
    draft = grow_trees(build_context([build_sequence([1], [], i) for i in range(4)]), plan, levels, calibration)
    check_draft(draft)
    assert draft.log_chances.isfinite().all(), "an absent node was drafted"
    depths = compute_ancestors(draft.parents).sum(-1) - 1
    expected = torch.where(draft.node_mask, draft.token_ids // 1000, 0)
    assert torch.equal(depths, expected), "a node hangs elsewhere than where it was offered"
    present = [torch.isfinite(level).sum((1, 2)) for level in levels.offered]
    assert (draft.num_nodes - 1 <= torch.stack(present).sum(0).clamp(max=plan.num_draft_tokens)).all()
    assert (draft.num_nodes - 1 >= present[0].clamp(max=plan.num_draft_tokens)).all(), "room was left unused"
    if absent == 0:
        assert (
            draft.num_nodes == 1 + min(plan.num_draft_tokens, sum(level[0].numel() for level in levels.offered))
        ).all()
    if absent == 1:
        assert (draft.num_nodes == 1).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_candidates_are_ranked_by_log_q_and_the_shared_noise(temperature):
    drafter, rng = NgramDrafter(), random.Random(2)
    prompt = [rng.randrange(12) for _ in range(200)]
    rows = [build_sequence(prompt, [rng.randrange(12) for _ in range(i)], i, temperature) for i in range(12)]
    for sequence in rows:
        admit(drafter, sequence)
    draft = draft_of(drafter, rows, ONE_LEVEL)
    tops = []
    for row, sequence in enumerate(rows):
        tail = np.array([sequence.all_token_ids[-MAX_ORDER:]])
        token_ids, chances, escape = drafter.table.predict(np.array([hash_group(prompt)], np.uint64), tail)
        position = torch.tensor([len(sequence.token_ids)])
        noise = gumbel_noise(torch.tensor([sequence.stream_key]), position, torch.from_numpy(token_ids[0]))[0]
        scores = torch.from_numpy(chances[0]).log() + (noise if temperature else 0)
        order = scores.argsort(descending=True)[: int((chances[0] > 0).sum())][:4]
        drafted = draft.token_ids[row, 1 : 1 + len(order)]
        known = {
            token: score for token, score in zip(token_ids[0].tolist(), scores.tolist(), strict=True) if score > -99
        }
        assert [known[token_id] for token_id in drafted.tolist()] == scores[order].tolist()  # ties may stand either way
        unseen = math.log(escape[0]) + (float(np.euler_gamma) if temperature else 0)
        total = torch.cat((scores, torch.tensor([unseen]))).logsumexp(0)
        assert draft.log_chances[row, 1].item() == pytest.approx((scores[order[0]] - total).item(), abs=1e-5)
        tops.append(token_ids[0, order[0]])
    assert temperature == 0 or len(set(tops)) > 2, "siblings have noise of their own"


def test_greedy_rows_have_no_noise_beside_noisy_ones():
    drafter, prompt = NgramDrafter(), [1, 2, 1, 3, 1, 2, 1]
    rows = [build_sequence(prompt, [], i, temperature) for i, temperature in enumerate((0.0, 1.0, 0.0))]
    for sequence in rows:
        admit(drafter, sequence)
    together = draft_of(drafter, rows, ONE_LEVEL)
    alone = draft_of(drafter, rows[:1], ONE_LEVEL)
    assert together.token_ids[0].tolist() == together.token_ids[2].tolist()
    assert together.token_ids[0, : alone.token_ids.shape[1]].tolist() == alone.token_ids[0].tolist()
    assert together.token_ids[0, 1] == 3, "behind 1 alone it would be 2, behind 2 1 it is 3"


def test_rows_have_as_many_nodes_as_they_know():
    drafter = NgramDrafter()
    known, unknown, single = (
        build_sequence(PHRASE * 3, []),
        build_sequence(list(range(90, 99)), []),
        build_sequence([7], []),
    )
    for sequence in (known, unknown, single):
        admit(drafter, sequence)
    draft = draft_of(drafter, [known, unknown, single])
    assert draft.num_nodes.tolist() == [5, 1, 1]
    assert draft.token_ids[0].tolist() == [PHRASE[-1], *PHRASE[:4]]
    assert draft.parents.tolist() == [[-1, 0, 1, 2, 3], [-1] * 5, [-1] * 5]
    assert draft_of(drafter, [unknown]).token_ids.shape == (1, 1)


def test_drafts_for_a_device_are_of_few_sizes():
    """Each is recorded, which takes as long as many steps."""
    drafter, widths, plan = NgramDrafter(), defaultdict(set), SpeculationPlan(depth=4, width=4, num_draft_tokens=12)
    for seed in range(60):
        sequence = build_sequence(random.Random(seed).choices(range(1, 3 + seed % 20), k=12), [], stream=seed)
        admit(drafter, sequence)
        here = draft_of(drafter, [sequence], plan)
        context = replace(build_context([sequence]), device=torch.device("meta"))
        widths[drafter.propose(context, plan).token_ids.shape[1]].add(here.token_ids.shape[1])
    assert set(widths) <= {1, 2, 3, 4, 6, 8, 12, 1 + plan.tree_size}
    assert any(len(held) > 1 for held in widths.values())
    assert all(width >= max(held) for width, held in widths.items())
    wide = _widen(torch.tensor([[3, 4]]), 4, -1)
    assert wide.tolist() == [[3, 4, -1, -1]]


def test_siblings_share_and_other_groups_do_not():
    drafter = NgramDrafter()
    first, sibling = build_sequence([1, 2], PHRASE, 0), build_sequence([1, 2], PHRASE[:2], 1)
    other = build_sequence([2, 1], PHRASE[:2], 2)
    for sequence in (first, sibling, other):
        admit(drafter, sequence)
    draft = draft_of(drafter, [sibling, other])
    assert draft.token_ids[0, 1:5].tolist() == PHRASE[2:6]
    assert draft.num_nodes[1] == 1


def test_a_prompt_is_counted_once_for_its_group():
    drafter = NgramDrafter()
    for stream in range(5):
        admit(drafter, build_sequence(PHRASE, [], stream))
    drafter.count_observed()
    assert drafter.table.look_up(hash_group(PHRASE), PHRASE[:2]) == {PHRASE[2]: 1}


# -- in the engine ---------------------------------------------------------------------------------------------

GROUP = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [GROUP, [7], GROUP, [8, 8], GROUP, [7], list(range(30))]


def measure_length(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    engine.generate(prompts, params)
    rows = sum(record.num_seqs for record in engine.records)
    return sum(record.num_emitted for record in engine.records) / rows


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"temperature": 0.7}, {}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.8}],
    ids=str,
)
@pytest.mark.parametrize("max_bytes", [2_000, 2**20])
def test_what_is_emitted_is_plain_decoding(settings, max_bytes):
    """Three epochs with one drafter, which finds its counts again; also where they hardly fit."""
    model = shared_model("llama")
    engine = Engine(model, drafter=NgramDrafter(max_bytes=max_bytes), speculation=PLAN, max_num_seqs=4)
    num_drafted = 0
    for seed in range(3):
        params = SamplingParams(seed=seed, max_tokens=14, **settings)
        tokens = [completion.token_ids for completion in engine.generate(PROMPTS, params)]
        assert tokens == expected_tokens(model, PROMPTS, params)
        num_drafted += sum(record.num_tokens - record.num_seqs for record in engine.records)
    assert num_drafted > 40


def build_markov_model() -> PreTrainedModel:
    """What it says depends on its last token alone, so that texts repeat themselves."""
    model = build_model("qwen2", max_position_embeddings=512)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.usefixtures("unchecked_shapes")
def test_repetition_is_accepted_and_a_second_epoch_more():
    """Greedy decoding falls into loops; the second time it says what it said the first time."""
    engine = Engine(build_markov_model(), drafter="ngram", speculation=PLAN)
    params = SamplingParams(temperature=0.0, max_tokens=80)
    first, second = (measure_length(engine, [GROUP, [7], [8, 8]], params) for _ in range(2))
    assert first > 2
    assert second > max(4.0, first)


@pytest.mark.usefixtures("unchecked_shapes")
def test_with_noise_later_epochs_are_drafted_better():
    """Other noise in each epoch; siblings help within one."""
    prompts = [prompt for prompt in (GROUP, [7], [8, 8]) for _ in range(4)]
    engine = Engine(build_markov_model(), drafter="ngram", speculation=PLAN)
    lengths = [
        measure_length(engine, prompts, SamplingParams(temperature=0.7, top_k=4, seed=seed, max_tokens=60))
        for seed in range(4)
    ]
    assert lengths[0] > 1.3
    assert lengths[0] < lengths[1] < max(lengths[2:])


def test_chances_are_judged_and_fitted_between_rollouts():
    engine = Engine(shared_model("llama"), drafter="ngram", speculation=PLAN)
    engine.generate(PROMPTS, SamplingParams(max_tokens=20))
    calibration = engine.drafter.calibration
    assert calibration.offered.sum() > 10 and (calibration.slope == 1).all()
    engine.generate(PROMPTS[:1], SamplingParams(max_tokens=2))
    assert (calibration.slope != 1).any()


def test_a_rollout_leaves_nothing_collected_of_its_sequences():
    engine = Engine(shared_model("llama"), drafter="ngram", speculation=PLAN)
    engine.generate(PROMPTS, SamplingParams(max_tokens=6))
    assert not engine.drafter._groups


def test_plain_steps_collect_and_what_is_collected_is_bounded():
    drafter = NgramDrafter()
    sequence = build_sequence([1, 2, 3], [])
    drafter.observe(sequence, 0)
    most = 0
    for step in range(9000):
        sequence.token_ids.append(step % 50)
        drafter.observe(sequence, 1)
        most = max(most, drafter._texts.num_new_tokens)
    assert most <= 4096
    drafter.count_observed()
    assert drafter.table.look_up(hash_group([1, 2, 3]), [5]).keys() == {6}


# -- state -----------------------------------------------------------------------------------------------------


def build_learnt(max_bytes: int = 2**20) -> tuple[NgramDrafter, list[Sequence]]:
    drafter, rng = NgramDrafter(max_bytes=max_bytes), random.Random(5)
    rows = [build_sequence([i % 3] * 4, [rng.randrange(9) for _ in range(80)], i) for i in range(6)]
    for sequence in rows:
        admit(drafter, sequence)
    drafter.calibration.offered += 20
    drafter.calibration.hits += 7
    drafter.calibration.fit()
    return drafter, rows


def test_a_restored_drafter_drafts_the_same(tmp_path):
    drafter, rows = build_learnt()
    drafter.save(tmp_path / "new" / "folder")
    restored = NgramDrafter(max_bytes=2**20)
    admit(restored, build_sequence([9], PHRASE * 3))  # forgotten
    restored.restore(tmp_path / "new" / "folder")
    other_size = NgramDrafter(max_bytes=2**22)
    other_size.restore(tmp_path / "new" / "folder")
    for each in (drafter, restored, other_size):
        each.begin()
    for _ in range(3):
        draft = draft_of(drafter, rows)
        assert_same_draft(draft, draft_of(restored, rows))
        assert_same_draft(draft, draft_of(other_size, rows))
        for sequence in rows:
            sequence.token_ids += [1, 2, 3]
            for each in (drafter, restored, other_size):
                each.observe(sequence, 3)
    assert draft_of(restored, [build_sequence([9], PHRASE)]).num_nodes.tolist() == [1]


def test_a_smaller_table_takes_what_fits(tmp_path):
    drafter, rows = build_learnt()
    drafter.save(tmp_path)
    small = NgramDrafter(max_bytes=5_000)
    small.restore(tmp_path)
    assert small.table.num_evicted > 0
    draft_of(small, rows)


def test_an_empty_drafter_is_saved_and_restored(tmp_path):
    NgramDrafter().save(tmp_path)
    drafter = NgramDrafter()
    drafter.restore(tmp_path)
    assert draft_of(drafter, [build_sequence([1, 2], [])]).num_nodes.tolist() == [1]


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ngram.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("ngram.safetensors", lambda path: path.write_bytes(b"")),
        ("ngram.safetensors", _flip_last_byte),
        ("ngram.safetensors", lambda path: path.unlink()),
        ("ngram.json", lambda path: path.write_text("{")),
        ("ngram.json", lambda path: path.write_text("[]")),
        ("ngram.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("ngram.json", lambda path: path.write_text(json.dumps({"orders": [1, 2], "checksums": {}}))),
        ("calibration.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    drafter, _ = build_learnt()
    drafter.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        NgramDrafter().restore(tmp_path)


def test_arrays_of_another_kind_are_refused():
    drafter, _ = build_learnt()
    arrays = drafter.table.to_arrays()
    with pytest.raises(ValueError, match="totals must be uint16"):
        NgramTable(2**16).load_arrays(arrays | {"totals": arrays["totals"].astype(np.int64)})
    with pytest.raises(ValueError, match="counts must be uint16 of shape"):
        NgramTable(2**16).load_arrays({name: array for name, array in arrays.items() if name != "counts"})


def test_counts_travel_with_a_checkpoint(tmp_path):
    model, params = shared_model("llama"), SamplingParams(max_tokens=12)
    engine = Engine(model, drafter="ngram", speculation=PLAN)
    assert isinstance(engine.drafter, StatefulDrafter) and not isinstance(engine.drafter, TrainableDrafter)
    engine.generate(PROMPTS, params)
    save_state(tmp_path, engine, None)
    resumed = Engine(model, drafter="ngram", speculation=PLAN)
    load_state(tmp_path, resumed, None)
    again = replace(params, seed=1)
    tokens = [completion.token_ids for completion in engine.generate(PROMPTS, again)]
    assert tokens == [completion.token_ids for completion in resumed.generate(PROMPTS, again)]
    facts = [[(record.num_tokens, record.offered, record.hits) for record in e.records] for e in (engine, resumed)]
    assert facts[0] == facts[1]
    assert engine.scheduler.lengths.state_dict() == resumed.scheduler.lengths.state_dict()
    (tmp_path / "drafter" / "ngram.json").unlink()
    with pytest.raises(ValueError, match=r"ngram\.json"):
        load_state(tmp_path, resumed, None)


def test_what_a_planner_learnt_elsewhere_is_left_out_by_name(tmp_path):
    model, params = shared_model("llama"), SamplingParams(max_tokens=12)
    engine = Engine(model, drafter="ngram", speculation="auto")
    engine.generate(PROMPTS, params)
    save_state(tmp_path, engine, None)
    path = tmp_path / "planner.json"
    saved = json.loads(path.read_text())

    def resume(changed):
        path.write_text(json.dumps(changed))
        resumed = Engine(model, drafter="ngram", speculation="auto")
        load_state(tmp_path, resumed, None)
        return resumed.planner

    assert json.loads(json.dumps(resume(saved).state_dict())) == saved["state"]
    with pytest.warns(UserWarning, match=r"cpu is 'Z80' there and .* here"):
        assert resume(saved | {"identity": saved["identity"] | {"cpu": "Z80"}}) is None
    with pytest.warns(UserWarning, match="it has version None"):
        assert resume({"name": "auto", "state": {}}) is None
    with pytest.raises(ValueError, match="is damaged"):
        resume({name: value for name, value in saved.items() if name != "state"})
    with pytest.raises(ValueError, match=r"is damaged \(planner\.json holds no mapping\)"):
        resume([])
    prices = saved["state"]["costs"] | {"target": saved["state"]["costs"]["target"] | {"prices": [-1.0]}}
    for change, message in (({"margin": 0.1}, "margin must be .* got 0.1"), ({"costs": prices}, "prices above 0")):
        with pytest.raises(ValueError, match=rf"planner\.json is damaged \(.*{message}.*remove it"):
            resume(saved | {"state": saved["state"] | change})
    unsound = saved | {"state": saved["state"] | {"promised": math.nan}}  # as earlier versions could save it
    assert math.isfinite(resume(unsound).state_dict()["promised"])


def test_draft_tokens_are_tokens_of_the_model():
    engine = Engine(shared_model("qwen3"), drafter="ngram", speculation=PLAN)
    propose, seen = engine.drafter.propose, []
    engine.drafter.propose = lambda *args: seen.append(propose(*args)) or seen[-1]
    engine.generate(PROMPTS, SamplingParams(max_tokens=30))
    assert seen
    for draft in seen:
        check_draft(draft)
        assert ((draft.token_ids >= 0) & (draft.token_ids < VOCAB_SIZE)).all()
