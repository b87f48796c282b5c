"""Heads travel: what is exported is read back bit for bit, and a foreign file is measured before it is trusted."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conftest import VOCAB_SIZE, build_model
from fastgrpo import travel
from fastgrpo.cli import main
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_files import load_head, save_head
from fastgrpo.engine import Engine
from fastgrpo.model import TargetModel
from fastgrpo.types import SamplingParams, SpeculationPlan
from fastgrpo.unroll import collate, compute_outputs
from test_eagle import build_drafter_for, draft_chains
from test_heads import collect_rollouts, edit_config, edit_tensors
from test_trainer import build_tokenizer

PLAN = SpeculationPlan(depth=2, width=2, num_draft_tokens=4)


@pytest.fixture
def target_folder(tmp_path: Path) -> Path:
    """A tiny target on disk, with a tokenizer."""
    folder = tmp_path / "target"
    build_model("llama", torch.float32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_target(folder: Path) -> TargetModel:
    from fastgrpo.loading import load_model

    return TargetModel(load_model(folder, dtype="float32", device="cpu"))


def build_trained_head(folder: Path, target_folder: Path) -> EagleDrafter:
    """A head that is not the one that every target begins with, saved in `folder`."""
    drafter = EagleDrafter(build_target(target_folder), draft_vocab_size=50)
    with torch.no_grad():
        for parameter in drafter.head.midlayer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    drafter.save(folder)
    return drafter


def write_as_speculators(source: Path, folder: Path, **changes: object) -> None:
    """The same head as the speculators library would save it."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    layer = {key: value for key, value in config.items() if key.endswith(("heads", "size", "dim", "layers", "eps"))}
    layer = {key: value for key, value in layer.items() if key != "draft_vocab_size"}
    folder.mkdir()
    save_file(
        {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    record = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": False,
        "norm_before_fc": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": None,
        "transformer_layer_config": layer,
    }
    (folder / "config.json").write_text(json.dumps(record | changes))


def assert_same_tensors(first: Path, second: Path) -> None:
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_export_then_import_is_the_identity(tmp_path: Path, target_folder: Path) -> None:
    build_trained_head(tmp_path / "head", target_folder)
    common = ["--model", str(target_folder)]
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "imported")
    assert (
        main(["draft", "export", *common, "--head", str(tmp_path / "head"), "--output", exported, "--dtype", "float32"])
        == 0
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"what is {i}+{i}?"}) + "\n" for i in range(4)))
    measured = ["--data", str(prompts), "--max-tokens", "12", "--least-acceptance", "0", "--dtype", "float32"]
    assert main(["draft", "import", *common, "--source", exported, "--output", imported, *measured]) == 0
    assert_same_tensors(tmp_path / "head", Path(exported))
    assert_same_tensors(tmp_path / "head", Path(imported))
    result = json.loads((Path(imported) / "import.json").read_text())
    assert 0 <= result["acceptance"][0][0] <= 1
    assert {"command", "commit", "machine", "settings"} <= result.keys()


def test_weights_that_a_type_cannot_hold_are_not_exported(tmp_path: Path, target_folder: Path, capsys) -> None:
    build_trained_head(tmp_path / "head", target_folder)
    edit_tensors(tmp_path / "head", lambda t: t["fc.weight"].view(-1)[:1].fill_(1e6))
    argv = ["draft", "export", "--model", str(target_folder), "--head", str(tmp_path / "head")]
    argv += ["--output", str(tmp_path / "out"), "--dtype"]
    assert main([*argv, "float16"]) == 2
    assert "fc.weight has values beyond torch.float16, up to 1e+06: take bfloat16" in capsys.readouterr().err
    assert main([*argv, "bfloat16"]) == 0


