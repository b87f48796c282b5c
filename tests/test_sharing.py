"""One prompt for all its completions, and no [tokens, vocabulary] tensor: the gradient stays TRL's."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import add_fused_lm_head

from conftest import build_model
from fastgrpo import FastGRPOTrainer
from fastgrpo.families import base_model_of
from fastgrpo.grpo import head, scoring, segments, sharing
from fastgrpo.grpo.head import add_token_scores, score_tokens
from fastgrpo.grpo.scoring import find_sharing_obstacle, score_completions
from fastgrpo.grpo.segments import Segment, SegmentMask
from fastgrpo.grpo.sharing import pack_rows
from test_scoring import LOSSES, compute_loss
from test_trainer import build_trainer, weights_of

ROWS = [(5, 7), (3, 4), (5, 12), (5, 1), (9, 3), (3, 9), (5, 10), (7, 5)]  # tokens of prompt and completion
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
ADVANTAGES = [0.9, 1.5, -0.4, -0.7, 0.3, 0.2, -1.1, 0.5]


def build_batch(rows: list[tuple[int, int]], *, vocab_size: int = 40) -> dict[str, torch.Tensor]:
    """Rows whose prompts are equal where they are as long, padded outward, some columns padding in all rows."""
    generator = torch.Generator().manual_seed(1)
    prompt_width, width = 2 + max(p for p, _ in rows), 1 + max(c for _, c in rows)
    prompts = {p: torch.randint(2, vocab_size, (p,), generator=generator) for p, _ in rows}
    prompt_ids, completion_ids = (torch.zeros(len(rows), w).long() for w in (prompt_width, width))
    prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
    for row, (num_prompt, num_completion) in enumerate(rows):
        prompt_ids[row, prompt_width - num_prompt :] = prompts[num_prompt]
        prompt_mask[row, prompt_width - num_prompt :] = 1
        completion_ids[row, :num_completion] = torch.randint(2, vocab_size, (num_completion,), generator=generator)
        completion_mask[row, :num_completion] = 1
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return dict(zip(names, (prompt_ids, prompt_mask, completion_ids, completion_mask), strict=True))


def build_inputs(trainer: FastGRPOTrainer, advantages: list[float] = ADVANTAGES) -> dict[str, Any]:
    """A micro-batch as TRL hands it to its loss."""
    batch = build_batch(ROWS)
    generator = torch.Generator().manual_seed(2)
    inputs: dict[str, Any] = batch | {"advantages": torch.tensor(advantages)}
    inputs["num_items_in_batch"] = batch["completion_mask"].sum() * 2
    shape = batch["completion_ids"].shape
    if trainer.num_iterations > 1:  # of weights a little older, so that ratios are clipped
        inputs["old_per_token_logps"] = -3.0 + torch.rand(shape, generator=generator)
    if trainer.beta:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            if trainer.ref_model is None:
                with trainer.model.disable_adapter():
                    reference = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, shape[1], 3)[0]
            else:
                reference = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, shape[1], 3)[0]
        inputs["ref_per_token_logps"] = reference
    return inputs


def build_family_trainer(folder: Path, family: str, *, peft: bool = False, **keys: Any) -> FastGRPOTrainer:
    """A trainer whose model can be loaded again, as TRL does for a reference."""
    build_model(family, torch.float32).save_pretrained(folder / family)
    model = AutoModelForCausalLM.from_pretrained(folder / family)
    trainer = build_trainer(folder, model=model, peft=peft, speculation="off", **keys)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name or not peft:  # away from the start, and from the reference
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return trainer


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[sharing.PackedRows]:
    """What was packed, all of it used: a test of the packed path must not pass by the padded one."""
    seen: list[sharing.PackedRows] = []
    monkeypatch.setattr(scoring, "pays", lambda packed, _: seen.append(packed) or True)
    return seen


@pytest.fixture(params=[False, True], ids=["call by call", "at once"])
def is_padded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether other completions of a prompt are one padded call, as on a GPU."""
    monkeypatch.setattr(segments, "may_pad", lambda *_: request.param)
    return bool(request.param)


