"""Law 6: whatever arrives, is accepted and leaves, every row of the cache holds what its sequence says."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastgrpo import cache as cache_module
from fastgrpo.cache import RowStore, SlotCache, reserve_rows
from fastgrpo.scheduler import Scheduler
from fastgrpo.types import SamplingParams, Sequence


def build_sequence(request_id: int, prompt_ids: list[int]) -> Sequence:
    return Sequence(
        request_id=request_id, prompt_ids=prompt_ids, params=SamplingParams(), max_tokens=10_000, stream_key=request_id
    )


def build_cache(feature_width: int) -> SlotCache:
    return SlotCache(
        num_layers=2,
        num_kv_heads=1,
        head_dim=2,
        feature_width=feature_width,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


class CacheAndScheduler(RuleBasedStateMachine):
    """Every cached position carries a number of its own; `contents` says which ones a request should see."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = build_cache(3)
        self.scheduler = Scheduler(4)
        self.contents: dict[int, list[int]] = {}  # request -> marks of its cached positions
        self.num_requests = 0
        self.num_marks = 0

    @initialize(max_num_seqs=st.integers(1, 5), with_features=st.booleans())
    def start(self, max_num_seqs: int, with_features: bool) -> None:
        self.scheduler = Scheduler(max_num_seqs)
        self.cache = build_cache(3 if with_features else 0)

    # -- the model's side of it ----------------------------------------------------------------------------

    def new_marks(self, count: int) -> list[int]:
        self.num_marks += count
        return list(range(self.num_marks - count + 1, self.num_marks + 1))

    def write(self, stores: list[RowStore], row: int, start: int, marks: list[int]) -> None:
        """As the model does: position start + i of a row gets marks[i], in every layer of the stores."""
        index = row * self.cache.keys.capacity + torch.arange(start, start + len(marks))
        values = torch.tensor(marks, dtype=torch.float32)[:, None]
        for sign, store in zip((1, -1, 0.5), self.cache.stores, strict=False):
            if store not in stores:
                continue
            for layer in range(store.data.shape[0]):
                store.write(layer, index, (sign * values + layer / 4).expand(-1, store.data.shape[3]).contiguous())

    def read(self, row: int) -> list[int]:
        """The marks of a row, after seeing that all layers and stores agree."""
        length = self.cache.lengths[row]
        marks = self.cache.keys.data[0, row, :length, 0]
        for sign, store in zip((1, -1, 0.5), self.cache.stores, strict=False):
            for layer in range(store.data.shape[0]):
                expected = (sign * marks + layer / 4)[:, None].expand(-1, store.data.shape[3])
                assert torch.equal(store.data[layer, row, :length], expected)
        return [int(mark) for mark in marks]

    # -- what can happen --------------------------------------------------------------------------------------

    @rule(
        prompt=st.integers(0, 2), length=st.sampled_from([1, 2, 5, 63, 64, 65, 130]), num_generations=st.integers(1, 4)
    )
    def arrive(self, prompt: int, length: int, num_generations: int) -> None:
        for _ in range(num_generations):
            self.scheduler.add(build_sequence(self.num_requests, [prompt] * length))
            self.num_requests += 1

    @precondition(lambda self: self.scheduler.waiting)
    @rule()
    def admit(self) -> None:
        """Prompts are computed once for siblings that are admitted together; who fits is admitted as they came."""
        arrived, num_free = list(self.scheduler.waiting), self.scheduler.max_num_seqs - len(self.scheduler.running)
        admitted = self.scheduler.admit()
        running = self.scheduler.running
        assert len(admitted) == min(num_free, len(arrived))
        if len(arrived) <= num_free:
            assert admitted == arrived
        assert running[len(running) - len(admitted) :] == admitted
        if not admitted:
            return
        self.cache.reserve(len(running), max(len(s.prompt_ids) for s in admitted))
        self.cache.add_rows(len(admitted))
        leaders: dict[tuple[int, ...], int] = {}
        for row in range(len(running) - len(admitted), len(running)):
            sequence = running[row]
            length = len(sequence.prompt_ids) - 1
            if sequence.group_key in leaders:
                leader = leaders[sequence.group_key]
                self.cache.restore([row], self.cache.snapshot(leader, length))
                self.contents[sequence.request_id] = list(self.contents[running[leader].request_id])
            else:
                leaders[sequence.group_key] = row
                marks = self.new_marks(length)
                self.write(self.cache.stores, row, 0, marks)
                self.cache.lengths[row] = length
                self.contents[sequence.request_id] = marks

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def commit_trees(self, data: st.DataObject) -> None:
        """Each row gets some nodes, keeps an increasing path that starts at its root, and may then be cut."""
        running = self.scheduler.running
        counts = data.draw(st.lists(st.integers(1, 9), min_size=len(running), max_size=len(running)))
        self.cache.reserve(len(running), max(self.cache.lengths) + max(counts))
        paths = []
        for row, count in enumerate(counts):
            marks = self.new_marks(count)
            self.write([self.cache.keys, self.cache.values], row, self.cache.lengths[row], marks)
            path = [0, *sorted(data.draw(st.sets(st.integers(1, count - 1)) if count > 1 else st.just(set())))]
            kept = data.draw(st.integers(1, len(path)))
            if self.cache.features is not None:  # these are written when the path is known
                self.write([self.cache.features], row, self.cache.lengths[row], [marks[node] for node in path])
            self.contents[running[row].request_id] += [marks[node] for node in path[:kept]]
            paths.append((path, kept))
        depth = max(len(path) for path, _ in paths)
        lengths = [length + len(path) for length, (path, _) in zip(self.cache.lengths, paths, strict=True)]
        padded = torch.tensor([path + [-1] * (depth - len(path)) for path, _ in paths])
        self.cache.commit(padded, [len(path) for path, _ in paths])
        assert self.cache.lengths == lengths
        for row, (path, kept) in enumerate(paths):
            self.cache.truncate(row, lengths[row] - len(path) + kept)
            running[row].append([0] * kept, [0.0] * kept, [0.0] * kept)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.scheduler.running) - 1))
        sequence = self.scheduler.remove(slot)
        self.cache.remove_row(slot)
        del self.contents[sequence.request_id]

    @precondition(lambda self: self.num_requests > 12)
    @rule()
    def give_up(self) -> None:
        self.scheduler.abort()
        self.cache.clear()
        self.contents.clear()
        assert self.cache.num_bytes == 0
        assert not self.scheduler.has_work

    # -- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def rows_hold_what_their_sequences_say(self) -> None:
        running = self.scheduler.running
        self.scheduler.check()
        self.cache.check([sequence.num_cached for sequence in running])
        assert [self.read(row) for row in range(len(running))] == [self.contents[s.request_id] for s in running]

    @invariant()
    def no_sibling_is_overtaken_and_nobody_lost(self) -> None:
        waiting: dict[tuple[int, ...], list[int]] = {}
        for sequence in self.scheduler.waiting:
            waiting.setdefault(sequence.group_key, []).append(sequence.request_id)
        assert all(group == sorted(group) for group in waiting.values())
        assert set(self.contents) == {sequence.request_id for sequence in self.scheduler.running}
        for sequence in self.scheduler.running:
            is_sibling = any(other.prompt_ids == sequence.prompt_ids for other in self.scheduler.waiting)
            assert self.scheduler.has_waiting_sibling(sequence) == is_sibling


