"""What the benchmarks share: one clock, one kind of table, and `trl sft`, the peer of every training.

`python -m tests.bench.measuring RESULT OPTION…` is `trl sft OPTION…`, timed.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TRL_LORA = ("--load_in_4bit", "--use_bnb_nested_quant", "--use_peft", "--lora_target_modules", "all-linear")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what `work` returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def in_turns(ways: Mapping[str, Callable[[], T]], rounds: int = 1) -> dict[str, list[tuple[float, T]]]:
    """Seconds and result of each way in each round, in turns, so that what disturbs one disturbs the others."""
    runs: dict[str, list[tuple[float, T]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            runs[name].append(timed(way))
    return runs


def header(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def trl_sft(options: Sequence[Any]) -> dict[str, float]:
    """Seconds of the training loop of `trl sft` and its real tokens a second, the first fifth of the steps left out."""
    import torch
    from transformers import TrainerCallback, trainer
    from trl.scripts.sft import main, make_parser

    marks: list[tuple[float, float]] = []  # (when, tokens so far)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), 0.0))

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            marks.append((time.perf_counter(), logs.get("num_tokens", marks[-1][1])))

    trainer.DEFAULT_CALLBACKS.append(Clock)
    device = [] if torch.cuda.is_available() else ["--use_cpu"]  # without it bf16, its default, finds no GPU
    fixed = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", *device]
    try:
        main(*make_parser().parse_args_and_config([*map(str, options), *fixed]))
    finally:
        trainer.DEFAULT_CALLBACKS.remove(Clock)
    steps = [mark for i, mark in enumerate(marks) if i == 0 or mark[1] > marks[i - 1][1]]
    (start, before), (end, tokens) = steps[len(steps) // 5], steps[-1]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": marks[-1][0] - marks[0][0], "tokens_per_s": (tokens - before) / (end - start), "peak": peak}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(trl_sft(sys.argv[2:])))