def assert_same_gradient(trainer: FastGRPOTrainer, inputs: dict[str, Any]) -> None:
    """As TRL's to 1e-5 of its length, whole and by parameter; the log too."""
    expected, expected_log = compute_loss(trainer, inputs, is_stock=True)
    gradients, logged = compute_loss(trainer, inputs, is_stock=False)
    length = sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    assert length > 0
    for name, gradient in gradients.items():
        error = float((gradient - expected[name]).norm())
        assert error <= 1e-5 * max(float(expected[name].norm()), 0.1 * length), name
    for key, value in expected_log.items():
        assert logged[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize(
    ("family", "peft", "loss_type", "keys"),
    [  # each loss, and each pair of the other settings, at least once
        ("llama", False, "dapo", {}),
        ("llama", True, "grpo", {"beta": 0.04, "num_iterations": 2}),
        ("llama", True, "luspo", {"importance_sampling_level": "sequence", "gradient_checkpointing": True}),
        ("llama", False, "bnpo", {"beta": 0.04, "gradient_checkpointing": True, "entropy_coef": 0.01}),
        ("qwen2", False, "dr_grpo", {"num_iterations": 2, "gradient_checkpointing": True}),
        ("qwen2", True, "cispo", {"beta": 0.04}),
        ("qwen2", False, "sapo", {"beta": 0.04, "num_iterations": 2, "temperature": 0.7}),
        ("qwen3", True, "vespo", {"num_iterations": 2}),
        ("qwen3", False, "dapo", {"beta": 0.04, "top_entropy_quantile": 0.5}),
        ("qwen3", True, "grpo", REENTRANT),
        ("gemma", True, "bnpo", {"beta": 0.04}),
        ("olmo2", True, "dapo", {}),
        ("phi3", False, "grpo", {"gradient_checkpointing": True}),
        ("smollm3", True, "dr_grpo", {"beta": 0.04}),
    ],
)
def test_the_gradient_is_trls(
    tmp_path: Path,
    family: str,
    peft: bool,
    loss_type: str,
    keys: dict,
    packings: list[sharing.PackedRows],
    is_padded: bool,
) -> None:
    settings = {"gradient_checkpointing": False} | keys
    trainer = build_family_trainer(tmp_path, family, peft=peft, loss_type=loss_type, **settings)
    if settings["gradient_checkpointing"]:  # as `train` does
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    layers = base_model_of(trainer.model).model.layers
    assert all(layer.gradient_checkpointing == settings["gradient_checkpointing"] for layer in layers)
    assert_same_gradient(trainer, build_inputs(trainer))
    assert packings[-1].input_ids.shape[1] == 5 + 3 + 9 + 7 + sum(c - 1 for _, c in ROWS)
    assert any(group.padding for group in packings[-1].mask.groups) == is_padded


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_gradient_is_trls_whatever_is_combined(
    tmp_path: Path, family: str, loss_type: str, packings: list[sharing.PackedRows]
) -> None:
    """LoRA or all weights, checkpointing, a reference, a second iteration: all of them with every loss and family."""
    for case, (peft, checkpointing, beta, num_iterations) in enumerate(
        itertools.product((False, True), (False, True), (0.0, 0.04), (1, 2))
    ):
        keys = {"gradient_checkpointing": checkpointing, "beta": beta, "num_iterations": num_iterations}
        trainer = build_family_trainer(tmp_path / str(case), family, peft=peft, loss_type=loss_type, **keys)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        assert_same_gradient(trainer, build_inputs(trainer))
    assert len(packings) >= 16


def test_every_loss_is_covered() -> None:
    cases = test_the_gradient_is_trls.pytestmark[0].args[1]
    assert {case[2] for case in cases} == set(LOSSES)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # norms of queries and keys leave autocast in float32
@pytest.mark.parametrize("keys", [{}, {"cast_lm_head_to_fp32": True}])
@pytest.mark.usefixtures("is_padded")
def test_under_autocast_the_gradient_is_as_near_as_trls(
    tmp_path: Path, family: str, keys: dict, packings: list[sharing.PackedRows]
) -> None:
    exact, rounded = (build_family_trainer(tmp_path / str(on), family, bf16=on, **keys) for on in (False, True))
    expected, _ = compute_loss(exact, build_inputs(exact), is_stock=True)
    errors = []
    for is_stock in (False, True):
        gradients, _ = compute_loss(rounded, build_inputs(rounded), is_stock=is_stock)
        errors.append(sum(float((gradients[name] - g).norm()) ** 2 for name, g in expected.items()) ** 0.5)
    assert 0 < errors[0] <= 1.3 * errors[1]
    assert packings


@pytest.mark.parametrize(("keys", "backend"), [({"share_prompts": False}, "sdpa"), ({}, "eager")])
def test_where_it_is_off_nothing_is_packed_and_the_gradient_is_trls(
    tmp_path: Path, keys: dict, backend: str, packings: list[sharing.PackedRows]
) -> None:
    model = build_model("llama", torch.float32)
    model.set_attn_implementation(backend)
    trainer = build_trainer(tmp_path, model=model, speculation="off", **keys)
    assert_same_gradient(trainer, build_inputs(trainer))
    assert not packings


def truncated(inputs: dict[str, Any]) -> None:
    inputs["completion_mask"][[0, 4, 5]] = 0  # as mask_truncated_completions does: a sibling, one alone, a sibling


def tools(inputs: dict[str, Any]) -> None:
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1:4] = 0
    inputs["tool_mask"][3] = 0


