"""Cost tables of machines that are not at hand, from their specification: the two limits of the roofline.

Nothing here is measured. Peak figures are the makers' (dense bfloat16); efficiencies and overheads are assumptions,
named below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgrpo.planner import HardwareProfile

BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY = 0.8, 0.6  # of the peaks that large forwards reach
MEMORY_SHARE = 0.9  # of the memory, for weights and cache
LAYER_OVERHEAD_S = 10e-6  # a layer's kernels one after another, from a captured graph
DRAFT_OVERHEAD_S = 150e-6  # a draft level: choosing the nodes to expand, from the host
STEP_OVERHEAD_S = 1e-3  # scheduling, sampling rows and bookkeeping of a step
SAMPLE_OVERHEAD_S = 2e-6  # an emitted token's own bookkeeping
DRAFT_VOCAB_SIZE = 32000  # rows of the head's reduced output head
MOST_TOKENS = 16384  # of the grid
_VALUE_BYTES = 2  # bfloat16


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak figures of one accelerator."""

    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: float  # dense bfloat16


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder with gated MLPs."""

    num_layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    has_tied_embedding: bool = False

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.mlp_size

    @property
    def read_parameters(self) -> int:
        """Parameters that a forward multiplies with: all but the embedding that tokens are looked up in."""
        return self.num_layers * self.layer_parameters + self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        return self.read_parameters + (0 if self.has_tied_embedding else self.hidden_size * self.vocab_size)

    @property
    def position_bytes(self) -> int:
        """Keys and values of one cached position."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _VALUE_BYTES

    @property
    def head_parameters(self) -> int:
        """Parameters that a level of an EAGLE-3 head reads: one layer, wider at its input, and the output rows."""
        wider = self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return self.layer_parameters + wider + self.hidden_size * min(DRAFT_VOCAB_SIZE, self.vocab_size)


DEVICES = {
    "a100": Device(memory_bytes=80e9, bandwidth_bytes_per_s=2.04e12, flops_per_s=312e12),  # A100-80GB SXM
    "h100": Device(memory_bytes=80e9, bandwidth_bytes_per_s=3.35e12, flops_per_s=989e12),  # H100 SXM
    "h200": Device(memory_bytes=141e9, bandwidth_bytes_per_s=4.8e12, flops_per_s=989e12),
    "b200": Device(memory_bytes=180e9, bandwidth_bytes_per_s=8.0e12, flops_per_s=2250e12),
}
MODELS = {
    "1.5b": ModelShape(  # Qwen2.5-1.5B
        num_layers=28, hidden_size=1536, mlp_size=8960, num_heads=12, num_kv_heads=2, head_dim=128,
        vocab_size=151936, has_tied_embedding=True,
    ),
    "8b": ModelShape(  # Llama-3.1-8B
        num_layers=32, hidden_size=4096, mlp_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
        vocab_size=128256,
    ),
    "32b": ModelShape(  # Qwen2.5-32B
        num_layers=64, hidden_size=5120, mlp_size=27648, num_heads=40, num_kv_heads=8, head_dim=128,
        vocab_size=152064,
    ),
    "70b": ModelShape(  # Llama-3.1-70B
        num_layers=80, hidden_size=8192, mlp_size=28672, num_heads=64, num_kv_heads=8, head_dim=128,
        vocab_size=128256,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A computed cost table.

    Args:
        num_devices: over which the model is split, ideally: bandwidth, rate and memory add up, talking costs nothing.
    """

    profile: HardwareProfile
    num_devices: int


def build_roofline_profile(device: str, model: str, *, cached_positions: int) -> Roofline:
    """What forwards and draft levels of a model would take on a machine, by its limits alone.

    A forward of n tokens takes the longer of reading the weights once and computing 2 n parameters, plus each layer's
    overhead; a draft level likewise, with a head's parameters. Cached positions are read at the bandwidth. A model
    that does not fit one device with its cache stands on the least power of two that it fits.

    Args:
        device: one of `DEVICES`.
        model: one of `MODELS`.
        cached_positions: of all live sequences, which the memory must hold beside the weights.

    Raises:
        ValueError: an unknown device or model, or fewer than 0 positions; names what there is.
    """
    for kind, name, known in (("device", device, DEVICES), ("model", model, MODELS)):
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(known)}")
    if cached_positions < 0:
        raise ValueError(f"cached_positions must be >= 0, got {cached_positions}")
    machine, shape = DEVICES[device], MODELS[model]
    needed = shape.num_parameters * _VALUE_BYTES + shape.position_bytes * cached_positions
    num_devices = 2 ** max(math.ceil(math.log2(needed / (MEMORY_SHARE * machine.memory_bytes))), 0)
    bandwidth = num_devices * BANDWIDTH_EFFICIENCY * machine.bandwidth_bytes_per_s
    flops = num_devices * COMPUTE_EFFICIENCY * machine.flops_per_s
    knee = round(_VALUE_BYTES * flops / (2 * bandwidth))  # the same for all that is read once and computed once
    grid = sorted({2**power for power in range(int(math.log2(MOST_TOKENS)) + 1)} | {knee})

    def compute_s(parameters: int, num_tokens: int, overhead_s: float) -> float:
        return max(_VALUE_BYTES * parameters / bandwidth, 2 * parameters * num_tokens / flops) + overhead_s

    overhead_s = shape.num_layers * LAYER_OVERHEAD_S
    profile = HardwareProfile(
        num_tokens=tuple(grid),
        target_s=tuple(compute_s(shape.read_parameters, n, overhead_s) for n in grid),
        draft_s=tuple(compute_s(shape.head_parameters, n, DRAFT_OVERHEAD_S) for n in grid),
        read_s=shape.position_bytes / bandwidth,
        sample_s=SAMPLE_OVERHEAD_S,
        fixed_s=STEP_OVERHEAD_S,
    )
    return Roofline(profile=profile, num_devices=num_devices)
