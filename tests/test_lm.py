"""An LM of the target's tokenizer drafts: exact, right where it equals the target, and never an error for a row."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from conftest import VOCAB_SIZE, build_model, expected_tokens, lose_memory_behind_drafts, shared_model
from fastgrpo.cache import locate
from fastgrpo.drafters import DraftContext, build_drafter, eagle_files
from fastgrpo.drafters import lm as lm_module
from fastgrpo.drafters.drafter import TrainableDrafter
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.lm import LmDrafter
from fastgrpo.engine import Engine
from fastgrpo.model import TargetModel
from fastgrpo.planner import PlanInputs
from fastgrpo.tokenizers import find_tokenizer, hash_vocabulary
from fastgrpo.tree import Draft, check_draft
from fastgrpo.types import PLAIN, SamplingParams, Sequence, SpeculationPlan
from test_heads import EveryOtherStep
from test_trainer import build_tokenizer, build_trainer
from tiny import save_tiny_model

CHAIN = SpeculationPlan(depth=3, width=1, num_draft_tokens=3)
TREE = SpeculationPlan(depth=3, width=3, num_draft_tokens=8)
GROUP = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [GROUP, [7], GROUP, [8, 8], list(range(40)), GROUP, [7], [5, 4, 3, 2, 1]]
TOKENIZER = SimpleNamespace(get_vocab=lambda: {f"token {i}": i for i in range(90)})  # the rest is padding
OTHER_TOKENIZER = SimpleNamespace(get_vocab=lambda: {f"token {i}": (i + 1) % 90 for i in range(90)})


def build_lm(**overrides: object) -> PreTrainedModel:
    """Smaller than the target, and of another family."""
    return build_model("qwen2", seed=1, **({"num_hidden_layers": 1, "hidden_size": 16, "head_dim": 4} | overrides))


def build_lm_drafter(target: PreTrainedModel, lm: PreTrainedModel) -> LmDrafter:
    return LmDrafter(TargetModel(target, tokenizer=TOKENIZER), lm, tokenizer=TOKENIZER)


def record_drafts(drafter: LmDrafter) -> list[tuple[DraftContext, Draft]]:
    """Every draft from now on, checked."""
    propose, drafts = drafter.propose, []

    def keep(context: DraftContext, plan: SpeculationPlan) -> Draft:
        draft = propose(context, plan)
        check_draft(draft)
        now = [replace(sequence, token_ids=list(sequence.token_ids)) for sequence in context.sequences]
        drafts.append((replace(context, sequences=now), draft))
        return draft

    drafter.propose = keep
    return drafts


# -- the law -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("plan", [CHAIN, TREE, SpeculationPlan(depth=2, width=200, num_draft_tokens=100)])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_tokens_are_those_of_plain_decoding(plan, temperature, max_num_seqs):
    model, params = shared_model("llama"), SamplingParams(temperature=temperature, seed=2, max_tokens=9)
    engine = Engine(model, drafter=build_lm_drafter(model, build_lm()), speculation=plan, max_num_seqs=max_num_seqs)
    engine.on_step.append(lambda record: engine.check())
    prompts = random.Random(max_num_seqs).sample(PROMPTS, len(PROMPTS))
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected_tokens(model, prompts, params)
    assert [c.token_ids for c in engine.generate(prompts[:3], params)] == expected_tokens(model, prompts[:3], params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_target_itself_is_always_right(family, dtype, temperature):
    model, params = shared_model(family, dtype), SamplingParams(temperature=temperature, max_tokens=40)
    engine = Engine(model, drafter=build_lm_drafter(model, model), speculation=CHAIN)
    engine.generate(PROMPTS, params)
    assert {record.acceptance_length for record in engine.records} == {CHAIN.depth + 1}


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_a_step_that_is_made_again_is_drafted_as_well_as_before():
    """Its pending tokens were read by the drafts that memory ran out behind; a prompt that is kept goes first."""
    model = shared_model("llama", torch.float32)
    engine = Engine(model, drafter=build_lm_drafter(model, model), speculation=CHAIN, max_num_seqs=1)
    failures = lose_memory_behind_drafts(engine)
    engine.generate([GROUP] * 3, SamplingParams(max_tokens=40))
    assert not failures and {record.acceptance_length for record in engine.records} == {CHAIN.depth + 1}


def test_the_target_itself_is_right_in_a_tree_too():
    model = shared_model("llama")
    drafter = build_lm_drafter(model, model)
    engine = Engine(model, drafter=drafter, speculation=SpeculationPlan(depth=3, width=3, num_draft_tokens=21))
    engine.generate(PROMPTS, SamplingParams(max_tokens=40))
    assert {record.acceptance_length for record in engine.records} == {4}  # the whole pool is kept
    assert drafter.calibration.offered.sum() > 0, "it hears what became of its drafts"


def test_the_owners_model_is_left_as_it_was():
    model, lm = shared_model("llama"), build_lm()
    lm.train()
    attention = lm.config._attn_implementation
    Engine(model, drafter=build_lm_drafter(model, lm), speculation=TREE).generate(
        PROMPTS[:2], SamplingParams(max_tokens=4)
    )
    assert lm.training
    assert lm.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_it_drafts_in_its_own_type_whatever_the_rollout_computes_in():
    model, lm = build_model("llama", torch.float32), build_lm(initializer_range=0.2).float()
    drafter = build_lm_drafter(model, lm)
    engine = Engine(model, drafter=drafter, speculation=TREE, compute_dtype=torch.bfloat16)
    engine.generate(PROMPTS[:3], SamplingParams(max_tokens=6))
    assert drafter.cache.keys.data.dtype == torch.float32
    assert sum(sum(map(sum, record.offered)) for record in engine.records) > 0


def test_its_weights_are_laid_out_once_in_a_rollout(monkeypatch):
    """And not for each draft, which would take longer than the draft."""
    model, prepared, change = shared_model("llama", torch.float32), [], TargetModel._change_model

    def noted(target):
        prepared.append(target)
        return change(target)

    monkeypatch.setattr(TargetModel, "_change_model", noted)
    lm = build_lm().float().train()
    drafter = build_lm_drafter(model, lm)
    engine = Engine(model, drafter=drafter, speculation=SpeculationPlan(depth=2, width=2, num_draft_tokens=4))
    steps = engine.roll_out(engine.take_requests(PROMPTS, SamplingParams(max_tokens=40)))
    for _ in range(3):
        next(steps)
    assert prepared == [engine.target, drafter.lm] and not lm.training
    steps.close()
    assert lm.training


def test_it_is_not_trained():
    model = shared_model("llama")
    assert not isinstance(build_lm_drafter(model, build_lm()), TrainableDrafter)


# -- its rows ------------------------------------------------------------------------------------------------


def collect_drafts(max_num_seqs: int, period: int) -> dict[tuple[int, int], tuple]:
    """Every draft of a rollout whose rows come and go, by sequence and position."""
    model = shared_model("llama")
    drafter = build_lm_drafter(model, build_lm())
    engine = Engine(model, drafter=drafter, speculation="off", max_num_seqs=max_num_seqs)
    engine.planner = EveryOtherStep(TREE, period)
    seen = record_drafts(drafter)
    params = [SamplingParams(max_tokens=4 + 7 * (index % 4), stream=index) for index in range(10)]
    engine.generate([PROMPTS[index % len(PROMPTS)] for index in range(10)], params)
    drafts = {}
    for context, draft in seen:
        for row, sequence in enumerate(context.sequences):
            count = int(draft.num_nodes[row])
            key = (sequence.stream_key, len(sequence.token_ids))
            drafts[key] = (draft.token_ids[row, :count].tolist(), draft.parents[row, :count].tolist())
    return drafts


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("max_num_seqs", "period"), [(1, 1), (3, 1), (64, 1), (3, 2), (64, 3)])
def test_a_draft_does_not_depend_on_the_rows_beside_it_or_on_when_it_is_asked(max_num_seqs, period, monkeypatch):
    drafts = collect_drafts(max_num_seqs, period)
    monkeypatch.setattr(lm_module, "_READ_CHUNK", 5)  # nor on the forwards it was read in
    monkeypatch.setattr(lm_module, "_READ_TOKENS", 11)
    expected = collect_drafts(4, 1)
    shared = drafts.keys() & expected.keys()
    assert len(shared) >= 10
    assert {key: drafts[key] for key in shared} == {key: expected[key] for key in shared}
    if period == 1:
        assert drafts.keys() == expected.keys()


def test_a_prompt_is_read_once_for_its_siblings():
    model = shared_model("llama")
    drafter = build_lm_drafter(model, build_lm())
    engine = Engine(model, drafter=drafter, speculation=SpeculationPlan(depth=1, width=1, num_draft_tokens=1))
    counts, forward = [], drafter.lm.forward

    def count(batch: object, cache: object) -> object:
        counts.append(len(batch.token_ids))
        return forward(batch, cache)

    drafter.lm.forward = count
    prompts = [GROUP] * 5 + [[1, 2, 3]]
    engine.generate(prompts, SamplingParams(max_tokens=2))
    assert counts[:2] == [len(GROUP) - 1, 5 + 3]  # the group's prompt, then a pending token each and the other prompt


def test_a_row_beside_longer_ones_is_given_no_more_of_a_table_than_it_fills(monkeypatch):
    """Attention on a GPU makes room for all positions that a table could hold, for each token and head."""
    drafter, tables = build_lm_drafter(shared_model("llama"), build_lm()), []
    forward = drafter.lm.forward
    monkeypatch.setattr(drafter.lm, "forward", lambda batch, _: tables.append(batch.blocks) or forward(batch, _))
    drafter.cache.add_rows(3)
    with drafter._drafting():
        apart = [drafter._read_tokens({slot: tokens})[slot] for slot, tokens in enumerate([[5] * 300, GROUP, [7, 8]])]
        for slot in (1, 2):
            drafter.cache.truncate(slot, 0)
        beside = drafter._read_tokens({1: GROUP, 2: [7, 8]})
    assert [table.shape[1] for table in tables] == [5, 1, 1, 1]
    assert torch.allclose(beside[1:], torch.stack(apart[1:]), atol=1e-5)


def test_slots_are_released_and_moved():
    model = shared_model("llama")
    drafter = build_lm_drafter(model, build_lm())
    cache = drafter.cache
    cache.add_rows(4)
    for row in range(4):
        cache.reserve(row, 8)
        cache.keys.data[:, locate(cache.blocks[row, None], torch.arange(8)[None])] = row
    cache.lengths = [2, 3, 4, 5]
    drafter.release(1, 3)  # the last moves
    assert cache.lengths == [2, 5, 4]
    assert (cache.keys.data[:, locate(cache.blocks[1, None], torch.arange(5)[None])] == 3).all()
    drafter.release(2, 2)
    assert cache.lengths == [2, 5]
    drafter.release(0, 2)  # the last was admitted after the last draft
    assert cache.lengths == [0, 5]
    drafter.release(3, 3)
    assert cache.lengths == [0, 5]
    assert drafter.count_unread(build_sequences([9, 4, 2])) == 10 + 0 + 3
    drafter.begin()
    assert cache.lengths == []
    assert cache.num_bytes == 0


def build_sequences(lengths):
    """Of so many cached tokens."""
    return [
        Sequence(request_id=row, prompt_ids=[1] * (length + 1), params=SamplingParams(), max_tokens=1, stream_key=row)
        for row, length in enumerate(lengths)
    ]


def test_the_profiler_can_time_its_drafts():
    model = shared_model("llama", torch.float32)
    drafter = build_lm_drafter(model, build_lm().float())
    engine = Engine(model, drafter=drafter, speculation="auto")
    params = SamplingParams(max_tokens=6)
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] == expected_tokens(model, PROMPTS, params)
    assert len(engine.planner.profile.draft_s) == len(engine.planner.profile.num_tokens)
    assert engine.planner.profile.draft_s[0] > 0


# -- other sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [100, 150])
def test_padding_of_another_size_is_never_drafted(vocab_size):
    """The target emits its padding here, as random weights do: an id that the LM lacks is read as another."""
    model, params = shared_model("llama"), SamplingParams(max_tokens=16)
    drafter = build_lm_drafter(model, build_lm(vocab_size=vocab_size))
    drafts = record_drafts(drafter)
    completions = Engine(model, drafter=drafter, speculation=TREE).generate(PROMPTS, params)
    assert [c.token_ids for c in completions] == expected_tokens(model, PROMPTS, params)
    assert max(max(c.token_ids) for c in completions) >= 100
    assert max(int(draft.token_ids[:, 1:].max()) for _, draft in drafts) < min(vocab_size, VOCAB_SIZE)


def test_rows_beyond_its_context_get_no_draft():
    model, params = shared_model("llama"), SamplingParams(max_tokens=20)
    drafter = build_lm_drafter(model, build_lm(max_position_embeddings=24))
    drafts = record_drafts(drafter)
    prompts = [[3, 1, 4], list(range(40)), list(range(15)), list(range(23)), [7]]
    engine = Engine(model, drafter=drafter, speculation=TREE)
    completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == expected_tokens(model, prompts, params)
    for context, draft in drafts:
        for sequence, count in zip(context.sequences, draft.num_nodes.tolist(), strict=True):
            assert (count > 1) == (len(sequence.all_token_ids) + TREE.depth - 1 <= 24)
    assert {int(n) for _, draft in drafts for n in draft.num_nodes} == {1, 1 + TREE.num_draft_tokens}
    assert drafter.count_unread(build_sequences([40, 100])) == 0


def test_a_shallow_draft_after_a_deep_one_reads_on():
    """A row that is too near the end for one plan may fit another."""
    model, params = shared_model("llama"), SamplingParams(max_tokens=20)
    drafter = build_lm_drafter(model, model)
    drafter.lm.max_position = 20
    plans = [CHAIN, PLAIN, replace(CHAIN, depth=2, num_draft_tokens=2), replace(CHAIN, depth=1, num_draft_tokens=1)]

    class Turns:
        name, num_steps = "fixed", 0

        def begin(self) -> None:
            pass

        def plan(self, inputs: PlanInputs) -> SpeculationPlan:
            self.num_steps += 1
            return plans[self.num_steps % 4]

        def observe(self, record: object) -> None:
            pass

    engine = Engine(model, drafter=drafter, speculation="off")
    engine.planner = Turns()
    drafts = record_drafts(drafter)
    completions = engine.generate(PROMPTS[:4], params)
    assert [c.token_ids for c in completions] == expected_tokens(model, PROMPTS[:4], params)
    accepted = [record.acceptance_length for record in engine.records]
    assert len({tuple(draft.num_nodes.tolist()) for _, draft in drafts}) > 3
    assert max(accepted) == 4


# -- files and tokenizers ------------------------------------------------------------------------------------


@pytest.fixture
def lm_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "lm")


def load_target(folder: Path) -> PreTrainedModel:
    from fastgrpo.loading import load_model

    return load_model(str(folder), dtype="float32", device=torch.device("cpu"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def replace_tokenizer(folder: Path) -> None:
    """The same tokens under other ids."""
    text = json.loads((folder / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(text))


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def test_a_folder_with_a_model_drafts(tmp_path, lm_folder, recwarn):
    target = load_target(save_tiny_model(tmp_path / "target"))
    engine = Engine(target, drafter=lm_folder, speculation=CHAIN)
    assert isinstance(engine.drafter, LmDrafter)
    completions = engine.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=12))
    assert {record.acceptance_length for record in engine.records} == {4}  # both folders hold the same weights
    plain = Engine(target, drafter="none").generate([[5, 6, 7], [8]], SamplingParams(max_tokens=12))
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert isinstance(build_drafter(str(lm_folder), TargetModel(target)), LmDrafter)
    assert not [w for w in recwarn if "token" in str(w.message)]
    half = Engine(target.to(torch.bfloat16), drafter=lm_folder)
    assert half.drafter.lm.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in half.drafter.lm.model.parameters())


def test_another_tokenizer_is_refused(tmp_path, lm_folder):
    target = load_target(save_tiny_model(tmp_path / "target"))
    replace_tokenizer(lm_folder)
    with pytest.raises(ValueError, match="have different tokenizers") as caught:
        Engine(target, drafter=lm_folder)
    for word in (str(lm_folder), str(tmp_path / "target"), "a smaller model of the target's own family"):
        assert word in str(caught.value)
    theirs = find_tokenizer(lm_folder)
    Engine(target, drafter=lm_folder, tokenizer=theirs)  # the owner says what the target's is


def test_a_tokenizer_that_is_not_known_is_not_compared(tmp_path, lm_folder):
    target = load_target(save_tiny_model(tmp_path / "target"))
    remove_tokenizer(lm_folder)
    with pytest.warns(UserWarning, match="token ids were not compared"):
        Engine(target, drafter=lm_folder)
    with pytest.raises(ValueError, match="vocabularies of 64 and 120 entries, and not both tokenizers"):
        LmDrafter(TargetModel(shared_model("llama")), build_lm(vocab_size=64))


def set_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no readable draft model in"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nothing"), "no readable draft model in"),
        (lambda f: edit_config(f, model_type="gpt2", architectures=["GPT2LMHeadModelForCausalLM"]), "family 'gpt2'"),
        (lambda f: drop_tensor(f, "model.layers.1.mlp.up_proj.weight"), "lacks weights, model.layers.1.mlp.up_proj"),
        (lambda f: edit_config(f, hidden_size=64), "draft model in"),
        (lambda f: edit_config(f, hidden_size="32"), "no readable draft model in .*hidden_size"),
        (set_nan, "not finite in model.norm.weight"),
        (lambda f: edit_config(f, architectures=5), "not an EAGLE-3 head|no readable draft head"),
        (lambda f: edit_config(f, architectures=["BertModel"]), "not an EAGLE-3 head"),
        (lambda f: (f / "config.json").unlink(), "no readable draft head"),
    ],
    ids=[
        "no_weights",
        "damaged",
        "family",
        "missing_tensor",
        "other_shapes",
        "text_for_a_size",
        "nan",
        "odd_name",
        "no_lm",
        "no_config",
    ],
)
def test_a_folder_that_cannot_draft_is_refused(tmp_path, lm_folder, damage, message):
    target = load_target(save_tiny_model(tmp_path / "target"))
    damage(lm_folder)
    with pytest.raises(ValueError, match=message) as caught:
        Engine(target, drafter=lm_folder)
    assert str(lm_folder) in str(caught.value)


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- what ids mean -------------------------------------------------------------------------------------------


def test_a_hash_names_a_vocabulary():
    vocab = {"a": 0, "b": 1, "ab": 2, "\ud800": 3}
    assert hash_vocabulary(vocab) == hash_vocabulary(dict(reversed(vocab.items())))
    assert len(hash_vocabulary(vocab)) == 16
    others = [{}, vocab | {"c": 4}, vocab | {"a": 1, "b": 0}, {"a": 0, "b": 1, "ab": 2, "\ud801": 3}]
    assert len({hash_vocabulary(each) for each in (vocab, *others)}) == 5
    assert hash_vocabulary({"a": 0, "1 1 b": 1}) != hash_vocabulary({"a0 1 1 b": 0})


def test_a_target_knows_its_tokenizer_by_its_folder(tmp_path, lm_folder, monkeypatch):
    known = TargetModel(load_target(lm_folder))
    assert known.tokenizer_hash == hash_vocabulary(find_tokenizer(lm_folder).get_vocab())
    assert TargetModel(shared_model("llama")).tokenizer_hash is None
    given = TargetModel(shared_model("llama"), tokenizer=TOKENIZER)
    assert given.tokenizer_hash == hash_vocabulary(TOKENIZER.get_vocab())
    remove_tokenizer(lm_folder)
    assert TargetModel(load_target(lm_folder)).tokenizer_hash is None
    assert find_tokenizer("") is None
    assert find_tokenizer(tmp_path / "nowhere") is None


def test_a_tokenizer_is_read_at_most_once_and_only_for_a_folder(tmp_path, lm_folder, monkeypatch):
    calls = []
    monkeypatch.setattr("fastgrpo.model.find_tokenizer", lambda folder: calls.append(folder) or TOKENIZER)
    model = load_target(lm_folder)
    for drafter in ("eagle-new", "ngram", "none"):
        Engine(model, drafter=drafter)
    assert not calls
    engine = Engine(model, drafter="eagle-new")
    for _ in range(3):
        engine.drafter.save(tmp_path / "head")
        engine.drafter.restore(tmp_path / "head")
    assert len(calls) == 1


def test_a_head_keeps_the_hash_of_its_tokenizer_and_refuses_another(tmp_path):
    model = shared_model("llama", torch.float32)
    EagleDrafter(TargetModel(model, tokenizer=TOKENIZER)).save(tmp_path)
    known = hash_vocabulary(TOKENIZER.get_vocab())
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_hash"] == known
    for tokenizer in (TOKENIZER, None):
        assert isinstance(Engine(model, drafter=tmp_path, tokenizer=tokenizer).drafter, EagleDrafter)
    with pytest.raises(ValueError, match="trained with another tokenizer") as caught:
        Engine(model, drafter=tmp_path, tokenizer=OTHER_TOKENIZER)
    for word in (str(tmp_path), known, hash_vocabulary(OTHER_TOKENIZER.get_vocab()), "draft train", "remove"):
        assert word in str(caught.value)


def test_a_head_of_an_unknown_tokenizer_fits_any(tmp_path):
    model = shared_model("llama", torch.float32)
    EagleDrafter(TargetModel(model)).save(tmp_path)
    assert "tokenizer_hash" not in json.loads((tmp_path / "config.json").read_text())
    Engine(model, drafter=tmp_path, tokenizer=OTHER_TOKENIZER)


def test_a_shipped_head_of_another_tokenizer_is_left_out_with_a_warning(tmp_path, monkeypatch):
    """Nobody named it, so that it is no mistake of the user's."""
    model = shared_model("llama", torch.float32)
    monkeypatch.setattr(eagle_files, "_SHIPPED", tmp_path)
    EagleDrafter(TargetModel(model, tokenizer=TOKENIZER)).save(tmp_path / "mine")
    assert eagle_files.find_shipped_head(TargetModel(model, tokenizer=TOKENIZER)) == tmp_path / "mine"
    assert Engine(model, drafter="eagle").drafter.was_trained
    with pytest.warns(UserWarning, match="ships for this model is left out: .* trained with another tokenizer"):
        assert not Engine(model, drafter="eagle", tokenizer=OTHER_TOKENIZER).drafter.was_trained


# -- in training -----------------------------------------------------------------------------------------------


def test_the_trainer_drafts_with_a_model_of_its_tokenizer_alone(tmp_path):
    theirs = tmp_path / "theirs"
    build_lm(vocab_size=len(build_tokenizer())).float().save_pretrained(theirs)
    build_tokenizer().save_pretrained(theirs)
    losses = []
    for keys in ({"drafter": str(theirs), "speculation": "fixed"}, {"speculation": "off"}):
        trainer = build_trainer(tmp_path / "run", max_steps=2, **keys)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert trainer.learner is None
    assert losses[0] == losses[1], "speculation changes no token"
    swapped = save_tiny_model(tmp_path / "swapped")
    replace_tokenizer(swapped)
    with pytest.raises(ValueError, match="have different tokenizers"):
        build_trainer(tmp_path / "run", drafter=str(swapped))
