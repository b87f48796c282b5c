"""Tools: TRL calls them and asks us again, with longer prompts and fewer of them."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastgrpo import FastGRPOConfig, FastGRPOTrainer
from fastgrpo.types import Completion, SamplingParams

MARKERS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>"]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 20, "b": 3}}\n</tool_call><|im_end|>'


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, and the markers of Qwen's chat template."""
    vocab = {text: index for index, text in enumerate([*MARKERS, "<unk>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=MARKERS[0], pad_token=MARKERS[2], unk_token="<unk>"
    )
    fast.add_tokens(MARKERS[3:])
    fast.add_special_tokens({"additional_special_tokens": [MARKERS[1]]})
    fast.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return fast


def build_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("is_async", [False, True])
def test_tools_are_called_and_their_results_answered(tmp_path: Path, is_async: bool) -> None:
    calls: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first number.
            b: the second number.

        Returns:
            Their sum.
        """
        calls.append((a, b))
        return a + b

    async def add_later(a: int, b: int) -> int:
        return add(a, b)

    add_later.__name__, add_later.__doc__ = "add", add.__doc__
    tokenizer = build_tokenizer()
    seen: list[list[dict]] = []

    def reward(completions: list[list[dict]], **_: object) -> list[float]:
        seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    trainer = FastGRPOTrainer(
        build_model(len(tokenizer)),
        reward,
        FastGRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=192, max_steps=1,
            report_to="none", bf16=False, use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
            speculation="fixed",
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "20+3"}]] * 4}),
        processing_class=tokenizer,
        tools=[add_later if is_async else add],
    )  # fmt: skip
    generate, rounds = trainer.engine.generate, []

    def call_a_tool_at_first(prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        """What the policy draws, but for two answers of the first round, which call the tool."""
        completions = generate(prompts, params)
        rounds.append([tokenizer.decode(ids) for ids in prompts])
        if len(rounds) == 1:
            ids = tokenizer(CALL)["input_ids"]
            none = [0.0] * len(ids)
            called = Completion(token_ids=ids, logprobs=none, entropies=none, finish_reason="stop")
            completions = [called if index in (1, 2) else each for index, each in enumerate(completions)]
        return [dataclasses.replace(each) for each in completions]

    trainer.engine.generate = call_a_tool_at_first
    trainer.train()
    assert calls == [(20, 3), (20, 3)]
    assert [len(prompts) for prompts in rounds] == [4, 2], "only those that called are asked again"
    assert all("add" in text for text in rounds[0]), "the prompt offers the tool"
    assert all(text.startswith(rounds[0][0]) and "23" in text[len(rounds[0][0]) :] for text in rounds[1])
    assert [[message["role"] for message in completion] for completion in seen] == [
        ["assistant"], ["assistant", "tool", "assistant"], ["assistant", "tool", "assistant"], ["assistant"],
    ]  # fmt: skip
    row = next(row for row in trainer.state.log_history if "reward" in row)
    assert row["tools/call_frequency"] == pytest.approx(0.5)
    assert row["tools/failure_frequency"] == 0
