"""Write the prompts that both engines complete: `python bench/vllm/prompts.py OUTPUT.json [TASK] [COUNT]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastgrpo.data import build_task_dataset
from fastgrpo.loading import encode_prompts, find_stop_token_ids, load_model, load_tokenizer, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the prompts that both engines complete.")
    parser.add_argument("output", type=Path, help="JSON file")
    parser.add_argument("task", nargs="?", default="chain_sum")
    parser.add_argument("count", nargs="?", type=int, default=32)
    output, task, count = vars(parser.parse_args()).values()
    path = resolve_model("demo")
    tokenizer = load_tokenizer(path)
    chats = build_task_dataset(task, size=count, seed=17)["prompt"]
    stops = find_stop_token_ids(load_model(path, dtype="bfloat16", device="cpu"), tokenizer)
    record = {
        "model": str(path),
        "task": task,
        "prompts": encode_prompts(tokenizer, chats),
        "stop_token_ids": list(stops),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
