"""How fast a file becomes validated conversations: `read_batches` beside `datasets.map` doing the same row by row."""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.conversion import read_batches

# Lengths of the 52,000 Alpaca rows as GPT-4 answered them: 60 characters of instruction, 25 of input in two rows of
# five, 700 of output at the mean; 841 bytes a line. One row in nine has a character that is not ASCII.
MEAN_OUTPUT = 110  # words
WORDS = "the a of to model data row word time year people world answer question write list make find good new text at"
FOREIGN = " 数据 été"


def write_rows(path: Path, number: int, seed: int = 0) -> None:
    """Write `number` different Alpaca rows to the JSONL file `path`; the lengths of outputs vary as real ones do."""
    draw, words = random.Random(seed), WORDS.split()
    texts = [" ".join(draw.choices(words, k=max(3, int(draw.expovariate(1 / MEAN_OUTPUT))))) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            instruction = f"{i}: {' '.join(draw.choices(words, k=12))}"
            extra = " ".join(draw.choices(words, k=13)) if i % 5 < 2 else ""
            output = f"{draw.choice(texts)} {draw.choice(words)} {draw.choice(texts)[:200]}"
            output += FOREIGN if i % 9 == 0 else ""
            record = {"instruction": instruction, "input": extra, "output": output}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def seconds_of_read_batches(path: Path) -> tuple[float, int]:
    """(seconds, rows) from the file to tables of validated conversations, starting the processes included."""
    return _timed(lambda: sum(len(batch.table) for batch in read_batches(path)))


def seconds_of_datasets_map(path: Path) -> tuple[float, int]:
    """(seconds, rows) for the usual way: load the file and map a function over its rows, here with one process."""
    import datasets

    datasets.disable_progress_bars()

    def convert(record: dict[str, Any]) -> dict[str, Any]:
        prompt = f"{record['instruction']}\n{record['input']}" if record["input"] else record["instruction"]
        texts = {"user": prompt.strip(), "assistant": record["output"].strip()}
        if not all(texts.values()):
            raise ValueError("a text is empty")
        return {"messages": [{"role": role, "content": text} for role, text in texts.items()]}

    with tempfile.TemporaryDirectory() as cache:

        def run() -> int:
            loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
            return len(loaded.map(convert, remove_columns=loaded.column_names))

        return _timed(run)


def _timed(run: Callable[[], int]) -> tuple[float, int]:
    began = time.perf_counter()
    rows = run()
    return time.perf_counter() - began, rows


def main(number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, number)
        print(f"| {number:,} rows, {path.stat().st_size / number:.0f} bytes each | rows/s |\n|---|---|")
        for name, measure in (("read_batches", seconds_of_read_batches), ("datasets.map", seconds_of_datasets_map)):
            seconds, rows = measure(path)
            print(f"| {name} | {rows / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
