"""`make bench-data`, the part on near duplicates: rows a second beside datasketch, on the same made-up rows.

Rows have the lengths of Alpaca's (median 85 words, mean 128), words as frequent as those of a language, and every tenth
is a copy of an earlier row with 0 to 10 % of its words changed. Needs the development dependencies.
"""

import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate

import numpy as np

from pipeline.data.duplicates import near_duplicates
from pipeline.data.shingles import LANES, WORDS, Signatures, signature_version, signatures

THRESHOLD = 0.8
BATCH = 2000  # rows signed at once
PEER_ROWS = 10_000  # what a peer gets through in seconds


def made_up_rows(count: int, seed: int = 42) -> list[str]:
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=min(12, 2 + rank % 11))) for rank in range(30_000)]
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(vocabulary))))
    rows: list[str] = []
    for _ in range(count):
        if rows and draw.random() < 0.1:
            row = draw.choice(rows).split()
            for _ in range(int(len(row) * draw.choice((0, 0.02, 0.03, 0.05, 0.1)))):
                row[draw.randrange(len(row))] = draw.choice(vocabulary)
        else:
            length = min(500, max(8, int(draw.lognormvariate(4.44, 0.98))))
            row = draw.choices(vocabulary, cum_weights=weights, k=length)
        rows.append(" ".join(row))
    return rows


def with_retune(rows: list[str], workers: ProcessPoolExecutor) -> tuple[int, float]:
    """Duplicates found, and CPU seconds of the workers, which make the signatures."""
    signed = np.empty((len(rows), LANES), np.uint16)
    busy = 0.0
    batches = (rows[at : at + BATCH] for at in range(0, len(rows), BATCH))
    for place, (batch, seconds) in enumerate(workers.map(_signed, batches)):
        signed[place * BATCH : place * BATCH + len(batch)] = batch
        busy += seconds

    unprotected = np.zeros(len(rows), dtype=bool)
    found = near_duplicates(signed, rows.__getitem__, np.arange(len(rows)), unprotected, THRESHOLD)
    return int((found.duplicate_of >= 0).sum()), busy


def with_datasketch(rows: list[str]) -> tuple[int, float]:
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

    index = MinHashLSH(threshold=THRESHOLD, num_perm=LANES)
    found = 0
    for row, text in enumerate(rows):
        words = text.lower().split()
        runs = [words[at : at + WORDS] for at in range(max(1, len(words) - WORDS + 1))]
        sketch = MinHash(num_perm=LANES)
        sketch.update_batch([" ".join(run).encode() for run in runs])
        if index.query(sketch):
            found += 1
        else:
            index.insert(row, sketch)
    return found, 0.0


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [1_000, 10_000, 100_000]
    rows = made_up_rows(max(*sizes, PEER_ROWS))
    with ProcessPoolExecutor(2) as workers:
        list(workers.map(_warm, range(2)))
        _warm(0)
        few = rows[:PEER_ROWS]
        print("| near duplicates | rows | rows/s | CPU µs a row | found |\n|---|---|---|---|---|")
        _line("datasketch, 1 process", few, with_datasketch)
        retune = partial(with_retune, workers=workers)
        took = [_line("retune, 2 processes", rows[:size], retune) for size in sizes]
    slope = np.polyfit(np.log(sizes), np.log(took), 1)[0]
    print(f"\nSlope of retune's CPU time over rows, both as logarithms: {slope:.2f}")


def _line(name: str, rows: list[str], run: Callable[[list[str]], tuple[int, float]]) -> float:
    """Print a line of the table; the CPU seconds that the run took."""
    start, cpu_start = time.perf_counter(), time.process_time()
    found, busy = run(rows)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start + busy
    count = len(rows)
    print(f"| {name} | {count:,} | {count / seconds:,.0f} | {cpu / count * 1e6:,.0f} | {found:,} |", flush=True)
    return cpu


def _signed(rows: list[str]) -> tuple[Signatures, float]:
    start = time.process_time()
    return signatures(rows), time.process_time() - start


def _warm(_: int) -> str:
    time.sleep(0.2)  # long enough for each worker to get one
    return signature_version()


if __name__ == "__main__":
    main()
