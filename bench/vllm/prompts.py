"""Write the prompts that both engines complete: `python bench/vllm/prompts.py OUTPUT.json [TASK] [COUNT]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastgrpo.data import build_task_dataset
from fastgrpo.loading import encode_prompts, find_stop_token_ids, load_model, load_tokenizer, resolve_model


def main() -> None:
    output, task, count = Path(sys.argv[1]), (sys.argv[2:3] or ["chain_sum"])[0], int((sys.argv[3:4] or ["32"])[0])
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
