"""Forwards and drafts as CUDA graphs of a few sizes: recorded at their first call, replayed at later ones.

For small batches, launching kernels one by one takes longer than their work. A batch is copied into buffers of the next
larger size and padded there. Recordings hold the addresses of what they read and write. When the cache moves they are
dropped, and between two rollouts they are kept where weights and cache stay in their places (`TargetModel.place`).
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fastgrpo.attention import MOST_GPU_NODES, ForwardBatch
from fastgrpo.cache import SlotCache
from fastgrpo.kernels import gpu
from fastgrpo.memory import find_available_bytes, is_out_of_memory

Outputs = tuple[Tensor, ...]
Inputs = TypeVar("Inputs")
_SIZES = sorted({base << shift for shift in range(15) for base in (2, 3)} | {1})  # 1 2 3 4 6 8 12 16 ...
_MOST_TOKENS = 1024  # larger forwards are bound by their arithmetic, not by launches
_LEAST_BLOCKS = 4  # the attention kernel reads as many at once; larger sizes are its doubles, as rows grow
_MOST_GRAPHS = 96  # of sizes that rollouts go through from many sequences to one, plan by plan
_PADDED_USES = 16  # uses of a larger recording before one of the right size is worth recording
_FREE_BYTES = 2 * 2**30  # nothing is recorded with less free memory on the device
_MODE = "thread_local"  # capture error mode: other threads, in which drafts may be learnt, are not restricted
_PADDING = ("token_ids", "positions", "row_starts", "num_nodes", "lengths")  # fields padded with zeros


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The sizes of a recorded forward."""

    rows: int
    nodes: int
    tokens: int
    blocks: int  # of the longest row's table

    @staticmethod
    def find(batch: ForwardBatch) -> Bucket | None:
        """The smallest bucket for a batch; None where it is too large, or its nodes see earlier ones of a tree."""
        num_tokens = len(batch.token_ids)
        if not may_record(batch.most_nodes, num_tokens) or batch.num_before:
            return None
        num_rows, num_blocks = batch.blocks.shape
        rows, nodes, tokens = map(round_size, (num_rows, batch.most_nodes, num_tokens))
        return Bucket(rows=rows, nodes=nodes, tokens=tokens, blocks=round_blocks(num_blocks))


def may_record(most_nodes: int, num_tokens: int) -> bool:
    """Whether a forward is small enough to be worth recording, and its rows for the attention kernel."""
    return most_nodes <= MOST_GPU_NODES and num_tokens <= _MOST_TOKENS


def round_size(count: int) -> int:
    """The smallest size of rows, nodes or tokens that is at least `count`."""
    return next(size for size in _SIZES if size >= count)


