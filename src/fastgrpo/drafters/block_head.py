"""The weights of a block head: a few decoder layers that see the target's features and draft all levels at once.

Block diffusion as in DFlash (arXiv:2602.06036): a block is the pending token and learned masks, the target's
features enter every layer as keys and values. After it a low-rank correction by the token one before, DSpark's
(arXiv:2607.05147). Where we differ:

- Attention inside the block is causal, so a shorter block computes the first levels of a longer one: one head
  serves every plan, and only as many masks are run as the plan is deep. Little is lost, for a mask knows
  nothing of the text but what it reads in the same context.
- The context of the newest cached token also enters the block's stream, joined with its embeddings as EAGLE-3
  joins them (arXiv:2503.01840): the first layer begins with what the target last thought, instead of having to
  learn to look there. With 100 updates it is worth 3 points of acceptance at every level (dev/LOG.md).
- The pending token's own output predicts the next token, so a block of D positions drafts D tokens.
- The correction reads the target's embedding of the token before, not a table of its own: the draft
  vocabulary may change, and there is no row to learn for each token.
- Output rows are the target's own; there is no confidence head, since shared noise ranks the candidates and
  what a rank is worth is fitted from hits and misses (`Calibration`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastgrpo.drafters.head_parts import (
    DraftHead,
    RMSNorm,
    SwiGLU,
    copy_layer,
    copy_norm,
    rotate,
    same_random_weights,
)
from fastgrpo.model import TargetModel

DEFAULT_BLOCK_SIZE = 8
DEFAULT_NUM_LAYERS = 2
DEFAULT_RANK = 64


class BlockLayer(nn.Module):
    """One decoder layer. Queries come from the block; keys and values from the block and from the context."""

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self.input_layernorm = RMSNorm(hidden, eps)
        self.context_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.mlp = SwiGLU(hidden, inner)

    def read_context(
        self, context: Float[Tensor, "T H"], cos: Float[Tensor, "T d"], sin: Float[Tensor, "T d"]
    ) -> tuple[Float[Tensor, "T kv d"], Float[Tensor, "T kv d"]]:
        """Keys (rotated) and values of cached tokens."""
        return self._keys_of(self.context_layernorm(context), cos, sin)

    def read_block(
        self, hidden: Float[Tensor, "T H"], cos: Float[Tensor, "T d"], sin: Float[Tensor, "T d"]
    ) -> tuple[Float[Tensor, "T h d"], Float[Tensor, "T kv d"], Float[Tensor, "T kv d"]]:
        """Queries, keys (both rotated) and values of the block's positions."""
        x = self.input_layernorm(hidden)
        return rotate(self.q_proj(x).unflatten(-1, (self.num_heads, -1)), cos, sin), *self._keys_of(x, cos, sin)

    def _keys_of(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (proj(x).unflatten(-1, (self.num_kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return rotate(key, cos, sin), value

    def finish(self, hidden: Float[Tensor, "T H"], attended: Float[Tensor, "T hd"]) -> Float[Tensor, "T H"]:
        """The rest of the layer: residual connection, MLP."""
        hidden = hidden + self.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class BlockHead(DraftHead):
    """The head's weights: what is trained and saved.

    Position 0 of a block is the pending token, token n of its sequence; the masks stand for tokens n + 1,
    n + 2, ... The output at position j predicts token n + j + 1. The context is the features of tokens
    0..n - 1.

    Args:
        block_size: positions of a block, the deepest draft.
        num_layers: decoder layers.
        rank: of the correction by the token before.
    """

    layers: Any  # nn.ModuleList of BlockLayer

    def __init__(
        self,
        target: TargetModel,
        *,
        draft_vocab_size: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_layers: int = DEFAULT_NUM_LAYERS,
        rank: int = DEFAULT_RANK,
    ) -> None:
        super().__init__(target)
        assert block_size >= 2, f"a block of {block_size} has no mask"
        config = target.config
        hidden, eps = target.hidden_size, float(config.rms_norm_eps)
        self.block_size = block_size
        shape = int(config.num_attention_heads), target.num_kv_heads, target.head_dim
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.mask_embeddings = nn.Parameter(torch.randn(block_size - 1, hidden))
        self.embedding_norm = RMSNorm(hidden, eps)
        self.embedding_in = nn.Linear(hidden, hidden, bias=False)
        self.layers = nn.ModuleList(
            BlockLayer(hidden, int(config.intermediate_size), *shape, eps) for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden, eps)
        self.previous_in = nn.Linear(hidden, rank, bias=False)
        self.previous_out = nn.Linear(rank, hidden, bias=False)
        nn.init.zeros_(self.previous_out.weight)  # no correction at first
        self.resize_vocabulary(draft_vocab_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def rank(self) -> int:
        return self.previous_in.out_features

    def join(self, embedded: Float[Tensor, "K A H"], last: Float[Tensor, "A H"]) -> Float[Tensor, "K A H"]:
        """What enters the first layer.

        Args:
            embedded: of the pending token and of the masks.
            last: context of the token before the pending one.
        """
        return last + self.embedding_in(self.embedding_norm(embedded))

    def read_out(self, output: Float[Tensor, "*n H"], previous: Float[Tensor, "*n H"]) -> Float[Tensor, "*n H"]:
        """What meets the output rows.

        Args:
            output: of the last layer.
            previous: the target's embedding of the token before the one predicted.
        """
        hidden = self.norm(output) + self.previous_out(self.previous_in(previous))
        return hidden.to(self.lm_head.weight.dtype)


def build_block_head(
    target: TargetModel,
    draft_vocab_size: int,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_layers: int = DEFAULT_NUM_LAYERS,
    rank: int = DEFAULT_RANK,
) -> BlockHead:
    """A random head, always the same one."""
    with same_random_weights(target):
        return BlockHead(
            target, draft_vocab_size=draft_vocab_size, block_size=block_size, num_layers=num_layers, rank=rank
        )


def start_from_target(head: BlockHead, target: TargetModel) -> None:
    """Begin with the target's own last layers and final norm; the context is the high feature.

    The high feature is the stream that enters one of the last layers, so their keys and values of it are
    nearly those that the target itself computes. Masks begin as random tokens of the embedding's size.
    """
    hidden, last = target.hidden_size, list(target.decoder.layers)[-len(head.layers) :]
    with torch.no_grad():
        head.fc.weight.zero_()
        head.fc.weight[:, 2 * hidden :] = torch.eye(hidden)
        head.mask_embeddings.mul_(float(target.embed_tokens.weight.float().std()))
        head.embedding_in.weight.copy_(torch.eye(hidden))
        copy_norm(target.decoder.norm, head.norm.weight)
        for index, layer in enumerate(head.layers):
            source = last[min(index, len(last) - 1)]
            linears = {name: getattr(layer, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            linears |= {name: getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
            norms = {name: getattr(layer, name).weight for name in ("input_layernorm", "post_attention_layernorm")}
            copy_layer(source, linears | norms, target.num_kv_heads * target.head_dim)
            layer.context_layernorm.weight.copy_(layer.input_layernorm.weight)