@pytest.mark.parametrize("place", ["head", "drafter/eagle"])  # alone, and in a drafter of two
def test_a_checkpoint_and_a_type_can_be_exported(tmp_path: Path, target_folder: Path, place: str) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    build_trained_head(checkpoint / "fastgrpo" / place, target_folder)
    (checkpoint / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    output = tmp_path / "out"
    assert (
        main(["draft", "export", "--model", str(target_folder), "--head", str(checkpoint), "--output", str(output)])
        == 0
    )
    tensors = load_file(output / "model.safetensors")
    assert {value.dtype for name, value in tensors.items() if name.endswith("weight")} == {torch.bfloat16}
    assert tensors["t2d"].sum() == len(tensors["d2t"]) == 50
    assert tensors["lm_head.weight"].shape[0] == 50
    config = json.loads((output / "config.json").read_text())
    assert config["norm_before_residual"] is False
    assert config["torch_dtype"] == "bfloat16"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_theta": 5e4}),
        ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "rope_theta": 5e5}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    ],
)
def test_an_exported_head_rotates_for_its_readers_as_here(tmp_path: Path, family: str, settings: dict) -> None:
    """By `rope_parameters`, and for transformers 4, which SGLang reads with, by `rope_theta` and `rope_scaling`."""
    drafter = build_drafter_for(build_model(family, torch.float32, **settings))
    drafter.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    at = torch.tensor([[1, 7, 90]])
    expected = drafter.target.rotary_emb(torch.zeros(1), position_ids=at)
    whole = {
        name: config[name] for name in ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    }
    for names in (
        ("rope_parameters",),
        ("rope_theta", "rope_scaling"),
        ("rope_parameters", "rope_theta", "rope_scaling"),
    ):
        read = LlamaRotaryEmbedding(LlamaConfig(**whole, **{name: copy.deepcopy(config[name]) for name in names}))
        for ours, theirs in zip(expected, read(torch.zeros(1), at), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_speculators_format_is_read(tmp_path: Path, target_folder: Path) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)
    write_as_speculators(tmp_path / "head", tmp_path / "theirs")
    head = load_head(tmp_path / "theirs", drafter.target)
    assert not head.norm_before_residual
    for name, value in drafter.head.state_dict().items():
        assert torch.equal(value, head.state_dict()[name]), name


def test_a_normed_residual_is_drafted_and_trained_alike(tmp_path: Path, target_folder: Path) -> None:
    """Where the flag is not on file, the speculators format means true."""
    drafter = build_trained_head(tmp_path / "head", target_folder)
    write_as_speculators(tmp_path / "head", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["norm_before_residual"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    model = build_model("llama", torch.float32)
    target = TargetModel(model)
    other = EagleDrafter(target, head=load_head(tmp_path / "theirs", target))
    assert other.head.norm_before_residual
    rollout = max(collect_rollouts(model, 3), key=lambda rollout: len(rollout.prompt_ids))  # of 12 tokens
    batch = collate([rollout], target, torch.float32)
    with torch.no_grad():
        steps = compute_outputs(other.head, target, batch)
        plain = compute_outputs(drafter.head, target, batch)
    assert not torch.allclose(steps, plain)
    outputs = draft_chains(other, rollout, 11, len(steps))
    for depth, output in enumerate(outputs):
        torch.testing.assert_close(output, steps[depth, 2 + depth], rtol=1e-4, atol=1e-4)
    save_head(other.head, tmp_path / "again", target)
    assert load_head(tmp_path / "again", target).norm_before_residual
    with pytest.raises(ValueError, match="norm_before_residual True, and this one has False: set drafter to the head"):
        EagleDrafter(target).restore(tmp_path / "again")  # a checkpoint, with drafter="eagle" or another head
    other.restore(tmp_path / "again")


def test_an_imported_head_changes_no_token(tmp_path: Path, target_folder: Path) -> None:
    build_trained_head(tmp_path / "head", target_folder)
    model = build_model("llama", torch.float64)
    prompts, params = [[3, 1, 4], [1, 5]], SamplingParams(max_tokens=20)
    expected = Engine(model, drafter="none", speculation="off").generate(prompts, params)
    drafted = Engine(model, drafter=str(tmp_path / "head"), speculation=PLAN).generate(prompts, params)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in expected]


@pytest.mark.parametrize("place", ["fastgrpo/head", "fastgrpo/drafter/eagle", "head"])
def test_a_checkpoint_or_a_training_run_drafts_with_its_head(tmp_path: Path, target_folder: Path, place: str) -> None:
    trained = build_trained_head(tmp_path / place, target_folder)
    if place != "head":  # of full fine-tuning: a whole model lies beside it
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    drafter = Engine(build_model("llama", torch.float64), drafter=tmp_path, speculation=PLAN).drafter
    assert isinstance(drafter, EagleDrafter)
    assert torch.equal(drafter.head.fc.weight, trained.head.fc.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_fc": True}, "norm_before_fc, which is not known"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, r"reads target layers \[1, 2, 3\]"),
        ({"target_hidden_size": 4096}, "target_hidden_size 4096"),
        ({"eagle_aux_hidden_state_layer_ids": 5}, "reads target layers 5; only the default ones"),
        ({"speculators_model_type": "eagle"}, "not an EAGLE-3 head"),
        ({"transformer_layer_config": "llama"}, "transformer_layer_config 'llama', which must be a dictionary"),
        ({"hidden_size": "32"}, "hidden_size '32', the target has 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2; only heads of one layer"),
        ({"norm_before_residual": "false"}, "norm_before_residual 'false', which must be true or false"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, target_folder: Path, changes: dict, message: str) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)
    write_as_speculators(tmp_path / "head", tmp_path / "theirs", **changes)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path / "theirs", drafter.target)


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]])
def test_weights_in_other_files_are_named(tmp_path: Path, target_folder: Path, names: list[str]) -> None:
    """SafeAILab's heads come as a .bin, large ones in parts."""
    drafter = build_trained_head(tmp_path / "head", target_folder)
    (tmp_path / "head" / "model.safetensors").unlink()
    for name in names:
        (tmp_path / "head" / name).write_bytes(b"")
    message = f"model.safetensors; weights are read from that file alone, write those of {', '.join(names)} to it"
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path / "head", drafter.target)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Eagle3LlamaForCausalLM"])
def test_a_head_under_another_name_is_told_what_to_change(tmp_path: Path, target_folder: Path, name: str) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)
    edit_config(tmp_path / "head", architectures=[name])
    with pytest.raises(ValueError, match=r'if it is one, write "architectures": \["LlamaForCausalLMEagle3"\] in its'):
        load_head(tmp_path / "head", drafter.target)


