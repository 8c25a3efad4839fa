"""`make bench-data`: rows a second of ingest and prepare, next to `datasets.map` and datasketch on the same rows.

Formatting (JSONL to shards) with exact duplicates, near duplicates, then the whole prepare stage with the sample's base
model: first, again, and with 1 % new rows. The time to start processes counts.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.duplicates import near_duplicates
from pipeline.data.formats import read_rows
from pipeline.data.shards import tabulate, write_shards
from pipeline.data.shingles import LANES, WORDS, signature_version, signatures
from pipeline.settings import load_params
from tests.bench.measuring import header, row, timed

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PEER_ROWS = 10_000  # what datasketch gets through in seconds
THRESHOLD, BATCH = 0.8, 2000


def main(sizes: tuple[int, ...], prepared: int) -> None:
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as folder:
        _formatting(Path(folder), sizes)
        _near_duplicates([size for size in sizes if size <= 100_000])
        _preparing(Path(folder), prepared)


def write_rows(path: Path, number: int, seed: int = 0) -> None:
    """Write different Alpaca rows, as long as those that GPT-4 answered: 841 bytes at the mean."""
    draw, words = random.Random(seed), ["the", "a", "of", "model", "data", "word", "time", "people", "answer", "make"]
    texts = [" ".join(draw.choices(words, k=max(3, int(draw.expovariate(1 / 110))))) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            record = {"instruction": f"{i}: {' '.join(draw.choices(words, k=12))}"}
            record["input"] = " ".join(draw.choices(words, k=13)) if i % 5 < 2 else ""
            record["output"] = f"{draw.choice(texts)} {draw.choice(texts)[:200]}{' 数据 été' if i % 9 == 0 else ''}"
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _formatting(folder: Path, sizes: tuple[int, ...]) -> None:
    header("formatting and exact duplicates", "rows", "rows/s")
    path = folder / "rows.jsonl"
    for size in sizes:
        write_rows(path, size)
        row("retune", f"{size:,}", f"{size / timed(lambda: _format(path, folder / 'shards'))[0]:,.0f}")
    seconds, rows = timed(lambda: _with_datasets_map(path, folder / "cache"))
    row("datasets.map, which looks for no duplicates", f"{rows:,}", f"{rows / seconds:,.0f}")


def _format(path: Path, shards: Path, name: str = "rows") -> int:
    """Write the shards of `path` as `retune ingest` does; returns how many different conversations it has."""
    shards.mkdir(exist_ok=True)
    contents = []

    def counted() -> Iterator[pa.Table]:
        for table in tabulate(read_rows(path), []):
            contents.extend(table["content"].chunks)
            yield table

    write_shards(counted(), shards, name)
    return len(pa.chunked_array(contents).combine_chunks().dictionary_encode().dictionary)


def _with_datasets_map(path: Path, cache: Path) -> int:
    import datasets

    def convert(record: dict[str, Any]) -> dict[str, Any]:
        prompt = f"{record['instruction']}\n{record['input']}".strip()
        turns = {"user": prompt, "assistant": record["output"].strip()}
        if not all(turns.values()):
            raise ValueError("a text is empty")
        return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    return len(loaded.map(convert, remove_columns=loaded.column_names))


def made_up_texts(count: int) -> list[str]:
    """Texts as long as Alpaca's (median 85 words), with a language's word frequencies; every tenth is a copy of an
    earlier one with up to 10 % of its words changed."""
    draw = random.Random(42)
    vocabulary = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=min(12, 2 + rank % 11))) for rank in range(30_000)]
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(vocabulary))))
    texts: list[str] = []
    for _ in range(count):
        if texts and draw.random() < 0.1:
            words = draw.choice(texts).split()
            for _ in range(int(len(words) * draw.choice((0, 0.02, 0.03, 0.05, 0.1)))):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        else:
            words = draw.choices(vocabulary, cum_weights=weights, k=min(500, max(8, int(draw.lognormvariate(4.44, 1)))))
        texts.append(" ".join(words))
    return texts


def _near_duplicates(sizes: list[int]) -> None:
    texts = made_up_texts(max(*sizes, PEER_ROWS))
    header("near duplicates", "rows", "rows/s", "found")
    with ProcessPoolExecutor(2) as workers:
        list(workers.map(_load, range(2)))

        def with_retune(rows: list[str]) -> int:
            batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
            signed = np.concatenate(list(workers.map(signatures, batches)))
            unprotected = np.zeros(len(rows), dtype=bool)
            duplicates = near_duplicates(signed, rows.__getitem__, np.arange(len(rows)), unprotected, THRESHOLD)
            return int((duplicates.duplicate_of >= 0).sum())

        ways: list[tuple[str, Callable[[list[str]], int], list[str]]]
        ways = [("retune, 2 processes", with_retune, texts[:size]) for size in sizes]
        for name, way, rows in [("datasketch, 1 process", _with_datasketch, texts[:PEER_ROWS]), *ways]:
            seconds, duplicates = timed(lambda way=way, rows=rows: way(rows))  # type: ignore[misc]
            row(name, f"{len(rows):,}", f"{len(rows) / seconds:,.0f}", f"{duplicates:,}")


def _load(_: int) -> str:
    return signature_version()


def _with_datasketch(rows: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

    index, duplicates = MinHashLSH(threshold=THRESHOLD, num_perm=LANES), 0
    for i, text in enumerate(rows):
        words = text.lower().split()
        sketch = MinHash(num_perm=LANES)
        starts = range(max(1, len(words) - WORDS + 1))
        sketch.update_batch([" ".join(words[start : start + WORDS]).encode() for start in starts])
        if index.query(sketch):
            duplicates += 1
        else:
            index.insert(i, sketch)
    return duplicates


def _preparing(folder: Path, rows: int) -> None:
    from pipeline.prepare import prepare  # here, since spawned processes import this module again, and torch with it

    header("prepare, tokenising included", "rows", "rows/s")
    params = load_params().prepare.model_copy(update={"max_length": 2048})
    for name, number in (("first", rows), ("again", 0), ("with 1 % new rows", rows // 100)):
        if number:
            write_rows(folder / "new.jsonl", number, seed=number)
            _format(folder / "new.jsonl", folder / "data", name)
        seconds, _ = timed(lambda: prepare(params, folder / "data", folder / "dataset", folder / "prepared"))
        row(name, f"{rows:,}", f"{rows / seconds:,.0f}")


if __name__ == "__main__":
    given = [int(number) for number in sys.argv[1:]]
    main(tuple(given) or SIZES, given[-1] if given else 50_000)
