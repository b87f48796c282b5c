"""A large model without a download: a small model put exactly into the body of a larger one.

`python bench/grow.py FOLDER --body 8b` writes a Llama model that says what the demo model says, at the compute and
memory of an 8B model, with its tokenizer, and the shipped draft head grown with it (`FOLDER/head`). Then
`fastgrpo ... --model FOLDER --drafter FOLDER/head` measures real text and real acceptance in a large body.

The residual stream keeps its numbers in its first dimensions and zeros in the others. Norms divide by the root of a
mean over more dimensions, so their weights and their epsilon are scaled. Rotated pairs go where the longer head has
the same frequency, and queries make up for its smaller scale. Heads and inner columns that the small model does not
have are random and meet zeros in `o_proj` and `down_proj`; layers it does not have are random and add nothing.
Everything that may be random is, since zeros are moved and multiplied faster.

The text is the small model's: a number measured here tells of the speed of a large body, not of a large model's text
or acceptance. Results name it (`grown_from`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastgrpo.drafters.acceptance_file import read_acceptance, write_acceptance
from fastgrpo.drafters.eagle_files import find_shipped_head, load_head, save_head
from fastgrpo.drafters.eagle_head import EagleHead
from fastgrpo.loading import load_model, load_tokenizer, resolve_device, resolve_model
from fastgrpo.model import TargetModel

_SPREAD = 0.02  # standard deviation of random weights, as models begin with


@dataclass(frozen=True, kw_only=True)
class Body:
    """The sizes of a Llama model but its vocabulary."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


BODIES = {
    "1.5b": Body(num_layers=32, hidden_size=2048, num_heads=16, num_kv_heads=4, head_dim=128, intermediate_size=5632),
    "8b": Body(  # Llama-3.1-8B's
        num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336
    ),
}


