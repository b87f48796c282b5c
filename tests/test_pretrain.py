"""A head learns before any run: what is drawn and learnt survives a stop, and ships where it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model, shared_model
from fastgrpo import answers, pretrain
from fastgrpo.answers import compute_features
from fastgrpo.cli import main
from fastgrpo.drafters import build_drafter, eagle_files, head_parts
from fastgrpo.drafters.eagle import EagleDrafter
from fastgrpo.drafters.eagle_files import find_shipped_head, save_head
from fastgrpo.engine import Engine
from fastgrpo.learner import Learner
from fastgrpo.loading import load_tokenizer
from fastgrpo.model import TargetModel
from fastgrpo.options import DraftTrainOptions
from fastgrpo.tokenizers import hash_vocabulary
from fastgrpo.types import SamplingParams, SpeculationPlan
from test_heads import collect_rollouts
from tiny import save_tiny_model

CHAIN = SpeculationPlan(depth=3, width=1, num_draft_tokens=3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def build_options(model_dir: Path, output: Path, **settings: object) -> DraftTrainOptions:
    defaults = {"dtype": "float32", "device": "cpu", "num_prompts": 6, "num_generations": 2, "max_tokens": 16}
    return DraftTrainOptions(model=str(model_dir), output=output, **(defaults | {"updates": 12} | settings))


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "head" / "model.safetensors")


# -- a run -----------------------------------------------------------------------------------------------------


def test_the_command_leaves_a_head_that_drafts_better(model_dir: Path, tmp_path: Path) -> None:
    argv = ["draft", "train", "--model", str(model_dir), "--dtype", "float32", "--task", "chain_sum,gcd"]
    argv += ["--num-prompts", "12", "--max-tokens", "24", "--updates", "40", "--output", str(tmp_path / "run")]
    assert main(argv) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == result["num_answers"] == 48
    assert {answer["source"] for answer in answers} == {"chain_sum", "gcd"}
    assert result["command"] == " ".join(["fastgrpo", *argv])
    engine = Engine.from_pretrained(model_dir, drafter=tmp_path / "run" / "head", speculation=CHAIN, device="cpu")
    fresh = Engine.from_pretrained(model_dir, drafter="eagle-new", speculation=CHAIN, device="cpu")
    prompts = [answer["prompt_ids"] for answer in answers[:8]]
    lengths = []
    for each in (engine, fresh):
        each.generate(prompts, SamplingParams(max_tokens=32, seed=9))
        lengths.append(sum(r.num_emitted for r in each.records) / sum(r.num_seqs for r in each.records))
    assert lengths[0] > lengths[1] + 0.1


def test_a_head_learns_from_the_answers_of_another_run(model_dir: Path, tmp_path: Path) -> None:
    pretrain.run_draft_training(build_options(model_dir, tmp_path / "first"), "")
    drawn = tmp_path / "first" / "answers.jsonl"
    before = drawn.read_bytes()
    result = pretrain.run_draft_training(build_options(model_dir, tmp_path / "second", answers=drawn), "")
    assert result["num_answers"] == 12
    first, second = read_head(tmp_path / "first"), read_head(tmp_path / "second")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)  # features are computed anew
    more = build_options(model_dir, tmp_path / "second", answers=drawn)
    drawn.write_bytes(before[: before.index(b"\n") + 1])
    with pytest.raises(ValueError, match=r"has changed since it was copied"):
        pretrain.run_draft_training(more, "")
    shown = json.dumps({"source": "own", "prompt_ids": [1], "token_ids": [2, 10**6]})
    for content, message in (
        ("", "holds no answers"),
        (shown, r"line 1 of .* token id 1000000"),
        ("{", "is damaged"),
        (shown.replace("[1]", "1"), "must be lists"),
        (shown.replace("[1]", "[]"), "0 tokens of prompt"),
    ):
        drawn.write_text(content)
        with pytest.raises(ValueError, match=message):
            pretrain.run_draft_training(build_options(model_dir, tmp_path / "third", answers=drawn), "")
        assert drawn.read_text() == content
        assert not (tmp_path / "third").exists()
    with pytest.raises(FileNotFoundError, match=r"no answers at .*missing"):
        pretrain.run_draft_training(build_options(model_dir, tmp_path / "third", answers=tmp_path / "missing"), "")
    with pytest.raises(ValueError, match="both given"):
        build_options(model_dir, tmp_path / "third", answers=drawn, data=drawn)


def test_a_run_that_was_stopped_goes_on_where_it_was(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "_SAVE_EVERY", 5)
    monkeypatch.setattr(answers, "_ROUND", 3)
    pretrain.run_draft_training(build_options(model_dir, tmp_path / "whole"), "")
    options = build_options(model_dir, tmp_path / "stopped")
    draw, update = Engine.generate, Learner.update
    calls = {"draw": 0, "update": 0}

    def stop_at(name: str, number: int, function: object) -> object:
        def wrapped(*args: object) -> object:
            calls[name] += 1
            if calls[name] == number:
                raise KeyboardInterrupt
            return function(*args)

        return wrapped

    monkeypatch.setattr(Engine, "generate", stop_at("draw", 2, draw))
    with pytest.raises(KeyboardInterrupt):
        pretrain.run_draft_training(options, "")
    path = tmp_path / "stopped" / "answers.jsonl"
    assert len(path.read_text().splitlines()) == 6
    path.write_text(path.read_text() + '{"source": "cha')  # the stop came while a line was written
    monkeypatch.setattr(Learner, "update", stop_at("update", 8, update))
    with pytest.raises(KeyboardInterrupt):
        pretrain.run_draft_training(options, "")
    pretrain.run_draft_training(options, "")
    assert path.read_text() == (tmp_path / "whole" / "answers.jsonl").read_text()
    whole, stopped = read_head(tmp_path / "whole"), read_head(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_head_goes_on_counting_the_tokens_it_meets(model_dir: Path, tmp_path: Path) -> None:
    settings = {"updates": 1, "compact": True, "draft_vocab_size": 50}
    pretrain.run_draft_training(build_options(model_dir, tmp_path / "first", **settings), "")
    again = build_options(model_dir, tmp_path / "again", head=tmp_path / "first" / "head", seed=1, **settings)
    pretrain.run_draft_training(again, "")
    counts = []
    for name in ("first", "again"):
        tensors = load_file(tmp_path / name / "head" / "model.safetensors")
        ids = (tensors["d2t"] + torch.arange(50)).tolist()
        counts.append(dict(zip(ids, tensors["vocab_counts"].tolist(), strict=True)))
    first, both = counts
    assert set(first) & set(both), "some tokens are frequent in both"
    assert all(both[token] >= first[token] for token in set(first) & set(both))
    assert sum(both.values()) > 1.5 * sum(first.values())


def test_prompts_come_from_a_file_too(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "' + "x" * 50 + '"}\n')
    options = build_options(model_dir, tmp_path / "run", data=path, max_prompt_length=40, updates=2)
    assert pretrain.run_draft_training(options, "")["num_answers"] == 4, "the third prompt is too long"


@pytest.mark.parametrize("now", [("two", "three", "four"), ("one", "two")], ids=["others", "fewer"])
def test_a_run_goes_on_with_its_own_prompts_alone(model_dir: Path, tmp_path: Path, now: tuple[str, ...]) -> None:
    def write(*prompts: str) -> None:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))

    write("one", "two", "three")
    options = build_options(model_dir, tmp_path / "run", data=tmp_path / "prompts.jsonl", updates=1)
    pretrain.run_draft_training(options, "")
    path = tmp_path / "run" / "answers.jsonl"
    before = path.read_text()
    write(*now)
    with pytest.raises(ValueError, match=r"line \d of .*answers\.jsonl answers another prompt .* another --output"):
        pretrain.run_draft_training(options, "")
    assert path.read_text() == before
    write("one", "two", "three")
    pretrain.run_draft_training(options, "")


def test_broken_prompts_are_left_out_if_told_to_also_in_a_folder_that_was_begun(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt":\n{"prompt": "two"}\n')
    argv = ["draft", "train", "--model", str(model_dir), "--dtype", "float32", "--data", str(path), "--updates", "1"]
    argv += ["--num-generations", "2", "--max-tokens", "16", "--output", str(tmp_path / "run")]
    assert main(argv) == 2
    assert "1 of 3 lines of" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="the first is line 2"):
        assert main([*argv, "--skip-broken"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_answers"] == 4
    config = json.loads((tmp_path / "run" / "head" / "config.json").read_text())
    assert config["tokenizer_hash"] == hash_vocabulary(load_tokenizer(str(model_dir)).get_vocab())


def test_a_wrong_path_leaves_the_folder_to_the_right_one(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    argv = ["draft", "train", "--dtype", "float32", "--updates", "1", "--max-tokens", "16"]
    argv += ["--output", str(tmp_path / "run"), "--num-generations", "2"]
    wrong = ["--model", str(model_dir), "--data", "prompt.jsonl"], ["--model", str(tmp_path), "--data", str(path)]
    for given in wrong:
        assert main([*argv, *given]) == 2
        assert not (tmp_path / "run").exists() and capsys.readouterr().err
    assert main([*argv, "--model", str(model_dir), "--data", str(path)]) == 0


@pytest.mark.parametrize("damaged", ["", '{"model": ', "[1]", "null"])
def test_settings_that_were_cut_off_are_named(model_dir: Path, tmp_path: Path, damaged: str) -> None:
    (tmp_path / "settings.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"settings.json is damaged .*; choose another --output"):
        pretrain.run_draft_training(build_options(model_dir, tmp_path, updates=1), "")


def test_a_run_from_before_an_option_goes_on(model_dir: Path, tmp_path: Path) -> None:
    options = build_options(model_dir, tmp_path / "run", updates=1)
    pretrain.run_draft_training(options, "")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    del settings["skip_broken"], settings["learning_rate"]
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    pretrain.run_draft_training(options, "")
    with pytest.raises(ValueError, match=r"holds a run with learning_rate=0.002, asked for 1.0"):
        pretrain.run_draft_training(build_options(model_dir, tmp_path / "run", updates=1, learning_rate=1.0), "")


def test_what_cannot_be_trained_is_refused(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = build_options(model_dir, tmp_path / "done", updates=1)
    pretrain.run_draft_training(done, "")
    with pytest.raises(ValueError, match=r"holds a run with seed=0, asked for 1; choose another --output"):
        pretrain.run_draft_training(build_options(model_dir, tmp_path / "done", updates=1, seed=1), "")
    settings = json.loads((tmp_path / "done" / "settings.json").read_text())
    del settings["kind"]  # as a run was begun before there were two kinds of heads
    (tmp_path / "done" / "settings.json").write_text(json.dumps(settings))
    pretrain.run_draft_training(done, "")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no draft training"):
        pretrain.run_draft_training(build_options(model_dir, tmp_path / "foreign"), "")
    with pytest.raises(ValueError, match="no prompt has at most max_prompt_length=3 tokens"):
        pretrain.run_draft_training(build_options(model_dir, tmp_path / "short", max_prompt_length=3), "")
    (tmp_path / "done" / "answers.jsonl").write_text('{"token_ids": "none"}\n')
    with pytest.raises(ValueError, match=r"is damaged .* remove it to draw the answers again"):
        pretrain.run_draft_training(done, "")
    assert main(["draft", "train", "--updates", "0"]) == 2
    assert "updates must be above 0, got 0" in capsys.readouterr().err


# -- what it learns from ---------------------------------------------------------------------------------------


def test_features_of_a_text_are_those_of_its_rollout() -> None:
    target = TargetModel(shared_model("qwen2"))
    rollouts = collect_rollouts(target.model, 3, 48)
    with target.rollout_mode():
        for rollout in rollouts:
            features = compute_features(target, rollout.prompt_ids, rollout.token_ids)
            assert torch.allclose(features, rollout.features, atol=1e-9)


# -- heads that ship -------------------------------------------------------------------------------------------


def test_a_head_ships_for_its_target_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", torch.float32, seed=5)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 1.5, len(model.model.norm.weight)))
    drafter = EagleDrafter(TargetModel(model))
    with torch.no_grad():
        drafter.head.fc.weight.add_(1.0)
    save_head(drafter.head, tmp_path / "mine", drafter.target, compact=True)
    assert find_shipped_head(drafter.target) is None
    monkeypatch.setattr(eagle_files, "_SHIPPED", tmp_path)
    assert find_shipped_head(drafter.target) == tmp_path / "mine"
    shipped, fresh = (build_drafter(name, drafter.target) for name in ("eagle", "eagle-new"))
    assert isinstance(shipped, EagleDrafter) and isinstance(fresh, EagleDrafter)
    assert torch.allclose(shipped.head.fc.weight, drafter.head.fc.weight, rtol=2**-8)
    assert torch.equal(shipped.head.lm_head.weight, drafter.head.lm_head.weight), "output rows are the target's"
    assert not torch.allclose(fresh.head.fc.weight, drafter.head.fc.weight, rtol=0.1)
    other = build_model("llama", torch.float32, seed=6)  # the same shape, another model
    assert find_shipped_head(TargetModel(other)) is None


def test_heads_in_the_package_are_small_and_whole() -> None:
    folders = sorted(eagle_files._SHIPPED.glob("*"))
    assert [folder.name for folder in folders] == ["smollm2-135m-instruct"]
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 10**6
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert tensors["fc.weight"].shape == (config["hidden_size"], 3 * config["hidden_size"])
        assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_a_head_that_ships_is_cut_to_its_frequent_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = EagleDrafter(TargetModel(shared_model("llama")), draft_vocab_size=40)
    counts = torch.zeros(drafter.target.vocab_size, dtype=torch.int64)
    counts[10:60] = torch.arange(50)  # 40 tokens, from 20 on, are drafted; the last ones were said most
    drafter.select_vocabulary(counts)
    save_head(drafter.head, tmp_path / "mine", drafter.target, compact=True, counts=counts)
    monkeypatch.setattr(eagle_files, "_SHIPPED", tmp_path)
    monkeypatch.setattr(head_parts, "_CPU_VOCAB_SIZE", 15)
    shipped = build_drafter("eagle", drafter.target)
    assert isinstance(shipped, EagleDrafter) and shipped.was_trained
    assert shipped.head.draft_vocab.tolist() == list(range(45, 60))
    assert torch.equal(shipped.head.lm_head.weight, drafter.target.lm_head.weight[45:60])
    assert torch.allclose(shipped.head.fc.weight, drafter.head.fc.weight, rtol=2**-8)
