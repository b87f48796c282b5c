"""bfloat16 products computed in float32: what PyTorch's own say, to a bfloat16's last bit, forward and backward."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from conftest import build_model
from fastgrpo.kernels import half
from fastgrpo.kernels.half import float32_products

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    """As on a processor that does not multiply bfloat16, whatever this one does."""
    monkeypatch.setattr(half, "multiplies_bfloat16", lambda: False)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def counts(monkeypatch):
    """How often each product was computed in float32."""
    counts = {"linear": 0, "attention": 0, "matmul": 0}
    for name, function in (("linear", "_apply_linear"), ("attention", "_attend"), ("matmul", "_multiply")):
        given = getattr(half, function)

        def counted(*args, name=name, given=given, **kwargs):
            counts[name] += 1
            return given(*args, **kwargs)

        monkeypatch.setattr(half, function, counted)
    monkeypatch.setattr(half, "_REPLACEMENTS", half._build_replacements())
    return counts


PRODUCTS = {
    "linear": lambda x, w: F.linear(x, w, w[:, 0]),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "mm": lambda x, w: torch.mm(x[0], w.T),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_gradients_are_rounded_float32(name, autocast, counts):
    compute = PRODUCTS[name]
    leaves = [(_draw(2, 7, 40) * 0.3).to(BF16), (_draw(24, 40, seed=1) * 0.3).to(BF16)]

    def run(dtype, context):
        own = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        with context, torch.autocast("cpu", BF16, enabled=autocast and dtype == torch.float32):
            output = compute(*own)
            output.float().pow(2).sum().backward()
        return output, own

    ours, own = run(torch.float32 if autocast else BF16, float32_products())
    assert counts.pop({"mm": "matmul"}.get(name, name)) == 1 and not any(counts.values())
    exact, leaves_of_exact = run(torch.float64, contextlib.nullcontext())
    assert ours.dtype == BF16
    assert torch.allclose(ours.double(), exact, rtol=2**-8, atol=1e-5), "one rounding"
    for a, b in zip(own, leaves_of_exact, strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad.double(), b.grad, rtol=0.03, atol=0.02 * float(b.grad.abs().max()))


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradient_of_a_model_is_as_near_to_float32_as_pytorchs(family, kwargs, counts):
    """With checkpointed layers too, whose recomputation must take the same way."""
    exact_model, model = build_model(family, torch.float32), build_model(family, BF16)
    model.load_state_dict(exact_model.state_dict())
    exact_model.load_state_dict(model.state_dict())
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()

    def find_gradient(model, context):
        model.train()
        model.zero_grad()
        with context:
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    exact = find_gradient(exact_model, contextlib.nullcontext())
    theirs = find_gradient(model, contextlib.nullcontext())
    ours = find_gradient(model, float32_products())
    num_passes = 1 if kwargs is None else 2
    assert counts["linear"] == num_passes * 7 * len(model.model.layers) + 1
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_other_types_are_left_alone(counts):
    with float32_products():
        for dtype in (torch.float32, torch.float64):
            x, w = _draw(3, 8).to(dtype), _draw(5, 8).to(dtype)
            assert torch.equal(F.linear(x, w), x @ w.T) and F.linear(x, w).dtype == dtype
        with torch.autocast("cpu", torch.float16):
            F.linear(_draw(3, 8), _draw(5, 8))
    assert not any(counts.values())


def test_nothing_changes_where_the_processor_multiplies_bfloat16_or_afterwards(counts, monkeypatch):
    x, w, before = _draw(3, 8).to(BF16), _draw(5, 8).to(BF16), (F.linear, torch.mm)
    with float32_products(enabled=False):
        F.linear(x, w)
    with pytest.raises(KeyError), float32_products(), float32_products():
        raise KeyError
    F.linear(x, w)
    assert (F.linear, torch.mm) == before
    monkeypatch.setattr(half, "multiplies_bfloat16", lambda: True)
    with float32_products():
        F.linear(x, w)
    assert not any(counts.values())


def test_other_threads_compute_as_ever(counts):
    """Which decode while drafts are learnt; the first to leave takes nothing from who is still inside."""
    x, w, before = _draw(3, 8).to(BF16), _draw(5, 8).to(BF16), F.linear
    came, may_leave = threading.Event(), threading.Event()

    def stay():
        with float32_products():
            came.set()
            may_leave.wait()
            F.linear(x, w)

    with ThreadPoolExecutor(1) as pool:
        with float32_products():
            staying = pool.submit(stay)
            came.wait()
        F.linear(x, w)
        assert counts["linear"] == 0, "the other thread alone is inside"
        may_leave.set()
        staying.result()
    assert counts["linear"] == 1 and F.linear is before


def test_a_product_is_written_where_it_is_wanted(counts):
    x, w, out = _draw(3, 8).to(BF16), _draw(5, 8).to(BF16), torch.zeros(4, 5, dtype=BF16)
    with float32_products():
        torch.mm(x, w.T, out=out[:3])
    assert torch.equal(out[:3], (x.float() @ w.float().T).to(BF16)) and not out[3].any() and counts["matmul"] == 1


def test_attention_under_a_mask_of_another_type_is_asked_in_float32(counts):
    q = _draw(1, 2, 5, 8).to(BF16)
    with float32_products():
        ours = F.scaled_dot_product_attention(q, q, q, attn_mask=causal_lower_right(5, 5))
    exact = F.scaled_dot_product_attention(q.float(), q.float(), q.float(), is_causal=True)
    assert torch.allclose(ours.float(), exact, rtol=2**-8) and counts["attention"] == 1
