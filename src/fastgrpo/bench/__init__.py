"""Benchmarks: `rollout` measures the engine, `e2e` whole training steps beside TRL's own trainer.

Variants take turns in one process on the same prompts and seeds, results are medians, every ratio names
its baseline, and each JSON file names machine, versions, commit and command.
"""