TestCacheAndScheduler = CacheAndScheduler.TestCase
TestCacheAndScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


# -- the parts -----------------------------------------------------------------------------------------------


def test_room_for_more_rows_keeps_longer_ones():
    """A short prompt is admitted beside a long row, after rows were given back."""
    cache = build_cache(0)
    cache.reserve(1, 100)
    cache.add_rows(1)
    cache.keys.data[:] = torch.randn(cache.keys.data.shape)
    cache.lengths[0] = 100
    before = cache.keys.data[:, 0, :100].clone()
    cache.reserve(2, 3)
    assert torch.equal(cache.keys.data[:, 0, :100], before)
    assert cache.keys.capacity >= 100


@given(
    moves=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), min_size=1, max_size=20, unique_by=lambda m: m[1])
)
def test_positions_are_read_before_any_is_written(moves):
    store = RowStore(num_layers=2, width=1, dtype=torch.float32, device=torch.device("cpu"))
    store.data = torch.arange(60.0).view(2, 3, 10, 1)
    expected = store.data.clone().view(2, 30)
    before = expected.clone()
    for source, target in moves:
        expected[:, target] = before[:, source]
    store.move_positions(torch.tensor([source for source, _ in moves]), torch.tensor([target for _, target in moves]))
    assert torch.equal(store.data.view(2, 30), expected)


