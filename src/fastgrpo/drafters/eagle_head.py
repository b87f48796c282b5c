"""The weights of an EAGLE-3 head (arXiv:2503.01840): one decoder layer over target features.

Tensor names and shapes are those of published EAGLE-3 checkpoints.
"""

from __future__ import annotations

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


class EagleHead(DraftHead):
    """The head's weights: what is trained, saved and exchanged.

    Args:
        norm_before_residual: the residual is the normed hidden state, as heads in the speculators format may have it.
    """

    def __init__(
        self,
        target: TargetModel,
        *,
        draft_vocab_size: int,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__(target)
        self.norm_before_residual = norm_before_residual
        config = target.config
        hidden, eps = target.hidden_size, float(config.rms_norm_eps)
        self.head_dim = target.head_dim
        self.num_heads, self.num_kv_heads = int(config.num_attention_heads), target.num_kv_heads
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = _MidLayer(
            hidden, int(config.intermediate_size), self.num_heads, self.num_kv_heads, self.head_dim, eps
        )
        self.norm = RMSNorm(hidden, eps)
        self.resize_vocabulary(draft_vocab_size)

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
    hidden, layer = target.hidden_size, head.midlayer
    attention = layer.self_attn
    linears = {name: getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
    states = {name: getattr(attention, name).weight[:, hidden:] for name in ("q_proj", "k_proj", "v_proj")}
    norms = {
        "input_layernorm": layer.hidden_norm.weight,
        "post_attention_layernorm": layer.post_attention_layernorm.weight,
    }
    with torch.no_grad():
        head.fc.weight.zero_()
        head.fc.weight[:, 2 * hidden :] = torch.eye(hidden)
        copy_norm(target.decoder.norm, head.norm.weight)
        for name in states:
            getattr(attention, name).weight[:, :hidden].mul_(0.5)
        places = linears | states | norms | {"o_proj": attention.o_proj.weight}
        copy_layer(target.decoder.layers[-1], places, head.num_kv_heads * head.head_dim)


def build_head(target: TargetModel, draft_vocab_size: int, *, norm_before_residual: bool = False) -> EagleHead:
    """A random head, always the same one."""
    with same_random_weights(target):
        return EagleHead(target, draft_vocab_size=draft_vocab_size, norm_before_residual=norm_before_residual)
