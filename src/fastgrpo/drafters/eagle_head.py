"""The weights of an EAGLE-3 head (arXiv:2503.01840): one decoder layer over target features.

Tensor names and shapes are those of published EAGLE-3 checkpoints.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastgrpo.drafters.head_parts import RMSNorm, SwiGLU, rotate
from fastgrpo.model import TargetModel


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)


class _MidLayer(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.self_attn = _Attention(hidden, heads, kv_heads, head_dim)
        self.mlp = SwiGLU(hidden, inner)


class EagleHead(nn.Module):
    """The head's weights: what is trained, saved and exchanged.

    The output head holds rows of the target's own and is not trained here; `draft_vocab` lists the
    target ids of its rows in increasing order.

    Args:
        norm_before_residual: the residual is the normed hidden state, as heads in the speculators format may have it.
    """

    draft_vocab: Tensor  # int32 target ids, increasing
    vocab_rank: Tensor | None = None  # place of each by frequency, 0 the most frequent, where the file says it

    def __init__(
        self,
        target: TargetModel,
        *,
        draft_vocab_size: int,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        config = target.config
        hidden, eps = target.hidden_size, float(config.rms_norm_eps)
        self.hidden_size, self.head_dim = hidden, target.head_dim
        self.num_heads, self.num_kv_heads = int(config.num_attention_heads), target.num_kv_heads
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = _MidLayer(
            hidden, int(config.intermediate_size), self.num_heads, self.num_kv_heads, self.head_dim, eps
        )
        self.norm = RMSNorm(hidden, eps)
        self.target_vocab_size = target.vocab_size
        self.resize_vocabulary(draft_vocab_size)

    def resize_vocabulary(self, size: int) -> None:
        """Output rows for the first `size` tokens, or for all; the drafter fills them from the target."""
        size = min(size, self.target_vocab_size)
        self.lm_head = nn.Linear(self.hidden_size, size, bias=False).requires_grad_(False)
        self.register_buffer("draft_vocab", torch.arange(size, dtype=torch.int32))

    def keep_frequent(self, size: int) -> None:
        """Output rows for the `size` most frequent tokens of this vocabulary, where their frequency is known."""
        if self.vocab_rank is None or size >= self.draft_vocab_size:
            return
        kept = self.draft_vocab[self.vocab_rank < size]
        self.resize_vocabulary(len(kept))
        self.draft_vocab.copy_(kept)
        self.vocab_rank = None

    @property
    def draft_vocab_size(self) -> int:
        return self.lm_head.out_features

    def attention_inputs(
        self, embedded: Float[Tensor, "*n H"], hidden: Float[Tensor, "*n H"], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values, `[*n, heads, head_dim]`."""
        layer = self.midlayer
        x = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), -1)
        attention = layer.self_attn
        query = attention.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        key = attention.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = attention.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, hidden: Float[Tensor, "*n H"], attended: Float[Tensor, "*n HD"]) -> Float[Tensor, "*n H"]:
        """The rest of the layer: residual connection, MLP."""
        if self.norm_before_residual:
            hidden = self.midlayer.hidden_norm(hidden)
        hidden = hidden + self.midlayer.self_attn.o_proj(attended)
        return hidden + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden))

    def compute_logits(self, output: Float[Tensor, "*n H"]) -> Float[Tensor, "*n V"]:
        """Logits over the draft vocabulary."""
        return self.lm_head(self.read_out(output))

    def read_out(self, output: Float[Tensor, "*n H"]) -> Float[Tensor, "*n H"]:
        """What meets the output rows."""
        return self.norm(output).to(self.lm_head.weight.dtype)


def start_from_target(head: EagleHead, target: TargetModel) -> None:
    """Begin with the target's own norm, output rows and last layer, the hidden path passing the high feature on."""
    last = target.decoder.layers[-1]
    hidden = target.hidden_size
    with torch.no_grad():
        head.fc.weight.zero_()
        head.fc.weight[:, 2 * hidden :] = torch.eye(hidden)
        head.norm.weight.copy_(target.decoder.norm.weight)
        head.midlayer.hidden_norm.weight.copy_(last.input_layernorm.weight)
        head.midlayer.post_attention_layernorm.weight.copy_(last.post_attention_layernorm.weight)
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(head.midlayer.mlp, name).weight.copy_(getattr(last.mlp, name).weight)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(head.midlayer.self_attn, name).weight
            weight[:, hidden:] = getattr(last.self_attn, name).weight
            weight[:, :hidden].mul_(0.5)
        head.midlayer.self_attn.o_proj.weight.copy_(last.self_attn.o_proj.weight)


def build_head(target: TargetModel, draft_vocab_size: int, *, norm_before_residual: bool = False) -> EagleHead:
    """A random head, always the same one; the run's generators are neither read nor moved."""
    with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(0)
        return EagleHead(target, draft_vocab_size=draft_vocab_size, norm_before_residual=norm_before_residual)
