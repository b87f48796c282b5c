"""Plain decoding side by side: our engine, transformers' `generate` and vLLM, milliseconds a step.

`python bench/vllm/decode.py --vllm-python VENV/bin/python --output docs/results/decode.json` in our environment;
without `--vllm-python` vLLM is left out. Each engine is a process of its own that keeps its model and takes its turn:
at each batch size completions of 16 and of 80 tokens, nobody stops early, T = 1; what the longer ones take more, over
64, is a step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEW, MANY = 16, 80
ENGINES = ("ours", "transformers", "vllm")
READY = "@ready "  # before what a process says to us; libraries print what they like

Generate = Callable[[list[list[int]], int], Any]


def open_ours(model: str) -> Generate:
    from fastgrpo import Engine, SamplingParams

    engine = Engine.from_pretrained(model, dtype="bfloat16", drafter="none", speculation="off")
    return lambda prompts, count: engine.generate(prompts, SamplingParams(max_tokens=count))


def open_transformers(model: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    lm = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").eval()

    def generate(prompts: list[list[int]], count: int) -> Any:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=count, pad_token_id=0)
        with torch.no_grad():
            out = lm.generate(ids, attention_mask=mask, generation_config=config, eos_token_id=None)
        assert out.shape[1] == width + count, f"{out.shape[1] - width} tokens for {count}"

    return generate


def open_vllm(model: str) -> Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype="bfloat16", max_model_len=1024, gpu_memory_utilization=0.3)  # of the CPU's memory

    def generate(prompts: list[list[int]], count: int) -> Any:
        params = SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True)
        return engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return generate


def serve(name: str, work: dict[str, Any]) -> None:
    """Answer each batch size with seconds a step."""
    generate = {"ours": open_ours, "transformers": open_transformers, "vllm": open_vllm}[name](work["model"])
    generate(work["prompts"][:2], FEW)
    print(READY, flush=True)
    for line in sys.stdin:
        prompts, took = work["prompts"][: int(line)], []
        for count in (FEW, FEW, MANY):  # the first one prepares what depends on the batch
            started = time.perf_counter()
            generate(prompts, count)
            took.append(time.perf_counter() - started)
        print(READY, (took[2] - took[1]) / (MANY - FEW), flush=True)


class Process:
    def __init__(self, name: str, python: str, work: Path) -> None:
        command = [python, __file__, "--serve", name, "--work", str(work)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
        raise RuntimeError(f"the process of {self.name} died, exit code {self.process.wait()}")

    def measure(self, batch: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return float(self.read())


def compare(options: argparse.Namespace) -> dict[str, Any]:
    from fastgrpo.data import build_task_dataset
    from fastgrpo.loading import encode_prompts, load_tokenizer, resolve_model
    from fastgrpo.machine import describe_commit
    from fastgrpo.options import check_writable

    if options.output:  # before anything is measured
        check_writable("output", options.output)
    commit = describe_commit(Path(__file__).parent)  # before it runs: another commit may be made meanwhile
    path = resolve_model(options.model)
    chats = build_task_dataset(options.task, size=max(options.batches), seed=17)["prompt"]
    work = {"model": path, "prompts": encode_prompts(load_tokenizer(path), chats)}
    pythons = {"ours": sys.executable, "transformers": sys.executable, "vllm": options.vllm_python}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "work.json"
        file.write_text(json.dumps(work))
        processes = [Process(name, python, file) for name, python in pythons.items() if python]
        step_ms: dict[str, dict[str, list[float]]] = {}
        for _ in range(options.repeats):
            for batch in options.batches:
                for process in processes:
                    seconds = process.measure(batch)
                    step_ms.setdefault(str(batch), {}).setdefault(process.name, []).append(1000 * seconds)
                    print(f"{batch} {process.name}: {1000 * seconds:.1f} ms", flush=True)
            if options.output:  # what there is, should a later turn fail
                write(describe(options, commit, step_ms), options.output)
        for process in processes:
            process.process.terminate()
    return describe(options, commit, step_ms)


def describe(options: argparse.Namespace, commit: str, step_ms: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    from fastgrpo.machine import describe_machine

    medians = {
        batch: {name: statistics.median(values) for name, values in each.items()} for batch, each in step_ms.items()
    }
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "machine": describe_machine(),
        "settings": {"model": options.model, "task": options.task, "repeats": options.repeats, "tokens": [FEW, MANY]},
        "step_ms": step_ms,
        "median_step_ms": medians,
        "over_ours": {b: {name: value / m["ours"] for name, value in m.items()} for b, m in medians.items()},
    }


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Plain decoding: ours, transformers and vLLM.")
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="gsm_symbolic")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, json.loads(options.work.read_text()))
        return
    result = compare(options)
    print(json.dumps(result["over_ours"], indent=1))
    if options.output:
        write(result, options.output)


if __name__ == "__main__":
    main()
