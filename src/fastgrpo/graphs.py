"""Forwards of a few sizes, recorded once and replayed: launching a layer's kernels one by one costs more than a small
batch's work.

A batch is copied into buffers of the next larger size and padded there. What is recorded reads and writes the cache
where it stood at the time: when that moves, recordings are dropped.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastgrpo.attention import ForwardBatch
from fastgrpo.cache import SlotCache
from fastgrpo.memory import find_available_bytes

Outputs = tuple[Tensor, ...]  # each with one row for each packed token
_SIZES = sorted({base << shift for shift in range(15) for base in (2, 3)} | {1})  # 1 2 3 4 6 8 12 16 ...
_MOST_NODES = 64  # of a row, as many as our attention kernel takes
_MOST_TOKENS = 1024  # more are bound by their arithmetic, not by launches
_LEAST_BLOCKS = 4  # our attention kernel reads as many at once; from here on their number doubles, as rows grow
_USES_BEFORE = 2  # forwards of a size before it is recorded
_MOST_GRAPHS = 32
_FREE_BYTES = 2 * 2**30  # left to others; nothing is recorded with less
_PADDING = ("token_ids", "positions", "row_starts", "num_nodes", "lengths")  # zero behind the real entries


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The sizes of a recorded forward."""

    rows: int
    nodes: int
    tokens: int
    blocks: int  # of the longest row's table

    @staticmethod
    def find(batch: ForwardBatch) -> Bucket | None:
        """The smallest that holds a batch; None where it is too large, or sees earlier nodes of its tree."""
        num_tokens = len(batch.token_ids)
        if batch.most_nodes > _MOST_NODES or num_tokens > _MOST_TOKENS or batch.num_before:
            return None
        num_rows, num_blocks = batch.blocks.shape
        rows, nodes, tokens = (
            next(size for size in _SIZES if size >= n) for n in (num_rows, batch.most_nodes, num_tokens)
        )
        blocks = max(_LEAST_BLOCKS, 1 << (num_blocks - 1).bit_length())
        return Bucket(rows=rows, nodes=nodes, tokens=tokens, blocks=blocks)


@runtime_checkable
class Recorder(Protocol):
    """Records a call whose inputs stay where they are."""

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Returns what repeats the call, and the outputs that it writes anew each time.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...

    def count_free_bytes(self) -> int: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None  # a handle whose type PyTorch does not show

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # kernels are compiled and workspaces taken outside the recording
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        self._pool = self._pool or graph.pool()
        return graph.replay, outputs

    def count_free_bytes(self) -> int:
        free = find_available_bytes(torch.device("cuda"))
        assert free is not None, "CUDA says what is free"
        return free


@dataclass(frozen=True, kw_only=True)
class _Graph:
    inputs: ForwardBatch
    replay: Callable[[], None]
    outputs: Outputs


class GraphRunner:
    """Replays forwards of sizes it has met often enough; runs the others as they come.

    Outputs hold until the next call. Padded tokens are written to the cache's scratch block.

    Args:
        run: the forward; launches work of the device only, and reads nothing back.
        cache: that `run` reads and writes.
    """

    def __init__(self, run: Callable[[ForwardBatch], Outputs], cache: SlotCache, recorder: Recorder) -> None:
        self._run, self._cache, self._recorder = run, cache, recorder
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()  # the least recently used first
        self._uses: dict[Bucket, int] = {}
        self._place: tuple[int, ...] = ()
        self.obstacle: str | None = None  # why nothing is recorded any more

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def __call__(self, batch: ForwardBatch) -> Outputs:
        bucket = None if self.obstacle else Bucket.find(batch)
        if bucket is None:
            return self._run(batch)
        self._cache.take_scratch()  # which may move the cache, and so comes first
        self._drop_if_moved()
        graph = self._graphs.get(bucket)
        if graph is None:
            self._uses[bucket] = self._uses.get(bucket, 0) + 1
            if self._uses[bucket] <= _USES_BEFORE:
                return self._run(batch)
            graph = self._record(bucket, batch)
            if graph is None:
                return self._run(batch)
        else:
            self._graphs.move_to_end(bucket)
            self._fill(graph.inputs, batch)
        graph.replay()
        return tuple(output[: len(batch.token_ids)] for output in graph.outputs)

    def _drop_if_moved(self) -> None:
        stores = self._cache.stores
        place = (*(store.data.data_ptr() for store in stores), stores[0].num_blocks)
        if place != self._place:
            self._graphs.clear()
            self._place = place

    def _record(self, bucket: Bucket, batch: ForwardBatch) -> _Graph | None:
        free = self._recorder.count_free_bytes()
        if free < _FREE_BYTES:
            self._stop(f"only {free / 2**30:.1f} GiB of the device's memory are free")
            return None
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        inputs = _build_inputs(bucket, batch)
        self._fill(inputs, batch)
        try:
            # a view of its own for each run: what the batch computes lazily must be computed in the recording
            replay, outputs = self._recorder.record(lambda: self._run(replace(inputs)))
        except RuntimeError as error:  # out of memory is one
            self._stop(str(error).strip().splitlines()[0] if str(error).strip() else repr(error))
            return None
        self._graphs[bucket] = _Graph(inputs=inputs, replay=replay, outputs=outputs)
        return self._graphs[bucket]

    def _stop(self, reason: str) -> None:
        """Once is enough: where it failed it would fail again."""
        self.obstacle = reason
        self._graphs.clear()
        warnings.warn(f"decoding goes on without CUDA graphs, which takes longer: {reason}", stacklevel=3)

    def _fill(self, inputs: ForwardBatch, batch: ForwardBatch) -> None:
        """Copy a batch into the buffers; what stands behind it there computes nothing that is looked at."""
        for name, padding in (*((name, 0) for name in _PADDING), ("write_index", self._cache.take_scratch())):
            buffer, values = getattr(inputs, name), getattr(batch, name)
            buffer[: len(values)].copy_(values)
            buffer[len(values) :].fill_(padding)
        for buffer, values in ((inputs.blocks, batch.blocks), (inputs.visible, batch.visible)):
            buffer.zero_()
            buffer[tuple(map(slice, values.shape))].copy_(values)


def _build_inputs(bucket: Bucket, batch: ForwardBatch) -> ForwardBatch:
    """Buffers of a bucket's size."""
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
    )