def test_fresh_positions_are_zero_and_room_grows_with_the_rows():
    store = RowStore(num_layers=1, width=2, dtype=torch.float32, device=torch.device("cpu"))

    def reserve(num_rows, length, *used):
        reserve_rows([store], num_rows, length, used_rows=used[0], used_length=used[1])

    reserve(4, 10, 0, 0)
    assert store.num_bytes == 4 * 64 * 2 * 4
    assert not store.data.any()
    store.data += 7
    reserve(4, 65, 1, 10)
    assert store.num_bytes == 4 * 128 * 2 * 4
    assert store.data[0, 0, :10].eq(7).all()
    assert store.data.sum() == 7 * 20
    reserve(2, 64, 1, 10)  # there is room: nothing moves
    assert store.num_rows == 4
    reserve(1, 129, 1, 10)
    assert (store.num_rows, store.capacity) == (1, 256), "twice as long, so that it seldom moves"
    store.clear()
    assert store.num_bytes == 0


def _build_stores(*widths):
    return [RowStore(num_layers=4, width=w, dtype=torch.bfloat16, device=torch.device("cpu")) for w in widths]


def _read_resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_room_that_is_set_aside_costs_memory_as_it_is_written():
    stores, before = _build_stores(512, 8), _read_resident_bytes()
    reserve_rows(stores, 8, 10, used_rows=0, used_length=0, expected=16_000)
    assert {store.capacity for store in stores} == {16_000}
    assert stores[0].num_bytes > 500e6 and _read_resident_bytes() - before < 50e6
    stores[0].data[:, 7, :100] = 3
    assert not stores[0].data[:, 7, 100:200].any()
    assert _read_resident_bytes() - before < 50e6


def test_where_so_much_is_not_promised_there_is_what_is_needed(monkeypatch):
    monkeypatch.setattr(cache_module, "_LAZY_BYTES", 0)
    allocate = cache_module.mmap.mmap

    def refuse(fd, size, **kwargs):
        if size > 300_000:
            raise OSError("no")
        return allocate(fd, size, **kwargs)

    monkeypatch.setattr(cache_module.mmap, "mmap", refuse)
    stores = _build_stores(8, 16)
    reserve_rows(stores, 2, 100, used_rows=0, used_length=0, expected=5000)  # enough for the first alone
    assert {store.capacity for store in stores} == {128}
    stores[1].data += 2
    reserve_rows(stores, 2, 129, used_rows=1, used_length=100, expected=5000)
    assert {store.capacity for store in stores} == {192}
    assert stores[1].data[:, 0, :100].eq(2).all() and not stores[1].data[:, 1].any()
    with pytest.raises(OSError, match="no"):
        reserve_rows(stores, 2, 9000, used_rows=1, used_length=100)
    assert {store.capacity for store in stores} == {192}


def test_a_snapshot_outlives_its_row():
    cache = build_cache(3)
    cache.reserve(2, 8)
    cache.add_rows(2)
    for store in cache.stores:
        store.data[:] = torch.randn(store.data.shape)
    cache.lengths = [5, 7]
    kept = [store.data[:, 1, :4].clone() for store in cache.stores]
    prefix = cache.snapshot(1, 4)
    cache.remove_row(1)
    cache.reserve(3, 8)
    cache.add_rows(2)
    for store in cache.stores:
        store.data[:] = 0
    cache.restore([1, 2], prefix)
    assert cache.lengths == [5, 4, 4]
    for store, part in zip(cache.stores, kept, strict=True):
        assert torch.equal(store.data[:, 1, :4], part)
        assert torch.equal(store.data[:, 2, :4], part)


def test_check_finds_what_is_broken():
    cache = build_cache(3)
    cache.reserve(2, 8)
    cache.add_rows(2)
    cache.check([0, 0])
    with pytest.raises(AssertionError, match="sequences say"):
        cache.check([0, 1])
    with pytest.raises(AssertionError, match="reserved"):
        cache.add_rows(1)
    cache.lengths = [100, 0]
    with pytest.raises(AssertionError, match="beyond"):
        cache.check([100, 0])
    with pytest.raises(AssertionError, match="holds"):
        cache.truncate(1, 3)


def test_the_scheduler_is_first_come_first_served_while_no_length_is_known():
    scheduler = Scheduler(2)
    sequences = [build_sequence(index, [index % 2]) for index in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert scheduler.admit() == sequences[:2]
    assert scheduler.admit() == []
    assert scheduler.remove(0) is sequences[0]
    assert scheduler.admit() == [sequences[2]]
    assert scheduler.running == [sequences[1], sequences[2]]
    assert scheduler.has_waiting_sibling(sequences[1])
    scheduler.check()
    sequences[1].finish_reason = "stop"
    with pytest.raises(AssertionError, match="still runs"):
        scheduler.check()
    scheduler.abort()
    assert not scheduler.has_work


def test_at_least_one_slot():
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1, got 0"):
        Scheduler(0)
