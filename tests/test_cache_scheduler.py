"""Law 6: whatever arrives, is accepted and leaves, every row of the cache holds what its sequence says."""

from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastgrpo import block_store
from fastgrpo.block_store import BlockStore
from fastgrpo.blocks import BLOCK_SIZE, BlockPool, count_blocks
from fastgrpo.cache import RowPrefix, SlotCache, locate
from fastgrpo.kernels import cpu
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


def find_places(cache: SlotCache, row: int, start: int, end: int) -> torch.Tensor:
    """Where a row's positions stand in the stores."""
    return locate(cache.blocks[row, None], torch.arange(start, end)[None])[0]


class CacheAndScheduler(RuleBasedStateMachine):
    """Every cached position carries a number of its own; `contents` says which ones a request should see."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = build_cache(3)
        self.scheduler = Scheduler(4)
        self.contents: dict[int, list[int]] = {}  # request -> marks of its cached positions
        self.held: list[tuple[RowPrefix, list[int]]] = []
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

    def write(self, stores: list[BlockStore], row: int, start: int, marks: list[int]) -> None:
        """As the model does: position start + i of a row gets marks[i], in every layer of the stores."""
        index = find_places(self.cache, row, start, start + len(marks))
        values = torch.tensor(marks, dtype=torch.float32)[:, None]
        for sign, store in zip((1, -1, 0.5), self.cache.stores, strict=False):
            if store not in stores:
                continue
            for layer in range(store.data.shape[0]):
                store.write(layer, index, (sign * values + layer / 4).expand(-1, store.data.shape[2]).contiguous())

    def read(self, row: int) -> list[int]:
        """The marks of a row, after seeing that all layers and stores agree."""
        index = find_places(self.cache, row, 0, self.cache.lengths[row])
        marks = self.cache.keys.data[0, index, 0]
        for sign, store in zip((1, -1, 0.5), self.cache.stores, strict=False):
            for layer in range(store.data.shape[0]):
                expected = (sign * marks + layer / 4)[:, None].expand(-1, store.data.shape[2])
                assert torch.equal(store.data[layer, index], expected)
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
        begun = [sequence for sequence in arrived if sequence.token_ids]
        assert admitted[: len(begun)] == begun[: len(admitted)], "who has begun goes first"
        assert running[len(running) - len(admitted) :] == admitted
        if not admitted:
            return
        self.cache.add_rows(len(admitted))
        leaders: dict[tuple[int, ...], int] = {}
        for row in range(len(running) - len(admitted), len(running)):
            sequence = running[row]
            length = sequence.num_cached
            if not sequence.token_ids and sequence.group_key in leaders:
                leader = leaders[sequence.group_key]
                self.cache.share(leader, [row], length)
                self.contents[sequence.request_id] = self.contents[running[leader].request_id][:length]
            else:
                leaders[sequence.group_key] = row
                marks = self.new_marks(length)
                self.cache.reserve(row, length)
                self.write(self.cache.stores, row, 0, marks)
                self.cache.lengths[row] = length
                self.contents[sequence.request_id] = marks

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def commit_trees(self, data: st.DataObject) -> None:
        """Each row gets some nodes, keeps an increasing path that starts at its root, and may then be cut."""
        running = self.scheduler.running
        counts = data.draw(st.lists(st.integers(1, 9), min_size=len(running), max_size=len(running)))
        for row, length in enumerate(self.cache.lengths):
            missing, left = self.cache.count_missing(row, length + max(counts)), self.cache.num_left
            self.cache.reserve(row, length + max(counts))
            assert self.cache.num_left == left - missing
        paths, packed = [], []
        for row, count in enumerate(counts):
            marks = self.new_marks(count)
            self.write([self.cache.keys, self.cache.values], row, self.cache.lengths[row], marks)
            path = [0, *sorted(data.draw(st.sets(st.integers(1, count - 1)) if count > 1 else st.just(set())))]
            kept = data.draw(st.integers(1, len(path)))
            packed += marks
            self.contents[running[row].request_id] += [marks[node] for node in path[:kept]]
            paths.append((path, kept))
        depth = max(len(path) for path, _ in paths)
        lengths = [length + len(path) for length, (path, _) in zip(self.cache.lengths, paths, strict=True)]
        padded = torch.tensor([path + [-1] * (depth - len(path)) for path, _ in paths])
        features, before = None, torch.tensor(self.cache.lengths)
        if self.cache.features is not None:  # these are written when the path is known
            features = 0.5 * torch.tensor(packed, dtype=torch.float32)[:, None].repeat(
                1, self.cache.features.data.shape[2]
            )
        starts = torch.tensor([sum(counts[:row]) for row in range(len(counts))])
        with pytest.MonkeyPatch.context() as patch:
            if data.draw(st.booleans(), label="by PyTorch's operators"):
                patch.setattr(cpu, "is_available", lambda: False)
            self.cache.gather(padded, before, self.cache.blocks, starts, features)
        self.cache.advance([len(path) for path, _ in paths])
        assert self.cache.lengths == lengths
        for row, (path, kept) in enumerate(paths):
            self.cache.truncate(row, lengths[row] - len(path) + kept)
            running[row].append([0] * kept, [0.0] * kept, [0.0] * kept)

    @precondition(lambda self: self.scheduler.running and all(s.token_ids for s in self.scheduler.running))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """After a step, in which each running sequence emits at least a token."""
        slot = data.draw(st.integers(0, len(self.scheduler.running) - 1))
        sequence = self.scheduler.remove(slot)
        self.cache.remove_row(slot)
        del self.contents[sequence.request_id]

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        """The youngest, as `Admission` does; of equals the last."""
        running = self.scheduler.running
        slot = min(reversed(range(len(running))), key=lambda slot: len(running[slot].token_ids))
        num_lengths = self.scheduler.lengths.num_prompts
        sequence = self.scheduler.preempt(slot)
        self.cache.remove_row(slot)
        del self.contents[sequence.request_id]
        assert self.scheduler.waiting[0] is sequence and self.scheduler.lengths.num_prompts == num_lengths

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.scheduler.running) - 1))
        length = data.draw(st.integers(0, self.cache.lengths[row]))
        marks = self.contents[self.scheduler.running[row].request_id][:length]
        self.held.append((self.cache.hold(row, length), marks))

    @precondition(
        lambda self: (
            self.held and len(self.scheduler.running) < self.scheduler.max_num_seqs and not self.scheduler.waiting
        )
    )
    @rule(is_dropped=st.booleans())
    def restore(self, is_dropped: bool) -> None:
        """A sibling that comes when the others have gone; it writes into what it shares, and harms nobody.

        It comes alone: from a queue the scheduler would have taken the first.
        """
        prefix, marks = self.held[0]
        sequence = build_sequence(self.num_requests, [3] * (len(marks) + 1))
        self.num_requests += 1
        self.scheduler.running.append(sequence)
        self.cache.add_rows(1)
        self.cache.restore([len(self.scheduler.running) - 1], prefix)
        self.contents[sequence.request_id] = list(marks)
        if is_dropped:
            self.cache.drop(prefix)
            self.held.pop(0)

    @precondition(lambda self: self.num_requests > 12)
    @rule()
    def give_up(self) -> None:
        self.scheduler.abort()
        self.cache.clear()
        self.contents.clear()
        self.held.clear()
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
    def memory_is_that_of_live_tokens_and_a_block_a_row(self) -> None:
        lengths = [*self.cache.lengths, *(prefix.length for prefix, _ in self.held)]
        token_bytes = self.cache.block_bytes // BLOCK_SIZE
        assert self.cache.used_bytes <= sum(map(count_blocks, lengths)) * self.cache.block_bytes
        assert self.cache.used_bytes <= 1.05 * sum(lengths) * token_bytes + len(lengths) * self.cache.block_bytes
        assert self.cache.used_bytes <= min(self.cache.peak_bytes, self.cache.num_bytes)

    @invariant()
    def no_sibling_is_overtaken_and_nobody_lost(self) -> None:
        waiting: dict[tuple[int, ...], list[int]] = {}
        for sequence in self.scheduler.waiting:
            if sequence.token_ids:
                continue
            waiting.setdefault(sequence.group_key, []).append(sequence.request_id)
        assert all(group == sorted(group) for group in waiting.values())
        assert set(self.contents) == {sequence.request_id for sequence in self.scheduler.running}
        for sequence in self.scheduler.running:
            is_sibling = any(other.prompt_ids == sequence.prompt_ids for other in self.scheduler.waiting)
            assert self.scheduler.has_waiting_sibling(sequence) == is_sibling


TestCacheAndScheduler = CacheAndScheduler.TestCase
TestCacheAndScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


# -- the parts -----------------------------------------------------------------------------------------------


def _fill(cache: SlotCache, lengths: list[int]) -> None:
    """Rows of random numbers."""
    cache.add_rows(len(lengths))
    for row, length in enumerate(lengths):
        cache.reserve(row, length)
        cache.lengths[row] = length
        for store in cache.stores:
            store.data[:, find_places(cache, row, 0, length)] = torch.randn(
                store.data.shape[0], length, store.data.shape[2]
            )


def _read(cache: SlotCache, row: int, length: int) -> list[torch.Tensor]:
    return [store.data[:, find_places(cache, row, 0, length)] for store in cache.stores]


def test_a_cache_that_cannot_grow_by_a_quarter_moves_a_few_times_and_not_with_each_block(monkeypatch):
    cache, moves = build_cache(3), []
    resize = BlockStore.resize

    def resize_up_to(store: BlockStore, num_blocks: int, num_kept: int) -> None:
        if num_blocks > 120:
            raise torch.OutOfMemoryError("no room")
        moves.extend([num_blocks] if store is cache.features else [])
        resize(store, num_blocks, num_kept)

    monkeypatch.setattr(BlockStore, "resize", resize_up_to)
    cache.begin(expected_blocks=100)
    cache.add_rows(1)
    for count in range(1, 121):
        cache.reserve(0, count * BLOCK_SIZE)
    assert moves[0] == 100 and moves[-1] == 120 and len(moves) <= 5
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(0, 121 * BLOCK_SIZE)


@pytest.mark.parametrize(("num_free", "fits"), [(100, (False, False)), (150, (True, False)), (10_000, (True, True))])
def test_stores_of_a_device_move_one_after_the_other_into_what_is_free(monkeypatch, num_free, fits):
    """Two halves of what a position takes: the first one's copy takes what the second one's lacks."""
    cache = build_cache(0)
    block_bytes = BLOCK_SIZE * cache.position_bytes
    for store in cache.stores:
        store.resize(100, 0)
    monkeypatch.setattr("fastgrpo.cache.find_available_bytes", lambda _: num_free * block_bytes)
    assert cache._may_move(200), "memory of a CPU is taken as it is written"
    for store in cache.stores:
        store.data = store.data.to("meta")
    assert (cache._may_move(180), cache._may_move(200)) == fits


def test_room_that_grows_keeps_what_is_there():
    """On a CPU nothing moves where the rollout was foreseen."""
    for expected in (0, 50):
        cache = build_cache(3)
        cache.begin(expected_blocks=expected)
        _fill(cache, [100, 5])
        before, data = _read(cache, 0, 100), cache.keys.data.data_ptr()
        cache.reserve(1, 40 * BLOCK_SIZE)
        assert all(torch.equal(a, b) for a, b in zip(before, _read(cache, 0, 100), strict=True))
        assert (cache.keys.data.data_ptr() == data) == (expected > 0)


@given(
    moves=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63)), min_size=1, max_size=20, unique_by=lambda m: m[1])
)
def test_positions_are_read_before_any_is_written(moves):
    store = BlockStore(num_layers=2, width=1, dtype=torch.float32, device=torch.device("cpu"))
    store.data = torch.arange(128.0).view(2, 64, 1)
    expected = store.data.clone()
    before = expected.clone()
    for source, target in moves:
        expected[:, target] = before[:, source]
    store.move_positions(torch.tensor([source for source, _ in moves]), torch.tensor([target for _, target in moves]))
    assert torch.equal(store.data, expected)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "give_back"]), st.integers(0, 30)), max_size=80))
def test_the_lowest_free_block_is_taken(actions):
    """Against a model that counts owners in a dict."""
    pool, owners, most = BlockPool(), {}, 0
    pool.size, pool.limit = 12, 10
    for action, number in actions:
        taken = sorted(owners)
        if action == "take" and len(owners) == pool.limit:
            with pytest.raises(MemoryError, match="all 10 blocks of the cache are taken"):
                pool.take()
        elif action == "take":
            block = pool.take()
            assert block == min(set(range(pool.size)) - set(owners))
            owners[block] = 1
        elif taken and action == "share":
            pool.share(taken[number % len(taken)])
            owners[taken[number % len(taken)]] += 1
        elif taken:
            block = taken[number % len(taken)]
            pool.give_back(block)
            owners[block] -= 1
            if not owners[block]:
                del owners[block]
        most = max(most, len(owners))
        pool.check([[block] * count for block, count in owners.items()])
        assert {block for block in owners if pool.is_shared(block)} == {b for b, count in owners.items() if count > 1}
        assert (pool.num_taken, pool.num_left, pool.most_taken) == (len(owners), 10 - len(owners), most)


def test_siblings_store_the_full_blocks_of_their_prompt_once():
    cache = build_cache(3)
    length = 2 * BLOCK_SIZE + 10
    _fill(cache, [length])
    cache.add_rows(7)
    cache.share(0, range(1, 8), length)
    assert cache.used_bytes == 3 * cache.block_bytes
    before = _read(cache, 0, length)
    for row in range(8):
        assert cache.count_missing(row, length + 1) == (row < 7), "the last to write has the block to itself"
        cache.reserve(row, length + 1)
        for store in cache.stores:
            store.data[:, find_places(cache, row, length, length + 1)] = row
        cache.lengths[row] += 1
    assert cache.used_bytes == (2 + 8) * cache.block_bytes
    for row in range(8):
        assert all(torch.equal(a, b) for a, b in zip(before, _read(cache, row, length), strict=True))
        assert (cache.keys.data[:, find_places(cache, row, length, length + 1)] == row).all()
    for _ in range(8):
        cache.remove_row(0)
    cache.check([])
    assert cache.used_bytes == 0


def test_a_block_that_there_is_no_memory_to_copy_is_not_lost(monkeypatch):
    cache = build_cache(0)
    length = BLOCK_SIZE + 1
    _fill(cache, [length, 0])
    cache.share(0, [1], length)
    before = _read(cache, 1, length)

    def fail(store: BlockStore, source: int, target: int) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "copy_block", fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(1, length + 1)
    cache.check([length, length])
    cache.reserve(1, length + 1)
    cache.check([length, length])
    assert all(map(torch.equal, _read(cache, 1, length), before))


def test_a_held_prefix_outlives_its_row():
    cache = build_cache(3)
    _fill(cache, [5, 7])
    kept = _read(cache, 1, 4)
    prefix = cache.hold(1, 4)
    cache.remove_row(1)
    cache.add_rows(1)
    cache.reserve(1, 30)  # not in the held block
    for store in cache.stores:
        store.data[:, find_places(cache, 1, 0, 30)] = 0
    cache.add_rows(2)
    cache.restore([2, 3], prefix)
    assert cache.lengths == [5, 0, 4, 4]
    for row in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(kept, _read(cache, row, 4), strict=True))
    cache.drop(prefix)
    cache.trim()
    cache.check([5, 0, 4, 4])


# -- memory --------------------------------------------------------------------------------------------------


def _build_large(**settings: int) -> SlotCache:
    shape = {"num_layers": 4, "num_kv_heads": 1, "head_dim": 512, "feature_width": 64} | settings
    return SlotCache(**shape, dtype=torch.bfloat16, device=torch.device("cpu"))


def _read_resident_bytes():
    """Once the C library has given back what it keeps of memory that was freed, by whatever test."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_room_that_is_set_aside_costs_memory_as_it_is_written_until_it_is_idle():
    cache, before = _build_large(), _read_resident_bytes()
    cache.begin(expected_blocks=2000)
    cache.add_rows(4)
    cache.reserve(0, 10)
    assert cache.num_bytes > 1e9 and _read_resident_bytes() - before < 30e6
    assert not cache.keys.data[:, :200].any(), "a masked position must be finite"
    for row in range(4):
        cache.reserve(row, 6400)
        for store in cache.stores:
            store.data[:, find_places(cache, row, 0, 6400)] = 3
        cache.lengths[row] = 6400
    written = 4 * 100 * cache.block_bytes
    assert written > 200e6
    assert 0.9 * written < _read_resident_bytes() - before < 1.1 * written + 30e6
    for _ in range(3):
        cache.remove_row(1)
    assert _read_resident_bytes() - before < 0.55 * written, "more was idle than in use"
    assert all(bool((part == 3).all()) for part in _read(cache, 0, 6400))
    cache.add_rows(1)
    cache.reserve(1, 100)
    assert torch.isfinite(cache.keys.data[:, find_places(cache, 1, 0, 100)]).all()
    cache.trim()
    cache.check([6400, 0])
    cache.clear()
    assert cache.num_bytes == 0 and _read_resident_bytes() - before < 30e6