def nothing_to_learn(inputs: dict[str, Any]) -> None:
    inputs["advantages"][[0, 2, 4, 7]] = 0.0


def off_policy(inputs: dict[str, Any]) -> None:
    inputs["old_per_token_logps"] = torch.full(inputs["completion_ids"].shape, -3.3)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (truncated, {}),
        (tools, {"loss_type": "grpo"}),
        (nothing_to_learn, {}),
        (off_policy, {"off_policy_mask_threshold": 0.1, "importance_sampling_level": "sequence"}),
        (off_policy, {"delta": 1.5, "loss_type": "grpo"}),
    ],
)
def test_masks_and_importance_sampling_keep_their_meaning(
    tmp_path: Path, change: Any, keys: dict, packings: list[sharing.PackedRows]
) -> None:
    trainer = build_family_trainer(tmp_path, "llama", **keys)
    inputs = build_inputs(trainer)
    change(inputs)
    assert_same_gradient(trainer, inputs)
    assert packings


def test_a_batch_without_any_completion_is_computed(tmp_path: Path) -> None:
    trainer = build_family_trainer(tmp_path, "llama")
    inputs = build_inputs(trainer)
    inputs["completion_mask"][:] = 0
    gradients, _ = compute_loss(trainer, inputs, is_stock=False)
    assert all(not g.any() for g in gradients.values())


