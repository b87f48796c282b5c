"""The target model: an unmodified transformers causal LM run over packed tree nodes and a slot cache."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastgrpo.attention import ATTENTION_NAME, ForwardBatch
from fastgrpo.cache import SlotCache
from fastgrpo.decoder import (
    NO_KERNELS,
    FusedDecoder,
    find_obstacle,
    is_model_touched,
    is_touched,
    join_features,
)
from fastgrpo.families import FULL_ATTENTION, base_model_of, check_adapters, check_supported, find_windows
from fastgrpo.graphs import CudaRecorder, GraphRunner, Recorder
from fastgrpo.kernels import gpu
from fastgrpo.kernels.kept import KeptMemory
from fastgrpo.kernels.linear import PackedLinear, has_own_product
from fastgrpo.memory import may_stay
from fastgrpo.modules import check_takes_rows, run_modules
from fastgrpo.rollout_modes import MODES, OWNERS
from fastgrpo.rotation import RotationTable
from fastgrpo.tokenizers import find_tokenizer, hash_vocabulary
from fastgrpo.weights import merged_weights

_FREES_CUBLAS = "torch._inductor.cudagraph_trees"  # loaded by torch.compile's mode "reduce-overhead"


@dataclass(frozen=True, kw_only=True)
class ForwardOutput:
    """Hidden states of a forward, one row for each packed token."""

    last_hidden: Float[Tensor, "T H"]  # normed, the head's input
    features: Float[Tensor, "T W"] | None  # [low, mid, high, last_hidden] side by side


class TargetModel:
    """Adapter around a transformers causal LM (or a PEFT model of one). The weights stay the owner's.

    Args:
        model: of one of the `SUPPORTED_FAMILIES`.
        compute_dtype: run under autocast with linear weights cast once for each rollout;
            None computes in the model's own type.
        tokenizer: the model's; None looks where the model came from, once `tokenizer_hash` is asked for.

    Attributes:
        windows: for each layer, how many tokens a token sees, itself included; None: all before it.
        weight_bytes: of all weights when the model was given.

    Raises:
        ValueError: the family, attention kind, RoPE kind or PEFT method is not supported; names it.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype | None = None, tokenizer: Any = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._fused: FusedDecoder | None = None
        self._recorder: Recorder | None = None  # while a rollout lasts, where forwards are recorded
        self._runner: tuple[SlotCache, GraphRunner] | None = None
        self._output: PackedLinear | None = None
        self._runs_whole = False  # what the owner put around decoder and head has its say
        self._kept: KeptMemory | None = None  # of copies of weights, while no rollout has it
        self._rotation: RotationTable | None = None  # of the last rollout
        self._place: Hashable = None
        self.base = base_model_of(model)
        check_supported(self.base)
        self.config: Any = self.base.config
        check_adapters(model)
        weight = self.embed_tokens.weight
        self.compute_dtype = None if compute_dtype == weight.dtype else compute_dtype
        if self.compute_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"compute_dtype must be bfloat16, float16 or the model's own {weight.dtype}, got {compute_dtype!r}; "
                "to compute in another one, convert the model"
            )
        config = self.config
        self.num_layers = self._count_layers()
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(weight.shape[0])
        self.num_kv_heads = int(config.num_key_value_heads)
        self.num_repeats = int(config.num_attention_heads) // self.num_kv_heads
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.max_position = int(config.max_position_embeddings)
        self.windows = find_windows(self.base)
        self.weight_bytes = sum(each.numel() * each.element_size() for each in model.parameters())
        self._built_for = self._list_facts()

    def _count_layers(self) -> int:
        """Layers that transformers runs: no more than the config says."""
        return len(self.decoder.layers[: self.config.num_hidden_layers])

    def _list_facts(self) -> dict[str, object]:
        """What caches and drafters rely on: it must not change under an engine."""
        num_tokens = len(self.embed_tokens.weight)
        return {"dtype": self.dtype, "device": self.device, "tokens": num_tokens, "layers": self._count_layers()}

    def _check_unchanged(self) -> None:
        for name, now in self._list_facts().items():
            if now != (before := self._built_for[name]):
                raise RuntimeError(
                    f"the model's {name} were {before} when this engine was built and are {now}: build another engine, "
                    "or undo what has changed the model; a rollout with another compute_dtype may be under way"
                )

    def is_like(self, other: TargetModel) -> bool:
        """Whether both run the same model in the same type."""
        return self.model is other.model and self.compute_dtype == other.compute_dtype

    @property
    def decoder(self) -> Any:
        """The model without its head, which its owner may replace between rollouts."""
        return self.base.model

    @property
    def embed_tokens(self) -> Any:
        return self.base.get_input_embeddings()

    def embed(self, token_ids: Int[Tensor, "*N"]) -> Float[Tensor, "*N H"]:
        """Embeddings of tokens as in a rollout: without hooks that training may have added, such as NEFTune's noise."""
        embedded: Tensor = self.embed_tokens.forward(token_ids)
        return embedded

    @property
    def lm_head(self) -> Any:
        return self.base.get_output_embeddings()

    @property
    def rotary_emb(self) -> Any:
        """cos and sin of positions for draft heads: where kinds of layers differ, those of layers that see all."""
        module = self.decoder.rotary_emb
        kinds = getattr(module, "layer_types", None)
        if not kinds:
            return module
        return functools.partial(module, layer_type=FULL_ATTENTION if FULL_ATTENTION in kinds else kinds[0])

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Those of `rotary_emb`."""
        found = getattr(self.config, "rope_parameters", None) or {}
        kind = getattr(self.rotary_emb, "keywords", {}).get("layer_type")
        return dict(found.get(kind) or found)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys, values and features."""
        return self.compute_dtype or self.decoder.layers[0].self_attn.o_proj.weight.dtype

    @property
    def name(self) -> str:
        """Where the model came from: a folder or a hub id; empty if it was built in memory."""
        return str(getattr(self.config, "_name_or_path", None) or "")

    @functools.cached_property
    def tokenizer_hash(self) -> str | None:
        """Hash of what the token ids mean (see `hash_vocabulary`); None where no tokenizer is known.

        The first use reads the tokenizer from disk, unless one was given.
        """
        tokenizer = self._tokenizer if self._tokenizer is not None else find_tokenizer(self.name)
        return None if tokenizer is None else hash_vocabulary(tokenizer.get_vocab())

    @property
    def feature_layers(self) -> tuple[int, int, int]:
        """Indices of the layers whose inputs are the drafter's features, as in EAGLE-3 (arXiv:2503.01840)."""
        last = self.num_layers - 1
        low, mid, high = 2, self.num_layers // 2, self.num_layers - 3
        return min(low, last), min(mid, last), min(max(high, 0), last)

    @property
    def feature_width(self) -> int:
        """Numbers per token: the inputs of the `feature_layers` and the last hidden state."""
        return 4 * self.hidden_size

    def build_cache(self, *, with_features: bool) -> SlotCache:
        return SlotCache(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            feature_width=self.feature_width if with_features else 0,
            dtype=self.dtype,
            device=self.device,
        )

    @contextlib.contextmanager
    def rollout_mode(self) -> Iterator[None]:
        """`prepared`, and `computing` in this thread."""
        with self.prepared(), self.computing():
            yield

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Evaluation mode, merged LoRA, tree attention; everything is put back, whatever happens inside.

        Several engines of one thread may hold a model prepared, and leave in any order and any thread: what one of them
        changed is put back once all that entered later have left.

        Raises:
            RuntimeError: another thread has the model in a rollout, which goes on; or its type, device, vocabulary or
                layers have changed since it was given.
        """
        with OWNERS.own(self.base):
            self._check_unchanged()
            with contextlib.ExitStack() as entering:
                entering.enter_context(self._change_model())
                mode = entering.pop_all()
            MODES.enter(self.base, mode)
            try:
                yield
            finally:
                MODES.leave(self.base, mode)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """PyTorch's state of this thread as a rollout wants it: no gradients, the model's device, autocast to
        `compute_dtype` or none, and `host_by_default`, whatever the caller or another engine has set.

        Held for one step at a time, since a rollout may go on, or be closed, in another thread than it began in.
        """
        kind, dtype = self.device.type, self.compute_dtype
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if dtype is not None or torch.is_autocast_enabled(kind):
            autocast = torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=kind != "cuda")
        # Triton launches, and recordings are made, on the current device, whichever the tensors are on
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        # what it makes may be learnt from, and written to by steps outside
        leaving = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with leaving, torch.no_grad(), on_device, autocast, host_by_default():
            yield

    @contextlib.contextmanager
    def _change_model(self) -> Iterator[None]:
        before = (self._fused, self._output, self._recorder, self._runner, self._runs_whole, self._place)
        training = [module for module in self.model.modules() if module.training]
        attentions = [(config, config._attn_implementation) for config in self._list_configs()]
        memory, self._kept = self._kept or KeptMemory(), None  # a rollout that begins meanwhile takes its own
        memory.begin()
        # those of a rollout that is still open are of the model as it found it
        self._output = self._runner = self._place = None
        try:
            self.model.eval()
            for config, _ in attentions:
                config._attn_implementation = ATTENTION_NAME
            with contextlib.ExitStack() as weights:
                with self.computing():
                    self._recorder = self._build_recorder()
                copies = None if self._recorder is None else memory
                with torch.no_grad(), host_by_default():
                    weights.enter_context(merged_weights(self.model, self.compute_dtype, copies))
                with self.computing():
                    self._fused = self._fuse(memory)
                if self._may_keep(memory):
                    self._place = self._find_place()
                yield
        finally:
            self._fused, self._output, self._recorder, self._runner, self._runs_whole, self._place = before
            for config, attention in attentions:
                config._attn_implementation = attention
            for module in training:
                module.training = True
            self._kept = memory if self._may_keep(memory) else None

    def _find_place(self) -> Hashable:
        """`place`; None where modules of the owner's are recorded, which may compute something else the next time, and
        where PyTorch may free memory of cuBLAS that was recorded, too.
        """
        if self._recorder is None or self._fused is None or self._output is None or _FREES_CUBLAS in sys.modules:
            return None
        return self._fused.place, self._output.place, _list_precisions()

    def _may_keep(self, memory: KeptMemory) -> bool:
        """Whether the memory of copies of weights may be held until the next rollout."""
        return not memory.num_bytes or may_stay(memory.num_bytes, self.device)

    def _list_models(self) -> tuple[Any, ...]:
        """The causal LM, and what PEFT has put around it."""
        return (self.base,) if self.model is self.base else (self.model, self.model.base_model, self.base)

    def _list_configs(self) -> list[Any]:
        """The model's, and those of parts that came from other models; attention is looked up in its own."""
        parts = (self.base, self.decoder, *(layer.self_attn for layer in self.decoder.layers))
        return list({id(config): config for part in parts if (config := getattr(part, "config", None))}.values())

    def forward(self, batch: ForwardBatch, cache: SlotCache) -> ForwardOutput:
        """Run the packed tokens, writing their keys and values; call inside `rollout_mode`."""
        return self._run(batch, cache, wants_logits=False)[0]

    def decode(self, batch: ForwardBatch, cache: SlotCache) -> tuple[ForwardOutput, Float[Tensor, "T V"]]:
        """`forward` and the logits of all tokens, both valid until the next call; recorded and replayed on a GPU."""
        if self._recorder is None:
            return self.launch(batch, cache)
        if self._runner is None or self._runner[0] is not cache:
            runner = GraphRunner(lambda batch: _flatten(*self.launch(batch, cache)), cache, self._recorder)
            self._runner = (cache, runner)
        hidden, logits, *features = self._runner[1](batch)
        return ForwardOutput(last_hidden=hidden, features=features[0] if features else None), logits

    def launch(self, batch: ForwardBatch, cache: SlotCache) -> tuple[ForwardOutput, Float[Tensor, "T V"]]:
        """`decode`, but never recorded."""
        output, logits = self._run(batch, cache, wants_logits=True)
        return output, self.compute_logits(output.last_hidden) if logits is None else logits

    def forget(self) -> None:
        """Drop what `decode` has recorded, and with it the cache that was used last."""
        self._runner = None

    def leave_kernels(self) -> None:
        """Go on through transformers' modules in this rollout, now that the GPU kernels have been given up."""
        self._fused = self._recorder = self._runner = self._place = None
        _warn_of(gpu.find_obstacle() or NO_KERNELS)

    @property
    def records(self) -> bool:
        """Whether forwards are recorded and replayed; their padding is written to the cache's scratch block."""
        return self._recorder is not None

    @property
    def was_replayed(self) -> bool:
        """Whether the next `decode` like the last one will take as long: False where the last one was recorded."""
        return self._runner is None or self._runner[1].was_replayed

    @property
    def place(self) -> Hashable:
        """Equal in two rollouts if what one records of the model may be replayed in the other: its weights are where
        they were. None where that cannot be known, and outside of rollouts.
        """
        return self._place

    def open_recorder(self) -> Recorder | None:
        """A recorder with memory of its own, for calls other than `decode`; None where nothing is recorded."""
        return self._build_recorder() if self.records else None

    def _build_recorder(self) -> Recorder | None:
        if self.device.type != "cuda":
            return None
        obstacle = self._find_window_obstacle() or find_graph_obstacle(self.dtype)
        if obstacle is None:
            return CudaRecorder()
        _warn_of(obstacle)
        return None

    def _find_window_obstacle(self) -> str | None:
        """Why fastgrpo's kernels, whose tokens see all of a row, cannot run; None where they can."""
        seen = min((window for window in self.windows if window is not None), default=None)
        return None if seen is None else f"some layers see no more than the last {seen} tokens"

    def _fuse(self, memory: KeptMemory) -> FusedDecoder | None:
        touched = next((each for each in self._list_models() if is_model_touched(each)), None)
        self._runs_whole = touched is not None
        obstacle = self._find_window_obstacle() or find_obstacle(self.decoder, self.dtype)
        if touched is not None:
            check_takes_rows(touched)
            obstacle = f"{type(touched).__name__} has hooks or a forward of its own"
        if obstacle is None:
            head = self.lm_head
            if type(head) is nn.Linear and not is_touched(head):
                head = _cast(head, self.dtype, memory if self.records else None)
                if has_own_product(head, self.dtype):
                    self._output = PackedLinear([head], memory=memory)
            fused = FusedDecoder(self.decoder, self.dtype, self._output, memory, self._rotation)
            self._rotation = fused.rotation
            return fused
        _warn_of(obstacle)
        return None

    def _run(
        self, batch: ForwardBatch, cache: SlotCache, *, wants_logits: bool
    ) -> tuple[ForwardOutput, Float[Tensor, "T V"] | None]:
        """The forward, and the logits if `wants_logits` and the fused decoder computed them along with it."""
        kept, logits = None if cache.features is None else self.feature_layers, None
        if self._fused is not None:
            hidden, features, logits = self._fused.run(batch, cache, kept, wants_logits=wants_logits)
        else:
            assert self.config._attn_implementation == ATTENTION_NAME, "call inside rollout_mode"
            whole = self.model if self._runs_whole else None
            hidden, inputs, logits = run_modules(
                self.decoder, batch, cache, self.windows, kept or (), whole=whole, wants_logits=wants_logits
            )
            features = None if kept is None else join_features(inputs, kept, hidden, cache)
        return ForwardOutput(last_hidden=hidden, features=features), logits

    def compute_logits(self, hidden: Float[Tensor, "T H"]) -> Float[Tensor, "T V"]:
        if self._output is not None:
            return self._output(hidden)
        return self.lm_head(hidden)


