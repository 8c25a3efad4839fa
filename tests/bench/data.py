"""`make bench-data`: rows a second of ingest and prepare beside their peers on the same rows in the same run.

Formatting (JSONL to shards) with exact duplicates beside `datasets.map` row by row, near duplicates beside
datasketch, then the whole prepare stage with the sample's base model: first, again, and with 1 % new rows. Memory is
that of all processes.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from pipeline.data.conversion import read_batches
from pipeline.data.shards import ShardWriter
from pipeline.settings import load_params
from tests.bench import duplicates as bench_duplicates
from tests.bench.ingest import seconds_of_datasets_map, write_rows

SIZES = (1_000, 10_000, 100_000, 1_000_000)


def main(sizes: tuple[int, ...], prepared: int) -> None:
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        _formatting(Path(folder), sizes)
        print()
        sys.argv[1:] = []
        bench_duplicates.main()
        print()
        _preparing(Path(folder), prepared)


def _formatting(folder: Path, sizes: tuple[int, ...]) -> None:
    print("| formatting and exact duplicates | rows | rows/s | peak memory of all processes |\n|---|---|---|---|")
    path = folder / "rows.jsonl"
    took = []
    for size in sizes:
        write_rows(path, size)
        seconds, peak = _measured(lambda: _format(path, folder / "shards"))
        took.append(seconds)
        print(f"| retune | {size:,} | {size / seconds:,.0f} | {peak / 2**30:.2f} GiB |", flush=True)
    seconds, rows = seconds_of_datasets_map(path)
    print(f"| datasets.map, which looks for no duplicates | {rows:,} | {rows / seconds:,.0f} | |", flush=True)
    if len(sizes) > 2:  # the start of processes is no cost of a row
        slope = np.polyfit(np.log(sizes[1:]), np.log(took[1:]), 1)[0]
        print(f"\nSlope of retune's time over rows from {sizes[1]:,} on, both as logarithms: {slope:.2f}")


def _format(path: Path, shards: Path, name: str = "rows") -> int:
    """Write the shards of `path` as `retune ingest` does; how many different conversations it holds."""
    shards.mkdir(exist_ok=True)
    writer, contents = ShardWriter(shards, name), []
    for batch in read_batches(path):
        writer.add(batch.table)
        contents.append(batch.table["content"])
    writer.close()
    seen = pa.chunked_array([chunk for column in contents for chunk in column.chunks]).combine_chunks()
    return len(seen.dictionary_encode().dictionary)


def _preparing(folder: Path, rows: int) -> None:
    print("| prepare, tokenising included | rows | rows/s | of the first | peak memory of all processes |")
    print("|---|---|---|---|---|")
    from pipeline.prepare import prepare  # here, since spawned processes import this module again, and torch with it

    params = load_params().prepare.model_copy(update={"max_length": 2048})
    data, cache = folder / "data", folder / "cache"
    write_rows(folder / "a.jsonl", rows)
    _format(folder / "a.jsonl", data)
    first = 0.0
    for name in ("first", "again", "with 1 % new rows"):
        if name.startswith("with"):
            write_rows(folder / "b.jsonl", rows // 100, seed=1)
            _format(folder / "b.jsonl", data, "new")
        seconds, peak = _measured(lambda: prepare(params, data, folder / "dataset", cache))
        first = first or seconds
        share = f"{seconds / first:.0%}"
        print(f"| {name} | {rows:,} | {rows / seconds:,.0f} | {share} | {peak / 2**30:.2f} GiB |", flush=True)


def _measured(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of `run`, and the most bytes that this process and its children held at once (proportional set size)."""
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        me = psutil.Process()
        while not over.wait(0.5):  # adding up the pages of a process takes it some time
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        run()
    finally:
        seconds = time.perf_counter() - began
        over.set()
        watcher.join()
    return seconds, peak


if __name__ == "__main__":
    given = [int(number) for number in sys.argv[1:]]
    main(tuple(given) or SIZES, given[-1] if given else 50_000)
