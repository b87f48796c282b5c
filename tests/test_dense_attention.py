"""Attention by PyTorch's operators: by kernels that take any shape as it comes, and the switch is its owner's again."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from conftest import build_model
from fastgrpo.engine import Engine
from fastgrpo.grpo import segments
from fastgrpo.grpo.segments import Segment, SegmentMask
from fastgrpo.head_training import attend_packed
from fastgrpo.kernels import cpu
from fastgrpo.kernels.gpu import without_cudnn_attention
from fastgrpo.types import SamplingParams

is_cudnn_allowed = torch.backends.cuda.cudnn_sdp_enabled


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether cuDNN's attention could have been chosen, at each call of PyTorch's."""
    seen: list[bool] = []

    def note(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(*args: object, **kwargs: object) -> torch.Tensor:
            seen.append(is_cudnn_allowed())
            return attend(*args, **kwargs)

        return noted

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note(scaled_dot_product_attention))
    monkeypatch.setattr(segments, "_attend", note(segments._attend))
    return seen


def attend_in_update() -> None:
    states = torch.randn(1, 2, 9, 8)
    parts = tuple(Segment(num_tokens=size, num_prompt_tokens=3, is_first=size > 4) for size in (5, 4))
    scaled_dot_product_attention(states, states, states, attn_mask=SegmentMask(parts, states.device))


def attend_in_learning() -> None:
    states = torch.randn(6, 2, 8)
    attend_packed(states, states, states, torch.ones(6, 6, dtype=torch.bool).tril())


def roll_out() -> None:
    engine = Engine(build_model("llama", dtype=torch.float32), drafter="none")
    engine.generate([[3, 5, 7], [2]], SamplingParams(max_tokens=4))


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("attend", [attend_in_update, attend_in_learning, roll_out])
def test_no_shape_is_planned_anew(
    allowed: list[bool], monkeypatch: pytest.MonkeyPatch, attend: Callable[[], None], is_on: bool
) -> None:
    """cuDNN plans each new one for 0.08 s on an H100: a third of an update of the demo model."""
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    before = is_cudnn_allowed()
    try:
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        attend()
        assert is_cudnn_allowed() == is_on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert allowed and not any(allowed)


def test_the_switch_is_put_back_when_the_last_thread_is_through() -> None:
    before, entered, may_leave = is_cudnn_allowed(), threading.Event(), threading.Event()

    def learn() -> None:
        with without_cudnn_attention():
            entered.set()
            may_leave.wait(10)

    with without_cudnn_attention():
        thread = threading.Thread(target=learn)
        thread.start()
        assert entered.wait(10)
    assert not is_cudnn_allowed()  # the other is still inside
    may_leave.set()
    thread.join()
    assert is_cudnn_allowed() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_calls_no_kernel_of_cudnn() -> None:
    states = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    parts = tuple(Segment(num_tokens=size, num_prompt_tokens=60, is_first=size > 120) for size in (140, 100, 60))
    with torch.profiler.profile() as profiled:
        mask = SegmentMask(parts, states.device)
        scaled_dot_product_attention(states, states, states, attn_mask=mask).sum().backward()
        attend_packed(*(x[0].transpose(0, 1) for x in (states,) * 3), torch.ones(300, 300, device="cuda").tril().bool())
    assert not [event.key for event in profiled.key_averages() if "cudnn" in event.key]