def test_what_means_the_default_is_read(tmp_path: Path, target_folder: Path) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)
    changes = {"eagle_aux_hidden_state_layer_ids": [], "head_dim": None, "norm_before_residual": None}
    write_as_speculators(tmp_path / "head", tmp_path / "theirs", **changes)
    assert not load_head(tmp_path / "theirs", drafter.target).norm_before_residual


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path, target_folder: Path) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)
    write_as_speculators(tmp_path / "head", tmp_path / "theirs")
    name = "mlp.up_proj.weight"
    edit_tensors(tmp_path / "theirs", lambda t: t.update({f"midlayer.{name}": torch.zeros(64, 32)}))
    with pytest.raises(ValueError, match=f"both layers.0.{name} and midlayer.{name}; take one out"):
        load_head(tmp_path / "theirs", drafter.target)


@pytest.mark.parametrize("is_tied", [False, True])
def test_output_rows_of_another_program_are_the_target_s_or_warned_of(tmp_path: Path, is_tied: bool) -> None:
    """Heads draft with the target's rows here, and others train rows of their own."""
    drafter = build_drafter_for(build_model("llama", torch.float32), draft_vocab_size=50)
    drafter.save(tmp_path / "head")
    write_as_speculators(tmp_path / "head", tmp_path / "theirs", tie_word_embeddings=is_tied)
    edit_tensors(tmp_path / "theirs", lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    load_head(tmp_path / "theirs", drafter.target)
    if is_tied:  # the rows are the embedding, which the target's are not
        edit_tensors(tmp_path / "theirs", lambda t: t.pop("lm_head.weight"))
    else:
        edit_tensors(tmp_path / "theirs", lambda t: t["lm_head.weight"].mul_(1.1))
    with pytest.warns(UserWarning, match=r"has lm_head.weight of its own, 1\d+% away from the target's, and drafts"):
        EagleDrafter.load(tmp_path / "theirs", drafter.target)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"rope_theta": 500.0},
            UserWarning,
            r"RoPE \{'rope_type': 'default', 'rope_theta': 500.0\}, and drafts .*10000.0",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, UserWarning, r"RoPE \{'rope_type': 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, UserWarning, "'rope_theta': 7.0"),
        ({"rope_scaling": "linear"}, UserWarning, "RoPE .*'linear'"),
        ({"rms_norm_eps": 1e-5}, UserWarning, "rms_norm_eps 1e-05, and drafts with 1e-06, the target's"),
        ({"rms_norm_eps": "small"}, ValueError, "rms_norm_eps 'small', which must be a number"),
        ({"hidden_act": "gelu"}, ValueError, "hidden_act 'gelu', and heads compute with 'silu'"),
        ({"logit_scale": 0.1}, ValueError, "logit_scale 0.1"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, ValueError, "use_aux_hidden_state False"),
        ({"layer_types": ["sliding_attention"]}, ValueError, r"layer_types \['sliding_attention'\]"),
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_head_that_computes_otherwise_is_refused_or_warned_of(
    tmp_path: Path, changes: dict, kind: type[Exception], message: str, is_nested: bool
) -> None:
    """It drafts by the target's RoPE and norms, and may learn; another layer it cannot become."""
    drafter = build_drafter_for(build_model("llama", torch.float32), draft_vocab_size=50)
    drafter.save(tmp_path / "head")
    if is_nested:
        write_as_speculators(tmp_path / "head", tmp_path / "theirs")
    else:
        shutil.copytree(tmp_path / "head", tmp_path / "theirs")
        load_head(tmp_path / "theirs", drafter.target)  # ours
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for name in ("target_final_norm", "rope_parameters"):
        config.pop(name, None)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    load_head(tmp_path / "theirs", drafter.target)
    (config["transformer_layer_config"] if is_nested else config).update(changes)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    told = pytest.warns if kind is UserWarning else pytest.raises
    with told(kind, match=message):
        load_head(tmp_path / "theirs", drafter.target)