def test_whole_training_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings over micro-batches, old and reference log-probs by passes of their own, every key of the log."""
    ends, logs = [], []
    for is_stock in (True, False):
        keys = {"beta": 0.04, "num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        with monkeypatch.context() as patch:
            if is_stock:
                for name in ("_prepare_inputs", "_get_per_token_logps_and_entropies"):
                    patch.setattr(FastGRPOTrainer, name, getattr(GRPOTrainer, name))
            trainer = build_family_trainer(tmp_path / str(is_stock), "llama", max_steps=2, learning_rate=1e-3, **keys)
            trainer.train()
        ends.append(weights_of(trainer))
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for stock_row, row in zip(*logs, strict=True):
        for key in stock_row.keys() & {"loss", "grad_norm", "kl", "entropy", "reward", "num_tokens"} | {
            key for key in stock_row if "clip_ratio" in key
        }:
            assert row[key] == pytest.approx(stock_row[key], rel=1e-3, abs=1e-5), key


# -- packing and its attention -------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=7), st.integers(0, 3))
def test_a_prompt_is_packed_once_and_predicts_every_first_token(rows: list[tuple[int, int]], padding: int) -> None:
    rows = [*rows, (2, 3)]
    batch = build_batch(rows)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    used = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
    packed = pack_rows(ids, used, batch["completion_ids"].shape[1])
    kept = [row for row, (_, c) in enumerate(rows) if c]
    num_tokens = sum({rows[row][0] for row in kept}) + sum(rows[row][1] - 1 for row in kept)
    assert packed.input_ids.shape[1] == num_tokens == sum(s.num_tokens for s in packed.mask.segments)
    before = [used[row].nonzero()[-1 - rows[row][1] : -1, 0] for row in kept]
    expected = torch.cat([ids[row, columns] for row, columns in zip(kept, before, strict=True)])
    assert torch.equal(packed.input_ids[0, packed.predicted_at], expected)
    positions = torch.cat([used[row].cumsum(0)[columns] - 1 for row, columns in zip(kept, before, strict=True)])
    assert torch.equal(packed.position_ids[0, packed.predicted_at], positions)


def build_dense_mask(segments: tuple[Segment, ...]) -> torch.Tensor:
    """Token by token: the law that the segments stand for."""
    owner = [index for index, s in enumerate(segments) for _ in range(s.num_tokens)]
    starts = [sum(s.num_tokens for s in segments[:index]) for index in range(len(segments))]
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for query, own in enumerate(owner):
        first = max(index for index in range(own + 1) if segments[index].is_first)
        mask[query, starts[own] : query + 1] = True
        if own != first:
            mask[query, starts[first] : starts[first] + segments[own].num_prompt_tokens] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("is_padded")
def test_attention_by_segments_is_attention_under_the_dense_mask(dtype: torch.dtype) -> None:
    groups = [(4, 6, [3, 1, 5]), (2, 2, [2]), (7, 9, []), (1, 2, [1, 1])]
    parts = tuple(
        segment
        for prompt, first, others in groups
        for segment in (
            Segment(num_tokens=first, num_prompt_tokens=prompt, is_first=True),
            *(Segment(num_tokens=n, num_prompt_tokens=prompt, is_first=False) for n in others),
        )
    )
    dense = build_dense_mask(parts)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 3, len(dense), 8, dtype=dtype, generator=generator) for _ in range(4)]
    results = []
    for mask in (dense[None, None], SegmentMask(parts, torch.device("cpu"))):
        inputs = [x.clone().requires_grad_() for x in states[:3]]
        output = scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.5)
        results.append([output, *torch.autograd.grad(output, inputs, states[3])])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("lengths", "is_one_call"),
    [([50] * 7, True), ([2000, 1, 1], False), ([2000, 30, 60], False), ([1500, 1, 1000], True), ([3000, 3000], True)],
)
def test_a_device_pads_where_that_wastes_little(lengths: list[int], is_one_call: bool) -> None:
    """A few thousand tokens are done before their calls are launched."""
    assert segments.may_pad(lengths, torch.device("meta")) == is_one_call
    assert not segments.may_pad(lengths, torch.device("cpu"))


def test_a_backend_that_reads_the_mask_is_told_so() -> None:
    mask = SegmentMask((Segment(num_tokens=3, num_prompt_tokens=2, is_first=True),), torch.device("cpu"))
    assert mask.shape == (1, 1, 3, 3) and mask.ndim == 4
    with pytest.raises(ValueError, match="share_prompts=False"):
        torch.zeros(1, 1, 3, 3) + mask


@pytest.mark.parametrize("fault", ["reads", "ignores"])
def test_a_model_that_does_not_take_the_mask_trains_without_sharing(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its kind is one that does; the run goes on, with one line in the log."""
    model = build_model("llama", torch.float32)
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def attend(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            mask = kwargs["attention_mask"]
            if fault == "reads":
                kwargs["attention_mask"] = None if mask is None else mask * 1.0
            elif isinstance(mask, SegmentMask):
                kwargs["attention_mask"] = None
            return forward(*args, **kwargs)

        layer.self_attn.forward = attend
    with caplog.at_level(logging.WARNING):
        trainer = build_trainer(tmp_path, model=model, speculation="off", max_steps=1)
    expected = "does not take the mask" if fault == "reads" else "does not keep to the mask"
    assert [expected in record.getMessage() for record in caplog.records if "share_prompts" in record.getMessage()] == [
        True
    ]
    assert not trainer.savings.shares_prompts
    trainer.train()


def test_one_token_alone_is_computed_in_a_batch() -> None:
    """transformers folds the heads of a single query into its length, which segments know nothing of."""
    model = build_model("llama", torch.float32)
    add_token_scores(model, temperature=1.0)
    batch = build_batch([(1, 1), (1, 1), (2, 0)])
    ids, mask = (torch.cat((batch[f"prompt_{kind}"], batch[f"completion_{kind}"]), 1) for kind in ("ids", "mask"))
    shared, plain = (score_completions(model, ids, mask, 2, shares_prompts=shares)[0] for shares in (True, False))
    assert (shared[:2, 0] < 0).all()
    assert torch.equal(shared, plain)


def test_rows_that_gain_nothing_stay_a_batch() -> None:
    for rows, is_packed in (([(5, 4)] * 4, True), ([(5, 4), (6, 3)], False), ([(5, 9), (6, 1), (7, 1)], True)):
        batch = build_batch(rows)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        used = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
        packed = pack_rows(ids, used, batch["completion_ids"].shape[1])
        num_padded = len(rows) * int(used.any(0).sum())
        assert sharing.pays(packed, num_padded) == is_packed, rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"_attn_implementation": "eager"}, "eager"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"model_type": "mistral", "sliding_window": 40}, "the last 40 tokens"),
        ({"attention_dropout": 0.1}, "dropout"),
    ],
)
def test_what_stands_in_the_way_is_named_in_one_line(
    tmp_path: Path, change: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(tmp_path, speculation="off")
    assert find_sharing_obstacle(trainer) is None
    for key, value in change.items():
        object.__setattr__(trainer.model.config, key, value)
    with caplog.at_level(logging.WARNING):
        assert not scoring.can_share_prompts(trainer)
    assert [reason in record.getMessage() for record in caplog.records] == [True]


# -- the head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_entropy_gradient", [False, True])
def test_token_scores_are_trls(has_entropy_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_TILE_ELEMENTS", 50 * 20)  # three tiles
    generator = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(50, 8, generator=generator), torch.randint(0, 50, (50,), generator=generator)
    linear = nn.Linear(8, 50, bias=False)
    weights = torch.randn(2, 50, generator=generator)
    results = []
    for is_ours in (True, False):
        own = hidden.clone().requires_grad_()
        if is_ours:
            logprobs, entropies = score_tokens(own, linear, labels, 0.7)
        else:
            outputs = ("log_probs", "entropy")
            logprobs, entropies, *_ = ChunkedLogProbFunction.apply(
                own, linear.weight, None, labels, 0.7, 64, None, 1.0, outputs
            )
        total = (logprobs * weights[0]).sum() + has_entropy_gradient * (entropies * weights[1]).sum()
        results.append([logprobs, entropies, *torch.autograd.grad(total, [own, linear.weight])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result


def build_wide_model() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 2}
    return build_model("llama", torch.float32, vocab_size=49152, max_position_embeddings=512, **sizes)


def test_no_tensor_has_tokens_by_vocabulary() -> None:
    model = build_wide_model()
    batch = build_batch([(16, 256)] * 4, vocab_size=49152)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_token_scores(model, temperature=1.0)
    with LargestTensor() as ours:
        logprobs, entropies = score_completions(model, ids, mask, 257, shares_prompts=True)
        (logprobs.sum() + entropies.sum()).backward()
    with LargestTensor() as stock:
        model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    assert ours.num_elements <= 2**23 < 4 * 256 * 49152 / 4
    assert stock.num_elements >= 4 * 256 * 32768  # the measure sees such tensors


# -- for tests of several processes --------------------------------------------------------------------------


def compute_gradient(model: Any, rows: slice, num_rows: int) -> None:
    """Of the mean over all rows, by the rows of one process."""
    batch = build_batch(ROWS)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[rows]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[rows]
    weights = torch.tensor(ADVANTAGES)[rows, None]
    logprobs, _ = score_completions(model, ids, mask, batch["completion_ids"].shape[1], shares_prompts=True)
    ((weights * logprobs).sum() / num_rows).backward()


def build_scoring_model() -> PreTrainedModel:
    model = build_model("llama", torch.float32)
    add_token_scores(model, temperature=1.0)
    return model.train()
