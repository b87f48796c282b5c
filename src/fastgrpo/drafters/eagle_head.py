"""The weights of an EAGLE-3 head (arXiv:2503.01840): one decoder layer over target features, and its files.

Tensor names and shapes are those of published EAGLE-3 checkpoints. Files are safetensors and JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.model import TargetModel

DEFAULT_DRAFT_VOCAB_SIZE = 4096
_ARCHITECTURE = "LlamaForCausalLMEagle3"
_FINGERPRINT = "target_final_norm"
_SHIPPED = Path(__file__).parent.parent / "heads"


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)


class _MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _MidLayer(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.self_attn = _Attention(hidden, heads, kv_heads, head_dim)
        self.mlp = _MLP(hidden, inner)


class EagleHead(nn.Module):
    """The head's weights: what is trained, saved and exchanged.

    The output head holds rows of the target's own and is not trained here; `draft_vocab` lists the
    target ids of its rows in increasing order.
    """

    draft_vocab: Tensor  # int32 target ids, increasing

    def __init__(self, target: TargetModel, *, draft_vocab_size: int = DEFAULT_DRAFT_VOCAB_SIZE) -> None:
        super().__init__()
        config = target.config
        hidden, eps = target.hidden_size, float(config.rms_norm_eps)
        self.hidden_size, self.head_dim = hidden, target.head_dim
        self.num_heads, self.num_kv_heads = int(config.num_attention_heads), target.num_kv_heads
        size = min(draft_vocab_size, target.vocab_size)
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = _MidLayer(
            hidden, int(config.intermediate_size), self.num_heads, self.num_kv_heads, self.head_dim, eps
        )
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, size, bias=False)
        self.lm_head.weight.requires_grad_(False)
        self.register_buffer("draft_vocab", torch.arange(size, dtype=torch.int32))

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
        """The rest of the layer: residual on the un-normed hidden state, MLP."""
        hidden = hidden + self.midlayer.self_attn.o_proj(attended)
        return hidden + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden))

    def compute_logits(self, output: Float[Tensor, "*n H"]) -> Float[Tensor, "*n V"]:
        """Logits over the draft vocabulary."""
        return self.lm_head(self.norm(output).to(self.lm_head.weight.dtype))


def rotate(x: Float[Tensor, "*n heads d"], cos: Float[Tensor, "*#n d"], sin: Float[Tensor, "*#n d"]) -> Tensor:
    """Rotary position embedding in transformers' half-split convention."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return x * cos + torch.cat((-second, first), -1) * sin


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


def save_head(head: EagleHead, folder: Path, target: TargetModel, *, compact: bool = False) -> None:
    """Write `config.json` and `model.safetensors` in the EAGLE-3 layout.

    Args:
        compact: bfloat16, and without the output rows, which the target has itself: half the size, for
            heads that ship with a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = target.config
    tensors = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items() if k != "draft_vocab"}
    if compact:
        tensors = {name: value.bfloat16() for name, value in tensors.items() if name != "lm_head.weight"}
    vocab = head.draft_vocab.long().cpu()
    tensors["d2t"] = vocab - torch.arange(len(vocab))
    tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, vocab, True)
    save_file(tensors, folder / "model.safetensors")
    record = {
        "architectures": [_ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": head.hidden_size,
        "intermediate_size": int(config.intermediate_size),
        "num_attention_heads": head.num_heads,
        "num_key_value_heads": head.num_kv_heads,
        "head_dim": head.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(config.rms_norm_eps),
        "num_hidden_layers": 1,
        "max_position_embeddings": target.max_position,
        "rope_parameters": dict(getattr(config, "rope_parameters", None) or {}),
        "rope_theta": (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": head.draft_vocab_size,
        "torch_dtype": str(tensors["fc.weight"].dtype).removeprefix("torch."),
        _FINGERPRINT: _take_fingerprint(target),
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def find_shipped_head(target: TargetModel) -> Path | None:
    """The folder of the head that comes with this package for this target, if there is one.

    A target is known by its shape and by its final norm, which training LoRA leaves as it is and
    quantising too.
    """
    for folder in sorted(_SHIPPED.glob("*")):
        config = json.loads((folder / "config.json").read_text())
        try:
            _check_config(config, folder, target)
        except ValueError:
            continue
        known, own = torch.tensor(config[_FINGERPRINT]), torch.tensor(_take_fingerprint(target))
        if bool((own - known).norm() < 0.05 * known.norm()):
            return folder
    return None


def _take_fingerprint(target: TargetModel) -> list[float]:
    """The first values of the final norm's weight."""
    return [round(float(value), 4) for value in target.decoder.norm.weight.detach()[:32]]


def build_head(target: TargetModel, draft_vocab_size: int = DEFAULT_DRAFT_VOCAB_SIZE) -> EagleHead:
    """A random head, always the same one; the run's generators are neither read nor moved."""
    with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(0)
        return EagleHead(target, draft_vocab_size=draft_vocab_size)


def load_head(folder: Path, target: TargetModel) -> EagleHead:
    """Read and check a saved head against its target; see `EagleDrafter.load`."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no readable draft head in {folder}: {error}") from error
    if not isinstance(config, dict) or config.get("architectures") != [_ARCHITECTURE]:
        found = config.get("architectures") if isinstance(config, dict) else config
        raise ValueError(f"{folder} holds {found}, not an EAGLE-3 head ({_ARCHITECTURE})")
    _check_config(config, folder, target)
    if "d2t" not in tensors:
        raise ValueError(f"the head in {folder} lacks d2t; export it again")
    for name in ("t2d", "embed_tokens.weight"):  # said again by d2t, and by the target
        tensors.pop(name, None)
    tensors["draft_vocab"] = _read_vocabulary(tensors.pop("d2t"), folder, target.vocab_size)
    head = build_head(target, len(tensors["draft_vocab"]))
    if "lm_head.weight" not in tensors:  # a compact head: they are the target's own
        tensors["lm_head.weight"] = target.lm_head.weight.detach()[tensors["draft_vocab"].long()]
    _check_tensors(tensors, head, folder)
    head.load_state_dict(tensors)
    return head


def _check_config(config: dict[str, object], folder: Path, target: TargetModel) -> None:
    wanted = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_attention_heads": int(target.config.num_attention_heads),
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "num_hidden_layers": 1,
    }
    for key, expected in wanted.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"the head in {folder} has {key} {config.get(key)}, the target has {expected}")


def _read_vocabulary(offsets: Tensor, folder: Path, vocab_size: int) -> Tensor:
    """Target ids of the draft vocabulary from d2t's offsets."""
    ids = offsets.long() + torch.arange(len(offsets))
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(ids.unique()) != len(ids):
        raise ValueError(f"the head in {folder} has a d2t that repeats a token or leaves 0..{vocab_size - 1}")
    return ids.to(torch.int32)


def _check_tensors(tensors: dict[str, Tensor], head: EagleHead, folder: Path) -> None:
    wanted = head.state_dict()
    problems = sorted(set(wanted) ^ set(tensors)) or [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if tensors[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"the head in {folder} does not fit this target: {problems[0]}")
    broken = next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)
    if broken is not None:
        raise ValueError(f"the head in {folder} has values that are not finite in {broken}")
