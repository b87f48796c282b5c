"""What the laws are tested with: tiny random models, a plain Hugging Face loop, drafters that know the answer.

Shapes in the signatures of tensor functions are checked while the tests run (jaxtyping and beartype), at the first
calls of each function in each test.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import hypothesis
import jaxtyping

CHECKED_MODULES = (
    *(
        "kernels.cpu",
        "kernels.linear",
        "decoder",
        "attention",
        "block_store",
        "cache",
        "sampling",
        "tree",
        "verify",
        "model",
        "weights",
        "prefill",
        "learner",
    ),
    *("drafters.drafter", "drafters.eagle", "drafters.eagle_head", "drafters.lm", "drafters.ngram"),
    *("drafters.ngram_table", "drafters.block", "drafters.block_head", "drafters.head_rows", "drafters.head_parts"),
    *("drafters.beams", "drafters.calibration", "drafters.join", "head_training", "block_training"),
)
jaxtyping.install_import_hook([f"fastgrpo.{name}" for name in CHECKED_MODULES], "shape_checks.check_first_calls")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

import shape_checks  # noqa: E402
from fastgrpo.attention import ForwardBatch  # noqa: E402
from fastgrpo.cache import SlotCache  # noqa: E402
from fastgrpo.drafters import DraftContext  # noqa: E402
from fastgrpo.engine import Engine  # noqa: E402
from fastgrpo.graphs import Recording  # noqa: E402
from fastgrpo.kernels import linear  # noqa: E402
from fastgrpo.planner import AutoPlanner, HardwareProfile  # noqa: E402
from fastgrpo.planner.acceptance import Rates  # noqa: E402
from fastgrpo.sampling import SamplingBatch, sample, stream_key  # noqa: E402
from fastgrpo.tree import Draft, check_draft  # noqa: E402
from fastgrpo.types import Completion, SamplingParams, Sequence, SpeculationPlan, StepRecord  # noqa: E402

torch.set_num_threads(1)  # pytest-xdist runs one worker a core

hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, MAX_POSITION = 120, 32, 3, 128


def pytest_collection_finish() -> None:
    """What the imports left is never garbage: trainers collect often, and would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries complain of leaks as the process ends