def host_by_default() -> contextlib.AbstractContextManager[Any]:
    """Tensors made without a device are the host's, whatever `torch.set_default_device` says: kernels there take their
    addresses."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _list_precisions() -> tuple[object, ...]:
    """PyTorch's settings of how cuBLAS rounds."""
    products = torch.backends.cuda.matmul
    reductions = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    splits = [f"{name}_split_k" for name in reductions]  # which not every PyTorch has
    names = ("fp32_precision", "allow_fp16_accumulation", *reductions, *splits)
    return (*(getattr(products, name, None) for name in names), torch.backends.cuda.preferred_blas_library())


def _cast(linear: nn.Linear, dtype: torch.dtype, memory: KeptMemory | None) -> nn.Linear:
    """The output head in `dtype`: where it shares its weights with the embedding, it was not cast with the others.

    Args:
        memory: where the copy is to stand; None takes new memory.
    """
    if linear.weight.dtype == dtype:
        return linear
    cast = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    for name, parameter in linear.named_parameters():
        values = parameter.data.to(dtype) if memory is None else memory.copy(parameter.data, dtype)
        setattr(cast, name, nn.Parameter(values, requires_grad=False))
    return cast


def _flatten(output: ForwardOutput, logits: Tensor) -> tuple[Tensor, ...]:
    return (output.last_hidden, logits) if output.features is None else (output.last_hidden, logits, output.features)


@functools.cache
def _warn_of(obstacle: str) -> None:
    """Warn once for each reason."""
    if obstacle != NO_KERNELS:  # for this one, a warning has been given already
        warnings.warn(f"decoding goes through transformers' modules, which takes longer: {obstacle}", stacklevel=2)


def find_graph_obstacle(dtype: torch.dtype) -> str | None:
    """Why forwards cannot be recorded and replayed on a GPU; None where they can."""
    return gpu.find_obstacle() or (None if dtype in gpu.DTYPES else f"there are no GPU kernels for {dtype}")
