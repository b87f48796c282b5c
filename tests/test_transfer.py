"""What a step asks of a device: counted on CPU tensors that are not told they are on the host."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import EagerRecorder, build_model
from fastgrpo import attention, cache, sampling, transfer, tree, verify
from fastgrpo.blocks import BLOCK_SIZE
from fastgrpo.drafters import calibration
from fastgrpo.engine import Engine
from fastgrpo.kernels import cpu
from fastgrpo.model import TargetModel
from fastgrpo.transfer import download
from fastgrpo.types import PLAIN, SamplingParams, SpeculationPlan

READS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique"}
PLANS = [
    PLAIN,
    SpeculationPlan(depth=3, width=1, num_draft_tokens=3),
    SpeculationPlan(depth=3, width=3, num_draft_tokens=6),
]


HOST_COPIES = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}


class CountReads(TorchDispatchMode):
    """Operators whose result or size the host must wait for, by name; boolean indexing is one."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name, method in HOST_COPIES.items():
            self._patch.setattr(torch.Tensor, name, self._count(name, method))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def _count(self, name, method):
        def counted(values, *args, **kwargs):
            self.found.append(name)
            return method(values, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        if name in READS or any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The code that decides by `is_host` goes the device's way; kernels for the CPU are out of reach.

    Returns:
        how often `download` was called.
    """
    for module in [module for name, module in sys.modules.items() if name.startswith("fastgrpo.")]:
        if hasattr(module, "is_host"):
            monkeypatch.setattr(module, "is_host", lambda _: False)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    calls = []

    def counted(*values, **packed):
        calls.append(len(values))
        with pytest.MonkeyPatch.context() as patch:
            for name, method in HOST_COPIES.items():
                patch.setattr(torch.Tensor, name, method)
            return download(*values, **packed)

    monkeypatch.setattr(verify, "download", counted)
    monkeypatch.setattr(attention.ForwardBatch, "read_length", functools.cached_property(_read_all))
    attention.ForwardBatch.read_length.__set_name__(attention.ForwardBatch, "read_length")
    return calls


def _read_all(batch):
    """What the fallback without our kernel asks of a device; the kernel does not."""
    return batch.blocks.shape[1] * BLOCK_SIZE


@pytest.mark.parametrize("plan", PLANS, ids=["plain", "chain", "tree"])
@pytest.mark.parametrize("recorder", [None, EagerRecorder()], ids=["launched", "recorded"])
@pytest.mark.parametrize("drafter", ["eagle-new", "block"])
def test_a_step_reads_once(plan, recorder, drafter, as_on_a_device, monkeypatch):
    """Nothing but `download` waits, and a step calls it once; the tokens are those of the host's own way."""
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: recorder)
    engine = Engine(build_model("llama", torch.float32), drafter=drafter, speculation=plan)
    prompts, params = [[5, 6, 7], [8, 9], [3, 4, 5, 6]], SamplingParams(max_tokens=8)
    found = []
    steps = engine.step

    def counted_step():
        before, is_prefill = len(as_on_a_device), engine.scheduler.waiting
        with CountReads() as reads:
            record = steps()
        if not is_prefill and engine.scheduler.running:
            found.append((reads.found, len(as_on_a_device) - before))
        return record

    engine.step = counted_step
    told = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert found and all(each == ([], 1) for each in found), found
    monkeypatch.setattr(TargetModel, "_build_recorder", lambda _: None)
    assert told == _generate_on_the_host(plan, drafter, prompts, params)


def test_reads_are_found():
    values = torch.tensor([1, 2])
    with CountReads() as reads:
        bool((values > 1).any())
        values[values > 1]
        values.tolist()
        values.max().item()
        values[1:].cpu()
    assert reads.found == ["_local_scalar_dense", "index", "tolist", "_local_scalar_dense", "cpu"]


def _generate_on_the_host(plan, drafter, prompts, params):
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, cache, calibration, sampling, transfer, tree, verify):
            patch.setattr(module, "is_host", lambda _: True)
        engine = Engine(build_model("llama", torch.float32), drafter=drafter, speculation=plan)
        return [completion.token_ids for completion in engine.generate(prompts, params)]


def test_what_is_read_at_once_is_what_was_written(monkeypatch):
    values = torch.tensor([[1, -2], [2**40, 4]]), torch.tensor([0.1, -torch.inf]), torch.tensor(3, dtype=torch.int32)
    monkeypatch.setattr(transfer, "is_host", lambda _: False)
    for value, found in zip(values, download(*values), strict=True):
        assert found.shape == tuple(value.shape) and (found == value.numpy()).all()