def test_a_reduced_vocabulary_needs_its_map(tmp_path: Path, target_folder: Path) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    del tensors["d2t"]
    save_file(tensors, tmp_path / "head" / "model.safetensors")
    with pytest.raises(ValueError, match="lacks d2t although its vocabulary is reduced"):
        load_head(tmp_path / "head", drafter.target)


def test_target_ids_in_place_of_offsets_are_refused(tmp_path: Path, target_folder: Path) -> None:
    drafter = build_trained_head(tmp_path / "head", target_folder)  # of the first 50 tokens
    edit_tensors(tmp_path / "head", lambda t: t.update(d2t=torch.arange(50)))
    with pytest.raises(ValueError, match="d2t that leads to other tokens than t2d marks: d2t must hold what to add"):
        load_head(tmp_path / "head", drafter.target)


def test_a_whole_vocabulary_needs_none(tmp_path: Path) -> None:
    drafter = build_drafter_for(build_model("llama", torch.float32), draft_vocab_size=VOCAB_SIZE)
    drafter.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["d2t"], tensors["t2d"]
    save_file(tensors, tmp_path / "model.safetensors")
    head = load_head(tmp_path, drafter.target)
    assert torch.equal(head.draft_vocab, torch.arange(VOCAB_SIZE, dtype=torch.int32))


def test_a_head_that_is_never_right_is_not_taken(
    tmp_path: Path, target_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    build_trained_head(tmp_path / "head", target_folder)
    monkeypatch.setattr(travel, "measure_acceptance", lambda *_: torch.full((3, 4), 0.01))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1?"}\n"2+2?"\n')
    arguments = ["--source", str(tmp_path / "head"), "--output", str(tmp_path / "out"), "--data", str(prompts)]
    argv = ["draft", "import", "--model", str(target_folder), "--max-tokens", "4", *arguments]
    assert main(argv) == 2
    assert "1 of 2 lines of" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="the first is line 2"):
        assert main([*argv, "--skip-broken"]) == 2
    assert "1.0% of this head's first drafts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert main(["draft", "export", "--output", str(tmp_path / "out")]) == 2
    assert "is in use" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_head_that_was_not_written_whole_does_not_refuse_the_next_run(stop, target_folder, tmp_path, monkeypatch):
    build_trained_head(tmp_path / "head", target_folder)
    argv = ["draft", "export", "--model", str(target_folder), "--head", str(tmp_path / "head")]
    argv += ["--output", str(tmp_path / "out")]

    def write_a_part(head: object, folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("{")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(travel, "save_head", write_a_part)
        assert main(argv) == (2 if stop.args else 130)
    assert main(argv) == 0


def test_an_output_that_cannot_be_written_is_refused_before_a_head_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command, head in (("import", "--source"), ("export", "--head")):
        assert main(["draft", command, head, str(tmp_path), "--output", str(tmp_path / "file" / "out")]) == 2
        assert f"output='{tmp_path / 'file' / 'out'}' cannot be written" in capsys.readouterr().err