def list_larger(count: int) -> list[int]:
    """Sizes above `count`, up to 1.5 times as large: with more padding, recording anew soon takes less time."""
    return [size for size in _SIZES if count < size <= count + count // 2]


def round_blocks(count: int) -> int:
    """The smallest size of a row's table that is at least `count` blocks."""
    return max(_LEAST_BLOCKS, 1 << (count - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A call that was made once, and can be replayed."""

    first: Outputs  # the results of the first call
    replay: Callable[[], None]
    outputs: Outputs  # tensors that each replay writes its results to


@runtime_checkable
class Recorder(Protocol):
    """Records calls whose inputs keep their addresses."""

    def record(self, run: Callable[[], Outputs]) -> Recording:
        """Make the call once and record it.

        Raises:
            RuntimeError: it cannot be recorded.
            Exception: whatever the call raises, or Triton where a kernel cannot be compiled.
        """
        ...

    def count_free_bytes(self) -> int:
        """Free memory of the device."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that all recordings so far have taken for themselves."""
        ...


class _Streams(threading.local):
    """A thread's own stream to record on, on each device.

    PyTorch has 32 streams in all and hands them out in turn: a new one each time would soon be that of another thread,
    whose work would be recorded too. Besides, memory that PyTorch caches for one stream no other stream may use.
    """

    def __init__(self) -> None:
        self._by_device: dict[int, torch.cuda.Stream] = {}

    def find(self) -> torch.cuda.Stream:
        """This thread's stream on the current device."""
        device = torch.cuda.current_device()
        if device not in self._by_device:
            self._by_device[device] = torch.cuda.Stream()
        return self._by_device[device]


_STREAMS = _Streams()


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: a replay may overwrite the outputs of all others.

    The host records a call while the device still executes it, and waits for nothing.
    """

    def __init__(self) -> None:
        self._first: Any = None  # an empty graph: PyTorch gives up the pool for good with the last graph that uses it
        self._num_bytes = 0

    def record(self, run: Callable[[], Outputs]) -> Recording:
        current, own = torch.cuda.current_stream(), _STREAMS.find()
        own.wait_stream(current)
        try:
            with torch.cuda.stream(own):
                first = run()  # so that kernels are compiled and workspaces taken outside the recording
                if torch.cuda.mem_get_info()[0] < _FREE_BYTES:  # a recording cannot use memory that PyTorch has cached
                    torch.cuda.empty_cache()
                held = torch.cuda.memory_reserved()
                if self._first is None:
                    self._first, _ = _capture(lambda: (torch.zeros(1, device="cuda"),), None)
                graph, outputs = _capture(run, self._first.pool())
                self._num_bytes += max(torch.cuda.memory_reserved() - held, 0)
        finally:  # whoever makes the call after a failure writes where the first one may still be at work
            current.wait_stream(own)
        return Recording(first=first, replay=graph.replay, outputs=outputs)

    def count_free_bytes(self) -> int:
        free = find_available_bytes(torch.device("cuda"))
        assert free is not None, "CUDA reports its free memory"
        return free

    @property
    def num_bytes(self) -> int:
        return self._num_bytes


def _capture(run: Callable[[], Outputs], pool: Any) -> tuple[Any, Outputs]:
    """The call's launches on the current stream as a CUDA graph, and its outputs.

    `torch.cuda.graph` would wait for the device and empty the memory cache.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(pool=pool, capture_error_mode=_MODE)
        try:
            outputs = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says more of the cause
                graph.capture_end()
            raise
        graph.capture_end()
    except BaseException:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # else the generator stays as in a recording
        raise
    return graph, outputs


@dataclass(frozen=True, kw_only=True)
class _Graph(Generic[Inputs]):
    inputs: Inputs
    replay: Callable[[], None]
    outputs: Outputs


class Replays(Generic[Inputs]):
    """Calls that are recorded at the first use of their key, and replayed from then on.

    A larger recording, if there is one, is used for a while before the right size is recorded: while sequences finish
    fast, sizes do not last. Outputs are valid until the next call.

    Args:
        run: launches work of the device only, and reads nothing back.
        list_stores: tensors that `run` reads and writes besides its inputs; when one moves, recordings are dropped.

    Attributes:
        obstacle: why nothing is recorded any more; None while recording goes on.
        was_replayed: whether the next call like the last one will take as long: False where the last one was recorded.
    """

    def __init__(
        self,
        run: Callable[[Inputs], Outputs],
        list_stores: Callable[[], Sequence[Tensor]],
        recorder: Recorder,
    ) -> None:
        self._run, self._list_stores = run, list_stores
        self._recorder: Recorder | None = recorder  # None once closed
        self._graphs: OrderedDict[Hashable, _Graph[Inputs]] = OrderedDict()  # the least recently used first
        self._padded_uses: Counter[Hashable] = Counter()
        self._place: tuple[tuple[int, int], ...] = ()
        self.obstacle: str | None = None
        self.was_replayed = True
        _REPLAYS.add(self)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Memory that recordings have taken, besides the stores."""
        return 0 if self._recorder is None else self._recorder.num_bytes

    def close(self) -> None:
        """Drop all recordings with the memory that they share, and record nothing any more."""
        self.obstacle, self._recorder = "the process ends", None
        self._graphs.clear()

    def __call__(
        self,
        key: Hashable,
        build: Callable[[], Inputs],
        fill: Callable[[Inputs], None],
        larger: Iterable[Hashable] = (),
    ) -> Outputs | None:
        """The outputs of the call on padded inputs; None where nothing can be recorded and the caller must make it.

        Where recording fails, the call is made without it; what fails then, too, is raised.

        Args:
            key: calls with the same key differ in the numbers in their inputs alone.
            build: makes the buffers for a key's inputs.
            fill: copies the inputs of this call into such buffers, or into those of a larger key.
            larger: keys whose buffers would hold the inputs too, the nearest first.
        """
        self.was_replayed = self.obstacle is not None
        if self.obstacle is not None:
            return None
        self._drop_if_moved()
        key = self._choose(key, larger)
        graph = self._graphs.get(key)
        if graph is None:
            return self._record(key, build, fill)
        self.was_replayed = True
        self._graphs.move_to_end(key)
        fill(graph.inputs)
        graph.replay()
        return graph.outputs

    def _choose(self, key: Hashable, larger: Iterable[Hashable]) -> Hashable:
        """The key itself, or for its first uses a larger one that is recorded."""
        if key in self._graphs or self._padded_uses[key] >= _PADDED_USES:
            return key
        found = next((each for each in larger if each in self._graphs), key)
        self._padded_uses[key] += found is not key
        return found

    def _drop_if_moved(self) -> None:
        place = tuple((store.data_ptr(), store.shape[1]) for store in self._list_stores())
        if place != self._place:
            self._graphs.clear()
            self._place = place

    def _record(self, key: Hashable, build: Callable[[], Inputs], fill: Callable[[Inputs], None]) -> Outputs | None:
        assert self._recorder is not None, "there is an obstacle once this is closed"
        free = self._recorder.count_free_bytes()
        if free < _FREE_BYTES:
            self._stop(f"only {free / 2**30:.1f} GiB of the device's memory are free")
            return None
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        inputs = build()
        fill(inputs)
        try:
            made = self._recorder.record(lambda: self._run(inputs))
        except Exception as error:
            outputs = None if is_out_of_memory(error) else self._run(inputs)  # fails where recording is not the reason
            self._stop(gpu.describe_failure(error))
            return outputs
        self._graphs[key] = _Graph(inputs=inputs, replay=made.replay, outputs=made.outputs)
        return made.first

    def _stop(self, reason: str) -> None:
        """Record nothing any more: what failed once would fail again."""
        self.obstacle = reason
        self._graphs.clear()
        warnings.warn(f"decoding goes on without CUDA graphs, which takes longer: {reason}", stacklevel=4)


_REPLAYS: weakref.WeakSet[Replays[Any]] = weakref.WeakSet()


@atexit.register
def _drop_recordings() -> None:
    """Before the process ends: afterwards there is no driver to give them back to."""
    for replays in list(_REPLAYS):
        replays.close()


class GraphRunner:
    """Replays forwards in padded batches of a few sizes; runs larger ones without recording.

    Outputs are valid until the next call. Padded tokens are written to the cache's scratch block.

    Args:
        run: the forward; launches work of the device only, and reads nothing back.
        cache: the one that `run` reads and writes.
    """

    def __init__(self, run: Callable[[ForwardBatch], Outputs], cache: SlotCache, recorder: Recorder) -> None:
        self._run, self._cache = run, cache
        # a copy of the batch for each run: what a batch computes lazily must be computed within the recording
        self._replays = Replays[ForwardBatch](lambda inputs: run(replace(inputs)), cache.list_data, recorder)

    @property
    def num_graphs(self) -> int:
        return len(self._replays)

    @property
    def obstacle(self) -> str | None:
        """Why nothing is recorded any more; None while recording goes on."""
        return self._replays.obstacle

    @property
    def was_replayed(self) -> bool:
        """Whether the next forward like the last one will take as long: False where the last one was recorded."""
        return self._replays.was_replayed

    def __call__(self, batch: ForwardBatch) -> Outputs:
        bucket = Bucket.find(batch)
        outputs = None
        if bucket is not None and self.obstacle is None:
            self._cache.take_scratch()  # which may move the cache, and so comes first
            outputs = self._replays(
                bucket, lambda: _build_inputs(bucket, batch), lambda inputs: self._fill(inputs, batch)
            )
        if outputs is None:
            return self._run(batch)
        return tuple(output[: len(batch.token_ids)] for output in outputs)

    def _fill(self, inputs: ForwardBatch, batch: ForwardBatch) -> None:
        """Copy a batch into the buffers and pad it; nobody reads what is computed for the padding."""
        for name, padding in (*((name, 0) for name in _PADDING), ("write_index", self._cache.take_scratch())):
            buffer, values = getattr(inputs, name), getattr(batch, name)
            buffer[: len(values)].copy_(values)
            if len(values) < len(buffer):
                buffer[len(values) :].fill_(padding)
        for buffer, values in ((inputs.blocks, batch.blocks), (inputs.visible, batch.visible)):
            if values.shape != buffer.shape:
                buffer.zero_()
            buffer[tuple(map(slice, values.shape))].copy_(values)


def _build_inputs(bucket: Bucket, batch: ForwardBatch) -> ForwardBatch:
    """Buffers of a bucket's sizes, filled with zeros."""
    device = batch.blocks.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return replace(
        batch,
        token_ids=zeros(bucket.tokens),
        positions=zeros(bucket.tokens),
        write_index=zeros(bucket.tokens),
        row_starts=zeros(bucket.rows),
        num_nodes=zeros(bucket.rows),
        blocks=zeros(bucket.rows, bucket.blocks),
        lengths=zeros(bucket.rows),
        visible=torch.zeros(bucket.rows, bucket.nodes, bucket.nodes, dtype=torch.bool, device=device),
        pad_index=None,
        laid_out_words=None,  # those of `batch` itself
    )