def test_where_so_much_is_not_promised_there_is_what_is_needed(monkeypatch):
    monkeypatch.setattr(block_store, "_LAZY_BYTES", 0)
    allocate = block_store.mmap.mmap

    def refuse(fd, size, **kwargs):
        if size > 500_000:
            raise OSError(errno.ENOMEM, "no")
        return allocate(fd, size, **kwargs)

    monkeypatch.setattr(block_store.mmap, "mmap", refuse)
    cache = _build_large(head_dim=16)  # 8 KiB of keys in a block, so 61 blocks at most
    cache.begin(expected_blocks=5000)
    cache.add_rows(2)
    cache.reserve(0, 100)
    cache.lengths[0] = 100
    cache.keys.data[:, find_places(cache, 0, 0, 100)] = 2
    held = cache.num_bytes
    assert held < len(cache.stores) * 500_000
    cache.reserve(0, 61 * BLOCK_SIZE)
    assert cache.num_bytes > held and (_read(cache, 0, 100)[0] == 2).all()
    with pytest.raises(OSError, match="no"):
        cache.reserve(1, 1)
    cache.trim()
    cache.check([100, 0])
    assert (_read(cache, 0, 100)[0] == 2).all(), "nothing is lost"
    cache.reserve(1, 1)


def test_no_more_blocks_are_taken_than_may_be():
    cache = build_cache(0)
    cache.begin(expected_blocks=100, limit=3)
    cache.add_rows(2)
    cache.reserve(0, 2 * BLOCK_SIZE)
    with pytest.raises(MemoryError, match="all 3 blocks of the cache are taken"):
        cache.reserve(1, 2 * BLOCK_SIZE)
    assert cache.num_left == 0 and cache.num_bytes == cache.peak_bytes == 3 * cache.block_bytes
    cache.trim()
    cache.check([0, 0])
    assert cache.num_left == 3


def test_check_finds_what_is_broken():
    cache = build_cache(3)
    cache.add_rows(2)
    cache.check([0, 0])
    with pytest.raises(AssertionError, match="sequences say"):
        cache.check([0, 1])
    cache.lengths = [100, 0]
    with pytest.raises(AssertionError, match="row 0: 0 blocks for 100 positions"):
        cache.check([100, 0])
    with pytest.raises(AssertionError, match="holds"):
        cache.truncate(1, 3)
    cache.lengths = [0, 0]
    cache.reserve(0, 10)
    cache.lengths[0] = 10
    cache.check([10, 0])
    cache._pool.take()
    with pytest.raises(AssertionError, match="owners differ"):
        cache.check([10, 0])


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


@given(prompt=st.lists(st.integers(0, 9), min_size=1, max_size=6), emitted=st.lists(st.integers(0, 9), max_size=6))
def test_last_token_ids_are_the_end_of_prompt_and_completion(prompt, emitted):
    sequence = build_sequence(0, prompt)
    sequence.token_ids += emitted
    assert sequence.last_token_ids(0) == []
    for count in range(1, 20):  # more than there are: all of them
        assert sequence.last_token_ids(count) == sequence.all_token_ids[-count:]