class Plan:
    """Where the numbers of a small Llama model stand in a larger body.

    Raises:
        ValueError: the model is no Llama with plain RoPE, or the body has less of something than the model, or sizes
            that no Llama has; names it.
    """

    def __init__(self, config: Any, body: Body) -> None:
        self.config, self.body = config, body
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        repeats, wide_repeats = heads // kv_heads, body.num_heads // max(body.num_kv_heads, 1)
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        biases = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
        if config.model_type != "llama" or rope != "default" or biases:
            raise ValueError(
                f"only a Llama model with plain RoPE and no biases can be grown, got model_type={config.model_type!r}, "
                f"rope_type={rope!r}, biases {biases}"
            )
        for name, small, large in (
            ("num_layers", config.num_hidden_layers, body.num_layers),
            ("hidden_size", config.hidden_size, body.hidden_size),
            ("num_kv_heads", kv_heads, body.num_kv_heads),
            ("heads for each key head", repeats, wide_repeats),
            ("intermediate_size", config.intermediate_size, body.intermediate_size),
        ):
            if small > large:
                raise ValueError(f"the body has {name}={large}, the model has {small}; take a larger body")
        for name, divisor in (("num_heads", "num_kv_heads"), ("hidden_size", "num_heads")):
            number, by = getattr(body, name), getattr(body, divisor)
            if number % by:
                raise ValueError(f"the body's {name}={number} must be a multiple of its {divisor}={by}")
        if body.head_dim < 1 or body.head_dim % self.head_dim:
            raise ValueError(f"the body's head_dim={body.head_dim} must be a multiple of the model's {self.head_dim}")
        self.query_heads = [h // repeats * wide_repeats + h % repeats for h in range(heads)]
        self.query_rows = self._find_rows(self.query_heads)
        self.key_rows = self._find_rows(range(kv_heads))
        self.query_scale = (body.head_dim / self.head_dim) ** 0.5
        self.norm_scale = (config.hidden_size / body.hidden_size) ** 0.5
        self.eps = float(config.rms_norm_eps) * config.hidden_size / body.hidden_size
        self.layers = self._spread_layers()

    def _find_rows(self, heads: Any) -> Tensor:
        """Rows of the heads' dimensions: pair j (dimensions j and j + half) turns as fast as pair j * stride there."""
        half, stride = self.head_dim // 2, self.body.head_dim // self.head_dim
        pairs = torch.arange(half) * stride
        within = torch.cat((pairs, pairs + self.body.head_dim // 2))
        return torch.cat([head * self.body.head_dim + within for head in heads])

    def _spread_layers(self) -> list[int | None]:
        """For each layer of the body the small model's, or None: so that the features' layers are the same ones."""
        few, many = self.config.num_hidden_layers, self.body.num_layers
        layers: list[int | None] = list(range(few))
        kept = ((many // 2, few // 2), (many - 3, few - 3)) if few > 4 else ()  # see TargetModel.feature_layers
        for wanted, has in kept:
            at = layers.index(has)
            layers[at:at] = [None] * (wanted - at)
        return layers + [None] * (many - len(layers))

    def norm(self, new: nn.Module, old: nn.Module) -> None:
        new.weight.normal_(1.0, _SPREAD)
        new.weight[: len(old.weight)] = (old.weight * self.norm_scale).to(new.weight)

    def attention(self, new: nn.Module, old: nn.Module | None, inputs: Tensor) -> None:
        """`inputs`: columns that the small layer's inputs take."""
        for linear in (new.q_proj, new.k_proj, new.v_proj):
            linear.weight.normal_(0.0, _SPREAD)
        new.o_proj.weight.zero_()
        if old is None:
            return
        used = torch.zeros(self.body.num_heads, dtype=torch.bool)
        used[self.query_heads] = True
        new.q_proj.weight[used.repeat_interleave(self.body.head_dim)] = 0  # what keys hold besides meets nothing
        _place(new.q_proj, self.query_rows, inputs, old.q_proj.weight * self.query_scale)
        _place(new.k_proj, self.key_rows, inputs, old.k_proj.weight)
        _place(new.v_proj, self.key_rows, inputs, old.v_proj.weight)
        _place(new.o_proj, torch.arange(old.o_proj.out_features), self.query_rows, old.o_proj.weight)

    def mlp(self, new: nn.Module, old: nn.Module | None) -> None:
        for linear in (new.gate_proj, new.up_proj):
            linear.weight.normal_(0.0, _SPREAD)
        new.down_proj.weight.zero_()
        if old is not None:
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(old, name).weight
                _place(getattr(new, name), torch.arange(weight.shape[0]), torch.arange(weight.shape[1]), weight)


@torch.no_grad()
def grow_model(
    model: LlamaForCausalLM, body: Body, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> LlamaForCausalLM:
    """The same logits from a larger body, up to rounding.

    Raises:
        ValueError: see `Plan`.
    """
    small, plan = model.config, Plan(model.config, body)
    config = LlamaConfig.from_dict(
        small.to_diff_dict()
        | {
            "num_hidden_layers": body.num_layers,
            "hidden_size": body.hidden_size,
            "num_attention_heads": body.num_heads,
            "num_key_value_heads": body.num_kv_heads,
            "head_dim": body.head_dim,
            "intermediate_size": body.intermediate_size,
            "rms_norm_eps": plan.eps,
            "tie_word_embeddings": False,  # output rows may be random where embeddings must be zero
            "dtype": dtype,
        }
    )
    with torch.device("meta"):
        large = LlamaForCausalLM(config).to(dtype)
    large.to_empty(device=device)
    with torch.device(device):
        large.model.rotary_emb = type(large.model.rotary_emb)(config)
    with torch.random.fork_rng(devices=[large.device] if large.device.type == "cuda" else []):
        torch.manual_seed(seed)
        hidden = torch.arange(small.hidden_size)
        large.model.embed_tokens.weight.zero_()[:, hidden] = model.model.embed_tokens.weight.to(large.lm_head.weight)
        large.lm_head.weight.normal_(0.0, _SPREAD)[:, hidden] = model.lm_head.weight.to(large.lm_head.weight)
        plan.norm(large.model.norm, model.model.norm)
        for new, which in zip(large.model.layers, plan.layers, strict=True):
            old = None if which is None else model.model.layers[which]
            for name in ("input_layernorm", "post_attention_layernorm"):
                plan.norm(getattr(new, name), getattr(old or model.model.layers[0], name))
            plan.attention(new.self_attn, old and old.self_attn, hidden)
            plan.mlp(new.mlp, old and old.mlp)
    large.generation_config = model.generation_config
    name = Path(str(getattr(small, "_name_or_path", ""))).name or "a small model"
    large.config.grown_from = f"{name}, {small.num_hidden_layers} layers of {small.hidden_size}"
    return large.eval()


@torch.no_grad()
def grow_head(head: EagleHead, small: TargetModel, large: TargetModel, body: Body, *, seed: int = 0) -> EagleHead:
    """The same draft logits from a head as wide as the grown target.

    Raises:
        ValueError: the grown target's features are of other layers than the small one's, as of four layers or fewer.
    """
    plan, width, wide = Plan(small.config, body), small.hidden_size, large.hidden_size
    read = tuple(sum(layer is not None for layer in plan.layers[:at]) for at in large.feature_layers)
    if read != small.feature_layers:
        raise ValueError(
            f"the head of a model of {small.num_layers} layers reads the inputs of layers {small.feature_layers}; in a "
            f"body of {large.num_layers} it would read those of {read}: grow a model of more than 4 layers, or no "
            "head"
        )
    with torch.random.fork_rng(devices=[large.device] if large.device.type == "cuda" else []), large.device:
        torch.manual_seed(seed)
        grown = EagleHead(
            large, draft_vocab_size=head.draft_vocab_size, norm_before_residual=head.norm_before_residual
        ).to(large.dtype)
        grown.fc.weight.zero_()
        grown.fc.weight[:width].normal_(0.0, _SPREAD)
        features = torch.cat([part * wide + torch.arange(width) for part in range(3)])
        _place(grown.fc, torch.arange(width), features, head.fc.weight)
        new, old = grown.midlayer, head.midlayer
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            plan.norm(getattr(new, name), getattr(old, name))
        plan.norm(grown.norm, head.norm)
        plan.attention(new.self_attn, old.self_attn, torch.cat((torch.arange(width), wide + torch.arange(width))))
        plan.mlp(new.mlp, old.mlp)
    grown.draft_vocab.copy_(head.draft_vocab)
    grown.vocab_counts = head.vocab_counts
    grown.take_output_rows(large)
    return grown


def _place(linear: nn.Linear, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    weight = linear.weight
    rows, columns = rows.to(weight.device), columns.to(weight.device)
    weight[rows[:, None], columns] = values.to(weight)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put a small Llama model exactly into the body of a larger one.")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--body", choices=BODIES, default="8b")
    parser.add_argument("--model", default="demo", help="folder or hub id of the small model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto", help="where it is built: auto, cpu or cuda")
    options = parser.parse_args(argv)
    path, body = resolve_model(options.model), BODIES[options.body]
    small = load_model(path, dtype="float32", device=resolve_device(options.device))
    large = grow_model(small, body, dtype=getattr(torch, options.dtype), device=small.device)
    large.config.grown_from += f", in the body of a {options.body} model"
    large.save_pretrained(options.output)
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(options.output)
    targets = [TargetModel(model, tokenizer=tokenizer) for model in (small, large)]
    shipped = find_shipped_head(targets[0])
    if shipped is not None:
        head = load_head(shipped, targets[0]).to(small.device)
        save_head(grow_head(head, *targets, body), options.output / "head", targets[1], dtype=targets[1].dtype)
        if (known := read_acceptance(shipped)) is not None:  # the same drafts of the same text
            write_acceptance(options.output / "head", known)
    size = sum(parameter.numel() for parameter in large.parameters()) / 1e9
    print(f"{options.output}: {size:.2f} billion weights; {large.config.grown_from}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