@pytest.fixture(scope="session", autouse=True)
def no_profile_cache() -> Iterator[None]:
    """No test reads or writes the user's own cache, nor does a process that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGRPO_CACHE", "off")
        yield


@pytest.fixture(autouse=True)
def first_calls_are_checked() -> None:
    shape_checks.begin_test()


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Faster still, for tests of many rollouts of a kind that others run with the check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# -- models --------------------------------------------------------------------------------------------------


FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "mistral_window": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {"no_rope_layer_interval": 2},
}


def build_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model whose distributions are far from flat and from certain.

    transformers' norms compute in float32 whatever the model's type; in float64 they are replaced by
    torch's own, so that equality can be asked to nine digits.
    """
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_POSITION,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    settings |= FAMILY_SETTINGS.get(family, {})
    config = CONFIG_MAPPING[family.removesuffix("_window")](**(settings | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(dtype).eval()
    return _widen_norms(model) if dtype == torch.float64 else model


def _widen_norms(model: PreTrainedModel) -> PreTrainedModel:
    norms = [(name, m) for name, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
    for name, norm in norms:
        parent, _, child = name.rpartition(".")
        wide = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=norm.weight.dtype)
        wide.weight = norm.weight
        setattr(model.get_submodule(parent), child, wide)
    return model


shared_model = functools.cache(build_model)  # for tests that leave the weights alone


# -- the law, without any of our cache, tree or engine code --------------------------------------------------


def reference_generate(
    model: PreTrainedModel, prompt: tuple[int, ...], params: SamplingParams, stream: int
) -> Completion:
    """One whole forward of the unmodified model for each token, then the sampling law."""
    sequence = Sequence(
        request_id=0,
        prompt_ids=list(prompt),
        params=params,
        max_tokens=min(params.max_tokens, model.config.max_position_embeddings - len(prompt)),
        stream_key=stream_key(params.seed, stream),
    )
    vocabulary = torch.arange(model.config.vocab_size, dtype=torch.int32)
    with torch.no_grad():
        while sequence.finish_reason is None:
            logits = model(input_ids=torch.tensor([sequence.all_token_ids]), use_cache=False).logits[0, -1:]
            drawn = sample(logits, SamplingBatch.build([sequence], logits.device), vocabulary)
            sequence.append(*(values.tolist() for values in drawn))
    return Completion(
        token_ids=sequence.token_ids,
        logprobs=sequence.logprobs,
        entropies=sequence.entropies,
        finish_reason=sequence.finish_reason or "length",
    )


expected_completion = functools.cache(reference_generate)  # for models from `shared_model`


def expected_tokens(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[list[int]]:
    """Reference tokens of a whole batch, the streams numbered as `Engine.generate` numbers them."""
    if isinstance(params, SamplingParams):
        streams = [(params, params.stream + index) for index in range(len(prompts))]
    else:
        streams = [(each, each.stream) for each in params]
    return [
        expected_completion(model, tuple(prompt), each, stream).token_ids
        for prompt, (each, stream) in zip(prompts, streams, strict=True)
    ]


# -- drafters that know what the target will say -------------------------------------------------------------

Answers = Mapping[tuple[tuple[int, ...], int], list[int]]  # (prompt, stream key) -> completion


def lose_memory_behind_drafts(engine: Engine) -> list[Exception]:
    """Memory runs out once, in a forward of drafts while a prompt is kept, which goes first; empty once it has."""
    decode, failures = engine.target.decode, [torch.OutOfMemoryError("no room")]

    def fail_once(batch: ForwardBatch, cache: SlotCache) -> object:
        if failures and batch.most_nodes > 1 and engine.prefiller._kept:
            raise failures.pop()
        return decode(batch, cache)

    engine.target.decode = fail_once
    return failures


def build_answers(
    model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> Answers:
    """The reference completions by what names a request."""
    tokens = expected_tokens(model, prompts, params)
    if isinstance(params, SamplingParams):
        keys = [stream_key(params.seed, params.stream + index) for index in range(len(prompts))]
    else:
        keys = [stream_key(each.seed, each.stream) for each in params]
    return {(tuple(prompt), key): known for prompt, key, known in zip(prompts, keys, tokens, strict=True)}


class _KnowingDrafter:
    """Looks the target's choices up; subclasses decide what to make of them."""

    wants_features = False
    position_bytes = 0

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def begin(self) -> None:
        pass

    def count_unread(self, sequences: list[Sequence]) -> int:
        return 0

    def observe(self, sequence: Sequence, num_new_tokens: int) -> None:
        pass

    def release(self, slot: int, last_slot: int) -> None:
        pass

    def propose(self, context: DraftContext, plan: SpeculationPlan) -> Draft:
        trees = []
        for sequence in context.sequences:
            known = self.answers[tuple(sequence.prompt_ids), sequence.stream_key]
            ahead = known[len(sequence.token_ids) : len(sequence.token_ids) + plan.depth]
            trees.append([(sequence.pending_token_id, -1), *self.grow(ahead, plan)])
        width = max(len(tree) for tree in trees)
        padded = torch.tensor([tree + [(0, -1)] * (width - len(tree)) for tree in trees])
        draft = Draft(
            token_ids=padded[..., 0], parents=padded[..., 1], num_nodes=torch.tensor([len(tree) for tree in trees])
        )
        check_draft(draft)
        return draft

    def grow(self, ahead: list[int], plan: SpeculationPlan) -> list[tuple[int, int]]:
        """(token, parent) of the draft nodes, given the target's next choices."""
        raise NotImplementedError


class OracleDrafter(_KnowingDrafter):
    """The right continuation, padded with wrong siblings that stand before it, so its rank is never first."""

    name = "oracle"

    def grow(self, ahead: list[int], plan: SpeculationPlan) -> list[tuple[int, int]]:
        nodes: list[tuple[int, int]] = []
        parent, spare = 0, plan.num_draft_tokens - len(ahead)
        for token_id in ahead:
            for sibling in range(1, min(plan.width - 1, spare) + 1):
                nodes.append(((token_id + sibling) % VOCAB_SIZE, parent))
                spare -= 1
            nodes.append((token_id, parent))
            parent = len(nodes)
        return nodes


class AlwaysWrongDrafter(_KnowingDrafter):
    """Full trees in which no child of the root is the target's choice."""

    name = "always_wrong"

    def grow(self, ahead: list[int], plan: SpeculationPlan) -> list[tuple[int, int]]:
        nodes: list[tuple[int, int]] = []
        frontier = [0]
        for depth in range(plan.depth):
            wrong = ahead[depth] + 1 if depth < len(ahead) else depth
            level = []
            for parent in frontier[: plan.width]:
                for sibling in range(plan.width):
                    if len(nodes) < plan.num_draft_tokens:
                        nodes.append(((wrong + sibling) % VOCAB_SIZE, parent))
                        level.append(len(nodes))
            frontier = level
        return nodes


# -- a machine whose times are computed, not measured --------------------------------------------------------

# A small CPU: flat up to the knee near 64 tokens, then linear.
SMALL_CPU = HardwareProfile(
    num_tokens=(1, 8, 32, 64, 128, 256),
    target_s=(0.060, 0.064, 0.075, 0.100, 0.190, 0.370),
    draft_s=(0.002, 0.002, 0.003, 0.005, 0.009, 0.018),
)


class SyntheticClockPlanner(AutoPlanner):
    """`auto` on a machine that takes exactly `speed` times what its first profile says: no run differs from another."""

    def __init__(
        self, profile: HardwareProfile = SMALL_CPU, *, speed: float = 1.0, acceptance: Rates | None = None
    ) -> None:
        super().__init__(profile, acceptance=acceptance)
        self.machine, self.speed = profile, speed

    def compute_step_s(self, record: StepRecord) -> float:
        """What the step really takes."""
        draft_s = self.machine.compute_draft_s(record.plan, record.num_seqs)
        return self.speed * (draft_s + self.machine.compute_target_s(record.num_tokens, record.num_read))

    def observe(self, record: StepRecord) -> None:
        target_s = self.speed * self.machine.compute_target_s(record.num_tokens, record.num_read)
        step_s = self.compute_step_s(record)
        times = {"draft_s": step_s - target_s, "target_s": target_s, "verify_s": 0.0, "prefill_s": 0.0, "plan_s": 0.0}
        super().observe(replace(record, **times, step_s=step_s))


@pytest.fixture
def layouts_found_anew():
    """What layout suits a type is found once in a process: not while the processor's kernels are hidden."""
    linear.find_layout.cache_clear()
    yield
    linear.find_layout.cache_clear()


class EagerRecorder:
    """Runs the call again and writes its outputs where the first ones stand, as a device's recording does."""

    def __init__(self, free_bytes=2**40):
        self.free_bytes, self.num_recorded, self.num_replayed, self.num_bytes = free_bytes, 0, 0, 0

    def record(self, run):
        self.num_recorded += 1
        first = run()
        outputs = tuple(output.clone() for output in first)

        def replay():
            self.num_replayed += 1
            for output, new in zip(outputs, run(), strict=True):
                if output.shape == new.shape:
                    output.copy_(new)
                else:
                    output.set_(new)  # on the host a walk ends where all have

        return Recording(first=first, replay=replay, outputs=outputs)

    def count_free_bytes(self):
        return self.free_bytes
